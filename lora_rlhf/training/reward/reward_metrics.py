# SPDX-License-Identifier: Apache-2.0
"""Quality of a reward on held-out comparisons: every estimate with its n.

Pairs of one prompt share completions, so every interval is clustered by prompt
(`estimates.share_interval`; plain Wilson if each prompt has one pair). U completions, each scored
once; N comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from lora_rlhf.estimates import (
    Estimate,
    Floats,
    calibration,
    calibration_error,
    mean_interval,
    share_interval,
)
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.models.scoring import Episode


@dataclass
class Comparisons:
    """Held-out comparisons, encoded as PPO scores them.

    Attributes:
        episodes: U different completions with their prompts.
        pairs: (N, 2) positions of the chosen and the rejected completion.
        prompts: (N,) identifier of each comparison's prompt.
        longer: (N,) tokens of the chosen completion minus tokens of the rejected.
        margin: (N,) the labeler's margin, if the data have it.
        gold: (N,) gold reward of chosen minus rejected, on tasks with a checker.
    """

    episodes: list[Episode]
    pairs: NDArray[np.int64]
    prompts: list[Any]
    longer: Floats
    margin: Floats | None = None
    gold: Floats | None = None

    @classmethod
    def encode(cls, backbone: Backbone, rows: Dataset) -> Comparisons:
        """Encode `prompt`, `chosen`, `rejected`; optionally `group`, `margin`, `gold_margin`."""
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
        """Return chosen minus rejected score, (N,), from (U,) scores of `episodes`."""
        array = np.asarray(scores, dtype=np.float64)
        return np.asarray(array[self.pairs[:, 0]] - array[self.pairs[:, 1]])

    def share(self, outcomes: Floats, where: NDArray[np.bool_] | None = None) -> Estimate:
        """Estimate the mean outcome of the comparisons, or of a subset."""
        rows = np.arange(len(self.prompts)) if where is None else np.flatnonzero(where)
        return share_interval(outcomes[rows], [self.prompts[i] for i in rows])


def report(held_out: Comparisons, scores: Sequence[float] | Floats) -> dict[str, Any]:
    """Measure (U,) scores; a tie counts as half right, also for the rules by length.

    Returns:
        accuracy: Share of comparisons in which the chosen completion has the higher score.
        accuracy_length_baseline: Accuracy of the rule "the longer completion is better".
        gain_over_length: accuracy minus that of the better rule by length (longer, or shorter) on
            the same comparisons; mean with clustered t interval.
        accuracy_by_length: By chosen completion longer, shorter, equally long.
        accuracy_by_score_margin: By thirds of |score margin|; it should rise.
        accuracy_by_label_margin, accuracy_by_gold_margin: By thirds of the labeler's margin, or of
            |gold margin|, if the data have it.
        accuracy_against_gold: Share that agrees with gold, whatever the label.
        score_std: Over the U completions.
    """
    margin = held_out.margins(scores)
    right, by_length = _won(margin), _won(held_out.longer)
    rule = by_length if by_length.mean() >= 0.5 else 1 - by_length
    bins = calibration(margin, clusters=held_out.prompts)
    signs = {"longer": 1, "shorter": -1, "equal": 0}
    parts = {name: np.sign(held_out.longer) == sign for name, sign in signs.items()}
    entry: dict[str, Any] = {
        "accuracy": held_out.share(right),
        "accuracy_length_baseline": held_out.share(by_length),
        "gain_over_length": mean_interval(right - rule, held_out.prompts),
        "accuracy_by_length": {
            name: held_out.share(right, where) for name, where in parts.items() if where.any()
        },
        "accuracy_by_score_margin": _thirds(held_out, right, np.abs(margin)),
        "score_std": float(np.std(scores)),
        "mean_margin": float(margin.mean()),
        "calibration": bins,
        "calibration_error": calibration_error(bins),
    }
    if held_out.margin is not None:
        entry["accuracy_by_label_margin"] = _thirds(held_out, right, held_out.margin)
    if (gold := held_out.gold) is not None and gold.any():
        entry["accuracy_by_gold_margin"] = _thirds(held_out, right, np.abs(gold))
        agrees = _won(margin * np.sign(gold))
        entry["accuracy_against_gold"] = held_out.share(agrees, gold != 0)
    return entry


def ceiling(agreement: dict[str, Any] | None) -> Estimate | None:
    """Return the agreement of two labelers from the data's report, to compare accuracy with.

    In InstructGPT: 72.6 % for labelers, 69.6 % for the reward model. It is no strict bound: a model
    of the majority's answer can agree with one labeler more often than another labeler does.
    """
    if not agreement or agreement.get("measured") is None:
        return None
    low, high = agreement.get("low"), agreement.get("high")
    return {"value": agreement["measured"], "low": low, "high": high, "n": agreement["pairs"]}


def _won(margin: Floats) -> Floats:
    return np.where(margin == 0, 0.5, (margin > 0).astype(np.float64))


def _thirds(held_out: Comparisons, right: Floats, size: Floats) -> list[dict[str, Any]]:
    """Return accuracy by thirds of `size`, ascending; fewer parts if many sizes are equal."""
    edges = np.unique(np.quantile(size, [1 / 3, 2 / 3]))
    which = np.searchsorted(edges, size, side="left")
    parts = []
    for part in np.unique(which):
        where = which == part
        low, high = float(size[where].min()), float(size[where].max())
        parts.append({"from": low, "to": high, **held_out.share(right, where)})
    return parts
