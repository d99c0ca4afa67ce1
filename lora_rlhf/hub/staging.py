# SPDX-License-Identifier: Apache-2.0
"""Assemble and check a folder for the Hub, without a network.

The folder holds only files on a list, with the hashes of the record, and no text with a secret or a
path of this machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open

from lora_rlhf import tiny
from lora_rlhf.errors import HubError, UsageError
from lora_rlhf.recipe.home import expanded
from lora_rlhf.redaction import TOKENS, variables
from lora_rlhf.reports import evaluation_report, html_report
from lora_rlhf.reports.cards import model_card
from lora_rlhf.reports.cards.card_facts import RL_STAGES, ROLES, hub_base, slug
from lora_rlhf.reports.cards.card_markdown import cell, code, without_paths
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.record import Record

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
_NEEDED = ("adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json")
ADAPTER = (*_NEEDED[:2], "check.json", "reward.json", *TOKENIZER)
BASE = ("config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER)
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_PLOT = re.compile(r"[\w-]+\.png")

_HOME = re.compile(r"(?<![\w.])(/home/[\w.-]+/|/Users/[\w.-]+/|/root/)|[A-Za-z]:\\+Users\\+\w")
_CANARY = re.compile(r"canary\s+GUID\s+[0-9a-f]{8}", re.IGNORECASE)
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BF16_EXPONENT = 0x7F80


def stage_adapter(
    record: Record, role: str, repo_id: str, folder: Path, *, report: bool = False
) -> list[str]:
    """Put the adapter of `role` and its card into `folder` for the Hub; return the file names.

    Args:
        report: Add the evaluation's report.json and report.html, which hold prompts and answers.

    Raises:
        UsageError: There is no such role.
        HubError: A file may not be published.
    """
    base, source = check_adapter(record, role), record.adapter(role)
    files = [source / name for name in ADAPTER if (source / name).exists()]
    recipe = record.folder / "recipe.yaml"
    files += [recipe] if recipe.exists() else []
    files += [record.folder / evaluation_report.FILE] if report else []
    for path in files:
        _check_unchanged(record, path)
        shutil.copyfile(path, folder / path.name)
    for path in sorted((record.folder / "plots").glob("*.png")):
        if _PLOT.fullmatch(path.name):
            (folder / "plots").mkdir(exist_ok=True)
            _check_regular(path)
            shutil.copyfile(path, folder / "plots" / path.name)
    if report:
        html_report.write(evaluation_report.read(folder), folder / html_report.NAME)
    check_finite(folder / "adapter_model.safetensors")
    _name_base(record, base, folder / "adapter_config.json")
    _write(folder / "README.md", model_card.render(record, role, {"base": base, role: repo_id}))
    if recipe.exists():
        plain = without_paths(yaml.safe_load((folder / recipe.name).read_text(encoding="utf-8")))
        _write(folder / recipe.name, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    _write_record(record, folder)
    names = file_names(folder)
    scan(folder, names, [str(record.folder.resolve())])
    return names


def check_adapter(record: Record, role: str) -> str:
    """Check that the adapter of `role` may be published, and return the Hub id of its base.

    Raises:
        UsageError: There is no such role.
        HubError: The stage is not finished, files are missing or changed, or the base is local.
    """
    if role not in ROLES:
        raise UsageError(f"the role {role!r}", expected=f"one of {', '.join(ROLES)}")
    stages = (role,) if role in ("sft", "reward") else RL_STAGES
    if not any(record.done(stage) for stage in stages):
        raise HubError(
            f"the run in {record.folder} has not finished the stage that makes the {role} adapter",
            remedy="continue it with `lora-rlhf run`; finished stages are not run again",
        )
    folder = record.adapter(role)
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise HubError(
            f"{folder} lacks {', '.join(missing)}",
            expected="the folder as the run wrote it",
            remedy="run the stage again",
        )
    if not record.data["files"]:
        raise HubError(
            "the record does not list the run's files yet",
            remedy="let the run finish its last stage, card: `lora-rlhf run`",
        )
    for path in (*(folder / name for name in ADAPTER), record.folder / "samples.jsonl"):
        if path.exists():  # the card is made from samples and log
            _check_unchanged(record, path)
    record.metrics()
    base = hub_base(record.data["model"])
    if base is None:
        raise local_base(str(record.data["model"].get("id", "the base")), record)
    return base


def local_base(identity: str, record: Record | None = None) -> HubError:
    """Return the error for a base that exists only on this machine."""
    push = "push it as a repository of its own, `lora-rlhf push"
    if record is None:  # before training, when there is no run to push from
        how = f"train without `hub:` first; then {push} RUN --base org/name`, and run again with it"
    else:
        how = f"{push} {record.folder} --base org/name`"
    return HubError(
        f"the base model {identity!r} exists only on this machine",
        expected="a base on the Hub, since an adapter is of no use without its base",
        remedy=f"{how}, or set model.hub_id to the same model on the Hub",
    )


def stage_base(record: Record, folder: Path) -> list[str]:
    """Put the base model of the run, packaged or a local folder, into `folder` for the Hub.

    Raises:
        HubError: The base is on the Hub already, or its folder is missing or incomplete.
    """
    model = record.data["model"]
    identity = str(model.get("id", "tiny"))
    source = tiny.path() if identity == "tiny" else Path(expanded(identity))
    if not source.is_dir():
        raise HubError(
            f"there is no folder {identity}",
            expected="a base that exists only on this machine",
            remedy="a base that is on the Hub already needs no push",
        )
    shards = sorted(p.name for p in source.iterdir() if _SHARD.fullmatch(p.name))
    if not shards or not (source / "config.json").is_file():
        raise HubError(
            f"{source} holds no model",
            expected="config.json and model*.safetensors",
            remedy="save the base with save_pretrained",
        )
    trained_on = model.get("weights") or {}
    for name in shards if trained_on else ():  # a newer package may have another tiny model
        if trained_on.get(name) != sha256(source / name):
            raise HubError(
                f"{name} in {source} is not what the run was trained on",
                expected=f"sha256 {trained_on.get(name)}",
                remedy="restore the base, or run again: the adapters fit no other",
            )
    for path in (source / name for name in (*BASE, *shards)):
        if path.exists():
            _check_regular(path)
            shutil.copyfile(path, folder / path.name)
    for name in shards:
        check_finite(folder / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    _write_json(folder / "config.json", config)
    _write(folder / "README.md", _base_card(model, folder, shards))
    names = file_names(folder)
    scan(folder, names, [str(record.folder.resolve()), str(source.resolve())])
    return names


def scan(
    folder: Path, names: Iterable[str], private: Iterable[str] = (), *, paths: bool = True
) -> None:
    """Refuse text files that hold secrets, local paths, or a string of `private`.

    Args:
        paths: Whether to search for paths; rows of data may contain any path.

    Raises:
        HubError: A file holds one; the message names the file and the kind, never the secret.
    """
    home = str(Path.home())
    private = {*private, *([home + os.sep] if paths and len(home) > 1 else [])}
    shapes = (
        TOKENS
        | {"the canary of a benchmark": _CANARY}
        | ({"a path of somebody's home": _HOME} if paths else {})
    )
    for name in names:
        if name.endswith((".safetensors", ".png", ".model")):
            continue
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        kinds = [kind for kind, shape in shapes.items() if shape.search(text)]
        kinds += [
            f"the value of the environment variable {variable}"
            for value, variable in variables().items()
            if value in text
        ]
        kinds += ["a path of this machine" for path in private if path in text]
        if kinds:
            raise HubError(
                f"{name} holds what looks like {kinds[0]}",
                expected="no secrets, no local paths and no benchmarks in published files",
                remedy="remove it at its source (recipe, data or samples), and run again",
            )


def check_finite(path: Path) -> None:
    """Check that a safetensors file can be read and holds neither NaN nor infinity.

    Raises:
        HubError: It cannot, or a tensor does.
    """
    try:
        with safe_open(path, "numpy"):  # checks shapes, offsets and length
            pass
    except SafetensorError as error:
        raise HubError(
            f"{path.name} is not a readable safetensors file: {error}",
            remedy="run the stage again",
        ) from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if (kind := _NUMPY.get(entry["dtype"])) is None:
            continue
        begin, end = entry["data_offsets"]
        count = (end - begin) // np.dtype(kind).itemsize
        values = np.fromfile(path, kind, count, offset=8 + size + begin)
        if entry["dtype"] == "BF16":  # NumPy has no such type
            finite = (values & _BF16_EXPONENT) != _BF16_EXPONENT
        else:
            finite = np.isfinite(values)
        if not finite.all():
            raise HubError(
                f"{path.name}: {name} holds NaN or infinity",
                expected="finite weights; a broken adapter is never published",
                remedy="train again with a lower learning rate",
            )


def file_names(folder: Path) -> list[str]:
    """List the relative names of all files in a folder, sorted."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _check_unchanged(record: Record, path: Path) -> None:
    """Refuse a link, and a file whose sha256 is not the record's."""
    _check_regular(path)
    name = path.relative_to(record.folder).as_posix()
    if name not in record.listed():
        raise HubError(
            f"{name} is not a file that the run wrote: the record does not list it",
            remedy="remove it; if the recipe was changed, `lora-rlhf run` goes on with it",
        )
    record.verified(name)


