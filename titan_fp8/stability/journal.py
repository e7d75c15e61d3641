"""metrics.jsonl: a run's numbers on disk, one JSON object per line, readable with one line of any language.

Every row has "kind" and "step". "run" rows say what (re)started at that step, "train" rows hold the logged
steps, "validation" rows the held-out losses, "action" rows what the policy did (stability/policy.py): "action", "cause",
"why", and where they apply "until", "tensors", "target", "times". After a roll-back the rows beyond its target are in
metrics.dropped.jsonl, and an "action" row of the target's step says from which step ("from").

A number that is not finite is written as null and its key is
listed under "nonfinite" (JSON has no NaN); a null that is not listed there is unknown. Example:

    {"kind": "train", "step": 40, "loss": null, "grad_norm": 1.5, "nonfinite": ["loss"]}
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from titan_fp8.errors import UserError


def encode(row: dict[str, Any]) -> str:
    """`row` as one line of strict JSON. Non-finite floats, nested ones too, become null."""
    nonfinite: list[str] = []

    def clean(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: clean(v, f"{path}.{key}" if path else key) for key, v in value.items()}
        if isinstance(value, float) and not math.isfinite(value):
            nonfinite.append(path)
            return None
        return value

    cleaned = clean(row, "")
    if nonfinite:
        cleaned["nonfinite"] = nonfinite
    return json.dumps(cleaned, allow_nan=False)


def _parse(line: str) -> dict[str, Any] | None:
    """The row of a line, or None if it is torn (a killed run leaves half a line)."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a metrics.jsonl, in file order; torn lines are left out."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return [row for line in file if (row := _parse(line)) is not None]


def _belongs(row: dict[str, Any], step: int) -> bool:
    """Whether an earlier process's row still holds when the run goes on from `step` (0: it starts anew)."""
    if step == 0:
        return False
    # The process that starts now writes its own "run" row for `step`.
    return row["step"] < step or (row["step"] == step and row.get("kind") != "run")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"could not write {path}: {error.strerror or error}; make room there, or choose another job.dump_folder, and "
            "start again: the run goes on from its last checkpoint"
        ) from error


class Journal:
    """The open metrics.jsonl of `folder`. One process writes it. What writes raises UserError if that fails."""

    def __init__(self, folder: str | os.PathLike[str], step: int):
        """Open for a run that goes on from `step` (0: a fresh run); the file will hold each step once.

        Rows beyond `step`, which a killed run left or a fresh run replaces, and torn lines move to the end
        of `metrics.dropped.jsonl`: nothing is lost. `self.kept` holds the rows that stay.
        """
        self.path = Path(folder) / "metrics.jsonl"
        self.kept: list[dict[str, Any]] = []
        with _writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._keep(lambda row: _belongs(row, step))
            self._file: IO[str] = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def roll_back(self, step: int) -> None:
        """The run goes back to `step` and trains on from there: rows beyond move aside, as in a restart."""
        self._file.close()
        self.kept = []
        with _writing(self.path):
            self._keep(lambda row: row["step"] <= step)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def _keep(self, belongs: Callable[[dict[str, Any]], bool]) -> None:
        keep, drop = [], []
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for line in file:
                row = _parse(line)
                # A line without its newline was being written when the run died.
                if row is not None and line.endswith("\n") and belongs(row):
                    keep.append(line)
                    self.kept.append(row)
                else:
                    drop.append(line if line.endswith("\n") else line + "\n")
        if not drop:
            return
        with open(self.path.with_name("metrics.dropped.jsonl"), "a", encoding="utf-8") as file:
            _write_through(file, drop)
        temporary = self.path.with_name("metrics.jsonl.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            _write_through(file, keep)
        os.replace(temporary, self.path)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row ("kind" and "step" required) and flush it, so that a reader sees it at once."""
        assert {"kind", "step"} <= row.keys(), f"a row needs kind and step: {row}"
        with _writing(self.path):
            self._file.write(encode(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file. May be called twice."""
        with suppress(OSError):  # `write` has told already of what it could not flush
            self._file.close()


def _write_through(file: IO[str], lines: list[str]) -> None:
    file.writelines(lines)
    file.flush()
    os.fsync(file.fileno())
