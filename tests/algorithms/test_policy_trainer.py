# SPDX-License-Identifier: Apache-2.0
"""What all algorithms share: only the policy moves, against a reference that is SFT and frozen."""

import math

import pytest
import small
import torch
from peft import PeftModel
from policy_run import recipe, run
from ppo_run import ARGS, eos_more_often, roles
from several import assert_near

from lora_rlhf._trl import SEAMS, DPOTrainer, GRPOTrainer, RLOOTrainer
from lora_rlhf.algorithms import dpo, grpo_rloo, reward_functions
from lora_rlhf.algorithms.identities import FrozenRolesCheck
from lora_rlhf.errors import IdentityError, NonFiniteError
from lora_rlhf.runs.record import Record


@pytest.fixture(scope="module", params=["grpo", "rloo", "dpo"])
def finished(request, tmp_path_factory):
    """One run of each algorithm, with the hashes from before it."""
    made = roles()
    before = {r: made.state_hash(r) for r in (None, "reference", "reward", "policy")}
    folder = tmp_path_factory.mktemp(request.param) / "run"
    made, record = run(folder, recipe(request.param), made)
    return request.param, made, record, before


def test_only_the_policy_moves(finished):
    _, made, _, before = finished
    for role in (None, "reference", "reward"):
        assert made.state_hash(role) == before[role]
    assert made.state_hash("policy") not in (before["policy"], before["reference"])


def test_trls_clone_of_the_policy_is_dropped_and_never_saved(finished):
    _, made, record, _ = finished
    assert set(made.views["policy"].peft_config) == {"default", "reference"}
    assert not [n for n, _ in made.views["policy"].named_parameters() if ".ref." in n]
    assert {p.name for p in (record.folder / "adapters").iterdir()} == {"policy"}
    assert small.active(made) is None
    assert not any(p.requires_grad for p in made.views["policy"].parameters())


def test_other_adapters_stay_frozen_where_peft_makes_all_trainable(monkeypatch, tmp_path):
    """As PEFT 0.20 does when TRL adds its clone."""
    real = PeftModel.add_adapter

    def add(self, *args, **options):
        real(self, *args, **options)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora_" in name)

    monkeypatch.setattr(PeftModel, "add_adapter", add)
    _, record = run(tmp_path / "run", recipe("dpo"), roles())
    assert record.done("dpo")


def test_the_entry_holds_results_and_identities(finished):
    name, _, record, _ = finished
    entry = record.data["stages"][name]
    assert entry["status"] == "done" and len(entry["adapter_sha256"]) == 64
    assert entry["identities"]["kl_at_start"] == 0
    assert entry["identities"]["only_policy_moved"] == 1
    assert entry["identities"]["reference_tensors_tied"] > 0
    rate = 5e-5 if name == "dpo" else ARGS["learning_rate"]
    assert entry["args"]["learning_rate"] == rate
    lines = record.metrics(name)
    assert len(lines) == 2  # two updates; or one epoch over 8 comparisons, 4 at a time
    assert all(math.isfinite(line["policy/grad_norm"]) for line in lines)


def test_rollouts_are_logged_under_ppos_names(finished):
    name, _, record, _ = finished
    if name == "dpo":
        line = record.metrics("dpo")[0]
        assert {"loss", "accuracy", "margin", "policy/entropy", "rewards/chosen"} <= line.keys()
        return
    lines, entry = record.metrics(name), record.data["stages"][name]
    wanted = {
        "reward/score",
        "reward/score_std",
        "kl/sequence",
        "kl/k1",
        "kl/k3",
        "kl/coef",
        "policy/entropy",
        "policy/clip_fraction",
        "completions/length",
        "completions/eos_rate",
        "completions/repetition",
        "rewards/model",
        "rewards/missing_eos",
        "reward/groups_without_spread",
    }
    assert wanted <= lines[0].keys()
    assert lines[0]["kl/sequence"] == 0 and lines[1]["kl/sequence"] != 0
    assert lines[0]["reward/score"] == pytest.approx(lines[0]["rewards/model"], abs=1e-5)
    share = 1 - lines[0]["completions/eos_rate"]
    assert lines[0]["rewards/missing_eos"] == pytest.approx(-share)
    assert entry["episodes"] == 2 * 8 and entry["num_generations"] == 4
    assert entry["kl_last"] == lines[-1]["kl/sequence"]
    assert not {"entropy", "kl", "reward", "completions/mean_length"} & lines[0].keys()


def test_two_equal_runs_give_equal_bits(finished, tmp_path):
    name, _, record, _ = finished
    _, again = run(tmp_path / "run", recipe(name))
    key = "adapter_sha256"
    assert again.data["stages"][name][key] == record.data["stages"][name][key]


