"""FP8 attention backward for Hopper: five GEMMs in two kernels, no atomic sums: two runs give the same bits.

    P = 256 * 2^(q8 k8^T c + shift)         dV = P8^T do8 / (256 s_do)                  c, shift: attention_forward
    dS = P * (do8 v8^T a - delta)           dK = softmax_scale * dS8^T q8 / (s_ds s_q)  a = s_ds / (256 s_do s_v)
    delta = s_ds / 256 * rowsum(dO * O)     dQ = softmax_scale * dS8 k8 / (s_ds s_k)    so dS comes out times s_ds

`kv_kernel` (Gluon) computes dK and dV for 128 keys of one kv head and loops over the queries of the group's heads.
It forms S^T = k q^T, so that P^T and dS^T are left operands that already lie in registers. Two warpgroups take 64
keys each and share the tiles of q and dO; they run apart, so that one computes its softmax while the other's products
run. The first also fills the ring of tiles. The dS8 tiles go to memory (a byte per visible pair of query and key;
heads take turns if SCRATCH_BYTES does not hold all), and `q_kernel` (Triton) multiplies them with k. Recomputing S and
dP for dQ, as is usual, would be two GEMMs and a softmax more.

The matrix unit wants dS8 with the keys contiguous; kv_kernel holds it with the queries contiguous, and no instruction
transposes bytes. But a thread holds keys r and r + 8 of the same query: they make a 16-bit word, and 16-bit words are
transposed on the way to shared memory. So in memory the keys stand in `pairs` order, and so does the transposed k that
q_kernel takes (attention_cast).
"""

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
from triton.tools.tensor_descriptor import TensorDescriptor

from ..formats import E4M3, E5M2, saturating_cast
from .attention_cast import P_SCALE, PAD
from .attention_forward import (
    LOG2_E,
    bshc,
    exp2,
    left_operand,
    load_tile,
    masked_scores,
    require_hopper,
    store_rows,
    store_tile,
    tiles,
)

BLOCK_Q = gl.constexpr(64)
HALF = gl.constexpr(64)  # keys of one warpgroup
BLOCK_KV = gl.constexpr(128)
STAGES = gl.constexpr(4)
LAG = gl.constexpr(1)  # the ring is refilled this many tiles behind the first warpgroup
SCRATCH_BYTES = 9 << 28  # 2.25 GiB: dS8 of batch 2, 32 heads, 8192 tokens in one go

