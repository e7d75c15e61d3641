"""Stop a run between two steps when it is asked to: by SIGTERM, or by a file.

    SIGTERM to a process of the run            what schedulers send before they kill; torchrun passes it on, kills after 30 s
    a file at TITAN_FP8_STOP_FILE that appears run_train.sh makes it on SIGTERM; torchrun need not know

One process that was asked is enough: a MAX over all processes, one number a step, makes the same step the last one on all of
them. On a GPU the number of one step is read after the next, when it has long been there, so that the host never waits for
the device; the run then ends one step later than it could.

The run answers in the same file, with a line that says where it stopped. By it run_train.sh knows on every machine that the
run was interrupted and not finished. The processes themselves exit with status 0: torchrun would start them again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

STOP_FILE = "TITAN_FP8_STOP_FILE"
_PR_SET_PDEATHSIG = 1  # Linux, <sys/prctl.h>


def die_with_launcher(launcher: int) -> None:
    """Let the kernel kill this process when its parent, torchrun, dies, even by SIGKILL; exit if it is dead already.

    `launcher`: the parent's process id, asked for as early as can be. It may be 1, in a container. Does nothing without
    torchrun or off Linux. torchrun starts workers in sessions of their own: they would train on, unseen, in the folder of
    whoever starts next.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before we asked
        sys.exit(1)


class StopRequest:
    """Whether this run has been asked to stop. Make it in the main thread; `close` gives SIGTERM back."""

    def __init__(self, device: torch.device):
        self._device = device
        # One process of a machine looks and answers: the file may lie on a disk that thousands share.
        self._path = os.environ.get(STOP_FILE, "") if os.environ.get("LOCAL_RANK", "0") == "0" else ""
        self._signalled = False
        self._posted: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self._before = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signalled = True

    def due(self) -> bool:
        """Whether to stop now: the same on every rank. Collective; call it once between two steps."""
        asked = self._signalled or bool(self._path and os.path.exists(self._path))
        if dist.get_world_size() == 1:
            return asked
        anywhere = torch.full((), asked, dtype=torch.int32, device=self._device)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        if anywhere.device.type == "cpu":
            return bool(anywhere)
        host = torch.empty((), dtype=torch.int32, pin_memory=True)
        host.copy_(anywhere, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        earlier, self._posted = self._posted, (host, event)
        if earlier is None:
            return False
        earlier[1].synchronize()
        return bool(earlier[0])

    def answer(self, step: int, saved: bool) -> str:
        """The line that says where the run stopped; run_train.sh gets it too."""
        what = "with a checkpoint of it" if saved else "nothing new was saved"
        line = f"stopped as asked after step {step}, {what}; start again with the same command to go on"
        if self._path:
            whole = Path(f"{self._path}.{dist.get_rank()}")
            whole.write_text(f"{line}\n")
            whole.replace(self._path)  # all machines may write it: never half a line, never none
        return line

    def close(self) -> None:
        """Put back what SIGTERM did before. May be called twice."""
        if signal.getsignal(signal.SIGTERM) == self._on_signal:
            signal.signal(signal.SIGTERM, self._before)
