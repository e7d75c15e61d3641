"""tools/plot_run.py: draws what is there, and says in one line what is not."""

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib (pip install 'titan-fp8[plot]')")

SCRIPT = Path(__file__).parents[2] / "tools" / "plot_run.py"


@pytest.fixture(scope="module")
def plot():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("plot_run")


def write_run(folder, fp8=True, about=True):
    rows = []
    if about:
        about = {"model": "titan_fp8 debug", "recipe": "delayed", "ranks": 2, "device": "CPU"}
        rows.append({"kind": "run", "step": 0, **about, "unigram_entropy": 2.5})
    for step in range(1, 6):
        row = {"kind": "train", "step": step, "loss": 3 / step, "grad_norm": 1.0, "lr": 1e-3}
        row["tokens_per_second"] = 1e4
        if fp8:
            row["fp8"] = {"max_saturation": 0.9, "saturated_tensors": 0, "worst": "a"}
        rows.append(row)
    rows[-1] |= {"loss": None, "nonfinite": ["loss"]}
    rows.append({"kind": "validation", "step": 4, "validation_loss": 1.0})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_series_breaks_where_a_value_is_not_finite_and_skips_unknown_ones(plot, tmp_path):
    run = plot.load(write_run(tmp_path / "run"), "run")
    steps, values, broken = run.series("loss")
    assert (steps, broken) == ([1, 2, 3, 4, 5], [5])
    assert values[:4] == [3.0, 1.5, 1.0, 0.75] and values[4] != values[4]
    assert run.series("fp8.max_saturation") == ([1, 2, 3, 4, 5], [0.9] * 5, [])
    assert run.series("mfu") == ([], [], [])


@pytest.mark.filterwarnings("error::UserWarning")  # matplotlib warns where a layout collapses
def test_a_picture_with_a_panel_per_known_metric(plot, tmp_path):
    """The SVG is told to keep its text, so that panels and names can be read from it."""
    import matplotlib

    full, plain = write_run(tmp_path / "full"), write_run(tmp_path / "plain", fp8=False, about=False)
    out = tmp_path / "run.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert plot.main([str(full), "--out", str(out)]) == 0
        text = out.read_text()
        panels = ["Loss (nats per token)", "Gradient norm", "Learning rate", "Throughput", "FP8 saturation"]
        for expected in [*panels, "token frequencies alone", "held-out", "titan_fp8 debug, delayed, 2 x CPU"]:
            assert expected in text
        assert plot.main([str(plain), "--out", str(out)]) == 0
        assert "FP8 saturation" not in out.read_text()
        assert plot.main([str(full), str(plain), "--out", str(out)]) == 0
        assert ">full<" in out.read_text() and ">plain<" in out.read_text()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing", None, "does not exist"),
        ("empty", "", "has none"),
        ("torn", '{"kind": "train", "st', "has none"),
    ],
)
def test_bad_input_is_one_line_and_status_2(plot, tmp_path, capsys, name, content, expected):
    folder = tmp_path / name
    if content is not None:
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(content)
    assert plot.main([str(folder), "--out", str(tmp_path / "run.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error and error.count("\n") == 1
    assert not (tmp_path / "run.png").exists()


@pytest.mark.parametrize("out", ["picture.gif2", "no/such/folder/run.png"])
def test_bad_out_is_one_line_and_status_2(plot, tmp_path, capsys, out):
    assert plot.main([str(write_run(tmp_path / "run")), "--out", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert "--out must" in error and error.count("\n") == 1
