"""Build what is checked in here but made by code: Grafana's dashboard and the list of metrics.

    python tools/monitoring/build.py

Writes grafana/dashboard.json and METRICS.md next to this file. tests/monitoring holds that they are what this program
makes, and that every expression returns data.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from titan_fp8.stability.exporter import TABLE

FOLDER = Path(__file__).resolve().parent
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
RUN = '{instance=~"$instance"}'
GREEN, YELLOW, RED = "green", "#EAB839", "red"
WIDTH = 24  # of Grafana's grid


def _query(expr: str, legend: str = "__auto", ref: str = "A") -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(ref).datasource(SOURCE)


def _thresholds(*steps: tuple[float | None, str]) -> dashboard.ThresholdsConfig:
    levels = [models.Threshold(value=value, color=color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(levels)


def _stat(title: str, expr: str, about: str, unit: str = "short", span: int = 4) -> stat.Panel:
    values = common.ReduceDataOptions().calcs(["lastNotNull"])
    panel = stat.Panel().title(title).description(about).unit(unit).datasource(SOURCE).reduce_options(values)
    return panel.span(span).height(4).with_target(_query(expr, "{{instance}}"))


def _lines(
    title: str, about: str, *queries: tuple[str, str], unit: str = "short", span: int = 12
) -> timeseries.Panel:
    """Lines over time; a query is (expression, legend)."""
    panel = (
        timeseries.Panel().title(title).description(about).unit(unit).datasource(SOURCE).span(span).height(8)
    )
    panel = panel.line_width(1).show_points(common_models.VisibilityMode.NEVER)
    panel = panel.tooltip(
        common.VizTooltipOptions()
        .mode(common_models.TooltipDisplayMode.MULTI)
        .sort(common_models.SortOrder.DESCENDING)
    )
    for index, (expr, legend) in enumerate(queries):
        panel = panel.with_target(_query(expr, legend, chr(ord("A") + index)))
    return panel


def _log(panel: timeseries.Panel, base: int = 10) -> timeseries.Panel:
    scale = common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LOG).log(base)
    return panel.scale_distribution(scale)


def _heat(
    title: str, about: str, expr: str, legend: str, low: float | None = None, high: float | None = None,
    reverse: bool = False, span: int = 12,
) -> heatmap.Panel:  # fmt: skip
    """A row per layer, time to the right, the value as colour: dark is bad."""
    color = (
        heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("YlOrRd").steps(64)
    )
    color = (
        color.scale(heatmap_models.HeatmapColorScale.EXPONENTIAL)
        .exponent(1)
        .fill("dark-red")
        .reverse(reverse)
    )
    if low is not None:
        color = color.min(low)
    if high is not None:
        color = color.max(high)
    panel = heatmap.Panel().title(title).description(about).datasource(SOURCE).span(span).height(8)
    panel = (
        panel.calculate(False)
        .color(color)
        .cell_gap(0)
        .rows_frame(heatmap.RowsHeatmapOptions().value("value"))
    )
    # Grafana hides what is not above 1e-9 unless told otherwise, and logarithms and headroom are mostly below.
    panel = panel.filter_values(heatmap.FilterValueRange().le(-1e9))
    panel = panel.y_axis(heatmap.YAxisConfig().axis_label("layer").reverse(False).decimals(0))
    # A heat map paints what falls between two points; so many points that a pixel column is about one.
    return panel.max_data_points(200).with_target(_query(expr, legend))


def _by_layer(metric: str, how: str = "max") -> str:
    """`metric` by layer, in the order of numbers: Prometheus sorts labels as text, so "3" becomes "03"."""
    padded = f'label_replace({metric}{RUN}, "layer", "0$1", "layer", "([0-9])")'
    return f"{how} by (layer) ({padded})"


def overview() -> list[dashboard.cogbuilder.Builder]:
    risk = _stat(
        "Risk", f"max(titan_fp8_divergence_risk_ratio{RUN})", "Predicted risk of divergence.", "percentunit"
    )
    risk = risk.thresholds(_thresholds((None, GREEN), (0.5, YELLOW), (0.9, RED))).min(0).max(1)
    age = _stat(
        "Last step", f"max(instance:titan_fp8_last_step:age_seconds{RUN})", "Since the last logged step.", "s"
    )
    age = age.thresholds(_thresholds((None, GREEN), (300, YELLOW), (600, RED)))
    bad = _stat(
        "Non-finite steps", f"sum(titan_fp8_nonfinite_steps_total{RUN})", "Since the start of the run."
    )
    bad = bad.thresholds(_thresholds((None, GREEN), (1, RED)))
    plain = _thresholds((None, "text"))
    loss = _stat("Loss", f"max(titan_fp8_loss{RUN})", "Nats per token.").thresholds(plain).decimals(3)
    step = _stat("Step", f"max(titan_fp8_steps_total{RUN})", "Over all restarts.", "none").thresholds(plain)
    speed = _stat("Tokens/s", f"sum(titan_fp8_tokens_per_second{RUN})", "All ranks.").thresholds(plain)
    cause = statetimeline.Panel().title("Leading cause").datasource(SOURCE).span(24).height(6)
    cause = cause.description("The series with the most evidence of divergence, over time.").show_value(
        common_models.VisibilityMode.NEVER
    )
    cause = cause.with_target(
        _query(
            f"max by (layer, site, statistic) (titan_fp8_risk_cause_info{RUN})",
            "{{layer}} {{site}} {{statistic}}",
        )
    ).color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.FIXED).fixed_color("orange"))
    risks = _lines("Risk of divergence", "0.5 warns, 0.9 alerts.", (f"titan_fp8_divergence_risk_ratio{RUN}", "{{instance}}"),
                   unit="percentunit").min(0).max(1)  # fmt: skip
    risks = risks.thresholds(_thresholds((None, "transparent"), (0.5, YELLOW), (0.9, RED))).thresholds_style(
        common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.DASHED)
    )
    to = "titan_fp8_steps_to_saturation"
    saturation = _log(_lines(
        "Steps to saturation", "Of the series with the strongest trend: 10, 50 and 90 % quantiles. Absent: never.",
        *((f"{to}_p{percent}{RUN} < Inf", f"{percent} %") for percent in (10, 50, 90)),
    ))  # fmt: skip
    losses = _lines(
        "Loss", "Training and held-out loss, nats per token.",
        (f"titan_fp8_loss{RUN}", "training"), (f"titan_fp8_validation_loss{RUN}", "held-out"),
        (f"instance:titan_fp8_loss:median30m{RUN}", "median of 30 minutes"),
    )  # fmt: skip
    norms = _log(_lines("Gradient norm", "Before clipping.", (f"titan_fp8_grad_norm{RUN}", "{{instance}}")))
    return [risk, loss, step, speed, age, bad, losses, risks, cause, saturation, norms]


def stability() -> list[dashboard.cogbuilder.Builder]:
    kurtosis = _heat(
        "Kurtosis by layer (log2, worst site)", "log2 of mean(x^4) / mean(x^2)^2; 1.6 for a Gaussian.",
        f"log2({_by_layer('titan_fp8_activation_kurtosis')})", "{{layer}}", 1.5, 10,
    )  # fmt: skip
    sites = _log(_lines(
        "Kurtosis by site (worst layer)", "Largest of all layers.",
        (f"max by (site) (titan_fp8_activation_kurtosis{RUN})", "{{site}}"),
    ), 2)  # fmt: skip
    clamped = _heat(
        "Saturated share by layer (log10, worst tensor)", "Share of elements clamped by the cast; below 10^-7 as 10^-7.",
        f"log10(clamp_min({_by_layer('titan_fp8_fp8_saturated_ratio')}, 1e-7))", "{{layer}}", -7, -2,
    )  # fmt: skip
    underflow = _lines(
        "Underflowed share", "Nonzero elements rounded to 0 by the cast, worst tensor of a layer: largest and median layer.",
        (f"max(titan_fp8_fp8_underflowed_ratio{RUN})", "largest"),
        (f"quantile(0.5, titan_fp8_fp8_underflowed_ratio{RUN})", "median"), unit="percentunit",
    )  # fmt: skip
    headroom = _heat(
        "FP8 headroom by layer (bits, worst tensor)", "log2(largest FP8 number / (amax * scale)); below 0 the cast clamps.",
        _by_layer("titan_fp8_fp8_headroom_log2", "min"), "{{layer}}", -3, 3, reverse=True,
    )  # fmt: skip
    tensors = _lines(
        "FP8 headroom by tensor (worst layer)", "Below 0 the cast clamps. Delayed scaling does it now and then in health.",
        (f"min by (tensor) (titan_fp8_fp8_headroom_log2{RUN})", "{{tensor}}"),
    )  # fmt: skip
    alignment = _heat(
        "FFN alignment by layer", "99.9 % quantile of |cosine| of gate and up rows. Gated models only.",
        _by_layer("titan_fp8_ffn_alignment_q999"), "{{layer}}", 0, 1,
    )  # fmt: skip
    aligned = _lines(
        "FFN alignment", "Worst layer. From 0.85 on a channel is a square.",
        (f"max(titan_fp8_ffn_alignment_max{RUN})", "largest"),
        (f"max(titan_fp8_ffn_alignment_q999{RUN})", "99.9 % quantile"),
    ).min(0).max(1)  # fmt: skip
    logits = _lines(
        "Attention logits",
        "Largest, worst layers.",
        (f"topk(3, titan_fp8_attention_logit_max{RUN})", "layer {{layer}}"),
    )
    entropy = _lines(
        "Attention entropy (nats)", "Lowest layers. A collapse to 0 precedes logit growth.",
        (f"bottomk(3, titan_fp8_attention_entropy_nats{RUN})", "layer {{layer}}"),
    )  # fmt: skip
    summary = _lines(
        "FP8 tensors that clamped", "In the last logged step, without statistics too.",
        (f"titan_fp8_fp8_saturated_tensors{RUN}", "tensors"),
        (f"titan_fp8_fp8_max_saturation_ratio{RUN}", "largest saturation"),
    )  # fmt: skip
    actions = _lines(
        "Actions of the stability policy", "Totals, by action and cause.",
        (f"sum by (action, cause) (titan_fp8_actions_total{RUN})", "{{action}}: {{cause}}"),
        (f"titan_fp8_skipped_steps_total{RUN}", "skipped steps"),
    )  # fmt: skip
    return [
        kurtosis,
        sites,
        clamped,
        underflow,
        headroom,
        tensors,
        alignment,
        aligned,
        logits,
        entropy,
        summary,
        actions,
    ]


def throughput() -> list[dashboard.cogbuilder.Builder]:
    tokens = _lines(
        "Throughput (tokens/s, all ranks)", "While training, and over all time: validation and checkpoints included.",
        (f"titan_fp8_tokens_per_second{RUN}", "training"), (f"instance:titan_fp8_tokens:rate5m{RUN}", "all time"),
    )  # fmt: skip
    seconds = _lines(
        "Step time", "Mean wall time of a step, and its wait for data on the slowest rank.",
        (f"titan_fp8_step_seconds{RUN}", "step"), (f"titan_fp8_data_loading_seconds{RUN}", "data"), unit="s",
    )  # fmt: skip
    memory = _lines(
        "Memory of the fullest rank", "Peaks since the last logged step.",
        (f"titan_fp8_memory_reserved_peak_bytes{RUN}", "reserved"), (f"titan_fp8_memory_active_peak_bytes{RUN}", "active"),
        unit="bytes",
    )  # fmt: skip
    rate = _lines("Learning rate", "", (f"titan_fp8_learning_rate{RUN}", "{{instance}}"))
    return [tokens, seconds, memory, rate]


def build() -> dashboard.Dashboard:
    source = dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    instance = (
        dashboard.QueryVariable("instance").label("Run").datasource(SOURCE)
        .query("label_values(titan_fp8_build_info, instance)").refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC).multi(False).include_all(False)
    )  # fmt: skip
    page = (
        dashboard.Dashboard("titan_fp8")
        .uid("titan-fp8")
        .tags(["titan_fp8"])
        .refresh("30s")
        .time("now-6h", "now")
    )
    page = page.description(
        "A training run: progress, predicted divergence and what foretells it."
    ).editable()
    page = page.tooltip(models.DashboardCursorSync.CROSSHAIR).with_variable(source).with_variable(instance)
    for title, panels in (("Overview", overview()), ("Stability", stability()), ("Throughput", throughput())):
        page = page.with_row(dashboard.Row(title))
        for panel in panels:
            page = page.with_panel(panel)
    return page


def metrics() -> str:
    """METRICS.md."""
    lines = [
        "# Metrics",
        "",
        "What a run exports to Prometheus. Made by `build.py` from the table in `titan_fp8/stability/exporter.py`.",
        "A metric that a run does not have (statistics off, BF16, no gated FFN) is absent, never 0.",
        "",
        "| metric | type | labels | meaning |",
        "|---|---|---|---|",
    ]
    for row in TABLE:
        labels = ", ".join(f"`{label}`" for label in row.labels)
        lines.append(f"| `{row.name}` | {row.kind} | {labels} | {row.help.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def files() -> dict[Path, str]:
    """Path -> content of all that this program makes."""
    page = JSONEncoder(sort_keys=True, indent=2).encode(build().build())
    return {FOLDER / "grafana/dashboard.json": page + "\n", FOLDER / "METRICS.md": metrics()}


def main() -> None:
    for path, text in files().items():
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
        print(f"Wrote {path}")


if __name__ == "__main__":
    main()
