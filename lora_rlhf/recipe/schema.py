# SPDX-License-Identifier: Apache-2.0
"""The recipe's schema: every key with its type, bounds, default and description.

A stage's `args:` go unchanged to its TRL config, under TRL's names. The text under a field is its
description; docs/recipes.md is generated from these classes.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .home import expanded

COLUMNS = tuple(
    "system prompt input tools completion messages chosen rejected margin completions ranks scores "
    "label labeler user".split()
)
"""Column names that `columns:` may map to; in `data.text` only `text`."""

Rules = Iterator[tuple[str, *tuple[str, ...]]]
"""(message, keys) of each broken rule. Keys are dotted and relative to the section; the error
points to the first that the recipe has."""

_AT_HOME = ("~", "$HOME", "${HOME}")
_ADDRESS = re.compile(r"https?://[^\s/?#@]+/?")

SEEDS = 2**32 - 1000
"""Seeds must be below this: NumPy's end at 2**32, and each role adds an offset."""


class Section(BaseModel):
    """Base of all sections; unknown keys and wrong types are errors."""

    # Strict, so that `r: "4"`, `load_in_4bit: 1` and infinities are errors; 1 is still a float.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    def rules(self) -> Rules:
        """Yield the broken rules on keys that depend on each other.

        A rule compares values with defaults, never with pydantic's `model_fields_set`, because a
        run writes every key to its recipe.yaml and reads it back.
        """
        yield from ()

    @model_validator(mode="after")
    def _follows_its_rules(self, info: ValidationInfo) -> Self:
        if (info.context or {}).get("without_rules"):  # of stages that are not asked for
            return self
        if broken := next(self.rules(), None):
            message, *keys = broken
            raise PydanticCustomError("conflict", "{message}", {"message": message, "keys": keys})
        return self

    def changed(self, *keys: str) -> list[str]:
        """Return the keys whose values differ from their defaults."""
        fields = type(self).model_fields
        return [
            k for k in keys if getattr(self, k) != fields[k].get_default(call_default_factory=True)
        ]


class ModelSection(Section):
    """`model`: the backbone."""

    id: str
    """`tiny` (shipped), a local folder relative to the recipe, or a Hub id."""
    revision: str | None = None
    """Commit of the Hub repository."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on a CPU, bfloat16 from compute capability 8.0, else float16."""
    load_in_4bit: bool = False
    """Quantise to NF4 with double quantisation (bitsandbytes)."""
    hub_id: str | None = None
    """Hub id that adapters name as their base model, if `id` is tiny or a folder."""
    gradient_checkpointing: bool = False
    """Save memory by recomputing activations in the backward pass."""
    shard: bool = False
    """Share the base's layers between the processes of a run, for a base that fits no GPU."""

    @field_validator("id")
    @classmethod
    def _resolve(cls, given: str, info: ValidationInfo) -> str:
        """Make `./x`, `~/x` and the name of a model folder beside the recipe absolute."""
        _check_escapes(given)
        if info.context is None or given == "tiny" or "\0" in given:
            return given
        folder = info.context["folder"]
        path = (folder or Path()) / expanded(given)
        beside = folder and (given.startswith(".") or os.path.isfile(path / "config.json"))
        return os.path.abspath(path) if beside or given.startswith(_AT_HOME) else given

    def rules(self) -> Rules:
        """`revision` is for Hub ids only, `hub_id` for local base models only."""
        local = self.id == "tiny" or self.id.startswith((".", "~")) or Path(self.id).is_absolute()
        if self.revision is not None and local:
            message = f"model.revision is a commit of a Hub repository, but model.id is {self.id}: "
            yield f"{message}leave model.revision out", "revision"
        if self.hub_id is not None and not local:
            message = f"model.hub_id is for a local base model, but model.id {self.id} is already "
            yield (
                f"{message}a Hub id: leave model.hub_id out, or write a folder as ./folder",
                "hub_id",
            )


