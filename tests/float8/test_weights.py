"""Weights gathered in FP8 by FSDP2: the same numbers, half the bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from titan_fp8.float8.formats import E4M3
from titan_fp8.float8.weights import GatheredWeight

ROOT = Path(__file__).parents[2]


def test_three_ranks():
    worker = str(Path(__file__).with_name("weights_ranks.py"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", worker],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=180,
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    assert done.stdout.count("ok") == 3


def test_a_gathered_weight_is_for_fp8_gemms_only():
    weight = GatheredWeight(torch.zeros(16, 32, dtype=torch.uint8).view(E4M3), torch.bfloat16)
    assert weight.dtype == torch.bfloat16 and weight.detach().q.dtype == E4M3
    with pytest.raises(NotImplementedError, match=r'FP8 GEMMs only, got aten\.t.*all_gather = "bf16"'):
        torch.nn.functional.linear(torch.zeros(1, 32, dtype=torch.bfloat16), weight)
