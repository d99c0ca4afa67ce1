# SPDX-License-Identifier: Apache-2.0
"""Rounds of feedback: tasks of a run's model, their labels, and the recipe that learns from all.

A round has a folder:

tasks.jsonl    the tasks, chosen by `task_choice`
answers/       answers that were sampled for them
labels.jsonl   their labels, as comparisons
earlier.jsonl  labels that a task generator made for the run before, if it did
round.json     what was asked for, and the sha256 of these files
run/           the run that the round makes: reward model on old and new labels, policy, evaluation

Every file is written whole, so that a round that was killed goes on by the same command.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.data import label_pool, sources
from lora_rlhf.data.closed_world import generator, labelers
from lora_rlhf.data.closed_world.checkers import Item
from lora_rlhf.data.filters import prompt_key
from lora_rlhf.distributed import launch
from lora_rlhf.errors import DataError, UsageError, counted
from lora_rlhf.recipe.loader import dump_recipe, parse_recipe
from lora_rlhf.recipe.schema import DataSource, Recipe
from lora_rlhf.runs import run_lock
from lora_rlhf.runs.disk import damaged, is_signed, sha256, signed, write_atomically
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record, is_run
from lora_rlhf.serving import loaded_run

from . import task_choice
from .task_choice import Choice, Say

SIMULATED = "simulated"
"""Labels of simulated labelers, for the closed-world task."""

STATE = "round.json"
"""What was asked for, in the folder of a round."""

RUN = "run"
"""Folder of the run in the folder of its round."""


@dataclass(frozen=True)
class Round:
    """Options of a round.

    Attributes:
        choice: The tasks.
        labels: `simulated`, a labelling project's folder, or a file of comparisons; None: not there
            yet.
        start: Model from which the policy goes on: sft, or the policy of the run before.
        overrides: `key=value` changes of the recipe.
    """

    choice: Choice
    labels: str | None = None
    start: Literal["sft", "policy"] = "sft"
    overrides: Sequence[str] = field(default_factory=tuple)


def find_run(folder: Path) -> Path:
    """Return the run that a folder is or, for the folder of a round, holds."""
    return folder / RUN if is_run(folder / RUN) and not is_run(folder) else folder


def next_folder(run: Path) -> Path:
    """Return the default folder of the round after a run: beside it, with the round's number."""
    own = run.parent if (run.parent / STATE).is_file() else run
    own = own if own.name not in ("", "..") else own.resolve()
    number = len(Record.read(run).recipe().rounds) + 1
    return own.parent / f"{re.sub('-round-[0-9]+$', '', own.name)}-round-{number}"


def iterate(
    run: Path, out: Path, request: Round, execute: Callable[..., Record], progress: Progress
) -> Record | None:
    """Make a round: evaluate the run if it is not, then tasks, labels and the round's own run.

    Args:
        execute: Runs a recipe: `pipeline.run`, a room that this one does not import.

    Returns:
        The record of the round's run; None if tasks wait for labels.
    """
    launch.refuse("a round")
    run = find_run(run)
    record = Record.read(run)
    try:
        if record.done(record.algorithm) and not record.done("evaluate"):
            execute(record.recipe(), run, until="evaluate", progress=progress)
        recipe = prepare(run, out, request, say=progress.say)
        return None if recipe is None else execute(recipe, out / RUN, progress=progress)
    finally:
        progress.end()


def prepare(run: Path, out: Path, request: Round, *, say: Say = lambda line: None) -> Recipe | None:
    """Make tasks, take their labels, and return the recipe of the round's run.

    Returns:
        None if tasks wait for labels; the same call goes on when they are there.

    Raises:
        UsageError: The folder holds another round, or the run lacks what is asked for.
        DataError: Labels cannot be read, or are of other prompts.
        DamageError: A file of the round has changed since it was written.
    """
    record = Record.read(run)
    number = len(record.recipe().rounds) + 1
    request = replace(request, choice=replace(request.choice, round=number))
    for model in (request.choice.model, request.start):
        task_choice.stage_of(record, model)
    with run_lock.locked(out):
        state = _state(out, run, record, request)
        if "tasks" not in state:
            known = _earlier_prompts(record.recipe())
            task_choice.make(run, request.choice, out / "tasks.jsonl", without=known, say=say)
            _note(out, state, "tasks")
        if "labels" not in state:
            if request.labels is None:
                return None
            if not _take_labels(record, out, request.choice.round, request.labels, state, say):
                return None
        return _recipe(record, out, request, state)


