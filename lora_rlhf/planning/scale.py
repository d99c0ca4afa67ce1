# SPDX-License-Identifier: Apache-2.0
"""A model of one update's time on N data-parallel workers, from measured parts.

    update  = rollout + score + steps x (micro-batches + exchange) + rows
    section = (fixed + rows of a worker x seconds per row) x (1 + cv x e(N))

All workers wait for the slowest after the rollout, after scoring, and in each optimizer step: e(N)
is the expected maximum of N standard normal numbers, cv the measured coefficient of variation. The
exchange is a ring all-reduce of the trained parameters' gradients, `2 (N - 1) / N` of their bytes
and `2 (N - 1)` latencies, and small messages. `rows` are the sampled tokens and their numbers.

Not in the model: work that every worker repeats (advantages, the optimizer), links that workers
share, exchanges that overlap with computing, and workers that fail.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from lora_rlhf.algorithms import trainer_configs
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.errors import UsageError
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import differences, stage_names
from lora_rlhf.reports.tables import aligned
from lora_rlhf.runs.record import Record

from . import meta_backbone
from .memory_budget import Plan, format_bytes

NUMBER = 4
"""Bytes of a gradient's number: float32. bfloat16 would halve the exchanges of both."""

TOKEN = 40
"""Assumed bytes per sampled token: its id, two log-probs, a value and a reward, 8 each."""

SMALL = 8
"""Small messages per micro-batch, assumed: loss, metrics of policy and value, a waiting signal, and
the length of each. Each goes around the ring once."""

BEND = 0.8
"""Efficiency below which the curve is said to bend."""

_PHASES = ("rollout", "score", "update")
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Network:
    """The link of each worker: bits per second in both directions at once, seconds of latency."""

    bits: float
    latency: float

    @classmethod
    def parse(cls, speed: str, latency: str) -> Network:
        """Read texts such as 1Gbit and 0.1ms.

        Raises:
            UsageError: They are not.
        """
        bits = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMG])bit(?:/s)?", speed, re.IGNORECASE)
        time = re.fullmatch(r"(\d+(?:\.\d+)?) ?(us|ms|s)", latency)
        if not bits or not float(bits[1]):
            raise UsageError(f"--network {speed!r} is not a speed", expected="such as 1Gbit")
        if not time:
            raise UsageError(f"--latency {latency!r} is not a time", expected="such as 0.1ms")
        return cls(float(bits[1]) * _UNITS[bits[2].lower()], float(time[1]) * _SECONDS[time[2]])

    def all_reduce(self, count: float, workers: int) -> tuple[float, float]:
        """Return the seconds of a ring all-reduce of some bytes: for the bytes, and of latency."""
        return 2 * (workers - 1) / workers * 8 * count / self.bits, self.around(workers, 2)

    def around(self, workers: int, times: float) -> float:
        """Return the seconds of latency of messages that go around the ring."""
        return times * (workers - 1) * self.latency


@dataclass(frozen=True)
class Part:
    """Measured seconds of one section between two waits, and their coefficient of variation."""

    fixed: float
    per_row: float
    cv: float

    def seconds(self, rows: int) -> float:
        """Return the mean seconds of a worker with so many rows."""
        return self.fixed + self.per_row * rows


@dataclass(frozen=True)
class Work:
    """An update: episodes of its rollout, optimizer steps, and the micro-batches of each."""

    episodes: int
    steps: int
    micro_batches: int
    micro_rows: int
    tokens: int

    @classmethod
    def of(cls, recipe: Recipe) -> Work:
        """Read the work of a recipe's update.

        Raises:
            UsageError: Its algorithm samples no rollouts.
        """
        if recipe.algorithm not in ("ppo", "grpo", "rloo"):
            raise UsageError(
                f"algorithm: {recipe.algorithm} has no rollouts to share between workers",
                expected="ppo, grpo or rloo",
            )
        args = trainer_configs.build(recipe, Path("plan"), stage_names(recipe.algorithm)).policy
        window = int(args.gradient_accumulation_steps)
        longest = recipe.data.max_prompt_tokens + ppo_stage.completion_limit(
            recipe, recipe.algorithm
        )
        return cls(
            episodes=int(args.generation_batch_size),
            steps=int(args.steps_per_generation * args.num_iterations) // window,
            micro_batches=window,
            micro_rows=int(args.per_device_train_batch_size),
            tokens=longest,
        )

    def times(self, factor: int) -> Work:
        """Return the work with batches so many times as large."""
        rows = {"episodes": self.episodes * factor, "micro_rows": self.micro_rows * factor}
        return Work(**{**self.__dict__, **rows})


