"""AdamW with FP8 moments: m in E4M3, v in E5M2, each with float32 scales per block. Mathematics: float8/kernels/adam.py.

What is stored, in bytes per parameter (blocks of 256; a gradient of bf16 is 2 more, while it lives):

    parameters   parameter   m   v   scales   together
    float32      4           1   1   0.03     6.03
    bfloat16     2           1   1   0.03     4.03      rounding="stochastic": no master copy is needed
    float16      2           1   1   0.03     4.03      `half_master`: the parameter is the master copy, times a scale;
                                                        autograd passes its gradients through float16: scale the loss

A moment named exp_avg (or exp_avg_sq) of a parameter lies in its state as

    exp_avg_e4m3   codes, of the parameter's shape and placement          exp_avg_scale   [..., blocks of the last dimension]
    exp_avg        where it is not FP8: format bf16 or fp32, and parameters with fewer than two dimensions (float32)

so that a name never means two formats. All are plain tensors (DTensors for a sharded parameter): slicing whole rows slices
codes and scales alike, which is all that saving, loading and resharding need. A parameter sharded along its last dimension
must have whole blocks in each shard, else its moments are float32. With block_size 0 the scale is one number for the whole
parameter, the same on all ranks (one MAX all-reduce a step).

Why not on torchao's `_AdamBase`: it steps each parameter by a `torch.compile`d function, hence one compile per shape and one
launch per parameter. Its state is a tensor subclass: E4M3 only, pickled into checkpoints by its class's name, cast to the
parameter's dtype by `Optimizer.load_state_dict`, and with blocks that run across rows, so that a shard may end inside one.
Kept from it: blocks with float32 scales, and the new moments, not the stored ones, in the update.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from titan_fp8.errors import UserError
from titan_fp8.float8.formats import E4M3, E5M2, FP8_MAX, is_fp8, scale_from_amax, short_name
from titan_fp8.float8.kernels import adam

logger = logging.getLogger(__name__)

FORMATS = {"e4m3": E4M3, "e5m2": E5M2, "bf16": torch.bfloat16, "fp32": torch.float32}
MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK_SIZES = (0, *(2**i for i in range(4, 14)))


class Fp8AdamW(torch.optim.Optimizer):
    """AdamW with moments in few bits; one kernel launch for all matrices of a parameter group, no host sync.

    As with torch's fused AdamW, gradients are divided by the attribute `grad_scale` and nothing changes, the step counts
    included, where `found_inf` is 1; both are 0-dim float32 tensors on the parameters' device, or None.

    The attribute `amaxes` has, after a step, the amax of this rank's part of every parameter that had a gradient, as it is
    now stored (0-dim float32); 0 where `found_inf` kept the parameter as it was. A step overwrites it.

    Args:
        params, lr (float or 0-dim tensor), betas, eps, weight_decay (decoupled): as in torch.optim.AdamW.
        first_moment, second_moment: "e4m3", "e5m2", "bf16" or "fp32".
        block_size: elements that share a scale, a power of two from 16 to 8192; 0: the whole parameter.
        round_moments, round_parameters: "nearest" or "stochastic" (float32 is not rounded). The random bits are a function
            of `seed`, the step, the parameter's number and the element's place in it: a resumed run draws the same.
        half_master: allow float16 parameters. They hold value * scale, see `scale_master`.

    Raises:
        UserError: a setting, a parameter or a gradient that cannot be.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        first_moment: str = "e4m3",
        second_moment: str = "e5m2",
        block_size: int = 256,
        round_moments: str = "nearest",
        round_parameters: str = "nearest",
        half_master: bool = False,
        amsgrad: bool = False,
        seed: int = 0,
    ) -> None:
        if block_size not in BLOCK_SIZES:
            raise UserError(
                f"block_size must be a power of two from 16 to {BLOCK_SIZES[-1]}, or 0 for one scale per parameter, "
                f"got {block_size}: write 256"
            )
        for name, value, known in (
            ("first_moment", first_moment, FORMATS),
            ("second_moment", second_moment, FORMATS),
            ("round_moments", round_moments, ("nearest", "stochastic")),
            ("round_parameters", round_parameters, ("nearest", "stochastic")),
        ):
            if value not in known:
                raise UserError(
                    f"{name} must be one of {', '.join(known)}, got {value!r}: choose one of them"
                )
        if not (eps > 0 and 0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise UserError(
                f"eps must be above 0 and betas in [0, 1), got {eps} and {betas}: use 1e-8, (0.9, 0.95)"
            )
        if amsgrad:
            raise UserError("amsgrad must be false: FP8 AdamW keeps no maximum of v, got true: leave it out")
        self.formats = {"exp_avg": FORMATS[first_moment], "exp_avg_sq": FORMATS[second_moment]}
        self.block_size = block_size
        self.stochastic_moments = round_moments == "stochastic"
        self.stochastic_parameters = round_parameters == "stochastic"
        self.half_master = half_master
        self.seed = seed
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.amaxes: dict[Tensor, Tensor] = {}
        self._plans: dict[int, _Plan] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self._check(p)
            self.state[p] = self._new_state(p)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}

    @property
    def coded(self) -> bool:
        """Whether a moment is in FP8."""
        return any(is_fp8(dtype) for dtype in self.formats.values())

    def _check(self, p: Tensor) -> None:
        allowed = [torch.float32, torch.bfloat16, *([torch.float16] if self.half_master else [])]
        if p.dtype not in allowed:
            more = " or pass half_master=True" if p.dtype == torch.float16 else ""
            raise UserError(
                f"parameters must be {' or '.join(map(str, allowed))}, got {p.dtype}: convert the model{more}"
            )
        if not _local(p).is_contiguous():
            raise UserError(
                f"parameters must be contiguous, got strides {p.stride()} for {list(p.shape)}: call .contiguous()"
            )
        if self.coded and p.is_cuda and torch.cuda.get_device_capability(p.device) < (8, 9):
            name = torch.cuda.get_device_name(p.device)
            raise UserError(
                f"FP8 moments need a GPU of compute capability 8.9 or later, got {name}: use bf16 or fp32, or AdamW"
            )

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        """Zeros. Made now, not at the first step, so that a checkpoint can be loaded before it."""
        local = _local(p)
        state = {"step": torch.zeros((), device=local.device)}
        for name, dtype in self.formats.items():
            if not is_fp8(dtype) or not _has_blocks(p, self.block_size):
                state[name] = _like(
                    p, torch.zeros_like(local, dtype=torch.float32 if is_fp8(dtype) else dtype), p.shape
                )
                continue
            state[f"{name}_{short_name(dtype)}"] = _like(p, torch.zeros_like(local, dtype=dtype), p.shape)
            if self.block_size:
                scales = [*local.shape[:-1], adam.blocks_per_row(local.shape[-1], self.block_size)]
                whole = torch.Size([*p.shape[:-1], adam.blocks_per_row(p.shape[-1], self.block_size)])
                state[f"{name}_scale"] = _like(p, torch.ones(scales, device=local.device), whole)
            else:
                state[f"{name}_scale"] = torch.ones((), device=local.device)
        if p.dtype == torch.float16:
            state["master_scale"] = torch.ones((), device=local.device)
        return state

    @torch.no_grad()
    def scale_master(self, p: Tensor, scale: float) -> None:
        """Let the float16 parameter p hold value * `scale` (a power of two) from now on; its value stays.

        Scale 1 holds values from 6e-5 (6e-8 with fewer digits) to 65504. Who uses p divides by `state[p]["master_scale"]`.
        """
        state = self.state[p]
        _local(p).mul_(scale / float(state["master_scale"]))
        state["master_scale"].fill_(scale)
        self.amaxes.pop(p, None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.amaxes.clear()
        for index, group in enumerate(self.param_groups):
            grads = [_gradient(p) for p in group["params"]]
            if any(grad is not None for grad in grads):
                self._step(index, group, grads)
        return loss

    def _step(self, index: int, group: dict[str, Any], grads: list[Tensor | None]) -> None:
        plan = self._plan(index, group, grads)
        device = plan.steps.device
        given = plan.addresses(grads)
        found_inf = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        inverse = torch.ones((), device=device) if self.grad_scale is None else 1.0 / self.grad_scale
        acts = (given != 0) & (found_inf == 0)
        plan.steps += acts
        table = adam.numbers(plan.steps, group["lr"], *group["betas"], plan.masters)
        cuda = device.type == "cuda"
        launches = plan.launches if cuda else []
        if not plan.rule.block:
            plan.amaxes.zero_()
            for launch in launches:
                launch(given, table, inverse, found_inf, plan.amaxes, plan.p_amaxes, only_amax=True)
            if not cuda:
                _reference_amaxes(plan, grads, inverse)
            plan.reduce_amaxes()
        plan.p_amaxes.zero_()
        for launch in launches:
            launch(given, table, inverse, found_inf, plan.amaxes, plan.p_amaxes)
        if not cuda and not found_inf:
            _reference_step(plan, grads, table, inverse)
        if not plan.rule.block:
            pairs = plan.amaxes.view(torch.float32).unbind(1)
            largest = (FP8_MAX.get(dtype, 1.0) for dtype in self.formats.values())
            new = torch.stack([scale_from_amax(*pair) for pair in zip(pairs, largest, strict=True)], 1)
            plan.scales.copy_(torch.where(acts[:, None], new, plan.scales))
        triples = zip(group["params"], grads, plan.p_amax_of, strict=True)
        self.amaxes.update((p, amax) for p, grad, amax in triples if grad is not None)

    def _plan(self, index: int, group: dict[str, Any], grads: list[Tensor | None]) -> _Plan:
        """The group's tables; made anew if a parameter has moved, or betas, eps or weight decay have changed."""
        rule = adam.Rule(
            *group["betas"], group["eps"], group["weight_decay"], self.block_size,
            self.stochastic_moments, self.stochastic_parameters, self.seed,
        )  # fmt: skip
        params = group["params"]
        where = [_local(p).data_ptr() for p in params]
        dtypes = [torch.float32 if grad is None else grad.dtype for grad in grads]
        plan = self._plans.get(index)
        if plan is None or (plan.rule, plan.where, plan.dtypes) != (rule, where, dtypes):
            first = sum(len(g["params"]) for g in self.param_groups[:index])
            plan = _Plan(params, [self.state[p] for p in params], rule, where, dtypes, first)
            self._plans[index] = plan
        return plan

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state in this format, or in any other that this class or torch's AdamW keeps (one warning); in place.

        Raises:
            UserError: the state is of other parameters.
        """
        groups = state_dict["param_groups"]
        own = self.state
        # Only the groups through the base class: it would cast every state to its parameter's dtype.
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state = own
        ids = [i for group in groups for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        keys = [(p, i) for i, p in zip(ids, params, strict=True) if i in state_dict["state"]]
        mine = {f"{i}.{name}": value for p, i in keys for name, value in own[p].items()}
        saved = {f"{i}.{name}": value for _, i in keys for name, value in state_dict["state"][i].items()}
        saved = adopt(saved, mine)
        for name, value in mine.items():
            there = getattr(saved.get(name), "shape", None)
            if there != value.shape:
                got = "none" if there is None else list(there)
                raise UserError(
                    f"the optimizer state must hold {name} {list(value.shape)}, got {got}: "
                    'load the state of these parameters, or begin it anew (checkpoint.exclude_from_loading = ["optimizer"])'
                )
            _local(value).copy_(_local(saved[name]))


class _Plan:
    """What one parameter group needs every step and that changes only when its tensors move."""

    def __init__(
        self,
        params: list[Tensor],
        states: list[dict[str, Tensor]],
        rule: adam.Rule,
        where: list[int],
        dtypes: list[torch.dtype],
        first: int,
    ) -> None:
        self.rule, self.where, self.dtypes = rule, where, dtypes
        device = _local(params[0]).device
        # One row per parameter; what the states hold from now on are views of these tables.
        self.steps = _table(states, "step", device)
        self.masters = _table(states, "master_scale", device)
        self.amaxes = torch.zeros((len(params), 2), dtype=torch.int32, device=device)
        self.p_amaxes = torch.zeros(len(params), dtype=torch.int32, device=device)
        self.p_amax_of = self.p_amaxes.view(torch.float32).unbind()
        if rule.block == 0:
            self.scales = torch.stack([_table(states, f"{name}_scale", device) for name in MOMENTS], 1)
            for row, state in zip(self.scales, states, strict=True):
                for column, name in enumerate(MOMENTS):
                    if f"{name}_scale" in state:
                        state[f"{name}_scale"] = row[column]
        self.slots = [
            _slot(p, state, first + i) for i, (p, state) in enumerate(zip(params, states, strict=True))
        ]
        # In the same order on all ranks.
        self.meshes = list(dict.fromkeys(p.device_mesh for p in params if isinstance(p, DTensor)))
        self.launches = self._launches() if device.type == "cuda" else []
        self._last: tuple[list[int], Tensor] | None = None

    def _launches(self) -> list[adam.Launch]:
        """One for each combination of formats; ragged rows and odd addresses apart."""
        kinds: dict[Any, list[int]] = {}
        for i, slot in enumerate(self.slots):
            if slot.p.numel():
                whole = slot.p.ndim > 0 and slot.p.shape[-1] % (self.rule.block or 256) == 0
                whole &= all(t.data_ptr() % 16 == 0 for t in (slot.p, slot.m, slot.v))
                kinds.setdefault((slot.formats(), self.dtypes[i], whole), []).append(i)
        return [
            adam.Launch([self.slots[i] for i in which], which, dtype, self.rule, whole)
            for (_, dtype, whole), which in kinds.items()
        ]

    def addresses(self, grads: list[Tensor | None]) -> Tensor:
        """[n] int64 on the device: where the gradients lie, 0 for none. Copied only when it has changed."""
        now = [0 if grad is None else grad.data_ptr() or 1 for grad in grads]
        if self._last is None or self._last[0] != now:
            host = torch.tensor(now, dtype=torch.int64)
            if self.steps.is_cuda:
                host = host.pin_memory()
            self._last = now, host.to(self.steps.device, non_blocking=True)
        return self._last[1]

    def reduce_amaxes(self) -> None:
        """The largest over all shards. As bit patterns: an integer maximum keeps NaN."""
        for mesh in self.meshes:
            for group in mesh.get_all_groups():
                dist.all_reduce(self.amaxes, op=dist.ReduceOp.MAX, group=group)


def _reference_amaxes(plan: _Plan, grads: list[Tensor | None], inverse: Tensor) -> None:
    for row, slot, grad in zip(plan.amaxes.view(torch.float32), plan.slots, grads, strict=True):
        if grad is not None and grad.numel():
            row.copy_(torch.stack([x.abs().amax() for x in adam.moments(slot, grad, inverse, plan.rule)]))


def _reference_step(plan: _Plan, grads: list[Tensor | None], table: Tensor, inverse: Tensor) -> None:
    amaxes = None if plan.rule.block else plan.amaxes.view(torch.float32)
    for i, (slot, grad) in enumerate(zip(plan.slots, grads, strict=True)):
        if grad is not None and grad.numel():
            adam.reference(slot, grad, table[i], inverse, plan.rule, None if amaxes is None else amaxes[i])
            plan.p_amaxes.view(torch.float32)[i] = slot.p.abs().amax()


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, as memory: without the wrapper that a weight has while FSDP2 gathers it in FP8."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if is_traceable_wrapper_subclass(local):
        (name,), _ = local.__tensor_flatten__()
        return getattr(local, name)
    return local.detach() if local.requires_grad else local


def _offset(tensor: Tensor) -> tuple[int, ...]:
    """Where this rank's part begins in the whole, by dimension."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]


def _gradient(p: Tensor) -> Tensor | None:
    """This rank's part of p's gradient, contiguous, at an address that 16-byte accesses can have."""
    if p.grad is None:
        return None
    grad = _local(p.grad)
    if grad.layout != torch.strided:
        raise UserError(f"gradients must be dense, got {grad.layout}: use sparse=False in nn.Embedding")
    if grad.dtype not in (torch.float32, torch.bfloat16):
        raise UserError(
            f"gradients must be float32 or bfloat16, got {grad.dtype}: set the parameter's grad_dtype"
        )
    grad = grad.contiguous()
    return grad.clone() if grad.data_ptr() % 16 else grad


def _like(p: Tensor, local: Tensor, shape: torch.Size) -> Tensor:
    """`local` as this rank's shard of a tensor of `shape` that is placed as p is; `local` itself for a plain p."""
    if not isinstance(p, DTensor):
        return local
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=shape, stride=strides
    )


