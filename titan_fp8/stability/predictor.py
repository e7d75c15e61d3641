"""Risk of divergence from rows of metrics, before the loss shows it. numpy only: runs beside training and on old logs.

A row is a step and {series: value}. A series is named "layers.3.ffn_act.kurtosis" (layer, site, statistic), or "loss".
KINDS says which statistics are read and how; each is mapped to a y that grows with danger (log-kurtosis, minus headroom).

Trend, per series. A regression line through the past with weights w_i = exp(-(t - t_i) / (m d)); m is the memory in rows, d
the series' mean spacing in steps, so gaps need no care and a row every 10 steps is as good as one every step. u_i = t_i - t:

    S_k = sum w_i u_i^k    M_k = sum w_i y_i u_i^k    Q_k = sum w_i^2 u_i^k        moved to a new t by a shift of origin
    D = S_0 (S_2 + r) - S_1^2     level = ((S_2 + r) M_0 - S_1 M_1) / D     slope = (S_0 M_1 - S_1 M_0) / D

(r: ridge on the slope, felt by the first few rows only.) The line's height at horizon H is the sum of w_i (p + q u_i) y_i:

    p = (S_2 + r - H S_1) / D    q = (H S_0 - S_1) / D    variance = f s^2 (p^2 Q_0 + 2 p q Q_1 + q^2 Q_2)

s is the noise, and f > 1 pays for its correlation from row to row. An innovation e = y - prediction enters clipped to +-c s,
and s is the weighted mean of 1.2533 |e clipped| (sigma of a Gaussian): one outlier moves line and noise by little, a lasting
change moves both.

Nobody knows a run's time scale beforehand (300 steps or 10^6). So each series has two lines: one of short memory, and one
whose memory is a share of the series' age. H is a multiple of the memory and at most a share of the age: no line looks
further ahead than the past bears out.

    evidence of a trend = ceiling * Phi((line(H) - limit) / sd(H) - g)      g = sqrt(2 ln(series)): as far as chance reaches
    limit = max(fixed, mean of y over the run + growth)                     a plateau becomes health in time
    steps to saturation, quantile p: the first T with Phi((line(T) - limit) / sd(T)) = p, by a quadratic; or never

Shock, per series: x is y itself (a jump of amax, in bits), its innovation, or the innovation over s against the longer line
(loss and gradient norm); evidence = ceiling * sigmoid((x - at) / width). A non-finite value anywhere is an event with
evidence of its own and changes no line, so a NaN blinds nothing; but gradients that overflow under a loss scale are how it
finds its height, and none. Shocks and events fade with a half-life, and so does the trend of a series that stops.

    risk = 1 - product over witnesses of (1 - largest evidence among the witness' series)                       (noisy or)

Layers move together, so among the series of one witness (kurtosis, headroom, ...) only the largest counts. Witnesses measure
different things and add up; none can veto another, and a ceiling says how far one can go alone. Each evidence is a number
that a person can check; the largest is named as the cause. Cost: O(1) per row and series, 25 floats kept for each.

The scale: 0.5 is the alarm. No shock alone reaches it, and the trend of one witness does; 0.9 and more takes two witnesses
or a value that was not finite. It is no probability: too few runs are known.

Where the numbers come from: the papers (arXiv 2505.20524, 2409.12517, 2309.14322, 2402.17762), and one half of 48 recorded
runs (studies/divergence; the other half judges them, studies/divergence/backtest.json). On the half they were chosen on,
the alarm is the same at any threshold from 0.3 to 0.75. Those are runs of 400 steps of a 3M model whose learning rate was
driven up: at other scales the numbers are a guess, and tools/backtest.py tells on the runs that there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from titan_fp8.errors import UserError

Floats = NDArray[np.float64]
Put = NDArray[np.intp] | slice  # which series


@dataclass(frozen=True)
class Kind:
    """How the series of some statistics are read. Limits, noise and shocks are in units of y."""

    witness: str
    statistics: tuple[str, ...]

    log: bool = False
    """y = factor * ln(v) instead of factor * v. v <= 0 is unknown, unless `smallest` is positive."""
    factor: float = 1.0
    complement: bool = False
    """v = 1 - |value|: what is left to the end of the scale."""
    smallest: float = 0.0
    """v is raised to this: below it differences mean nothing."""
    noise: float = 0.0
    """s is at least this: less is the measurement's own scatter, and constant series must not divide by 0."""

    limit: float = math.inf
    growth: float = -math.inf
    trend: float = 0.0
    """Ceiling of the trend's evidence."""

    shock: Literal["none", "value", "innovation", "score"] = "none"
    at: float = math.inf
    width: float = 1.0
    shock_ceiling: float = 0.0
    shock_witness: str = ""
    """Where shocks count, if elsewhere than trends."""


