# SPDX-License-Identifier: Apache-2.0
"""NaN in a reward, a logit, a gradient, an adapter: skipped, written down, stopped after three."""

import json
import math
from pathlib import Path

import killed
import pytest
import torch
from ppo_run import Run, w9
from transformers import TrainerCallback

from lora_rlhf import pipeline
from lora_rlhf.algorithms import reward_functions
from lora_rlhf.cli import shell
from lora_rlhf.errors import IdentityError, LoraRlhfError, NonFiniteError
from lora_rlhf.hub import staging
from lora_rlhf.models import scoring
from lora_rlhf.runs.checkpoint import newest
from lora_rlhf.runs.record import Record
from lora_rlhf.training import checkpoint_callback

ARGS = {"steps_per_generation": 2}
NAN = float("nan")


class At(TrainerCallback):
    """Does something to a trainer at the given optimizer steps."""

    def __init__(self, moment: str, steps: set[int], act) -> None:
        self.steps, self.act = steps, act
        setattr(self, moment, self.fire)

    def fire(self, args, state, control, **_):
        if state.global_step in self.steps:
            self.act()


def reward(bad: set[int]):
    """NaN for one episode of each of these rollouts."""
    calls = iter(range(99))

    def broken(completion_ids, **_):
        found = w9(completion_ids)
        return [NAN, *found[1:]] if next(calls) in bad else found

    return broken


def run(folder: Path, kind: str, updates: set[int], total: int = 5) -> Run:
    """PPO with NaN in these updates (two optimizer steps each)."""
    made = Run(
        folder,
        ARGS,
        updates=total,
        normalize_reward=True,
        kl_target=1.0,
        rewards=[reward(updates if kind == "reward" else set())],
    )
    first = {2 * update for update in updates}
    named = made.backbone.role_parameters("policy")
    spoil = named[0][1]

    def gradient():
        named[-1][1].grad[0] = NAN

    def adapter():
        spoil.data[0] = NAN

    if kind == "gradient":
        made.trainer.add_callback(At("on_pre_optimizer_step", first, gradient))
    if kind == "adapter":
        made.trainer.add_callback(At("on_step_begin", first, adapter))
    if kind == "logit":
        made.spoiled = first
    return made


