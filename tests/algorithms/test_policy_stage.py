# SPDX-License-Identifier: Apache-2.0
"""The controls of PPO: each moves only the policy, against a reference that is SFT and frozen."""

import math

import pytest
import torch
from datasets import Dataset
from ppo_run import ARGS, prompts, roles

from lora_rlhf._trl import GRPOTrainer, RLOOTrainer
from lora_rlhf.algorithms import best_of_n, dpo, grpo_rloo, policy_stage, reward_functions
from lora_rlhf.algorithms.identities import FrozenRolesCheck
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.errors import DataError, IdentityError, NonFiniteError, RecipeError
from lora_rlhf.recipe.schema import DataSection, DataSource, ModelSection, PpoSection, Recipe
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record

COMPARISONS = Dataset.from_list(
    [
        {"prompt": f"w{5 + i}", "chosen": "w9 w10", "rejected": f"w{11 + i} w12 w13"}
        for i in range(8)
    ]
)


def recipe(algorithm, args=None, *, seed=0, ppo=None, **section):
    own = {"args": args or {}} if algorithm != "best_of_n" else {}
    data = DataSection(comparisons=[DataSource(path="x.jsonl")])
    ppo = {"updates": 2, "args": {**ARGS, "steps_per_generation": 2}, **(ppo or {})}
    return Recipe(
        name="little",
        seed=seed,
        algorithm=algorithm,
        model=ModelSection(id="tiny"),
        data=data,
        ppo=PpoSection(**ppo),
        **{algorithm: {**own, **section}},
    )


def run(folder, asked, made=None):
    made, record = made or roles(), Record.open(folder, asked)
    progress = Progress(quiet=True)
    if asked.algorithm == "dpo":
        dpo.run(asked, dpo.arguments(asked, folder), made, record, COMPARISONS, progress)
    else:
        grpo_rloo.run(asked, grpo_rloo.arguments(asked, folder), made, record, prompts(), progress)
    return made, record


@pytest.fixture(scope="module", params=["grpo", "rloo", "dpo"])
def finished(request, tmp_path_factory):
    """One run of each algorithm, with the hashes from before it."""
    made = roles()
    before = {r: made.state_hash(r) for r in (None, "reference", "reward", "policy")}
    folder = tmp_path_factory.mktemp(request.param) / "run"
    made, record = run(folder, recipe(request.param), made)
    return request.param, made, record, before


# -------------------------------------------------------------------- every trainer


def test_only_the_policy_moves(finished):
    _, made, _, before = finished
    for role in (None, "reference", "reward"):
        assert made.state_hash(role) == before[role]
    assert made.state_hash("policy") not in (before["policy"], before["reference"])


def test_the_clone_that_trl_takes_is_gone_and_never_saved(finished):
    _, made, record, _ = finished
    assert set(made.views["policy"].peft_config) == {"default", "reference"}
    assert not [n for n, _ in made.views["policy"].named_parameters() if ".ref." in n]
    assert {p.name for p in (record.folder / "adapters").iterdir()} == {"policy"}
    assert made.active() is None
    assert not any(p.requires_grad for p in made.views["policy"].parameters())


def test_the_record_says_what_was_done(finished):
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


# ------------------------------------------------------------------- the reference


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_trls_reference_is_sft_while_it_trains(tmp_path, monkeypatch, load_in_4bit):
    """Under TRL's own switch to its clone the outputs are those of the reference role."""
    made = roles(load_in_4bit=load_in_4bit)
    made.views["policy"].active_adapter = "reference"  # as after loading a finished SFT stage
    seen, real = [], GRPOTrainer._get_per_token_logps_and_entropies

    def spy(self, *args, **kwargs):
        found = real(self, *args, **kwargs)
        active = {tuple(layer._active_adapter) for layer in made._lora_layers()}
        seen.append((active, torch.is_grad_enabled()))
        if active == {("ref",)}:
            with made.role("reference"):
                assert torch.equal(real(self, *args, **kwargs)[0], found[0])
        return found

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", spy)
    run(tmp_path / "run", recipe("grpo"), made)
    assert ({("ref",)}, False) in seen and ({("default",)}, True) in seen
    assert all(active == {("default",)} for active, training in seen if training)


