"""Activation and FP8 cast of a feed-forward, each direction in one pass over memory.

    forward     z = act(h)              z8 = cast(z * z_scale)
    backward    dh = dz * act'(h)       dh8 = cast(dh * dh_scale), dh8_t its transpose      z8_t: z8 transposed, made again

    xielu     z = alpha b(h) + beta h           h > 0:  alpha = alpha_p, b = h^2                          b' = 2 h
                                                h <= 0: alpha = alpha_n, b = expm1(min(h, eps)) - h       b' = expm1(h)
              act' = alpha b'(h) + beta         (eps < h <= 0: b' = -1, as autograd has it of the clamp)
              dalpha_p = sum over h > 0 of dz b(h)        dalpha_n = sum over h <= 0 of dz b(h)
    gelu      z = h s(u)                        u = 2 sqrt(2/pi) (h + 0.044715 h^3), which is the tanh form
              act' = s + h s (1 - s) u'         u' = 2 sqrt(2/pi) (1 + 3 * 0.044715 h^2)
    swiglu    z = gate s(gate) up               h = [gate | up]
              dgate = dz up s (1 + gate (1 - s))          dup = dz gate s                  dh = [dgate | dup]

Smooth-SwiGLU is swiglu with `channels`, a scale for each feature i (arXiv 2409.12517, section 4), constant to autograd. z
then leaves as c_i z_i, and dz arrives as the gradient of that: it is multiplied by c_i, and is 0 where the cast clipped z,
as the derivative there is. (Let through, the gradient of a feature 10^4 times beyond its scale was 10^4 times too large:
nothing in the forward pass had answered to it.) The backward takes, on the way, the amax of each z_i that later steps scale
it by; it sees taller stretches of a column than the forward does.

s is the logistic function. Shapes: h [M, N], z and dz [M, F]; N = F, for swiglu N = 2 F. alphas = (alpha_p, alpha_n) [2]
float32; channels [F] float32. All arithmetic is float32 and goes to FP8 without a rounding to 16 bits in between. The
forward does not keep z: the backward makes it again from h, bit for bit, and stores it as the weight's gradient wants it,
contiguous along M.

expm1(x) is exp(x) - 1 below -1/16 and a Taylor polynomial above. exp(x) - 1 is wrong by up to 2^-22 however small x is: by
as much as z itself, should h be that small, and far more than b. As it is, expm1 is good to 2^-18 of itself.

`reference` and `reference_backward` are the same in plain PyTorch, and what runs where there is no CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from titan_fp8.float8.formats import E4M3, fold_amax, saturating_cast

KINDS = ("xielu", "gelu", "swiglu")

# xIELU's constants; the slopes of GELU's u: u' = _GELU_1 + 3 _GELU_3 h^2.
_BETA, _EPS = tl.constexpr(0.5), tl.constexpr(-1e-6)
_GELU_1, _GELU_3 = tl.constexpr(1.5957691216057308), tl.constexpr(0.07135481282553182)
_LOG2_E = tl.constexpr(1.4426950408889634)
_CLIPPED = tl.constexpr(464.0)  # what is larger does not round to E4M3's 448, but is clipped to it


def _sizes(h: Tensor, kind: str) -> tuple[int, int, int]:
    """(M, N, F)."""
    assert kind in KINDS, kind
    rows, columns = h.shape
    return rows, columns, columns // 2 if kind == "swiglu" else columns


def _activation(h: Tensor, alphas: Tensor | None, kind: str) -> Tensor:
    """z [M, F] float32."""
    h = h.float()
    if kind == "gelu":
        return h * _gelu_s(h)
    if kind == "swiglu":
        gate, up = h.chunk(2, dim=1)
        return gate * torch.sigmoid(gate) * up
    assert alphas is not None
    b = torch.where(h > 0, h.square(), torch.expm1(h.clamp(max=_EPS.value)) - h)
    return torch.where(h > 0, alphas[0], alphas[1]) * b + _BETA.value * h


def _gelu_s(h: Tensor) -> Tensor:
    """s(u). With h * s(u), unlike h (1 + tanh(u / 2)) / 2, nothing cancels where h is negative."""
    return torch.sigmoid(h * (_GELU_1.value + _GELU_3.value * h.square()))


def _gradient(dz: Tensor, h: Tensor, alphas: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """(dh [M, N], dalphas [2], empty but for xielu), float32."""
    h, dz = h.float(), dz.float()
    if kind == "gelu":
        s = _gelu_s(h)
        dh = dz * (s + h * s * (1 - s) * (_GELU_1.value + 3 * _GELU_3.value * h.square()))
        return dh, dh.new_empty(0)
    if kind == "swiglu":
        gate, up = h.chunk(2, dim=1)
        s = torch.sigmoid(gate)
        dh = torch.cat((dz * up * s * (1 + gate * (1 - s)), dz * gate * s), dim=1)
        return dh, dh.new_empty(0)
    assert alphas is not None
    em1 = torch.expm1(h.clamp(max=_EPS.value))
    turn = torch.where(h > 0, 2 * h, torch.where(h > _EPS.value, -1.0, em1))
    dh = dz * (torch.where(h > 0, alphas[0], alphas[1]) * turn + _BETA.value)
    dalpha_p = torch.where(h > 0, dz * h.square(), 0.0).sum()
    return dh, torch.stack((dalpha_p, torch.where(h > 0, 0.0, dz * (em1 - h)).sum()))


def channel_gradient(dz: Tensor, z: Tensor, channels: Tensor, z_scale: Tensor) -> Tensor:
    """The gradient of z [M, F] float32 from dz, that of channels * z: 0 where the cast clipped it. NaN is kept."""
    clipped = (z * channels * z_scale).abs() > _CLIPPED.value
    return torch.where(clipped, 0.0, dz.float() * channels)


def reference(
    h: Tensor, alphas: Tensor | None, scale: Tensor, seen: Tensor, kind: str, record: bool,
    channels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """z8 [M, F] E4M3 in plain PyTorch. Updates `seen` in place if `record`."""
    z = _activation(h, alphas, kind)
    z = z if channels is None else z * channels
    if record:
        fold_amax(seen, z)
    return saturating_cast(z, scale, E4M3)


def reference_backward(
    dz: Tensor, h: Tensor, alphas: Tensor | None, z_scale: Tensor, dh_scale: Tensor, dh_seen: Tensor, kind: str,
    dh_dtype: torch.dtype, record: bool, channels: Tensor | None = None, z_seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dh8, dh8_t, z8_t, dalphas) in plain PyTorch; see `activate_backward`. Updates dh_seen and z_seen if `record`."""
    z = _activation(h, alphas, kind)
    if record and z_seen is not None:
        z_seen.copy_(torch.maximum(z_seen, z.abs().amax(0)))
    if channels is not None:
        dz = channel_gradient(dz, z, channels, z_scale)
        z = z * channels
    dh, dalphas = _gradient(dz, h, alphas, kind)
    if record:
        fold_amax(dh_seen, dh)
    dh8 = saturating_cast(dh, dh_scale, dh_dtype)
    z8 = saturating_cast(z, z_scale, E4M3)
    return dh8, dh8.t().contiguous(), z8.t().contiguous(), dalphas


