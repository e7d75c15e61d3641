"""What every test needs: torchtitan on CPU, a one-process group, and GPU tests that skip with a reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Tests are small: threads that wait for each other cost more than they save. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed as dist

from titan_fp8 import device

device.install()
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config: pytest.Config) -> None:
    """Capture from INFO up: torch.distributed writes pages of DEBUG into every failure's report."""
    if config.option.log_level is None:
        config.option.log_level = "INFO"


# Minutes each: begun first, none of them is left over for one worker alone at the end.
LONG = ("test_run.py", "test_layouts.py", "test_respond.py", "test_launch.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; skip tests marked `gpu` where there is no CUDA GPU, and say so."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU: torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one rank on gloo, for the whole session, with the variables torchrun would set."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            patch.setenv(name, value)
        store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 short documents that a model of two layers learns in a few dozen steps."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        words = " ".join(f"the {(i * 7 + j) % 23} quick brown foxes number {j % 11} jump" for j in range(150))
        (folder / f"{i:02}.txt").write_text(words)
    return folder
