# SPDX-License-Identifier: Apache-2.0
"""Finished stages, reused in the same run or copied: `lora-rlhf run RECIPE --out B --from A`.

SFT and the reward model are the expensive part that runs with other algorithms (or settings) share.
They are copied only if every recipe key that they read is equal, so that run B ends with the same
bits as it would without run A.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lora_rlhf.errors import AdapterError, DataError, UsageError
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import ALGORITHMS, READS, differences, first_reader
from lora_rlhf.runtime.environment import changed_versions

from .disk import sha256
from .record import Record

_SHARED = ("sft", "reward")
_DATA = {"sft": ("demonstrations",), "reward": ("comparisons", "comparisons_held_out_model")}
"""Stage -> the sets that only it reads; a later stage reads the others itself."""


def check_data(record: Record, name: str, report: dict[str, Any]) -> None:
    """Refuse a dataset that has changed since a finished stage read it.

    Args:
        report: The dataset's report now.

    Raises:
        DataError: Its sources have other hashes.
    """
    before = record.data["data"].get(name, {})
    parts = {name: (before, report, READS[name])}
    if "evaluate" in before or "evaluate" in report:  # every set leaves its prompts out
        readers = ("sft", "reward", *ALGORITHMS, "evaluate")
        parts["evaluate"] = before.get("evaluate", {}), report.get("evaluate", {}), readers
    for part, (old, new, readers) in parts.items():
        stage = next((s for s in readers if record.done(s)), None)
        if before and stage and _fingerprints(old) != _fingerprints(new):
            raise DataError(
                f"data.{part} has changed since {stage}, which read it",
                expected="the same rows, by their sha256 in record.json",
                remedy="restore the data, or give another --out",
            )


def _fingerprints(report: dict[str, Any]) -> list[Any]:
    return [source.get("sha256") for source in report.get("sources", [])]


def check(source: str | Path, recipe: Recipe, out: str | Path) -> Record:
    """Read the record of run A, from which a new run of `recipe` in `out` may copy stages.

    Raises:
        UsageError: A is no run or has no finished stage, a key that its stages read differs, or
            `out` holds a run that did not start from A.
    """
    other = Record.read(source)
    if not other.done("sft"):
        raise UsageError(f"{source} has no finished stage to start from", remedy="leave --from out")
    if (Path(out) / "record.json").exists():
        sft = Record.read(out).data["stages"].get("sft", {})
        if sft.get("adapter_sha256") != other.data["stages"]["sft"]["adapter_sha256"]:
            raise UsageError(
                f"{out} holds a run that did not start from {source}",
                remedy="give another --out, or leave --from out to continue it",
            )
    wrong = [
        f"  {key}: {was!r} -> {now!r} (read by {stage})"
        for key, was, now in differences(other.recipe(), recipe)
        if key != "name"
        and (stage := first_reader(key, recipe.algorithm)) in _SHARED
        and other.done(str(stage))
    ]
    if wrong:
        raise UsageError(
            f"cannot start from {source}: its stages read other values:\n" + "\n".join(wrong),
            expected="a recipe that differs only in what later stages read",
            remedy="leave --from out, or give those keys the values of that run",
        )
    return other


def copy_stages(other: Record, record: Record) -> list[str]:
    """Copy the finished SFT and reward stages of another run into a new one.

    Adapters, entries, data reports, log lines and times come along; `stages.STAGE.from_run` names
    the run and the sha256 of its record, and no folder of this machine.

    Returns:
        The names of the copied stages.

    Raises:
        AdapterError: An adapter of the other run does not match its record.
    """
    stages = {  # a reward stage with nothing to do (gold, no comparisons) left no adapter
        s: other.data["stages"][s]
        for s in _SHARED
        if other.done(s) and not record.done(s) and "adapter_sha256" in other.data["stages"][s]
    }
    for stage, entry in stages.items():
        path = other.adapter(stage) / "adapter_model.safetensors"
        if not path.is_file() or sha256(path) != entry["adapter_sha256"]:
            raise AdapterError(
                f"{path} does not match the record of that run",
                expected=f"sha256 {entry['adapter_sha256']}",
                remedy="was the folder changed? Leave --from out to train the stage again",
            )
    origin = {"name": other.data["name"], "record_sha256": sha256(other.folder / "record.json")}
    lines = other.metrics()
    for stage, entry in stages.items():
        for folder in _adapters(other, stage):
            target = record.adapter(folder.name)
            shutil.rmtree(target, ignore_errors=True)
            # Without the card: that of the new run is written at its end.
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns("README.md"))
        for name in _DATA[stage]:
            if name in other.data["data"]:
                record.data["data"][name] = other.data["data"][name]
        for line in lines:
            if _logged_by(stage, line["stage"]):
                metrics = {k: v for k, v in line.items() if k not in ("stage", "step", "clock")}
                record.log(line["stage"], line["step"], metrics, line.get("clock"))
        made_with = {**other.data["versions"], **entry.get("versions", {})}
        entry = {k: v for k, v in entry.items() if k not in ("from_run", "versions")}
        if changed := changed_versions(record.data["versions"], made_with):
            entry["versions"] = changed
        record.data["stages"][stage] = {**entry, "from_run": origin}
        if stage in other.data["clock"]["stages"]:
            record.data["clock"]["stages"][stage] = other.data["clock"]["stages"][stage]
    record.data["lora"] = record.data["lora"] or other.data["lora"]
    record.save()
    return list(stages)


def _logged_by(stage: str, name: str) -> bool:
    """Tell whether a log line is of the stage; every reward model logs under its own name."""
    if stage == "sft":
        return name == "sft"
    return name != "sft" and name not in ALGORITHMS


def _adapters(other: Record, stage: str) -> list[Path]:
    """List the folders that the stage left: adapters/sft, or those of all reward models."""
    folders = [p for p in sorted((other.folder / "adapters").iterdir()) if p.is_dir()]
    if stage == "sft":
        return [p for p in folders if p.name == "sft"]
    return [p for p in folders if p.name not in ("sft", "policy", "value")]
