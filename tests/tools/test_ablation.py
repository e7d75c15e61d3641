"""tools/ablation.py at a toy's size: its optimizers from papers, what it measures, merging, and refusals."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
ARMS = ["torch fp32", "ours e4m3+e5m2", "plain e4m3+e4m3 tensor", "ours e4m3+e5m2 fp16 master", "coat"]


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module("ablation")


@pytest.fixture(scope="module")
def size(tool):
    return tool.Size(64, 1, 2, 128, 32, 8, 40, 3e-3, 4)


@pytest.fixture(scope="module")
def texts():
    """Bytes that a byte-level model learns something about in 40 steps."""
    words = [f"{i * i} is the square of {i}. " for i in range(4000)]
    text = "".join(words).encode()
    return text[: -len(text) // 10], text[-len(text) // 10 :]


@pytest.fixture(scope="module")
def result(tool, size, texts):
    return tool.train_all(size, {"llama": ARMS}, 2, texts, torch.device("cpu"))


def runs(result, arm):
    return [run for run in result["runs"] if run["arm"] == arm]


# ---- Optimizers from papers ----


def test_coat_fills_the_range_of_e4m3_and_errs_as_e4m3_does(tool):
    """Error of f(x): half a step of E4M3, 2^-4 of a normal number or 2^-10; 1e-3 of it for float32's powers.

    Magnitudes span 2^60 in the first groups and 1 % in the last, so that k is below and above 1.
    """
    coat, fp8_max = tool.Coat(), 448.0
    x = torch.randn(9, 100, dtype=torch.float64)  # 7 groups of 128 and a short one
    x = (x.sign() * torch.exp2(x.abs().clamp(max=3) * torch.linspace(20, 0.005, 9)[:, None])).float()
    kept = coat.encode(x)
    assert kept["codes"].shape == x.shape and kept["codes"].dtype == torch.float8_e4m3fn
    assert kept["scale"].shape == kept["power"].shape == (8,)
    assert kept["power"].min() < 1 < kept["power"].max()
    y = coat.decode(**kept)
    groups, codes, decoded = (coat._groups(t.float()).abs() for t in (x, kept["codes"], y))
    inside = coat._groups(torch.ones_like(x)) > 0
    wide = kept["power"] < coat.MAX_POWER
    assert torch.equal(codes.amax(1), torch.full((8,), fp8_max))
    assert torch.equal(codes.where(inside, math.inf).amin(1)[wide], torch.full((int(wide.sum()),), 2.0**-9))
    f, g = (
        (t / kept["scale"][:, None]).double() ** kept["power"][:, None] * fp8_max for t in (groups, decoded)
    )
    bound = (f * 2.0**-4).clamp(min=2.0**-10)
    assert ((g - f).abs() <= bound * 1.001)[inside].all()
    assert torch.equal(y.sign(), x.sign())


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(128), torch.zeros(128)),
        (torch.full((128,), -3e-30), torch.full((128,), -3e-30)),
        (torch.tensor([0.0, 1e-20, 1e10] + [0.0] * 125), torch.tensor([0.0, 1e-20, 1e10] + [0.0] * 125)),
    ],
    ids=["zeros", "equal", "two"],
)
def test_coat_keeps_zeros_and_the_ends_of_a_group(tool, x, expected):
    coat = tool.Coat()
    torch.testing.assert_close(coat.decode(**coat.encode(x)), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("keeper", "bad"), [("coat", math.nan), ("coat", math.inf), ("tensor", math.nan)])
def test_what_is_not_finite_does_not_vanish(tool, keeper, bad):
    kept = tool.Coat() if keeper == "coat" else tool.PerTensor(torch.float8_e5m2)
    x = torch.randn(2, 128)
    x[1, 5] = bad
    assert not kept.decode(**kept.encode(x))[1, 5].isfinite()


def test_without_rounding_it_is_adamw(tool):
    class Exact:
        def encode(self, x):
            return {"codes": x, "scale": torch.ones(())}

        def decode(self, codes, scale):
            return codes * scale

    start = [torch.randn(6, 4), torch.randn(5)]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = (
        tool.PaperAdamW(ours, Exact(), Exact(), **tool.ADAMW),
        torch.optim.AdamW(theirs, **tool.ADAMW),
    )
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


# ---- What is measured ----


def test_runs_start_alike_and_learn(result):
    """Measured: 5.6 at the start, below 2.8 at the end."""
    for seed in (0, 1):
        first = {run["arm"]: run["losses"][0] for run in result["runs"] if run["seed"] == seed}
        assert first["coat"] == first["ours e4m3+e5m2"] == first["torch fp32"]
        assert first["ours e4m3+e5m2 fp16 master"] == pytest.approx(first["torch fp32"], abs=1e-3)
    a, b = runs(result, "torch fp32")
    assert a["losses"][0] != b["losses"][0]
    for run in result["runs"]:
        if run["arm"] != "plain e4m3+e4m3 tensor":
            assert run["diverged"] is None and len(run["losses"]) == 40 and len(run["held_out"]) == 4
            assert run["losses"][-1] < 3.5 < run["losses"][0]


def test_bytes_are_those_of_the_state(result):
    """Two bytes a parameter and scales: 4 B per row of 64 each (ours), 8 B per 128 each (coat); vectors have 8."""
    bytes_of = {arm: runs(result, arm)[0] for arm in ARMS}
    assert bytes_of["torch fp32"]["state_bytes"] == pytest.approx(8, abs=0.01)
    assert bytes_of["ours e4m3+e5m2"]["state_bytes"] == pytest.approx(2.11, abs=0.05)
    assert bytes_of["coat"]["state_bytes"] == pytest.approx(2.125, abs=0.05)
    assert bytes_of["coat"]["parameter_bytes"] == 4
    assert bytes_of["ours e4m3+e5m2 fp16 master"]["parameter_bytes"] == 2


def test_a_second_moment_without_range_meets_its_floor(result):
    """Measured: 0.5 to 0.7 % of the entries in E4M3 with one scale, none in E5M2; of COAT's, one in each group of 128."""
    for run in runs(result, "plain e4m3+e4m3 tensor"):
        assert run["v_least"] > 0.002 and run["v_least"] >= run["v_zero"]
    assert all(run["v_least"] < 1e-4 for run in runs(result, "ours e4m3+e5m2"))
    assert all(run["v_zero"] == 0 and 1 / 140 < run["v_least"] < 0.05 for run in runs(result, "coat"))


