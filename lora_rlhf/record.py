# SPDX-License-Identifier: Apache-2.0
"""The run directory and its record: the one source of cards, reports and plots.

recipe.yaml      as resolved, secrets masked
record.json      what was done; all that differs between two equal runs is under `clock`
metrics.jsonl    one line per logged step: {"stage", "step", ..., "clock": {...}}
samples.jsonl    completions of base, SFT and policy (or best of n) on the held-out prompts
adapters/ROLE/   a plain PEFT folder with its card as README.md and its check.json
plots/*.png
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import Recipe, dump_recipe, parse_recipe
from .errors import SetupError, UsageError

ALGORITHMS = {
    "ppo": "PPO", "grpo": "GRPO", "rloo": "RLOO", "dpo": "DPO", "best_of_n": "best of n",
}  # fmt: skip
"""What can stand third among the stages, and what people call it."""

_FREE = ("card", "hub", "report_to", "threads", "reward.gate")
"""Recipe keys that may differ when a run is continued: none of them changes what is trained."""

_POLICY = "ppo.updates", "ppo.kl_coef", "ppo.reward", "ppo.missing_eos_penalty", "ppo.watch"
"""Keys of `ppo` that GRPO and RLOO read too, beside `ppo.args`: one recipe, equal budgets."""

_SAMPLING = ("ppo.args.max_completion_length", "evaluate.batch_size")
"""Keys that the reward stage reads too, when the SFT model's completions are ranked."""

_PACKAGES = ("lora-rlhf", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate",
             "datasets", "huggingface_hub")  # fmt: skip