# Forward and backward must give the same bits of z. So a product that goes into a sum is written as fma: left to itself,
# the compiler fuses some of them, and not the same ones in both kernels.


@triton.jit
def _exp2(x):
    """2^x to 2 ulp; results below 2^-126 are zero, which saves the three instructions that tl.exp2 spends on them."""
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _logistic(exponent):
    """1 / (1 + 2^exponent), to 2 ulp; below 2^-126 zero."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + _exp2(exponent)], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _xielu_parts(h, alphas_ptr):
    """(alpha, b, expm1(min(h, eps)))."""
    low = tl.minimum(h, _EPS, propagate_nan=tl.PropagateNan.ALL)
    square = h * h
    # For h in (eps, 0] the square is not min(h, eps)^2; both are below 1e-12, and the term before them is 1e-6.
    taylor = tl.fma(square, tl.fma(tl.fma(low, 1 / 24, 1 / 6), low, 0.5), low)
    em1 = tl.where(low > -0.0625, taylor, _exp2(low * _LOG2_E) - 1.0)
    alpha = tl.where(h > 0, tl.load(alphas_ptr), tl.load(alphas_ptr + 1))
    return alpha, tl.where(h > 0, square, em1 - h), em1


@triton.jit
def _gelu_logistic(h):
    """s(u)."""
    return _logistic(h * tl.fma(h * h, -_LOG2_E * _GELU_3, -_LOG2_E * _GELU_1))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _record_amax(x, seen_ptr):
    # Bit patterns of non-negative floats order like the floats, and NaN's lie above inf's: an integer maximum keeps NaN,
    # and an integer atomic gives the same result in any order.
    bits = tl.reduce(tl.abs(x), None, _larger).to(tl.int32, bitcast=True)
    tl.atomic_max(seen_ptr.to(tl.pointer_type(tl.int32)), bits, sem="relaxed")


@triton.jit
def _forward_kernel(
    h_ptr, alphas_ptr, channels_ptr, scale_ptr, seen_ptr, z_ptr, M, F, stride_m, stride_n,
    KIND: tl.constexpr, CHANNELS: tl.constexpr, RECORD: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (rows < M)[:, None] & (columns < F)[None, :]
    at = h_ptr + rows[:, None] * stride_m + columns[None, :] * stride_n
    h = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if KIND == "xielu":
        alpha, b, _ = _xielu_parts(h, alphas_ptr)
        z = tl.fma(alpha, b, _BETA * h)
    elif KIND == "gelu":
        z = h * _gelu_logistic(h)
    else:
        up = tl.load(at + F * stride_n, mask=inside, other=0.0).to(tl.float32)
        z = h * _logistic(-_LOG2_E * h) * up
    if CHANNELS:
        z *= tl.load(channels_ptr + columns, mask=columns < F, other=0.0)[None, :]
    if RECORD:
        # xIELU(0) is -1e-6 alpha_n, not 0.
        _record_amax(z if EVEN else tl.where(inside, z, 0.0), seen_ptr)
    z8 = (z * tl.load(scale_ptr)).to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + rows[:, None] * F + columns[None, :], z8, mask=inside)


@triton.jit
def _words(x, dtype: tl.constexpr):
    """x[i].to(dtype) of four float32 tensors, in the bytes of one uint32 tensor, the first lowest. Saturates."""
    KIND: tl.constexpr = "e4m3x2" if dtype == tl.float8e4nv else "e5m2x2"
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite." + KIND + ".f32 low, $2, $1; cvt.rn.satfinite." + KIND
        + ".f32 high, $4, $3; mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f", [x[0], x[1], x[2], x[3]], dtype=tl.uint32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _backward_kernel(
    dz_ptr, h_ptr, alphas_ptr, channels_ptr, z_scale_ptr, dh_scale_ptr, dh_seen_ptr, z_seen_ptr, dh_ptr, dh_t_ptr, z_t_ptr,
    parts_ptr, M, F, dz_stride_m, dz_stride_n, h_stride_m, h_stride_n,
    KIND: tl.constexpr, CHANNELS: tl.constexpr, RECORD: tl.constexpr, RECORD_Z: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # A thread takes rows 4 * quad + 0..3 of each of its columns: four bytes of a transposed row, exchanged as one word.
    # (Left to transpose bytes, Triton 3.6 exchanges h instead and computes all of z twice.)
    quads = tl.program_id(0).to(tl.int64) * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    height = M // 4
    inside = (quads < height)[:, None] & (columns < F)[None, :]
    dh_scale, z_scale = tl.load(dh_scale_ptr), tl.load(z_scale_ptr)
    dh_dtype: tl.constexpr = dh_ptr.dtype.element_ty
    width = F * 2 if KIND == "swiglu" else F
    largest = tl.zeros((BLOCK_M // 4, BLOCK_F), tl.float32)
    sum_p, sum_n, z_largest = largest, largest, largest
    if CHANNELS:
        channels = tl.load(channels_ptr + columns, mask=columns < F, other=0.0)[None, :]
    hs, ups, dzs = (), (), ()
    # All loads before the first store: none moves up across one, and each waits long.
    for i in tl.static_range(4):
        rows = (4 * quads + i)[:, None]
        h_at = h_ptr + rows * h_stride_m + columns[None, :] * h_stride_n
        hs += (tl.load(h_at, mask=inside, other=0.0),)
        if KIND == "swiglu":
            ups += (tl.load(h_at + F * h_stride_n, mask=inside, other=0.0),)
        dz_at = dz_ptr + rows * dz_stride_m + columns[None, :] * dz_stride_n
        dzs += (tl.load(dz_at, mask=inside, other=0.0),)
    dhs, dups, zs = (), (), ()
    for i in tl.static_range(4):
        h, dz = hs[i].to(tl.float32), dzs[i].to(tl.float32)
        dh_at = dh_ptr + (4 * quads + i)[:, None] * width + columns[None, :]
        if KIND == "xielu":
            alpha, b, em1 = _xielu_parts(h, alphas_ptr)
            z = tl.fma(alpha, b, _BETA * h)
            dh = dz * tl.fma(alpha, tl.where(h > 0, h + h, tl.where(h > _EPS, -1.0, em1)), _BETA)
            sum_p = tl.fma(tl.where(h > 0, dz, 0.0), b, sum_p)
            sum_n = tl.fma(tl.where(h > 0, 0.0, dz), b, sum_n)
        elif KIND == "gelu":
            s = _gelu_logistic(h)
            z = h * s
            dh = dz * tl.fma(z * (1.0 - s), tl.fma(h * h, 3 * _GELU_3, _GELU_1), s)
        else:
            up = ups[i].to(tl.float32)
            s = _logistic(-_LOG2_E * h)
            swish = h * s
            z = swish * up
            if CHANNELS:
                # Written so that NaN is not hidden.
                dz = tl.where(tl.abs(z * channels * z_scale) > _CLIPPED, 0.0, dz * channels)
            dh = dz * up * tl.fma(swish, 1.0 - s, s)
            dup = dz * swish
            if RECORD:
                largest = _larger(largest, tl.abs(dup))
            dups += (dup * dh_scale,)
            tl.store(dh_at + F, dups[i].to(dh_dtype), mask=inside)
        if RECORD:
            largest = _larger(largest, tl.abs(dh))
        dhs += (dh * dh_scale,)
        tl.store(dh_at, dhs[i].to(dh_dtype), mask=inside)
        if RECORD_Z:
            z_largest = _larger(z_largest, tl.abs(z))
        if CHANNELS:
            z *= channels
        zs += (z * z_scale,)
    if RECORD:
        _record_amax(largest, dh_seen_ptr)
    if RECORD_Z:
        # swiglu(0, 0) is 0: what lies outside does not count.
        bits = tl.reduce(z_largest, 0, _larger).to(tl.int32, bitcast=True)
        z_seen_at = z_seen_ptr.to(tl.pointer_type(tl.int32)) + columns
        tl.atomic_max(z_seen_at, bits, mask=columns < F, sem="relaxed")
    if KIND == "xielu":
        # Summed outside in a fixed order: atomic additions of floats would give another sum each time.
        part = parts_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(part, tl.sum(sum_p))
        tl.store(part + tl.num_programs(0) * tl.num_programs(1), tl.sum(sum_n))
    at = columns.to(tl.int64)[:, None] * height + quads[None, :]
    inside = tl.trans(inside)
    dh_t_words = dh_t_ptr.to(tl.pointer_type(tl.uint32))
    tl.store(dh_t_words + at, tl.trans(_words(dhs, dh_dtype)), mask=inside)
    if KIND == "swiglu":
        at_dup = (columns + F).to(tl.int64)[:, None] * height + quads[None, :]
        tl.store(dh_t_words + at_dup, tl.trans(_words(dups, dh_dtype)), mask=inside)
    z_words = _words(zs, z_t_ptr.dtype.element_ty)
    tl.store(z_t_ptr.to(tl.pointer_type(tl.uint32)) + at, tl.trans(z_words), mask=inside)


@triton_op("titan_fp8::activate", mutates_args={"seen"})
def activate_op(
    h: Tensor,
    alphas: Tensor | None,
    scale: Tensor,
    seen: Tensor,
    kind: str,
    record: bool,
    channels: Tensor | None,
) -> Tensor:
    """The kernel behind `activate`, with the arguments of `reference`; h is a 16-bit CUDA tensor."""
    rows, _, features = _sizes(h, kind)
    z8 = torch.empty((rows, features), dtype=E4M3, device=h.device)
    block_m, block_f = 4, 1024
    grid = (triton.cdiv(rows, block_m), triton.cdiv(features, block_f))
    wrap_triton(_forward_kernel)[grid](
        h, scale if alphas is None else alphas, scale if channels is None else channels, scale, seen, z8,
        rows, features, h.stride(0), h.stride(1),
        KIND=kind, CHANNELS=channels is not None, RECORD=record, EVEN=rows % block_m == 0 and features % block_f == 0,
        BLOCK_M=block_m, BLOCK_F=block_f, num_warps=4,
    )  # fmt: skip
    return z8


@triton_op("titan_fp8::activate_backward", mutates_args={"dh_seen", "z_seen"})
def activate_backward_op(
    dz: Tensor, h: Tensor, alphas: Tensor | None, z_scale: Tensor, dh_scale: Tensor, dh_seen: Tensor, kind: str,
    dh_dtype: torch.dtype, record: bool, channels: Tensor | None, z_seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The kernel behind `activate_backward`, with the arguments of `reference_backward`; dz, h: 16-bit CUDA tensors."""
    rows, columns, features = _sizes(h, kind)
    assert rows % 16 == 0, rows  # what FP8 GEMMs ask for; the kernel needs 4
    dh8 = torch.empty((rows, columns), dtype=dh_dtype, device=h.device)
    dh8_t = torch.empty((columns, rows), dtype=dh_dtype, device=h.device)
    z8_t = torch.empty((features, rows), dtype=E4M3, device=h.device)
    block_m, block_f = 32, 128
    grid = (triton.cdiv(rows, block_m), triton.cdiv(features, block_f))
    parts = torch.empty((2, grid[0] * grid[1] if kind == "xielu" else 0), device=h.device)
    wrap_triton(_backward_kernel)[grid](
        dz, h, z_scale if alphas is None else alphas, z_scale if channels is None else channels, z_scale, dh_scale,
        dh_seen, dh_seen if z_seen is None else z_seen, dh8, dh8_t, z8_t, parts,
        rows, features, dz.stride(0), dz.stride(1), h.stride(0), h.stride(1),
        KIND=kind, CHANNELS=channels is not None, RECORD=record, RECORD_Z=record and z_seen is not None,
        BLOCK_M=block_m, BLOCK_F=block_f, num_warps=4,
    )  # fmt: skip
    return dh8, dh8_t, z8_t, parts.sum(1) if kind == "xielu" else parts[0]