def _state(out: Path, run: Path, record: Record, request: Round) -> dict[str, Any]:
    """Read `round.json`, or begin it; compare it with the request and with the files."""
    path = out / STATE
    wanted = {
        "run": record.data["name"],
        "adapter": record.data["stages"][task_choice.stage_of(record, request.choice.model)][
            "adapter_sha256"
        ],
        "choice": asdict(request.choice),
    }
    if not path.exists():
        ours = "answers", run_lock.LOCK, f"{STATE}.tmp"
        if any(p.name not in ours for p in out.iterdir()):
            raise UsageError(f"{out} holds other files", remedy="give another --out")
        wanted["record_sha256"] = sha256(run / "record.json")
        write_atomically(path, json.dumps(signed(wanted), indent=1) + "\n")
        return wanted
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, f"it cannot be read: {error}") from None
    if not is_signed(state):
        raise damaged(path, "its own sha256 differs")
    for key, value in wanted.items():
        if state.get(key) != value:
            raise UsageError(
                f"{out} holds a round with another {key}: {state.get(key)!r:.300}",
                expected=f"{value!r:.300}",
                remedy="give the options of that round, or another --out",
            )
    for name in ("tasks", "labels", "earlier"):
        if (
            name in state
            and (file := out / f"{name}.jsonl")
            and (not file.is_file() or sha256(file) != state[name])
        ):
            raise damaged(file, "its sha256 is not the one in round.json")
    return state


def _note(out: Path, state: dict[str, Any], name: str) -> None:
    """Note a finished file of the round."""
    state[name] = sha256(out / f"{name}.jsonl")
    write_atomically(out / STATE, json.dumps(signed(state), indent=1) + "\n")


# --- labels --------------------------------------------------------------------------------------


def _take_labels(
    record: Record, out: Path, number: int, labels: str, state: dict[str, Any], say: Say
) -> bool:
    """Write the labels of the round's tasks as comparisons; False: a project lacks some."""
    given, rows = _rows(out / "tasks.jsonl"), []
    path = Path(labels)
    if path.is_dir():
        if not _from_project(path, out, say):
            return False
        rows = _rows(out / "labels.jsonl")
    _write_earlier(record, out, state, say)
    if labels == SIMULATED:
        recipe = record.recipe()
        known = state.get("noise") or next((r.noise for r in recipe.rounds if r.noise), None)
        # Another seed a round, or its labelers would draw the same errors again.
        seed = recipe.seed + 1_000 * number
        rows, state["noise"] = simulated(recipe, given, seed, known)
    elif not path.is_dir():
        rows = _from_file(path, given)
    if not rows:
        raise DataError("no label is usable", where=labels, expected="rankings without ties alone")
    state |= {"rankings": len(rows), "labels_from": path.name}
    _write(out / "labels.jsonl", rows)
    _note(out, state, "labels")
    return True


def _from_project(folder: Path, out: Path, say: Say) -> bool:
    """Give the round's tasks to a project, and export their labels if all have one."""
    from . import label_files, project

    tasks = label_files.read_tasks(out / "tasks.jsonl")
    known = {task.id for task in tasks}
    with project.load(folder).store() as store:
        store.add_tasks(tasks)
        labels = [one for one in store.labels() if one.task in known]
    if missing := len(tasks) - len({one.task for one in labels}):
        again = f"`lora-rlhf label {shlex.quote(str(folder))}`"
        say(f"without a label yet: {missing} of {counted(len(tasks), 'task')}: {again}")
        return False
    path = out / "labels.jsonl"
    say(label_files.export(tasks, labels, path))
    _write(path, _rows(path))
    about = path.with_name(path.name + label_pool.SUFFIX)
    pool = json.loads(about.read_text(encoding="utf-8")) | {"sha256": sha256(path)}
    write_atomically(about, json.dumps(pool, indent=1))
    return True