@dataclass(frozen=True)
class Parts:
    """Seconds measured on one worker: rollout, score, and one micro-batch of the update."""

    rollout: Part
    score: Part
    micro: Part
    updates: int

    @classmethod
    def measure(cls, runs: Sequence[Record], recipe: Recipe) -> Parts:
        """Read the seconds per phase from the logs of runs.

        With runs of several batch sizes, seconds are a fixed part and a part per row, by least
        squares; with one, all are per row. The first update of each run warms up.

        Raises:
            UsageError: A run has no such log, or another model or LoRA than the recipe.
        """
        points: dict[str, list[tuple[int, float, float]]] = {name: [] for name in _PHASES}
        updates = 0
        for run in runs:
            own = run.recipe()
            _check_same(run, own, recipe)
            lines = phases(run)
            work, updates = Work.of(own), updates + len(lines)
            for name in _PHASES:
                many = work.steps * work.micro_batches if name == "update" else 1
                rows = work.micro_rows if name == "update" else work.episodes
                seconds = [line[name] / many for line in lines]
                mean = statistics.fmean(seconds)
                # Of independent micro-batches: their sum varies less, by the root of their number.
                cv = statistics.stdev(seconds) / mean * math.sqrt(many) if mean else 0.0
                points[name].append((rows, mean, cv))
        rollout, score, micro = (_fit(points[name]) for name in _PHASES)
        return cls(rollout, score, micro, updates)


def phases(run: Record) -> list[dict[str, float]]:
    """Return the seconds of each phase in every update of a run after the first, which warms up.

    Raises:
        UsageError: There are not two of them.
    """
    clocks = (line.get("clock", {}).get("phases", {}) for line in run.metrics(run.algorithm))
    lines = [line for line in list(clocks)[1:] if set(_PHASES) <= line.keys()]
    if len(lines) < 2:
        raise UsageError(
            f"{run.folder} has no seconds per phase for two updates after the first",
            remedy="run its recipe again with this version into a new --out",
        )
    return lines


_MEASURED = ("data.max_prompt_tokens", "ppo.args.max_completion_length", "ppo.value", "ppo.reward")
"""Keys that change the seconds of a row."""


def _check_same(run: Record, own: Recipe, recipe: Recipe) -> None:
    if (processes := run.data["clock"].get("processes", 1)) != 1:
        raise UsageError(
            f"{run.folder} was made by {processes} processes",
            expected="the seconds of one worker",
            remedy="measure with a short run in one process",
        )
    sections = ("model", "lora", "algorithm", "threads")
    for key, was, now in differences(own, recipe):
        same = key.split(".")[0] in sections or key in _MEASURED
        if same and key != "model.hub_id":
            raise UsageError(
                f"{run.folder} was measured with {key} {was!r}, and the recipe has {now!r}",
                expected="the same model, LoRA, algorithm, lengths and threads",
                remedy="measure with a short run of this recipe: --set ppo.updates=10",
            )


def _fit(points: Sequence[tuple[int, float, float]]) -> Part:
    rows, seconds, cvs = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    cv = float(cvs.mean())
    if len(set(rows)) > 1:
        per_row, fixed = np.polyfit(rows, seconds, 1)
        if fixed > 0 and per_row > 0:
            return Part(float(fixed), float(per_row), cv)
        if per_row <= 0:
            return Part(float(seconds.mean()), 0.0, cv)
    return Part(0.0, float((rows @ seconds) / (rows @ rows)), cv)


