"""A recorded run that diverges is trained again in haste: real exporter, Prometheus, Alertmanager, and a webhook.

Twelve rows a second instead of one in 20 s; what the rules wait for and look back is divided by the same (servers.HASTE).
Prometheus asks five times a second.
"""

from __future__ import annotations

import json
import re
import time
import urllib.request
from dataclasses import dataclass

import pytest
from recordings import bad_row, recording
from servers import MONITORING, Monitoring, alerts, rules, wait_for

from titan_fp8.stability.exporter import TABLE, Exporter

ROWS_PER_SECOND = 12
DASHBOARD = json.loads((MONITORING / "grafana/dashboard.json").read_text())
PANELS = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
}


@dataclass
class Life:
    """What happened, in seconds of the clock."""

    monitoring: Monitoring
    start: float
    bad: float  # when the row at which the loss left its baseline was exported
    end: float  # when the exporter was closed
    scrape: str  # the text of the last scrape


@pytest.fixture(scope="module")
def life(monitoring) -> Life:
    import replay

    rows = recording("diverging")
    off = bad_row(rows)
    # What this machine's run had not: a policy, a loss scale, a peak that is known.
    rows.insert(
        off + 40, {"kind": "action", "step": 0, "action": "roll_back", "cause": "loss_spike", "why": "a test"}
    )
    rows = [row | {"loss_scale": 1024.0, "mfu": 0.4} if row["kind"] == "train" else row for row in rows]
    exporter = Exporter({"host": "127.0.0.1", "port": 0})
    exporter.start()
    target = f"127.0.0.1:{exporter.endpoint.port}"
    found = monitoring(target)
    try:
        wait_for(lambda: found.query("up == 1"), 10, "a scrape")
        start, bad = time.time(), None
        for index, _ in enumerate(replay.replay(rows, exporter, ROWS_PER_SECOND)):
            if index == off:
                bad = time.time()
        time.sleep(0.5)
        with urllib.request.urlopen(exporter.endpoint.url) as answer:
            scrape = answer.read().decode()
    finally:
        exporter.close()
    end = time.time()
    wait_for(lambda: found.webhook.first("TitanFp8ExporterDown"), 15, "the alert of a run that is gone")
    return Life(found, start, bad, end, scrape)


def test_the_alert_is_delivered_before_the_loss_leaves_its_baseline(life, capsys):
    at, alert = life.monitoring.webhook.first("TitanFp8DivergencePredicted")
    spike = life.monitoring.webhook.first("TitanFp8LossSpike")
    assert spike is not None
    lead = (life.bad - at) * ROWS_PER_SECOND
    told, off, late = ((when - life.start) * ROWS_PER_SECOND for when in (at, life.bad, spike[0]))
    with capsys.disabled():
        print(
            f"\n  alert of a prediction at row {told:.0f}; loss off its baseline at {off:.0f}; alert of that at {late:.0f}"
        )
    assert lead > 10 and at < spike[0]
    assert alert["labels"]["severity"] == "critical" and alert["labels"]["job"] == "titan_fp8"
    assert re.search(r"divergence predicted, risk 9\d", alert["annotations"]["summary"])
    assert re.search(r"most evidence is \w+ of [\w.]+ in layer \d\.", alert["annotations"]["description"])


def test_other_alerts_of_this_run_come_too(life):
    received = {alert["labels"]["alertname"] for _, alert in life.monitoring.webhook.received}
    assert received >= {"TitanFp8LossSpike", "TitanFp8ActionTaken", "TitanFp8ExporterDown"}
    assert not received & {"TitanFp8NonFinite", "TitanFp8RunStalled"}


@pytest.mark.parametrize("name", PANELS)
def test_every_panel_has_data(life, name):
    expr = PANELS[name].replace("$instance", ".*").replace("$__rate_interval", "5s")
    series = life.monitoring.query_range(expr, life.start, life.end)
    values = [float(value) for one in series for _, value in one["values"]]
    assert len(values) > 3 and any(value == value for value in values)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_rule_has_data(life, rule):
    """A record is there. An alert's expression, asked for true or false instead of for what is true, answers."""
    (rule,) = [
        one
        for one in life.monitoring.rules
        if (one.get("alert"), one.get("record")) == (rule.get("alert"), rule.get("record"))
    ]
    expr = rule.get("record") or re.sub(r" (>|<|==|!=) ", r" \1 bool ", rule["expr"])
    assert life.monitoring.query_range(expr, life.start, life.end)


def test_no_rule_fails_or_warns(life):
    answer = json.loads(life.monitoring._get("/api/v1/rules"))
    found = [rule for group in answer["data"]["groups"] for rule in group["rules"]]
    assert len(found) == len(rules())
    assert [(rule["name"], rule.get("lastError")) for rule in found if rule["health"] != "ok"] == []


def test_the_scrape_is_right_by_promtool(life, promtool):
    """`promtool check metrics` fails on what does not parse and complains of names against the convention."""
    said = promtool("check", "metrics", stdin=life.scrape)
    assert said.strip() == ""


def test_the_scrape_has_every_metric(life):
    names = set(re.findall(r"^([a-z0-9_]+)[{ ]", life.scrape, re.M))
    assert {row.name for row in TABLE} - names == {"titan_fp8_dropped_samples_total"}  # nothing was


def test_every_alert_is_known_to_prometheus(life):
    answer = json.loads(life.monitoring._get("/api/v1/rules", type="alert"))
    known = {rule["name"] for group in answer["data"]["groups"] for rule in group["rules"]}
    assert known == {rule["alert"] for rule in alerts()}
