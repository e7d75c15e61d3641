"""Which GEMM ran in which precision: every matrix product that a step dispatches, with its module, dtypes and FLOPs.

Nothing is declared by the layers; the operands' dtypes are read off the operators as they are called. An operator counts as
a GEMM if PyTorch's FLOP counter knows it, so a product that nobody thought of shows up too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import addmm_flop, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .formats import is_fp8

# Two GEMMs forward and five backward in one operator that the FLOP counter has no formula for.
_ATTENTION, _ATTENTION_BACKWARD = (
    {
        getattr(torch.ops.aten, f"_scaled_dot_product_{kind}{suffix}")
        for kind, suffix in (
            *((kind, f"_attention{back}") for kind in ("flash", "efficient", "cudnn")),
            ("flash", f"_attention_for_cpu{back}"),
        )
    }
    for back in ("", "_backward")
)


@dataclass(frozen=True)
class Gemm:
    """One call: deepest module, phase, operator, operand dtypes and shapes, FLOPs (2 per multiply-add)."""

    module: str
    phase: str
    op: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    flops: int
    fp8: bool


def _with_all_heads(q: torch.Size, k: torch.Size, v: torch.Size) -> tuple[torch.Size, torch.Size, torch.Size]:
    """As many kv heads as query heads, which is what is computed: torch 2.11's formula knows no groups."""
    return q, *(torch.Size([shape[0], q[1], *shape[2:]]) for shape in (k, v))  # type: ignore


def _flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int | None:
    packet = func._overloadpacket
    if packet in _ATTENTION:
        return sdpa_flop_count(*_with_all_heads(*(t.shape for t in args[:3])))
    if packet in _ATTENTION_BACKWARD:
        do, *qkv = (t.shape for t in args[:4])
        return sdpa_backward_flop_count(do, *_with_all_heads(*qkv))
    if packet is torch.ops.aten.addmm:  # the registered formula does not take the overload with an out_dtype
        return addmm_flop(*(t.shape for t in args[:3]))
    formula = flop_registry.get(packet)
    return None if formula is None else formula(*args, **kwargs, out_val=out)


class GemmAudit(TorchDispatchMode):
    """Context manager around forward and backward of `model`; afterwards `gemms` lists the calls in order.

    In forward the module is the innermost one running. In backward it is the module whose forward made the autograd node
    that is running: when a module returns, the nodes between its output and its inputs are tagged with its name. The phase
    is when a GEMM ran: those for the head's gradients run with the loss, in forward (titan_fp8/loss.py).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.gemms: list[Gemm] = []
        self._model = model
        self._running: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> GemmAudit:
        for name, module in self._model.named_modules():
            self._hooks.append(
                module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name))
            )
            self._hooks.append(module.register_forward_hook(self._leave))
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for hook in self._hooks:
            hook.remove()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._running.pop()
        border = {t.grad_fn for t in args if isinstance(t, Tensor)}
        nodes = [
            t.grad_fn for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)
        ]
        seen = set()
        while nodes:
            node = nodes.pop()
            if node is None or node in border or node in seen:
                continue
            seen.add(node)
            node.metadata.setdefault("module", name)  # inner modules return first, and keep their nodes
            nodes.extend(parent for parent, _ in node.next_functions)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        flops = _flops(func, args, kwargs, out)
        if flops:
            # The operands are the first two matrices (addmm and baddbmm put what is added before them).
            matrices = [t for t in args if isinstance(t, Tensor) and t.dim() >= 2]
            left, right = matrices[-2:] if "addmm" in str(func) else matrices[:2]
            node = torch._C._current_autograd_node()
            module = self._running[-1] if node is None else node.metadata.get("module", "")
            self.gemms.append(
                Gemm(
                    module=module or "(model)",
                    phase="forward" if node is None else "backward",
                    op=str(func._overloadpacket),
                    dtypes=(_name(left.dtype), _name(right.dtype)),
                    shapes=(tuple(left.shape), tuple(right.shape)),
                    flops=int(flops),
                    fp8=is_fp8(left.dtype) and is_fp8(right.dtype),
                )
            )
        return out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def audit_step(model: nn.Module, tokens: Tensor) -> list[Gemm]:
    """List the GEMMs of model(tokens, labels), a loss, and its backward; tokens [B, S]. Gradients are left on the model."""
    with GemmAudit(model) as audit:
        model(tokens, tokens).backward()
    return audit.gemms


def summarize(gemms: list[Gemm]) -> dict[str, Any]:
    """JSON-ready report. `block_gemm_flops_fp8_ratio`: FP8 share of the GEMM FLOPs inside the transformer blocks."""
    total = sum(g.flops for g in gemms)
    block = [g for g in gemms if g.module.startswith("layers.")]
    block_flops = sum(g.flops for g in block)
    rows = [asdict(g) | {"share": g.flops / total} for g in gemms]
    return {
        "gemm_flops": total,
        "block_gemm_flops": block_flops,
        "block_gemm_flops_fp8_ratio": sum(g.flops for g in block if g.fp8) / block_flops
        if block_flops
        else 0.0,
        "gemm_flops_fp8_ratio": sum(g.flops for g in gemms if g.fp8) / total if total else 0.0,
        "gemms": rows,
    }
