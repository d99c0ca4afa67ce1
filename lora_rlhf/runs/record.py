# SPDX-License-Identifier: Apache-2.0
"""The run directory and its record, the only source of cards, reports and plots.

recipe.yaml      as resolved, secrets masked
record.json      results and versions; only `clock` differs between two equal runs
metrics.jsonl    one line per logged step: {"stage", "step", ..., "clock": {...}}
samples.jsonl    completions of base, SFT and policy (or best of n) on the held-out prompts
report.json      the evaluation's tables, without times; report.html is made from it and `clock`
adapters/ROLE/   a plain PEFT folder with its card as README.md and its check.json
plots/*.png

Recipe and record have a copy beside them (`*.bak`), which is read if a power cut damaged the file.
The record has its own sha256 and those of all files; readers call `verified` first.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import math
import os
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_rlhf.errors import DamageError, LoraRlhfError, RecipeError, SetupError, UsageError
from lora_rlhf.recipe.loader import dump_recipe, parse_recipe
from lora_rlhf.recipe.schema import ModelSection, Recipe
from lora_rlhf.recipe.stage_keys import (
    ALGORITHMS,
    FREE,
    differences,
    first_reader,
    identity,
    stage_names,
    stage_of,
    stage_of_role,
)
from lora_rlhf.recipe.strict_yaml import parse_yaml
from lora_rlhf.redaction import hide, safe
from lora_rlhf.runtime.environment import changed_versions, versions
from lora_rlhf.runtime.paths import moved, reject_escaping_links

from .disk import BACKUP, append, damaged, is_signed, sha256, signed, sync, write_atomically
from .run_lock import LOCK

SCHEMA = 1
"""Version of the layout of `record.json`."""

_PARTS = ("model", "lora", "data", "stages", "evaluation", "files", "clock")
"""Keys of the record that hold a mapping."""

COPY = "backup.tmp"
"""Folder in a run directory while a snapshot is sent to the Hub; not part of the run."""

BEGINNINGS = {"recipe.yaml", "recipe.yaml.tmp", "recipe.yaml.bak", "recipe.yaml.bak.tmp",
              "record.json.tmp"}  # fmt: skip
"""Files of a run that was killed before it had a record; such a run starts again."""

_log = logging.getLogger(__name__)

_REWRITTEN = ("README.md", "recipe.yaml")
"""Files that may be rewritten in a sealed run: cards, and the recipe's free keys."""

_UNSEALED = ("record.json", "metrics.jsonl", LOCK)
_STATE = ("st_dev", "st_ino", "st_size", "st_mtime_ns")
"""Parts of a file's status that show that it was changed since it was hashed."""


