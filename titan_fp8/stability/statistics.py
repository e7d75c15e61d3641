"""What the device knows about the health of a step, without waiting for it.

`FiniteWatch`: where a step first went non-finite. Every block's output sets a flag on the device; the trainer adds the loss
and the gradients, and the host looks only where it synchronises anyway (when logging, and before a checkpoint).

`Statistics`: a table of numbers that foretell divergence (arXiv 2505.20524, section 4; 2409.12517, section 4), of the last
micro-batch of an observed step. Of a site (titan_fp8/probe.py), over its elements that are finite:

    mean = sum x / n       rms = sqrt(sum x^2 / n)       amax = max |x|
    kurtosis = mean over samples of n_b sum x^4 / (sum x^2)^2        uncentred, as the FOG authors have it: 3 for a Gaussian

Per sample, for a rank has whole samples under FSDP. Under tensor parallel it has parts of them: the sums are added first.
Attention: logit_max, entropy. FP8 tensors: headroom = log2(fp8_max / (amax scale)), amax_jump = amax / max of its history,
saturated_share and underflowed_share of the elements, and of gradients that come in rms and kurtosis, all from every 8th row
of a sample. So are mean, rms and kurtosis of an FP8 feed-forward's ffn_act, which never stands in memory; with
Smooth-SwiGLU it is the smoothed one, as w2 gets it. amax is of all rows; in these two cases, over all micro-batches.
Matrices: weight_rms and update_rms, of every 64th row, exact. Gated feed-forwards: largest and 99.9 % quantile of |cos|
between the rows of w1 and w3 that meet in a product; the quantile from a histogram of angles, 0.09 degrees wide, since a
rank has some of the rows. Where SwiGLU's outliers come from, it goes to 1.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_fp8.float8.kernels.cosines import row_cosines
from titan_fp8.float8.kernels.moments import (
    AMAX,
    ELEMENTS,
    FOURTHS,
    NONFINITE,
    SATURATED,
    SQUARES,
    SUM,
    UNDERFLOWED,
    total,
)
from titan_fp8.probe import AttentionSite, Observer, Probe, Site


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


Table = dict[str, dict[str, float]]
"""site -> statistic -> value, 6 significant digits. What is missing is unknown in this step."""

ROWS = 64  # one of so many rows of a matrix is looked at, and compared with what it was before the step
BINS = 1000  # of the angle between two rows, 0 to 90 degrees
QUANTILE = 0.999
DIGITS = 6
KURTOSIS, SAMPLES = 7, 8  # columns beside those of the probe


class Statistics:
    """The statistics of one model on one rank. In an observed step, on every rank, the trainer calls in this order:

        begin()             before the last micro-batch
        end()               after its backward
        before_update()     before the optimizer's step
        collect()           after it, and after DelayedScaling.update

    `batch`: samples of a micro-batch on this rank. `tp`: the tensor-parallel group. `scaling`: the model's DelayedScaling,
    for headroom and jump of its tensors. Nothing here has to be in a checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        observer: Observer,
        batch: int,
        tp: Any = None,
        scaling: Any = None,
    ):
        self.observer, self.tp = observer, tp
        self.probes: dict[str, Probe] = {}
        self.attentions: dict[str, AttentionSite] = {}
        self.sites: list[bool] = []  # of the probes: is it a site, with mean, rms, kurtosis and amax
        device = next(model.parameters()).device
        for path, module in model.named_modules():
            if not isinstance(module, Probe):
                continue
            module.make_room(batch, device)
            name = plain(path)
            layer = re.match(r"layers\.\d+\.", name)
            if isinstance(module, AttentionSite):
                self.attentions[name.partition(".probes.")[0]] = module
            elif isinstance(module, Site):
                assert layer is not None, name
                self.probes[layer[0] + name.rpartition(".")[2]] = module
                self.sites.append(True)
            else:
                self.probes[name] = module
                self.sites.append(False)
        self.scaling = scaling
        named = {plain(name): p for name, p in model.named_parameters()}
        self.matrices = {name.removesuffix(".weight"): p for name, p in named.items() if p.dim() == 2}
        gates = [name for name in self.matrices if name.endswith(".feed_forward.w3")]
        self.gated = [name.removesuffix(".w3") for name in gates]
        self.first_rows = [_first_row(p) for p in self.matrices.values()]
        rows = self._rows()
        self.counts = torch.tensor([x.numel() for x in rows], dtype=torch.float64, device=device)  # [W]
        # Indices of matrices whose rows can lie in one tensor: one by one, each would cost several launches.
        self.alike: dict[Any, list[int]] = {}
        for i, x in enumerate(rows):
            self.alike.setdefault((x.shape[1], x.dtype, x.device), []).append(i)
        heights = [len(_inner(self.matrices[f"{name}.w1"])) for name in self.gated]
        heights = torch.tensor(heights, dtype=torch.int64, device=device)
        # Of every row of every gate, one below another's: which gate's it is.
        self.gate_of_row = torch.arange(len(self.gated), device=device).repeat_interleave(heights)
        self._before: list[Tensor] = []

    def begin(self) -> None:
        probes = [*self.probes.values(), *self.attentions.values()]
        torch._foreach_zero_([probe.sums for probe in probes])
        self.observer.on = True

    def end(self) -> None:
        self.observer.on = False

    @torch.no_grad()
    def before_update(self) -> None:
        """Remember every 64th row of each matrix."""
        self._before = self._together()

    def _rows(self) -> list[Tensor]:
        """Rows 0, 64, 128, ... of each whole matrix, as far as they are here."""
        pairs = zip(self.matrices.values(), self.first_rows, strict=True)
        return [_inner(p)[first::ROWS] for p, first in pairs]

    def _together(self) -> list[Tensor]:
        """Copies of these rows, of all matrices that are `alike` one below another's."""
        rows = self._rows()
        return [torch.cat([rows[i] for i in group]) for group in self.alike.values()]

    @torch.no_grad()
    def collect(self) -> Table:
        """The table, the same on every rank. Two all-reduces, three under tensor parallel; one copy to the host."""
        sums, maxima = self._reduced()
        fp8 = []
        if self.scaling is not None:
            jump = self.scaling.jump
            fp8 = [self.scaling.headroom().double(), torch.where(jump > 0, jump, torch.nan).double()]
        numbers = torch.cat([sums, maxima, *fp8]).cpu().numpy()  # the one wait for the device
        # From here on the GPU may be idle: no loop over elements in Python that numpy has too.
        table = _Table(numbers)
        self._tell_probes(table, len(sums))
        self._tell_weights(table)
        if self.scaling is not None:
            table.seek(len(sums) + len(maxima))
            names, weights = self.scaling.names, self.scaling.weights
            jumps = np.array([name not in weights for name in names], bool)
            for statistic in ("headroom", "amax_jump"):
                values = table.take(len(names))
                table.put(names, statistic, values, jumps & ~np.isnan(values))
        return table.found

    def _reduced(self) -> tuple[Tensor, Tensor]:
        """What is added over all ranks, and what is maximised; both [n] float64."""
        samples = total(torch.stack([probe.sums for probe in self.probes.values()]))  # [probes, B, 8]
        amax = samples[..., AMAX].amax(1)
        samples = samples[..., :AMAX]
        if self.tp is not None:
            samples = samples.contiguous()
            dist.all_reduce(samples, group=self.tp)
            # All ranks of the group have the whole sums now, and all add them below.
            samples /= self.tp.size()
        squares = samples[..., SQUARES]
        told = squares > 0
        kurtosis = samples[..., FOURTHS] * samples[..., ELEMENTS] / torch.where(told, squares.square(), 1.0)
        more = torch.stack((torch.where(told, kurtosis, 0.0), told.double()), -1)
        sums = [torch.cat((samples, more), -1).sum(1).flatten()]
        maxima = [amax]
        if self.attentions:
            attention = torch.stack([site.sums for site in self.attentions.values()])
            sums.append(attention[:, 1:].flatten())
            maxima.append(torch.where(attention[:, 2] > 0, attention[:, 0], -torch.inf))
        sums.append(self._weight_sums())
        if self.gated:
            pairs = [
                [_inner(self.matrices[f"{name}.{part}"]) for part in ("w1", "w3")] for name in self.gated
            ]
            cosines = torch.cat([row_cosines(w1, w3) for w1, w3 in pairs])
            bins = (torch.acos(cosines) * (BINS / (math.pi / 2))).long().clamp(max=BINS - 1)
            bins += self.gate_of_row * BINS
            histograms = torch.zeros(len(pairs) * BINS, dtype=torch.float64, device=bins.device)
            sums.append(histograms.scatter_add_(0, bins, torch.ones_like(bins, dtype=torch.float64)))
            largest = torch.zeros(len(pairs), dtype=torch.float64, device=bins.device)
            maxima.append(largest.scatter_reduce_(0, self.gate_of_row, cosines.double(), "amax"))
        whole, largest = torch.cat(sums), torch.cat(maxima)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(whole)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return whole, largest

    def _weight_sums(self) -> Tensor:
        """[3 W] float64: of every 64th row of each matrix the squares, those of its update, and the number of elements."""
        now = self._together()
        assert len(self._before) == len(now), "before_update() comes before collect()"
        changes = [x.float() - y.float() for x, y in zip(now, self._before, strict=True)]
        self._before = []
        heights = [len(x) for x in self._rows()]
        columns = []
        for groups in (now, changes):
            parts: dict[int, Tensor] = {}
            for group, x in zip(self.alike.values(), groups, strict=True):
                parts |= zip(group, x.split([heights[i] for i in group]), strict=True)
            tensors = [parts[i] for i in range(len(parts))]
            tensors = [x if x.numel() else torch.zeros(1, device=x.device) for x in tensors]
            norms = torch.stack(torch._foreach_norm(tensors, 2.0, dtype=torch.float32))
            columns.append(norms.double().square())
        return torch.stack((*columns, self.counts), 1).flatten()

    def _tell_probes(self, table: _Table, maxima: int) -> None:
        names, site = list(self.probes), np.array(self.sites, bool)
        columns = table.take((SAMPLES + 1) * len(names)).reshape(len(names), -1).T
        n, squares, samples = columns[ELEMENTS], columns[SQUARES], columns[SAMPLES]
        table.count(names, columns[NONFINITE])
        there = n > 0
        n = np.where(there, n, 1.0)
        table.put(names, "mean", columns[SUM] / n, there & site)
        table.put(names, "saturated_share", columns[SATURATED] / n, there & ~site)
        table.put(names, "underflowed_share", columns[UNDERFLOWED] / n, there & ~site)
        there &= site | (squares != 0)
        table.put(names, "rms", np.sqrt(squares / n), there)
        table.put(
            names, "kurtosis", columns[KURTOSIS] / np.where(samples, samples, 1.0), there & (samples != 0)
        )
        table.put(names, "amax", table.numbers[maxima : maxima + len(names)], there)
        maxima += len(names)
        names = list(self.attentions)
        entropy, rows = table.take(2 * len(names)).reshape(-1, 2).T
        table.put(names, "logit_max", table.numbers[maxima : maxima + len(names)], rows > 0)
        table.put(names, "entropy", entropy / np.where(rows, rows, 1.0), rows > 0)

    def _tell_weights(self, table: _Table) -> None:
        names = list(self.matrices)
        squares, changes, n = table.take(3 * len(names)).reshape(-1, 3).T
        table.put(names, "weight_rms", np.sqrt(squares / n))
        table.put(names, "update_rms", np.sqrt(changes / n))
        histograms = table.take(BINS * len(self.gated)).reshape(-1, BINS)
        table.seek(table.position + len(self.probes) + len(self.attentions))
        if self.gated:
            above = histograms.cumsum(1) > (1 - QUANTILE) * histograms.sum(1, keepdims=True)
            angles = (above.argmax(1) + 0.5) * math.pi / 2 / BINS
            table.put(self.gated, "alignment_max", table.take(len(self.gated)))
            table.put(self.gated, "alignment_q999", np.cos(angles))


