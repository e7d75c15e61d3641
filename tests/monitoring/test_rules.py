"""Rules by promtool: each alert on series made for it, and all of them on runs that were recorded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from recordings import bad_row, recording
from servers import MONITORING, alerts, rules

from titan_fp8.stability.exporter import Exporter

STEP = 15  # seconds between two samples
RUN = '{instance="here", job="titan_fp8"}'


def test_rules_are_right(promtool):
    assert f"SUCCESS: {len(rules())} rules found" in promtool("check", "rules", MONITORING / "rules.yml")


def test_each_alert_fires_when_it_must_and_not_before(promtool):
    """alerts_test.yml: times, labels and texts, alert by alert; absent series raise nothing."""
    path = Path(__file__).parent / "alerts_test.yml"
    tested = {
        test["alertname"]
        for group in yaml.safe_load(path.read_text())["tests"]
        for test in group["alert_rule_test"]
    }
    assert tested == {rule["alert"] for rule in alerts()}
    promtool("test", "rules", path)


def sampled(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Series as promtool's unit tests write them -> a value per row, of the metrics that rules name."""
    exporter = Exporter()
    wanted = set(re.findall(r"\btitan_fp8_[a-z0-9_]+", " ".join(rule["expr"] for rule in rules())))
    found: dict[str, list[str]] = {f"up{RUN}": ["1"] * len(rows)}
    for index, row in enumerate(rows):
        exporter.update(row)
        for family in exporter.collect():
            for sample in family.samples:
                if sample.name not in wanted:
                    continue
                labels = {"instance": "here", "job": "titan_fp8", **sample.labels}
                inside = ", ".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
                value = (
                    index * STEP if sample.name == "titan_fp8_last_step_timestamp_seconds" else sample.value
                )
                found.setdefault(f"{sample.name}{{{inside}}}", ["_"] * len(rows))[index] = (
                    f"{value:g}".replace("inf", "Inf")
                )
    return found


def alerted(promtool, folder: Path, rows: list[dict[str, Any]], expected: dict[str, bool]) -> None:
    """Hold, by promtool, which alerts have ever fired by the last of the rows."""
    end = f"{(len(rows) - 1) * STEP}s"
    checks = []
    for name, fired in expected.items():
        expr = f'clamp_max(count(max_over_time(ALERTS{{alertname="{name}", alertstate="firing"}}[1d])), 1)'
        checks.append(
            {"expr": expr, "eval_time": end, "exp_samples": [{"labels": "{}", "value": 1}] if fired else []}
        )
    test = {
        "interval": f"{STEP}s",
        "input_series": [
            {"series": name, "values": " ".join(values)} for name, values in sampled(rows).items()
        ],
        "promql_expr_test": checks,
    }
    document = {
        "rule_files": [str(MONITORING / "rules.yml")],
        "evaluation_interval": f"{STEP}s",
        "tests": [test],
    }
    path = folder / "recorded_test.yml"
    path.write_text(yaml.safe_dump(document, width=10**6))
    promtool("test", "rules", path)


def test_a_healthy_run_is_left_in_peace(promtool, tmp_path):
    """From its first step on: no alert at all, and warm-up is in it."""
    alerted(promtool, tmp_path, recording("healthy"), {rule["alert"]: False for rule in alerts()})


def test_a_run_that_diverges_is_foretold(promtool, tmp_path):
    rows = recording("diverging")
    told = {"TitanFp8DivergencePredicted": True, "TitanFp8RiskElevated": True, "TitanFp8LossSpike": False}
    alerted(
        promtool, tmp_path, rows[: bad_row(rows)], told
    )  # the last row is the one before the loss left its baseline
    alerted(
        promtool,
        tmp_path,
        rows,
        {"TitanFp8LossSpike": True, "TitanFp8RunStalled": False, "TitanFp8NonFinite": False},
    )
