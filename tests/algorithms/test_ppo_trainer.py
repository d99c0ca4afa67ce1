# SPDX-License-Identifier: Apache-2.0
"""PPO on a tiny random Llama: what moves, when, by how much, and what stops a broken run."""

import importlib.util
import math
import statistics

import pytest
import torch
from ppo_run import Run, eos_more_often, roles, w9
from small import EOS, nudge
from transformers import TrainerCallback

from lora_rlhf.algorithms import identities, objectives
from lora_rlhf.algorithms.ppo import minibatches, ppo_trainer
from lora_rlhf.algorithms.ppo.ppo_metrics import METRICS, OPTIONAL
from lora_rlhf.algorithms.ppo.ppo_trainer import PPOTrainer
from lora_rlhf.data.padding import position_ids
from lora_rlhf.errors import AdapterError, IdentityError, NonFiniteError
from lora_rlhf.models import scoring

TRAINER_KEYS = {"stage", "step", "clock", "loss", "learning_rate"}


def lengths(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def all_tensors(made):
    """Every parameter and buffer by name, over all views."""
    found = {f"base {n}": p for n, p in made.causal.named_parameters()}
    for role, view in made.views.items():
        found |= {f"{role} {n}": p for n, p in view.named_parameters()}
        found |= {f"{role} buffer {n}": b for n, b in view.named_buffers()}
    return found


def same(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a) <= tolerance


class Watch(TrainerCallback):
    """Hashes of policy and value after each optimizer step."""

    def __init__(self, made):
        self.made = made
        self.seen = [self.now()]

    def now(self):
        return self.made.state_hash("policy"), self.made.state_hash("value")

    def on_optimizer_step(self, *_, **__):
        self.seen.append(self.now())


class Collect(PPOTrainer):
    """Keeps every micro-batch that is trained on, and every rollout."""

    batches = ()
    rollouts = ()

    def _prepare_inputs(self, generation_batch):
        batch = super()._prepare_inputs(generation_batch)
        self.batches = [*self.batches, batch]
        return batch

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        self.rollouts = [*self.rollouts, out]
        return out


def episodes(batch):
    """Each row as the tuple of its valid ids."""
    rows = []
    for i in range(len(batch["prompt_ids"])):
        parts = [
            batch[f"{k}_ids"][i][batch[f"{k}_mask"][i].bool()] for k in ("prompt", "completion")
        ]
        rows.append(tuple(tuple(part.tolist()) for part in parts))
    return rows


# ----------------------------------------------------------------------- what moves


def test_one_update_moves_policy_and_value_only(tmp_path):
    run = Run(tmp_path / "r")
    tensors = all_tensors(run.backbone)
    before = {name: x.detach().clone() for name, x in tensors.items()}
    run.go()
    moved = {id(x) for name, x in tensors.items() if not torch.equal(before[name], x)}
    wanted = {r: {id(p) for _, p in run.backbone.role_parameters(r)} for r in run.backbone.views}
    assert moved == wanted["policy"] | wanted["value"]
    assert moved.isdisjoint(wanted["reference"] | wanted["reward"])
    found = run.trainer.identities
    assert found["kl_at_start"] == 0
    assert found["ratio_at_start"] < 1e-5
    assert found["mean_abs_log_ratio_after_first_update"] > 0


def test_every_parameter_of_policy_and_value_is_in_the_optimizer_once(tmp_path):
    run = Run(tmp_path / "r", value_learning_rate=3e-4).go()
    found = [p for group in run.trainer.optimizer.param_groups for p in group["params"]]
    wanted = [p for r in ("policy", "value") for _, p in run.backbone.role_parameters(r)]
    assert len(found) == len(wanted) and {id(p) for p in found} == {id(p) for p in wanted}
    assert id(run.backbone.head("value").weight) in {id(p) for p in found}
    assert [g["lr"] for g in run.trainer.optimizer.param_groups] == [1e-2, 3e-4]
    assert run.trainer.optimizer.param_groups[0]["eps"] == 1e-5
    assert run.trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_value_warm_up_leaves_the_policy_bit_for_bit(tmp_path):
    made = roles()
    run = Run(
        tmp_path / "r",
        {"steps_per_generation": 2, "weight_decay": 0.1},
        made=made,
        updates=3,
        value_warmup_updates=2,
    )
    watch = Watch(made)
    run.trainer.add_callback(watch)
    run.go()
    policy, value = zip(*watch.seen, strict=True)
    assert len(policy) == 7
    assert len(set(policy[:5])) == 1, "the policy moved during the value's warm-up"
    assert len(set(policy[4:])) == 3, "the policy did not move after it"
    assert len(set(value)) == 7
    first, _, last = run.lines
    assert first["policy/grad_norm"] == 0 < first["value/grad_norm"]
    assert "policy/entropy" not in first and last["policy/grad_norm"] > 0


def test_policy_and_value_are_clipped_apart(tmp_path):
    norms = {}

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            for role in ("policy", "value"):
                grads = [p.grad.norm() for _, p in made.role_parameters(role) if p.grad is not None]
                norms[role] = float(torch.stack(grads).norm())

    made = roles()
    run = Run(
        tmp_path / "r",
        {"max_grad_norm": 0.01},
        made=made,
        rewards=[lengths],
        callbacks=[Norms()],
        max_grad_norm_value=0.003,
    )
    run.go()
    assert norms == {
        "policy": pytest.approx(0.01, rel=1e-3),
        "value": pytest.approx(0.003, rel=1e-3),
    }
    assert run.lines[0]["policy/grad_norm"] > 0.1 and run.lines[0]["value/grad_norm"] > 0.1


# ------------------------------------------------------------------- equivalences


def test_accumulation_equals_one_large_batch(tmp_path):
    """1 x 8 = 8 x 1 for episodes of different lengths: all divide by the tokens of the window."""
    shapes = {"large": (8, 1), "accumulated": (1, 8), "between": (2, 4)}
    found, counts = {}, set()
    for name, (batch, window) in shapes.items():
        args = {
            "per_device_train_batch_size": batch,
            "steps_per_generation": window,
            "gradient_accumulation_steps": window,
            "learning_rate": 1e-3,
        }
        run = Run(
            tmp_path / name,
            args,
            made=eos_more_often(roles()),
            updates=2,
            rewards=[lengths],
            trainer=Collect,
        )
        found[name] = run.go().weights()
        counts |= {int(n) for n in run.trainer.rollouts[0]["completion_mask"].sum(dim=1)}
        assert run.trainer.state.global_step == 2
    assert len(counts) > 1, "the test needs episodes of different lengths"
    assert same(found["large"], found["accumulated"]) and same(found["large"], found["between"])


class Joint(PPOTrainer):
    """The trap: one backward for both roles, inside the policy's role."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        ids, mask, tokens = minibatches.model_inputs(inputs)
        with self.backbone.role("value"):
            values = scoring.token_values(self.backbone, ids, mask, tokens)
        result = objectives.value_loss(
            values,
            inputs["old_values"],
            inputs["returns"],
            inputs["completion_mask"],
            self.ppo.clip_value,
        )
        return loss + self.ppo.vf_coef * result.loss_sum / inputs["window_tokens"]

    def training_step(self, model, inputs, num_items_in_batch):
        return super(PPOTrainer, self).training_step(model, inputs, num_items_in_batch)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    """And the test would see the trap that it is about: recomputation under the wrong adapter."""

    def weights(name, trainer, checkpointing):
        run = Run(
            tmp_path / name,
            {"learning_rate": 1e-3},
            trainer=trainer,
            rewards=[lengths],
            model={"gradient_checkpointing": checkpointing},
        )
        inputs = []
        run.backbone.layers[0].register_forward_pre_hook(
            lambda m, args: inputs.append(args[0].requires_grad)
        )
        run.go()
        assert inputs and not any(inputs), "backward would run on to the embeddings"
        layers = [layer.gradient_checkpointing for layer in run.backbone.layers]
        assert not any(layers), "checkpointing survives the stage"
        return run.weights()

    plain = weights("plain", PPOTrainer, False)
    assert same(plain, weights("checkpointed", PPOTrainer, True))
    assert same(plain, weights("joint", Joint, False))
    assert not same(plain, weights("trap", Joint, True), 1e-4)


def test_a_seed_decides_everything(tmp_path):
    def lines(name, seed):
        run = Run(tmp_path / name, {"steps_per_generation": 2}, updates=2, seed=seed).go()
        return [{k: v for k, v in line.items() if k != "clock"} for line in run.lines]

    first = lines("a", 0)
    assert lines("b", 0) == first
    assert lines("c", 1) != first


# --------------------------------------------------------------------- rollouts


def test_each_epoch_takes_each_episode_once_in_another_order(tmp_path):
    args = {"per_device_train_batch_size": 3, "steps_per_generation": 4, "num_iterations": 2}
    run = Run(tmp_path / "r", args, trainer=Collect, updates=2).go()
    batches = [episodes(b) for b in run.trainer.batches]
    assert [len(b) for b in batches] == [3] * 16 and len(run.trainer.rollouts) == 2
    for i, rollout in enumerate(run.trainer.rollouts):
        epochs = [sum(batches[8 * i + 4 * e : 8 * i + 4 * e + 4], []) for e in range(2)]
        assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(episodes(rollout))
        assert epochs[0] != epochs[1], "both epochs have the same order"
    assert [line["step"] for line in run.lines] == [1, 2]
    assert run.trainer.state.global_step == 16


def test_micro_batches_carry_their_own_rows(tmp_path):
    """Shuffling, splitting and trimming keep the columns of an episode together."""
    run = Run(
        tmp_path / "r", {"steps_per_generation": 3}, trainer=Collect, made=eos_more_often(roles())
    ).go()
    [rollout] = run.trainer.rollouts
    rows = dict(zip(episodes(rollout), range(12), strict=True))
    for batch in run.trainer.batches:
        assert batch["prompt_mask"].any(dim=0).all() and batch["completion_mask"].any(dim=0).all()
        assert batch["window_tokens"] == int(batch["completion_mask"].sum())
        for i, episode in enumerate(episodes(batch)):
            n = len(episode[1])
            for key in ("old_logprobs", "old_values", "advantages", "returns"):
                assert torch.equal(batch[key][i, :n], rollout[key][rows[episode], :n]), key


@pytest.mark.parametrize("batch", [1, 3])
def test_odd_batches_with_one_completion_a_prompt(tmp_path, batch):
    args = {"per_device_train_batch_size": batch, "steps_per_generation": 1}
    run = Run(tmp_path / "r", args, updates=2, trainer=Collect).go()
    for rollout in run.trainer.rollouts:
        assert len({prompt for prompt, _ in episodes(rollout)}) == batch
    assert all(math.isfinite(line["policy/grad_norm"]) for line in run.lines)


def test_two_completions_a_prompt(tmp_path):
    run = Run(tmp_path / "r", {"num_generations": 2}, trainer=Collect).go()
    found = [prompt for prompt, _ in episodes(run.trainer.rollouts[0])]
    assert found[0::2] == found[1::2] and len(set(found)) == 2


def test_the_penalty_for_a_missing_eos_is_taken_once(tmp_path, monkeypatch):
    given = []

    def spy(scores_b, kl_bt, mask_bt, kl_coef):
        given.append((scores_b, kl_coef))
        return objectives.token_rewards(scores_b, kl_bt, mask_bt, kl_coef)

    monkeypatch.setattr(ppo_trainer, "token_rewards", spy)
    made = eos_more_often(roles())
    run = Run(
        tmp_path / "r",
        {"per_device_train_batch_size": 16},
        made=made,
        trainer=Collect,
        rewards=[lengths],
        missing_eos_penalty=0.75,
        kl_coef=0.07,
    ).go()
    [rollout], [(scores, kl_coef)] = run.trainer.rollouts, given
    rows = [completion for _, completion in episodes(rollout)]
    ended = [ids[-1] == EOS for ids in rows]
    assert 0 < sum(ended) < len(ended), "the test needs both kinds"
    assert all(EOS not in ids[:-1] for ids in rows), "tokens after the first eos are kept"
    expected = [len(ids) - (0 if end else 0.75) for ids, end in zip(rows, ended, strict=True)]
    assert scores.tolist() == expected and kl_coef == 0.07
    line = run.lines[0]
    assert line["completions/eos_rate"] == pytest.approx(sum(ended) / len(ended))
    assert line["reward/score"] == pytest.approx(sum(len(ids) for ids in rows) / len(rows))
    assert line["reward/total"] == pytest.approx(sum(expected) / len(expected))  # KL is 0 here


def test_advantages_and_returns_of_a_rollout(tmp_path):
    """From the roles' own outputs, row by row and unpadded, by a loop."""
    made = eos_more_often(roles())
    first = {}

    class Values(Collect):
        def _generate_and_score_completions(self, inputs):
            out = super()._generate_and_score_completions(inputs)
            first.update({ids: values_of(made, ids) for ids in episodes(out)})
            return out

    run = Run(
        tmp_path / "r",
        made=made,
        trainer=Values,
        rewards=[lengths],
        kl_coef=0.1,
        gamma=0.9,
        lam=0.8,
    ).go()
    rollout, flat = run.trainer.rollouts[0], []
    for i, ids in enumerate(episodes(rollout)):
        n, values = len(ids[1]), [*first[ids], 0.0]
        rewards = [0.0] * (n - 1) + [n - float(ids[1][-1] != EOS)]
        running, advantages = 0.0, [0.0] * n
        for t in reversed(range(n)):
            running = rewards[t] + 0.9 * values[t + 1] - values[t] + 0.72 * running
            advantages[t] = running
        expected = [a + v for a, v in zip(advantages, values, strict=False)]
        assert rollout["returns"][i, :n].tolist() == pytest.approx(expected, abs=1e-4)
        flat += advantages
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
    mask = rollout["completion_mask"].bool()
    assert rollout["advantages"][mask].tolist() == pytest.approx(
        [(a - mean) / std for a in flat], abs=1e-4
    )


@torch.no_grad()
def values_of(made, episode):
    ids = torch.tensor([episode[0] + episode[1]])
    with made.role("value"):
        return scoring.token_values(made, ids, torch.ones_like(ids), len(episode[1]))[0].tolist()


def test_reward_functions_get_the_sampled_ids(tmp_path):
    seen = []

    def spy(prompts, prompt_ids, completions, completion_ids, **_):
        seen.extend(zip(prompt_ids, completion_ids, strict=True))
        assert prompts and completions
        return [0.0] * len(prompts)

    run = Run(tmp_path / "r", rewards=[spy], trainer=Collect).go()
    assert [(tuple(p), tuple(c)) for p, c in seen] == episodes(run.trainer.rollouts[0])


# ------------------------------------------------------------- broken on purpose


def test_a_policy_that_is_not_the_sft_adapter_stops_the_run(tmp_path):
    run = Run(tmp_path / "r", value_warmup_updates=1, updates=2)
    nudge(run.backbone, "policy", std=0.01)
    with pytest.raises(IdentityError, match="policy and reference differ"):
        run.go()


def test_a_stale_reference_stops_the_run(tmp_path, monkeypatch):
    """Its KL is 0 at the start, as it should be; only after an update does it show."""
    run = Run(tmp_path / "r")
    switch = run.backbone.role
    monkeypatch.setattr(
        run.backbone, "role", lambda role: switch("policy" if role == "reference" else role)
    )
    with pytest.raises(IdentityError, match="stale adapter"):
        run.go()
    assert run.trainer.identities["kl_at_start"] == 0


@pytest.mark.parametrize(
    ("when", "message"), [("always", "sampler's log-probs"), ("training", "ratio of new")]
)
def test_dropout_stops_the_run(tmp_path, when, message):
    run = Run(tmp_path / "r")

    def dropout(module, args, out):
        on = when == "always" or torch.is_grad_enabled()
        return torch.nn.functional.dropout(out, 0.3) if on else out

    run.backbone.layers[0].mlp.register_forward_hook(dropout)
    with pytest.raises(IdentityError, match=message):
        run.go()


@pytest.mark.parametrize(("group", "role"), [(0, "policy"), (1, "value")])
def test_a_role_that_the_optimizer_misses_stops_the_run(tmp_path, monkeypatch, group, role):
    run = Run(tmp_path / "r")
    create = run.trainer.create_optimizer

    def without(model=None):
        optimizer = create(model)
        optimizer.param_groups[group]["params"] = [torch.nn.Parameter(torch.zeros(1))]
        return optimizer

    monkeypatch.setattr(run.trainer, "create_optimizer", without)
    with pytest.raises(IdentityError, match=f"the {role} did not move"):
        run.go()


@pytest.mark.parametrize("role", ["reward", None])
def test_a_frozen_role_that_moves_stops_the_run(tmp_path, role):
    run = Run(tmp_path / "r")
    parameter = (
        run.backbone.role_parameters(role)[0][1] if role else run.backbone.causal.lm_head.weight
    )

    class Poke(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            parameter.data.add_(1e-3)

    run.trainer.add_callback(Poke())
    with pytest.raises(IdentityError, match=f"the {role or 'backbone'} moved, but is frozen"):
        run.go()


def test_a_foreign_set_adapter_stops_the_run(tmp_path):
    """PEFT's `set_adapter` freezes the other adapters, so the value would learn no more."""

    class Switch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            run.backbone.views["policy"].set_adapter("default")

    run = Run(tmp_path / "r", callbacks=[Switch()])
    with pytest.raises(AdapterError, match="frozen"):
        run.go()


def test_a_first_step_with_learning_rate_0_is_no_failure(tmp_path):
    run = Run(tmp_path / "r", {"warmup_steps": 2}, updates=2).go()
    assert run.trainer.identities["mean_abs_log_ratio_after_first_update"] > 0


def test_nan_reward_names_the_prompt(tmp_path):
    def broken(prompts, **_):
        return [float("nan") if i == 2 else 1.0 for i in range(len(prompts))]

    run = Run(tmp_path / "r", rewards=[broken], trainer=Collect)
    with pytest.raises(NonFiniteError, match=r"reward of 1 episodes .* prompt is 'w\d"):
        run.go()
    with pytest.raises(NonFiniteError, match="reward of 4 episodes"):
        Run(tmp_path / "none", rewards=[lambda prompts, **_: [None] * len(prompts)]).go()


def test_nan_of_a_reward_that_is_only_logged_is_ignored(tmp_path):
    def absent(prompts, **_):
        return [float("nan"), *[2.0] * (len(prompts) - 1)]

    run = Run(tmp_path / "r", rewards=[w9, absent], weights=[2.0, 0.0]).go()
    line = run.lines[0]
    assert line["rewards/absent"] == 2.0
    assert line["reward/score"] == pytest.approx(2 * line["rewards/w9"])


def test_nan_in_the_loss_stops_before_the_optimizer_moves_anything(tmp_path, monkeypatch):
    run = Run(tmp_path / "r")
    before = run.weights()
    monkeypatch.setattr(
        ppo_trainer, "whiten", lambda advantages_bt, mask_bt: advantages_bt * float("nan")
    )
    with pytest.raises(NonFiniteError, match="gradient of the policy is nan"):
        run.go()
    assert same(before, run.weights(), 0)


def test_a_minibatch_with_a_huge_ratio_moves_the_value_only(tmp_path, monkeypatch):
    run = Run(tmp_path / "r", {"steps_per_generation": 2}, trainer=Collect)
    prepare = Collect._prepare_inputs

    def far(self, generation_batch):
        batch = prepare(self, generation_batch)
        if self._step == 1:
            batch["old_logprobs"] = batch["old_logprobs"] - 3.0  # a mean ratio of e³ > 10
        return batch

    monkeypatch.setattr(Collect, "_prepare_inputs", far)
    watch = Watch(run.backbone)
    run.trainer.add_callback(watch)
    run.go()
    first, second = watch.seen[1:]
    assert first[0] == second[0] and first[1] != second[1]
    assert run.lines[0]["policy/skipped"] == 0.5 and run.lines[0]["policy/ratio_max"] > 10


def test_the_ratio_is_checked_at_the_start_of_each_rollout(tmp_path, monkeypatch):
    run = Run(tmp_path / "r", updates=2)
    scored = PPOTrainer._generate_and_score_completions

    def other_temperature(self, inputs):
        self.scorer.temperature = 1.0 if self._step == 0 else 0.5
        return scored(self, inputs)

    monkeypatch.setattr(PPOTrainer, "_generate_and_score_completions", other_temperature)
    with pytest.raises(IdentityError, match="ratio of new to old"):
        run.go()
    assert len(run.lines) == 1


def test_the_samplers_log_probs_are_compared_after_every_processor(tmp_path):
    run = Run(tmp_path / "r")
    made, config = run.backbone, run.trainer.generation_config
    ids = [made.encode_prompt(p) for p in ("w5", "w6 w7 w8")]
    state = torch.get_rng_state()
    assert identities.sampler_agrees(made, ids, config, 1.0) < 1e-4
    assert torch.equal(state, torch.get_rng_state()), "the check disturbs the run's random numbers"
    with pytest.raises(IdentityError, match="sampler's log-probs"):
        identities.sampler_agrees(made, ids, config, 1.3)
    config.top_k = 5
    with pytest.raises(IdentityError, match="sampler's log-probs"):
        identities.sampler_agrees(made, ids, config, 1.0)
    config.top_k = 0
    made.causal.generation_config.suppress_tokens = list(range(20, 60))  # the base model's own
    with pytest.raises(IdentityError, match="generation config"):
        identities.sampler_agrees(made, ids, config, 1.0)


# ----------------------------------------------------------------------------- log


def test_the_log_holds_exactly_what_is_listed(tmp_path):
    args = {"steps_per_generation": 2, "num_iterations": 2, "temperature": 0.9}
    run = Run(tmp_path / "r", args, rewards=[lengths, w9], weights=[1.0, 0.0], updates=2).go()
    for line in run.lines:
        rewards = {"rewards/lengths", "rewards/w9"}
        assert set(line) == set(METRICS) - OPTIONAL | rewards | TRAINER_KEYS
        assert line["kl/k3"] >= 0 and line["policy/ratio_start"] < 1e-5
        assert set(line["clock"]) == {"step_time", "seconds", "phases"}
    assert run.lines[0]["kl/sequence"] == run.lines[0]["kl/k3"] == 0 < run.lines[1]["kl/k3"]
    assert run.lines[0]["policy/ratio_max"] > 1


def test_the_logged_largest_ratio_is_not_averaged(tmp_path):
    run = Run(tmp_path / "r", {"steps_per_generation": 3}, updates=1)
    log = run.trainer._metrics["train"]
    log["policy/ratio_max"] += [1.0, 4.0, 1.0]
    log["policy/entropy"] += [1.0, 4.0, 1.0]
    logs = {}
    run.trainer.model.train()
    run.trainer.log(logs)
    assert logs["policy/ratio_max"] == 4 and logs["policy/entropy"] == 2


@pytest.mark.parametrize("mode", [pytest.param("bfloat16", marks=pytest.mark.slow), "4bit"])
def test_other_precisions_hold_the_same_identities(tmp_path, mode):
    if mode == "4bit" and not importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed")
    made = roles(load_in_4bit=True) if mode == "4bit" else roles(dtype="bfloat16")
    run = Run(tmp_path / "r", {"steps_per_generation": 2}, made=made, updates=2).go()
    assert {p.dtype for p in run.weights().values()} == {torch.float32}
    assert run.trainer.identities["kl_at_start"] == 0
    assert run.trainer.identities["mean_abs_log_ratio_after_first_update"] > 0
    ids = [made.encode_prompt(p) for p in ("w5", "w6 w7 w8")]
    config = run.trainer.generation_config
    agreement = identities.sampler_agrees(made, ids, config, 1.0)
    assert agreement < (0.25 if mode == "bfloat16" else 1e-3)


def test_it_learns(tmp_path):
    """Paid for one token, the policy says it more often."""
    args = {"per_device_train_batch_size": 16, "steps_per_generation": 2, "learning_rate": 2e-2}
    run = Run(tmp_path / "r", args, updates=24, kl_coef=0.0, missing_eos_penalty=0.0).go()
    share = [line["reward/score"] for line in run.lines]
    assert sum(share[-3:]) / 3 > 0.5 > 0.1 > share[0]
    assert run.lines[-1]["kl/sequence"] > 1


# ------------------------------------------------------------------------------ options


def test_the_learning_rate_warms_up_from_a_tenth(tmp_path):
    args = {"learning_rate": 1e-2, "warmup_steps": 4}
    run = Run(tmp_path / "r", args, updates=6).go()
    rates = [line["learning_rate"] for line in run.lines]
    assert rates == pytest.approx([1e-2 * x for x in (0.1, 0.325, 0.55, 0.775, 1, 1)])


def test_another_schedule_is_transformers_own(tmp_path):
    args = {"learning_rate": 1e-2, "warmup_steps": 0, "lr_scheduler_type": "linear"}
    run = Run(tmp_path / "r", args, updates=4).go()
    rates = [line["learning_rate"] for line in run.lines]
    assert rates == pytest.approx([1e-2 * x for x in (1, 0.75, 0.5, 0.25)])


def test_the_gradient_of_an_entropy_bonus():
    """It is that of the mean entropy, against autograd over whole logits."""
    made = roles()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    mask = torch.ones_like(ids)
    with made.training("policy"):
        states = scoring.completion_states(made, ids, mask, 3)
        _, entropy = scoring.logprobs_of(made, states, ids, 0.7, entropy_gradient=True)
        entropy.sum().backward()
        ours = {n: p.grad.clone() for n, p in made.role_parameters("policy")}
        made.views["policy"].zero_grad()
        logits = made.causal(input_ids=ids).logits[:, 1:-1] / 0.7
        logprobs = logits.log_softmax(-1)
        (-(logprobs.exp() * logprobs).sum(-1)).sum().backward()
        for name, p in made.role_parameters("policy"):
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_an_entropy_bonus_pushes_entropy_up(tmp_path):
    options = {
        "updates": 12,
        "rewards": [lambda completion_ids, **_: [0.0] * len(completion_ids)],
        "kl_coef": 0.0,
        "missing_eos_penalty": 0.0,
    }
    plain = Run(tmp_path / "a", made=roles(), **options).go()
    bonus = Run(tmp_path / "b", made=roles(), entropy_coef=3.0, **options).go()
    without, with_bonus = (
        statistics.fmean(line["policy/entropy"] for line in run.lines[-4:])
        for run in (plain, bonus)
    )
    assert with_bonus > without


def test_a_value_head_learns_and_never_moves_the_policy(tmp_path):
    """`value: head`: the policy's own states, detached; no adapter, no second forward."""
    args = {"steps_per_generation": 2, "num_iterations": 2}
    made = roles()
    run = Run(tmp_path / "r", args, made=made, updates=3, value_warmup_updates=1, value="head")
    names = [name for name, _ in made.role_parameters("value")]
    assert names == ["value_head.weight", "value_head.bias"]
    assert "value" not in made.views
    head = made.head("value")
    assert torch.equal(head.weight, made.head("reward").weight)
    assert float(head.bias.detach()) == made.reward_offset["reward"]
    before = {n: p.detach().clone() for n, p in made.role_parameters("policy")}
    policies, values = [], []

    class Look(TrainerCallback):
        def on_step_end(self, *_, **__):
            policies.append({n: p.detach().clone() for n, p in made.role_parameters("policy")})
            values.append(head.weight.detach().clone())

    run.trainer.add_callback(Look())
    run.go()
    assert all(torch.equal(policies[3][n], before[n]) for n in before)  # the warm-up's four steps
    assert any(not torch.equal(policies[4][n], before[n]) for n in before)
    assert not torch.equal(values[0], values[3])
    assert run.trainer.identities["ratio_at_start"] < 1e-5


def test_a_value_head_gives_the_values_of_the_policys_states(tmp_path):
    made = roles()
    run = Run(tmp_path / "r", made=made, value="head", kl_coef=0.0)
    seen = {}
    score = run.trainer.scorer.score

    def keep(out, *, exact):
        result = score(out, exact=exact)
        seen.update(out)
        return result

    run.trainer.scorer.score = keep
    weight, bias = (p.detach().clone() for p in made.head("value").parameters())
    before = {n: p.detach().clone() for n, p in made.role_parameters("policy")}
    run.go()
    with torch.no_grad():
        for name, p in made.role_parameters("policy"):
            p.copy_(before[name])
        ids, mask, tokens = minibatches.model_inputs(seen)
        with made.role("policy"):
            states = made.decoder(
                input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)
            ).last_hidden_state[:, -tokens - 1 : -1]
    valid = seen["completion_mask"].bool()
    wanted = (states @ weight.T).squeeze(-1) + bias
    torch.testing.assert_close(seen["old_values"][valid], wanted[valid], rtol=1e-4, atol=1e-5)


def test_small_gradients_survive_float16():
    """A loss divided by the tokens of a large batch needs the scale in float16."""

    ids = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(0))
    mask, found = torch.ones_like(ids), {}

    def gradient(dtype, scale):
        made = roles(dtype=dtype)
        nudge(made, "policy")
        with made.training("policy"):
            logprobs, _ = scoring.completion_logprobs(made, ids, mask, 16, 1.0)
            (scale * logprobs.sum() / 500_000).backward()
            parts = [p.grad.flatten() / scale for _, p in made.role_parameters("policy")]
            return torch.cat(parts).double()

    exact = gradient("float32", 1.0)
    for scale in (1.0, ppo_trainer.FLOAT16_SCALE):
        rounded = gradient("float16", scale)
        found[scale] = float(torch.nn.functional.cosine_similarity(exact, rounded, dim=0))
    assert found[1.0] < 0.99 < 0.999 < found[ppo_trainer.FLOAT16_SCALE]


def test_the_scale_of_float16_changes_no_update(tmp_path):
    """Any power of two is taken back exactly: the same weights in float32, clipping included."""
    plain = Run(tmp_path / "a", {"max_grad_norm": 0.05}, made=roles(), updates=2).go()
    scaled = Run(tmp_path / "b", {"max_grad_norm": 0.05}, made=roles(), updates=2)
    scaled.trainer._scale = 1024.0
    scaled.go()
    for name, tensor in plain.weights().items():
        torch.testing.assert_close(tensor, scaled.weights()[name], rtol=1e-5, atol=1e-7)
    assert scaled.lines[-1]["loss"] == pytest.approx(plain.lines[-1]["loss"], abs=1e-4)
