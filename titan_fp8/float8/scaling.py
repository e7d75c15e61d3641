"""Delayed scaling: the scale of step t comes from the amaxes of steps before t.

    scale_t = fp8_max / (2^margin * max(amax_{t-1}, ..., amax_{t-H}))         H = amax_history

So a cast needs one pass over its tensor: it multiplies by a number known beforehand and takes, on the way, the amax
that later steps will use (FOG, arXiv 2505.20524, section 2; the algorithm is Transformer Engine's "max").

`TensorScale` is one tensor's slot inside a layer; `DelayedScaling` is the whole model's state and updates every slot at
once, with one MAX all-reduce. A weight's slot (`WeightScale`) has the amax of now, not of earlier steps: nothing can
jump, and margin does not apply. A tensor whose features have a scale each (`ChannelScale`, Smooth-SwiGLU) brings, as one
more row of the same all-reduce, the amaxes of its features, and of the columns of the weight that undoes those scales.
Until a first step is not skipped there is no history, and each other tensor is scaled by its own amax. So are, at any time,
the tensors that `use_current` names: slower, but nothing in them can be clamped.

    layers write   slot.amax    (max over micro-batches; recomputation under activation checkpointing changes nothing)
    layers read    slot.scale, and for GEMMs slot.inverse = 1 / scale
    update()       join amaxes, take the weights' -> all-reduce -> history -> scales -> slots

Channel scales, for z [M, F] that a weight w [N, F] multiplies: s_i z_i is cast, and w_i / s_i.

    A_i <- max(amax of z_i, A_i / 2^(1 / 4))        C_i = amax of w_i        P_i = A_i C_i        H = 2^(6 + margin)
    h_i = H / (P_i / (64 median P)), within 1 and H        D = max_j P_j h_j / H
    s_i = the largest power of two with s_i max(A_i h_i, H D / (2^12 C_i)) <= 448

A power of two scales exactly, in every format. Within one feature magnitudes differ far less than within a tensor, so E4M3
has room: with s_i A_i in (3.5, 7] a feature may jump to 64 times its amax before the cast saturates, and what is 2^-8 of
its amax is still a normal number. The tensor itself then needs no scale: it is 1. P_i is the most that a feature adds to
the product, and the size of its column of w / s. A feature that adds far more than others has jumped already: it gives up
its headroom h_i, so that its column does not push theirs out of E4M3. The last bound keeps columns within 2^12 of one
another, and a feature that is nearly off from a huge s, in which it would saturate as soon as it wakes. Amaxes are soon
forgotten, for what headroom is there for needs no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_fp8.probe import Observer, Probe
from titan_fp8.tensor_parallel import Ranks, all_max

from .formats import (
    E4M3,
    FP8_MAX,
    MAX_SCALE,
    ROUNDS_TO_ZERO,
    amax,
    fold_amax,
    saturating_cast,
    scale_from_amax,
    short_name,
)
from .kernels.moments import Cast, look, some_rows

HEADROOM = (
    6  # binades between a feature's amax and the largest that its cast holds; up to 8 cost no precision
)
SPREAD = 12  # binades between the columns of a weight that is divided by features' scales
OUTLIER = 64.0  # times the median: what a feature adds to the product if it is one
HALF_LIFE = 4  # steps in which a feature's amax is half forgotten


class CastRule(NamedTuple):
    """What one call of a layer needs of the recipe: constants to torch.compile, so it travels by value."""

    margin: int
    power_of_two: bool
    calibrating: bool
    record: bool
    ranks: Ranks | None = None
    observe: bool = False
    current: bool = False

    @property
    def measuring(self) -> bool:
        """Some tensors are scaled by their own amax, so amaxes are taken before casts."""
        return self.calibrating or self.current


@dataclass
class Recipe:
    """What the layers of one model share. `calibrating` until a step was not skipped: no amax of an earlier one exists.

    `ranks`: everyone with a part of the tensors, who must have one scale in the first step too; parallelize sets it.
    `current`: `DelayedScaling.use_current` named a tensor. Which ones stands in their slots, on the device: all layers share
    one more graph, whatever is named. `attention_16bit`: FP8 attention runs in the compute dtype, until it is set back.
    """

    history: int = 1024
    margin: int = 0
    power_of_two: bool = False
    calibrating: bool = True
    ranks: Ranks | None = None
    observer: Observer | None = field(default=None, repr=False)
    current: bool = False
    attention_16bit: bool = False

    def rule(self, record: bool) -> CastRule:
        observe = record and self.observer is not None and self.observer.on
        return CastRule(
            self.margin, self.power_of_two, self.calibrating, record, self.ranks, observe, self.current
        )


class TensorScale(Probe):
    """One FP8 tensor's scale in use, 1 / scale, and the amax seen since the last update (0-dim float32 buffers); its probe.

    A scale of 0 stands for the one from the tensor's own amax (`scale_in_use`). The buffers are not saved:
    `DelayedScaling` keeps the truth and writes them.
    """

    scale: Tensor
    inverse: Tensor
    amax: Tensor

    def __init__(self, dtype: torch.dtype, gradient: bool = False):
        super().__init__()
        self.dtype = dtype
        self.gradient = gradient  # its size goes with the loss scale
        self.register_buffer("scale", torch.ones((), dtype=torch.float32), persistent=False)
        self.register_buffer("inverse", torch.ones((), dtype=torch.float32), persistent=False)
        self.register_buffer("amax", torch.zeros((), dtype=torch.float32), persistent=False)

    def state(self, rule: CastRule) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """For layers of GEMMs; sums only if they are looked at: a compiled graph pays for every tensor it is handed."""
        return self.scale, self.inverse, self.amax, self.sums if rule.observe else None

    def extra_repr(self) -> str:
        return f"delayed_{short_name(self.dtype)}"


class WeightScale(TensorScale):
    """The slot of linears' weights, which share a scale if there are several. `DelayedScaling.update` takes their amax.

    So the scale is exact: the optimizer has just changed the weights, and nothing else does before they are used.
    """

    def __init__(self, linears: tuple[nn.Linear, ...]):
        super().__init__(E4M3)
        self.linears = linears  # a tuple: they are others' submodules, and FSDP2 replaces their parameters

    def multiplier(self) -> Tensor:
        """What weights are multiplied by when they are cast: float32, 0-dim, or one per column."""
        return self.scale

    def weights(self) -> list[Tensor]:
        """This rank's part of each weight; a zero where it has none."""
        weights = [linear.weight.detach() for linear in self.linears]
        weights = [w.to_local() if isinstance(w, DTensor) else w for w in weights]
        return [w if w.numel() else w.new_zeros(1) for w in weights]


