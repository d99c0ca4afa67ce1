# SPDX-License-Identifier: Apache-2.0
"""The recipe's keys: every knob has its one home here, with its type, bounds and meaning.

`args:` of a stage goes through to the TRL config of that stage unchanged, so those names are TRL's
own. config.py reads a recipe from a file; docs/recipes.md is written from these classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError


def conflict(said: str, *keys: str) -> PydanticCustomError:
    """An error about keys that do not go together, dotted and relative to the section.

    config.py tells the line of the first of them that the recipe has. What a recipe sets is told by
    its value and never by pydantic's `model_fields_set`: a run writes down every key, and reads it.
    """
    return PydanticCustomError("conflict", "{said}", {"said": said, "keys": list(keys)})


class Section(BaseModel):
    """Keys that belong together; unknown ones and wrong types are errors."""

    # Strict, so that `r: "4"`, `load_in_4bit: 1` and infinities are errors; 1 is still a float.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    def changed(self, *keys: str) -> list[str]:
        """Those of the keys that differ from their defaults."""
        fields = type(self).model_fields
        return [
            k for k in keys if getattr(self, k) != fields[k].get_default(call_default_factory=True)
        ]


def plain_data(value: Any) -> Any:
    """The value, if YAML can hold it; else an error that shows what it cannot."""
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"the key {wrong[0]!r} is not text")
        return {key: plain_data(found) for key, found in value.items()}
    if isinstance(value, list):
        return [plain_data(found) for found in value]
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"{value!r:.80} is no plain data, such as a number, text or a list")
    return value


class ModelSection(Section):
    """`model`: the backbone."""

    id: str = Field(
        description="`tiny` (shipped), a local folder, relative to the recipe, or a Hub id."
    )
    revision: str | None = Field(None, description="Commit of the Hub repository.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: float32 on a CPU, bfloat16 from compute capability 8.0, else float16.",
    )
    load_in_4bit: bool = Field(False, description="NF4 with double quantisation, by bitsandbytes.")
    hub_id: str | None = Field(
        None,
        description="The Hub id that adapters name as their base, when `id` is tiny or a folder.",
    )
    gradient_checkpointing: bool = Field(False, description="Trade a second forward for memory.")

    @model_validator(mode="after")
    def _of_the_hub(self) -> ModelSection:
        folder = self.id.startswith((".", "~")) or Path(self.id).is_absolute()
        if self.revision is not None and (folder or self.id == "tiny"):
            raise conflict(
                f"model.revision is a commit of a Hub repository, and model.id is {self.id}: "
                "leave model.revision out",
                "revision",
            )
        if self.hub_id is not None and not folder and self.id != "tiny":
            raise conflict(
                f"model.hub_id is for a base that is on this machine, and model.id {self.id} is a "
                "Hub id: leave model.hub_id out, or write a folder as ./folder",
                "hub_id",
            )
        return self


class LoraSection(Section):
    """`lora`: the shape of every role's adapter."""

    r: int = Field(16, ge=1, description="Rank.")
    alpha: int = Field(32, ge=1, description="Scale; the update is multiplied by alpha / r.")
    top_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of the layers, from the top, that carry adapters."
    )
    target_modules: list[str] | None = Field(
        None, description="Linear layers to adapt, by last name; default: all inside the layers."
    )


COLUMNS = (
    *("prompt", "completion", "messages", "chosen", "rejected", "margin"),
    *("completions", "ranks", "labeler"),
)
"""What `columns:` of a set may map to; those of layouts.py. Of `data.text` only `text`."""


