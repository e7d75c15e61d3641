"""The formats against tables written out from their bit fields; the cast bit for bit against rounding by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from titan_fp8.float8.formats import (
    E4M3,
    E5M2,
    FP8_MAX,
    amax,
    is_fp8,
    saturating_cast,
    scale_from_amax,
    short_name,
)

BOTH = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])


@BOTH
def test_every_code_stands_for_what_its_bits_say(fp8, dtype):
    bits = torch.arange(256, dtype=torch.uint8)
    table = torch.tensor([fp8.decode(code, dtype) for code in range(256)])
    torch.testing.assert_close(bits.view(dtype).float(), table, rtol=0, atol=0, equal_nan=True)
    finite = table[table.isfinite()]
    assert finite.max() == FP8_MAX[dtype]
    assert table.isnan().sum() == {E4M3: 2, E5M2: 6}[dtype]
    assert table.isinf().sum() == {E4M3: 0, E5M2: 2}[dtype]
    assert finite[finite > 0].min() == {E4M3: 2**-9, E5M2: 2**-16}[dtype]


def test_names():
    assert (short_name(E4M3), short_name(E5M2)) == ("e4m3", "e5m2")
    assert is_fp8(E4M3) and is_fp8(E5M2) and not is_fp8(torch.bfloat16)


def hard_cases(fp8, dtype) -> torch.Tensor:
    """float32: every value, every midpoint, one ulp on either side of both, and what lies beyond; both signs."""
    values = fp8.positive_values(dtype).float()
    middles = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, middles])
    zero, infinity = torch.tensor(0.0), torch.tensor(torch.inf)
    limit = values[-1]
    beyond = limit * torch.tensor([1 + 2**-20, 1.02, 1 + 2.0**-4, 1.07, 1 + 2.0**-3, 1.13, 2, 1e6, 1e30])
    tiny = torch.tensor([2.0**-149, 2.0**-127, 2.0**-126, 3.4e38])
    x = torch.cat([points, points.nextafter(zero), points.nextafter(infinity), beyond, tiny, infinity[None]])
    return torch.cat([x, -x])


@BOTH
def test_cast_rounds_to_nearest_even_and_saturates(fp8, dtype):
    x = hard_cases(fp8, dtype)
    got = fp8.codes(saturating_cast(x, 1.0, dtype))
    assert torch.equal(got, fp8.encode(x.double(), dtype))


@BOTH
def test_cast_of_what_is_not_finite_and_of_zeros(fp8, dtype):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    for scale in (1.0, torch.tensor(3.0), torch.tensor(2.0**-126)):
        q = saturating_cast(x, scale, dtype)
        largest = FP8_MAX[dtype]
        assert q[0].float().isnan()
        assert q[1:3].float().tolist() == [largest, -largest]
        assert fp8.codes(q)[3:].tolist() == [0x00, 0x80]


@BOTH
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_scale_multiplies_in_float32(fp8, dtype, source):
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(1 << 14, generator=generator) * 3).to(source)
    scale = torch.tensor(FP8_MAX[dtype] / 7.3)
    # numpy's float32 product, rounded once more by hand
    product = x.float().numpy() * np.float32(scale.item())
    assert product.dtype == np.float32
    expected = fp8.encode(torch.from_numpy(product).double(), dtype)
    assert torch.equal(fp8.codes(saturating_cast(x, scale, dtype)), expected)
    assert torch.equal(fp8.codes(saturating_cast(x, scale.item(), dtype)), expected)
    # a product rounded to bfloat16 on the way gives other codes: the test would see it
    twice = fp8.encode((x.bfloat16() * scale.bfloat16()).double(), dtype)
    assert (twice != expected).any()


@BOTH
def test_scale_maps_amax_to_the_largest_number(fp8, dtype):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(2)).exp() * 10
    scale = scale_from_amax(x, FP8_MAX[dtype])
    exact = FP8_MAX[dtype] / x.double()
    # a reciprocal and a product, each rounded once (half an ulp, 2^-24)
    assert ((scale - exact).abs() <= 2.0**-23 * exact).all()
    assert (saturating_cast(x, scale, dtype).float() == FP8_MAX[dtype]).all()
    for margin in (1, 3, 8):
        q = saturating_cast(x, scale_from_amax(x, FP8_MAX[dtype], margin), dtype)
        assert (q.float() == FP8_MAX[dtype] / 2**margin).all()


@BOTH
@pytest.mark.parametrize("margin", [0, 8])
def test_power_of_two_scale_is_the_next_one_below(dtype, margin):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(3)).exp() * 10
    x[:3] = torch.tensor([FP8_MAX[dtype], 1e-38, 3e38])
    exact = scale_from_amax(x, FP8_MAX[dtype], margin)
    scale = scale_from_amax(x, FP8_MAX[dtype], margin, power_of_two=True)
    assert (scale.frexp().mantissa == 0.5).all()
    assert ((scale <= exact) & (exact < 2 * scale)).all()
    assert scale[0] == 2.0**-margin


@pytest.mark.parametrize("power_of_two", [False, True])
def test_scale_of_amaxes_that_say_nothing(power_of_two):
    nothing = torch.tensor([0.0, torch.inf, torch.nan])
    assert scale_from_amax(nothing, 448.0, power_of_two=power_of_two).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("margin", [0, 8])  # 8: the most that the configuration allows
@pytest.mark.parametrize("power_of_two", [False, True])
def test_scale_and_its_reciprocal_stay_normal_numbers(margin, power_of_two):
    smallest = torch.finfo(torch.float32).smallest_normal
    extreme = torch.tensor([2.0**-149, 1e-40, smallest, 1e30, torch.finfo(torch.float32).max])
    for largest in (448.0, 57344.0):
        scale = scale_from_amax(extreme, largest, margin, power_of_two)
        for number in (scale, scale.reciprocal()):
            assert (number.isfinite() & (number >= smallest)).all()


def test_scale_takes_one_format_per_tensor():
    amaxes = torch.tensor([2.0, 2.0, 0.0])
    scale = scale_from_amax(amaxes, torch.tensor([448.0, 57344.0, 448.0]), margin=1)
    assert scale.tolist() == [112.0, 14336.0, 1.0]


def test_amax_is_a_float32_scalar_without_gradient():
    x = torch.tensor([[1.0, -3.0], [2.0, 0.5]], dtype=torch.bfloat16, requires_grad=True)
    largest = amax(x)
    assert largest.item() == 3.0
    assert (largest.shape, largest.dtype, largest.requires_grad) == ((), torch.float32, False)
    assert amax(torch.tensor([1.0, -torch.inf])).item() == math.inf
    assert amax(torch.tensor([torch.inf, torch.nan])).isnan()
