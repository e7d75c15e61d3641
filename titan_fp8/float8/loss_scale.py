"""Dynamic loss scaling for E5M2 gradients, on the device.

The loss is multiplied by `scale` before backward and the gradients divided by it afterwards. A step whose gradients are not
finite is skipped and the scale backs off; after `growth_interval` good steps in a row it grows. Nothing here waits for the
device, and every rank computes the same, since the gradient norm it is told of is global.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titan_fp8.config import LossScale


class LossScaler:
    """State: scale [] float32, good_steps and skipped [] int64. Scale 1 for ever if not enabled."""

    def __init__(self, config: LossScale, device: torch.device):
        self.config = config
        self.scale = torch.tensor(config.init if config.enable else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, overflow: Tensor) -> Tensor:
        """Move on after a step ([] bool: did its gradients overflow). Returns new scale / old scale, [] float32."""
        config = self.config
        if not config.enable:
            return torch.ones_like(self.scale)
        grow = self.good_steps + 1 >= config.growth_interval
        factor = torch.where(overflow, config.backoff_factor, torch.where(grow, config.growth_factor, 1.0))
        fresh = (self.scale * factor).clamp(config.min, config.max)
        ratio = fresh / self.scale
        self.scale.copy_(fresh)
        self.good_steps.copy_(torch.where(overflow | grow, 0, self.good_steps + 1))
        self.skipped += overflow
        return ratio

    def at_minimum(self) -> Tensor:
        """[] bool: the scale cannot back off any further."""
        return self.scale <= self.config.min

    def state_dict(self) -> dict[str, Tensor]:
        """Copies: a checkpoint is read into what this returns, and `load_state_dict` decides what is taken of it."""
        state = {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}
        return {name: tensor.clone() for name, tensor in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> Tensor:
        """Go on from a `state_dict`. Returns scale now / scale then, [] float32: gradients change by that.

        It is 1 unless loss scaling has been switched on or off since: then the scale is the first one, of `init` or 1.
        """
        then = state["scale"]
        was_on = bool((then != 1) | (state["good_steps"] > 0) | (state["skipped"] > 0))
        if was_on == self.config.enable:
            self.scale.copy_(then)
            self.good_steps.copy_(state["good_steps"])
        self.skipped.copy_(state["skipped"])
        return self.scale / then.to(self.scale.device)
