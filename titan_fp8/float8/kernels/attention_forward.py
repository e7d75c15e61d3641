"""FP8 attention forward for Hopper: O = softmax(softmax_scale * q k^T, causal) v in one pass over k and v (online softmax).

    S = q8 k8^T * c           c = softmax_scale * log2(e) / (s_q s_k): exponentials are taken to base 2
    P = 256 * 2^(S - m)       m: the row's maximum so far; P in (0, 256], cast to E4M3
    l = sum P                 of P before the cast
    O = (P8 v8) / (s_v l)     shift = 16 - m - log2 l, kept for backward: there 256 * softmax(S) is 2^(S + shift)

`forward_reference` subtracts the row's final maximum. Here P is cast against the maximum so far, and the sums are
rescaled when that grows: P8 is rounded with the same relative precision, but not to the same bits.

One program computes 64 queries of one head with one warpgroup: 64 x 128 tiles of S, the diagonal one first (it alone
needs the mask), then those before it. The product P v of a tile runs while the softmax of the next is computed. Two
programs share a multiprocessor. Tiles of k and v come through rings of STAGES buffers, filled by the copy engine (TMA):

    full[stage]    the tile has arrived            empty[stage]    the tile has been used

Written in Gluon, Triton's lower level: Triton 3.6 waits for each product before the next instruction.
"""

from __future__ import annotations

from copy import copy
from functools import cache

import torch
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

from titan_fp8.errors import UserError

from ..formats import E4M3, saturating_cast
from .attention_cast import P_SCALE, unquad  # the 8 and 16 above are the logarithm of P_SCALE and twice that

# The same two under the names of Triton 3.6 and of later releases.
load_tile = getattr(tma, "async_load", tma.async_copy_global_to_shared)
store_tile = getattr(tma, "async_store", tma.async_copy_shared_to_global)

LOG2_E = gl.constexpr(1.4426950408889634)
BLOCK_Q = gl.constexpr(64)
BLOCK_KV = gl.constexpr(128)
STAGES = gl.constexpr(3)
AHEAD = gl.constexpr(
    2
)  # tiles under way before they are needed; the stage of the tile before last is free by then