class Record:
    """`record.json` of one run, kept on disk after every change.

    Layout: `{schema, name, seed, algorithm, recipe_sha256, versions, model: {...}, lora: {...},
    data: {SET: {...}}, stages: {STAGE: {status, ...}},
    evaluation: {MODEL: {METRIC: {value, low, high, n}}}, files: {PATH: sha256}, clock: {...}}`.
    """

    def __init__(self, folder: str | Path, data: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.data = data

    @classmethod
    def open(cls, folder: str | Path, recipe: Recipe) -> Record:
        """The record of a new run, or of an earlier run of the same recipe, to be continued.

        Raises:
            UsageError: The folder holds a run of another recipe, or files that are no run.
            SetupError: The folder cannot be written.
        """
        folder = Path(folder)
        text = dump_recipe(recipe)
        digest = identity(recipe)
        if (folder / "record.json").exists():
            record = cls.read(folder)
            record._accept(recipe)
            record.data |= {"recipe_sha256": digest, "algorithm": recipe.algorithm}
            for other in ALGORITHMS.keys() - {recipe.algorithm}:  # interrupted, then another chosen
                record.data["stages"].pop(other, None)
                record.restart_metrics(other)
            (folder / "recipe.yaml").write_text(text, encoding="utf-8")
            return record
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(
                f"{folder} exists and is not a run", remedy="give an --out that is empty or new"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        except OSError as error:
            raise SetupError(
                f"cannot write to {folder}: {error.strerror}", remedy="give another --out"
            ) from None
        record = cls(folder, {
            "schema": 1, "name": recipe.name, "seed": recipe.seed, "algorithm": recipe.algorithm,
            "recipe_sha256": digest, "versions": versions(), "model": {}, "lora": {}, "data": {},
            "stages": {}, "evaluation": {}, "files": {},
            "clock": {"started": _now(), "host": {"python": platform.python_version(),
                      "machine": platform.machine(), "system": platform.system(),
                      "cores": os.cpu_count()}, "stages": {}},
        })  # fmt: skip
        record.save()
        return record

    def _accept(self, recipe: Recipe) -> None:
        """Go on only with a recipe under which every finished stage would have been the same.

        Raises:
            UsageError: With a table of the keys that differ and are no longer free to change.
        """
        before = self.recipe()
        wrong = [
            f"  {key}: {was!r} -> {now!r} (read by {stage}, which is done)"
            for key, was, now in differences(before, recipe)
            if (stage := first_reader(key, before.algorithm)) and self.done(stage)
        ]
        if wrong:
            raise UsageError(
                f"{self.folder} holds a run of another recipe:\n" + "\n".join(wrong),
                expected="a change only of what stages to come read, or of " + ", ".join(_FREE),
                remedy="give another --out",
            )

    @classmethod
    def read(cls, folder: str | Path) -> Record:
        """The record of a finished or interrupted run.

        Raises:
            UsageError: The folder is no run, or its record cannot be read.
        """
        path = Path(folder) / "record.json"
        try:
            return cls(folder, json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UsageError(
                f"{folder} is not a run directory", expected="a folder that holds record.json",
                remedy="give the --out of a `lora-rlhf run`",
            ) from None  # fmt: skip
        except (ValueError, OSError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from None

    def recipe(self) -> Recipe:
        """The recipe of this run, as it was resolved."""
        path = self.folder / "recipe.yaml"
        return parse_recipe(path.read_text(encoding="utf-8"), str(path))

    @property
    def algorithm(self) -> str:
        """What makes, or made, this run's policy."""
        found = self.data.get("algorithm")
        return found or next((a for a in ALGORITHMS if a in self.data["stages"]), "ppo")

    def save(self) -> None:
        """Write `record.json` at once and whole, or not at all."""
        _write_atomically(
            self.folder / "record.json", json.dumps(finite(self.data), indent=1) + "\n"
        )

    def done(self, stage: str) -> bool:
        """Whether `stage` has been finished in this run."""
        return bool(self.data["stages"].get(stage, {}).get("status") == "done")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Run a stage: the yielded dict becomes `stages.NAME`; status and time are kept.

        An exception leaves the status `interrupted` with no result, so the stage runs again.
        """
        started, entry = time.perf_counter(), {}  # type: tuple[float, dict[str, Any]]
        self.data["stages"][name] = {"status": "interrupted"}
        self.save()
        yield entry
        self.data["stages"][name] = {"status": "done", **entry}
        self.data["clock"]["stages"][name] = {"seconds": round(time.perf_counter() - started, 3)}
        self.save()

    def restart_metrics(self, stage: str) -> None:
        """Forget what an interrupted try of `stage` logged: it starts from its beginning."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
                    if json.loads(line)["stage"] != stage]  # fmt: skip
            _write_atomically(path, "".join(kept))

    def log(
        self, stage: str, step: int, metrics: dict[str, Any], clock: dict[str, Any] | None = None
    ) -> None:
        """Append one line to `metrics.jsonl`; non-finite numbers are kept as text ("NaN")."""
        line = {"stage": stage, "step": step, **finite(metrics)}
        if clock:
            line["clock"] = finite(clock)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The logged lines, of one stage or of all."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if stage is None or line["stage"] == stage]

    def adapter(self, role: str) -> Path:
        """The folder of a role's adapter: sft, reward, policy or value."""
        return self.folder / "adapters" / role

    def finish(self) -> None:
        """Note that all stages are done; cards are drawn after this, from the final clock."""
        self.data["clock"]["finished"] = _now()
        self.save()

    def seal(self) -> None:
        """Note the sha256 of every file of the run that is not the record itself or a log."""
        skipped = {"record.json", "metrics.jsonl"}
        files = sorted(p for p in self.folder.rglob("*") if p.is_file() and p.name not in skipped)
        self.data["files"] = {
            str(p.relative_to(self.folder)): sha256(p) for p in files
            if "checkpoints" not in p.relative_to(self.folder).parts and not p.name.endswith(".png")
        }  # fmt: skip
        self.save()


def stage_names(algorithm: str) -> tuple[str, ...]:
    """The stages of a run in their order; the third carries the algorithm's name."""
    return ("sft", "reward", algorithm, "evaluate", "card")


def identity(recipe: Recipe, without: tuple[str, ...] = ()) -> str:
    """sha256 of what decides a run's result: the recipe without the keys that may change."""
    flat = _flat(recipe.model_dump(mode="json"))
    kept = (k for k in flat if k not in without and first_reader(k, recipe.algorithm))
    data = {k: flat[k] for k in kept}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def differences(before: Recipe, now: Recipe) -> list[tuple[str, Any, Any]]:
    """(dotted key, value before, value now) of every key in which two recipes differ."""
    a, b = (_flat(recipe.model_dump(mode="json")) for recipe in (before, now))
    keys = sorted(a.keys() | b.keys())
    return [(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]


def first_reader(key: str, algorithm: str) -> str | None:
    """The first stage of a run by `algorithm` whose result depends on a recipe key, or None."""
    if any(key == free or key.startswith(free + ".") for free in _FREE):
        return None
    section = key.split(".")[0]
    if key in _SAMPLING:
        return "reward"
    if section == "algorithm":
        return algorithm
    if key == "data.text" or key.startswith("data.text."):
        return "ppo" if algorithm == "ppo" else None
    if section == "ppo" and algorithm in ("grpo", "rloo"):
        return algorithm if key in _POLICY or key.startswith("ppo.args") else None
    if section == "ppo" and algorithm == "dpo":
        return algorithm if key.startswith("ppo.args") else None
    if section in ALGORITHMS:
        return section if section == algorithm else None
    return section if section in ("reward", "evaluate") else "sft"


def _flat(data: Any, at: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict with dotted keys; what is empty stays a value."""
    if not data or not isinstance(data, dict | list):
        return {at: data}
    items = data.items() if isinstance(data, dict) else enumerate(data)
    return {
        k: v for key, x in items for k, v in _flat(x, f"{at}.{key}" if at else str(key)).items()
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide what a run computes."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(value: Any) -> Any:
    """The same data with NaN and infinities as text, since JSON has no word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
