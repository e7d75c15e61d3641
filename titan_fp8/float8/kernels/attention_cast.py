"""The casts of FP8 attention: one read of a bf16 tensor, up to three results.

    x8   [B, H, L, C]    cast(x * scale), saturating; NaN stays NaN
    x8_t [B, H, C, L]    the same, transposed
    amax []              folded into the buffer that delayed scaling reads

Hopper's FP8 matrix unit wants both operands contiguous along the summed dimension. Attention sums q, k, v and dO over C in
one GEMM and over the sequence in another, so each is needed in both layouts; here the second costs a write, no read.

L is the sequence length S rounded up to PAD, and what lies beyond S is zero. So the GEMM kernels need no bounds: zero rows of
q and dO add nothing to dK and dV, and causality hides the zero rows of k and v from all true rows of q.

`pair_rows` stores the transposed sequence in another order: within each 16 positions 0 8 1 9 2 10 ... 7 15. A sum over the
sequence does not mind, if both operands do it; dS leaves the backward kernel in this order (see attention_backward).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FP8_MAX

CONFIG = [64, 4]
PAD = 128  # every block length of the attention kernels divides it

TL_DTYPE = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


def padded(seq_len: int) -> int:
    """The sequence length that the FP8 operands have."""
    return triton.cdiv(seq_len, PAD) * PAD


@triton.jit
def _record_amax(x, amax_bits):
    """Fold max |x| into the float32 whose bits `amax_bits` points to. A max of bit patterns: exact in any order, and NaN wins."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(amax_bits, tl.max(bits), sem="relaxed")


@triton.jit
def _saturate(x, limit: tl.constexpr):
    x = tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store(y, head, start, padded_len, x8, x8_t, BLOCK: tl.constexpr, C: tl.constexpr,
           PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr, PAIR_ROWS: tl.constexpr):  # fmt: skip
    """y [BLOCK, C] float8 to both layouts."""
    rows, channels = start + tl.arange(0, BLOCK), tl.arange(0, C)
    if PLAIN:
        tl.store(x8 + (head * padded_len + rows)[:, None] * C + channels[None, :], y)
    if TRANSPOSED:
        if PAIR_ROWS:
            y = y.reshape(BLOCK // 16, 2, 8, C).permute(0, 2, 1, 3).reshape(BLOCK, C)
        else:
            y = y.reshape(BLOCK // 16, 2, 4, 2, C).permute(0, 2, 1, 3, 4).reshape(BLOCK, C)
        tl.store(x8_t + (head * C + channels)[:, None] * padded_len + rows[None, :], tl.trans(y))


@triton.jit
def _cast_kernel(x, scale, amax_bits, x8, x8_t, seq_len, padded_len, heads, stride_b, stride_h, stride_s,
                 C: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, DTYPE: tl.constexpr,
                 RECORD: tl.constexpr, PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr, PAIR_ROWS: tl.constexpr):  # fmt: skip
    start, head = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64)
    rows, channels = start + tl.arange(0, BLOCK), tl.arange(0, C)
    x += head // heads * stride_b + head % heads * stride_h
    value = tl.load(
        x + rows.to(tl.int64)[:, None] * stride_s + channels[None, :], (rows < seq_len)[:, None], 0.0
    )
    value = value.to(tl.float32)
    if RECORD:
        _record_amax(value, amax_bits)
    y = _saturate(value * tl.load(scale), LIMIT).to(DTYPE)
    _store(y, head, start, padded_len, x8, x8_t, BLOCK, C, PLAIN, TRANSPOSED, PAIR_ROWS)


@triton.jit
def _cast_gradient_kernel(do, o, scale, scale_ds, amax_bits, x8, x8_t, delta, seq_len, padded_len, heads,
                          do_stride_b, do_stride_h, do_stride_s, o_stride_b, o_stride_h, o_stride_s,
                          C: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, DTYPE: tl.constexpr,
                          RECORD: tl.constexpr, P_SCALE: tl.constexpr):  # fmt: skip
    start, head = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64)
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
        _record_amax(value, amax_bits)
    y = _saturate(value * tl.load(scale), LIMIT).to(DTYPE)
    _store(y, head, start, padded_len, x8, x8_t, BLOCK, C, True, True, False)


def launch_cast(
    x: Tensor,
    scale: Tensor,
    amax: Tensor,
    dtype: torch.dtype,
    record: bool,
    plain: bool,
    transposed: bool,
    pair_rows: bool,
) -> tuple[Tensor, Tensor]:
    """(x8 [B, H, L, C], x8_t [B, H, C, L]); the one not asked for is empty. See `attention.attention_cast`."""
    batch, heads, seq_len, dim = x.shape
    length = padded(seq_len)
    x8 = x.new_empty((batch, heads, length, dim) if plain else 0, dtype=dtype)
    x8_t = x.new_empty((batch, heads, dim, length) if transposed else 0, dtype=dtype)
    block = CONFIG[0]
    _cast_kernel[(length // block, batch * heads)](
        x, scale, amax.view(torch.int32), x8, x8_t, seq_len, length, heads, *x.stride()[:3],
        C=dim, BLOCK=block, LIMIT=FP8_MAX[dtype], DTYPE=TL_DTYPE[dtype],
        RECORD=record, PLAIN=plain, TRANSPOSED=transposed, PAIR_ROWS=pair_rows, num_warps=CONFIG[1],
    )  # fmt: skip
    return x8, x8_t


def launch_cast_gradient(
    do: Tensor,
    o: Tensor,
    scale: Tensor,
    scale_ds: Tensor,
    amax: Tensor,
    dtype: torch.dtype,
    record: bool,
    p_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(do8 [B, H, L, C], do8_t [B, H, C, L], delta [B, H, L]). See `attention.attention_cast_gradient`."""
    batch, heads, seq_len, dim = do.shape
    length = padded(seq_len)
    do8 = do.new_empty((batch, heads, length, dim), dtype=dtype)
    do8_t = do.new_empty((batch, heads, dim, length), dtype=dtype)
    delta = do.new_empty((batch, heads, length), dtype=torch.float32)
    block = CONFIG[0]
    _cast_gradient_kernel[(length // block, batch * heads)](
        do, o, scale, scale_ds, amax.view(torch.int32), do8, do8_t, delta, seq_len, length, heads,
        *do.stride()[:3], *o.stride()[:3],
        C=dim, BLOCK=block, LIMIT=FP8_MAX[dtype], DTYPE=TL_DTYPE[dtype], RECORD=record, P_SCALE=p_scale, num_warps=CONFIG[1],
    )  # fmt: skip
    return do8, do8_t, delta
