# SPDX-License-Identifier: Apache-2.0
"""Little runs in child processes, killed for real and continued.

A child is a fork: everything is imported already, and `kill -9` is the kernel's own. `Runs` holds
finished runs for all test files; a test copies the one that it continues.
"""

import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import broken_runs
import torch
from filelock import FileLock
from small import base_folder

from lora_rlhf import pipeline
from lora_rlhf.recipe.loader import parse_recipe
from lora_rlhf.runs.record import Record
from lora_rlhf.training import checkpoint_callback

SETS = [
    "checkpoint.every_steps=1", "checkpoint.every_minutes=null", "threads=1",
    "sft.args={per_device_train_batch_size: 4, num_train_epochs: 2, learning_rate: 2e-2, "
    "gradient_accumulation_steps: 2}",
    "reward.held_out_model=true",
    "reward.args={per_device_train_batch_size: 8, learning_rate: 1e-2}",
    "ppo.updates=3", "ppo.args.per_device_train_batch_size=4", "ppo.args.steps_per_generation=2",
    "ppo.args.num_iterations=2", "dpo.args={per_device_train_batch_size: 8, num_train_epochs: 2}",
    # Everything that PPO carries from update to update.
    "ppo.normalize_reward=true", "ppo.ema=0.9", "ppo.kl_target=1.0", "ppo.ptx_coef=0.5",
    "data.text=[{path: text.jsonl}]", "evaluate.n=12",
]  # fmt: skip
"""Small, and with the parts that a resume can lose: half epochs, half rollouts, moments, text."""

_BOTH = ("sft", "reward")
STAGES = {
    "sft": (), "reward": ("sft",), "ppo": _BOTH, "grpo": _BOTH, "rloo": _BOTH, "dpo": _BOTH,
    "evaluate": (*_BOTH, "ppo"),
}  # fmt: skip
"""Stage -> those that are finished when it begins."""


def write(folder: Path, n: int = 40) -> None:
    """The data of all little runs."""
    broken_runs.write(folder, None, n)
    rng = random.Random(1)
    rows = [{"text": broken_runs.completion(rng, "w50", 8)} for _ in range(12)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(folder: Path, *sets: str):
    base = folder / "base" if (folder / "base").is_dir() else base_folder("llama")
    text = broken_runs.RECIPE.format(base=base)
    return parse_recipe(text, "recipe.yaml", [*SETS, *sets], folder)


def start(run, *args, **kwargs) -> int:
    """Call a function in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(null, stream)
        # After a fork torch makes its pool of threads anew. If the threads that load a base do it
        # at the same moment, one of them fails: "Invalid thread pool".
        torch.set_num_threads(torch.get_num_threads())
        code = run(*args, **kwargs) or 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        Path(os.environ.get("KILLED_LOG", "/dev/null")).write_text(traceback.format_exc())
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The exit code; minus the signal where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def go(recipe, out: Path, until: str) -> None:
    pipeline.run(recipe, out, until=until)


def finish(recipe, out: Path, until: str) -> float:
    """Run to the end in a child; seconds it took."""
    started, log = time.monotonic(), out.with_suffix(".error")
    os.environ["KILLED_LOG"] = str(log)
    code = wait(start(go, recipe, out, until))
    assert code == 0, log.read_text()
    return time.monotonic() - started


def kill(recipe, out: Path, until: str, after: float) -> bool:
    """Run in a child and kill it after so many seconds; False where it was done before."""
    child = start(go, recipe, out, until)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return wait(child) == -signal.SIGKILL


def die_after_save(recipe, out: Path, name: str, step: int) -> None:
    """Run PPO, and kill this process when the stage `name` has saved its checkpoint of `step`."""
    real = checkpoint_callback.CheckpointCallback.save

    def save(self, trainer, notes=None):
        real(self, trainer, notes)
        if self.name == name and trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_callback.CheckpointCallback.save = save
    pipeline.run(recipe, out, until="ppo")


def bits(folder: Path) -> dict[str, object]:
    """All that two equal runs must share."""
    record = Record.read(folder)
    samples = folder / "samples.jsonl"
    return {
        "record": {k: v for k, v in record.data.items() if k not in ("clock", "files")},
        "metrics": [{k: v for k, v in line.items() if k != "clock"} for line in record.metrics()],
        "samples": samples.read_text() if samples.exists() else "",
        "weights": {
            p.parent.name: p.read_bytes()
            for p in sorted(folder.glob("adapters/*/adapter_model.safetensors"))
        },
        "checks": {p.parent.name: p.read_text() for p in folder.glob("adapters/*/check.json")},
    }


class Runs:
    """Undisturbed runs of one recipe up to each stage, made at the first use.

    They lie in one folder for both workers of `pytest -n 2`; a lock keeps them from making the same
    run twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                shutil.copytree(base_folder("llama"), folder / "base")
                write(folder)

    def recipe(self, stage: str = "ppo", *sets: str):
        """The recipe of the runs, with the algorithm that has this stage."""
        algorithm = stage if stage in ("grpo", "rloo", "dpo") else "ppo"
        return recipe(self.folder, f"algorithm={algorithm}", *sets)

    def after(self, stage: str) -> Path:
        """A run that has finished this stage; not to be changed."""

        def make(out: Path) -> None:
            self.copy(stage, out)
            seconds = finish(self.recipe(stage), out, stage)
            (self.folder / f"{stage}.seconds").write_text(str(seconds))

        return self._once(f"after-{stage}", make)

    def seconds(self, stage: str) -> float:
        """The time that this stage took."""
        self.after(stage)
        return float((self.folder / f"{stage}.seconds").read_text())

    def before(self, stage: str) -> Path | None:
        """A run in which just the stages before this one are finished; None for the first."""
        return self.after(STAGES[stage][-1]) if STAGES[stage] else None

    def copy(self, stage: str, out: Path) -> Path:
        """Start `out` as a copy of the run before this stage."""
        if (before := self.before(stage)) is not None:
            shutil.copytree(before, out)
        return out

    def half(self) -> Path:
        """A run that was killed in the middle of a rollout of PPO; not to be changed."""

        def make(out: Path) -> None:
            child = start(die_after_save, self.recipe(), self.copy("ppo", out), "ppo", 6)
            assert wait(child) == -signal.SIGKILL

        return self._once("half", make)

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        out = self.folder / name
        with FileLock(self.folder / f"{name}.lock"):
            if not out.exists():
                making = self.folder / f"{name}-making"
                shutil.rmtree(making, ignore_errors=True)
                make(making)
                making.rename(out)
        return out
