"""Put FP8 into a model: swap linears and attention by name, once, before the model is parallelised.

    bf16        nothing is swapped
    tensorwise  torchao's Float8Linear: every tensor scaled by its own amax, taken just before its cast
    rowwise     the same, but every row along the summed dimension by its own, and gradients in E4M3 too
    delayed     our Float8Linear, joined where linears share an input (Float8FanOut) or an activation lies between them
                (Float8FeedForward), and Float8Attention if `[fp8] attention` asks for it

Registered with torchtitan as the model converter "titan_fp8.float8".
"""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any
from weakref import ref

import torch
from torch import nn
from torchtitan.tools.logging import logger

from titan_fp8.config import Fp8
from titan_fp8.errors import UserError

from .attention import Float8Attention, resolve
from .feed_forward import SMOOTH, Float8FeedForward
from .formats import BY_NAME
from .head import Float8ChunkedLoss
from .linear import Float8FanOut, Float8Linear
from .scaling import DelayedScaling, Recipe, TensorScale, WeightScale
from .weights import ShardedWeight

SCALED = (Float8Linear, Float8FanOut, Float8FeedForward, Float8Attention, Float8ChunkedLoss)  # what has slots
FAN_OUTS = ("wqkv", "up")  # modules that apply several linears to one input
LOSS = "loss"  # the module that multiplies by the head's weight
HEAD = "output"  # the LM head, if it has a weight of its own: [fp8] lm_head decides about it, not the filter
TORCHAO = ("tensorwise", "rowwise")  # recipes that are torchao's
STATE = "float8_state"  # name of the DelayedScaling submodule: a prefix of its keys in checkpoints


def select(names: list[str], patterns: list[str]) -> list[str]:
    """Names matched by the globs, in order; "!glob" takes names out. Raises UserError if a glob matches no name."""
    chosen: set[str] = set()
    for pattern in patterns:
        glob = pattern.removeprefix("!")
        hits = {name for name in names if fnmatchcase(name, glob)}
        if not hits:
            close = get_close_matches(glob, names, n=1, cutoff=0.3)
            hint = (
                f"did you mean {close[0]!r}?" if close else f"the model's linears are named like {names[:1]}"
            )
            if glob == HEAD:
                hint = '[fp8] lm_head = "fp8" converts the head'
            raise UserError(
                f"[fp8] filter: every pattern must match a linear module, {pattern!r} matches none: {hint}"
            )
        chosen = chosen - hits if pattern.startswith("!") else chosen | hits
    return [name for name in names if name in chosen]


