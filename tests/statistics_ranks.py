"""Run by stability/test_statistics.py under torchrun on two ranks: FSDP 2 and TP 2 tell what one process tells.

Each rank has the whole model, too. Each prints "ok".
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from tensor_parallel_ranks import ALONE, CASES, B, S, build, data
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.distributed import ParallelDims

from titan_fp8.float8.convert import scaling_state
from titan_fp8.stability.statistics import Statistics, Table

FEW = {"saturated_share": 1e-3, "underflowed_share": 1e-3, "headroom": 0.18}  # 2^0.18 = 1 + 2^-3


class Reductions(TorchDispatchMode):
    """Counts all-reduces that the trainer's process groups run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "allreduce" in str(func)
        return func(*args, **(kwargs or {}))


def tables(model: Any, dims: Any, steps: int = 2) -> list[Table]:
    tp = dims.get_mesh("tp").get_group() if dims.tp_enabled else None
    batch = B // 2 if dims.dp_enabled else B
    scaling = scaling_state(model)
    statistics = Statistics(model, model.observer, batch, tp, scaling)
    found = []
    for step in range(steps):
        statistics.begin()
        (model(*data(step, dims)) / (B * S)).backward()
        statistics.end()
        statistics.before_update()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.02 * p.grad
                p.grad = None
        if scaling is not None:
            scaling.update()
        with Reductions() as reductions:
            found.append(statistics.collect())
        assert reductions.count == (3 if tp else 2)
    return found


def check(name: str, dims: Any) -> None:
    """Without FP8, float32 sums in another order: 1e-5 of a value, times a few for fourth powers and what cancels.

    With FP8 one in 10^5 values falls on the other side of a rounding border, and with it one element by up to 2^-3: an
    amax by as much, sums by a part of it, counts by a few of 8192 elements.
    """
    fp8, architecture, how = CASES[name]
    plain = fp8.recipe == "bf16"
    expected = tables(build(ALONE, fp8, architecture), ALONE)
    got = tables(build(dims, fp8, architecture, **how), dims)
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, got)
    assert objects[0] == objects[1], "ranks differ"
    compared = 0
    for a, b in zip(expected, got, strict=True):
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        for site in a:
            assert a[site].keys() == b[site].keys(), (name, site, a[site], b[site])
            for statistic, value in a[site].items():
                size = a[site].get("rms", 0) if statistic == "mean" else abs(value)
                bound = 1e-4 * size if plain else 0.12 * size + FEW.get(statistic, 0.0)
                error = abs(value - b[site][statistic])
                assert error <= bound, (name, site, statistic, value, b[site][statistic])
                compared += 1
    assert compared > 100


def main() -> None:
    fsdp = ParallelDims(1, 2, 1, 1, 1, 1, 1, 2)
    tp = ParallelDims(1, 1, 1, 2, 1, 1, 1, 2)
    for dims in (fsdp, tp):
        dims.build_mesh()
        for name in ("xielu, tanh, tied", "swiglu", "smooth", "delayed", "delayed smooth", "tensorwise"):
            torch._dynamo.reset()
            check(name, dims)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.barrier()
    print("ok", flush=True)
    # Not through Python's shutdown: gloo's threads may hold tensors then, and torch, rarely, aborts.
    os._exit(0)
