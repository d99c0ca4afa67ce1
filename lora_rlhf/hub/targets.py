# SPDX-License-Identifier: Apache-2.0
"""Names of what answers, resolved: runs, their models, adapters, servers.

A run is base, SFT and policy; `RUN:policy` is one of them; a folder or Hub id is a model or an
adapter; a URL is a chat-completions server. Adapters are read with plain PEFT, ours and others',
so that all targets on one base share it in memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_rlhf.errors import AdapterError, UsageError, reason
from lora_rlhf.recipe.home import expanded
from lora_rlhf.recipe.schema import ModelSection
from lora_rlhf.redaction import safe
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.record import Record, is_run

from . import repository

MODELS = {"base": None, "sft": "sft", "policy": "policy"}
"""Models of a run -> folder of the adapter."""

Kind = Literal["run", "model", "adapter", "url"]


@dataclass(frozen=True)
class Target:
    """One model that answers.

    Attributes:
        name: Name in tables, unique among those named together.
        base: The base model; None for a URL.
        adapter: Folder of a PEFT adapter on it.
        url: A chat-completions endpoint, `http://host:port/v1#model`.
        few_shot: Examples before each prompt, for a base model without a chat template.
        run: The run that the target is a model of.
    """

    name: str
    kind: Kind
    base: ModelSection | None = None
    adapter: Path | None = None
    url: str | None = None
    few_shot: int = 0
    run: Path | None = None

    def describe(self) -> dict[str, Any]:
        """Describe the target for the report; equal descriptions give equal answers."""
        files = () if self.adapter is None else ("adapter_model.safetensors", "adapter_config.json")
        sums = [sha256(Path(str(self.adapter), name)) for name in files]  # its config scales it
        described: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "base": self.base.id if self.base else None,
            "load_in_4bit": self.base.load_in_4bit if self.base else None,
            "dtype": self.base.dtype if self.base else None,
            "adapter_sha256": sums[0] if sums else None,
            "adapter_config_sha256": sums[1] if sums else None,
            "id": self.url or str(self.adapter or (self.base.id if self.base else "")),
            "few_shot": self.few_shot,
        }
        return safe(described)


def parse(
    texts: Sequence[str],
    *,
    base: str | None = None,
    load_in_4bit: bool = False,
    few_shot: int = 0,
    servers: bool = True,
) -> list[Target]:
    """Resolve what a user named to targets with unique names.

    Args:
        base: Base of the adapters whose config names none that can be loaded.
        load_in_4bit: Quantise models and bases that are no run's; a run has its own setting.
        few_shot: Examples before each prompt of a base without a chat template.
        servers: Take URLs too; False where the weights are loaded.

    Raises:
        UsageError: A text names nothing that answers.
    """
    named: list[Target] = []
    runs: dict[Path, str] = {}
    for text in texts:
        if text.startswith(("http://", "https://")) and not servers:
            raise UsageError(
                f"{text} is a server, whose weights cannot be loaded", expected=_expected(servers)
            )
        for target in _resolve(text, base, load_in_4bit, servers):
            if target.kind == "model" and few_shot:
                target = dataclasses.replace(target, few_shot=few_shot)
            name = target.name
            if target.run is not None:  # base, SFT and policy of a run share what keeps it apart
                folder = target.run.resolve()
                run = runs.setdefault(folder, apart(folder.name, [*runs.values()]))
                name = f"{run}:{name.rpartition(':')[2]}"
            name = apart(name, [one.name for one in named])
            named.append(dataclasses.replace(target, name=name))
    if not named:
        raise UsageError("nothing is named", expected=_expected(servers))
    return named


def distinct(named: Sequence[Target]) -> list[Target]:
    """Return the targets without those that are an earlier one, named once more."""
    first: dict[tuple[Any, ...], Target] = {}
    for target in named:
        folders = (one and one.resolve() for one in (target.run, target.adapter))
        base = target.base and target.base.model_dump_json()
        first.setdefault((target.kind, target.url, base, *folders), target)
    return list(first.values())


def check_text(named: Sequence[Target]) -> None:
    """Refuse targets that write no text.

    Raises:
        UsageError: An adapter is one of a reward or value model, or a model is a classifier.
    """
    for target in named:
        kind = ""
        if target.adapter is not None:
            kind = str(_read_json(target.adapter / "adapter_config.json").get("task_type") or "")
        elif target.base is not None and (config := Path(target.base.id, "config.json")).is_file():
            architectures = _read_json(config).get("architectures") or [""]
            kind = "SEQ_CLS" * ("Classification" in str(architectures[0]))
        if kind not in ("", "CAUSAL_LM"):
            raise UsageError(
                f"{target.name} scores answers and writes none (task type {kind})",
                expected="a model or an adapter that writes text, such as RUN:policy",
                remedy="`lora-rlhf score RUN FILE` scores answers by a run's reward model",
            )


def _expected(servers: bool) -> str:
    kinds = ["a run directory or RUN:policy", "a model or adapter folder", "a Hub id"]
    kinds += ["the URL of a chat-completions server"] * servers
    return f"{', '.join(kinds[:-1])} or {kinds[-1]}"


def apart(name: str, taken: Sequence[str]) -> str:
    """Return the name, with a number if it is taken."""
    numbered = (f"{name} {number}" for number in itertools.count(2))
    return next(one for one in itertools.chain([name], numbered) if one not in taken)


def _resolve(text: str, base: str | None, load_in_4bit: bool, servers: bool) -> list[Target]:
    if text.startswith(("http://", "https://")):
        return [Target(text.partition("#")[2] or text, "url", url=text)]
    text = expanded(text)
    folder, _, model = text.rpartition(":")
    if folder and model in MODELS and is_run(Path(folder)):
        return [_of_run(Path(folder), model)]
    path = Path(text)
    if is_run(path):
        return _all_of_run(path)
    if (path / "adapter_config.json").is_file():
        return [_adapter(path, path.name, base, load_in_4bit)]
    if text == "tiny" or (path / "config.json").is_file():
        section = ModelSection(id=text if text == "tiny" else str(path.resolve()))
        section = section.model_copy(update={"load_in_4bit": load_in_4bit})
        return [Target(text if text == "tiny" else path.name, "model", base=section)]
    if path.exists() or text.count("/") != 1:
        raise UsageError(
            f"{text} is no run, model or adapter",
            expected=_expected(servers),
            remedy="check the name; `lora-rlhf run RECIPE` makes a run directory",
        )
    return [_on_hub(text, base, load_in_4bit)]


def _on_hub(repo: str, base: str | None, load_in_4bit: bool) -> Target:
    """Resolve a Hub id: an adapter if it has an adapter_config.json, else a model."""
    folder = repository.adapter_folder(repo)
    if folder is None:
        return Target(repo, "model", base=ModelSection(id=repo, load_in_4bit=load_in_4bit))
    return _adapter(folder, repo, base, load_in_4bit)


def _adapter(folder: Path, name: str, base: str | None, load_in_4bit: bool) -> Target:
    config = _read_json(folder / "adapter_config.json")
    check = _read_json(folder / "check.json") if (folder / "check.json").is_file() else {}
    named = base or config.get("base_model_name_or_path")
    if not named:
        raise UsageError(
            f"{folder} names no base model",
            expected="base_model_name_or_path in its adapter_config.json",
            remedy="name the base with --base",
        )
    section = ModelSection(
        id=str(named), load_in_4bit=load_in_4bit or check.get("load_in_4bit") is True
    )
    return Target(name, "adapter", base=section, adapter=folder)


def _of_run(folder: Path, model: str) -> Target:
    record = Record.read(folder)
    recipe = record.recipe()
    stages = {"sft": "sft", "policy": record.algorithm}
    if model in stages and not record.done(stages[model]):
        raise UsageError(
            f"{folder} has no finished {model}",
            remedy=f"continue it: `lora-rlhf run {shlex.quote(str(folder))}`",
        )
    name = f"{folder.resolve().name}:{model}"
    adapter = None if model == "base" else record.verified(f"adapters/{MODELS[model]}")
    return Target(name, "run", base=recipe.model, adapter=adapter, run=folder)


def _all_of_run(folder: Path) -> list[Target]:
    record = Record.read(folder)
    done = ["base"] + ["sft"] * record.done("sft")
    if record.algorithm != "best_of_n" and record.done(record.algorithm):
        done.append("policy")
    return [_of_run(folder, model) for model in done]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a JSON {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"cannot be read: {reason(error)}", where=str(path), expected="a JSON object"
        ) from None
    return content
