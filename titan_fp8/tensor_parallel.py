"""Tensor and sequence parallel: what the T ranks of a group hold, and what they send each other.

    residual stream    x [B, S/T, D]: of every sequence a rank has one stretch; norms and residual adds work on that
    split by columns   x --gather--> [M, D]     y [M, N/T] = x w^T     w [N/T, D]: some heads, FFN features or tokens
    split by rows      y [M, D] = x [M, K/T] w^T, one part of a sum --scatter--> [B, S/T, D]             w [D, K/T]

    gather    rows of all ranks, one rank's below the other's         backward: scatter
    scatter   the sum over ranks, of which a rank gets its rows       backward: gather

M = B S rows then lie in the order (rank, batch, position in the stretch). Only attention and whoever sees logits care:
`by_rank` and `by_sequence` go there and back, which costs a copy where B > 1. What every rank has whole but uses on its own
rows (gains, curvatures) has its gradient summed over the ranks: `shared`.

FP8 layers cast before they gather, so bytes travel: all ranks have the same scale (float8/scaling.py). The collectives are
PyTorch's functional ones, which torch.compile traces; a group goes by name, as a constant. With `tp` None nothing happens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_ops = torch.ops._c10d_functional


class Ranks(NamedTuple):
    """A rank's place in a group of processes. Constants to torch.compile, so it travels by value."""

    group: str
    """The process group's name."""
    size: int
    rank: int


# ---- Collectives, not differentiable ----


def begin_gather(x: Tensor, tp: Ranks | None) -> Tensor:
    """Start sending: contiguous x [n, ...] -> [T n, ...], for `finish`. FP8 becomes uint8, since gloo knows no float8."""
    if tp is None:
        return x
    return _ops.all_gather_into_tensor(x.view(torch.uint8) if x.dtype.itemsize == 1 else x, tp.size, tp.group)


def begin_scatter(x: Tensor, tp: Ranks | None) -> Tensor:
    """Start summing: x [T n, ...] -> [n, ...], the rank's rows of the sum over ranks, for `finish`. In x's dtype."""
    return x if tp is None else _ops.reduce_scatter_tensor(x, "sum", tp.size, tp.group)


def finish(x: Tensor, tp: Ranks | None, dtype: torch.dtype) -> Tensor:
    """What a `begin_` returned, once it is there (on a GPU: the stream waits, not the host); bytes are `dtype` again."""
    if tp is None:
        return x
    x = _ops.wait_tensor(x)
    return x.view(dtype) if x.dtype == torch.uint8 else x


def all_gather(x: Tensor, tp: Ranks | None) -> Tensor:
    return finish(begin_gather(x, tp), tp, x.dtype)


def reduce_scatter(x: Tensor, tp: Ranks | None) -> Tensor:
    return finish(begin_scatter(x, tp), tp, x.dtype)


def all_max(x: Tensor, tp: Ranks | None) -> Tensor:
    """Elementwise maximum over the ranks. NaN may be lost."""
    return x if tp is None else _ops.wait_tensor(_ops.all_reduce(x, "max", tp.group))


# ---- The same for autograd ----


@torch._dynamo.allow_in_graph
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_nK, tp: Ranks):
        ctx.tp = tp
        return all_gather(x_nK.contiguous(), tp)

    @staticmethod
    def backward(ctx, dx_MK):
        return reduce_scatter(dx_MK.contiguous(), ctx.tp), None


@torch._dynamo.allow_in_graph
class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_MN, tp: Ranks):
        ctx.tp = tp
        return reduce_scatter(y_MN.contiguous(), tp)

    @staticmethod
    def backward(ctx, dy_nN):
        return all_gather(dy_nN.contiguous(), ctx.tp), None


@torch._dynamo.allow_in_graph
class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, tp: Ranks):
        ctx.tp = tp
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, dweight):
        return _ops.wait_tensor(_ops.all_reduce(dweight.contiguous(), "sum", ctx.tp.group)), None


@torch._dynamo.allow_in_graph
class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_MN, tp: Ranks):
        ctx.tp, ctx.width = tp, y_MN.shape[1]
        return all_gather(y_MN.t().contiguous(), tp).t()

    @staticmethod
    def backward(ctx, dy_MN):
        # All ranks compute the same from the whole: each has the whole gradient of its part.
        return dy_MN.narrow(1, ctx.tp.rank * ctx.width, ctx.width), None


# ---- What modules call ----


def local(weight: Tensor) -> Tensor:
    """A parameter's part on this rank, which the module multiplies by. Differentiable."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def shared(weight: Tensor, tp: Ranks | None) -> Tensor:
    """A parameter that every rank has whole; its gradient is the sum of the ranks'."""
    return weight if tp is None else _SumGradient.apply(local(weight), tp)


def by_rank(x: Tensor, tp: Ranks | None) -> Tensor:
    """[B, S, ...] -> rows [M, ...] in the order of gathered ones."""
    if tp is None:
        return x.flatten(0, 1)
    return x.unflatten(1, (tp.size, -1)).transpose(0, 1).flatten(0, 2)


def by_sequence(x: Tensor, batch: int, tp: Ranks | None) -> Tensor:
    """`by_rank` backwards: rows [M, ...] -> [B, S, ...]."""
    if tp is None:
        return x.unflatten(0, (batch, -1))
    return x.unflatten(0, (tp.size, batch, -1)).transpose(0, 1).flatten(1, 2)


def gather_sequence(x: Tensor, tp: Ranks | None) -> Tensor:
    """[B, S/T, D] -> [B, S, D], the whole sequences on every rank."""
    return x if tp is None else by_sequence(_Gather.apply(x.flatten(0, 1), tp), x.shape[0], tp)


def scatter_sequence(y: Tensor, tp: Ranks | None) -> Tensor:
    """Parts of a sum [B, S, D] -> the rank's stretch of the sum [B, S/T, D]."""
    return y if tp is None else _Scatter.apply(by_rank(y, tp), tp).unflatten(0, (y.shape[0], -1))


def gather_features(y: Tensor, tp: Ranks | None) -> Tensor:
    """[..., N/T] -> [..., N] on every rank."""
    return y if tp is None else _GatherFeatures.apply(y.flatten(0, -2), tp).unflatten(0, y.shape[:-1])


def own_stretch(x: Tensor, tp: Ranks | None) -> Tensor:
    """[B, S, ...] -> the rank's [B, S/T, ...]."""
    return x if tp is None else x.unflatten(1, (tp.size, -1))[:, tp.rank]
