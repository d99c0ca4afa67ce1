# SPDX-License-Identifier: Apache-2.0
"""Comparison of finished runs: one table, and paired differences where they are valid.

Reads only records and samples. Two runs are paired prompt by prompt if both started from the same
SFT adapter and answered the same prompts with the same seed and settings; otherwise the report
gives the reason. Runs that differ only in the seed are one row: mean and interval over seeds. A
difference over several seeds allows for the seeds and for the prompts that they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lora_rlhf.errors import UsageError
from lora_rlhf.estimates import (
    Estimate,
    correct,
    crossed_interval,
    mean_interval,
    paired_difference,
)
from lora_rlhf.recipe.stage_keys import ALGORITHMS, identity
from lora_rlhf.runs import samples
from lora_rlhf.runs.metric_names import METRICS
from lora_rlhf.runs.record import Record

from . import kinds
from .cards.card_markdown import at

REWARDS = ("gold_reward", "held_out_reward", "proxy_reward")
"""Judges, the most reliable one first."""

_JUDGED_BY = {"held_out_reward": "stages.reward.held_out_adapter_sha256",
              "proxy_reward": "stages.reward.adapter_sha256"}  # fmt: skip
"""Reward -> path of the hash of its reward model in the record: two models' scores differ."""

ONE_ROW = ("seed", "name", "threads")
"""Recipe keys in which the runs of one row may differ."""

FEWEST_SEEDS = 3
"""Seeds for a statement about an algorithm (2411.00640 asks for the spread over runs)."""


@dataclass(frozen=True)
class Run:
    """One finished run, and the answers of its policy (or best of n) by held-out prompt."""

    name: str
    record: Record
    model: str  # name of its policy in the evaluation
    lines: dict[int, dict[str, Any]]
    recipe: str
    label: str = ""  # of its row, if it is given

    @property
    def seed(self) -> int:
        """Random seed of the run, its evaluation included."""
        return int(self.record.data["seed"])

    def get(self, path: str) -> Any:
        """The record's value at a dotted path, or None."""
        return at(self.record.data, path)

    def evaluated(self, model: str | None = None) -> dict[str, Estimate]:
        """The evaluation of `model`, by default that of the policy."""
        return dict(self.record.data["evaluation"].get(model or self.model, {}))

    def by_kind(self, model: str | None = None) -> dict[str, kinds.Metrics]:
        """The evaluation by kind of prompt, likewise."""
        return dict(kinds.of_record(self.record).get(model or self.model, {}))


class Comparison(dict[str, Any]):
    """The report of `run`; a notebook shows it as a table."""


def run(folders: Sequence[str | Path], labels: Sequence[str] = ()) -> Comparison:
    """Compare runs; differences are to the first one.

    Args:
        folders: Run directories whose evaluation is finished.
        labels: The name of each run's row; default: from the folders.

    Returns:
        Plain JSON: `metric` (the reward of the differences), `rows` (`label`, `algorithm`, `runs`,
        `seeds`, `metrics`, `by_kind` (kind of prompt -> metrics), `episodes`, `seconds`,
        `samples_per_answer`), `differences` (`of`, `less`, `estimate` or None, `by_kind`, `pairs`,
        `why_not`) and `notes`. Several differences are corrected for their number, and those by
        kind for theirs.

    Raises:
        UsageError: A folder is not a run, is given twice, or its evaluation is not finished.
    """
    if len({Path(f).resolve() for f in folders}) < len(folders):
        raise UsageError("a run is given twice", remedy="name each run once")
    names = labels or [""] * len(folders)
    runs = [_read(one, folders, name) for one, name in zip(folders, names, strict=True)]
    groups = _grouped(runs)
    metric = next((m for m in REWARDS if all(m in r.evaluated() for r in runs)), None)
    starts = _sft_rows(groups)
    rows = [*starts, *map(_policy_row, groups)]
    differences = [] if metric is None else [_difference(g, groups[0], metric) for g in groups[1:]]
    kind_gaps = [estimate for one in differences for estimate in one["by_kind"].values()]
    for family in ([one["estimate"] for one in differences if one["estimate"]], kind_gaps):
        if len(family) > 1:
            correct(family)
    notes = _notes(groups, metric)
    if len(starts) > 1:
        notes.append(
            "The runs start from different SFT adapters: each of the first rows is the SFT of the "
            "runs that it names."
        )
    for number, row in enumerate(rows[len(starts) :]):
        of_sft = [r.evaluated("sft") for r in groups[number]]
        sentences = kinds.sentences(row["label"], row["metrics"], _means(of_sft), row["by_kind"])
        notes += sentences.values()
    return Comparison(metric=metric, rows=rows, differences=differences, notes=notes)


