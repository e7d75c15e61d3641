"""A FOG decoder in plain PyTorch for transformers. This file travels with the exported weights (titan_fp8).

    tokens_BS -> embedding * input_scale -> blocks -> [norm] -> head -> logits_BSV

    post (FOG):    h = x + norm(Attention(x))        y = h + norm(FFN(h))
    pre:           h = x + Attention(norm(x))        y = h + FFN(norm(h))

    Attention(x) = wo softmax(softmax_scale * R(reg(wq x)) . R(reg(wk x))) wv x        reg: QK regulariser, R: RoPE
    FFN(x)       = w2 act(w1 x)     xIELU or GELU;  or w2 (swish(w1 x) * w3 x)

FOG is "Towards Fully FP8 GEMM LLM Training at Scale" (arXiv 2505.20524). Norms, regularisers, RoPE and activations compute
in float32 and return their input's dtype. Nothing here is FP8: training's scales are not part of the model.

Shapes: B batch, S queries, K keys (cached ones first), D hidden size, H heads, C head dim, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_fog import FogConfig


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class FogRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float, initial_gain: float = 1.0):
        super().__init__()
        self.eps = eps
        self.initial_gain = initial_gain
        self.weight = nn.Parameter(torch.full((dim,), initial_gain))

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalize(x, self.eps) * self.weight.to(x.dtype)


class FogHeadRMS(nn.Module):
    """QK regulariser: every head's vector (last dimension) gets rms 1. Nothing is trained."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalize(x, self.eps)


class FogScalarTanh(nn.Module):
    """QK regulariser: tanh(alpha * x) with one trained alpha."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.float() * self.alpha.float()).to(x.dtype)


class FogXIELU(nn.Module):
    """xIELU: alpha_p x^2 + beta x above 0, alpha_n (expm1(min(x, eps)) - x) + beta x below; two trained curvatures."""

    beta = 0.5
    eps = -1e-6
    initial_alpha = 0.8

    def __init__(self) -> None:
        super().__init__()
        self.a_p = nn.Parameter(torch.full((1,), math.log(math.expm1(self.initial_alpha))))
        self.a_n = nn.Parameter(torch.full((1,), math.log(math.expm1(self.initial_alpha - self.beta))))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        alpha_p = F.softplus(self.a_p.float())
        alpha_n = self.beta + F.softplus(self.a_n.float())
        negative = alpha_n * (torch.expm1(wide.clamp(max=self.eps)) - wide)
        positive = alpha_p * wide.clamp(min=0).square()
        return (torch.where(wide > 0, positive, negative) + self.beta * wide).to(x.dtype)


def qk_regulariser(config: FogConfig) -> nn.Module:
    if config.qk_norm == "rms":
        return FogHeadRMS(config.rms_norm_eps)
    if config.qk_norm == "rms_gain":
        return FogRMSNorm(config.head_dim, config.rms_norm_eps)
    return FogScalarTanh() if config.qk_norm == "tanh" else nn.Identity()


def apply_rope(x_BSHC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> Tensor:
    """Turn (first half, second half) of each head by the position's angle, in float32."""
    cos, sin = cos_BSC[:, :, None, :], sin_BSC[:, :, None, :]
    a, b = x_BSHC.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BSHC.dtype)


