"""Configuration of a FOG decoder for transformers. This file travels with the exported weights (titan_fp8).

Sizes carry the names that transformers gives them; what makes FOG differ from Llama has the names of titan_fp8's
[architecture] section.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class FogConfig(PretrainedConfig):
    """Shape and settings of `FogForCausalLM`.

    norm_placement: "post" normalises each branch's output before it is added, "pre" its input.
    qk_norm: "rms" (each head's q and k get rms 1), "rms_gain" (and a trained gain), "tanh" (tanh(alpha q), alpha trained) or
        "none", before RoPE.
    activation: "xielu", "gelu" (tanh form) or "swiglu" (gated: three matrices).
    softmax_scale multiplies q.k; input_scale multiplies the embeddings; final_norm: RMSNorm before the head.
    """

    model_type = "titan_fog"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 272,
        hidden_size: int = 128,
        intermediate_size: int = 384,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        max_position_embeddings: int = 2048,
        rope_theta: float = 500_000.0,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        norm_placement: str = "post",
        qk_norm: str = "rms",
        activation: str = "xielu",
        softmax_scale: float = 0.25,
        input_scale: float = 50.0,
        post_norm_gain: float = 0.5,
        final_norm: bool = False,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.norm_placement = norm_placement
        self.qk_norm = qk_norm
        self.activation = activation
        self.softmax_scale = softmax_scale
        self.input_scale = input_scale
        self.post_norm_gain = post_norm_gain
        self.final_norm = final_norm
        self.use_cache = use_cache
        kwargs.pop("head_dim", None)  # follows from the sizes
        super().__init__(**kwargs | {"tie_word_embeddings": tie_word_embeddings})
