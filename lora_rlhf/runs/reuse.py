# SPDX-License-Identifier: Apache-2.0
"""Finished stages, reused in the same run or copied: `lora-rlhf run RECIPE --out B --from A`.

SFT and the reward model are copied only if every recipe key that they read is equal, so that run B
ends with the same bits as without run A.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lora_rlhf.errors import AdapterError, DataError, UsageError
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import ALGORITHMS, READS, differences, first_reader, stage_of
from lora_rlhf.runtime.environment import changed_versions

from .disk import sha256
from .record import Record, is_run

_SHARED = ("sft", "reward")
_DATA = {"sft": ("demonstrations",), "reward": ("comparisons", "comparisons_held_out_model")}
"""Stage -> the sets that only this stage reads; the others are read again by later stages."""


def check_data(record: Record, name: str, report: dict[str, Any]) -> None:
    """Check by its new report that a dataset has not changed since a finished stage read it.

    Raises:
        DataError: The hashes of its sources differ.
    """
    before = record.data["data"].get(name, {})
    parts = {name: (before, report, READS[name])}
    if "evaluate" in before or "evaluate" in report:  # its prompts are removed from every set
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
    """Read the record of the run `source`, and check that a run of `recipe` may copy its stages.

    Raises:
        UsageError: `source` is not a run or has no finished stage, a key that its stages read
            differs, or `out` holds a run that did not start from it.
        DamageError: An adapter or the log of `source` is not as it wrote it.
    """
    other = Record.read(source)
    if not other.done("sft"):
        raise UsageError(f"{source} has no finished stage to start from", remedy="leave --from out")
    if is_run(Path(out)) and (sft := Record.read(out).data["stages"].get("sft")):
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
    for stage in _SHARED:
        for role in _roles(other, stage) if other.done(stage) else ():
            other.verified(f"adapters/{role}")
    other.metrics()
    return other


def copy_stages(other: Record, record: Record) -> list[str]:
    """Copy the finished SFT and reward stages of another run into a new one; return their names.

    Adapters, entries, data reports, log lines and times are copied; `stages.STAGE.from_run` holds
    the name of the other run and the sha256 of its record, but no local path.

    Raises:
        AdapterError: An adapter of the other run does not match its record.
        DamageError: Another file of that adapter, or the log, does not.
    """
    stages = {  # a skipped reward stage (gold reward, no comparisons) has no adapter
        s: other.data["stages"][s]
        for s in _SHARED
        if other.done(s) and not record.done(s) and "adapter_sha256" in other.data["stages"][s]
    }
    for stage, entry in stages.items():
        for role in _roles(other, stage):
            other.verified(f"adapters/{role}")
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
        for role in _roles(other, stage):
            target = record.adapter(role)
            shutil.rmtree(target, ignore_errors=True)
            # The card is left out: the new run writes its own at the end.
            ignored = shutil.ignore_patterns("README.md")
            shutil.copytree(other.adapter(role), target, ignore=ignored)
            record.verified(f"adapters/{role}")
        for name in _DATA[stage]:
            if name in other.data["data"]:
                record.data["data"][name] = other.data["data"][name]
        copied = [line for line in lines if stage_of(line["stage"]) == stage]
        for training in {line["stage"] for line in copied}:
            record.truncate_log(training)  # of a copy that was killed before the record was saved
        for line in copied:
            metrics = {k: v for k, v in line.items() if k not in ("stage", "step", "clock")}
            record.log(line["stage"], line["step"], metrics, line.get("clock"))
        made_with = {**other.data["versions"], **entry.get("versions", {})}
        entry = {k: v for k, v in entry.items() if k not in ("from_run", "versions")}
        if changed := changed_versions(record.data["versions"], made_with):
            entry["versions"] = changed
        record.data["stages"][stage] = {**entry, "from_run": origin}
        record.note_log(stage)
        if stage in other.data["clock"]["stages"]:
            record.data["clock"]["stages"][stage] = other.data["clock"]["stages"][stage]
    record.data["lora"] = record.data["lora"] or other.data["lora"]
    record.save()
    return list(stages)


def _roles(record: Record, stage: str) -> list[str]:
    """List the adapters that a finished SFT or reward stage of a run made."""
    listed = record.data["stages"][stage].get("files")
    if listed is None:  # by an earlier version
        listed = [
            p.relative_to(record.folder).as_posix() for p in record.folder.glob("adapters/*/*")
        ]
    names = sorted({name.split("/")[1] for name in listed} - {"policy", "value"})
    return [name for name in names if stage_of(name) == stage and not name.endswith(".tmp")]
