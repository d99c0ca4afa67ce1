# SPDX-License-Identifier: Apache-2.0
"""Doctor checks of SFT: loss, comparison with the base, end tokens, and the start of PPO."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from lora_rlhf.reports import alarms
from lora_rlhf.runs.record import Record

from .findings import Findings, Line, Lines, above, finding, rate

CUT = 0.5
"""Share of completions with an end token below which the reward mostly scores fragments."""

NEVER_ENDS = 0.02
"""Share of completions with an end token below which the model never learned that token."""

OVERFIT = 0.5
"""Nats by which the held-out loss may exceed the training loss."""

NEAR_CHANCE = 0.5
"""Share of the loss of guessing, ln of the vocabulary's size, above which little was learned."""

KL_AT_START = 1e-4
"""Largest KL to the reference before the first update, in nats per token, due to rounding."""


def check(record: Record, lines: Lines) -> Findings:
    """Check the losses, the base, and the first rollouts, in which the policy is still SFT."""
    early = lines["ppo"][: alarms.LATEST]
    kl = alarms.series(early[:1], "kl/k3")
    if kl and record.algorithm == "ppo" and abs(kl[0]) > KL_AT_START:
        what = f"KL to the reference is {kl[0]:.3g} nats per token before the first update"
        yield finding("wrong_reference", what)
    yield from _losses(record.data["stages"].get("sft", {}), lines.get("sft", []))
    gain = record.data["evaluation"].get("base", {}).get("gold_reward_minus_sft")
    if above(gain, 0.0):
        yield finding("sft_below_base", f"gold reward of the base minus that of SFT: {rate(gain)}")
    ended = alarms.series(early, "completions/eos_rate")
    if len(ended) == alarms.LATEST and fmean(ended) < CUT:
        length = fmean(alarms.series(early, "completions/length") or [0.0])
        what = (
            f"only {fmean(ended):.0%} of completions had an end token before the first updates "
            f"(mean length {length:.3g} tokens)"
        )
        yield finding("no_eos" if fmean(ended) < NEVER_ENDS else "few_eos", what)


def _losses(entry: dict[str, Any], lines: list[Line]) -> Findings:
    """Check that the loss fell, on held-out rows too, and far below that of guessing."""
    losses = alarms.series(lines, "loss")
    moved = alarms.change(losses, max(2, min(alarms.ENDS, len(losses) // 2)))
    rose = moved and moved.after > moved.before and moved.sigmas > alarms.SIGMAS
    if moved and rose:
        what = f"the loss of SFT rose from {moved.before:.3g} to {moved.after:.3g}"
        yield finding("sft_loss_rises", what)
    if entry.get("held_out_loss") is None:
        return
    # A run of an earlier version has no loss of guessing.
    held_out, chance = float(entry["held_out_loss"]), float(entry.get("chance_loss", "inf"))
    guessing = f", where guessing has {chance:.3g}" if held_out > NEAR_CHANCE * chance else ""
    severity = "fault" if held_out >= chance else ""
    in_nats = entry.get("args", {}).get("loss_type", "nll") == "nll"  # as the held-out loss always
    if losses and in_nats and held_out > fmean(losses[-2:]) + OVERFIT:
        what = f"held-out loss {held_out:.3g}, but training loss {fmean(losses[-2:]):.3g}{guessing}"
        yield finding("sft_overfits", what, severity=severity)
    elif guessing and not rose:
        yield finding("sft_at_chance", f"held-out loss {held_out:.3g}{guessing}", severity=severity)
