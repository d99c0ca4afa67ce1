# SPDX-License-Identifier: Apache-2.0
"""Checks of a stage's `args:`, which read the fields of TRL's configs without loading TRL."""

import dataclasses

import pytest

from lora_rlhf import _trl
from lora_rlhf.errors import RecipeError
from lora_rlhf.recipe import trl_args
from lora_rlhf.recipe.loader import parse_recipe

CONFIGS = {
    "sft": _trl.SFTConfig, "reward": _trl.RewardConfig, "ppo": _trl.GRPOConfig,
    "grpo": _trl.GRPOConfig, "rloo": _trl.RLOOConfig, "dpo": _trl.DPOConfig,
}  # fmt: skip


def recipe(**sections):
    data = "name: x\nmodel: {id: tiny}\ndata: {comparisons: [{task: closed-world}]}\n"
    return parse_recipe(data + "".join(f"{k}: {v}\n" for k, v in sections.items()), "r.yaml")


@pytest.mark.parametrize("stage", CONFIGS)
def test_the_fields_read_from_source_are_those_of_the_config(stage):
    real = {field.name for field in dataclasses.fields(CONFIGS[stage]) if field.init}
    assert trl_args.fields(stage) == real


@pytest.mark.parametrize(
    ("algorithm", "section", "args", "message"),
    [
        ("ppo", "sft", "{learning_rat: 1}", "SFTConfig has no such field"),
        ("ppo", "sft", "{bf16: true}", "sft.args.bf16 cannot be set there"),
        ("ppo", "reward", "{deepspeed: x}", "reward.args.deepspeed cannot be set"),
        ("ppo", "ppo", "{beta: 0.1}", "use ppo.kl_coef"),
        ("grpo", "grpo", "{beta: 0.1}", "use grpo.kl_coef"),
        ("dpo", "dpo", "{beta: 0.1}", "use dpo.beta"),
        ("ppo", "sft", "{beta: 0.1}", "SFTConfig has no such field"),
        ("rloo", "rloo", "{lr: 1}", "RLOOConfig has no such field"),
        ("dpo", "dpo", "{loss_type: kto_pair}", "'kto_pair'\n.*bco_pair, .*sigmoid"),
        ("dpo", "dpo", "{loss_type: [ipo, sigmod]}", "'sigmod'\n"),
        ("dpo", "dpo", "{f_divergence_type: kl}", "'kl'\n.*reverse_kl"),
        ("grpo", "grpo", "{loss_type: gspo}", "'gspo'\n.*dr_grpo"),
        ("grpo", "grpo", "{scale_rewards: std}", "'std'\n.*batch, group, none"),
        ("ppo", "sft", "{warmup_ratio: 0.1}", "did you mean 'sft.args.warmup_steps'"),
    ],
)
def test_unknown_and_unusable_names_are_refused(algorithm, section, args, message):
    with pytest.raises(RecipeError, match=message):
        trl_args.check(recipe(algorithm=algorithm, **{section: f"{{args: {args}}}"}))


@pytest.mark.parametrize(("algorithm", "args"), [
    ("dpo", "{loss_type: [ipo, sft]}"), ("dpo", "{f_divergence_type: js_divergence}"),
    ("grpo", "{loss_type: dr_grpo, scale_rewards: false}"), ("grpo", "{scale_rewards: batch}"),
])  # fmt: skip
def test_names_that_trl_knows_are_taken(algorithm, args):
    trl_args.check(recipe(algorithm=algorithm, **{algorithm: f"{{args: {args}}}"}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("per_device_train_batch_size", 0), ("per_device_train_batch_size", 2.5),
        ("gradient_accumulation_steps", True), ("learning_rate", "fast"), ("learning_rate", 0),
        ("learning_rate", float("inf")), ("num_train_epochs", 0), ("max_steps", 0),
        ("weight_decay", -1), ("adam_beta1", 1), ("warmup_steps", "ten"), ("packing", "no"),
        ("packing", "false"), ("packing", 1), ("dataloader_num_workers", "2"),
        ("neftune_noise_alpha", "5"), ("logging_first_step", None),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(key, value):
    with pytest.raises(RecipeError, match=rf"^sft\.args\.{key}: ") as caught:
        trl_args.refuse("sft", {key: value})
    assert caught.value.expected and caught.value.exit_code == 2


def test_ordinary_arguments_pass():
    trl_args.check(
        recipe(
            sft="{args: {learning_rate: 2.0e-4, num_train_epochs: 2.5, warmup_steps: 0}}",
            reward="{args: {weight_decay: 0}}",
            ppo="{args: {steps_per_generation: 4}}",
        )
    )
    trl_args.check(
        recipe(
            sft="{args: {packing: true, neftune_noise_alpha: 5, logging_steps: 2, run_name: x, "
            "lr_scheduler_kwargs: {power: 2}, padding_free: false, torch_empty_cache_steps: null}}",
        )
    )


def test_all_reward_models_share_one_section():
    with pytest.raises(RecipeError, match=r"^reward\.args\.learning_rate"):
        trl_args.refuse("held_out", {"learning_rate": -1})
