# SPDX-License-Identifier: Apache-2.0
"""Facts for one card, from record, recipe and the adapter's files; the card's front matter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from lora_rlhf.recipe.stage_keys import ALGORITHMS
from lora_rlhf.reports.alarms import series
from lora_rlhf.runs.record import Record

from .card_markdown import at, cell, interval, is_number, number, one_line, without_paths

ROLES = ("policy", "reward", "value", "sft")
RL_STAGES = tuple(ALGORITHMS)
MODELS = {"base": "base", "sft": "SFT", "policy": "policy", "best_of_n": "best of n"}

_PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "isc", "unlicense"}
_KNOWN = {
    *_PERMISSIVE,
    "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-3.0", "odc-by",
    "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "openrail", "bigscience-openrail-m", "openrail++",
    "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "other", "unknown",
}  # fmt: skip
"""Licence identifiers of the Hub."""

_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Facts:
    """Source of everything that the card of `role` states; any file of the run may be missing."""

    def __init__(
        self, record: Record, role: str, repo_ids: Mapping[str, str] | None = None
    ) -> None:
        self.record, self.role, self.repo_ids = record, role, dict(repo_ids or {})
        recipe, adapter = record.folder / "recipe.yaml", record.verified(f"adapters/{role}")
        loaded = yaml.safe_load(record.recipe_text()) if recipe.is_file() else {}
        self.recipe = without_paths(loaded) if isinstance(loaded, dict) else {}
        self.config = _json(adapter / "adapter_config.json")
        self.check = _json(adapter / "check.json")
        self.head = _json(adapter / "reward.json")

    def get(self, path: str, default: Any = None) -> Any:
        """Return the value in `record.json` at a dotted path, without local folders."""
        return without_paths(at(self.record.data, path, default))

    def own(self, key: str) -> Any:
        """Return a value of the recipe's `card` section, which the author wrote."""
        return at(self.recipe, f"card.{key}")

    @property
    def algorithm(self) -> str:
        """The stage that trained the policy, by default ppo."""
        stages = (stage for stage in RL_STAGES if self.get(f"stages.{stage}"))
        return next(stages, None) or str(self.get("algorithm", "ppo"))

    @property
    def algorithm_name(self) -> str:
        """The algorithm's usual name, such as PPO."""
        return ALGORITHMS.get(self.algorithm) or cell(self.algorithm.upper())

    @property
    def base(self) -> str | None:
        """The Hub id of the base; None if the base exists only locally."""
        return self.repo_ids.get("base") or hub_base(self.record.data.get("model", {}))

    @property
    def packaged(self) -> bool:
        """True if the base is the tiny model in the package."""
        source = str(self.get("model.source", "")).lower()
        return not self.base and ("packaged" in source or self.get("model.id") == "tiny")

    @property
    def published(self) -> str | None:
        """The Hub repository of the adapter, if any."""
        return self.repo_ids.get(self.role)

    def sources(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield every data source of the record with the name of its set."""
        for name, entry in self.sets():
            for source in at(entry, "sources", []):
                yield name, source

    def sets(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield every data set of the record; separate evaluation prompts are one more."""
        for name, entry in self.get("data", {}).items():
            yield cell(name), entry
            if "sources" in at(entry, "evaluate", {}):
                yield "evaluate", entry["evaluate"]

    def signs(self) -> list[str]:
        """Return the alarms that the policy's stage recorded, as safe text."""
        seen = self.get(f"stages.{self.algorithm}.signs", [])
        return [f"at update {number(s.get('update'))}: {cell(s.get('message'))}" for s in seen]

    def curve(self, *names: str) -> list[float]:
        """Return the finite values of the first of these metrics that was logged."""
        lines = self.record.metrics(self.algorithm)
        return next((values for name in names if (values := series(lines, name))), [])


def hub_base(model: Mapping[str, Any]) -> str | None:
    """Return the Hub id that adapters may name as their base, never a local path.

    Args:
        model: `id`, `hub_id` and `source`, as under `model` in the record.
    """
    if model.get("hub_id"):
        return str(model["hub_id"])
    identity, source = str(model.get("id") or ""), str(model.get("source") or "Hub")
    if source != "Hub" or Path(identity).exists():
        return None
    return identity if _HUB_ID.fullmatch(identity) else None


def licence(facts: Facts) -> tuple[str | None, str]:
    """Return the card's licence, or None, and the reason in one sentence."""
    if own := facts.own("license"):
        return str(own), "Chosen by the author of the recipe."
    parts = {"the base model": facts.get("model.license")}
    for name, source in facts.sources():
        shipped = "apache-2.0" if at(source, "kind") == "task" else None
        parts[f"{name} ({at(source, 'name', 'unnamed')})"] = at(source, "license") or shipped
    unknown = [name for name, given in parts.items() if not given]
    if unknown:
        listed = ", ".join(cell(name) for name in unknown)
        return None, f"Left out, because no licence is recorded for: {listed}."
    if not any(facts.sources()):
        return None, "Left out, because the record names no training data."
    strict = [f"{name}: {given}" for name, given in parts.items() if slug(given) not in _PERMISSIVE]
    if strict:
        listed = ", ".join(cell(item) for item in strict)
        return None, f"Left out, because a person has to weigh the terms of {listed}."
    return slug(parts["the base model"]), "That of the base; the licences of all data permit it."


def slug(text: Any) -> str:
    """Spell a licence as the Hub does."""
    return re.sub(r"[\s_]+", "-", str(text).strip().lower())


def front_matter(facts: Facts) -> str:
    """Return the YAML block with metadata for the Hub."""
    chosen, _ = licence(facts)
    known = chosen is None or slug(chosen) in _KNOWN
    stage = facts.role if facts.role in ("sft", "reward") else facts.algorithm
    task = {"reward": "text-classification", "value": "token-classification"}
    hub_data = [at(source, "name") for _, source in facts.sources() if at(source, "kind") == "hub"]
    tags = ["lora-rlhf", "rlhf", "lora", "trl", stage, f"{facts.role}-adapter"]
    if facts.role in ("reward", "value"):
        tags.append("reward-trainer" if facts.role == "reward" else "value-model")
    results, codes = _eval_results(facts), facts.own("language")
    codes = codes if isinstance(codes, list) else [codes]
    data = ModelCardData(
        base_model=facts.base,
        base_model_relation="adapter" if facts.base else None,
        library_name="peft",
        pipeline_tag=task.get(facts.role, "text-generation"),
        license=(slug(chosen) if known else "other") if chosen else None,
        license_name=None if known else slug(chosen),
        language=[code for code in codes if _LANGUAGE.fullmatch(str(code))] or None,
        datasets=sorted({str(name) for name in hub_data if name}) or None,
        tags=tags,
        model_name=str(facts.get("name", "run")) if results else None,
        eval_results=results or None,
    )
    values = one_line(data.to_dict())  # type: ignore[no-untyped-call]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"---\n{text.strip()}\n---\n"


def _eval_results(facts: Facts) -> list[EvalResult]:
    if facts.role == "reward":
        # Of an ensemble that is not merged, only the first member is published.
        merged = facts.get("stages.reward.ensemble.combine", "warm") == "warm"
        members = facts.get("stages.reward.ensemble.accuracy") or [None]
        metrics = {"accuracy": facts.get("stages.reward.accuracy") if merged else members[0]}
        data_set, task = "comparisons", "text-classification"
    elif facts.role == "value":
        return []
    else:
        metrics = facts.get(f"evaluation.{facts.role}", {})
        data_set, task = "prompts", "text-generation"
    used = [source for name, source in facts.sources() if name == data_set]
    names = ", ".join(str(at(source, "name", "unnamed")) for source in used)
    return [
        EvalResult(
            task_type=task,
            dataset_type="held-out",
            dataset_name=f"held-out {data_set}: {names or 'of the recipe'}",
            metric_type=metric,
            metric_name=f"{metric.replace('_', ' ')}, {interval(value)}",
            metric_value=value["value"],
            metric_args={k: value[k] for k in ("low", "high", "n") if is_number(value.get(k))},
        )
        for metric, value in metrics.items()
        if isinstance(value, Mapping) and is_number(value.get("value"))
    ]


def _json(path: Path) -> dict[str, Any]:
    loaded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return loaded if isinstance(loaded, dict) else {}
