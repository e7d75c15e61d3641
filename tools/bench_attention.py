"""FP8 attention alone, ours beside cuDNN's in BF16 and in FP8: times and errors. `benchmark.py --attention-only` runs this.

A shape is batch, sequence, query heads, kv heads, head dim; causal. The variants take turns in rounds, each call timed with
CUDA events, on unit-normal data; figures are medians in ms. The peers at their best:

    bf16 cuDNN    contiguous [B, H, S, C], k and v repeated to all heads (the repetition is not counted)
    fp8 cuDNN     E4M3, the faster of k and v as they are and repeated. It needs casts before it and, since its results are
                  FP8, casts behind it; none are counted

Ours is counted both ways: the operators alone (forward, backward), and all, with casts, transposes and amaxes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from titan_fp8.errors import UserError
from titan_fp8.float8.formats import E4M3, FP8_MAX, amax
from titan_fp8.float8.kernels import attention as ops
from titan_fp8.float8.kernels import attention_cudnn as cudnn
from titan_fp8.float8.kernels.attention_forward import P_SCALE

SHAPES = ("8,2048,32,8,128", "4,4096,32,8,128", "2,8192,32,8,128")
ERROR_SHAPE = (2, 1024, 8, 2, 128)


def parse_shape(text: str) -> tuple[int, ...]:
    """Raises UserError."""
    shape = tuple(int(n) for n in text.split(",") if n.isdecimal())
    if len(shape) != 5 or 0 in shape or len(text.split(",")) != 5:
        raise UserError(f'--shape must be five positive whole numbers, got "{text}": write {SHAPES[1]}')
    return shape


def fitting_scale(x: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    return FP8_MAX[dtype] / amax(x)


class Ours:
    """One layer's attention as training runs it; each stage keeps its results for the next."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, gradients: torch.dtype, backend: str = "triton"
    ):
        self.q, self.k, self.v, self.do, self.gradients = q, k, v, do, gradients
        self.softmax_scale = q.shape[-1] ** -0.5
        self.cudnn = torch.compile(cudnn.forward, dynamic=False) if backend == "cudnn" else None
        self.scale = {n: fitting_scale(x) for n, x in (("q", q), ("k", k), ("v", v))}
        self.scale["do"] = fitting_scale(do, gradients)
        self.scale["ds"] = torch.ones((), device=q.device)
        self.amax = torch.zeros(5, device=q.device).unbind()
        self.all()
        self.scale["ds"] = FP8_MAX[gradients] / self.amax[4]
        self.all()

    def casts(self) -> None:
        s, mine = self.scale, self.cudnn is None
        self.q8, self.q8_t = ops.attention_cast(self.q, s["q"], self.amax[0], E4M3, True, True, True, False)
        self.k8, self.k8_t = ops.attention_cast(self.k, s["k"], self.amax[1], E4M3, True, True, True, True)
        self.v8, self.v8_t = ops.attention_cast(self.v, s["v"], self.amax[2], E4M3, True, True, mine, False)

    def forward(self) -> None:
        scales = (self.scale[n] for n in "qkv")
        v8, run = (self.v8, self.cudnn) if self.cudnn else (self.v8_t, ops.attention_forward)
        self.o, self.shift = run(self.q8, self.k8, v8, *scales, self.softmax_scale, self.q.shape[2])

    def gradient_cast(self) -> None:
        self.do8, self.do8_t, self.delta = ops.attention_cast_gradient(
            self.do, self.o, self.scale["do"], self.scale["ds"], self.amax[3], self.gradients, True
        )

    def backward(self) -> None:
        scales = (self.scale[n] for n in ("q", "k", "v", "do", "ds"))
        self.results = ops.attention_backward(
            self.q8, self.k8, self.q8_t, self.k8_t, self.v8, self.do8, self.do8_t, self.shift, self.delta, *scales,
            self.amax[4], self.softmax_scale, self.q.shape[2], self.gradients, True,
        )  # fmt: skip

    def all(self) -> None:
        self.casts()
        self.forward()
        self.gradient_cast()
        self.backward()

    def outputs(self) -> list[Tensor]:
        return [self.o, *self.results]