class _Table:
    """Reads numbers in their order, and writes the table."""

    def __init__(self, numbers: np.ndarray):
        self.numbers, self.position = numbers, 0
        self.found: Table = {}

    def take(self, count: int) -> np.ndarray:
        self.seek(self.position + count)
        return self.numbers[self.position - count : self.position]

    def seek(self, position: int) -> None:
        self.position = position

    def put(
        self, sites: list[str], statistic: str, values: np.ndarray, there: np.ndarray | bool = True
    ) -> None:
        """The values of those that are `there`; one that is not finite is an event, and no value."""
        finite = np.isfinite(values)
        self.count(sites, there & ~finite)
        at = (there & finite).nonzero()[0].tolist()
        # All in one go: a call for each would be most of the time.
        digits = f"%.{DIGITS}g " * len(at) % tuple(values[at])
        for i, value in zip(at, map(float, digits.split()), strict=True):
            self.found.setdefault(sites[i], {})[statistic] = value

    def count(self, sites: list[str], events: np.ndarray) -> None:
        """Add non-finite values."""
        for i in events.nonzero()[0].tolist():
            values = self.found.setdefault(sites[i], {})
            values["nonfinite"] = values.get("nonfinite", 0) + round(float(events[i]))


def plain(name: str) -> str:
    """A module's or parameter's name without the wrappers of torch.compile and activation checkpointing."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _inner(p: Tensor) -> Tensor:
    """This rank's part of a parameter, as a plain tensor."""
    part = p.detach()
    part = part.to_local() if isinstance(part, DTensor) else part
    for wrapped in ("rows", "_tensor"):  # our ShardedWeight, torchao's: prepared to be gathered in FP8
        part = getattr(part, wrapped, part)
    return part


def _first_row(p: Tensor) -> int:
    """The first row here that is one of rows 0, 64, 128, ... of the whole matrix."""
    if not isinstance(p, DTensor):
        return 0
    _, (offset, _) = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return -offset % ROWS
