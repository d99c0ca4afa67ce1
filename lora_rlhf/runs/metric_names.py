# SPDX-License-Identifier: Apache-2.0
"""Names of evaluation metrics in the record, with unit and denominator."""

from __future__ import annotations

METRICS = {
    "gold_reward": "mean reward by the task's exact checker, -1 to 1",
    "gold_reward_minus_sft": "gold reward less that of SFT on the same prompts, paired",
    "win_rate": "share of prompts on which the gold reward beats SFT's; ties count half",
    "win_rate_length_controlled": "the same, predicted for answers as long as SFT's",
    "success": "share of task prompts answered without any fault",
    "hallucination": "share of answers with an invented value; n: prompts about a record",
    "false_abstention": "share of questions called unanswerable; n: those that the record answers",
    "false_abstention_minus_sft": "the difference from SFT on the same questions, paired",
    "missed_abstention": "share answered nevertheless; n: questions that the record cannot answer",
    "missed_abstention_minus_sft": "the difference from SFT on the same questions, paired",
    "incidents_per_1000": "harmful requests complied with, per 1,000; n: harmful prompts",
    "over_refusal": "share of harmless prompts refused; n: harmless prompts",
    "constraint": "share of answers in the form asked for; n: prompts that ask for a form",
    "words": "mean words per answer to a task prompt",
    "held_out_reward": "mean score of a reward model that training never saw, centred",
    "held_out_reward_minus_sft": "the difference from SFT on the same prompts, paired",
    "win_rate_held_out": "share of prompts on which that model prefers the answer to SFT's",
    "win_rate_held_out_length_controlled": "the same, predicted for answers as long as SFT's",
    "proxy_reward": "mean score of the reward model that training optimised, centred",
    "proxy_reward_minus_sft": "the difference from SFT on the same prompts, paired",
    "win_rate_proxy": "share of prompts on which that model prefers the answer to SFT's",
    "win_rate_proxy_length_controlled": "the same, predicted for answers as long as SFT's",
    "longer_than_sft": "share of prompts with more tokens than SFT; ties count half",
    "kl": "nats per sequence, on the model's own samples: log-probability less that under SFT",
    "kl_bound": "the same, an upper bound: log n - (n - 1) / n, from a formula, not measured",
    "length": "mean completion tokens, the end token included",
    "length_minus_sft": "the difference from SFT on the same prompts, paired",
    "eos_rate": "share of completions that ended by themselves",
    "repetition": "mean share of 4-grams that occurred before; n: completions with 4 tokens",
}
"""Every metric with its unit and denominator, in the order of tables."""

DIFFERENCE = "gold_reward_minus_sft"
"""The paired difference that decides whether a model is clearly worse than SFT."""

DIFFERENCES = tuple(name for name in METRICS if name.endswith("_minus_sft"))
"""Metrics that are differences, of which small values matter as much as large ones."""

JUDGES = {
    "win_rate": "the task's exact checker",
    "win_rate_held_out": "a reward model that training never saw",
    "win_rate_proxy": "the reward model that training optimised",
}
"""Win rate -> its judge, the most reliable one first: the first that a run has is its headline."""