def _has_blocks(p: Tensor, block: int) -> bool:
    """Whether FP8 moments of p can be sliced by rows: a matrix whose shards hold whole blocks."""
    if p.ndim < 2:
        return False
    if not isinstance(p, DTensor) or block == 0:
        return True
    cuts = 1
    for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        if isinstance(placement, Shard) and placement.dim % p.ndim == p.ndim - 1:
            cuts *= size
    return cuts == 1 or p.shape[-1] % (cuts * block) == 0


def without_blocks(parameters: Iterable[tuple[str, Tensor]], block: int) -> list[str]:
    """Names of the matrices whose moments stay float32 because their shards do not hold whole blocks."""
    return [name for name, p in parameters if p.ndim > 1 and not _has_blocks(p, block)]


def _slot(p: Tensor, state: dict[str, Tensor], number: int) -> adam.Slot:
    local = _local(p)
    codes = {}
    for name in MOMENTS:
        key = next(key for key in (name, f"{name}_e4m3", f"{name}_e5m2") if key in state)
        scale = state.get(f"{name}_scale") if key != name else None
        codes[name] = _local(state[key]), None if scale is None else _local(scale)
    offset = _offset(p)
    rows_each = 1  # rows per step of the first dimension
    for size in p.shape[1:-1]:
        rows_each *= size
    row, column = (offset[0] * rows_each, offset[-1]) if p.ndim > 1 else (0, offset[0] if offset else 0)
    (m, m_scale), (v, v_scale) = codes.values()
    return adam.Slot(local, m, v, m_scale, v_scale, number, row, column)