def _read(folder: str | Path, all_folders: Sequence[str | Path], row: str) -> Run:
    record = Record.read(folder)
    if not record.done("evaluate"):
        raise UsageError(f"{folder} is not evaluated yet", remedy="finish it with `lora-rlhf run`")
    names = [Path(f).resolve().name for f in all_folders]
    name = Path(folder).resolve().name
    label = name if names.count(name) == 1 else str(folder)
    model = "best_of_n" if record.algorithm == "best_of_n" else "policy"
    answers = samples.read(record)
    lines = {index: line[model] for index, line in answers.items() if model in line}
    recipe = identity(record.recipe(), without=ONE_ROW)
    return Run(label, record, model, lines, recipe, row)


def _grouped(runs: list[Run]) -> list[list[Run]]:
    """Group runs whose recipes differ only in the seed, in the order of their first run."""
    groups: dict[str, list[Run]] = {}
    for each in runs:
        group = groups.setdefault(each.recipe, [])
        twin = next((other for other in group if other.seed == each.seed), None)
        if twin is not None:
            raise UsageError(
                f"{twin.name} and {each.name} are runs of the same recipe and seed",
                remedy="leave one of them out",
            )
        group.append(each)
    return list(groups.values())


_COSTS = ("episodes", "comparisons", "seconds", "seconds_per_answer")
_NO_POLICY = {"algorithm": "SFT", "samples_per_answer": 1, **dict.fromkeys(_COSTS)}


def _row(group: list[Run], label: str, model: str | None = None) -> dict[str, Any]:
    return {
        "label": label,
        "runs": [r.name for r in group],
        "seeds": [r.seed for r in group],
        "metrics": _means([r.evaluated(model) for r in group]),
        "by_kind": {
            kind: _means([r.by_kind(model)[kind] for r in group])
            for kind in group[0].by_kind(model)
            if all(kind in r.by_kind(model) for r in group)
        },
    }


def _sft_rows(groups: list[list[Run]]) -> list[dict[str, Any]]:
    """Return a row of SFT for each set of adapters that runs start from, with the runs' labels."""
    apart: list[list[list[Run]]] = []  # groups with the same adapters in the seeds that they share
    for group in groups:
        for alike in apart:
            if _same_start(alike[0], group):
                alike.append(group)
                break
        else:
            apart.append([group])
    labels = ["SFT"]
    if len(apart) > 1:
        labels = [f"SFT of {', '.join(map(_label, alike))}" for alike in apart]
    return [
        _row(alike[0], label, "sft") | _NO_POLICY
        for alike, label in zip(apart, labels, strict=True)
    ]


def _same_start(first: list[Run], second: list[Run]) -> bool:
    ours, theirs = (
        {r.seed: r.get("stages.sft.adapter_sha256") for r in group} for group in (first, second)
    )
    shared = ours.keys() & theirs.keys()
    return bool(shared) and all(ours[seed] == theirs[seed] for seed in shared)


def _label(group: list[Run]) -> str:
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    return group[0].label or group[0].name + more


def _policy_row(group: list[Run]) -> dict[str, Any]:
    first = group[0]
    stage = f"stages.{first.record.algorithm}"
    spent = [
        (r.get(f"clock.evaluation.{r.model}.seconds"), r.get("stages.evaluate.prompts"))
        for r in group
    ]
    return _row(group, _label(group)) | {
        "algorithm": ALGORITHMS[first.record.algorithm],
        "episodes": first.get(f"{stage}.episodes"),
        "comparisons": first.get(f"{stage}.comparisons"),
        "samples_per_answer": first.get(f"{stage}.n") or 1,
        "seconds": _average([r.get(f"clock.{stage}.seconds") for r in group]),
        "seconds_per_answer": _average([s / n for s, n in spent if s is not None and n]),
    }


def _means(each: Sequence[kinds.Metrics]) -> dict[str, Estimate]:
    """The estimates of one run, or their means over several seeds; then n counts seeds."""
    names = [name for name in METRICS if all(name in estimates for estimates in each)]
    # A number from a formula has n = 0 and does not vary with the seed.
    return {
        name: mean_interval([estimates[name]["value"] for estimates in each])
        if len(each) > 1 and each[0][name]["n"]
        else each[0][name]
        for name in names
    }


