"""Files and folders that are whole or not there: written under another name, flushed to the disk, then renamed. No torch."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """`sync` for everything below `folder`."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def save(path: Path, write: Callable[[Path], Any]) -> None:
    """Make or replace the file `path`: `write` is called with another name beside it. Raises what it raises, and OSError."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    sync(partial)
    partial.rename(path)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder to fill, which is `out` afterwards; after an error nothing is left of it.

    Others may read what is in it, as the umask says: temporary folders and safetensors' files are their owner's alone.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield partial
        os.umask(mask := os.umask(0))
        partial.chmod(0o777 & ~mask)
        for file in partial.iterdir():
            file.chmod(0o666 & ~mask)
        sync_files(partial)
        partial.rename(out)
        sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
