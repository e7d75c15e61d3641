"""metrics.jsonl: strict JSON, each step once, nothing lost."""

import json
import math

from helpers import refusal

from titan_fp8.stability.journal import Journal, encode, read


def strict(line):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def train(step, **values):
    return {"kind": "train", "step": step, **values}


def rows_of(path):
    return [(row["kind"], row["step"]) for row in read(path)]


def fill(folder, last_step):
    """A run's file: a run row, steps 1..last_step, a validation at step 4."""
    journal = Journal(folder, 0)
    journal.write({"kind": "run", "step": 0})
    for step in range(1, last_step + 1):
        journal.write(train(step, loss=1.0 / step))
        if step == 4:
            journal.write({"kind": "validation", "step": 4, "validation_loss": 0.3})
    journal.close()
    return journal.path


def test_nonfinite_numbers_become_null_and_are_named():
    row = train(
        3, loss=math.nan, grad_norm=math.inf, mfu=None, fp8={"max_saturation": -math.inf, "worst": "a.x"}
    )
    assert strict(encode(row)) == {
        "kind": "train",
        "step": 3,
        "loss": None,
        "grad_norm": None,
        "mfu": None,
        "fp8": {"max_saturation": None, "worst": "a.x"},
        "nonfinite": ["loss", "grad_norm", "fp8.max_saturation"],
    }


def test_a_row_is_on_disk_before_the_next(tmp_path):
    journal = Journal(tmp_path / "new" / "folder", 0)
    journal.write(train(1, loss=2.0))
    assert read(journal.path) == [train(1, loss=2.0)]
    journal.close()


def test_resume_drops_rows_beyond_the_checkpoint_and_keeps_them_aside(tmp_path):
    path = fill(tmp_path, last_step=6)
    journal = Journal(tmp_path, 4)
    assert [row["step"] for row in journal.kept] == [0, 1, 2, 3, 4, 4]
    journal.write({"kind": "run", "step": 4})
    journal.write(train(5))
    journal.close()
    history = [
        ("run", 0),
        *(("train", step) for step in (1, 2, 3, 4)),
        ("validation", 4),
        ("run", 4),
        ("train", 5),
    ]
    assert rows_of(path) == history
    assert rows_of(tmp_path / "metrics.dropped.jsonl") == [("train", 5), ("train", 6)]

    # A second resume from the same checkpoint leaves one run row for it.
    journal = Journal(tmp_path, 4)
    journal.write({"kind": "run", "step": 4})
    journal.close()
    assert rows_of(path) == history[:-1]


def test_a_torn_last_line_is_tolerated_and_moved(tmp_path):
    path = fill(tmp_path, last_step=2)
    with open(path, "a") as file:
        file.write('{"kind": "train", "st')
    assert rows_of(path)[-1] == ("train", 2)
    journal = Journal(tmp_path, 2)
    journal.write(train(3))
    journal.close()
    assert [strict(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    assert (tmp_path / "metrics.dropped.jsonl").read_text() == '{"kind": "train", "st\n'


def test_a_fresh_run_moves_the_old_one_aside(tmp_path):
    path = fill(tmp_path, last_step=2)
    old = path.read_text()
    journal = Journal(tmp_path, 0)
    assert journal.kept == []
    journal.close()
    assert path.read_text() == ""
    assert (tmp_path / "metrics.dropped.jsonl").read_text() == old


def test_a_full_disk_is_one_line(tmp_path):
    journal = Journal(tmp_path, 0)
    journal.write(train(1))
    journal._file = open("/dev/full", "w")  # noqa: SIM115 - the journal closes it
    refusal(lambda: journal.write(train(2)), str(tmp_path / "metrics.jsonl"), "No space left", "make room")
    journal.close()
    (tmp_path / "file").write_text("")
    refusal(lambda: Journal(tmp_path / "file", 0), "could not write", "File exists")


def test_a_clean_file_is_not_rewritten(tmp_path):
    path = fill(tmp_path, last_step=4)
    before = path.stat().st_ino
    Journal(tmp_path, 4).close()
    assert path.stat().st_ino == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_rollback_moves_later_rows_aside_and_goes_on_in_the_same_file(tmp_path):
    path = fill(tmp_path, last_step=6)
    journal = Journal(tmp_path, 4)
    journal.write({"kind": "run", "step": 4})
    journal.write(train(5, loss=9.0))
    journal.roll_back(4)
    journal.write({"kind": "action", "step": 4, "action": "roll_back", "from": 5})
    journal.write(train(5, loss=0.2))
    journal.close()
    # The run row of step 4 stays: unlike a restart, a roll-back writes none.
    assert rows_of(path)[-4:] == [("validation", 4), ("run", 4), ("action", 4), ("train", 5)]
    assert read(path)[-1]["loss"] == 0.2
    dropped = read(path.with_name("metrics.dropped.jsonl"))
    assert [row["step"] for row in dropped] == [5, 6, 5] and dropped[-1]["loss"] == 9.0
