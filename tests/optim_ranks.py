"""Run by test_optim.py under torchrun on two ranks: the same training sharded, and checkpoints from one rank and to it.

Argument: a folder. Blocks lie within rows, random bits hang on places in whole parameters and per-tensor
scales are reduced over ranks: so every layout must give the same bits, given the same gradients.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from titan_fp8.optim import Fp8AdamW, adopt, destinations

SETTINGS = {
    "blocks": {"block_size": 32, "round_moments": "stochastic", "round_parameters": "stochastic"},
    "tensor": {"block_size": 0},
}
OTHERS = {"float32": {"first_moment": "fp32", "second_moment": "fp32"}, "blocks of 16": {"block_size": 16}}


def build(settings: dict, sharded: bool) -> tuple[nn.Module, Fp8AdamW]:
    """Rows that do not divide by two ranks, a matrix with fewer rows than ranks, a vector."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 33), nn.Linear(33, 1, bias=False)).bfloat16()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, Fp8AdamW(model.parameters(), lr=1e-2, **settings)


def train(model: nn.Module, optimizer: Fp8AdamW, steps: range) -> None:
    for step in steps:
        for number, p in enumerate(model.parameters()):
            grad = torch.randn(
                p.shape, generator=torch.Generator().manual_seed(100 * step + number)
            ).bfloat16()
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        optimizer.step()


def states(model: nn.Module, optimizer: Fp8AdamW) -> dict:
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def load(folder: Path, model: nn.Module, optimizer: Fp8AdamW) -> None:
    state = states(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def whole(model: nn.Module, optimizer: Fp8AdamW) -> dict[str, torch.Tensor]:
    """Every parameter and state as bytes, gathered (gloo knows no float8: as float32, which is exact)."""
    result = {}
    for name, p in model.named_parameters():
        for key, value in {"p": p, **optimizer.state[p]}.items():
            value = value.detach().float()
            result[f"{name}.{key}"] = value.full_tensor() if isinstance(value, DTensor) else value
    return result


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def load_converted(folder: Path, model: nn.Module, optimizer: Fp8AdamW) -> None:
    """The moments of a checkpoint of another format or other blocks."""
    own = {
        f"optimizer.state.{name}.{key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
    }
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    wanted = destinations(own, {name: getattr(entry, "size", None) for name, entry in saved.items()})
    dcp.load(wanted, checkpoint_id=folder)
    adopt(wanted, own)


def in_columns() -> tuple[nn.Module, Fp8AdamW]:
    """Two ranks with 24 of 48 columns each, as tensor parallel cuts wo and w2: blocks of 32 end inside a shard."""
    model, _ = build({}, sharded=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(1)]))
    return model, Fp8AdamW(model.parameters(), lr=1e-2, **SETTINGS["blocks"])


def main(base: Path) -> None:
    """Train as `test_two_ranks` did whole; take up its checkpoint; save one of this layout, and what training on gives.
    Then its moments in other layouts and formats."""
    for kind, settings in SETTINGS.items():
        model, optimizer = build(settings, sharded=True)
        train(model, optimizer, range(3))
        expected = torch.load(base / f"{kind}.pt", weights_only=True)
        same(whole(model, optimizer), expected)
        dcp.save(states(model, optimizer), checkpoint_id=base / f"{kind}-two")
        again = build(settings, sharded=True)
        load(base / f"{kind}-one", *again)
        same(whole(*again), expected)
        train(model, optimizer, range(3, 5))
        train(*again, range(3, 5))
        same(whole(*again), whole(model, optimizer))
        torch.save(whole(*again), base / f"{kind}-on{dist.get_rank()}.pt")
    others = {kind: build(settings, sharded=True) for kind, settings in OTHERS.items()} | {
        "columns": in_columns()
    }
    for source in SETTINGS:
        for kind, run in others.items():
            load_converted(base / f"{source}-one", *run)
            got = whole(*run)
            if dist.get_rank() == 0:
                torch.save(got, base / f"{source}-to-{kind}.pt")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    dist.barrier()
    print("ok", flush=True)
    os._exit(0)  # see checkpoint_ranks.py
