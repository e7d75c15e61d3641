"""FP8 attention forward by cuDNN, through its graph interface (`pip install nvidia-cudnn-frontend`).

    S = softmax_scale * q8 k8^T / (s_q s_k), causal        P = exp(S - m)       l = rowsum P      lse = m + log l
    o8 = cast(O * s_v)                                     O = P8 v8 / (256 s_v l)               P8 = cast(256 P)

On Hopper cuDNN writes O in FP8 only (bfloat16 needs Blackwell). O is a mean of rows of v, so v's scale fits it and O needs
no delayed state of its own; but it carries a rounding that our kernel's bfloat16 does not (float8/attention.py has figures).
What our backward needs follows from o8 and lse elementwise: `forward` has attention_forward's results.

Shapes as in attention.py; v8 in plain layout, not transposed. A graph is built once for each shape and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.utils.flop_counter import register_flop_formula

from titan_fp8.errors import UserError

from ..formats import E4M3, saturating_cast
from .attention_cast import P_SCALE
from .attention_forward import LOG2_E, bshc, masked_scores, require_hopper


@cache
def library() -> Any:
    """The module `cudnn`. Raises UserError where it is not installed."""
    try:
        import cudnn  # pyrefly: ignore
    except ImportError as error:
        raise UserError(
            f'attention backend "cudnn" needs the package nvidia-cudnn-frontend, got "{error}":'
            ' pip install nvidia-cudnn-frontend, or choose "triton"'
        ) from error
    return cudnn


@cache
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return library().create_handle()


@cache
def _p_scale(device: torch.device) -> tuple[Tensor, Tensor]:
    """(1 / 256, 256) on the device."""
    return torch.tensor(1 / P_SCALE, device=device), torch.tensor(P_SCALE, device=device)


def _shaped(x: Tensor) -> Tensor:
    """cuDNN's tensors have four dimensions."""
    return x.view(x.shape + (1,) * (4 - x.dim()))


class Graph:
    """One cuDNN operation, compiled for the shapes, strides and dtypes of its operands; call it with tensors like those.

    `add(graph, inputs) -> nodes` adds the operation to cuDNN's graph; `nodes` correspond to `outputs`.
    """

    def __init__(
        self,
        add: Callable[[Any, list[Any]], Sequence[Any]],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ):
        self.device = inputs[0].device
        require_hopper(self.device)
        cudnn = library()
        kinds = cudnn.data_type
        types = {torch.float32: kinds.FLOAT, E4M3: kinds.FP8_E4M3}
        graph = cudnn.pygraph(
            io_data_type=kinds.FP8_E4M3, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT,
            handle=_handle(self.device),
        )  # fmt: skip
        nodes = [
            graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=types[x.dtype])
            for x in map(_shaped, inputs)
        ]
        for node, x in zip(results := list(add(graph, nodes)), map(_shaped, outputs), strict=True):
            node.set_output(True).set_dim(list(x.shape)).set_stride(list(x.stride()))
            node.set_data_type(types[x.dtype])
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        self.graph = graph
        self.workspace_bytes = max(graph.get_workspace_size(), 1)
        self.ids = [node.get_uid() for node in nodes + results]

    def __call__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        handle = _handle(self.device)
        library().set_stream(handle, torch.cuda.current_stream(self.device).cuda_stream)
        workspace = inputs[0].new_empty(self.workspace_bytes, dtype=torch.uint8)
        tensors = dict(zip(self.ids, [*inputs, *outputs], strict=True))
        self.graph.execute(tensors, workspace, handle=handle)


_graphs: dict[tuple, Graph] = {}


@torch.library.custom_op("titan_fp8::attention_forward_cudnn", mutates_args=(), device_types="cuda")
def attention_forward_cudnn(
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    scale_q: Tensor,
    scale_k: Tensor,
    scale_v: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """(o8 [B, H, L, C] E4M3 = O * scale_v, stored as [B, L, H, C]; lse [B, H, L] float32, natural logarithm)."""
    batch, heads, length, dim = q8.shape
    descales = torch._foreach_reciprocal([scale_q, scale_k, scale_v])
    inputs = [q8, k8, v8, *descales, *_p_scale(q8.device), scale_v]
    o8 = bshc(q8, batch, heads, length, dim, E4M3)
    lse = q8.new_empty((batch, heads, length), dtype=torch.float32)
    outputs = [
        o8,
        lse,
        torch.empty_like(scale_q),
        torch.empty_like(scale_q),
    ]  # the last two: amaxes of P and O
    # Strides follow from the shapes: all are new tensors of attention_cast.
    key = (q8.device, softmax_scale, q8.shape, k8.shape)
    if key not in _graphs:

        def add(graph: Any, nodes: list[Any]) -> Sequence[Any]:
            return graph.sdpa_fp8(*nodes, attn_scale=softmax_scale, use_causal_mask=True, generate_stats=True)

        _graphs[key] = Graph(add, inputs, outputs)
    _graphs[key](inputs, outputs)
    return o8, lse


@attention_forward_cudnn.register_kernel("cpu")
def _reference(q8, k8, v8, scale_q, scale_k, scale_v, softmax_scale):
    """The same in plain PyTorch; holds all of S."""
    s = masked_scores(q8, k8, softmax_scale / (scale_q * scale_k))
    m = s.amax(-1, keepdim=True)
    p = torch.exp(s - m)
    l = p.sum(-1, keepdim=True)  # noqa: E741  (the literature's name)
    v = v8.float().repeat_interleave(q8.shape[1] // v8.shape[1], 1)
    o = saturating_cast(p, P_SCALE, E4M3).float() @ v / (P_SCALE * l)
    o8 = bshc(q8, *q8.shape, E4M3)
    o8.copy_(saturating_cast(o, 1.0, E4M3))
    return o8, (m + torch.log(l)).squeeze(-1)


@attention_forward_cudnn.register_fake
def _(q8, k8, v8, scale_q, scale_k, scale_v, softmax_scale):
    return bshc(q8, *q8.shape, E4M3), q8.new_empty(q8.shape[:3], dtype=torch.float32)


@register_flop_formula(torch.ops.titan_fp8.attention_forward_cudnn)
def _(q8_shape, *args, out_shape=None, **kwargs) -> int:
    batch, heads, length, dim = q8_shape
    return 2 * 2 * batch * heads * length * length * dim


@register_sharding(torch.ops.titan_fp8.attention_forward_cudnn.default)
def _(*args):
    """By batch or by heads, as the operators of attention.py."""
    scales, softmax_scale = [Replicate()] * 3, [None]
    return [([how] * 2, [how] * 3 + scales + softmax_scale) for how in (Replicate(), Shard(0), Shard(1))]


def forward(
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    scale_q: Tensor,
    scale_k: Tensor,
    scale_v: Tensor,
    softmax_scale: float,
    seq_len: int,
) -> tuple[Tensor, Tensor]:
    """(o, shift) as `attention.attention_forward` has them. torch.compile makes one pass of what follows the operator."""
    o8, lse = attention_forward_cudnn(q8, k8, v8, scale_q, scale_k, scale_v, softmax_scale)
    o = (o8[:, :, :seq_len].float() * scale_v.reciprocal()).bfloat16()
    return o, 8.0 - LOG2_E.value * lse  # 16 - log2(256 * denominator)