class Record:
    """`record.json` of one run.

    Layout: `{schema, name, seed, algorithm, recipe_sha256, versions, model: {...}, lora: {...},
    data: {SET: {...}}, stages: {STAGE: {status, ..., files: {PATH: sha256}}},
    evaluation: {MODEL: {METRIC: {value, low, high, n}}}, files: {PATH: sha256}, clock: {...},
    sha256}`. A stage lists the files that it wrote, `files` all of the sealed run.
    `recipe_sha256` is of the keys that decide the result (`stage_keys.identity`), in `clock` it is
    of the file `recipe.yaml`, whose free keys may change.
    """

    def __init__(self, folder: str | Path, data: dict[str, Any]) -> None:
        self.folder, self.data = Path(folder), data
        self.warm_start = False
        self.changed: list[tuple[str, Any, Any]] = []  # (key, value of the run, value given now)
        self.check_place: Callable[[], None] = lambda: None  # called before the run is written to
        self._written: dict[str, str] = {}  # path -> sha256, by the stage that runs now
        self._seen: dict[str, tuple[os.stat_result, str]] = {}  # path -> sha256 of that state
        self._digest = ""  # of record.json as it was read or written here
        self._forgotten: tuple[str, ...] = ()  # stages that run again
        self.on_done: Callable[[], None] = lambda: None  # called before a stage is marked as done
        # Called after each checkpoint (False) and each finished stage (True).
        self.on_saved: Callable[[bool], None] = lambda whole_stage: None

    def __repr__(self) -> str:
        stages = [f"{name} {entry['status']}" for name, entry in self.data["stages"].items()]
        seed, state = self.data.get("seed"), ", ".join(stages) or "no stage begun"
        return f"Record({str(self.folder)!r}: {self.algorithm}, seed {seed}; {state})"

    @classmethod
    def open(
        cls,
        folder: str | Path,
        recipe: Recipe,
        *,
        warm_start: bool = False,
        redo: str | None = None,
    ) -> Record:
        """Start a new run, or continue an earlier run of the same recipe.

        Args:
            warm_start: Allow changes of keys that only the interrupted stage reads, which restarts.
            redo: Drop this stage and the later ones, which then run again.

        Raises:
            UsageError: The folder holds a run of another recipe or other files, or `warm_start`
                finds no interrupted stage.
            SetupError: The folder cannot be written.
        """
        record = cls.peek(folder, recipe, warm_start=warm_start, redo=redo)
        folder, text = record.folder, dump_recipe(recipe)
        if is_run(folder):
            record._remove_forgotten()
            for other in ALGORITHMS.keys() - {recipe.algorithm}:  # interrupted before a change
                record.data["stages"].pop(other, None)
                record.truncate_log(other)
                record._drop_checkpoints(other)
            record._update_recipe(recipe, text)
            return record
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "recipe.yaml", text, twice=True)
        except OSError as error:
            raise SetupError(
                f"cannot write to {folder}: {error.strerror}", remedy="give another --out"
            ) from None
        record.save()
        return record

    @classmethod
    def peek(
        cls,
        folder: str | Path,
        recipe: Recipe,
        *,
        warm_start: bool = False,
        redo: str | None = None,
    ) -> Record:
        """Return the record that `open` would start or continue, and write nothing.

        Raises:
            UsageError: As `open`.
        """
        folder, digest = Path(folder), identity(recipe)
        if is_run(folder):
            record = cls.read(folder)
            record.warm_start = warm_start
            if redo is not None:
                record.forget(redo)
            record.metrics()  # raises if the log of a finished stage was changed
            record._check_recipe(recipe)
            record.data |= {"recipe_sha256": digest, "algorithm": recipe.algorithm}
            return record
        if folder.exists() and (
            not folder.is_dir() or {p.name for p in folder.iterdir()} - BEGINNINGS
        ):
            raise UsageError(
                f"{folder} exists and is not a run",
                remedy=_rebuild(folder) or "give an empty or new --out",
            )
        if redo is not None:
            raise UsageError(f"{folder} holds no run", remedy="leave --redo out")
        host = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "system": platform.system(),
            "cores": os.cpu_count(),
        }
        record = cls(folder, blank(recipe, dump_recipe(recipe)))
        record.data["versions"] = versions()
        record.data["clock"] |= {"started": _now(), "host": host}
        return record

    def forget(self, stage: str) -> None:
        """Drop a stage and all later ones from the record in memory, not yet from the disk.

        Raises:
            UsageError: The stage has not begun.
        """
        names = stage_names(self.algorithm)
        stage = self.algorithm if stage == "policy" else stage
        if stage not in self.data["stages"] or stage not in names:
            begun = [name for name in names if name in self.data["stages"]]
            raise UsageError(
                f"{self.folder} has no stage {stage!r} to do again",
                expected=", ".join(begun) or "a stage that has begun",
                remedy="leave --redo out to continue the run",
            )
        self._forgotten = names[names.index(stage) :]
        clock = self.data["clock"]
        for kept in (self.data["stages"], clock["stages"], clock.get("log", {})):
            for name in [n for n in kept if stage_of(n) in self._forgotten]:
                del kept[name]
        self.data["files"] = {}
        if stage != "card":
            self.data["evaluation"] = {}

    def _remove_forgotten(self) -> None:
        """Remove from the disk what the forgotten stages wrote, so that none of it is read."""
        if not self._forgotten:
            return
        self.save()  # if the process is killed now, the stages are known not to be done
        for stage in self._forgotten:
            self._drop_checkpoints(stage)
            for training in [t for t in self.log_states() if stage_of(t) == stage]:
                self.truncate_log(training)
            for folder in (self.folder / "adapters").glob("*"):
                if stage_of_role(folder.name, self.algorithm) == stage:
                    shutil.rmtree(folder)
        if self._forgotten != ("card",):
            (self.folder / "samples.jsonl").unlink(missing_ok=True)

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
        if _text(path) == text == _text(_copy_of(path)):
            return
        if model and recipe.model.hub_id and recipe.model.hub_id != model.get("hub_id"):
            model["hub_id"] = recipe.model.hub_id
            model.pop("hub_revision", None)  # a commit of the other repository
        # If the process is killed in between, either file is the recipe that the record knows.
        write_atomically(_copy_of(path), text)
        if self.data["clock"].get("recipe_sha256") != _digest(text):
            self.data["stages"].pop("card", None)
        self.data["clock"]["recipe_sha256"] = _digest(text)
        self.save()
        write_atomically(path, text)

    @classmethod
    def read(cls, folder: str | Path) -> Record:
        """Read the record of a finished or interrupted run.

        Raises:
            UsageError: The folder is not a run, a link leads out of it, or its record is damaged,
                and so is the copy beside it.
        """
        reject_escaping_links(Path(folder), UsageError)
        path = Path(folder) / "record.json"
        if not is_run(path.parent):
            raise UsageError(
                f"{folder} is not a run directory",
                expected="a folder that holds record.json",
                remedy=_rebuild(path.parent) or "give the --out of a `lora-rlhf run`",
            )
        data, wrong = _parsed(path)
        if wrong:
            data, none = _parsed(_copy_of(path))
            if none:
                again = "run the recipe into a new --out"
                raise UsageError(
                    f"{path} is not a record of a run: {wrong}",
                    expected=f"record.json of schema {SCHEMA}, as the run wrote it",
                    remedy=f"restore the file, or {_rebuild(path.parent) or again}",
                )
            _log.warning("%s: %s; its copy %s is used", path, wrong, _copy_of(path).name)
        digest = data.pop("sha256", "")
        record = cls(folder, data)
        record._digest = digest
        return record

    def refresh(self) -> None:
        """Read the record again if somebody has written it since this object did."""
        now = Record.read(self.folder)
        if now._digest != self._digest:
            self.data, self._digest = now.data, now._digest

    def recipe(self) -> Recipe:
        """Read the resolved recipe of this run; files that were moved together with it are found.

        The base is compared by its fingerprint, and data by sha256, before a stage uses them.

        Raises:
            DamageError: The file is not the recipe of this run.
        """
        recipe = parse_recipe(self.recipe_text(), str(self.folder / "recipe.yaml"), until="")
        model = recipe.model.model_copy(update={"id": moved(recipe.model.id, self.folder)})
        sets = {
            name: [
                source.model_copy(update={"path": moved(source.path, self.folder)})
                if isinstance(source.path, str)
                else source
                for source in getattr(recipe.data, name)
            ]
            for name in ("demonstrations", "comparisons", "prompts", "text", "evaluate")
        }
        updated = {"model": model, "data": recipe.data.model_copy(update=sets)}
        for name in ("sft", "reward"):
            section = getattr(recipe, name)
            if section.start:
                start = {"from": moved(section.start, self.folder)}
                updated[name] = section.model_copy(update=start)
        if recipe.ppo.function:
            file, function = recipe.ppo.function
            own = {"reward": f"{moved(file, self.folder)}:{function}"}
            updated["ppo"] = recipe.ppo.model_copy(update=own)
        return recipe.model_copy(update=updated)

    def model_section(self, recipe: Recipe) -> ModelSection:
        """Return the recipe's base at the precision at which this run loaded it first."""
        model, dtype = recipe.model, self.data["model"].get("dtype")
        return (
            model.model_copy(update={"dtype": dtype}) if dtype and model.dtype == "auto" else model
        )

    def recipe_text(self) -> str:
        """Read the text of the recipe, or of its copy if more than free keys was edited.

        Raises:
            DamageError: Neither is the recipe of this run.
        """
        path = self.folder / "recipe.yaml"
        known, wrong = self.data.get("clock", {}).get("recipe_sha256"), ""
        for each in (path, _copy_of(path)):
            text = _text(each)
            # Runs of earlier versions have no digest.
            if (known is None and text) or _digest(text) == known or self._is_edited(text):
                if each != path:
                    _log.warning("%s: %s; its copy %s is used", path, wrong, each.name)
                return text
            wrong = "it is not the recipe of this run" if text else "it is missing or empty"
        raise damaged(path, wrong)

    def _is_edited(self, text: str) -> bool:
        """Tell if a text is the whole recipe of this run, in which only free keys were edited."""
        try:
            recipe = parse_recipe(text, "", until="")
            whole = hide(recipe.model_dump(mode="json")) == parse_yaml(text, "")[0]
            return whole and identity(recipe) == self.data.get("recipe_sha256")
        except RecipeError:
            return False

    @property
    def algorithm(self) -> str:
        """The algorithm of this run's policy stage."""
        stages = self.data["stages"]
        return self.data.get("algorithm") or next((a for a in ALGORITHMS if a in stages), "ppo")

    def save(self) -> None:
        """Write `record.json` and the copy beside it, each whole or not at all."""
        self.check_place()
        data = signed(json.loads(json.dumps(safe(finite(self.data)))))
        text = json.dumps(data, indent=1) + "\n"
        write_atomically(self.folder / "record.json", text, twice=True)
        self._digest = data["sha256"]

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
        self.data["stages"][name], self._written = {"status": "interrupted"}, {}
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
        self.note_log(name)
        if self._written:
            entry["files"] = dict(sorted(self._written.items()))
        self.data["stages"][name] = {"status": "done", **entry}
        clock["stages"][name] = {"seconds": round(seconds, 3)}
        self.save()
        self._drop_checkpoints(name)
        self.on_saved(True)

    def note(self, path: Path) -> dict[str, str]:
        """List a file that the current stage wrote, or all of a folder; return name -> sha256."""
        files = [path] if path.is_file() else sorted(path.iterdir())
        for each in (*files, path, path.parent):
            sync(each)
        hashes = {each.name: self._sha256(each) for each in files}
        self._written |= {p.relative_to(self.folder).as_posix(): hashes[p.name] for p in files}
        return hashes

    def verified(self, name: str) -> Path:
        """Compare a file, or all files of a folder, with the record; return its path.

        Raises:
            DamageError: A file is missing, or has another sha256.
        """
        for damage in self.damages(name):
            raise damage
        return self.folder / name

    def damages(self, name: str = "") -> Iterator[DamageError]:
        """Yield an error for each file, by default of the whole run, that differs from the record.

        Files that the run did not write, and cards, which people may edit, are not checked.
        """

        def known(files: dict[str, str]) -> dict[str, str]:
            names = (n for n in files if not name or f"{n}/".startswith(f"{name}/"))
            return {n: files[n] for n in names if not n.endswith("README.md")}

        # Runs of earlier versions list their files only when they are sealed.
        files = known(self._by_stages()) or (known(self.data.get("files", {})) if name else {})
        for each, digest in files.items():
            path = self.folder / each
            entries = self.data["stages"].items()
            stage = next((s for s, entry in entries if each in entry.get("files", {})), "")
            place = self.folder if stage else None, stage
            if not path.is_file():
                yield damaged(path, "it is missing", *place)
            elif self._sha256(path) != digest:
                yield damaged(path, "its sha256 is not the one in record.json", *place)

    def rehash(self, names: Sequence[str]) -> None:
        """Update the sha256 of files that were rewritten on purpose."""
        if "recipe.yaml" in names:
            self.data["clock"]["recipe_sha256"] = sha256(self.folder / "recipe.yaml")
        entries = (entry.get("files", {}) for entry in self.data["stages"].values())
        for files in (self.data["files"], *entries):
            files.update({n: sha256(self.folder / n) for n in names if n in files})

    def listed(self) -> dict[str, str]:
        """Return path -> sha256 of every file that the record lists."""
        known = self.data["clock"].get("recipe_sha256")
        recipe = {"recipe.yaml": known} if known else {}
        return {**self.data["files"], **self._by_stages(), **recipe}

    def _by_stages(self) -> dict[str, str]:
        entries = self.data.get("stages", {}).values()
        return {n: d for entry in entries for n, d in entry.get("files", {}).items()}

    def _sha256(self, path: Path) -> str:
        """Hash a file, once while it is unchanged."""
        stat, name = path.stat(), str(path)
        before, digest = self._seen.get(name, (None, ""))
        if before is None or any(getattr(before, a) != getattr(stat, a) for a in _STATE):
            digest = sha256(path)
            self._seen[name] = stat, digest
        return digest

    def note_log(self, stage: str) -> None:
        """List the log lines of a finished stage; they are on the disk before the record is."""
        sync(self.folder / "metrics.jsonl")
        log = self.data["clock"].setdefault("log", {})
        for training in list(log):
            if stage_of(training) == stage:
                del log[training]
        log |= {t: state for t, state in self.log_states().items() if stage_of(t) == stage}

    def log_states(self) -> dict[str, dict[str, Any]]:
        """Return for each training the number of its log lines, and the sha256 of their text."""
        texts: dict[str, list[str]] = {}
        for text, line in self._logged():
            texts.setdefault(line["stage"], []).append(text)
        return {t: {"lines": len(x), "sha256": _digest("".join(x))} for t, x in texts.items()}

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
        self.check_place()
        append(self.folder / "metrics.jsonl", json.dumps(safe(line)) + "\n")

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """Return the logged lines of one stage or of all.

        Raises:
            UsageError: A line is not one that a run writes.
            DamageError: The lines of a finished stage are not those that it wrote.
        """
        states = self.log_states()
        for training, known in self.data.get("clock", {}).get("log", {}).items():
            if self.done(stage_of(training)) and states.get(training) != known:
                raise damaged(
                    self.folder / "metrics.jsonl",
                    f"the lines of {training} are not the {known['lines']} that it wrote",
                    self.folder,
                    stage_of(training),
                )
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
            except (ValueError, KeyError, TypeError, RecursionError) as error:
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
        """Record the sha256 of every file of the run, except the record, pictures and pages.

        A file that was listed before keeps its hash, except cards and recipe: a card that is
        written again must not hide that weights have changed. The log holds times, so its hashes
        are under `clock`.
        """
        before, files = self.listed(), {}
        self.recipe_text()  # raises if more than free keys was edited
        tops = [p for p in self.folder.iterdir() if p.name not in ("checkpoints", COPY)]
        for path in sorted(p for top in tops for p in (top, *top.rglob("*")) if p.is_file()):
            name = path.relative_to(self.folder).as_posix()
            if path.suffix not in (".png", ".html", ".tmp", BACKUP) and name not in _UNSEALED:
                known = None if path.name in _REWRITTEN else before.get(name)
                files[name] = known or self._sha256(path)
        states = {t: s for t, s in self.log_states().items() if self.done(stage_of(t))}
        self.data["clock"]["log"] = states | self.data["clock"].get("log", {})
        self.data["files"] = files
        self.save()


