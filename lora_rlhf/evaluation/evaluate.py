# SPDX-License-Identifier: Apache-2.0
"""The evaluation stage: base, SFT and policy (or best of n) on the same prompts and seed.

Writes `evaluation` into the record, every number with its interval and n, and beside it
`report.json` and `samples.jsonl`, one line per prompt and model. A metric that does not apply is
left out, never set to 0.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from datasets import Dataset

from lora_rlhf.algorithms import best_of_n, reward_functions
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.data.closed_world.checkers import Item, check
from lora_rlhf.errors import DataError, NonFiniteError
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.models.scoring import scores, sequence_logprobs
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.redaction import safe
from lora_rlhf.runs.disk import write_atomically
from lora_rlhf.runs.record import Record
from lora_rlhf.runs.samples import prompt_text
from lora_rlhf.training.reward import ensemble

from . import run_tables
from .answers import AnswerCache, Answers

MODELS: dict[str, str | None] = {
    "base": None, "sft": "reference", "policy": "policy", "best_of_n": "reference",
}  # fmt: skip
"""Models in the order of evaluation: name in the record -> role of the adapter."""


def run(
    recipe: Recipe,
    backbone: Backbone,
    record: Record,
    prompts: Dataset,
    identity: dict[str, Any] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> None:
    """Evaluate every model; `prompts` has a column `prompt` and, for tasks, `item` (JSON).

    Args:
        identity: Flat description of the run: models that an earlier process of the same run
            finished are not evaluated again. None: evaluate all models, without a cache.
        say: Called with messages on cached answers.

    Raises:
        DataError: There are no prompts, or an item cannot be read.
        NonFiniteError: A score or a log-probability is NaN or infinite.
    """
    rows, items = _read(prompts, recipe.evaluate.n)
    models = _models(recipe, backbone)
    with record.stage("evaluate") as entry:
        max_new_tokens = recipe.evaluate.max_new_tokens
        if max_new_tokens is None:
            max_new_tokens = ppo_stage.completion_limit(recipe, recipe.algorithm)
        encoded = [backbone.encode_prompt(row["prompt"]) for row in rows]
        cache = AnswerCache(record, identity, say)
        earlier = {model: cache.take(model) for model in models}
        answers: dict[str, Answers] = {}
        for model in models:
            one = earlier[model] or _answer(recipe, backbone, model, rows, encoded, max_new_tokens)
            one.verdicts = [
                None if item is None else check(item, text)
                for item, text in zip(items, one.texts, strict=True)
            ]
            answers[model] = one
            if earlier[model] is None:
                cache.put(model, one)
        prompt_rows = run_tables.prompt_set(record, rows, items)
        made = run_tables.evaluation_of(recipe, prompt_rows, answers, max_new_tokens)
        tables, judges = run_tables.tables(made, prompt_rows)
        families = Counter(item.family for item in items if item is not None)
        evaluation, by_kind = run_tables.by_model(tables, models, list(families))
        record.data["evaluation"] = evaluation
        if "best_of_n" in models:
            n = recipe.best_of_n.n
            evaluation["best_of_n"]["kl_bound"] = best_of_n.analytic(best_of_n.best_of_n_kl(n))
            entry["samples_per_answer"] = {"best_of_n": n}
        record.data["clock"]["evaluation"] = {model: one.speed for model, one in answers.items()}
        _write_samples(record, rows, items, answers)
        run_tables.write_report(record, made, prompt_rows, tables, judges, by_kind)
        entry.update(
            prompts=len(rows),
            models=models,
            seed=recipe.seed,
            max_new_tokens=max_new_tokens,
            temperature=recipe.evaluate.temperature,
            families=dict(families),
            by_kind=by_kind,
        )


def rows_processed(recipe: Recipe, backbone: Backbone, prompts: int) -> int:
    """Return the rows that an evaluation samples and scores, each as often as it is processed."""
    scored = len(ensemble.roles(recipe.reward)) if backbone.has("reward") else 0
    scored += backbone.has("held_out")
    likely = 2 if recipe.evaluate.temperature > 0 else 0
    passes = 0
    for model in _models(recipe, backbone):
        drawn = recipe.best_of_n.n if model == "best_of_n" else 1
        own = likely if MODELS[model] != "reference" else 0
        passes += drawn + scored * (drawn + 1 if drawn > 1 else 1) + own
    return passes * min(recipe.evaluate.n, prompts)


def _models(recipe: Recipe, backbone: Backbone) -> list[str]:
    """The models of this run; best of n, which samples from SFT, takes the place of a policy."""
    skipped = "policy" if recipe.algorithm == "best_of_n" else "best_of_n"
    known = [m for m, role in MODELS.items() if role is None or backbone.has(role)]
    return [model for model in known if model != skipped]


def _read(prompts: Dataset, n: int) -> tuple[list[dict[str, Any]], list[Item | None]]:
    """The first n rows and their task items; None for a row without item."""
    rows = [dict(prompts[i]) for i in range(min(n, len(prompts)))]
    if not rows or "prompt" not in rows[0]:
        raise DataError(
            "no prompts to evaluate on" if not rows else f"columns {sorted(rows[0])}",
            expected="a dataset with a column `prompt`",
            remedy="give data.evaluate, or more data.prompts",
        )
    items: list[Item | None] = []
    for number, row in enumerate(rows):
        raw = row.get("item")
        try:
            plain = json.loads(raw) if isinstance(raw, str) and raw else raw
            items.append(Item.from_dict(plain) if plain else None)
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"evaluation prompt {number} has an item that cannot be read: {error}",
                expected="the JSON of a task item, or nothing",
            ) from None
    return rows, items


def _answer(
    recipe: Recipe,
    backbone: Backbone,
    model: str,
    rows: list[dict[str, Any]],
    prompts: list[list[int]],
    max_new_tokens: int,
) -> Answers:
    """Answer with one model; score the answers with reward models, and log-ratios to SFT."""
    role, size = MODELS[model], recipe.evaluate.batch_size
    temperature = recipe.evaluate.temperature
    options: dict[str, Any] = {"temperature": temperature, "seed": recipe.seed}
    options["max_new_tokens"] = max_new_tokens
    started = time.perf_counter()
    if model == "best_of_n":
        ids = best_of_n.choose(backbone, prompts, recipe, given=rows, **options)
    else:
        ids = backbone.generate(prompts, role, batch_size=size, **options)
    seconds = time.perf_counter() - started
    finished = [bool(completion) and completion[-1] in backbone.eos_ids for completion in ids]
    answers = Answers(ids, [backbone.decode(completion) for completion in ids], finished, seconds)
    sequences = list(zip(prompts, ids, strict=True))
    if recipe.ppo.function or backbone.has("reward"):
        rewards = reward_functions.scores(recipe, backbone, rows, sequences, size)
        answers.scores["reward"] = _finite(rewards, "reward score")
    if backbone.has("held_out"):
        raw = scores(backbone, sequences, role="held_out", batch_size=size)
        offset = backbone.reward_offset.get("held_out", 0.0)
        answers.scores["held_out"] = _finite([s + offset for s in raw], "held_out score")
    # KL is an expectation over samples; greedy answers are none.
    if role != "reference" and backbone.has("reference") and temperature > 0:
        own, sft = (
            sequence_logprobs(
                backbone, sequences, role=who, batch_size=size, temperature=temperature
            )
            for who in (role, "reference")
        )
        gaps = [a - b for a, b in zip(own, sft, strict=True)]
        answers.kl = _finite(gaps, f"log-ratio of {role or 'base'} to SFT")
    return answers


def _finite(values: list[float], what: str) -> list[float]:
    for number, value in enumerate(values):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {what} of evaluation prompt {number} is {value}",
                remedy="look for NaN in the log of the stage that trained this role",
            )
    return values


# --- samples -----------------------------------------------------------------------------------


def _write_samples(
    record: Record,
    rows: list[dict[str, Any]],
    items: list[Item | None],
    answers: dict[str, Answers],
) -> None:
    """Write `samples.jsonl`, prompt by prompt; `score` is the reward of the most reliable judge."""
    text = ""
    for i, (row, item) in enumerate(zip(rows, items, strict=True)):
        for model, one in answers.items():
            line: dict[str, Any] = {
                "index": i,
                "model": model,
                "prompt": prompt_text(row["prompt"]),
                "completion": one.texts[i],
                "tokens": len(one.ids[i]),
                "finished": one.finished[i],
            }
            line |= {run_tables.REWARDS[role]: round(s[i], 6) for role, s in one.scores.items()}
            if one.kl is not None:
                line["kl"] = round(one.kl[i], 6)
            verdict = one.verdicts[i]
            if item is not None and verdict is not None:
                line |= {"gold_reward": verdict.reward, "family": item.family}
                line["verdict"] = asdict(verdict)
            kinds = ("gold_reward", "held_out_reward", "proxy_reward")
            if ranked := [line[kind] for kind in kinds if kind in line]:
                line["score"] = ranked[0]
            text += json.dumps(safe(line)) + "\n"
    path = record.folder / "samples.jsonl"
    write_atomically(path, text)
    record.note(path)
