# SPDX-License-Identifier: Apache-2.0
"""`lora-rlhf doctor RUN`: which stage of a run is at fault, and what to try.

Only the record and `metrics.jsonl` are read; no model is loaded, and torch is not imported. A
reward that does not rise looks the same whether the data, the SFT model, the reward model or PPO is
to blame, and each stage hides the faults of the one before it: findings come in the order of the
stages, and the first fault is the one to mend first.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rich.console import Console

from lora_rlhf.reports import alarms
from lora_rlhf.reports.tables import say
from lora_rlhf.runs.record import Record

from . import findings
from .findings import STAGES, Finding, Found, Line, Lines, above, below, rate

FAST = 2
"""Rollouts after the policy's first move within which a KL of `watch.KL_TOKEN` is a matter of the
learning rate and not of the penalty, which only acts through the reward."""

STILL = 0.01
"""KL to SFT, nats per sequence, below which the policy is SFT for all that a reader can see."""


def examine(record: Record) -> list[Finding]:
    """Everything that can be said of a run, ordered by stage and then by severity."""
    lines: dict[str, list[Line]] = {}
    for line in record.metrics():
        lines.setdefault(line["stage"], []).append(_numbers(line))
    lines["ppo"] = lines.get(record.algorithm, [])
    found = {f.name: f for check in _CHECKS for f in check(record, lines)}
    severities = ("fault", "warning", "note")
    return sorted(
        found.values(), key=lambda f: (STAGES.index(f.stage), severities.index(f.severity))
    )


def verdict(found: list[Finding]) -> str:
    """One sentence: the stage at fault, if one is."""
    faults = [f for f in found if f.severity == "fault"]
    if faults:
        return f"stage at fault: {faults[0].stage} ({faults[0].what})"
    warnings = sum(f.severity == "warning" for f in found)
    return f"no fault found; {warnings or 'no'} warning{'s' * (warnings != 1)}"


def show(record: Record, found: list[Finding], console: Console | None = None) -> None:
    """Print the findings, plainly."""
    console = console or Console(highlight=False)
    for f in found:
        say(console, f"{f.stage}: {f.severity}: {f.what}")
        say(console, f"    why  {f.why}")
        say(console, f"    try  {f.remedy}")
    stages = [f"{name} {entry['status']}" for name, entry in record.data["stages"].items()]
    say(console, f"\n{record.folder}: {', '.join(stages) or 'no stage was started'}")
    say(console, verdict(found))


def as_json(record: Record, found: list[Finding]) -> str:
    """The same for a program: verdict and findings."""
    data = {"verdict": verdict(found), "findings": [f.as_dict() for f in found]}
    return json.dumps({"name": record.data["name"], **data}, indent=1)


def _numbers(line: dict[str, Any]) -> Line:
    """The metrics of a line; what is not finite stands in the log as text."""
    out = {}
    for key, value in line.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            out[key] = float(value)
        elif value in ("nan", "inf", "-inf"):
            out[key] = float(value)
    return out


# --- ppo -----------------------------------------------------------------------------------------


def _identities(record: Record, lines: Lines) -> Found:
    """KL is 0 before the first update: the policy starts as the reference."""
    start = alarms.series(lines["ppo"][:1], "kl/k3")
    if start and record.algorithm == "ppo" and abs(start[0]) > 1e-4:
        yield Finding(
            "sft",
            "fault",
            "wrong_reference",
            f"KL to the reference is {start[0]:.3g} nats per token before the first update",
            "it must be 0: the policy is no copy of the model that it is held to",
            "was adapters/sft changed, or another adapter loaded as policy or reference?",
        )
    entry = record.data["stages"].get(record.algorithm, {})
    last = entry.get("kl_last")
    if last is not None and entry.get("updates", 0) >= 2 * alarms.ENDS and abs(last) < STILL:
        yield Finding(
            "ppo",
            "warning",
            "policy_still",
            f"after {entry['updates']} updates KL to SFT is {last:.2g} nats per sequence",
            "the policy is still SFT",
            "a higher ppo.args.learning_rate, or more ppo.updates",
        )


_STEP_SIZE = {"nan", "update_too_large", "ratio_max", "skipped", "clip_fraction", "value_loss"}
"""Signs that updates are too large: together one finding, since they have one cause."""

_AWAY = ("kl_high", "kl_accelerating")


def _signs(record: Record, lines: Lines) -> Found:
    """What the watch saw, with the causes that several signs have in common named once."""
    found = {sign.name: (update, sign) for update, sign in alarms.history(lines["ppo"])}
    fast, rates = _fast(lines["ppo"]), alarms.series(lines["ppo"], "learning_rate")
    large = [name for name in found if name in _STEP_SIZE]
    away = [name for name in found if name in _AWAY]
    explained: list[str] = []
    if rates and (fast or len(large) >= 2):
        numbers = [fast] if fast else []
        numbers += [f"{found[n][1].what} (update {found[n][0]})" for n in large]
        yield Finding(
            "ppo",
            "fault",
            "learning_rate",
            f"learning rate {max(rates):.2g}: {'; '.join(numbers)}",
            "updates are too large: PPO is only sound near the policy that made the samples",
            "a tenth of ppo.args.learning_rate (LoRA on a model of 100M or more: 1e-5 to 2e-4)",
        )
        explained += [*large, *(away if fast else ())]
    coefs = alarms.series(lines["ppo"], "kl/coef")
    if away and coefs and max(coefs) == 0:
        yield Finding(
            "ppo",
            "fault",
            "no_kl_penalty",
            f"kl_coef is 0 and {'; '.join(found[n][1].what for n in away)}",
            "nothing holds the policy to text that the reward model was taught on",
            "ppo.kl_coef 0.02 to 0.05, ppo.kl_target, or ppo.kl_budget",
        )
        explained += away
    for name, (update, sign) in found.items():
        if name not in explained:
            why, remedy = alarms.MEANINGS[name]
            what = f"{sign.what} (seen first at update {update})"
            yield Finding("ppo", "fault" if sign.serious else "warning", name, what, why, remedy)


def _fast(lines: list[Line]) -> str:
    """A KL that is high as soon as the policy moves; empty where it is not."""
    moving = [i for i, line in enumerate(lines) if "policy/entropy" in line]
    if not moving:
        return ""
    for update in range(moving[0] + 1, min(moving[0] + 1 + FAST, len(lines))):
        token = lines[update].get("kl/k1", 0.0)
        if token > alarms.KL_TOKEN:
            return (
                f"KL to SFT is {token:.2g} nats per token after {update - moving[0]} "
                f"update{'s' * (update - moving[0] > 1)} of the policy"
            )
    return ""


def _hacked(record: Record, lines: Lines) -> Found:
    """The proxy rises while something that is not optimised falls. Here gold may be read."""
    ppo = lines["ppo"]
    proxy, gold = (alarms.change(alarms.series(ppo, n)) for n in ("rewards/model", "rewards/gold"))
    if proxy and gold and proxy.sigmas > alarms.SIGMAS and gold.sigmas < -alarms.SIGMAS:
        yield Finding(
            "reward",
            "fault",
            "gold_falls",
            f"in PPO the reward model's score went from {proxy.before:.3g} to {proxy.after:.3g}, "
            f"the gold reward from {gold.before:.3g} to {gold.after:.3g}",
            "the reward model pays for something else than what is wanted",
            "read the samples for what it pays for; better comparisons; a larger ppo.kl_coef",
        )
    score = alarms.change(alarms.series(ppo, "reward/score"))
    length = alarms.change(alarms.series(ppo, "completions/length"))
    if (
        score
        and length
        and score.sigmas > alarms.SIGMAS
        and length.sigmas > alarms.SIGMAS
        and length.after > alarms.LENGTH[1] * length.before
    ):
        yield Finding(
            "reward",
            "warning",
            "paid_by_length",
            f"in PPO the score rose from {score.before:.3g} to {score.after:.3g} while completions "
            f"grew from {length.before:.3g} to {length.after:.3g} tokens",
            "length may be all that was learned (2310.03716)",
            "compare win rates with their length-controlled twins; comparisons whose better "
            "completion is the shorter one",
        )


# --- evaluation ----------------------------------------------------------------------------------

_JUDGES = {"win_rate": "the exact checker", "win_rate_held_out": "the held-out reward model"}

_MATERIAL = 0.5
"""Share of a gain in win rate that has to go with the lengths before it is called one of length."""


def _evaluation(record: Record, lines: Lines) -> Found:
    policy = record.data["evaluation"].get("policy", {})
    proxy = policy.get("win_rate_proxy")
    yield from _weight(policy)
    for name, judge in _JUDGES.items():
        won, controlled = policy.get(name), policy.get(f"{name}_length_controlled")
        if not won:
            continue
        told = f"the policy's win rate over SFT by {judge} is {rate(won)}"
        if below(won, 0.5) and above(proxy, 0.5):
            longer = policy.get("longer_than_sft")
            length = f"; its answers are the longer ones on {rate(longer)}" if longer else ""
            yield Finding(
                "reward",
                "fault",
                f"hacked_{name}",
                f"{told}, by the reward model that PPO optimised {rate(proxy)}{length}",
                "the policy pleases the reward model and nobody else",
                "better comparisons; a larger ppo.kl_coef; fewer ppo.updates; ppo.watch: best",
            )
        elif below(won, 0.5):
            yield Finding(
                "evaluate",
                "fault",
                f"worse_{name}",
                told,
                "PPO made the model worse",
                "the findings above; SFT is the better model of this run",
            )
        elif above(won, 0.5) and _by_length(won, controlled):
            yield Finding(
                "evaluate",
                "warning",
                f"length_{name}",
                f"{told}; for answers as long as SFT's {rate(controlled)}",
                "the advantage may be one of length",
                "shorter answers among the preferred ones",
            )
        elif not above(won, 0.5):
            yield Finding(
                "evaluate",
                "note",
                f"undecided_{name}",
                told,
                "PPO was not shown to help",
                "more prompts (evaluate.n) tell smaller differences; more ppo.updates",
            )


def _weight(policy: dict[str, Any]) -> Found:
    """What the evaluation can tell at all: its judges and its prompts."""
    proxy = policy.get("win_rate_proxy")
    won = next((policy[name] for name in (*_JUDGES, "win_rate_proxy") if policy.get(name)), None)
    yield from findings.few_prompts(won["n"]) if won else ()
    if proxy and not any(policy.get(name) for name in _JUDGES):
        undecided = "" if above(proxy, 0.5) else ", and that is not clearly above 50 %"
        yield Finding(
            "evaluate",
            "note",
            "no_judge",
            f"only the reward model that PPO optimised judges: {rate(proxy)}{undecided}",
            "a gain by it proves little, and no gain by it is no help",
            "reward.held_out_model: true trains a judge on other comparisons",
        )


def _by_length(won: dict[str, Any], controlled: dict[str, Any] | None) -> bool:
    """Whether much of the gain is gone among answers of one length; a wide interval is no sign."""
    if not controlled or above(controlled, 0.5):
        return False
    return bool(controlled["value"] - 0.5 <= (1 - _MATERIAL) * (won["value"] - 0.5))


_CHECKS: tuple[Callable[[Record, Lines], Found], ...] = (
    findings.stopped, findings.data, _identities, findings.sft, findings.reward,
    _signs, _hacked, _evaluation,
)  # fmt: skip
