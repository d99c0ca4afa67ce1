# SPDX-License-Identifier: Apache-2.0
"""A record that is lost, with its copy: rebuilt from the recipe, the adapters and the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_rlhf.errors import DamageError, LoraRlhfError, RecipeError, UsageError
from lora_rlhf.recipe.loader import parse_recipe
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import has_reward_model, stage_of, stage_of_role
from lora_rlhf.runtime.paths import reject_escaping_links

from .disk import BACKUP, sha256
from .record import Record, blank, is_run
from .run_lock import locked

UNKNOWN = (
    "versions", "times and host", "data of finished stages", "results of their training",
    "where copied stages come from", "pushes",
)  # fmt: skip
"""What only the lost record held."""


def rebuild(folder: str | Path) -> Record:
    """Write a new record of a run: stages whose adapters are whole count as done.

    The files are taken as they are, because their hashes were in the lost record. The evaluation is
    not rebuilt, because `run` can repeat it.

    Raises:
        UsageError: The record is not damaged, or the folder is no run.
        DamageError: The recipe is damaged too, or no adapter is whole.
    """
    folder = Path(folder)
    reject_escaping_links(folder, UsageError)
    if is_run(folder):
        try:
            Record.read(folder)
        except LoraRlhfError:
            pass
        else:
            raise UsageError(
                f"{folder / 'record.json'} or its copy can be read",
                remedy="leave --rebuild-record out",
            )
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", expected="the --out of a `lora-rlhf run`")
    with locked(folder):
        recipe, text = _recipe(folder)
        record = Record(folder, blank(recipe, text))
        record.data["rebuilt"] = {"unknown": list(UNKNOWN)}
        record.data["clock"] |= {"started": None, "host": {}}
        stages = ("sft", "reward", recipe.algorithm)
        for stage in stages:
            entry = _stage(record, recipe, stage)
            if entry is None:
                break
            record.data["stages"][stage] = {"status": "done", **entry}
            record.note_log(stage)
        if "sft" not in record.data["stages"]:
            raise DamageError(
                f"{folder} holds no whole adapter of SFT",
                remedy="run the recipe into a new --out",
            )
        check = _json(folder / "adapters/sft/check.json")
        record.data["model"] = {
            "id": recipe.model.id,
            "fingerprint": check["base_fingerprint"],
            **{key: check[key] for key in ("dtype", "load_in_4bit")},
        }
        record.save()
    return record


def _recipe(folder: Path) -> tuple[Recipe, str]:
    """Read the recipe or its copy."""
    wrong: Exception | None = None
    for name in ("recipe.yaml", "recipe.yaml" + BACKUP):
        try:
            text = (folder / name).read_bytes().decode().strip("\0")
            return parse_recipe(text, str(folder / name), until=""), text
        except (OSError, ValueError, RecipeError) as error:
            wrong = wrong or error
    raise DamageError(
        f"{folder / 'recipe.yaml'} and its copy cannot be read: {wrong}",
        expected="the recipe of the run, from which its record is rebuilt",
        remedy="restore recipe.yaml, such as the recipe that the run was started with",
    )


def _stage(record: Record, recipe: Recipe, stage: str) -> dict[str, Any] | None:
    """Return the entry of a stage from its adapters; None if it is not known to be finished."""
    folders = {
        path.name: path
        for path in sorted((record.folder / "adapters").glob("*"))
        if path.is_dir() and stage_of_role(path.name, recipe.algorithm) == stage
    }
    whole = [role for role, path in folders.items() if _is_whole(path)]
    if not folders and stage == "reward" and not has_reward_model(recipe):
        return {"skipped": "there are no comparisons"}
    needed = {"sft": {"sft"}, "reward": {"reward"}}.get(stage, {"policy"})
    needed |= {"value"} if stage == "ppo" and recipe.ppo.value == "adapter" else set()
    needed |= {"held_out"} if stage == "reward" and recipe.reward.held_out_model else set()
    members = recipe.reward.ensemble if recipe.reward.combine != "warm" else None
    needed |= {f"reward_{i}" for i in range(1, members or 1)} if stage == "reward" else set()
    # A stage removes its checkpoints once the record has its result.
    begun = any(stage_of(path.name) == stage for path in record.checkpoints("").glob("*"))
    if begun or not needed <= set(whole):
        return None
    files = [path for role in sorted(needed) for path in sorted(folders[role].iterdir())]
    hashes = {path.relative_to(record.folder).as_posix(): sha256(path) for path in files}
    weights = {role: hashes[f"adapters/{role}/adapter_model.safetensors"] for role in needed}
    main = {"sft": "sft", "reward": "reward"}.get(stage, "policy")
    entry: dict[str, Any] = {"adapter_sha256": weights[main], "files": hashes}
    if "value" in needed:
        entry["value_adapter_sha256"] = weights["value"]
    if stage != "reward":
        return entry
    offset = _json(folders["reward"] / "reward.json").get("reward_offset")
    if not isinstance(offset, int | float):
        return None  # without its offset the reward is another one
    entry["offset"] = offset
    entry |= {"gate": "not judged", "gate_reason": "its accuracy was in the lost record"}
    if "held_out" in needed:
        entry["held_out_adapter_sha256"] = weights["held_out"]
    if members:
        roles = ["reward", *(f"reward_{i}" for i in range(1, members))]
        entry["ensemble"] = {
            "members": members,
            "combine": recipe.reward.combine,
            "combine_std": recipe.reward.combine_std,
            "roles": roles,
            "adapter_sha256": [weights[role] for role in roles],
        }
    return entry


def _is_whole(folder: Path) -> bool:
    """Tell if an adapter's files are there and its weights have the length that they state."""
    try:
        with safe_open(folder / "adapter_model.safetensors", "np") as weights:
            config, check = (_json(folder / f"{n}.json") for n in ("adapter_config", "check"))
            known = {"base_fingerprint", "dtype", "load_in_4bit"} <= check.keys()
            return bool(weights.keys() and config and known)
    except (OSError, SafetensorError):
        return False


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
