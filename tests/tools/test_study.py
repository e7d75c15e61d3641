"""tools/study.py: what a study's file says, runs that go on where they stopped, what is kept of them, and the report."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from titan_fp8.errors import UserError

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tools"))
import study

TINY = """
[study]
title = "A test"
text = "What it asks."
baseline = "wide"
pairs = [["FOG full", "wide"]]
keep = ["tokens", "loss", "statistics.kurtosis"]

[flags]
training = { steps = 6, seq_len = 32, local_batch_size = 4 }
metrics = { log_freq = 1, enable_tensorboard = false }
architecture.n_layers = 1
validation = { enable = true, freq = 3, steps = 1, seq_len = 32, local_batch_size = 4 }
prometheus.enable = false
checkpoint.interval = 2

[arms.wide]
fp8.recipe = "bf16"
fp8.attention = "off"

[arms."FOG full"]
"fp8.amax_history" = 4
"""


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def test_flags_of_a_run_are_the_common_ones_and_its_own(tiny):
    loaded = study.load(tiny)
    assert loaded.arms == ["wide", "FOG full"] and loaded.folder == tiny.with_suffix("")
    run = loaded.runs[1]
    assert run.name == "fog-full-1" and run.result == loaded.folder / "results" / "fog-full-1.jsonl.gz"
    assert "--training.seq_len=32" in run.arguments and "--fp8.amax_history=4" in run.arguments
    assert "--metrics.enable_tensorboard=false" in run.arguments and "--debug.seed=1" in run.arguments


@pytest.mark.parametrize(
    "change, words",
    [
        (('baseline = "wide"', 'baseline = "narrow"'), "baseline must be one of the arms, got 'narrow'"),
        (('keep = ["', 'kept = ["'), "got kept: rename it"),
        (("[flags]", "[flag]"), r"got \[flag\]"),
        (('text = "', "text = "), "mend it"),
        (('"FOG full", "wide"', '"FOG full", "narrow"'), r"two arms, got \['FOG full', 'narrow'\]"),
        (('title = "A test"', "seeds = [1, -2]"), "seeds must be whole numbers"),
        (('"FOG full"', '"WIDE!"'), "arms must differ"),
    ],
)
def test_bad_studies_are_refused(tiny, change, words):
    tiny.write_text(TINY.replace(*change))
    with pytest.raises(UserError, match=words):
        study.load(tiny)


def test_bad_choices_are_refused(tiny):
    loaded = study.load(tiny)
    assert [run.name for run in study.choose(loaded, "wide", "1")] == ["wide-1"]
    for arms, seeds in (("narrow", None), (None, "3"), (None, "x")):
        with pytest.raises(UserError):
            study.choose(loaded, arms, seeds)
    tiny.write_text(TINY.replace('"fp8.amax_history" = 4', '"fp8.amax_history" = -4'))
    with pytest.raises(UserError, match=r"arm 'FOG full': .*amax_history"):
        study.check(study.load(tiny), study.load(tiny).runs)


def test_kept_is_what_was_asked_for():
    row = {
        "kind": "train", "step": 3, "loss": 1.23456789, "lr": 0.1, "nonfinite": ["grad_norm"], "grad_norm": None,
        "statistics": {"layers.0.q": {"kurtosis": 3.0000001, "mean": 1.0}, "layers.0.k": {"mean": 2.0}},
    }  # fmt: skip
    assert study.kept(row, ("loss", "grad_norm", "statistics.kurtosis")) == {
        "kind": "train", "step": 3, "loss": 1.2346, "nonfinite": ["grad_norm"], "grad_norm": None,
        "statistics": {"layers.0.q": {"kurtosis": 3.0}},
    }  # fmt: skip


def test_the_gap_is_of_the_same_seeds():
    def arm(losses):
        return study.Arm("x", [], [], losses, {}, {}, [], True)

    mean, error = study.gap(arm({1: 2.02, 2: 3.0}), arm({1: 2.0, 2: 3.0, 3: 9.0}))
    assert mean == pytest.approx(0.5) and error == pytest.approx(0.5)
    assert study.gap(arm({1: math.inf, 2: 3.0}), arm({1: 2.0, 2: 3.0})) is None
    assert study.gap(arm({1: 2.0}), arm({2: 2.0})) is None


def test_an_arm_that_goes_on_from_another_is_not_compared_by_its_time(tmp_path):
    def arm(name, flags, first):
        rows = [
            {"tokens": 1000 * step, "loss": 3.0 - step / 10, "tokens_per_second": 100.0}
            for step in range(first, 11)
        ]
        run = study.Run(name, 1, tmp_path / name, tmp_path / f"{name}.gz", flags)
        return study.Arm(name, [run], [rows], {1: 2.0}, {}, {}, [{"jobs": 1}], True)

    whole = arm("whole", {}, 1)
    branch = arm("branch", {"checkpoint.initial_load_path": "whole/checkpoint/step-7"}, 8)
    assert whole.timed == whole.speed == branch.speed == 100.0 and branch.timed is None
    (line,) = study.at_equal_time([whole, branch], whole)
    assert "after the 100 GPU seconds of whole: whole 2.000" in line and "branch" not in line


def test_an_arm_that_goes_on_from_another_waits_for_it(tmp_path):
    first, other = (study.Run(n, 1, tmp_path / n, tmp_path / f"{n}.gz", {}) for n in ("first", "other"))
    flags = {"checkpoint.initial_load_path": str(tmp_path / "first/checkpoint/step-7")}
    branch = study.Run("branch", 1, tmp_path / "branch", tmp_path / "branch.gz", flags)
    runs = [first, branch, other]
    assert [study.startable(run, runs) for run in runs] == [True, False, True]
    assert study.startable(branch, [branch, other]), "its source is not to be run: it may be there"
    first.result.touch()
    assert study.startable(branch, runs)


def test_runs_stop_go_on_and_are_reported(tiny, tmp_path, capsys):
    """Asked to stop at once, the runs save and end; the same command finishes them; a third has nothing to do."""
    assert study.main(["run", str(tiny), "--jobs", "2", "--seconds", "0"]) == 1
    loaded = study.load(tiny)
    assert not any(run.ended() for run in loaded.runs)
    assert study.main(["run", str(tiny), "--jobs", "2"]) == 0
    for run in loaded.runs:
        rows = study.rows_of(run)
        train = [row for row in rows if row["kind"] == "train"]
        assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6]
        assert rows[-1]["kind"] == "outcome" and rows[-1]["status"] == "finished" and rows[-1]["step"] == 6
        assert {"kind", "step", "tokens", "loss", "statistics"} == train[-1].keys()
        assert rows[-1]["flags"]["training.steps"] == "6" and "job.dump_folder" not in rows[-1]["flags"]
        written = run.result.stat().st_mtime_ns
        assert study.main(["run", str(tiny), "--arms", run.arm]) == 0
        assert run.result.stat().st_mtime_ns == written
    capsys.readouterr()
    assert study.main(["report", str(tiny)]) == 0 and "curves" not in capsys.readouterr().out
    assert not (loaded.folder / "curves.png").exists()
    assert study.main(["report", str(tiny), "--out", str(tmp_path / "STUDY.md")]) == 0
    text = (tmp_path / "STUDY.md").read_text()
    assert "## A test" in text and "What it asks." in text and "| FOG full | 1 | 0.0 M |" in text
    arms = [study.read_arm(name, loaded.runs) for name in loaded.arms]
    for arm, run in zip(arms, loaded.runs, strict=True):
        (held_out,) = [row for row in study.rows_of(run) if row["kind"] == "validation" and row["step"] == 6]
        assert arm.validated and arm.losses == {1: held_out["validation_loss"]}
    assert "FOG full over wide: " in text and "No validation" not in text
    assert (loaded.folder / "curves.png").stat().st_size > 10_000
    other = tmp_path / "other.toml"
    other.write_text(TINY.replace("A test", "Another"))
    assert study.main(["report", str(tiny), str(other), "--out", str(tmp_path / "STUDY.md")]) == 0
    assert (tmp_path / "STUDY.md").read_text().endswith("## Another\n\nNo run has ended yet.\n")
    assert study.main(["report", str(other)]) == 2
    tiny.write_text(TINY.replace('amax_history" = 4', 'amax_history" = 8'))
    assert study.main(["run", str(tiny)]) == 2
    assert "got fp8.amax_history 4, now 8 in fog-full-1" in capsys.readouterr().err
    assert study.main(["report", str(tiny)]) == 0
    assert "fog-full-1 had other flags: fp8.amax_history 4, now 8." in capsys.readouterr().out
    assert study.main(["status", str(tiny)]) == 0
    assert capsys.readouterr().out.count("finished") == 2


def test_what_stops_before_a_new_step_is_no_end_and_flags_stay(tiny, capsys):
    """A resumed run that is refused keeps its rows and has no result; with the flags it had it goes on."""
    run = study.load(tiny).runs[0]
    run.folder.mkdir(parents=True)
    (run.folder / "outcome.json").write_text(json.dumps({"seconds": 1.0, "flags": run.recipe}))
    (run.folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 3.0, "tokens": 128}\n')
    lock = TINY.replace(
        'fp8.recipe = "bf16"', 'fp8.recipe = "bf16"\ndata.source = "files"\ndata.path = "/nowhere"'
    )
    tiny.write_text(lock)
    capsys.readouterr()
    assert study.main(["run", str(tiny), "--arms", "wide"]) == 2
    assert "data.path -, now /nowhere" in capsys.readouterr().err
    (run.folder / "outcome.json").unlink()  # as where it was killed: the trainer refuses it then
    assert study.main(["run", str(tiny), "--arms", "wide"]) == 1
    assert "/nowhere" in capsys.readouterr().err and not run.ended()


def test_a_run_that_cannot_start_ends_the_study(tiny, capsys):
    tiny.write_text(
        TINY.replace('"fp8.amax_history" = 4', '"data.source" = "files"\n"data.path" = "/nowhere"')
    )
    assert study.main(["run", str(tiny), "--arms", "FOG full"]) == 1
    assert "/nowhere" in capsys.readouterr().err
    assert not any(run.ended() for run in study.load(tiny).runs)


def test_a_run_that_is_not_finite_has_come_to_its_end(tiny, capsys):
    tiny.write_text(TINY.replace('"fp8.amax_history" = 4', '"optimizer.lr" = 1e38'))
    assert study.main(["run", str(tiny), "--arms", "FOG full"]) == 0
    (run,) = study.choose(study.load(tiny), "FOG full", None)
    end = study.rows_of(run)[-1]
    assert (end["status"], end["exit"]) == ("stopped", 3) and "not finite" in end["error"]
    assert study.main(["run", str(tiny), "--arms", "FOG full"]) == 0  # nothing to do
