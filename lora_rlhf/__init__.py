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
    from lora_rlhf.hub.publishing import push
    from lora_rlhf.models.backbone import Backbone
    from lora_rlhf.pipeline import run
    from lora_rlhf.recipe.loader import load_recipe
    from lora_rlhf.recipe.schema import Recipe
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
    "demo",
    "generate",
    "load",
    "load_recipe",
    "push",
    "run",
]

_HOMES = {
    "Backbone": "models.backbone",
    "LoraRlhfError": "errors",
    "Recipe": "recipe.schema",
    "Record": "runs.record",
    "generate": "serving.loaded_run",
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


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("lora-rlhf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