@gluon.jit
def exp2(x):
    """2^x; results below 2^-126 are zero, which saves the three instructions that gl.exp2 spends on them."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def left_operand(x, layout: gl.constexpr):
    """x [M, N] float8, a cast product -> left operand of the next one, its columns in `quads` order (attention_cast).

    In that order each thread already holds what it needs; in plain order threads would have to exchange.
    """
    x = x.reshape([x.shape[0], x.shape[1] // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))
    return gl.convert_layout(x.reshape([x.shape[0], x.shape[1] * 16]), layout, assert_trivial=True)


@gluon.jit
def _load(
    k8, v8_t, row_k, row_v, tile, step, k_ring, v_ring, k_full, k_empty, v_full, v_empty, C: gl.constexpr
):
    """Fetch tile number `tile` of k and v as the step-th tiles."""
    stage = step % STAGES
    used = (step // STAGES & 1) ^ 1
    mbarrier.wait(k_empty.index(stage), used)
    mbarrier.expect(k_full.index(stage), BLOCK_KV * C)
    load_tile(k8, [row_k + tile * BLOCK_KV, 0], k_full.index(stage), k_ring.index(stage))
    mbarrier.wait(v_empty.index(stage), used)
    mbarrier.expect(v_full.index(stage), BLOCK_KV * C)
    load_tile(v8_t, [row_v, tile * BLOCK_KV], v_full.index(stage), v_ring.index(stage))


@gluon.jit
def forward_kernel(q8, k8, v8_t, scale_q, scale_k, scale_v, o, shift, softmax_scale, seq_len, padded_len, heads, group,
                   stride_b, stride_h, stride_s, C: gl.constexpr):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV, 32])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 32])
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 4)
    q_start = (gl.num_programs(1) - 1 - gl.program_id(1)) * BLOCK_Q  # the longest rows first
    head = gl.program_id(0)
    row_k, row_v = head // group * padded_len, head // group * C
    factor = softmax_scale * LOG2_E / (gl.load(scale_q) * gl.load(scale_k))

    q = gl.allocate_shared_memory(q8.dtype, [BLOCK_Q, C], q8.layout)
    k_ring = gl.allocate_shared_memory(k8.dtype, [STAGES, BLOCK_KV, C], k8.layout)
    v_ring = gl.allocate_shared_memory(v8_t.dtype, [STAGES, C, BLOCK_KV], v8_t.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=1)
    mbarrier.init(q_full, count=1)
    fence_async_shared()
    mbarrier.expect(q_full, BLOCK_Q * C)
    load_tile(q8, [head * padded_len + q_start, 0], q_full, q)
    count = q_start // BLOCK_KV + 1
    for i in range(0, gl.minimum(AHEAD, count)):
        _load(k8, v8_t, row_k, row_v, count - 1 - i, i, k_ring, v_ring, k_full, k_empty, v_full, v_empty, C)

    zeros = gl.zeros([BLOCK_Q, BLOCK_KV], gl.float32, S_LAYOUT)
    acc = gl.zeros([BLOCK_Q, C], gl.float32, O_LAYOUT)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, k_ring.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    mbarrier.arrive(k_empty.index(0), count=1)
    queries = q_start % BLOCK_KV + gl.arange(0, BLOCK_Q, ROWS)
    keys = gl.arange(0, BLOCK_KV, gl.SliceLayout(0, S_LAYOUT))
    s = gl.where(gl.expand_dims(queries, 1) >= gl.expand_dims(keys, 0), s, float("-inf"))
    m = gl.max(s, 1) * factor
    p = exp2(s * factor - gl.expand_dims(m - 8.0, 1))
    l = gl.sum(p, 1)  # noqa: E741  (the literature's name)
    for step in range(1, count):
        stage, before = step % STAGES, (step - 1) % STAGES
        # Cast here, not where p is made: bytes carried around a loop would take a register each.
        p8 = left_operand(p.to(gl.float8e4nv), LEFT)
        mbarrier.wait(k_full.index(stage), step // STAGES & 1)
        s = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), (step - 1) // STAGES & 1)
        acc = warpgroup_mma(p8, v_ring.index(before).permute((1, 0)), acc, is_async=True)
        s = warpgroup_mma_wait(1, [s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        ahead = step - 1 + AHEAD
        if ahead < count:
            tile = count - 1 - ahead
            _load(k8, v8_t, row_k, row_v, tile, ahead, k_ring, v_ring, k_full, k_empty, v_full, v_empty, C)
        m_new = gl.maximum(m, gl.max(s, 1) * factor)
        p = exp2(s * factor - gl.expand_dims(m_new - 8.0, 1))
        alpha = exp2(m - m_new)
        l = l * alpha + gl.sum(p, 1)  # noqa: E741
        m = m_new
        acc, p = warpgroup_mma_wait(0, [acc, p])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, O_ROWS), 1)
    last = (count - 1) % STAGES
    p8 = left_operand(p.to(gl.float8e4nv), LEFT)
    mbarrier.wait(v_full.index(last), (count - 1) // STAGES & 1)
    acc = warpgroup_mma(p8, v_ring.index(last).permute((1, 0)), acc, is_async=True)
    rows = q_start + gl.arange(0, BLOCK_Q, ROWS)
    gl.store(shift + head.to(gl.int64) * padded_len + rows, 16.0 - m - gl.log2(l))
    acc = warpgroup_mma_wait(0, [acc])
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / (l * gl.load(scale_v)), O_ROWS), 1)
    o += (head // heads).to(gl.int64) * stride_b + (head % heads).to(gl.int64) * stride_h
    store_rows(acc, o, q_start, seq_len, stride_s)


@gluon.jit
def store_rows(acc, pointer, start, seq_len, stride_s):
    """acc [M, C], a product, to the rows from `start` on of a matrix that has seq_len rows."""
    layout: gl.constexpr = acc.type.layout
    rows = start + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    channels = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    where = gl.expand_dims(rows.to(gl.int64), 1) * stride_s + gl.expand_dims(channels, 0)
    gl.store(pointer + where, acc.to(pointer.dtype.element_ty), gl.expand_dims(rows < seq_len, 1))


def tiles(x: Tensor, *block: int) -> TensorDescriptor:
    """Contiguous x for the copy engine: blocks of two numbers are of its [-1, N] matrix, of one number of the flat x."""
    assert x.is_contiguous()
    descriptor = copy(_tiles(x.shape, x.dtype, block))
    descriptor.base = x
    return descriptor


@cache
def _tiles(shape: torch.Size, dtype: torch.dtype, block: tuple[int, ...]) -> TensorDescriptor:
    """A descriptor without memory, one per shape: Triton checks each in Python for as long as a launch takes."""
    matrix = torch.empty(shape, dtype=dtype, device="meta").view(
        (-1, shape[-1]) if len(block) == 2 else (-1,)
    )
    swizzle = min(128, block[-1] * dtype.itemsize) if len(block) == 2 else 0
    layout = gl.NVMMASharedLayout(swizzle, 8 * dtype.itemsize, rank=len(block))
    return TensorDescriptor.from_tensor(matrix, list(block), layout)


@cache
def require_hopper(device: torch.device) -> None:
    """Raises UserError where the device cannot run these kernels."""
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        raise UserError(
            f"FP8 attention needs a Hopper GPU (compute capability 9.0), got {major}.{minor}"
            f' ({torch.cuda.get_device_name(device)}): set [fp8] attention = "off"'
        )


def bshc(x: Tensor, batch: int, heads: int, seq_len: int, dim: int, dtype: torch.dtype) -> Tensor:
    """A new [B, H, S, C] on x's device, stored as [B, S, H, C]: what linear layers write and read."""
    return x.new_empty((batch, seq_len, heads, dim), dtype=dtype).transpose(1, 2)


