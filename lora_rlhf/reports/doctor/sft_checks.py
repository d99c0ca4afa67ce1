# SPDX-License-Identifier: Apache-2.0
"""Doctor checks of SFT: loss, comparison with the base, end tokens, and the start of PPO."""

from __future__ import annotations

from statistics import fmean

from lora_rlhf.reports import alarms
from lora_rlhf.runs.record import Record

from .findings import Findings, Lines, above, finding, rate

CUT = 0.5
"""Share of completions with an end token below which the reward mostly scores fragments."""

NEVER_ENDS = 0.02
"""Share of completions with an end token below which the model never learned that token."""

OVERFIT = 0.5
"""Nats by which the held-out loss may exceed the training loss."""

KL_AT_START = 1e-4
"""Largest KL to the reference before the first update, in nats per token, due to rounding."""


def check(record: Record, lines: Lines) -> Findings:
    """Check the loss, the base, and the first rollouts, in which the policy is still SFT."""
    early = lines["ppo"][: alarms.LATEST]
    kl = alarms.series(early[:1], "kl/k3")
    if kl and record.algorithm == "ppo" and abs(kl[0]) > KL_AT_START:
        what = f"KL to the reference is {kl[0]:.3g} nats per token before the first update"
        yield finding("wrong_reference", what)
    losses = alarms.series(lines.get("sft", []), "loss")
    moved = alarms.change(losses, max(2, min(alarms.ENDS, len(losses) // 2)))
    if moved and moved.after > moved.before and moved.sigmas > alarms.SIGMAS:
        what = f"the loss of SFT rose from {moved.before:.3g} to {moved.after:.3g}"
        yield finding("sft_loss_rises", what)
    held_out = record.data["stages"].get("sft", {}).get("held_out_loss")
    if losses and held_out is not None and float(held_out) > fmean(losses[-2:]) + OVERFIT:
        what = f"held-out loss {float(held_out):.3g}, but training loss {fmean(losses[-2:]):.3g}"
        yield finding("sft_overfits", what)
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
