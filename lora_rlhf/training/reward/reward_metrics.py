# SPDX-License-Identifier: Apache-2.0
"""How good a reward is on held-out comparisons: what the record says of it, every part with its n.

The pairs of one prompt share completions, so they are no independent evidence: every interval here
is clustered by prompt (`metrics.share_interval`; plain Wilson where each prompt has one pair).
U completions, each scored once; N comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from lora_rlhf.estimates import (
    Estimate,
    calibration,
    calibration_error,
    mean_interval,
    share_interval,
)
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.models.scoring import Episode

Floats = NDArray[np.float64]


@dataclass
class Comparisons:
    """Held-out comparisons, encoded as PPO scores them.

    Attributes:
        episodes: U different completions with their prompts.
        pairs: (N, 2) positions of the chosen and the rejected one.
        prompts: (N,) which prompt each comparison belongs to.
        longer: (N,) tokens of the chosen completion less those of the rejected one.
        margin: (N,) how much better the labeler said the chosen one is; None: nobody said.
        gold: (N,) gold reward of chosen less rejected, on tasks with a checker; None elsewhere.
    """

    episodes: list[Episode]
    pairs: NDArray[np.int64]
    prompts: list[Any]
    longer: Floats
    margin: Floats | None = None
    gold: Floats | None = None

    @classmethod
    def encode(cls, backbone: Backbone, rows: Dataset) -> Comparisons:
        """From rows with `prompt`, `chosen`, `rejected`; `group`, `margin`, `gold_margin` if there.

        A row without `group` is a prompt of its own.
        """
        number: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        pairs = []
        for row in rows:
            prompt = tuple(backbone.encode_prompt(row["prompt"]))
            sides = (tuple(backbone.encode_completion(row[k])) for k in ("chosen", "rejected"))
            pairs.append([number.setdefault((prompt, side), len(number)) for side in sides])
        episodes = [(list(prompt), list(completion)) for prompt, completion in number]
        tokens = np.array([len(completion) for _, completion in episodes], dtype=np.float64)
        index = np.array(pairs)

        def column(name: str) -> Floats | None:
            given = name in rows.column_names and None not in rows[name]
            return np.array(rows[name], dtype=np.float64) if given else None

        prompts = rows["group"] if "group" in rows.column_names else range(len(rows))
        return cls(
            episodes,
            index,
            list(prompts),
            tokens[index[:, 0]] - tokens[index[:, 1]],
            column("margin"),
            column("gold_margin"),
        )

    def margins(self, scores: Sequence[float] | Floats) -> Floats:
        """(N,) score of the chosen less that of the rejected, from (U,) scores of `episodes`."""
        array = np.asarray(scores, dtype=np.float64)
        return np.asarray(array[self.pairs[:, 0]] - array[self.pairs[:, 1]])

    def share(self, outcomes: Floats, where: NDArray[np.bool_] | None = None) -> Estimate:
        """A share of comparisons, or of those at `where`, with its interval."""
        rows = np.arange(len(self.prompts)) if where is None else np.flatnonzero(where)
        return share_interval(outcomes[rows], [self.prompts[i] for i in rows])


@dataclass
class Report:
    """The numbers of one reward: `entry` for the record, `margin` (N,) to compare it by."""

    entry: dict[str, Any] = field(default_factory=dict)
    margin: Floats = field(default_factory=lambda: np.empty(0))


def report(found: Comparisons, scores: Sequence[float] | Floats) -> Report:
    """Judge (U,) scores. A tie counts as half right; a comparison of equal length says nothing
    for the rule "the longer one is better", and counts half there too.

    Entry:
        accuracy: Share of comparisons with the chosen completion ahead.
        accuracy_length_baseline: The same, of the rule "the longer one is better".
        gain_over_length: accuracy less that of the better of the two rules that know nothing but
            length (longer, or shorter), on the same comparisons; mean with clustered t interval.
        accuracy_by_length: Where the chosen one is longer, shorter, equally long.
        accuracy_by_score_margin: By thirds of |score margin|: it should rise with what it says.
        accuracy_by_label_margin, accuracy_by_gold_margin: By thirds of the margin that the labeler
            gave, or of the size of the gold margin, where there is one.
        accuracy_against_gold: Share in which it prefers what gold does, whatever the label.
        calibration, calibration_error: As in metrics.py.
        score_std: Over the U completions.
    """
    margin = found.margins(scores)
    right, by_length = _won(margin), _won(found.longer)
    rule = by_length if by_length.mean() >= 0.5 else 1 - by_length
    bins = calibration(margin, clusters=found.prompts)
    entry: dict[str, Any] = {
        "accuracy": found.share(right),
        "accuracy_length_baseline": found.share(by_length),
        "gain_over_length": mean_interval(right - rule, found.prompts),
        "accuracy_by_length": {
            name: found.share(right, where)
            for name, where in (
                ("longer", found.longer > 0),
                ("shorter", found.longer < 0),
                ("equal", found.longer == 0),
            )
            if where.any()
        },
        "accuracy_by_score_margin": _thirds(found, right, np.abs(margin)),
        "score_std": float(np.std(scores)),
        "mean_margin": float(margin.mean()),
        "calibration": bins,
        "calibration_error": calibration_error(bins),
    }
    if found.margin is not None:
        entry["accuracy_by_label_margin"] = _thirds(found, right, found.margin)
    if found.gold is not None and found.gold.any():
        entry["accuracy_by_gold_margin"] = _thirds(found, right, np.abs(found.gold))
        agrees = _won(margin * np.sign(found.gold))
        entry["accuracy_against_gold"] = found.share(agrees, found.gold != 0)
    return Report(entry, margin)


def ceiling(agreement: Any) -> Estimate | None:
    """How often two labelers agree, from the data's report: what accuracy is to be held against.

    It is the usual yardstick (InstructGPT: 69.6 % of the reward model against 72.6 % of labelers),
    no strict bound: a model that gives the majority's answer can be right more often than one
    labeler agrees with another.
    """
    agreement = agreement or {}
    if agreement.get("measured") is None:
        return None
    return {
        "value": agreement["measured"],
        "low": agreement.get("low"),
        "high": agreement.get("high"),
        "n": agreement["pairs"],
    }


def _won(margin: Floats) -> Floats:
    return np.where(margin == 0, 0.5, (margin > 0).astype(np.float64))


def _thirds(found: Comparisons, right: Floats, size: Floats) -> list[dict[str, Any]]:
    """Accuracy by thirds of `size`, smallest first; fewer parts where many sizes are equal."""
    edges = np.unique(np.quantile(size, [1 / 3, 2 / 3]))
    which = np.searchsorted(edges, size, side="left")
    return [
        {
            "from": float(size[which == part].min()),
            "to": float(size[which == part].max()),
            **found.share(right, which == part),
        }
        for part in np.unique(which)
    ]