BITS = 1 / math.log(2)

KINDS: tuple[Kind, ...] = (
    # 3 for a Gaussian, about 30 for a product or square of them (SwiGLU, xIELU): 100 is above any healthy start. FOG's
    # diverging runs grow by orders of magnitude over their own past. Calm recordings rise to 100 to 800 as they learn, and
    # their lines head for up to 15 times the mean so far.
    Kind(
        "kurtosis", ("kurtosis",), log=True, noise=0.03,
        limit=math.log(100), growth=math.log(20), trend=0.8,
    ),
    # Bits. At 0 a step's largest element is clamped, which delayed scaling does in health (a debug run: 21 tensors in one
    # step, by up to 2.4x). A level of -1 clamps the largest elements of every step to half. A jump of 8x is one outlier, and
    # no alarm alone; how far it was clamped and how far it jumped are one and the same observation, so one witness.
    Kind(
        "headroom", ("headroom",), factor=-1, noise=0.1,
        limit=1, trend=0.9, shock="value", at=3, width=0.4, shock_ceiling=0.45, shock_witness="jump",
    ),
    Kind(
        "headroom", ("saturation", "max_saturation"), log=True, factor=BITS, noise=0.1,
        limit=1, trend=0.9, shock="value", at=3, width=0.4, shock_ceiling=0.45, shock_witness="jump",
    ),
    # Calm recordings clamp up to 1 element in 500 of a tensor during their warm-up.
    Kind("headroom", ("saturated_share",), noise=5e-5, limit=5e-3, trend=0.8),
    # Bits above the largest amax of the history.
    Kind("jump", ("amax_jump",), log=True, factor=BITS, noise=0.1, shock="value", at=3, width=0.4, shock_ceiling=0.45),
    # Bits. Large healthy models hold single activations of 10^3 to 10^4 (arXiv 2402.17762): 2^14. Calm recordings stay below
    # 2^8; where attention is normalised, nothing else tells that a residual stream grows. Jumps are bits above the line, and
    # must be wider than those of amax_jump, for gradients jump in health.
    Kind(
        "magnitude", ("amax",), log=True, factor=BITS, noise=0.1,
        limit=14, growth=3, trend=0.8, shock="innovation", at=4, width=0.4, shock_ceiling=0.45, shock_witness="jump",
    ),
    # 1 - |cos| of gate and up rows. At |cos| = 0.85 SwiGLU's channel is a square to within a few percent.
    Kind(
        "alignment", ("alignment_max", "alignment_q999"), log=True, factor=-1, complement=True, smallest=1e-6, noise=0.02,
        limit=-math.log(0.15), growth=math.log(2), trend=0.7,
    ),
    # Healthy logits are tens; runs lost to logit growth pass 10^3 to 10^4 (arXiv 2309.14322).
    Kind("logits", ("logit_max",), log=True, noise=0.05, limit=math.log(1000), growth=math.log(4), trend=0.7),
    # A bad batch lifts loss and gradient together and is gone the next row: one witness, and no alarm alone. A loss that
    # heads for 1.3 times its mean over the run is late news, but the only one where nothing else is watched.
    Kind(
        "loss", ("loss",), log=True, noise=0.02, limit=-math.inf, growth=math.log(1.3), trend=0.8,
        shock="score", at=6, width=1, shock_ceiling=0.45, shock_witness="spike",
    ),
    Kind(
        "gradient", ("grad_norm",), log=True, noise=0.2, limit=-math.inf, growth=math.log(6), trend=0.6,
        shock="score", at=6, width=1, shock_ceiling=0.45, shock_witness="spike",
    ),
)  # fmt: skip
COUNT, TOTAL = (
    "nonfinite",
    "nonfinite_steps",
)  # statistics: what was not finite in this row; in how many steps so far
EVENTS = "nonfinite"  # their witness
GRADIENTS = {"dy", "dh", "do", "ds"}  # FP8 tensors, by the last part of their site
SHOCKS = ("none", "value", "innovation", "score")


