"""A checkpoint of one layout goes on in another, on CPU with gloo: the same curve, full FP8, optimizer and loader included.

Moments are in FP8, but float32 where tensor parallel cuts rows inside a block: there each change of layout converts them.

1 process  --step 4-->  FSDP 2  --step 6-->  HSDP 2 x 2
           --step 4-->  TP 2    --step 6-->  FSDP 2 x TP 2
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_layouts import LAYOUTS, RECIPES, SEQUENCES, STEPS, common_flags, curve, run  # pyrefly: ignore

CHAIN = {"fsdp2": ("one", 4), "tp2": ("one", 4), "hsdp2x2": ("fsdp2", 6), "fsdp2_tp2": ("tp2", 6)}


@pytest.fixture(scope="module")
def curves(tmp_path_factory) -> dict[str, list[tuple[float, float]]]:
    """Layout -> (loss, gradient norm) of each step that it trained."""
    base = tmp_path_factory.mktemp("reshard")
    flags = [*common_flags(base), *RECIPES["delayed"]]
    flags += [
        "--optimizer.fp8.enable",
        "--checkpoint.enable",
        "--checkpoint.interval=2",
        "--checkpoint.keep_latest_k=0",
    ]
    one = [*flags, f"--training.local_batch_size={SEQUENCES}"]
    run(base / "1", 1, {"one": one})
    folders = {"one": base / "1" / "one"}

    def go_on(processes: int) -> None:
        cases, launch = {}, base / str(processes)
        for layout, (source, step) in CHAIN.items():
            if LAYOUTS[layout][0] == processes:
                cases[layout] = [*flags, *LAYOUTS[layout][1]]
                folders[layout] = launch / layout
                kept = Path("checkpoint") / f"step-{step}"
                shutil.copytree(folders[source] / kept, base / "start" / layout / kept)
        run(launch, processes, cases, base / "start")

    go_on(2)
    go_on(4)
    return {layout: curve(folder) for layout, folder in folders.items()}


@pytest.mark.parametrize("layout", CHAIN)
def test_another_layout_continues_the_curve(layout, curves):
    """As between layouts (test_layouts.py): bfloat16 sums in another order. A lost state would show at once: without the
    optimizer's the next steps' norms, without the loader's position the next loss, differ by far more."""
    source, step = CHAIN[layout]
    got, expected = curves[layout], curves["one"][step:]
    assert len(curves["one"]) == STEPS and len(got) == STEPS - step
    for (loss, norm), (loss_one, norm_one) in zip(got, expected, strict=True):
        assert loss == pytest.approx(loss_one, rel=0.01)
        assert norm == pytest.approx(norm_one, rel=0.1)
    (first, _), (first_one, _) = got[0], curves[source][step if source == "one" else step - CHAIN[source][1]]
    assert first == pytest.approx(
        first_one, rel=2e-3
    )  # the same weights and data, nothing trained in between
