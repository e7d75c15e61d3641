"""The GEMM audit against FLOPs counted by hand, and the command line's verdicts."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import needs_scaled_mm

from titan_fp8.config import Fp8
from titan_fp8.float8.audit import GemmAudit, audit_step, summarize
from titan_fp8.float8.convert import convert
from titan_fp8.float8.formats import E4M3

ROOT = Path(__file__).resolve().parents[2]

# One layer of `tiny_decoder` on 2 sequences of 32 tokens, in FLOPs (2 per multiply-add).
M, D, KV, F, V = 64, 64, 32, 192, 64
LINEARS = {
    "attention.wqkv": 2 * M * D * (D + 2 * KV),
    "attention.wo": 2 * M * D * D,
    "feed_forward": 2 * 2 * M * D * F,
}
APART = {  # where nothing is converted, and so nothing joined
    "attention.wq": 2 * M * D * D,
    "attention.wk": 2 * M * D * KV,
    "attention.wv": 2 * M * D * KV,
    "attention.wo": 2 * M * D * D,
    "feed_forward.w1": 2 * M * D * F,
    "feed_forward.w2": 2 * M * F * D,
}
ONE_OF_ATTENTION = 2 * 2 * 4 * 32 * 32 * 16  # batch 2, 4 heads, 32 x 32 scores, head dim 16
ATTENTION = 7 * ONE_OF_ATTENTION  # 2 forward, 5 backward
BLOCK = 3 * sum(LINEARS.values()) + ATTENTION


def report(model: torch.nn.Module, fp8: Fp8) -> dict:
    convert(model, fp8)
    tokens = torch.randint(0, V, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        return summarize(audit_step(model.train(), tokens))


def sums(gemms: list[dict]) -> Counter:
    table = Counter()
    for gemm in gemms:
        table[gemm["module"], gemm["phase"], gemm["fp8"]] += gemm["flops"]
    return table


def expected_linears(layer: int, fp8: bool = True) -> dict:
    return {
        (f"layers.{layer}.{name}", phase, fp8): flops * (1 if phase == "forward" else 2)
        for name, flops in (LINEARS if fp8 else APART).items()
        for phase in ("forward", "backward")
    }


@pytest.mark.parametrize("mode", ["off", "forward", "full"])
def test_flops_phases_and_modules_are_those_counted_by_hand(tiny_decoder, mode):
    got = report(tiny_decoder(), Fp8(attention=mode))
    expected = {("loss", "forward", False): 6 * M * D * V}  # the head's gradients are computed with its loss
    # (forward, backward) GEMMs of attention in FP8 and in bfloat16; "forward" recomputes S in FP8
    in_fp8, in_bf16 = {"off": ((0, 0), (2, 5)), "forward": ((2, 1), (0, 4)), "full": ((2, 5), (0, 0))}[mode]
    for layer in range(2):
        expected |= expected_linears(layer)
        for fp8, counts in ((True, in_fp8), (False, in_bf16)):
            for phase, count in zip(("forward", "backward"), counts, strict=True):
                if count:
                    expected[f"layers.{layer}.attention.inner_attention", phase, fp8] = (
                        count * ONE_OF_ATTENTION
                    )
    assert sums(got["gemms"]) == expected
    attention_in_fp8 = sum(in_fp8) * ONE_OF_ATTENTION
    ratio = (3 * sum(LINEARS.values()) + attention_in_fp8) / BLOCK
    assert got["block_gemm_flops"] == 2 * BLOCK and got["gemm_flops"] == 2 * BLOCK + 6 * M * D * V
    assert got["block_gemm_flops_fp8_ratio"] == ratio and (ratio == 1.0) == (mode == "full")
    assert got["gemm_flops_fp8_ratio"] == ratio * 2 * BLOCK / (2 * BLOCK + 6 * M * D * V)
    assert sum(gemm["share"] for gemm in got["gemms"]) == pytest.approx(1)


@needs_scaled_mm
def test_formats_are_read_off_the_operands(tiny_decoder):
    gemms = report(tiny_decoder(n_layers=1), Fp8(attention="full"))["gemms"]
    e4m3, e5m2 = "float8_e4m3fn", "float8_e5m2"
    kinds = {
        (gemm["op"], gemm["phase"], tuple(gemm["dtypes"]))
        for gemm in gemms
        if gemm["module"].startswith("layers.")
    }
    assert kinds == {
        ("aten._scaled_mm", "forward", (e4m3, e4m3)),
        ("aten._scaled_mm", "backward", (e5m2, e4m3)),
        ("titan_fp8.bmm", "forward", (e4m3, e4m3)),
        ("titan_fp8.bmm", "backward", (e4m3, e4m3)),  # S again
        ("titan_fp8.bmm", "backward", (e4m3, e5m2)),  # dV = P dO
        ("titan_fp8.bmm", "backward", (e5m2, e4m3)),
    }
    head = [g for g in gemms if g["module"] == "loss"]
    assert [g["shapes"] for g in head] == [((M, D), (D, V)), ((M, V), (V, D)), ((V, M), (M, D))]
    assert all((g["op"], g["dtypes"]) == ("aten.mm", ("bfloat16", "bfloat16")) for g in head)


def test_a_tied_head_and_a_gate_are_counted(tiny_decoder):
    got = report(tiny_decoder("llama", tie_embeddings=True), Fp8(recipe="bf16"))
    assert got["block_gemm_flops_fp8_ratio"] == got["gemm_flops_fp8_ratio"] == 0.0
    table = sums(got["gemms"])
    assert table["loss", "forward", False] == 6 * M * D * V
    for name in ("w1", "w2", "w3"):
        assert table[f"layers.1.feed_forward.{name}", "forward", False] == 2 * M * D * 128
        assert table[f"layers.1.feed_forward.{name}", "backward", False] == 4 * M * D * 128


def test_a_layer_left_out_is_seen(tiny_decoder):
    got = report(tiny_decoder(), Fp8(attention="full", filter=["layers.*", "!layers.0.*"]))
    table = sums(got["gemms"])
    for key, flops in (expected_linears(0, fp8=False) | expected_linears(1)).items():
        assert table[key] == flops, key
    assert got["block_gemm_flops_fp8_ratio"] == 1 - 3 * sum(LINEARS.values()) / (2 * BLOCK)


def test_attention_that_the_policy_took_out_of_fp8_is_seen(tiny_decoder):
    """Nothing is declared: the operands' dtypes tell, in the same model before and after."""
    model = tiny_decoder()
    before = report(model, Fp8(attention="full"))
    recipe = model.layers["0"].attention.inner_attention.recipe
    tokens = torch.randint(0, V, (2, 32), generator=torch.Generator().manual_seed(1))
    ratios = []
    for away in (True, False):
        recipe.attention_16bit = away
        with torch.autocast("cpu", torch.bfloat16):
            got = summarize(audit_step(model, tokens))
        ratios.append(got["block_gemm_flops_fp8_ratio"])
        assert got["gemm_flops"] == before["gemm_flops"]
        slow = {g["module"] for g in got["gemms"] if not g["fp8"]} - {"loss"}
        names = {f"layers.{layer}.attention.inner_attention" for layer in range(2)}
        assert slow == (names if away else set())
    assert ratios == [1 - ATTENTION / BLOCK, 1.0]


