"""The operators of FP8 attention: the casts (attention_cast), forward and backward.

On CUDA they run the kernels of a Hopper GPU, on CPU the plain-PyTorch references beside them. torch.compile launches the
casts' kernels itself; forward and backward are opaque to it, and on other devices do not exist. Their operands ARE float8
tensors, so the FLOP counter and `audit.GemmAudit` see their GEMMs (two and five, each of 2 * B * H * S * S * C, the masked
half counted as usual) as FP8.

Shapes: B batch, H query heads, K kv heads, S sequence, C head dim, L: S rounded up to 128. Scales and amaxes: 0-dim
float32.

    q8, q8_t = attention_cast(q, scale_q, amax_q, E4M3, record, True, backward, False)
    k8, k8_t = attention_cast(k, scale_k, amax_k, E4M3, record, True, backward, True)
    v8, v8_t = attention_cast(v, scale_v, amax_v, E4M3, record, backward, True, False)
    o, shift = attention_forward(q8, k8, v8_t, scale_q, scale_k, scale_v, softmax_scale, S)

    do8, do8_t, delta = attention_cast_gradient(do, o, scale_do, scale_ds, amax_do, do_dtype, record)
    dq, dk, dv = attention_backward(q8, k8, q8_t, k8_t, v8, do8, do8_t, shift, delta, scale_q, scale_k, scale_v, scale_do,
                                    scale_ds, amax_ds, softmax_scale, S, ds_dtype, record)

`shift` [B, H, L] float32 is 16 - (log2 of the softmax's denominator times 256): the kernels' form of the log-sum-exp.
Where dS has no scale yet (the very first step), run the last two with scale_ds = 1 and a fresh amax, then again with
the scale that this amax gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.library import infer_schema, triton_op
from torch.utils.flop_counter import register_flop_formula

from titan_fp8.errors import UserError

from .attention_backward import backward_reference, launch_backward
from .attention_cast import (
    cast_gradient_reference,
    cast_reference,
    launch_cast,
    launch_cast_gradient,
)
from .attention_forward import bshc, forward_reference, launch_forward

HEAD_DIMS = (64, 128)


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises UserError for q [B, H, S, C], k, v [B, K, S, C] that the kernels do not take."""
    if q.shape[-1] not in HEAD_DIMS:
        raise UserError(
            f"FP8 attention needs head_dim 64 or 128, got {q.shape[-1]}:"
            ' change the heads or dim, or set [fp8] attention = "off"'
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != torch.bfloat16:
            raise UserError(f"FP8 attention needs bfloat16 {name}, got {x.dtype}: train in bfloat16")
    if k.shape != v.shape or q.shape[1] % k.shape[1] or q.shape[::2] != k.shape[::2]:
        raise UserError(
            "FP8 attention needs q [B, H, S, C] and k, v [B, K, S, C] with H a multiple of K, got"
            f" {list(q.shape)}, {list(k.shape)}, {list(v.shape)}: change n_heads or n_kv_heads"
        )


@triton_op("titan_fp8::attention_cast", mutates_args=("amax",))
def attention_cast(
    x: Tensor,
    scale: Tensor,
    amax: Tensor,
    dtype: torch.dtype,
    record: bool,
    plain: bool,
    transposed: bool,
    pairs: bool,
) -> tuple[Tensor, Tensor]:
    """x [B, H, S, C] bfloat16, any strides -> (x8 [B, H, L, C], x8_t [B, H, C, L]) float8, zero beyond S.

    x8 and x8_t are made if `plain` and `transposed` say so, else empty. `pairs` (k) or not (q, v): the order of x8_t's last
    dimension. With `record` max |x| is folded into `amax`; NaN and inf stay visible there.
    """
    run = cast_reference if x.device.type == "cpu" else launch_cast
    return run(x, scale, amax, dtype, record, plain, transposed, pairs)


@triton_op("titan_fp8::attention_cast_gradient", mutates_args=("amax",))
def attention_cast_gradient(
    do: Tensor,
    o: Tensor,
    scale: Tensor,
    scale_ds: Tensor,
    amax: Tensor,
    dtype: torch.dtype,
    record: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """do, o [B, H, S, C] bfloat16, any strides -> (do8 [B, H, L, C], do8_t [B, H, C, L], delta [B, H, L] float32).

    delta is rowsum(do * o) of the unrounded do, times scale_ds / 256. As `attention_cast` otherwise.
    """
    run = cast_gradient_reference if do.device.type == "cpu" else launch_cast_gradient
    return run(do, o, scale, scale_ds, amax, dtype, record)


_LIBRARY = torch.library.Library("titan_fp8", "FRAGMENT")


def _operator(cpu: Callable, fake: Callable, mutates_args: Sequence[str] = ()) -> Callable[[Callable], Any]:
    """Make an opaque operator of a function for CUDA, as torch.library.custom_op does, but without its Python around each
    call (version counters, a search for aliases), which costs the host more than our launches. Inside of an
    autograd.Function nobody asks for it."""

    def define(cuda: Callable) -> Any:
        name = cuda.__name__
        schema = name + infer_schema(cuda, mutates_args=mutates_args)
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, cuda, "CUDA")
        _LIBRARY.impl(name, cpu, "CPU")
        torch.library.register_fake(f"titan_fp8::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.titan_fp8, name).default

    return define


def _forward_results(q8, k8, v8_t, scale_q, scale_k, scale_v, softmax_scale, seq_len):
    batch, heads, length, dim = q8.shape
    o = bshc(q8, batch, heads, seq_len, dim, torch.bfloat16)
    return o, q8.new_empty((batch, heads, length), dtype=torch.float32)


def _backward_results(q8, k8, *rest):
    seq_len = rest[14]
    shapes = (q8.shape, k8.shape, k8.shape)
    dq, dk, dv = (bshc(q8, b, n, seq_len, c, torch.bfloat16) for b, n, _, c in shapes)
    return dq, dk, dv


@_operator(forward_reference, _forward_results)
def attention_forward(
    q8: Tensor,
    k8: Tensor,
    v8_t: Tensor,
    scale_q: Tensor,
    scale_k: Tensor,
    scale_v: Tensor,
    softmax_scale: float,
    seq_len: int,
) -> tuple[Tensor, Tensor]:
    """(o [B, H, S, C] bfloat16, stored as [B, S, H, C]; shift [B, H, L] float32). All operands E4M3; softmax_scale > 0."""
    return launch_forward(q8, k8, v8_t, scale_q, scale_k, scale_v, softmax_scale, seq_len)


@_operator(backward_reference, _backward_results, mutates_args=("amax_ds",))
def attention_backward(
    q8: Tensor,
    k8: Tensor,
    q8_t: Tensor,
    k8_t: Tensor,
    v8: Tensor,
    do8: Tensor,
    do8_t: Tensor,
    shift: Tensor,
    delta: Tensor,
    scale_q: Tensor,
    scale_k: Tensor,
    scale_v: Tensor,
    scale_do: Tensor,
    scale_ds: Tensor,
    amax_ds: Tensor,
    softmax_scale: float,
    seq_len: int,
    ds_dtype: torch.dtype,
    record: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [B, H, S, C], dk, dv [B, K, S, C]) bfloat16, stored as [B, S, heads, C]. Deterministic.

    q, k, v are E4M3, dO and dS E4M3 or E5M2. With `record` max |dS| is folded into amax_ds.
    """
    return launch_backward(
        q8, k8, q8_t, k8_t, v8, do8, do8_t, shift, delta, scale_q, scale_k, scale_v, scale_do, scale_ds, amax_ds,
        softmax_scale, seq_len, ds_dtype, record,
    )  # fmt: skip


@register_flop_formula(torch.ops.titan_fp8.attention_forward)
def _(
    q8_shape, k8_shape, v8_t_shape, sq, sk, sv, softmax_scale, seq_len, *args, out_shape=None, **kwargs
) -> int:
    batch, heads, _, dim = q8_shape
    return 2 * 2 * batch * heads * seq_len * seq_len * dim


@register_flop_formula(torch.ops.titan_fp8.attention_backward)
def _(q8_shape, *args, out_shape=None, **kwargs) -> int:
    batch, heads, _, dim = q8_shape
    seq_len = args[15]
    return 5 * 2 * batch * heads * seq_len * seq_len * dim


# Attention of a part of the batch, or of some kv heads with their query heads, is a part of attention. The casts' amax is
# then each rank's own, which `DelayedScaling.update` brings together.


def _shardings(outputs: int, tensors: int, scales: int, rest: int) -> list[tuple[list, list]]:
    """Of an operator with that many results, [B, H, ...] operands, 0-dim operands and constants, in this order."""
    whole = [Replicate()] * scales + [None] * rest
    return [([how] * outputs, [how] * tensors + whole) for how in (Replicate(), Shard(0), Shard(1))]


@register_sharding(torch.ops.titan_fp8.attention_cast.default)
def _(*args):
    return _shardings(2, 1, 2, 5)


@register_sharding(torch.ops.titan_fp8.attention_cast_gradient.default)
def _(*args):
    return _shardings(3, 2, 3, 2)


@register_sharding(torch.ops.titan_fp8.attention_forward.default)
def _(*args):
    return _shardings(2, 3, 3, 2)


@register_sharding(torch.ops.titan_fp8.attention_backward.default)
def _(*args):
    return _shardings(3, 9, 6, 4)
