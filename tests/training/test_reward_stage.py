# SPDX-License-Identifier: Apache-2.0
"""The reward stage on tiny models: training, offset, the held-out model, refusal of length."""

import json

import numpy as np
import pytest
import torch
from reward_run import ARGS, DEMONSTRATIONS, last_word, prepared, recipe, run
from small import backbone

from lora_rlhf.errors import GateError
from lora_rlhf.models import scoring
from lora_rlhf.runs.progress import Progress
from lora_rlhf.training.reward import ensemble, reward_gate, reward_stage


def longest(text):
    return len(text.split())


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
    ours = ensemble.scores(made, shown, recipe().reward).rewards
    assert np.mean(ours) == pytest.approx(0, abs=1e-5)
    raw = scoring.scores(made, shown, "reward")
    assert ours[0] == pytest.approx(raw[0] + record.data["stages"]["reward"]["offset"], abs=1e-5)
    torch.manual_seed(0)
    again = backbone("llama", "reference")
    reward_stage.load(again, record)
    assert again.has("held_out")
    assert ensemble.scores(again, shown, recipe().reward).rewards == pytest.approx(ours, abs=1e-5)


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
        reward_gate.check(recipe(), record, Progress(quiet=True))
    reward_gate.check(recipe(gate="warn"), record, Progress(quiet=True))
    assert entry["gate"] == "warned"
