# SPDX-License-Identifier: Apache-2.0
"""A card states which conclusions its numbers do not support."""

import itertools

import pytest
from card_run import RECIPE, change, estimate, make_run, pythons, section

from lora_rlhf.reports.cards import model_card


@pytest.fixture
def run(tmp_path):
    count = itertools.count()
    return lambda *args, **kw: make_run(tmp_path / f"run{next(count)}", *args, **kw)


def limits_of(record, role="policy"):
    return section(model_card.render(record, role), "Limits")


def test_a_win_rate_that_includes_one_half_is_not_called_a_win(run):
    sentence = "PPO did not clearly beat SFT"
    assert sentence not in limits_of(run())
    close = run(change(evaluation__policy__win_rate=estimate(0.53, 0.45, 0.61, 128)))
    assert f"{sentence}: win rate 0.53" in limits_of(close)
    worse = run(change(evaluation__policy__win_rate=estimate(0.31, 0.25, 0.37, 128)))
    assert "PPO made the model worse than SFT" in limits_of(worse)
    lone = run(lambda data: data["evaluation"]["policy"].pop("win_rate"))
    assert "unknown whether PPO beat SFT" in limits_of(lone)


def test_simulated_labelers_are_named_only_where_they_compared(run):
    people = limits_of(run(), "reward")
    assert "simulated" not in people
    assert "A synthetic task generated the demonstrations; the comparisons were given" in people
    source = {"kind": "task", "name": "closed-world", "rows": 9}
    task = run(change(data__comparisons__sources=[source]))
    assert "Trained on a synthetic task with simulated labelers" in limits_of(task, "reward")


def test_a_judge_that_training_optimised_is_no_proof(run):
    def edit(data):
        policy = data["evaluation"]["policy"]
        policy["win_rate_proxy"] = policy.pop("win_rate")

    assert "The only judge of the win rate is the reward model" in limits_of(run(edit))
    assert "The only judge" not in limits_of(run())


def test_a_kind_of_prompt_that_got_worse_is_stated(run):
    text = limits_of(run())
    assert "PPO is clearly worse than SFT on prompts of these kinds: answer (gold reward" in text
    assert "free" not in text, "it got better"
    better = run(
        change(stages__evaluate__by_kind__policy__answer={"success": estimate(0.5, 0.4, 0.6, 68)})
    )
    assert "clearly worse than SFT on no kind of prompt" in limits_of(better)
    assert "clearly worse" not in limits_of(run(change(stages__evaluate__by_kind={})))


def test_more_false_abstention_is_stated(run):
    shares = {
        "evaluation__sft__false_abstention": estimate(0.21, 0.14, 0.31, 64),
        "evaluation__policy__false_abstention": estimate(0.3, 0.2, 0.42, 64),
        "evaluation__policy__false_abstention_minus_sft": estimate(0.09, 0.02, 0.17, 64),
    }
    limits = limits_of(run(change(**shares)))
    assert "calls answerable questions unanswerable more often than SFT" in limits
    assert "paired difference 0.09" in limits, "the intervals of the two shares overlap"
    shares["evaluation__policy__false_abstention_minus_sft"] = estimate(0.4, -0.01, 0.8, 64)
    assert "unanswerable" not in limits_of(run(change(**shares)))


def test_high_kl_and_longer_answers_are_stated(run):
    assert "far from SFT" not in limits_of(run())
    assert "far from SFT: KL 88.25 nats" in limits_of(run(change(stages__ppo__kl_last=88.25)))
    assert "not finite" in limits_of(run(change(stages__ppo__kl_last="NaN")))
    longer = run(change(evaluation__policy__length_minus_sft=estimate(1.5, 0.2, 2.9, 128)))
    assert "Answers grew longer: 21.7" in limits_of(longer)
    assert "grew longer" not in limits_of(run())


def test_signs_of_alarm_are_stated(run):
    """The PPO controller records them as `signs` of its stage."""
    sign = {"update": 9, "sign": "kl_high", "message": "KL to SFT is 38 nats per sequence"}
    text = model_card.render(run(change(stages__ppo__signs=[sign])), "policy")
    assert "alarm during training at update 9: KL to SFT is 38 nats" in section(text, "Limits")
    assert "Alarm at update 9: KL" in section(text, "Reinforcement learning")


def test_a_proxy_that_rises_alone_is_stated(run):
    rose = {"evaluation__policy__proxy_reward_minus_sft": estimate(0.8, 0.5, 1.1, 128)}
    level = {"evaluation__policy__gold_reward_minus_sft": estimate(0.05, -0.02, 0.12, 128)}
    assert "may exploit the reward model" in limits_of(run(change(**rose, **level)))
    above = {"evaluation__policy__gold_reward_minus_sft": estimate(0.05, 0.02, 0.08, 128)}
    assert "may exploit" not in limits_of(run(change(**rose, **above))), "the gain is paired"
    assert "may exploit" not in limits_of(run())


def test_one_judge_decides_and_length_is_named(run):
    """A win by the headline's judge is not contradicted by other win rates."""
    clear = {"evaluation__policy__win_rate": estimate(0.63, 0.57, 0.69, 128)}
    other = {"evaluation__policy__win_rate_proxy": estimate(0.5, 0.4, 0.6, 128)}
    assert "did not clearly beat" not in limits_of(run(change(**clear, **other)))
    level = {"evaluation__policy__win_rate_length_controlled": estimate(0.51, 0.45, 0.57, 128)}
    text = limits_of(run(change(**clear, **level)))
    assert "With answers as long as SFT's, PPO was not shown to win: win rate 0.51" in text


def test_a_gate_that_only_warned_is_stated_at_the_top(run):
    edit = change(stages__reward__gate="warned", stages__reward__gate_reason="too few comparisons")
    for role in ("policy", "reward", "value"):
        text = model_card.render(run(edit), role)
        top = text.split("\n## ")[0]
        assert "> **Warning.** The reward model did not pass its gate" in top
        assert "too few comparisons" in top and "warning only" in top
        assert "did not pass its gate" in section(text, "Limits")
        assert "**Warning.**" not in model_card.render(run(), role)


def test_quantised_and_gold_runs_are_stated(run):
    four_bit = model_card.render(run(change(model__load_in_4bit=True)), "policy")
    assert "4-bit base" in section(four_bit, "Limits")
    assert "4-bit NF4" in section(four_bit, "Lineage")
    load, merge = pythons(four_bit)[0], pythons(four_bit)[-1]
    assert "load_in_4bit=True" in load and "load_in_4bit" not in merge
    gold = run(change(stages__ppo__reward="gold"))
    assert "optimised the exact checker" in limits_of(gold)
    assert "a copy of the SFT adapter with a new head" in model_card.render(gold, "value")


def test_small_evaluations_and_the_authors_limits_are_stated(run):
    few = run(change(evaluation__policy__win_rate__n=12))
    assert "rest on only 12 prompts" in limits_of(few)
    own = {**RECIPE, "card": {**RECIPE["card"], "limits": "Do not use it for medicine."}}
    assert "Do not use it for medicine." in limits_of(run(recipe=own))
