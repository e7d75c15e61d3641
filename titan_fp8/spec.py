"""Registers the model "titan_fp8" and the converter "titan_fp8.float8" with torchtitan.

This is the target of `[experimental] custom_import`; importing it is its only effect.
"""

from __future__ import annotations

from typing import Any

from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.protocols.model_converter import register_model_converter
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from titan_fp8.data import tokenizer as tokenizers
from titan_fp8.data.dataset import build_dataloader
from titan_fp8.errors import UserError
from titan_fp8.float8.convert import Float8Converter
from titan_fp8.model.args import FLAVORS
from titan_fp8.model.decoder import Decoder
from titan_fp8.model.hf import LlamaAdapter
from titan_fp8.model.parallelize import parallelize
from titan_fp8.stability.processor import build_metrics_processor
from titan_fp8.validate import build_validator


def build_tokenizer(job_config: Any) -> tokenizers.Tokenizer:
    """The run's tokeniser. Settles the model's vocabulary: the tokeniser's, rounded up to 16, unless it is configured."""
    tokenizer = tokenizers.build_tokenizer(job_config.data)
    needed = tokenizer.get_vocab_size()
    architecture = job_config.architecture
    if architecture.vocab_size is None:
        architecture.vocab_size = -(-needed // 16) * 16
    elif architecture.vocab_size < needed:
        raise UserError(
            f"[architecture] vocab_size must hold the tokeniser's {needed} tokens, got {architecture.vocab_size}: raise "
            f"it to {-(-needed // 16) * 16} or leave it out"
        )
    return tokenizer


register_train_spec(
    "titan_fp8",
    TrainSpec(
        model_cls=Decoder,
        model_args=FLAVORS,
        parallelize_fn=parallelize,
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_cross_entropy_loss,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=build_metrics_processor,
        state_dict_adapter=LlamaAdapter,
    ),
)
register_model_converter(Float8Converter, "titan_fp8.float8")
