"""Rates of a model's own GEMMs on this GPU, in bf16 and FP8, and the floor that they set for a training step.

A linear of weight [N, K] on M = batch * sequence rows runs three GEMMs of 2 M N K FLOPs each:

    forward  y = x w^T  [M, N]          dgrad  dx = dy w  [M, K]          wgrad  dw = dy^T x  [N, K]

Weights that share an input count as one: that is how fast they can run. FP8 is E4M3 forward, E5M2 x E4M3 backward without
fast accumulation, one scale a tensor. The floor of a step is the time of all its matrix products at these rates and nothing
else; attention's seven GEMMs, half of each masked, are charged at the linears' mean rate.

Two rates each. Sustained: all GEMMs in turn, CALLS back to back on a warm chip. Burst: CALLS after a rest. The power limit
makes the first up to 20 % lower. A step lies between: its other kernels draw less power. (390M on an H200: the GEMMs of a
bf16 step took 54 ms; 63 at the sustained rates, 57 at the better of both, the rest being that a model's numbers cost less
power than random ones.) So the floor takes the better of both; the one at sustained rates stands beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_fp8.float8.formats import E4M3, E5M2, FP8_MAX
from titan_fp8.model.activations import GATED
from titan_fp8.model.args import DecoderArgs

CALLS = 8
HEAD = "head"


class Linear(NamedTuple):
    """A weight [n, k] that `count` layers have."""

    name: str
    n: int
    k: int
    count: int


def linears(args: DecoderArgs) -> list[Linear]:
    """The linears of one step, the LM head last."""
    up = args.hidden_dim * (2 if args.activation in GATED else 1)
    return [
        Linear("qkv", (args.n_heads + 2 * args.n_kv_heads) * args.head_dim, args.dim, args.n_layers),
        Linear("wo", args.dim, args.n_heads * args.head_dim, args.n_layers),
        Linear("up", up, args.dim, args.n_layers),
        Linear("down", args.dim, args.hidden_dim, args.n_layers),
        Linear(HEAD, args.vocab_size, args.dim, 1),
    ]


def attention_flops(args: DecoderArgs, batch: int, seq_len: int) -> int:
    """Of the seven GEMMs of attention in all layers, without what the causal mask hides."""
    return 7 * args.n_layers * batch * args.n_heads * args.head_dim * seq_len * seq_len


def products(linear: Linear, m: int) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """(pass, precision) -> one GEMM of the linear, on random data: rates on zeros are too high."""

    def draw(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, device="cuda") * 100).clamp(-FP8_MAX[E4M3], FP8_MAX[E4M3])

    x, w, dy = draw(m, linear.k), draw(linear.n, linear.k), draw(m, linear.n)
    xb, wb, dyb = x.bfloat16(), w.bfloat16(), dy.bfloat16()
    x8, w8, dy8 = x.to(E4M3), w.to(E4M3), dy.to(E5M2)
    x8_t, w8_t, dy8_t = (t.t().contiguous() for t in (x8, w8, dy8))
    one = torch.ones((), device="cuda")

    def mm8(a: Tensor, b_t: Tensor, fast: bool) -> Tensor:
        return torch._scaled_mm(
            a, b_t.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    return {
        ("forward", "bf16"): lambda: xb @ wb.t(),
        ("dgrad", "bf16"): lambda: dyb @ wb,
        ("wgrad", "bf16"): lambda: dyb.t() @ xb,
        ("forward", "fp8"): lambda: mm8(x8, w8, True),
        ("dgrad", "fp8"): lambda: mm8(dy8, w8_t, False),
        ("wgrad", "fp8"): lambda: mm8(dy8_t, x8_t, False),
    }


def _milliseconds(run: Callable[[], Any], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def measure(model: list[Linear], m: int, rounds: int = 4) -> list[dict[str, Any]]:
    """A row per GEMM: linear, pass, count, m, n, k, and per precision "..._tflops", sustained, and "..._burst_tflops"."""
    runs = {(linear, *key): run for linear in model for key, run in products(linear, m).items()}
    times: dict[tuple, list[float]] = {key: [] for key in runs}
    for _ in range(rounds + 1):
        for key, run in runs.items():
            times[key].append(_milliseconds(run, CALLS))
    rows: list[dict[str, Any]] = []
    for linear in model:
        for kind in ("forward", "dgrad", "wgrad"):
            row = {
                "linear": linear.name,
                "pass": kind,
                "count": linear.count,
                "m": m,
                "n": linear.n,
                "k": linear.k,
            }
            for precision in ("bf16", "fp8"):
                flops = 2 * m * linear.n * linear.k
                # The first round is the warm load.
                row[f"{precision}_tflops"] = flops / median(times[linear, kind, precision][1:]) / 1e9
                run = runs[linear, kind, precision]
                torch.cuda.synchronize()
                time.sleep(0.05)
                run()  # else the first launch's latency would count
                row[f"{precision}_burst_tflops"] = flops / _milliseconds(run, CALLS) / 1e9
            rows.append(row)
    return rows


def rate(row: dict[str, Any], precision: str, sustained: bool) -> float:
    """TFLOP/s of one GEMM: the sustained one, or the better of both."""
    warm = row[f"{precision}_tflops"]
    return warm if sustained else max(warm, row[f"{precision}_burst_tflops"])


def milliseconds(rows: list[dict[str, Any]], precision: str, sustained: bool) -> float:
    """Of all the GEMMs in `rows`, each as often as a step runs it."""
    return sum(2 * r["m"] * r["n"] * r["k"] * r["count"] / rate(r, precision, sustained) for r in rows) / 1e9


def mean_rate(rows: list[dict[str, Any]], precision: str, sustained: bool) -> float:
    """TFLOP/s over all the GEMMs in `rows`."""
    flops = sum(2 * r["m"] * r["n"] * r["k"] * r["count"] for r in rows)
    return flops / milliseconds(rows, precision, sustained) / 1e9


def floor(
    rows: list[dict[str, Any]],
    core_flops: float,
    linear: str,
    attention: str,
    head: str,
    sustained: bool = False,
) -> dict[str, float]:
    """Milliseconds that a step's products alone take; `linear`, `attention`, `head` are precisions, "bf16" or "fp8"."""
    blocks, last = [r for r in rows if r["linear"] != HEAD], [r for r in rows if r["linear"] == HEAD]
    return {
        "linears": milliseconds(blocks, linear, sustained),
        "attention": core_flops / mean_rate(blocks, attention, sustained) / 1e9,
        "head": milliseconds(last, head, sustained),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'GEMM':14s} {'m':>7s} {'n':>7s} {'k':>7s}   bf16 TFLOP/s (burst)    fp8 TFLOP/s (burst)   fp8/bf16"
    ]
    for r in rows:
        bf16, fp8 = r["bf16_tflops"], r["fp8_tflops"]
        lines.append(
            f"{r['linear'] + ' ' + r['pass']:14s} {r['m']:7d} {r['n']:7d} {r['k']:7d}   {bf16:8.0f} "
            f"({r['bf16_burst_tflops']:.0f})  {fp8:17.0f} ({r['fp8_burst_tflops']:.0f}) {fp8 / bf16:13.2f}"
        )
    for precision in ("bf16", "fp8"):
        for name, sustained in (("sustained", True), ("better of both", False)):
            lines.append(
                f"all, {precision}, {name}: {milliseconds(rows, precision, sustained):.1f} ms a step, "
                f"{mean_rate(rows, precision, sustained):.0f} TFLOP/s"
            )
    return "\n".join(lines)
