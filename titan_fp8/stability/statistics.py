"""What the device knows about the health of a step, without waiting for it.

First cut: where a step first went non-finite. Every block's output sets a flag on the device; the trainer adds the loss and
the gradients, and the host looks only where it synchronises anyway (when logging, and before a checkpoint).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class FiniteWatch:
    """Flags for one model on one rank. The outputs watched are the blocks', in order, by name."""

    def __init__(self, blocks: dict[str, nn.Module], parameters: list[str], device: torch.device):
        self.names = list(blocks)
        self.parameters = parameters
        self._now = torch.zeros(len(blocks), dtype=torch.bool, device=device)
        # The first bad step: its number (0: none yet), loss, non-finite blocks and parameters.
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.blocks = torch.zeros_like(self._now)
        self.gradients = torch.zeros(len(parameters), dtype=torch.bool, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.longest = torch.zeros_like(self.in_a_row)
        self.total = torch.zeros_like(self.in_a_row)
        for index, block in enumerate(blocks.values()):
            block.register_forward_hook(self._hook(index))

    def _hook(self, index: int):
        def look(module: nn.Module, args: object, output: Tensor) -> None:
            if module.training:
                self._now[index] |= ~output.detach().isfinite().all()

        return look

    @torch.no_grad()
    def record(self, step: int, bad: Tensor, loss: Tensor, gradient_norms: Tensor) -> None:
        """Take in a finished step. bad: [] bool, equal on all ranks; loss: []; gradient_norms: [P], one per parameter."""
        self.in_a_row.copy_(torch.where(bad, self.in_a_row + 1, 0))
        self.longest.copy_(torch.maximum(self.longest, self.in_a_row))
        self.total += bad
        first = bad & (self.step == 0)
        self.blocks.copy_(torch.where(first, self._now, self.blocks))
        self.gradients.copy_(torch.where(first, ~gradient_norms.isfinite(), self.gradients))
        self.loss.copy_(torch.where(first, loss.float(), self.loss))
        self.step.copy_(torch.where(first, step, self.step))
        self._now.zero_()

    def describe(self) -> str:
        """Where the first bad step went wrong, in words. Collective: every rank calls it, after a bad step."""
        blocks, loss = self.blocks.int(), (~self.loss.isfinite()).int()
        if dist.get_world_size() > 1:
            dist.all_reduce(blocks, op=dist.ReduceOp.MAX)
            dist.all_reduce(loss, op=dist.ReduceOp.MAX)
        step = int(self.step)
        if bool(blocks.any()):
            where = f"the loss is not finite, first non-finite value in the output of {self.names[int(blocks.argmax())]}"
        elif bool(loss):
            where = "the loss is not finite, all blocks' outputs are: the LM head or the loss overflowed"
        else:
            bad = self.gradients.nonzero().flatten().tolist()
            # Backward runs from the last layer to the first: the last bad parameter is where it began.
            last = self.parameters[bad[-1]] if bad else "an unknown parameter"
            where = f"the loss is finite but gradients are not, beginning at {last}"
        return f"step {step}: {where}"

    def forget(self) -> None:
        """Start anew after the host has dealt with what was recorded (counts of the whole run stay)."""
        self.step.zero_()
        self.longest.copy_(self.in_a_row)