def _table(states: list[dict[str, Tensor]], key: str, device: torch.device) -> Tensor:
    """[n] float32 of the states' 0-dim `key`, 1 where one has none; the states get views of it."""
    one = torch.ones((), device=device)
    table = torch.stack([_local(state.get(key, one)).float().reshape(()).to(device) for state in states])
    for i, state in enumerate(states):
        if key in state:
            state[key] = table[i]
    return table


# ---- States of another format: dicts of one parameter, or flat ones with names like "state.layers.0.wq.weight.exp_avg" ----


def destinations(own: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """What to load into, given the names and shapes that a checkpoint holds (None for what is no tensor): `own`, but for
    moments that the checkpoint keeps in another format, or in other blocks, tensors as it keeps them. Codes are placed as
    in `own`; their scales are whole on every rank, since blocks of the one need not end where shards of the other do."""
    wanted = dict(own)
    for moment, name, there in _kept_otherwise(own, saved):
        value, scale = wanted.pop(name), f"{moment}_scale"
        wanted.pop(scale, None)
        dtype = torch.float32 if there == moment else FORMATS[there.removeprefix(f"{moment}_")]
        wanted[there] = torch.zeros_like(value, dtype=dtype)
        if scale in saved:
            wanted[scale] = torch.zeros(saved[scale], device=_local(value).device)
    return wanted


@torch.no_grad()
def adopt(loaded: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`loaded`, with moments that `own` keeps in another format, or in other blocks, in that of `own` (whose tensors are
    overwritten); one warning if there are any. From FP8 to float32 nothing is lost; to bfloat16 and to FP8 it is rounded."""
    result, shapes = dict(loaded), {name: getattr(value, "shape", None) for name, value in loaded.items()}
    formats: Counter[str] = Counter()
    for moment, name, there in _kept_otherwise(own, shapes):
        scale, source = f"{moment}_scale", result.pop(there)
        source_scale = result.pop(scale, None)
        _store(_decoded(source, source_scale), own[name], own.get(scale), moment.endswith("_sq"))
        result |= {key: own[key] for key in (name, scale) if key in own}
        formats[f"{_format(source, source_scale)} to {_format(own[name], own.get(scale))}"] += 1
    if formats:
        told = ", ".join(f"{number} from {change}" for change, number in formats.items())
        logger.warning(f"Saved moments of the optimizer were converted to the format they have now: {told}.")
    return result


def _moments(names: Iterable[str]) -> dict[str, str]:
    """AdamW's name of each moment among `names` -> its name there."""
    found = {name.removesuffix("_e4m3").removesuffix("_e5m2"): name for name in names}
    return {moment: name for moment, name in found.items() if moment.rpartition(".")[2] in MOMENTS}


def _kept_otherwise(own: Mapping[str, Any], shapes: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(moment, its name in `own`, its name in a state with these names and shapes) where format or blocks differ."""
    theirs, found = _moments(shapes), []
    for moment, name in _moments(own).items():
        there = theirs.get(moment)
        if there is None or shapes[there] != own[name].shape:
            continue  # nothing there, or another parameter's: for the caller to refuse
        mine, blocks = own.get(f"{moment}_scale"), shapes.get(f"{moment}_scale")
        if there != moment and blocks is None:
            continue  # codes without scales, too
        if there != name or blocks != getattr(mine, "shape", None):
            found.append((moment, name, there))
    return found


def _format(value: Tensor, scale: Tensor | None) -> str:
    if scale is None:
        return str(value.dtype).removeprefix("torch.")
    block = _block_size(value.shape[-1], scale)
    where = "one block" if not block else "a block a row" if scale.shape[-1] == 1 else f"blocks of {block}"
    return f"{short_name(value.dtype)} in {where}"


def _block_size(columns: int, scale: Tensor) -> int:
    """Of the blocks that rows of `columns` with these scales can have: one size, but for rows of one block the smallest."""
    if not scale.ndim:
        return 0
    return next(b for b in BLOCK_SIZES[1:] if adam.blocks_per_row(columns, b) == scale.shape[-1])


def _decoded(codes: Tensor, scale: Tensor | None) -> Tensor:
    """The float32 values of a stored moment, placed as its codes are."""
    local = _local(codes)
    scale = scale.full_tensor() if isinstance(scale, DTensor) else scale
    if scale is not None and scale.ndim:  # as each element has it
        *start, first = _offset(codes)
        rows = [slice(begin, begin + size) for begin, size in zip(start, local.shape, strict=False)]
        columns = torch.arange(first, first + local.shape[-1], device=scale.device)
        scale = scale[tuple(rows)][..., columns // _block_size(codes.shape[-1], scale)]
    return _like(codes, adam.decode(local, scale, 1), codes.shape)


def _store(value: Tensor, kept: Tensor, scale: Tensor | None, positive: bool) -> None:
    """Put a moment into `kept` and `scale`, in place. All three may be DTensors."""
    local, x = _local(kept), _local(value).float()
    if scale is None:
        local.copy_(x)
        return
    block, amax = _block_size(kept.shape[-1], scale), None
    if not block:  # over all shards
        amax = value.abs().amax()
        amax = (amax.full_tensor() if isinstance(amax, DTensor) else amax).float().to(scale.device)
    if local.numel():
        adam.encode(x.to(local.device), local, _local(scale), block, positive, amax=amax)
