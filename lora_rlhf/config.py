# SPDX-License-Identifier: Apache-2.0
"""The recipe: one YAML file that states a whole run; every knob has its one home here.

A key that is not in these classes is
an error with its line and a suggestion. `args:` of a stage goes through to the TRL config of that
stage unchanged, so those names are TRL's own.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import RecipeError
from .strict_yaml import Lines, parse_yaml

_SECRET = re.compile(r"token|secret|password|api_key", re.IGNORECASE)
_NOT_SECRET = re.compile(r"_?tokens?_|_tokens?$|^tokens$|tokenizer", re.IGNORECASE)
_MAX_BYTES = 1_000_000


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(_Section):
    """`model`: the backbone."""

    id: str = Field(description="`tiny` (shipped), a Hub id, or a local folder.")
    revision: str | None = Field(None, description="Commit of the Hub repository.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: float32 on a CPU, bfloat16 from compute capability 8.0, else float16.",
    )
    load_in_4bit: bool = Field(False, description="NF4 with double quantisation, by bitsandbytes.")
    hub_id: str | None = Field(
        None,
        description="The Hub id that adapters name as their base, when `id` is a local folder.",
    )
    gradient_checkpointing: bool = Field(False, description="Trade a second forward for memory.")


class LoraSection(_Section):
    """`lora`: the shape of every role's adapter."""

    r: int = Field(16, ge=1, description="Rank.")
    alpha: int = Field(32, ge=1, description="Scale; the update is multiplied by alpha / r.")
    top_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of the layers, from the top, that carry adapters."
    )
    target_modules: list[str] | None = Field(
        None, description="Linear layers to adapt, by last name; default: all inside the layers."
    )


class DataSource(_Section):
    """One dataset: a task generator, a file, or a Hub dataset. Exactly one of the three."""

    task: Literal["closed-world"] | None = Field(None, description="The shipped generator.")
    path: str | None = Field(
        None,
        description="JSONL, CSV or parquet file, .gz allowed; relative to the recipe; "
        "`data://x` is the folder named by LORA_RLHF_DATA.",
    )
    hub: str | None = Field(None, description="A dataset on the Hub, as org/name.")
    name: str | None = Field(None, description="Hub dataset configuration.")
    split: str = Field("train", description="Split of a Hub dataset.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Our column name -> the file's column name."
    )
    limit: int | None = Field(
        None, ge=1, description="At most this many rows, taken after shuffling."
    )
    n: int = Field(256, ge=1, description="Rows to generate (task only).")
    completions: int = Field(
        4, ge=2, description="Completions ranked per prompt (task comparisons only)."
    )
    agreement: float = Field(
        0.73, gt=0.5, le=1, description="Share of pairs on which two simulated labelers agree."
    )
    license: str | None = Field(None, description="Licence of the data, for the card.")

    @model_validator(mode="after")
    def _one_source(self) -> DataSource:
        given = [key for key in ("task", "path", "hub") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of task, path, hub (found: {given or 'none'})")
        return self


class DataSection(_Section):
    """`data`: where demonstrations, comparisons and prompts come from."""

    demonstrations: list[DataSource] = Field(default_factory=list, description="For SFT.")
    comparisons: list[DataSource] = Field(default_factory=list, description="For the reward model.")
    prompts: list[DataSource] = Field(default_factory=list, description="For PPO rollouts.")
    evaluate: list[DataSource] = Field(
        default_factory=list,
        description="Held-out prompts; without it they are held out of `prompts`.",
    )
    held_out: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of prompts held out where a set has no split of its own.",
    )
    max_prompt_tokens: int = Field(512, ge=1, description="Longer prompts are dropped and counted.")
    max_tokens: int = Field(
        1024, ge=2, description="Longer demonstrations and comparisons are dropped."
    )


class StageSection(_Section):
    """What every training stage has."""

    args: dict[str, Any] = Field(default_factory=dict, description="For the stage's TRL config.")


class SftSection(StageSection):
    """`sft`: supervised fine-tuning on demonstrations."""


