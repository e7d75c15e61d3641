"""The kernel of sums beside float64, in Triton's interpreter (this file as a script: it must be switched on before Triton is
imported) and on a GPU.

ROWS elements of a column are scaled by a power of two, which is exact, squared, squared again and added in float32: ROWS + 1
roundings of 2^-24. All else is float64. Counts, and the largest magnitude, are exact.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from titan_fp8.float8.formats import E4M3, E5M2, FP8_MAX, ROUNDS_TO_ZERO, saturating_cast
from titan_fp8.float8.kernels import cosines, moments
from titan_fp8.float8.kernels.moments import (
    AMAX,
    COLUMNS,
    ELEMENTS,
    FOURTHS,
    NONFINITE,
    ROWS,
    SATURATED,
    SQUARES,
    SUM,
    UNDERFLOWED,
    Cast,
    launch,
    look,
    reference,
    some_rows,
    total,
)

RELATIVE = (ROWS + 1) * 2.0**-24
FRESH = torch.Generator()
FRESH.seed()


def truth(x: Tensor, batch: int, groups: int) -> tuple[Tensor, Tensor]:
    """(sums [B, 8] in float64, with exponents that no float64 loses; sum |x| [B]), of x [..., N]."""
    x = x.detach().cpu().double().reshape(groups, batch, -1).transpose(0, 1).flatten(1)
    finite = x.isfinite()
    x = torch.where(finite, x, 0.0)
    sums = torch.zeros(batch, COLUMNS, dtype=torch.float64)
    for column, power in ((SUM, 1), (SQUARES, 2), (FOURTHS, 4)):
        sums[:, column] = x.pow(power).sum(1)
    sums[:, ELEMENTS], sums[:, NONFINITE] = finite.sum(1), (~finite).sum(1)
    sums[:, AMAX] = x.abs().amax(1)
    return sums, x.abs().sum(1)


def random(
    *shape: int, size: float = 1.0, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> Tensor:
    """Outliers in some columns, and magnitudes about `size`."""
    x = torch.randn(shape, dtype=torch.float64, generator=FRESH)
    x[..., ::7] *= 50
    return (x * size).to(device, dtype)


def cases(device: str) -> dict[str, tuple[Tensor, int, int]]:
    """name -> (x, batch, groups)."""

    def draw(*shape: int, size: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return random(*shape, size=size, dtype=dtype, device=device)

    holes = draw(2, 19, 70)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        holes[i % 2, 3 * i, 5 * i :: 11] = value
    zeros = draw(2, 40, 1300)
    zeros[:, 8:24] = 0.0
    zeros[1] = 0.0
    wide = draw(2, 24, 4096)
    return {
        "rows": (draw(60, 96), 3, 1),
        "one row": (draw(1, 5), 1, 1),
        "groups": (draw(2 * 3 * 9, 50), 3, 2),
        "a batch": (draw(3, 33, 1100), 3, 1),
        "heads": (draw(2, 37, 4, 32), 2, 1),
        "heads first": (draw(2, 4, 37, 32), 2, 1),
        "heads turned": (draw(2, 37, 4, 32).transpose(1, 2), 2, 1),
        "heads of a wider tensor": (draw(2, 37, 8, 32)[:, :, 2:5], 2, 1),
        "half of every row": (wide.chunk(2, -1)[1], 2, 1),
        "columns apart": (draw(96, 60).t(), 2, 1),
        "some rows": (some_rows(draw(2, 4, 37, 32), 2), 2, 1),
        "some rows of groups": (some_rows(draw(2 * 3 * 16, 1100), 3, 2), 3, 2),
        "some rows of a stretch": (some_rows(draw(2 * 3 * 17, 48), 3, 2), 3, 2),
        "batches of kv heads": (draw(2 * 3, 20, 16), 2, 1),
        "not finite": (holes, 2, 1),
        "nothing finite": (torch.full((2, 9, 30), torch.nan, device=device), 2, 1),
        "zeros": (zeros, 2, 1),
        "only zeros": (torch.zeros(2, 9, 30, device=device), 2, 1),
        "float32": (draw(2, 21, 333, dtype=torch.float32), 2, 1),
        "float16": (draw(2, 21, 333, size=100.0, dtype=torch.float16), 2, 1),
        "small float16": (draw(2, 21, 333, size=1e-7, dtype=torch.float16), 2, 1),
        "huge": (draw(2, 21, 333, size=3e36), 2, 1),
        "largest": (torch.full((2, 21, 333), torch.finfo(torch.float32).max, device=device), 2, 1),
        "small": (draw(2, 21, 333, size=1e-30), 2, 1),
        "subnormal": (draw(2, 21, 333, size=1e-39), 2, 1),
        "subnormal float32": (draw(2, 21, 333, size=1e-42, dtype=torch.float32), 2, 1),
        "all sizes": (draw(2, 21, 333) * torch.logspace(-36, 36, 333, device=device).bfloat16(), 2, 1),
    }  # fmt: skip


def room(batch: int, parts: int, device: str) -> Tensor:
    """Full of garbage: all of it must be written."""
    return torch.full((batch, parts, COLUMNS), torch.nan, dtype=torch.float64, device=device)


def compare(name: str, sums: Tensor, x: Tensor, batch: int, groups: int) -> None:
    got, (expected, magnitudes) = total(sums).cpu(), truth(x, batch, groups)
    for column in (ELEMENTS, NONFINITE, AMAX):
        assert torch.equal(got[:, column], expected[:, column]), (name, column, got, expected)
    for column in (SQUARES, FOURTHS):
        error = (got[:, column] - expected[:, column]).abs()
        # One summand of ROWS may be as small as 2^-149 of the largest's fourth power without being seen.
        assert (error <= (RELATIVE + 2.0**-140) * expected[:, column]).all(), (name, column, got, expected)
    assert ((got[:, SUM] - expected[:, SUM]).abs() <= RELATIVE * magnitudes).all(), (name, got, expected)
    assert not got[:, SATURATED : UNDERFLOWED + 1].any(), name


def check(device: str) -> None:
    """All of the above, and what the options do."""
    for name, (x, batch, groups) in cases(device).items():
        sums, again = room(batch, 3, device), room(batch, 3, device)
        launch(x, sums, groups, True, None, None, False)
        compare(name, sums, x, batch, groups)
        if device == "cuda":
            launch(x, again, groups, True, None, None, False)
            assert torch.equal(again, sums), name

    for dtype in (E4M3, E5M2):
        x = random(3, 40, 96, device=device) * torch.logspace(-6, 1, 96, device=device).bfloat16()
        x[0, 0, :5], x[2, 1, 7], x[:, 3, 1], x[:, 4, 2] = 0.0, torch.inf, 1e-9, -1e3
        cast = Cast(torch.tensor(FP8_MAX[dtype] / 100, device=device), FP8_MAX[dtype], ROUNDS_TO_ZERO[dtype])
        x[1, 0, 0] = ROUNDS_TO_ZERO[dtype] / cast.scale
        sums = room(3, 4, device)
        launch(x, sums, 1, False, cast, None, False)
        got, expected = total(sums), reference(x, 3, 1, False, cast)
        assert torch.equal(got, expected) and expected[:, SATURATED].all() and expected[:, UNDERFLOWED].all()
        q = saturating_cast(x, cast.scale, dtype).float()
        assert got[:, UNDERFLOWED].tolist() == ((q == 0) & (x != 0)).sum((1, 2)).tolist()

    x = random(2, 20, 96, device=device)
    largest = float(x.double().abs().max())
    for known, expected in ((1e5, 1e5), (0.1, 0.1), (torch.nan, largest), (torch.inf, largest)):
        sums = room(2, 3, device)
        launch(x, sums, 1, True, None, torch.tensor(known, device=device), False)
        assert float(total(sums)[:, AMAX].max()) == float(torch.tensor(expected)), known

    gate, up = (part.contiguous() for part in x.chunk(2, -1))
    sums = room(2, 3, device)
    for part, add in ((gate, False), (up, True)):
        launch(part, sums, 1, True, None, None, add)
    compare("a pair", sums, x, 2, 1)


def check_cosines(device: str) -> None:
    """Sums of 1500 products in float32: 1500 2^-24 of the product of norms at most, three of them, and some scalings."""
    for rows, width, dtype in ((10, 1500, torch.bfloat16), (5, 16, torch.float32), (1, 1024, torch.float16)):
        a, b = (
            random(rows, width, dtype=dtype, device=device),
            random(width, rows, dtype=dtype, device=device).t(),
        )
        a[0] = 2.0 * b[0]
        if rows > 3:
            a[1], b[2], a[3, 5], a[4] = 0.0, 0.0, torch.nan, torch.inf
        got = cosines._launch(a, b).cpu()
        torch.testing.assert_close(got, cosines.reference(a, b).cpu(), rtol=0, atol=3 * 1500 * 2.0**-24)
        assert got[0] == pytest.approx(1, abs=1e-4) and not got[1:5].any() if rows > 3 else True
        norms = a.cpu().double().norm(dim=1) * b.cpu().double().norm(dim=1)
        true = ((a.cpu().double() * b.cpu().double()).sum(1).abs() / norms).nan_to_num(0.0)
        torch.testing.assert_close(got.double(), true, rtol=0, atol=3 * 1500 * 2.0**-24)


def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", list(cases("cpu")))
def test_the_kernel_is_given_views(name):
    """Five dimensions, whose elements are x's, with no copy; rows that are long where neighbours can be joined."""
    x, batch, groups = cases("cpu")[name]
    five = moments._five(x, batch, groups)
    assert five.shape[:2] == (groups, batch) and five.dim() == 5
    assert five.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    ours, theirs = (t.reshape(groups, batch, -1).float().nan_to_num(9.0).sort(-1).values for t in (five, x))
    assert torch.equal(ours, theirs)
    if name == "heads":
        assert five.shape[-1] == 37 * 4 * 32
    if name == "heads of a wider tensor":
        assert five.shape[2:] == (37, 1, 3 * 32)