def launch_forward(
    q8: Tensor,
    k8: Tensor,
    v8_t: Tensor,
    scale_q: Tensor,
    scale_k: Tensor,
    scale_v: Tensor,
    softmax_scale: float,
    seq_len: int,
) -> tuple[Tensor, Tensor]:
    """(o, shift): see `attention.attention_forward`."""
    require_hopper(q8.device)
    batch, heads, length, dim = q8.shape
    o = bshc(q8, batch, heads, seq_len, dim, torch.bfloat16)
    shift = q8.new_empty((batch, heads, length), dtype=torch.float32)
    forward_kernel[(batch * heads, length // BLOCK_Q.value)](
        tiles(q8, BLOCK_Q.value, dim), tiles(k8, BLOCK_KV.value, dim), tiles(v8_t, dim, BLOCK_KV.value),
        scale_q, scale_k, scale_v, o, shift, softmax_scale, seq_len, length, heads, heads // k8.shape[1],
        *o.stride()[:3], C=dim, num_warps=4,  # type: ignore
    )  # fmt: skip
    return o, shift


def masked_scores(q8: Tensor, k8: Tensor, factor: Tensor) -> Tensor:
    """factor * q k^T with the causal mask: [B, H, L, L] float32. k8 may have fewer heads."""
    k = k8.float().repeat_interleave(q8.shape[1] // k8.shape[1], 1)
    s = (q8.float() @ k.mT) * factor
    return s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf)


def forward_reference(
    q8: Tensor,
    k8: Tensor,
    v8_t: Tensor,
    scale_q: Tensor,
    scale_k: Tensor,
    scale_v: Tensor,
    softmax_scale: float,
    seq_len: int,
) -> tuple[Tensor, Tensor]:
    """`launch_forward` in plain PyTorch; holds all of S."""
    s = masked_scores(q8, k8, softmax_scale * LOG2_E.value / (scale_q * scale_k))
    m = s.amax(-1, keepdim=True)
    p = P_SCALE * torch.exp2(s - m)
    l = p.sum(-1, keepdim=True)  # noqa: E741
    v = unquad(v8_t.float()).mT.repeat_interleave(q8.shape[1] // v8_t.shape[1], 1)
    o = (saturating_cast(p, 1.0, E4M3).float() @ v) / (scale_v * l)
    out = bshc(q8, q8.shape[0], q8.shape[1], seq_len, q8.shape[3], torch.bfloat16)
    out.copy_(o[:, :, :seq_len])
    return out, (16.0 - m - torch.log2(l)).squeeze(-1)