class ChannelScale(TensorScale):
    """The slot of an E4M3 activation [M, F] whose features have a scale each; its own is 1 after the first step.

    channel_scale, channel_amax, column_amax [F] float32 (not saved): the scales in use; the unscaled features' amaxes since
    the last update; the amaxes of the weight's columns. With tensor parallel each rank has all F, and uses `own` of them.
    """

    channel_scale: Tensor
    channel_amax: Tensor
    column_amax: Tensor
    tp: Ranks | None = None

    def __init__(self, features: int):
        super().__init__(E4M3)
        self.features = features
        for name, value in (("channel_scale", 1.0), ("channel_amax", 0.0), ("column_amax", 0.0)):
            buffer = torch.full((features,), value, dtype=torch.float32)
            self.register_buffer(name, buffer, persistent=False)

    def own(self, channels: Tensor) -> Tensor:
        """A view of this rank's part of [F]."""
        return channels if self.tp is None else channels.chunk(self.tp.size)[self.tp.rank]

    def extra_repr(self) -> str:
        return f"delayed_e4m3 x {self.features}"


class FoldedScale(WeightScale):
    """The slot of a weight w [N, F] that undoes the scales of a `ChannelScale`: it is cast divided by them, by columns."""

    def __init__(self, linear: nn.Linear, channels: ChannelScale):
        super().__init__((linear,))
        self.channels = (channels,)  # a tuple: a submodule of the layer, not of this slot

    def multiplier(self) -> Tensor:
        (channels,) = self.channels
        return folded(self.scale, channels.own(channels.channel_scale))

    def column_amaxes(self) -> Tensor:
        """[F] float32 over this rank's part of the weight; 0 where it has none."""
        (channels,) = self.channels
        (weight,) = self.weights()
        amaxes = torch.zeros(channels.features, dtype=torch.float32, device=weight.device)
        if weight.dim() == 2:
            channels.own(amaxes).copy_(torch.linalg.vector_norm(weight, torch.inf, dim=0))
        return amaxes