@dataclass(frozen=True)
class Parameters:
    """What the mathematics above leaves open. Rows are rows of the series itself."""

    kinds: tuple[Kind, ...] = KINDS

    short_memory: float = 32
    """Rows. Long enough that a slope stands out of noise, short enough that a run of 300 rows has several."""
    memory_share: float = 0.15
    """Of the age in rows: with a horizon of twice that, an even trend is foretold a quarter of the run ahead."""
    long_memory: float = 20_000
    """Rows; beyond, the shift of origin would lose digits, and the model of the past is another one."""
    reach: float = 2.0
    """Horizon in memories: exponential weights have half their information within 0.7 and 95 % within 3 memories."""
    horizon_share: float = 0.3
    """H is at most this share of the age: a young rise to a plateau (warm-up) looks like growth without end."""
    grace: float = 20
    """Rows before trends and shocks count: first steps are warm-up, and no noise is known from fewer."""
    clip: float = 3.0
    """Innovations are clipped to so many s: 0.3 % of Gaussian ones."""
    correlation: float = 4.0
    """f: variance of a mean under noise with a correlation of 0.6 from row to row, over that of white noise."""
    ridge: float = 0.1
    """r in squared memories (times d^2): the weight of 0.1 row one memory ago that says "no slope"."""
    fade: float = 10
    """Half-life of a shock or of a silent series' trend, in rows: jump, gradient and loss must meet to add up."""
    event: float = 0.97
    """Evidence of a non-finite value. Not 1: a skipped step can be the end of it."""
    interval: float = 1.2816
    """z of the 10 and 90 % quantiles of the steps to saturation."""


def parameters_of(run: Mapping[str, Any]) -> Parameters:
    """For the run that a journal's "run" row describes.

    Smooth-SwiGLU scales each feature by itself, so aligned rows endanger no cast: their witness is left out.
    """
    if run.get("activation") != "smooth_swiglu":
        return Parameters()
    return Parameters(kinds=tuple(kind for kind in KINDS if kind.witness != "alignment"))


class Cause(NamedTuple):
    """The series with the largest evidence."""

    series: str
    layer: int | None
    site: str
    statistic: str
    kind: Literal["trend", "shock", "nonfinite"]
    evidence: float


class Prediction(NamedTuple):
    """What a row says. The steps are 10, 50 and 90 % quantiles for the series with the strongest trend; inf: never."""

    step: int
    risk: float
    cause: Cause | None
    steps_to_saturation: tuple[float, float, float] | None
    saturating: str | None  # that series
    witnesses: dict[str, float]


def split_name(series: str) -> tuple[int | None, str, str]:
    """(layer, site, statistic) of "layers.3.ffn_act.kurtosis"; "loss" has neither layer nor site."""
    *site, statistic = series.split(".")
    layer = None
    if len(site) > 1 and site[0] == "layers" and site[1].isdecimal():
        layer, site = int(site[1]), site[2:]
    return layer, ".".join(site), statistic


