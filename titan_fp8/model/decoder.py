"""The decoder. FOG and Llama are settings of it.

    tokens_BS -> embedding * input_scale -> blocks -> [norm] -> LM head -> logits_BSV, or with labels_BS -> the summed loss

    pre  (Llama):  h = x + Attention(norm(x))        y = h + FFN(norm(h))
    post (FOG):    h = x + norm(Attention(x))        y = h + norm(FFN(h))       gain of norm starts at post_norm_gain

Attention regularises q and k per head before RoPE, with no trained gain but tanh's one alpha (FOG, arXiv 2505.20524, section
3): this bounds the logits. ("rms_gain" trains one, as Qwen3 does, and with it the bound.) RoPE turns the two halves of a
head (Hugging Face's layout), so Llama checkpoints load without permuting rows.

Shapes: B batch, S sequence, D dim, H query heads, K kv heads, C head_dim, F hidden of the FFN, V vocabulary.
All GEMMs of a block are Linears or inside `inner_attention`; `titan_fp8.float8.convert` swaps both, and what joins several
of them: `FanOut` and `FeedForward`. Where `parallelize` has set a module's `tp`, the residual stream is [B, S/T, D], and the
linears, heads and tokens are split over T ranks (titan_fp8/tensor_parallel.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.protocols.model import ModelProtocol

from titan_fp8.loss import ChunkedLoss
from titan_fp8.probe import AttentionSite, Observer, sites
from titan_fp8.tensor_parallel import (
    Ranks,
    by_rank,
    gather_features,
    gather_sequence,
    local,
    own_stretch,
    scatter_sequence,
    shared,
)

from .activations import GATED, XIELU, gelu, smooth_swiglu, swiglu
from .args import DecoderArgs


def init_normal_(weight: Tensor, std: float) -> None:
    """Fill with N(0, std^2). A sharded CPU tensor gets its part of a whole draw: CPU has no sharded generator, and every
    rank would otherwise draw the same numbers for different rows."""
    if isinstance(weight, DTensor) and weight.device.type == "cpu":
        whole = torch.empty(weight.shape, dtype=weight.dtype).normal_(std=std)
        weight.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None))
    else:
        nn.init.normal_(weight, std=std)


class Linear(nn.Linear):
    """nn.Linear without bias, on this rank's part of the weight. With `tp` outputs are parts of a sum, and scattered."""

    tp: Ranks | None = None

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return scatter_sequence(F.linear(x, local(self.weight)), self.tp)


class Embedding(nn.Embedding):
    """nn.Embedding; with `tp` a rank looks up the tokens that it has, and the others' rows are zero: parts of a sum."""

    tp: Ranks | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        weight = local(self.weight)
        if self.tp is None:
            return F.embedding(tokens, weight)
        row = tokens - self.tp.rank * len(weight)
        elsewhere = (row < 0) | (row >= len(weight))
        return F.embedding(row.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[..., None], 0)


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dimension; float32 inside, the input's dtype outside."""

    tp: Ranks | None = None

    def __init__(self, dim: int, eps: float, initial_gain: float = 1.0):
        super().__init__()
        self.eps = eps
        self.initial_gain = initial_gain
        self.weight = nn.Parameter(torch.empty(dim))

    def init_weights(self) -> None:
        nn.init.constant_(self.weight, self.initial_gain)

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalize(x, self.eps) * shared(self.weight, self.tp).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, initial_gain={self.initial_gain:.4g}"


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class FrozenRMS(nn.Module):
    """QK regulariser: every head's vector (last dimension) gets rms 1. Nothing is trained."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalize(x, self.eps)


class ScalarTanh(nn.Module):
    """QK regulariser: tanh(alpha * x), one trained alpha, started at 1."""

    tp: Ranks | None = None

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        nn.init.ones_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.float() * shared(self.alpha, self.tp).float()).to(x.dtype)


def make_qk_norm(args: DecoderArgs) -> nn.Module:
    return {
        "rms": lambda: FrozenRMS(args.norm_eps),
        "rms_gain": lambda: RMSNorm(args.head_dim, args.norm_eps),
        "tanh": ScalarTanh,
        "none": nn.Identity,
    }[args.qk_norm]()


def rope_table(head_dim: int, seq_len: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos, sin of shape [S, C/2], float32."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(seq_len).float(), frequencies)
    return angles.cos(), angles.sin()


def apply_rope(x_BSHC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    """Turn (first half, second half) of each head by the position's angle, in float32."""
    cos, sin = cos_SC[None, :, None, :], sin_SC[None, :, None, :]
    a, b = x_BSHC.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BSHC.dtype)


