# SPDX-License-Identifier: Apache-2.0
"""One recipe, executed: demonstrations → SFT → reward model → PPO → evaluation → cards → Hub.

A finished stage is not run again; an interrupted one starts over from its own seed, so a run that
was stopped between or inside stages ends with the same bits as one that was not.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from . import card, data, evaluate, heads, hub, plots, ppo, reward, sft
from .backbone import Backbone
from .config import Recipe, load_recipe
from .data import Prepared
from .errors import UsageError
from .progress import Progress
from .record import STAGES, Record


def run(
    recipe: Recipe, out: str | Path, *, until: str = "card", progress: Progress | None = None
) -> Record:
    """Run a recipe into a directory, or go on with the run that is there.

    Args:
        recipe: The whole run.
        out: The run directory: new, empty, or holding a run of the same recipe.
        until: The last stage: sft, reward, ppo, evaluate or card. Whatever it needs runs too.
        progress: Where to report; default: nowhere.

    Returns:
        The record, with `evaluation` once that stage is done.

    Raises:
        LoraRlhfError: One of errors.py, with what to do.
    """
    if until not in STAGES:
        raise UsageError(f"there is no stage {until!r}", expected=", ".join(STAGES))
    progress = progress or Progress(quiet=True)
    record = Record.open(out, recipe)
    wanted = [s for s in STAGES[: STAGES.index(until) + 1] if not record.done(s)]
    if until == "card":
        for note in hub.preflight(recipe):  # before hours of training, not after them
            progress.say(note)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    if set(wanted) - {"card"}:
        _Work(recipe, record, progress).run(wanted)
    if "card" in wanted:
        with record.stage("card"):
            plots.run(record)
        record.finish()
        card.write(record)
        record.seal()
    if until == "card":
        _push(recipe, record, progress)
    return record


def _push(recipe: Recipe, record: Record, progress: Progress) -> None:
    """Push what the recipe's `hub:` names and this run has not pushed yet."""
    for role in ("policy", "reward", "value", "sft"):
        repo_id = getattr(recipe.hub, role)
        done = record.data["clock"].get("pushed", {})
        if repo_id and done.get(role, {}).get("repo_id") != repo_id and not hub.offline():
            pushed = hub.push(record, role, repo_id, public=recipe.hub.public)
            entry = {role: {"repo_id": repo_id, "commit": pushed["commit"]}}
            record.data["clock"]["pushed"] = done | entry
            record.save()
            progress.say(f"pushed {role} to {pushed['url']}")


_OFFSET_ROWS = 256
"""Demonstrations on which the reward's offset is fitted: its error falls with the root of it."""


