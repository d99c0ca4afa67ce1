# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments and prompts that the stages share."""

import pytest
from policy_run import recipe
from ppo_run import prompts

from lora_rlhf.algorithms import dpo, grpo_rloo, policy_stage
from lora_rlhf.errors import DataError, RecipeError


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("grpo", {"beta": 0.1}, "use grpo.kl_coef"),
        ("rloo", {"num_generations": 2}, "use rloo.num_generations"),
        ("grpo", {"max_steps": 2}, "use grpo.updates"),
        ("grpo", {"top_k": 5}, "whole distribution"),
        ("grpo", {"seed": 5}, "use seed"),
        ("grpo", {"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "divisible"),
        ("grpo", {"num_iterations": 0}, "num_iterations: 0"),
        ("rloo", {"learning_rates": 1}, "TRL's RLOOConfig has no such field"),
        ("dpo", {"beta": 0.2}, "use dpo.beta"),
        ("dpo", {"max_length": 9}, "use data.max_tokens"),
        ("dpo", {"lossy": 9}, "TRL's DPOConfig has no such field"),
    ],
)
def test_keys_that_are_set_elsewhere_are_refused(tmp_path, name, args, message):
    asked = recipe(name, args)
    arguments = dpo.arguments if name == "dpo" else grpo_rloo.arguments
    with pytest.raises(RecipeError, match=message):
        arguments(asked, tmp_path / "run")


def test_a_rollout_needs_its_prompts_and_gold_its_checker(tmp_path):
    asked = recipe("grpo")
    args = grpo_rloo.arguments(asked, tmp_path)
    policy_stage.check(asked, args, prompts(2))
    with pytest.raises(DataError, match="too few prompts: 1 are left"):
        policy_stage.check(asked, args, prompts(1))
    gold = recipe("rloo", ppo={"reward": "gold"})
    with pytest.raises(DataError, match="no checker"):
        policy_stage.check(gold, args, prompts(8))