def folded(scale: Tensor, channels: Tensor) -> Tensor:
    """scale / channels, [F]; finite for columns that are all zeros too, since 0 times inf is not."""
    return (scale / channels).clamp(max=MAX_SCALE)


def channel_scales(amaxes: Tensor, columns: Tensor, headroom: int) -> Tensor:
    """The scales (powers of two, float32) of features with these amaxes, and these of the weight's columns.

    All [..., F], one activation's features in a row.
    """
    adds = amaxes * columns
    usual = OUTLIER * adds.median(-1, keepdim=True).values
    given_up = torch.where(usual > 0, adds / usual, 1.0).clamp(1.0, 2.0**headroom)
    most = (adds / given_up).amax(-1, keepdim=True)
    floor = torch.where(columns > 0, most * 2.0**-SPREAD / columns, 0.0)
    return scale_from_amax(
        torch.maximum(amaxes / given_up, floor), FP8_MAX[E4M3], headroom, power_of_two=True
    )


def scale_in_use(x: Tensor, scale: Tensor, dtype: torch.dtype, rule: CastRule) -> Tensor:
    """The delayed `scale`, or where it is 0 and in the first step, the one from x's own amax (0-dim float32)."""
    return measured_scale(amax(x), scale, dtype, rule) if rule.measuring else scale


def scales_in_use(
    x: Tensor, scale: Tensor, inverse: Tensor, dtype: torch.dtype, rule: CastRule
) -> tuple[Tensor, Tensor]:
    """(`scale_in_use`, its inverse)."""
    if not rule.measuring:
        return scale, inverse
    scale = scale_in_use(x, scale, dtype, rule)
    return scale, scale.reciprocal()


def measured_scale(amax: Tensor, scale: Tensor, dtype: torch.dtype, rule: CastRule) -> Tensor:
    """`scale_in_use` of a tensor whose amax on this rank is known, with `rule.measuring` (0-dim float32)."""
    own = first_scale(amax, dtype, rule)
    return own if rule.calibrating else torch.where(scale > 0, scale, own)


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


def cast_of(scale: Tensor, dtype: torch.dtype) -> Cast:
    """What `scale` and FP8 of this format do to a tensor."""
    return Cast(scale, FP8_MAX[dtype], ROUNDS_TO_ZERO[dtype])


def observe(
    x: Tensor,
    sums: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    ranks: Ranks | None = None,
    amax: Tensor | None = None,
) -> None:
    """Look at some rows of x [..., N], which `scale` takes to FP8. `ranks`: it has rows of all, one rank's below another's.

    With `amax` (0-dim float32, of all rows) also at the moments, whose amax it becomes.
    """
    groups = 1 if ranks is None else ranks.size
    rows = some_rows(x, len(sums), groups)
    look(rows, sums, groups, amax is not None, cast_of(scale, dtype), amax)


def _no_nan(amaxes: Tensor) -> Tensor:
    """What is not finite as inf: a maximum over ranks or weights loses NaN, but not inf."""
    return amaxes.nan_to_num(nan=torch.inf, posinf=torch.inf)


class _Buffers(NamedTuple):
    """What `DelayedScaling` reads and writes of its N slots. `in_use`: its own buffer's numbers, ordered as `scales`."""

    memory: list[int]
    amaxes: list[Tensor]  # N of [1]
    scales: list[Tensor]  # N scales, N inverses
    in_use: list[Tensor]


