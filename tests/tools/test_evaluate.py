"""tools/downstream/evaluate.py: which runs of a study, on what, and how the report tells it. lm-eval is played."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers import SIZES, Saved, refusal  # pyrefly: ignore

ROOT = Path(__file__).parents[2]
STUDY = """
[study]
title = "A test"
seeds = [1, 2]
[flags]
{flags}
[arms.fog]
[arms.llama]
architecture.preset = "llama"
"""
TEXT = (
    "The keeper of the lighthouse had painted every wooden shutter in a deep and rather solemn shade of green. "
    * 3
)


@pytest.fixture
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        patch.syspath_prepend(str(ROOT / "tools" / "downstream"))
        yield importlib.import_module("evaluate")


@pytest.fixture
def place(tool, tmp_path) -> Path:
    """A study of which fog-1 and llama-1 have ended, and fog-1's checkpoint lies here."""
    flags = "\n".join(flag.removeprefix("--") for flag in SIZES)
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY.format(flags=flags))
    study = tool.study.load(path)
    for run in study.runs[:2]:
        run.result.parent.mkdir(exist_ok=True, parents=True)
        outcome = {"kind": "outcome", "status": "finished", "step": 5, "flags": run.recipe}
        outcome |= {"jobs": 1, "seconds": 1.0, "device": "cpu", "torch": "2", "titan_fp8": "x"}
        train = {"kind": "train", "step": 5, "tokens": 10, "loss": 2.0}
        with gzip.open(run.result, "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in (train, outcome)))
    Saved(study.runs[0].folder)
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"text": TEXT + str(i)}) + "\n" for i in range(3)))
    return path


def played(model: Path, tasks: Path, name: str) -> dict[str, dict[str, float]]:
    """What lm-eval would answer, once the exported model and the tasks have been looked at."""
    assert json.loads((model / "config.json").read_text())["num_hidden_layers"] == 2
    assert (tasks / f"{name}_bits_per_byte_other.jsonl").read_text().count("\n") == 3
    return {
        f"{name}_bits_per_byte": {"bits_per_byte,none": 1.25},
        f"{name}_bits_per_byte_other": {"bits_per_byte,none": 1.5},
        f"{name}_cloze": {"acc,none": 0.5, "acc_stderr,none": 0.02, "perplexity,none": 9.0},
    }


def test_what_is_there_is_evaluated_once_and_reported(tool, place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setattr(tool, "version", lambda _: "0.4")
    monkeypatch.setattr(tool, "evaluate", lambda *given: tool.figures(played(*given), given[2]))
    command = [str(place), "--path", str(place.parent / "val.jsonl")]
    assert tool.main(command) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        *(f"{name}: no last checkpoint here" for name in ("llama-1", "fog-2", "llama-2")),
        "fog-1: 1.2500 bits per byte, cloze 50.0 %",
    ]
    (result,) = (place.with_suffix("") / "downstream").iterdir()
    assert json.loads(result.read_text()) == {
        "bits_per_byte": {"mean": 1.25, "other": 1.5},
        "cloze": {"acc": 0.5, "acc_stderr": 0.02, "perplexity": 9.0},
        "held_out": "val.jsonl",
        "lm_eval": "0.4",
    }
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # where nothing is left to do, nothing is needed
    assert tool.main(command) == 0 and capsys.readouterr().out.startswith("fog-1: done before\n")
    text = tool.study.report([tool.study.load(place)], None)
    assert "| fog | 1 | 1.2500 | 50.0 % ± 2.0 | 9.00 |" in text
    assert "| bits per byte | fog |\n| --- | ---: |\n| other | 1.500 |" in text


def test_refusals(tool, place, monkeypatch, capsys):
    path = str(place.parent / "val.jsonl")
    refusal(
        lambda: tool.main.__wrapped__([str(place), "--path", path, "--arms", "llama"]),
        "ended",
        "none in",
        "study.py run",
    )
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert tool.main([str(place), "--path", path]) == 2
    assert "pip install -e .[eval]" in capsys.readouterr().err
    assert not (place.with_suffix("") / "downstream").exists()
