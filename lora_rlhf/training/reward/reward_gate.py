# SPDX-License-Identifier: Apache-2.0
"""Whether a reward model may be optimised against: clearly better than chance, and than length."""

from __future__ import annotations

from typing import Any

from lora_rlhf.errors import GateError


def gate_reward(
    accuracy: dict[str, Any],
    spread: float,
    length_accuracy: dict[str, Any],
    by_length: dict[str, Any] | None = None,
    gain: dict[str, Any] | None = None,
) -> str | None:
    """Why the reward model is not good enough to optimise against and what to do, or None.

    Args:
        accuracy: Held-out accuracy as {value, low, high, n}.
        spread: Standard deviation of its scores on held-out completions.
        length_accuracy: Accuracy of "the longer one is better" on the same comparisons.
        by_length: Its accuracy where the chosen one is `longer`, and where it is `shorter`.
        gain: Its accuracy less that of the better rule by length alone, paired.

    Length alone: it is right where the rule is, wrong where the rule is wrong (both beyond chance),
    and not shown to know more. People may really like long answers, so a model that leans on
    length and clearly beats the rule passes.
    """
    if not spread > 1e-6:
        return (
            "its score is constant, so training did not reach it: raise the learning rate, and "
            "look for a frozen adapter"
        )
    if _lies_below(0.5, accuracy):
        return (
            "it prefers what people rejected: chosen and rejected may be swapped in the data, so "
            "check `columns:` and the order of `ranks` (1 is best)"
        )
    if not _lies_above(0.5, accuracy):
        low, high = (float("nan") if accuracy[k] is None else accuracy[k] for k in ("low", "high"))
        return (
            f"its held-out accuracy {accuracy['value']:.3f} [{low:.3f}, {high:.3f}] on "
            f"n={accuracy['n']} is not clearly above chance: more or cleaner comparisons are needed"
        )
    longer = length_accuracy["value"]
    rule, word = max((longer, "longer"), (1 - longer, "shorter"))
    balance = "add comparisons in which the better completion is not the " + word
    if accuracy["value"] <= rule:
        return (
            f"it is no better ({accuracy['value']:.3f}) than preferring the {word} completion "
            f"({rule:.3f}) on the same comparisons: {balance}"
        )
    other = "shorter" if word == "longer" else "longer"
    with_rule, against = ((by_length or {}).get(key) for key in (word, other))
    if (
        with_rule
        and against
        and _lies_above(0.5, with_rule)
        and _lies_below(0.5, against)
        and not (gain and _lies_above(0.0, gain))
    ):
        return (
            f"it goes by length: right on {with_rule['value']:.3f} of the comparisons whose chosen "
            f"completion is {word} and on {against['value']:.3f} (n={against['n']}) of those where "
            f"it is {other}, and not clearly better than the rule by length: {balance}"
        )
    return None


def _lies_above(bound: float, estimate: dict[str, Any]) -> bool:
    """Whether the whole interval lies above `bound`; never without an interval."""
    return estimate["low"] is not None and estimate["low"] > bound


def _lies_below(bound: float, estimate: dict[str, Any]) -> bool:
    """Whether the whole interval lies below `bound`; never without an interval."""
    return estimate["high"] is not None and estimate["high"] < bound


def refuse(reason: str) -> GateError:
    """The gate's error, with the remedy."""
    return GateError(
        f"the reward model may not be optimised against: {reason}",
        expected="held-out accuracy whose 95 % interval excludes 0.5, and more than length",
        remedy="mend the comparisons or train longer, in a new --out (this run keeps its reward "
        "model); `reward.gate: warn` goes on here, and the card says so",
    )