@pytest.mark.parametrize(
    ("role", "at"),
    [("reference", 3), ("reward", 1),
     pytest.param("reference", 1, marks=pytest.mark.slow),
     pytest.param("reward", 3, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_frozen_role_that_moves_stops_the_run_in_that_update(tmp_path, role, at):
    """The first update has hashes of its own; this one is after each."""
    made = Run(tmp_path / "r", ARGS, updates=3)
    name, parameter = made.backbone.role_parameters(role)[0]

    def write():
        parameter.data[0, 0] += 1e-7 + parameter.data[0, 0].abs() * 1e-6  # the smallest change

    made.trainer.add_callback(At("on_step_begin", {at}, write))
    with pytest.raises(IdentityError) as error:
        made.kept()
    assert role in str(error.value) and made.trainer.state.global_step <= 2 * (at // 2 + 1)


@pytest.fixture
def bad_logits(monkeypatch):
    """Log-probs of the training pass are NaN at the steps that a run names."""
    real = scoring.logprobs_of

    def prepare(made: Run) -> None:
        def spoiled(*args, **kwargs):
            found = real(*args, **kwargs)
            if torch.is_grad_enabled() and made.trainer.state.global_step in made.spoiled:
                return found[0] * NAN, *found[1:]
            return found

        monkeypatch.setattr(scoring, "logprobs_of", spoiled)

    return prepare


KINDS = ["reward", "logit", "gradient", "adapter"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_update_is_skipped_and_reported(tmp_path: Path, kind: str, bad_logits):
    made = run(tmp_path / "r", kind, {2})
    if kind == "logit":
        bad_logits(made)
    seen = {}
    made.trainer.add_callback(
        At("on_step_end", set(range(99)), lambda: seen.setdefault(len(seen), made.weights()))
    )
    made.kept()
    assert len(made.lines) == 5 and made.trainer.policy_updates
    for tensors in seen.values():
        assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    same = [all(torch.equal(seen[i][k], seen[i - 1][k]) for k in seen[i]) for i in range(1, 10)]
    # Steps 4 and 5 are the third update: a bad rollout spoils both, a bad step itself only.
    assert same == [i in ((4, 5) if kind == "reward" else (4,)) for i in range(1, 10)]
    [told] = map(json.loads, (tmp_path / "r" / "skipped.jsonl").read_text().splitlines())
    assert (told["training"], told["update"]) == ("ppo", 2) and told["prompts"]
    assert set(made.record.data["skipped"]["ppo"]) == {"2"}
    numbers = [line["reward/score"] for line in made.lines]
    assert [isinstance(n, str) for n in numbers] == [i == 2 and kind == "reward" for i in range(5)]
    assert math.isfinite(made.trainer.controller.kl_coef)
    assert math.isfinite(made.trainer._moments.std)


@pytest.mark.parametrize(
    "kind", ["reward", "adapter", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:3])]
)
def test_three_in_a_row_stop_with_the_last_good_state(tmp_path: Path, kind: str, bad_logits):
    made = run(tmp_path / "r", kind, {1, 2, 3})
    if kind == "logit":
        bad_logits(made)
    good = {}
    made.trainer.add_callback(At("on_step_end", {2}, lambda: good.update(made.weights())))
    with pytest.raises(NonFiniteError, match="3 updates in a row were skipped") as caught:
        made.kept()
    assert caught.value.exit_code == 5 and "skipped.jsonl" in caught.value.remedy
    now = made.weights()
    assert all(bool(torch.isfinite(t).all()) for t in now.values())
    if kind == "reward":  # the others spoil the first step of an update only
        assert all(torch.equal(now[name], good[name]) for name in now)
    assert len(made.record.data["skipped"]["ppo"]) == 3


def test_two_in_a_row_and_two_later_do_not_stop(tmp_path: Path):
    made = run(tmp_path / "r", "reward", {1, 2, 4, 5}, total=7).kept()
    assert sorted(made.record.data["skipped"]["ppo"]) == ["1", "2", "4", "5"]


@pytest.mark.parametrize(
    "stage",
    ["sft", *(pytest.param(s, marks=pytest.mark.slow) for s in ("reward", "dpo", "grpo", "rloo"))],
)
def test_every_stage_skips_a_bad_gradient_and_keeps_its_loss(tmp_path, monkeypatch, stage: str):
    """And the mean loss of the record is one of the steps that counted."""
    killed.write(tmp_path)
    real = checkpoint_callback.CheckpointCallback.train

    def train(self, trainer):
        if self.stage == stage and self.name == stage:
            compute = trainer.whole_loss
            trainer.whole_loss = lambda *a, **k: (
                compute(*a, **k) * (NAN if trainer.state.global_step == 1 else 1.0)
            )
        return real(self, trainer)

    monkeypatch.setattr(checkpoint_callback.CheckpointCallback, "train", train)
    algorithm = stage if stage in ("dpo", "grpo", "rloo") else "ppo"
    asked = killed.recipe(
        tmp_path,
        f"algorithm={algorithm}",
        "reward.held_out_model=false",
        "sft.args.logging_steps=1",
        "reward.args.logging_steps=1",
    )
    record = pipeline.run(asked, tmp_path / "run", until=stage)
    assert list(record.data["skipped"]) == [stage]
    [told] = map(json.loads, (tmp_path / "run" / "skipped.jsonl").read_text().splitlines())
    assert told["training"] == stage and told["prompts"] or stage in ("reward", "dpo")
    losses = [line["loss"] for line in record.metrics(stage) if "loss" in line]
    assert losses.count("nan") == 1, "the loss that was no number is in the log as what it was"
    loss = record.data["stages"][stage].get("train_loss", 0.0)
    assert isinstance(loss, float) and math.isfinite(loss)


def test_a_run_that_stops_leaves_no_bad_adapter_anywhere(runs: killed.Runs, tmp_path: Path):
    """Exit code 5, no final adapter, no push, and every checkpoint finite; the next run goes on."""
    asked, out = runs.recipe(), runs.copy("ppo", tmp_path / "run")

    def broken():
        real = reward_functions.of_recipe

        def rewards(*args):
            functions, weights = real(*args)
            functions[0] = lambda completion_ids, **_: [NAN] * len(completion_ids)
            return functions, weights

        reward_functions.of_recipe = rewards
        try:
            with shell.errors_as_text(False):
                pipeline.run(asked, out, until="ppo")
        except Exception as error:
            return error.exit_code
        return 0

    assert killed.wait(killed.start(broken)) == 5
    record = Record.read(out)
    assert not record.done("ppo") and not record.adapter("policy").exists()
    assert record.data["stages"]["ppo"]["error"]["type"] == "NonFiniteError"
    found, _ = newest(out / "checkpoints" / "ppo")
    for tensors in found.part("roles").values():
        assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    with pytest.raises(LoraRlhfError):
        staging.check_adapter(record, "policy")
