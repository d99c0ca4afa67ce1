# SPDX-License-Identifier: Apache-2.0
"""One recipe, executed: demonstrations → SFT → reward model → PPO → evaluation → cards → Hub.

In the place of PPO stands what the recipe's `algorithm:` says.

A finished stage is not run again; an interrupted one goes on from its newest checkpoint, so a run
that was stopped between or inside stages ends with the same bits as one that was not.
"""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any, Literal

import torch

from lora_rlhf.runtime import optional_packages  # noqa: F401  # isort: skip
from lora_rlhf import preflight
from lora_rlhf.algorithms import best_of_n, dpo, grpo_rloo, policy_stage
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.algorithms.trainer_configs import TrainerConfigs
from lora_rlhf.data import dataset_builder
from lora_rlhf.data.dataset_builder import Prepared
from lora_rlhf.data.filters import SECRET
from lora_rlhf.errors import HubError, MemoryLimitError, UsageError
from lora_rlhf.evaluation import evaluate
from lora_rlhf.hub import backup, publishing, repository
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.planning import gpu_fit
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import has_reward_model, stage_names
from lora_rlhf.reports import plots
from lora_rlhf.reports.cards import model_card
from lora_rlhf.reports.doctor import findings
from lora_rlhf.runs import disk, reuse, run_lock
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import interrupts, paths
from lora_rlhf.runtime.devices import hardware_limitations
from lora_rlhf.training import checkpoint_callback, sft
from lora_rlhf.training.reward import reward_gate, reward_stage


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    until: str = "card",
    progress: Progress | None = None,
    start_from: str | Path | None = None,
    warm_start: bool = False,
) -> Record:
    """Run a recipe into a directory, or go on with the run that is there.

    Args:
        recipe: The whole run.
        out: The run directory: new, empty, or holding a run of the same recipe.
        until: The last stage: sft, reward, policy (or the algorithm's name), evaluate or card.
            Whatever it needs runs too.
        progress: Where to report; default: nowhere.
        start_from: Another run, whose finished SFT and reward stages are taken over where every
            recipe key that they read is equal.
        warm_start: Begin the stage that was interrupted again, from the adapters of its newest
            checkpoint: another run than the one that was interrupted, and the record says so.

    Returns:
        The record, with `evaluation` once that stage is done.

    Raises:
        LoraRlhfError: One of errors.py, with what to do.
    """
    names = stage_names(recipe.algorithm)
    until = recipe.algorithm if until == "policy" else until
    if until not in names:
        raise UsageError(
            f"there is no stage {until!r} where the recipe says algorithm: {recipe.algorithm}",
            expected=", ".join((*names, "policy")),
        )
    progress = progress or Progress(quiet=True)
    preflight.setup(recipe)
    configs = preflight.every_argument(recipe, out)
    paths.reject_escaping_links(
        Path(out), UsageError
    )  # or what is written here would be written there
    if Path(out).is_dir() or not Path(out).exists():
        with run_lock.locked(Path(out)), interrupts.time_budget(recipe.checkpoint.max_minutes):
            try:
                return _run(recipe, configs, out, names, until, progress, start_from, warm_start)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                    raise disk.no_room(Path(error.filename or out), error) from error
                raise
            except (RuntimeError, MemoryError, MemoryLimitError) as error:
                if (limit := gpu_fit.memory_limit(recipe, error)) is None:
                    raise
                raise limit from error
    return Record.open(out, recipe)  # a file: it says so


def _run(
    recipe: Recipe,
    configs: TrainerConfigs,
    out: str | Path,
    names: tuple[str, ...],
    until: str,
    progress: Progress,
    start_from: str | Path | None,
    warm_start: bool,
) -> Record:
    """`run` in a directory that nobody else works in."""
    source = reuse.check(start_from, recipe, out) if start_from is not None else None
    remote = backup.prepare(recipe, Path(out), progress, warm_start=warm_start)
    record = Record.open(out, recipe, warm_start=warm_start)
    if source is not None and (taken := reuse.copy_stages(source, record)):
        progress.say(f"copied from {source.folder}: {', '.join(taken)}")
    if until == "card":
        for note in publishing.check_pushes(recipe, record):  # before hours of training, not after
            progress.say(note)
    with backup.uploading(remote, recipe, record, progress):
        return _work(recipe, configs, record, names[: names.index(until) + 1], progress)


def _work(
    recipe: Recipe,
    configs: TrainerConfigs,
    record: Record,
    names: tuple[str, ...],
    progress: Progress,
) -> Record:
    """Those of these stages that are not finished."""
    wanted = [stage for stage in names if not preflight.finished(recipe, record, stage)]
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    if set(wanted) - {"card"}:
        try:
            _Work(recipe, configs, record, progress).run(wanted)
        except interrupts.OutOfTime:
            progress.say("Time budget reached; run the same command to continue.")
            return record
    if "card" in wanted:
        with record.stage("card"):  # to its very end: what is not sealed cannot be pushed
            plots.run(record)
            record.finish()
            model_card.write(record)
            record.seal()
    if "card" in names:
        _push(recipe, record, progress)
    return record