@pytest.mark.gpu
def test_on_a_gpu():
    check("cuda")
    check_cosines("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 4096, 4096), (2, 4096, 1024), (1, 1000, 21504)])
def test_kernel_and_reference_agree_on_what_a_model_has(shape):
    x = random(*shape, device="cuda")
    sums = room(len(x), moments.partials(len(x), x.device), "cuda")
    look(x, sums)
    again = torch.empty_like(sums)
    look(x, again)
    assert torch.equal(sums, again)
    compare("model", sums, x, len(x), 1)
    expected = reference(x, len(x))
    torch.testing.assert_close(
        total(sums)[:, SQUARES:], expected[:, SQUARES:], rtol=shape[-1] * 2.0**-24, atol=0
    )


@pytest.mark.gpu
def test_compiled_it_is_the_same_and_in_one_graph():
    wide = random(2, 256, 24, 64, device="cuda")
    scale, known = torch.tensor(0.5, device="cuda"), torch.tensor(1e4, device="cuda")
    cast = Cast(scale, FP8_MAX[E4M3], ROUNDS_TO_ZERO[E4M3])

    def run(x: Tensor, sums: Tensor, more: Tensor) -> Tensor:
        q, v = x[:, :, :16] * 2, x[:, :, 16:]
        look(q, sums)
        look(v, sums, add=True)
        look(some_rows(q.transpose(1, 2), 2), more, 1, True, cast, known)
        return q + 1

    results = []
    for call in (run, torch.compile(run, fullgraph=True)):
        sums, more = room(2, 7, "cuda"), room(2, 7, "cuda")
        results.append((call(wide, sums, more), sums, more))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=0, atol=0)
        assert plain.isfinite().all()


def right_bfloat16() -> None:
    """The interpreter's own conversion of bfloat16 gets subnormal numbers wrong."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(x, source, target, mode):
        if (source, target) != (tl.bfloat16, tl.float32):
            return original(x, source, target, mode)
        return np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << 16

    interpreter._convert_float = convert


if __name__ == "__main__":
    right_bfloat16()
    moments.wrap_triton = lambda kernel: kernel  # torch 2.11's takes no interpreted kernels
    check("cpu")
    check_cosines("cpu")
