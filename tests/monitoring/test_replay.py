"""tools/monitoring/replay.py: a recorded run over real HTTP, and a plain word where there is none."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import replay
from recordings import recording
from servers import MONITORING, free_port, wait_for


def write(folder: Path, rows) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tra')
    return folder


def test_as_a_person_runs_it(tmp_path):
    rows = recording("healthy")[:20]
    port = free_port()
    command = [
        sys.executable,
        str(MONITORING / "replay.py"),
        str(write(tmp_path / "run", rows)),
        f"--port={port}",
    ]
    process = subprocess.Popen([*command, "--rows-per-second=200"], stdout=subprocess.PIPE, text=True)
    try:
        newest = max(row["step"] for row in rows)

        def at_the_end() -> str | None:
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            return text if f"titan_fp8_steps_total {newest}.0" in text else None

        text = wait_for(at_the_end, 20, "the last row")
        assert re.search(r'titan_fp8_activation_kurtosis\{layer="0",site="ffn_act"\} [\d.]+', text)
    finally:
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert f"http://127.0.0.1:{port}/metrics" in said and f"step {newest}  loss" in said


def test_rows_without_risk_are_predicted(tmp_path):
    """The same as training wrote, but for what thinning took away: here a run of loss and gradient norm only."""
    rows = [{"kind": "train", "step": step, "loss": 2.0, "grad_norm": 1.0} for step in range(1, 60)]
    rows[-1] |= {"loss": None, "nonfinite": ["loss"]}
    found = replay.recorded(write(tmp_path / "run", rows))
    assert found[10]["risk"] == 0 and found[-1]["risk"] > 0.9 and found[-1]["cause"] == "loss"


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        (None, (), "metrics.jsonl"),
        ('{"kind": "run", "step": 0}\n', (), "has none"),
        ('{"kind": "train", "step": 1, "loss": 1.0}\n', ("--rows-per-second=0",), "above 0"),
        ('{"kind": "train", "step": 1, "loss": 1.0}\n', ("--port=99999",), "--prometheus.port="),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, content, flags, words):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert replay.main([str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
