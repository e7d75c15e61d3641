"""Registers the model "titan_fp8" and the converter "titan_fp8.float8" with torchtitan.

This is the target of `[experimental] custom_import`; importing it is its only effect.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.protocols.model_converter import register_model_converter
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.tools.logging import logger

from titan_fp8.data import tokenizer as tokenizers
from titan_fp8.data.dataset import build_dataloader
from titan_fp8.errors import UserError
from titan_fp8.float8.convert import Float8Converter
from titan_fp8.model.args import FLAVORS
from titan_fp8.model.decoder import Decoder
from titan_fp8.model.hf import LlamaAdapter
from titan_fp8.model.parallelize import parallelize
from titan_fp8.optim import Fp8AdamW, adopt, destinations, without_blocks
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


SETTINGS = "param_groups."  # how torch begins their names in an optimizer's flat state


class Optimizers(OptimizersContainer):
    """torchtitan's container, which also takes moments that were saved in another format, FP8 or not, or other blocks.

    `prepare_to_load(saved)`, what a checkpoint holds for the optimizer (names, and the shapes of tensors), makes the next
    `state_dict` ask for what is there. Without it torch's checkpointing finds names missing.

    A load brings steps and moments; learning rate, betas, eps and weight decay stay as configured.
    """

    saved: Mapping[str, Any] = MappingProxyType({})

    def prepare_to_load(self, saved: Mapping[str, Any]) -> None:
        self.saved = saved

    def state_dict(self) -> dict[str, Any]:
        own = super().state_dict()
        if not self.saved:
            return own
        wanted = destinations(own, self.saved)
        return {name: value for name, value in wanted.items() if not name.startswith(SETTINGS)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = {}
        own = self.state_dict()
        settings = {name: value for name, value in own.items() if name.startswith(SETTINGS)}
        super().load_state_dict(adopt(state_dict, own) | settings)


class Schedules(LRSchedulersContainer):
    """torchtitan's learning rate schedules. A load brings the step; the rate at it is what the configuration says.

    Args: as of torchtitan's TrainSpec.build_lr_schedulers_fn.
    """

    def __init__(self, optimizers: OptimizersContainer, config: Any, training_steps: int):
        self.schedulers = build_lr_schedulers(optimizers, config, training_steps).schedulers

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for scheduler in self.schedulers:
            base_lrs = scheduler.base_lrs
            scheduler.load_state_dict(copy.deepcopy(state_dict))
            scheduler.base_lrs = base_lrs
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            scheduler._last_lr = [lr * factor for lr, factor in zip(base_lrs, factors, strict=True)]
            for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = lr


def build_optimizers(model_parts: list[nn.Module], config: Any, parallel_dims: Any) -> OptimizersContainer:
    """torchtitan's TrainSpec.build_optimizers_fn; `config` is [optimizer] with our [optimizer.fp8]."""
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    fp8 = config.fp8
    if not fp8.enable:
        return Optimizers(model_parts, getattr(torch.optim, config.name), settings | {"fused": True})
    names = ("first_moment", "second_moment", "block_size", "round_moments", "round_parameters")
    optimizers = Optimizers(model_parts, Fp8AdamW, settings | {name: getattr(fp8, name) for name in names})
    parameters = [(name, p) for model in model_parts for name, p in model.named_parameters()]
    coded = any(optimizer.coded for optimizer in optimizers)
    if coded and (ragged := without_blocks(parameters, fp8.block_size)):
        logger.warning(
            f"The FP8 moments of {len(ragged)} matrices are float32: tensor parallel cuts their rows inside a block of "
            f"{fp8.block_size}. A smaller optimizer.fp8.block_size may divide them. They are: {', '.join(ragged)}"
        )
    return optimizers


register_train_spec(
    "titan_fp8",
    TrainSpec(
        model_cls=Decoder,
        model_args=FLAVORS,
        parallelize_fn=parallelize,
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=Schedules,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_cross_entropy_loss,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=build_metrics_processor,
        state_dict_adapter=LlamaAdapter,
    ),
)
register_model_converter(Float8Converter, "titan_fp8.float8")