class CausalAttention(nn.Module):
    """softmax(scale * q k^T) v under the causal mask, in the inputs' precision. Convert swaps this for FP8."""

    def __init__(self, softmax_scale: float):
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, q_BHSC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q_BHSC,
            k_BKSC,
            v_BKSC,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=q_BHSC.shape[1] != k_BKSC.shape[1],
        )

    def extra_repr(self) -> str:
        return f"softmax_scale={self.softmax_scale:.4g}"


class FanOut(nn.Module):
    """Several linears of one input: x [..., D] -> a tuple of [..., N_i]. Convert swaps this for one that casts x once.

    `linears` names the siblings that it is called with. With `tp`: [B, S/T, D] -> [B, S, N_i/T].
    """

    tp: Ranks | None = None

    def __init__(self, *linears: str):
        super().__init__()
        self.linears = linears

    def forward(self, x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        x = gather_sequence(x, self.tp)
        return tuple(linear(x) for linear in linears)

    def extra_repr(self) -> str:
        return "+".join(self.linears)


class Attention(nn.Module):
    def __init__(self, args: DecoderArgs, observer: Observer):
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = Linear(args.dim, args.n_heads * args.head_dim)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wqkv = FanOut("wq", "wk", "wv")
        self.wo = Linear(args.n_heads * args.head_dim, args.dim)
        self.q_norm = make_qk_norm(args)
        self.k_norm = make_qk_norm(args)
        self.softmax_scale = args.softmax_scale
        self.inner_attention: nn.Module = CausalAttention(args.softmax_scale)
        self.probes = sites(observer, "qkv_in", "q", "k", "v", "attention_out")
        self.probes["logits"] = AttentionSite(observer)

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        x_BSD = self.probes["qkv_in"](x_BSD)
        q_BSHC, k_BSKC, v_BSKC = (
            y.unflatten(-1, (-1, self.head_dim)) for y in self.wqkv(x_BSD, self.wq, self.wk, self.wv)
        )
        q_BSHC = self.probes["q"](apply_rope(self.q_norm(q_BSHC), cos_SC, sin_SC))
        k_BSKC = self.probes["k"](apply_rope(self.k_norm(k_BSKC), cos_SC, sin_SC))
        v_BSKC = self.probes["v"](v_BSKC)
        self.probes["logits"](q_BSHC, k_BSKC, self.softmax_scale)
        o_BHSC = self.inner_attention(q_BSHC.transpose(1, 2), k_BSKC.transpose(1, 2), v_BSKC.transpose(1, 2))
        return self.wo(self.probes["attention_out"](o_BHSC.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """w2(act(w1 x)), or with a gate w2(swish(w1 x) * w3 x).

    Smooth-SwiGLU is SwiGLU to mathematics. What its scales are good for is a cast to FP8: convert puts them in, or sets
    `by_token` for the form that scales each token here, around a w2 that it has converted.
    """

    tp: Ranks | None = None
    by_token = False

    def __init__(self, args: DecoderArgs, observer: Observer | None = None):
        super().__init__()
        self.activation = args.activation
        self.w1 = Linear(args.dim, args.hidden_dim)
        self.w2 = Linear(args.hidden_dim, args.dim)
        self.w3 = Linear(args.dim, args.hidden_dim) if self.activation in GATED else None
        self.up = FanOut("w1") if self.w3 is None else FanOut("w1", "w3")
        self.act = XIELU() if self.activation == "xielu" else None
        self.probes = sites(observer or Observer(), "ffn_up", "ffn_act", "ffn_out")

    def forward(self, x_BSD: Tensor) -> Tensor:
        up, act, out = (self.probes[name] for name in ("ffn_up", "ffn_act", "ffn_out"))
        if self.w3 is None:
            (h_BSF,) = self.up(x_BSD, self.w1)
            h_BSF = up(h_BSF)
            return out(self.w2(act(gelu(h_BSF) if self.act is None else self.act(h_BSF))))
        gate_BSF, up_BSF = self.up(x_BSD, self.w1, self.w3)
        up.pair(gate_BSF, up_BSF)
        if not self.by_token:
            return out(self.w2(act(swiglu(gate_BSF, up_BSF))))
        z_BSF, inverse_scale_BS1 = smooth_swiglu(gate_BSF, up_BSF, self.tp)
        return out(self.w2(act(z_BSF)) * own_stretch(inverse_scale_BS1, self.tp))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class Block(nn.Module):
    def __init__(self, args: DecoderArgs, observer: Observer):
        super().__init__()
        self.post_norm = args.norm_placement == "post"
        gain = args.post_norm_gain if self.post_norm else 1.0
        self.attention = Attention(args, observer)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps, gain)
        self.feed_forward = FeedForward(args, observer)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps, gain)
        self.probes = sites(observer, "residual")

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        x_BSD = self.probes["residual"](x_BSD)
        if self.post_norm:
            h_BSD = x_BSD + self.attention_norm(self.attention(x_BSD, cos_SC, sin_SC))
            return h_BSD + self.ffn_norm(self.feed_forward(h_BSD))
        h_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_SC, sin_SC)
        return h_BSD + self.feed_forward(self.ffn_norm(h_BSD))

    def extra_repr(self) -> str:
        return f"norm={'post' if self.post_norm else 'pre'}"


