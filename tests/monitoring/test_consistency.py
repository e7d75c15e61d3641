"""The files of tools/monitoring fit each other and the exporter's table."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import yaml
from servers import MONITORING, alerts, program, rules

from titan_fp8 import config
from titan_fp8.stability.exporter import TABLE

EXPORTED = {row.name for row in TABLE}
RECORDED = {rule["record"] for rule in rules() if "record" in rule}
DASHBOARD = json.loads((MONITORING / "grafana/dashboard.json").read_text())
NAME = re.compile(r"\b[a-z_]*:?titan_fp8_[a-z0-9_]+(?::[a-z0-9_]+)?")


def dashboard_expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_and_the_list_of_metrics_are_what_the_code_makes():
    pytest.importorskip(
        "grafana_foundation_sdk", reason="needs grafana-foundation-sdk (pip install 'titan-fp8[dev]')"
    )
    import build

    made = build.files()
    assert {path.name for path in made} == {"dashboard.json", "METRICS.md"}
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, (
            f"run python tools/monitoring/build.py: {path.name} is not up to date"
        )


@pytest.mark.parametrize("expr", dashboard_expressions())
def test_every_metric_of_a_panel_is_exported_or_recorded(expr):
    names = set(NAME.findall(expr))
    assert names and names <= EXPORTED | RECORDED


def templates(rule: dict) -> str:
    return " ".join(rule.get("annotations", {}).values())


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_metric_of_a_rule_is_exported_or_recorded(rule):
    names = set(NAME.findall(rule["expr"])) | set(NAME.findall(templates(rule)))
    assert names <= EXPORTED | RECORDED
    assert names or rule["alert"] == "TitanFp8ExporterDown"


def test_all_that_is_exported_per_layer_is_used():
    """Series that cost 32 or more each must have a panel or an alert."""
    used = " ".join([*dashboard_expressions(), *(rule["expr"] + templates(rule) for rule in rules())])
    assert [row.name for row in TABLE if "layer" in row.labels and row.name not in used] == []


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_what_and_where_to_read_on(rule):
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert re.fullmatch(r"\d+[smh]", rule["for"])
    assert {"summary", "description", "runbook_url"} == rule["annotations"].keys()
    file, anchor = rule["annotations"]["runbook_url"].split("#")
    headings = re.findall(r"^## (.+)$", (MONITORING / file).read_text(), re.M)
    assert anchor == rule["alert"].lower() and rule["alert"] in headings


def test_the_runbook_has_no_alert_that_is_gone():
    headings = re.findall(r"^## (.+)$", (MONITORING / "RUNBOOK.md").read_text(), re.M)
    assert sorted(headings) == sorted(rule["alert"] for rule in alerts())


def test_the_runbook_names_keys_that_exist():
    keys = set()
    for section in dataclasses.fields(config.JobConfig):
        for field in dataclasses.fields(section.default_factory):
            keys.add(f"{section.name}.{field.name}")
            if dataclasses.is_dataclass(field.type):
                keys |= {
                    f"{section.name}.{field.name}.{inner.name}" for inner in dataclasses.fields(field.type)
                }
    sections = {key.split(".")[0] for key in keys} - {"optimizer", "data"}
    named = re.findall(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)+)", (MONITORING / "RUNBOOK.md").read_text())
    ours = [name for name in named if name.split(".")[0] in sections]
    assert len(ours) > 5 and [name for name in ours if name not in keys] == []


def test_the_dashboard_takes_any_data_source():
    def sources(node):
        if isinstance(node, dict):
            if isinstance(node.get("datasource"), dict):
                yield node["datasource"]["uid"]
            for value in node.values():
                yield from sources(value)
        elif isinstance(node, list):
            for value in node:
                yield from sources(value)

    assert set(sources(DASHBOARD)) == {"${datasource}"}
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (
        variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    )


def test_alertmanagers_example_is_right():
    done = subprocess.run(
        [program("amtool"), "check-config", str(MONITORING / "alertmanager.yml")], capture_output=True
    )
    assert done.returncode == 0, done.stderr
    names = {rule["alert"] for rule in alerts()}
    for rule in yaml.safe_load((MONITORING / "alertmanager.yml").read_text())["inhibit_rules"]:
        for matcher in rule["source_matchers"] + rule["target_matchers"]:
            pattern = re.split(r"=~?", matcher, maxsplit=1)[1].strip().strip('"')
            assert any(re.fullmatch(pattern, name) for name in names), matcher


def test_compose_mounts_files_that_exist_and_listens_here_only():
    services = yaml.safe_load((MONITORING / "compose.yaml").read_text())["services"]
    for service in services.values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert not source.startswith(".") or (MONITORING / source).exists(), mount
        assert "127.0.0.1" in json.dumps(service)
    provisioned = yaml.safe_load(
        (MONITORING / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )
    assert (
        "127.0.0.1:9090" in provisioned["datasources"][0]["url"]
        and "--web.listen-address=127.0.0.1:9090" in (services["prometheus"]["command"])
    )


def test_build_says_what_it_wrote(tmp_path):
    """As a person runs it, on a copy."""
    pytest.importorskip(
        "grafana_foundation_sdk", reason="needs grafana-foundation-sdk (pip install 'titan-fp8[dev]')"
    )
    import shutil

    copy = tmp_path / "tools/monitoring"
    shutil.copytree(MONITORING, copy)
    (copy / "METRICS.md").unlink()
    done = subprocess.run(
        [sys.executable, str(copy / "build.py")], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("Wrote ") == 2
    assert (copy / "METRICS.md").read_bytes() == (MONITORING / "METRICS.md").read_bytes()
