# SPDX-License-Identifier: Apache-2.0
"""What may leave the machine: a folder put together for the Hub, checked before anything is sent.

Only names on a list are taken, only bytes that the record vouches for, and no text that holds a
secret or a path of this machine. Nothing here touches the network.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lora_rlhf import tiny
from lora_rlhf.errors import HubError, UsageError
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.redaction import TOKENS, variables
from lora_rlhf.reports.cards import model_card
from lora_rlhf.reports.cards.card_facts import RL_STAGES, ROLES, hub_base, slug
from lora_rlhf.reports.cards.card_markdown import cell, code, without_paths
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.record import Record

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
ADAPTER = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "check.json",
    "reward.json",
    *TOKENIZER,
)
BASE = ("config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER)
_NEEDED = ("adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json")
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_PLOT = re.compile(r"[\w-]+\.png")

_SECRETS = {
    **TOKENS,
    "a path of somebody's home": re.compile(
        r"(?<![\w.])(/home/[\w.-]+/|/Users/[\w.-]+/|/root/)|[A-Za-z]:\\+Users\\+\w"
    ),
}
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_BF16_EXPONENT = 0x7F80


def stage_adapter(record: Record, role: str, repo_id: str, folder: Path) -> list[str]:
    """Put the adapter of `role` into the empty `folder` as it shall be published.

    Returns:
        The names of the files, sorted; the card is always among them.

    Raises:
        UsageError: No such role.
        HubError: Something may not be published; the message says what, and what to do.
    """
    base, source = check_adapter(record, role), record.adapter(role)
    for name in ADAPTER:
        if (source / name).exists():
            _take(record, source / name, folder / name)
    _rewrite_config(record, base, folder / "adapter_config.json")
    finite(folder / "adapter_model.safetensors")
    text = model_card.render(record, role, {"base": base, role: repo_id})
    (folder / "README.md").write_text(text, encoding="utf-8", newline="\n")
    recipe = record.folder / "recipe.yaml"
    if recipe.exists():
        _take(record, recipe, folder / "recipe.yaml")
        plain = without_paths(yaml.safe_load(recipe.read_text(encoding="utf-8")))
        published = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        (folder / "recipe.yaml").write_text(published, encoding="utf-8", newline="\n")
    for plot in sorted((record.folder / "plots").glob("*.png")):
        if _PLOT.fullmatch(plot.name):
            (folder / "plots").mkdir(exist_ok=True)
            _take(record, plot, folder / "plots" / plot.name)
    _publish_record(record, folder)
    names = _names(folder)
    scan(folder, names, [str(record.folder.resolve())])
    return names


def asked_for(
    record: Record, named: dict[str, str | None], *, public: bool, base: str | None
) -> tuple[dict[str, str], bool]:
    """Role -> repository of a `push`: those named, else those of the recipe; and whether public.

    Raises:
        UsageError: There are none.
    """
    found = {role: repo_id for role, repo_id in named.items() if repo_id}
    if found or base:
        return found, public
    section = record.recipe().hub
    found = {role: getattr(section, role) for role in named if getattr(section, role)}
    if not found:
        raise UsageError(
            "no repository to push to",
            expected="--policy, --reward, --value, --sft or --base, each with org/name",
            remedy=f"lora-rlhf push {record.folder} --policy org/name",
        )
    return found, public or section.public


def to_push(recipe: Recipe, record: Record | None) -> dict[str, str]:
    """Role -> repository of what `hub:` names and the run has not pushed there yet."""
    done = record.data["clock"].get("pushed", {}) if record is not None else {}
    wanted = {role: getattr(recipe.hub, role) for role in ROLES}
    return {
        role: repo
        for role, repo in wanted.items()
        if repo and done.get(role, {}).get("repo_id") != repo
    }


def check_adapter(record: Record, role: str) -> str:
    """The Hub id of the base, if the adapter of `role` is finished, whole and may be published.

    Raises:
        UsageError: No such role.
        HubError: Not finished, files missing, changed since the run, or the base is only local.
    """
    if role not in ROLES:
        raise UsageError(f"the role {role!r}", expected=f"one of {', '.join(ROLES)}")
    stages = (role,) if role in ("sft", "reward") else RL_STAGES
    if not any(record.done(stage) for stage in stages):
        raise HubError(
            f"the run in {record.folder} has not finished the stage that makes the {role} adapter",
            remedy="go on with `lora-rlhf run`; a finished stage is not run again",
        )
    folder = record.adapter(role)
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise HubError(
            f"{folder} lacks {', '.join(missing)}",
            expected="the folder as the run wrote it",
            remedy="run the stage again",
        )
    if not record.data.get("files"):
        raise HubError(
            "the record does not say yet which files the run wrote",
            remedy="let the run finish its last stage, card: `lora-rlhf run`",
        )
    for name in sorted({*_NEEDED, *(n for n in ADAPTER if (folder / n).exists())}):
        _vouched(record, folder / name)
    _vouched_sources(record)
    base = hub_base(record.data.get("model", {}))
    if base is None:
        raise local_base(str(record.data.get("model", {}).get("id", "the base")), record)
    return base


def local_base(identity: str, record: Record | None = None) -> HubError:
    """The error for a base that exists only on this machine: others could not load the adapter."""
    push = "push it as a repository of its own, `lora-rlhf push"
    if record is None:  # before training, there is no run that could be pushed
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
        HubError: The base is on the Hub already, or its folder is not there or not complete.
    """
    identity = str(record.data.get("model", {}).get("id", "tiny"))
    source = tiny.path() if identity == "tiny" else Path(identity).expanduser()
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
    seen = record.data.get("model", {}).get("weights") or {}
    changed = [name for name in shards if seen and seen.get(name) != sha256(source / name)]
    if changed:  # the packaged model differs between versions, and a folder may be written anew
        raise HubError(
            f"{changed[0]} in {source} is not what the run was trained on",
            expected=f"sha256 {seen.get(changed[0])}",
            remedy="restore the base, or run again: the adapters fit no other",
        )
    for name in (*BASE, *shards):
        if (source / name).exists():
            _regular(source / name)
            shutil.copyfile(source / name, folder / name)
    for name in shards:
        finite(folder / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    _write_json(folder / "config.json", config)
    (folder / "README.md").write_text(_base_card(record, folder, shards), encoding="utf-8")
    names = _names(folder)
    scan(folder, names, [str(record.folder.resolve()), str(source.resolve())])
    return names


def scan(
    folder: Path, names: Iterable[str], private: Iterable[str] = (), *, homes: bool = True
) -> None:
    """Look for secrets and local paths in every text file; `private` are more strings to refuse.

    Args:
        homes: Whether paths are looked for: rows of data may speak of them as they like.

    Raises:
        HubError: Naming the file and the kind of what was found, never the secret.
    """
    home = str(Path.home())
    paths = {*private, *([home + os.sep] if homes and len(home) > 1 else [])}
    kinds = _SECRETS if homes else TOKENS
    for name in names:
        if name.endswith((".safetensors", ".png", ".model")):
            continue
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        found = [kind for kind, pattern in kinds.items() if pattern.search(text)]
        found += [
            f"the value of the environment variable {name}"
            for value, name in variables().items()
            if value in text
        ]
        found += ["a path of this machine" for path in paths if path in text]
        if found:
            raise HubError(
                f"{name} holds what looks like {found[0]}",
                expected="no secrets and no local paths in published files",
                remedy="take it out of where it came from (recipe, data or samples), and run again",
            )


def finite(path: Path) -> None:
    """Refuse a safetensors file that cannot be read or holds NaN or infinity.

    Raises:
        HubError: With the name of the tensor.
    """
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(size))
            header.pop("__metadata__", None)
            bad = [n for n, entry in header.items() if not _all_finite(file, 8 + size, entry)]
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise HubError(
            f"{path.name} is no readable safetensors file: {error}", remedy="run the stage again"
        ) from None
    if bad:
        raise HubError(
            f"{path.name}: {bad[0]} holds NaN or infinity",
            expected="finite weights; a broken adapter is never published",
            remedy="train again with a lower learning rate",
        )


