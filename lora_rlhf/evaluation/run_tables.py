# SPDX-License-Identifier: Apache-2.0
"""The numbers of a run's own evaluation: tables by the functions of suites, and `report.json`.

The record's `evaluation`, and with it cards, plots and comparisons, is read off these tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_rlhf import estimates
from lora_rlhf.data.closed_world.checkers import Item
from lora_rlhf.estimates import Estimate
from lora_rlhf.hub.targets import Target
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.redaction import safe
from lora_rlhf.reports import evaluation_report
from lora_rlhf.reports import tables as screen
from lora_rlhf.runs.disk import write_atomically
from lora_rlhf.runs.metric_names import METRICS
from lora_rlhf.runs.record import Record

from . import run_suite, suite_tables
from .answers import Answers
from .engine import Answer
from .judges import Checker, JudgeSpec, describe
from .metrics import closed_world
from .metrics.metric import Better, Metric
from .prompt_sets import PromptSet, Row, sha256_of
from .suite import SetSection, Suite
from .verdicts import Verdicts, by_score

SET = "held-out prompts"

REWARDS = {"held_out": "held_out_reward", "reward": "proxy_reward"}
"""Role that scores answers -> its reward in the record and in `samples.jsonl`."""

_JUDGES = {"checker": "gold_reward", **REWARDS}
"""Judge -> the metric by which it compares answers, the most reliable judge first."""

_WIN_RATES = {"checker": "win_rate", "held_out": "win_rate_held_out", "reward": "win_rate_proxy"}
"""Judge -> its win rate in the record."""

_OF_ANSWERS: dict[str, tuple[Better, bool]] = {
    "held_out_reward": ("higher", False),
    "proxy_reward": ("higher", False),
    "kl": ("neither", False),
    "length": ("neither", False),
    "eos_rate": ("higher", True),
    "repetition": ("lower", True),
}
"""Metric that needs no checker -> which values are better, and if they are shares."""

_METRICS = (
    *closed_world.METRICS,
    *(Metric(name, METRICS[name], *how) for name, how in _OF_ANSWERS.items()),
)

_ALL = ""
"""All prompts, in place of a kind; prompts without a task are of no kind."""

ByModel = dict[str, dict[str, Estimate]]


def prompt_set(
    record: Record, rows: Sequence[dict[str, Any]], items: Sequence[Item | None]
) -> PromptSet:
    """Describe the held-out prompts as a prompt set; the kind of a prompt is its task's family."""
    questions = [
        Row(str(i), item.family if item else "", row["prompt"])
        for i, (row, item) in enumerate(zip(rows, items, strict=True))
    ]
    data = record.data["data"].get("prompts", {})
    sources = data.get("evaluate", data).get("sources", [])
    names, licences = (
        ", ".join(dict.fromkeys(str(s[key]) for s in sources if s.get(key)))
        for key in ("name", "license")
    )
    return PromptSet(SET, questions, names, licences, sha256_of(questions))


def evaluation_of(
    recipe: Recipe, prompts: PromptSet, answers: Mapping[str, Answers], max_new_tokens: int
) -> run_suite.Evaluation:
    """Make the evaluation of a suite from answers that the stage has sampled and scored."""
    suite = Suite(
        name=recipe.name,
        seed=recipe.seed,
        temperature=recipe.evaluate.temperature,
        max_new_tokens=max_new_tokens,
        batch_size=recipe.evaluate.batch_size,
        headline=f"{SET}/win_rate",
        sets=[SetSection(name=SET, format="plain", win_rate=True)],
    )
    made = run_suite.Evaluation(
        targets=[Target(model, "run", recipe.model) for model in answers],
        suite=suite,
        suite_file=Path("recipe.yaml"),
        out=Path(),
        reference="sft" if "sft" in answers else next(iter(answers)),
    )
    for model, one in answers.items():
        made.answers[prompts.name, model] = [
            Answer(*each) for each in zip(one.texts, one.lengths, one.finished, strict=True)
        ]
        made.values[prompts.name, model] = _values(one)
    return made