def _average(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def _difference(group: list[Run], base: list[Run], metric: str) -> dict[str, Any]:
    """The metric of `group` minus that of `base`, paired by prompt and, with seeds, by seed."""
    by_seed = {r.seed: r for r in base}
    pairs = [(r, by_seed[r.seed]) for r in group if r.seed in by_seed]
    why_not = next((why for pair in pairs if (why := not_comparable(*pair, metric))), None)
    if not pairs:
        ours, theirs = (sorted(r.seed for r in side) for side in (group, base))
        why_not = f"no seed in common: {ours} and {theirs}"
    gaps = [] if why_not else [gap for pair in pairs for gap in _gaps(*pair, metric)]
    by_kind: dict[str, list[_Gap]] = {}
    for gap in gaps:
        if gap.kind is not None:
            by_kind.setdefault(gap.kind, []).append(gap)
    return {
        "of": _label(group),
        "less": _label(base),
        "metric": metric,
        "estimate": _estimate(gaps) if gaps else None,
        "by_kind": {kind: _estimate(by_kind[kind]) for kind in sorted(by_kind)},
        "pairs": len(pairs) if gaps else 0,
        "why_not": why_not,
    }


class _Gap(NamedTuple):
    """One prompt that two runs of a seed answered."""

    seed: int
    prompt: str
    kind: str | None
    ours: float
    theirs: float


def _gaps(ours: Run, theirs: Run, metric: str) -> list[_Gap]:
    return [
        _Gap(ours.seed, line["prompt"], line.get("family"), line[metric], other[metric])
        for i, line in ours.lines.items()
        if metric in line and metric in (other := theirs.lines[i])
    ]


def _estimate(gaps: Sequence[_Gap]) -> Estimate:
    """The mean difference: over prompts with one seed, over seeds and prompts with several."""
    if len({gap.seed for gap in gaps}) == 1:
        return paired_difference([gap.ours for gap in gaps], [gap.theirs for gap in gaps], seed=0)
    values = [gap.ours - gap.theirs for gap in gaps]
    return crossed_interval(values, [gap.seed for gap in gaps], [gap.prompt for gap in gaps])


def not_comparable(ours: Run, theirs: Run, metric: str) -> str | None:
    """The reason why two runs may not be paired prompt by prompt, or None if they may."""
    if ours.get("stages.sft.adapter_sha256") != theirs.get("stages.sft.adapter_sha256"):
        return "they start from different SFT adapters (start the second run with --from)"
    if ours.get("model.fingerprint") != theirs.get("model.fingerprint"):
        return "they have different base models"
    for key in ("seed", "temperature", "max_new_tokens", "prompts"):
        a, b = (r.get(f"stages.evaluate.{key}") for r in (ours, theirs))
        if a != b:
            return f"they were evaluated with different settings: {key} {a} and {b}"
    prompts = [{i: line["prompt"] for i, line in r.lines.items()} for r in (ours, theirs)]
    if not all(prompts):
        return "one of them has no answers in samples.jsonl"
    if prompts[0] != prompts[1]:
        return "they were evaluated on different prompts"
    if metric in _JUDGED_BY and ours.get(_JUDGED_BY[metric]) != theirs.get(_JUDGED_BY[metric]):
        return f"their {metric.replace('_', ' ')} comes from different reward models"
    return None


def _notes(groups: list[list[Run]], metric: str | None) -> list[str]:
    kls = [r for group in groups for r in group if r.evaluated().get("kl")]
    notes = {
        "The runs have no reward in common, so no difference is computed.": metric is None,
        "The only common judge is the reward model that training optimised, so a gain proves "
        "little. Set reward.held_out_model: true to train an independent judge.": (
            metric == "proxy_reward"
        ),
        "Rows with several seeds show the mean over seeds; their interval and n count seeds. Their "
        "differences are paired by seed and prompt, and hold for other seeds and prompts.": (
            any(len(group) > 1 for group in groups)
        ),
        f"Rows with fewer than {FEWEST_SEEDS} seeds describe those runs, not their algorithm: "
        "another seed may reverse the order.": any(len(group) < FEWEST_SEEDS for group in groups),
        "Best of n: its KL is an upper bound from a formula, and each answer costs n samples.": (
            any(group[0].model == "best_of_n" for group in groups)
        ),
        "Equal KL coefficients do not give equal KL: compare rewards at a similar distance from "
        "SFT.": len(kls) > 1,
    }
    return [note for note, applies in notes.items() if applies]
