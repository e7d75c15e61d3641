"""A run's checkpoint folder: the names in it, what they promise, and repair after a killed run.

    step-<n>        complete: written, synced to disk, and only then given this name
    partial-<n>     being written; found at start, it is what a killed run left, and is removed
    replaced-<n>    the former step-<n>, set aside while a new one takes its name; put back if it never did
    stale-<n>       no longer kept, being deleted
    abandoned-<k>   what was later than a checkpoint.load_step, its names kept; nothing here reads or deletes it
    .taken-up       the checkpoint.load_step of the start that trains, or trained last, is behind it

No torch and no torchtitan here: tools that only look for checkpoints start at once.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import re
import shutil
from pathlib import Path

from titan_fp8.errors import UserError

logger = logging.getLogger()  # torchtitan's: the root logger

STEP, PARTIAL, REPLACED, STALE, ABANDONED = "step-", "partial-", "replaced-", "stale-", "abandoned-"
"""Prefixes. Only complete checkpoints may contain "step-<n>": torchtitan and other readers search for it."""

LOCK = ".running"
"""File in a run's dump folder, locked by its first process."""

TAKEN_UP = ".taken-up"
"""File in a checkpoint folder, see above."""

TORCH_TABLE, HF_TABLE = ".metadata", "model.safetensors.index.json"
"""The file that is written last: table of contents of torch's format, or of a Hugging Face export."""


def claim(folder: Path) -> int:
    """Make `folder` this run's while this process lives. Returns an open file, whose lock ends with the process.

    Raises UserError if a run that is alive has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(file, 200).decode(errors="replace").strip()
        os.close(file)
        raise UserError(
            f"job.dump_folder must belong to one run at a time, but {folder} is being written by {owner or 'another'}: stop "
            "that one, or choose another --job.dump_folder"
        ) from None
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
    return file


def complete_steps(folder: str | os.PathLike[str]) -> list[int]:
    """Steps with a complete checkpoint in `folder`, ascending; empty if there is no such folder."""
    steps = []
    if os.path.isdir(folder):
        for entry in os.scandir(folder):
            name = re.fullmatch(r"step-(\d+)", entry.name)
            if name and any(os.path.isfile(os.path.join(entry.path, t)) for t in (TORCH_TABLE, HF_TABLE)):
                steps.append(int(name[1]))
    return sorted(steps)


def take_up(folder: Path, step: int) -> None:
    """Set aside the complete checkpoints later than `step`, from which the run goes on, and note that it does."""
    if later := [other for other in complete_steps(folder) if other > step]:
        k = 1
        while (aside := folder / f"{ABANDONED}{k}").exists():
            k += 1
        aside.mkdir()
        for other in reversed(later):  # killed in between, the next start does the rest
            (folder / f"{STEP}{other}").rename(aside / f"{STEP}{other}")
        logger.warning(
            "Going on from step-%d as checkpoint.load_step says; later checkpoints (%s) are in %s now. Leave load_step out "
            "of the next start, or what is trained from here goes the same way.",
            step, listed(later), aside,
        )  # fmt: skip
    (folder / TAKEN_UP).touch()


def tidy(folder: Path, restarted: bool = False) -> None:
    """Remove or put back what a killed run left in `folder`; remove the folder if that leaves it empty.

    An empty folder would make torchtitan ignore checkpoint.initial_load_path. `restarted`: by torchrun, hence with the same
    checkpoint.load_step.
    """
    if not folder.is_dir():
        return
    if not restarted:
        (folder / TAKEN_UP).unlink(missing_ok=True)
    for entry in sorted(folder.iterdir()):
        found = re.fullmatch(f"({PARTIAL}|{REPLACED}|{STALE})(\\d+)", entry.name)
        if found is None:
            continue
        kind, final = found[1], folder / f"step-{found[2]}"
        if kind == REPLACED and not final.exists():
            logger.warning("Put back %s: an earlier run was stopped while replacing it.", final)
            entry.rename(final)
        else:
            logger.warning("Removed %s: an earlier run was stopped before it had finished with it.", entry)
            shutil.rmtree(entry)
    if not any(folder.iterdir()):
        folder.rmdir()


def make_empty(folder: Path) -> None:
    """Create `folder`, without anything an earlier attempt left in it."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def free_space(folder: Path) -> str:
    """Room on the disk under `folder`, in words for a message; empty if that cannot be told."""
    try:
        return f" ({shutil.disk_usage(folder).free / 2**30:.2f} GiB free)"
    except OSError:
        return ""


def listed(steps: list[int]) -> str:
    """The newest steps, for a message."""
    shown = ", ".join(str(step) for step in steps[-10:])
    return ("..., " if len(steps) > 10 else "") + (shown or "none")