def _all_finite(file: Any, start: int, entry: dict[str, Any]) -> bool:
    begin, end = entry["data_offsets"]
    file.seek(start + begin)
    raw = file.read(end - begin)
    if len(raw) != end - begin:
        raise ValueError("it is cut short")
    if entry["dtype"] == "BF16":
        bits = np.frombuffer(raw, dtype="<u2")
        return not bool(((bits & _BF16_EXPONENT) == _BF16_EXPONENT).any())
    kind = _FLOATS.get(entry["dtype"])
    if kind is None:
        return True
    values = np.frombuffer(raw, dtype=kind)
    if values.size != math.prod(entry["shape"]):
        raise ValueError("a shape does not fit its data")
    return bool(np.isfinite(values).all())


def _vouched(record: Record, path: Path) -> None:
    """Refuse a file that is not what the record says; pictures are not sealed, as they may vary."""
    _regular(path)
    name = path.relative_to(record.folder).as_posix()
    if path.suffix != ".png" and record.data.get("files", {}).get(name) != sha256(path):
        raise _changed(name)


def _vouched_sources(record: Record) -> None:
    """The card is made from samples and log: they must be what the run wrote as well."""
    if (record.folder / "samples.jsonl").exists():
        _vouched(record, record.folder / "samples.jsonl")
    log = record.folder / "metrics.jsonl"
    if log.exists():
        _regular(log)
        if record.data.get("clock", {}).get("metrics_sha256") != sha256(log):
            raise _changed("metrics.jsonl")


