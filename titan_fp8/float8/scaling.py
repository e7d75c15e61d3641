"""Delayed scaling: the scale of step t comes from the amaxes of steps before t.

    scale_t = fp8_max / (2^margin * max(amax_{t-1}, ..., amax_{t-H}))         H = amax_history

So a cast needs one pass over its tensor: it multiplies by a number known beforehand and takes, on the way, the amax
that later steps will use (FOG, arXiv 2505.20524, section 2; the algorithm is Transformer Engine's "max").

`TensorScale` is one tensor's slot inside a layer; `DelayedScaling` is the whole model's state and updates every slot at
once, with one MAX all-reduce. A weight's slot (`WeightScale`) has the amax of now, not of earlier steps: nothing can
jump, and margin does not apply. On the very first step there is no history, and each other tensor is scaled by its own amax.

    layers write   slot.amax    (max over micro-batches; recomputation under activation checkpointing changes nothing)
    layers read    slot.scale
    update()       stack amaxes, take the weights' -> all-reduce -> history -> scales -> slots
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_fp8.probe import Cast, Observer, Probe, sample_sums
from titan_fp8.tensor_parallel import Ranks, all_max

from .formats import (
    E4M3,
    FP8_MAX,
    ROUNDS_TO_ZERO,
    amax,
    fold_amax,
    saturating_cast,
    scale_from_amax,
    short_name,
)


class CastRule(NamedTuple):
    """What one call of a layer needs of the recipe: constants to torch.compile, so it travels by value."""

    margin: int
    power_of_two: bool
    calibrating: bool
    record: bool
    ranks: Ranks | None = None
    observe: bool = False


@dataclass
class Recipe:
    """What the layers of one model share. `calibrating` until the first update: no amax of an earlier step exists.

    `ranks`: everyone with a part of the tensors, who must have one scale in the first step too; parallelize sets it.
    """

    history: int = 1024
    margin: int = 0
    power_of_two: bool = False
    calibrating: bool = True
    ranks: Ranks | None = None
    observer: Observer | None = field(default=None, repr=False)

    def rule(self, record: bool) -> CastRule:
        observe = record and self.observer is not None and self.observer.on
        return CastRule(self.margin, self.power_of_two, self.calibrating, record, self.ranks, observe)


class TensorScale(Probe):
    """One FP8 tensor's scale in use and the amax seen since the last update (0-dim float32 buffers), and its probe.

    The buffers are not saved: `DelayedScaling` keeps the truth and writes them.
    """

    scale: Tensor
    amax: Tensor

    def __init__(self, dtype: torch.dtype, gradient: bool = False):
        super().__init__()
        self.dtype = dtype
        self.gradient = gradient  # its size goes with the loss scale
        self.register_buffer("scale", torch.ones((), dtype=torch.float32), persistent=False)
        self.register_buffer("amax", torch.zeros((), dtype=torch.float32), persistent=False)

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.scale, self.amax, self.sums

    def extra_repr(self) -> str:
        return f"delayed_{short_name(self.dtype)}"


class WeightScale(TensorScale):
    """The slot of linears' weights, which share a scale if there are several. `DelayedScaling.update` takes their amax.

    So the scale is exact: the optimizer has just changed the weights, and nothing else does before they are used.
    """

    def __init__(self, linears: tuple[nn.Linear, ...]):
        super().__init__(E4M3)
        self.linears = linears  # a tuple: they are others' submodules, and FSDP2 replaces their parameters

    def weights(self) -> list[Tensor]:
        """This rank's part of each weight; a zero where it has none."""
        weights = [linear.weight.detach() for linear in self.linears]
        weights = [w.to_local() if isinstance(w, DTensor) else w for w in weights]
        return [w if w.numel() else w.new_zeros(1) for w in weights]


def scale_in_use(x: Tensor, scale: Tensor, dtype: torch.dtype, rule: CastRule) -> Tensor:
    """The delayed `scale`, or in the first step, which has no history, the one from x's own amax (0-dim float32)."""
    return first_scale(amax(x), dtype, rule) if rule.calibrating else scale


def first_scale(amax: Tensor, dtype: torch.dtype, rule: CastRule) -> Tensor:
    """The scale from a tensor's own amax on this rank and the others (0-dim float32)."""
    return scale_from_amax(all_max(amax, rule.ranks), FP8_MAX[dtype], rule.margin, rule.power_of_two)


