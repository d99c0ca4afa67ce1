# SPDX-License-Identifier: Apache-2.0
"""The gate before PPO: a reward model must clearly beat chance, and the rule by length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_rlhf.errors import GateError
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record

UNKNOWN = "not judged"
"""Verdict on a reward model of the user's own, for which there are no comparisons."""


def check(recipe: Recipe, record: Record, progress: Progress) -> None:
    """Reject optimisation against a reward model that failed its gate.

    Raises:
        GateError: The gate failed and `reward.gate` is not `warn`.
    """
    entry = record.data["stages"]["reward"]
    if recipe.ppo.reward != "model":
        return
    gate, reason = entry["gate"], entry.get("gate_reason")
    if gate in ("passed", UNKNOWN) and (preferred := worse_answers(record.folder)):
        gate, reason = "failed", preferred
    if gate == "passed":
        return
    if gate == UNKNOWN:
        why = reason or "there are no comparisons"
        progress.say(f"warning: the reward model was not judged: {why}")
        return
    if recipe.reward.gate == "stop":
        raise GateError(
            f"the reward model may not be optimised against: {reason}",
            expected="held-out accuracy whose 95 % interval excludes 0.5, above the rule by "
            "length, and no clear preference for answers that were made worse",
            remedy="improve the comparisons or train longer, in a new --out (this run keeps its "
            "reward model); `reward.gate: warn` continues here, and the card says so",
        )
    entry |= {"gate": "warned", "gate_reason": reason}
    record.save()
    progress.say(f"warning: the reward model is weak: {reason}")


def worse_answers(folder: Path) -> str | None:
    """Return which worse answers the reward model prefers, by the records of `lora-rlhf judge`.

    These lie in the run directory as `judge*.json`, if somebody has made them. A probe counts if
    its whole 95 % interval is above one half.
    """
    for path in sorted(folder.glob("judge*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if str(content["judge"]).rpartition(":")[2] != "reward":
                continue
            failed = {n: p["value"] for n, p in content["probes"].items() if _lies_above(0.5, p)}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # of another program
        if failed:
            rates = ", ".join(f"{n.replace('_', ' ')} {rate:.0%}" for n, rate in failed.items())
            return (
                f"it prefers answers that were made worse to better ones ({rates}; {path.name}): "
                "add comparisons in which such answers lose, or delete the file if it is of "
                "another reward model"
            )
    return None


def weakness(entry: dict[str, Any]) -> str | None:
    """Return why a reward model is too weak to optimise against and what to do, or None.

    A model fails as one of length if it is right where the rule by length is right, wrong where
    the rule is wrong (both beyond chance), and does not clearly beat the rule. People may prefer
    long answers, so a model that uses length and clearly beats the rule passes.

    Args:
        entry: The result of `reward_metrics.report`.
    """
    accuracy, by_length = entry["accuracy"], entry["accuracy_by_length"]
    if not entry["score_std"] > 1e-6:
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
    longer = entry["accuracy_length_baseline"]["value"]
    rule, word, other = max((longer, "longer", "shorter"), (1 - longer, "shorter", "longer"))
    balance = "add comparisons in which the better completion is not the " + word
    if accuracy["value"] <= rule:
        return (
            f"it is no better ({accuracy['value']:.3f}) than preferring the {word} completion "
            f"({rule:.3f}) on the same comparisons: {balance}"
        )
    with_rule, against = by_length.get(word), by_length.get(other)
    follows_rule = with_rule and _lies_above(0.5, with_rule)
    fails_without = against and _lies_below(0.5, against)
    if follows_rule and fails_without and not _lies_above(0.0, entry["gain_over_length"]):
        return (
            f"it goes by length: right on {with_rule['value']:.3f} of the comparisons whose chosen "
            f"completion is {word} and on {against['value']:.3f} (n={against['n']}) of those where "
            f"it is {other}, and not clearly better than the rule by length: {balance}"
        )
    return None


def _lies_above(bound: float, estimate: dict[str, Any]) -> bool:
    return estimate["low"] is not None and estimate["low"] > bound


def _lies_below(bound: float, estimate: dict[str, Any]) -> bool:
    return estimate["high"] is not None and estimate["high"] < bound
