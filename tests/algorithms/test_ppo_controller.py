# SPDX-License-Identifier: Apache-2.0
"""KL control, stopping, the moving average, the best policy: each against its formula."""

import pytest
import torch
from ppo_run import Run, roles
from small import backbone
from transformers import TrainerControl, TrainerState

from lora_rlhf.algorithms.ppo.ppo_controller import PPOController
from lora_rlhf.recipe.schema import PpoSection
from lora_rlhf.reports import alarms
from lora_rlhf.runs.progress import Progress


def policy(made):
    return torch.cat([p.detach().flatten() for _, p in made.role_parameters("policy")])


def steering(made=None, **section):
    made = made or backbone("llama", "policy", "reference")
    return PPOController(made, PpoSection(**section), Progress(quiet=True), episodes_per_update=100)


def tell(steered, **line):
    control = TrainerControl()
    line = {"kl/sequence": 0.0, **line}
    steered.on_log(None, TrainerState(), control, logs=line)
    return control.should_training_stop


def test_without_a_target_the_coefficient_stays():
    steered = steering(kl_coef=0.05)
    tell(steered, **{"kl/sequence": 100.0})
    assert steered.kl_coef == 0.05


def test_a_target_moves_the_coefficient_as_ziegler_does():
    # 1909.08593: K ← K (1 + clip(kl/target - 1, ±0.2) · n / horizon), by hand for n = 100.
    steered = steering(kl_coef=0.1, kl_target=6.0, kl_horizon=1000)
    tell(steered, **{"kl/sequence": 6.6})
    assert steered.kl_coef == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    tell(steered, **{"kl/sequence": 60.0})
    assert steered.kl_coef == pytest.approx(0.1 * 1.01 * 1.02)
    tell(steered, **{"kl/sequence": 0.0})
    assert steered.kl_coef == pytest.approx(0.1 * 1.01 * 1.02 * 0.98)


def test_lines_without_a_rollout_are_not_counted():
    steered = steering(kl_target=6.0)
    steered.on_log(None, TrainerState(), TrainerControl(), logs={"train_runtime": 3.0})
    assert steered.lines == [] and steered.kl_coef == 0.05


def test_a_budget_stops_and_returns_to_the_last_policy_within_it():
    made = backbone("llama", "policy", "reference")
    steered = steering(made, kl_budget=5.0)
    seen = []
    for update, kl in enumerate((0.0, 4.0, 5.5)):
        seen.append(policy(made))
        steered.before_update(update)
        with torch.no_grad():
            for _, p in made.role_parameters("policy"):
                p.add_(1.0)
        assert tell(steered, **{"kl/sequence": kl}) is (kl > 5.0)
    steered.finish()
    assert torch.equal(policy(made), seen[1])
    assert steered.entry["policy_of_update"] == 1 and "budget of 5" in steered.entry["stopped"]


def test_within_the_budget_the_last_policy_is_the_result():
    made = backbone("llama", "policy", "reference")
    steered = steering(made, kl_budget=5.0)
    steered.before_update(0)
    with torch.no_grad():
        for _, p in made.role_parameters("policy"):
            p.add_(1.0)
    last = policy(made)
    assert not tell(steered, **{"kl/sequence": 1.0})
    steered.finish()
    assert torch.equal(policy(made), last) and "policy_of_update" not in steered.entry


def test_the_average_is_that_of_the_policies():
    made = backbone("llama", "policy", "reference")
    steered = steering(made, ema=0.75)
    mean = policy(made)
    for step in range(3):
        with torch.no_grad():
            for _, p in made.role_parameters("policy"):
                p.add_(0.1 * (step + 1))
        steered.after_policy_step()
        mean = 0.75 * mean + 0.25 * policy(made)
    steered.finish()
    torch.testing.assert_close(policy(made), mean)
    assert steered.entry == {"ema": 0.75}


