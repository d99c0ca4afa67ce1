# SPDX-License-Identifier: Apache-2.0
"""Where the config of a base is found, without its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lora_rlhf import tiny
from lora_rlhf.errors import BaseModelError, first_line
from lora_rlhf.recipe.schema import Recipe


def find_config(recipe: Recipe, folder: Path | None = None) -> Any:
    """The base's config: of the model itself, from the Hub's cache, beside the recipe, or the Hub.

    Args:
        recipe: Its `model.id` and `model.revision` are read.
        folder: The recipe's own, whose `config.json` may stand in for a model that is not here.

    Raises:
        BaseModelError: None of them has it.
    """
    model = recipe.model
    where = str(tiny.path()) if model.id == "tiny" else str(Path(model.id).expanduser())
    local = Path(where).is_dir()
    options: dict[str, Any] = {"revision": model.revision, "trust_remote_code": False}
    tries: list[tuple[str, dict[str, Any]]] = [
        (where if local else model.id, {**options, "local_files_only": True})
    ]
    if folder is not None and not local and (folder / "config.json").is_file():
        tries.append((str(folder), {"trust_remote_code": False}))
    if not local:
        tries.append((model.id, options))
    why = ""
    for source, given in tries:
        try:
            config = AutoConfig.from_pretrained(source, **given)
        except Exception as error:  # whatever the libraries raise for a file that is not there
            why = why or first_line(error)
            continue
        named = getattr(config, "_name_or_path", "")
        if source != str(folder) or _names(source) in ("", model.id):
            return config
        why = f"{source}/config.json is that of {_names(source) or named}"
    raise BaseModelError(
        f"no config of {model.id} is here: {why}",
        expected="config.json of the base: in its folder, in the Hub's cache, or beside the recipe",
        remedy="put the base's config.json beside the recipe, or let the Hub be reached once",
    )


def _names(folder: str) -> str:
    """The model that a config beside a recipe says it is of."""
    found = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return str(found.get("_name_or_path", ""))
