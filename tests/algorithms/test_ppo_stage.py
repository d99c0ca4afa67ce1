# SPDX-License-Identifier: Apache-2.0
"""The PPO stage: its arguments, rewards and roles, and what it leaves behind."""

import pytest
import small
import torch
from ppo_run import prompts, recipe, roles

from lora_rlhf.algorithms import identities, policy_stage
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.errors import DataError, IdentityError, RecipeError
from lora_rlhf.models import scoring
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.serving import loaded_run
from lora_rlhf.training.stage_context import StageContext

EPISODES = [([5, 6], [7, 8, 1]), ([9], [10, 11])]


def arguments(tmp_path, args=None, **section):
    asked = recipe(args, **section)
    return ppo_stage.arguments(asked, tmp_path / "run")


# ----------------------------------------------------------------------- arguments


def test_updates_become_optimizer_steps(tmp_path):
    args = {"steps_per_generation": 6, "gradient_accumulation_steps": 2, "num_iterations": 3}
    found = arguments(tmp_path, args, updates=5)
    assert found.max_steps == 5 * 3 * 6 // 2 and found.logging_steps == 9
    assert found.generation_batch_size == 4 * 6 and found.num_generations == 1


def test_defaults_are_those_of_the_details(tmp_path):
    asked = recipe().model_copy(update={"ppo": recipe().ppo.model_copy(update={"args": {}})})
    found = ppo_stage.arguments(asked, tmp_path / "run")
    assert (found.top_k, found.top_p, found.min_p, found.temperature) == (0, 1.0, None, 1.0)
    assert found.repetition_penalty == 1.0 and found.generation_kwargs is None
    assert found.beta == 0 and found.epsilon == 0.2 and found.disable_dropout
    assert (found.adam_beta1, found.adam_beta2, found.adam_epsilon) == (0.9, 0.95, 1e-5)
    assert found.num_iterations == 1 and found.max_grad_norm == 1.0
    assert not found.use_vllm and not found.bf16 and not found.fp16


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "steps_per_generation 3"),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 4}, "accumulation_steps 4"),
        ({"top_k": 50}, "top_k: 50 changes the distribution"),
        ({"top_p": 0.9}, "top_p: 0.9 changes the distribution"),
        ({"min_p": 0.05}, "min_p: 0.05 changes the distribution"),
        ({"repetition_penalty": 1.1}, "repetition_penalty: 1.1 changes the distribution"),
        ({"generation_kwargs": {"top_k": 5}}, "generation_kwargs: .* changes the distribution"),
        ({"temperature": 0}, "temperature: 0"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast'"),
        ({"max_grad_norm": 0}, "max_grad_norm: 0"),
        ({"epsilon": -0.2}, "epsilon: -0.2"),
        ({"num_iterations": 0}, "num_iterations: 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: 0"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size: 2.5"),
        ({"steps_per_generation": True}, "steps_per_generation: True"),
        ({"num_generations": 3}, "num_generations"),
        ({"beta": 0.1}, r"ppo\.args\.beta cannot be set there"),
        ({"seed": 1}, r"ppo\.args\.seed cannot be set there"),
        ({"max_steps": 10}, "max_steps would do nothing"),
        ({"entropy_coef": 0.01}, "entropy_coef would do nothing"),
        ({"loss_type": "grpo"}, "loss_type would do nothing"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions would do nothing"),
        ({"vllm_importance_sampling_clip_max": 2.0}, "beside ppo.max_staleness: 1"),
        ({"learning_rates": 1e-5}, "TRL's GRPOConfig has no such field"),
    ],
)
def test_what_ppo_cannot_do_is_refused_before_it_starts(tmp_path, args, message):
    with pytest.raises(RecipeError, match=message):
        arguments(tmp_path, args)


def test_keys_without_effect_are_keys_of_trl():
    known = set(ppo_stage.PPOConfig.__dataclass_fields__)
    assert ppo_stage._READ | set(ppo_stage._INSTEAD) <= known


def test_a_run_in_which_the_policy_never_moves_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="value_warmup_updates 2"):
        arguments(tmp_path, updates=2, value_warmup_updates=2)


@pytest.mark.parametrize(("generations", "needed"), [(1, 8), (2, 4)])
def test_a_rollout_needs_its_prompts(tmp_path, generations, needed):
    asked = recipe({"steps_per_generation": 2, "num_generations": generations})
    args = ppo_stage.arguments(asked, tmp_path)
    assert args.generation_batch_size == 8
    policy_stage.check(asked, args, prompts(needed))
    with pytest.raises(DataError, match=f"too few prompts: {needed - 1} are left") as error:
        policy_stage.check(asked, args, prompts(needed - 1))
    assert f"at least {needed}" in error.value.expected