def test_underflow_counts_entries_with_a_gradient(tool):
    p = nn.Parameter(torch.zeros(1, 8))
    p.grad = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0]])
    optimizer = tool.Fp8AdamW([p])
    codes = optimizer.state[p]["exp_avg_sq_e5m2"]
    codes.copy_(torch.tensor([[0.0, 2.0**-16, 2.0**-15, 1, 0, 0, 0, 0]]))
    assert tool.underflow(optimizer) == (0.25, 0.5)


def test_the_same_twice(tool, size, texts, result):
    again = tool.train_all(size, {"llama": ["coat"]}, 1, texts, torch.device("cpu"))["runs"][0]
    assert again["losses"] == runs(result, "coat")[0]["losses"]
    assert again["held_out"] == runs(result, "coat")[0]["held_out"]


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([3.0] + [2.0] * 20, None),
        ([3.0, 2.0, math.nan, 2.0], 2),
        ([3.0, 2.0, math.inf], 2),
        ([3.0] + [3.5] * 9, 9),
        ([3.0] + [2.0] * 10 + [4.5] * 10, 15),
        ([3.0] + [3.5] * 3 + [2.0] * 10, None),
    ],
)
def test_diverged_at(tool, losses, step):
    """In the fifth, five of 4.5 and five of 2 have a mean of 3.25: the first above 3."""
    assert tool.diverged_at(losses) == step


def test_learning_rate(tool, size):
    rates = [tool.learning_rate(size, step) for step in range(40)]
    assert rates[0] == pytest.approx(3e-3 / 4) and max(rates) == rates[3] == pytest.approx(3e-3)
    assert rates[3:] == sorted(rates[3:], reverse=True) and rates[-1] == pytest.approx(3e-4)


def test_held_out_windows_do_not_overlap(tool, size):
    text = bytes(i % 251 for i in range(4 * 8 * 33 + 5))
    batches = tool.held_out_batches(text, size, torch.device("cpu"))
    assert [batch.shape for batch in batches] == [(8, 33)] * 4
    assert torch.cat(batches).flatten().tolist() == list(text[:-5])


def test_gaps_are_paired_by_seed(tool, result):
    row = {row["arm"]: row for row in tool.summarize(result)["llama"]}["coat"]
    mean = [sum(run["held_out"]) / 4 for arm in ("coat", "torch fp32") for run in runs(result, arm)]
    gaps, level = (mean[0] - mean[2], mean[1] - mean[3]), (mean[2] + mean[3]) / 2
    assert row["gap"] == pytest.approx(100 * sum(gaps) / 2 / level)
    assert row["gap_error"] == pytest.approx(100 * abs(gaps[0] - gaps[1]) / 2**0.5 / level)
    assert row["gap_spreads"] == pytest.approx(sum(gaps) / 2 / (abs(mean[2] - mean[3]) / 2**0.5))