class DataSource(Section):
    """One dataset: a task generator, a file, or a Hub dataset. Exactly one of the three."""

    task: Literal["closed-world"] | None = Field(None, description="The shipped generator.")
    path: str | None = Field(
        None,
        description="A .jsonl, .ndjson, .json, .csv, .tsv or .parquet file, .gz allowed; relative "
        "to the recipe; `data://x` is the folder named by LORA_RLHF_DATA.",
    )
    hub: str | None = Field(None, description="A dataset on the Hub, as org/name.")
    name: str | None = Field(None, description="Hub dataset configuration.")
    split: str = Field("train", description="Split of a Hub dataset.")
    revision: str | None = Field(None, description="Commit, tag or branch of a Hub dataset.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description=f"Our column name -> the file's column name. Ours: {', '.join(COLUMNS)}; of "
        "`data.text` only text.",
    )
    limit: int | None = Field(
        None, ge=1, description="At most this many rows, taken after shuffling."
    )
    skip_bad: int = Field(
        0,
        ge=0,
        description="Leave out at most this many broken lines or rows, counted (path, hub).",
    )
    n: int = Field(256, ge=1, description="Rows to generate (task only).")
    completions: int = Field(
        4, ge=2, description="Completions ranked per prompt (task comparisons only)."
    )
    agreement: float = Field(
        0.73, gt=0.5, le=1, description="Share of pairs on which two simulated labelers agree."
    )
    license: str | None = Field(None, description="Licence of the data, for the card.")
    labeler_instructions: str | None = Field(
        None, description="Instructions that labelers were given, for the card (comparisons only)."
    )

    @model_validator(mode="after")
    def _one_source(self) -> DataSource:
        given = self.changed("task", "path", "hub")
        if len(given) != 1:
            found = f"give exactly one of task, path, hub (found: {', '.join(given) or 'none'})"
            raise conflict(found, *given)
        readers = {
            "task": ("n", "completions", "agreement"),
            "path": ("columns", "skip_bad"),
            "hub": ("columns", "skip_bad", "name", "split", "revision"),
        }
        every = {key for keys in readers.values() for key in keys}
        unread = self.changed(*sorted(every.difference(readers[given[0]])))
        if unread:
            kinds = " or ".join(f"{kind}:" for kind, keys in readers.items() if unread[0] in keys)
            raise conflict(
                f"{unread[0]} is read with {kinds} only, and this source is a {given[0]}: "
                f"leave {unread[0]} out",
                *unread,
            )
        return self


class DataSection(Section):
    """`data`: where demonstrations, comparisons and prompts come from."""

    demonstrations: list[DataSource] = Field(default_factory=list, description="For SFT.")
    comparisons: list[DataSource] = Field(default_factory=list, description="For the reward model.")
    prompts: list[DataSource] = Field(default_factory=list, description="For PPO rollouts.")
    text: list[DataSource] = Field(
        default_factory=list, description="Plain text (column `text`) for `ppo.ptx_coef`."
    )
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
    max_lost: float = Field(
        0.2, ge=0, le=1, description="Share of the rows that a token limit may take; more stops."
    )

    @model_validator(mode="after")
    def _every_key_is_read(self) -> DataSection:
        for name in ("demonstrations", "comparisons", "prompts", "text", "evaluate"):
            for index, source in enumerate(getattr(self, name)):
                at = f"{name}.{index}"
                if name == "text" and source.task:
                    raise conflict(
                        "data.text takes path or hub: a task generates no plain text", f"{at}.task"
                    )
                known = ("text",) if name == "text" else COLUMNS
                for ours in source.columns.keys() - set(known):
                    raise conflict(
                        f"data.{at}.columns maps to {ours!r}, which data.{name} has not; known: "
                        f"{', '.join(known)}",
                        f"{at}.columns.{ours}",
                        f"{at}.columns",
                    )
                labels = source.changed("completions", "agreement", "labeler_instructions")
                if labels and name != "comparisons":
                    raise conflict(
                        f"data.{at}.{labels[0]} is read for data.comparisons only: leave it out",
                        f"{at}.{labels[0]}",
                    )
        return self


class StageSection(Section):
    """What every training stage has."""

    args: dict[str, Any] = Field(default_factory=dict, description="For the stage's TRL config.")

    @field_validator("args")
    @classmethod
    def _plain(cls, args: dict[str, Any]) -> dict[str, Any]:
        # The run writes it down as YAML, and has to read it again.
        plain: dict[str, Any] = plain_data(args)
        return plain


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
    ensemble: int | None = Field(
        None,
        ge=2,
        le=16,
        description="Reward adapters that differ in seed and data order; each costs one adapter.",
    )
    combine: Literal["mean", "min", "mean_minus_std", "warm"] = Field(
        "mean",
        description="How an ensemble scores; warm: one adapter, the mean of their B·A products.",
    )
    combine_std: float = Field(
        1.0, ge=0, description="Standard deviations taken off by combine: mean_minus_std."
    )

    @model_validator(mode="after")
    def _combined(self) -> RewardSection:
        if self.ensemble is None and self.changed("combine"):
            raise conflict("reward.combine needs reward.ensemble: 2 or more adapters", "combine")
        if self.combine != "mean_minus_std" and self.changed("combine_std"):
            raise conflict(
                "reward.combine_std is read by reward.combine: mean_minus_std only", "combine_std"
            )
        return self