class LoraSection(Section):
    """`lora`: the shape of every role's adapter."""

    r: int = Field(16, ge=1)
    """Rank."""
    alpha: int = Field(32, ge=1)
    """Scale: the update is multiplied by alpha / r."""
    top_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the layers, from the top, that carry adapters."""
    target_modules: list[str] | None = None
    """Linear layers to adapt, by the last part of their name; default: all linear layers of the
    transformer blocks."""


class FormatSection(Section):
    """`format`: the form that every answer of a set of demonstrations must have."""

    json_schema: dict[str, Any] | None = None
    """The whole answer is JSON that this JSON Schema allows."""
    bullets: bool | int | None = None
    """true: the answer is a list of bullets (`- `); a number: with so many bullets."""
    max_words: int | None = Field(None, ge=1)
    """Largest number of words."""
    regex: str | None = None
    """Regular expression that matches the whole answer."""

    @field_validator("json_schema")
    @classmethod
    def _check_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        _check_plain(schema)
        return schema

    @field_validator("bullets")
    @classmethod
    def _check_bullets(cls, bullets: bool | int | None) -> bool | int | None:
        if bullets is not None and bullets < 1:
            raise ValueError("expected true, or a number of bullets from 1")
        return bullets

    @property
    def checks(self) -> dict[str, Any]:
        """The checks that are given, for `data.answer_format`."""
        return self.model_dump(exclude_none=True)


def _check_escapes(path: str | None) -> None:
    """Refuse what `"data\\train.jsonl"` becomes in YAML, where a backslash and t are a tab."""
    if path and any(letter in path for letter in "\t\n\r\a\b\f\v\x1b"):
        raise ValueError(
            "a path without control characters is expected: in double quotes a backslash begins "
            "an escape, so write it with / or in 'single quotes'"
        )


class DataSource(Section):
    """One dataset: a task generator, a file, or a Hub dataset. Exactly one of the three."""

    task: Literal["closed-world"] | None = None
    """The shipped task generator."""
    path: str | None = None
    """A .jsonl, .ndjson, .json, .csv, .tsv or .parquet file, .gz allowed; relative to the recipe;
    `data://x` lies in the folder named by LORA_RLHF_DATA."""
    hub: str | None = None
    """A dataset on the Hub, as org/name."""
    name: str | None = None
    """Configuration of the Hub dataset."""
    data_dir: str | None = None
    """Folder of the Hub dataset, if its parts are folders and not configurations."""
    split: str = "train"
    """Split of the Hub dataset."""
    revision: str | None = None
    """Commit, tag or branch of the Hub dataset."""
    columns: dict[str, str] = Field(
        {},
        description=f"Our column name -> the file's column name. Ours: {', '.join(COLUMNS)}; for "
        "`data.text` only text.",
    )
    ignore: list[str] = Field([])
    """Columns to leave unread although they look like a part of the prompt or a judgement."""
    limit: int | None = Field(None, ge=1)
    """Maximum number of rows, after shuffling."""
    skip_bad: int = Field(0, ge=0)
    """Maximum number of broken lines or rows to skip and count (path, hub)."""
    n: int = Field(256, ge=1)
    """Rows to generate (task only)."""
    completions: int = Field(4, ge=2)
    """Completions ranked per prompt (task comparisons only)."""
    agreement: float = Field(0.73, gt=0.5, le=1)
    """Share of pairs on which two simulated labelers agree (task comparisons only)."""
    format: FormatSection | None = None
    """Form that answers must have; others are broken rows (demonstrations only; path, hub)."""
    dialogue_as_text: bool = False
    """Prompts that hold a conversation as text are a task's material, such as one to summarize, and
    stay one text (path, hub)."""
    lang: str | None = None
    """Language of the messages to keep, such as en (message trees only; path, hub)."""
    license: str | None = None
    """Licence of the data, for the card."""
    labeler_instructions: str | None = None
    """Instructions given to the labelers, for the card (comparisons only)."""

    @field_validator("path")
    @classmethod
    def _resolve(cls, given: str | None, info: ValidationInfo) -> str | None:
        """Make the path absolute, so that a run can start in any working directory."""
        if given and re.match(r"(?!data:)[a-z0-9]+://", given):
            raise ValueError("a file of this machine is expected: download it, or use `hub:`")
        _check_escapes(given)
        if info.context is None or given is None or given.startswith("data://") or "\0" in given:
            return given
        folder = info.context["folder"]
        if folder is None and not given.startswith(_AT_HOME):
            return given
        try:
            return str(((folder or Path()) / expanded(given)).resolve())
        except (OSError, RuntimeError):  # the name is too long, or links form a circle
            return given

    def rules(self) -> Rules:
        """A source is of one kind, and has no key that this kind does not read."""
        for theirs in self.columns.values():
            if len(ours := [k for k, v in self.columns.items() if v == theirs]) > 1:
                message = (
                    f"columns reads {theirs!r} as {' and as '.join(ours)}: one of them is wrong"
                )
                yield message, "columns"
        given = self.changed("task", "path", "hub")
        listed = ", ".join(given) or "none"
        if len(given) != 1:
            yield f"give exactly one of task, path, hub (found: {listed})", *given
        readers = {
            "task": ("n", "completions", "agreement"),
            "path": ("columns", "ignore", "skip_bad", "format", "dialogue_as_text", "lang"),
            "hub": (
                "columns",
                "ignore",
                "skip_bad",
                "format",
                "dialogue_as_text",
                "lang",
                "name",
                "data_dir",
                "split",
                "revision",
            ),
        }
        every = {key for keys in readers.values() for key in keys}
        for key in self.changed(*sorted(every.difference(readers[given[0]]))):
            kinds = " or ".join(f"{kind}:" for kind, keys in readers.items() if key in keys)
            message = f"{key} is read with {kinds} only, but this source is a {given[0]}: "
            yield f"{message}leave {key} out", key


class AugmentSection(Section):
    """`data.augment`: new rows, marked, from rows that are trained on; never to evaluate on."""

    paraphrases: float = Field(0.0, ge=0, le=0.3)
    """Rows with the instruction worded differently by a template, as a share of the given rows."""
    identities: float = Field(0.0, ge=0, le=0.3)
    """Rows with names, pronouns and groups swapped in prompt and answers, as a share of them."""


class DataSection(Section):
    """`data`: sources of demonstrations, comparisons, prompts and text."""

    demonstrations: list[DataSource] = Field([])
    """For SFT."""
    comparisons: list[DataSource] = Field([])
    """For the reward model."""
    prompts: list[DataSource] = Field([])
    """For PPO rollouts."""
    text: list[DataSource] = Field([])
    """Plain text (column `text`) for `ppo.ptx_coef`."""
    evaluate: list[DataSource] = Field([])
    """Prompts to evaluate on; default: the held-out part of `prompts`."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the prompts that is held out from training."""
    max_prompt_tokens: int = Field(512, ge=1)
    """Prompts with more tokens are dropped and counted."""
    max_tokens: int = Field(1024, ge=2)
    """Demonstrations and comparisons with more tokens are dropped and counted."""
    max_lost: float = Field(0.2, ge=0, le=1)
    """Largest share of the rows that a filter may drop before the run stops."""
    max_prompts_per_user: int = Field(200, ge=1)
    """Most prompts of one user, where there is a column `user`; such a set is split by user."""
    personal_data: Literal["keep", "warn", "redact", "drop"] = "keep"
    """E-mail addresses, numbers of phones, cards and accounts, names: counted and warned of,
    replaced by pseudonyms, or their rows dropped. Needs the extra hygiene."""
    name_model: str = "en_core_web_sm"
    """spaCy model, package or folder, that finds names; where it is not installed, lists do."""
    near_duplicates: float | None = Field(None, ge=0.3, le=1)
    """Drop prompts as similar as this to an earlier one (Jaccard, of three words each)."""
    common_prefix: int | None = Field(None, ge=20)
    """Drop prompts whose first so many characters are those of an earlier one."""
    contamination: Literal["keep", "warn", "drop"] = "keep"
    """Training rows that share 13 words in a row with an evaluation prompt, or resemble one."""
    contamination_suites: list[str] = Field(["full"])
    """Suites whose prompts count as evaluation prompts too, where their files are at hand."""
    augment: AugmentSection = AugmentSection()
    identity_test: bool = False
    """Measure on comparisons if preferences change with names, pronouns and groups alone."""

    def rules(self) -> Rules:
        """Sources have no key that their set does not read."""
        for name in ("demonstrations", "comparisons", "prompts", "text", "evaluate"):
            known = ("text",) if name == "text" else COLUMNS
            for index, source in enumerate(getattr(self, name)):
                at = f"{name}.{index}"
                if name == "text" and source.task:
                    message = "data.text takes path or hub: a task generates no plain text"
                    yield message, f"{at}.task"
                for ours in source.columns.keys() - set(known):
                    hint = f"known: {', '.join(known)}"
                    if (theirs := source.columns[ours]) in known:
                        hint = f"did you mean {{{theirs}: {ours}}}? {hint}"
                    elif close := difflib.get_close_matches(ours, known, n=1, cutoff=0.7):
                        hint = f"did you mean {close[0]!r}? {hint}"
                    message = f"columns maps to {ours!r}; {hint}"
                    yield message, f"{at}.columns.{ours}", f"{at}.columns"
                if name != "demonstrations" and source.format:
                    message = f"data.{at}.format is read for data.demonstrations only: leave it out"
                    yield message, f"{at}.format"
                if name == "comparisons":
                    continue
                for key in source.changed("completions", "agreement", "labeler_instructions"):
                    message = f"data.{at}.{key} is read for data.comparisons only: leave it out"
                    yield message, f"{at}.{key}"


