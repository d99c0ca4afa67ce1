# SPDX-License-Identifier: Apache-2.0
"""The recipe's keys: every knob has its one home here, with its type, bounds and meaning.

`args:` of a stage goes through to the TRL config of that stage unchanged, so those names are TRL's
own. config.py reads a recipe from a file; docs/recipes.md is written from these classes.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
    ensemble: int | None = Field(
        None,
        ge=2,
        le=16,
        description="Reward adapters that differ in seed and data order; each costs one adapter.",
    )
    combine: Literal["mean", "min", "mean_minus_std", "warm"] = Field(
        "mean",
        description="How an ensemble scores; warm: one adapter with the mean of their B·A products.",
    )
    combine_std: float = Field(
        1.0, ge=0, description="Standard deviations taken off by combine: mean_minus_std."
    )


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
        description="head: only a linear head on the frozen SFT states; cheaper, and weaker.",
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


class GroupSection(StageSection):
    """`grpo` and `rloo`: TRL's trainers in the place of PPO. Sources: 2402.03300, 2402.14740."""

    updates: int | None = Field(None, ge=1, description="Rollouts; default: ppo.updates.")
    kl_coef: float | None = Field(None, ge=0, description="beta; default: ppo.kl_coef.")
    num_generations: int = Field(4, ge=2, description="Completions per prompt: the group.")


class DpoSection(StageSection):
    """`dpo`: TRL's trainer on the comparisons, in the place of PPO. Source: 2305.18290."""

    beta: float = Field(0.1, gt=0, description="beta of the implicit KL to SFT.")


class BestOfNSection(_Section):
    """`best_of_n`: no training; of n SFT samples the one with the highest reward."""

    n: int = Field(16, ge=2, description="Samples per prompt.")


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
    algorithm: Literal["ppo", "grpo", "rloo", "dpo", "best_of_n"] = Field(
        "ppo", description="What turns the reward into a policy; each has its section below."
    )
    ppo: PpoSection = PpoSection()
    grpo: GroupSection = GroupSection()
    rloo: GroupSection = GroupSection()
    dpo: DpoSection = DpoSection()
    best_of_n: BestOfNSection = BestOfNSection()
    evaluate: EvaluateSection = EvaluateSection()
    card: CardSection = CardSection()
    hub: HubSection = HubSection()

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        """Refuse what cannot work together, before a model is loaded."""
        ppo, reward = self.ppo, self.reward
        if ppo.ptx_coef and not self.data.text:
            raise ValueError("ppo.ptx_coef is above 0, and data.text is empty: give it text")
        if ppo.kl_target is not None and ppo.kl_coef == 0:
            raise ValueError("ppo.kl_target multiplies ppo.kl_coef, which is 0: start above 0")
        if reward.ensemble is None and "combine" in reward.model_fields_set:
            raise ValueError("reward.combine needs reward.ensemble: 2 or more adapters")
        if self.algorithm == "best_of_n" and ppo.reward == "gold":
            raise ValueError("algorithm: best_of_n chooses by the reward model, not by gold")
        if self.algorithm in ("dpo", "best_of_n") and not self.data.comparisons:
            raise ValueError(f"algorithm: {self.algorithm} needs data.comparisons")
        return self
