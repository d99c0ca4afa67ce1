# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a run before PPO, told from its record: data, SFT, the reward model.

The first half of `lora-rlhf doctor`; what it says of PPO and of the evaluation is in doctor.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from lora_rlhf.reports import alarms
from lora_rlhf.runs.record import Record

Line = dict[str, float]

STAGES = ("data", "sft", "reward", "ppo", "evaluate")
"""Where a fault can lie. `ppo` stands for whatever the run's algorithm is."""

CUT = 0.5
"""Share of completions that end by themselves below which the reward mostly sees stumps."""

NEVER_ENDS = 0.02
"""Share of completions that end by themselves below which the model does not know its eos."""

DROPPED = 0.5, 0.9
"""Share of the rows that one filter drops: worth a note, and worth a warning."""

CONTRADICTED = 0.05
"""Share of comparisons labelled both ways that is worth a warning."""

AGREEMENT = 0.6
"""Agreement of two labelers; InstructGPT's was 0.73, and 0.5 is a coin."""

UNTRAINED = 1e-2, 1e-6
"""Standard deviation of the scores, and learning rate, below which nothing was learned."""

MEMORISED = 0.75
"""Accuracy on training batches of a reward model that is at chance on held-out ones."""

OVERFIT = 0.5
"""Nats by which the held-out loss of SFT may exceed the training loss."""

SMALL = 100
"""Prompts below which an interval of a rate is wider than 0.2."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        stage: One of `STAGES`.
        severity: fault: the result cannot be trusted; warning: look at it; note: good to know.
        name: Stays the same from version to version.
        what: The numbers.
        why: Why it matters.
        remedy: What to try.
    """

    stage: str
    severity: Literal["fault", "warning", "note"]
    name: str
    what: str
    why: str
    remedy: str

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return {
            "stage": self.stage,
            "severity": self.severity,
            "name": self.name,
            "what": self.what,
            "why": self.why,
            "try": self.remedy,
        }

    def line(self) -> str:
        """All of it in one line, for a run that tells it as it goes."""
        return f"{self.severity}: {self.what}; {self.why}; try {self.remedy}"


Lines = dict[str, list[Line]]
Found = Iterator[Finding]


def rate(estimate: dict[str, Any]) -> str:
    """`0.412 [0.350, 0.470], n=128`."""
    low, high = estimate["low"], estimate["high"]
    interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{estimate['value']:.3f}{interval}, n={estimate['n']}"


def above(estimate: dict[str, Any] | None, bound: float) -> bool:
    """Whether the whole interval lies above; never without one."""
    return estimate is not None and estimate["low"] is not None and estimate["low"] > bound


def below(estimate: dict[str, Any] | None, bound: float) -> bool:
    """Whether the whole interval lies below; never without one."""
    return estimate is not None and estimate["high"] is not None and estimate["high"] < bound


# --- stages that stopped -------------------------------------------------------------------------


def stopped(record: Record, lines: Lines) -> Found:
    """A stage that ended by an exception; the message of an identity names the stage at fault."""
    again = "the same command starts this stage again"
    for name, entry in record.data["stages"].items():
        if entry["status"] != "interrupted":
            continue
        stage = "ppo" if name == record.algorithm else name if name in STAGES else "evaluate"
        error = entry.get("error")
        if not error:
            why = "it has no result; killed, out of memory, or an error of the program"
            yield Finding(
                stage, "warning", "interrupted", f"{name} did not finish, or runs now", why, again
            )
            continue
        first, *rest = str(error["message"]).splitlines()
        remedy = next((r.split(":", 1)[1].strip() for r in rest if "to do:" in r), again)
        if blamed := re.search(r"stage at fault: (\w+)", remedy):
            stage = blamed[1] if blamed[1] in STAGES else "ppo"
        why = {
            "IdentityError": "an identity that holds for every correct run does not hold: nothing "
            "that PPO would have computed could be trusted",
            "NonFiniteError": "NaN spreads to every weight: nothing of the stage can be used",
        }.get(error["type"], f"{name} has no result")
        what = f"{name} stopped with {error['type']}: {first}"
        yield Finding(stage, "fault", f"stopped_{name}", what, why, remedy)


# --- data ----------------------------------------------------------------------------------------


