"""Feed-forward activations: xIELU, GELU, SwiGLU, Smooth-SwiGLU.

    xIELU(x) = alpha_p x^2 + beta x                                  x > 0
             = alpha_n (expm1(min(x, eps)) - x) + beta x             x <= 0
    alpha_p = softplus(a_p)     alpha_n = beta + softplus(a_n)       a_p, a_n trained, one of each per layer

    SwiGLU(u, g)        = u * swish(g)
    Smooth-SwiGLU(u, g) = s * u * swish(g), then w2(.) / s           by token: s = 1 / max_i |u_i|, constant to autograd

xIELU is FOG's (arXiv 2505.20524, section 3); its integral form keeps the slope linear in x, so that outputs stay within a
small factor of inputs, unlike a gate's product of two learned projections. Smooth-SwiGLU (arXiv 2409.12517, section 4)
takes the linear branch's size out before the FP8 cast and puts it back behind the GEMM: mathematically nothing changes.
Here it is by token; by feature it lives where the casts are, in titan_fp8/float8/feed_forward.py.

Each computes in float32 and returns its input's dtype.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_fp8.tensor_parallel import Ranks, all_max, shared

GATED = ("swiglu", "smooth_swiglu")


class XIELU(nn.Module):
    """xIELU with trained curvatures, started at alpha_p = alpha_n = 0.8. Elementwise, any shape."""

    beta = 0.5
    eps = -1e-6
    initial_alpha = 0.8
    tp: Ranks | None = None

    def __init__(self) -> None:
        super().__init__()
        # Shape [1], not []: FSDP2 shards along a dimension.
        self.a_p = nn.Parameter(torch.empty(1))
        self.a_n = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        nn.init.constant_(self.a_p, math.log(math.expm1(self.initial_alpha)))
        nn.init.constant_(self.a_n, math.log(math.expm1(self.initial_alpha - self.beta)))

    def alphas(self) -> Tensor:
        """(alpha_p, alpha_n) [2] float32, differentiable."""
        a_p, a_n = shared(self.a_p, self.tp), shared(self.a_n, self.tp)
        return torch.cat((F.softplus(a_p.float()), self.beta + F.softplus(a_n.float())))

    def forward(self, x: Tensor) -> Tensor:
        return xielu(x, shared(self.a_p, self.tp), shared(self.a_n, self.tp), self.beta, self.eps)


def xielu(x: Tensor, a_p: Tensor, a_n: Tensor, beta: float = 0.5, eps: float = -1e-6) -> Tensor:
    """xIELU of x (any shape) with raw curvature parameters a_p, a_n of shape [1]."""
    wide = x if x.dtype == torch.float64 else x.float()
    alpha_p = F.softplus(a_p.to(wide.dtype))
    alpha_n = beta + F.softplus(a_n.to(wide.dtype))
    negative = alpha_n * (torch.expm1(wide.clamp(max=eps)) - wide)
    # The square is taken of the positive part only: a large negative x must not send inf * 0 into the gradient.
    positive = alpha_p * wide.clamp(min=0).square()
    return (torch.where(wide > 0, positive, negative) + beta * wide).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh form."""
    return F.gelu(x, approximate="tanh")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """up * swish(gate), elementwise."""
    wide = gate if gate.dtype == torch.float64 else gate.float()
    return (F.silu(wide) * up).to(gate.dtype)


def smooth_swiglu(gate: Tensor, up: Tensor, tp: Ranks | None = None) -> tuple[Tensor, Tensor]:
    """(z, 1/s): z = s * up * swish(gate), of the inputs' shape [..., F]; 1/s of shape [..., 1] goes behind the GEMM.

    s is a power of two near 1 / max_i |up_i|, so that scaling loses no bit; a token whose branch is all zeros has s = 1.
    With `tp` a rank has some of the features, and s is that of all.
    """
    size = all_max(up.detach().abs().amax(dim=-1, keepdim=True).float(), tp)
    exponent = torch.where((size > 0) & size.isfinite(), size, 1.0).log2().ceil()
    exponent = exponent.clamp(-126, 126)  # s and 1/s stay normal float32 numbers
    wide = gate if gate.dtype == torch.float64 else gate.float()
    z = F.silu(wide) * (up * torch.exp2(-exponent))
    return z.to(gate.dtype), torch.exp2(exponent).to(gate.dtype)