def series_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics.jsonl row by series, nested ones too. Null: NaN if listed as "nonfinite", else left out.

    What is nested under "statistics" is named without that.
    """
    nonfinite = row.get("nonfinite")
    found = dict.fromkeys(nonfinite, math.nan) if isinstance(nonfinite, list) else {}

    def walk(values: Mapping[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{key}.")
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                found[prefix + key] = float(value)

    walk({key: value for key, value in row.items() if key not in ("step", "statistics")}, "")
    walk(row.get("statistics", {}), "")
    return found


# Rows of the tables below. LAST is the clock at a series' last row, AGE counts its rows.
S0, S1, S2, M0, M1, Q0, Q1, Q2 = range(8)
AGE, LAST, SPACING, BASELINE, TREND, SHOCK, EVENT = range(7)
LONG = 1  # of the two lines: 0 has the short memory


class _Lines(NamedTuple):
    """Fitted lines of n series, short memory first; steps are counted from now."""

    sums: Floats  # [8, 2, n]
    s2: Floats  # [2, n], ridge included
    determinant: Floats  # [2, n]

    def at(self, horizon: Floats | float) -> Floats:
        """Height of the lines at `horizon` steps from now."""
        s0, s1, m0, m1 = self.sums[S0], self.sums[S1], self.sums[M0], self.sums[M1]
        return (self.s2 * m0 - s1 * m1 + horizon * (s0 * m1 - s1 * m0)) / self.determinant

    def variance(self, a: Floats | float, b: Floats | float) -> Floats:
        """Variance of a * level + b * slope, in units of the noise's."""
        s0, s1 = self.sums[S0], self.sums[S1]
        p, q = (a * self.s2 - b * s1) / self.determinant, (b * s0 - a * s1) / self.determinant
        return p * p * self.sums[Q0] + 2 * p * q * self.sums[Q1] + q * q * self.sums[Q2]


