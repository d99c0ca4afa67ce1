# SPDX-License-Identifier: Apache-2.0
"""Best of n: the choice, its samples and its KL."""

import math

import pytest
from policy_run import recipe
from ppo_run import roles

from lora_rlhf.algorithms import best_of_n
from lora_rlhf.errors import RecipeError
from lora_rlhf.runs.record import Record
from lora_rlhf.training.reward import ensemble


def test_the_highest_reward_is_chosen(tmp_path, monkeypatch):
    made, asked = roles(), recipe("best_of_n", n=3)
    drawn = [[7, 1], [8, 1], [9, 1], [7, 1], [9, 1], [9, 9, 1]]
    monkeypatch.setattr(type(made), "generate", lambda *_, **__: drawn)
    score = {7: 0.5, 8: 2.0, 9: 1.0}
    monkeypatch.setattr(
        ensemble,
        "scores",
        lambda _, episodes, *__: ensemble.Scores([score[c[0]] for _, c in episodes], []),
    )
    found = best_of_n.choose(made, [[5], [6]], asked, max_new_tokens=4, temperature=1.0, seed=0)
    assert found == [[8, 1], [9, 1]]  # the first of equals


def test_samples_are_from_sft_with_another_seed(monkeypatch):
    made, asked, calls = roles(), recipe("best_of_n", n=4), []
    real = type(made).generate

    def spy(self, prompts, role, **options):
        calls.append((len(prompts), role, options["seed"]))
        return real(self, prompts, role, **options)

    monkeypatch.setattr(type(made), "generate", spy)
    found = best_of_n.choose(made, [[5], [6]], asked, max_new_tokens=4, temperature=1.0, seed=3)
    assert len(found) == 2 and calls[0][:2] == (8, "reference") and calls[0][2] != 3


def test_the_kl_is_a_bound_from_a_formula(tmp_path):
    asked = recipe("best_of_n", n=16)
    record = Record.open(tmp_path / "run", asked)
    best_of_n.run(asked, record)
    bound = record.data["stages"]["best_of_n"]["kl_bound"]
    assert bound == {
        "value": pytest.approx(math.log(16) - 15 / 16),
        "low": None,
        "high": None,
        "n": 0,
    }
    greedy = asked.model_copy(
        update={"evaluate": asked.evaluate.model_copy(update={"temperature": 0.0})}
    )
    with pytest.raises(RecipeError, match="temperature"):
        best_of_n.check(greedy)
