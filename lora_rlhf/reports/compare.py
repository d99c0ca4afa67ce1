# SPDX-License-Identifier: Apache-2.0
"""Finished runs side by side: one table, and paired differences where they may be taken.

Everything comes from the records and samples of the runs; no torch, no network. Two runs are
paired prompt by prompt only where both started from the same SFT adapter and answered the same
prompts with the same seed and settings; otherwise it is said why not. Runs of one recipe that
differ in the seed only are one row: the mean over seeds, with an interval that rests on the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_rlhf.errors import UsageError
from lora_rlhf.estimates import Estimate, mean_interval, paired_difference
from lora_rlhf.recipe.stage_keys import ALGORITHMS, identity
from lora_rlhf.runs import samples
from lora_rlhf.runs.record import Record

REWARDS = ("gold_reward", "held_out_reward", "proxy_reward")
"""From the most to the least telling judge."""

_JUDGED_BY = {"held_out_reward": "stages.reward.held_out_adapter_sha256",
              "proxy_reward": "stages.reward.adapter_sha256"}  # fmt: skip
"""Reward -> where the record keeps the judge's hash; two judges have two scales."""

_WIN_RATES = ("win_rate", "win_rate_held_out", "win_rate_proxy")
_SHOWN = (*REWARDS, "gold_reward_minus_sft", *_WIN_RATES, "kl", "kl_bound", "length")

FEWEST_SEEDS = 3
"""Of a statement about an algorithm (2411.00640 asks for the spread over runs)."""


@dataclass(frozen=True)
class Run:
    """One finished run and what its policy (or best of n) did on the held-out prompts."""

    name: str
    record: Record
    lines: dict[int, dict[str, Any]]
    recipe: str

    @property
    def model(self) -> str:
        """Its column of the evaluation."""
        return "best_of_n" if self.record.algorithm == "best_of_n" else "policy"

    @property
    def seed(self) -> int:
        """Of everything that draws, the evaluation included."""
        return int(self.record.data["seed"])

    def get(self, path: str) -> Any:
        """The record at a dotted path; None where it has nothing there."""
        found: Any = self.record.data
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return found


def run(folders: Sequence[str | Path]) -> dict[str, Any]:
    """Compare runs; the first one is what differences are taken from.

    Args:
        folders: Run directories whose evaluation is finished.

    Returns:
        Plain JSON: `metric` (the reward that differences are in), `rows` (`label`, `algorithm`,
        `runs`, `seeds`, `metrics`, `episodes`, `seconds`, `samples_per_answer`), `differences`
        (`of`, `less`, `estimate` or None, `pairs`, `why_not`) and `notes`.

    Raises:
        UsageError: A folder is no run, is given twice, or its evaluation is not finished.
    """
    if len({Path(f).resolve() for f in folders}) < len(folders):
        raise UsageError("a run is given twice", remedy="name each run once")
    runs = [_read(folder, folders) for folder in folders]
    groups = _grouped(runs)
    metric = next((m for m in REWARDS if all(m in _evaluated(r) for r in runs)), None)
    rows = [_sft(groups[0]), *(_row(group) for group in groups)]
    differences = [] if metric is None else [_difference(g, groups[0], metric) for g in groups[1:]]
    return {
        "metric": metric,
        "rows": rows,
        "differences": differences,
        "notes": _notes(groups, metric),
    }


def _read(folder: str | Path, all_folders: Sequence[str | Path]) -> Run:
    record = Record.read(folder)
    if not record.done("evaluate"):
        raise UsageError(f"{folder} is not evaluated yet", remedy="finish it with `lora-rlhf run`")
    names = [Path(f).resolve().name for f in all_folders]
    name = Path(folder).resolve().name
    model = "best_of_n" if record.algorithm == "best_of_n" else "policy"
    by_prompt = samples.read(record)
    lines = {i: found[model] for i, found in by_prompt.items() if model in found}
    label = name if names.count(name) == 1 else str(folder)
    return Run(label, record, lines, identity(record.recipe(), without=("seed", "name")))


def _grouped(runs: list[Run]) -> list[list[Run]]:
    """Runs of equal recipes but for the seed together, in the order of their first.

    Raises:
        UsageError: One recipe with one seed is there twice, which would count it twice.
    """
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


def _evaluated(found: Run, model: str | None = None) -> dict[str, Estimate]:
    return dict(found.record.data["evaluation"].get(model or found.model, {}))


def _row(group: list[Run]) -> dict[str, Any]:
    first = group[0]
    algorithm = first.record.algorithm
    seconds = [r.get(f"clock.stages.{algorithm}.seconds") for r in group]
    answer = [r.get(f"clock.evaluation.{first.model}.seconds") for r in group]
    prompts = [r.get("stages.evaluate.prompts") for r in group]
    per_answer = [a / p for a, p in zip(answer, prompts, strict=True) if a is not None and p]
    return {
        "label": first.name if len(group) == 1 else f"{first.name} and {len(group) - 1} more",
        "algorithm": ALGORITHMS[algorithm],
        "runs": [r.name for r in group],
        "seeds": [r.seed for r in group],
        "metrics": _means([_evaluated(r) for r in group]),
        "episodes": first.get(f"stages.{algorithm}.episodes"),
        "comparisons": first.get(f"stages.{algorithm}.comparisons"),
        "samples_per_answer": first.get(f"stages.{algorithm}.n") or 1,
        "seconds": _average([s for s in seconds if s is not None]),
        "seconds_per_answer": _average(per_answer),
    }