class PpoSection(StageSection):
    """`ppo`: reinforcement learning from the reward model. Sources: 2203.02155, 2403.17031."""

    updates: int = Field(100, ge=1, description="Rollouts, each followed by its PPO epochs.")
    reward: Literal["model", "gold"] = Field(
        "model", description="gold: the exact checker of a task, instead of the reward model."
    )
    kl_coef: float = Field(
        0.05, ge=0, description="beta of the per-token KL penalty in the reward; 0: no penalty."
    )
    kl_target: float | None = Field(
        None, gt=0, description="Adapt beta towards this KL, nats per sequence (1909.08593)."
    )
    kl_horizon: int = Field(
        10_000, ge=1, description="Episodes over which kl_target's controller acts."
    )
    kl_budget: float | None = Field(
        None, gt=0, description="Stop once an update's KL to SFT is above this, nats per sequence."
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
    value: Literal["adapter", "head"] = Field(
        "adapter",
        description="head: only a linear head on the policy's own states, detached; cheaper.",
    )
    trunk_states: Literal["device", "cpu", "off"] = Field(
        "device",
        description="Where a rollout keeps the states that leave the frozen layers "
        "(lora.top_fraction); off: every pass runs these layers again.",
    )
    normalize_reward: bool = Field(
        False, description="Divide scores by their running std; the mean is not shifted."
    )
    clip_reward: float | None = Field(
        None, gt=0, description="Clip scores to plus or minus this, after normalize_reward."
    )
    entropy_coef: float = Field(0.0, ge=0, description="Weight of an entropy bonus.")
    ptx_coef: float = Field(
        0.0, ge=0, description="Weight of the language-model loss on data.text, per token."
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of a moving average of the policy's adapter, which is then the result "
        "(0.992 in 2203.02155).",
    )
    watch: Literal["off", "warn", "raise_kl", "stop", "best"] = Field(
        "warn",
        description="On signs of over-optimisation: say so; double kl_coef; stop; or stop and "
        "return to the best policy by held-out reward.",
    )

    @model_validator(mode="after")
    def _one_controller(self) -> PpoSection:
        if self.ema is not None and (self.watch == "best" or self.kl_budget is not None):
            other = "watch" if self.watch == "best" else "kl_budget"
            raise conflict(
                "ppo.ema, and watch: best or kl_budget: both say which policy is kept", "ema", other
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise conflict(
                "ppo.kl_target multiplies ppo.kl_coef, which is 0: start above 0",
                "kl_coef",
                "kl_target",
            )
        return self


class GroupSection(StageSection):
    """`grpo` and `rloo`: TRL's trainers in the place of PPO. Sources: 2402.03300, 2402.14740."""

    updates: int | None = Field(None, ge=1, description="Rollouts; default: ppo.updates.")
    kl_coef: float | None = Field(None, ge=0, description="beta; default: ppo.kl_coef.")
    num_generations: int = Field(4, ge=2, description="Completions per prompt: the group.")


class DpoSection(StageSection):
    """`dpo`: TRL's trainer on the comparisons, in the place of PPO. Source: 2305.18290."""

    beta: float = Field(0.1, gt=0, description="beta of the implicit KL to SFT.")


class BestOfNSection(Section):
    """`best_of_n`: no training; of n SFT samples the one with the highest reward."""

    n: int = Field(16, ge=2, description="Samples per prompt.")


class EvaluateSection(Section):
    """`evaluate`: base, SFT and policy on the same held-out prompts and seeds."""

    n: int = Field(128, ge=2, description="Prompts.")
    max_new_tokens: int | None = Field(None, ge=1, description="Default: as in the rollouts.")
    temperature: float = Field(1.0, ge=0, description="0: greedy.")
    batch_size: int = Field(64, ge=1, description="Prompts generated at once.")
    samples: int = Field(
        8, ge=0, description="Rows in the sample table of the card, worst included."
    )


class CheckpointSection(Section):
    """`checkpoint`: what is kept while a stage trains, so that it can go on; changes no result."""

    every_minutes: float | None = Field(
        5.0, ge=0, description="Save at the next update after so many minutes; 0: every update."
    )
    every_steps: int | None = Field(
        None, ge=1, description="Save after so many optimizer steps, in a rollout's middle too."
    )
    keep: int = Field(2, ge=1, description="Checkpoints of a stage that are kept.")
    max_minutes: float | None = Field(
        None, gt=0, description="Save and stop after so many minutes; the same command goes on."
    )
    hub: str | None = Field(
        None,
        description="A private repository, organisation/name, that is kept equal to the run; the "
        "same recipe with an empty --out, on any machine, goes on from there.",
    )
    hub_minutes: float = Field(
        15.0, ge=0, description="Send there at most every so many minutes, and after each stage."
    )

    @model_validator(mode="after")
    def _with_hub(self) -> CheckpointSection:
        if self.hub is None and self.changed("hub_minutes"):
            raise conflict("checkpoint.hub_minutes needs checkpoint.hub", "hub_minutes")
        return self


class CardSection(Section):
    """`card`: what only a person can know."""

    title: str | None = Field(None, description="Default: the recipe's name.")
    license: str | None = Field(None, description="Default: from base and data, else left out.")
    language: list[str] = Field(default_factory=list, description="Language codes.")
    authors: str | None = Field(None, description="Who made it.")
    intended_use: str | None = Field(None, description="One paragraph.")
    limits: str | None = Field(None, description="One paragraph, beside those that are measured.")


class HubSection(Section):
    """`hub`: where finished adapters are pushed; absent: nowhere."""

    policy: str | None = Field(None, description="repo_id as organisation/name.")
    reward: str | None = Field(None, description="repo_id as organisation/name.")
    value: str | None = Field(None, description="repo_id, only when wanted.")
    sft: str | None = Field(None, description="repo_id, only when wanted.")
    public: bool = Field(False, description="Private unless true.")

    @model_validator(mode="after")
    def _a_repository_each(self) -> HubSection:
        taken: dict[str, str] = {}
        for role in ("policy", "reward", "value", "sft"):
            repo_id = getattr(self, role)
            if repo_id is None:
                continue
            if (other := taken.setdefault(repo_id.casefold(), role)) != role:
                raise conflict(
                    f"hub.{role} and hub.{other} are both {repo_id}: a repository holds one "
                    "adapter, so give each role its own",
                    role,
                    other,
                )
        return self


class Recipe(Section):
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
    algorithm: Literal["ppo", "grpo", "rloo", "dpo", "best_of_n"] = Field(
        "ppo", description="What turns the reward into a policy; each has its section below."
    )
    ppo: PpoSection = PpoSection()
    grpo: GroupSection = GroupSection()
    rloo: GroupSection = GroupSection()
    dpo: DpoSection = DpoSection()
    best_of_n: BestOfNSection = BestOfNSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    card: CardSection = CardSection()
    hub: HubSection = HubSection()

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        """Refuse what cannot work together, before a model is loaded."""
        ppo, reward = self.ppo, self.reward
        for role in ("policy", "reward", "value", "sft"):
            named = getattr(self.hub, role)
            if named and self.checkpoint.hub and named.casefold() == self.checkpoint.hub.casefold():
                raise conflict(
                    f"checkpoint.hub and hub.{role} are both {named}: checkpoints need a "
                    "repository of their own",
                    "checkpoint.hub",
                    f"hub.{role}",
                )
        if ppo.ptx_coef and not self.data.text:
            raise conflict(
                "ppo.ptx_coef is above 0, and data.text is empty: give it text",
                "ppo.ptx_coef",
                "data.text",
            )
        if ppo.watch == "best" and not reward.held_out_model:
            raise conflict(
                "ppo.watch: best needs reward.held_out_model: true to choose by",
                "ppo.watch",
                "reward.held_out_model",
            )
        if self.algorithm == "best_of_n" and ppo.reward == "gold":
            raise conflict(
                "algorithm: best_of_n chooses by the reward model, not by gold",
                "ppo.reward",
                "algorithm",
            )
        if self.algorithm in ("dpo", "best_of_n") and not self.data.comparisons:
            raise conflict(
                f"algorithm: {self.algorithm} needs data.comparisons",
                "algorithm",
                "data.comparisons",
            )
        return self