def _check_regular(path: Path) -> None:
    if path.is_symlink() or not path.is_file():  # a link may lead to any file of this machine
        raise HubError(f"{path} is a link or not a regular file", expected="a regular file")


def _name_base(record: Record, base: str, path: Path) -> None:
    """Write base and revision into an adapter_config.json."""
    config, model = json.loads(path.read_text(encoding="utf-8")), record.data["model"]
    pinned = model.get("revision") if base == model.get("id") else model.get("hub_revision")
    _write_json(path, config | {"base_model_name_or_path": base, "revision": pinned or None})


def _write_record(record: Record, folder: Path) -> None:
    """Write the record without local paths, other repositories and errors, and with file hashes."""
    data = without_paths(record.data)
    for name in ("pushed", "backup"):
        data["clock"].pop(name, None)
    for entry in data["stages"].values():
        entry.pop("error", None)
    data["published"] = {name: sha256(folder / name) for name in file_names(folder)}
    _write_json(folder / "record.json", data)


def _base_card(model: dict[str, Any], folder: Path, shards: list[str]) -> str:
    meta = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lora-rlhf"],
    }
    licence = str(model.get("license") or "")
    meta |= {"license": slug(licence)} if licence else {}
    original = f"- Made from: {cell(model['original'])}\n" if model.get("original") else ""
    sums = (f"- {code(shard)}: sha256 {code(sha256(folder / shard))}\n" for shard in shards)
    return (
        f"---\n{yaml.safe_dump(meta, sort_keys=False)}---\n\n"
        f"# {cell(Path(str(model.get('id', 'base'))).name)}\n\n"
        "The base model of adapters made by `lora-rlhf`, published so that they can be loaded. It "
        "is not aligned: its answers may be wrong, rude or harmful.\n\n"
        f"- Source: {cell(model.get('source') or 'not recorded')}\n{original}"
        f"- Licence: {cell(licence or 'not recorded')}\n{''.join(sums)}"
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _write_json(path: Path, data: Any) -> None:
    _write(path, json.dumps(data, indent=1) + "\n")
