"""The casts of FP8 attention: one read of a bf16 tensor, up to three results.

    x8   [B, H, L, C]    cast(x * scale), saturating; NaN stays NaN
    x8_t [B, H, C, L]    the same, transposed
    amax []              max |x|, folded into the buffer that delayed scaling reads

Hopper's FP8 matrix unit wants both operands contiguous along the summed dimension. Attention sums q, k, v and dO over C in
one GEMM and over the sequence in another, so each is needed in both layouts; here the second costs a write, no read.

L is the sequence length S rounded up to PAD, and what lies beyond S is zero. So the GEMM kernels need no bounds: zero
rows of q and dO add nothing to dK and dV, and causality hides the zero rows of k and v from all true rows of q.

A sum over the sequence does not mind its order, if both operands have the same. So x8_t has, within each 16 positions, the
order in which the other operand leaves the matrix unit's registers:

    quads    0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15    v, q, dO: beside P and dS as left operands
    pairs    0 8 1 9 2 10 3 11 4 12 5 13 6 14 7 15    k: beside dS as the backward kernel stores it
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ..formats import FP8_MAX, fold_amax, saturating_cast

PAD = 128  # every block length of the attention kernels divides it
P_SCALE = 256.0  # of P in (0, 1]


def padded(seq_len: int) -> int:
    """The sequence length that the FP8 operands have."""
    return triton.cdiv(seq_len, PAD) * PAD


@triton.jit
def _record_amax(x, seen):
    """Fold max |x| into the float32 that `seen` points to.

    The maximum of bit patterns: exact in any order, so deterministic, and NaN is the largest.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(seen.to(tl.pointer_type(tl.int32)), tl.max(bits), sem="relaxed")