GL_DTYPE = {E4M3: gl.float8e4nv, E5M2: gl.float8e5}


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def _pair_rows(x):
    """x [M, N] float8, a cast product -> [M / 2, N] uint16: rows r and r + 8 of each 16 as low and high byte."""
    bits = x.to(gl.uint8, bitcast=True).reshape([x.shape[0] // 16, 2, 8, x.shape[1]])
    low, high = bits.permute((0, 2, 3, 1)).split()
    # Not low | high << 8: Triton 3.6's ptxas (12.8) gets that wrong behind the float8 conversion (seen on an H200).
    words = gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x5140; prmt.b32 $1, $2, $3, 0x7362;", "=r,=r,r,r", [low, high],
        dtype=gl.uint16, is_pure=True, pack=4,
    )  # fmt: skip
    return words.reshape([x.shape[0] // 2, x.shape[1]])


@gluon.jit
def _position(step, work):
    """(query head, first query) of a step: the masked tiles of all heads of the group come first, then the full ones."""
    first_head, group, first, count, _, _ = work
    per_head: gl.constexpr = BLOCK_KV // BLOCK_Q
    full = gl.maximum(step - group * per_head, 0)
    width = gl.maximum(count, 1)
    masked = step < group * per_head
    head = gl.where(masked, step // per_head, full // width)
    start = gl.where(masked, step % per_head * BLOCK_Q, BLOCK_KV + full % width * BLOCK_Q)
    return first_head + head, first + start


@gluon.jit
def _load(step, work, sources, rings, full, empty, C: gl.constexpr):
    """Fetch the tiles of a step, once both warpgroups have done with what their stage held."""
    q8, q8_t, do8, do8_t, shift, delta = sources
    q_ring, qt_ring, do_ring, dot_ring, shift_ring, delta_ring = rings
    stage = step % STAGES
    head, start = _position(step, work)
    row = head * work[4] + start
    arrived = full.index(stage)
    mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
    mbarrier.expect(arrived, 4 * BLOCK_Q * C + 2 * 4 * BLOCK_Q)
    load_tile(q8, [row, 0], arrived, q_ring.index(stage))
    load_tile(do8, [row, 0], arrived, do_ring.index(stage))
    load_tile(shift, [row], arrived, shift_ring.index(stage))
    load_tile(delta, [row], arrived, delta_ring.index(stage))
    load_tile(do8_t, [head * C, start], arrived, dot_ring.index(stage))
    load_tile(q8_t, [head * C, start], arrived, qt_ring.index(stage))


@gluon.jit
def _steps(dk, dv, largest, begin, end, work, k, v, sources, rings, full, empty, ds, staging, factor, ds_factor,
           C: gl.constexpr, PART: gl.constexpr, MASKED: gl.constexpr, RECORD: gl.constexpr, DS_DTYPE: gl.constexpr,
           S_LAYOUT: gl.constexpr, ACC_LAYOUT: gl.constexpr):  # fmt: skip
    """Steps begin to end - 1 of a warpgroup. dk, dv [HALF, C] float32, largest [HALF] float32: the running results."""
    QUERIES: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC_LAYOUT, 4)
    _, group, first, count, _, tiles_per_head = work
    q_ring, qt_ring, do_ring, dot_ring, shift_ring, delta_ring = rings
    zeros = gl.zeros([HALF, BLOCK_Q], gl.float32, S_LAYOUT)
    total = group * (BLOCK_KV // BLOCK_Q + count)
    for step in range(begin, end):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        s = warpgroup_mma(k, q_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        dp = warpgroup_mma(v, do_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, [s])
        tma.store_wait(0)
        if step > 0:  # products end in order: all that read the last stage have ended
            mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        if PART == 0:  # noqa: SIM102  (this one is decided by the compiler, the next at run time)
            if step + STAGES - LAG < total:
                _load(step + STAGES - LAG, work, sources, rings, full, empty, C)
        p = exp2(s * factor + gl.expand_dims(shift_ring.index(stage).load(QUERIES), 0))
        head, start = _position(step, work)
        if MASKED:
            queries = start + gl.arange(0, BLOCK_Q, QUERIES)
            keys = first + PART * HALF + gl.arange(0, HALF, gl.SliceLayout(1, S_LAYOUT))
            p = gl.where(gl.expand_dims(queries, 0) >= gl.expand_dims(keys, 1), p, 0.0)
        p8 = left_operand(p.to(gl.float8e4nv), LEFT)
        dp = warpgroup_mma_wait(0, [dp])
        d = p * (dp * ds_factor - gl.expand_dims(delta_ring.index(stage).load(QUERIES), 0))
        if RECORD:
            largest = _larger(largest, gl.reduce(gl.abs(d), 1, _larger))
        d8 = d.to(DS_DTYPE)  # the instruction saturates and keeps NaN
        # Both products only now: ptxas runs all products one by one if a left operand is made while one is under way.
        d8_left = left_operand(d8, LEFT)
        dv = warpgroup_mma(p8, dot_ring.index(stage).permute((1, 0)), dv, is_async=True)
        dk = warpgroup_mma(d8_left, qt_ring.index(stage).permute((1, 0)), dk, is_async=True)
        staging.store(_pair_rows(d8).permute((1, 0)))
        fence_async_shared()
        row, column = (
            start // BLOCK_KV,
            first // BLOCK_KV,
        )  # of 128 x 128 tiles; of each row only those up to the diagonal
        tile = head * tiles_per_head + row * (row + 1) // 2 + column
        store_tile(ds, [tile * BLOCK_KV + start % BLOCK_KV, PART * HALF // 2], staging)
    return dk, dv, largest


@gluon.jit
def _warpgroup(work, k, v, ready, sources, rings, full, empty, ds, staging, factors, s_ds, amax_bits, dk_out, dv_out,
               seq_len, stride_s,
               C: gl.constexpr, PART: gl.constexpr, RECORD: gl.constexpr, DS_DTYPE: gl.constexpr):  # fmt: skip
    """dK and dV of the PART-th 64 of the program's 128 keys."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 32])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 32])
    _, group, first, count, _, _ = work
    factor, ds_factor, dk_factor, dv_factor = factors
    masked = group * (BLOCK_KV // BLOCK_Q)
    total = masked + group * count
    if PART == 0:
        for step in range(0, gl.minimum(STAGES - LAG, total)):
            _load(step, work, sources, rings, full, empty, C)
    # Here, not before the warpgroups part: Triton would take the barrier's memory for what it hands to the second one,
    # while some warps still look at the barrier.
    mbarrier.wait(ready, 0)
    k, v = k.slice(PART * HALF, HALF), v.slice(PART * HALF, HALF)
    dk = warpgroup_mma_init(gl.zeros([HALF, C], gl.float32, ACC_LAYOUT))
    dv = warpgroup_mma_init(gl.zeros([HALF, C], gl.float32, ACC_LAYOUT))
    largest = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    dk, dv, largest = _steps(dk, dv, largest, 0, masked, work, k, v, sources, rings, full, empty, ds, staging,
                             factor, ds_factor, C, PART, True, RECORD, DS_DTYPE, S_LAYOUT, ACC_LAYOUT)  # fmt: skip
    dk, dv, largest = _steps(dk, dv, largest, masked, total, work, k, v, sources, rings, full, empty, ds, staging,
                             factor, ds_factor, C, PART, False, RECORD, DS_DTYPE, S_LAYOUT, ACC_LAYOUT)  # fmt: skip
    dk, dv = warpgroup_mma_wait(0, [dk, dv])
    tma.store_wait(0)
    if RECORD:
        bits = (gl.reduce(largest, 0, _larger) / s_ds).to(gl.int32, bitcast=True) & 0x7FFFFFFF
        gl.atomic_max(amax_bits, bits, sem="relaxed")  # of bit patterns: exact in any order, and NaN wins
    store_rows(dk * dk_factor, dk_out, first + PART * HALF, seq_len, stride_s)
    store_rows(dv * dv_factor, dv_out, first + PART * HALF, seq_len, stride_s)


@gluon.jit
def kv_kernel(q8, q8_t, k8, v8, do8, do8_t, ds, shift, delta, scale_q, scale_k, scale_v, scale_do, scale_ds, amax_bits,
              dk_out, dv_out, softmax_scale, seq_len, padded_len, tiles_per_head, kv_heads, group,
              stride_b, stride_h, stride_s,
              C: gl.constexpr, RECORD: gl.constexpr, P_SCALE: gl.constexpr, DS_DTYPE: gl.constexpr):  # fmt: skip
    kv_head = gl.program_id(0)
    first = (
        gl.program_id(1) * BLOCK_KV
    )  # the first keys are seen by the most queries: the longest programs first
    s_q, s_ds, s_do = gl.load(scale_q), gl.load(scale_ds), gl.load(scale_do)
    factors = (
        softmax_scale * LOG2_E / (s_q * gl.load(scale_k)),
        s_ds / (P_SCALE * s_do * gl.load(scale_v)),
        softmax_scale / (s_q * s_ds),
        1.0 / (P_SCALE * s_do),
    )
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
    load_tile(k8, [kv_head * padded_len + first, 0], ready, k)
    load_tile(v8, [kv_head * padded_len + first, 0], ready, v)

    work = (
        kv_head * group,
        group,
        first,
        (padded_len - first - BLOCK_KV) // BLOCK_Q,
        padded_len,
        tiles_per_head,
    )
    sources = (q8, q8_t, do8, do8_t, shift, delta)
    where = (kv_head // kv_heads).to(gl.int64) * stride_b + (kv_head % kv_heads).to(gl.int64) * stride_h
    dk_out += where
    dv_out += where
    # All 256 registers to both warpgroups: with 248, or a third partition that only loads, products run one by one.
    gl.warp_specialize([
        (_warpgroup, (work, k, v, ready, sources, rings, full, empty, ds, staging.index(0), factors, s_ds, amax_bits,
                      dk_out, dv_out, seq_len, stride_s, C, 0, RECORD, DS_DTYPE)),
        (_warpgroup, (work, k, v, ready, sources, rings, full, empty, ds, staging.index(1), factors, s_ds, amax_bits,
                      dk_out, dv_out, seq_len, stride_s, C, 1, RECORD, DS_DTYPE)),
    ], [4], [256])  # fmt: skip


@triton.jit
def q_kernel(ds, k8_t, scale_k, scale_ds, dq_out, softmax_scale, seq_len, tiles_per_head, heads, group,
             stride_b, stride_h, stride_s, C: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dQ of BLOCK queries of one head."""
    row = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest rows first
    head = tl.program_id(0)
    tile = head * tiles_per_head + row * (row + 1) // 2
    acc = tl.zeros([BLOCK, C], tl.float32)
    for column in tl.range(0, row + 1):
        d = ds.load([(tile + column) * BLOCK, 0])
        k = k8_t.load([head // group * C, column * BLOCK])
        acc = tl.dot(d, k.T, acc)
    acc *= softmax_scale / (tl.load(scale_k) * tl.load(scale_ds))
    rows = row * BLOCK + tl.arange(0, BLOCK)
    where = (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
    where += rows.to(tl.int64)[:, None] * stride_s + tl.arange(0, C)[None, :]
    tl.store(dq_out + where, acc.to(dq_out.dtype.element_ty), (rows < seq_len)[:, None])


def tiles_per_head(length: int) -> int:
    """How many 128 x 128 tiles of dS lie on or below the diagonal."""
    return length // PAD * (length // PAD + 1) // 2


def launch_q(
    ds8: Tensor, k8_t: Tensor, scale_k: Tensor, scale_ds: Tensor, dq: Tensor, softmax_scale: float
) -> None:
    """dq [B, H, S, C] from ds8 [B * H * tiles * 128, 128] and k8_t [B, K, C, L], both in `pairs` order."""
    batch, kv_heads, dim, length = k8_t.shape
    heads = dq.shape[1]
    q_kernel[(batch * heads, length // PAD)](
        TensorDescriptor.from_tensor(ds8, [PAD, PAD]),
        TensorDescriptor.from_tensor(k8_t.view(-1, length), [dim, PAD]),
        scale_k, scale_ds, dq, softmax_scale, dq.shape[2], tiles_per_head(length), heads, heads // kv_heads,
        *dq.stride()[:3], C=dim, BLOCK=PAD, num_warps=8, num_stages=3,  # type: ignore
    )  # fmt: skip


def launch_backward(
    q8: Tensor, k8: Tensor, q8_t: Tensor, k8_t: Tensor, v8: Tensor, do8: Tensor, do8_t: Tensor, shift: Tensor, delta: Tensor,
    scale_q: Tensor, scale_k: Tensor, scale_v: Tensor, scale_do: Tensor, scale_ds: Tensor, amax_ds: Tensor,
    softmax_scale: float, seq_len: int, ds_dtype: torch.dtype, record: bool, scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv): see `attention.attention_backward`."""
    require_hopper(q8.device)
    batch, heads, length, dim = q8.shape
    kv_heads = k8.shape[1]
    group = heads // kv_heads
    dq = bshc(q8, batch, heads, seq_len, dim, torch.bfloat16)
    dk, dv = (bshc(k8, batch, kv_heads, seq_len, dim, torch.bfloat16) for _ in range(2))
    # As many whole batch elements at a time as fit the scratch; if not even one does, as many of its kv heads.
    unit = group * tiles_per_head(length) * PAD * PAD
    batches = max(1, scratch_bytes // (unit * kv_heads))
    some = min(kv_heads, max(1, scratch_bytes // unit))
    ds8 = q8.new_empty(
        (min(batches, batch) * some * group * tiles_per_head(length) * PAD, PAD), dtype=ds_dtype
    )
    whole = batches >= batch and some == kv_heads

    def part(x: Tensor, batches: slice, heads: slice) -> Tensor:
        return x if whole else x[batches, heads]  # slicing takes the host as long as the launch

    for b in range(0, batch, batches):
        for n in range(0, kv_heads, some):
            kv = slice(b, b + batches), slice(n, n + some)
            q = slice(b, b + batches), slice(n * group, (n + some) * group)
            here = part(k8, *kv)
            kv_kernel[(here.shape[0] * here.shape[1], length // BLOCK_KV.value)](
                tiles(part(q8, *q), BLOCK_Q.value, dim), tiles(part(q8_t, *q), dim, BLOCK_Q.value),
                tiles(here, BLOCK_KV.value, dim), tiles(part(v8, *kv), BLOCK_KV.value, dim),
                tiles(part(do8, *q), BLOCK_Q.value, dim), tiles(part(do8_t, *q), dim, BLOCK_Q.value),
                tiles(ds8.view(torch.uint16), BLOCK_Q.value, HALF.value // 2),
                tiles(part(shift, *q), BLOCK_Q.value), tiles(part(delta, *q), BLOCK_Q.value),
                scale_q, scale_k, scale_v, scale_do, scale_ds, amax_ds.view(torch.int32), part(dk, *kv), part(dv, *kv),
                softmax_scale, seq_len, length, tiles_per_head(length), here.shape[1], group, *dk.stride()[:3],
                C=dim, RECORD=record, P_SCALE=P_SCALE, DS_DTYPE=GL_DTYPE[ds_dtype], num_warps=4,  # type: ignore
            )  # fmt: skip
            launch_q(ds8, part(k8_t, *kv), scale_k, scale_ds, part(dq, *q), softmax_scale)
    return dq, dk, dv


def backward_reference(
    q8: Tensor, k8: Tensor, q8_t: Tensor, k8_t: Tensor, v8: Tensor, do8: Tensor, do8_t: Tensor, shift: Tensor, delta: Tensor,
    scale_q: Tensor, scale_k: Tensor, scale_v: Tensor, scale_do: Tensor, scale_ds: Tensor, amax_ds: Tensor,
    softmax_scale: float, seq_len: int, ds_dtype: torch.dtype, record: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`launch_backward` in plain PyTorch; holds all of S and leaves the transposed operands alone."""
    group = q8.shape[1] // k8.shape[1]
    q, do = q8.float(), do8.float()
    k, v = (t.float().repeat_interleave(group, 1) for t in (k8, v8))
    s = masked_scores(q8, k8, softmax_scale * LOG2_E.value / (scale_q * scale_k))
    p = torch.exp2(s + shift[..., None])
    d = p * (do @ v.mT * (scale_ds / (P_SCALE * scale_do * scale_v)) - delta[..., None])
    if record:
        amax_ds.copy_(torch.maximum(amax_ds, d.abs().amax() / scale_ds))
    p8, d8 = saturating_cast(p, 1.0, E4M3).float(), saturating_cast(d, 1.0, ds_dtype).float()
    dq = d8 @ k * (softmax_scale / (scale_k * scale_ds))
    dk = (d8.mT @ q).unflatten(1, (-1, group)).sum(2) * (softmax_scale / (scale_q * scale_ds))
    dv = (p8.mT @ do).unflatten(1, (-1, group)).sum(2) / (P_SCALE * scale_do)
    results = []
    for x in (dq, dk, dv):
        out = bshc(x, x.shape[0], x.shape[1], seq_len, x.shape[3], torch.bfloat16)
        results.append(out.copy_(x[:, :, :seq_len]))
    return results[0], results[1], results[2]
