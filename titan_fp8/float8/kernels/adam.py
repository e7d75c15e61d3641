"""AdamW with moments in 8 bits: many parameters of any size in one kernel launch, one pass over memory.

For every element, in float32, with t the step and * the moments as they were stored (their stored values decoded):

    g = grad / grad_scale          m = b1 m* + (1 - b1) g          v = b2 v* + (1 - b2) g^2
    r = clamp( m/(1 - b1^t) / (sqrt(v/(1 - b2^t)) + eps), -limit, limit )
    p = p - lr (r + weight_decay p)

m and v are stored as codes with one float32 scale per block of `block` consecutive elements of a row (the last
dimension; a row's last block may be short), from the block's own amax as it is now: nothing saturates.

    q_m = cast(m s_m)              q_v = cast(max(v s_v, smallest code))          s = largest code / amax(block)

A block of zeros has scale 1 and codes 0. With `block` 0 the whole tensor has one scale per moment (the paper's), in two
passes. bf16 and float32 moments have no scales. Rows are whole, so that slices of rows can be saved and loaded anywhere.

What goes wrong in low-bit Adam is that v rounds to 0 where m does not: m/eps is then a step of 1e8. Two rules against it:
* No code of v is 0 in a block that has something else: the least is 2^-16 (E5M2). Such a v is too large, its step too small.
* |r| <= limit, the most that exact Adam can reach: by Cauchy-Schwarz, with k = b1^2/b2,
      |m_t| <= sqrt(v_t) (1 - b1) sqrt((1 - k^t) / (1 - k) / (1 - b2))
  so that |r| < 1.165 for betas 0.9, 0.95. What float32 Adam does is never cut; what a v that rounding holds down, or an m
  that it holds up, would add is (r up to 2.4 in tests).

To nearest, neighbours in E5M2 lie 14 to 25 % apart, and a v falls only because its block's scale, which moves every step,
shakes it. Measured on gradients that shrink tenfold: v follows with b2 = 0.95 and does not with b2 = 0.999 (nor in bf16).
Rounding stochastically, up or down with the probability that makes the mean right, follows float32 in both. The bits:

    Philox4x32-7, key = seed, counter = (column and row in the whole parameter, step, number of the parameter)

give a word for m, v and p each, so that a result depends neither on the launch nor, for matrices, on how they are sharded.

`reference` is the same in plain PyTorch for one tensor, and what runs where there is no CUDA. The kernel computes m, v and
their scales by the same float32 operations in the same order, so these have the same bits. For p it takes the fast root and
reciprocal, whose exact forms are a third of all instructions, and fuses. With u = 2^-24, the two r then differ by at most
    2u root + 2u reciprocal + 2u (sum and product here) + 4u (root, product, sum, quotient there) = 10u |r|
to first order (IEEE errs by u, the approximations by 2u), and the two p, before they are rounded to p's dtype, by at most
    10u lr |r| + 3u lr (|r| + wd |p|) + 2u |p| < 2^-20 lr (|r| + wd |p|) + 2^-23 |p|
A root below 2^-63, which counts beside eps only if that is as small, is 0.

A launch also takes the amax of the new p, as stored: the FP8 layers' weight scales need it, and here it costs no pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.float8.formats import E4M3, E5M2, FP8_MAX, scale_from_amax

SMALLEST = {E4M3: 2.0**-9, E5M2: 2.0**-16}
MIN_NORMAL = {
    E4M3: 2.0**-6,
    E5M2: 2.0**-14,
    torch.float16: 2.0**-14,
    torch.bfloat16: 2.0**-126,
    torch.float32: 0.0,
}
# Bits of a float32's mantissa that the format lacks.
DROPPED = {E4M3: 20, E5M2: 21, torch.float16: 13, torch.bfloat16: 16, torch.float32: 0}
TRITON = {
    E4M3: tl.float8e4nv,
    E5M2: tl.float8e5,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}
TILE = 4096  # elements per program, and
LANES = 256  # at a time, by one warp
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ROUNDS = 7  # of Philox; the fewest that pass BigCrush


@dataclass(frozen=True)
class Rule:
    """What is the same for all tensors of a launch. `block`: a power of two; 0: one scale per tensor."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    block: int
    stochastic_moments: bool
    stochastic_parameters: bool
    seed: int


