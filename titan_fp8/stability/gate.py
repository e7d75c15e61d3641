"""Skip a step whose gradient norm is beyond k sigma: decided on the device, before the optimizer, without waiting for it.

With x = ln(norm) of a step and x' of the one before (weights 1/n, later 1/LEVEL, 1/NOISE):

    mean over x        sd^2 = mean over (x - x')^2 / 2    differences, so that a norm that falls has no more spread for it
    outlier:   x > mean + sigma * max(sd, FLOOR)          from step warmup_steps and FEW steps on; it enters nothing
    skipped:   an outlier, but for the one after max_skips_in_a_row of them: so many are no outliers, and all starts anew

So a norm that stays high is accepted in time, and no more than max_skips_in_a_row steps are lost to it. A norm that is not
finite is another's business (train.py) and enters nothing. Every rank has the same norm, hence the same answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVEL, NOISE = 20.0, 200.0  # steps
FEW = 10  # steps from which no spread is known
FLOOR = 0.1  # of sd, in ln(norm): norms of neighbouring steps differ by so much in health


class GradientGate:
    """State, 0-dim, on the device and in the checkpoint: mean, variance, before, last_norm float32; steps, in_a_row,
    outliers, skipped, last_step int64. `outliers` counts all that were found, `skipped` those of them that were skipped."""

    def __init__(
        self, mode: str, sigma: float, warmup_steps: int, max_skips_in_a_row: int, device: torch.device
    ):
        """`mode`: "off" looks at nothing, "warn" counts, "act" skips."""
        self.mode, self.sigma = mode, sigma
        self.warmup_steps, self.max_skips_in_a_row = warmup_steps, max_skips_in_a_row
        self.mean, self.variance, self.before, self.last_norm = (
            torch.zeros((), device=device) for _ in range(4)
        )
        self.steps, self.in_a_row, self.outliers, self.skipped, self.last_step = (
            torch.zeros((), dtype=torch.int64, device=device) for _ in range(5)
        )

    @torch.no_grad()
    def judge(self, step: int, norm: Tensor) -> Tensor:
        """[] bool: whether to skip step number `step`, whose gradient has this norm ([] float32, equal on all ranks)."""
        if self.mode == "off":
            return torch.zeros_like(norm, dtype=torch.bool)
        finite = norm.isfinite() & (norm > 0)
        x = torch.where(finite, norm, 1.0).float().log()
        limit = self.mean + self.sigma * self.variance.sqrt().clamp(min=FLOOR)
        outlier = finite & (self.steps >= FEW) & (x > limit) & (step > self.warmup_steps)
        lasting = outlier & (self.in_a_row >= self.max_skips_in_a_row)
        outlier = outlier & ~lasting
        skipped = outlier & (self.mode == "act")

        for value in (self.mean, self.variance, self.steps):
            value.copy_(torch.where(lasting, 0, value))
        enters = finite & ~outlier
        spread = (x - self.before).square() / 2 - self.variance
        share = torch.clamp(1 / self.steps.clamp(min=1), min=1 / NOISE)
        self.variance += torch.where(enters & (self.steps > 0), share * spread, 0.0)
        self.steps += enters
        share = torch.clamp(1 / self.steps.clamp(min=1), min=1 / LEVEL)
        self.mean += torch.where(enters, share * (x - self.mean), 0.0)
        self.before.copy_(torch.where(enters, x, self.before))
        self.in_a_row.copy_(torch.where(outlier, self.in_a_row + 1, torch.where(finite, 0, self.in_a_row)))
        self.outliers += outlier
        self.skipped += skipped
        self.last_step.copy_(torch.where(outlier, step, self.last_step))
        self.last_norm.copy_(torch.where(outlier, norm, self.last_norm))
        return skipped

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
