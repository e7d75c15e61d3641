"""Activation and cast in one pass, against float64 autograd of the model's activations.

Where |computed - true| <= slack before the cast, its FP8 value lies between those of true - slack and true + slack, since
rounding is monotone: that is what `assert_rounds` checks, element by element. In float32 the logistic function is good to
(2 |u| + 5) 2^-23 of itself (u its argument, rounded three times on the way), 2^-17 for all |u| < 30; xIELU's expm1 to 2^-18
of itself (see the kernels). So z and dh are good to SLACK = 2^-16 of the largest term of the sums that they are.
"""

from __future__ import annotations

import pytest
import torch

from titan_fp8.float8.formats import E4M3, E5M2, FP8_MAX
from titan_fp8.float8.kernels.activation import (
    KINDS,
    activate,
    activate_backward,
    channel_amax,
    reference,
    reference_backward,
)
from titan_fp8.model.activations import gelu, swiglu, xielu

A_P, A_N = 0.3, -0.4
SLACK = 2.0**-16
WAYS = [*((kind, False) for kind in KINDS), ("swiglu", True)]  # (kind, smooth)


def alphas_for(kind: str, device: str = "cpu") -> torch.Tensor | None:
    if kind != "xielu":
        return None
    raw = torch.nn.functional.softplus(torch.tensor([A_P, A_N]))
    return (raw + torch.tensor([0.0, 0.5])).to(device)


def draw(rows: int, features: int, kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, dz), h a view into a wider tensor, with the points where xIELU's branches meet."""
    random = torch.Generator().manual_seed(rows + features)
    columns = features * (2 if kind == "swiglu" else 1)
    h = (2 * torch.randn(rows, columns + 32, generator=random))[:, 16:-16]
    points = [0.0, -0.0, 1e-3, -1e-3, -0.0624, -0.0626, 30.0, -30.0]
    points += [] if dtype == torch.float16 else [1e-7, -1e-7, -9e-7, -2e-6, 1e-20, -1e-20]
    h[0, : len(points)] = torch.tensor(points)
    return h.to(dtype), torch.randn(rows, features, generator=random).to(dtype)


def truth(h: torch.Tensor, dz: torch.Tensor, kind: str) -> tuple[torch.Tensor, ...]:
    """(z, size of z's terms, dh, size of dh's terms, dalphas, size of their terms), float64 on CPU."""
    h, dz = h.detach().cpu().double().requires_grad_(), dz.cpu().double()
    a = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (A_P, A_N)]
    if kind == "swiglu":
        gate, up = h.chunk(2, dim=1)
        z = swiglu(gate, up)
        size = torch.cat((dz * up * (1 + gate.abs()), dz * gate), dim=1).abs()
    else:
        z = xielu(h, a[0], a[1]) if kind == "xielu" else gelu(h)
        size = dz.abs() * (1 + h.abs())
    z.backward(dz)
    z, h_abs = z.detach(), h.detach().abs()
    if kind != "xielu":
        return z, z.abs(), h.grad, size.detach(), torch.zeros(0), torch.zeros(0)
    dalphas = torch.cat([x.grad / x.sigmoid() for x in a]).detach()
    terms = (dz * torch.where(h > 0, h.square(), h)).abs().sum().detach()
    return z, z.abs() + h_abs, h.grad, size.detach(), dalphas, terms


def assert_rounds(q: torch.Tensor, true: torch.Tensor, slack: torch.Tensor, scale: float, fp8) -> None:
    """q is (true +- slack) * scale in FP8. NaN fails."""
    q64 = q.cpu().double()
    assert (q64 >= fp8.rounded((true - slack) * scale, q.dtype)).all()
    assert (q64 <= fp8.rounded((true + slack) * scale, q.dtype)).all()


