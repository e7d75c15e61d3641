"""Real Prometheus and Alertmanager programs for the tests, or a plain word that they are missing."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

MONITORING = Path(__file__).parents[2] / "tools" / "monitoring"
RECORDINGS = Path(__file__).parent / "recordings"
sys.path.insert(0, str(MONITORING))  # replay, build

HASTE = 240  # tests run rules, and time in them, so many times faster


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name} (apt-get install prometheus prometheus-alertmanager)")
    return found


def rules() -> list[dict[str, Any]]:
    return [
        rule
        for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
        for rule in group["rules"]
    ]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds: float, what: str):
    """The first true value of condition(); errors of a server that is not up yet count as false."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except OSError:
            pass
        time.sleep(0.05)
    pytest.fail(f"{what} did not happen within {seconds:g} s")


class Webhook:
    """Receives what Alertmanager delivers: (time, alert) of each alert of each notification."""

    def __init__(self):
        self.received: list[tuple[float, dict[str, Any]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.received += [(time.time(), alert) for alert in body["alerts"]]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def first(self, name: str) -> tuple[float, dict[str, Any]] | None:
        """When the first firing alert of that name came, and the alert."""
        for at, alert in self.received:
            if alert["labels"]["alertname"] == name and alert["status"] == "firing":
                return at, alert
        return None

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def hasten(text: str) -> str:
    """rules.yml with every `for`, and all that expressions look back, divided by HASTE."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}

    def shorter(match: re.Match) -> str:
        return f"{match[1]}{int(match[2]) * units[match[3]] * 1000 // HASTE}ms"

    document = yaml.safe_load(text)
    for group in document["groups"]:
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"(\[|offset )(\d+)([smhd])\b", shorter, rule["expr"])
            if "for" in rule:
                rule["for"] = re.sub(r"()(\d+)([smhd])", shorter, rule["for"])
    return yaml.safe_dump(document, sort_keys=False)


class Monitoring:
    """Prometheus with our rules, scraping one target five times a second, Alertmanager with our routes, and a webhook."""

    def __init__(self, folder: Path, target: str):
        self.folder, self.webhook = folder, Webhook()
        self.port, alertmanager = free_port(), free_port()
        manager = yaml.safe_load((MONITORING / "alertmanager.yml").read_text())
        for route in (manager["route"], *manager["route"]["routes"]):
            route |= {"group_wait": "0s", "group_interval": "1s"}
        manager["receivers"] = [
            {
                "name": "team",
                "webhook_configs": [{"url": f"http://127.0.0.1:{self.webhook.server.server_port}/"}],
            }
        ]
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {
            "scrape_interval": "200ms",
            "scrape_timeout": "200ms",
            "evaluation_interval": "200ms",
        }
        config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{alertmanager}"]
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(manager))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        hasty = hasten((MONITORING / "rules.yml").read_text())
        self.rules = [rule for group in yaml.safe_load(hasty)["groups"] for rule in group["rules"]]
        (folder / "rules.yml").write_text(hasty)
        commands = {
            "alertmanager": [
                program("prometheus-alertmanager"), f"--config.file={folder}/alertmanager.yml",
                f"--storage.path={folder}/alertmanager", f"--web.listen-address=127.0.0.1:{alertmanager}",
                "--cluster.listen-address=",
            ],
            "prometheus": [
                program("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{self.port}", "--query.lookback-delta=1h",
            ],
        }  # fmt: skip
        self.processes = []
        for name, command in commands.items():
            with open(folder / f"{name}.log", "wb") as log:
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=folder))
        wait_for(lambda: self._get("/-/ready"), 20, "Prometheus' start")

    def _get(self, path: str, **arguments: Any) -> bytes:
        url = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(arguments)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read()

    def query(self, expr: str, at: float | None = None) -> list[dict[str, Any]]:
        """The result of an instant query."""
        arguments = {"query": expr} | ({} if at is None else {"time": at})
        return json.loads(self._get("/api/v1/query", **arguments))["data"]["result"]

    def query_range(self, expr: str, start: float, end: float) -> list[dict[str, Any]]:
        """Series with their values at every second."""
        answer = json.loads(self._get("/api/v1/query_range", query=expr, start=start, end=end, step=1))
        return answer["data"]["result"]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(timeout=10)
        self.webhook.close()
