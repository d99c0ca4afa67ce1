# SPDX-License-Identifier: Apache-2.0
"""Finished stages of one run, taken over by another: `lora-rlhf run RECIPE --out B --from A`.

SFT and the reward model are the dear part that runs of several algorithms (or settings) have in
common. They are taken over only where every recipe key that they read is equal, so that run B ends
with the same bits as it would without run A.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lora_rlhf.errors import AdapterError, UsageError
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import ALGORITHMS, differences, first_reader
from lora_rlhf.runtime.environment import changed_versions

from .disk import sha256
from .record import Record

_SHARED = ("sft", "reward")
_DATA = {"sft": ("demonstrations",), "reward": ("comparisons", "comparisons_held_out_model")}
"""Stage -> the sets that only it reads; a later stage reads the others itself."""


def check(source: str | Path, recipe: Recipe, out: str | Path) -> Record:
    """The record of run A, where a new run of `recipe` in `out` may take over its stages.

    Raises:
        UsageError: A is no run or has no finished stage, a key that its stages read differs, or
            `out` holds a run that did not start from A.
    """
    found = Record.read(source)
    if not found.done("sft"):
        raise UsageError(f"{source} has no finished stage to start from", remedy="leave --from out")
    if (Path(out) / "record.json").exists():
        there = Record.read(out).data["stages"].get("sft", {})
        if there.get("adapter_sha256") != found.data["stages"]["sft"]["adapter_sha256"]:
            raise UsageError(
                f"{out} holds a run that did not start from {source}",
                remedy="give another --out, or leave --from out to go on with it",
            )
    wrong = [
        f"  {key}: {was!r} -> {now!r} (read by {stage})"
        for key, was, now in differences(found.recipe(), recipe)
        if key != "name"
        and (stage := first_reader(key, recipe.algorithm)) in _SHARED
        and found.done(str(stage))
    ]
    if wrong:
        raise UsageError(
            f"{source} cannot be started from, its stages read other values:\n" + "\n".join(wrong),
            expected="a recipe that differs only in what later stages read",
            remedy="leave --from out, or give those keys the values of that run",
        )
    return found


def take_over(found: Record, record: Record) -> list[str]:
    """Copy the finished SFT and reward stages of `found` into the new run; returns their names.

    Adapters, entries, data reports, log lines and times come along; `stages.STAGE.from_run` names
    the run and the sha256 of its record, and no folder of this machine.

    Raises:
        AdapterError: An adapter of run A is not the one that its record speaks of.
    """
    taken = [s for s in _SHARED if found.done(s) and not record.done(s) and _has_adapter(found, s)]
    for stage in taken:
        _check_weights(found, stage)
    origin = {"name": found.data["name"], "record_sha256": sha256(found.folder / "record.json")}
    lines = found.metrics()
    for stage in taken:
        for folder in _adapters(found, stage):
            target = record.adapter(folder.name)
            shutil.rmtree(target, ignore_errors=True)
            # The card of run A is not the card of run B, which is written at its end.
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns("README.md"))
        for name in _DATA[stage]:
            if name in found.data["data"]:
                record.data["data"][name] = found.data["data"][name]
        for line in lines:
            if _logged_by(stage, line["stage"]):
                metrics = {k: v for k, v in line.items() if k not in ("stage", "step", "clock")}
                record.log(line["stage"], line["step"], metrics, line.get("clock"))
        entry = {k: v for k, v in found.data["stages"][stage].items() if k != "from_run"}
        made_with = {**found.data["versions"], **entry.pop("versions", {})}
        if other := changed_versions(record.data["versions"], made_with):
            entry["versions"] = other
        record.data["stages"][stage] = {**entry, "from_run": origin}
        if stage in found.data["clock"]["stages"]:
            record.data["clock"]["stages"][stage] = found.data["clock"]["stages"][stage]
    record.data["lora"] = record.data["lora"] or found.data["lora"]
    record.save()
    return taken


def _has_adapter(found: Record, stage: str) -> bool:
    """A reward stage that had nothing to do (gold, no comparisons) left nothing to take over."""
    return "adapter_sha256" in found.data["stages"][stage]


def _logged_by(stage: str, name: str) -> bool:
    """Whether a log line belongs to the stage; every reward model logs under a name of its own."""
    if stage == "sft":
        return name == "sft"
    return name != "sft" and name not in ALGORITHMS


def _adapters(found: Record, stage: str) -> list[Path]:
    """The folders that the stage left: adapters/sft, or those of all reward models."""
    later = {"sft", "policy", "value"}
    folders = [p for p in sorted((found.folder / "adapters").iterdir()) if p.is_dir()]
    return [p for p in folders if (p.name == "sft" if stage == "sft" else p.name not in later)]


def _check_weights(found: Record, stage: str) -> None:
    path = found.adapter(stage) / "adapter_model.safetensors"
    entry: dict[str, Any] = found.data["stages"][stage]
    if not path.is_file() or sha256(path) != entry["adapter_sha256"]:
        raise AdapterError(
            f"{path} is not the adapter that the record of that run speaks of",
            expected=f"sha256 {entry['adapter_sha256']}",
            remedy="was the folder changed? Leave --from out to train the stage again",
        )
