# SPDX-License-Identifier: Apache-2.0
"""DPO: its arguments, its first loss, and that it learns."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from policy_run import COMPARISONS, recipe, run

from lora_rlhf.algorithms import dpo
from lora_rlhf.errors import IdentityError


def test_batches_are_those_of_ppo_and_beta_and_rate_its_own(tmp_path):
    asked = recipe("dpo", {"num_train_epochs": 3}, beta=0.3)
    found = dpo.arguments(asked, tmp_path / "run")
    assert (found.beta, found.num_train_epochs) == (0.3, 3)
    assert found.learning_rate == 5e-5 and found.disable_dropout  # its own: not PPO's
    assert found.per_device_train_batch_size == 4 and found.max_length == asked.data.max_tokens


def test_the_first_loss_is_ln_2_on_the_tokens_of_sft(tmp_path):
    made, record = run(tmp_path / "run", recipe("dpo"))
    entry = record.data["stages"]["dpo"]
    assert entry["identities"]["loss_at_start"] == pytest.approx(math.log(2), abs=1e-5)
    assert record.metrics("dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert (entry["comparisons"], entry["optimizer_steps"], entry["beta"]) == (8, 2, 0.1)
    row = dpo.tokenize(made, COMPARISONS)[0]
    assert row["prompt_ids"] == made.encode_prompt("w5")
    assert row["chosen_ids"] == made.encode_completion("w9 w10") and row["chosen_ids"][-1] == 1


def test_it_learns_to_prefer_the_chosen_completions(tmp_path):
    asked = recipe("dpo", {"num_train_epochs": 4})
    _, record = run(tmp_path / "run", asked)
    lines = record.metrics("dpo")
    assert lines[-1]["margin"] > 0 and lines[-1]["loss"] < lines[0]["loss"]


def test_another_first_loss_than_ln_2_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "RATIO_TOLERANCE", {torch.float32: -1.0})
    with pytest.raises(IdentityError, match="first loss of DPO"):
        run(tmp_path / "run", recipe("dpo"))


def test_the_first_check_sees_differences_below_float32(monkeypatch):
    """At 100 nats a step of float32 is eight times the tolerance."""
    by_role = {"policy": [-100.000002], "reference": [-100.0]}
    monkeypatch.setattr(dpo.scoring, "sequence_logprobs", lambda *given: by_role[given[-1]])
    rows = Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}])
    trainer = SimpleNamespace(train_dataset=rows, backbone=None, identities={})
    with pytest.raises(IdentityError):
        dpo.ResumableDPOTrainer.before_training(trainer)
