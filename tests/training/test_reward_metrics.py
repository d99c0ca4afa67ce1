# SPDX-License-Identifier: Apache-2.0
"""The report on a reward, against numbers by hand; the yardstick of labeler agreement."""

import json

import numpy as np
import pytest
from reward_run import comparisons, last_word, prepared, scores
from small import backbone, tokenizer

from lora_rlhf import estimates
from lora_rlhf.data import dataset_builder
from lora_rlhf.recipe.schema import ModelSection, Recipe
from lora_rlhf.training.reward import reward_metrics
from lora_rlhf.training.reward.reward_metrics import Comparisons, report


def test_report_by_hand():
    found = comparisons(
        [1, 2, -1, -2, 0, 0],
        margin=np.array([1.0, 1, 1, 3, 3, 3]),
        gold=np.array([0.5, 0.5, -1.0, 0.0, 2.0, 2.0]),
    )
    entry = report(found, scores([1, 2, -3, 4, 5, 0]))
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
    entry = report(comparisons([-1] * 9 + [1]), scores([1] * 9 + [-1]))
    assert entry["accuracy_length_baseline"]["value"] == pytest.approx(0.1)
    assert entry["gain_over_length"]["value"] == 0


def test_pairs_of_one_prompt_are_not_taken_for_independent():
    """Ten prompts, six pairs each, all right or all wrong: ten outcomes, not sixty."""
    prompts = [i for i in range(10) for _ in range(6)]
    right = [1.0 if i < 7 else -1.0 for i in prompts]
    entry = report(comparisons([0] * 60, prompts), scores(right))
    plain, ours = estimates.wilson(42, 60), entry["accuracy"]
    assert ours["value"] == plain["value"] and ours["n"] == 60
    assert ours["high"] - ours["low"] > 2 * (plain["high"] - plain["low"])
    assert entry["calibration"][0]["observed_low"] == ours["low"]


def test_every_completion_is_scored_once():
    made, data = backbone(), prepared(last_word)
    found = Comparisons.encode(made, data.held_out)
    row, pair = data.held_out[3], found.pairs[3]
    for side, position in zip(("chosen", "rejected"), pair, strict=True):
        prompt, completion = found.episodes[position]
        assert prompt == made.encode_prompt(row["prompt"])
        assert completion == made.encode_completion(row[side])
    assert len(found.episodes) <= 3 * 40 < 2 * len(data.held_out)
    assert found.longer[3] == len(row["chosen"].split()) - len(row["rejected"].split())


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
