"""Held-out loss: the mean over the same held-out tokens each time, in nats per token and bits per byte of text."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.validate import BaseValidator
from torchtitan.tools import utils

from titan_fp8.data.dataset import build_validation_dataloader


class Validator(BaseValidator):
    """torchtitan's validator, weighted by tokens (its own averages batch means) and with bits per byte."""

    def __init__(
        self,
        job_config: Any,
        dataloader: Any,
        token_bytes: torch.Tensor,
        context: Any,
        amp: AbstractContextManager[None],
        metrics_processor: Any,
    ):
        super().__init__(job_config)
        self.dataloader = dataloader
        self.token_bytes = token_bytes.to(utils.device_type)
        self.context = context
        self.amp = amp
        self.metrics_processor = metrics_processor

    def should_validate(self, step: int) -> bool:
        """Step 1, every freq steps, and the last."""
        return super().should_validate(step) or step == self.job_config.training.steps

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        (model,) = model_parts
        self.metrics_processor.begin_validation()
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=utils.device_type)  # nats, tokens, bytes
        limit = self.job_config.validation.steps
        for batch, (inputs, labels) in enumerate(self.dataloader):
            if batch == limit:
                break
            self.metrics_processor.ntokens_since_last_log += labels.numel()
            labels = labels.to(utils.device_type)
            with self.context(), self.amp:
                nats = model(inputs["input"].to(utils.device_type), labels)
            valid = labels[labels != IGNORE_INDEX]
            sums += torch.stack(
                [nats.double(), torch.tensor(valid.numel()).to(sums), self.token_bytes[valid].sum().double()]
            )
        if dist.get_world_size() > 1:
            dist.all_reduce(sums)
        nats_total, tokens, text_bytes = sums.tolist()
        model.train()
        self.metrics_processor.log_validation(
            loss=nats_total / tokens,
            step=step,
            extra_metrics={"bits_per_byte": nats_total / math.log(2) / max(text_bytes, 1)},
        )


def build_validator(
    job_config: Any,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: Any,
    parallel_dims: Any,
    validation_context: Any,
    maybe_enable_amp: AbstractContextManager[None],
    metrics_processor: Any,
    **unused: Any,
) -> Validator:
    """torchtitan's TrainSpec.build_validator_fn. The loss is the model's own, hence no use for loss_fn."""
    del parallel_dims, unused
    return Validator(
        job_config,
        build_validation_dataloader(dp_world_size, dp_rank, tokenizer, job_config),
        torch.from_numpy(tokenizer.token_byte_lengths()),
        validation_context,
        maybe_enable_amp,
        metrics_processor,
    )
