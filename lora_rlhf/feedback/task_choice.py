# SPDX-License-Identifier: Apache-2.0
"""Tasks for labelers: answers of a run's model to prompts that have no label yet.

random          prompts drawn at random
disagreement    prompts on whose answers the run's reward models disagree most: the standard
                deviation over models of the probability that one answer is better, averaged over
                pairs (query by committee; Christiano et al. 2017, 1706.03741, section 2.2.4)
highest_reward  prompts of the answers with the highest reward, where a policy that exploits the
                reward model ends
failures        prompts most like those on which the model failed in its last evaluation, each
                failure in turn; the evaluation's own prompts stay unlabelled, since no reward model
                may train on them
novelty         prompts farthest from all that are labelled or chosen: farthest-first traversal
                (Gonzalez 1985; as k-centre, Sener and Savarese 2018, 1708.00489)

Likeness of prompts is the cosine of the base's mean hidden states, centred.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_rlhf.runtime import optional_packages  # noqa: F401  # isort: skip
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.data import dataset_builder
from lora_rlhf.data.filters import prompt_key
from lora_rlhf.errors import DataError, UsageError, counted
from lora_rlhf.estimates import Floats
from lora_rlhf.evaluation import kept
from lora_rlhf.evaluation.answers import digest
from lora_rlhf.evaluation.judges import AT_RANDOM
from lora_rlhf.models import sampler, scoring
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.reports import evaluation_report
from lora_rlhf.runs import samples
from lora_rlhf.runs.disk import make_place, write_atomically
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import interrupts, quiet
from lora_rlhf.serving import loaded_run
from lora_rlhf.training.reward import ensemble

from .labels import ANSWERS, Answer, Task

STRATEGIES = ("random", "disagreement", "highest_reward", "failures", "novelty")
MODELS = {"sft": "reference", "policy": "policy"}
"""Model that answers -> its role."""

_POOL = 4
"""Prompts among which a strategy chooses, for each that is wanted."""

_AT_ONCE = 64
"""Prompts whose answers are sampled and kept together."""

Say = Callable[[str], object]


@dataclass(frozen=True)
class Choice:
    """A choice of tasks.

    Attributes:
        n: Number of tasks.
        k: Answers to each prompt.
        model: sft or policy.
        pool: Prompts, drawn at random, among which the strategy chooses; default: 4 times n.
        round: Number of the round.
    """

    strategy: str = "random"
    n: int = 100
    k: int = 4
    model: str = "sft"
    pool: int | None = None
    seed: int = 0
    round: int = 0

    def __post_init__(self) -> None:
        fewest, most = ANSWERS["ranking"]
        if self.strategy not in STRATEGIES:
            raise UsageError(f"strategy {self.strategy!r}", expected=", ".join(STRATEGIES))
        if self.model not in MODELS:
            raise UsageError(f"model {self.model!r}", expected=", ".join(MODELS))
        if not fewest <= self.k <= most:
            raise UsageError(f"{self.k} answers to a prompt", expected=f"{fewest} to {most}")
        if self.n < 1 or (self.pool or self.n) < self.n:
            raise UsageError(
                f"{self.n} tasks out of a pool of {self.pool}",
                expected="1 task or more, and a pool with at least as many prompts",
            )


@quiet.libraries()
def make(
    run: str | Path,
    choice: Choice,
    out: Path,
    *,
    failed: Sequence[str] | None = None,
    without: Collection[str] = (),
    say: Say = lambda line: None,
) -> list[Task]:
    """Write tasks of a run's prompts and its model's answers to a file, and return them.

    Answers are kept in `answers/` beside the file: another strategy, or the same command after it
    was interrupted, samples only what is missing.

    Args:
        failed: Prompts of failures; default: those of the run's own evaluation.
        without: Keys (`prompt_key`) of prompts to leave out.

    Raises:
        UsageError: The run lacks a stage that is needed.
        DataError: No prompt is left, or none whose answers differ.
    """
    make_place(out)
    record = Record.read(run)
    recipe = record.recipe()
    stage_of(record, choice.model)
    if choice.strategy == "failures" and failed is None:
        failed = failures(record, choice.model)
    backbone, _ = loaded_run.load(run)
    rows, labelled = dataset_builder.unlabelled(recipe, backbone.tokenizer)
    rows = [row for row in rows if prompt_key(row["prompt"]) not in without]
    if not rows:
        raise DataError(
            "no prompt of data.prompts is without a comparison, or they were all tasks before",
            remedy="train a run whose data.prompts has prompts without comparisons too",
        )
    random.Random(f"{choice.seed}/tasks").shuffle(rows)
    if choice.strategy != "random":
        rows = rows[: choice.pool or _POOL * choice.n]
    answers = _Answers(record, backbone, choice, out.parent / "answers", say)
    tasks = []
    for row, why in _ordered(answers, rows, labelled, failed or ()):
        if len(texts := answers.different(row)) > 1:
            tasks.append(_task(row, texts, why, choice))
        if len(tasks) == choice.n:
            break
    if not tasks:
        raise DataError(
            f"of {len(rows)} unlabelled prompts, none has two different answers",
            remedy="give more data.prompts, or another --model",
        )
    if len(tasks) < choice.n:
        say(
            f"only {len(tasks)} of {counted(choice.n, 'task')}: "
            "no more prompts with different answers"
        )
    write(out, tasks)
    return tasks


def stage_of(record: Record, model: str) -> str:
    """Return the stage that trained a model of a run.

    Raises:
        UsageError: It is not finished, or trains no model.
    """
    stage = {"sft": "sft", "policy": record.algorithm}[model]
    if not record.done(stage) or stage == "best_of_n":
        raise UsageError(
            f"{record.folder} has no finished {model}",
            remedy="continue it with `lora-rlhf run`, or choose the model sft",
        )
    return stage


def write(path: Path, tasks: Sequence[Task]) -> None:
    """Write a task file, whose `ranking` is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(_line(task)) + "\n" for task in tasks))


