# SPDX-License-Identifier: Apache-2.0
"""The recipe's `data` section: where the sets come from, and which keys a source reads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .section import Section, conflict

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
