# SPDX-License-Identifier: Apache-2.0
"""A recipe's `args:` become a TRL config, or one clear error."""

import copy
import dataclasses
import json
import pickle

import pytest

from lora_rlhf._trl import GRPOConfig, RewardConfig, SFTConfig
from lora_rlhf.algorithms.ppo.ppo_trainer import PPOConfig
from lora_rlhf.errors import RecipeError, SetupError
from lora_rlhf.recipe import trl_args
from lora_rlhf.recipe.schema import DataSection, ModelSection, Recipe
from lora_rlhf.training import trl_config

CONFIGS = {"sft": SFTConfig, "reward": RewardConfig, "held_out": RewardConfig, "ppo": PPOConfig}


@pytest.fixture
def recipe():
    return Recipe(
        name="little", seed=7, model=ModelSection(id="tiny"), data=DataSection(max_tokens=77)
    )


@pytest.mark.parametrize("stage", CONFIGS)
def test_every_stage_gets_what_the_recipe_says_and_no_surprises(stage, recipe, tmp_path):
    merged = trl_config.trainer_args(recipe, tmp_path, stage, {"learning_rate": 1.0}, {})
    config = trl_config.build(stage, CONFIGS[stage], merged)
    assert config.output_dir == str(tmp_path / "checkpoints" / stage)
    assert config.seed == 7 and config.run_name == f"little-{stage}"
    assert config.report_to == [] and not config.push_to_hub
    assert not config.bf16 and not config.fp16 and not config.activation_checkpointing
    assert config.save_strategy == "no" and config.adam_epsilon == 1e-5
    assert config.learning_rate == 1.0 and not config.logging_nan_inf_filter
    if stage != "ppo":
        assert config.max_length == 77


def test_the_recipe_comes_before_the_defaults(recipe, tmp_path):
    merged = trl_config.trainer_args(
        recipe, tmp_path, "sft", {"learning_rate": 1.0, "warmup_steps": 3}, {"learning_rate": 2.0}
    )
    assert merged["learning_rate"] == 2.0 and merged["warmup_steps"] == 3


def test_checkpointing_comes_from_the_model_section(tmp_path):
    recipe = Recipe(name="little", model=ModelSection(id="tiny", gradient_checkpointing=True))
    config = trl_config.build(
        "sft", SFTConfig, trl_config.trainer_args(recipe, tmp_path, "sft", {}, {})
    )
    assert config.activation_checkpointing
    assert config.activation_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize("key", sorted(trl_args.OWNED))
def test_a_key_that_is_set_elsewhere_is_refused_with_its_place(key, recipe, tmp_path):
    with pytest.raises(RecipeError, match=f"ppo.args.{key} cannot be set there") as error:
        trl_config.trainer_args(recipe, tmp_path, "ppo", {}, {key: 1})
    assert error.value.remedy == f"use {trl_args.OWNED[key]}"


def test_every_place_that_a_refusal_names_exists(recipe):
    """A home that is spelt like a key is one; TRL still knows the keys that are sent away."""
    known = {f.name for config in CONFIGS.values() for f in dataclasses.fields(config)}
    for key, home in trl_args.OWNED.items():
        assert key in known or key == "fp16" or key == "bf16", key
        section, dot, name = home.partition(".")
        if dot:
            assert name in type(getattr(recipe, section)).model_fields, home


@pytest.mark.parametrize(
    ("stage", "key", "trl", "hint"),
    [
        ("sft", "learning_rat", "SFTConfig", "did you mean 'sft.args.learning_rate'?"),
        ("reward", "center_rewards_coef", "RewardConfig", "center_rewards_coefficient"),
        (
            "ppo",
            "steps_per_generations",
            "GRPOConfig",
            "did you mean 'ppo.args.steps_per_generation'?",
        ),
        ("ppo", "qqqqq", "GRPOConfig", "leave it out"),
    ],
)
def test_an_unknown_key_is_one_clear_error(stage, key, trl, hint, recipe, tmp_path):
    merged = trl_config.trainer_args(recipe, tmp_path, stage, {}, {key: 1})
    with pytest.raises(RecipeError, match=rf"{stage}\.args\.{key}: TRL's {trl} has no") as error:
        trl_config.build(stage, CONFIGS[stage], merged)
    assert hint in error.value.remedy


