# SPDX-License-Identifier: Apache-2.0
"""The run directory and its record, the only source of cards, reports and plots.

recipe.yaml      as resolved, secrets masked
record.json      results and versions; only `clock` differs between two equal runs
metrics.jsonl    one line per logged step: {"stage", "step", ..., "clock": {...}}
samples.jsonl    completions of base, SFT and policy (or best of n) on the held-out prompts
adapters/ROLE/   a plain PEFT folder with its card as README.md and its check.json
plots/*.png
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_rlhf.errors import LoraRlhfError, SetupError, UsageError
from lora_rlhf.recipe.loader import dump_recipe, parse_recipe
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import (
    ALGORITHMS,
    FREE,
    differences,
    first_reader,
    identity,
    stage_names,
    stage_of,
)
from lora_rlhf.redaction import safe
from lora_rlhf.runtime.environment import changed_versions, versions
from lora_rlhf.runtime.paths import reject_escaping_links

from .disk import sha256, write_atomically

SCHEMA = 1
"""Version of the layout of `record.json`."""

_PARTS = ("model", "lora", "data", "stages", "evaluation", "files", "clock")
"""Keys of the record that hold a mapping."""

COPY = "backup.tmp"
"""Folder in a run directory while a snapshot is sent to the Hub; not part of the run."""

BEGINNINGS = {"recipe.yaml", "recipe.yaml.tmp", "record.json.tmp"}
"""Files of a run that was killed before it had a record; such a run starts again."""

_REWRITTEN = ("README.md", "recipe.yaml")
"""Files that may be rewritten in a sealed run: cards, and the recipe's free keys."""