@triton.jit
def _saturate(x, limit: tl.constexpr):
    x = tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store(y, head, start, padded_len, x8, x8_t, BLOCK: tl.constexpr, C: tl.constexpr,
           PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """y [BLOCK, C] float8 to both layouts."""
    rows, channels = start + tl.arange(0, BLOCK), tl.arange(0, C)
    if PLAIN:
        tl.store(x8 + (head * padded_len + rows)[:, None] * C + channels[None, :], y)
    if TRANSPOSED:
        if PAIRS:
            y = y.reshape(BLOCK // 16, 2, 8, C).permute(0, 2, 1, 3).reshape(BLOCK, C)
        else:
            y = y.reshape(BLOCK // 16, 2, 4, 2, C).permute(0, 2, 1, 3, 4).reshape(BLOCK, C)
        tl.store(x8_t + (head * C + channels)[:, None] * padded_len + rows[None, :], tl.trans(y))


@triton.jit
def _cast_kernel(x, scale, seen, x8, x8_t, seq_len, padded_len, heads, stride_b, stride_h, stride_s,
                 C: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
                 RECORD: tl.constexpr, PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    start, head = tl.program_id(1) * BLOCK, tl.program_id(0).to(tl.int64)
    rows, channels = start + tl.arange(0, BLOCK), tl.arange(0, C)
    x += head // heads * stride_b + head % heads * stride_h
    value = tl.load(
        x + rows.to(tl.int64)[:, None] * stride_s + channels[None, :], (rows < seq_len)[:, None], 0.0
    )
    value = value.to(tl.float32)
    if RECORD:
        _record_amax(value, seen)
    y = _saturate(value * tl.load(scale), LIMIT).to(x8.dtype.element_ty)
    _store(y, head, start, padded_len, x8, x8_t, BLOCK, C, PLAIN, TRANSPOSED, PAIRS)


@triton.jit
def _cast_gradient_kernel(do, o, scale, scale_ds, seen, x8, x8_t, delta, seq_len, padded_len, heads,
                          do_stride_b, do_stride_h, do_stride_s, o_stride_b, o_stride_h, o_stride_s,
                          C: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
                          RECORD: tl.constexpr, P_SCALE: tl.constexpr):  # fmt: skip
    start, head = tl.program_id(1) * BLOCK, tl.program_id(0).to(tl.int64)
    rows, channels = start + tl.arange(0, BLOCK), tl.arange(0, C)
    do += head // heads * do_stride_b + head % heads * do_stride_h
    o += head // heads * o_stride_b + head % heads * o_stride_h
    mask = (rows < seq_len)[:, None]
    value = tl.load(do + rows.to(tl.int64)[:, None] * do_stride_s + channels[None, :], mask, 0.0).to(
        tl.float32
    )
    out = tl.load(o + rows.to(tl.int64)[:, None] * o_stride_s + channels[None, :], mask, 0.0).to(tl.float32)
    sums = tl.sum(value * out, 1) * (tl.load(scale_ds) / P_SCALE)
    tl.store(delta + head * padded_len + rows, sums)
    if RECORD:
        _record_amax(value, seen)
    y = _saturate(value * tl.load(scale), LIMIT).to(x8.dtype.element_ty)
    _store(y, head, start, padded_len, x8, x8_t, BLOCK, C, True, True, False)


def launch_cast(
    x: Tensor,
    scale: Tensor,
    seen: Tensor,
    dtype: torch.dtype,
    record: bool,
    plain: bool,
    transposed: bool,
    pairs: bool,
) -> tuple[Tensor, Tensor]:
    """(x8, x8_t): see `attention.attention_cast`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, seq_len, dim = x.shape
    length = padded(seq_len)
    x8 = x.new_empty((batch, heads, length, dim) if plain else (0,) * 4, dtype=dtype)
    x8_t = x.new_empty((batch, heads, dim, length) if transposed else (0,) * 4, dtype=dtype)
    block = 64
    wrap_triton(_cast_kernel)[(batch * heads, length // block)](
        x, scale, seen, x8, x8_t, seq_len, length, heads, *x.stride()[:3],
        C=dim, BLOCK=block, LIMIT=FP8_MAX[dtype],
        RECORD=record, PLAIN=plain, TRANSPOSED=transposed, PAIRS=pairs, num_warps=4,  # type: ignore
    )  # fmt: skip
    return x8, x8_t


def launch_cast_gradient(
    do: Tensor,
    o: Tensor,
    scale: Tensor,
    scale_ds: Tensor,
    seen: Tensor,
    dtype: torch.dtype,
    record: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(do8, do8_t, delta): see `attention.attention_cast_gradient`."""
    do, o = (t if t.stride(-1) == 1 else t.contiguous() for t in (do, o))
    batch, heads, seq_len, dim = do.shape
    length = padded(seq_len)
    do8 = do.new_empty((batch, heads, length, dim), dtype=dtype)
    do8_t = do.new_empty((batch, heads, dim, length), dtype=dtype)
    delta = do.new_empty((batch, heads, length), dtype=torch.float32)
    block = 64
    wrap_triton(_cast_gradient_kernel)[(batch * heads, length // block)](
        do, o, scale, scale_ds, seen, do8, do8_t, delta, seq_len, length, heads,
        *do.stride()[:3], *o.stride()[:3],
        C=dim, BLOCK=block, LIMIT=FP8_MAX[dtype], RECORD=record, P_SCALE=P_SCALE, num_warps=4,  # type: ignore
    )  # fmt: skip
    return do8, do8_t, delta


def reorder(x: Tensor, pairs: bool) -> Tensor:
    """x [..., L] with its last dimension in `pairs` or `quads` order."""
    if pairs:
        return x.unflatten(-1, (-1, 2, 8)).transpose(-2, -1).flatten(-3)
    return x.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)


def unquad(x: Tensor) -> Tensor:
    """x [..., L] in `quads` order -> in plain order."""
    return x.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)


def cast_reference(
    x: Tensor,
    scale: Tensor,
    seen: Tensor,
    dtype: torch.dtype,
    record: bool,
    plain: bool,
    transposed: bool,
    pairs: bool,
) -> tuple[Tensor, Tensor]:
    """`launch_cast` in plain PyTorch."""
    if record:
        fold_amax(seen, x)
    rows = torch.nn.functional.pad(x.float(), (0, 0, 0, padded(x.shape[2]) - x.shape[2]))
    y = saturating_cast(rows, scale, dtype)
    y_t = reorder(y.float().mT, pairs).to(dtype)
    nothing = y.new_empty((0,) * 4)
    return y.contiguous() if plain else nothing, y_t.contiguous() if transposed else nothing


def cast_gradient_reference(
    do: Tensor,
    o: Tensor,
    scale: Tensor,
    scale_ds: Tensor,
    seen: Tensor,
    dtype: torch.dtype,
    record: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`launch_cast_gradient` in plain PyTorch."""
    do8, do8_t = cast_reference(do, scale, seen, dtype, record, True, True, False)
    delta = (do.float() * o.float()).sum(-1) * (scale_ds / P_SCALE)
    return do8, do8_t, torch.nn.functional.pad(delta, (0, do8.shape[2] - do.shape[2]))
