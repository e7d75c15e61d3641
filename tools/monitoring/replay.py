"""Serve a recorded run to Prometheus as if it were training now: to try alerts and the dashboard without a GPU.

    python tools/monitoring/replay.py RUN [--rows-per-second 5] [--port 9464]

RUN is a run folder, or a recording *.jsonl or *.jsonl.gz as titan_fp8.stability.journal writes it. Rows without "risk"
(recorded before the predictor ran in training) are given to the predictor here. The last row stays until Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent.parent)
)  # runs from a checkout, installed or not

from titan_fp8.errors import UserError, in_one_line
from titan_fp8.stability.exporter import Exporter
from titan_fp8.stability.predictor import Predictor, parameters_of, series_of


def recorded(path: Path) -> list[dict[str, Any]]:
    """The rows of a recording, with risk. Raises UserError if there is none."""
    if path.is_dir():
        plain = path / "metrics.jsonl"
        path = plain if plain.exists() else path / "metrics.jsonl.gz"
    rows = []
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(ValueError):  # the torn end of a run that was killed
                    rows.append(json.loads(line))
    except (OSError, EOFError) as error:
        raise UserError(
            f"a run must be a folder with metrics.jsonl or a whole *.jsonl or *.jsonl.gz file, got {path} ({error}): "
            "name the [job] dump_folder of a run"
        ) from error
    if not any(row.get("kind") == "train" for row in rows):
        raise UserError(f"a recording must hold a logged step, and {path} has none: let the run train first")
    return list(_predicted(rows))


def _predicted(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    predictor = Predictor(parameters_of(next((row for row in rows if row.get("kind") == "run"), {})))
    for row in rows:
        if row.get("kind") == "train" and row.get("risk") is None:
            told = predictor.update(row["step"], series_of(row))
            steps = told.steps_to_saturation
            row |= {
                "risk": told.risk,
                "cause": told.cause.series if told.cause else None,
                "steps_to_saturation": steps and [count if math.isfinite(count) else None for count in steps],
            }
        yield row


def replay(
    rows: list[dict[str, Any]], exporter: Exporter, rows_per_second: float
) -> Iterator[dict[str, Any]]:
    """Hand the rows to the exporter in their order and pace, and yield each when it is out."""
    due = time.monotonic()
    for row in rows:
        exporter.update(row)
        yield row
        due += 1 / rows_per_second
        time.sleep(max(due - time.monotonic(), 0))


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        description="Serve a recorded run to Prometheus as if it were training now."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or a recording")
    parser.add_argument("--rows-per-second", type=float, default=5.0, help="pace (default: 5)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=9464, help="port to listen on (default: 9464)")
    options = parser.parse_args(arguments)
    if not options.rows_per_second > 0:
        raise UserError(f"--rows-per-second must be above 0, got {options.rows_per_second}: leave it out")
    rows = recorded(options.run)
    exporter = Exporter({"host": options.host, "port": options.port})
    print(f"Prometheus metrics at {exporter.start()[0]}", flush=True)
    try:
        for row in replay(rows, exporter, options.rows_per_second):
            if row["kind"] == "train":
                print(
                    f"step {row['step']}  loss {row['loss']}  risk {row['risk']:.2f}  {row['cause'] or ''}",
                    flush=True,
                )
        print("The last row stays; Ctrl-C ends", flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return 0
    finally:
        exporter.close()


if __name__ == "__main__":
    sys.exit(main())
