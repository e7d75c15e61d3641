"""Places in a model where a step is looked at: sums of which `stability.statistics` makes statistics. No host sync.

An `Observer` switches all probes of a model on and off. It is a plain Python value, so torch.compile makes one graph with
observation and one without, and a step that is not observed costs nothing. What is observed is overwritten, never added to:
activation checkpointing's second forward changes nothing, and of several micro-batches the last one counts.

Of every sample sums [B, P, 8] float64 (titan_fp8/float8/kernels/moments.py), in P parts that whoever reads adds up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titan_fp8.float8.kernels.moments import COLUMNS, look, partials

QUERIES = 32  # query rows whose attention is looked at


class Observer:
    """Whether the probes of a model look. One for each model."""

    def __init__(self) -> None:
        self.on = False


class Probe(nn.Module):
    """A place with sums. Empty until somebody who knows the batch size makes room (`Statistics`)."""

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(0, 1, COLUMNS, dtype=torch.float64), persistent=False)

    def make_room(self, batch: int, device: torch.device) -> None:
        """For samples of a micro-batch on this rank."""
        shape = (batch, partials(batch, device), COLUMNS)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)


class Site(Probe):
    """Looks at x [B, ..., N] on its way through the model, and returns it as it is."""

    def __init__(self, observer: Observer):
        super().__init__()
        self.observer = observer

    def forward(self, x: Tensor) -> Tensor:
        if self.observer.on and self.training:
            look(x, self.sums)
        return x

    def pair(self, a: Tensor, b: Tensor) -> None:
        """Look at two tensors as if they were one."""
        if self.observer.on and self.training:
            look(a, self.sums)
            look(b, self.sums, add=True)


@torch._dynamo.allow_in_graph
def attention_sums(q_BSHC: Tensor, k_BSKC: Tensor, softmax_scale: float) -> Tensor:
    """[3] float64: largest logit, summed entropy (nats) and number of the looked-at rows of causal attention.

    Of every sample and head QUERIES evenly spaced queries, the last one among them; logits in float32 of
    q, k [B, S, heads, C] as attention gets them. Elements that are not finite are zeros here: the sites q
    and k tell of them. With d = logit - max, Z = sum exp d: entropy = log Z - sum d exp(d) / Z.
    """
    with torch.no_grad(), torch.autocast(q_BSHC.device.type, enabled=False):
        q, k = q_BSHC.detach(), k_BSKC.detach()
        seq_len = q.shape[1]
        count = min(QUERIES, seq_len)
        at = torch.arange(1, count + 1, device=q.device) * seq_len // count - 1
        q, k = (torch.where(x.isfinite(), x, 0.0) for x in (q.index_select(1, at), k))
        q_BKRnC = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)
        # k is copied by whole rows and read as its transpose: the transposed copy took 0.16 ms a layer (8B shape, H200).
        q, k = q_BKRnC.flatten(2, 3).flatten(0, 1), k.transpose(1, 2).flatten(0, 1).mT
        if (
            q.device.type == "cuda" and q.dtype.itemsize == 2
        ):  # products of 16-bit numbers are exact in float32
            logits = torch.bmm(q, k, out_dtype=torch.float32)
        else:
            logits = q.float() @ k.float()
        later = torch.arange(seq_len, device=q.device) > at[:, None]
        logits = (logits.unflatten(1, (-1, count)) * softmax_scale).masked_fill(later, -torch.inf)
        largest = logits.amax(-1, keepdim=True)
        below = logits - largest
        p = below.exp()
        z = p.sum(-1)
        entropy = z.log() - torch.where(later, 0.0, p * below).sum(-1) / z
        rows = torch.full((), entropy.numel(), dtype=torch.float64, device=q.device)
        return torch.stack((largest.amax().double(), entropy.double().sum(), rows))


class AttentionSite(Probe):
    """Looks at the logits of attention. `sums` [3]: see `attention_sums`."""

    def __init__(self, observer: Observer):
        super().__init__()
        self.observer = observer

    def make_room(self, batch: int, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def forward(self, q_BSHC: Tensor, k_BSKC: Tensor, softmax_scale: float) -> None:
        if self.observer.on and self.training:
            self.sums.copy_(attention_sums(q_BSHC, k_BSKC, softmax_scale))


def sites(observer: Observer, *names: str) -> nn.ModuleDict:
    """name -> Site, for a module's attribute `probes`."""
    return nn.ModuleDict({name: Site(observer) for name in names})