class Record:
    """`record.json` of one run.

    Layout: `{schema, name, seed, algorithm, recipe_sha256, versions, model: {...}, lora: {...},
    data: {SET: {...}}, stages: {STAGE: {status, ...}},
    evaluation: {MODEL: {METRIC: {value, low, high, n}}}, files: {PATH: sha256}, clock: {...}}`.
    """

    def __init__(self, folder: str | Path, data: dict[str, Any]) -> None:
        self.folder, self.data = Path(folder), data
        self.warm_start = False
        self.changed: list[tuple[str, Any, Any]] = []  # (key, value of the run, value given now)
        self.on_done: Callable[[], None] = lambda: None  # called before a stage is marked as done
        # Called after each checkpoint (False) and each finished stage (True).
        self.on_saved: Callable[[bool], None] = lambda whole_stage: None

    @classmethod
    def open(cls, folder: str | Path, recipe: Recipe, *, warm_start: bool = False) -> Record:
        """Start a new run, or continue an earlier run of the same recipe.

        Args:
            warm_start: Allow changes of keys that only the interrupted stage reads, which restarts.

        Raises:
            UsageError: The folder holds a run of another recipe or other files, or `warm_start`
                finds no interrupted stage.
            SetupError: The folder cannot be written.
        """
        record = cls.peek(folder, recipe, warm_start=warm_start)
        folder, text = record.folder, dump_recipe(recipe)
        if (folder / "record.json").exists():
            for other in ALGORITHMS.keys() - {recipe.algorithm}:  # interrupted before a change
                record.data["stages"].pop(other, None)
                record.truncate_log(other)
                record._drop_checkpoints(other)
            record._update_recipe(recipe, text)
            return record
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "recipe.yaml", text)
        except OSError as error:
            raise SetupError(
                f"cannot write to {folder}: {error.strerror}", remedy="give another --out"
            ) from None
        record.save()
        return record

    @classmethod
    def peek(cls, folder: str | Path, recipe: Recipe, *, warm_start: bool = False) -> Record:
        """Return the record that `open` would start or continue, and write nothing.

        Raises:
            UsageError: As `open`.
        """
        folder, digest = Path(folder), identity(recipe)
        if (folder / "record.json").exists():
            record = cls.read(folder)
            record.warm_start = warm_start
            record._check_recipe(recipe)
            record.data |= {"recipe_sha256": digest, "algorithm": recipe.algorithm}
            return record
        if folder.exists() and (
            not folder.is_dir() or {p.name for p in folder.iterdir()} - BEGINNINGS
        ):
            raise UsageError(
                f"{folder} exists and is not a run", remedy="give an empty or new --out"
            )
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "name": recipe.name,
            "seed": recipe.seed,
            "algorithm": recipe.algorithm,
            "recipe_sha256": digest,
            "versions": versions(),
            **{part: {} for part in _PARTS},
            "clock": {
                "started": _now(),
                "host": {
                    "python": platform.python_version(),
                    "machine": platform.machine(),
                    "system": platform.system(),
                    "cores": os.cpu_count(),
                },
                "stages": {},
            },
        }
        return cls(folder, data)

    def _check_recipe(self, recipe: Recipe) -> None:
        """Refuse a recipe that changes keys which a finished or interrupted stage has read."""
        before = self.recipe()
        self.changed = differences(before, recipe)
        wrong = [
            f"  {key}: {was!r} -> {now!r} (read by {stage}, which "
            + ("is done)" if self.done(stage) else "has begun)")
            for key, was, now in self.changed
            if (stage := first_reader(key, before.algorithm))
            and (self.done(stage) or (self.in_flight(stage) and not self.warm_start))
        ]
        if self.warm_start and not any(map(self.in_flight, stage_names(before.algorithm))):
            raise UsageError(
                f"{self.folder} has no interrupted stage with a checkpoint",
                remedy="leave --warm-start out",
            )
        if wrong:
            raise UsageError(
                f"{self.folder} holds a run of another recipe:\n" + "\n".join(wrong),
                expected="changes only to what later stages read, or to " + ", ".join(FREE),
                remedy="to continue it as it was, give its values again: "
                f"{self.as_options()}; or give another --out; `--warm-start` restarts an "
                "interrupted stage",
            )

    def as_options(self) -> str:
        """Return the run's values of the keys that now have others, as options of its command."""
        texts = ((key, w if isinstance(w, str) else json.dumps(w)) for key, w, _ in self.changed)
        return " ".join(f"--set {shlex.quote(f'{key}={text}')}" for key, text in texts)

    def _update_recipe(self, recipe: Recipe, text: str) -> None:
        """Store a recipe whose free keys changed; cards and seal are made again."""
        path, model = self.folder / "recipe.yaml", self.data["model"]
        if path.read_text(encoding="utf-8") == text:
            return
        if model and recipe.model.hub_id and recipe.model.hub_id != model.get("hub_id"):
            model["hub_id"] = recipe.model.hub_id
            model.pop("hub_revision", None)  # a commit of the other repository
        # The record first: if the process is killed in between, the card stage runs once more.
        self.data["stages"].pop("card", None)
        self.save()
        write_atomically(path, text)

    @classmethod
    def read(cls, folder: str | Path) -> Record:
        """Read the record of a finished or interrupted run.

        Raises:
            UsageError: The folder is not a run, a link leads out of it, or its record is damaged.
        """
        reject_escaping_links(Path(folder), UsageError)
        path = Path(folder) / "record.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(
                f"{folder} is not a run directory",
                expected="a folder that holds record.json",
                remedy="give the --out of a `lora-rlhf run`",
            ) from None
        except (ValueError, OSError, RecursionError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from None
        if wrong := _layout_fault(data):
            raise UsageError(
                f"{path} is no record of a run: {wrong}",
                expected=f"record.json of schema {SCHEMA}",
                remedy="restore the file, or run the recipe into a new --out",
            )
        return cls(folder, data)

    def recipe(self) -> Recipe:
        """Read the resolved recipe of this run.

        Raises:
            UsageError: The file is missing or cannot be read.
        """
        path = self.folder / "recipe.yaml"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{path} cannot be read: {getattr(error, 'strerror', None) or error}",
                expected="the recipe as the run wrote it",
                remedy="restore the file",
            ) from None
        return parse_recipe(text, str(path))

    @property
    def algorithm(self) -> str:
        """The algorithm of this run's policy stage."""
        stages = self.data["stages"]
        return self.data.get("algorithm") or next((a for a in ALGORITHMS if a in stages), "ppo")

    def save(self) -> None:
        """Write `record.json`, whole or not at all."""
        text = json.dumps(safe(finite(self.data)), indent=1)
        write_atomically(self.folder / "record.json", text + "\n")

    def done(self, stage: str) -> bool:
        """Return whether `stage` is finished; for `card`, the run must be sealed too."""
        done = self.data["stages"].get(stage, {}).get("status") == "done"
        return bool(done and (stage != "card" or self.data["files"]))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Run a stage: the yielded dict becomes `stages.NAME`, with status and time.

        After an exception the stage has the status `interrupted`, no result, and as `error` the
        message of a LoraRlhfError. `versions` lists packages that changed since the run started.
        """
        started, entry = time.perf_counter(), {}  # type: tuple[float, dict[str, Any]]
        self.data["stages"][name] = {"status": "interrupted"}
        if name != "card":
            self.data["files"] = {}  # no longer sealed
        self.save()
        try:
            yield entry
        except LoraRlhfError as error:
            self.data["stages"][name]["error"] = {
                "type": type(error).__name__,
                "message": str(error),
            }
            self.save()
            raise
        if other := changed_versions(self.data["versions"], versions()):
            entry["versions"] = other
        clock, seconds = self.data["clock"], time.perf_counter() - started
        for training in [t for t in clock.get("before", {}) if stage_of(t) == name]:
            seconds += clock["before"].pop(training)  # of interrupted processes
        self.on_done()
        self.data["stages"][name] = {"status": "done", **entry}
        clock["stages"][name] = {"seconds": round(seconds, 3)}
        self.save()
        self._drop_checkpoints(name)
        self.on_saved(True)

    def truncate_log(self, stage: str, count: int = 0) -> bool:
        """Drop the log lines of `stage` after its first `count`; return False if it has fewer."""
        path, kept, seen = self.folder / "metrics.jsonl", [], 0
        if not path.exists():
            return count == 0
        for text, line in self._logged():
            seen += line["stage"] == stage
            if line["stage"] != stage or seen <= count:
                kept.append(text)
        if seen < count:
            return False
        write_atomically(path, "".join(kept))
        return True

    def checkpoints(self, training: str) -> Path:
        """Return the folder of a training's checkpoints."""
        return self.folder / "checkpoints" / training

    def in_flight(self, stage: str) -> bool:
        """Return whether `stage` was interrupted and left a checkpoint."""
        manifests = self.checkpoints("").glob("*/step-*/manifest.json")
        return not self.done(stage) and any(stage_of(p.parts[-3]) == stage for p in manifests)

    def _drop_checkpoints(self, stage: str) -> None:
        for path in self.checkpoints("").glob("*"):
            if stage_of(path.name) == stage:
                shutil.rmtree(path, ignore_errors=True)

    def log(
        self, stage: str, step: int, metrics: dict[str, Any], clock: dict[str, Any] | None = None
    ) -> None:
        """Append one line to `metrics.jsonl`, non-finite numbers as text ("nan")."""
        line = {"stage": stage, "step": step, **finite(metrics)}
        if clock:
            line["clock"] = finite(clock)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(safe(line)) + "\n")

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """Return the logged lines of one stage or of all.

        Raises:
            UsageError: A line is not one that a run writes.
        """
        return [line for _, line in self._logged() if stage is None or line["stage"] == stage]

    def _logged(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Read the lines of `metrics.jsonl`, as text and as data."""
        path = self.folder / "metrics.jsonl"
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
        *whole, _ = text.split("\n")  # a killed process may leave a last line without an end
        for number, line in enumerate(whole, start=1):
            try:
                data = json.loads(line)
                if not isinstance(data["stage"], str) or not isinstance(data["step"], int):
                    raise TypeError("stage and step are text and a number")
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"not a line of the log ({error})",
                    where=f"{path}:{number}",
                    expected='a JSON object with "stage" and "step"',
                    remedy="remove the line, or restore the file",
                ) from None
            yield line + "\n", data

    def adapter(self, role: str) -> Path:
        """Return the folder of a role's adapter: sft, reward, policy or value."""
        return self.folder / "adapters" / role

    def finish(self) -> None:
        """Mark the run as finished, before its cards are made from the final clock."""
        self.data["clock"]["finished"] = _now()
        self.save()

    def seal(self) -> None:
        """Record the sha256 of every file of the run, except the record and pictures.

        A file that was sealed before keeps its hash, except cards and recipe: a card that is
        written again must not hide that weights have changed. The log holds times, so its hash is
        under `clock`.
        """
        before, files = self.data["files"], {}
        tops = [p for p in self.folder.iterdir() if p.name not in ("checkpoints", COPY)]
        for path in sorted(p for top in tops for p in (top, *top.rglob("*")) if p.is_file()):
            name = path.relative_to(self.folder).as_posix()
            if path.suffix not in (".png", ".tmp") and name not in ("record.json", "metrics.jsonl"):
                known = None if path.name in _REWRITTEN else before.get(name)
                files[name] = known or sha256(path)
        log, clock = self.folder / "metrics.jsonl", self.data["clock"]
        if log.exists() and not (before and "metrics_sha256" in clock):
            clock["metrics_sha256"] = sha256(log)
        self.data["files"] = files
        self.save()


def finite(value: Any) -> Any:
    """Turn NaN and infinities into text, since JSON has no numbers for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _layout_fault(data: Any) -> str:
    """Name the first fault in the shape of a parsed `record.json`; empty if there is none."""
    if not isinstance(data, dict):
        return f"it holds a {type(data).__name__}"
    if data.get("schema") != SCHEMA:
        return f"schema {data.get('schema')!r}"
    if wrong := [key for key in _PARTS if not isinstance(data.get(key), dict)]:
        return f"{wrong[0]} is {'missing' if wrong[0] not in data else 'no mapping'}"
    entries = [*data["stages"].values(), *data["data"].values(), *data["evaluation"].values()]
    if not all(isinstance(entry, dict) for entry in entries):
        return "a stage, a data set or a model of the evaluation is no mapping"
    return "" if isinstance(data["clock"].get("stages"), dict) else "clock.stages is missing"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
