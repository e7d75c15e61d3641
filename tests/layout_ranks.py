"""Run by test_layouts.py under torchrun: train the cases of a JSON file, one after the other, in the same processes.

Argument: a folder with cases.json, a table of case -> flags. Case after case writes <folder>/<case>/metrics.jsonl; each
rank checks that its FP8 state is rank 0's, and prints "ok" at the end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from titan_fp8.config import load_config
from titan_fp8.train import Trainer


def same_on_all_ranks(state: torch.nn.Module) -> None:
    for name, tensor in state.state_dict().items():
        of_rank_0 = tensor.clone()
        dist.broadcast(of_rank_0, 0)
        assert torch.equal(tensor, of_rank_0), name


def main(folder: Path) -> None:
    for case, flags in json.loads((folder / "cases.json").read_text()).items():
        torch._dynamo.reset()
        trainer = Trainer(load_config([*flags, f"--job.dump_folder={folder / case}"]))
        trainer.train()
        if trainer.scaling is not None:
            same_on_all_ranks(trainer.scaling)
        trainer.close()
        dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    print("ok", flush=True)
    # Not through Python's shutdown: gloo's threads may hold tensors then, and torch, rarely, aborts.
    os._exit(0)
