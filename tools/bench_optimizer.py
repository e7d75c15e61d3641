"""An optimizer step by itself: ours with moments in FP8 or bf16 beside torch's fused AdamW and torchao's AdamWFp8.

Each optimizer has the same matrices (those of the model), bf16 or float32, and gradients of their own, drawn anew for every
optimizer and never zero. Time is the median of CUDA events around STEPS steps, the optimizers taking turns; bytes are
what a step must read and write (parameter, gradient, moments, scales), over the time: the rate. State: what the optimizer
keeps for a parameter, counted from its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from titan_fp8.optim import Fp8AdamW

STEPS, ROUNDS = 5, 7
SETTINGS: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def _ours(**options: Any) -> Make:
    return lambda parameters: Fp8AdamW(parameters, **SETTINGS, **options)


def _torchao(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamWFp8

    return AdamWFp8(parameters, **SETTINGS)


BASE = "torch fused"
OPTIMIZERS: dict[str, Make] = {
    BASE: lambda parameters: torch.optim.AdamW(parameters, **SETTINGS, fused=True),
    "ours fp8": _ours(),
    "ours fp8, one scale": _ours(block_size=0),
    "ours fp8, stochastic": _ours(round_moments="stochastic", round_parameters="stochastic"),
    "ours bf16": _ours(first_moment="bf16", second_moment="bf16"),
    "torchao fp8": _torchao,
}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors; a subclass (torchao's) by its parts."""
    total = 0
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                parts = [value]
                if hasattr(value, "__tensor_flatten__"):
                    parts = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
                total += sum(part.numel() * part.element_size() for part in parts)
    return total


def run(shapes: list[tuple[int, ...]], dtype: torch.dtype, names: list[str]) -> dict[str, Any]:
    """{"parameters", "dtype", "gpu", "rows"}: a row has step_ms, min, max, ratio to BASE, gb_per_s, state_bytes."""
    count = sum(torch.Size(shape).numel() for shape in shapes)
    built: dict[str, torch.optim.Optimizer] = {}
    for seed, name in enumerate(names):
        generator = torch.Generator("cuda").manual_seed(seed)
        parameters = []
        for shape in shapes:
            drawn = torch.empty(shape, device="cuda", dtype=dtype).normal_(0, 0.02, generator=generator)
            p = nn.Parameter(drawn)
            p.grad = torch.empty_like(p).normal_(0, 1e-3, generator=generator)
            parameters.append(p)
        built[name] = OPTIMIZERS[name](parameters)
        for _ in range(2):
            built[name].step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name, optimizer in built.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(STEPS):
                optimizer.step()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / STEPS)
    base = median(times[BASE]) if BASE in times else None
    rows = []
    for name in names:
        ms, kept = median(times[name]), state_bytes(built[name])
        moved = count * 3 * dtype.itemsize + 2 * kept  # parameter in and out, gradient in, state in and out
        rows.append(
            {
                "optimizer": name, "step_ms": ms, "step_ms_min": min(times[name]), "step_ms_max": max(times[name]),
                "time_ratio": ms / base if base else None, "gb_per_s": moved / ms / 1e6,
                "state_bytes_per_parameter": kept / count,
            }
        )  # fmt: skip
    return {
        "parameters": count, "dtype": str(dtype), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "optimizers": rows,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['parameters'] / 1e9:.3f}B parameters in {result['dtype']}, {result['gpu']}, torch {result['torch']}",
        f"{'optimizer':22s} {'step ms (min - max)':>24s} {'time':>7s} {'GB/s':>7s} {'state B/param':>13s}",
    ]
    for row in result["optimizers"]:
        spread = f"{row['step_ms']:.2f} ({row['step_ms_min']:.2f} - {row['step_ms_max']:.2f})"
        ratio = "" if row["time_ratio"] is None else f"{row['time_ratio']:.2f}x"
        lines.append(
            f"{row['optimizer']:22s} {spread:>24s} {ratio:>7s} {row['gb_per_s']:7,.0f} "
            f"{row['state_bytes_per_parameter']:13.3f}"
        )
    return "\n".join(lines)
