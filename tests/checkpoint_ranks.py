"""Run by test_checkpoint.py under torchrun on two ranks: sharded saves, and one rank's full disk.

Argument: an empty folder. Each rank prints "ok" at the end; anything else is a failure.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from titan_fp8 import device

device.install()  # before anything of torchtitan is imported

from test_checkpoint import Adapter, Run, Tiny, same  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

from titan_fp8 import checkpoint  # noqa: E402
from titan_fp8.errors import UserError  # noqa: E402


def sharded(width: int = 64) -> torch.nn.Module:
    torch.manual_seed(0)
    model = fully_shard(Tiny(width), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return device.gloo_safe(model)


def whole(run: Run) -> list[torch.Tensor]:
    return [tensor.full_tensor() for tensor in run.state()]


def limit_file_size(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def check(base: Path, mode: str) -> None:
    folder = base / mode
    run = Run(base, sharded(), async_mode=mode, folder=mode, keep_latest_k=2).train(3)
    run.manager.close()
    dist.barrier()  # closing is not collective
    assert sorted(os.listdir(folder)) == ["step-2", "step-3"]
    again = Run(base, sharded(), async_mode=mode, folder=mode)
    assert again.manager.load() and again.counter.step == 3 and same(whole(run), whole(again))
    if dist.get_rank() == 1:
        limit_file_size(100)
    try:
        again.train(2)  # an async failure is told at the next save
    except UserError as error:
        assert "could not save step-4" in str(error) and "last good checkpoint is step-3" in str(error)
    else:
        raise AssertionError("rank 1 could not write, and nobody said so")
    limit_file_size(resource.RLIM_INFINITY)
    dist.barrier()
    assert sorted(os.listdir(folder)) == ["step-2", "step-3"]


def check_unshared(base: Path) -> None:
    """Two machines with disks of their own, as it looks to them: a relative folder, another working folder for each."""
    home, own = os.getcwd(), base / f"node{dist.get_rank()}"
    own.mkdir()
    os.chdir(own)
    checkpoint.SEEN_WITHIN = 0.5
    try:
        Run(Path("out"), sharded())
    except UserError as error:
        assert f"must be one folder for all machines, got {base}/node1/out/checkpoint on" in str(error), error
    else:
        raise AssertionError("each rank has a folder of its own, and nobody said so")
    os.chdir(home)
    dist.barrier()


def check_export(base: Path) -> None:
    adapter = Adapter({"up.weight": 1, "down.weight": 2})  # one file for each rank to put together
    Run(base, sharded(), adapter=adapter, folder="hf", last_save_in_hf=True).train(last=True)
    names = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert names < set(os.listdir(base / "hf" / "step-1"))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for mode in ("disabled", "async"):
        check(Path(sys.argv[1]), mode)
    check_export(Path(sys.argv[1]))
    check_unshared(Path(sys.argv[1]))
    dist.barrier()
    print("ok", flush=True)
    # Not through Python's shutdown: gloo's threads may hold tensors then, and torch, rarely, aborts.
    os._exit(0)
