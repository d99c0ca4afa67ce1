# SPDX-License-Identifier: Apache-2.0
"""Plots: panels for all logged metrics; the same run gives the same bytes."""

import math
import subprocess
import sys

import pytest

from lora_rlhf import estimates
from lora_rlhf.reports import plots
from lora_rlhf.runs.record import Record


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path, {"stages": {}, "evaluation": {}, "clock": {"stages": {}}})


@pytest.fixture
def drawn(monkeypatch):
    """Title -> axes of every panel, in the order drawn; nothing is rendered."""
    panels = {}
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)
    whole = plots._label

    def label(axes, title, x, y):
        panels[title] = axes
        whole(axes, title, x, y)

    monkeypatch.setattr(plots, "_label", label)
    return panels


def fill(record):
    for step in range(4):
        record.log("sft", step, {"loss": 2.0 - step / 4})
        record.log("reward", step, {"loss": 0.7, "accuracy": 0.5 + step / 20})
        record.log(
            "ppo",
            step,
            {
                "reward/score": step / 10,
                "rewards/gold": step / 20,
                "kl/sequence": step - 0.01,
                "kl/k3": 0.1,
                "policy/entropy": 1.0,
                "policy/clip_fraction": 0.02,
                "policy/ratio_max": 1.1,
                "value/loss": float("nan") if step == 1 else 0.5,
                "value/explained_variance": 0.1,
                "completions/length": 20.0,
                "completions/eos_rate": 0.9,
                "policy/grad_norm": 0.1,
                "value/grad_norm": 4.0,
            },
        )
    record.data["evaluation"] = {
        "base": {"gold_reward": estimates.mean_interval([-1.0, 0.0, 0.5])},
        "sft": {"gold_reward": estimates.mean_interval([0.1, 0.6, 0.2])},
        "policy": {
            "gold_reward": estimates.mean_interval([0.5, 0.7, 0.4]),
            "win_rate": estimates.wilson(3, 3),
            "kl": estimates.mean_interval([4.0]),
        },
    }
    record.data["stages"]["reward"] = {
        "calibration": estimates.calibration([0.3, -0.2, 1.5, 2.0, 3.0, -0.9])
    }


def test_an_empty_run_has_no_plots(record):
    assert plots.run(record) == []
    assert not (record.folder / "plots").exists()


def test_three_plots_with_the_same_bytes_under_any_user_style(record):
    import matplotlib

    fill(record)
    paths = plots.run(record)
    assert [path.name for path in paths] == [
        "training.png",
        "evaluation.png",
        "reward_calibration.png",
    ]
    for path in paths:
        assert path.parent == record.folder / "plots"
        assert path.read_bytes().startswith(b"\x89PNG")
    first = [path.read_bytes() for path in paths]
    drawing = (plots.evaluation, plots.reward_calibration)  # the slow one is saved by the same code
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "savefig.dpi": 30}):
        again = [draw(record).read_bytes() for draw in drawing]
        assert matplotlib.rcParams["font.size"] == 20, "the user's style has to come back"
    assert first[1:] == again
    for data in first:
        for chunk in (b"tEXt", b"iTXt", b"zTXt", b"tIME", b"matplotlib"):
            assert chunk not in data


def test_every_logged_key_has_its_panel(record, drawn):
    fill(record)
    plots.training(record)
    assert len(drawn) == 15
    labels = {line.get_label() for axes in drawn.values() for line in axes.get_lines()}
    logged = {key for line in record.metrics("ppo") for key in line} - {"stage", "step"}
    assert logged <= labels
    score = drawn["PPO: score"].get_lines()
    assert list(score[0].get_ydata()) == [0.0, 0.1, 0.2, 0.3]


def test_nan_leaves_a_gap_and_not_a_crash(record, drawn):
    fill(record)
    plots.training(record)
    assert list(drawn["PPO: value loss"].get_lines()[0].get_xdata()) == [0, 2, 3]


def test_score_is_drawn_over_the_root_of_kl(record, drawn):
    fill(record)
    plots.training(record)
    line = drawn["PPO: score against distance"].get_lines()[0]
    expected = [0.0, math.sqrt(0.99), math.sqrt(1.99), math.sqrt(2.99)]
    assert list(line.get_xdata()) == pytest.approx(expected)


def test_metrics_that_were_not_logged_are_not_drawn(record, drawn):
    record.log("grpo", 0, {"reward": 0.5, "other": 3.0})
    assert plots.training(record) is not None
    assert list(drawn) == ["GRPO: score"]


def test_bars_are_the_models_with_their_intervals(record, drawn):
    fill(record)
    for model, right in (("base", 0), ("sft", 3), ("policy", 9)):  # intervals are lopsided
        record.data["evaluation"][model]["success"] = estimates.wilson(right, 10)
    plots.evaluation(record)
    axes = drawn["success"]
    shown = [values["success"] for values in record.data["evaluation"].values()]
    bars = [patch.get_height() for patch in axes.patches]
    assert bars == [estimate["value"] for estimate in shown]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["base", "sft", "policy"]
    whiskers = [box.lines[2][0].get_segments()[0][:, 1].tolist() for box in axes.containers[::2]]
    assert whiskers == [pytest.approx([e["low"], e["high"]]) for e in shown]


def test_no_whiskers_without_an_interval_and_no_bar_without_a_value(record, drawn):
    fill(record)
    plots.evaluation(record)
    axes = drawn["KL to SFT (nats per sequence)"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["policy"]
    assert len(axes.containers) == 1
    color = drawn["gold reward"].patches[2].get_facecolor()
    assert axes.patches[0].get_facecolor() == color, "a model keeps its colour"


def test_a_value_that_is_not_finite_has_no_bar(record, drawn):
    fill(record)
    for value in (float("nan"), "inf", None, True):
        record.data["evaluation"]["policy"]["gold_reward"]["value"] = value
        plots.evaluation(record)
        assert len(drawn["gold reward"].patches) == 2


def test_calibration_shows_the_observed_accuracy(record, drawn):
    fill(record)
    bins = record.data["stages"]["reward"]["calibration"]
    plots.reward_calibration(record)
    axes = drawn["reward model: calibration"]
    line = axes.get_lines()[1]
    assert list(line.get_ydata()) == [b["observed"] for b in bins]
    assert [text.get_text() for text in axes.texts] == [f"n={b['n']}" for b in bins]


def test_calibration_without_intervals_is_drawn(record):
    record.data["stages"]["reward"] = {
        "calibration": [{"low": 0.5, "high": 0.6, "predicted": 0.55, "observed": 0.5, "n": 9}]
    }
    assert plots.reward_calibration(record) is not None


def test_the_plot_of_an_earlier_attempt_is_removed(record):
    fill(record)
    path = plots.evaluation(record)
    record.data["evaluation"] = {}
    assert plots.evaluation(record) is None
    assert not path.exists()


def test_importing_plots_does_not_import_matplotlib():
    code = "import sys, lora_rlhf.reports.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