# ---- Results ----


def test_merging_parts_is_the_whole_with_its_picture(tool, result, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib (pip install 'titan-fp8[plot]')")
    for name, wanted in (("a", ARMS[:2]), ("b", ARMS[2:])):
        tool.write(
            result | {"runs": [run for run in result["runs"] if run["arm"] in wanted]},
            tmp_path / f"{name}.json",
        )
    parts = [str(tmp_path / "b.json"), str(tmp_path / "a.json")]
    assert tool.main(["--merge", *parts, "--out", str(tmp_path / "c.json")]) == 0
    assert tool.table(result) in capsys.readouterr().out
    merged = json.loads((tmp_path / "c.json").read_text())
    assert sorted(map(str, merged["runs"])) == sorted(map(str, result["runs"]))
    (tmp_path / "c.png").unlink()
    assert tool.main(["--draw", str(tmp_path / "c.json")]) == 0
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "c.json", "c.png"]


def test_runs_of_other_kinds_do_not_merge(tool, result):
    with pytest.raises(tool.UserError, match="different runs, got 'torch fp32' of llama, seed 0, twice"):
        tool.merge([result, result])
    with pytest.raises(tool.UserError, match=r"of the same torch, got .* and 1\.0"):
        tool.merge([result, result | {"torch": "1.0"}])


def test_a_run_that_diverges_is_told_and_drawn(tool, result, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib (pip install 'titan-fp8[plot]')")
    base = runs(result, "torch fp32")
    dead = [
        run
        | {"arm": "torchao fp8", "diverged": 3, "held_out": [], "last": None, "losses": [5.6, 5.0, 6.0, None]}
        for run in base
    ]
    broken = result | {"runs": base + dead}
    assert "2 of 2 diverged, at step 3, 3" in tool.table(broken)
    tool.write(broken, tmp_path / "r.json")
    assert tool.main(["--draw", str(tmp_path / "r.json")]) == 0


def test_the_command_line(tool, size, tmp_path, monkeypatch, capsys, texts):
    pytest.importorskip("matplotlib", reason="needs matplotlib (pip install 'titan-fp8[plot]')")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(tool.SIZES, "tiny", tool.Size(64, 1, 2, 128, 32, 4, 3, 3e-3, 1))
    (tmp_path / "t.txt").write_bytes(b"".join(texts))
    arguments = ["--data", str(tmp_path / "t.txt"), "--out", str(tmp_path / "r.json")]
    assert tool.main([*arguments, "--models", "fog_max", "--arms", "torch fp32, ours e4m3+e5m2"]) == 0
    printed = capsys.readouterr().out
    assert "fog_max: 0." in printed and "\nours e4m3+e5m2 " in printed
    assert [run["model"] for run in json.loads((tmp_path / "r.json").read_text())["runs"]] == ["fog_max"] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arms", "torch fp32,fast"], "--arms must name known ones, got 'fast'"),
        (["--models", ""], "--models must name known ones, got ''"),
        (["--seeds", "0"], "--seeds must lie between 1 and 100, got 0"),
        (["--data", "nowhere.txt"], "--data must be a file that can be read, got nowhere.txt"),
        (["--data", "short.txt"], "at least 1,040 bytes in its held-out tenth, got 1"),
        (["--draw", "nowhere.json"], "--draw must name a recorded result, got nowhere.json"),
        (["--merge", "short.txt", "--out", "o.json"], "--merge must name a recorded result, got short.txt"),
        (["--merge", "short.txt"], "--merge must have an --out"),
        (["--out", "nowhere/r.json"], "in a folder that exists, got nowhere/r.json"),
        (["--out", "r.png"], "must end in .json and lie"),
    ],
)
def test_arguments_are_refused_in_one_line(tool, capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("short.txt").write_text("0123456789")
    assert tool.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["llama", "fog_max"])
def test_every_arm_on_a_gpu(tool, texts, model):
    """Compiled, and for fog_max FP8 throughout; heads of 64, which the kernels need."""
    size = tool.Size(128, 2, 2, 384, 128, 8, 30, 3e-3, 4)
    result = tool.train_all(size, {model: tool.DEFAULT[model]}, 1, texts, torch.device("cuda"))
    ends = {run["arm"]: run["held_out"] for run in result["runs"]}
    base = sum(ends.pop(tool.BASE)) / 4
    for arm, losses in ends.items():
        if not arm.startswith("plain"):
            assert sum(losses) / 4 == pytest.approx(base, rel=0.1), arm
