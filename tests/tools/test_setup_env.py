"""tools/setup_env.sh with a stand-in for Python, which notes when pip runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *"-m pip"*) echo begin >>"$NOTES"; sleep 0.3; touch "$NOTES.done"; echo end >>"$NOTES" ;;
    *missing_requirements*) [ -e "$NOTES.done" ] || echo "something" ;;
esac
"""


@pytest.fixture
def starts(tmp_path):
    """starts(count) -> what that many starts at the same time printed; `notes` in the folder has what pip did."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup_env.sh", tmp_path / "tools")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "VIRTUAL_ENV": str(tmp_path / "env"), "NOTES": str(tmp_path / "notes")}
    script = f'root={tmp_path}; source "$root/tools/setup_env.sh"; setup_env; echo "$PY"'

    def run(count: int) -> list[str]:
        command = ["bash", "-c", script]
        both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        return [process.communicate(timeout=30)[0] for process in both]

    return run


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock (util-linux)")
def test_of_two_first_starts_one_installs_and_the_other_waits(starts, tmp_path):
    assert starts(2) == [f"{tmp_path}/env/bin/python\n"] * 2
    assert (tmp_path / "notes").read_text().split() == ["begin", "end"]
    assert (tmp_path / "pyproject.toml").read_text() == "[project]\n"
    assert not (tmp_path / "env" / "titan_fp8.installing").exists()
    assert starts(1) and (tmp_path / "notes").read_text().split() == ["begin", "end"]


def test_an_installation_that_was_stopped_is_finished(starts, tmp_path):
    (tmp_path / "notes.done").touch()
    (tmp_path / "env" / "titan_fp8.installing").touch()
    starts(1)
    assert (tmp_path / "notes").read_text().split() == ["begin", "end"]
