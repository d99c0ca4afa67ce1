# SPDX-License-Identifier: Apache-2.0
"""A sweep: the runs of one recipe at several settings and seeds, and their comparison.

DIR/sweep.json, sweep.md    the plan and the results
DIR/SETTING/seed-N/         an ordinary run, with the output of its last command in seed-N.log
DIR/shared/                 SFT and reward models that several runs start from

Every run is a child process of the ordinary command, so a run that fails or is killed takes no
other with it, and the same sweep goes on with what is not finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_rlhf import preflight
from lora_rlhf.distributed import launch
from lora_rlhf.errors import LoraRlhfError, RecipeError, UsageError, counted
from lora_rlhf.recipe.loader import load_recipe
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import identity, keys_read, stage_names
from lora_rlhf.recipe.strict_yaml import list_items
from lora_rlhf.reports import compare, sweep_report
from lora_rlhf.runs.disk import write_atomically
from lora_rlhf.runs.progress import clock
from lora_rlhf.runs.record import Record, finite
from lora_rlhf.runs.run_lock import locked
from lora_rlhf.runtime import process_pool, quiet

PLAN = "sweep.json"
_NO_PUSH = "hub={}"
"""Runs of one recipe would push over one another."""


@dataclass(frozen=True, eq=False)
class Job:
    """One command: a run to its end, or the shared first stages of several runs."""

    folder: Path
    recipe: Recipe
    sets: tuple[str, ...]
    until: str = "card"
    start: Job | None = None
    setting: str = ""

    @property
    def log(self) -> Path:
        """The output of its last command."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def done(self) -> bool:
        """Return whether its run is finished, with the recipe that is asked for."""
        with contextlib.suppress(LoraRlhfError):
            record = Record.read(self.folder)
            wanted, known = (keys_read(one, self.until) for one in (self.recipe, record.recipe()))
            return record.done(self.until) and wanted == known
        return False

    def command(self, recipe: Path) -> list[str]:
        """Return the command of a shell that does it."""
        verb = "run" if self.until == "card" else self.until
        made = [sys.executable, "-m", "lora_rlhf", verb, str(recipe), "--out", str(self.folder)]
        for text in self.sets:
            made += ["--set", text]
        return made + (["--from", str(self.start.folder)] if self.start else [])