class Decoder(ModelProtocol):
    """A decoder-only transformer: tokens [B, S] int64 -> logits [B, S, V].

    With labels [B, S] int64 -> the summed cross-entropy, 0-dim float32, by `loss`, which never holds all logits (and which
    convert may swap). It is computed in here because FSDP2 has gathered the head's weight only here.
    With tied embeddings there is no `output` module: the head multiplies by the embedding's weight.
    """

    rope_cos: Tensor
    rope_sin: Tensor
    tp: Ranks | None = None

    def __init__(self, args: DecoderArgs):
        super().__init__(args)
        self.model_args = args
        self.tok_embeddings = Embedding(args.vocab_size, args.dim)
        self.observer = Observer()
        self.layers = nn.ModuleDict({str(i): Block(args, self.observer) for i in range(args.n_layers)})
        self.norm = RMSNorm(args.dim, args.norm_eps) if args.final_norm else None
        self.output = None if args.tie_embeddings else Linear(args.dim, args.vocab_size)
        self.loss: nn.Module = ChunkedLoss()
        cos, sin = rope_table(args.head_dim, args.seq_len, args.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Fill every parameter and buffer (after `to_empty` they hold garbage).

        N(0, init_std^2) everywhere (FOG: "init std 0.02 for everything"); in a pre-norm model the two matrices that write
        into the residual stream are divided by sqrt(2 n_layers), since no norm follows them.
        """
        args = self.model_args
        with torch.device(buffer_device or self.rope_cos.device):
            cos, sin = rope_table(args.head_dim, args.seq_len, args.rope_theta)
        self.rope_cos, self.rope_sin = cos, sin
        residual_std = args.init_std
        if args.norm_placement == "pre":
            residual_std /= (2 * args.n_layers) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes_residual = name.endswith(("attention.wo", "feed_forward.w2"))
                init_normal_(module.weight, residual_std if writes_residual else args.init_std)
            elif isinstance(module, nn.Embedding):
                init_normal_(module.weight, args.init_std)
            elif module is not self and hasattr(module, "init_weights"):
                module.init_weights()

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        h_BSD = self.tok_embeddings(tokens_BS)
        # Autocast leaves embeddings alone; the residual stream runs in the compute dtype, as under FSDP2.
        device_type = h_BSD.device.type
        if torch.is_autocast_enabled(device_type):
            h_BSD = h_BSD.to(torch.get_autocast_dtype(device_type))
        h_BSD = scatter_sequence(h_BSD, self.tp) * self.model_args.input_scale
        seq_len = tokens_BS.shape[1]
        cos_SC, sin_SC = self.rope_cos[:seq_len], self.rope_sin[:seq_len]
        for block in self.layers.values():
            h_BSD = block(h_BSD, cos_SC, sin_SC)
        if self.norm is not None:
            h_BSD = self.norm(h_BSD)
        w_VD = local(self.tok_embeddings.weight if self.output is None else self.output.weight)
        if labels_BS is not None:
            return self.loss(h_BSD.flatten(0, 1), w_VD, by_rank(labels_BS, self.tp))
        return gather_features(F.linear(gather_sequence(h_BSD, self.tp), w_VD), self.tp)
