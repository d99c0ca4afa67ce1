# SPDX-License-Identifier: Apache-2.0
"""The evaluation stage: base, SFT and policy (or best of n) on the same prompts and seed.

Writes `evaluation` into the record, every number with its interval and n, and `samples.jsonl`
beside it, one line per prompt and model. A metric that does not apply is left out, never set to 0.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lora_rlhf import estimates
from lora_rlhf.data.closed_world.checkers import Item, Verdict, check
from lora_rlhf.errors import DataError, NonFiniteError
from lora_rlhf.estimates import Estimate
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.redaction import safe
from lora_rlhf.runs.metric_names import METRICS
from lora_rlhf.runs.record import Record
from lora_rlhf.runs.samples import prompt_text

from .answers import AnswerCache, Answers

if TYPE_CHECKING:
    from datasets import Dataset

    from lora_rlhf.models.backbone import Backbone

MODELS: dict[str, str | None] = {
    "base": None, "sft": "reference", "policy": "policy", "best_of_n": "reference",
}  # fmt: skip
"""What is evaluated, in this order: its name in the record, and the role of its adapter."""


_SCORES = ("gold_reward", "held_out_reward", "proxy_reward")


def run(
    recipe: Recipe,
    backbone: Backbone,
    record: Record,
    prompts: Dataset,
    identity: dict[str, Any] | None = None,
    say: Callable[[str], object] = len,
) -> None:
    """Evaluate every model there is; `prompts` has a column `prompt` and, for tasks, `item` (JSON).

    Args:
        identity: What the run is, as flat keys: models that an earlier process of the same run
            finished are not evaluated again. None: all are, and nothing is kept.
        say: Told which they are.

    Raises:
        DataError: No prompts, or items that cannot be read.
        NonFiniteError: A score or a log-probability is NaN or infinite.
    """
    asked, items = _read(prompts, recipe.evaluate.n)
    models = _models(recipe, backbone)
    with record.stage("evaluate") as entry:
        longest = _max_new_tokens(recipe)
        encoded = [backbone.encode_prompt(row["prompt"]) for row in asked]
        answers: dict[str, Answers] = {}
        shelf = AnswerCache(record, identity, say)
        kept = {model: shelf.take(model) for model in models}
        for model in models:
            found = kept[model] or _answer(recipe, backbone, model, encoded, longest)
            found.verdicts = _verdicts(items, found.texts)
            answers[model] = found
            if kept[model] is None:
                shelf.put(model, found)
        record.data["evaluation"] = {
            model: measure(found, None if model == "sft" else answers.get("sft"), recipe.seed)
            for model, found in answers.items()
        }
        if "best_of_n" in models:
            from lora_rlhf.algorithms.best_of_n import analytic, best_of_n_kl

            bound = analytic(best_of_n_kl(recipe.best_of_n.n))
            record.data["evaluation"]["best_of_n"]["kl_bound"] = bound
            entry["samples_per_answer"] = {"best_of_n": recipe.best_of_n.n}
        record.data["clock"]["evaluation"] = {
            model: {
                "seconds": round(found.seconds, 3),
                "tokens_per_second": round(sum(found.lengths) / max(found.seconds, 1e-9), 1),
            }
            for model, found in answers.items()
        }
        _write_samples(record, asked, items, answers)
        entry.update(
            prompts=len(asked),
            models=models,
            seed=recipe.seed,
            max_new_tokens=longest,
            temperature=recipe.evaluate.temperature,
            families=dict(Counter(item.family for item in items if item is not None)),
        )


def _max_new_tokens(recipe: Recipe) -> int:
    """How long an answer may be: as evaluation says, else as in the rollouts."""
    if recipe.evaluate.max_new_tokens is not None:
        return recipe.evaluate.max_new_tokens
    from lora_rlhf.algorithms.ppo import ppo_stage

    return ppo_stage.longest(recipe)


def _models(recipe: Recipe, backbone: Backbone) -> list[str]:
    """The models of this run; best of n is SFT, chosen from, and stands in a policy's place."""
    skipped = "policy" if recipe.algorithm == "best_of_n" else "best_of_n"
    there = [m for m, role in MODELS.items() if role is None or backbone.has(role)]
    return [model for model in there if model != skipped]