@quiet.libraries()
def sweep(
    recipe: str | Path,
    grid: Sequence[str],
    out: str | Path,
    *,
    seeds: int = 5,
    processes: int = 1,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run a recipe at every point of a grid with several seeds, and compare the settings.

    The same call goes on where an earlier one stopped; finished runs are kept. SFT and the reward
    model are trained once for all runs that read the same values for them.

    Args:
        recipe: A YAML file, or its folder.
        grid: `key=value,value,...` each; the points are all combinations.
        out: Folder of the sweep.
        seeds: Number of seeds, from that of the recipe on.
        processes: Runs at a time.
        overrides: `key=value` changes for all runs.
        say: Called with each line of progress.

    Returns:
        The contents of sweep.json: `settings`, `runs` (each with `state` and, if it failed,
        `error` and `exit_code`), `reference`, and the `comparison` of `lora_rlhf.compare`, or None.

    Raises:
        UsageError: The grid is empty, a point is given twice, a key or value is wrong, or `out`
            holds something else.
    """
    launch.refuse("a sweep")
    path, folder = Path(recipe), Path(out)
    if seeds < 1 or processes < 1:
        raise UsageError(f"{seeds} seeds in {processes} processes", expected="1 or more of both")
    points = _points(path, _settings(grid), seeds, overrides, processes)
    settings = {one.setting: identity(one.recipe, compare.ONE_ROW) for one in points}
    plan = {"grid": list(grid), "seeds": seeds, "settings": settings}
    points = list(_with_shared(points, folder))
    _check_folder(folder, settings)
    with locked(folder):
        _write(folder, plan)
        results = _run_all(points, path, folder, processes, say)
        own = _reference(path, settings, overrides)
        report = plan | _report(points, results, own)
        _write(folder, report)
        write_atomically(folder / "sweep.md", sweep_report.markdown(report))
    return report


def _settings(grid: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the `key=value` of every point of a grid."""
    axes: dict[str, list[str]] = {}
    for text in grid:
        key, sign, values = text.partition("=")
        items = list_items(values, f"--grid {key}") if sign and key else []
        if not items:
            raise UsageError(
                f"--grid {text!r} is empty" if sign else f"--grid {text!r} has no values",
                expected="KEY=VALUE,VALUE, such as ppo.kl_coef=0.02,0.05,0.1",
            )
        if key in axes or key in ("seed", "name"):
            why = "is given twice" if key in axes else "is not for a grid"
            raise UsageError(f"--grid {key} {why}", remedy="seeds are counted by --seeds")
        axes[key] = items
    if not axes:
        raise UsageError("the grid is empty", expected="--grid KEY=VALUE,VALUE")
    return [
        tuple(f"{key}={value}" for key, value in zip(axes, values, strict=True))
        for values in itertools.product(*axes.values())
    ]


def _points(
    path: Path,
    settings: list[tuple[str, ...]],
    seeds: int,
    overrides: Sequence[str],
    processes: int = 1,
) -> list[Job]:
    """Return the run of every setting and seed, without folders yet; all recipes are checked."""
    points, known = list[Job](), dict[str, str]()
    for setting in settings:
        name = ",".join(setting)
        sets = (*overrides, _NO_PUSH, *setting)
        first = load_recipe(path, list(sets))
        if first.ppo.rollout_server and processes > 1:
            raise RecipeError(
                "ppo.rollout_server: it holds the adapter of one run at a time",
                remedy="--processes 1, or --set ppo.rollout_server=null",
            )
        preflight.check_launch(first, stages := stage_names(first.algorithm))
        preflight.trainer_configs(first, Path(), stages)
        if first.checkpoint.hub:
            raise RecipeError(
                f"checkpoint.hub: all runs of a sweep would back up to {first.checkpoint.hub}",
                remedy="--set checkpoint.hub=null",
            )
        if (twin := known.setdefault(identity(first, compare.ONE_ROW), name)) != name:
            raise UsageError(
                f"{twin} and {name} are the same point of the grid",
                expected="values that change what is trained or evaluated",
                remedy="leave one of them out",
            )
        for seed in range(first.seed, first.seed + seeds):
            own = (*sets, f"seed={seed}")
            points.append(Job(Path(), load_recipe(path, list(own)), own, setting=name))
    return points


def _with_shared(points: list[Job], out: Path) -> Iterator[Job]:
    """Give every run its folder, and the run whose SFT and reward model it may copy."""
    keys: list[dict[str, str]] = [
        {stage: _digest(keys_read(one.recipe, stage)) for stage in ("sft", "reward")}
        for one in points
    ]
    names = _folder_names(list(dict.fromkeys(one.setting for one in points)))
    shared: dict[str, Job] = {}
    for one, key in zip(points, keys, strict=True):
        start: Job | None = None
        seed = f"seed-{one.recipe.seed}"
        rewards = {other["reward"] for other in keys if other["sft"] == key["sft"]}
        users = {
            "sft": len(rewards) if len(rewards) > 1 else 0,
            "reward": sum(other["reward"] == key["reward"] for other in keys),
        }
        for stage, count in users.items():
            if count > 1:
                folder = out / "shared" / f"{seed}-{stage}-{key[stage][:6]}"
                start = shared.setdefault(
                    key[stage], Job(folder, one.recipe, one.sets, stage, start)
                )
        folder = out / names[one.setting] / seed
        yield Job(folder, one.recipe, one.sets, start=start, setting=one.setting)


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _folder_names(settings: list[str]) -> dict[str, str]:
    """Name a folder after each setting; settings that would share a name get a number."""
    names: dict[str, str] = {}
    for setting in settings:
        name = plain = re.sub(r"[^\w.,=+-]", "_", setting)[:100]
        for number in itertools.count(2):
            if name not in names.values() and name != "shared":
                break
            name = f"{plain}-{number}"
        names[setting] = name
    return names


def _check_folder(folder: Path, settings: Mapping[str, str]) -> None:
    """Refuse a folder with other files, or with a sweep of another recipe or grid."""
    path = folder / PLAN
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["settings"]
        same = [settings[name] == digest for name, digest in known.items() if name in settings]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"{folder} exists and is not a sweep", remedy="give an empty or new --out"
        ) from None
    if not same or not all(same):
        raise UsageError(
            f"{folder} holds another sweep: {', '.join(known)}",
            expected="the same recipe and keys; values and seeds may be added",
            remedy="give another --out",
        )