def data(record: Record, lines: Lines) -> Found:
    """The tokenizer, what filters dropped, and whether labelers agree."""
    model = record.data["model"]
    if model.get("pad_id") is not None and model["pad_id"] in model.get("eos_ids", []):
        yield Finding(
            "data",
            "fault",
            "pad_is_eos",
            f"the pad token {model['pad_id']} is an eos token",
            "what is masked as padding is masked as eos too: the model never learns to end",
            "set tokenizer.pad_token to an unused token, saved beside the base model",
        )
    for name, report in record.data["data"].items():
        for step, count in report.get("counts", {}).items():
            before, after = count["before"], count["after"]
            share = 1 - after / before if before else 0.0
            if step == "labelled both ways" and share > CONTRADICTED:
                yield Finding(
                    "data",
                    "warning",
                    f"contradictions_{name}",
                    f"{share:.0%} of {name} were labelled both ways and dropped",
                    "labels that contradict each other cap what a reward model can learn",
                    "clearer instructions for labelers; look at the order of `ranks` (1 is best)",
                )
            elif step.startswith(("over ", "refused")) and share > DROPPED[0]:
                yield Finding(
                    "data",
                    "warning" if share > DROPPED[1] else "note",
                    f"dropped_{name}",
                    f"{share:.0%} of {name} were dropped: {step}",
                    "what is left may differ from what the model will be asked",
                    "raise data.max_tokens or data.max_prompt_tokens, if memory allows",
                )
        agreement = (report.get("labeler_agreement") or {}).get("measured")
        if agreement is not None and agreement < AGREEMENT:
            yield Finding(
                "data",
                "warning",
                f"agreement_{name}",
                f"two labelers of {name} agree on {agreement:.0%} of pairs",
                "the reward model cannot be expected to do much better than labelers agree",
                "clearer instructions, fewer and better labelers, or more labels per pair",
            )


def few_prompts(n: int) -> Found:
    """What an evaluation on n prompts can tell; a run says it before it trains."""
    if n < SMALL:
        yield Finding(
            "evaluate",
            "note",
            "few_prompts",
            f"the evaluation rests on {n} prompt{'s' * (n != 1)}",
            "only large differences show",
            "more prompts (data.prompts or data.held_out), and a larger evaluate.n",
        )


# --- sft -----------------------------------------------------------------------------------------


