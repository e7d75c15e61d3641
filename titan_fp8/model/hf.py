"""State-dict adapter: Hugging Face Llama in and out.

Both sides rotate the halves of a head, so weights keep their rows and only names change; export and re-import is exact.
A tied model has no `lm_head.weight`. FP8 scaling state is not part of a Hugging Face checkpoint and is left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from titan_fp8.errors import UserError

from .args import DecoderArgs
from .decoder import Decoder

_TO_HF = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_FROM_HF = {theirs: ours for ours, theirs in _TO_HF.items()}
_NOT_TRAINED = "rotary_emb.inv_freq"  # a table that old checkpoints carry


def _rename(key: str, table: dict[str, str]) -> str | None:
    number = re.search(r"layers\.(\d+)\.", key)
    if number is None:
        return table.get(key)
    name = table.get(key.replace(f"layers.{number[1]}.", "layers.{}.", 1))
    return None if name is None else name.format(number[1])


def is_llama(args: DecoderArgs) -> bool:
    """Whether the decoder computes what a Llama of these shapes does."""
    return (
        args.norm_placement == "pre"
        and args.qk_norm == "none"
        and args.activation in ("swiglu", "smooth_swiglu")
        and args.final_norm
        and args.input_scale == 1.0
        and abs(args.softmax_scale * args.head_dim**0.5 - 1) < 1e-6
    )


class LlamaAdapter(StateDictAdapter):
    """torchtitan's StateDictAdapter for decoders that are Llama: pre-norm, gated FFN, no QK regularisation, final norm."""

    def __init__(self, model_args: DecoderArgs, hf_assets_path: str | None):
        # torchtitan's default path is a folder of its own tests; a path that is not there means: none given.
        super().__init__(model_args, hf_assets_path if os.path.isdir(hf_assets_path or "") else None)
        self.model_args = model_args

    def check(self) -> None:
        """Raises UserError if the model is not a Llama."""
        args = self.model_args
        if not is_llama(args):
            raise UserError(
                f"Hugging Face's Llama form needs a Llama architecture, got norm {args.norm_placement}, qk_norm "
                f'{args.qk_norm}, activation {args.activation}: use [architecture] preset = "llama", or tools/export_hf.py'
            )

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Our names -> Llama's. Raises UserError if the model is not a Llama."""
        self.check()
        renamed = {}
        for key, value in state_dict.items():
            if key.startswith("float8_state."):
                continue
            name = _rename(key, _TO_HF)
            assert name is not None, f"no Hugging Face name for {key}"
            renamed[name] = value
        return renamed

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Llama's names -> ours. Raises UserError for a weight that this decoder has no place for (a bias, say)."""
        self.check()
        renamed = {}
        for key, value in hf_state_dict.items():
            if key.endswith(_NOT_TRAINED):
                continue
            if key == "lm_head.weight" and self.model_args.tie_embeddings:
                if not torch.equal(value, hf_state_dict["model.embed_tokens.weight"]):
                    raise UserError(
                        "a tied model's lm_head.weight must equal its model.embed_tokens.weight, got different "
                        "ones: set [architecture] tie_embeddings = false"
                    )
                continue
            name = _rename(key, _FROM_HF)
            if name is None:
                raise UserError(
                    f"a Llama checkpoint has no weight {key!r} that this decoder could take: convert a plain Llama"
                )
            renamed[name] = value
        return renamed

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> HuggingFaceStorageReader:
        """Reader of the safetensors in the folder `path`, once their names and shapes are this decoder's, and what its
        config.json, if it has one, says of how they are used.

        torchtitan asks the reader for the weights it wants and never learns of others: a bias, a deeper
        model's last layers or an untied head would be dropped in silence. Raises UserError.
        """
        reader = super().get_hf_storage_reader(path, from_quantized)
        there = {
            name: tuple(entry.size)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if not name.endswith(_NOT_TRAINED)
        }
        with torch.device("meta"):
            ours = self.to_hf(Decoder(self.model_args).state_dict())
        here = {name: tuple(weight.shape) for name, weight in ours.items()}
        wrong = [name for name in here | there if here.get(name) != there.get(name)]
        if wrong:
            name = wrong[0]
            raise UserError(
                f"the weights in {path} must be this model's, but {len(wrong)} differ, first {name}: shape "
                f"{there.get(name, 'missing')} there, {here.get(name, 'missing')} here: set [model] flavor "
                f"and [architecture] vocab_size, tie_embeddings, n_layers as the checkpoint has them"
            )
        for key, theirs, ours in _config_differences(Path(path) / "config.json", self.model_args):
            raise UserError(
                f"the model in {path} must compute what this one does, but its config.json has {key} {theirs}, and here it "
                f"is {ours}: choose a [model] flavor (titan_fp8/model/args.py) that has it, or another checkpoint"
            )
        return reader


def _config_differences(path: Path, args: DecoderArgs) -> Iterator[tuple[str, Any, Any]]:
    """(key, value there, value here) of what the weights' shapes do not tell. A key left out has transformers' default."""
    if not path.exists():
        return
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} must be JSON, got: {error}: copy it again, or remove it") from None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    for key, theirs, ours in (
        ("num_attention_heads", config.get("num_attention_heads", 32), args.n_heads),
        ("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10_000.0)), args.rope_theta),
        ("rms_norm_eps", config.get("rms_norm_eps", 1e-6), args.norm_eps),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
    ):
        if theirs != ours:
            yield key, theirs, ours
    if (scaling := rope.get("rope_type", rope.get("type", "default"))) != "default":
        yield "RoPE scaling", scaling, "unknown: this decoder has none"
    if window is not None and window < args.seq_len:
        yield "sliding_window", window, f"unknown: every token sees all of its seq_len {args.seq_len}"