class CudnnFp8:
    """cuDNN's FP8 attention in E4M3, forward and backward, with scales that fit. S must be a multiple of 128."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, repeat: bool):
        self.heads = q.shape[1] // k.shape[1] if repeat else 1
        k, v = (x.repeat_interleave(self.heads, 1) for x in (k, v))
        inputs = {"q": q, "k": k, "v": v, "do": do}
        seen = torch.zeros((), device=q.device)
        s = self.scale = {n: fitting_scale(x) for n, x in inputs.items()}
        q8, k8, v8, do8 = (
            ops.attention_cast(x, s[n], seen, E4M3, False, True, False, False)[0] for n, x in inputs.items()
        )
        s |= {"o": s["v"], "p": torch.tensor(P_SCALE, device=q.device)}
        s |= {n: torch.ones((), device=q.device) for n in ("ds", "dq", "dk", "dv")}
        options = {"attn_scale": q.shape[-1] ** -0.5, "use_causal_mask": True}

        def scalars(*names: str) -> list[Tensor]:
            return [1 / s[n[1:]] if n[0] == "/" else s[n] for n in names]

        self.o8, self.lse = torch.empty_like(q8), q8.new_empty(q8.shape[:3], dtype=torch.float32)
        outputs = [self.o8, self.lse, *torch.zeros(2, device=q.device).unbind()]
        operands = [q8, k8, v8, *scalars("/q", "/k", "/v", "/p", "p", "o")]
        graph = cudnn.Graph(
            lambda g, nodes: g.sdpa_fp8(*nodes, generate_stats=True, **options), operands, outputs
        )
        self.forward: Callable[[], None] = partial(graph, operands, outputs)
        self.forward()

        amaxes = torch.zeros(4, device=q.device).unbind()
        self.gradients = [torch.empty_like(x) for x in (q8, k8, v8)]
        outputs = [*self.gradients, *amaxes]

        def with_scales() -> list[Tensor]:
            names = ("/q", "/k", "/v", "/o", "/do", "/p", "/ds", "p", "dq", "dk", "dv", "ds")
            return [q8, k8, v8, self.o8, do8, self.lse, *scalars(*names)]

        graph = cudnn.Graph(lambda g, nodes: g.sdpa_fp8_backward(*nodes, **options), with_scales(), outputs)
        for names in (("ds",), ("dq", "dk", "dv")):  # the second run's amaxes are those of the right dS
            graph(with_scales(), outputs)
            found = dict(zip(("dq", "dk", "dv", "ds"), amaxes, strict=True))
            s |= {n: FP8_MAX[E4M3] / found[n] for n in names}
        self.backward: Callable[[], None] = partial(graph, with_scales(), outputs)
        self.backward()

    def outputs(self) -> list[Tensor]:
        dq, dk, dv = (
            g.float() / self.scale[n] for g, n in zip(self.gradients, ("dq", "dk", "dv"), strict=True)
        )
        dk, dv = (t.unflatten(1, (-1, self.heads)).sum(2) for t in (dk, dv))
        return [self.o8.float() / self.scale["o"], dq, dk, dv]


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


def draw(shape: tuple[int, ...]) -> list[Tensor]:
    """Unit-normal q, k, v, do in bfloat16, stored as [B, S, heads, C]."""
    batch, seq_len, heads, groups, dim = shape
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(batch, seq_len, n, dim, generator=generator, device="cuda").bfloat16().transpose(1, 2)
        for n in (heads, groups, groups, heads)
    ]


def measure(shape: tuple[int, ...], gradients: torch.dtype, with_cudnn: bool) -> dict[str, float]:
    """ms by name. `with_cudnn`: FP8 cuDNN too, as peer and as forward of ours."""
    tensors = draw(shape)
    ops.check_operands(*tensors[:3])
    ours = Ours(*tensors, gradients)
    runs: dict[str, Callable[[], None]] = {}
    runs["bf16 forward"], runs["bf16 backward"] = bf16(*tensors)
    for stage in ("casts", "forward", "gradient_cast", "backward", "all"):
        runs[stage] = getattr(ours, stage)
    peers = {
        name: CudnnFp8(*tensors, repeat)
        for name, repeat in (("gqa", False), ("repeated", True))
        if with_cudnn
    }
    for name, peer in peers.items():
        runs[f"{name} forward"], runs[f"{name} backward"] = peer.forward, peer.backward
    if with_cudnn:
        mixed = Ours(*tensors, gradients, "cudnn")
        runs["forward, cudnn"], runs["all, cudnn forward"] = mixed.forward, mixed.all
    row = time_in_turns(runs)
    return row | ratios(row, list(peers))


def ratios(row: dict[str, float], peers: Sequence[str]) -> dict[str, float]:
    """Peers' time over ours: above 1 ours is faster."""
    result = {"bf16 / all": (row["bf16 forward"] + row["bf16 backward"]) / row["all"]}
    if peers:
        best = min(row[f"{name} forward"] + row[f"{name} backward"] for name in peers)
        result["fp8 cudnn / all"] = best / row["all"]
        result["fp8 cudnn / (forward + backward)"] = best / (row["forward"] + row["backward"])
    return result