@lru_cache(maxsize=256)
def expected_maximum(workers: int) -> float:
    """Return the expected maximum of so many independent standard normal numbers."""
    x = np.linspace(-8.0, 8.0, 4001)
    below = np.array([NormalDist().cdf(v) for v in x]) ** (workers - 1)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return float(np.trapezoid(x * workers * density * below, x))


@dataclass(frozen=True)
class Point:
    """Seconds of one update on some workers, by cause; `gradients` and `rows` are their bytes."""

    workers: int
    episodes: int
    compute: float
    stragglers: float
    gradients: float
    rows: float
    latency: float

    @property
    def seconds(self) -> float:
        """The whole update."""
        return self.compute + self.stragglers + self.gradients + self.rows + self.latency


def point(parts: Parts, work: Work, exchanged: float, workers: int, network: Network) -> Point:
    """Return an update's time on so many workers that share the rows of `work`.

    Args:
        exchanged: Bytes of the gradients of one optimizer step.
    """
    many, worst = work.steps * work.micro_batches, expected_maximum(workers)
    sections = [
        (1, parts.rollout, math.ceil(work.episodes / workers)),
        (1, parts.score, math.ceil(work.episodes / workers)),
    ]
    compute = sum(times * part.seconds(rows) for times, part, rows in sections)
    waiting = sum(times * part.seconds(rows) * part.cv * worst for times, part, rows in sections)
    micro = parts.micro.seconds(math.ceil(work.micro_rows / workers))
    compute += many * micro
    # Micro-batches of one step are summed before the wait.
    waiting += work.steps * math.sqrt(work.micro_batches) * micro * parts.micro.cv * worst
    transfer, latency = network.all_reduce(exchanged, workers)
    rows = 8 * TOKEN * work.episodes * work.tokens * (workers - 1) / workers / network.bits
    small = network.around(workers, SMALL * many) if workers > 1 else 0.0
    return Point(
        workers,
        work.episodes,
        compute,
        waiting if workers > 1 else 0.0,
        work.steps * transfer,
        rows,
        work.steps * latency + small,
    )


