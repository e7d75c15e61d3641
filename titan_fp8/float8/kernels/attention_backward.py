from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_forward import LOG2_E, rows_of


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _kv_blocks(dk, dv, largest, k, v, q8, q8_t, do8, do8_t, ds, shift, delta, first_head, heads_here, first, count, kv_start,
               padded_len, tiles_per_head, factor, ds_factor, C: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
               MASKED: tl.constexpr, RECORD: tl.constexpr, P_DTYPE: tl.constexpr, DS_DTYPE: tl.constexpr):  # fmt: skip
    for step in tl.range(0, heads_here * count):
        head = first_head + step // count
        start = first + step % count * BLOCK_Q
        row = head * padded_len + start
        q = q8.load([row, 0])
        s = tl.dot(k, q.T)
        do = do8.load([row, 0])
        dp = tl.dot(v, do.T)
        p = tl.math.exp2(s * factor + shift.load([row])[None, :])
        if MASKED:
            queries, keys = start + tl.arange(0, BLOCK_Q), kv_start + tl.arange(0, BLOCK_KV)
            p = tl.where(queries[None, :] >= keys[:, None], p, 0.0)
        do_t = do8_t.load([head * C, start])
        dv = tl.dot(p.to(P_DTYPE), do_t.T, dv)
        d = p * (dp * ds_factor - delta.load([row])[None, :])
        if RECORD:
            largest = _larger(largest, tl.reduce(tl.abs(d), 1, _larger))
        d8 = d.to(DS_DTYPE)
        q_t = q8_t.load([head * C, start])
        dk = tl.dot(d8, q_t.T, dk)
        # Rows r and r + 8 of a thread's matrix fragment make one 16-bit word, and words transpose cheaply.
        bits = d8.to(tl.uint8, bitcast=True).reshape(BLOCK_KV // 16, 2, 8, BLOCK_Q).permute(0, 2, 3, 1)
        low, high = bits.split()
        words = (low.to(tl.uint16) | (high.to(tl.uint16) << 8)).reshape(BLOCK_KV // 2, BLOCK_Q)
        u = start // 128
        tile = head * tiles_per_head + u * (u + 1) // 2 + kv_start // 128
        ds.store([tile * 128 + start % 128, kv_start % 128 // 2], words.T)
    return dk, dv, largest


@triton.jit
def _kv_kernel(q8, q8_t, k8, v8, do8, do8_t, ds, shift, delta, scale_q, scale_k, scale_v, scale_do, scale_ds, amax_bits,
               dk_out, dv_out, softmax_scale, seq_len, padded_len, tiles_per_head, kv_heads, group,
               stride_b, stride_h, stride_s, C: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
               RECORD: tl.constexpr, P_SCALE: tl.constexpr, DS_DTYPE: tl.constexpr):  # fmt: skip
    kv_start = (
        tl.program_id(1) * BLOCK_KV
    )  # the first blocks are seen by the most queries: the longest programs first
    kv_head = tl.program_id(0)
    s_q, s_ds, s_do = tl.load(scale_q), tl.load(scale_ds), tl.load(scale_do)
    factor = softmax_scale * LOG2_E / (s_q * tl.load(scale_k))
    ds_factor = s_ds / (P_SCALE * s_do * tl.load(scale_v))
    k = k8.load([kv_head * padded_len + kv_start, 0])
    v = v8.load([kv_head * padded_len + kv_start, 0])
    dk = tl.zeros([BLOCK_KV, C], tl.float32)
    dv = tl.zeros([BLOCK_KV, C], tl.float32)
    largest = tl.zeros([BLOCK_KV], tl.float32)
    first = kv_start // 128 * 128
    MASKED_Q: tl.constexpr = 128 // BLOCK_Q
    dk, dv, largest = _kv_blocks(
        dk, dv, largest, k, v, q8, q8_t, do8, do8_t, ds, shift, delta, kv_head * group, group, first, MASKED_Q, kv_start,
        padded_len, tiles_per_head, factor, ds_factor, C, BLOCK_Q, BLOCK_KV, True, RECORD, k8.dtype, DS_DTYPE,
    )  # fmt: skip
    dk, dv, largest = _kv_blocks(
        dk, dv, largest, k, v, q8, q8_t, do8, do8_t, ds, shift, delta, kv_head * group, group, first + 128,
        (padded_len - first - 128) // BLOCK_Q, kv_start,
        padded_len, tiles_per_head, factor, ds_factor, C, BLOCK_Q, BLOCK_KV, False, RECORD, k8.dtype, DS_DTYPE,
    )  # fmt: skip
    if RECORD:
        bits = (tl.reduce(largest, 0, _larger) / s_ds).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        tl.atomic_max(amax_bits, bits, sem="relaxed")
    rows = kv_start + tl.arange(0, BLOCK_KV)
    where = (kv_head // kv_heads).to(tl.int64) * stride_b + (kv_head % kv_heads).to(tl.int64) * stride_h
    where += rows.to(tl.int64)[:, None] * stride_s + tl.arange(0, C)[None, :]
    mask = (rows < seq_len)[:, None]
    tl.store(dk_out + where, (dk * (softmax_scale / (s_q * s_ds))).to(dk_out.dtype.element_ty), mask)
    tl.store(dv_out + where, (dv * (1.0 / (P_SCALE * s_do))).to(dv_out.dtype.element_ty), mask)


@triton.jit
def _q_kernel(ds, k8_t, scale_k, scale_ds, dq_out, softmax_scale, seq_len, tiles_per_head, heads, group,
              stride_b, stride_h, stride_s, C: tl.constexpr, BLOCK_KV: tl.constexpr):  # fmt: skip
    u = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest rows first
    head = tl.program_id(0)
    row_k = head // group * C
    tile = head * tiles_per_head + u * (u + 1) // 2
    acc = tl.zeros([128, C], tl.float32)
    for start in tl.range(0, (u + 1) * 128, BLOCK_KV):
        a = ds.load([(tile + start // 128) * 128, start % 128])
        b = k8_t.load([row_k, start])
        acc = tl.dot(a, b.T, acc)
    acc *= softmax_scale / (tl.load(scale_k) * tl.load(scale_ds))
    rows = u * 128 + tl.arange(0, 128)
    where = (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
    where += rows.to(tl.int64)[:, None] * stride_s + tl.arange(0, C)[None, :]
    tl.store(dq_out + where, acc.to(dq_out.dtype.element_ty), (rows < seq_len)[:, None])


# head_dim -> (BLOCK_Q, BLOCK_KV, num_warps, num_stages)
KV_TABLE = {64: (64, 64, 4, 2), 128: (64, 64, 4, 2)}
# head_dim -> (BLOCK_KV, num_warps, num_stages)
Q_TABLE = {64: (128, 8, 3), 128: (128, 8, 3)}


def tiles_per_head(length: int) -> int:
    return length // 128 * (length // 128 + 1) // 2


def launch_kv(
    q8,
    q8_t,
    k8,
    v8,
    do8,
    do8_t,
    ds8,
    shift,
    delta,
    scales,
    amax_ds,
    dk,
    dv,
    softmax_scale,
    record,
    p_scale,
    config=None,
):
    from .attention_cast import TL_DTYPE

    batch, heads, length, dim = q8.shape
    kv_heads = k8.shape[1]
    block_q, block_kv, warps, stages = config or KV_TABLE[dim]
    words = ds8.view(torch.uint16)
    assert dk.stride() == dv.stride()
    _kv_kernel[(batch * kv_heads, length // block_kv)](
        rows_of(q8, block_q, dim), rows_of(q8_t, dim, block_q), rows_of(k8, block_kv, dim), rows_of(v8, block_kv, dim),
        rows_of(do8, block_q, dim), rows_of(do8_t, dim, block_q), rows_of(words, block_q, block_kv // 2),
        TensorDescriptor.from_tensor(shift.view(-1), [block_q]), TensorDescriptor.from_tensor(delta.view(-1), [block_q]),
        *scales, amax_ds.view(torch.int32), dk, dv, softmax_scale, dk.shape[2], length, tiles_per_head(length),
        kv_heads, heads // kv_heads, *dk.stride()[:3],
        C=dim, BLOCK_Q=block_q, BLOCK_KV=block_kv, RECORD=record, P_SCALE=p_scale, DS_DTYPE=TL_DTYPE[ds8.dtype],
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def launch_q(ds8, k8_t, scale_k, scale_ds, dq, softmax_scale, config=None):
    batch, kv_heads, dim, length = k8_t.shape
    heads = dq.shape[1]
    block_kv, warps, stages = config or Q_TABLE[dim]
    _q_kernel[(batch * heads, length // 128)](
        rows_of(ds8, 128, block_kv), rows_of(k8_t, dim, block_kv), scale_k, scale_ds, dq, softmax_scale, dq.shape[2],
        tiles_per_head(length), heads, heads // kv_heads, *dq.stride()[:3], C=dim, BLOCK_KV=block_kv,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
