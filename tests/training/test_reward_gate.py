# SPDX-License-Identifier: Apache-2.0
"""The gate before PPO, on reports by hand and on constructed scores."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from reward_run import comparisons, scores

from lora_rlhf.errors import GateError
from lora_rlhf.runs.progress import Progress
from lora_rlhf.training.reward import reward_gate
from lora_rlhf.training.reward.reward_metrics import report

NAN = float("nan")


def accuracy(value, low, high, n=100):
    return {"value": value, "low": low, "high": high, "n": n}


GOOD = accuracy(0.7, 0.6, 0.79)
BY_LENGTH = accuracy(0.55, 0.45, 0.65)


def entry(found=GOOD, spread=1.0, by_length=BY_LENGTH):
    """A report whose accuracies by length are not known."""
    return {
        "accuracy": found,
        "score_std": spread,
        "accuracy_length_baseline": by_length,
        "accuracy_by_length": {},
        "gain_over_length": accuracy(0.1, 0.0, 0.2),
    }


def test_a_good_reward_model_passes():
    assert reward_gate.weakness(entry()) is None


@pytest.mark.parametrize(
    ("found", "spread", "by_length", "reason"),
    [
        (GOOD, 0.0, BY_LENGTH, "constant"),
        (GOOD, NAN, BY_LENGTH, "constant"),
        (accuracy(0.3, 0.2, 0.4), 1.0, BY_LENGTH, "swapped"),
        (accuracy(0.6, 0.5, 0.7), 1.0, BY_LENGTH, "not clearly above chance"),
        (accuracy(0.6, 0.41, 0.7, 20), 1.0, BY_LENGTH, r"0.600 [0.410, 0.700] on n=20"),
        (accuracy(NAN, NAN, NAN, 0), 1.0, BY_LENGTH, "not clearly above chance"),
        (GOOD, 1.0, accuracy(0.7, 0.6, 0.79), "longer completion"),
    ],
)
def test_a_weak_reward_model_is_refused_with_its_reason(found, spread, by_length, reason):
    assert reason in reward_gate.weakness(entry(found, spread, by_length))


def verdict(found, given):
    return reward_gate.weakness(report(found, given))


def test_the_gate_on_constructed_scores():
    rng = np.random.default_rng(0)
    longer = rng.integers(1, 9, size=200) * np.where(np.arange(200) < 130, 1, -1)
    balanced = rng.integers(1, 9, size=200) * np.where(rng.random(200) < 0.5, 1, -1)
    good = np.where(rng.random(200) < 0.75, 1.0, -1.0)
    chance = np.where(np.arange(200) % 2 == 0, 1.0, -1.0)
    assert verdict(comparisons(balanced), scores(good)) is None
    assert "not clearly above chance" in verdict(comparisons(balanced), scores(chance))
    assert "rejected" in verdict(comparisons(balanced), scores(-good))
    assert "constant" in verdict(comparisons(balanced), np.ones(400))
    assert "longer completion" in verdict(comparisons(longer), scores(longer))
    assert "shorter completion" in verdict(comparisons(-longer), scores(longer))


def test_the_gate_sees_length_behind_a_lucky_accuracy():
    """Right wherever longer is right, and on a tenth of the rest: a little over the rule."""
    longer = np.array([1] * 120 + [-1] * 80)
    mostly = np.array([1.0] * 120 + [1.0] * 3 + [-1.0] * 77)
    reason = verdict(comparisons(longer), scores(mostly))
    assert "goes by length" in reason and "add comparisons" in reason
    assert "0.037 (n=80)" in reason
    # One that leans on length and clearly knows more is no length model.
    more = np.array([1.0] * 120 + [1.0] * 28 + [-1.0] * 52)
    assert verdict(comparisons(longer), scores(more)) is None
    assert report(comparisons(longer), scores(more))["gain_over_length"]["low"] > 0


def test_the_gate_without_an_interval_is_closed():
    reason = verdict(comparisons([1, -1, 1], "aaa"), scores([1, 1, 1]))
    assert "not clearly above chance" in reason


@pytest.mark.parametrize(
    ("content", "stops"),
    [
        ({"judge": "r:reward", "probes": {"padded": accuracy(0.9, 0.8, 1.0)}}, True),
        ({"judge": "r:reward", "probes": {"padded": accuracy(0.6, 0.4, 0.8)}}, False),
        ({"judge": "r:held_out", "probes": {"padded": accuracy(0.9, 0.8, 1.0)}}, False),
        ({"judge": "r:reward", "probes": 3}, False),
        ([], False),
    ],
    ids=["worse", "unclear", "another model", "no probes", "of another program"],
)  # fmt: skip
@pytest.mark.parametrize("gate", ["passed", reward_gate.UNKNOWN])
def test_a_reward_model_that_prefers_worse_answers_is_stopped(tmp_path, content, stops, gate):
    (tmp_path / "judge.json").write_text(json.dumps(content))
    stage = {"gate": gate}
    saved = []
    record = SimpleNamespace(
        folder=tmp_path, data={"stages": {"reward": stage}}, save=lambda: saved.append(dict(stage))
    )

    def check(mode):
        settings = SimpleNamespace(
            ppo=SimpleNamespace(reward="model"), reward=SimpleNamespace(gate=mode)
        )
        reward_gate.check(settings, record, Progress(quiet=True))

    if not stops:
        check("stop")
        assert stage == {"gate": gate} and not saved
        return
    with pytest.raises(GateError, match=r"made worse to better ones \(padded 90%; judge.json\)"):
        check("stop")
    assert stage == {"gate": gate}, "without the file, the gate is what it was"
    check("warn")
    assert saved[0]["gate"] == "warned" and "padded" in saved[0]["gate_reason"]