class StageSection(Section):
    """Base of the sections of training stages."""

    args: dict[str, Any] = Field({})
    """Arguments of the stage's TRL config."""

    @field_validator("args")
    @classmethod
    def _check_args(cls, args: dict[str, Any]) -> dict[str, Any]:
        _check_plain(args)
        return args


def _check_plain(value: Any) -> None:
    """Refuse values that YAML cannot hold, because a run writes its recipe and reads it back."""
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"the key {wrong[0]!r} is not text")
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            _check_plain(part)
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"{value!r:.80} is no plain data, such as a number, text or a list")


def _resolved_adapter(cls: Any, given: str | None, info: ValidationInfo) -> str | None:
    """Make a folder beside the recipe absolute; a Hub id (org/name) stays as it is."""
    if given is None or info.context is None or "\0" in given:
        return given
    folder = info.context["folder"]
    beside = folder or given.startswith(_AT_HOME)
    path = os.path.abspath((folder or Path()) / expanded(given))
    hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given) and not os.path.isdir(path)
    return path if beside and not hub_id else given


class PrivacySection(Section):
    """`sft.privacy`, `reward.privacy`: DP-SGD (1607.00133), and an audit of what is remembered."""

    epsilon: float | None = Field(None, gt=0)
    """Train privately with this budget: one demonstration, or one prompt with its comparisons, can
    change the probability of any result by a factor of e^epsilon at most. Needs the extra
    `privacy`."""
    delta: float | None = Field(None, gt=0, lt=1)
    """Probability with which the guarantee may fail; default: a tenth of 1 / examples."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest gradient norm of one example."""
    canaries: int = Field(0, ge=0)
    """Random examples that are planted, each with probability one half, to audit how much of them
    is remembered (2305.08846, 1802.08232)."""

    def rules(self) -> Rules:
        """`delta` and `clip_norm` belong to a budget."""
        for key in self.changed("delta", "clip_norm") if self.epsilon is None else ():
            yield f"privacy.{key} is read with privacy.epsilon only", key