# --------------------------------------------------------------------------- roles


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_policy_starts_as_sft_and_value_as_the_reward(name):
    """Whatever a model calls its heads, the value's first word is the reward with its offset."""
    made = small.backbone(name, "policy", "reference", "reward")
    made.reward_offset["reward"] = 0.25
    ppo_stage.start_roles(made, recipe())
    assert made.state_hash("policy") == made.state_hash("reference")
    ids = torch.tensor([EPISODES[0][0] + EPISODES[0][1]])
    [score] = scoring.scores(made, EPISODES[:1], "reward")
    with torch.no_grad(), made.role("value"):
        states = scoring.hidden_states(made, ids, torch.ones_like(ids))
        value = float(made.head("value")(states[0, -1]))
    assert value == pytest.approx(score + 0.25, abs=1e-5)


def test_roles_start_anew_when_the_stage_is_run_again():
    made = roles()
    ppo_stage.start_roles(made, recipe())
    small.nudge(made, "policy", "value", std=1.0)
    ppo_stage.start_roles(made, recipe())
    assert made.state_hash("policy") == made.state_hash("reference")
    lora = [{n: p for n, p in made.role_parameters(r) if "lora_" in n} for r in ("value", "reward")]
    assert all(torch.equal(p, lora[1][n]) for n, p in lora[0].items())


def test_without_a_reward_model_the_value_starts_from_sft():
    made = small.backbone("llama", "policy", "reference")
    ppo_stage.start_roles(made, recipe(reward="gold"))
    lora = [dict(made.role_parameters(r)) for r in ("value", "reference")]
    assert all(torch.equal(p, lora[0][n]) for n, p in lora[1].items())
    assert made.head("value").weight.abs().max() > 0 and made.head("value").bias == 0


# ------------------------------------------------------------------------- rewards


def test_gold_without_a_checker_is_refused(tmp_path):
    asked = recipe(reward="gold")
    with pytest.raises(DataError, match="no checker"):
        policy_stage.check(asked, ppo_stage.arguments(asked, tmp_path), prompts())


# ----------------------------------------------------------------------- the stage


def run(asked, made, record):
    context = StageContext(asked, made, record, Progress(quiet=True))
    ppo_stage.run(context, ppo_stage.arguments(asked, record.folder), prompts())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of the stage: backbone, recipe, record."""
    asked = recipe({"steps_per_generation": 2}, updates=3, value_warmup_updates=1)
    made = roles()
    record = Record.open(tmp_path_factory.mktemp("ppo") / "run", asked)
    run(asked, made, record)
    return made, asked, record


def test_the_entry_holds_results_and_identities(finished):
    _, _, record = finished
    entry = Record.read(record.folder).data["stages"]["ppo"]
    assert entry["status"] == "done"
    assert (entry["updates"], entry["episodes"], entry["optimizer_steps"]) == (3, 24, 6)
    assert entry["reward"] == "model" and entry["kl_coef"] == 0.05
    assert set(entry["identities"]) == {
        "kl_at_start",
        "ratio_at_start",
        "sampler_difference",
        "mean_abs_log_ratio_after_first_update",
    }
    lines = record.metrics("ppo")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert entry["kl_last"] == lines[-1]["kl/sequence"]
    assert {len(entry[k]) for k in ("adapter_sha256", "value_adapter_sha256")} == {64}


def test_the_saved_policy_is_the_trained_one(finished):
    made, _, record = finished
    trained = scoring.sequence_logprobs(made, EPISODES, "policy")
    assert trained != scoring.sequence_logprobs(made, EPISODES, "reference")
    made.copy_role("reference", "policy")
    loaded_run.load_stage("ppo", made, record)
    assert scoring.sequence_logprobs(made, EPISODES, "policy") == trained
    assert (record.adapter("value") / "adapter_model.safetensors").is_file()


def test_the_stage_leaves_nothing_active(finished):
    made, _, _ = finished
    assert small.active(made) is None
    assert not any(p.requires_grad for v in made.views.values() for p in v.parameters())
    assert not made.causal.training
    assert {"forward", "enable_input_require_grads"}.isdisjoint(made.causal.__dict__)


def test_a_second_run_with_the_same_seed_gives_the_same_bits(finished, tmp_path):
    made, asked, record = finished
    again = Record.open(tmp_path / "run", asked)
    run(asked, made, again)
    first, second = (r.data["stages"]["ppo"] for r in (record, again))
    assert first["adapter_sha256"] == second["adapter_sha256"]
    assert first["value_adapter_sha256"] == second["value_adapter_sha256"]


def test_a_failure_leaves_an_interrupted_stage_and_a_closed_line(tmp_path, monkeypatch):
    asked, ended = recipe(), []
    args = ppo_stage.arguments(asked, tmp_path)
    record = Record.open(tmp_path / "run", asked)
    record.log("ppo", 1, {"reward/score": 1.0})  # of an earlier, interrupted try
    progress = Progress(quiet=True)
    monkeypatch.setattr(progress, "end", lambda: ended.append(True))
    monkeypatch.setattr(identities, "RATIO_TOLERANCE", {torch.float32: -1.0})
    with pytest.raises(IdentityError):
        ppo_stage.run(StageContext(asked, roles(), record, progress), args, prompts())
    assert not Record.read(record.folder).done("ppo") and ended
    assert record.metrics("ppo") == [] and not record.adapter("policy").exists()
