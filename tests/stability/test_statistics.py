"""FiniteWatch: where the first bad step began, in words, and how many came in a row."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_fp8.stability.statistics import FiniteWatch

NAN, INF = float("nan"), float("inf")


class Model(nn.Module):
    """Three blocks and a head; `poison` names the module whose output gets a NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): nn.Linear(4, 4) for i in range(3)})
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor, poison: str = "", value: float = NAN) -> Tensor:
        for name, block in self.layers.items():
            x = block(x + value if poison == name else x)
        return self.head(x + value if poison == "head" else x)


class Run:
    """A model under watch, and steps as the trainer reports them."""

    def __init__(self) -> None:
        self.model = Model()
        blocks = {f"layers.{name}": block for name, block in self.model.layers.items()}
        self.parameters = [name for name, _ in self.model.named_parameters()]
        self.watch = FiniteWatch(blocks, self.parameters, torch.device("cpu"))
        self.number = 0

    def step(self, poison: str = "", value: float = NAN, bad_gradients: tuple[str, ...] = ()) -> None:
        self.number += 1
        loss = self.model(torch.ones(2, 4), poison, value).sum()
        norms = torch.tensor([value if poison or name in bad_gradients else 1.0 for name in self.parameters])
        self.watch.record(self.number, ~norms.isfinite().all(), loss.detach(), norms)

    def counts(self) -> tuple[int, int, int, int]:
        """(first bad step, bad steps in a row now, longest row, total)."""
        watch = self.watch
        return int(watch.step), int(watch.in_a_row), int(watch.longest), int(watch.total)


@pytest.fixture
def run(gloo) -> Run:
    return Run()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("block", ["0", "1", "2"])
def test_names_the_block_where_it_begins(run, block, value):
    run.step()
    run.step(block, value)
    run.step("0")  # later ones do not matter
    assert run.watch.describe() == (
        f"step 2: the loss is not finite, first non-finite value in the output of layers.{block}"
    )


def test_names_the_head_when_all_blocks_are_finite(run):
    run.step("head")
    assert run.watch.describe() == (
        "step 1: the loss is not finite, all blocks' outputs are: the LM head or the loss overflowed"
    )


def test_names_the_last_bad_parameter_when_only_gradients_are_bad(run):
    run.step()
    run.step(bad_gradients=("layers.0.weight", "layers.1.weight", "layers.0.bias"))
    assert (
        run.watch.describe()
        == "step 2: the loss is finite but gradients are not, beginning at layers.1.weight"
    )


def test_a_finite_run_records_nothing(run):
    for _ in range(3):
        run.step()
    assert run.counts() == (0, 0, 0, 0)


def test_counts_steps_in_a_row(run):
    for poison in ("", "1", "1", "", "2", "2", "2", ""):
        run.step(poison)
    assert run.counts() == (2, 0, 3, 5)


def test_forgetting_starts_a_new_search_and_keeps_the_total(run):
    for poison in ("1", "1", "", "2"):
        run.step(poison)
    assert run.counts() == (1, 1, 2, 3)
    run.watch.forget()
    assert run.counts() == (0, 1, 1, 3)  # the row that goes on still counts
    run.step("0")
    assert run.counts() == (5, 2, 2, 4)
    assert run.watch.describe().endswith("the output of layers.0")
    run.step()
    run.watch.forget()
    assert run.counts() == (0, 0, 0, 4)
    run.step(bad_gradients=("head.bias",))
    assert run.watch.describe().startswith(
        "step 7: the loss is finite but gradients are not, beginning at head.bias"
    )


def test_micro_batches_add_up_and_good_steps_wipe_the_slate(run):
    run.model(torch.ones(2, 4), "1")  # first micro-batch of the step
    run.step()  # the second is finite; gradients too, so nothing is recorded
    assert run.counts() == (0, 0, 0, 0)
    run.step("head")
    assert "all blocks' outputs are" in run.watch.describe()
    run.watch.forget()
    run.model(torch.ones(2, 4), "2")
    run.step(bad_gradients=("head.bias",))
    assert run.watch.describe().endswith("the output of layers.2")


def test_evaluation_is_not_watched(run):
    run.model.eval()
    run.model(torch.ones(2, 4), "1")
    run.model.train()
    run.step("head")
    assert "all blocks' outputs are" in run.watch.describe()


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    run = Run()
    run.step("2" if rank == 0 else "1")  # each rank saw its own data; block 1 is the earlier one
    first = run.watch.describe()
    run.watch.forget()
    # a NaN in one rank's loss only; gradients are reduced over ranks and bad on both
    run.step("head" if rank == 0 else "", bad_gradients=tuple(run.parameters))
    second = run.watch.describe()
    with open(f"{folder}/rank{rank}.txt", "w") as file:
        file.write(f"{first}\n{second}")
    dist.destroy_process_group()


def test_ranks_agree(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    texts = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    first, second = texts[0].splitlines()
    assert first.endswith("the output of layers.1") and second.endswith("the LM head or the loss overflowed")