def _write(folder: Path, data: Mapping[str, Any]) -> None:
    write_atomically(folder / PLAN, json.dumps(finite(data), indent=1) + "\n")


def _run_all(
    points: list[Job], recipe: Path, out: Path, processes: int, say: Callable[[str], None]
) -> dict[Path, dict[str, Any]]:
    """Run what is not finished; return the result of every job, by its folder."""
    jobs = list(dict.fromkeys(one for point in points for one in (*_starts(point), point)))
    results = {one.folder: {"state": "done"} for one in jobs if one.done()}
    waiting = [one for one in jobs if one.folder not in results]
    if results:
        say(f"finished already: {len(results)} of {counted(len(jobs), 'run')}")
    if not waiting:
        return results
    pool, running = process_pool.start(processes, out), dict[Future[int], tuple[Job, float]]()
    try:
        while waiting or running:
            for one in list(waiting):
                before = results.get(one.start.folder) if one.start else {"state": "done"}
                if before is None or len(running) == processes:
                    continue
                waiting.remove(one)
                if before["state"] != "done":
                    results[one.folder] = before
                    continue
                one.folder.parent.mkdir(parents=True, exist_ok=True)
                running[pool.submit(one.command(recipe), one.log)] = one, time.monotonic()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                one, begun = running.pop(future)
                results[one.folder] = result = _result(one, future)
                where = one.folder.relative_to(out)
                what = f"{result['state']} after {clock(time.monotonic() - begun)}"
                say(f"{len(results)}/{len(jobs)} {where}: {what}")
                if "error" in result:
                    say(result["error"])
    finally:
        pool.stop()
    return results


def _starts(job: Job) -> list[Job]:
    """Return the shared runs that a job needs, the first one first."""
    return [*_starts(job.start), job.start] if job.start else []


def _result(job: Job, future: Future[int]) -> dict[str, Any]:
    """Describe how a command ended."""
    try:
        code = future.result()
    except Exception as error:  # of Ray: its worker died
        return {"state": "failed", "exit_code": 1, "error": f"{type(error).__name__}: {error}"}
    if code == 0 and job.done():
        return {"state": "done"}
    where = shlex.quote(str(job.log))
    if code < 0:
        name = signal.Signals(-code).name
        text = f"it was ended by {name}" + ("; out of memory?" if name == "SIGKILL" else "")
    elif code == 0:
        text = "it stopped before its end: the time budget is used up, or the recipe has changed"
    else:
        lines = job.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        first = max((i for i, line in enumerate(lines) if line[:1].strip()), default=0)
        text = "\n".join(lines[first:]) or f"exit code {code}"
    code = 128 - code if code < 0 else code or 1
    return {"state": "failed", "exit_code": code, "error": f"{text}\n  its output: {where}"}


def _reference(path: Path, settings: Mapping[str, str], overrides: Sequence[str]) -> str:
    """Return the setting that is the recipe as it stands, else the first one."""
    first = next(iter(settings))
    with contextlib.suppress(RecipeError):
        own = identity(load_recipe(path, [*overrides, _NO_PUSH]), compare.ONE_ROW)
        return next((name for name, digest in settings.items() if digest == own), first)
    return first


def _report(
    points: list[Job], results: Mapping[Path, dict[str, Any]], reference: str
) -> dict[str, Any]:
    """Put the results together; the settings are compared over the runs that are finished."""
    ordered = sorted(points, key=lambda one: one.setting != reference)
    done = [one for one in ordered if results[one.folder]["state"] == "done"]
    comparison = None
    if done:
        comparison = compare.run([one.folder for one in done], [one.setting for one in done])
    runs = [
        {"setting": one.setting, "seed": one.recipe.seed, **results[one.folder]} for one in points
    ]
    return {"reference": reference, "runs": runs, "comparison": comparison}
