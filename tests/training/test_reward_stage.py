# SPDX-License-Identifier: Apache-2.0
"""The reward stage on tiny models: what it reports, against numbers by hand, and its gate."""

import json

import numpy as np
import pytest
import torch
from reward_run import ARGS, DEMONSTRATIONS, last_word, prepared, recipe, run
from small import backbone, tokenizer

from lora_rlhf import estimates
from lora_rlhf.data import dataset_builder
from lora_rlhf.errors import GateError
from lora_rlhf.models import scoring
from lora_rlhf.recipe.schema import ModelSection, Recipe
from lora_rlhf.runs.progress import Progress
from lora_rlhf.training.reward import ensemble, reward_gate, reward_metrics, reward_stage
from lora_rlhf.training.reward.reward_metrics import Comparisons, report


def longest(text):
    return len(text.split())


# -------------------------------------------------------------------------- a trained model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    agreement = {"measured": 0.9, "low": 0.85, "high": 0.94, "pairs": 211}
    data = prepared(last_word, labeler_agreement=agreement)
    return *run(tmp_path_factory.mktemp("good") / "run", data, prepared(last_word, 20)), data


def test_a_stage_that_learned_passes_and_says_how_well(trained):
    made, record, data = trained
    entry = record.data["stages"]["reward"]
    assert entry["gate"] == "passed" and "gate_reason" not in entry
    assert entry["accuracy"]["low"] > 0.7 and entry["accuracy"]["n"] == len(data.held_out)
    assert entry["prompts"] == len(set(data.train["group"])) == 60
    assert entry["steps"] == 15, "a batch counts prompts"
    assert entry["labeler_agreement"] == {"value": 0.9, "low": 0.85, "high": 0.94, "n": 211}
    assert entry["held_out_accuracy"]["value"] > 0.6 and "ensemble" not in entry
    assert entry["agreement_with_held_out"]["n"] == len(data.held_out)
    parts = entry["accuracy_by_length"].values()
    assert sum(part["n"] for part in parts) == len(data.held_out)
    assert len(entry["accuracy_by_score_margin"]) == 3
    json.dumps(record.data)  # plain numbers


def test_demonstrations_score_zero_and_the_offset_is_loaded_again(trained):
    made, record, _ = trained
    shown = reward_stage._episodes(made, DEMONSTRATIONS)
    ours = ensemble.rewards_of(made, shown, recipe().reward)
    assert np.mean(ours) == pytest.approx(0, abs=1e-5)
    raw = scoring.scores(made, shown, "reward")
    assert ours[0] == pytest.approx(raw[0] + record.data["stages"]["reward"]["offset"], abs=1e-5)
    torch.manual_seed(0)
    again = backbone("llama", "reference")
    reward_stage.load(again, record)
    assert again.has("held_out")
    assert ensemble.rewards_of(again, shown, recipe().reward) == pytest.approx(ours, abs=1e-5)


def test_the_second_model_is_another_one(trained):
    made, record, _ = trained
    assert made.state_hash("held_out") != made.state_hash("reward")
    assert record.data["stages"]["reward"]["held_out_accuracy"]["n"] > 0


def test_labels_that_pay_length_alone_are_refused(tmp_path):
    _, record = run(tmp_path / "run", prepared(longest), args={**ARGS, "num_train_epochs": 2})
    entry = record.data["stages"]["reward"]
    assert entry["accuracy"]["low"] > 0.55, "it did learn to prefer the longer one"
    assert entry["accuracy_length_baseline"]["value"] == 1.0
    assert entry["gate"] == "failed" and "longer completion" in entry["gate_reason"]
    with pytest.raises(GateError, match="longer completion.*add comparisons"):
        reward_stage.gate(recipe(), record, Progress(quiet=True))
    reward_stage.gate(recipe(gate="warn"), record, Progress(quiet=True))
    assert entry["gate"] == "warned"


# ------------------------------------------------------------------------------ the report


def comparisons(longer, prompts=None, **more):
    """N comparisons of 2 N completions; scores are given as [chosen, rejected] in turn."""
    n = len(longer)
    pairs = np.arange(2 * n).reshape(n, 2)
    return Comparisons([], pairs, list(prompts or range(n)), np.array(longer, float), **more)


def scores(margins):
    return np.array([[m, 0.0] for m in margins], float).ravel()


def test_report_by_hand():
    found = comparisons(
        [1, 2, -1, -2, 0, 0],
        margin=np.array([1.0, 1, 1, 3, 3, 3]),
        gold=np.array([0.5, 0.5, -1.0, 0.0, 2.0, 2.0]),
    )
    entry = report(found, scores([1, 2, -3, 4, 5, 0])).entry
    assert entry["accuracy"] == estimates.wilson(4.5, 6)
    assert entry["accuracy_length_baseline"] == estimates.wilson(3, 6)
    assert entry["gain_over_length"]["value"] == pytest.approx(0.25)
    assert entry["accuracy_by_length"] == {
        "longer": estimates.wilson(2, 2),
        "shorter": estimates.wilson(1, 2),
        "equal": estimates.wilson(1.5, 2),
    }
    thirds = entry["accuracy_by_score_margin"]
    assert [(t["from"], t["to"], t["value"], t["n"]) for t in thirds] == [
        (0, 1, 0.75, 2),
        (2, 3, 0.5, 2),
        (4, 5, 1.0, 2),
    ]
    labels = entry["accuracy_by_label_margin"]
    assert [(t["from"], t["to"], t["n"]) for t in labels] == [(1, 1, 3), (3, 3, 3)]
    # The label of the third is wrong by gold, and so is preferring its chosen completion.
    assert entry["accuracy_against_gold"] == estimates.wilson(4.5, 5)
    assert entry["calibration_error"] == estimates.calibration_error(entry["calibration"])
    assert entry["mean_margin"] == pytest.approx(1.5)