def quantize(
    x: Tensor, scale: Tensor, seen: Tensor, dtype: torch.dtype, rule: CastRule
) -> tuple[Tensor, Tensor]:
    """(q, scale used): x cast to FP8 with the delayed `scale`, its amax folded into `seen` (both 0-dim float32).

    A non-finite amax stays visible in `seen` until `DelayedScaling.update` counts it.
    """
    scale = scale_in_use(x, scale, dtype, rule)
    if rule.record:
        fold_amax(seen, x)
    return saturating_cast(x, scale, dtype), scale


def observe(
    x: Tensor,
    sums: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    ranks: Ranks | None = None,
    moments: bool = False,
) -> None:
    """Look at x [..., N], which `scale` takes to FP8. `ranks`: it has all their rows, one rank's below another's."""
    cast = Cast(scale, FP8_MAX[dtype], ROUNDS_TO_ZERO[dtype])
    sums.copy_(sample_sums(x, len(sums), 1 if ranks is None else ranks.size, moments, cast))


def _no_nan(amaxes: Tensor) -> Tensor:
    """What is not finite as inf: a maximum over ranks or weights loses NaN, but not inf."""
    return torch.where(amaxes.isfinite(), amaxes, torch.inf)


class DelayedScaling(nn.Module):
    """Histories and scales of all N FP8 tensors of a model; a submodule of it, so that checkpoints carry the state.

    Buffers (saved): history [H, N] and scale, last_amax, saturation [N] float32; saturated_steps, nonfinite_steps [N] and
    steps [] int64. `saturation` is the last step's amax over the largest magnitude its scale could hold: above 1 it clamped.
    Not saved: largest [N], the history's maximum; jump [N], the last step's amax over the one before (0: unknown).
    """

    history: Tensor
    scale: Tensor
    last_amax: Tensor
    saturation: Tensor
    saturated_steps: Tensor
    nonfinite_steps: Tensor
    steps: Tensor
    largest: Tensor
    jump: Tensor
    fp8_max: Tensor
    is_gradient: Tensor
    is_weight: Tensor
    weight_index: Tensor

    def __init__(self, slots: Mapping[str, TensorScale], recipe: Recipe):
        super().__init__()
        self.names = list(slots)
        self.slots = tuple(slots.values())  # a tuple: they are the layers' submodules, not ours
        self.weights = frozenset(name for name, slot in slots.items() if isinstance(slot, WeightScale))
        self.recipe = recipe
        n = len(self.slots)
        # Named dtypes: under torchtitan's training.dtype the default one may be bfloat16.
        self.register_buffer("history", torch.zeros(recipe.history, n, dtype=torch.float32))
        for name in ("scale", "last_amax", "saturation"):
            self.register_buffer(name, torch.zeros(n, dtype=torch.float32))
        self.register_buffer("saturated_steps", torch.zeros(n, dtype=torch.int64))
        self.register_buffer("nonfinite_steps", torch.zeros(n, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for name in ("largest", "jump"):
            self.register_buffer(name, torch.zeros(n, dtype=torch.float32), persistent=False)
        self.register_buffer("fp8_max", torch.zeros(n, dtype=torch.float32), persistent=False)
        self.register_buffer("is_gradient", torch.zeros(n, dtype=torch.bool), persistent=False)
        self.register_buffer("is_weight", torch.zeros(n, dtype=torch.bool), persistent=False)
        self.weight_slots = tuple(slot for slot in self.slots if isinstance(slot, WeightScale))
        matrices = sum(len(slot.linears) for slot in self.weight_slots)
        self.register_buffer("weight_index", torch.zeros(matrices, dtype=torch.int64), persistent=False)
        self.skipped: Tensor | None = None  # [] bool, set by the trainer: this step's gradients overflowed
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh())  # type: ignore

    def init_weights(self) -> None:
        """Fresh state (after `to_empty` the buffers hold garbage)."""
        for buffer in self.buffers():
            buffer.zero_()
        self.scale.fill_(1.0)
        self.fp8_max.copy_(torch.tensor([FP8_MAX[slot.dtype] for slot in self.slots], dtype=torch.float32))
        self.is_gradient.copy_(torch.tensor([slot.gradient for slot in self.slots]))
        self.is_weight.copy_(torch.tensor([isinstance(slot, WeightScale) for slot in self.slots]))
        index = [
            i for i, slot in enumerate(self.slots) if isinstance(slot, WeightScale) for _ in slot.linears
        ]
        self.weight_index.copy_(torch.tensor(index, dtype=torch.int64))
        self.refresh()
        self.scale_weights()

    def refresh(self) -> None:
        """Bring slots and the calibration flag in line with the buffers, after a start or a load."""
        if self.steps.is_meta:
            return
        self._write_slots()
        self.largest.copy_(torch.where(self.is_weight, 0.0, self.history.amax(0)))
        self.jump.zero_()
        self.recipe.calibrating = int(self.steps) == 0

    @torch.no_grad()
    def scale_weights(self) -> None:
        """Scale the weights by their amaxes of now. To be called, on every rank, when something but a step changed them."""
        if self.scale.is_meta or not self.weight_slots:
            return
        fresh = scale_from_amax(self._amaxes(), self.fp8_max, 0, self.recipe.power_of_two)
        self.scale.copy_(torch.where(self.is_weight, fresh, self.scale))
        self._write_slots()

    def _amaxes(self) -> Tensor:
        """[N] float32: the amax of every slot and every weight, over all ranks; inf where it is not finite."""
        now = torch.stack([slot.amax for slot in self.slots])
        if self.weight_slots:
            norms = torch._foreach_norm([w for slot in self.weight_slots for w in slot.weights()], torch.inf)
            now.scatter_reduce_(0, self.weight_index, _no_nan(torch.stack(norms).float()), "amax")
        now = _no_nan(now)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(now, op=dist.ReduceOp.MAX)
        return now

    def _write_slots(self) -> None:
        torch._foreach_copy_([slot.scale for slot in self.slots], list(self.scale.unbind()))
        torch._foreach_zero_([slot.amax for slot in self.slots])

    @torch.no_grad()
    def update(self) -> None:
        """Take this step's amaxes into the history and compute the next step's scales. Call once per step, on every rank.

        Amaxes that are not finite are counted and never enter the history: the tensor's previous row stands in. A tensor
        that saw nothing keeps its scale. In a step that was `skipped`, no gradient's amax enters either: one that is huge
        and just finite would flush that tensor to zero for `history` steps. No host synchronisation.
        """
        now = self._amaxes()
        finite = now.isfinite()
        self.nonfinite_steps += ~finite
        if not self.recipe.calibrating:
            self.saturation.copy_((now * self.scale / self.fp8_max).masked_fill(self.is_weight, 1.0))
            # Rounding alone can put it a little above 1.
            self.saturated_steps += finite & (self.saturation > 1 + 1e-6)
        self.jump.copy_(torch.where(self.largest > 0, now / self.largest, 0.0))

        rows = self.history.shape[0]
        row = self.steps % rows
        # history[row - 1] would wait for the device.
        previous = self.history.index_select(0, ((row - 1) % rows).view(1))
        usable = finite
        if self.skipped is not None:
            usable = finite & ~(self.is_gradient & self.skipped)
            self.skipped = None
        entry = torch.where(usable, now, previous)
        self.history.index_copy_(0, row.view(1), entry)
        largest = torch.where(self.is_weight, entry[0], self.history.amax(0))
        margins = torch.where(self.is_weight, 0.0, self.recipe.margin)
        fresh = scale_from_amax(largest, self.fp8_max / torch.exp2(margins), 0, self.recipe.power_of_two)
        self.scale.copy_(torch.where(largest > 0, fresh, self.scale))
        self.largest.copy_(largest)
        self.last_amax.copy_(now)
        self.steps += 1
        self._write_slots()
        self.recipe.calibrating = False

    @torch.no_grad()
    def rescale_gradients(self, factor: Tensor | float) -> None:
        """The loss scale changed by `factor`: so will every gradient's amax. Keeps histories and scales in step with it."""
        factors = torch.where(self.is_gradient, factor, 1.0)
        self.history *= factors
        self.largest *= factors
        self.scale /= factors
        self._write_slots()

    def report(self) -> dict[str, dict[str, float]]:
        """Tensor name -> the last step's amax and saturation, the scale now in use, and counts. Copies to the host."""
        table = torch.stack(
            [
                self.last_amax.double(),
                self.scale.double(),
                self.saturation.double(),
                self.saturated_steps.double(),
                self.nonfinite_steps.double(),
            ]
        ).tolist()
        keys = ("amax", "scale", "saturation", "saturated_steps", "nonfinite_steps")
        return {
            name: {key: column[i] for key, column in zip(keys, table, strict=True)}
            for i, name in enumerate(self.names)
        }

    def headroom(self) -> Tensor:
        """[N] float32: log2 of how far the last step's amax was below what its scale could hold; NaN: unknown."""
        return torch.where(self.saturation > 0, 0 - self.saturation.log2(), torch.nan)

    def extra_repr(self) -> str:
        return f"tensors={len(self.slots)}, {self.recipe}"