class RewardSection(StageSection):
    """`reward`: the reward model, from comparisons."""

    gate: Literal["stop", "warn"] = Field(
        "stop", description="What to do when the reward model is not clearly better than chance."
    )
    held_out_model: bool = Field(
        False,
        description="Train a second reward adapter on other comparisons, for evaluation only.",
    )


class PpoSection(StageSection):
    """`ppo`: reinforcement learning from the reward model. Sources: 2203.02155, 2403.17031."""

    updates: int = Field(100, ge=1, description="Rollouts, each followed by its PPO epochs.")
    reward: Literal["model", "gold"] = Field(
        "model", description="gold: the exact checker of a task, instead of the reward model."
    )
    kl_coef: float = Field(
        0.05, ge=0, description="beta of the per-token KL penalty in the reward."
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount.")
    lam: float = Field(0.95, ge=0, le=1, description="Lambda of GAE.")
    clip_value: float = Field(0.2, gt=0, description="Clip range of the value loss.")
    vf_coef: float = Field(0.1, gt=0, description="Weight of the value loss.")
    missing_eos_penalty: float = Field(1.0, ge=0, description="Taken off the score without eos.")
    value_learning_rate: float | None = Field(None, gt=0, description="Default: the policy's.")
    value_warmup_updates: int = Field(
        2, ge=0, description="First updates that move the value only, never the policy."
    )
    max_grad_norm_value: float = Field(1.0, gt=0, description="Gradient-norm clip of the value.")


class EvaluateSection(_Section):
    """`evaluate`: base, SFT and policy on the same held-out prompts and seeds."""

    n: int = Field(128, ge=2, description="Prompts.")
    max_new_tokens: int | None = Field(None, ge=1, description="Default: as in the rollouts.")
    temperature: float = Field(1.0, ge=0, description="0: greedy.")
    batch_size: int = Field(64, ge=1, description="Prompts generated at once.")
    samples: int = Field(
        8, ge=0, description="Rows in the sample table of the card, worst included."
    )


class CardSection(_Section):
    """`card`: what only a person can know."""

    title: str | None = Field(None, description="Default: the recipe's name.")
    license: str | None = Field(None, description="Default: from base and data, else left out.")
    language: list[str] = Field(default_factory=list, description="Language codes.")
    authors: str | None = Field(None, description="Who made it.")
    intended_use: str | None = Field(None, description="One paragraph.")
    limits: str | None = Field(None, description="One paragraph, beside those that are measured.")


class HubSection(_Section):
    """`hub`: where finished adapters are pushed; absent: nowhere."""

    policy: str | None = Field(None, description="repo_id as organisation/name.")
    reward: str | None = Field(None, description="repo_id as organisation/name.")
    value: str | None = Field(None, description="repo_id, only when wanted.")
    sft: str | None = Field(None, description="repo_id, only when wanted.")
    public: bool = Field(False, description="Private unless true.")


class Recipe(_Section):
    """One run, from demonstrations to the Hub."""

    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]*$", description="Names the run folder.")
    seed: int = Field(0, ge=0, description="Of everything that draws.")
    threads: int | None = Field(None, ge=1, description="torch threads on a CPU.")
    report_to: list[str] = Field(
        default_factory=list, description="Trackers, as transformers names."
    )
    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    sft: SftSection = SftSection()
    reward: RewardSection = RewardSection()
    ppo: PpoSection = PpoSection()
    evaluate: EvaluateSection = EvaluateSection()
    card: CardSection = CardSection()
    hub: HubSection = HubSection()


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, check and return a recipe; `overrides` are `key.sub=value` strings (`--set`).

    Relative data paths are resolved against the recipe's folder.

    Raises:
        RecipeError: With file, line, the wrong key or value, and a suggestion.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "recipe.yaml"
    if not path.is_file():
        raise RecipeError(
            f"there is no recipe at {path}",
            expected="a YAML file, or a folder that holds recipe.yaml",
            remedy="check the path; `lora-rlhf demo` needs no recipe",
        )
    if path.stat().st_size > _MAX_BYTES:
        raise RecipeError(f"{path} has over {_MAX_BYTES} bytes", expected="a recipe of a few kB")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 ({error.reason})", remedy="save it as UTF-8"
        ) from error
    return parse_recipe(text, str(path), overrides, folder=path.resolve().parent)


