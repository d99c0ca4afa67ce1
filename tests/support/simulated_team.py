"""A team of simulated labelers on the closed world: who they are, what they were given and said."""

import random
from dataclasses import dataclass, replace
from functools import lru_cache

from lora_rlhf.data.closed_world import checkers, generator, labelers
from lora_rlhf.feedback.labels import Answer, Label, Task

TEAM = ("honest",) * 7 + ("spammer", "spammer", "liar", "left", "copy")


WORLD = 1200
"""Prompts that teams draw from, at least."""


@dataclass(frozen=True)
class Team:
    """Tasks, labels (with those of the judge), the habit of each labeler, and gold rewards."""

    tasks: list[Task]
    labels: list[Label]
    judge: list[Label]
    habits: dict[str, str]
    rewards: dict[str, list[float]]


@lru_cache(maxsize=8)
def answers(number, seed, k):
    """Closed-world prompts, each with k good and flawed answers and their gold rewards."""
    rng = random.Random(f"{seed}/answers")
    found = []
    for item in generator.items(number, seed, "comparisons"):
        texts = [
            generator.good(item, rng) if rng.random() < 0.4 else generator.flawed(item, rng)
            for _ in range(k)
        ]
        found.append((item, texts, [checkers.check(item, text).reward for text in texts]))
    return found


def team(
    seed,
    each=60,
    overlap=0.5,
    per_overlap=2,
    gold_share=0.1,
    k=4,
    kind="ranking",
    habits=TEAM,
    agreement=0.73,
    skill_spread=0.0,
    judge_noise=0.5,
    deviation=0.0,
):
    """Simulate a team that labels `each` tasks a person, a share of them together with others.

    Args:
        gold_share: Share of one's tasks that are gold items, which everybody gets.
        skill_spread: Standard deviation of the logarithm of a person's temperature.
        judge_noise: Temperature of the judge's own mistakes, which are the same in every reading.
        deviation: Share of a copy's or a left-taker's labels that are random instead.
    """
    rng = random.Random(f"{seed}/team")
    people = [f"p{number:02}" for number in range(len(habits))]
    shuffled = list(habits)
    rng.shuffle(shuffled)
    golden = round(each * gold_share)
    needed = golden + len(people) * (each - golden)  # tasks at most
    k = 2 if kind == "pair" else k
    world = rng.sample(answers(max(WORLD, needed), seed % 2, k), needed)
    gaps = [(a, b) for _, _, rewards in world for a in rewards for b in rewards if a > b]
    temperature = labelers.calibrate(agreement, gaps)
    temperatures = {who: temperature * 2.718 ** rng.gauss(0, skill_spread) for who in people}
    tasks, plan, left = [], [], dict.fromkeys(people, each - golden)
    rewards, scores = {}, {}
    for number, (item, texts, golds) in enumerate(world):
        free = [who for who in people if left[who] > 0]
        if number >= golden and not free:
            break
        models = tuple(Answer(f"m{i}", text) for i, text in enumerate(texts))
        prompt = ({"role": "user", "content": item.prompt},)
        task = Task(f"t{number}", kind, prompt, models, kind=item.family)
        if number < golden:
            right = labelers.rank(golds, 1e-6, rng)
            task = replace(task, gold=value(kind, right))
            chosen = people
        else:
            several = rng.random() < overlap
            rng.shuffle(free)
            free.sort(key=lambda who: -left[who])
            chosen = free[: per_overlap if several else 1]
            for who in chosen:
                left[who] -= 1
        tasks.append(task)
        rewards[task.id] = golds
        noise = [rng.gauss(0, judge_noise) for _ in golds]
        scores[task.id] = [gold + one for gold, one in zip(golds, noise, strict=True)]
        plan += [(task, who) for who in chosen]
    rng.shuffle(plan)
    labels, by_habit = [], dict(zip(people, shuffled, strict=True))
    for number, (task, who) in enumerate(plan):
        order = rng.sample(range(k), k)
        habit = by_habit[who]
        if habit in ("left", "copy") and rng.random() < deviation:
            habit = "spammer"
        ranks = labelers.judged(
            habit, rewards[task.id], temperatures[who], rng, order, scores[task.id]
        )
        labels.append(label(number, task, who, value(kind, ranks), order))
    judge = [
        label(
            i,
            task,
            "the judge",
            value(kind, labelers.judged("copy", [], 1, rng, [], scores[task.id])),
            range(k),
        )
        for i, task in enumerate(tasks)
    ]
    return Team(tasks, labels, judge, by_habit, rewards)


def value(kind, ranks):
    if kind == "ranking":
        return {"ranks": list(ranks)}
    return {"strength": (ranks[0] > ranks[1]) - (ranks[0] < ranks[1])}


def label(number, task, who, given, order=None, flags=()):
    """One label of somebody, by default in the task's own order."""
    order = range(len(task.answers)) if order is None else order
    created = f"2026-01-01T00:00:00.{number:06}Z"
    return Label(
        number, task.id, who, given, tuple(flags), False, "", tuple(order), 9.0, "", created
    )
