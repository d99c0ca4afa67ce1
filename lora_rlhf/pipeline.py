# SPDX-License-Identifier: Apache-2.0
"""One recipe, executed: demonstrations → SFT → reward model → PPO → evaluation → cards → Hub.

The recipe's `algorithm` may replace PPO. A finished stage is not run again, and an interrupted one
continues from its newest checkpoint, so an interrupted run ends with the same bits as any other.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from lora_rlhf.runtime import optional_packages  # noqa: F401  # isort: skip
from lora_rlhf import preflight
from lora_rlhf.algorithms import best_of_n, custom_reward, dpo, grpo_rloo, policy_stage
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.algorithms.trainer_configs import TrainerConfigs
from lora_rlhf.data import dataset_builder, sources
from lora_rlhf.data.contamination import OVERLAP
from lora_rlhf.data.dataset_builder import Prepared
from lora_rlhf.data.filters import SECRET
from lora_rlhf.distributed import replica
from lora_rlhf.distributed.world import joined, world
from lora_rlhf.errors import (
    AdapterError,
    DataError,
    HubError,
    LoraRlhfError,
    MemoryLimitError,
    UsageError,
)
from lora_rlhf.evaluation import evaluate, suite
from lora_rlhf.hub import backup, publishing, repository
from lora_rlhf.models import adapters, sharded_layers
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.planning import run_memory, stage_work
from lora_rlhf.recipe.loader import check_recipe
from lora_rlhf.recipe.schema import LoraSection, ModelSection, Recipe
from lora_rlhf.recipe.stage_keys import fingerprints, flat_keys, has_reward_model, stage_names
from lora_rlhf.reports import evaluation_report, html_report, plots, rich_displays, tables
from lora_rlhf.reports.cards import model_card
from lora_rlhf.reports.doctor import findings
from lora_rlhf.runs import disk, reuse, run_lock
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import environment, interrupts, paths, quiet
from lora_rlhf.runtime.devices import device_name, hardware_limitations
from lora_rlhf.serving import loaded_run
from lora_rlhf.training import checkpoint_callback, sft
from lora_rlhf.training.reward import reward_gate, reward_stage
from lora_rlhf.training.stage_context import StageContext

_OFFSET_ROWS = 256
"""Demonstrations to which the reward's offset is fitted; its error falls with their square root."""


@quiet.libraries()
@joined()
def run(
    recipe: Recipe,
    out: str | Path,
    *,
    until: str = "card",
    progress: Progress | None = None,
    start_from: str | Path | None = None,
    warm_start: bool = False,
    redo: str | None = None,
) -> Record:
    """Run a recipe in a directory, or continue the run that is there.

    Started by torchrun or `accelerate launch`, the processes share every batch, and the first one
    writes the run directory.

    Args:
        out: The run directory: new, empty, or with a run of the same recipe.
        until: The last stage: sft, reward, policy (or the algorithm's name), evaluate or card.
            The stages that it needs run too.
        progress: The progress line; `Progress(quiet=True)` prints nothing.
        start_from: Another run, whose finished SFT and reward stages are copied if every recipe key
            that they read is equal.
        warm_start: Restart the interrupted stage from the adapters of its newest checkpoint. This
            is not an exact resume, and the record says so.
        redo: A stage of the run in `out`, which is dropped and runs again with all later ones, for
            a file that is damaged.

    Returns:
        The record, with `evaluation` if that stage is done.

    Raises:
        LoraRlhfError: An error that the user can correct; see errors.py.
    """
    out, progress = Path(out), progress or rich_displays.progress()
    check_recipe(recipe)
    stages = _stages(recipe, until)
    preflight.check_launch(recipe, stages)
    preflight.check_processes(recipe)
    configs = preflight.trainer_configs(recipe, out, stages)
    _check_same_launch(recipe)
    if not world().first:
        with replica.received() as copy:
            return _follow(recipe, copy, stages, warm_start)
    return _lead(recipe, out, stages, configs, progress, start_from, warm_start, redo)


