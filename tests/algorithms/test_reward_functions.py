# SPDX-License-Identifier: Apache-2.0
"""Reward functions: the model, the gold checker and the penalty for a missing eos."""

import json
import random

from datasets import Dataset
from ppo_run import prompts, recipe, roles

from lora_rlhf.algorithms import reward_functions
from lora_rlhf.data.closed_world import checkers, generator
from lora_rlhf.models import scoring

EPISODES = [([5, 6], [7, 8, 1]), ([9], [10, 11])]


def task_prompts(n=8):
    items = generator.items(n, 0, "prompts")
    return items, Dataset.from_list(
        [{"prompt": i.prompt, "item": json.dumps(i.to_dict())} for i in items]
    )


def test_the_models_reward_is_its_score_and_its_offset():
    made = roles()
    [function], weights = reward_functions.of_recipe(recipe(), made, prompts())
    found = function(
        completion_ids=[c for _, c in EPISODES], prompt_ids=[p for p, _ in EPISODES], other=1
    )
    expected = [s + 0.25 for s in scoring.scores(made, EPISODES, "reward")]
    assert found == expected and weights == [1.0] and function.__name__ == "model"


def test_gold_is_logged_beside_the_model_and_used_on_request():
    made, (items, rows) = roles(), task_prompts()
    functions, weights = reward_functions.of_recipe(recipe(), made, rows)
    assert [f.__name__ for f in functions] == ["model", "gold"] and weights == [1.0, 0.0]
    [gold], weights = reward_functions.of_recipe(recipe(reward="gold"), made, rows)
    assert weights == [1.0]
    texts = [
        generator.good(i, random.Random(0)) if k % 2 else "Nonsense." for k, i in enumerate(items)
    ]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    expected = [checkers.check(i, text).reward for i, text in zip(items, texts, strict=True)]
    assert len(set(expected)) > 1
    assert gold(completions=texts, item=rows["item"]) == expected
    assert gold(completions=chats, item=rows["item"]) == expected


def test_the_eos_penalty_is_that_of_ppo():
    made = roles()
    found = reward_functions.eos_penalty(made, 0.5)([[5, 1], [5, 6], []])
    assert found == [0.0, -0.5, -0.5]