class DelayedScaling(nn.Module):
    """Histories and scales of all N FP8 tensors of a model; a submodule of it, so that checkpoints carry the state.

    Buffers (saved): history [H, N] and scale, last_amax, saturation [N] float32; saturated_steps, nonfinite_steps [N] and
    steps [] int64; channel_amax and channel_scale [L, F] float32, if L activations have channel scales. `saturation` is
    the last step's amax over the largest magnitude its scale could hold: above 1 it clamped. tensors_and_formats_<hash> []
    is 0: its name tells other tensors' state apart, for checkpoints are compared by names and shapes before they are read.
    Not saved: largest [N], the history's maximum; jump [N], the last step's amax over the one before (0: unknown);
    in_use [2, N], what the slots hold: scales, and their inverses.
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
    in_use: Tensor
    fp8_max: Tensor
    is_gradient: Tensor
    is_weight: Tensor
    is_current: Tensor
    weight_index: Tensor
    channel_amax: Tensor
    channel_scale: Tensor

    def __init__(self, slots: Mapping[str, TensorScale], recipe: Recipe):
        super().__init__()
        self.names = list(slots)
        self.slots = tuple(slots.values())  # a tuple: they are the layers' submodules, not ours
        self.weights = frozenset(name for name, slot in slots.items() if isinstance(slot, WeightScale))
        self.recipe = recipe
        self.current: list[str] = []  # as `use_current` was told
        n = len(self.slots)
        # Named dtypes: under torchtitan's training.dtype the default one may be bfloat16.
        self.register_buffer("history", torch.zeros(recipe.history, n, dtype=torch.float32))
        for name in ("scale", "last_amax", "saturation"):
            self.register_buffer(name, torch.zeros(n, dtype=torch.float32))
        self.register_buffer("saturated_steps", torch.zeros(n, dtype=torch.int64))
        self.register_buffer("nonfinite_steps", torch.zeros(n, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        formats = repr([(name, short_name(slot.dtype)) for name, slot in slots.items()]).encode()
        same = f"tensors_and_formats_{blake2b(formats, digest_size=8).hexdigest()}"
        self.register_buffer(same, torch.zeros((), dtype=torch.int64))
        for name in ("largest", "jump"):
            self.register_buffer(name, torch.zeros(n, dtype=torch.float32), persistent=False)
        self.register_buffer("in_use", torch.ones(2, n, dtype=torch.float32), persistent=False)
        self._collected: _Buffers | None = None
        self.register_buffer("fp8_max", torch.zeros(n, dtype=torch.float32), persistent=False)
        self.register_buffer("is_gradient", torch.zeros(n, dtype=torch.bool), persistent=False)
        self.register_buffer("is_weight", torch.zeros(n, dtype=torch.bool), persistent=False)
        self.register_buffer("is_current", torch.zeros(n, dtype=torch.bool), persistent=False)
        self.weight_slots = tuple(
            slot for slot in self.slots if isinstance(slot, WeightScale) and not isinstance(slot, FoldedScale)
        )
        self.channel_slots = tuple(slot for slot in self.slots if isinstance(slot, ChannelScale))
        self.folded_slots = tuple(slot for slot in self.slots if isinstance(slot, FoldedScale))
        if self.channel_slots:
            shape = (len(self.channel_slots), self.channel_slots[0].features)
            for name in ("channel_amax", "channel_scale"):
                self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
            for name in ("channel_index", "folded_index"):
                self.register_buffer(name, torch.zeros(shape[0], dtype=torch.int64), persistent=False)
        matrices = sum(len(slot.linears) for slot in self.weight_slots)
        self.register_buffer("weight_index", torch.zeros(matrices, dtype=torch.int64), persistent=False)
        # [] bool, the same on all ranks, set by the trainer: the optimizer left the weights as they were.
        self.skipped: Tensor | None = None
        # Set by the trainer: parameter -> amax of this rank's part of it (0-dim float32), as the optimizer's last step left
        # it; 0 where that step changed nothing. Unless all weights are there, they are read once more.
        self.stepped: Mapping[Tensor, Tensor] = {}
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh())  # type: ignore

    def init_weights(self) -> None:
        """Fresh state (after `to_empty` the buffers hold garbage)."""
        for buffer in self.buffers():
            buffer.zero_()
        self.scale.fill_(1.0)
        self.fp8_max.copy_(torch.tensor([FP8_MAX[slot.dtype] for slot in self.slots], dtype=torch.float32))
        self.is_gradient.copy_(torch.tensor([slot.gradient for slot in self.slots]))
        self.is_weight.copy_(torch.tensor([isinstance(slot, WeightScale) for slot in self.slots]))
        index = [i for i, slot in enumerate(self.slots) if slot in self.weight_slots for _ in slot.linears]
        self.weight_index.copy_(torch.tensor(index, dtype=torch.int64))
        if self.channel_slots:
            self.channel_scale.fill_(1.0)
            for buffer, kind in ((self.channel_index, ChannelScale), (self.folded_index, FoldedScale)):
                buffer.copy_(torch.tensor([i for i, slot in enumerate(self.slots) if isinstance(slot, kind)]))
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
        if self.scale.is_meta or not (self.weight_slots or self.folded_slots):
            return
        now, _, columns = self._amaxes({})
        self._fold(now, columns)
        fresh = scale_from_amax(now, self.fp8_max, 0, self.recipe.power_of_two)
        self.scale.copy_(torch.where(self.is_weight, fresh, self.scale))
        self.last_amax.copy_(torch.where(self.is_weight, now, self.last_amax))
        self._write_slots()

    def _buffers_of_slots(self) -> _Buffers:
        """Collected anew if the model has moved: views of hundreds of numbers take long."""
        # Not the tensors: FSDP2 gives a tensor other memory. Views keep theirs, so its name is not given again.
        memory = [t.untyped_storage()._cdata for t in (self.in_use, self.slots[-1].amax)]
        if self._collected is None or self._collected.memory != memory:
            self._collected = _Buffers(
                memory,
                [slot.amax.view(1) for slot in self.slots],
                [slot.scale for slot in self.slots] + [slot.inverse for slot in self.slots],
                list(self.in_use.view(-1).unbind()),
            )
        return self._collected

    def _amaxes(self, known: Mapping[Tensor, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Over all ranks, inf where not finite: [N] the amax of every slot and every weight, but those that are folded;
        [L, F] of activations' features, and [L, F] of folded weights' columns, which are not divided by anything yet.

        known: weights' amaxes, used if it has all of them; folded weights are always read.
        """
        now = torch.cat(self._buffers_of_slots().amaxes)
        if self.weight_slots:
            weights = [linear.weight for slot in self.weight_slots for linear in slot.linears]
            if all(weight in known for weight in weights):
                norms = [known[weight] for weight in weights]
            else:
                local = [w for slot in self.weight_slots for w in slot.weights()]
                norms = list(torch._foreach_norm(local, torch.inf))
            now.scatter_reduce_(0, self.weight_index, _no_nan(torch.stack(norms).float()), "amax")
        features = columns = None
        if self.channel_slots:
            features = torch.stack([slot.channel_amax for slot in self.channel_slots])
            columns = torch.stack([slot.column_amaxes() for slot in self.folded_slots])
            now = torch.cat((now, features.flatten(), columns.flatten()))
        now = _no_nan(now)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(now, op=dist.ReduceOp.MAX)
        if features is not None and columns is not None:
            sizes = [len(self.slots), features.numel(), columns.numel()]
            now, features, columns = (
                part.view(shape)
                for part, shape in zip(now.split(sizes), ((-1,), features.shape, columns.shape), strict=True)
            )
        return now, features, columns

    def _fold(self, now: Tensor, columns: Tensor | None) -> None:
        """Write the amaxes of folded weights, whose `columns` have these, into `now` [N], in place."""
        if columns is None:
            return
        now.index_copy_(0, self.folded_index, (columns / self.channel_scale).amax(1))
        torch._foreach_copy_([slot.column_amax for slot in self.channel_slots], list(columns.unbind()))

    def _take_channels(
        self, now: Tensor, features: Tensor | None, columns: Tensor | None, skipped: Tensor | None
    ) -> None:
        """Write the amaxes of what was cast into `now`, in place, and the features' into channel_amax; scale them anew.

        Those that are not finite, or of a step that was skipped, show in `now`, and change nothing else."""
        if features is None or columns is None:
            return
        cast = features * self.channel_scale
        usable = features.isfinite() if skipped is None else features.isfinite() & ~skipped
        seen = torch.where(usable, features, 0.0)
        self.channel_amax.copy_(torch.maximum(seen, self.channel_amax * 2.0 ** (-1 / HALF_LIFE)))
        self.channel_scale.copy_(channel_scales(self.channel_amax, columns, HEADROOM + self.recipe.margin))
        # What the first step saw is told as later steps will tell it, so that it can be compared.
        cast = features * self.channel_scale if self.recipe.calibrating else cast
        now.index_copy_(0, self.channel_index, cast.amax(1))

    def use_current(self, names: Iterable[str]) -> None:
        """Scale these tensors, and no others, by their own amaxes (weights always are) until told otherwise.

        While there are any, every FP8 tensor's amax is taken before its cast, with one all-reduce each: torch.compile then
        needs one more graph and no more, and nothing waits for the device. Histories go on. Every rank calls it with the
        same names, between steps. Raises ValueError for a name that is no FP8 tensor, or a weight.
        """
        named = set(names)
        movable = {
            n for n, slot in zip(self.names, self.slots, strict=True) if not isinstance(slot, WeightScale)
        }
        if unknown := sorted(named - movable):
            raise ValueError(f"current scaling is for FP8 tensors other than weights, got {unknown[0]}")
        self.current = [name for name in self.names if name in named]
        self.is_current.copy_(torch.tensor([name in named for name in self.names]))
        self.recipe.current = bool(named)
        self._write_slots()

    def _write_slots(self) -> None:
        buffers = self._buffers_of_slots()
        scales = torch.where(self.is_current, 0.0, self.scale)
        torch.stack((scales, scales.reciprocal()), out=self.in_use)
        torch._foreach_copy_(buffers.scales, buffers.in_use)
        torch._foreach_zero_(buffers.amaxes)
        if self.channel_slots:
            slots = [slot.channel_scale for slot in self.channel_slots]
            torch._foreach_copy_(slots, list(self.channel_scale.unbind()))
            torch._foreach_zero_([slot.channel_amax for slot in self.channel_slots])

    @torch.no_grad()
    def update(self) -> None:
        """Take this step's amaxes into the history and compute the next step's scales. Call once per step, on every rank.

        Amaxes that are not finite are counted and never enter the history: the tensor's previous row stands in. A tensor
        that saw nothing keeps its scale. Of a step that was `skipped` only weights' amaxes enter: one that is huge and just
        finite would flush its tensor to zero for `history` steps. No host synchronisation, but until a step is not skipped.
        """
        skipped, self.skipped = self.skipped, None
        now, features, columns = self._amaxes(self.stepped)
        self._take_channels(now, features, columns, skipped)
        self._fold(now, columns)
        now = torch.where(self.is_weight & (now == 0), self.last_amax, now)  # not stepped: what it was
        finite = now < torch.inf
        self.nonfinite_steps += ~finite
        if not self.recipe.calibrating:
            exact = self.is_weight | self.is_current
            self.saturation.copy_((now * self.scale / self.fp8_max).masked_fill(exact, 1.0))
            # Rounding alone can put it a little above 1.
            self.saturated_steps += finite & (self.saturation > 1 + 1e-6)
        self.jump.copy_(torch.where(self.largest > 0, now / self.largest, 0.0))

        rows = self.history.shape[0]
        row = self.steps % rows
        # history[row - 1] would wait for the device.
        previous = self.history.index_select(0, ((row - 1) % rows).view(1))
        usable = finite if skipped is None else finite & (self.is_weight | ~skipped)
        entry = torch.where(usable, now, previous)
        self.history.index_copy_(0, row.view(1), entry)
        largest = torch.where(self.is_weight, entry[0], self.history.amax(0))
        margins = torch.where(self.is_weight, 0.0, self.recipe.margin)
        fresh = scale_from_amax(largest, self.fp8_max / torch.exp2(margins), 0, self.recipe.power_of_two)
        self.scale.copy_(torch.where(largest > 0, fresh, self.scale))
        if self.channel_slots:
            self.scale.index_fill_(0, self.channel_index, 1.0)
        self.largest.copy_(largest)
        self.last_amax.copy_(now)
        # A first step that was skipped left nothing to scale by: the next is the first.
        if not (self.recipe.calibrating and skipped is not None and bool(skipped)):
            self.steps += 1
            self.recipe.calibrating = False
        self._write_slots()

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