def _lead(
    recipe: Recipe,
    out: Path,
    stages: tuple[str, ...],
    configs: TrainerConfigs,
    progress: Progress,
    start_from: str | Path | None,
    warm_start: bool,
    redo: str | None,
) -> Record:
    """Run the stages in the run directory, and share it with other processes."""
    paths.reject_escaping_links(out, UsageError)
    if out.exists() and not out.is_dir():
        return Record.open(out, recipe)  # raises: it is a file
    with (
        run_lock.locked(out) as check_place,
        interrupts.time_budget(recipe.checkpoint.max_minutes, alone=world().size == 1),
        _disk_and_memory_errors(recipe, out),
    ):
        source = reuse.check(start_from, recipe, out) if start_from is not None else None
        remote = backup.prepare(recipe, out, progress, warm_start=warm_start)
        record = Record.open(out, recipe, warm_start=warm_start, redo=redo)
        if record.changed:
            now = ", ".join(f"{key} {was!r} -> {new!r}" for key, was, new in record.changed)
            progress.say(f"changed in this run: {now} (to undo: {record.as_options()})")
        record.check_place = check_place
        record.data["clock"]["environment"] = environment.result_variables()
        if ignored := environment.note():
            progress.say(ignored)
        if source is not None and (copied := reuse.copy_stages(source, record)):
            progress.say(f"copied from {source.folder}: {', '.join(copied)}")
        replica.share(record.folder)
        if "card" in stages:  # before hours of training, not after them
            for note in publishing.check_pushes(recipe, record):
                progress.say(note)
        with backup.uploading(remote, recipe, record, progress), _end_recorded(record):
            _run_stages(recipe, configs, record, stages, progress)
    return record


def _check_same_launch(recipe: Recipe) -> None:
    """Check that all processes have the same recipe, libraries and kind of device.

    Raises:
        SetupError: They differ.
    """
    if world().size == 1:
        return
    recipe_keys = {  # a folder may have another place on another machine; its data is compared
        f"recipe {key}": Path(value).name if isinstance(value, str) else value
        for key, value in flat_keys(recipe).items()
    }
    device = {"device": device_name()}
    world().agree("recipes, packages or devices", recipe_keys | environment.versions() | device)


def _follow(recipe: Recipe, folder: Path, stages: tuple[str, ...], warm_start: bool) -> Record:
    """Compute this process's part of the run, in a temporary copy of its directory."""
    with (
        run_lock.locked(folder) as check_place,
        interrupts.time_budget(recipe.checkpoint.max_minutes, alone=world().size == 1),
        _disk_and_memory_errors(recipe, folder),
    ):
        record = Record.open(folder, recipe, warm_start=warm_start)
        record.check_place = check_place
        configs = preflight.trainer_configs(recipe, folder, stages)
        stages = tuple(stage for stage in stages if stage != "card")
        _run_stages(recipe, configs, record, stages, Progress(quiet=True))
    return record


def _stages(recipe: Recipe, until: str) -> tuple[str, ...]:
    """Return the stages up to one, in order."""
    stages = stage_names(recipe.algorithm)
    until = recipe.algorithm if until == "policy" else until
    if until not in stages:
        raise UsageError(
            f"there is no stage {until!r} with algorithm: {recipe.algorithm}",
            expected=", ".join((*stages, "policy")),
        )
    return stages[: stages.index(until) + 1]


