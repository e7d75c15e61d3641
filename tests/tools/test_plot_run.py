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


def with_statistics(folder, layers=3):
    """A run of 40 steps that goes bad, as the monitor writes it; row 7 has a NaN, the first no FP8 history."""
    rows = [{"kind": "run", "step": 0, "model": "m", "recipe": "delayed", "ranks": 1, "device": "CPU"}]
    for step in range(1, 41):
        statistics = {}
        for layer in range(layers):
            name = f"layers.{layer}"
            statistics[f"{name}.ffn_act"] = {"kurtosis": 3.0 * step, "rms": 1.0}
            statistics[f"{name}.residual"] = {"kurtosis": 3.0}
            statistics[f"{name}.attention"] = {"logit_max": 5.0}
            statistics[f"{name}.feed_forward"] = {"alignment_q999": step / 50}
            statistics[f"{name}.attention.wo.x"] = {
                "headroom": 1.0 - layer,
                "saturated_share": 1e-4 * layer,
                "kurtosis": 1e9,
            }
        if step == 1:
            del statistics["layers.0.attention.wo.x"]["headroom"]
        row = {
            "kind": "train",
            "step": step,
            "loss": 3.0 if step < 30 else 3.0 * (step - 28),
            "grad_norm": 1.0,
            "lr": 1e-3,
        }
        row |= {"tokens_per_second": 1e4, "statistics": statistics, "fp8": {"max_saturation": 2.0}}
        row |= {
            "risk": 0.0 if step < 20 else 0.95,
            "cause": None if step < 20 else "layers.2.ffn_act.kurtosis",
        }
        if step == 7:
            statistics["layers.1.ffn_act"]["kurtosis"] = None
            row["nonfinite"] = ["statistics.layers.1.ffn_act.kurtosis"]
        rows.append(row)
    rows.append(
        {
            "kind": "action",
            "step": 25,
            "action": "current_scaling",
            "cause": "fp8_range",
            "why": "x",
            "until": 35,
        }
    )
    rows.append(
        {"kind": "action", "step": 31, "action": "roll_back", "cause": "loss_spike", "why": "x", "target": 20}
    )
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_statistics_by_layer_and_site(plot, tmp_path):
    run = plot.load(with_statistics(tmp_path / "run"), "run")
    kurtosis = run.table("kurtosis")
    assert set(kurtosis) == {(layer, site) for layer in range(3) for site in ("ffn_act", "residual")}
    values = kurtosis[1, "ffn_act"]
    assert values[0] == 3 and values[39] == 120 and values[6] != values[6]
    headroom = run.table("headroom", tensors=True)
    assert set(headroom) == {(layer, "attention.wo.x") for layer in range(3)}
    assert headroom[0, "attention.wo.x"][0] != headroom[0, "attention.wo.x"][0]
    assert [len(run.actions), run.table("entropy")] == [2, {}]


def test_the_worst_of_a_group_is_shown(plot, tmp_path):
    import numpy as np

    table = plot.load(with_statistics(tmp_path / "run"), "run").table("kurtosis")
    by_layer = plot._grouped(table, 0, np.fmax)
    assert list(by_layer) == [0, 1, 2] and by_layer[1][39] == 120
    assert by_layer[1][6] == 3  # what is not a number hides nothing
    assert list(plot._grouped(table, 1, np.fmax)) == ["residual", "ffn_act"]  # as data meets them


@pytest.mark.filterwarnings("error::UserWarning")  # matplotlib warns where a layout collapses
def test_the_page_of_a_watched_run(plot, tmp_path):
    import matplotlib

    out = tmp_path / "run.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert plot.main([str(with_statistics(tmp_path / "run")), "--out", str(out)]) == 0
    text = out.read_text()
    for expected in (
        "Predicted risk of divergence", "risk first at 0.5: step 20", "Kurtosis by layer", "Kurtosis by site",
        "FP8 headroom by layer", "FP8 headroom by tensor", "FFN alignment", "attention logit", "Saturated share",
        "roll back (loss spike)", "current scaling (fp8 range)", ">kurtosis<", ">ffn_act<", ">layer 2<",
    ):  # fmt: skip
        assert expected in text, expected
    assert "FP8 saturation" not in text  # headroom says it by tensor


def test_the_risk_panel_promises_a_cause_only_where_there_is_one(plot, tmp_path):
    from matplotlib.figure import Figure

    run = plot.load(with_statistics(tmp_path / "run"), "run")
    for rows, promised, bottom in ((run.train, True, -0.5), (run.train[:19], False, -0.03)):
        run.train, axis = rows, Figure().subplots()
        plot._risk(axis, run)
        assert ("leading cause" in axis.get_title(loc="left") + axis.get_title()) == promised
        assert axis.get_ylim()[0] == bottom


def test_ticks_of_a_log_scale_are_plain_numbers(plot):
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    axis.plot([3, 80])
    plot.log_scale(axis)
    axis.figure.canvas.draw()
    words = [label.get_text() for label in axis.get_yticklabels(which="both")]
    assert {"5", "10", "20", "50"} <= set(words) and not any("10^" in word for word in words)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_long_run_of_many_layers_is_drawn_in_seconds(plot, tmp_path):
    """2000 rows: a heat map's columns are merged, and the worst step of each is kept."""
    import numpy as np

    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 2001):
            statistics = {
                f"layers.{i}.residual": {"kurtosis": 500.0 if step == 1234 else 3.0} for i in range(80)
            }
            file.write(
                json.dumps({"kind": "train", "step": step, "loss": 2.0, "statistics": statistics}) + "\n"
            )
    seen = []
    original = plot._heat

    def look(axis, *arguments, **options):
        original(axis, *arguments, **options)
        seen.append(axis.collections[0].get_array())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "_heat", look)
        assert plot.main([str(folder), "--out", str(tmp_path / "run.png")]) == 0
    by_layer = seen[0].reshape(80, -1)
    assert by_layer.shape[1] == plot.COLUMNS and np.count_nonzero(by_layer == 500) == 80


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
