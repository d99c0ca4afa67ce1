# SPDX-License-Identifier: Apache-2.0
"""Doctor checks of the evaluation: win rates over SFT, their judges and their prompts."""

from __future__ import annotations

from lora_rlhf.recipe.stage_keys import ALGORITHMS
from lora_rlhf.reports import kinds
from lora_rlhf.runs.metric_names import JUDGES
from lora_rlhf.runs.record import Record

from .findings import Findings, Lines, above, below, few_prompts, finding, rate

MATERIAL = 0.5
"""Share of a gain in win rate that must vanish at equal length to be attributed to length."""


def check(record: Record, lines: Lines) -> Findings:
    """Check the win rates of the policy over SFT."""
    policy = record.data["evaluation"].get("policy", {})
    proxy = policy.get("win_rate_proxy")
    judged = [name for name in JUDGES if policy.get(name) and name != "win_rate_proxy"]
    if judged or proxy:
        yield from few_prompts((policy[judged[0]] if judged else proxy)["n"])
    if proxy and not judged:
        undecided = "" if above(proxy, 0.5) else ", and that is not clearly above 50 %"
        what = f"the only judge is the reward model that PPO optimised: {rate(proxy)}{undecided}"
        yield finding("no_judge", what)
    sft, by_kind = record.data["evaluation"].get("sft", {}), kinds.of_record(record)
    who, own = ALGORITHMS[record.algorithm], by_kind.get("policy", {})
    for topic, what in kinds.sentences(who, policy, sft, own).items():
        if topic != "none_worse":
            yield finding("kinds", what.removesuffix("."), topic)
    for name in judged:
        won, controlled = policy[name], policy.get(f"{name}_length_controlled")
        what = f"the policy's win rate over SFT by {JUDGES[name]} is {rate(won)}"
        if below(won, 0.5) and above(proxy, 0.5):
            what += f", but {rate(proxy)} by the reward model that PPO optimised"
            if longer := policy.get("longer_than_sft"):
                what += f"; its answer is longer on {rate(longer)}"
            yield finding("hacked", what, name)
        elif below(won, 0.5):
            yield finding("worse", what, name)
        elif not above(won, 0.5):
            yield finding("undecided", what, name)
        elif (
            # A wide interval alone does not show that the gain is due to length.
            controlled
            and not above(controlled, 0.5)
            and controlled["value"] - 0.5 <= (1 - MATERIAL) * (won["value"] - 0.5)
        ):
            yield finding("length", f"{what}, but {rate(controlled)} at the length of SFT", name)