def test_a_product_with_one_operand_in_16_bits_is_not_fp8():
    class Product(torch.nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return torch.ops.titan_fp8.bmm(left, right)

    model = Product()
    fp8, bf16 = (torch.ones(1, 16, 16).to(dtype) for dtype in (E4M3, torch.bfloat16))
    with GemmAudit(model) as audit:
        for left, right in ((fp8, fp8), (fp8, bf16), (bf16, fp8), (bf16, bf16)):
            model(left, right)
    assert [gemm.fp8 for gemm in audit.gemms] == [True, False, False, False]


def test_hooks_are_gone_afterwards(tiny_decoder):
    model = tiny_decoder()
    report(model, Fp8())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit_gemms", ROOT / "tools" / "audit_gemms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, monkeypatch, capsys, tmp_path):
    """run(*flags, toml=...) -> (exit status, stdout, stderr) of tools/audit_gemms.py on a small FOG."""

    def run(*flags: str, toml: str = '[fp8]\nattention = "full"\n') -> tuple[int, str, str]:
        config = tmp_path / "small.toml"
        config.write_text(toml)
        small = ["--architecture.n_layers=2", "--training.seq_len=32"]
        monkeypatch.setattr(sys, "argv", ["audit_gemms.py", "--config", str(config), *small, *flags])
        status = tool.main()
        return status, *capsys.readouterr()

    return run