def _read(prompts: Dataset, n: int) -> tuple[list[dict[str, Any]], list[Item | None]]:
    """The first n rows, and the task item of each where it has one."""
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
    recipe: Recipe, backbone: Backbone, model: str, prompts: list[list[int]], longest: int
) -> Answers:
    """Generate with one model and let reward models and SFT judge it."""
    # Imported here: whoever only wants the table or the samples need not wait for torch.
    from lora_rlhf.models.scoring import scores, sequence_logprobs

    section, role = recipe.evaluate, MODELS[model]
    found = _generate(recipe, backbone, model, prompts, longest)
    sequences = list(zip(prompts, found.ids, strict=True))
    if backbone.has("reward"):
        from lora_rlhf.training.reward.ensemble import rewards_of

        rewards = rewards_of(backbone, sequences, recipe.reward, section.batch_size)
        found.scores["reward"] = _finite(rewards, "reward score")
    if backbone.has("held_out"):
        raw = scores(backbone, sequences, role="held_out", batch_size=section.batch_size)
        offset = backbone.reward_offset.get("held_out", 0.0)
        found.scores["held_out"] = _finite([s + offset for s in raw], "held_out score")
    # Greedy answers are no samples of the model: the mean log-ratio over them is no KL.
    if role != "reference" and backbone.has("reference") and section.temperature > 0:
        own, sft = (
            sequence_logprobs(
                backbone,
                sequences,
                role=who,
                batch_size=section.batch_size,
                temperature=section.temperature,
            )
            for who in (role, "reference")
        )
        gaps = [a - b for a, b in zip(own, sft, strict=True)]
        found.kl = _finite(gaps, f"log-ratio of {role or 'base'} to SFT")
    return found


def _verdicts(items: list[Item | None], texts: list[str]) -> list[Verdict | None]:
    """What the checkers say, where a prompt is of a task."""
    return [
        None if item is None else check(item, text) for item, text in zip(items, texts, strict=True)
    ]


def _generate(
    recipe: Recipe, backbone: Backbone, model: str, prompts: list[list[int]], longest: int
) -> Answers:
    """One answer of `model` to each prompt, timed; best of n takes n samples for each."""
    section = recipe.evaluate
    options: dict[str, Any] = {
        "max_new_tokens": longest,
        "temperature": section.temperature,
        "seed": recipe.seed,
    }
    started = time.perf_counter()
    if model == "best_of_n":
        from lora_rlhf.algorithms.best_of_n import choose

        ids = choose(backbone, prompts, recipe, **options)
    else:
        ids = backbone.generate(prompts, MODELS[model], batch_size=section.batch_size, **options)
    seconds = time.perf_counter() - started
    ends = set(backbone.eos_ids)
    return Answers(
        ids=ids,
        texts=[backbone.decode(completion) for completion in ids],
        finished=[bool(completion) and completion[-1] in ends for completion in ids],
        seconds=seconds,
    )


def _finite(values: list[float], what: str) -> list[float]:
    for number, value in enumerate(values):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {what} of evaluation prompt {number} is {value}",
                remedy="look for NaN in the log of the stage that trained this role",
            )
    return values


# --- from answers to numbers -------------------------------------------------------------------


