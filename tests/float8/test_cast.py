"""The cast of linears: q, its transpose and the amax. On a GPU the kernel equals its reference bit for bit."""

from __future__ import annotations

import pytest
import torch

from titan_fp8.float8.formats import E4M3, E5M2, saturating_cast
from titan_fp8.float8.kernels.cast import cast, cast_joined, cast_rows, reference, transpose


def draw(*shape: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).to(device, dtype)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_both_layouts_and_the_amax(dtype):
    x, scale, seen = draw(33, 70, dtype=torch.bfloat16), torch.tensor(150.0), torch.tensor(0.5)
    q, qt = cast(x, scale, seen, dtype, True, True, True)
    assert torch.equal(q.float(), saturating_cast(x, scale, dtype).float())
    assert torch.equal(qt.float(), q.float().t()) and qt.is_contiguous()
    assert float(seen) == float(x.abs().max())


def test_only_what_is_asked_for():
    x, scale, seen = draw(16, 32, dtype=torch.float32), torch.tensor(1.0), torch.tensor(0.0)
    q, qt = cast(x, scale, seen, E4M3, False, True, False)
    assert q.shape == (16, 32) and qt.numel() == 0 and float(seen) == 0
    q, qt = cast(x, scale, seen, E4M3, False, False, True)
    assert q.numel() == 0 and qt.shape == (32, 16)


def test_seen_keeps_the_larger_and_nan():
    x, scale = draw(16, 16, dtype=torch.float32), torch.tensor(1.0)
    seen = torch.tensor(1e6)
    cast(x, scale, seen, E4M3, True, True, False)
    assert float(seen) == 1e6
    x[3, 4] = torch.nan
    q, _ = cast(x, scale, seen, E4M3, True, True, False)
    assert seen.isnan() and q.float().isnan().sum() == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rows", [(48,), (64, 33), (16, 33, 160), (16, 48, 32, 5)])
def test_joined_matrices_are_casts_one_below_the_other(rows, device):
    matrices = [draw(m, 72, dtype=torch.bfloat16, device=device) for m in rows]
    matrices[-1][3, 5] = torch.nan
    scale, seen = torch.tensor(100.0, device=device), torch.tensor(0.0, device=device)
    q, qt = reference(torch.cat(matrices), scale, seen, E4M3, False, True, True)
    for transposed, expected in ((False, q), (True, qt)):
        got = cast_joined(matrices, scale, E4M3, transposed)
        assert got.is_contiguous() and torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("transposed", [False, True])
def test_columns_may_have_scales_of_their_own(device, transposed):
    x = draw(48, 72, dtype=torch.bfloat16, device=device)
    scales = torch.exp2(torch.arange(72, device=device) % 15 - 3.0)
    expected = saturating_cast(x.float() * scales, 1.0, E4M3)
    got = cast_joined([x], scales, E4M3, transposed)
    assert torch.equal(got.float(), (expected.t() if transposed else expected).float())
    if not transposed:
        assert torch.equal(cast_rows(x, scales, E4M3).float(), expected.float())
    again = cast_joined([got], scales, E4M3, transposed)  # FP8 already: not scaled again
    assert torch.equal(again.float(), expected.float() if transposed else got.float())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(48, 72), (64, 256), (1024, 512)])
def test_bytes_of_fp8_are_transposed(shape, dtype, device):
    """All that a saturating cast makes, NaN among it; sizes that the kernel takes in whole vectors, and one that is not."""
    codes = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes = torch.where(codes.view(dtype).float().isfinite(), codes, 0x7F).to(device)
    got = transpose(codes.view(dtype))
    assert got.is_contiguous() and torch.equal(got.view(torch.uint8), codes.t())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_rows_are_cast_as_the_reference_does(rows, dtype, device):
    x, scale = draw(rows, 2100, dtype=dtype, device=device), torch.tensor(150.0, device=device)
    if rows:
        x[0, 0], x[-1, -1] = torch.nan, torch.inf
    got = cast_rows(x, scale, E4M3)
    assert got.shape == x.shape
    assert torch.equal(got.view(torch.uint8), saturating_cast(x, scale, E4M3).view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(33, 70), (16, 16), (129, 1000), (8192, 4096)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strided", [False, True])
def test_kernel_equals_reference_bit_for_bit(shape, dtype, source, strided):
    x = draw(*shape, dtype=source, device="cuda")
    x[0, 0], x[1, 1], x[-1, -1], x[2, 0] = torch.nan, torch.inf, 0.0, 1e-9
    if strided:
        x = x.t()
    scale, a, b = torch.tensor(150.0).cuda(), torch.tensor(0.5).cuda(), torch.tensor(0.5).cuda()
    for straight, transposed in ((True, True), (True, False), (False, True)):
        ours = cast(x, scale, a, dtype, True, straight, transposed)
        plain = reference(x, scale, b, dtype, True, straight, transposed)
        for mine, theirs in zip(ours, plain, strict=True):
            same = (mine.view(torch.uint8) == theirs.view(torch.uint8)) | (
                mine.float().isnan() & theirs.float().isnan()
            )
            assert same.all()
        assert a.isnan() and b.isnan()