class FogAttention(nn.Module):
    def __init__(self, config: FogConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.softmax_scale = config.softmax_scale
        self.wq = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = qk_regulariser(config)
        self.k_norm = qk_regulariser(config)

    def forward(
        self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        q, k, v = (w(x_BSD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q = apply_rope(self.q_norm(q), *rope).transpose(1, 2)
        k = apply_rope(self.k_norm(k), *rope).transpose(1, 2)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        o_BHSC = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            # Without a mask: a first pass, where a query's keys are those up to itself, or one query that sees all.
            is_causal=mask is None and q.shape[2] > 1,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return self.wo(o_BHSC.transpose(1, 2).flatten(2))


class FogFeedForward(nn.Module):
    def __init__(self, config: FogConfig):
        super().__init__()
        gated = config.activation == "swiglu"
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False) if gated else None
        self.act = FogXIELU() if config.activation == "xielu" else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.w1(x)
        if self.w3 is not None:
            return self.w2((F.silu(h.float()) * self.w3(x)).to(h.dtype))
        return self.w2(F.gelu(h, approximate="tanh") if self.act is None else self.act(h))


class FogBlock(nn.Module):
    def __init__(self, config: FogConfig, layer: int):
        super().__init__()
        self.post_norm = config.norm_placement == "post"
        gain = config.post_norm_gain if self.post_norm else 1.0
        self.attention = FogAttention(config, layer)
        self.attention_norm = FogRMSNorm(config.hidden_size, config.rms_norm_eps, gain)
        self.feed_forward = FogFeedForward(config)
        self.ffn_norm = FogRMSNorm(config.hidden_size, config.rms_norm_eps, gain)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        if self.post_norm:
            h = x + self.attention_norm(self.attention(x, rope, mask, cache))
            return h + self.ffn_norm(self.feed_forward(h))
        h = x + self.attention(self.attention_norm(x), rope, mask, cache)
        return h + self.feed_forward(self.ffn_norm(h))


class FogPreTrainedModel(PreTrainedModel):
    config_class = FogConfig
    base_model_prefix = "model"
    _no_split_modules = ("FogBlock",)
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, FogRMSNorm):
            nn.init.constant_(module.weight, module.initial_gain)
        elif isinstance(module, FogScalarTanh):
            nn.init.ones_(module.alpha)
        elif isinstance(module, FogXIELU):
            nn.init.constant_(module.a_p, math.log(math.expm1(module.initial_alpha)))
            nn.init.constant_(module.a_n, math.log(math.expm1(module.initial_alpha - module.beta)))


class FogModel(FogPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: FogConfig):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(FogBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = FogRMSNorm(config.hidden_size, config.rms_norm_eps) if config.final_norm else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.tok_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """attention_mask [B, K]: 1 where there is a token, 0 where there is padding."""
        h_BSD = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        mask = self._mask(attention_mask, past, h_BSD.shape[1], h_BSD.device)
        if position_ids is None:
            position_ids = torch.arange(past, past + h_BSD.shape[1], device=h_BSD.device)[None]
        rope = self._rope(position_ids)
        h_BSD = h_BSD * self.config.input_scale
        for block in self.layers:
            h_BSD = block(h_BSD, rope, mask, past_key_values)
        if self.norm is not None:
            h_BSD = self.norm(h_BSD)
        # transformers 5.24 calls it `cache`; the old name works in every 5.x.
        return BaseModelOutputWithPast(last_hidden_state=h_BSD, past_key_values=past_key_values)  # pyrefly: ignore

    def _rope(self, position_ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [B, S, C/2] float32. Computed each time: a buffer would be garbage after a lazy load."""
        even = torch.arange(0, self.config.head_dim, 2, device=position_ids_BS.device).float()
        frequencies = 1.0 / self.config.rope_theta ** (even / self.config.head_dim)
        angles = position_ids_BS[..., None].float() * frequencies
        return angles.cos(), angles.sin()

    @staticmethod
    def _mask(attention_mask: Tensor | None, past: int, queries: int, device: torch.device) -> Tensor | None:
        """[B or 1, 1, S, K] bool, true where a query may look; None where the causal mask alone says it."""
        padded = attention_mask is not None and not bool(attention_mask.all())
        if not padded and (past == 0 or queries == 1):
            return None
        at = torch.arange(past, past + queries, device=device)[:, None]
        key = torch.arange(past + queries, device=device)[None, :]
        mask = (key <= at)[None, None]
        if padded:
            assert attention_mask is not None
            if attention_mask.dim() != 2 or attention_mask.shape[1] != past + queries:
                raise ValueError(
                    f"attention_mask must be [batch, {past + queries}] (cached tokens and new ones), got "
                    f"{list(attention_mask.shape)}: pass the tokenizer's, extended by one column for each new token"
                )
            # A query in the padding sees itself: for a row without any key some kernels return NaN.
            mask = mask & attention_mask[:, None, None, :].bool() | (key == at)
        return mask


class FogForCausalLM(FogPreTrainedModel, GenerationMixin):
    """The decoder and its head. With tied embeddings there is no `lm_head`: the head multiplies by the embedding."""

    def __init__(self, config: FogConfig):
        super().__init__(config)
        self.model = FogModel(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """logits [B, S, V], or of the last `logits_to_keep` positions; with labels [B, S] (-100: ignored) the loss too."""
        if past_key_values is None:  # transformers 5.24 and later say `cache`
            past_key_values = cache
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        h_BSD = out.last_hidden_state[:, -logits_to_keep:]
        w_VD = self.model.tok_embeddings.weight if self.lm_head is None else self.lm_head.weight
        logits = F.linear(h_BSD, w_VD)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        kept = out.past_key_values
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=kept)  # pyrefly: ignore
