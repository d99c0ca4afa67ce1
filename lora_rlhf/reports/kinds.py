# SPDX-License-Identifier: Apache-2.0
"""Results by kind of prompt, and sentences on losses that the mean over all kinds hides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from lora_rlhf.estimates import Estimate, differs
from lora_rlhf.runs.metric_names import DIFFERENCE, METRICS
from lora_rlhf.runs.record import Record

from .cards.card_markdown import at, interval, is_number

Metrics = Mapping[str, Estimate]

_ABSTENTION = {
    "false_abstention": "calls answerable questions unanswerable more often than SFT",
    "missed_abstention": "answers unanswerable questions more often than SFT",
}


def of_record(record: Record) -> dict[str, dict[str, Metrics]]:
    """Return model -> kind of prompt -> metrics; empty for prompts without kinds."""
    by_kind = at(record.data, "stages.evaluate.by_kind", {})
    return by_kind if isinstance(by_kind, dict) else {}


def clearly_worse(kinds: Mapping[str, Metrics]) -> dict[str, Estimate]:
    """Return the kinds of prompt on which the difference to SFT is clearly below 0."""
    gaps = {kind: at(metrics, DIFFERENCE) for kind, metrics in kinds.items()}
    return {k: gap for k, gap in gaps.items() if _side(gap) < 0}


def _side(gap: Estimate | None) -> int:
    """Return 1 or -1 if a difference is clearly above or below 0, if the record can be read."""
    return differs(gap) if gap and is_number(at(gap, "low")) and is_number(at(gap, "high")) else 0


def sentences(who: str, own: Metrics, sft: Metrics, kinds: Mapping[str, Metrics]) -> dict[str, str]:
    """Say on which kinds of prompt a model is clearly worse than SFT, and how it abstains.

    Args:
        who: The algorithm's name.
        own: Its metrics over all prompts, as `sft` for SFT.
        kinds: Its metrics by kind of prompt.

    Returns:
        Sentences by topic: `worse` or `none_worse`, `false_abstention`, `missed_abstention`.
    """
    by_topic: dict[str, str] = {}
    worse = ", ".join(
        f"{kind.replace('_', ' ')} (gold reward {interval(gap, short=True)})"
        for kind, gap in clearly_worse(kinds).items()
    )
    if worse:
        by_topic["worse"] = f"{who} is clearly worse than SFT on prompts of these kinds: {worse}."
    elif any(DIFFERENCE in metrics for metrics in kinds.values()):
        by_topic["none_worse"] = f"{who} is clearly worse than SFT on no kind of prompt."
    for metric, what in _ABSTENTION.items():
        gap = at(own, f"{metric}_minus_sft")
        if _side(gap) > 0:
            shares = " to ".join(interval(at(of, metric), short=True) for of in (sft, own))
            by_topic[metric] = (
                f"{who} {what}: {shares}, paired difference {interval(gap, short=True)}."
            )
    return by_topic


def columns(kinds: Iterable[str]) -> list[str]:
    """Return the names of the columns of a table by kind."""
    return ["all", *(kind.replace("_", " ") for kind in kinds)]


def values(
    own: Metrics, kinds: Mapping[str, Metrics], names: Sequence[str] = tuple(METRICS)
) -> Iterator[tuple[str, list[Estimate | None]]]:
    """Yield each metric that is known, with its value over all prompts and by kind."""
    for name in names:
        known = [at(metrics, name) for metrics in (own, *kinds.values())]
        if any(known):
            yield name, known