@needs_scaled_mm
def test_a_full_recipe_passes(run):
    status, out, err = run()
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == [
        "module",
        "phase",
        "operator",
        "operands",
        "shapes",
        "calls",
        "GFLOP",
        "share",
    ]
    assert lines[-1].startswith("FP8 share of GEMM FLOPs: 100.0% in the blocks, ")
    wqkv = next(line for line in lines if line.startswith("layers.*.attention.wqkv ") and " forward " in line)
    # folded over 2 layers, [32, 128] x [128, 128 + 64 + 64] each
    assert "float8_e4m3fn x float8_e4m3fn  [32, 128] x [128, 256]  " in wqkv and wqkv.split()[-3:-1] == [
        "2",
        "0.00",
    ]


def test_a_recipe_that_is_not_as_full_as_it_claims_fails(run):
    status, out, err = run("--fp8.filter=layers.*,!layers.0.*")
    assert status == 1 and "bfloat16 x bfloat16" in out
    assert err.startswith("error: ") and err.count("\n") == 1
    # 3 GEMMs of layer 0's linears, of 2 layers with 7 of attention: 32 tokens, dim 128, 64 for k and v, hidden 384
    linears = 3 * 2 * 32 * 128 * (2 * 128 + 2 * 64 + 2 * 384)
    share = linears / (2 * linears + 2 * 7 * 2 * 4 * 32 * 32 * 32)
    assert (
        f"claims full FP8, but {share:.2%} of the blocks' GEMM FLOPs are not: layers.0.attention.wk and 5 more"
        in err
    )


@pytest.mark.parametrize("flags", [["--fp8.attention=off"], ["--fp8.recipe=bf16", "--fp8.attention=off"]])
def test_a_recipe_that_claims_less_passes(run, flags):
    status, out, err = run(*flags)
    assert (status, err) == (0, "") and "100.0% in the blocks" not in out


def test_json_is_the_whole_report(run):
    status, out, _ = run("--json")
    got = json.loads(out)
    assert status == 0 and got["block_gemm_flops_fp8_ratio"] == 1.0
    assert sum(gemm["flops"] for gemm in got["gemms"]) == got["gemm_flops"]
    assert {gemm["phase"] for gemm in got["gemms"]} == {"forward", "backward"}
    status, out, _ = run("--json", "--fp8.filter=layers.*,!layers.0.*")
    assert status == 1 and json.loads(out)["block_gemm_flops_fp8_ratio"] < 1


@pytest.mark.parametrize(
    ("toml", "flags", "words"),
    [
        ('[fp8]\nattention = "all"\n', [], "attention"),
        ("[fp8\n", [], "valid TOML"),
        ("", ["--fp8.filter=layer.*"], "[fp8] filter"),
        ("", ["--model.flavor=9b"], "flavor must be a known size"),
        ("", ["--architecture.n_layers=40"], "n_layers must lie between"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(run, toml, flags, words):
    status, out, err = run(*flags, toml=toml)
    assert (status, out) == (2, "") and words in err
    assert err.startswith("error: ") and err.count("\n") == 1
