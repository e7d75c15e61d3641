"""A run asked to stop, by SIGTERM or a file, and saved whole outside the interval; on two machines: tools/test_launch.py."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from test_checkpoint import Run, same  # pyrefly: ignore

from titan_fp8 import interrupt
from titan_fp8.checkpoint_folder import complete_steps
from titan_fp8.interrupt import STOP_FILE, StopRequest

pytestmark = pytest.mark.usefixtures("gloo")


@pytest.fixture
def make(monkeypatch):
    made = []

    def build(path: str = "", local_rank: str = "0") -> StopRequest:
        monkeypatch.setenv(STOP_FILE, path)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        made.append(StopRequest(torch.device("cpu")))
        return made[-1]

    yield build
    for request in made:
        request.close()


def test_sigterm_asks_and_close_gives_it_back(make):
    before = signal.getsignal(signal.SIGTERM)
    request = make()
    assert not request.due()
    os.kill(os.getpid(), signal.SIGTERM)
    assert request.due() and request.due()
    request.close()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not make().due(), "a new run starts unasked"


def test_a_file_asks_and_takes_the_answer(make, tmp_path):
    path = tmp_path / "stop"
    request = make(str(path))
    assert not request.due()
    path.touch()
    assert request.due()
    line = request.answer(7, saved=True)
    assert path.read_text() == line + "\n" and "step 7, with a checkpoint" in line
    assert os.listdir(tmp_path) == ["stop"]
    other = make(str(path), local_rank="3")
    assert not other.due(), "one process of a machine looks"
    path.unlink()
    assert "nothing new was saved" in other.answer(7, saved=False)
    assert not path.exists(), "and answers"


def test_a_process_lives_while_its_launcher_does(monkeypatch):
    """Which is process 1 where torchrun is a container's only program."""
    asked = []
    monkeypatch.setattr(
        interrupt.ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *args: asked.append(args))
    )
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    interrupt.die_with_launcher(4711)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    assert not asked
    interrupt.die_with_launcher(1)
    with pytest.raises(SystemExit):
        interrupt.die_with_launcher(4711)
    assert asked == [(1, signal.SIGKILL)] * 2


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_save_now(tmp_path, mode):
    """Between two checkpoints: whole, complete on return, once."""
    run = Run(tmp_path, interval=3, async_mode=mode).train(4)
    assert run.manager.save_now(4)
    place = tmp_path / "checkpoint"
    assert complete_steps(place) == [3, 4]
    written = (place / "step-4" / ".metadata").stat().st_mtime_ns
    assert run.manager.save_now(4) and (place / "step-4" / ".metadata").stat().st_mtime_ns == written
    other = Run(tmp_path, load_only=True)
    assert other.manager.load() and other.counter.step == 4 and same(run.state(), other.state())
    assert not other.manager.save_now(5)
    run.train(1)  # nothing is forced any more
    run.manager.close()
    assert complete_steps(place) == [3, 4]