def test_shorter_is_a_rule_by_length_too():
    entry = report(comparisons([-1] * 9 + [1]), scores([1] * 9 + [-1])).entry
    assert entry["accuracy_length_baseline"]["value"] == pytest.approx(0.1)
    assert entry["gain_over_length"]["value"] == 0


def test_pairs_of_one_prompt_are_not_taken_for_independent():
    """Ten prompts, six pairs each, all right or all wrong: ten outcomes, not sixty."""
    prompts = [i for i in range(10) for _ in range(6)]
    right = [1.0 if i < 7 else -1.0 for i in prompts]
    entry = report(comparisons([0] * 60, prompts), scores(right)).entry
    plain, ours = estimates.wilson(42, 60), entry["accuracy"]
    assert ours["value"] == plain["value"] and ours["n"] == 60
    assert ours["high"] - ours["low"] > 2 * (plain["high"] - plain["low"])
    assert entry["calibration"][0]["observed_low"] == ours["low"]


def test_share_interval_covers():
    rng, inside, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        p = rng.beta(7, 3, size=40)  # 40 prompts, six pairs each, mean 0.7
        outcomes = (rng.random((40, 6)) < p[:, None]).astype(float).ravel()
        found = estimates.share_interval(outcomes, np.repeat(np.arange(40), 6).tolist())
        inside += found["low"] <= 0.7 <= found["high"]
    assert 0.93 <= inside / runs <= 0.98


def test_share_interval_at_its_edges():
    assert estimates.share_interval([1, 0, 1], "abc") == estimates.wilson(2, 3)
    assert estimates.share_interval([1, 0], "aa") == {
        "value": 0.5,
        "low": None,
        "high": None,
        "n": 2,
    }
    sure = estimates.share_interval([1.0] * 8, list("aabbccdd"))
    assert sure["high"] == 1.0 and sure["low"] < estimates.wilson(4, 4)["low"]
    with pytest.raises(ValueError, match="0 to 1"):
        estimates.share_interval([2.0], "a")
    with pytest.raises(ValueError, match="2 outcomes but 1"):
        estimates.share_interval([1, 0], "a")


def test_every_completion_is_scored_once(trained):
    made, _, data = trained
    found = Comparisons.encode(made, data.held_out)
    row, pair = data.held_out[3], found.pairs[3]
    for side, position in zip(("chosen", "rejected"), pair, strict=True):
        prompt, completion = found.episodes[position]
        assert prompt == made.encode_prompt(row["prompt"])
        assert completion == made.encode_completion(row[side])
    assert len(found.episodes) <= 3 * 40 < 2 * len(data.held_out)
    assert found.longer[3] == longest(row["chosen"]) - longest(row["rejected"])


# ------------------------------------------------------------------------- labeler agreement


def labelled(tmp_path, rows):
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = Recipe(
        name="labels",
        model=ModelSection(id="tiny"),
        data={"comparisons": [{"path": str(path)}], "held_out": 0.4},
    )
    return dataset_builder.comparisons(chosen, tokenizer(markers=())).report


def test_labelers_who_judged_the_same_pair_give_the_yardstick(tmp_path):
    rows = []
    for i in range(40):
        a, b = {"chosen": f"w5 w{i}", "rejected": "w7"}, {"chosen": "w7", "rejected": f"w5 w{i}"}
        rows.append({"prompt": f"q w{i}", **a, "labeler": "ann"})
        if i < 20:
            rows.append({"prompt": f"q w{i}", **(b if i < 5 else a), "labeler": "ben"})
    agreement = labelled(tmp_path, rows)["labeler_agreement"]
    share = estimates.wilson(15, 20)
    assert agreement == {
        "measured": 0.75,
        "low": share["low"],
        "high": share["high"],
        "pairs": 20,
        "labelers": 2,
    }
    assert reward_metrics.ceiling(agreement) == share


def test_without_overlap_there_is_no_yardstick(tmp_path):
    rows = [
        {"prompt": f"q w{i}", "chosen": f"w{i}", "rejected": "w7 w8", "labeler": "ann"}
        for i in range(10, 40)
    ]
    assert "labeler_agreement" not in labelled(tmp_path, rows)
    assert reward_metrics.ceiling(None) is None
    assert reward_metrics.ceiling({"asked": 0.7, "measured": None, "pairs": 0}) is None


# ------------------------------------------------------------------------------------ gate


def verdict(found, given):
    entry = report(found, given).entry
    return reward_gate.gate_reward(
        entry["accuracy"],
        entry["score_std"],
        entry["accuracy_length_baseline"],
        entry["accuracy_by_length"],
        entry["gain_over_length"],
    )


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
    assert report(comparisons(longer), scores(more)).entry["gain_over_length"]["low"] > 0


def test_the_gate_without_an_interval_is_closed():
    reason = verdict(comparisons([1, -1, 1], "aaa"), scores([1, 1, 1]))
    assert "not clearly above chance" in reason
