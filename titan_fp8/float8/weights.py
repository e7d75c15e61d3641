"""A weight as FSDP2 gathers it: every rank casts its shard, and E4M3 bytes travel, half as many as in bf16.

    sharded     ShardedWeight: the rank's rows in the optimizer's dtype, and the slot that knows the scale
    gather      cast(rows * slot.multiplier()) -> uint8 [ceil(N / ranks), K] -> all-gather        (gloo knows no float8)
    unsharded   GatheredWeight: q [N, K] E4M3, which a Float8Linear multiplies by as it is

All ranks have the same scale (`WeightScale`, one MAX all-reduce a step for the whole model), so the gathered bytes are those
that one process would have cast. FSDP2 asks a parameter's local tensor for `fsdp_pre_all_gather` and `fsdp_post_all_gather`
(torch.distributed.fsdp, all-gather extensions); torchao's WeightWithDynamicFloat8CastTensor is the same idea.

Both are wrapper subclasses of torch.Tensor. Operators see through a ShardedWeight; those that FSDP2 makes and moves
parameters with give a ShardedWeight again. A GatheredWeight can be looked at and handed to an FP8 GEMM, nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .formats import E4M3
from .kernels.cast import cast_rows

if TYPE_CHECKING:
    from .scaling import WeightScale

_aten = torch.ops.aten
_SAME_TENSOR = {_aten.detach.default, _aten.alias.default, _aten.view.default, _aten.as_strided.default}
_STILL_A_WEIGHT = _SAME_TENSOR | {
    _aten.empty_like.default, _aten.new_zeros.default, _aten.slice.Tensor, _aten.split.Tensor, _aten.clone.default,
    _aten._to_copy.default, _aten._pin_memory.default,
}  # fmt: skip


def _wrap(cls: type[Tensor], inner: Tensor, dtype: torch.dtype, requires_grad: bool) -> Any:
    return Tensor._make_wrapper_subclass(
        cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=dtype,
        layout=inner.layout, device=inner.device, requires_grad=requires_grad,
    )  # fmt: skip


class GatheredWeight(Tensor):
    """q [N, K] E4M3 under the name of a tensor in `dtype`, so that its gradient has that dtype. The scale is the slot's."""

    q: Tensor

    @staticmethod
    def __new__(cls, q: Tensor, dtype: torch.dtype) -> GatheredWeight:
        return _wrap(cls, q, dtype, False)

    def __init__(self, q: Tensor, dtype: torch.dtype):
        self.q = q

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["q"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any
    ) -> GatheredWeight:
        return GatheredWeight(inner["q"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func in _SAME_TENSOR:
            return GatheredWeight(func(args[0].q, *args[1:], **(kwargs or {})), args[0].dtype)
        raise NotImplementedError(
            f"a weight gathered in FP8 is for FP8 GEMMs only, got {func}: leave its module out of [fp8] filter, or set "
            '[fp8] all_gather = "bf16"'
        )

    def __repr__(self) -> str:
        return f"GatheredWeight({list(self.shape)}, {self.dtype}, device={self.device})"


class ShardedWeight(Tensor):
    """`rows` of a weight in any float dtype; the slot, a part of the same model, has the scale that they are gathered with.

    It is referred to weakly: it knows the weight, and Python cannot collect a cycle through a tensor that C++ holds too.
    """

    rows: Tensor
    slot: ReferenceType[WeightScale]

    @staticmethod
    def __new__(cls, rows: Tensor, slot: ReferenceType[WeightScale]) -> ShardedWeight:
        return _wrap(cls, rows, rows.dtype, rows.requires_grad)

    def __init__(self, rows: Tensor, slot: ReferenceType[WeightScale]):
        self.rows, self.slot = rows, slot

    def __tensor_flatten__(self) -> tuple[list[str], ReferenceType[WeightScale]]:
        return ["rows"], self.slot

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], slot: ReferenceType[WeightScale], size: Any, stride: Any
    ) -> ShardedWeight:
        return ShardedWeight(inner["rows"], slot)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        slot = next(x.slot for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, ShardedWeight))
        args, kwargs = pytree.tree_map_only(ShardedWeight, lambda x: x.rows, (args, kwargs or {}))
        out = func(*args, **kwargs)
        if func in _STILL_A_WEIGHT:
            return pytree.tree_map_only(Tensor, lambda x: ShardedWeight(x, slot), out)
        return out

    def __repr__(self) -> str:
        return f"ShardedWeight({self.rows})"

    def fsdp_pre_all_gather(
        self, mesh, outer_size, outer_stride, module, mp_policy
    ) -> tuple[tuple[Tensor, ...], Any]:
        rows = self.rows if mp_policy.param_dtype is None else self.rows.to(mp_policy.param_dtype)
        slot = self.slot()
        assert slot is not None, "the model is gone"
        q = cast_rows(rows, slot.multiplier(), E4M3).view(torch.uint8)
        missing = -(-outer_size[0] // mesh.size()) - len(q)  # ranks at the end may have fewer rows
        return (nn.functional.pad(q, (0, 0, 0, missing)) if missing else q,), None

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> Any:
        if out is not None:
            return None  # its storage is what has just been gathered into
        (q,) = all_gather_outputs
        return GatheredWeight(q.view(E4M3), param_dtype), (q,)
