# SPDX-License-Identifier: Apache-2.0
"""InstructGPT-style RLHF on one consumer GPU: SFT, reward model and PPO as LoRA on one backbone.

recipe = lora_rlhf.load_recipe("recipe.yaml", ["ppo.updates=50"])
record = lora_rlhf.run(recipe, "runs/mine")
answers = lora_rlhf.generate("runs/mine", "What is in the box?")

Nothing heavy is imported before a name is used: `import lora_rlhf` does not load torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_rlhf.errors import LoraRlhfError
    from lora_rlhf.evaluation.evaluate_targets import evaluate_targets
    from lora_rlhf.feedback.notebook import label
    from lora_rlhf.hub.publishing import push
    from lora_rlhf.models.backbone import Backbone
    from lora_rlhf.pipeline import run
    from lora_rlhf.planning.plan_report import Report
    from lora_rlhf.recipe.loader import load_recipe
    from lora_rlhf.recipe.schema import Recipe
    from lora_rlhf.reports.doctor.findings import Finding
    from lora_rlhf.runs.progress import Progress
    from lora_rlhf.runs.record import Record
    from lora_rlhf.serving.loaded_run import generate, load

    __version__: str

__all__ = [
    "Backbone",
    "LoraRlhfError",
    "Recipe",
    "Record",
    "__version__",
    "card",
    "compare",
    "demo",
    "doctor",
    "evaluate",
    "evaluate_targets",
    "generate",
    "label",
    "load",
    "load_recipe",
    "plan",
    "push",
    "run",
]

_HOMES = {
    "Backbone": "models.backbone",
    "LoraRlhfError": "errors",
    "Recipe": "recipe.schema",
    "Record": "runs.record",
    "evaluate_targets": "evaluation.evaluate_targets",
    "generate": "serving.loaded_run",
    "label": "feedback.notebook",
    "load": "serving.loaded_run",
    "load_recipe": "recipe.loader",
    "push": "hub.publishing",
    "run": "pipeline",
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


def plan(recipe: Recipe, gpu: str | None = None, *, probe: bool = False) -> Report:
    """Plan the memory of a recipe for a GPU such as "16GB"; `as_text()` of the result prints it."""
    from lora_rlhf.planning import plan_report

    return plan_report.report(recipe, Path(), gpu, probe=probe)


def compare(*runs: str | Path) -> dict[str, Any]:
    """Compare finished runs: their metrics as `rows`, paired `differences`, and `notes`."""
    from lora_rlhf.reports import compare

    return compare.run([Path(run) for run in runs])


def doctor(run: str | Path) -> list[Finding]:
    """Return what is wrong or doubtful in a run, the stage at fault first."""
    from lora_rlhf.reports.doctor import doctor
    from lora_rlhf.runs.record import Record

    return doctor.examine(Record.read(run))


def card(run: str | Path) -> list[Path]:
    """Write the cards of a run again, from its record alone; return their paths."""
    from lora_rlhf.reports.cards import model_card

    return model_card.rewrite(run)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("lora-rlhf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