if TYPE_CHECKING:
    StartSection = StageSection
else:  # `from` is a keyword, so a class cannot define it
    StartSection = create_model(
        "StartSection",
        __base__=StageSection,
        __validators__={"_resolve_from": field_validator("from")(_resolved_adapter)},
        # There is no source to search for docstrings, and pydantic would look in every caller's.
        __cls_kwargs__={"use_attribute_docstrings": False},
        **{
            "from": (
                str | None,
                Field(
                    None,
                    description="Folder of your own adapter, relative to the recipe, or its Hub "
                    "id; it is used unchanged instead of training this stage.",
                ),
            )
        },
    )
    StartSection.model_config["use_attribute_docstrings"] = True  # for the sections below


def _unused(key: str) -> str:
    start = f"{key.partition('.')[0]}.from"
    return (
        f"{key}: without effect with {start}, which is used as it is; leave it out, or add "
        f"`--set {key}={{}}`"
    )


class SftSection(StartSection):
    """`sft`: supervised fine-tuning on demonstrations."""

    privacy: PrivacySection = PrivacySection()

    @property
    def start(self) -> str | None:
        """Folder or Hub id of the adapter that is used instead of training this stage."""
        return getattr(self, "from")  # type: ignore[no-any-return]  # noqa: B009

    def rules(self) -> Rules:
        """Nothing is trained with `from`."""
        if self.start and self.args:
            yield _unused("sft.args"), "args", "from"
        if self.start and self.changed("privacy"):
            yield _unused("sft.privacy"), "privacy", "from"


