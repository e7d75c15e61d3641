"""Tensor and sequence parallel on CPU with gloo: gradients, FP8 state, traffic (tensor_parallel_ranks.py), checkpoints.

Two processes, and four with FSDP2 above. All cases on four:   LAYOUTS=all python -m pytest tests/test_tensor_parallel.py
How whole training runs compare: test_layouts.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import refusal

from titan_fp8.config import Fp8, load_config
from titan_fp8.loss import cross_entropy_, cross_entropy_gradient_
from titan_fp8.model.args import DecoderArgs
from titan_fp8.model.parallelize import _check_split
from titan_fp8.train import Trainer

ROOT = Path(__file__).parent.parent


def run(processes: int, *flags: str) -> None:
    worker = str(Path(__file__).with_name("tensor_parallel_ranks.py"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", worker, *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
    assert done.stdout.count("ok") == processes


def rows(folder: Path, kind: str) -> dict[int, dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in lines if row["kind"] == kind}


def test_two_ranks_and_a_checkpoint_for_one(tmp_path, gloo):
    """TP 2 trains four steps of eight; one process resumes, and goes on as one process that ran all eight."""
    (tmp_path / "text").mkdir()
    for i in range(30):
        words = " ".join(f"the {(i * 7 + j) % 23} quick brown foxes number {j % 11} jump" for j in range(150))
        (tmp_path / "text" / f"{i:02}.txt").write_text(words)
    common = {
        "job.config_file": ROOT / "train_configs" / "debug.toml", "architecture.n_layers": 2, "training.seq_len": 32,
        "training.local_batch_size": 4, "lr_scheduler.warmup_steps": 2, "lr_scheduler.total_steps": 8,
        "validation.seq_len": 32, "validation.local_batch_size": 4, "validation.freq": 4, "validation.steps": 4,
        "data.source": "files", "data.path": tmp_path / "text", "data.held_out": 0.1, "metrics.log_freq": 1,
        "prometheus.enable": "false", "metrics.enable_tensorboard": "false", "checkpoint.interval": 4,
        "fp8.amax_history": 4, "fp8.lm_head": "fp8", "architecture.vocab_size": 288, "optimizer.lr": 1e-3,
    }  # fmt: skip
    flags = [f"--{key}={value}" for key, value in common.items()]
    split = f"--job.dump_folder={tmp_path / 'split'}"
    run(2, *flags, split, "--training.steps=4", "--parallelism.tensor_parallel_degree=2")
    for folder in (split, f"--job.dump_folder={tmp_path / 'one'}"):
        trainer = Trainer(load_config([*flags, folder, "--training.steps=8"]))
        trainer.train()
        trainer.close()
    one, resumed = (rows(tmp_path / name, "train") for name in ("one", "split"))
    assert list(one) == list(resumed) == list(range(1, 9))
    assert one[8]["loss"] < 0.95 * one[1]["loss"]
    for step, row in one.items():
        # bfloat16 moves sums by 2^-9 and with them one FP8 code in thirty: as in test_layouts.py.
        assert resumed[step]["loss"] == pytest.approx(row["loss"], rel=0.01), step
        assert resumed[step]["grad_norm"] == pytest.approx(row["grad_norm"], rel=0.1), step
        assert resumed[step]["tokens"] == row["tokens"]
    held_out = [rows(tmp_path / name, "validation") for name in ("one", "split")]
    assert list(held_out[0]) == list(held_out[1]) == [1, 4, 8]
    for step, row in held_out[0].items():
        assert held_out[1][step]["validation_loss"] == pytest.approx(row["validation_loss"], rel=0.01), step


def test_four_ranks():
    run(4)


@pytest.mark.parametrize(
    ("changes", "fp8", "words"),
    [
        ({"n_kv_heads": 2}, Fp8(), ("kv heads must be a multiple of 4, got 2", "smaller degree")),
        ({"vocab_size": 258}, Fp8(), ("vocabulary must be a multiple of 4, got 258", "vocab_size = 260")),
        (
            {"vocab_size": 272},
            Fp8(lm_head="fp8"),
            ("multiple of 64 (FP8 GEMMs", "got 272", "vocab_size = 320"),
        ),
        ({"ffn_dim": 64}, Fp8(), ("feed-forward must be a multiple of 64 (FP8 GEMMs", "got 96")),
        ({"dim": 32}, Fp8(), ("heads must be a multiple of 8 (FP8 GEMMs", "got 4")),
    ],
)
def test_a_model_that_does_not_divide_is_refused(changes, fp8, words):
    shape = {"dim": 128, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 128, "vocab_size": 320}
    _check_split(DecoderArgs(**shape), 4, fp8)
    args = DecoderArgs(**(shape | changes))
    _check_split(args, 2, Fp8(recipe="bf16"))
    refusal(lambda: _check_split(args, 4, fp8), *words)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_from_a_given_lse_is_cross_entropys(device, dtype):
    """The same formula in float32 from the same lse, rounded once: equal but for exp's last bits."""
    logits = (3 * torch.randn(40, 1009)).to(device, dtype)
    labels = torch.randint(0, 1009, (40,), device=device)
    labels[3] = -100
    expected, got = logits.clone(), logits.clone()
    _, lse = cross_entropy_(expected, labels, True)
    cross_entropy_gradient_(got, labels - 7, lse)  # as on a rank whose tokens begin with number 7
    one = torch.nn.functional.one_hot(labels.clamp(min=0), 1009) * (labels != -100)[:, None]
    moved = one.roll(-7, 1).where(torch.arange(1009, device=device) < 1002, 0)
    torch.testing.assert_close(
        got + one.to(dtype), expected + one.to(dtype) + one.to(dtype) - moved.to(dtype)
    )