def test_a_clone_that_is_not_sft_stops_the_run(tmp_path, monkeypatch):
    made = roles()
    monkeypatch.setattr(made, "copy_role", lambda source, target: None)
    with pytest.raises(IdentityError, match="not the SFT adapter"):
        run(tmp_path / "run", recipe("dpo"), made)


def test_what_moves_beside_the_policy_stops_the_run():
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


# --------------------------------------------------------------------------- reward


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_nan_rewards_teach_nothing_and_stop_the_run(tmp_path, monkeypatch, algorithm):
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


def test_the_penalty_is_ppos():
    made = roles()
    found = reward_functions.eos_penalty(made, 0.5)([[5, 1], [5, 6], []])
    assert found == [0.0, -0.5, -0.5]


# ------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_the_budget_is_ppos(tmp_path, name):
    args = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 3}
    asked = recipe(name, ppo={"updates": 5, "kl_coef": 0.07, "args": {**ARGS, **args}})
    found = grpo_rloo.arguments(asked, tmp_path / "run")
    assert found.max_steps == 5 * 3 * 4 // 2 and found.logging_steps == 6
    assert found.generation_batch_size == 4 * 4 and found.num_generations == 4
    assert found.beta == 0.07 and found.learning_rate == ARGS["learning_rate"]
    assert found.max_completion_length == 6 and found.temperature == 1.0
    assert (found.top_k, found.top_p) == (0, 1.0) and found.disable_dropout


def test_its_own_section_wins(tmp_path):
    args = {"learning_rate": 3e-4, "max_completion_length": 5, "per_device_train_batch_size": 6}
    asked = recipe("grpo", args, updates=7, kl_coef=0.0, num_generations=3)
    found = grpo_rloo.arguments(asked, tmp_path)
    assert (found.learning_rate, found.max_completion_length) == (3e-4, 5)
    assert (found.beta, found.num_generations, found.max_steps) == (0.0, 3, 14)
    assert ppo_stage.longest(asked) == 5 and ppo_stage.sampled_tokens(asked) == 6


def test_dpo_has_ppos_batches_its_own_beta_and_rate(tmp_path):
    asked = recipe("dpo", {"num_train_epochs": 3}, beta=0.3)
    found = dpo.arguments(asked, tmp_path / "run")
    assert (found.beta, found.num_train_epochs) == (0.3, 3)
    assert found.learning_rate == 5e-5 and found.disable_dropout  # its own: not PPO's
    assert found.per_device_train_batch_size == 4 and found.max_length == asked.data.max_tokens


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("grpo", {"beta": 0.1}, "use grpo.kl_coef"),
        ("rloo", {"num_generations": 2}, "use rloo.num_generations"),
        ("grpo", {"max_steps": 2}, "use grpo.updates"),
        ("grpo", {"top_k": 5}, "whole distribution"),
        ("grpo", {"seed": 5}, "use seed"),
        ("grpo", {"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "divides"),
        ("grpo", {"num_iterations": 0}, "num_iterations: 0"),
        ("rloo", {"learning_rates": 1}, "TRL's RLOOConfig has no such field"),
        ("dpo", {"beta": 0.2}, "use dpo.beta"),
        ("dpo", {"max_length": 9}, "use data.max_tokens"),
        ("dpo", {"lossy": 9}, "TRL's DPOConfig has no such field"),
    ],
)
def test_what_has_its_home_elsewhere_is_refused(tmp_path, name, args, message):
    asked = recipe(name, args)
    arguments = dpo.arguments if name == "dpo" else grpo_rloo.arguments
    with pytest.raises(RecipeError, match=message):
        arguments(asked, tmp_path / "run")


def test_a_group_must_fit_into_a_rollout(tmp_path):
    asked = recipe("grpo", num_generations=3)
    with pytest.raises(RecipeError, match="num_generations"):
        grpo_rloo.arguments(asked, tmp_path / "run")


