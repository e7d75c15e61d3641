"""Probes: sums beside float64, what is not finite, the counts of a cast, attention's rows."""

from __future__ import annotations

import pytest
import torch

from titan_fp8 import probe
from titan_fp8.float8.formats import E4M3, E5M2, FP8_MAX, ROUNDS_TO_ZERO, saturating_cast
from titan_fp8.probe import (
    AMAX,
    ELEMENTS,
    FOURTHS,
    NONFINITE,
    SATURATED,
    SQUARES,
    SUM,
    UNDERFLOWED,
    Cast,
    Observer,
    Site,
    attention_sums,
    sample_sums,
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
    sums, wide = sample_sums(x, B), x.double()
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
    got, expected = sample_sums(x, B), sample_sums(holes, B)
    assert got[:, NONFINITE].tolist() == [2, 0, 1]
    assert got[:, ELEMENTS].tolist() == [S * N - 2, S * N, S * N - 1]
    for column in (SUM, SQUARES, FOURTHS, AMAX):
        assert torch.equal(got[:, column], expected[:, column])
    nothing = sample_sums(torch.full((B, 2, 4), torch.nan), B)
    assert nothing.isfinite().all() and (nothing[:, NONFINITE] == 8).all() and not nothing[:, AMAX].any()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_counts_of_a_cast_are_those_of_the_cast(dtype):
    x = heavy(B, S, N) * torch.logspace(-6, 1, N).bfloat16()
    x[0, 0, :5] = 0.0  # stays zero: no underflow
    scale = torch.tensor(FP8_MAX[dtype] / 100)
    x[1, 0, 0] = ROUNDS_TO_ZERO[dtype] / float(scale)
    sums = sample_sums(x, B, moments=False, cast=Cast(scale, FP8_MAX[dtype], ROUNDS_TO_ZERO[dtype]))
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
    torch.testing.assert_close(sample_sums(by_rank, B, groups=2), sample_sums(x, B), rtol=1e-14, atol=0)


def test_pieces_are_the_whole(monkeypatch):
    x = heavy(B, S, N)
    whole = sample_sums(x, B)
    monkeypatch.setattr(probe, "PIECE", 7 * N)
    assert torch.equal(sample_sums(x, B), whole)


@pytest.mark.parametrize(("seq_len", "heads", "groups"), [(16, 4, 4), (200, 4, 2)])
def test_attention_rows(seq_len, heads, groups):
    """float32 logits of 32 products: each within 32 2^-24 of its size, 30; the entropy moves by twice that at most."""
    torch.manual_seed(0)
    q, k = (2 * torch.randn(2, seq_len, n, 32).bfloat16() for n in (heads, groups))
    scale = 0.25
    largest, entropy, rows = attention_sums(q, k, scale).tolist()
    wide = k.double().repeat_interleave(heads // groups, 2)
    logits = torch.einsum("bqhc,bkhc->bhqk", q.double(), wide) * scale
    logits = logits.masked_fill(torch.ones(seq_len, seq_len).triu(1).bool(), -torch.inf)
    count = min(64, seq_len)
    at = [(i + 1) * seq_len // count - 1 for i in range(count)]
    assert len(set(at)) == count and at[-1] == seq_len - 1
    logits = logits[:, :, at]
    p = logits.softmax(-1)
    expected = -(p * p.clamp(min=1e-300).log()).sum(-1)
    assert rows == 2 * heads * count == expected.numel()
    assert largest == pytest.approx(float(logits.max()), abs=1e-4)
    assert entropy / rows == pytest.approx(float(expected.mean()), abs=1e-4)


def test_a_site_looks_only_when_told():
    observer = Observer()
    site = Site(observer)
    site.sums = torch.zeros(site.room(B), dtype=torch.float64)
    x = heavy(B, S, N).requires_grad_()
    assert site(x) is x and not site.sums.any()
    observer.on = True
    assert site(x) is x and torch.equal(site.sums, sample_sums(x, B))
    before = site.sums.clone()
    site(x)  # again, as activation checkpointing does
    assert torch.equal(site.sums, before)
    site.sums.zero_()
    site.eval()
    assert site(x) is x and not site.sums.any()
    assert not site.state_dict()


@pytest.mark.gpu
def test_compiled_sums_on_a_gpu_are_float64s():
    """Inductor's kernels, which add in trees and divide within 2 ulps: within the bound for adding one by one."""
    rows = 4096
    x = heavy(2, 512, rows).cuda()
    scale = torch.tensor(1.0, device="cuda")

    def look(x: torch.Tensor) -> torch.Tensor:
        return sample_sums(x, 2, cast=Cast(scale, FP8_MAX[E4M3], ROUNDS_TO_ZERO[E4M3]))

    sums, wide = torch.compile(look, fullgraph=True)(x), x.double()
    for column, power in ((SQUARES, 2), (FOURTHS, 4)):
        torch.testing.assert_close(
            sums[:, column], wide.pow(power).sum((1, 2)), rtol=(rows + 8) * 2.0**-24, atol=0
        )
    q = saturating_cast(x, scale, E4M3).float()
    assert sums[:, SATURATED].tolist() == (wide.abs() > FP8_MAX[E4M3]).sum((1, 2)).tolist()
    assert sums[:, UNDERFLOWED].tolist() == ((q == 0) & (x != 0)).sum((1, 2)).tolist()
    assert torch.equal(sums[:, AMAX], wide.abs().amax((1, 2)))
