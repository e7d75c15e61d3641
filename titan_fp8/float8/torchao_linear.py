"""torchao's Float8Linear on this rank's part of the weight (titan_fp8/tensor_parallel.py).

torchao's own tensor-parallel styles gather activations in FP8, after an all-reduce for each tensor's amax; gloo cannot carry
them. Here activations travel in the compute dtype, and each rank scales its part of the weight, and of what lies between two
split linears, by amaxes of that part: at least as fine a scale as one process has, and no collective for it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args

from titan_fp8.tensor_parallel import Ranks, local, scatter_sequence


class TorchaoLinear(Float8Linear):
    """torchao's Float8Linear without bias; with `tp` its outputs are parts of a sum, which it scatters."""

    tp: Ranks | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight = local(self.weight)
        y = matmul_with_hp_or_float8_args.apply(x, weight.t(), self.linear_mm_config, self.config)
        return scatter_sequence(y, self.tp)


def adopt(model: nn.Module) -> None:
    """Make every Float8Linear of torchao's in the model one of these, in place."""
    for module in model.modules():
        if type(module) is Float8Linear:
            assert module.bias is None
            module.__class__ = TorchaoLinear