@quiet.libraries()
def check(
    recipe: Recipe,
    out: str | Path,
    *,
    until: str = "card",
    progress: Progress | None = None,
    start_from: str | Path | None = None,
    warm_start: bool = False,
    redo: str | None = None,
) -> list[LoraRlhfError]:
    """Return every error that `run` would raise before it trains; write nothing.

    Loads the base and reads all data, as `run` does.
    """
    out, progress, wrong = Path(out), progress or rich_displays.progress(), list[LoraRlhfError]()

    def ok(step: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a step; if it fails, collect the error and return None."""
        try:
            return step(*args, **options)
        except LoraRlhfError as error:
            if str(error) not in map(str, wrong):  # two sets may fail on one file
                wrong.append(error)
            return None

    if (stages := ok(_stages, recipe, until)) is None:
        return wrong
    ok(preflight.check_launch, recipe, stages)
    configs = ok(preflight.trainer_configs, recipe, out, stages)
    ok(paths.reject_escaping_links, out, UsageError)
    with contextlib.ExitStack() as stack:
        if out.is_dir():
            ok(lambda: stack.enter_context(run_lock.locked(out)))
        ok(disk.check_writable, out)
        record = ok(Record.peek, out, recipe, warm_start=warm_start, redo=redo)
        source = ok(reuse.check, start_from, recipe, out) if start_from is not None else None
        ok(backup.prepare, recipe, out, progress, warm_start=warm_start, dry_run=True)
        if "card" in stages:
            for note in ok(publishing.check_pushes, recipe, record) or ():
                progress.say(note)
        if record is None:
            return wrong
        progress.say(run_memory.before_run(recipe)[1])
        if (backbone := ok(Backbone.load, *_base(recipe, record))) is None:
            return wrong
        for note in backbone.source.get("token_notes", ()):
            progress.say(note)
        wanted = [stage for stage in stages if not _finished(recipe, record, stage)]
        shared = [stage for stage in wanted if stage in ("sft", "reward")]
        copied = [stage for stage in shared if source is not None and source.done(stage)]
        wanted = [stage for stage in wanted if stage not in copied]
        for stage in stages:
            if stage not in (*wanted, "card"):
                ok(loaded_run.load_stage, stage, backbone, source if stage in copied else record)
        if record.done("reward") and recipe.algorithm in wanted and recipe.reward.gate == "stop":
            ok(reward_gate.check, recipe, record, progress)
        data = _Data(ok(_with_adapters_here, recipe) or recipe, record, backbone, progress)
        for part in data.checks(wanted, configs):
            ok(part)
    return wrong


@contextlib.contextmanager
def _end_recorded(record: Record) -> Iterator[None]:
    """Record under `clock.stopped` why a run ends early; the doctor reads it."""
    record.data["clock"].pop("stopped", None)
    try:
        yield
    except BaseException as error:
        stopped = {"type": type(error).__name__, "message": str(error)[:2000]}
        record.data["clock"]["stopped"] = stopped
        with contextlib.suppress(OSError, LoraRlhfError):  # the error that is raised says more
            record.save()
        raise


@contextlib.contextmanager
def _disk_and_memory_errors(recipe: Recipe, out: Path) -> Iterator[None]:
    """Turn errors of a full disk or full memory into errors with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise disk.no_room(Path(error.filename or out), error) from error
        raise
    except (RuntimeError, MemoryError, MemoryLimitError) as error:
        if (limit := run_memory.memory_limit(recipe, error)) is None:
            raise
        raise limit from error


def _run_stages(
    recipe: Recipe,
    configs: TrainerConfigs,
    record: Record,
    stages: tuple[str, ...],
    progress: Progress,
) -> None:
    """Run the unfinished stages, within the time budget."""
    if recipe.rounds:
        record.data["rounds"] = [one.model_dump() for one in recipe.rounds]
    wanted = [stage for stage in stages if not _finished(recipe, record, stage)]
    if not wanted:
        _check_unchanged(recipe, record)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    threads, clock = torch.get_num_threads(), record.data["clock"]
    size, before = world().size, clock.get("processes", 1)
    if wanted and size != before:
        if "threads" in clock:
            progress.say(
                f"{size} process{'es' * (size > 1)} instead of {before}: sums round differently, "
                "so the results are not bit-identical to those of an uninterrupted run"
            )
        clock["processes"] = size
    if wanted and clock.setdefault("threads", threads) != threads:
        progress.say(
            f"{threads} threads instead of {clock['threads']}: sums round differently, so the "
            "results are not bit-identical to those of an uninterrupted run"
        )
        clock["threads"] = threads
    if computed := [stage for stage in wanted if stage != "card"]:
        try:
            _compute(recipe, configs, record, computed, progress)
        except interrupts.OutOfTime:
            progress.say("Time budget reached; run the same command to continue.")
            return
    if wanted and world().first and evaluation_report.FILE in record.listed():
        html_report.of_run(record)
    if "card" in wanted:
        with record.stage("card"):  # the seal included, because only a sealed run can be pushed
            plots.run(record)
            record.finish()
            model_card.write(record)
            record.seal()
        progress.say(tables.stage_line(record, "card"))
    if "card" in stages:
        _push(recipe, record, progress)


def _finished(recipe: Recipe, record: Record, stage: str) -> bool:
    """Return whether a stage need not run; a reward model that was skipped may be needed now."""
    needed = stage == "reward" and has_reward_model(recipe)
    return record.done(stage) and not (needed and "skipped" in record.data["stages"][stage])


def _check_unchanged(recipe: Recipe, record: Record) -> None:
    """Check that a finished run has its adapters, and that the files that it read are the same.

    Raises:
        DamageError: An adapter is missing or another one.
        DataError: A file has changed, so what is asked for is another run.
    """
    record.verified("adapters")
    for name, before in record.data["data"].items():
        given = getattr(recipe.data, name.removesuffix("_held_out_model"), [])
        now = sources.described_again(given, before.get("sources", []))
        reuse.check_data(record, name, {**before, "sources": now})


def _push(recipe: Recipe, record: Record, progress: Progress) -> None:
    """Make the pushes of `hub:` that are not done; the run stays finished if one fails."""
    if repository.offline():
        return
    for role, repo_id in publishing.pending_pushes(recipe, record).items():
        try:
            pushed = publishing.push(record, role, repo_id, public=recipe.hub.public)
        except HubError as error:
            progress.say(f"the {role} adapter is not pushed, but the run is saved: {error}")
        else:
            progress.say(f"pushed {role} to {pushed['url']}")


def _compute(
    recipe: Recipe,
    configs: TrainerConfigs,
    record: Record,
    wanted: list[str],
    progress: Progress,
) -> None:
    """Run the wanted stages that need the backbone; load the finished stages before them."""
    recipe = _with_adapters_here(recipe)
    backbone, peak = _load_backbone(recipe, record, progress)
    context = StageContext(recipe, backbone, record, progress)
    data = _Data(recipe, record, backbone, progress)
    for check_part in data.checks(wanted, configs):
        check_part()
    read = {f"rows of {n}": fingerprints(report) for n, report in record.data["data"].items()}
    world().agree("data or base", {**read, "base": backbone.fingerprint})
    progress.plan(stage_names(recipe.algorithm), data.work(wanted, configs))
    record.on_done = lambda: _describe(record, backbone, peak)
    stages = stage_names(recipe.algorithm)
    for stage in stages[: stages.index(wanted[-1]) + 1]:
        if stage not in wanted:
            loaded_run.load_stage(stage, backbone, record)
            continue
        run_memory.return_freed()
        _run_stage(stage, context, configs, data)
        progress.say(tables.stage_line(record, stage))
        stop = interrupts.agree(world().gathered)
        # Checked after a stage, so that even the shortest budget makes some progress each time.
        if stop and stage != wanted[-1]:
            interrupts.stop_if_requested()
    progress.say(peak.line())


def _run_stage(stage: str, context: StageContext, configs: TrainerConfigs, data: _Data) -> None:
    """Run one stage that needs the backbone."""
    recipe, backbone, record, progress = context
    if stage == "sft":
        sft.run(context, configs.sft, None if recipe.sft.start else data.demonstrations)
    elif stage == "reward":
        if data.comparisons is None and not recipe.reward.start:
            with record.stage("reward") as entry:
                kind = "a function" if recipe.ppo.function else "gold"
                entry["skipped"] = f"ppo.reward is {kind}, and there are no comparisons"
            return
        main, held_out = data.comparisons or (None, None)
        rows = None
        if recipe.data.demonstrations or not recipe.reward.start:
            rows = data.demonstrations.train
            rows = rows.select(range(min(_OFFSET_ROWS, len(rows))))
        reward_stage.run(context, configs.reward, main, rows, held_out)
    elif stage == "evaluate":
        same, prompts = checkpoint_callback.identity(backbone, record, "evaluate"), data.prompts
        rows = evaluate.rows_processed(recipe, backbone, len(prompts.held_out))
        with progress.counting(backbone.backoff, "evaluate", rows):
            evaluate.run(recipe, backbone, record, prompts.held_out, same, progress.say)
    elif stage == "dpo":
        assert data.comparisons is not None  # a DPO recipe without comparisons is refused
        dpo.run(context, configs.policy, data.comparisons[0].train)
    else:
        if recipe.ppo.reward == "model":
            reward_gate.check(recipe, record, progress)
        if stage == "best_of_n":
            best_of_n.run(recipe, record)
            return
        if stage == "ppo":
            ppo_stage.run(context, configs.policy, data.prompts.train, data.texts)
        else:
            grpo_rloo.run(context, configs.policy, data.prompts.train)


def _with_adapters_here(recipe: Recipe) -> Recipe:
    """Return the recipe in which `from` names folders: an adapter on the Hub is downloaded."""
    for stage in ("sft", "reward"):
        section = getattr(recipe, stage)
        given = section.start
        if not given or os.path.isdir(given) or not re.fullmatch(r"[\w.-]+/[\w.-]+", given):
            continue
        if (folder := repository.adapter_folder(given)) is None:
            raise AdapterError(
                f"{stage}.from: {given} is no folder here, and no adapter on the Hub",
                expected="a folder, or org/name, with adapter_config.json and "
                "adapter_model.safetensors",
                remedy="check the name; without a network, download it first",
            )
        new = section.model_copy(update={"from": str(folder)})
        recipe = recipe.model_copy(update={stage: new})
    return recipe


def _base(recipe: Recipe, record: Record) -> tuple[ModelSection, LoraSection, bool]:
    """Return how the base is loaded; one that processes share comes by way of the host."""
    return record.model_section(recipe), recipe.lora, recipe.model.shard


def _load_backbone(
    recipe: Recipe, record: Record, progress: Progress
) -> tuple[Backbone, run_memory.PeakMemory]:
    """Load the base model; record the plan, the model and the limits of the hardware."""
    planned, line = run_memory.before_run(recipe)
    if planned is not None:
        progress.say(line)
        record.data["plan"] = planned.as_dict()
    peak, clock = run_memory.PeakMemory(planned), record.data["clock"]
    started = time.perf_counter()
    backbone = Backbone.load(*_base(recipe, record))
    if recipe.model.shard:
        progress.say(sharded_layers.shard(backbone))
    elif (size := world().size) > 1:
        progress.say(f"{size} processes share the work; each holds the whole base")
    if planned is None:  # said after loading, so that a missing base is reported once
        progress.say(line)
    backbone.backoff.say = progress.say
    clock["host"]["makes_do"] = hardware_limitations(backbone.causal.dtype)
    before, model = record.data["model"], backbone.describe()
    for note in (*clock["host"]["makes_do"], *model.get("token_notes", ())):
        progress.say(note)
    # `push --base` adds the base's repository to the record, which a resume must keep.
    model |= {key: before[key] for key in ("hub_id", "hub_revision") if before.get(key)}
    if model.get("source") == "Hub" and not model.get("license"):
        model["license"] = before.get("license") or repository.base_licence(model)
    record.data["model"] = model
    clock["load_seconds"] = round(time.perf_counter() - started, 3)
    record.save()
    return backbone, peak


def _describe(record: Record, backbone: Backbone, peak: run_memory.PeakMemory) -> None:
    """Record adapters and memory, together with the stage that is done."""
    lora, clock = backbone.describe_lora(), record.data["clock"]
    # A role that an earlier process trained (the value) may not be loaded in this one.
    known = record.data["lora"].get("parameters_per_role", {})
    lora["parameters_per_role"] = known | lora["parameters_per_role"]
    record.data["lora"] = lora
    clock["memory"] = backbone.memory_report()
    if backbone.backoff.limits:  # with these limits sums round differently than on a larger GPU
        clock["rows_at_once"] = dict(backbone.backoff.limits)
    measured = peak.read()  # the record keeps the highest of all processes of this run
    if measured / 1e6 >= clock.get("peak_memory_mb", 0):
        clock |= {"peak_memory_mb": round(measured / 1e6, 1), "peak_memory_is": peak.quantity}


class _Data:
    """The datasets of one run, each read once and compared with the data of finished stages."""

    def __init__(
        self, recipe: Recipe, record: Record, backbone: Backbone, progress: Progress
    ) -> None:
        self.recipe, self.record, self.backbone, self.say = recipe, record, backbone, progress.say
        self.progress = progress
        self._loaded = suite.prompts_at_hand(recipe)
        self._samples: dict[str, list[list[str]]] = {}

    def checks(
        self, wanted: list[str], configs: TrainerConfigs | None
    ) -> Iterator[Callable[[], Any]]:
        """Yield functions that read and check the needed sets, to call before any training."""
        recipe, stages = self.recipe, set(wanted)
        if not wanted:
            yield partial(_check_unchanged, recipe, self.record)
        starts = {s: getattr(recipe, s).start for s in ("sft", "reward") if s in stages}
        for role, folder in starts.items():
            if folder:
                yield partial(adapters.read_role, self.backbone, role, folder)
        if None in starts.values() or ("reward" in starts and recipe.data.demonstrations):
            yield lambda: self.demonstrations
        if configs and recipe.algorithm in stages - {"dpo", "best_of_n"}:
            yield lambda: policy_stage.check(recipe, configs.policy, self.prompts.train)
        elif stages & {recipe.algorithm, "evaluate"}:
            yield lambda: self.prompts
        if recipe.ppo.function and stages & {recipe.algorithm, "evaluate"}:
            yield self._check_function
        if recipe.algorithm == "ppo" and "ppo" in stages:
            yield lambda: self.texts
        if stages & {"reward", "dpo"} and not any(s.task for s in recipe.data.comparisons):
            yield lambda: self.comparisons

    def _check_function(self) -> None:
        """Load the user's reward function, and check that the policy was trained with it."""
        custom_reward.load(self.recipe)
        entry, now = self.record.data["stages"].get(self.recipe.algorithm, {}), self.recipe
        before = entry.get("reward_sha256")
        if before and before != custom_reward.describe(now)["reward_sha256"]:
            raise DataError(
                f"{entry['reward']} has changed since {now.algorithm}, which used it",
                remedy="restore the file, or give another --out",
            )

    def work(self, wanted: list[str], configs: TrainerConfigs) -> dict[str, float]:
        """Return the work of the trainings in the wanted stages."""
        rows = {}
        if "sft" in wanted:
            start = self.recipe.sft.start
            rows["demonstrations"] = 0 if start else len(self.demonstrations.train)
        if {"reward", "dpo"} & {*wanted} and not any(s.task for s in self.recipe.data.comparisons):
            rows["comparisons"] = len(self.comparisons[0].train) if self.comparisons else 0
        if "evaluate" in wanted:
            rows["evaluate"] = min(self.recipe.evaluate.n, len(self.prompts.held_out))
        return stage_work.work(self.recipe, configs, wanted, rows)

    @cached_property
    def demonstrations(self) -> Prepared:
        """The demonstrations of SFT, and of the reward's offset."""
        rows = dataset_builder.demonstrations(self.recipe, self.backbone.tokenizer, self._loaded)
        return self._recorded("demonstrations", rows)

    @cached_property
    def prompts(self) -> Prepared:
        """The prompts of the policy, and the held-out ones of the evaluation."""
        rows = dataset_builder.prompts(self.recipe, self.backbone.tokenizer, self._loaded)
        few = list(findings.few_prompts(min(self.recipe.evaluate.n, len(rows.held_out))))
        rows.report["notes"] += [f"{finding.what}: {finding.why}" for finding in few]
        self._recorded("prompts", rows)
        for finding in few:
            self.say(finding.line())
        return rows

    @cached_property
    def texts(self) -> list[list[int]] | None:
        """Token ids of PPO's language-model loss; None without one."""
        if not self.recipe.ppo.ptx_coef:
            return None
        tokenizer, loaded = self.backbone.tokenizer, self._loaded
        texts, report = dataset_builder.texts(self.recipe, tokenizer, loaded)
        reuse.check_data(self.record, "text", report)
        self.record.data["data"]["text"] = report
        return texts

    @cached_property
    def comparisons(self) -> tuple[Prepared, Prepared | None] | None:
        """Comparisons of the reward model and of the held-out one; None if neither is trained."""
        given = self.recipe.reward.start and not self.recipe.data.comparisons
        if given or not has_reward_model(self.recipe):
            return None

        def read(name: str, part: Literal["all", "proxy", "held_out_model"]) -> Prepared:
            tokenizer, loaded = self.backbone.tokenizer, self._loaded
            rows = dataset_builder.comparisons(self.recipe, tokenizer, self.sample, part, loaded)
            return self._recorded(name, rows)

        if not self.recipe.reward.held_out_model:
            return read("comparisons", "all"), None
        return (
            read("comparisons", "proxy"),
            read("comparisons_held_out_model", "held_out_model"),
        )

    def _recorded(self, name: str, rows: Prepared) -> Prepared:
        reuse.check_data(self.record, name, rows.report)
        self.record.data["data"][name] = rows.report
        for line in rows.lines if name != "comparisons_held_out_model" else ():
            self.say(line)
        for small in findings.few_rows(name, rows.report):
            self.say(small.line())
        for note in rows.report["notes"]:
            if note.startswith((SECRET, OVERLAP)):
                self.say(f"warning: data.{name}: {note}")
        return rows

    def sample(self, prompts: list[Any], k: int, seed: int) -> list[list[str]]:
        """Return k completions of the SFT model for each prompt, for simulated labelers to rank."""
        # The proxy's and the held-out model's comparisons share these samples.
        key = json.dumps([seed, k, prompts])
        if key not in self._samples:
            self.say(f"reward: {k} completions of the SFT model for each of {len(prompts)} prompts")
            with self.progress.counting(self.backbone.backoff, "sampling", k * len(prompts)):
                answers = self.backbone.generate(
                    [self.backbone.encode_prompt(p) for p in prompts for _ in range(k)],
                    "reference",
                    seed=seed,
                    batch_size=self.recipe.evaluate.batch_size,
                    max_new_tokens=ppo_stage.completion_limit(self.recipe, "ppo"),
                )
            texts = [self.backbone.decode(a) for a in answers]
            self._samples[key] = [texts[i : i + k] for i in range(0, len(texts), k)]
        return self._samples[key]