def finite(value: Any) -> Any:
    """Turn NaN and infinities into text, since JSON has no numbers for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def blank(recipe: Recipe, text: str) -> dict[str, Any]:
    """Return the record of a run in which no stage has begun; `text` is its recipe.yaml."""
    return {
        "schema": SCHEMA,
        "name": recipe.name,
        "seed": recipe.seed,
        "algorithm": recipe.algorithm,
        "recipe_sha256": identity(recipe),
        "versions": {},
        **{part: {} for part in _PARTS},
        "clock": {"recipe_sha256": _digest(text), "stages": {}},
    }


def is_run(folder: Path) -> bool:
    """Tell if a folder holds the record of a run, or its copy."""
    path = folder / "record.json"
    return path.exists() or _copy_of(path).exists()


def _rebuild(folder: Path) -> str:
    """Return how to rebuild a record, if a folder holds a recipe and adapters; else empty."""
    whole = (folder / "recipe.yaml").exists() or (folder / f"recipe.yaml{BACKUP}").exists()
    if not whole or not any(folder.glob("adapters/*")):
        return ""
    return f"rebuild it: `lora-rlhf doctor {shlex.quote(str(folder))} --rebuild-record`"


def _copy_of(path: Path) -> Path:
    return path.with_name(path.name + BACKUP)


def _text(path: Path) -> str:
    """Read a text; empty if there is none."""
    try:
        return path.read_bytes().decode().strip("\0")
    except (OSError, ValueError):
        return ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _parsed(path: Path) -> tuple[dict[str, Any], str]:
    """Read a record; also return what is wrong with it, or an empty text."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        return {}, f"it cannot be read: {error}"
    wrong = _layout_fault(data)
    if not wrong and "sha256" in data and not is_signed(data):
        wrong = "its own sha256 differs, so it was changed"
    return data, wrong


def _layout_fault(data: Any) -> str:
    """Name the first fault in the shape of a parsed `record.json`; empty if there is none."""
    if not isinstance(data, dict):
        return f"it holds a {type(data).__name__}"
    if data.get("schema") != SCHEMA:
        return f"schema {data.get('schema')!r}"
    if wrong := [key for key in _PARTS if not isinstance(data.get(key), dict)]:
        return f"{wrong[0]} is {'missing' if wrong[0] not in data else 'no mapping'}"
    kinds = {"name": str, "seed": int, "versions": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(data.get(key), kind)]:
        return f"{wrong[0]} is {'missing' if wrong[0] not in data else 'of another type'}"
    entries = [*data["stages"].values(), *data["data"].values(), *data["evaluation"].values()]
    if not all(isinstance(entry, dict) for entry in entries):
        return "a stage, a data set or a model of the evaluation is no mapping"
    if not all("status" in entry for entry in data["stages"].values()):
        return "a stage has no status"
    return "" if isinstance(data["clock"].get("stages"), dict) else "clock.stages is missing"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