@dataclass(frozen=True)
class Scale:
    """The curve of a recipe: its own batch, and a batch that grows with the workers."""

    parts: Parts
    work: Work
    network: Network
    trained: int
    whole: int
    workers: int

    def curve(self, *, grown: bool, full: bool = False) -> list[Point]:
        """Return the points at powers of two, and at the number that was asked for.

        Args:
            grown: Whether the batch is `workers` times the recipe's.
            full: Whether all parameters are exchanged, as in full fine-tuning.
        """
        counts = [2**i for i in range(self.workers.bit_length())]
        counts += [] if self.workers in counts else [self.workers]
        if not grown:
            counts = [n for n in counts if self.work.micro_rows % n == 0]
        sent = NUMBER * (self.whole if full else self.trained)
        return [
            point(self.parts, self.work.times(n) if grown else self.work, sent, n, self.network)
            for n in counts
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the inputs and curves for machines."""
        curves = {
            name: [vars(p) | {"seconds": p.seconds} for p in self.curve(**options)]
            for name, options in _CURVES.items()
        }
        inputs = {name: vars(getattr(self.parts, name)) for name in ("rollout", "score", "micro")}
        return {
            "parts": inputs | {"updates": self.parts.updates},
            "work": vars(self.work),
            "network": vars(self.network),
            "exchanged_bytes": NUMBER * self.trained,
            "exchanged_bytes_full": NUMBER * self.whole,
            "curves": curves,
        }

    def lines(self) -> Iterator[str]:
        """Return the curve for people."""
        bits, latency = self.network.bits / 1e9, 1e3 * self.network.latency
        own, all_of_it = (format_bytes(NUMBER * n) for n in (self.trained, self.whole))
        yield (
            f"modelled from {self.parts.updates} measured updates, for {self.work.episodes} "
            f"episodes in {self.work.steps} optimizer steps, {bits:g} Gbit/s and {latency:g} ms"
        )
        yield f"exchanged per step in float32: {own} of adapters and heads; {all_of_it} of all"
        for grown in (False, True):
            points = self.curve(grown=grown)
            yield ""
            yield (
                "a batch that grows with the workers:"
                if grown
                else f"the recipe's batch, as far as its {self.work.micro_rows} rows can be shared:"
            )
            full = self.curve(grown=grown, full=True)
            yield from aligned(*table(points, full))
            yield bend(points)


_CURVES = {
    "recipe_batch": {"grown": False}, "grown_batch": {"grown": True},
    "grown_batch_full": {"grown": True, "full": True},
}  # fmt: skip


def efficiencies(points: Sequence[Point]) -> list[float]:
    """Return the episodes per second and worker, as a share of those of one worker."""
    first = points[0].episodes / points[0].seconds
    return [p.episodes / p.seconds / p.workers / first for p in points]


def table(points: Sequence[Point], full: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a curve, with full fine-tuning's exchange beside it."""
    rows = [
        [
            str(p.workers),
            *(f"{x:.4g}" for x in (p.compute, p.stragglers, p.gradients, p.rows, p.latency)),
            f"{p.seconds:.4g}",
            f"{p.episodes / p.seconds:.4g}",
            f"{100 * share:.0f} %",
            f"{other.seconds:.4g}",
            f"{100 * theirs:.0f} %",
        ]
        for p, share, other, theirs in zip(
            points, efficiencies(points), full, efficiencies(full), strict=True
        )
    ]
    head = ["workers", "compute, s", "stragglers, s", "gradients, s", "rows, s", "latency, s"]
    return [*head, "update, s", "episodes/s", "efficiency", "all parameters, s", "efficiency"], rows


def bend(points: Sequence[Point]) -> str:
    """Say from how many workers on the efficiency is low, and what costs most there."""
    for p, share in zip(points, efficiencies(points), strict=True):
        if share < BEND:
            lost = {
                "waiting for the slowest": p.stragglers,
                "the bytes of gradients": p.gradients,
                "the bytes of sampled rows": p.rows,
                "latency of the ring": p.latency,
                "what does not shrink with the rows": p.compute
                - points[0].compute * p.episodes / points[0].episodes / p.workers,
            }
            most = max(lost, key=lambda name: lost[name])
            return f"below {100 * BEND:.0f} % from {p.workers} workers on, mostly by {most}"
    return f"above {100 * BEND:.0f} % up to {points[-1].workers} workers"


def model(
    config: Any, recipe: Recipe, plan: Plan, runs: Sequence[str | Path], workers: int, link: Network
) -> Scale:
    """Model a recipe on workers, with the seconds of runs.

    Args:
        config: Config of the base.
        plan: The recipe's plan, for the size of its adapters.

    Raises:
        UsageError: There is no run, or it does not fit the recipe.
    """
    if workers < 1:
        raise UsageError(f"--workers {workers}", expected="1 or more")
    work = Work.of(recipe)
    if not runs:
        raise UsageError(
            "--workers needs measured seconds",
            expected="--from RUN, a run of this recipe's model; several with other batch sizes",
        )
    parts = Parts.measure([Record.read(run) for run in runs], recipe)
    return Scale(parts, work, link, *exchanged(config, recipe, plan), workers)


def exchanged(config: Any, recipe: Recipe, plan: Plan) -> tuple[int, int]:
    """Return the parameters whose gradients are exchanged, and those of full fine-tuning.

    Full fine-tuning trains the policy and, for PPO with a value of its own, a second model.
    """
    adapter = plan.roles["policy"] // 4
    head = int(config.get_text_config().hidden_size) + 1  # with its bias
    value = {"adapter": adapter + head, "head": head}[recipe.ppo.value]
    of_value = recipe.algorithm == "ppo"
    models = 1 + (of_value and recipe.ppo.value == "adapter")
    return adapter + of_value * value, models * meta_backbone.parameters(config)