def convert(model: nn.Module, fp8: Fp8, sharded: bool = False) -> int:
    """Apply the recipe to the model in place. Returns the number of converted linears; logs "converted n of m".

    `sharded`: FSDP2 will shard the model, so weights are prepared to be gathered as `[fp8] all_gather` says.

    Raises UserError: a filter matches or leaves nothing, a dimension is no multiple of 16, a GPU lacks FP8.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != HEAD
    }
    if fp8.recipe == "bf16":
        logger.info(f"FP8: recipe bf16, converted 0 of {len(linears)} linears")
        return 0
    _check_device()
    chosen = {name: linears[name] for name in select(list(linears), fp8.filter)}
    if not chosen:
        raise UserError(
            f"[fp8] filter must leave at least one linear with recipe {fp8.recipe!r}, got {fp8.filter}: "
            'take a "!pattern" out, or write recipe = "bf16"'
        )
    # The head's dimensions are checked with these: D is a block's, and DecoderArgs checks V.
    for name, linear in chosen.items():
        if linear.in_features % 16 or linear.out_features % 16:
            raise UserError(
                f"FP8 GEMMs need dimensions that are multiples of 16, {name} is {linear.in_features} -> "
                f'{linear.out_features}: change the shape, or leave it out with [fp8] filter = [..., "!{name}"]'
            )
    gather = sharded and fp8.all_gather == "fp8"
    if gather and fp8.recipe == "rowwise":
        raise UserError(
            '[fp8] all_gather must be "bf16" with recipe "rowwise" under FSDP, got "fp8": backward scales a weight along '
            "its other dimension; write that, or another recipe"
        )
    smooth = [m for n, m in model.named_modules() if n.endswith("feed_forward") and m.activation == SMOOTH]
    if smooth and fp8.smooth_scale != "token_dynamic":
        if fp8.recipe in TORCHAO:
            raise UserError(
                f'[fp8] smooth_scale must be "token_dynamic" with Smooth-SwiGLU and recipe "{fp8.recipe}", got '
                f'"{fp8.smooth_scale}": write that, or change recipe'
            )
        if fp8.smooth_scale == "channel_dynamic" and gather:
            raise UserError(
                '[fp8] smooth_scale = "channel_dynamic" needs all_gather = "bf16" under FSDP, got "fp8": w2 would be cast '
                'before its scales are known; write that, or smooth_scale = "channel_delayed"'
            )
    if fp8.recipe in TORCHAO:
        for feed_forward in smooth:
            feed_forward.by_token = True
        _convert_torchao(model, set(chosen), fp8.recipe, gather)
    else:
        _convert_delayed(model, chosen, fp8, gather)
    logger.info(
        f"FP8: recipe {fp8.recipe}, attention {fp8.attention}, head {fp8.lm_head}, "
        f"converted {len(chosen)} of {len(linears)} linears"
    )
    return len(chosen)


def _check_device() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        major, minor = torch.cuda.get_device_capability()
        raise UserError(
            f"FP8 GEMMs need a GPU of compute capability 8.9 or later, got {torch.cuda.get_device_name()} "
            f'({major}.{minor}): use [fp8] recipe = "bf16"'
        )


def _convert_torchao(model: nn.Module, names: set[str], recipe: str, gather: bool) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    from .torchao_linear import adopt

    # On CPU torchao's own emulation: its FP8 GEMM is a reference kernel there, a thousand times slower.
    config = replace(
        Float8LinearConfig.from_recipe_name(recipe),
        emulate=not torch.cuda.is_available(),
        enable_fsdp_float8_all_gather=gather,
    )
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in names)
    adopt(model)


def _convert_delayed(model: nn.Module, linears: dict[str, nn.Linear], fp8: Fp8, gather: bool) -> None:
    recipe = Recipe(fp8.amax_history, fp8.margin, fp8.power_of_two_scales)
    recipe.observer = getattr(model, "observer", None)
    device = next(model.parameters()).device
    alone = dict(linears)
    for name, module in list(model.named_modules()):
        joint = name.rpartition(".")[2]
        if joint in FAN_OUTS and len(module.linears) > 1:
            parts = [f"{name.removesuffix(joint)}{sibling}" for sibling in module.linears]
        elif joint == "feed_forward" and not _scaled_by_token(module, fp8):
            parts = [
                f"{name}.{part}" for part, inside in module.named_children() if isinstance(inside, nn.Linear)
            ]
        else:
            continue
        chosen = [part in alone for part in parts]
        if joint == "feed_forward" and module.activation == SMOOTH and any(chosen) and not all(chosen):
            raise UserError(
                f"[fp8] filter must take all linears of a feed-forward with Smooth-SwiGLU or none, got "
                f'{parts[chosen.index(False)]} left out: change it, or write [fp8] smooth_scale = "token_dynamic"'
            )
        # Only as a whole: a linear that the filter leaves in 16 bits leaves its siblings each on their own.
        if all(chosen):
            for part in parts:
                del alone[part]
            with device:
                if joint in FAN_OUTS:
                    joined = Float8FanOut({part.rpartition(".")[2]: linears[part] for part in parts}, recipe)
                else:
                    joined = Float8FeedForward(module, recipe, fp8.smooth_scale == "channel_dynamic")
            model.set_submodule(name, joined)
    for name, linear in alone.items():
        model.set_submodule(name, Float8Linear.from_linear(linear, recipe))
    if fp8.lm_head == "fp8":
        with device:
            model.set_submodule(LOSS, Float8ChunkedLoss(recipe))
    if fp8.attention != "off":
        backends = _attention_backends(fp8)
        for name, module in list(model.named_modules()):
            if name.endswith("inner_attention"):
                with device:
                    attention = Float8Attention(
                        module.softmax_scale,
                        recipe,
                        fp8_backward=fp8.attention == "full",
                        grad_dtype=BY_NAME[fp8.attention_gradients],
                        **backends,
                    )
                model.set_submodule(name, attention)
    slots: dict[str, TensorScale] = {}
    for name, module in model.named_modules():
        if isinstance(module, SCALED):
            slots |= {f"{name}.{tensor}": slot for tensor, slot in module.slots().items()}
    if gather:
        for slot in slots.values():
            for linear in slot.linears if isinstance(slot, WeightScale) else ():
                linear.weight = nn.Parameter(ShardedWeight(linear.weight.detach(), ref(slot)))
    with device:
        model.add_module(STATE, DelayedScaling(slots, recipe))


def _scaled_by_token(feed_forward: Any, fp8: Fp8) -> bool:
    """Whether Smooth-SwiGLU scales rows here; if so the decoder's own FeedForward does it, around w2."""
    feed_forward.by_token = feed_forward.activation == SMOOTH and fp8.smooth_scale == "token_dynamic"
    return feed_forward.by_token


def _attention_backends(fp8: Fp8) -> dict[str, str]:
    if fp8.attention == "forward":  # the kernels know no 16-bit backward
        return {"forward_backend": "reference", "backward_backend": "reference"}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "forward_backend": resolve(fp8.attention_forward, "forward", device),
        "backward_backend": resolve(fp8.attention_backward, "backward", device),
    }


def scaling_state(model: nn.Module) -> DelayedScaling | None:
    """The model's delayed-scaling state, if its recipe has one."""
    state = getattr(model, STATE, None)
    return state if isinstance(state, DelayedScaling) else None


class Float8Converter:
    """torchtitan's ModelConverter protocol: converts after the model is built on meta, updates scales after each step."""

    def __init__(self, job_config: Any, parallel_dims: Any):
        self.fp8: Fp8 = job_config.fp8
        self.sharded = bool(parallel_dims.fsdp_enabled)

    def convert(self, model: nn.Module) -> None:
        convert(model, self.fp8, self.sharded)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        for part in model if isinstance(model, list) else [model]:
            if (state := scaling_state(part)) is not None:
                state.update()
            elif self.fp8.recipe == "tensorwise" and self.sharded and self.fp8.all_gather == "fp8":
                from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

                precompute_float8_dynamic_scale_for_fsdp(part)  # all weights' scales in one all-reduce