class RewardSection(StartSection):
    """`reward`: the reward model, from comparisons."""

    gate: Literal["stop", "warn"] = "stop"
    """Reaction to a reward model that is not clearly better than chance."""
    held_out_model: bool = False
    """Train a second reward adapter on other comparisons, for evaluation only."""
    ensemble: int | None = Field(None, ge=2, le=16)
    """Number of reward adapters, which differ in seed and data order."""
    combine: Literal["mean", "min", "mean_minus_std", "warm"] = "mean"
    """How an ensemble scores; warm: as one adapter, the mean of their B·A products."""
    combine_std: float = Field(1.0, ge=0)
    """Standard deviations subtracted by combine: mean_minus_std."""
    privacy: PrivacySection = PrivacySection()

    @property
    def start(self) -> str | None:
        """Folder or Hub id of the adapter that is used instead of training this stage."""
        return getattr(self, "from")  # type: ignore[no-any-return]  # noqa: B009

    def rules(self) -> Rules:
        """`combine` is for ensembles, `combine_std` for `combine: mean_minus_std`."""
        if self.start and self.ensemble is not None:
            yield "reward.from is one adapter: leave reward.ensemble out", "ensemble", "from"
        if self.start and self.args and not self.held_out_model:
            yield _unused("reward.args"), "args", "from"
        if self.start and self.changed("privacy") and not self.held_out_model:
            yield _unused("reward.privacy"), "privacy", "from"
        if self.ensemble is None and self.changed("combine"):
            yield "reward.combine needs reward.ensemble: 2 or more adapters", "combine"
        if self.combine != "mean_minus_std" and self.changed("combine_std"):
            message = "reward.combine_std is read by reward.combine: mean_minus_std only"
            yield message, "combine_std"