def _line(task: Task) -> dict[str, Any]:
    [*before, last] = task.prompt
    return {
        "id": task.id,
        "type": task.type,
        "prompt": list(task.prompt) if before else last["content"],
        "answers": {answer.model: answer.text for answer in task.answers},
        "kind": task.kind,
        "why": task.why,
        "round": task.round,
        "ranking": None,
    }


def _task(row: dict[str, Any], texts: Sequence[str], why: str, choice: Choice) -> Task:
    prompt = row["prompt"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Task(
        id=f"round-{choice.round}-{digest(prompt)[:12]}",
        type="ranking",
        prompt=tuple(turns),
        answers=tuple(Answer(f"{choice.model}/{i}", text) for i, text in enumerate(texts, 1)),
        kind=json.loads(row["item"])["family"] if row["item"] else "",
        why=why,
        round=choice.round,
    )


# --- the answers ---------------------------------------------------------------------------------


class _Answers:
    """K answers of one model to prompts, sampled when they are asked for, and kept on disk."""

    def __init__(
        self, record: Record, backbone: Backbone, choice: Choice, folder: Path, say: Say
    ) -> None:
        self.backbone, self.choice, self.say = backbone, choice, say
        self.recipe = recipe = record.recipe()
        self.limit = recipe.evaluate.max_new_tokens or ppo_stage.completion_limit(
            recipe, recipe.algorithm
        )
        self.identity = {
            "adapter": record.data["stages"][stage_of(record, choice.model)]["adapter_sha256"],
            "base": backbone.fingerprint,
            "answers": [choice.k, choice.seed, self.limit],
        }
        self.path = folder / f"{digest(self.identity)[:16]}.json"
        self.kept: dict[str, list[list[int]]] = kept.take(self.path, self.identity)

    def sample(self, rows: Sequence[dict[str, Any]]) -> None:
        """Sample the answers that are missing; each depends on its prompt and the seed alone."""
        k = self.choice.k
        for start in range(0, len(rows), _AT_ONCE):
            keys = [prompt_key(row["prompt"]) for row in rows[start : start + _AT_ONCE]]
            if all(key in self.kept for key in keys):
                continue
            interrupts.stop_if_requested()
            self.say(
                f"{self.choice.model} answers {counted(len(keys), 'prompt')}, "
                f"{counted(k, 'time')} each"
            )
            part = rows[start : start + _AT_ONCE]
            prompts = [self.backbone.encode_prompt(row["prompt"]) for row in part for _ in range(k)]
            with self.backbone.role(MODELS[self.choice.model]):
                drawn = sampler.sample(
                    self.backbone,
                    prompts,
                    max_new_tokens=self.limit,
                    temperature=1.0,
                    batch_size=self.recipe.evaluate.batch_size,
                    seeds=[
                        int(digest([self.choice.seed, key, i])[:15], 16)
                        for key in keys
                        for i in range(k)
                    ],
                )
            for i, key in enumerate(keys):
                self.kept[key] = [one.ids for one in drawn[i * k : (i + 1) * k]]
            kept.put(self.path, self.identity, self.kept)

    def ids(self, row: dict[str, Any]) -> dict[str, list[int]]:
        """Return the different answers to a sampled prompt that are not empty: text -> tokens."""
        by_text = {self.backbone.decode(ids): ids for ids in self.kept[prompt_key(row["prompt"])]}
        return {text: ids for text, ids in by_text.items() if text.strip()}

    def different(self, row: dict[str, Any]) -> list[str]:
        """Return the different answers to a prompt."""
        if prompt_key(row["prompt"]) not in self.kept:
            self.sample([row])
        return list(self.ids(row))

    def scores(self, rows: Sequence[dict[str, Any]], roles: Sequence[str]) -> list[Floats]:
        """Score the answers to each prompt by each reward model, (M, answers)."""
        per_row = [list(self.ids(row).values()) for row in rows]
        prompts = [self.backbone.encode_prompt(row["prompt"]) for row in rows]
        episodes = [(p, a) for p, each in zip(prompts, per_row, strict=True) for a in each]
        size = self.recipe.evaluate.batch_size
        scored = ensemble.member_scores(self.backbone, episodes, roles, size)
        ends = np.cumsum([len(each) for each in per_row])
        return np.split(scored, ends[:-1], axis=1)

    def embeddings(self, prompts: Sequence[Any]) -> Floats:
        """Return the base's mean hidden state of each prompt, (N, H)."""
        ids = [self.backbone.encode_prompt(prompt) for prompt in prompts]
        size = self.recipe.evaluate.batch_size
        return np.asarray(scoring.mean_states(self.backbone, ids, size), dtype=np.float64)


# --- the strategies ------------------------------------------------------------------------------


def _ordered(
    answers: _Answers,
    rows: list[dict[str, Any]],
    labelled: Sequence[Any],
    failed: Sequence[str],
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the prompts in the order of the strategy, with the reason of each.

    What only one prompt has, such as a number, comes after a colon: cards leave it out.
    """
    strategy, n = answers.choice.strategy, answers.choice.n
    order: Iterator[tuple[int, str]]
    if strategy in ("disagreement", "highest_reward"):
        yield from _by_reward(answers, rows)
        return
    if strategy == "random":
        order = ((i, AT_RANDOM) for i in range(len(rows)))
    else:
        chat = bool(answers.backbone.tokenizer.chat_template)
        turns = [[{"role": "user", "content": text}] if chat else text for text in failed]
        others = turns if strategy == "failures" else list(labelled)
        points = answers.embeddings([*(row["prompt"] for row in rows), *others])
        points -= points.mean(axis=0)
        points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
        own, other = points[: len(rows)], points[len(rows) :]
        if strategy == "failures":
            order = ((i, f"like the failure: {failed[f][:80]}") for i, f in nearest(own, other))
        else:
            order = (
                (i, f"unlike labelled prompts: distance {d:.2f}")
                for i, d in farthest_first(own, other)
            )
    while part := list(itertools.islice(order, min(n, _AT_ONCE))):
        answers.sample([rows[i] for i, _ in part])
        yield from ((rows[i], why) for i, why in part)


def _by_reward(
    answers: _Answers, rows: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], str]]:
    backbone, section = answers.backbone, answers.recipe.reward
    roles = [role for role in ensemble.roles(section) if backbone.has(role)]
    proxies = len(roles)
    disagree = answers.choice.strategy == "disagreement"
    roles += ["held_out"] if disagree and backbone.has("held_out") else []
    if len(roles) < 1 + disagree:
        raise UsageError(
            f"--strategy {answers.choice.strategy} needs {1 + disagree} reward models or more, "
            f"and the run has {len(roles)}",
            remedy="train them: reward.held_out_model: true, or reward.ensemble: 3; or choose "
            "another strategy",
        )
    answers.sample(rows)
    rows = [row for row in rows if len(answers.ids(row)) > 1]
    scored = answers.scores(rows, roles) if rows else []
    if disagree:
        value = [disagreement(each) for each in scored]
        reason = "disagreement of the reward models: {:.2f}"
    else:
        value = [float(ensemble.combine(each[:proxies], section).max()) for each in scored]
        reason = "highest reward of an answer: {:.2f}"
    for i in sorted(range(len(rows)), key=lambda i: -value[i]):
        yield rows[i], reason.format(value[i])


def disagreement(scores: Floats) -> float:
    """Return the mean over pairs of K answers of the std over M models of P(one is better).

    Args:
        scores: (M, K) rewards, whose differences are log-odds of a preference (Bradley-Terry).
    """
    margins = [
        scores[:, a] - scores[:, b] for a, b in itertools.combinations(range(scores.shape[1]), 2)
    ]
    chances = 1 / (1 + np.exp(-np.clip(margins, -60, 60)))
    return float(chances.std(axis=1).mean())


def farthest_first(points: Floats, known: Floats) -> Iterator[tuple[int, float]]:
    """Yield each point's index and its distance from the nearest known or yielded point.

    The farthest comes first; without known points, the first point does.
    """
    distance = np.full(len(points), np.inf)
    for other in known:
        distance = np.minimum(distance, np.linalg.norm(points - other, axis=1))
    for _ in range(len(points)):
        i = int(distance.argmax())
        yield i, float(min(distance[i], 2.0))  # vectors of length 1 are no farther apart
        distance = np.minimum(distance, np.linalg.norm(points - points[i], axis=1))
        distance[i] = -np.inf


def nearest(points: Floats, targets: Floats) -> Iterator[tuple[int, int]]:
    """Yield (point, target): the targets in turn, each with its nearest point that is left."""
    queues = [iter(np.argsort(-(points @ target), kind="stable")) for target in targets]
    used: set[int] = set()
    while queues and len(used) < len(points):
        for number, queue in enumerate(queues):
            if (i := next((int(i) for i in queue if int(i) not in used), None)) is not None:
                used.add(i)
                yield i, number


def failures(record: Record, model: str, report: Path | None = None) -> list[str]:
    """Return the prompts on which the model failed, worst first.

    Of the run's own evaluation: by the exact checker the answers without success, else the quarter
    with the lowest reward. Of a report: its samples that are among the worst.

    Args:
        report: Folder of a `report.json`.

    Raises:
        UsageError: There are none.
    """
    if report is not None:
        shown = evaluation_report.read(report)["samples"]
        failed = [one["prompt"] for one in shown if one["why"] == "among the worst"]
    else:
        by_prompt = samples.read(record) if (record.folder / "samples.jsonl").exists() else {}
        lines = [by_model[model] for by_model in by_prompt.values() if model in by_model]
        lines = sorted((x for x in lines if "score" in x), key=lambda line: float(line["score"]))
        wrong = [line for line in lines if not line.get("verdict", {}).get("success", True)]
        checked = any("verdict" in line for line in lines)
        failed = [line["prompt"] for line in (wrong if checked else lines[: len(lines) // 4])]
    if not failed:
        raise UsageError(
            f"{report or record.folder} has no failures of {model}",
            expected="an evaluation with scores",
            remedy="evaluate first (`lora-rlhf evaluate`), or choose another strategy",
        )
    return list(dict.fromkeys(failed))
