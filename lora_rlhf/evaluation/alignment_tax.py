# SPDX-License-Identifier: Apache-2.0
"""Alignment tax: tasks of lm-eval on the engine's base, its adapters switched and never reloaded.

What the policy lost on public tasks against SFT and base (2203.02155, section 4.2). lm-eval asks
and grades; its grades of each document are then compared in pairs, like any other metric.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lora_rlhf.errors import UsageError, first_line
from lora_rlhf.hub.targets import Target
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runtime import optional_packages

from .engine import Engine
from .metrics.metric import Metric
from .prompt_sets import Row
from .suite import LmEvalSection

_USER = "lm_eval of a suite"

Grades = dict[str, dict[str, list[float]]]
"""Task -> metric -> grade of each document, higher is better."""


def grades(engine: Engine, target: Target, section: LmEvalSection, seed: int) -> Grades:
    """Run lm-eval's tasks on a target.

    Raises:
        UsageError: A task is unknown, or its data cannot be read.
        SetupError: lm-eval is not installed.
    """
    lm_eval = optional_packages.load("lm_eval", _USER, "eval")
    models = optional_packages.load("lm_eval.models.huggingface", _USER, "eval")
    tasks = optional_packages.load("lm_eval.tasks", _USER, "eval")
    base = engine.base
    model = models.HFLM(
        pretrained=base.causal, tokenizer=base.tokenizer, batch_size=section.batch_size
    )
    try:
        with engine.active(target):
            made = lm_eval.simple_evaluate(
                model=model,
                tasks=list(section.tasks),
                num_fewshot=section.few_shot,
                limit=section.n,
                bootstrap_iters=0,
                log_samples=True,
                task_manager=tasks.TaskManager(
                    include_path=section.path, include_defaults=section.path is None
                ),
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except Exception as error:  # tasks are programs of their own
        raise UsageError(
            f"lm-eval cannot run {', '.join(section.tasks)}: {first_line(error)}",
            expected="lm-eval tasks whose data is on this machine or on the Hub",
            remedy="`lm-eval ls tasks` lists them; lm_eval.path names a folder with your own",
        ) from error
    return {task: _by_metric(made, task, samples) for task, samples in made["samples"].items()}


def digest(section: LmEvalSection) -> str:
    """Hash what grades depend on: lm-eval's version, own task files and the files beside them."""
    lm_eval = optional_packages.load("lm_eval", _USER, "eval")
    made = hashlib.sha256(str(lm_eval.__version__).encode())
    tasks = Path(section.path).rglob("*.yaml") if section.path else ()
    for path in sorted({file for task in tasks for file in task.parent.iterdir()}):
        if path.is_file():
            made.update(f"{path}\n{sha256(path)}\n".encode())
    return made.hexdigest()


def _by_metric(made: dict[str, Any], task: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collect the grades of the first filter, by metric, in the order of the documents."""
    better = made["higher_is_better"][task]
    first = [one for one in samples if one["filter"] == samples[0]["filter"]]
    first.sort(key=lambda one: one["doc_id"])
    return {
        name: [float(one[name]) for one in first]
        for name in first[0]["metrics"]
        if better.get(name) and isinstance(first[0][name], int | float)
    }


def metric_of(task: str, name: str) -> Metric:
    """Describe a metric of a task for a table."""
    meaning = f"{name} of lm-eval's task {task}, mean over documents"
    return Metric(f"{task} {name}", meaning, better="higher", share=False, source="lm-eval")


def rows_of(task: str, count: int) -> list[Row]:
    """Return rows for the documents of a task, which lm-eval numbers."""
    return [Row(str(i), "", task) for i in range(count)]