def test_best_returns_to_the_peak_of_the_held_out_reward(monkeypatch):
    sick = alarms.Sign("made_up", "the proxy rises and the held-out reward falls")
    monkeypatch.setattr(alarms, "signs", lambda lines: [sick] if len(lines) == 6 else [])
    made = backbone("llama", "policy", "reference")
    steered, seen = steering(made, watch="best"), []
    for update, reward in enumerate((0.0, 0.6, 0.9, 0.8, 0.1, -0.5)):
        seen.append(policy(made))
        steered.before_update(update)
        with torch.no_grad():
            for _, p in made.role_parameters("policy"):
                p.add_(1.0)
        stopped = tell(steered, **{"rewards/held_out": reward})
        assert stopped is (update == 5)
    steered.finish()
    # Means of three: 0, .3, .5, .77, .6, .13
    assert steered.entry["policy_of_update"] == 3
    assert torch.equal(policy(made), seen[3])


@pytest.mark.parametrize("action", ["off", "warn", "raise_kl", "stop"])
def test_the_recipe_decides_what_a_serious_alarm_does(monkeypatch, action):
    sick = alarms.Sign("made_up", "it is sick")
    monkeypatch.setattr(alarms, "signs", lambda lines: [sick])
    steered = steering(watch=action, kl_coef=0.05)
    assert tell(steered) is (action == "stop")
    assert steered.kl_coef == (0.1 if action == "raise_kl" else 0.05)
    signs = steered.entry.get("signs")
    assert signs is None if action == "off" else signs[0]["message"] == "it is sick"


def test_an_alarm_is_reported_once(monkeypatch):
    sick = alarms.Sign("made_up", "it is sick", serious=False)
    monkeypatch.setattr(alarms, "signs", lambda lines: [sick])
    steered = steering(watch="stop")
    assert not tell(steered) and not tell(steered)
    assert len(steered.entry["signs"]) == 1


# ------------------------------------------------------------------- in whole runs


def test_a_budget_ends_a_run_early(tmp_path):
    run = Run(tmp_path / "r", {"learning_rate": 5e-2}, updates=12, kl_budget=0.02)
    run.go()
    assert 1 < len(run.lines) < 12
    assert run.lines[-1]["kl/sequence"] > 0.02 >= max(x["kl/sequence"] for x in run.lines[:-1])


def test_the_adapted_coefficient_is_the_one_in_the_next_reward(tmp_path):
    run = Run(tmp_path / "r", updates=3, kl_target=1e-6, kl_coef=0.5, kl_horizon=40).go()
    coefs = [line["kl/coef"] for line in run.lines]
    # The first KL is 0, below its target: -0.2 · 4/40; then it is far above.
    assert coefs == pytest.approx([0.5, 0.5 * 0.98, 0.5 * 0.98 * 1.02])


def test_the_average_lags_behind_the_last_policy(tmp_path):
    plain = Run(tmp_path / "a", made=roles(), updates=3).go()
    mean = Run(tmp_path / "b", made=roles(), updates=3, ema=0.5).go()
    last, before = policy(plain.backbone), policy(mean.backbone)
    assert torch.equal(last, before)  # training itself is not changed by it
    mean.trainer.controller.finish()
    start = torch.cat([p.flatten() for _, p in mean.backbone.role_parameters("reference")])
    after = policy(mean.backbone)
    assert 0 < (after - start).norm() < (last - start).norm()


def mean_id(completion_ids, **_):
    return [sum(ids) / len(ids) / 10 for ids in completion_ids]


def test_normalising_divides_by_the_running_std(tmp_path):
    plain = Run(
        tmp_path / "a", rewards=[mean_id], updates=2, kl_coef=0.0, missing_eos_penalty=0.0
    ).go()
    scaled = Run(
        tmp_path / "b",
        rewards=[mean_id],
        updates=2,
        kl_coef=0.0,
        missing_eos_penalty=0.0,
        normalize_reward=True,
        clip_reward=50.0,
    ).go()
    first, second = plain.lines[0], scaled.lines[0]
    assert first["reward/score"] == second["reward/score"]  # the log keeps the score as it is
    assert second["reward/scale"] == pytest.approx(first["reward/score_std"], rel=1e-5)
    assert second["reward/total"] == pytest.approx(
        first["reward/score"] / second["reward/scale"], rel=1e-4
    )