def sft(record: Record, lines: Lines) -> Found:
    """Whether it learned, generalises, is better than the base, and ends its completions."""
    losses = alarms.series(lines.get("sft", []), "loss")
    moved = alarms.change(losses, max(2, min(alarms.ENDS, len(losses) // 2)))
    if moved and moved.after > moved.before and moved.sigmas > alarms.SIGMAS:
        yield Finding(
            "sft",
            "fault",
            "sft_loss_rises",
            f"the loss of SFT rose from {moved.before:.3g} to {moved.after:.3g}",
            "everything after it starts from this model",
            "a lower sft.args.learning_rate",
        )
    held_out = record.data["stages"].get("sft", {}).get("held_out_loss")
    if losses and held_out is not None and float(held_out) > fmean(losses[-2:]) + OVERFIT:
        yield Finding(
            "sft",
            "warning",
            "sft_overfits",
            f"held-out loss {float(held_out):.3g}, training loss {fmean(losses[-2:]):.3g}",
            "the demonstrations were learned by heart",
            "fewer epochs, or more demonstrations",
        )
    base = record.data["evaluation"].get("base", {})
    if above(base.get("gold_reward_minus_sft"), 0.0):
        yield Finding(
            "sft",
            "warning",
            "sft_below_base",
            f"base less SFT in gold reward: {rate(base['gold_reward_minus_sft'])}",
            "PPO starts from a worse model than the base",
            "better demonstrations",
        )
    yield from _endings(record, lines)


def _endings(record: Record, lines: Lines) -> Found:
    """Whether SFT learned to end: the first rollouts are its own."""
    early = alarms.series(lines["ppo"][: alarms.LATEST], "completions/eos_rate")
    if len(early) < alarms.LATEST or fmean(early) >= CUT:
        return
    length = fmean(alarms.series(lines["ppo"][: alarms.LATEST], "completions/length") or [0.0])
    never = fmean(early) < NEVER_ENDS
    yield Finding(
        "sft",
        "fault" if never else "warning",
        "no_eos" if never else "few_eos",
        f"before the policy moved, {fmean(early):.0%} of completions ended by themselves (mean "
        f"length {length:.3g} tokens)",
        "the rest is cut off at max_completion_length: the reward sees stumps"
        + (", as where pad = eos and the eos was never learned" if never else ""),
        "a larger ppo.args.max_completion_length; demonstrations that end; a tokenizer whose pad "
        "is not its eos; more epochs of SFT",
    )


# --- reward --------------------------------------------------------------------------------------


def reward(record: Record, lines: Lines) -> Found:
    """Whether the reward model knows anything, and whether it is more than length."""
    entry = record.data["stages"].get("reward", {})
    if entry.get("status") != "done" or "accuracy" not in entry:
        return
    accuracy = entry["accuracy"]
    by_length = list(_length(entry, accuracy, entry["accuracy_length_baseline"]))
    yield from by_length
    rates = f"held-out accuracy {rate(accuracy)}"
    useless = "PPO climbs whatever the reward model says, right or wrong"
    if below(accuracy, 0.5):
        yield Finding(
            "reward",
            "fault",
            "reward_inverted",
            f"{rates}: below chance",
            "it prefers what people rejected, and PPO will too",
            "look for swapped columns (`columns:`), and at the order of `ranks` (1 is best)",
        )
    elif not above(accuracy, 0.5) or not entry["score_std"] > UNTRAINED[0]:
        name, numbers, remedy = _unlearned(entry, lines)
        severity: Any = "warning" if entry.get("gate") == "passed" else "fault"
        yield Finding("reward", severity, name, f"{rates}; {numbers}", useless, remedy)
    elif entry.get("gate") != "passed" and not any(f.severity == "fault" for f in by_length):
        yield Finding(
            "reward",
            "fault",
            "reward_gate",
            f"the gate says: {entry.get('gate_reason')}",
            useless,
            "mend the comparisons, or train longer",
        )
    other = entry.get("held_out_accuracy")
    if other and not above(other, 0.5):
        yield Finding(
            "reward",
            "warning",
            "held_out_at_chance",
            f"the held-out reward model's accuracy is {rate(other)}",
            "what it says of the policy, and ppo.watch: best, rests on nothing",
            "more comparisons: each of the two models gets half",
        )


def _unlearned(entry: dict[str, Any], lines: Lines) -> tuple[str, str, str]:
    """Why a reward model is at chance, as far as its log tells: name, numbers, what to try."""
    accuracies = alarms.series(lines.get("reward", []), "accuracy")
    late = fmean(accuracies[-max(1, len(accuracies) // 3) :]) if accuracies else 0.0
    fastest = max(alarms.series(lines.get("reward", []), "learning_rate"), default=1.0)
    if not entry["score_std"] > UNTRAINED[0] or fastest < UNTRAINED[1]:
        return (
            "reward_untrained",
            f"its scores have a standard deviation of {entry['score_std']:.2g}, and its learning "
            f"rate was at most {fastest:.2g}: training did not reach it",
            "a higher reward.args.learning_rate (1e-4 to 1e-3 is usual), more epochs",
        )
    if late > MEMORISED:
        return (
            "reward_memorised",
            f"on training batches it ended at {late:.2f}: it knows them by heart",
            "look for shuffled labels by reading twenty comparisons; more of them, fewer epochs",
        )
    return (
        "reward_at_chance",
        f"chance cannot be excluded, and on training batches it ended at {late:.2f}",
        "look for shuffled labels by reading twenty comparisons; more of them; a higher "
        "reward.args.learning_rate, more epochs",
    )


def _length(entry: dict[str, Any], accuracy: dict[str, Any], length: dict[str, Any]) -> Found:
    """Whether the reward goes by length, and whether the comparisons do."""
    longer = length["value"]
    rule, word = max((longer, "longer"), (1 - longer, "shorter"))
    told = above(length, 0.5) or below(length, 0.5)
    by = entry.get("accuracy_by_length", {})
    against = by.get("shorter" if word == "longer" else "longer")
    numbers = (
        f"accuracy {rate(accuracy)}; preferring the {word} completion alone gets {rule:.3f}"
        + (f"; where the {word} one is worse it is right on {rate(against)}" if against else "")
    )
    balance = f"add comparisons in which the better completion is not the {word}"
    if told and (accuracy["value"] <= rule or below(against, 0.5)):
        yield Finding(
            "reward",
            "fault",
            "reward_is_length",
            numbers,
            "PPO will change the length and nothing else (2310.03716)",
            balance,
        )
    elif told:
        yield Finding(
            "reward",
            "note",
            "labels_lean_on_length",
            numbers,
            "length is the easiest thing to learn from these comparisons",
            f"watch completions/length and the length-controlled win rate; {balance}",
        )
