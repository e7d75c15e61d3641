"""Two runs recorded on CPU, row by row, small enough to keep.

    healthy     the debug configuration (FOG), 200 steps
    diverging   240 steps of the same with architecture.preset = "llama", optimizer.lr = 1.0, training.max_norm = 1e6 and
                lr_scheduler.warmup_steps = 300: FFN rows align, kurtosis and logits grow, the loss leaves its baseline

Both with metrics.log_freq = 1, training.seq_len = 64 and training.local_batch_size = 8. To record one anew:

    python tests/monitoring/recordings.py RUN_FOLDER NAME
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

TOOLS = Path(__file__).parents[2] / "tools"
sys.path[:0] = [str(TOOLS), str(TOOLS / "monitoring")]  # backtest, replay, build

KEPT = (
    "kurtosis",
    "headroom",
    "saturated_share",
    "underflowed_share",
    "alignment_max",
    "alignment_q999",
    "logit_max",
    "entropy",
)


def recording(name: str) -> list[dict[str, Any]]:
    """The rows of a recorded run."""
    import replay

    return replay.recorded(Path(__file__).parent / f"{name}.jsonl.gz")


def bad_row(rows: list[dict[str, Any]]) -> int:
    """The row at which the loss left its baseline, by the definition of tools/backtest.py."""
    import backtest

    places = [index for index, row in enumerate(rows) if row["kind"] == "train"]
    losses = np.array([np.nan if rows[index]["loss"] is None else rows[index]["loss"] for index in places])
    off = backtest.divergence(losses)
    assert off is not None, "the run did not diverge"
    return places[off]


def thin(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without statistics that are not exported, and those that are to three digits."""
    for row in rows:
        statistics = {
            site: {key: value and float(f"{value:.3g}") for key, value in values.items() if key in KEPT}
            for site, values in row.get("statistics", {}).items()
        }
        if statistics:
            row["statistics"] = {site: values for site, values in statistics.items() if values}
    return rows


if __name__ == "__main__":
    import replay

    folder, name = Path(sys.argv[1]), sys.argv[2]
    lines = "".join(json.dumps(row) + "\n" for row in thin(replay.recorded(folder)) if row["step"] <= 240)
    path = Path(__file__).parent / f"{name}.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
    print(f"Wrote {path}: {path.stat().st_size} bytes")