class Predictor:
    """Streams rows into predictions.

    Steps may be missing, and so may series; a step that does not come after the last one (a rollback) counts as a row
    later. Series are met as they come. `state_dict` is plain JSON and goes on exactly where it was taken.
    """

    def __init__(self, parameters: Parameters | None = None):
        self.parameters = parameters or Parameters()
        # The last kind is for series that are met only because they are not finite.
        kinds = (*self.parameters.kinds, Kind(EVENTS, ()))
        self._kind_of = {name: i for i, kind in enumerate(kinds) for name in kind.statistics}
        trends = [kind.witness for kind in kinds]
        shocks = [kind.shock_witness or kind.witness for kind in kinds]
        self._witnesses = list(dict.fromkeys(trends + shocks))
        numbers = ("log", "factor", "complement", "smallest", "noise", "limit", "growth", "trend")
        numbers += ("at", "width", "shock_ceiling")
        self._kinds = {name: np.array([getattr(kind, name) for kind in kinds]) for name in numbers}
        self._kinds["shock"] = np.array([SHOCKS.index(kind.shock) for kind in kinds])
        self._kinds["trend_witness"] = np.array([self._witnesses.index(name) for name in trends])
        self._kinds["shock_witness"] = np.array([self._witnesses.index(name) for name in shocks])
        self._reset()

    def _reset(self) -> None:
        self._step: int | None = None
        self._clock = 0.0
        self._totals: dict[str, float] = {}
        self._names: list[str] = []
        self._lines = np.zeros((8, 2, 0))
        self._noise = np.zeros((2, 0))
        self._about = np.zeros((7, 0))
        self._index_series()

    def _index_series(self) -> None:
        """What follows from the names: where each stands, and its kind's numbers, one per series."""
        self._index = {name: i for i, name in enumerate(self._names)}
        other = len(self.parameters.kinds)
        kinds = [self._kind_of.get(name.rpartition(".")[2], other) for name in self._names]
        self._of = {name: column[np.array(kinds, dtype=np.intp)] for name, column in self._kinds.items()}
        self._row_names: list[str] | None = None  # of the last row's layout

    def _meet(self, names: Iterable[str]) -> None:
        """Room for series not met before."""
        new = [name for name in names if name not in self._index]
        if not new:
            return
        spacing = np.median(self._about[SPACING]) if self._names else 1.0
        self._names += new

        def wider(table: Floats) -> Floats:
            return np.concatenate([table, np.zeros((*table.shape[:-1], len(new)))], axis=-1)

        self._lines, self._noise, self._about = wider(self._lines), wider(self._noise), wider(self._about)
        self._about[SPACING, -len(new) :] = spacing  # until the second row tells
        self._index_series()

    def _lay_out(self, names: list[str]) -> None:
        """Where the values of a row with these names go. Kept, because rows mostly look alike."""
        statistics = [name.rpartition(".")[2] for name in names]
        known = [i for i, statistic in enumerate(statistics) if statistic in self._kind_of]
        self._meet(names[i] for i in known)
        put = [self._index[names[i]] for i in known]
        self._take = np.array(known, dtype=np.intp)
        # A row that tells of all series in their order is worked on in place, without copies.
        self._put = slice(None) if put == list(range(len(self._names))) else np.array(put, dtype=np.intp)
        self._counts = [names[i] for i, statistic in enumerate(statistics) if statistic in (COUNT, TOTAL)]
        self._row_names = names

    def update(self, step: int, values: Mapping[str, float]) -> Prediction:
        """Take in the row of `step`, e.g. `series_of` a row of the journal.

        Values of unknown statistics are ignored while they are finite; a logarithm's that are not positive are unknown.
        """
        par, names = self.parameters, list(values)
        if names != self._row_names:
            self._lay_out(names)
        raw = np.fromiter(values.values(), np.float64, len(names))
        passed = self._advance(step)
        # Fades all; what this row tells anew is written over it or, for shocks, on top.
        self._about[TREND:] *= 0.5 ** (passed / (par.fade * self._about[SPACING]))
        happened = [names[i] for i in np.flatnonzero(~np.isfinite(raw))]
        happened += [name for name in self._counts if self._rose(name, values[name])]
        if "loss_scale" in values and "grad_norm" in happened:  # `nonfinite_steps` counts what is worse
            happened = [name for name in happened if not _of_gradients(name)]
        if happened:
            self._meet(happened)
            self._about[EVENT, [self._index[name] for name in happened]] = par.event
            self._lay_out(names)
        self._take_in(raw[self._take], self._put)
        return self._predict(step)

    def _advance(self, step: int) -> float:
        """Steps since the last row, on a clock that never goes back."""
        if self._step is None:
            passed = 0.0
        elif step > self._step:
            passed = float(step - self._step)
        else:
            passed = float(np.median(self._about[SPACING])) if self._names else 1.0
        self._step = step
        self._clock += passed
        return passed

    def _rose(self, name: str, value: float) -> bool:
        """Whether a count says that something non-finite happened since the last row."""
        if not math.isfinite(value):
            return False  # known already
        if name.rpartition(".")[2] == COUNT:
            return value > 0
        before, self._totals[name] = self._totals.get(name, value), value
        return value > before

    def _solve(self, sums: Floats, memory: Floats) -> _Lines:
        """Lines of sums [8, 2, n] with memories [2, n] in steps."""
        s2 = sums[S2] + self.parameters.ridge * memory * memory
        return _Lines(sums, s2, sums[S0] * s2 - sums[S1] * sums[S1])

    def _memory(self, put: Put) -> Floats:
        """[2, n] rows."""
        par, age = self.parameters, self._about[AGE, put]
        long = np.clip(par.memory_share * age, par.short_memory, par.long_memory)
        return np.stack([np.full_like(long, par.short_memory), long])

    def _take_in(self, value: Floats, put: Put) -> None:
        """Move the series `put` on by one row of values."""
        par = self.parameters
        of = {name: column[put] for name, column in self._of.items()}
        value = np.where(of["complement"], 1 - np.abs(value), value)
        value = np.where(of["smallest"] > 0, np.maximum(value, of["smallest"]), value)
        told = np.isfinite(value) & ((value > 0) | ~of["log"])
        if not told.all():
            value, put = value[told], np.arange(len(self._names))[put][told]
            of = {name: column[told] for name, column in of.items()}
        y = of["factor"] * np.where(
            of["log"], np.log(value, where=of["log"], out=np.zeros_like(value)), value
        )

        about = self._about[:, put]
        age, spacing = about[AGE], about[SPACING]
        passed = np.where(age > 0, self._clock - about[LAST], 0.0)
        settled = age >= par.grace
        usual = np.where(settled, np.minimum(passed, par.clip * spacing), passed)
        spacing = np.where(age > 0, spacing + (usual - spacing) / np.clip(age, 1, par.short_memory), spacing)

        rows = self._memory(put)
        memory = rows * spacing
        sums = self._lines[:, :, put]
        for s0, s1, s2 in ((S0, S1, S2), (Q0, Q1, Q2)):
            sums[s2] += passed * (passed * sums[s0] - 2 * sums[s1])
            sums[s1] -= passed * sums[s0]
        sums[M1] -= passed * sums[M0]
        weight = np.exp(-np.minimum(passed / memory, 50))  # 1e-22 is forgotten, and not yet a division by 0
        sums[:Q0] *= weight
        sums[Q0:] *= weight * weight

        # Where the age is 0 there is no line: the sums are 0, and what comes of them is not used.
        with np.errstate(invalid="ignore", divide="ignore"):
            lines = self._solve(sums, memory)
            error = y - lines.at(0.0)
            spread = np.sqrt(1 + par.correlation * lines.variance(1.0, 0.0))
        noise = np.maximum(self._noise[:, put], of["noise"])
        predicted = (age > 0) & (passed <= par.reach * memory)
        error = np.where(predicted, error, 0.0)
        spread = np.where(predicted, spread, 1.0)
        bound = np.where(settled & predicted, par.clip * noise * spread, np.inf)
        entered = y - error + np.clip(error, -bound, bound)
        sums[S0] += 1
        sums[Q0] += 1
        sums[M0] += entered
        seen = SIGMA_OF_MEAN * np.abs(np.clip(error, -bound, bound)) / spread
        learn = np.where(predicted, 1 / np.clip(age, 1, rows), 0.0)
        self._noise[:, put] += learn * (seen - self._noise[:, put])
        self._lines[:, :, put] = sums

        x = np.choose(of["shock"], [-np.inf, y, error[LONG], error[LONG] / (noise * spread)[LONG]])
        shock = of["shock_ceiling"] * _sigmoid((x - of["at"]) / of["width"])
        about[SHOCK] = np.maximum(about[SHOCK], np.where(settled, shock, 0.0))
        about[BASELINE] += (y - about[BASELINE]) / np.minimum(age + 1, par.long_memory)
        about[AGE], about[LAST], about[SPACING] = age + 1, self._clock, spacing
        self._about[:, put] = about
        self._about[TREND, put] = self._trend(put).max(axis=0)

    def _trend(self, put: Put) -> Floats:
        """Evidence of the lines of the series `put`, [2, n]."""
        par, of = self.parameters, self._of
        ages = self._about[AGE]
        count = np.count_nonzero((ages > par.grace) & (of["trend"] > 0))
        memory = self._memory(put) * self._about[SPACING, put]
        lines = self._solve(self._lines[:, :, put], memory)
        horizon = np.minimum(par.reach * memory, par.horizon_share * ages[put] * self._about[SPACING, put])
        noise = np.maximum(self._noise[:, put], of["noise"][put])
        deviation = noise * np.sqrt(par.correlation * lines.variance(1.0, horizon))
        score = (lines.at(horizon) - self._limit(put)) / np.maximum(deviation, TINY)
        evidence = of["trend"][put] * _normal(score - math.sqrt(2 * math.log(max(count, 1))))
        return np.where(ages[put] > par.grace, evidence, 0.0)

    def _limit(self, put: Put) -> Floats:
        return np.maximum(self._of["limit"][put], self._about[BASELINE, put] + self._of["growth"][put])

    def _steps_to_saturation(self, series: int) -> tuple[float, float, float]:
        """Quantiles for the line with the larger evidence."""
        par, put = self.parameters, np.array([series])
        which = int(self._trend(put)[:, 0].argmax())
        lines = self._solve(self._lines[:, :, put], self._memory(put) * self._about[SPACING, put])
        level = float(lines.at(0.0)[which, 0])
        slope = float(lines.at(1.0)[which, 0]) - level
        room = float(self._limit(put)[0]) - level
        if room <= 0:
            return 0.0, 0.0, 0.0
        median = room / slope if slope > 0 else math.inf
        # (slope T - room)^2 = z^2 var(T), var(T) = v + 2 c T + w T^2, as a T^2 - 2 b T + d = 0.
        noise = max(float(self._noise[which, series]), float(self._of["noise"][series]))
        scale = par.interval**2 * par.correlation * noise * noise
        v, w, sum_of_all = (scale * float(lines.variance(*x)[which, 0]) for x in ((1, 0), (0, 1), (1, 1)))
        c = (sum_of_all - v - w) / 2
        a, b, d = slope * slope - w, slope * room + c, room * room - v
        root = math.sqrt(max(b * b - a * d, 0.0))
        if a > 0:  # the slope is surely not 0: both ends, or none
            soon, late = (d / (b + root), (b + root) / a) if slope > 0 else (math.inf, math.inf)
        else:
            soon, late = (d / (b + root) if b + root > 0 else math.inf), math.inf
        return max(soon, 0.0), median, late

    def _predict(self, step: int) -> Prediction:
        witnesses = np.zeros(len(self._witnesses))
        if not self._names:
            return Prediction(step, 0.0, None, None, None, {})
        trend, shock, event = self._about[TREND:]
        np.maximum.at(witnesses, self._of["trend_witness"], trend)
        np.maximum.at(witnesses, self._of["shock_witness"], shock)
        witnesses[self._witnesses.index(EVENTS)] = event.max()
        which, series = divmod(int(self._about[TREND:].argmax()), len(self._names))
        evidence = float(self._about[TREND + which, series])
        cause = None
        if evidence > 0:
            name, kinds = self._names[series], ("trend", "shock", "nonfinite")
            cause = Cause(name, *split_name(name), kinds[which], evidence)
        steps = saturating = None
        leading = int(trend.argmax())
        if trend[leading] > 0:
            steps, saturating = self._steps_to_saturation(leading), self._names[leading]
        risk = float(1 - np.prod(1 - witnesses))
        told = dict(zip(self._witnesses, witnesses.tolist(), strict=True))
        return Prediction(step, risk, cause, steps, saturating, told)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `update` has learned, as plain JSON."""
        return {
            "version": VERSION,
            "step": self._step,
            "clock": self._clock,
            "totals": dict(self._totals),
            "series": list(self._names),
            "lines": self._lines.tolist(),
            "noise": self._noise.tolist(),
            "about": self._about.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Raises UserError for one of another version; then nothing changes."""
        if state.get("version") != VERSION:
            raise UserError(
                f"the predictor's state must be of version {VERSION}, got {state.get('version')}: "
                "start it afresh by leaving the state out; it learns anew within the next rows"
            )
        self._reset()
        self._step, self._clock = state["step"], state["clock"]
        self._totals, self._names = dict(state["totals"]), list(state["series"])
        count = len(self._names)
        self._lines = np.array(state["lines"], dtype=np.float64).reshape(8, 2, count)
        self._noise = np.array(state["noise"], dtype=np.float64).reshape(2, count)
        self._about = np.array(state["about"], dtype=np.float64).reshape(7, count)
        self._index_series()


def _of_gradients(series: str) -> bool:
    """Whether it overflows with the gradients: their own series, and what is of all FP8 tensors together."""
    return (
        series in ("grad_norm", "fp8.max_saturation")
        or series.rpartition(".")[0].rpartition(".")[2] in GRADIENTS
    )


VERSION = 1  # of state_dict
SIGMA_OF_MEAN = math.sqrt(math.pi / 2)  # a Gaussian's sigma over its mean magnitude
TINY = 1e-300


def _sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * x))  # no overflow


def _normal(x: Floats) -> Floats:
    """Phi(x) within 0.01: numpy has no error function."""
    return _sigmoid(1.702 * x)
