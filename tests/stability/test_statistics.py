"""FiniteWatch: where the first bad step began, in words, and how many came in a row.

Statistics: values are the definitions, whatever the layout, recomputation or compiler; and looking changes nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensor_parallel_ranks as ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from titan_fp8.config import Fp8
from titan_fp8.float8.convert import scaling_state
from titan_fp8.float8.kernels import cosines
from titan_fp8.model.decoder import Decoder
from titan_fp8.probe import Observer, sites
from titan_fp8.stability.predictor import Predictor, series_of
from titan_fp8.stability.statistics import FiniteWatch, Statistics

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


# ---- Statistics ----


def build(
    preset: str = "llama", fp8: Fp8 | None = None, mode: str = "none", compile: bool = False
) -> Decoder:
    """Two layers in float32, always the same weights."""
    return ranks.build(ranks.ALONE, fp8 or Fp8(recipe="bf16"), {"preset": preset}, mode, compile)


class Watched:
    """A model, its statistics, and steps of gradient descent."""

    def __init__(self, model: Decoder, on: bool = True):
        self.model, self.on = model, on
        self.scaling = scaling_state(model)
        self.statistics = Statistics(model, model.observer, ranks.B, None, self.scaling)
        self.losses: list[Tensor] = []
        self.count = 0

    def step(self, observed: bool = True, microbatches: int = 1) -> dict[str, dict[str, float]]:
        observed = observed and self.on
        for i in range(microbatches):
            if observed and i == microbatches - 1:
                self.statistics.begin()
            loss = self.model(*ranks.data(self.count, ranks.ALONE)) / (ranks.B * ranks.S)
            loss.backward()
            self.losses.append(loss.detach())
            self.count += 1
        self.statistics.end()
        if observed:
            self.statistics.before_update()
        with torch.no_grad():
            for p in self.model.parameters():
                p -= 0.02 * p.grad
                p.grad = None
        if self.scaling is not None:
            self.scaling.update()
        return self.statistics.collect() if observed else {}


def moments(x: Tensor) -> dict[str, float]:
    """The definitions, in float64. x: [B, ...]."""
    x = x.double().flatten(1)
    kurtosis = x.shape[1] * x.pow(4).sum(1) / x.square().sum(1).square()
    return {
        "mean": float(x.mean()), "rms": float(x.square().mean().sqrt()),
        "kurtosis": float(kurtosis.mean()), "amax": float(x.abs().max()),
    }  # fmt: skip


@pytest.mark.parametrize("preset", ["llama", "fog_opt"])
def test_values_are_the_definitions(gloo, preset):
    """What hooks see, in float64. The sums are good to 1e-5 (test_probe.py), the table to 6 digits."""
    model = build(preset)
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, output: bool):
        def hook(module, args, out):
            seen.setdefault(name, []).append((out if output else args[0]).detach().clone())

        return hook

    for i, block in model.layers.items():
        for name, module, output in (
            ("residual", block, False), ("qkv_in", block.attention.wqkv, False), ("v", block.attention.wv, True),
            ("attention_out", block.attention.wo, False), ("ffn_act", block.feed_forward.w2, False),
            ("ffn_out", block.feed_forward, True),
        ):  # fmt: skip
            module.register_forward_hook(keep(f"layers.{i}.{name}", output))
        for part in ("w1", "w3") if preset == "llama" else ("w1",):
            block.feed_forward.get_submodule(part).register_forward_hook(keep(f"layers.{i}.ffn_up", True))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    table = Watched(model).step()
    assert len(seen) == 2 * 7
    for name, parts in seen.items():
        expected = moments(torch.cat(parts, -1))
        assert table[name] == pytest.approx(expected, rel=3e-5, abs=1e-5 * expected["rms"]), name
    for name, p in model.state_dict().items():
        if p.dim() == 2:
            some, change = p[::64].double(), (p.double() - before[name].double())[::64]
            told = table[name.removesuffix(".weight")]
            assert told["weight_rms"] == pytest.approx(float(some.square().mean().sqrt()), rel=1e-5)
            # p and its change are float32 numbers: their difference is exact.
            assert told["update_rms"] == pytest.approx(float(change.square().mean().sqrt()), rel=1e-5)
    for i in "01":
        assert 0 < table[f"layers.{i}.attention"]["entropy"] < torch.tensor(float(ranks.S)).log()
        assert ("alignment_max" in table.get(f"layers.{i}.feed_forward", {})) == (preset == "llama")
    assert all("nonfinite" not in values for values in table.values())


class Gated(nn.Module):
    """One feed-forward of 5000 features, and a site, as the decoder names them."""

    def __init__(self) -> None:
        super().__init__()
        self.observer = Observer()
        block = nn.Module()
        block.feed_forward = nn.ModuleDict({"w1": nn.Linear(8, 5000), "w3": nn.Linear(8, 5000)})
        block.probes = sites(self.observer, "residual")
        self.layers = nn.ModuleDict({"0": block})


def test_alignment_is_that_of_the_rows(gloo, monkeypatch):
    """1000 bins of 90 degrees: the quantile is off by half a bin at most, 0.8e-3 rad, and its cosine by no more."""
    monkeypatch.setattr(cosines, "PIECE", 8 * 1234)  # rows in pieces
    torch.manual_seed(0)
    model = Gated()
    w1, w3 = (p for p in model.parameters() if p.dim() == 2)
    with torch.no_grad():
        w3[5] = -3 * w1[5]
        w3[7] = 0.0
    watched = Statistics(model, model.observer, 1)
    watched.before_update()
    told = watched.collect()["layers.0.feed_forward"]
    truth = (
        nn.functional.cosine_similarity(w1.detach().double(), w3.detach().double(), dim=1).abs().sort().values
    )
    assert told["alignment_max"] == pytest.approx(1, abs=1e-6)
    # At most 5 of 5000 rows lie above.
    assert told["alignment_q999"] == pytest.approx(float(truth[-6]), abs=8e-4)
    assert truth[-6] < 0.98 and truth[0] == 0


def test_a_nan_is_an_event_and_blinds_nothing(gloo):
    watched = Watched(build("llama"))
    clean = watched.step()
    with torch.no_grad():
        watched.model.get_parameter("layers.1.attention.wv.weight")[3, 3] = torch.nan
    table = watched.step()
    rows = ranks.B * ranks.S
    assert table["layers.1.v"]["nonfinite"] == rows  # one feature of every token
    assert table["layers.1.v"]["kurtosis"] == pytest.approx(clean["layers.1.v"]["kurtosis"], rel=0.2)
    assert "nonfinite" not in table["layers.1.q"] and "nonfinite" not in table["layers.0.ffn_out"]
    bad = table["layers.1.attention.wv"]
    assert bad["nonfinite"] >= 1 and "weight_rms" not in bad
    numbers = [value for values in table.values() for value in values.values()]
    assert torch.tensor(numbers).isfinite().all()
    predictor = Predictor()
    predictor.update(1, series_of({"step": 1, "statistics": clean}))
    told = predictor.update(2, series_of({"step": 2, "statistics": table}))
    assert told.risk > 0.9 and told.cause is not None and told.cause.kind == "nonfinite"


DELAYED = Fp8(attention="full", lm_head="fp8", amax_history=4)


@pytest.mark.parametrize(("preset", "fp8"), [("fog_max", DELAYED), ("llama", DELAYED), ("llama", None)])
def test_recomputation_and_compilation_change_no_value(gloo, preset, fp8):
    """Recomputed: bit for bit. aot_eager runs the same operators, save that the last digit of a sum may differ."""
    runs = {}
    for how in ({}, {"mode": "full"}, {"mode": "full", "compile": True}):
        torch._dynamo.reset()
        watched = Watched(build(preset, fp8, **how))
        runs[str(how)] = [watched.step() for _ in range(2)]
    plain, recomputed, compiled = runs.values()
    assert plain == recomputed
    for a, b in zip(plain, compiled, strict=True):
        assert a.keys() == b.keys()
        for site in a:
            assert b[site] == pytest.approx(a[site], rel=1e-5), site


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("preset", ["fog_max", "llama"])
def test_looking_changes_nothing(gloo, preset, compile):
    results = []
    for on in (True, False):
        torch._dynamo.reset()
        watched = Watched(build(preset, DELAYED, compile=compile), on)
        for _ in range(3):
            watched.step()
        results.append((watched.losses, watched.model.state_dict()))
    (losses, state), (expected_losses, expected) = results
    assert all(torch.equal(*pair) for pair in zip(losses, expected_losses, strict=True))
    assert state.keys() == expected.keys()  # nothing of it in a checkpoint
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_two_graphs_by_step_three(gloo):
    """Observed steps 1 and 3, then both sorts in turn: nothing is compiled any more."""
    torch._dynamo.reset()
    watched = Watched(build("fog_max", DELAYED, compile=True))
    for observed in (True, False, True):
        watched.step(observed)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for observed in (False, True, False, False, True):
            assert bool(watched.step(observed)) == observed


def test_of_several_micro_batches_the_last_counts(gloo):
    one, two = Watched(build("llama")), Watched(build("llama"))
    one.count = 1
    a, b = one.step(), two.step(microbatches=2)
    for site in ("layers.0.qkv_in", "layers.1.ffn_act", "layers.1.attention"):
        assert a[site] == b[site]


def test_one_copy_to_the_host(gloo, monkeypatch):
    """Nothing else waits for the device: with `cpu` counted, no scalar is read and no truth of a tensor asked."""

    class NoScalars(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    copies = []
    cpu = Tensor.cpu
    watched = Watched(build("llama", DELAYED))
    watched.step()
    monkeypatch.setattr(Tensor, "cpu", lambda x: copies.append(x.shape) or cpu(x))
    with NoScalars():
        assert len(watched.step()) > 60
    assert len(copies) == 1


def test_layouts_tell_the_same():
    """One process, FSDP 2 and TP 2, six models: statistics_ranks.py."""
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        str(root / "tests/statistics_ranks.py"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
    assert done.stdout.count("ok") == 2
