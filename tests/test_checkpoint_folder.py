"""One run at a time in a folder (what else checkpoint_folder promises is tested with the manager, in test_checkpoint.py)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from titan_fp8.checkpoint_folder import claim
from titan_fp8.errors import UserError

HOLD = """
import pathlib, sys
from titan_fp8.checkpoint_folder import claim
claim(pathlib.Path(sys.argv[1]))
print("mine", flush=True)
input()
"""


def test_a_folder_is_one_runs_until_its_process_is_gone(tmp_path):
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=f"being written by process {other.pid} on .*choose another"):
            claim(folder)
        other.kill()
        other.wait()
        os.close(claim(folder))  # a killed run leaves no lock
