"""The gradient gate against its formulas in plain Python, and what an outlier, a shift and a NaN do to it."""

from __future__ import annotations

import math

import pytest
import torch

from titan_fp8.stability.gate import FEW, FLOOR, LEVEL, NOISE, GradientGate


def make(mode: str = "act", sigma: float = 6.0, warmup: int = 10, skips: int = 3) -> GradientGate:
    return GradientGate(mode, sigma, warmup, skips, torch.device("cpu"))


def judge(gate: GradientGate, norms: list[float], first: int = 1) -> list[bool]:
    return [bool(gate.judge(first + i, torch.tensor(norm))) for i, norm in enumerate(norms)]


def noise(n: int, spread: float = 0.2) -> list[float]:
    return torch.randn(n, generator=torch.Generator().manual_seed(1)).mul(spread).exp().tolist()


def test_against_plain_python():
    gate = make(sigma=2.0, warmup=20)
    norms = [*noise(300, 0.3), *(5 * norm for norm in noise(100, 0.3))]
    mean = variance = before = 0.0
    steps, row, expected, restarts = 0, 0, [], 0
    for step, norm in enumerate(norms, 1):
        x = math.log(norm)
        outlier = step > 20 and steps >= FEW and x > mean + 2 * max(math.sqrt(variance), FLOOR)
        if outlier and row == 3:
            outlier, steps, mean, variance = False, 0, 0.0, 0.0
            restarts += 1
        expected.append(outlier)
        row = row + 1 if outlier else 0
        if outlier:
            continue
        if steps:
            variance += max(1 / steps, 1 / NOISE) * ((x - before) ** 2 / 2 - variance)
        steps += 1
        mean += max(1 / steps, 1 / LEVEL) * (x - mean)
        before = x
    assert judge(gate, norms) == expected and 3 < sum(expected) < 60 and restarts
    assert float(gate.mean) == pytest.approx(mean, abs=1e-4)
    assert float(gate.variance) == pytest.approx(variance, rel=1e-3)
    assert int(gate.skipped) == sum(expected)


def test_health_is_never_skipped_nor_is_a_falling_norm():
    falling = [norm * (20 * math.exp(-i / 30) + 1) for i, norm in enumerate(noise(2000))]
    assert not any(judge(make(), falling))


def test_an_outlier_is_skipped_and_moves_nothing():
    gate = make()
    judge(gate, noise(100))
    before = gate.mean.clone(), gate.variance.clone()
    assert judge(gate, [30.0], 101) == [True]
    assert (gate.mean, gate.variance) == before
    assert [int(t) for t in (gate.outliers, gate.skipped, gate.last_step)] == [1, 1, 101]
    assert float(gate.last_norm) == 30.0
    assert judge(gate, [1.0], 102) == [False]


def test_a_norm_that_stays_high_is_accepted_in_time():
    gate = make(skips=3)
    judge(gate, noise(100))
    skipped = judge(gate, [20 * norm for norm in noise(200)], 101)
    assert skipped == [True] * 3 + [False] * 197
    assert judge(gate, [1000.0], 301) == [True]  # the new level has outliers too


def test_warm_up_nan_and_modes():
    assert judge(make(warmup=50), [1.0] * 40 + [1e6]) == [False] * 41
    gate = make()
    judge(gate, noise(100))
    state = {name: value.clone() for name, value in gate.state_dict().items()}
    assert judge(gate, [math.nan, math.inf, 0.0], 101) == [False] * 3
    assert all(torch.equal(value, state[name]) for name, value in gate.state_dict().items())
    warns = make("warn")
    assert not any(judge(warns, [*noise(100), 30.0])) and int(warns.outliers) == 1 and int(warns.skipped) == 0
    off = make("off")
    assert not any(judge(off, [*noise(100), 30.0])) and int(off.steps) == 0


def test_state_goes_on_where_it_was():
    norms = [*noise(150), 40.0, *noise(20)]
    whole, first, second = make(), make(), make()
    expected = judge(whole, norms)
    assert judge(first, norms[:90]) == expected[:90]
    second.load_state_dict(first.state_dict())
    assert judge(second, norms[90:], 91) == expected[90:]
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in second.state_dict().items())