class PpoSection(StageSection):
    """`ppo`: reinforcement learning from the reward model. Sources: 2203.02155, 2403.17031."""

    updates: int = Field(100, ge=1)
    """Rollouts, each followed by its PPO epochs."""
    reward: str = "model"
    """The reward model; `gold`, a task's exact checker; or `module:function`, a function with TRL's
    signature in module.py beside the recipe."""
    kl_coef: float = Field(0.05, ge=0)
    """beta of the per-token KL penalty in the reward; 0: no penalty."""
    kl_target: float | None = Field(None, gt=0)
    """Adapt beta towards this KL, in nats per sequence (1909.08593)."""
    kl_horizon: int = Field(10_000, ge=1)
    """Horizon of the adaptive KL controller, in episodes."""
    kl_budget: float | None = Field(None, gt=0)
    """Stop when an update's KL to SFT exceeds this, in nats per sequence."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount factor."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of GAE."""
    clip_value: float = Field(0.2, gt=0)
    """Clip range of the value loss."""
    vf_coef: float = Field(0.1, gt=0)
    """Weight of the value loss."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """Subtracted from the score of a completion without eos."""
    value_learning_rate: float | None = Field(None, gt=0)
    """Default: the policy's."""
    value_warmup_updates: int = Field(2, ge=0)
    """First updates, in which only the value model trains."""
    max_grad_norm_value: float = Field(1.0, gt=0)
    """Gradient-norm clip of the value model."""
    value: Literal["adapter", "head"] = "adapter"
    """head: only a linear head on the policy's detached hidden states; cheaper."""
    trunk_states: Literal["device", "cpu", "off"] = "device"
    """Where a rollout keeps the hidden states that leave the frozen layers (lora.top_fraction);
    off: every pass computes them again."""
    normalize_reward: bool = False
    """Divide scores by their running std; the mean is not shifted."""
    clip_reward: float | None = Field(None, gt=0)
    """Clip scores to plus or minus this, after normalize_reward."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of an entropy bonus."""
    ptx_coef: float = Field(0.0, ge=0)
    """Weight of the language-model loss on data.text, per token."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the policy's adapter, which becomes the result (0.992 in
    2203.02155)."""
    rollout_server: str | None = None
    """Address of `lora-rlhf rollout-server` on another GPU or machine, where vLLM samples the
    rollouts."""
    max_staleness: int = Field(0, ge=0, le=1)
    """1: the rollout server samples the next rollout while this one trains, by a policy that is
    then one update behind; truncated importance weights correct for it."""
    watch: Literal["off", "warn", "raise_kl", "stop", "best"] = "warn"
    """On signs of over-optimisation: warn; double kl_coef; stop; or stop and return to the policy
    with the best held-out reward."""

    @field_validator("rollout_server")
    @classmethod
    def _check_server(cls, given: str | None) -> str | None:
        """Accept http and https addresses without user, password or query."""
        if given is not None and not _ADDRESS.fullmatch(given):
            raise ValueError("expected an address such as http://127.0.0.1:8000")
        return given

    @field_validator("reward")
    @classmethod
    def _resolve(cls, given: str, info: ValidationInfo) -> str:
        """Make the file of a function absolute."""
        if given in ("model", "gold"):
            return given
        file, _, name = given.rpartition(":")
        if not file or not name.isidentifier() or "\0" in file:
            raise ValueError("expected model, gold, or module:function of a file beside the recipe")
        file = file if file.endswith(".py") else file.replace(".", "/") + ".py"
        folder = info.context and info.context["folder"]
        if folder or (info.context is not None and file.startswith(_AT_HOME)):
            file = os.path.abspath((folder or Path()) / expanded(file))
        return f"{file}:{name}"

    @property
    def function(self) -> tuple[str, str] | None:
        """File and name of the user's own reward function; None without one."""
        if self.reward in ("model", "gold"):
            return None
        file, _, name = self.reward.rpartition(":")
        return file, name

    def rules(self) -> Rules:
        """One key decides which policy is kept; the KL controller starts from a beta above 0;
        only a server can sample while this process trains."""
        if self.max_staleness and self.rollout_server is None:
            message = "ppo.max_staleness is read with ppo.rollout_server only: without one, "
            yield f"{message}sampling and training take turns", "max_staleness"
        best = self.watch == "best"
        if self.ema is not None and (best or self.kl_budget is not None):
            message = f"ppo.ema and ppo.{'watch: best' if best else 'kl_budget'} both decide which "
            yield f"{message}policy is kept: leave one out", "ema", "watch" if best else "kl_budget"
        if self.kl_target is not None and self.kl_coef == 0:
            message = "ppo.kl_target multiplies ppo.kl_coef, which is 0: start above 0"
            yield message, "kl_coef", "kl_target"