@pytest.mark.parametrize("name, loss", [("grpo", "dapo"), ("grpo", "bnpo"), ("rloo", None)])
def test_sorted_and_trimmed_rows_change_nothing_but_padding(tmp_path, monkeypatch, name, loss):
    args = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
        "steps_per_generation": 8, "max_completion_length": 20, "learning_rate": 1e-3,
    }  # fmt: skip
    asked = recipe(
        name, {"loss_type": loss} if loss else None, ppo={"updates": 2, "args": {**ARGS, **args}}
    )

    def sizes(folder):
        """Token columns of all forwards, with and without gradient."""
        made, computed = eos_more_often(roles()), []

        def count(_, args, inputs):
            computed.append((inputs["input_ids"].numel(), torch.is_grad_enabled()))

        made.decoder.register_forward_pre_hook(count, with_kwargs=True)
        run(tmp_path / folder, asked, made)
        return [sum(n for n, grad in computed if grad is mode) for mode in (True, False)]

    ours = sizes("ours")
    for method in ("_prepare_inputs", "_get_per_token_logps_and_entropies"):
        monkeypatch.delattr(grpo_rloo._GroupTrainer, method)
    padded = sizes("theirs")
    assert_near(tmp_path / "ours", tmp_path / "theirs")
    assert all(n < 0.9 * whole for n, whole in zip(ours, padded, strict=True)), (ours, padded)


def test_padding_far_from_the_policy_leaves_the_loss_finite(tmp_path, monkeypatch):
    real = grpo_rloo.scoring.logprobs_of

    def unlikely_after_eos(backbone, states, ids, *rest):
        logprobs, entropies = real(backbone, states, ids, *rest)
        eos = (ids[:, -logprobs.shape[1] :] == small.EOS).int()
        return logprobs - 200.0 * (eos.cumsum(dim=1) > eos), entropies

    monkeypatch.setattr(grpo_rloo.scoring, "logprobs_of", unlikely_after_eos)
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
            "steps_per_generation": 8, "max_completion_length": 20}  # fmt: skip
    asked = recipe("grpo", kl_coef=0.05, ppo={"updates": 1, "args": {**ARGS, **args}})
    _, record = run(tmp_path / "run", asked, eos_more_often(roles()))
    assert all(math.isfinite(line["loss"]) for line in record.metrics("grpo"))


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_trls_reference_is_sft_during_training(tmp_path, monkeypatch, load_in_4bit):
    """Under TRL's own switch to its clone the outputs are those of the reference role."""
    made = roles(load_in_4bit=load_in_4bit)
    made.views["policy"].active_adapter = "reference"  # as after loading a finished SFT stage
    seen, real = [], grpo_rloo._GroupTrainer._get_per_token_logps_and_entropies

    def spy(self, *args, **kwargs):
        found = real(self, *args, **kwargs)
        active = {tuple(layer._active_adapter) for layer in made._lora_layers()}
        seen.append((active, torch.is_grad_enabled()))
        if active == {("ref",)}:
            with made.role("reference"):
                assert torch.equal(real(self, *args, **kwargs)[0], found[0])
        return found

    monkeypatch.setattr(grpo_rloo._GroupTrainer, real.__name__, spy)
    run(tmp_path / "run", recipe("grpo"), made)
    assert ({("ref",)}, False) in seen and ({("default",)}, True) in seen
    assert all(active == {("default",)} for active, training in seen if training)


def test_a_clone_that_is_not_sft_stops_the_run(tmp_path, monkeypatch):
    made = roles()
    monkeypatch.setattr(made, "copy_role", lambda source, target: None)
    with pytest.raises(IdentityError, match="not the SFT adapter"):
        run(tmp_path / "run", recipe("dpo"), made)


def test_a_frozen_role_that_moves_stops_the_run():
    made = roles()
    made.copy_role("reference", "policy")
    check = FrozenRolesCheck.take(made, "grpo", ("policy",))
    with pytest.raises(IdentityError, match="the policy did not move"):
        check.check()
    with torch.no_grad():
        made.role_parameters("policy")[0][1].add_(1)
    assert check.check() == {"only_policy_moved": 1}
    with torch.no_grad():
        made.role_parameters("reward")[0][1].add_(1)
    with pytest.raises(IdentityError, match="the reward moved"):
        check.check()


def test_a_step_that_can_move_nothing_is_not_checked(tmp_path):
    """A learning rate that warms up from 0 makes such a first step."""
    asked = recipe("dpo", {"warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup"})
    _, record = run(tmp_path / "run", asked)
    assert record.data["stages"]["dpo"]["identities"]["only_policy_moved"] == 1


@pytest.mark.parametrize("algorithm", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_nan_rewards_are_skipped_and_then_stop_the_run(tmp_path, monkeypatch, algorithm):
    """TRL would take a NaN for 0."""
    monkeypatch.setattr(
        reward_functions,
        "of_recipe",
        lambda *_: ([lambda completion_ids, **_: [math.nan] * len(completion_ids)], [1.0]),
    )
    made = roles()
    with pytest.raises(NonFiniteError, match="3 updates in a row .* reward of 8 episodes"):
        run(tmp_path / "run", recipe(algorithm, ppo={"updates": 4}), made)
    assert made.state_hash("policy") == made.state_hash("reference")
    [first, second] = Record.read(tmp_path / "run").metrics(algorithm)  # the third is not logged
    assert first["reward/score"] == second["reward/score"] == "nan"


def test_overridden_methods_of_trl_are_seams():

    for ours, theirs in (
        (grpo_rloo._GroupTrainer, GRPOTrainer),
        (grpo_rloo._GroupTrainer, RLOOTrainer),
        (dpo.ResumableDPOTrainer, DPOTrainer),
    ):
        names = {n for n, v in vars(ours).items() if callable(v) and hasattr(theirs, n)}
        assert names - {"__init__", "__doc__"} <= SEAMS[theirs].keys()
