"""Parts of the small training experiments: a decoder on bytes, batches that depend on the step alone, and a step."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not
for noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(noisy).setLevel(logging.ERROR)

from titan_fp8 import device as platform  # noqa: E402

platform.install()  # before anything of torchtitan is imported

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from titan_fp8.config import Architecture  # noqa: E402
from titan_fp8.float8.convert import scaling_state  # noqa: E402
from titan_fp8.loss import IGNORE_INDEX  # noqa: E402
from titan_fp8.model.args import DecoderArgs  # noqa: E402
from titan_fp8.model.decoder import Decoder  # noqa: E402
from titan_fp8.stability.statistics import Statistics  # noqa: E402

VOCABULARY = 272  # bytes and a few more; a multiple of 16
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}


@dataclass(frozen=True)
class Shape:
    dim: int
    layers: int
    heads: int
    ffn: int
    seq_len: int
    batch: int


def build(shape: Shape, seed: int, preset: str = "llama", activation: str | None = None) -> Decoder:
    """On CPU, so that the weights depend on the seed alone."""
    args = DecoderArgs(
        dim=shape.dim, n_layers=shape.layers, n_heads=shape.heads, n_kv_heads=shape.heads, ffn_dim=shape.ffn,
        seq_len=shape.seq_len, tie_embeddings=False,
    )  # fmt: skip
    args.apply(Architecture(preset=preset, activation=activation, vocab_size=VOCABULARY))  # type: ignore
    model = Decoder(args)
    torch.manual_seed(seed)
    model.init_weights()
    return model


class Text:
    """Batches of bytes at places drawn from `seed` and the step's number."""

    def __init__(self, text: bytes, shape: Shape, device: torch.device, seed: int = 0):
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.shape, self.device, self.seed = shape, device, seed

    def generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + step)

    def windows(self, generator: torch.Generator) -> Tensor:
        """[B, S + 1] int64 on CPU."""
        shape = self.shape
        starts = torch.randint(0, len(self.bytes) - shape.seq_len - 1, (shape.batch, 1), generator=generator)
        return self.bytes[starts + torch.arange(shape.seq_len + 1)].long()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(tokens, labels) [B, S] on the device."""
        windows = self.windows(self.generator(step)).to(self.device)
        return windows[:, :-1], windows[:, 1:]


class Trained:
    """A model, its optimizer, and the steps of training. As titan_fp8/train.py does it, on one device.

    loss_scale: for gradients that pass through float16. Gradients are divided by it before they are clipped.
    statistics: if set, each step is observed, and `statistics.collect()` tells of it afterwards.
    """

    statistics: Statistics | None = None

    def __init__(
        self,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        loss_scale: float = 1.0,
    ):
        self.model, self.optimizer, self.device, self.loss_scale = model, optimizer, device, loss_scale
        self.scaling = scaling_state(model)
        if self.scaling is not None:
            self.scaling.stepped = getattr(optimizer, "amaxes", {})  # torch's AdamW takes none

    def step(self, tokens: Tensor, labels: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """(mean loss, gradient norm), on the device. The gradients, clipped, stay until the next step."""
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao's
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if self.statistics is not None:
            self.statistics.begin()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(tokens, labels) / (labels != IGNORE_INDEX).sum()
        (loss * self.loss_scale).backward()
        if self.statistics is not None:
            self.statistics.end()
            self.statistics.before_update()
        parameters = list(self.model.parameters())
        if self.loss_scale != 1.0:
            torch._foreach_div_([p.grad for p in parameters], self.loss_scale)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        if self.scaling is not None:
            self.scaling.update()
        return loss.detach(), norm


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type
