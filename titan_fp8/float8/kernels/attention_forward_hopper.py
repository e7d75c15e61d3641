from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .attention_backward_hopper import exp2, left_operand

LOG2_E = gl.constexpr(1.4426950408889634)
HALF = gl.constexpr(64)


@gluon.jit
def _load(desc, row, column, ring, full, empty, step, BYTES: gl.constexpr, STAGES: gl.constexpr):
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), BYTES)
    tma.async_copy_global_to_shared(desc, [row, column], full.index(stage), ring.index(stage))


@gluon.jit
def _consumer(q, k8, v8_t, k_ring, v_ring, k_full, k_empty, v_full, v_empty, row_k, row_v, q_start, factor, o, shift, out_factor, seq_len,
              stride_s, C: gl.constexpr, BLOCK_KV: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr, HALF_INDEX: gl.constexpr):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV, 32])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 32])
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 4)
    BYTES: gl.constexpr = BLOCK_KV * C
    AHEAD: gl.constexpr = STAGES - LAG
    count = q_start // BLOCK_KV + 1
    if HALF_INDEX == 0:
        for i in range(0, gl.minimum(AHEAD, count)):
            _load(k8, row_k + (count - 1 - i) * BLOCK_KV, 0, k_ring, k_full, k_empty, i, BYTES, STAGES)
            _load(v8_t, row_v, (count - 1 - i) * BLOCK_KV, v_ring, v_full, v_empty, i, BYTES, STAGES)
    q = q.slice(HALF_INDEX * HALF, HALF)
    zeros = gl.zeros([HALF, BLOCK_KV], gl.float32, S_LAYOUT)
    acc = gl.zeros([HALF, C], gl.float32, O_LAYOUT)

    # The diagonal block first: it alone needs the mask.
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, k_ring.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    mbarrier.arrive(k_empty.index(0), count=1)
    queries = q_start % BLOCK_KV + HALF_INDEX * HALF + gl.arange(0, HALF, ROWS)
    keys = gl.arange(0, BLOCK_KV, gl.SliceLayout(0, S_LAYOUT))
    s = gl.where(gl.expand_dims(queries, 1) >= gl.expand_dims(keys, 0), s, float("-inf"))
    m = gl.max(s, 1) * factor
    p = exp2(s * factor - gl.expand_dims(m - 8.0, 1))
    l = gl.sum(p, 1)  # noqa: E741
    for step in range(1, count):
        stage = step % STAGES
        before = (step - 1) % STAGES
        p8 = left_operand(p.to(gl.float8e4nv), LEFT)  # here, not below: bytes carried around a loop take a register each
        mbarrier.wait(k_full.index(stage), step // STAGES & 1)
        s = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), (step - 1) // STAGES & 1)
        acc = warpgroup_mma(p8, v_ring.index(before).permute((1, 0)), acc, is_async=True)
        s = warpgroup_mma_wait(1, [s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if HALF_INDEX == 0:
            ahead = step - 1 + AHEAD
            if ahead < count:
                _load(k8, row_k + (count - 1 - ahead) * BLOCK_KV, 0, k_ring, k_full, k_empty, ahead, BYTES, STAGES)
                _load(v8_t, row_v, (count - 1 - ahead) * BLOCK_KV, v_ring, v_full, v_empty, ahead, BYTES, STAGES)
        m_new = gl.maximum(m, gl.max(s, 1) * factor)
        p = exp2(s * factor - gl.expand_dims(m_new - 8.0, 1))
        alpha = exp2(m - m_new)
        l = l * alpha + gl.sum(p, 1)  # noqa: E741
        m = m_new
        acc, p = warpgroup_mma_wait(0, [acc, p])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, O_ROWS), 1)
    p8 = left_operand(p.to(gl.float8e4nv), LEFT)
    last = (count - 1) % STAGES
    mbarrier.wait(v_full.index(last), (count - 1) // STAGES & 1)
    acc = warpgroup_mma(p8, v_ring.index(last).permute((1, 0)), acc, is_async=True)
    rows = q_start + HALF_INDEX * HALF + gl.arange(0, HALF, ROWS)
    gl.store(shift + rows, 16.0 - m - gl.log2(l))
    acc = warpgroup_mma_wait(0, [acc])
    rows = q_start + HALF_INDEX * HALF + gl.arange(0, HALF, O_ROWS)
    channels = gl.arange(0, C, gl.SliceLayout(0, O_LAYOUT))
    out = acc * gl.expand_dims(gl.convert_layout(out_factor / l, O_ROWS), 1)
    where = o + gl.expand_dims(rows.to(gl.int64), 1) * stride_s + gl.expand_dims(channels, 0)
    gl.store(where, out.to(o.dtype.element_ty), gl.expand_dims(rows < seq_len, 1))


@gluon.jit
def _forward_kernel(q8, k8, v8_t, scale_q, scale_k, scale_v, o, shift, softmax_scale, seq_len, padded_len, heads, group,
                    stride_b, stride_h, stride_s, C: gl.constexpr, PARTS: gl.constexpr, BLOCK_KV: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr):  # fmt: skip
    BLOCK_Q: gl.constexpr = PARTS * HALF
    q_start = (gl.num_programs(1) - 1 - gl.program_id(1)) * BLOCK_Q  # the longest rows first
    head = gl.program_id(0)
    kv_head = head // group
    factor = softmax_scale * LOG2_E / (gl.load(scale_q) * gl.load(scale_k))
    out_factor = 1.0 / gl.load(scale_v)
    q = gl.allocate_shared_memory(q8.dtype, [BLOCK_Q, C], q8.layout)
    k_ring = gl.allocate_shared_memory(k8.dtype, [STAGES, BLOCK_KV, C], k8.layout)
    v_ring = gl.allocate_shared_memory(v8_t.dtype, [STAGES, C, BLOCK_KV], v8_t.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=PARTS)
        mbarrier.init(v_empty.index(i), count=PARTS)
    mbarrier.init(ready, count=1)
    fence_async_shared()
    mbarrier.expect(ready, BLOCK_Q * C)
    tma.async_copy_global_to_shared(q8, [head * padded_len + q_start, 0], ready, q)
    mbarrier.wait(ready, 0)
    o += (head // heads).to(gl.int64) * stride_b + (head % heads).to(gl.int64) * stride_h
    shift += head.to(gl.int64) * padded_len
    if PARTS == 1:
        _consumer(q, k8, v8_t, k_ring, v_ring, k_full, k_empty, v_full, v_empty, kv_head * padded_len, kv_head * C, q_start, factor,
                 o, shift, out_factor, seq_len, stride_s, C, BLOCK_KV, STAGES, LAG, 0)  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (q, k8, v8_t, k_ring, v_ring, k_full, k_empty, v_full, v_empty, kv_head * padded_len, kv_head * C, q_start, factor,
                 o, shift, out_factor, seq_len, stride_s, C, BLOCK_KV, STAGES, LAG, 0)),
            (_consumer, (q, k8, v8_t, k_ring, v_ring, k_full, k_empty, v_full, v_empty, kv_head * padded_len, kv_head * C, q_start, factor,
                 o, shift, out_factor, seq_len, stride_s, C, BLOCK_KV, STAGES, LAG, 1)),
        ], [4], [256])  # fmt: skip


def launch_forward(q8, k8, v8_t, scale_q, scale_k, scale_v, o, shift, softmax_scale, config=None) -> None:
    from .attention_backward_hopper import _tiles

    batch, heads, length, dim = q8.shape
    parts, block_kv, stages, lag, regs = config or (2, 128, 4, 2, None)
    _forward_kernel[(batch * heads, length // (64 * parts))](
        _tiles(q8, 64 * parts, dim), _tiles(k8, block_kv, dim), _tiles(v8_t, dim, block_kv), scale_q, scale_k, scale_v,
        o, shift, softmax_scale, o.shape[2], length, heads, heads // k8.shape[1], *o.stride()[:3],
        C=dim, PARTS=parts, BLOCK_KV=block_kv, STAGES=stages, LAG=lag, num_warps=4, maxnreg=regs,
    )  # fmt: skip