def _from_file(path: Path, given: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Read comparisons of the round's tasks."""
    known = {prompt_key(task["prompt"]) for task in given}
    rows = []
    for place, row in sources.read(DataSource(path=str(path.absolute())), sources.Skips(0)):
        prompt = row.get("prompt")
        if not isinstance(prompt, str | list) or prompt_key(prompt) not in known:
            raise DataError(
                f"the prompt {sources.excerpt(prompt)} is none of the round's tasks",
                where=place,
                expected="comparisons of the tasks in tasks.jsonl",
                remedy="name the labels of this round",
            )
        rows.append(row)
    return rows


def simulated(
    recipe: Recipe, given: Sequence[dict[str, Any]], seed: int, noise: float | None = None
) -> tuple[list[dict[str, Any]], float]:
    """Rank the answers of tasks as simulated labelers of the closed-world task do.

    Args:
        noise: Temperature of the labelers; None: so that they agree on these answers as often as
            the recipe says.

    Returns:
        Comparisons, and the noise.

    Raises:
        UsageError: A prompt is none of that task.
    """
    by_prompt = {
        item.prompt.strip(): item
        for source in recipe.data.prompts
        if source.task
        for item in generator.items(source.n, recipe.seed, "prompts")
    }
    items, completions = list[Item](), [list(task["answers"].values()) for task in given]
    for task in given:
        if (item := by_prompt.get(str(task["prompt"]).strip())) is None:
            raise UsageError(
                "simulated labelers judge the closed-world task only, and the prompt "
                f"{sources.excerpt(task['prompt'])} is none of it",
                remedy="give people's labels with --labels",
            )
        items.append(item)
    agreement = _agreement(recipe)
    if noise is None:
        noise = labelers.noise(items, completions, agreement)
    ranks, _ = labelers.rank_all(items, completions, agreement, seed, noise)
    rows = [
        {"prompt": task["prompt"], "completions": texts, "ranks": each}
        for task, texts, each in zip(given, completions, ranks, strict=True)
    ]
    return rows, noise


def _agreement(recipe: Recipe) -> float:
    """Return the agreement that the recipe asks of its labelers, else the default."""
    tasks_of = [source for source in recipe.data.comparisons if source.task]
    return (
        tasks_of[0].agreement if tasks_of else float(DataSource.model_fields["agreement"].default)
    )


def _write_earlier(record: Record, out: Path, state: dict[str, Any], say: Say) -> None:
    """Write the labels that a task generator made for the run: its SFT answers, ranked again.

    The round's run starts from another model, whose answers are not those that were ranked.
    """
    recipe = record.recipe()
    made = [source for source in recipe.data.comparisons if source.task]
    if not made:
        return
    backbone, _ = loaded_run.load(record.folder)
    rows = []
    for source in made:
        items, k = generator.items(source.n, recipe.seed, "comparisons"), source.completions
        say(f"{k} completions of the SFT model for each of {len(items)} earlier prompts")
        chat = bool(backbone.tokenizer.chat_template)
        prompts = [
            [{"role": "user", "content": item.prompt}] if chat else item.prompt + "\n"
            for item in items
        ]
        answers = backbone.generate(
            [backbone.encode_prompt(prompt) for prompt in prompts for _ in range(k)],
            "reference",
            seed=recipe.seed,
            batch_size=recipe.evaluate.batch_size,
            max_new_tokens=ppo_stage.completion_limit(recipe, "ppo"),
        )
        texts = [backbone.decode(answer) for answer in answers]
        each = [texts[i : i + k] for i in range(0, len(texts), k)]
        ranks, _ = labelers.rank_all(items, each, source.agreement, recipe.seed)
        state.setdefault("noise", labelers.noise(items, each, source.agreement))
        rows += [
            {"prompt": prompt, "completions": completions, "ranks": ranked}
            for prompt, completions, ranked in zip(prompts, each, ranks, strict=True)
        ]
    _write(out / "earlier.jsonl", rows)
    _note(out, state, "earlier")


def _earlier_prompts(recipe: Recipe) -> set[str]:
    """Return the keys of prompts of earlier rounds, also those whose labels were not usable."""
    folders = [Path(one.path).parent for one in recipe.data.comparisons if one.path]
    files = [one / "tasks.jsonl" for one in folders if (one / STATE).is_file()]
    return {prompt_key(row["prompt"]) for path in files for row in _rows(path)}


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:  # a text may hold other ends of a line, as U+2028
        return [json.loads(line) for line in lines]


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as canonical JSON, so that the file's sha256 is that of the source in a record."""
    lines = (json.dumps(row, sort_keys=True) + "\n" for row in rows)
    write_atomically(path, "".join(lines))


# --- the recipe ----------------------------------------------------------------------------------


def _recipe(record: Record, out: Path, request: Round, state: dict[str, Any]) -> Recipe:
    """Return the recipe of the run before with the new labels, the new start, and the lineage."""
    before = record.recipe()
    data: dict[str, Any] = before.model_dump(mode="json")
    files = ["earlier"] * ("earlier" in state) + ["labels"]
    data["data"]["comparisons"] = [
        *(source for source in data["data"]["comparisons"] if not source["task"]),
        *({"path": str((out / f"{name}.jsonl").absolute())} for name in files),
    ]
    adapter = record.verified(f"adapters/{request.start}")
    data["sft"] = {"from": str(adapter.absolute())}
    data["reward"]["from"] = None
    number = request.choice.round
    data["name"] = f"{re.sub('-round-[0-9]+$', '', before.name)}-round-{number}"
    data["rounds"] = [
        *data["rounds"],
        {
            "number": number,
            "run": before.name,
            "record_sha256": state["record_sha256"],
            "model": request.choice.model,
            "strategy": request.choice.strategy,
            "tasks_sha256": state["tasks"],
            "labels": state["labels_from"],
            "labels_sha256": state["labels"],
            "rankings": state["rankings"],
            "noise": state.get("noise"),
            "start": request.start,
        },
    ]
    text = dump_recipe(before.model_validate(data))
    return parse_recipe(text, str(out / STATE), list(request.overrides))
