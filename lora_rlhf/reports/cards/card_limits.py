# SPDX-License-Identifier: Apache-2.0
"""The limits that a card states by itself: sentences that follow from the numbers of the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .card_facts import Facts
from .card_markdown import at, cell, interval, is_number, number, paragraph

HIGH_KL = 15.0
"""Nats per sequence from which a policy is said to be far from SFT."""
_LONGER = 1.2
_FEW = 100
_EVEN = 0.5
LENGTH_KEYS = ("completions/length", "completions/mean_length", "length")


def limits(facts: Facts) -> list[str]:
    """Sentences, the recipe author's own last; there is always at least one."""
    found = [*_of_data(facts)]
    if facts.role != "sft":
        found += _of_reward(facts)
    if facts.role in ("policy", "value"):
        found += _of_rl(facts)
    if facts.role == "policy":
        found += [*_of_win_rate(facts), *_of_length(facts), *_of_proxy(facts)]
    if facts.role in ("policy", "sft"):
        found += _of_evaluation(facts)
    if own := facts.own("limits"):
        found.append(paragraph(own).replace("\n", " "))
    else:
        found.append("The author of the recipe stated no limits beyond those that were measured.")
    return found


def _of_data(facts: Facts) -> Iterator[str]:
    if facts.synthetic():
        yield (
            "Trained on a synthetic closed world with simulated labelers: the results say how the "
            "method works there, and nothing about what people prefer."
        )
    if facts.get("model.load_in_4bit"):
        yield "Trained and evaluated on a 4-bit base; another precision gives other outputs."


def _of_reward(facts: Facts) -> Iterator[str]:
    stage = facts.get("stages.reward", {})
    accuracy, baseline = stage.get("accuracy"), stage.get("accuracy_length_baseline")
    if stage.get("gate") in ("warned", "failed"):
        yield (
            f"The reward model did not pass its gate (accuracy {interval(accuracy)}); what was "
            "trained on it may have learned noise."
        )
    low, length = at(accuracy, "low"), at(baseline, "value", baseline)
    if is_number(low) and is_number(length) and low <= length:
        yield (
            f"The reward model ({interval(accuracy)}) is not clearly better than always preferring "
            f"the longer answer ({interval(baseline)})."
        )


def _of_rl(facts: Facts) -> Iterator[str]:
    stage, name = facts.get(f"stages.{facts.algorithm}", {}), facts.algorithm_name
    if stage.get("reward") == "gold":
        yield f"{name} optimised the exact checker of a task; real tasks have no such checker."
    kl = at(stage.get("kl_last"), "value", stage.get("kl_last"))
    if is_number(kl) and kl > HIGH_KL:
        yield (
            f"The policy is far from SFT: KL {number(kl)} nats per sequence at the end. Outputs "
            "may please the reward model without being better."
        )
    elif kl is not None and not is_number(kl):
        yield "The KL at the end of training is not finite: the policy may be broken."
    for alarm in stage.get("alarms") or []:
        yield f"An alarm was raised in training: {cell(alarm)}."


def _of_win_rate(facts: Facts) -> Iterator[str]:
    rates = {
        key: value
        for key, value in facts.get("evaluation.policy", {}).items()
        if key.startswith("win_rate")
    }
    name = facts.algorithm_name
    for key, rate in rates.items():
        label, low, high = cell(key).replace("_", " "), at(rate, "low"), at(rate, "high")
        if not (is_number(low) and is_number(high)):
            yield f"The {label}, {interval(rate)}, has no interval: it may be chance."
        elif low <= _EVEN <= high:
            yield f"{name} did not clearly beat SFT: {label} {interval(rate)} includes one half."
        elif high < _EVEN:
            yield f"{name} made the model worse than SFT: {label} {interval(rate)}."
    if not rates:
        yield f"No win rate was recorded, so this card cannot say whether {name} beat SFT."
    elif all("proxy" in key for key in rates):
        yield (
            "The only judge of the win rate is the reward model that training optimised, so a gain "
            "by it may be no gain to people."
        )


def _of_length(facts: Facts) -> Iterator[str]:
    before, after = (facts.get(f"evaluation.{model}.length") for model in ("sft", "policy"))
    low, high = at(after, "low"), at(before, "high")
    if is_number(low) and is_number(high):
        if low > high:
            yield (
                f"Answers grew longer: {interval(before)} tokens for SFT, {interval(after)} for "
                "the policy. Part of any gain may be length."
            )
        return
    values = facts.curve(*LENGTH_KEYS)
    if len(values) > 1 and values[-1] > _LONGER * values[0]:
        yield (
            f"Answers grew longer in training, from {number(values[0])} to {number(values[-1])} "
            "tokens. Part of any gain may be length."
        )


def _of_proxy(facts: Facts) -> Iterator[str]:
    def rose(metric: str) -> bool | None:
        """Whether the policy's interval lies above SFT's; nothing where either is missing."""
        low = facts.get(f"evaluation.policy.{metric}.low")
        high = facts.get(f"evaluation.sft.{metric}.high")
        return low > high if is_number(low) and is_number(high) else None

    def both(metric: str) -> str:
        values = (facts.get(f"evaluation.{model}.{metric}") for model in ("sft", "policy"))
        return " to ".join(interval(value, short=True) for value in values)

    for judge, label in (("gold_reward", "gold reward"), ("held_out_reward", "held-out reward")):
        if rose("proxy_reward") and rose(judge) is False:
            yield (
                f"The score that training optimised rose ({both('proxy_reward')}), the {label} did "
                f"not clearly ({both(judge)}): the policy may exploit the reward model."
            )


def _of_evaluation(facts: Facts) -> Iterator[str]:
    metrics: Mapping[str, Any] = facts.get(f"evaluation.{facts.role}", {})
    counts = [at(value, "n") for value in metrics.values() if is_number(at(value, "n"))]
    if not counts:
        yield "No evaluation with a count is recorded for this adapter."
    elif min(counts) < _FEW:
        yield f"Some results rest on {number(min(counts))} prompts only; mind the intervals."
    yield "Other prompts, languages and lengths than those of the recipe were not tested."