def _sft(group: list[Run]) -> dict[str, Any]:
    """The common start, as the first runs evaluated it."""
    return {
        "label": "SFT",
        "algorithm": "SFT",
        "runs": [r.name for r in group],
        "seeds": [r.seed for r in group],
        "metrics": _means([_evaluated(r, "sft") for r in group]),
        "episodes": None,
        "comparisons": None,
        "samples_per_answer": 1,
        "seconds": None,
        "seconds_per_answer": None,
    }


def _means(each: list[dict[str, Estimate]]) -> dict[str, Estimate]:
    """One run: its estimates. Several seeds: the mean of their values, n counts the seeds."""
    names = [name for name in _SHOWN if all(name in found for found in each)]
    if len(each) == 1:
        return {name: each[0][name] for name in names}
    return {
        # A number from a formula has no spread over seeds.
        name: each[0][name]
        if not each[0][name]["n"]
        else mean_interval([found[name]["value"] for found in each])
        for name in names
    }


def _average(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


# --- differences ---------------------------------------------------------------------------------


def _difference(group: list[Run], base: list[Run], metric: str) -> dict[str, Any]:
    """The metric of `group` less that of `base`, paired by prompt and, with seeds, by seed."""
    found: dict[str, Any] = {
        "of": _row(group)["label"],
        "less": _row(base)["label"],
        "metric": metric,
        "estimate": None,
        "pairs": 0,
        "why_not": None,
    }
    by_seed = {r.seed: r for r in base}
    pairs = [(r, by_seed[r.seed]) for r in group if r.seed in by_seed]
    if not pairs:
        seeds = (sorted(r.seed for r in side) for side in (group, base))
        return found | {"why_not": "no seed in common: {} and {}".format(*seeds)}
    for ours, theirs in pairs:
        if reason := not_comparable(ours, theirs, metric):
            return found | {"why_not": reason}
    each = [_paired(ours, theirs, metric) for ours, theirs in pairs]
    estimate = each[0] if len(each) == 1 else mean_interval([e["value"] for e in each])
    return found | {"estimate": estimate, "pairs": len(pairs)}


def _paired(ours: Run, theirs: Run, metric: str) -> Estimate:
    both = [i for i in ours.lines if metric in ours.lines[i] and metric in theirs.lines[i]]
    return paired_difference(
        [ours.lines[i][metric] for i in both], [theirs.lines[i][metric] for i in both], seed=0
    )


def not_comparable(ours: Run, theirs: Run, metric: str) -> str | None:
    """Why two runs may not be paired prompt by prompt, in plain words; None: they may."""
    if ours.get("stages.sft.adapter_sha256") != theirs.get("stages.sft.adapter_sha256"):
        return "they start from different SFT adapters; start the second with --from"
    if ours.get("model.fingerprint") != theirs.get("model.fingerprint"):
        return "they have different base models"
    for key in ("seed", "temperature", "max_new_tokens", "prompts"):
        a, b = (r.get(f"stages.evaluate.{key}") for r in (ours, theirs))
        if a != b:
            return f"they were evaluated with different settings: {key} {a} and {b}"
    asked = [{i: line["prompt"] for i, line in r.lines.items()} for r in (ours, theirs)]
    if not asked[0] or not asked[1]:
        return "samples.jsonl of one of them has no answers"
    if asked[0] != asked[1]:
        return "they were evaluated on different prompts"
    if metric in _JUDGED_BY and ours.get(_JUDGED_BY[metric]) != theirs.get(_JUDGED_BY[metric]):
        return f"the {metric.replace('_', ' ')} of each is by another reward model"
    return None


def _notes(groups: list[list[Run]], metric: str | None) -> list[str]:
    notes = []
    if metric is None:
        notes.append("The runs have no reward in common, so no difference can be taken.")
    if metric == "proxy_reward":
        notes.append(
            "The only common judge is the reward model that training optimised: a gain by it "
            "proves little. Set reward.held_out_model: true for a judge of its own."
        )
    if any(len(group) > 1 for group in groups):
        notes.append(
            "Rows of several seeds: the mean over seeds, its interval and n are those of seeds."
        )
    if any(len(group) < FEWEST_SEEDS for group in groups):
        notes.append(
            f"Rows of fewer than {FEWEST_SEEDS} seeds tell of those runs, not of their algorithm: "
            "another seed can turn the order round."
        )
    if any(group[0].record.algorithm == "best_of_n" for group in groups):
        notes.append(
            "Best of n: its KL is an upper bound from a formula, and each answer costs n samples."
        )
    kls = [_evaluated(r).get("kl") for group in groups for r in group]
    if len([k for k in kls if k]) > 1:
        notes.append(
            "Equal coefficients are not equal KL: compare rewards at a like distance from SFT."
        )
    return notes