class Slot(NamedTuple):
    """One parameter, or this rank's shard of it. All contiguous, of p's shape but for the scales.

    p: float32, bfloat16 or float16. m, v: FP8, bfloat16 or float32. m_scale, v_scale: float32, of p's shape with its last
    dimension in blocks, or 0-dim (block 0); None beside moments that are not FP8.
    number, row, column: number of the parameter, and where in it the shard begins.
    """

    p: Tensor
    m: Tensor
    v: Tensor
    m_scale: Tensor | None
    v_scale: Tensor | None
    number: int = 0
    row: int = 0
    column: int = 0

    def formats(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        return self.p.dtype, self.m.dtype, self.v.dtype


# Columns of `numbers`, float32 [tensors, 6], which the optimizer computes on the device before each step.
NUMBERS = ("correction1", "correction2", "limit", "lr", "master_scale", "step")


def numbers(
    steps: Tensor, lr: Tensor | float, beta1: float, beta2: float, master: Tensor | None = None
) -> Tensor:
    """[n, 6] float32, columns as in NUMBERS: 1/(1 - b1^t), 1/sqrt(1 - b2^t), limit, lr, scale of float16 parameters, t.

    steps [n] float32: t, from 1 on. Powers in float64: 1 - 0.999 has 4 digits in float32. No host sync.
    """
    t = steps.double()
    rest1, rest2 = 1 - beta1**t, 1 - beta2**t
    k = beta1**2 / beta2 if beta2 else float("inf")
    series = t if k == 1 else (1 - k**t) / (1 - k) if k < float("inf") else torch.full_like(t, float("inf"))
    limit = (1 - beta1) / rest1 * (series / (1 - beta2) * rest2).sqrt()
    # Room for the float32 roundings of exact Adam itself.
    master = torch.ones_like(t) if master is None else master
    columns = (1 / rest1, rest2.rsqrt(), limit * (1 + 1e-5), torch.zeros_like(t) + lr, master, t)
    return torch.stack([column.to(t).expand_as(t) for column in columns], 1).float()


# ---- Plain PyTorch ----


def philox(
    seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words for each counter, of four words each: int64 of any shapes that broadcast, 0 to 2^32 - 1."""
    low = 0xFFFFFFFF
    k0, k1 = seed & low, seed >> 32
    for _ in range(ROUNDS):
        h0, l0 = _multiply(0xD2511F53, c0)
        h2, l2 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = h2 ^ c1 ^ k0, l2, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers."""
    return (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16, (a * b) & 0xFFFFFFFF


def round_stochastically(y: Tensor, word: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 y as a number of `dtype` (still float32), up or down, so that the mean over `word` is y. NaN stays.

    Adding the smallest normal number gives subnormals the exponent, hence the spacing, that they have in `dtype`.
    """
    mask = (1 << DROPPED[dtype]) - 1
    normal = MIN_NORMAL[dtype]
    lift = torch.where(y.abs() < normal, torch.where(y < 0, -normal, normal), 0.0)
    bits = (y + lift).view(torch.int32)
    rounded = ((bits + (word & mask).int()) & ~mask).view(torch.float32) - lift
    return torch.where(y == y, rounded, y)


def blocks_per_row(columns: int, block: int) -> int:
    return -(-columns // block)


def _spread(scale: Tensor, block: int, columns: int) -> Tensor:
    """Scales [..., blocks] or [] as they apply to elements [..., columns]."""
    return scale if scale.ndim == 0 else scale.repeat_interleave(block, -1)[..., :columns]


def _block_amax(x: Tensor, block: int) -> Tensor:
    """[..., blocks]; [] with block 0. A NaN stays."""
    if not block:
        return x.abs().amax() if x.numel() else x.new_zeros(())
    short = -x.shape[-1] % block
    return torch.nn.functional.pad(x.abs(), (0, short)).unflatten(-1, (-1, block)).amax(-1)


def decode(codes: Tensor, scale: Tensor | None, block: int) -> Tensor:
    """The float32 values of a stored moment."""
    x = codes.float()
    return x if scale is None else x * _spread(1.0 / scale, block, codes.shape[-1])


def encode(
    x: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    block: int,
    positive: bool,
    word: Tensor | None = None,
    amax: Tensor | None = None,
) -> None:
    """Store float32 x in `codes` and `scale`, in place; `positive` for v, `word` to round stochastically.

    amax: of the whole tensor where x is a part of it (block 0).
    """
    y = x
    if scale is not None:
        amax = _block_amax(x, block) if amax is None else amax
        scale.copy_(scale_from_amax(amax, FP8_MAX[codes.dtype]))
        y = x * _spread(scale, block, x.shape[-1])
        if positive:
            floor = torch.where(amax == 0, 0.0, SMALLEST[codes.dtype])
            y = torch.maximum(y, _spread(floor, block, x.shape[-1]))
    if word is not None:
        y = round_stochastically(y, word, codes.dtype)
    if scale is not None:
        y = y.clamp(-FP8_MAX[codes.dtype], FP8_MAX[codes.dtype])
    codes.copy_(y)


def moments(slot: Slot, grad: Tensor, inverse: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """New m and v, float32. inverse: 1 / grad_scale, 0-dim float32."""
    g = grad.float() * inverse
    m = decode(slot.m, slot.m_scale, rule.block) * rule.beta1 + g * (1 - rule.beta1)
    v = decode(slot.v, slot.v_scale, rule.block) * rule.beta2 + g * g * (1 - rule.beta2)
    return m, v


def reference(
    slot: Slot, grad: Tensor, row: Tensor, inverse: Tensor, rule: Rule, amaxes: Tensor | None = None
) -> None:
    """One step of one tensor, in place. row [6]: its line of `numbers`; amaxes [2]: of m and v over all shards (block 0)."""
    correction1, correction2, limit, lr, master, step = row.unbind()
    m, v = moments(slot, grad, inverse, rule)
    ratio = ((m * correction1) / (v.sqrt() * correction2 + rule.eps)).clamp(-limit, limit)
    half = slot.p.dtype == torch.float16
    p = slot.p.float() * (1.0 / master) if half else slot.p.float()
    p = p - lr * (ratio + rule.weight_decay * p)
    p = p * master if half else p
    words: Any = (None, None, None)
    if rule.stochastic_moments or rule.stochastic_parameters:
        column, row_number = _places(slot)
        words = philox(rule.seed, column, row_number, step.long(), torch.full_like(column, slot.number))
    word_m, word_v = words[:2] if rule.stochastic_moments else (None, None)
    amax_m, amax_v = (None, None) if amaxes is None else amaxes.unbind()
    encode(m, slot.m, slot.m_scale, rule.block, False, word_m, amax_m)
    encode(v, slot.v, slot.v_scale, rule.block, True, word_v, amax_v)
    if rule.stochastic_parameters and slot.p.dtype != torch.float32:
        p = round_stochastically(p, words[2], slot.p.dtype)
    slot.p.copy_(p)


def _places(slot: Slot) -> tuple[Tensor, Tensor]:
    """int64 [columns] and [..., 1]: column and row of each element in the whole parameter."""
    shape, device = slot.p.shape or (1,), slot.p.device
    rows = torch.arange(slot.p.numel() // shape[-1], device=device) + slot.row
    columns = torch.arange(shape[-1], device=device) + slot.column
    return (columns, rows.view(*shape[:-1], 1)) if slot.p.ndim > 1 else (columns.view(slot.p.shape), rows[0])


# ---- The kernel ----


@triton.jit
def _round(y, word, DROPPED: tl.constexpr, NORMAL: tl.constexpr):
    """`round_stochastically`."""
    mask: tl.constexpr = (1 << DROPPED) - 1
    lift = tl.where(tl.abs(y) < NORMAL, tl.where(y < 0, -NORMAL, NORMAL), 0.0)
    bits = (y + lift).to(tl.int32, bitcast=True) + (word.to(tl.int32, bitcast=True) & mask)
    return tl.where(y == y, (bits & ~mask).to(tl.float32, bitcast=True) - lift, y)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _root(x):
    """sqrt(x) to 2^-23; 0 below 2^-126."""
    if INTERPRETED:
        return tl.sqrt(x)
    return tl.inline_asm_elementwise(
        "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _reciprocal(x):
    """1 / x to 2^-23, for normal x; 0 from 2^126 on."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _scale(amax, LARGEST: tl.constexpr):
    """`formats.scale_from_amax`."""
    usable = (amax > 0) & (amax < float("inf"))
    scale = tl.div_rn(1.0, tl.where(usable, amax, 1.0)) * LARGEST
    return tl.where(usable, tl.minimum(tl.maximum(scale, 2.0**-126), 2.0**126), 1.0)


@triton.jit
def _adam_kernel(
    owners_ptr, tensors_ptr, grads_ptr, numbers_ptr, inverse_ptr, found_inf_ptr, amaxes_ptr, p_amaxes_ptr,
    beta1, rest1, beta2, rest2, eps, weight_decay, seed,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    M_LARGEST: tl.constexpr, V_LARGEST: tl.constexpr, V_SMALLEST: tl.constexpr,
    P_DROPPED: tl.constexpr, M_DROPPED: tl.constexpr, V_DROPPED: tl.constexpr,
    P_NORMAL: tl.constexpr, M_NORMAL: tl.constexpr, V_NORMAL: tl.constexpr,
    RANDOM_M: tl.constexpr, RANDOM_P: tl.constexpr, ROUNDS: tl.constexpr,
    WHOLE: tl.constexpr, PER_TENSOR: tl.constexpr, ONLY_AMAX: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    # A program takes BLOCKS blocks of one tensor, ROWS at a time. m and v: FP8 where LARGEST is not 0.
    owner = tl.load(owners_ptr + tl.program_id(0))
    grad_address = tl.load(grads_ptr + owner)
    if (tl.load(found_inf_ptr) != 0.0) | (grad_address == 0):
        return
    line = tensors_ptr + owner * COLUMNS
    p_ptr = tl.load(line).to(tl.pointer_type(P))
    m_ptr = tl.load(line + 1).to(tl.pointer_type(M))
    v_ptr = tl.load(line + 2).to(tl.pointer_type(V))
    ms_ptr = tl.load(line + 3).to(tl.pointer_type(tl.float32))
    vs_ptr = tl.load(line + 4).to(tl.pointer_type(tl.float32))
    g_ptr = grad_address.to(tl.pointer_type(G))
    total, per_row, columns = (
        tl.load(line + 5).to(tl.int32),
        tl.load(line + 6).to(tl.int32),
        tl.load(line + 7),
    )
    first = (tl.program_id(0) - tl.load(line + 8).to(tl.int32)) * BLOCKS
    row0, column0, number = (
        tl.load(line + 9).to(tl.uint32),
        tl.load(line + 10).to(tl.uint32),
        tl.load(line + 11),
    )
    constants = numbers_ptr + owner * LINES
    correction1, correction2, limit = tl.load(constants), tl.load(constants + 1), tl.load(constants + 2)
    lr, master, step = tl.load(constants + 3), tl.load(constants + 4), tl.load(constants + 5).to(tl.uint32)
    inverse = tl.load(inverse_ptr)
    if WHOLE:
        # One layout for all tensors, so that nothing goes through shared memory: VECTOR consecutive elements for a thread.
        p_ptr = tl.multiple_of(p_ptr, VECTOR * P.primitive_bitwidth // 8)
        g_ptr = tl.multiple_of(g_ptr, VECTOR * G.primitive_bitwidth // 8)
        m_ptr = tl.multiple_of(m_ptr, VECTOR * M.primitive_bitwidth // 8)
        v_ptr = tl.multiple_of(v_ptr, VECTOR * V.primitive_bitwidth // 8)
    if PER_TENSOR:
        m_amax = tl.load(amaxes_ptr + 2 * owner).to(tl.float32, bitcast=True)
        v_amax = tl.load(amaxes_ptr + 2 * owner + 1).to(tl.float32, bitcast=True)
        m_decode = tl.div_rn(1.0, tl.load(ms_ptr)) if M_LARGEST > 0 else 1.0
        v_decode = tl.div_rn(1.0, tl.load(vs_ptr)) if V_LARGEST > 0 else 1.0
        m_scale, v_scale = _scale(m_amax, M_LARGEST), _scale(v_amax, V_LARGEST)
    row, lane = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    OTHER: tl.constexpr = None if WHOLE and ROWS == 1 else 0.0
    # Of |p|, or of |m| and |v|; folded after the loop.
    largest, largest_v = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)

    for done in range(0, min(BLOCKS, total - first), ROWS):
        block = first + done
        blocks = block + row
        exists = blocks < total
        if WHOLE:
            # Blocks lie end to end. Every row begins at a multiple of 16 elements.
            start = block.to(tl.int64) * BLOCK
            offset = row[:, None] * BLOCK + lane[None, :]
            inside = None if ROWS == 1 else exists[:, None] & (lane >= 0)[None, :]
        else:
            column = (blocks % per_row) * BLOCK
            start = 0
            offset = ((blocks // per_row) * columns + column)[:, None] + lane[None, :]
            inside = exists[:, None] & (column[:, None] + lane[None, :] < columns)
        g = tl.load(g_ptr + start + offset, mask=inside, other=OTHER).to(tl.float32) * inverse
        m = tl.load(m_ptr + start + offset, mask=inside, other=OTHER).to(tl.float32)
        v = tl.load(v_ptr + start + offset, mask=inside, other=OTHER).to(tl.float32)
        p = tl.load(p_ptr + start + offset, mask=inside, other=OTHER).to(tl.float32)
        if M_LARGEST > 0:
            if not PER_TENSOR:
                m_decode = tl.div_rn(1.0, tl.load(ms_ptr + blocks, mask=exists, other=1.0))[:, None]
            m = m * m_decode
        if V_LARGEST > 0:
            if not PER_TENSOR:
                v_decode = tl.div_rn(1.0, tl.load(vs_ptr + blocks, mask=exists, other=1.0))[:, None]
            v = v * v_decode
        m = m * beta1 + g * rest1
        v = v * beta2 + g * g * rest2
        if ONLY_AMAX:
            largest, largest_v = _larger(largest, tl.abs(m)), _larger(largest_v, tl.abs(v))
        else:
            ratio = m * correction1 * _reciprocal(tl.fma(_root(v), correction2, eps))
            ratio = tl.clamp(ratio, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
            if tl.float16 == P:
                p = p * tl.div_rn(1.0, master)
            p = tl.fma(-lr, tl.fma(p, weight_decay, ratio), p)
            if tl.float16 == P:
                p = p * master

            if M_LARGEST > 0:
                if not PER_TENSOR:
                    scales = _scale(tl.reduce(tl.abs(m), 1, _larger), M_LARGEST)
                    tl.store(ms_ptr + blocks, scales, mask=exists)
                    m_scale = scales[:, None]
                m = m * m_scale
            if V_LARGEST > 0:
                if not PER_TENSOR:
                    v_amax = tl.reduce(tl.abs(v), 1, _larger)
                    scales = _scale(v_amax, V_LARGEST)
                    tl.store(vs_ptr + blocks, scales, mask=exists)
                    v_scale, v_amax = scales[:, None], v_amax[:, None]
                v = _larger(v * v_scale, tl.where(v_amax == 0, 0.0, V_SMALLEST))
            if RANDOM_M or RANDOM_P:
                c0 = (column0 + ((blocks % per_row) * BLOCK).to(tl.uint32))[:, None] + lane.to(tl.uint32)[
                    None, :
                ]
                zero = c0 * 0
                word_m, word_v, word_p, _ = tl.philox(
                    seed, c0, zero + (row0 + (blocks // per_row).to(tl.uint32))[:, None],
                    zero + step, zero + number.to(tl.uint32), ROUNDS,
                )  # fmt: skip
                if RANDOM_M:
                    m = _round(m, word_m, M_DROPPED, M_NORMAL)
                    v = _round(v, word_v, V_DROPPED, V_NORMAL)
                if RANDOM_P:
                    p = _round(p, word_p, P_DROPPED, P_NORMAL)
            largest = _larger(largest, tl.abs(p))
            # Conversions to FP8 saturate on the hardware that has them.
            tl.store(m_ptr + start + offset, m.to(M), mask=inside)
            tl.store(v_ptr + start + offset, v.to(V), mask=inside)
            tl.store(p_ptr + start + offset, p.to(P), mask=inside)
    if ONLY_AMAX:
        _fold(amaxes_ptr + 2 * owner, largest, tl.float32)
        _fold(amaxes_ptr + 2 * owner + 1, largest_v, tl.float32)
    else:
        # Rounding is monotone: the largest of all, rounded, is the largest of those that were.
        _fold(p_amaxes_ptr + owner, largest, P)


@triton.jit
def _fold(ptr, x, DTYPE: tl.constexpr):
    """Raise the amax at ptr, an int32: bit patterns of numbers >= 0 order like the numbers, NaN's above inf's."""
    tl.atomic_max(
        ptr, tl.reduce(x, None, _larger).to(DTYPE).to(tl.float32).to(tl.int32, bitcast=True), sem="relaxed"
    )


COLUMNS = 12


class Launch:
    """The kernel's tables for tensors of the same formats: device memory that holds their addresses and sizes.

    grad_dtype: float32 or bfloat16. Tensors must stay where they are; gradients may move between steps.
    """

    def __init__(
        self, slots: Sequence[Slot], which: Sequence[int], grad_dtype: torch.dtype, rule: Rule, whole: bool
    ) -> None:
        """which: the line of each slot in the optimizer's tables (numbers, gradients' addresses)."""
        device = slots[0].p.device
        block = rule.block or 256
        self.options = _options(slots[0].formats(), grad_dtype, rule, whole)
        blocks = self.options["BLOCKS"]
        lines, owners, first = {}, [], 0
        for slot, index in zip(slots, which, strict=True):
            columns = slot.p.shape[-1] if slot.p.ndim else 1
            per_row = blocks_per_row(columns, block)
            total = slot.p.numel() // columns * per_row
            scales = [0 if s is None else s.data_ptr() for s in (slot.m_scale, slot.v_scale)]
            lines[index] = [
                *(
                    slot.p.data_ptr(),
                    slot.m.data_ptr(),
                    slot.v.data_ptr(),
                    *scales,
                    total,
                    per_row,
                    columns,
                    first,
                ),
                *(slot.row, slot.column, slot.number),
            ]
            programs = -(-total // blocks)
            owners.append(torch.full((programs,), index, dtype=torch.int32))
            first += programs
        empty = [0] * COLUMNS
        self.tensors = torch.tensor(
            [lines.get(i, empty) for i in range(max(lines) + 1)], dtype=torch.int64, device=device
        )
        self.owners = torch.cat(owners).to(device)
        self.arguments = (
            rule.beta1,
            1 - rule.beta1,
            rule.beta2,
            1 - rule.beta2,
            max(rule.eps, 2.0**-126),  # so that 0 / eps is 0
            rule.weight_decay,
            rule.seed,
        )

    def __call__(
        self,
        grads: Tensor,
        table: Tensor,
        inverse: Tensor,
        found_inf: Tensor,
        amaxes: Tensor,
        p_amaxes: Tensor,
        only_amax: bool = False,
    ) -> None:
        """grads [n] int64: addresses, 0 for none. table [n, 6]: `numbers`. amaxes [n, 2] int32, bit patterns (block 0).

        p_amaxes [n] int32: bit patterns, raised to the amaxes of the new parameters as they are stored.
        """
        _adam_kernel[(len(self.owners),)](
            self.owners, self.tensors, grads, table, inverse, found_inf, amaxes, p_amaxes, *self.arguments,
            **self.options, ONLY_AMAX=only_amax,
        )  # fmt: skip


def _options(
    formats: tuple[torch.dtype, torch.dtype, torch.dtype], grad_dtype: torch.dtype, rule: Rule, whole: bool
) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    p, m, v = formats
    block = rule.block or 256
    rows = max(LANES // block, 1)
    return {
        "P": TRITON[p], "G": TRITON[grad_dtype], "M": TRITON[m], "V": TRITON[v],
        "M_LARGEST": FP8_MAX.get(m, 0.0), "V_LARGEST": FP8_MAX.get(v, 0.0), "V_SMALLEST": SMALLEST.get(v, 0.0),
        "P_DROPPED": DROPPED[p], "M_DROPPED": DROPPED[m], "V_DROPPED": DROPPED[v],
        "P_NORMAL": MIN_NORMAL[p], "M_NORMAL": MIN_NORMAL[m], "V_NORMAL": MIN_NORMAL[v],
        "RANDOM_M": rule.stochastic_moments and (DROPPED[m] > 0 or DROPPED[v] > 0),
        "RANDOM_P": rule.stochastic_parameters and DROPPED[p] > 0, "ROUNDS": ROUNDS,
        "WHOLE": whole, "PER_TENSOR": rule.block == 0,
        "BLOCK": block, "ROWS": rows, "BLOCKS": max(TILE // block, rows),
        "VECTOR": 16 // max(x.itemsize for x in (*formats, grad_dtype)), "COLUMNS": COLUMNS, "LINES": len(NUMBERS),
        "num_warps": min(max(block // (2 * LANES), 1), 8), "enable_fp_fusion": False,
    }  # fmt: skip
