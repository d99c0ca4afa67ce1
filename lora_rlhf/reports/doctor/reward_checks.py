# SPDX-License-Identifier: Apache-2.0
"""Doctor checks of the reward model: accuracy, dependence on length, exploitation by PPO."""

from __future__ import annotations

import json
from statistics import fmean
from typing import Any

from lora_rlhf.reports import alarms, evaluation_report
from lora_rlhf.runs.record import Record

from .findings import Finding, Findings, Lines, above, below, direction, finding, rate

UNTRAINED = 1e-2, 1e-6
"""Standard deviation of the scores, and learning rate, below which the model was hardly trained."""

DIVERGED = 1.0
"""Loss on the last training batches above which the learning rate is too large; chance: 0.69."""

MEMORISED = 0.75
"""Accuracy on training batches above which a model with held-out accuracy at chance memorised."""


def check(record: Record, lines: Lines) -> Findings:
    """Check the accuracy on held-out comparisons, dependence on length, and the log of PPO."""
    entry = record.data["stages"].get("reward", {})
    if entry.get("status") == "done" and "accuracy" in entry:
        yield from _accuracy(record, entry, lines.get("reward", []))
    yield from _probed(record)
    yield from _exploited(lines["ppo"])


def _accuracy(record: Record, entry: dict[str, Any], lines: list[dict[str, float]]) -> Findings:
    accuracy, passed = entry["accuracy"], entry.get("gate") == "passed"
    by_length = list(_length(entry, accuracy, entry["accuracy_length_baseline"]))
    yield from by_length
    held_out = f"held-out accuracy {rate(accuracy)}"
    if below(accuracy, 0.5):
        more = direction(record.data["data"])
        yield finding("reward_inverted", f"{held_out}: below chance", more=more)
    elif not above(accuracy, 0.5) or not entry["score_std"] > UNTRAINED[0]:
        yield _unlearned(entry, lines, held_out, "warning" if passed else "fault")
    elif not passed and not any(f.severity == "fault" for f in by_length):
        reason = entry.get("gate_reason")
        yield finding("reward_gate", f"the reward model did not pass its gate: {reason}")
    other = entry.get("held_out_accuracy")
    if other and not above(other, 0.5):
        what = f"the held-out reward model is not clearly above chance: accuracy {rate(other)}"
        yield finding("held_out_at_chance", what)


def _unlearned(
    entry: dict[str, Any], lines: list[dict[str, float]], held_out: str, severity: str
) -> Finding:
    """Say why a reward model is at chance, from its log."""
    accuracies, losses = alarms.series(lines, "accuracy"), alarms.series(lines, "loss")
    late = fmean(accuracies[-max(1, len(accuracies) // 3) :]) if accuracies else 0.0
    fastest = max(alarms.series(lines, "learning_rate"), default=1.0)
    if not entry["score_std"] > UNTRAINED[0] or fastest < UNTRAINED[1]:
        name = "reward_untrained"
        cause = (
            f"the model was hardly trained: the standard deviation of its scores is "
            f"{entry['score_std']:.2g}, its highest learning rate {fastest:.2g}"
        )
    elif (loss := fmean(losses[-max(1, len(losses) // 3) :] or [0.0])) > DIVERGED:
        name = "reward_learning_rate"
        cause = f"learning rate {fastest:.2g}, and a loss of {loss:.2g}, where guessing has 0.69"
    elif late > MEMORISED:
        name, cause = "reward_memorised", f"{late:.2f} on training batches: it memorised them"
    else:
        name = "reward_at_chance"
        cause = f"not clearly above chance; {late:.2f} on the last training batches"
    return finding(name, f"{held_out}; {cause}", severity=severity)


def _length(entry: dict[str, Any], accuracy: dict[str, Any], length: dict[str, Any]) -> Findings:
    """Check how far labels and reward model depend on the length of completions."""
    if not (above(length, 0.5) or below(length, 0.5)):
        return
    longer = length["value"]
    rule, word = max((longer, "longer"), (1 - longer, "shorter"))
    against = entry.get("accuracy_by_length", {}).get("shorter" if word == "longer" else "longer")
    what = f"accuracy {rate(accuracy)}, but always preferring the {word} completion gets {rule:.3f}"
    if against:
        what += f"; where the {word} completion is worse, accuracy is {rate(against)}"
    only_length = accuracy["value"] <= rule or below(against, 0.5)
    yield finding(
        "reward_is_length" if only_length else "labels_lean_on_length",
        what,
        more=f"add comparisons in which the {word} completion is worse",
    )


def _probed(record: Record) -> Findings:
    """Report the worst probe of each judge's record in the run directory."""
    for path in sorted(record.folder.glob("judge*.json")):
        try:
            validation = json.loads(path.read_text(encoding="utf-8"))
            role = str(validation["judge"]).rpartition(":")[2]
            worst = evaluation_report.worst_probe(validation)
            fooled = any(above(rate, 0.5) for rate in validation.get("probes", {}).values())
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # of another program
        if worst and role in ("reward", "held_out"):
            what = f"{validation['judge']}: {worst} ({path.name})"
            severity = "warning" if fooled and role == "reward" else "note"
            yield finding("probes", what, role, severity=severity)


def _exploited(ppo: list[dict[str, float]]) -> Findings:
    """Check for a score that rises in PPO while the gold reward falls or completions grow."""
    # The gold reward may be read here, because the doctor does not influence training.
    proxy, gold, score, length = (
        alarms.change(alarms.series(ppo, name))
        for name in ("rewards/model", "rewards/gold", "reward/score", "completions/length")
    )
    if proxy and gold and proxy.sigmas > alarms.SIGMAS and gold.sigmas < -alarms.SIGMAS:
        yield finding(
            "gold_falls",
            f"during PPO the gold reward fell from {gold.before:.3g} to {gold.after:.3g}, while "
            f"the reward model's score rose from {proxy.before:.3g} to {proxy.after:.3g}",
        )
    if not score or not length or min(score.sigmas, length.sigmas) <= alarms.SIGMAS:
        return
    if length.after > alarms.LENGTH[1] * length.before:
        yield finding(
            "paid_by_length",
            f"during PPO completions grew from {length.before:.3g} to {length.after:.3g} tokens "
            f"while the score rose from {score.before:.3g} to {score.after:.3g}",
        )