def test_what_trl_refuses_is_a_recipe_error(recipe, tmp_path):
    merged = trl_config.trainer_args(recipe, tmp_path, "ppo", {}, {"auto_find_batch_size": True})
    for generations in (1, 2):
        with pytest.raises(RecipeError, match=r"ppo\.args: auto_find_batch_size"):
            trl_config.build("ppo", PPOConfig, {**merged, "num_generations": generations})


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_one_completion_a_prompt_fits_every_batch(batch, recipe, tmp_path):
    """GRPO itself refuses it; the rest of its checks stay."""
    merged = trl_config.trainer_args(
        recipe,
        tmp_path,
        "ppo",
        {},
        {
            "per_device_train_batch_size": batch,
            "steps_per_generation": 3,
            "num_generations": 1,
        },
    )
    config = trl_config.build("ppo", PPOConfig, merged)
    assert config.num_generations == 1 and config.generation_batch_size == 3 * batch
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig(**merged)
    with pytest.raises(RecipeError, match="num_generations"):
        trl_config.build("ppo", PPOConfig, {**merged, "num_generations": 2 * batch})


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr_scheduler_kwargs", {"min_lr": 1}), ("lr_scheduler_type", "bent"), ("optim", "magic"),
     ("logging_strategy", 7)],
)  # fmt: skip
def test_arguments_that_would_fail_in_training_fail_at_once(key, value, recipe, tmp_path):
    merged = trl_config.trainer_args(recipe, tmp_path, "sft", {}, {key: value})
    with pytest.raises(RecipeError, match=r"^sft\.args: "):
        trl_config.build("sft", SFTConfig, merged)


def test_a_trainer_that_refuses_its_arguments_is_a_recipe_error():
    with pytest.raises(RecipeError, match=r"^reward\.args: it does not fit"):
        with trl_config.as_recipe_error("held_out"):
            raise ValueError("it does not fit\nand more")
    with pytest.raises(RuntimeError), trl_config.as_recipe_error("sft"):
        raise RuntimeError("not the recipe's fault")


def test_trackers_are_known_and_installed(monkeypatch):
    trl_config.check_trackers([])
    with pytest.raises(RecipeError, match="no tracker 'foo'"):
        trl_config.check_trackers(["foo"])
    monkeypatch.setattr(
        trl_config.integration_utils, "get_available_reporting_integrations", lambda: ["wandb"]
    )
    trl_config.check_trackers(["wandb"])
    with pytest.raises(SetupError, match="the package of neptune is not installed"):
        trl_config.check_trackers(["wandb", "neptune"])


@pytest.mark.parametrize("stage", CONFIGS)
def test_effective_arguments_include_defaults(stage, recipe, tmp_path):
    given = {"learning_rate": 0.5, "num_train_epochs": 2.5}
    if stage == "ppo":
        given |= {"max_steps": 8, "num_generations": 1, "beta": 0.0}
    merged = trl_config.trainer_args(recipe, tmp_path, stage, given, {})
    told = trl_config.effective(trl_config.build(stage, CONFIGS[stage], merged))
    assert told["learning_rate"] == 0.5 and told["adam_epsilon"] == 1e-5
    assert told["lr_scheduler_type"] == "linear" and told["per_device_train_batch_size"] == 8
    assert ("max_steps" in told) == (stage == "ppo") != ("num_train_epochs" in told)
    assert ("epsilon" in told) == (stage == "ppo") and "beta" not in told
    assert stage != "ppo" or "loss_type" not in told  # GRPO's, and PPO has its own
    assert json.loads(json.dumps(told)) == told


def test_arguments_can_be_pickled_and_copied(recipe, tmp_path):
    """Trackers save and copy them; a copy describes itself."""
    args = trl_config.trainer_args(recipe, tmp_path, "sft", {}, {})
    config = trl_config.build("sft", SFTConfig, args)
    assert pickle.loads(pickle.dumps(config)).output_dir == config.output_dir
    other = copy.deepcopy(config)
    other.seed = 12345
    assert other.to_dict()["seed"] == 12345 != config.to_dict()["seed"]
