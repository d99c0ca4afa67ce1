# SPDX-License-Identifier: Apache-2.0
"""Doctor checks of PPO (or the run's other algorithm): step size, KL penalty, signs of alarm."""

from __future__ import annotations

from lora_rlhf.errors import counted
from lora_rlhf.reports import alarms
from lora_rlhf.runs.record import Record

from .findings import Finding, Findings, Line, Lines, finding

FAST = 2
"""Rollouts after the policy's first update within which a KL above `alarms.KL_TOKEN` is due to the
learning rate: a weak KL penalty acts more slowly, through the reward."""

STILL = 0.01
"""KL to SFT, nats per sequence, below which the policy's answers look the same as SFT's."""

_STEP_SIZE = {"nan", "update_too_large", "ratio_max", "skipped", "clip_fraction", "value_loss"}
"""Signs that updates are too large, reported as one finding because their cause is the same."""

_AWAY = ("kl_high", "kl_accelerating")


def check(record: Record, lines: Lines) -> Findings:
    """Check whether the policy moved, and find the causes of the signs in its log."""
    entry = record.data["stages"].get(record.algorithm, {})
    last, updates = entry.get("kl_last"), entry.get("updates", 0)
    if last is not None and updates >= 2 * alarms.ENDS and abs(last) < STILL:
        what = f"KL to SFT is only {last:.2g} nats per sequence after {counted(updates, 'update')}"
        yield finding("policy_still", what)
    yield from _signs(lines["ppo"])


def _signs(ppo: list[Line]) -> Findings:
    first = {sign.name: (update, sign) for update, sign in alarms.history(ppo)}
    fast, rates = _fast(ppo), alarms.series(ppo, "learning_rate")
    large = [name for name in first if name in _STEP_SIZE]
    away = [name for name in first if name in _AWAY]
    explained: list[str] = []
    if rates and (fast or len(large) >= 2):
        numbers = [fast] if fast else []
        numbers += [f"{first[name][1].what} (update {first[name][0]})" for name in large]
        yield finding("learning_rate", f"learning rate {max(rates):.2g}: {'; '.join(numbers)}")
        explained += [*large, *(away if fast else ())]
    coefs = alarms.series(ppo, "kl/coef")
    if away and coefs and max(coefs) == 0:
        numbers = [first[name][1].what for name in away]
        yield finding("no_kl_penalty", f"kl_coef is 0 and {'; '.join(numbers)}")
        explained += away
    for name, (update, sign) in first.items():
        if name not in explained:
            what = f"{sign.what} (first seen at update {update})"
            severity = "fault" if sign.serious else "warning"
            yield Finding("ppo", severity, name, what, *alarms.MEANINGS[name])


def _fast(lines: list[Line]) -> str:
    """Describe a KL that is high right after the policy's first updates; empty if it is not."""
    start = next((i for i, line in enumerate(lines) if "policy/entropy" in line), len(lines))
    for updates, line in enumerate(lines[start + 1 :][:FAST], start=1):
        token = line.get("kl/k1", 0.0)
        if token > alarms.KL_TOKEN:
            after = f"{counted(updates, 'update')} of the policy"
            return f"KL to SFT is {token:.2g} nats per token after {after}"
    return ""
