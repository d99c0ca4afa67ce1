# SPDX-License-Identifier: Apache-2.0
"""InstructGPT-style RLHF on one consumer GPU: SFT, reward model and PPO as LoRA on one backbone.

recipe = lora_rlhf.load_recipe("recipe.yaml", ["ppo.updates=50"])
record = lora_rlhf.run(recipe, "runs/mine")
answers = lora_rlhf.generate("runs/mine", "What is in the box?")

Nothing heavy is imported before a name is used: `import lora_rlhf` does not load torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lora_rlhf.errors import LoraRlhfError
    from lora_rlhf.evaluation.evaluate_targets import evaluate_targets
    from lora_rlhf.exports.export_run import export
    from lora_rlhf.feedback.labels import Task
    from lora_rlhf.feedback.notebook import label
    from lora_rlhf.hub.publishing import push
    from lora_rlhf.hub.pulling import pull
    from lora_rlhf.models.backbone import Backbone
    from lora_rlhf.pipeline import run
    from lora_rlhf.planning.plan_report import Report
    from lora_rlhf.recipe.loader import load_recipe
    from lora_rlhf.recipe.schema import Recipe
    from lora_rlhf.reports.doctor.findings import Finding
    from lora_rlhf.runs.progress import Progress
    from lora_rlhf.runs.record import Record
    from lora_rlhf.serving.api_server import serve
    from lora_rlhf.serving.chat import chat
    from lora_rlhf.serving.grounding import ground
    from lora_rlhf.serving.instructions import do
    from lora_rlhf.serving.loaded_run import generate, load
    from lora_rlhf.serving.scoring_files import score
    from lora_rlhf.starting.data_view import show_data
    from lora_rlhf.starting.first_recipe import init
    from lora_rlhf.sweeps import sweep

    __version__: str

__all__ = [
    "Backbone",
    "LoraRlhfError",
    "Recipe",
    "Record",
    "__version__",
    "card",
    "chat",
    "compare",
    "demo",
    "do",
    "doctor",
    "evaluate",
    "evaluate_targets",
    "export",
    "generate",
    "ground",
    "init",
    "iterate",
    "label",
    "lint_card",
    "load",
    "load_recipe",
    "moderate",
    "plan",
    "pull",
    "push",
    "run",
    "score",
    "serve",
    "show_data",
    "sweep",
    "tasks",
    "usage",
]

_HOMES = {
    "Backbone": "models.backbone",
    "LoraRlhfError": "errors",
    "Recipe": "recipe.schema",
    "Record": "runs.record",
    "chat": "serving.chat",
    "do": "serving.instructions",
    "evaluate_targets": "evaluation.evaluate_targets",
    "export": "exports.export_run",
    "generate": "serving.loaded_run",
    "ground": "serving.grounding",
    "init": "starting.first_recipe",
    "label": "feedback.notebook",
    "load": "serving.loaded_run",
    "load_recipe": "recipe.loader",
    "pull": "hub.pulling",
    "moderate": "serving.moderation",
    "push": "hub.publishing",
    "run": "pipeline",
    "score": "serving.scoring_files",
    "serve": "serving.api_server",
    "show_data": "starting.data_view",
    "sweep": "sweeps",
}
"""Public name -> the module that defines it."""


def demo(
    out: str | Path = "runs/demo", *, seed: int = 0, progress: Progress | None = None
) -> Record:
    """Run the packaged recipe, the whole pipeline on the tiny model, offline; return the record."""
    from lora_rlhf import pipeline, tiny
    from lora_rlhf.recipe import loader

    recipe = loader.load_recipe(tiny.recipe(), [f"seed={seed}"])
    return pipeline.run(recipe, out, progress=progress)


def evaluate(recipe: Recipe, out: str | Path, *, progress: Progress | None = None) -> Record:
    """Run a recipe up to the evaluation, or evaluate the run in `out`; return the record."""
    from lora_rlhf import pipeline

    return pipeline.run(recipe, out, until="evaluate", progress=progress)


def plan(
    recipe: Recipe,
    gpu: str | None = None,
    *,
    gpus: str | None = None,
    probe: bool = False,
    workers: int | None = None,
    network: tuple[str, str] = ("1Gbit", "0.1ms"),
    runs: Sequence[str | Path] = (),
) -> Report:
    """Plan the memory of a recipe for a GPU such as "16GB"; `as_text()` of the result prints it.

    Args:
        gpus: Several equal GPUs in place of one, such as "2x24GB", with a process on each.
        workers: Also model an update's time on up to so many workers, each with a link of this
            `network` (speed, latency), from the measured seconds of `runs`.
    """
    from lora_rlhf.planning import plan_report

    more: dict[str, Any] = {"gpus": gpus, "workers": workers, "network": network, "runs": runs}
    return plan_report.report(recipe, Path(), gpu, probe=probe, **more)


def compare(*runs: str | Path | Sequence[str | Path]) -> dict[str, Any]:
    """Compare finished runs: their metrics as `rows`, paired `differences`, and `notes`."""
    from lora_rlhf.reports import compare

    return compare.run([Path(run) for given in runs for run in _each(given)])


def _each(given: Any) -> Sequence[Any]:
    return given if isinstance(given, list | tuple) else [given]


def doctor(run: str | Path) -> list[Finding]:
    """Return what is wrong or doubtful in a run, the stage at fault first."""
    from lora_rlhf.reports.doctor import doctor
    from lora_rlhf.runs.record import Record

    return doctor.examine(Record.read(run))


def lint_card(path: str | Path) -> list[str]:
    """Return the faults of a model card, each as `file:line: what`."""
    from lora_rlhf.reports.cards import card_lint

    return card_lint.lint(path)


def card(run: str | Path) -> list[Path]:
    """Write the cards of a run again, from its record alone; return their paths."""
    from lora_rlhf.reports.cards import model_card

    return model_card.rewrite(run)


def tasks(
    run: str | Path,
    out: str | Path = "tasks.jsonl",
    *,
    strategy: str = "random",
    n: int = 100,
    k: int = 4,
    model: str = "sft",
    pool: int | None = None,
    seed: int = 0,
    report: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Task]:
    """Write n tasks for labelers: k answers of a run's model to prompts that a strategy chooses.

    Args:
        strategy: random, disagreement, highest_reward, failures or novelty.
        model: sft or policy.
        pool: Prompts among which the strategy chooses; default: 4 times n.
        report: Folder of an evaluation's report.json, for the strategy failures.
    """
    from lora_rlhf.feedback import task_choice
    from lora_rlhf.runs.record import Record

    say = progress.say if progress else lambda line: None
    failed = report and task_choice.failures(Record.read(run), model, Path(report))
    choice = task_choice.Choice(strategy, n, k, model, pool, seed)
    return task_choice.make(run, choice, Path(out), failed=failed or None, say=say)


def iterate(
    run: str | Path,
    out: str | Path | None = None,
    *,
    labels: str | None = None,
    strategy: str = "random",
    n: int = 100,
    k: int = 4,
    model: str = "policy",
    start: Literal["sft", "policy"] = "sft",
    pool: int | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Record | None:
    """Make the next round of a run: tasks, labels, reward model, policy; return its record.

    The same call goes on where it was. None: the tasks in `out` wait for labels.

    Args:
        out: Folder of the round; default: RUN-round-NUMBER.
        labels: A labelling project, a file of comparisons, or `simulated`.
        start: Model from which the policy goes on.
        overrides: `key=value` changes of the recipe. The others are those of `tasks`.
    """
    from lora_rlhf import pipeline
    from lora_rlhf.feedback import rounds, task_choice
    from lora_rlhf.reports import rich_displays

    choice = task_choice.Choice(strategy, n, k, model, pool, seed)
    request = rounds.Round(choice, labels, start, overrides)
    place = Path(out) if out else rounds.next_folder(rounds.find_run(Path(run)))
    return rounds.iterate(
        Path(run), place, request, pipeline.run, progress or rich_displays.progress()
    )


def usage(
    path: str | Path = "lora-rlhf-usage.sqlite", compare: Sequence[str] | None = None
) -> dict[str, Any]:
    """Report the use of models from the file of chat, do and serve: `groups`, `differences`."""
    from lora_rlhf.serving import usage_report

    return usage_report.report(path, compare)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("lora-rlhf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "IPython" in sys.modules:
    _displays = importlib.import_module(".reports.rich_displays", __name__)
    _displays.register(plan="lora_rlhf.planning.plan_report")


def __dir__() -> list[str]:
    return sorted(__all__)
