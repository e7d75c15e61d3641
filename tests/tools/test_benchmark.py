"""tools/benchmark.py without a GPU: arguments, shapes, the floor's arithmetic, the tokens, table and picture."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import refusal  # pyrefly: ignore

from titan_fp8.model.decoder import Decoder

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def bench():
    """The four modules: main, gemms, attention, report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        names = {
            "main": "benchmark",
            "gemms": "bench_gemms",
            "attention": "bench_attention",
            "report": "bench_report",
        }
        yield SimpleNamespace(**{short: importlib.import_module(name) for short, name in names.items()})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variants", "llama bf16,fast"], "--variants must name known ones, got 'fast'"),
        (["--seq-len", "16384"], "a multiple of 128 up to 8192, got 16384"),
        (["--rounds", "0"], "must be at least 1"),
        (["--draw", "nowhere.json"], "--draw must name a recorded result, got nowhere.json"),
        (["--out", "nowhere/r.json"], "in a folder that exists, got nowhere/r.json"),
        (["--shape", "1,2,3"], 'five positive whole numbers, got "1,2,3"'),
        ([], "needs a CUDA GPU"),
    ],
)
def test_arguments_are_refused_in_one_line(bench, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


@pytest.mark.parametrize("preset", ["llama", "fog_max", "fog_opt", "fog_flash"])
def test_the_listed_gemms_are_the_models(bench, preset):
    """Weights of the list against those of the model itself; the embedding is looked up, not multiplied."""
    args = bench.main.shape_args(bench.main.SHAPES["8b-slice"], 256, preset)
    with torch.device("meta"):
        model = Decoder(args)
    matrices = [p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "tok_embeddings" not in n]
    assert sum(x.n * x.k * x.count for x in bench.gemms.linears(args)) == sum(matrices)
    # 2 FLOPs a multiply-add, 7 GEMMs, half of each masked: 8 layers, 32 heads of 128.
    assert bench.gemms.attention_flops(args, 3, 256) == 8 * 7 * 2 * (3 * 32 * 256 * 256 * 128) // 2


def test_variants_have_equal_parameters(bench):
    shape = bench.main.SHAPES["8b-slice"]
    names = ("torchtitan bf16", "llama bf16", "fog_max bf16", "fog_max fp8 full", "fog_opt fp8 full")
    models = {name: bench.main.build(shape, 256, bench.main.VARIANTS[name]) for name in names}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    bench.main.check_parameters(counts)
    counts["other"] = int(1.002 * max(counts.values()))
    refusal(lambda: bench.main.check_parameters(counts), "equal parameters", f"{counts['other']:,} in other")


def test_smooth_variants_are_the_same_llama_with_scales(bench):
    """At Llama 2's shapes, of which the stock model must have the same."""
    shape, names = (
        bench.main.SHAPES["7b-slice"],
        ("torchtitan bf16", "llama fp8 linears", "llama fp8 linears + smooth"),
    )
    models = [bench.main.build(shape, 256, bench.main.VARIANTS[name]) for name in names]
    bench.main.check_parameters(
        {n: sum(p.numel() for p in m.parameters()) for n, m in zip(names, models, strict=True)}
    )
    plain, smooth = (sorted(m.float8_state.names) for m in models[1:])
    assert plain == smooth and models[2].float8_state.channel_amax.shape == (8, 11008)


def test_the_floor_is_each_gemm_at_its_own_rate(bench):
    def row(linear, flops, count, bf16, fp8):
        sizes = {"m": flops // 2, "n": 1, "k": 1}
        burst = {"bf16_burst_tflops": 2 * bf16, "fp8_burst_tflops": 0.9 * fp8}
        return {"linear": linear, "count": count, "bf16_tflops": bf16, "fp8_tflops": fp8} | burst | sizes

    tera = 10**12
    rows = [
        row("up", 4 * tera, 3, 400.0, 1000.0),
        row("down", 2 * tera, 1, 500.0, 800.0),
        row("head", tera, 1, 250.0, 1e3),
    ]
    bf16 = bench.gemms.floor(rows, 14 * tera, "bf16", "bf16", "bf16", sustained=True)
    # ms: 12 / 400 + 2 / 500 = 34; attention at 14 tera in 34 ms; 1 / 250
    assert bf16 == pytest.approx({"linears": 34.0, "attention": 34.0, "head": 4.0})
    # The better rate: for bf16 the burst's, twice as high, for FP8 the sustained one.
    mixed = bench.gemms.floor(rows, 14 * tera, "fp8", "bf16", "fp8")
    assert mixed == pytest.approx({"linears": 14.5, "attention": 17.0, "head": 1.0})


def test_tokens_are_a_fixed_chain_that_can_be_learned(bench):
    tokens, entropy = bench.main.markov_tokens(50_000, 2, 4, 4096, "cpu")
    again, _ = bench.main.markov_tokens(50_000, 2, 4, 4096, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(tokens, again, strict=True))
    flat = torch.cat(tokens)
    assert flat.shape == (8, 4096) and flat.max() > 40_000 and len(flat.unique()) <= bench.main.STATES
    followers: dict[int, list[int]] = {}
    for a, b in zip(flat[:, :-1].flatten().tolist(), flat[:, 1:].flatten().tolist(), strict=True):
        followers.setdefault(a, []).append(b)
    assert max(len(set(seen)) for seen in followers.values()) <= bench.main.SUCCESSORS
    # p_1 = 1 / (1 + 1/2 + ... + 1/8) = 0.368; the most frequent of few draws is a little above its probability.
    often = [max(map(seen.count, set(seen))) / len(seen) for seen in followers.values() if len(seen) >= 20]
    assert 0.36 < sum(often) / len(often) < 0.50
    assert entropy == pytest.approx(1.816, abs=1e-3)  # log 2.71786 + sum (log r / r) / 2.71786, by hand


def test_kernels_are_told_apart_by_name(bench):
    known = {
        "nvjet_sm90_qqtst_128x256_128x6_2x1_v_bz_coopA_NNT": "gemm", "_cast_kernel": "cast", "forward_kernel": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": "attention", "_forward_kernel": "activation",
        "triton_poi_fused_attention_cast_mul_3": "elementwise", "_softmax_gradient_kernel": "loss",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer", "Memset (Device)": "copy",
    }  # fmt: skip
    assert {name: bench.main.kind_of(name) for name in known} == known
    assert set(known.values()) <= set(bench.report.KINDS)


def result(learns: bool = True) -> dict:
    names = ("torchtitan bf16", "fog_max fp8 full")
    rows = [
        {
            "variant": name, "tokens_per_second": 8192e3 / ms, "step_ms": ms, "step_ms_min": ms - 1, "step_ms_max": ms + 2,
            "ratio": 160 / ms, "floor_ms": ms / 2, "peak_memory_gib": 20.0, "parameters": 2_013_335_552,
            "losses": [10.0] * 5 + [end] * 15, "profile_ms": {"gemm": ms / 2, "something new": 3.0, "idle": 1.0},
        }
        for name, ms, end in zip(names, (160.0, 100.0), (2.0, 2.1 if learns else 12.0), strict=True)
    ]  # fmt: skip
    about = {
        "model": "8b-slice",
        "layers": 8,
        "seq_len": 4096,
        "batch": 2,
        "gpu": "a GPU",
        "torch": "2",
        "base": names[0],
    }
    return about | {"token_entropy": 1.85, "rows": rows}


def test_the_table_says_how_near_the_floor_and_whether_the_model_learns(bench):
    text = bench.report.table(result())
    for words in (
        "1.600x",
        "160.00 (159.00 - 162.00)",
        "50%",
        "2013.3M",
        "-> 2.1000  (+0.1000)",
        "every variant learns",
    ):
        assert words in text
    assert "NOT every variant learns" in bench.report.table(result(learns=False))


def test_the_table_says_what_statistics_cost(bench):
    with_them = result()
    assert "statistics of" not in bench.report.table(with_them)
    with_them["rows"].append(
        with_them["rows"][1] | {"variant": "fog_max fp8 full + statistics", "step_ms": 104.0}
    )
    words = "statistics of fog_max fp8 full: +4.0% of every step, +0.40% at one step of ten"
    assert words in bench.report.table(with_them)


def test_a_recorded_result_is_drawn_again_without_a_gpu(bench, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib (pip install 'titan-fp8[plot]')")
    recorded = tmp_path / "r.json"
    bench.main.save(result(), recorded)
    assert json.loads(recorded.read_text()) == result()
    first = recorded.with_suffix(".png").read_bytes()
    recorded.with_suffix(".png").unlink()
    assert bench.main.main(["--draw", str(recorded)]) == 0 and "1.600x" in capsys.readouterr().out
    assert recorded.with_suffix(".png").read_bytes() == first and first.startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.png"]


@pytest.mark.parametrize("name", ["2026-11-25_h100_attention", "2026-11-25_h100-x2_8b_tp", "README"])
def test_what_has_no_picture_is_refused_in_a_line(bench, tmp_path, capsys, name):
    path = tmp_path / "r.json"
    source = TOOLS.parent / "benchmarks" / f"{name}.json"
    path.write_text(source.read_text() if source.exists() else "# Not JSON")
    assert bench.main.main(["--draw", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --draw must name a result of training steps") and error.count("\n") == 1


def test_attentions_peer_is_the_faster_of_its_two(bench):
    row = {"bf16 forward": 1.0, "bf16 backward": 3.0, "forward": 0.75, "backward": 1.25, "all": 2.5}
    row |= {"gqa forward": 1.0, "gqa backward": 4.5, "repeated forward": 1.0, "repeated backward": 4.0}
    expected = {"bf16 / all": 1.6, "fp8 cudnn / all": 2.0, "fp8 cudnn / (forward + backward)": 2.5}
    assert bench.attention.ratios(row, ["gqa", "repeated"]) == pytest.approx(expected)
    assert list(bench.attention.ratios(row, [])) == ["bf16 / all"]
