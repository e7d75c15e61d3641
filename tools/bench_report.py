"""What benchmark.py found, as a table and as a picture. Works on its JSON alone, recorded anywhere."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from titan_fp8.errors import UserError
from titan_fp8.files import save

# Okabe and Ito's colours, told apart with any colour vision; a kind of kernel keeps its colour.
KINDS = {
    "gemm": "#0072B2", "attention": "#56B4E9", "cast": "#D55E00", "activation": "#E69F00", "elementwise": "#CC79A7",
    "loss": "#F0E442", "optimizer": "#009E73", "copy": "#999999", "idle": "#DDDDDD",
}  # fmt: skip
LINES = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999")
LAST = 10  # steps of a loss curve that count as its end


def curve_end(losses: list[float]) -> float:
    return mean(losses[-LAST:])


def table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    base = result.get("base", rows[0]["variant"])
    lines = [
        f"{result['model']}, {result['layers']} layers, batch {result['batch']}, seq {result['seq_len']}, "
        f"{result['gpu']}, torch {result['torch']}; ratio to {base}",
        f"{'variant':24s} {'tokens/s':>9s} {'ratio':>7s} {'step ms (min - max)':>24s} {'floor ms (sustained)':>20s} "
        f"{'floor/step':>10s} "
        f"{'GiB':>6s} {'parameters':>11s}",
    ]
    for row in rows:
        floor = f"{row['floor_ms']:.1f} ({row.get('floor_sustained_ms', row['floor_ms']):.1f})"
        spread = f"{row['step_ms']:.2f} ({row['step_ms_min']:.2f} - {row['step_ms_max']:.2f})"
        lines.append(
            f"{row['variant']:24s} {row['tokens_per_second']:9,.0f} {row['ratio']:6.3f}x {spread:>24s} "
            f"{floor:>20s} {row['floor_ms'] / row['step_ms']:10.0%} {row['peak_memory_gib']:6.1f} "
            f"{row['parameters'] / 1e6:10.1f}M"
        )
    lines += statistics_cost(rows)
    if any(row.get("profile_ms") for row in rows):
        lines.append("\nms of a step by kind of kernel; idle: nothing runs on the GPU")
        for row in rows:
            parts = "  ".join(f"{kind} {value:.1f}" for kind, value in row["profile_ms"].items())
            lines.append(f"{row['variant']:24s} {parts}")
    return "\n".join(lines + curves(result))


def statistics_cost(rows: list[dict[str, Any]]) -> list[str]:
    """What statistics add to the step of the same variant without, in lines; nothing if it was not run."""
    step_ms = {row["variant"]: row["step_ms"] for row in rows}
    lines = []
    for name, ms in step_ms.items():
        plain = name.removesuffix(" + statistics")
        if plain != name and plain in step_ms:
            share = ms / step_ms[plain] - 1
            lines.append(
                f"statistics of {plain}: {share:+.1%} of every step, {share / 10:+.2%} at one step of ten"
            )
    return lines


def curves(result: dict[str, Any]) -> list[str]:
    """What the loss curves say, in lines."""
    rows = [row for row in result["rows"] if row.get("losses")]
    if not rows:
        return []
    base = next((row for row in rows if row["variant"] == result.get("base")), rows[0])
    count = len(base["losses"])
    lines = [
        f"\nloss after {count} steps (mean of the last {min(LAST, count)}), nats per token; the tokens' entropy is "
        f"{result['token_entropy']:.3f}"
    ]
    for row in rows:
        end = curve_end(row["losses"])
        difference = end - curve_end(base["losses"])
        lines.append(f"{row['variant']:24s} {row['losses'][0]:7.3f} -> {end:.4f}  ({difference:+.4f})")
    worst = max(rows, key=lambda row: curve_end(row["losses"]))
    lines.append(
        f"every variant learns, {worst['variant']} least: {worst['losses'][0]:.3f} -> {curve_end(worst['losses']):.3f}"
        if all(curve_end(row["losses"]) < row["losses"][0] for row in rows)
        else "NOT every variant learns: a speed above is that of a model that does not"
    )
    return lines


def draw(result: dict[str, Any], out: Path) -> None:
    """The picture of a result: bars of tokens/s with their spread, and what else it holds. Raises UserError."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("drawing needs matplotlib, got none: pip install 'titan-fp8[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["rows"]
    panels = [_bars]
    if all(row.get("profile_ms") for row in rows):
        panels.append(_stacks)
    if any(row.get("losses") for row in rows):
        panels.append(_lines)
    style = {"font.size": 9, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
             "legend.frameon": False}  # fmt: skip
    with plt.rc_context(style):
        heights = [3.2 if panel is _lines else 0.7 + 0.3 * len(rows) for panel in panels]
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(9, sum(heights) + 0.4), height_ratios=heights, squeeze=False, layout="constrained"
        )  # fmt: skip
        for panel, axis in zip(panels, axes[:, 0], strict=True):
            panel(axis, result)
        figure.suptitle(
            f"{result['model']}, {result['layers']} layers, {result['batch']} x {result['seq_len']} tokens, {result['gpu']}",
            x=0.01, ha="left", fontweight="bold",
        )  # fmt: skip
        save(out, lambda path: figure.savefig(path, dpi=150, format="png"))
        plt.close(figure)


