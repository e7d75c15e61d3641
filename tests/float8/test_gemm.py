"""The two FP8 GEMMs against float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from titan_fp8.float8.formats import E4M3, E5M2, saturating_cast
from titan_fp8.float8.kernels.gemm import bmm, scaled_mm


def float8(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return saturating_cast(x, 20.0, dtype)


def roundings(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What float32 may lose: products of FP8 are exact, K - 1 sums and at most 5 scalings round, each by 2^-24."""
    return (a.shape[-1] + 4) * 2.0**-24 * (a.abs() @ b.abs())


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    ("left", "right"), [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=lambda d: str(d).removeprefix("torch.")
)
def test_scaled_mm_divides_by_both_scales(left, right, fast):
    a, b = float8(48, 64, dtype=left, seed=1), float8(32, 64, dtype=right, seed=2).t()
    assert b.stride() == (1, 64)
    scale_a, scale_b = torch.tensor(20.3), torch.tensor(0.7)
    exact_a, exact_b = a.double() / scale_a.double(), b.double() / scale_b.double()
    exact = exact_a @ exact_b
    for dtype, half_ulp, autocast in (
        (torch.float32, 0.0, False), (torch.bfloat16, 2.0**-8, False), (torch.float32, 0.0, True),
    ):  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            c = scaled_mm(a, b, 1 / scale_a, 1 / scale_b, dtype, fast)
        assert c.dtype == dtype and c.shape == (48, 32)
        allowed = roundings(exact_a, exact_b) * (1 + half_ulp) + half_ulp * exact.abs()
        assert ((c.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize(("left", "right"), [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)])
def test_bmm_is_the_product_of_the_values(left, right):
    a, b = float8(3, 48, 64, dtype=left, seed=4), float8(3, 32, 64, dtype=right, seed=5).transpose(1, 2)
    exact = a.double() @ b.double()
    for autocast in (False, True):  # must not round the operands' product to bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            c = bmm(a, b)
        assert c.dtype == torch.float32
        assert ((c.double() - exact).abs() <= roundings(a.double(), b.double())).all()


def test_bmm_keeps_nan():
    a, b = float8(1, 16, 16, dtype=E4M3, seed=6), float8(1, 16, 16, dtype=E4M3, seed=7)
    a.view(torch.uint8)[0, 3, 5] = 0x7F
    c = bmm(a, b)
    assert c[0, 3].isnan().all() and c[0, :3].isfinite().all() and c[0, 4:].isfinite().all()


def test_bmm_is_a_proper_operator():
    a, b = float8(2, 16, 32, dtype=E5M2, seed=8), float8(2, 32, 16, dtype=E4M3, seed=9)
    # "test_schema" is left out: torch's own comparison of arguments cannot multiply float8
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for args in ((a, b), (a.transpose(1, 2), b.transpose(1, 2))):
        torch.library.opcheck(bmm, args, test_utils=checks)


def test_bmm_counts_two_flops_per_multiply_add():
    a, b = float8(2, 16, 32, dtype=E4M3, seed=10), float8(2, 32, 48, dtype=E4M3, seed=11)
    with FlopCounterMode(display=False) as counter:
        bmm(a, b)
    assert counter.get_total_flops() == 2 * 2 * 16 * 32 * 48