def _kernels_take(h: Tensor) -> bool:
    return h.device.type == "cuda" and h.dtype.itemsize == 2


def activate(
    h: Tensor, alphas: Tensor | None, scale: Tensor, seen: Tensor, kind: str, record: bool,
    channels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """z8 [M, F]: act(h [M, N]) times `scale`, and each feature times its entry of `channels`, in E4M3.

    h is read once on CUDA; any strides. kind: "xielu" with alphas = (alpha_p, alpha_n) [2] float32, "gelu" or "swiglu" with
    None. scale, seen: 0-dim float32; channels [F] float32, for swiglu. With `record`, the amax of act(h), times channels, is
    folded into `seen` in place; NaN and inf stay visible there.
    """
    return (activate_op if _kernels_take(h) else reference)(h, alphas, scale, seen, kind, record, channels)


def activate_backward(
    dz: Tensor, h: Tensor, alphas: Tensor | None, z_scale: Tensor, dh_scale: Tensor, dh_seen: Tensor, kind: str,
    dh_dtype: torch.dtype, record: bool, channels: Tensor | None = None, z_seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dh8 [M, N], dh8_t [N, M], z8_t [F, M], dalphas [2]) from dz [M, F] and the arguments of `activate`.

    dh8, dh8_t: the gradient of h times dh_scale in dh_dtype, its amax folded into dh_seen as above. z8_t: `activate`'s
    result for z_scale, transposed, bit for bit. dalphas: the gradient of alphas in float32, the same in every run; empty,
    (0,), where alphas is None. dz and h have one dtype. z_seen [F] float32: each feature's amax, of act(h) without any
    scale, is folded into it, with `record`.
    """
    run = activate_backward_op if _kernels_take(h) else reference_backward
    return run(dz, h, alphas, z_scale, dh_scale, dh_seen, kind, dh_dtype, record, channels, z_seen)


def channel_amax(h: Tensor) -> Tensor:
    """[F] float32: each feature's amax of swiglu(h [M, 2 F]); a pass of its own."""
    return _activation(h, None, "swiglu").abs().amax(0)