class GroupSection(StageSection):
    """`grpo` and `rloo`: TRL's trainers instead of PPO. Sources: 2402.03300, 2402.14740."""

    updates: int | None = Field(None, ge=1)
    """Rollouts; default: ppo.updates."""
    kl_coef: float | None = Field(None, ge=0)
    """beta; default: ppo.kl_coef."""
    num_generations: int = Field(4, ge=2)
    """Completions per prompt: the group size."""


class DpoSection(StageSection):
    """`dpo`: TRL's trainer on the comparisons, instead of PPO. Source: 2305.18290."""

    beta: float = Field(0.1, gt=0)
    """beta of the implicit KL to SFT."""


class BestOfNSection(Section):
    """`best_of_n`: no training; of n SFT samples the one with the highest reward."""

    n: int = Field(16, ge=2)
    """Samples per prompt."""


class EvaluateSection(Section):
    """`evaluate`: base, SFT and policy on the same held-out prompts and seeds."""

    n: int = Field(128, ge=2)
    """Number of prompts."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Default: as in the rollouts."""
    temperature: float = Field(1.0, ge=0)
    """0: greedy."""
    batch_size: int = Field(64, ge=1)
    """Prompts generated at once."""
    samples: int = Field(8, ge=0)
    """Rows of the card's table of samples, the worst included."""


class CheckpointSection(Section):
    """`checkpoint`: checkpoints and backups from which a stage can resume, and the time budget."""

    every_minutes: float | None = Field(5.0, ge=0)
    """Save at the first update after this many minutes; 0: every update."""
    every_steps: int | None = Field(None, ge=1)
    """Save after this many optimizer steps, also within a rollout."""
    keep: int = Field(2, ge=1)
    """Number of checkpoints kept per stage."""
    max_minutes: float | None = Field(None, gt=0)
    """Time budget: save and stop after this many minutes; run the same command to continue."""
    hub: str | None = None
    """A private repository, organisation/name, to back the run up to; the same recipe with an empty
    --out, on any machine, continues from it."""
    hub_minutes: float = Field(15.0, ge=0)
    """Least minutes between backups; each stage's end is backed up too."""

    def rules(self) -> Rules:
        """`hub_minutes` is for backups only."""
        if self.hub is None and self.changed("hub_minutes"):
            yield "checkpoint.hub_minutes needs checkpoint.hub", "hub_minutes"


class CardSection(Section):
    """`card`: the parts of the model card that only its author knows."""

    title: str | None = None
    """Default: the recipe's name."""
    license: str | None = None
    """Default: from base and data, else left out."""
    language: list[str] = Field([])
    """Language codes."""
    authors: str | None = None
    """Who made the model."""
    intended_use: str | None = None
    """One paragraph."""
    limits: str | None = None
    """One paragraph, in addition to the measured limits."""


class HubSection(Section):
    """`hub`: repositories that finished adapters are pushed to; by default nothing is pushed."""

    policy: str | None = None
    """Repository of the policy: organisation/name."""
    reward: str | None = None
    """Repository of the reward model."""
    value: str | None = None
    """Repository of the value model; rarely needed."""
    sft: str | None = None
    """Repository of the SFT adapter; rarely needed."""
    public: bool = False
    """Create public repositories instead of private ones."""


