# SPDX-License-Identifier: Apache-2.0
"""Arguments of GRPO and RLOO."""

import pytest
from policy_run import recipe
from ppo_run import ARGS

from lora_rlhf.algorithms import grpo_rloo
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.errors import RecipeError


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_the_budget_is_that_of_ppo(tmp_path, name):
    args = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 3}
    asked = recipe(name, ppo={"updates": 5, "kl_coef": 0.07, "args": {**ARGS, **args}})
    found = grpo_rloo.arguments(asked, tmp_path / "run")
    assert found.max_steps == 5 * 3 * 4 // 2 and found.logging_steps == 6
    assert found.generation_batch_size == 4 * 4 and found.num_generations == 4
    assert found.beta == 0.07 and found.learning_rate == ARGS["learning_rate"]
    assert found.max_completion_length == 6 and found.temperature == 1.0
    assert (found.top_k, found.top_p) == (0, 1.0) and found.disable_dropout


def test_its_own_args_override_those_of_ppo(tmp_path):
    args = {"learning_rate": 3e-4, "max_completion_length": 5, "per_device_train_batch_size": 6}
    asked = recipe("grpo", args, updates=7, kl_coef=0.0, num_generations=3)
    found = grpo_rloo.arguments(asked, tmp_path)
    assert (found.learning_rate, found.max_completion_length) == (3e-4, 5)
    assert (found.beta, found.num_generations, found.max_steps) == (0.0, 3, 14)
    limits = [ppo_stage.completion_limit(asked, name) for name in ("grpo", "ppo")]
    assert limits == [5, 6]


def test_a_group_must_fit_into_a_rollout(tmp_path):
    asked = recipe("grpo", num_generations=3)
    with pytest.raises(RecipeError, match="num_generations"):
        grpo_rloo.arguments(asked, tmp_path / "run")