class _Work:
    """The stages of one run that need the backbone, in order."""

    def __init__(self, recipe: Recipe, record: Record, progress: Progress) -> None:
        self.recipe, self.record, self.progress = recipe, record, progress
        started = time.perf_counter()
        self.backbone = Backbone.load(recipe.model, recipe.lora)
        self.tokenizer = self.backbone.tokenizer
        self._samples: dict[int, list[list[str]]] = {}
        # `push --base` names the base's repository in the record; going on must not forget it.
        pushed = {k: v for k, v in record.data["model"].items() if k in ("hub_id", "hub_revision")}
        record.data["model"] = self.backbone.describe() | {k: v for k, v in pushed.items() if v}
        record.data["clock"]["load_seconds"] = round(time.perf_counter() - started, 3)
        record.save()

    def run(self, wanted: list[str]) -> None:
        """Run the wanted stages and load the others that they stand on."""
        self._check_data(wanted)
        last = max(STAGES.index(stage) for stage in wanted if stage != "card")
        for stage in STAGES[: last + 1]:
            getattr(self, f"_{stage}")(run=stage in wanted)
            self.record.data["lora"] = self.backbone.describe_lora()
            self.record.data["clock"]["memory"] = self.backbone.memory_report()
            self.record.save()

    def _note(self, name: str, prepared: Prepared) -> Prepared:
        self.record.data["data"][name] = prepared.report
        return prepared

    def _check_data(self, wanted: list[str]) -> None:
        """Read what can be read before anything is trained: a missing file must not cost hours."""
        recipe, tokenizer = self.recipe, self.tokenizer
        if set(wanted) & {"sft", "reward"}:
            self.demonstrations = self._note(
                "demonstrations", data.demonstrations(recipe, tokenizer)
            )
        if set(wanted) & {"ppo", "evaluate"}:
            self.prompts = self._note("prompts", data.prompts(recipe, tokenizer))
        if "ppo" in wanted:
            ppo.check(recipe, self.record, self.prompts.train)
        if "reward" in wanted and not any(s.task for s in recipe.data.comparisons):
            self._comparisons()

    def _comparisons(self) -> tuple[Prepared, Prepared | None] | None:
        """Those of the reward model and of the held-out one; None where none is needed."""
        recipe, tokenizer = self.recipe, self.tokenizer
        if not recipe.data.comparisons and recipe.ppo.reward == "gold":
            return None
        if not recipe.reward.held_out_model:
            found = data.comparisons(recipe, tokenizer, self._sample)
            return self._note("comparisons", found), None
        proxy = data.comparisons(recipe, tokenizer, self._sample, part="proxy")
        other = data.comparisons(recipe, tokenizer, self._sample, part="held_out_model")
        return self._note("comparisons", proxy), self._note("comparisons_held_out_model", other)

    def _sft(self, *, run: bool) -> None:
        if run:
            sft.run(self.recipe, self.backbone, self.record, self.demonstrations, self.progress)
        else:
            sft.load(self.backbone, self.record)

    def _reward(self, *, run: bool) -> None:
        if not run:
            reward.load(self.backbone, self.record)
            return
        found = self._comparisons()
        if found is not None:
            main, other = found
            rows = self.demonstrations.train
            rows = rows.select(range(min(_OFFSET_ROWS, len(rows))))
            reward.run(self.recipe, self.backbone, self.record, main, rows, self.progress, other)

    def _ppo(self, *, run: bool) -> None:
        if run:
            if self.recipe.ppo.reward == "model":
                reward.gate(self.recipe, self.record, self.progress)
            ppo.run(self.recipe, self.backbone, self.record, self.prompts.train, self.progress)
        else:
            ppo.load(self.backbone, self.record)

    def _evaluate(self, *, run: bool) -> None:
        if run:
            self.progress.say("evaluate: base, sft and policy on the held-out prompts")
            evaluate.run(self.recipe, self.backbone, self.record, self.prompts.held_out)

    def _sample(self, prompts: list[Any], k: int, seed: int) -> list[list[str]]:
        """K completions of the SFT model for each prompt: what the simulated labelers rank."""
        if seed in self._samples:  # the held-out model's half comes from the same draw
            return self._samples[seed]
        self.progress.say(
            f"reward: {k} completions of the SFT model for each of {len(prompts)} prompts"
        )
        ids = [self.backbone.encode_prompt(p) for p in prompts for _ in range(k)]
        answers = self.backbone.generate(
            ids, "reference", seed=seed, batch_size=self.recipe.evaluate.batch_size,
            max_new_tokens=ppo.arguments(self.recipe, self.record).max_completion_length,
        )  # fmt: skip
        texts = [self.backbone.decode(a) for a in answers]
        self._samples[seed] = [texts[i : i + k] for i in range(0, len(texts), k)]
        return self._samples[seed]


def load(folder: str | Path) -> tuple[Backbone, Record]:
    """The backbone of a run with every role that it finished.

    Raises:
        UsageError: The folder is no run, or no stage of it is finished.
    """
    record = Record.read(folder)
    if not record.done("sft"):
        raise UsageError(f"{folder} has no finished stage", remedy="go on with `lora-rlhf run`")
    recipe = load_recipe(Path(folder) / "recipe.yaml")
    backbone = Backbone.load(recipe.model, recipe.lora)
    sft.load(backbone, record)
    if record.done("reward"):
        reward.load(backbone, record)
    if record.done("ppo"):
        ppo.load(backbone, record)
    return backbone, record


def generate(
    folder: str | Path, text: str, *, temperature: float = 1.0, seed: int = 0,
    max_new_tokens: int | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Answers of base, SFT and policy to one prompt, with the reward of each.

    Returns:
        One dict for each model that the run has: `model`, `text`, `tokens`, and `reward` where
        there is a reward model.
    """
    backbone, record = load(folder)
    recipe = load_recipe(Path(folder) / "recipe.yaml")
    prompt: Any = [{"role": "user", "content": text}] if backbone.tokenizer.chat_template else text
    ids = backbone.encode_prompt(prompt)
    limit = max_new_tokens or ppo.arguments(recipe, record).max_completion_length
    models = [("base", None), ("sft", "reference")]
    models += [("policy", "policy")] if record.done("ppo") else []
    rows = []
    for model, role in models:
        [answer] = backbone.generate(
            [ids], role, max_new_tokens=limit, temperature=temperature, seed=seed
        )
        row: dict[str, Any] = {
            "model": model,
            "text": backbone.decode(answer),
            "tokens": len(answer),
        }
        if backbone.has("reward"):
            [score] = heads.scores(backbone, [(ids, answer)], "reward")
            row["reward"] = score + backbone.reward_offset["reward"]
        rows.append(row)
    return rows
