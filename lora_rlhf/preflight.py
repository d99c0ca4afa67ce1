# SPDX-License-Identifier: Apache-2.0
"""What a run is refused for before a folder is made, a model loaded or a stage begun."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lora_rlhf.algorithms import best_of_n, trainer_configs
from lora_rlhf.algorithms.trainer_configs import TrainerConfigs
from lora_rlhf.errors import DataError, RecipeError, SetupError
from lora_rlhf.recipe import trl_args
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import ALGORITHMS, READS, has_reward_model
from lora_rlhf.runs.record import Record
from lora_rlhf.training import trl_config

_PROCESSES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are; accelerate would join them."""


def setup(recipe: Recipe) -> None:
    """Refuse what cannot end well, before a folder is made or a model loaded.

    Raises:
        SetupError: Several processes.
        RecipeError: `hub:` names a repository for an adapter that this run will not have.
    """
    for name in _PROCESSES:
        if (count := os.environ.get(name, "1")) not in ("", "0", "1"):
            raise SetupError(
                f"this is one of {count} processes ({name})",
                expected="one process: all roles share one backbone on one GPU",
                remedy="start `lora-rlhf` itself, without torchrun, accelerate launch or mpirun",
            )
    made = {"best_of_n": set(), "ppo": {"policy", "value"}}.get(recipe.algorithm, {"policy"})
    made -= {"value"} if recipe.ppo.value == "head" else set()
    for role in ("policy", "value"):
        if getattr(recipe.hub, role) and role not in made:
            raise RecipeError(
                f"hub.{role} is set, and {ALGORITHMS[recipe.algorithm]} trains no {role} adapter",
                remedy=f"leave it out, or --set hub.{role}=null",
            )


def every_argument(recipe: Recipe, out: str | Path) -> TrainerConfigs:
    """Build every stage's TRL config before a folder is made or the backbone loaded.

    Raises:
        RecipeError: `args:` of a stage, or `report_to`, cannot be what they say.
        SetupError: A tracker is not installed.
    """
    trl_args.check(recipe)
    trl_config.check_trackers(recipe.report_to)
    if recipe.algorithm == "best_of_n":
        best_of_n.check(recipe)
    return trainer_configs.build(recipe, Path(out))


def finished(recipe: Recipe, record: Record, stage: str) -> bool:
    """Whether a stage need not run; a reward model that was not needed may be needed now."""
    needed = stage == "reward" and has_reward_model(recipe)
    return record.done(stage) and not (needed and "skipped" in record.data["stages"][stage])


def same_data(record: Record, name: str, report: dict[str, Any]) -> None:
    """Refuse a set that is no longer what the finished stages that read it were made with.

    Args:
        report: What data.py says of it now.

    Raises:
        DataError: The data changed in between.
    """
    before = record.data["data"].get(name, {})
    parts = {name: (before, report, READS[name])}
    if "evaluate" in before or "evaluate" in report:  # every set leaves its prompts out
        parts["evaluate"] = (
            before.get("evaluate", {}),
            report.get("evaluate", {}),
            ("sft", "reward", *ALGORITHMS, "evaluate"),
        )
    for part, (was, now, readers) in parts.items():
        stage = next((s for s in readers if record.done(s)), None)
        if before and stage and _fingerprints(was) != _fingerprints(now):
            raise DataError(
                f"data.{part} is not what it was: it has changed since {stage}, which read it",
                expected="the same rows, by their sha256 in record.json",
                remedy="put the data back as they were, or give another --out",
            )


def _fingerprints(report: dict[str, Any]) -> list[Any]:
    return [source.get("sha256") for source in report.get("sources", [])]