def parse_recipe(
    text: str, name: str, overrides: list[str] | None = None, folder: Path | None = None
) -> Recipe:
    """The same from text, called `name` in errors; data paths are relative to `folder`."""
    data, lines = parse_yaml(text, name)
    for override in overrides or []:
        _apply_override(data, lines, override)
    if folder is not None:
        _anchor_paths(data, folder)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _explain(error, name, lines) from None


def masked(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain data, with values of secret-like keys replaced by `***`."""

    def mask(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: mask(v, str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [mask(v, key) for v in value]
        secret = isinstance(value, str) and _SECRET.search(key) and not _NOT_SECRET.search(key)
        return "***" if secret or (isinstance(value, str) and value.startswith("hf_")) else value

    out: dict[str, Any] = mask(recipe.model_dump(mode="json"))
    return out


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, secrets masked; it loads back to an equal recipe."""
    return yaml.safe_dump(masked(recipe), sort_keys=False, allow_unicode=True)


def _apply_override(data: dict[str, Any], lines: Lines, override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise RecipeError(
            f"--set {override!r}", expected="key=value, such as ppo.args.learning_rate=2e-5"
        )
    target: Any = data
    parts: list[str | int] = [int(p) if p.isdigit() else p for p in key.strip().split(".")]
    for index, part in enumerate(parts[:-1]):
        if isinstance(target, dict) and target.get(str(part)) is None:
            target[str(part)] = {}
        try:
            target = target[part if isinstance(target, list) else str(part)]
        except (IndexError, TypeError, KeyError):
            reached = ".".join(map(str, parts[: index + 1]))
            raise RecipeError(f"--set {override!r}: there is no {reached}") from None
    parsed, _ = parse_yaml(f"value: {value}", f"--set {key}")
    try:
        target[parts[-1] if isinstance(target, list) else str(parts[-1])] = parsed["value"]
    except (IndexError, TypeError):
        raise RecipeError(f"--set {override!r}: there is no {key}") from None
    lines[tuple(parts)] = 0


def _anchor_paths(data: dict[str, Any], folder: Path) -> None:
    """Make `./x` and file paths of the recipe absolute, so that a run can start anywhere."""
    model = data.get("model")
    if isinstance(model, dict) and isinstance(model.get("id"), str) and model["id"].startswith("."):
        model["id"] = str((folder / model["id"]).resolve())
    sections = data.get("data")
    for sources in sections.values() if isinstance(sections, dict) else ():
        for source in sources if isinstance(sources, list) else ():
            path = source.get("path") if isinstance(source, dict) else None
            if isinstance(path, str) and not path.startswith("data://"):
                source["path"] = str((folder / path).resolve())


def _fields(model: type[BaseModel], at: tuple[str | int, ...]) -> Iterator[str]:
    """The keys allowed beside the one that `at` names."""
    for part in at:
        if isinstance(part, int):
            continue
        annotation: Any = (
            model.model_fields[part].annotation if part in model.model_fields else None
        )
        if annotation is not None and getattr(annotation, "__args__", None):
            annotation = annotation.__args__[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return
        model = annotation
    yield from model.model_fields


def _explain(error: ValidationError, name: str, lines: Lines) -> RecipeError:
    problems = []
    for item in error.errors():
        at = tuple(item["loc"])
        key = ".".join(map(str, at)) or "the recipe"
        known = at
        while known and known not in lines:
            known = known[:-1]
        line = lines.get(known, 1)
        where = f"{name}:{line}" if line else f"--set {key}"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            allowed = list(_fields(Recipe, at[:-1]))
            close = difflib.get_close_matches(str(at[-1]), allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(allowed)}"
            message = f"unknown key {key!r}; {hint}"
        elif item["type"] == "missing":
            message = f"{key!r} is required"
        else:
            message = f"{key} = {item.get('input')!r:.80}: {message}"
        problems.append((where, message))
    where, first = problems[0]
    more = "".join(f"\n  {place}: {text}" for place, text in problems[1:])
    return RecipeError(
        first + more, where=where, remedy="correct the recipe; docs/recipes.md lists the keys"
    )