def _values(one: Answers) -> dict[str, list[float | None]]:
    """Return the value of every answer by each metric that applies to any."""
    every: dict[str, Sequence[float | None]] = {
        metric.name: [closed_world.value(metric.name, verdict) for verdict in one.verdicts]
        for metric in closed_world.METRICS
    }
    every |= {REWARDS[role]: scores for role, scores in one.scores.items()}
    every |= {"length": one.lengths, "eos_rate": one.finished, "kl": one.kl or []}
    every["repetition"] = estimates.repetition(one.ids, n=4)
    return {
        name: [None if value is None else float(value) for value in values]
        for name, values in every.items()
        if any(value is not None for value in values)
    }


def tables(
    evaluation: run_suite.Evaluation, prompts: PromptSet
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Make the tables of all metrics and judges that apply; returns them and the judges."""
    reference, seed = evaluation.reference, evaluation.suite.seed
    by_model = {target.name: evaluation.values[SET, target.name] for target in evaluation.targets}
    others = [model for model in by_model if model != reference]
    unknown: list[float | None] = [None] * len(prompts.rows)
    made = [
        suite_tables.metric_table(
            SET,
            metric,
            prompts.rows,
            {model: values.get(metric.name, unknown) for model, values in by_model.items()},
            reference,
            seed,
        )
        for metric in _METRICS
        if any(metric.name in values for values in by_model.values())
    ]
    about: list[dict[str, Any]] = []
    lengths = {model: [a.tokens for a in evaluation.answers[SET, model]] for model in by_model}
    for name, metric_name in _JUDGES.items():
        scores = {m: v[metric_name] for m, v in by_model.items() if metric_name in v}
        if reference not in scores or not others:
            continue
        judge = JudgeSpec(name, "reward", None, independent=name == "held_out")
        about.append(describe(Checker() if name == "checker" else judge, None))
        verdicts = {m: Verdicts(by_score(scores[m], scores[reference])) for m in others}
        for model, verdict in verdicts.items():
            evaluation.values[SET, model][f"wins by {name}"] = verdict.wins
        made += suite_tables.win_rate_tables(
            SET, about[-1], prompts.rows, verdicts, lengths, reference
        )
    if others:
        made.append(suite_tables.longer_table(SET, prompts.rows, lengths, reference))
    return made, about


def by_model(
    made: Sequence[Mapping[str, Any]], models: Sequence[str], kinds: Sequence[str]
) -> tuple[ByModel, dict[str, dict[str, dict[str, Estimate]]]]:
    """Read the record's numbers off the tables: model -> metric, and model -> kind -> metric.

    Metrics are those of METRICS, in its order; differences and win rates are against SFT only.
    """
    numbers: dict[str, dict[str, dict[str, Estimate | None]]] = {
        kind: {model: {} for model in models} for kind in (_ALL, *kinds)
    }
    for table in made:
        name = str(table["metric"])
        if name.startswith("win_rate"):
            name = name.replace("win_rate", _WIN_RATES[table["judge"]])
        for kind, by in (table["by_kind"] | {_ALL: table["estimates"]}).items():
            for model, estimate in by.items():
                numbers[kind][model][name] = estimate
        for row in table["differences"] if "sft" in models else ():
            for kind, estimate in (row["by_kind"] | {_ALL: row["estimate"]}).items():
                numbers[kind][row["a"]][f"{name}_minus_sft"] = estimate

    def known(kind: str, model: str) -> dict[str, Estimate]:
        values = numbers[kind][model]
        return {name: value for name in METRICS if (value := values.get(name)) is not None}

    return (
        {model: known(_ALL, model) for model in models},
        {model: {kind: known(kind, model) for kind in kinds} for model in models if kinds},
    )


def write_report(
    record: Record,
    evaluation: run_suite.Evaluation,
    prompts: PromptSet,
    made: list[dict[str, Any]],
    judges: list[dict[str, Any]],
    by_kind: Mapping[str, Any],
) -> None:
    """Write `report.json`, with the sentences of screen and card; times are in the record's clock.

    It is the same after an interruption, to the byte.
    """
    report = run_suite.report(evaluation, [prompts], judges, made)
    verdict = screen.verdict(record, by_kind)
    report |= {"created": None, "verdict": verdict}
    if report["headline"] is not None:
        report["headline"]["sentence"] = verdict[0]
    path = record.folder / evaluation_report.FILE
    write_atomically(path, json.dumps(safe(report), indent=1) + "\n")
    record.note(path)