def _push(recipe: Recipe, record: Record, progress: Progress) -> None:
    """Push what `hub:` names and is not pushed yet; a failure does not undo a run that is done."""
    targets = {} if repository.offline() else publishing.pending_pushes(recipe, record)
    for role, repo_id in targets.items():
        try:
            pushed = publishing.push(record, role, repo_id, public=recipe.hub.public)
        except HubError as error:
            progress.say(f"the run is done and saved, the {role} adapter is not pushed: {error}")
            continue
        progress.say(f"pushed {role} to {pushed['url']}")


_OFFSET_ROWS = 256
"""Demonstrations on which the reward's offset is fitted: its error falls with the root of it."""


class _Work:
    """The stages of one run that need the backbone, in order."""

    def __init__(
        self, recipe: Recipe, configs: TrainerConfigs, record: Record, progress: Progress
    ) -> None:
        self.configs = configs
        self.recipe, self.record, self.progress = recipe, record, progress
        planned, line = gpu_fit.before_run(recipe)
        if planned is not None:
            progress.say(line)
            record.data["plan"] = planned.as_dict()
        self._peak = gpu_fit.PeakMemory()
        started = time.perf_counter()
        self.backbone = Backbone.load(recipe.model, recipe.lora)
        if planned is None:  # said only now: a base that is not there is one error, not two
            progress.say(line)
        self.backbone.backoff.say = progress.say
        record.data["clock"]["host"]["makes_do"] = notes = hardware_limitations(
            self.backbone.causal.dtype
        )
        for note in notes:
            progress.say(note)
        self.tokenizer = self.backbone.tokenizer
        self._samples: dict[str, list[list[str]]] = {}
        self._loaded: dataset_builder.Loaded = {}
        self._found: tuple[Prepared, Prepared | None] | None = None
        self._texts: list[list[int]] | None = None
        # `push --base` names the base's repository in the record; going on must not forget it.
        pushed = {k: v for k, v in record.data["model"].items() if k in ("hub_id", "hub_revision")}
        found = self.backbone.describe() | {k: v for k, v in pushed.items() if v}
        if found.get("source") == "Hub" and not found.get("license"):
            found["license"] = record.data["model"].get("license") or repository.base_licence(found)
        record.data["model"] = found
        record.data["clock"]["load_seconds"] = round(time.perf_counter() - started, 3)
        record.save()

    def run(self, wanted: list[str]) -> None:
        """Run the wanted stages and load the others that they stand on."""
        self._check_data(wanted)
        self.record.on_done = self._describe
        steps = (self._sft, self._reward, self._policy, self._evaluate)
        names = stage_names(self.recipe.algorithm)[: len(steps)]
        last = max(names.index(stage) for stage in wanted if stage != "card")
        for stage, step in list(zip(names, steps, strict=True))[: last + 1]:
            step(run=stage in wanted)
            # Asked after what was done: the shortest budget, too, gets a little further each time.
            if stage in wanted and stage != names[last]:
                interrupts.stop_if_requested()
        if (measured := self._peak.read()) is not None:
            self.progress.say(f"measured: {gpu_fit.size(measured)} at the peak ({self._peak.what})")

    def _describe(self) -> None:
        """With the stage itself, or a run that is killed between the two would never say it."""
        record, found = self.record, self.backbone.describe_lora()
        # A role that an earlier process trained (the value) need not be loaded any more.
        known = record.data["lora"].get("parameters_per_role", {})
        found["parameters_per_role"] = known | found["parameters_per_role"]
        record.data["lora"] = found
        record.data["clock"]["memory"] = self.backbone.memory_report()
        if self.backbone.backoff.limits:  # since then not every sum is rounded as on a larger card
            record.data["clock"]["rows_at_once"] = dict(self.backbone.backoff.limits)
        if (measured := self._peak.read()) is None:
            return
        # The highest of this run, whichever of its sittings had it.
        clock = record.data["clock"]
        if measured / 1e6 >= clock.get("peak_memory_mb", 0):
            clock |= {"peak_memory_mb": round(measured / 1e6, 1), "peak_memory_is": self._peak.what}

    def _note(self, name: str, prepared: Prepared) -> Prepared:
        preflight.same_data(self.record, name, prepared.report)
        self.record.data["data"][name] = prepared.report
        for note in prepared.report["notes"]:
            if note.startswith(SECRET):
                self.progress.say(f"warning: data.{name}: {note}")
        return prepared

    def _check_data(self, wanted: list[str]) -> None:
        """Read what can be read before anything is trained: a missing file must not cost hours."""
        recipe, tokenizer = self.recipe, self.tokenizer
        if set(wanted) & {"sft", "reward"}:
            self.demonstrations = self._note(
                "demonstrations", dataset_builder.demonstrations(recipe, tokenizer, self._loaded)
            )
        if set(wanted) & {recipe.algorithm, "evaluate"}:
            self.prompts = dataset_builder.prompts(recipe, tokenizer, self._loaded)
            few = list(findings.few_prompts(min(recipe.evaluate.n, len(self.prompts.held_out))))
            self.prompts.report["notes"] += [f"{found.what}: {found.why}" for found in few]
            self._note("prompts", self.prompts)
            for found in few:
                self.progress.say(found.line())
        if recipe.algorithm in wanted:
            self._check_policy()
        if set(wanted) & {"reward", "dpo"} and not any(s.task for s in recipe.data.comparisons):
            self._comparisons()

    def _check_policy(self) -> None:
        """The prompts and the texts of the stage that makes the policy."""
        recipe, record = self.recipe, self.record
        if recipe.algorithm not in ("dpo", "best_of_n"):
            policy_stage.check(recipe, self.configs.policy, self.prompts.train)
        if recipe.algorithm == "ppo" and recipe.ppo.ptx_coef:
            self._texts, report = dataset_builder.texts(recipe, self.tokenizer)
            preflight.same_data(record, "text", report)
            record.data["data"]["text"] = report

    def _comparisons(self) -> tuple[Prepared, Prepared | None] | None:
        """Those of the reward model and of the held-out one; None where none is needed.

        Raises:
            DataError: They are no longer those that the finished reward stage learned from.
        """
        recipe, tokenizer = self.recipe, self.tokenizer
        if not has_reward_model(recipe):
            return None
        if self._found is None:  # read once, though checked first and used later
            parts: tuple[Literal["all", "proxy", "held_out_model"], ...] = ("all",)
            if recipe.reward.held_out_model:
                parts = ("proxy", "held_out_model")
            found = [
                dataset_builder.comparisons(recipe, tokenizer, self._sample, part, self._loaded)
                for part in parts
            ]
            self._note("comparisons", found[0])
            if len(found) > 1:
                self._note("comparisons_held_out_model", found[1])
            self._found = found[0], found[1] if len(found) > 1 else None
        return self._found

    def _sft(self, *, run: bool) -> None:
        if run:
            sft.run(
                self.recipe,
                self.configs.sft,
                self.backbone,
                self.record,
                self.demonstrations,
                self.progress,
            )
        else:
            sft.load(self.backbone, self.record)

    def _reward(self, *, run: bool) -> None:
        if not run:
            reward_stage.load(self.backbone, self.record)
            return
        found = self._comparisons()
        if found is None:
            with self.record.stage("reward") as entry:
                entry["skipped"] = "ppo.reward is gold, and there are no comparisons"
            return
        main, other = found
        rows = self.demonstrations.train
        rows = rows.select(range(min(_OFFSET_ROWS, len(rows))))
        reward_stage.run(
            self.recipe,
            self.configs.reward,
            self.backbone,
            self.record,
            main,
            rows,
            self.progress,
            other,
        )

    def _policy(self, *, run: bool) -> None:
        recipe, backbone, record = self.recipe, self.backbone, self.record
        args = self.configs.policy
        if not run:
            if recipe.algorithm != "best_of_n":  # it trains nothing
                policy_stage.load(backbone, record)
            return
        if recipe.ppo.reward == "model" and recipe.algorithm != "dpo":  # DPO asks no reward model
            reward_gate.check(recipe, record, self.progress)
        if recipe.algorithm == "ppo":
            ppo_stage.run(
                recipe, args, backbone, record, self.prompts.train, self.progress, self._texts
            )
        elif recipe.algorithm == "dpo":
            found = self._comparisons()
            assert found is not None  # the recipe was refused without comparisons
            dpo.run(recipe, args, backbone, record, found[0].train, self.progress)
        elif recipe.algorithm == "best_of_n":
            best_of_n.run(recipe, record)
        else:
            grpo_rloo.run(recipe, args, backbone, record, self.prompts.train, self.progress)

    def _evaluate(self, *, run: bool) -> None:
        if run:
            last = "best of n" if self.recipe.algorithm == "best_of_n" else "policy"
            self.progress.say(f"evaluate: base, sft and {last} on the held-out prompts")
            parts = self.recipe, self.backbone, self.record
            same = checkpoint_callback.identity(self.backbone, self.record, "evaluate")
            evaluate.run(*parts, self.prompts.held_out, same, self.progress.say)

    def _sample(self, prompts: list[Any], k: int, seed: int) -> list[list[str]]:
        """K completions of the SFT model for each prompt: what the simulated labelers rank."""
        # The held-out model's half comes from the same draw; another source has prompts of its own.
        asked = json.dumps([seed, k, prompts])
        if asked in self._samples:
            return self._samples[asked]
        self.progress.say(
            f"reward: {k} completions of the SFT model for each of {len(prompts)} prompts"
        )
        ids = [self.backbone.encode_prompt(p) for p in prompts for _ in range(k)]
        answers = self.backbone.generate(
            ids,
            "reference",
            seed=seed,
            batch_size=self.recipe.evaluate.batch_size,
            max_new_tokens=ppo_stage.sampled_tokens(self.recipe),
        )
        texts = [self.backbone.decode(a) for a in answers]
        self._samples[asked] = [texts[i : i + k] for i in range(0, len(texts), k)]
        return self._samples[asked]
