"""FP8 attention forward: O = softmax(softmax_scale * q k^T, causal) v in one pass over k and v (online softmax).

    S = q8 k8^T * c           c = softmax_scale * log2(e) / (s_q s_k): exponentials are taken to base 2
    P = 256 * 2^(S - m)       m: the row's maximum so far; P in (0, 256], cast to E4M3
    l = sum P                 from P before the cast
    O = (P8 v8) / (s_v l)     shift = 8 - (m + log2(sum 2^(S - m))), so that backward's 256 P is 2^(S + shift)

The reference subtracts the row's final maximum; here P is cast against the maximum so far and rescaled when that grows, so P8
may round differently (same relative precision).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _forward_blocks(acc, l, m, q, k8, v8_t, row_k, row_v, first, last, q_start, factor,
                    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    for start in tl.range(first, last, BLOCK_KV):
        k = k8.load([row_k + start, 0])
        s = tl.dot(q, k.T)
        if MASKED:
            queries = q_start + tl.arange(0, BLOCK_Q)
            keys = start + tl.arange(0, BLOCK_KV)
            s = tl.where(queries[:, None] >= keys[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * factor)
        p = tl.math.exp2(s * factor - (m_new - 8.0)[:, None])
        alpha = tl.math.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = acc * alpha[:, None]
        v = v8_t.load([row_v, start])
        acc = tl.dot(p.to(DTYPE), v.T, acc)
        m = m_new
    return acc, l, m


@triton.jit
def _forward_kernel(q8, k8, v8_t, scale_q, scale_k, scale_v, o, shift, softmax_scale, seq_len, padded_len,
                    heads, group, stride_b, stride_h, stride_s, C: tl.constexpr,
                    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):  # fmt: skip
    # The longest rows first, so that no long program starts last.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // group
    q_start = block * BLOCK_Q
    factor = softmax_scale * LOG2_E / (tl.load(scale_q) * tl.load(scale_k))
    q = q8.load([head * padded_len + q_start, 0])
    acc = tl.zeros([BLOCK_Q, C], tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)  # noqa: E741
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    acc, l, m = _forward_blocks(
        acc, l, m, q, k8, v8_t, kv_head * padded_len, kv_head * C, 0, q_start // BLOCK_KV * BLOCK_KV, q_start, factor,
        BLOCK_Q, BLOCK_KV, False, q8.dtype,
    )  # fmt: skip
    acc, l, m = _forward_blocks(
        acc, l, m, q, k8, v8_t, kv_head * padded_len, kv_head * C, q_start // BLOCK_KV * BLOCK_KV, q_start + BLOCK_Q,
        q_start, factor, BLOCK_Q, BLOCK_KV, True, q8.dtype,
    )  # fmt: skip
    rows = q_start + tl.arange(0, BLOCK_Q)
    tl.store(shift + head.to(tl.int64) * padded_len + rows, 16.0 - m - tl.log2(l))
    out = acc * (1.0 / (l * tl.load(scale_v)))[:, None]
    o += (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
    where = o + rows.to(tl.int64)[:, None] * stride_s + tl.arange(0, C)[None, :]
    tl.store(where, out.to(o.dtype.element_ty), (rows < seq_len)[:, None])


# head_dim -> (BLOCK_Q, BLOCK_KV, num_warps, num_stages)
FORWARD_TABLE = {64: (128, 128, 8, 3), 128: (128, 128, 8, 3)}


def rows_of(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x [..., M, N] contiguous as a descriptor of tiles [rows, columns] of its [-1, N] matrix."""
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [rows, columns])


def launch_forward(q8, k8, v8_t, scale_q, scale_k, scale_v, o, shift, softmax_scale, config=None) -> None:
    """Writes o [B, H, S, C] (any strides, C contiguous) and shift [B, H, L]. See `attention.attention_forward`."""
    batch, heads, length, dim = q8.shape
    block_q, block_kv, warps, stages = config or FORWARD_TABLE[dim]
    _forward_kernel[(length // block_q, batch * heads)](
        rows_of(q8, block_q, dim), rows_of(k8, block_kv, dim), rows_of(v8_t, dim, block_kv), scale_q, scale_k, scale_v,
        o, shift, softmax_scale, o.shape[2], length, heads, heads // k8.shape[1], *o.stride()[:3],
        C=dim, BLOCK_Q=block_q, BLOCK_KV=block_kv, num_warps=warps, num_stages=stages,
    )  # fmt: skip
