"""promtool, and Prometheus with Alertmanager, as fixtures."""

from __future__ import annotations

import subprocess

import pytest
import recordings  # noqa: F401 - puts tools/ and tools/monitoring/ on the path
from servers import Monitoring, program


@pytest.fixture(scope="session")
def promtool():
    """promtool(*arguments, stdin=None) -> what it said; fails the test where it fails."""
    path = program("promtool")

    def promtool(*arguments: str, stdin: str | None = None) -> str:
        done = subprocess.run(
            [path, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    return promtool


@pytest.fixture(scope="module")
def monitoring(tmp_path_factory):
    """monitoring(target) -> Monitoring; closed at the end of the module."""
    started = []

    def start(target: str) -> Monitoring:
        started.append(Monitoring(tmp_path_factory.mktemp("monitoring"), target))
        return started[-1]

    yield start
    for one in started:
        one.close()