def test_a_rollout_needs_its_prompts_and_gold_its_checker(tmp_path):
    asked = recipe("grpo")
    args = grpo_rloo.arguments(asked, tmp_path)
    policy_stage.check(asked, args, prompts(2))
    with pytest.raises(DataError, match="too few prompts: 1 are left"):
        policy_stage.check(asked, args, prompts(1))
    gold = recipe("rloo", ppo={"reward": "gold"})
    with pytest.raises(DataError, match="no checker"):
        policy_stage.check(gold, args, prompts(8))


# ------------------------------------------------------------------------------ DPO


def test_dpos_first_loss_is_ln_2_on_sfts_tokens(tmp_path):
    made, record = run(tmp_path / "run", recipe("dpo"))
    entry = record.data["stages"]["dpo"]
    assert entry["identities"]["loss_at_start"] == pytest.approx(math.log(2), abs=1e-5)
    assert record.metrics("dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert (entry["comparisons"], entry["optimizer_steps"], entry["beta"]) == (8, 2, 0.1)
    row = dpo.tokenize(made, COMPARISONS)[0]
    assert row["prompt_ids"] == made.encode_prompt("w5")
    assert row["chosen_ids"] == made.encode_completion("w9 w10") and row["chosen_ids"][-1] == 1


def test_dpo_learns_to_prefer_what_was_chosen(tmp_path):
    asked = recipe("dpo", {"num_train_epochs": 4})
    _, record = run(tmp_path / "run", asked)
    lines = record.metrics("dpo")
    assert lines[-1]["margin"] > 0 and lines[-1]["loss"] < lines[0]["loss"]


def test_dpo_stops_when_its_first_loss_is_not_ln_2(tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "RATIO_TOLERANCE", {torch.float32: -1.0})
    with pytest.raises(IdentityError, match="first loss of DPO"):
        run(tmp_path / "run", recipe("dpo"))


# ------------------------------------------------------------------------ best of n


def test_best_of_n_picks_the_highest_reward(tmp_path, monkeypatch):
    made, asked = roles(), recipe("best_of_n", n=3)
    drawn = [[7, 1], [8, 1], [9, 1], [7, 1], [9, 1], [9, 9, 1]]
    monkeypatch.setattr(type(made), "generate", lambda *_, **__: drawn)
    score = {7: 0.5, 8: 2.0, 9: 1.0}
    monkeypatch.setattr(
        best_of_n.ensemble,
        "rewards_of",
        lambda _, episodes, *__: [score[c[0]] for _, c in episodes],
    )
    found = best_of_n.choose(made, [[5], [6]], asked, max_new_tokens=4, temperature=1.0, seed=0)
    assert found == [[8, 1], [9, 1]]  # the first of equals


def test_best_of_n_asks_sft_with_draws_of_its_own(monkeypatch):
    made, asked, calls = roles(), recipe("best_of_n", n=4), []
    real = type(made).generate

    def spy(self, prompts, role, **options):
        calls.append((len(prompts), role, options["seed"]))
        return real(self, prompts, role, **options)

    monkeypatch.setattr(type(made), "generate", spy)
    found = best_of_n.choose(made, [[5], [6]], asked, max_new_tokens=4, temperature=1.0, seed=3)
    assert len(found) == 2 and calls[0][:2] == (8, "reference") and calls[0][2] != 3


def test_its_kl_is_a_bound_from_a_formula(tmp_path):
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


def test_overridden_methods_of_trl_are_seams():
    from lora_rlhf._trl import SEAMS, DPOTrainer

    for ours, theirs in (
        (grpo_rloo._GroupTrainer, GRPOTrainer),
        (grpo_rloo._GroupTrainer, RLOOTrainer),
        (dpo.ResumableDPOTrainer, DPOTrainer),
    ):
        names = {n for n, v in vars(ours).items() if callable(v) and hasattr(theirs, n)}
        assert names - {"__init__", "__doc__"} <= SEAMS[theirs].keys()
