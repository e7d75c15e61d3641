"""The predictor against numpy's own least squares, against noise it must not mind, and against its own text."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from helpers import refusal  # pyrefly: ignore

from titan_fp8.stability import journal
from titan_fp8.stability.predictor import (
    KINDS,
    Kind,
    Parameters,
    Predictor,
    parameters_of,
    series_of,
    split_name,
)

Z = "layers.3.feed_forward.z"
SEED = 0  # 0 to 39 pass


def feed(rows, predictor=None):
    """Predictions of rows [(step, values)]."""
    predictor = predictor or Predictor()
    return [predictor.update(step, values) for step, values in rows]


def growth(rng, count, begin, rate, sigma=0.1):
    """Rows whose kurtosis grows by `rate` (of its logarithm, per step) after `begin`; loss and gradient are calm."""
    steps = np.arange(1, count + 1)
    y = math.log(15) + rate * np.maximum(steps - begin, 0) + sigma * rng.normal(size=count)
    calm = rng.normal(size=(2, count))
    return [
        (
            int(s),
            {
                "loss": float(3 + 0.03 * a),
                "grad_norm": float(np.exp(0.2 * b)),
                "layers.3.ffn_act.kurtosis": float(np.exp(v)),
            },
        )
        for s, v, a, b in zip(steps, y, *calm, strict=True)
    ]


def test_names():
    assert split_name("layers.3.feed_forward.z.headroom") == (3, "feed_forward.z", "headroom")
    assert split_name("fp8.max_saturation") == (None, "fp8", "max_saturation")
    assert split_name("loss") == (None, "", "loss")
    statistics = [name for kind in KINDS for name in kind.statistics]
    assert len(statistics) == len(set(statistics))


def test_series_of_a_row_as_the_journal_writes_it():
    row = {"kind": "train", "step": 4, "loss": math.nan, "lr": 1e-3, "mfu": None, "ok": True}
    row["fp8"] = {"max_saturation": math.inf, "saturated_tensors": 2, "worst": "a"}
    found = series_of(json.loads(journal.encode(row)))
    assert found.keys() == {"loss", "lr", "fp8.max_saturation", "fp8.saturated_tensors"}
    assert math.isnan(found["loss"]) and math.isnan(found["fp8.max_saturation"])
    assert found["lr"] == 1e-3 and found["fp8.saturated_tensors"] == 2
    row = {"step": 4, "statistics": {"layers.3.ffn_act": {"kurtosis": 4.5}, "layers.3.q": {"nonfinite": 2}}}
    assert series_of(row) == {"layers.3.ffn_act.kurtosis": 4.5, "layers.3.q.nonfinite": 2}


def test_the_lines_are_weighted_least_squares():
    """Level, slope and its deviation at irregular steps, against the sums written out over the whole history.

    Noise is white and too small to be clipped; the ridge is part of the reference. Both sum the same ~1e2 products, one by
    recursion, whose rounding the shifts amplify by at most (memory / spacing)^2 ~ 1e3: 1e-12 holds.
    """
    rng = np.random.default_rng(SEED)
    par = Parameters(clip=1e9)
    steps = np.cumsum(rng.integers(1, 4, 150))
    headroom = 2 - 0.004 * steps + 0.05 * rng.normal(size=len(steps))
    predictor = Predictor(par)
    feed([(int(s), {"x.headroom": float(h)}) for s, h in zip(steps, headroom, strict=True)], predictor)
    # The spacing changes from row to row, and so does each row's decay: replay it.
    spacing, weights = 1.0, np.zeros(0)
    for age, gap in enumerate(np.diff(steps, prepend=steps[0])):
        if age:
            usual = min(gap, par.clip * spacing) if age >= par.grace else gap
            spacing += (usual - spacing) / min(max(age, 1), par.short_memory)
        weights = np.append(weights * np.exp(-gap / (par.short_memory * spacing)), 1.0)
    u, y = steps - steps[-1], -headroom
    design = np.stack([np.ones(len(u)), u])
    normal = (design * weights) @ design.T
    normal[1, 1] += par.ridge * (par.short_memory * spacing) ** 2
    inverse = np.linalg.inv(normal)
    level, slope = inverse @ (design * weights) @ y
    covariance = inverse @ (design * weights**2) @ design.T @ inverse

    put = np.array([0])
    lines = predictor._solve(predictor._lines[:, :, put], predictor._memory(put) * predictor._about[2, put])
    assert lines.at(0.0)[0, 0] == pytest.approx(level, rel=1e-12)
    assert lines.at(100.0)[0, 0] == pytest.approx(level + 100 * slope, rel=1e-12)
    assert lines.variance(0.0, 1.0)[0, 0] == pytest.approx(covariance[1, 1], rel=1e-11)
    assert lines.variance(1.0, 9.0)[0, 0] == pytest.approx(np.array([1, 9]) @ covariance @ [1, 9], rel=1e-11)


def test_steps_to_saturation_of_a_clean_decline():
    """Headroom 2 - 0.01 t meets its limit -1 at t = 300; seen from 200. The ridge takes 0.1 / 32 off the slope."""
    predictions = feed((t, {f"{Z}.headroom": 2 - 0.01 * t}) for t in range(201))
    soon, median, late = predictions[-1].steps_to_saturation
    assert median == pytest.approx(100, rel=0.01) and soon <= median <= late
    assert predictions[-1].saturating == f"{Z}.headroom"


def test_the_interval_covers_what_comes():
    """300 series decline alike under noise with a correlation of 0.6 from row to row, for which f is made.

    In 80 % of them the true step lies between the 10 and 90 % quantiles. The noise is itself estimated, from 160 rows worth
    40 independent ones: its deviation of 11 % moves the share by 4 %, and the binomial's is 2.3 %: 70 to 90 % is asked.
    """
    rng = np.random.default_rng(SEED)
    count, series = 160, 300
    noise = np.zeros((count, series))
    for t in range(1, count):
        noise[t] = 0.6 * noise[t - 1] + 0.8 * rng.normal(size=series)
    predictor = Predictor()
    for t in range(count):
        y = 1.5 - 0.01 * t + 0.1 * noise[t]
        predictor.update(t, {f"layers.{i}.z.headroom": float(v) for i, v in enumerate(y)})
    truth = (1.5 + 1) / 0.01 - (count - 1)
    inside = 0
    for i in range(series):
        soon, _, late = predictor._steps_to_saturation(i)
        inside += soon <= truth <= late
    assert 0.7 <= inside / series <= 0.9, inside / series


def test_growth_is_foretold_and_named_before_the_limit():
    rng = np.random.default_rng(SEED)
    predictions = feed(growth(rng, 420, begin=200, rate=0.02))  # 20 times the mean before: step 400
    calm = max(p.risk for p in predictions[:200])
    first = next(p for p in predictions if p.risk >= 0.5)
    assert calm < 0.3
    assert 200 < first.step < 400
    assert first.cause[:5] == ("layers.3.ffn_act.kurtosis", 3, "ffn_act", "kurtosis", "trend")
    soon, median, late = first.steps_to_saturation
    assert 0 < soon < median < late < math.inf


def test_activations_that_grow_without_bound_are_a_risk_and_large_ones_are_not():
    """2^5 doubling every 20 steps from step 60 on meets 2^14 at 240; a plateau at 2^12, as large models have, is health."""
    rng = np.random.default_rng(SEED)
    noise = 0.2 * rng.normal(size=(2, 260))
    bits = {"grows": 5 + np.maximum(np.arange(260) - 60, 0) / 20 + noise[0], "large": 12 + noise[1]}
    said = {
        name: feed((t, {"layers.2.ffn_out.amax": float(2**v)}) for t, v in enumerate(y))
        for name, y in bits.items()
    }
    first = next(p for p in said["grows"] if p.risk >= 0.5)
    assert 60 < first.step < 240 and first.cause[:5] == (
        "layers.2.ffn_out.amax",
        2,
        "ffn_out",
        "amax",
        "trend",
    )
    assert max(p.risk for p in said["large"]) < 0.2


def test_a_plateau_becomes_health():
    """The kurtosis grows 100 times within 100 steps and stays: risk, then none once the run has known it for long."""
    rng = np.random.default_rng(SEED)
    y = math.log(10) + math.log(100) * np.clip((np.arange(1200) - 200) / 100, 0, 1)
    y += 0.1 * rng.normal(size=1200)
    risks = [p.risk for p in feed((t, {"a.kurtosis": float(np.exp(v))}) for t, v in enumerate(y))]
    assert max(risks[:200]) < 0.1 and max(risks[200:320]) > 0.7 and max(risks[1000:]) < 0.1


@pytest.mark.parametrize(
    ("series", "value"),
    [("loss", math.nan), (f"{Z}.kurtosis", math.inf), (f"{Z}.anything", math.nan), (f"{Z}.nonfinite", 1.0)],
)
def test_a_non_finite_value_is_an_event_and_blinds_nothing(series, value):
    rng = np.random.default_rng(SEED)
    rows = growth(rng, 420, begin=200, rate=0.02)
    without = [(s, {k: v for k, v in row.items() if not (s == 100 and k == series)}) for s, row in rows]
    hit = [(s, {**row, series: value} if s == 100 else row) for s, row in rows]
    plain, poisoned = feed(without), feed(hit)
    at = poisoned[99]
    assert at.risk >= Parameters().event and at.cause.series == series and at.cause.kind == "nonfinite"
    assert plain[99].risk < 0.3 and poisoned[199].risk < 0.3  # 100 rows later it is forgotten
    assert poisoned[-1].risk == pytest.approx(plain[-1].risk, abs=1e-3) and plain[-1].risk > 0.5


def test_counts_of_bad_steps_and_a_backing_off_loss_scale():
    calm = {"loss": 3.0, "grad_norm": 1.0, "nonfinite_steps": 2.0, "loss_scale": 1024.0}
    first, more, backed_off = feed(
        [(1, calm), (2, {**calm, "nonfinite_steps": 3.0}), (60, {**calm, "nonfinite_steps": 3.0, "grad_norm": math.nan})]
    )  # fmt: skip
    assert first.risk == 0  # a resumed run starts with the total of before
    assert more.cause.statistic == "nonfinite_steps" and more.risk >= 0.97
    assert backed_off.risk < 0.1
    # As rows of FP8 runs with statistics have it, which come without the values; forward is none of the loss scale's.
    overflow = {**calm, "grad_norm": math.nan, "fp8.max_saturation": math.inf}
    overflow |= {
        f"layers.1.{name}.nonfinite": 8.0 for name in ("attention.wo.dy", "attention.inner_attention.ds")
    }
    overflow |= {"layers.0.feed_forward.dh.headroom": math.nan, "layers.0.feed_forward.x.headroom": 1.0}
    backed_off, activation, no_loss_scale = (
        feed([(1, calm), (2, row)])[1]
        for row in (
            overflow,
            {**overflow, "layers.0.ffn_act.nonfinite": 1.0},
            {name: value for name, value in overflow.items() if name != "loss_scale"},
        )
    )
    assert backed_off.risk == 0
    assert activation.cause.series == "layers.0.ffn_act.nonfinite" and activation.risk >= 0.97
    assert no_loss_scale.risk >= 0.97


def test_it_goes_on_from_its_state_exactly():
    """Through JSON, in the middle of growth, with series that stop and start around it."""
    rng = np.random.default_rng(SEED)
    rows = growth(rng, 400, begin=200, rate=0.02)
    rows = [
        (s, {k: v for k, v in row.items() if rng.random() > 0.3} | ({"b.headroom": 1.0} if s > 150 else {}))
        for s, row in rows
    ]
    predictor = Predictor()
    feed(rows[:290], predictor)
    text = json.dumps(predictor.state_dict(), allow_nan=False)
    going_on = feed(rows[290:], predictor)
    resumed = Predictor()
    resumed.load_state_dict(json.loads(text))
    assert feed(rows[290:], resumed) == going_on
    assert going_on[-1].risk > 0.5


def test_state_of_another_version_is_refused():
    predictor = Predictor()
    feed([(1, {"loss": 3.0})], predictor)
    before = predictor.state_dict()
    refusal(
        lambda: predictor.load_state_dict({**before, "version": 0}),
        "version 1, got 0",
        "leaving the state out",
    )
    assert predictor.state_dict() == before


def test_order_of_keys_and_rows_in_pieces_change_nothing():
    """In place for whole rows, by index for others: the same numbers, to rounding."""
    rng = np.random.default_rng(SEED)
    rows = growth(rng, 300, begin=150, rate=0.02)
    order = [(s, dict(reversed(row.items())) if s % 2 else row) for s, row in rows]
    for a, b in zip(feed(rows), feed(order), strict=True):
        assert b.risk == pytest.approx(a.risk, rel=1e-9, abs=1e-12)


def test_sparse_rows_tell_the_same_story():
    """A row every 10 steps is a run on a 10 times slower clock: same risks, 10 times the steps."""
    rng = np.random.default_rng(SEED)
    rows = growth(rng, 330, begin=200, rate=0.02)
    dense, sparse = feed(rows), feed((10 * s, row) for s, row in rows)
    for a, b in zip(dense, sparse, strict=True):
        assert b.risk == pytest.approx(a.risk, rel=1e-6, abs=1e-9)
    assert sparse[-1].steps_to_saturation == pytest.approx([10 * x for x in dense[-1].steps_to_saturation])


def test_one_outlier_is_no_risk_and_blinds_nothing():
    """It counts for 3 s at most, a tenth of the noise that 32 rows make: 1 to 4 rows later (8 seeds); unclipped 13 to 16."""
    rng = np.random.default_rng(SEED)
    rows = growth(rng, 420, begin=200, rate=0.02)
    hit = [(s, dict(row)) for s, row in rows]
    hit[225][1]["layers.3.ffn_act.kurtosis"] *= 1e6
    plain, outlier = feed(rows), feed(hit)
    assert max(p.risk for p in outlier[:232]) < 0.2

    def first(predictions):
        return next(p.step for p in predictions if p.risk >= 0.5)

    assert abs(first(outlier) - first(plain)) <= 8


def test_a_rollback_and_a_long_gap():
    rng = np.random.default_rng(SEED)
    rows = growth(rng, 300, begin=999, rate=0)
    back = rows[:200] + rows[150:]
    assert max(p.risk for p in feed(back)) < 0.3
    gap = rows[:200] + [(s + 100_000, row) for s, row in rows[200:]]
    assert max(p.risk for p in feed(gap)) < 0.3


def test_a_series_that_stops_loses_its_say():
    rng = np.random.default_rng(SEED)
    rows = growth(rng, 360, begin=200, rate=0.02)
    rows += [(s + 360, {"loss": 3.0, "grad_norm": 1.0}) for s in range(1, 60)]
    predictions = feed(rows)
    assert predictions[359].risk > 0.5 and predictions[-1].risk < 0.1


def test_risk_is_the_noisy_or_of_its_witnesses():
    """A jump of amax and a bad batch, which lifts gradient and loss: neither is an alarm alone, both together are."""
    calm = {f"{Z}.amax_jump": 1.0, "grad_norm": 1.0, "loss": 3.0}
    jump, spike = {f"{Z}.amax_jump": 64.0}, {"grad_norm": 100.0, "loss": 5.0}

    def risk(last):
        prediction = feed([*((t, calm) for t in range(60)), (60, calm | last)])[-1]
        by_hand = 1 - math.prod(1 - evidence for evidence in prediction.witnesses.values())
        assert prediction.risk == pytest.approx(by_hand) and 0 <= prediction.risk <= 1
        return prediction.risk

    assert risk(jump) < 0.5 and risk(spike) < 0.5 and risk(jump | spike) > 0.6


def test_many_noisy_series_are_no_evidence():
    """They lie 0.7 bits from their limit, and the largest of 1000 trends of noise heads for it. Their number is minded."""
    rng = np.random.default_rng(SEED)
    names = [f"layers.{i}.z.headroom" for i in range(1000)]
    rows = ((t, dict(zip(names, 0.5 * rng.normal(size=1000) - 0.3, strict=True))) for t in range(150))
    assert max(p.witnesses["headroom"] for p in feed(rows)) < 0.5


def test_a_row_costs_the_same_however_long_the_run_and_however_many_its_series():
    """Calls of Python functions are counted, not seconds: after the first row they do not grow with rows or series."""

    events: list[str] = []

    def calls(series: int) -> list[int]:
        rng, predictor, found = np.random.default_rng(0), Predictor(), []
        names = [
            f"layers.{i}.{s}"
            for i in range(series // 4)
            for s in ("a.kurtosis", "z.headroom", "z.amax", "z.saturated_share")
        ]
        for t in range(90):
            row = dict(zip(names, np.exp(0.1 * rng.normal(size=series)).tolist(), strict=True))
            events.clear()
            sys.setprofile(lambda frame, event, arg: events.append(event))
            predictor.update(t, row)
            sys.setprofile(None)
            found.append(events.count("call") + events.count("c_call"))
        return found

    few, many = calls(100), calls(1000)
    assert len(set(many[30:])) == 1 and many[30] <= few[30] + 8, (few, many)


def test_other_kinds_can_be_given():
    kind = Kind("heat", ("temperature",), limit=90, trend=1.0, noise=0.1)
    predictions = feed(
        ((t, {"gpu.temperature": 50 + 0.2 * t}) for t in range(250)), Predictor(Parameters(kinds=(kind,)))
    )
    assert predictions[100].risk < 0.1 and predictions[-1].risk > 0.9
    assert predictions[-1].cause.statistic == "temperature"


def test_aligned_rows_endanger_no_run_that_smooths():
    """A resumed run, too, that had learned of them before it changed its activation."""
    rows = [
        (s, {"loss": 3.0, "layers.3.feed_forward.alignment_q999": min(s / 300, 0.999)}) for s in range(1, 400)
    ]
    plain, smooth = (Predictor(parameters_of({"activation": name})) for name in ("swiglu", "smooth_swiglu"))
    assert feed(rows, plain)[-1].cause.statistic == "alignment_q999"
    assert max(told.risk for told in feed(rows, smooth)) < 0.05
    resumed = Predictor(parameters_of({"activation": "smooth_swiglu"}))
    resumed.load_state_dict(plain.state_dict())
    assert plain.update(400, rows[-1][1]).risk > 0.4
    assert feed([(s, rows[-1][1]) for s in range(400, 500)], resumed)[-1].risk < 0.05
    assert parameters_of({}) == parameters_of({"activation": "xielu"}) == Parameters()


def test_a_loss_that_climbs_is_a_risk_where_nothing_else_is_watched():
    """It falls for 100 rows and then doubles within 60; harder data (8 % from row 60 on) is none."""
    rng = np.random.default_rng(SEED)
    t = np.arange(160)
    loss = 2 + 2 * np.exp(-t / 20) + 0.02 * rng.normal(size=160)
    climb = [
        p.risk
        for p in feed(
            (int(i), {"loss": float(x)}) for i, x in enumerate(loss + 2 * np.clip((t - 100) / 60, 0, 1))
        )
    ]
    harder = [
        p.risk
        for p in feed((int(i), {"loss": float(x)}) for i, x in enumerate(loss * np.where(t < 60, 1, 1.08)))
    ]
    assert max(climb[:100]) < 0.2 and max(climb) > 0.5 and max(harder) < 0.5