def _names(axis: Any, rows: list[dict[str, Any]]) -> range:
    places = range(len(rows))
    axis.set_yticks(places, [row["variant"] for row in rows])
    axis.invert_yaxis()
    return places


def _bars(axis: Any, result: dict[str, Any]) -> None:
    rows = result["rows"]
    tokens = result["batch"] * result["seq_len"] * 1e3
    speeds = [row["tokens_per_second"] for row in rows]
    spread = [
        [max(0.0, speed - tokens / row["step_ms_max"]) for speed, row in zip(speeds, rows, strict=True)],
        [max(0.0, tokens / row["step_ms_min"] - speed) for speed, row in zip(speeds, rows, strict=True)],
    ]
    places = _names(axis, rows)
    ours = [LINES[1] if not row["variant"].startswith("torch") else LINES[-1] for row in rows]
    axis.barh(places, speeds, xerr=spread, color=ours, error_kw={"elinewidth": 0.8, "capsize": 2})
    for place, row in zip(places, rows, strict=True):
        axis.text(0.01 * max(speeds), place, f"{row['ratio']:.2f}x", va="center", color="white", fontsize=8)
    axis.set_title("Tokens per second (median of rounds; min and max)")


def _stacks(axis: Any, result: dict[str, Any]) -> None:
    rows = result["rows"]
    places = _names(axis, rows)
    left = [0.0] * len(rows)
    present = dict.fromkeys(kind for row in rows for kind in row["profile_ms"])
    for kind in sorted(present, key=lambda kind: list(KINDS).index(kind) if kind in KINDS else len(KINDS)):
        widths = [row["profile_ms"].get(kind, 0.0) for row in rows]
        axis.barh(places, widths, left=left, color=KINDS.get(kind, "#BBBBBB"), label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_title("Milliseconds of a step by kind of kernel")
    axis.legend(ncols=5, loc="upper left", bbox_to_anchor=(0, -0.12), fontsize=8)


def _lines(axis: Any, result: dict[str, Any]) -> None:
    rows = [row for row in result["rows"] if row.get("losses")]
    for i, row in enumerate(rows):
        axis.plot(
            row["losses"], color=LINES[i % len(LINES)], linestyle="--" if i >= len(LINES) else "-", linewidth=1.0,
            label=row["variant"],
        )  # fmt: skip
    axis.axhline(result["token_entropy"], color="#666666", linewidth=0.8, linestyle=":")
    axis.set(title="Loss, nats per token (dotted: the tokens' entropy)", xlabel="Step")
    axis.legend(ncols=2, fontsize=8)
