from __future__ import annotations

import torch
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
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2_E = gl.constexpr(1.4426950408889634)
BLOCK_Q = gl.constexpr(64)
HALF = gl.constexpr(64)  # kv rows of one warpgroup
BLOCK_KV = gl.constexpr(128)


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def exp2(x):
    """2^x; results below 2^-126 are zero, which saves the three instructions that gl.exp2 spends on them."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def left_operand(x, layout: gl.constexpr):
    """x [M, N] float8 in the layout of a matrix product -> left operand of the next one, its columns in `quads` order.

    In that order a thread already holds what it needs: no exchange, which plain order would take.
    """
    x = x.reshape([x.shape[0], x.shape[1] // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([x.shape[0], x.shape[1]])
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _pair_rows(x):
    """x [M, N] float8 in the layout of a matrix product -> [M / 2, N] uint16: rows r and r + 8 of each 16, low byte and high.

    A thread holds both rows, so nothing moves between threads.
    """
    low, high = x.to(gl.uint8, bitcast=True).reshape([x.shape[0] // 16, 2, 8, x.shape[1]]).permute((0, 2, 3, 1)).split()
    # Not low | high << 8: the ptxas of Triton 3.6 (12.8) miscompiles that behind the float8 conversion.
    words = gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x5140; prmt.b32 $1, $2, $3, 0x7362;", "=r,=r,r,r", [low, high], dtype=gl.uint16, is_pure=True, pack=4
    )
    return words.reshape([x.shape[0] // 2, x.shape[1]])


@gluon.jit
def _position(step, first_head, group, first, count):
    """(query head, first query) of a step: the masked blocks of all heads come first, then the full ones."""
    masked = group * (BLOCK_KV // BLOCK_Q)
    full = gl.maximum(step - masked, 0)
    width = gl.maximum(count, 1)
    head = gl.where(step < masked, step // (BLOCK_KV // BLOCK_Q), full // width)
    start = gl.where(step < masked, step % (BLOCK_KV // BLOCK_Q) * BLOCK_Q, BLOCK_KV + full % width * BLOCK_Q)
    return first_head + head, first + start


@gluon.jit
def _load_tiles(descs, rings, full, empty, step, first_head, group, first, count, padded_len, C: gl.constexpr, STAGES: gl.constexpr):
    """Fill the stage of `step`, once both warpgroups have done with what it held."""
    q8, q8_t, do8, do8_t, shift, delta = descs
    q_ring, qt_ring, do_ring, dot_ring, shift_ring, delta_ring = rings
    stage = step % STAGES
    head, start = _position(step, first_head, group, first, count)
    row = head * padded_len + start
    bar = full.index(stage)
    mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
    mbarrier.expect(bar, 4 * BLOCK_Q * C + 2 * 4 * BLOCK_Q)
    tma.async_copy_global_to_shared(q8, [row, 0], bar, q_ring.index(stage))
    tma.async_copy_global_to_shared(do8, [row, 0], bar, do_ring.index(stage))
    tma.async_copy_global_to_shared(shift, [row], bar, shift_ring.index(stage))
    tma.async_copy_global_to_shared(delta, [row], bar, delta_ring.index(stage))
    tma.async_copy_global_to_shared(do8_t, [head * C, start], bar, dot_ring.index(stage))
    tma.async_copy_global_to_shared(q8_t, [head * C, start], bar, qt_ring.index(stage))


@gluon.jit
def _consume(dk, dv, largest, base, steps, k, v, descs, rings, full, empty, ds, staging, first_head, group, first, count, padded_len,
             tiles_per_head, factor, ds_factor, C: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr, HALF_INDEX: gl.constexpr,
             MASKED: gl.constexpr, RECORD: gl.constexpr, DS_DTYPE: gl.constexpr, S_LAYOUT: gl.constexpr, ACC_LAYOUT: gl.constexpr):  # fmt: skip
    q_ring, qt_ring, do_ring, dot_ring, shift_ring, delta_ring = rings
    columns: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    rows: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    left: gl.constexpr = gl.DotOperandLayout(0, ACC_LAYOUT, 4)
    zeros = gl.zeros([HALF, BLOCK_Q], gl.float32, S_LAYOUT)
    total = group * (BLOCK_KV // BLOCK_Q + count)
    for step in range(base, base + steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        s = warpgroup_mma(k, q_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        dp = warpgroup_mma(v, do_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, [s])
        tma.store_wait(0)
        if step > 0:  # everything that read the last stage is done
            mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        if HALF_INDEX == 0:
            if step + STAGES - LAG < total:
                _load_tiles(descs, rings, full, empty, step + STAGES - LAG, first_head, group, first, count, padded_len, C, STAGES)
        p = exp2(s * factor + gl.expand_dims(shift_ring.index(stage).load(columns), 0))
        head, start = _position(step, first_head, group, first, count)
        if MASKED:
            queries = start + gl.arange(0, BLOCK_Q, columns)
            keys = first + HALF_INDEX * HALF + gl.arange(0, HALF, rows)
            p = gl.where(gl.expand_dims(queries, 0) >= gl.expand_dims(keys, 1), p, 0.0)
        p8 = left_operand(p.to(gl.float8e4nv), left)
        dp = warpgroup_mma_wait(0, [dp])
        d = p * (dp * ds_factor - gl.expand_dims(delta_ring.index(stage).load(columns), 0))
        if RECORD:
            largest = _larger(largest, gl.reduce(gl.abs(d), 1, _larger))
        d8 = d.to(DS_DTYPE)
        d8_left = left_operand(d8, left)
        dv = warpgroup_mma(p8, dot_ring.index(stage).permute((1, 0)), dv, is_async=True)
        dk = warpgroup_mma(d8_left, qt_ring.index(stage).permute((1, 0)), dk, is_async=True)
        bits = d8.to(gl.uint8, bitcast=True).reshape([HALF // 16, 2, 8, BLOCK_Q]).permute((0, 2, 3, 1))
        staging.store(_pair_rows(d8).permute((1, 0)))
        fence_async_shared()
        u = start // 128
        tile = head * tiles_per_head + u * (u + 1) // 2 + first // 128
        tma.async_copy_shared_to_global(ds, [tile * 128 + start % 128, HALF_INDEX * HALF // 2], staging)
    return dk, dv, largest


@gluon.jit
def _store(acc, pointer, kv_start, seq_len, stride_s, C: gl.constexpr, ACC_LAYOUT: gl.constexpr):
    rows = kv_start + gl.arange(0, HALF, gl.SliceLayout(1, ACC_LAYOUT))
    channels = gl.arange(0, C, gl.SliceLayout(0, ACC_LAYOUT))
    where = gl.expand_dims(rows.to(gl.int64), 1) * stride_s + gl.expand_dims(channels, 0)
    gl.store(pointer + where, acc.to(pointer.dtype.element_ty), gl.expand_dims(rows < seq_len, 1))


@gluon.jit
def _consumer(k, v, descs, rings, full, empty, ds, staging, first_head, group, first, count, padded_len, tiles_per_head, factor, ds_factor,
              s_ds, amax_bits, dk_out, dv_out, dk_factor, dv_factor, seq_len, stride_s, C: gl.constexpr, STAGES: gl.constexpr,
              LAG: gl.constexpr, HALF_INDEX: gl.constexpr, RECORD: gl.constexpr, DS_DTYPE: gl.constexpr):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 32])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 32])
    masked = group * (BLOCK_KV // BLOCK_Q)
    k, v = k.slice(HALF_INDEX * HALF, HALF), v.slice(HALF_INDEX * HALF, HALF)
    if HALF_INDEX == 0:
        for step in range(0, gl.minimum(STAGES - LAG, masked + group * count)):
            _load_tiles(descs, rings, full, empty, step, first_head, group, first, count, padded_len, C, STAGES)
    dk = warpgroup_mma_init(gl.zeros([HALF, C], gl.float32, ACC_LAYOUT))
    dv = warpgroup_mma_init(gl.zeros([HALF, C], gl.float32, ACC_LAYOUT))
    largest = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    dk, dv, largest = _consume(
        dk, dv, largest, 0, masked, k, v, descs, rings, full, empty, ds, staging, first_head, group, first, count, padded_len,
        tiles_per_head, factor, ds_factor, C, STAGES, LAG, HALF_INDEX, True, RECORD, DS_DTYPE, S_LAYOUT, ACC_LAYOUT,
    )  # fmt: skip
    dk, dv, largest = _consume(
        dk, dv, largest, masked, group * count, k, v, descs, rings, full, empty, ds, staging, first_head, group, first, count, padded_len,
        tiles_per_head, factor, ds_factor, C, STAGES, LAG, HALF_INDEX, False, RECORD, DS_DTYPE, S_LAYOUT, ACC_LAYOUT,
    )  # fmt: skip
    dk, dv = warpgroup_mma_wait(0, [dk, dv])
    tma.store_wait(0)
    if RECORD:
        bits = (gl.reduce(largest, 0, _larger) / s_ds).to(gl.int32, bitcast=True) & 0x7FFFFFFF
        gl.atomic_max(amax_bits, bits, sem="relaxed")
    _store(dk * dk_factor, dk_out, first + HALF_INDEX * HALF, seq_len, stride_s, C, ACC_LAYOUT)
    _store(dv * dv_factor, dv_out, first + HALF_INDEX * HALF, seq_len, stride_s, C, ACC_LAYOUT)


@gluon.jit
def _kv_kernel(q8, q8_t, k8, v8, do8, do8_t, ds, shift, delta, scale_q, scale_k, scale_v, scale_do, scale_ds, amax_bits,
               dk_out, dv_out, softmax_scale, seq_len, padded_len, tiles_per_head, kv_heads, group, stride_b, stride_h, stride_s,
               C: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr, RECORD: gl.constexpr, P_SCALE: gl.constexpr, DS_DTYPE: gl.constexpr):  # fmt: skip
    first = gl.program_id(1) * BLOCK_KV  # the first blocks are seen by the most queries: the longest programs first
    kv_head = gl.program_id(0)
    s_q, s_ds, s_do = gl.load(scale_q), gl.load(scale_ds), gl.load(scale_do)
    factor = softmax_scale * LOG2_E / (s_q * gl.load(scale_k))
    ds_factor = s_ds / (P_SCALE * s_do * gl.load(scale_v))
    where = (kv_head // kv_heads).to(gl.int64) * stride_b + (kv_head % kv_heads).to(gl.int64) * stride_h

    k = gl.allocate_shared_memory(k8.dtype, [BLOCK_KV, C], k8.layout)
    v = gl.allocate_shared_memory(v8.dtype, [BLOCK_KV, C], v8.layout)
    rings = (
        gl.allocate_shared_memory(q8.dtype, [STAGES, BLOCK_Q, C], q8.layout),
        gl.allocate_shared_memory(q8_t.dtype, [STAGES, C, BLOCK_Q], q8_t.layout),
        gl.allocate_shared_memory(do8.dtype, [STAGES, BLOCK_Q, C], do8.layout),
        gl.allocate_shared_memory(do8_t.dtype, [STAGES, C, BLOCK_Q], do8_t.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], shift.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], delta.layout),
    )
    staging = gl.allocate_shared_memory(gl.uint16, [2, BLOCK_Q, HALF // 2], ds.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(ready, count=1)
    fence_async_shared()
    mbarrier.expect(ready, 2 * BLOCK_KV * C)
    tma.async_copy_global_to_shared(k8, [kv_head * padded_len + first, 0], ready, k)
    tma.async_copy_global_to_shared(v8, [kv_head * padded_len + first, 0], ready, v)
    mbarrier.wait(ready, 0)

    first_head = kv_head * group
    count = (padded_len - first - BLOCK_KV) // BLOCK_Q
    dk_factor = softmax_scale / (s_q * s_ds)
    dv_factor = 1.0 / (P_SCALE * s_do)
    descs = (q8, q8_t, do8, do8_t, shift, delta)
    gl.warp_specialize([
        (_consumer, (k, v, descs, rings, full, empty, ds, staging.index(0), first_head, group, first, count, padded_len, tiles_per_head,
                     factor, ds_factor, s_ds, amax_bits, dk_out + where, dv_out + where, dk_factor, dv_factor, seq_len, stride_s,
                     C, STAGES, LAG, 0, RECORD, DS_DTYPE)),
        (_consumer, (k, v, descs, rings, full, empty, ds, staging.index(1), first_head, group, first, count, padded_len, tiles_per_head,
                     factor, ds_factor, s_ds, amax_bits, dk_out + where, dv_out + where, dk_factor, dv_factor, seq_len, stride_s,
                     C, STAGES, LAG, 1, RECORD, DS_DTYPE)),
    ], [4], [256])  # fmt: skip


GL_DTYPE = {torch.float8_e4m3fn: gl.float8e4nv, torch.float8_e5m2: gl.float8e5}


def _tiles(x: Tensor, *block: int) -> TensorDescriptor:
    """x contiguous as a descriptor of tiles of its [-1, N] matrix (two numbers), or of the flat x (one)."""
    size = x.element_size()
    swizzle = min(128, block[-1] * size) if len(block) == 2 else 0
    layout = gl.NVMMASharedLayout(swizzle, 8 * size, rank=len(block), transposed=len(block) == 1)
    x = x.view(-1, x.shape[-1]) if len(block) == 2 else x.view(-1)
    return TensorDescriptor.from_tensor(x, list(block), layout)


def launch_kv(q8, q8_t, k8, v8, do8, do8_t, ds8, shift, delta, scales, amax_ds, dk, dv, softmax_scale, record, p_scale, config=None):
    from .attention_backward import tiles_per_head

    batch, heads, length, dim = q8.shape
    kv_heads = k8.shape[1]
    stages, lag = config or (4, 2)
    _kv_kernel[(batch * kv_heads, length // 128)](
        _tiles(q8, 64, dim), _tiles(q8_t, dim, 64), _tiles(k8, 128, dim), _tiles(v8, 128, dim),
        _tiles(do8, 64, dim), _tiles(do8_t, dim, 64), _tiles(ds8.view(torch.uint16), 64, 32), _tiles(shift, 64), _tiles(delta, 64),
        *scales, amax_ds.view(torch.int32), dk, dv, softmax_scale, dk.shape[2], length, tiles_per_head(length),
        kv_heads, heads // kv_heads, *dk.stride()[:3],
        C=dim, STAGES=stages, LAG=lag, RECORD=record, P_SCALE=p_scale, DS_DTYPE=GL_DTYPE[ds8.dtype], num_warps=4,
    )  # fmt: skip