def errors(gradients: torch.dtype, with_cudnn: bool) -> dict[str, dict[str, float]]:
    """Relative Frobenius error of o, dq, dk, dv against float32 attention of the same bf16 tensors."""
    tensors = draw(ERROR_SHAPE)
    leaves = [x.float().detach().requires_grad_() for x in tensors[:3]]
    repeat = tensors[0].shape[1] // tensors[1].shape[1]
    k, v = (x.repeat_interleave(repeat, 1) for x in leaves[1:])
    with sdpa_kernel(SDPBackend.MATH):
        o = scaled_dot_product_attention(leaves[0], k, v, is_causal=True)
    exact = [o, *torch.autograd.grad(o, leaves, tensors[3].float())]
    variants: dict[str, Any] = {"ours": Ours(*tensors, gradients)}
    if with_cudnn:
        variants["ours, cudnn forward"] = Ours(*tensors, gradients, "cudnn")
        variants["fp8 cudnn"] = CudnnFp8(*tensors, repeat=False)
    return {
        name: {
            what: ((x.float() - y).norm() / y.norm()).item()
            for what, x, y in zip(("o", "dq", "dk", "dv"), variant.outputs(), exact, strict=True)
        }
        for name, variant in variants.items()
    }


def has_cudnn() -> bool:
    """Whether FP8 cuDNN can be compared with; says so if not."""
    try:
        cudnn.library()
    except UserError as error:
        print(f"without FP8 cuDNN: {error}")
        return False
    return True


def run(shapes: Sequence[str], gradients: torch.dtype) -> dict[str, Any]:
    """{"times": {shape: {name: ms or ratio}}, "errors": {variant: {tensor: error}}}"""
    parsed = {text: parse_shape(text) for text in shapes}
    with_cudnn = has_cudnn()
    found = errors(gradients, with_cudnn)
    rows = {}
    for text, shape in parsed.items():
        rows[text] = measure(shape, gradients, with_cudnn)
        torch.cuda.empty_cache()
    return {"times": rows, "errors": found}


def table(result: dict[str, Any]) -> str:
    shapes = list(result["times"])
    lines = [f"{'ms; last lines: ratios':36s}" + "".join(f"{shape:>18s}" for shape in shapes)]
    for name in result["times"][shapes[0]]:
        lines.append(f"{name:36s}" + "".join(f"{result['times'][shape][name]:18.3f}" for shape in shapes))
    lines.append(
        f"\n{'error against float32':36s}" + "".join(f"{what:>9s}" for what in ("o", "dq", "dk", "dv"))
    )
    for name, row in result["errors"].items():
        lines.append(f"{name:36s}" + "".join(f"{value:9.2%}" for value in row.values()))
    return "\n".join(lines)
