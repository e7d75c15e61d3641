"""Time FP8 attention, forward and backward with all casts, beside cuDNN's BF16 attention, on this machine's GPU.

    python tools/bench_attention.py [--shape 4,4096,32,8,128 ...] [--dtype e4m3|e5m2] [--json FILE]

A shape is batch, sequence, query heads, kv heads, head dim; causal. The variants take turns in rounds, each call timed with
CUDA events, on random data; the table has medians in ms. cuDNN gets the layout that it is fastest with: contiguous
[B, H, S, C] with k and v repeated to all heads (not counted).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from titan_fp8.errors import UserError
from titan_fp8.float8.formats import BY_NAME, E4M3, FP8_MAX, amax
from titan_fp8.float8.kernels import attention as ops
from titan_fp8.float8.kernels.attention_forward import require_hopper

SHAPES = ["8,2048,32,8,128", "4,4096,32,8,128", "2,8192,32,8,128"]


class Fp8:
    """One layer's attention as training runs it; each stage keeps its results for the next."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, gradients: torch.dtype):
        self.q, self.k, self.v, self.do, self.gradients = q, k, v, do, gradients
        self.softmax_scale = q.shape[-1] ** -0.5
        self.scale = {n: e4m3_scale(x) for n, x in (("q", q), ("k", k), ("v", v))}
        self.scale["do"] = FP8_MAX[gradients] / amax(do)
        self.scale["ds"] = torch.ones((), device=q.device)
        self.amax = torch.zeros(5, device=q.device).unbind()
        for stage in (self.casts, self.forward, self.gradient_cast, self.backward):
            stage()
        self.scale["ds"] = FP8_MAX[gradients] / self.amax[4]

    def casts(self) -> None:
        s = self.scale
        self.q8, self.q8_t = ops.attention_cast(self.q, s["q"], self.amax[0], E4M3, True, True, True, False)
        self.k8, self.k8_t = ops.attention_cast(self.k, s["k"], self.amax[1], E4M3, True, True, True, True)
        self.v8, self.v8_t = ops.attention_cast(self.v, s["v"], self.amax[2], E4M3, True, True, True, False)

    def forward(self) -> None:
        s = self.scale
        self.o, self.shift = ops.attention_forward(
            self.q8, self.k8, self.v8_t, s["q"], s["k"], s["v"], self.softmax_scale, self.q.shape[2]
        )

    def gradient_cast(self) -> None:
        self.do8, self.do8_t, self.delta = ops.attention_cast_gradient(
            self.do, self.o, self.scale["do"], self.scale["ds"], self.amax[3], self.gradients, True
        )

    def backward(self) -> None:
        s = self.scale
        ops.attention_backward(
            self.q8, self.k8, self.q8_t, self.k8_t, self.v8, self.do8, self.do8_t, self.shift, self.delta,
            s["q"], s["k"], s["v"], s["do"], s["ds"], self.amax[4],
            self.softmax_scale, self.q.shape[2], self.gradients, True,
        )  # fmt: skip

    def all(self) -> None:
        self.casts()
        self.forward()
        self.gradient_cast()
        self.backward()


def e4m3_scale(x: Tensor) -> Tensor:
    return FP8_MAX[E4M3] / amax(x)


def bf16(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """(forward, backward) of cuDNN's attention."""
    repeat = q.shape[1] // k.shape[1]
    leaves = [
        x.contiguous().requires_grad_()
        for x in (q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1))
    ]
    do, held = do.contiguous(), {}

    def forward() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            held["o"] = scaled_dot_product_attention(*leaves, is_causal=True)

    def backward() -> None:
        torch.autograd.grad(held["o"], leaves, do, retain_graph=True)

    forward()
    return forward, backward


def time_in_turns(
    variants: dict[str, Callable[[], None]], rounds: int = 5, calls: int = 10
) -> dict[str, float]:
    """Median ms of each variant's calls."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            run()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
            events[0].record()
            for event in events[1:]:
                run()
                event.record()
            torch.cuda.synchronize()
            times[name] += [a.elapsed_time(b) for a, b in pairwise(events)]
    return {name: median(values) for name, values in times.items()}


def measure(shape: tuple[int, ...], gradients: torch.dtype) -> dict[str, float]:
    batch, seq_len, heads, groups, dim = shape
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, do = (
        torch.randn(batch, seq_len, n, dim, generator=generator, device="cuda").bfloat16().transpose(1, 2)
        for n in (heads, groups, groups, heads)
    )
    ops.check_operands(q, k, v)
    ours = Fp8(q, k, v, do, gradients)
    forward, backward = bf16(q, k, v, do)
    row = time_in_turns(
        {"bf16 forward": forward, "bf16 backward": backward, "casts": ours.casts, "forward": ours.forward,
         "gradient cast": ours.gradient_cast, "backward": ours.backward, "fp8 all": ours.all}
    )  # fmt: skip
    return row | {"ratio": (row["bf16 forward"] + row["bf16 backward"]) / row["fp8 all"]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", action="append", help="batch,sequence,heads,kv heads,head dim; repeat for more"
    )
    parser.add_argument("--dtype", choices=list(BY_NAME), default="e4m3", help="of dO and dS")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    try:
        if not torch.cuda.is_available():
            raise UserError("this benchmark needs a Hopper GPU, got no CUDA GPU: run it on an H100 or H200")
        require_hopper(torch.device("cuda"))
        rows = {}
        for text in options.shape or SHAPES:
            shape = tuple(int(n) for n in text.split(",") if n.isdecimal())
            if len(shape) != 5 or 0 in shape:
                raise UserError(
                    f'--shape must be five positive whole numbers, got "{text}": write {SHAPES[1]}'
                )
            rows[text] = measure(shape, BY_NAME[options.dtype])
            torch.cuda.empty_cache()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = list(next(iter(rows.values())))
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "cuDNN", torch.backends.cudnn.version())
    print("B,S,H,K,C".ljust(18), *(name.rjust(13) for name in names))
    for shape, row in rows.items():
        print(shape.ljust(18), *(f"{row[name]:13.3f}" for name in names))
    if options.json:
        partial = options.json.with_name(options.json.name + ".partial")
        partial.write_text(json.dumps(rows, indent=1) + "\n")
        partial.rename(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