def _changed(name: str) -> HubError:
    return HubError(
        f"{name} is not the file that the run wrote: its sha256 differs from the record's",
        remedy="restore the file, or run the stage again; where the recipe was changed, "
        "`lora-rlhf run`",
    )


def _regular(path: Path) -> None:
    """A link may lead to anything on this machine."""
    if path.is_symlink() or not path.is_file():
        raise HubError(f"{path} is a link or no plain file", expected="a plain file")


def _take(record: Record, path: Path, to: Path) -> None:
    _vouched(record, path)
    shutil.copyfile(path, to)


def _rewrite_config(record: Record, base: str, path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    model = record.data.get("model", {})
    config["base_model_name_or_path"] = base
    pinned = model.get("revision") if base == model.get("id") else model.get("hub_revision")
    config["revision"] = pinned or None
    _write_json(path, config)


def _publish_record(record: Record, folder: Path) -> None:
    """A copy of the record without local paths, and the sha256 of what lies beside it.

    Without what is nobody's business: other repositories, and what a stage stopped with.
    """
    data = without_paths(record.data)
    for name in ("pushed", "backup"):
        data.get("clock", {}).pop(name, None)
    for entry in data.get("stages", {}).values():
        entry.pop("error", None)
    data["published"] = {name: sha256(folder / name) for name in _names(folder)}
    _write_json(folder / "record.json", data)


def _base_card(record: Record, folder: Path, shards: list[str]) -> str:
    model = record.data.get("model", {})
    chosen = str(model.get("license") or "")
    meta: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lora-rlhf"],
    }
    if chosen:
        meta["license"] = slug(chosen)
    name = Path(str(model.get("id", "base"))).name
    rows = [f"- {code(shard)}: sha256 {code(sha256(folder / shard))}" for shard in shards]
    lines = [
        "---",
        yaml.safe_dump(meta, sort_keys=False).strip(),
        "---",
        "",
        f"# {cell(name)}",
        "",
        "The base model of adapters made by `lora-rlhf`, published so that they can be loaded. It "
        "is not aligned: its answers may be wrong, rude or harmful.",
        "",
        f"- Source: {cell(model.get('source') or 'not recorded')}",
        *(f"- Made from: {cell(model['original'])}" for _ in [0] if model.get("original")),
        f"- Licence: {cell(chosen or 'not recorded')}",
        *rows,
        "",
    ]
    return "\n".join(lines)


def _names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8", newline="\n")
