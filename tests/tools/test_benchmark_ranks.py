"""tools/benchmark_ranks.py without a GPU: a profile's arithmetic, and a run of two CPU processes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_exposed_time_and_bytes_of_a_trace(monkeypatch):
    """Two ranks: an all-gather half of which no kernel covers, and a reduce-scatter beside a kernel all the time."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    traffic = importlib.import_module("benchmark_ranks").traffic

    def event(name, start, length, **args):
        return {"cat": "kernel", "name": name, "ts": start, "dur": length, "args": args}

    gather = {
        "Collective name": "_allgather_base",
        "dtype": "Byte",
        "In msg nelems": 500,
        "Out msg nelems": 1000,
    }
    scatter = {
        "Collective name": "_reduce_scatter_base",
        "dtype": "Float",
        "In msg nelems": 1000,
        "Out msg nelems": 500,
    }
    events = [
        event("gemm", 0, 2000), event("gemm", 1500, 500), event("cast", 3000, 4000), {"cat": "cpu_op", "name": "nccl"},
        event("ncclDevKernel_AllGather", 1000, 2000, **gather, **{"Group size": 2}),
        event("ncclDevKernel_ReduceScatter", 4000, 1000, **scatter, **{"Group size": 2}),
    ]  # fmt: skip
    found = traffic(events, 1)
    assert (found["nccl_ms"], found["exposed_ms"], found["busy_ms"]) == (3.0, 1.0, 6.0)
    assert found["received_gb"] == {
        "_reduce_scatter_base Float": 2000 / 1e9,
        "_allgather_base Byte": 500 / 1e9,
    }


def test_two_processes_train_ours_and_the_stock_model(tmp_path):
    flags = "--model debug --layers 2 --vocab 512 --multiple-of 64 --seq-len 64 --batch 2 --warm-up 2 --steps 4 --no-compile"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        str(ROOT / "tools/benchmark_ranks.py"),
    ]
    command += [*flags.split(), "--variants=torchtitan bf16,fog_max fp8 full", f"--out={tmp_path / 'r.json'}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["layout"] == "FSDP 2 x TP 1" and [row["variant"] for row in result["rows"]] == [
        "torchtitan bf16", "fog_max fp8 full",
    ]  # fmt: skip
    for row in result["rows"]:
        losses = row["losses"]
        assert len(losses) == 10 and losses[6] < losses[2] < losses[0]  # the same batch, three times
        assert row["plan"]["received_gb"]["FSDP all-gather"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variants", "fast"], "--variants must name known ones, got 'fast'"),
        (["--tp", "3"], "--tp must divide the number of ranks, got 3 and 2: start it with torchrun"),
    ],
)
def test_arguments_are_refused_in_one_line(monkeypatch, capsys, arguments, words):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert importlib.import_module("benchmark_ranks").main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