class RoundSection(Section):
    """`rounds`: where labels came from, oldest round first; `lora-rlhf iterate` writes it."""

    number: int = Field(1, ge=1)
    """Number of the round."""
    run: str
    """Name of the run whose model answered."""
    record_sha256: str
    """sha256 of that run's record.json."""
    model: Literal["sft", "policy"] = "sft"
    """The model that answered."""
    strategy: str = "random"
    """How the prompts were chosen."""
    tasks_sha256: str
    """sha256 of the round's task file."""
    labels: str
    """Who labelled: `simulated`, a project, or a file."""
    labels_sha256: str
    """sha256 of the round's comparisons, one of data.comparisons."""
    rankings: int = Field(1, ge=1)
    """Rankings of the round."""
    noise: float | None = Field(None, ge=0)
    """Temperature of simulated labelers, which later rounds keep."""
    start: Literal["sft", "policy"] = "sft"
    """The model from which the round's policy went on."""


class Recipe(Section):
    """One run, from demonstrations to the Hub."""

    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]*$")
    """Default name of the run directory."""
    seed: int = Field(0, ge=0, lt=SEEDS)
    """Random seed for the whole run."""
    threads: int | None = Field(None, ge=1)
    """torch threads on a CPU."""
    report_to: list[str] = Field([])
    """Experiment trackers, by the names that transformers uses."""
    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    sft: SftSection = SftSection()
    reward: RewardSection = RewardSection()
    algorithm: Literal["ppo", "grpo", "rloo", "dpo", "best_of_n"] = "ppo"
    """How the policy is made; each algorithm has its section below."""
    ppo: PpoSection = PpoSection()
    grpo: GroupSection = GroupSection()
    rloo: GroupSection = GroupSection()
    dpo: DpoSection = DpoSection()
    best_of_n: BestOfNSection = BestOfNSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    rounds: list[RoundSection] = Field([])
    """Rounds of feedback behind the labels, oldest first; `lora-rlhf iterate` writes them."""
    card: CardSection = CardSection()
    hub: HubSection = HubSection()

    def rules(self) -> Rules:
        """Sections agree with each other."""
        repositories: dict[str, str] = {}
        for key in ("hub.policy", "hub.reward", "hub.value", "hub.sft", "checkpoint.hub"):
            section, name = key.split(".")
            repo_id = getattr(getattr(self, section), name)
            other = repositories.setdefault(repo_id.casefold(), key) if repo_id else key
            if other != key:
                message = f"{key} and {other} are both {repo_id}: a repository holds one adapter, "
                yield f"{message}or the checkpoints of one run, so give each its own", key, other
        ppo = self.algorithm == "ppo"  # nothing else reads these keys
        if ppo and self.ppo.ptx_coef and not self.data.text:
            message = "ppo.ptx_coef is above 0, but data.text is empty: add text, or set it to 0"
            yield message, "ppo.ptx_coef", "data.text"
        if ppo and self.ppo.watch == "best" and not self.reward.held_out_model:
            message = "ppo.watch: best needs reward.held_out_model: true to choose by"
            yield message, "ppo.watch", "reward.held_out_model"
        if self.algorithm == "best_of_n" and self.ppo.reward == "gold":
            message = "algorithm: best_of_n chooses by the reward model, not by gold"
            yield message, "ppo.reward", "algorithm"
        if self.algorithm == "dpo" and self.reward.privacy.epsilon is not None:
            message = "algorithm: dpo trains the policy on the comparisons themselves, which "
            yield f"{message}reward.privacy does not protect", "reward.privacy.epsilon", "algorithm"
        given = self.ppo.function or self.reward.start
        by_model = self.algorithm == "best_of_n" and not given
        if (self.algorithm == "dpo" or by_model) and not self.data.comparisons:
            message = f"algorithm: {self.algorithm} needs data.comparisons"
            yield message, "algorithm", "data.comparisons"
