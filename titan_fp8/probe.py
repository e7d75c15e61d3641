"""Places in a model where a step is looked at: sums of which `stability.statistics` makes statistics. No host sync.

An `Observer` switches all probes of a model on and off. It is a plain Python value, so torch.compile makes one graph with
observation and one without, and a step that is not observed costs nothing. What is observed is overwritten, never added to:
activation checkpointing's second forward changes nothing, and of several micro-batches the last one counts.

Of every sample, over the elements that are finite (those that are not are counted, and blind nothing):

    sums [B, 8] float64 = sum x, sum x^2, sum x^4, elements, non-finite elements, saturated and underflowed elements, max |x|

Fourth powers overflow float32 beyond |x| = 2^32 and vanish below 2^-32, where gradients are. So each row of N features is
divided by its own largest magnitude a, summed in float32 (every term lies in [0, 1] and one of them is 1: the relative error
is at most N 2^-24, and with summation in trees about log2(N) 2^-24), and a, a^2, a^4 come in when rows are added in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

SUM, SQUARES, FOURTHS, ELEMENTS, NONFINITE, SATURATED, UNDERFLOWED, AMAX = range(8)
QUERIES = 64  # query rows whose attention is looked at
PIECE = 1 << 24  # elements that are looked at together where nothing is compiled: temporaries of 64 MiB


class Observer:
    """Whether the probes of a model look. One for each model."""

    def __init__(self) -> None:
        self.on = False


class Cast(NamedTuple):
    """How a tensor goes to FP8: |x| * scale saturates above `largest` and rounds to zero up to `smallest`."""

    scale: Tensor  # 0-dim float32
    largest: float
    smallest: float


def _row_sums(x_RN: Tensor, moments: bool, cast: Cast | None) -> tuple[Tensor, Tensor]:
    """([R, 7] float64, max |x| [R] float32)."""
    wide = x_RN.float()
    finite = wide.isfinite()
    wide = torch.where(finite, wide, 0.0)
    size = wide.abs()
    amax = size.amax(-1)
    elements = finite.sum(-1)
    nothing = torch.zeros_like(elements)
    sums = [nothing, nothing, nothing, elements, x_RN.shape[-1] - elements, nothing, nothing]
    if moments:
        unit = torch.where(amax > 0, amax, 1.0)
        y = wide / unit[:, None]
        y2 = y * y
        a = unit.double()
        sums[SUM] = y.sum(-1).double() * a
        sums[SQUARES] = y2.sum(-1).double() * a**2
        sums[FOURTHS] = (y2 * y2).sum(-1).double() * a**4
    if cast is not None:
        scaled = size * cast.scale
        sums[SATURATED] = (scaled > cast.largest).sum(-1)
        sums[UNDERFLOWED] = ((scaled <= cast.smallest) & (size > 0)).sum(-1)
    return torch.stack([column.double() for column in sums], -1), amax


@torch._dynamo.allow_in_graph
def sample_sums(
    x: Tensor, batch: int, groups: int = 1, moments: bool = True, cast: Cast | None = None
) -> Tensor:
    """The sums [B, 8] of x [..., N], whose rows lie in the order (group, sample, position); B = `batch`.

    Without `moments` those of x, x^2 and x^4 are 0; without `cast` so are the counts of what it does.
    """
    with torch.no_grad():
        x_RN = x.detach().reshape(-1, x.shape[-1])
        # A compiler fuses all of it into one pass; without one, temporaries must stay small.
        compiling = torch._guards.TracingContext.try_get() is not None
        pieces = [x_RN] if compiling else x_RN.split(max(1, PIECE // x_RN.shape[1]))
        parts = [_row_sums(piece, moments, cast) for piece in pieces]
        sums, amax = (
            torch.cat(column) if len(column) > 1 else column[0] for column in zip(*parts, strict=True)
        )
        sums = sums.view(groups, batch, -1, AMAX).sum((0, 2))
        amax = amax.view(groups, batch, -1).amax((0, 2)).double()
        return torch.cat((sums, amax[:, None]), 1)


class Probe(nn.Module):
    """A place with sums. Empty until somebody who knows the batch size makes room (`Statistics`)."""

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(0, AMAX + 1, dtype=torch.float64), persistent=False)

    def room(self, batch: int) -> tuple[int, ...]:
        """Shape of `sums`."""
        return (batch, AMAX + 1)


class Site(Probe):
    """Looks at x [B, ..., N] on its way through the model, and returns it as it is."""

    def __init__(self, observer: Observer):
        super().__init__()
        self.observer = observer

    def forward(self, x: Tensor) -> Tensor:
        if self.observer.on and self.training:
            self.sums.copy_(sample_sums(x, len(self.sums)))
        return x

    def pair(self, a: Tensor, b: Tensor) -> None:
        """Look at two tensors as if they were one."""
        if self.observer.on and self.training:
            sums = [sample_sums(x, len(self.sums)) for x in (a, b)]
            amax = torch.maximum(sums[0][:, AMAX:], sums[1][:, AMAX:])
            self.sums.copy_(torch.cat(((sums[0] + sums[1])[:, :AMAX], amax), 1))


@torch._dynamo.allow_in_graph
def attention_sums(q_BSHC: Tensor, k_BSKC: Tensor, softmax_scale: float) -> Tensor:
    """[3] float64: largest logit, summed entropy (nats) and number of the looked-at rows of causal attention.

    Of every sample and head QUERIES evenly spaced queries, the last one among them; logits in float32 of
    q, k [B, S, heads, C] as attention gets them. Elements that are not finite are zeros here: the sites q
    and k tell of them.
    """
    with torch.no_grad(), torch.autocast(q_BSHC.device.type, enabled=False):
        q, k = q_BSHC.detach(), k_BSKC.detach()
        seq_len = q.shape[1]
        count = min(QUERIES, seq_len)
        at = torch.arange(1, count + 1, device=q.device) * seq_len // count - 1
        q, k = q.index_select(1, at).float(), k.float()
        q, k = (torch.where(x.isfinite(), x, 0.0) for x in (q, k))
        q_BKRnC = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)
        logits = q_BKRnC.flatten(2, 3) @ k.permute(0, 2, 3, 1) * softmax_scale
        later = torch.arange(seq_len, device=q.device) > at[:, None]
        logits = logits.unflatten(2, (-1, count)).masked_fill(later, -torch.inf)
        logp = logits - logits.logsumexp(-1, keepdim=True)
        entropy = -torch.where(later, 0.0, logp.exp() * logp).sum(-1)
        rows = torch.full((), entropy.numel(), dtype=torch.float64, device=q.device)
        return torch.stack((logits.amax().double(), entropy.double().sum(), rows))


class AttentionSite(Probe):
    """Looks at the logits of attention. `sums`: see `attention_sums`."""

    def __init__(self, observer: Observer):
        super().__init__()
        self.observer = observer

    def room(self, batch: int) -> tuple[int, ...]:
        return (3,)

    def forward(self, q_BSHC: Tensor, k_BSKC: Tensor, softmax_scale: float) -> None:
        if self.observer.on and self.training:
            self.sums.copy_(attention_sums(q_BSHC, k_BSKC, softmax_scale))


def sites(observer: Observer, *names: str) -> nn.ModuleDict:
    """name -> Site, for a module's attribute `probes`."""
    return nn.ModuleDict({name: Site(observer) for name in names})