def scale_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A power of two that lets the largest numbers saturate."""
    return torch.exp2((2 * FP8_MAX[dtype] / x.abs().max()).log2().floor()).float()


def channels_for(features: int, device: str = "cpu") -> torch.Tensor:
    """Powers of two between 2^-6 and 2^6, each feature's another than its neighbour's."""
    return torch.exp2((torch.arange(features, device=device) * 5 % 13 - 6).float())


def check(h, dz, kind: str, dtype: torch.dtype, fp8, smooth: bool = False) -> tuple[torch.Tensor, ...]:
    """Both directions against float64. Returns (z8, dh8, z_scale, dh_scale)."""
    z, z_size, dh, dh_size, dalphas, terms = truth(h, dz, kind)
    alphas, device = alphas_for(kind, h.device.type), h.device
    channels = z_seen = None
    each = z.abs().amax(0)
    if smooth:  # exact: scaling by them rounds nothing
        channels, z_seen = channels_for(z.shape[1], device.type), torch.zeros(z.shape[1], device=device)
        c = channels.cpu().double()
        z, z_size, dh, dh_size = z * c, z_size * c, dh * torch.cat((c, c)), dh_size * torch.cat((c, c))
    z_scale = scale_of(z, E4M3)
    if smooth:  # what is clipped has no gradient; close to the limit it may have one
        beyond = z.abs() * z_scale / 464 - 1
        clipped, close = (torch.cat((x, x), 1) for x in (beyond > 0, beyond.abs() < 2 * SLACK))
        assert clipped.any()
        dh_size = torch.where(close, dh.abs() / SLACK, torch.where(clipped, 0.0, dh_size))
        dh = torch.where(clipped, 0.0, dh)
    dh_scale = scale_of(dh, dtype)
    seen, dh_seen = torch.zeros((), device=device), torch.zeros((), device=device)
    z8 = activate(h, alphas, z_scale.to(device), seen, kind, True, channels)
    back = (dz, h, alphas, z_scale.to(device), dh_scale.to(device))
    dh8, dh8_t, z8_t, da = activate_backward(*back, dh_seen, kind, dtype, True, channels, z_seen)
    if smooth:
        torch.testing.assert_close(z_seen.cpu().double(), each, rtol=2 * SLACK, atol=0)
    assert_rounds(z8, z, SLACK * z_size, z_scale.item(), fp8)
    assert_rounds(dh8, dh, SLACK * dh_size, dh_scale.item(), fp8)
    assert torch.equal(fp8.codes(z8_t), fp8.codes(z8.t())) and z8_t.is_contiguous()
    assert torch.equal(fp8.codes(dh8_t), fp8.codes(dh8.t())) and dh8_t.is_contiguous()
    assert seen.item() == pytest.approx(z.abs().max().item(), rel=2 * SLACK)
    assert dh_seen.item() == pytest.approx(dh.abs().max().item(), rel=2 * SLACK)
    assert da.shape == dalphas.shape
    assert ((da.cpu() - dalphas).abs() <= SLACK * terms).all()
    again = activate_backward(*back, dh_seen, kind, dtype, True, channels, z_seen)[3]
    assert torch.equal(da, again)
    return z8, dh8, z_scale, dh_scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source", "dtype"), [(torch.bfloat16, E5M2), (torch.float32, E4M3)])
def test_against_float64(kind, source, dtype, fp8):
    check(*draw(48, 80, kind, source), kind, dtype, fp8)


@pytest.mark.parametrize(("source", "dtype"), [(torch.bfloat16, E5M2), (torch.float32, E4M3)])
def test_features_with_scales_of_their_own(source, dtype, fp8):
    check(*draw(48, 80, "swiglu", source), "swiglu", dtype, fp8, smooth=True)


def assert_features_keep_their_amaxes(device: str) -> None:
    """The larger of before and now, NaN where there is one, and nothing without `record`."""
    h, dz = (x.to(device) for x in draw(48, 144, "swiglu", torch.bfloat16))
    h[40, 7] = torch.nan
    one, amax = torch.ones((), device=device), torch.zeros((), device=device)
    seen = torch.full((144,), 0.5, device=device)
    seen[3] = 1e6
    expected = torch.maximum(seen, swiglu(*h.float().chunk(2, 1)).abs().amax(0))
    back = (dz, h, None, one, one, amax, "swiglu", E5M2)
    channels = channels_for(144, device)
    activate_backward(*back, False, channels, seen)
    assert seen[3] == 1e6 and (seen == 0.5).sum() == 143
    activate_backward(*back, True, channels, seen)
    assert seen[3] == 1e6 and seen.isnan().nonzero().tolist() == [[7]]
    torch.testing.assert_close(seen, expected, rtol=2 * SLACK, atol=0, equal_nan=True)
    torch.testing.assert_close(
        channel_amax(h).nan_to_num(), expected.nan_to_num().where(seen != 1e6, channel_amax(h))
    )


def test_features_keep_their_amaxes():
    assert_features_keep_their_amaxes("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_seen_keeps_the_larger_and_record_is_obeyed(kind):
    h, dz = draw(16, 16, kind, torch.float32)
    one, alphas = torch.tensor(1.0), alphas_for(kind)
    for start, record in ((1e6, True), (0.5, False)):
        seen, dh_seen = torch.tensor(start), torch.tensor(start)
        activate(h, alphas, one, seen, kind, record)
        activate_backward(dz, h, alphas, one, one, dh_seen, kind, E5M2, record)
        assert seen.item() == dh_seen.item() == start


def assert_nan_and_inf_stay(kind: str, device: str) -> None:
    h, dz = (x.to(device) for x in draw(32, 144, kind, torch.bfloat16))
    h[3, 4], h[5, 6], dz[7, 8], dz[9, 10] = torch.nan, torch.inf, torch.nan, -torch.inf
    h[9, 10] = h[9, -134] = 1.0  # of dz = -inf: the slopes are positive (column 144 + 10 is up's, for swiglu)
    one, alphas = torch.tensor(1.0, device=device), alphas_for(kind, device)
    seen, dh_seen = torch.zeros((), device=device), torch.zeros((), device=device)
    z8 = activate(h, alphas, one, seen, kind, True)
    dh8, dh8_t, z8_t, dalphas = activate_backward(dz, h, alphas, one, one, dh_seen, kind, E5M2, True)
    assert seen.isnan() and dh_seen.isnan()
    assert z8.float().isnan().nonzero().tolist() == [[3, 4]] == z8_t.float().t().isnan().nonzero().tolist()
    assert z8[5, 6].float().abs() == FP8_MAX[E4M3]
    for q in (dh8.float(), dh8_t.float().t()):
        assert q[3, 4].isnan() and q[7, 8].isnan() and q[9, 10] == -FP8_MAX[E5M2]
        assert not q.isinf().any()
    if kind == "xielu":
        assert dalphas.isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_stay(kind):
    assert_nan_and_inf_stay(kind, "cpu")


def both(h, dz, alphas, z_scale, dh_scale, seen, dh_seen, kind, channels=None, z_seen=None):
    z8 = activate(h, alphas, z_scale, seen, kind, True, channels)
    back = (dz, h, alphas, z_scale, dh_scale, dh_seen, kind, E5M2, True, channels, z_seen)
    return z8, *activate_backward(*back)


def assert_compiles(kind: str, device: str, backend: str, fp8, smooth: bool = False) -> None:
    h, dz = (x.to(device) for x in draw(32, 48, kind, torch.bfloat16))
    scale, dh_scale = torch.tensor(20.0, device=device), torch.tensor(900.0, device=device)
    results, amaxes, each = [], [], []
    for run in (both, torch.compile(both, backend=backend, fullgraph=True)):
        amaxes.append(torch.zeros(2, device=device))
        each.append(torch.zeros(96, device=device))
        extra = (
            (channels_for(48, device), each[-1][48:]) if smooth else ()
        )  # a view, as of one rank's features
        results.append(
            run(h, dz, alphas_for(kind, device), scale, dh_scale, amaxes[-1][0], amaxes[-1][1], kind, *extra)
        )
    assert torch.equal(*each) and bool(each[0].any()) is smooth and not each[0][:48].any()
    for eager, compiled in zip(*results, strict=True):
        assert eager.dtype == compiled.dtype and torch.equal(fp8.codes(eager), fp8.codes(compiled))
    assert torch.equal(*amaxes) and (amaxes[0] > 0).all()


@pytest.mark.parametrize(("kind", "smooth"), WAYS)
def test_compiles_without_a_break(kind, smooth, fp8):
    assert_compiles(kind, "cpu", "aot_eager", fp8, smooth)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "smooth"), WAYS)
def test_kernels_compile_without_a_break(kind, smooth, fp8):
    assert_compiles(kind, "cuda", "inductor", fp8, smooth)


@pytest.mark.gpu
def test_kernels_keep_features_amaxes():
    assert_features_keep_their_amaxes("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_keep_nan_and_inf(kind):
    assert_nan_and_inf_stay(kind, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "smooth"), WAYS)
@pytest.mark.parametrize("shape", [(16, 16), (48, 200), (1040, 2064), (272, 1003)])
@pytest.mark.parametrize(("source", "dtype"), [(torch.bfloat16, E5M2), (torch.float16, E4M3)])
def test_kernels_against_float64_and_reference(kind, smooth, shape, source, dtype, fp8):
    h, dz = draw(*shape, kind, source)
    wide = torch.full((h.shape[0], h.shape[1] + 48), torch.nan, dtype=source, device="cuda")
    wide[:, 16:-32] = h.cuda()
    h, dz = wide[:, 16:-32], dz.cuda()
    # What the allocator hands out next is full of NaN.
    poison = [torch.full((n,), 0x7F, dtype=torch.uint8, device="cuda") for n in 6 * [2 * shape[0] * shape[1]]]
    del poison
    z8, dh8, z_scale, dh_scale = (x.cuda() for x in check(h, dz, kind, dtype, fp8, smooth))
    alphas, seen = alphas_for(kind, "cuda"), torch.zeros((), device="cuda")
    channels = channels_for(shape[1], "cuda") if smooth else None
    plain = reference(h, alphas, z_scale, seen, kind, True, channels)
    dh_plain = reference_backward(dz, h, alphas, z_scale, dh_scale, seen, kind, dtype, True, channels)[0]
    # Two values within 2^-16 of each other straddle a rounding boundary, at least 2^-4 of the value apart, once in 2^12.
    for ours, theirs in ((z8, plain), (dh8, dh_plain)):
        assert (ours.float() != theirs.float()).sum() <= 1 + ours.numel() // 2**12
