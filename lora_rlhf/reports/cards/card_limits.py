# SPDX-License-Identifier: Apache-2.0
"""Limits that follow from the numbers of the record, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_rlhf.estimates import differs
from lora_rlhf.reports import kinds
from lora_rlhf.runs.metric_names import JUDGES

from .card_facts import Facts
from .card_markdown import at, cell, interval, is_number, number, paragraph

HIGH_KL = 15.0  # nats per sequence
_LONGER = 1.2  # ratio of last to first mean length
_FEW = 100  # prompts
LENGTH_KEYS = ("completions/length", "completions/mean_length", "length")


def limits(facts: Facts) -> list[str]:
    """Return at least one sentence; the author's own limits are last."""
    sentences = [*_of_data(facts)]
    if facts.role != "sft":
        sentences += _of_reward(facts)
    if facts.role in ("policy", "value"):
        sentences += _of_rl(facts)
    if facts.role == "policy":
        sentences += [*_of_win_rate(facts), *_of_kinds(facts)]
        sentences += [*_of_length(facts), *_of_proxy(facts)]
    if facts.role in ("policy", "sft"):
        sentences += _of_evaluation(facts)
    if own := facts.own("limits"):
        return [*sentences, paragraph(own).replace("\n", " ")]
    return [*sentences, "The author of the recipe stated no limits beyond those measured."]


def _of_data(facts: Facts) -> Iterator[str]:
    sets = {name for name, source in facts.sources() if at(source, "kind") == "task"}
    judged = any(name.startswith("comparisons") for name in sets)
    if judged or (sets and not facts.get("data.comparisons")):
        yield (
            "Trained on a synthetic task with simulated labelers: the results show how the method "
            "works there, and say nothing about what people prefer."
        )
    elif sets:
        yield (
            f"A synthetic task generated the {' and '.join(sorted(sets))}; the comparisons were "
            "given. Of other prompts than those of the task the results say nothing."
        )
    if unknown := facts.get("rebuilt.unknown"):
        yield f"The record of this run was lost and rebuilt; not known: {', '.join(unknown)}."
    if facts.get("model.load_in_4bit"):
        yield "Trained and evaluated on a 4-bit base; other precisions give different outputs."


def _of_reward(facts: Facts) -> Iterator[str]:
    stage = facts.get("stages.reward", {})
    accuracy, baseline = stage.get("accuracy"), stage.get("accuracy_length_baseline")
    if stage.get("gate") in ("warned", "failed"):
        yield (
            f"The reward model did not pass its gate (accuracy {interval(accuracy)}), so a policy "
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
            f"The policy is far from SFT: KL {number(kl)} nats per sequence at the end. Its "
            "answers may please the reward model without being better."
        )
    elif kl is not None and not is_number(kl):
        yield "The KL at the end of training is not finite, so the policy may be broken."
    for sign in facts.signs():
        yield f"There was an alarm during training {sign}."


def _of_win_rate(facts: Facts) -> Iterator[str]:
    metrics, name = facts.get("evaluation.policy", {}), facts.algorithm_name
    metric = next((key for key in JUDGES if metrics.get(key)), None)
    if metric is None:
        yield f"No win rate was recorded, so it is unknown whether {name} beat SFT."
        return
    label, rate = cell(metric).replace("_", " "), metrics[metric]
    low, high = at(rate, "low"), at(rate, "high")
    if not (is_number(low) and is_number(high)):
        yield f"The {label}, {interval(rate)}, has no interval, so it may be chance."
    elif low <= 0.5 <= high:
        yield f"{name} did not clearly beat SFT: {label} {interval(rate)} includes one half."
    elif high < 0.5:
        yield f"{name} made the model worse than SFT: {label} {interval(rate)}."
    else:
        controlled = metrics.get(f"{metric}_length_controlled")
        if is_number(at(controlled, "low")) and controlled["low"] <= 0.5:
            yield (
                f"With answers as long as SFT's, {name} was not shown to win: {label} "
                f"{interval(controlled)}. Part of the gain may be length."
            )
    if metric == "win_rate_proxy":
        yield (
            "The only judge of the win rate is the reward model that training optimised, so people "
            "may not see the gain."
        )


def _of_kinds(facts: Facts) -> Iterator[str]:
    own, sft = (facts.get(f"evaluation.{model}", {}) for model in ("policy", "sft"))
    by_kind = kinds.of_record(facts.record).get("policy", {})
    yield from map(cell, kinds.sentences(facts.algorithm_name, own, sft, by_kind).values())


def _of_length(facts: Facts) -> Iterator[str]:
    before, after = (facts.get(f"evaluation.{model}.length") for model in ("sft", "policy"))
    if rose := _rose(facts, "length"):
        yield (
            f"Answers grew longer: {interval(before)} tokens for SFT, {interval(after)} for "
            "the policy. Part of any gain may be length."
        )
    if rose is not None:
        return
    values = facts.curve(*LENGTH_KEYS)
    if len(values) > 1 and values[-1] > _LONGER * values[0]:
        yield (
            f"Answers grew longer during training, from {number(values[0])} to "
            f"{number(values[-1])} tokens. Part of any gain may be length."
        )


def _rose(facts: Facts, metric: str) -> bool | None:
    """Tell if the paired difference to SFT is clearly above 0; None if it was not recorded."""
    gap = facts.get(f"evaluation.policy.{metric}_minus_sft")
    known = is_number(at(gap, "low")) and is_number(at(gap, "high"))
    return differs(gap) > 0 if known else None


def _of_proxy(facts: Facts) -> Iterator[str]:
    def gap(metric: str) -> str:
        return interval(facts.get(f"evaluation.policy.{metric}_minus_sft"), short=True)

    for judge, label in (("gold_reward", "gold reward"), ("held_out_reward", "held-out reward")):
        if _rose(facts, "proxy_reward") and _rose(facts, judge) is False:
            yield (
                f"The score that training optimised rose above SFT's (by {gap('proxy_reward')}), "
                f"but the {label} did not clearly (by {gap(judge)}): the policy may exploit the "
                "reward model."
            )


def _of_evaluation(facts: Facts) -> Iterator[str]:
    metrics: Mapping[str, Any] = facts.get(f"evaluation.{facts.role}", {})
    counts = [at(value, "n") for value in metrics.values() if is_number(at(value, "n"))]
    if not counts:
        yield "No evaluation with a count is recorded for this adapter."
    elif min(counts) < _FEW:
        yield f"Some results rest on only {number(min(counts))} prompts; see their intervals."
    yield "Prompts, languages and lengths other than those of the recipe were not tested."
