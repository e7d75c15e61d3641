"""Sums beside float64, what is not finite, the counts of a cast."""

from __future__ import annotations

import math

import pytest
import torch

from titan_fp8.float8.formats import E4M3, E5M2, FP8_MAX, ROUNDS_TO_ZERO, saturating_cast
from titan_fp8.float8.kernels import moments
from titan_fp8.float8.kernels.moments import (
    AMAX,
    ELEMENTS,
    FOURTHS,
    NONFINITE,
    SATURATED,
    SQUARES,
    SUM,
    UNDERFLOWED,
    Cast,
    look,
    reference,
    some_rows,
)

B, S, N = 3, 40, 96
# Per row float32 divides, squares twice and adds N terms of one sign: 4 + N - 1 roundings of 2^-24 at most.
RELATIVE = (N + 4) * 2.0**-24


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    """Outliers in some channels, so that fourth powers span ten decades."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x[..., ::7] *= 300
    return x.bfloat16()


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_sums_are_float64s(size):
    """Also where a fourth power lies far outside of float32."""
    x = (heavy(B, S, N).float() * size).bfloat16()
    sums, wide = reference(x, B), x.double()
    assert sums.dtype == torch.float64 and sums.shape == (B, 8)
    for column, power in ((SQUARES, 2), (FOURTHS, 4)):
        torch.testing.assert_close(sums[:, column], wide.pow(power).sum((1, 2)), rtol=RELATIVE, atol=0)
    bound = RELATIVE * wide.abs().sum((1, 2))  # terms of both signs: relative to the sum of magnitudes
    assert ((sums[:, SUM] - wide.sum((1, 2))).abs() <= bound).all()
    assert torch.equal(sums[:, AMAX], wide.abs().amax((1, 2)))
    assert (sums[:, ELEMENTS] == S * N).all() and not sums[:, NONFINITE : SATURATED + 1].any()


def test_what_is_not_finite_is_counted_and_left_out():
    x = heavy(B, S, N)
    holes = x.clone()
    for at, value in (((0, 3, 5), torch.nan), ((0, 3, 6), torch.inf), ((2, 0, 0), -torch.inf)):
        x[at], holes[at] = value, 0.0
    got, expected = reference(x, B), reference(holes, B)
    assert got[:, NONFINITE].tolist() == [2, 0, 1]
    assert got[:, ELEMENTS].tolist() == [S * N - 2, S * N, S * N - 1]
    for column in (SUM, SQUARES, FOURTHS, AMAX):
        assert torch.equal(got[:, column], expected[:, column])
    nothing = reference(torch.full((B, 2, 4), torch.nan), B)
    assert nothing.isfinite().all() and (nothing[:, NONFINITE] == 8).all() and not nothing[:, AMAX].any()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_counts_of_a_cast_are_those_of_the_cast(dtype):
    x = heavy(B, S, N) * torch.logspace(-6, 1, N).bfloat16()
    x[0, 0, :5] = 0.0  # stays zero: no underflow
    scale = torch.tensor(FP8_MAX[dtype] / 100)
    x[1, 0, 0] = ROUNDS_TO_ZERO[dtype] / float(scale)
    sums = reference(x, B, moments=False, cast=Cast(scale, FP8_MAX[dtype], ROUNDS_TO_ZERO[dtype]))
    q = saturating_cast(x, scale, dtype).float()
    saturated = ((x.float() * scale).abs() > FP8_MAX[dtype]).sum((1, 2))
    underflowed = ((q == 0) & (x != 0)).sum((1, 2))
    assert saturated.all() and underflowed.all()
    assert sums[:, SATURATED].tolist() == saturated.tolist()
    assert sums[:, UNDERFLOWED].tolist() == underflowed.tolist()
    assert not sums[:, [SUM, SQUARES, FOURTHS]].any()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_smallest_that_does_not_vanish(dtype):
    half = torch.tensor(ROUNDS_TO_ZERO[dtype])
    assert saturating_cast(half, 1.0, dtype).float() == 0
    assert saturating_cast(torch.nextafter(half, torch.tensor(1.0)), 1.0, dtype).float() > 0


def test_rows_of_several_ranks_find_their_samples():
    """Rows in the order (rank, sample, position), as a gather leaves them."""
    x = heavy(B, S, N)
    by_rank = x.unflatten(1, (2, -1)).transpose(0, 1).reshape(-1, N)
    torch.testing.assert_close(reference(by_rank, B, groups=2), reference(x, B), rtol=1e-14, atol=0)


def test_pieces_are_the_whole(monkeypatch):
    x = heavy(B, S, N)
    whole = reference(x, B)
    monkeypatch.setattr(moments, "PIECE", 7 * N)
    assert torch.equal(reference(x, B), whole)


@pytest.mark.gpu
def test_compiled_sums_on_a_gpu_are_float64s():
    """Inductor's kernels, which add in trees and divide within 2 ulps: within the bound for adding one by one."""
    rows = 4096
    x = heavy(2, 512, rows).cuda()
    scale = torch.tensor(1.0, device="cuda")

    def look(x: torch.Tensor) -> torch.Tensor:
        return reference(x, 2, cast=Cast(scale, FP8_MAX[E4M3], ROUNDS_TO_ZERO[E4M3]))

    sums, wide = torch.compile(look, fullgraph=True)(x), x.double()
    for column, power in ((SQUARES, 2), (FOURTHS, 4)):
        torch.testing.assert_close(
            sums[:, column], wide.pow(power).sum((1, 2)), rtol=(rows + 8) * 2.0**-24, atol=0
        )
    q = saturating_cast(x, scale, E4M3).float()
    assert sums[:, SATURATED].tolist() == (wide.abs() > FP8_MAX[E4M3]).sum((1, 2)).tolist()
    assert sums[:, UNDERFLOWED].tolist() == ((q == 0) & (x != 0)).sum((1, 2)).tolist()
    assert torch.equal(sums[:, AMAX], wide.abs().amax((1, 2)))


@pytest.mark.parametrize("known", [7.0, 0.5, torch.nan, torch.inf])
def test_some_rows_and_the_amax_of_all(known):
    """Rows in both orders: those at positions 0, 8, 16, ... of each stretch, whoever has it."""
    x = heavy(B, S, N)
    by_rank = x.unflatten(1, (2, -1)).transpose(0, 1).reshape(-1, N)  # stretches of 20
    heads = x.unflatten(2, (4, -1)).transpose(1, 2)
    sums = {}
    for name, (t, groups) in {"plain": (x, 1), "rows": (x.flatten(0, 1), 1), "heads": (heads, 1)}.items():
        sums[name] = torch.full((B, 1, 8), torch.nan, dtype=torch.float64)
        look(some_rows(t, B, groups), sums[name], groups, known=torch.tensor(known))
    expected = reference(x[:, ::8], B)
    expected[:, AMAX] = known if math.isfinite(known) else expected[:, AMAX]
    assert torch.equal(sums["plain"][:, 0], expected) and torch.equal(sums["rows"][:, 0], expected)
    torch.testing.assert_close(sums["heads"][:, 0], expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
    positions = [p for p in range(S) if p % 20 % 8 == 0]
    assert torch.equal(
        some_rows(by_rank, B, 2).view(2, B, -1, N).transpose(0, 1).flatten(1, 2), x[:, positions]
    )