def measure(found: Answers, sft: Answers | None, seed: int) -> dict[str, Estimate]:
    """Every metric that applies, in the order of METRICS; `sft` is None for SFT itself."""
    shares = [share for share in estimates.repetition(found.ids, n=4) if share is not None]
    out: dict[str, Estimate | None] = {
        "proxy_reward": _mean(found.scores.get("reward", [])),
        "held_out_reward": _mean(found.scores.get("held_out", [])),
        "length": _mean(found.lengths),
        "eos_rate": _share(found.finished),
        "repetition": estimates.mean_of_shares(shares) if shares else None,
        "kl": _mean(found.kl or []),
    }
    verdicts = [v for v in found.verdicts if v is not None]
    if verdicts:
        incidents = _share([v.incident for v in verdicts])
        out |= {
            "gold_reward": _mean([v.reward for v in verdicts]),
            "success": _share([v.success for v in verdicts]),
            "hallucination": _share([v.hallucinated for v in verdicts]),
            "incidents_per_1000": estimates.scaled(incidents, 1000) if incidents else None,
            "over_refusal": _share([v.over_refusal for v in verdicts]),
            "constraint": _share([v.constraint for v in verdicts]),
            "words": _mean([v.words for v in verdicts]),
        }
    if sft is not None:
        out |= _against(found, sft, seed)
    return {name: value for name in METRICS if (value := out.get(name)) is not None}


def _against(found: Answers, sft: Answers, seed: int) -> dict[str, Estimate | None]:
    """The paired comparisons with SFT."""
    every = range(len(found.ids))
    tasks = [i for i in every if found.verdicts[i] is not None]
    out: dict[str, Estimate | None] = {
        "longer_than_sft": estimates.win_rate(found.lengths, sft.lengths)
    }
    pairs: dict[str, tuple[Sequence[int], list[float], list[float]]] = {
        f"win_rate_{name}": (every, found.scores[judge], sft.scores[judge])
        for name, judge in (("proxy", "reward"), ("held_out", "held_out"))
        if judge in found.scores
    }
    if tasks:
        gold, gold_sft = (
            [v.reward for v in answers.verdicts if v is not None] for answers in (found, sft)
        )
        pairs["win_rate"] = (tasks, gold, gold_sft)
        out["gold_reward_minus_sft"] = estimates.paired_difference(gold, gold_sft, seed)
    for name, (rows, a, b) in pairs.items():
        out[name] = estimates.win_rate(a, b)
        out[f"{name}_length_controlled"] = estimates.length_controlled_win_rate(
            a, b, [found.lengths[i] for i in rows], [sft.lengths[i] for i in rows]
        )
    return out


def _mean(values: Sequence[float | None]) -> Estimate | None:
    kept = [value for value in values if value is not None]
    return estimates.mean_interval(kept) if kept else None


def _share(flags: Sequence[bool | None]) -> Estimate | None:
    kept = [flag for flag in flags if flag is not None]
    return estimates.wilson(sum(kept), len(kept)) if kept else None


# --- samples -----------------------------------------------------------------------------------


def _write_samples(
    record: Record,
    asked: list[dict[str, Any]],
    items: list[Item | None],
    answers: dict[str, Answers],
) -> None:
    """`samples.jsonl`: for each prompt one line per model, so that answers stand side by side.

    `score` is what worst is measured by: the gold reward, else the held-out, else the proxy one.
    """
    names = {"reward": "proxy_reward", "held_out": "held_out_reward"}
    with (record.folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for i, (row, item) in enumerate(zip(asked, items, strict=True)):
            for model, found in answers.items():
                line: dict[str, Any] = {
                    "index": i,
                    "model": model,
                    "prompt": prompt_text(row["prompt"]),
                    "completion": found.texts[i],
                    "tokens": len(found.ids[i]),
                    "finished": found.finished[i],
                }
                line |= {names[judge]: round(s[i], 6) for judge, s in found.scores.items()}
                if found.kl is not None:
                    line["kl"] = round(found.kl[i], 6)
                verdict = found.verdicts[i]
                if item is not None and verdict is not None:
                    line |= {"gold_reward": verdict.reward, "family": item.family}
                    line["verdict"] = asdict(verdict)
                kinds = [key for key in _SCORES if key in line]
                if kinds:
                    line["score"] = line[kinds[0]]
                file.write(json.dumps(safe(line)) + "\n")
