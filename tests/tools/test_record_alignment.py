"""tools/record_alignment.py at a toy's size: what is pushed, what is recorded, and that the backtest reads it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYER = "layers.0.feed_forward"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Run -> its recorded rows."""
    folder = tmp_path_factory.mktemp("recordings")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        tool, backtest = importlib.import_module("record_alignment"), importlib.import_module("backtest")
        size = importlib.import_module("instability").Size(64, 2, 4, 192, 64, 8, 100, 0, 0, 3e-3)
        patch.setattr(tool, "SIZE", size)
        patch.setattr(tool, "STEPS", 40)
        patch.setattr(tool, "PUSH", 10)
        patch.setattr(tool, "OFTEN", 2)
        assert tool.main(["--out", str(folder / "new"), "--seeds", "3"]) == 0
        names = [run.replace(" ", "-") for run in tool.RUNS]
        assert sorted(path.name for path in folder.glob("new/*")) == sorted(f"{n}-3.jsonl.gz" for n in names)
        read = {name: backtest.read(folder / "new" / f"{name}-3.jsonl.gz") for name in names}
        assert {name: rows.pop(0)["activation"] for name, rows in read.items()} == {
            name: "smooth_swiglu" if name == "pushed-smooth" else "swiglu" for name in names
        }
        return read


def test_every_step_is_recorded_with_what_the_predictor_reads(rows):
    for name, run in rows.items():
        assert [row["step"] for row in run] == list(range(1, 41)), name
        found = {key for values in run[-1]["statistics"].values() for key in values}
        assert {"kurtosis", "amax", "alignment_max", "logit_max"} <= found, name
        assert ("headroom" in found) == ("fp8" in name or "smooth" in name), name
        assert not found & {"mean", "weight_rms"}, name


def test_only_the_pushed_runs_align_and_grow_an_outlier(rows):
    def alignment(name, row):
        return rows[name][row]["statistics"][LAYER]["alignment_max"]

    def largest(name):
        return max(row["statistics"]["layers.0.ffn_act"]["amax"] for row in rows[name])

    for name in ("pushed-bf16", "pushed-fp8", "pushed-smooth"):
        assert alignment(name, 9) < 0.95 and alignment(name, 39) > 0.999, name
    assert alignment("calm-fp8", 39) < 0.95
    assert largest("pushed-bf16") > 1e5 and largest("pushed-fp8") > 1e5
    # What Smooth-SwiGLU casts has but those that grew since the last rare token: z is 2 times as large after each step.
    assert largest("pushed-smooth") < 1e4 and largest("calm-fp8") < 1e3


def test_the_runs_part_only_when_something_differs(rows):
    """Before the push, FP8 with and without it is the same run; BF16 and Smooth-SwiGLU live through it."""
    assert [row["loss"] for row in rows["pushed-fp8"][:10]] == [row["loss"] for row in rows["calm-fp8"][:10]]
    for name in ("pushed-bf16", "pushed-smooth"):
        assert rows[name][-1]["loss"] == pytest.approx(rows["calm-fp8"][-1]["loss"], rel=0.15), name


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = importlib.import_module("record_alignment")
    (tmp_path / "file").touch()
    assert tool.main(["--out", str(tmp_path / "file" / "below")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--out must be a folder" in error
