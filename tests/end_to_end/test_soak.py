# SPDX-License-Identifier: Apache-2.0
"""500 updates of PPO: memory, open files, log and checkpoints stay where they were."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
from ppo_run import Run
from transformers import TrainerCallback

from lora_rlhf.algorithms import policy_stage

UPDATES, WARM = 500, 100


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Watch(TrainerCallback):
    """What the process holds at the end of every update."""

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints, self.rows = checkpoints, []

    def on_step_end(self, args, state, control, **_):
        gc.collect()
        folders = sorted(p.name for p in self.checkpoints.glob("*"))
        size = sum(p.stat().st_size for p in self.checkpoints.rglob("*") if p.is_file())
        self.rows.append((resident(), len(os.listdir("/proc/self/fd")), len(folders), size))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_500_updates_leave_the_machine_as_it_was(tmp_path):
    watch = Watch(tmp_path / "run" / "checkpoints" / "ppo")
    args = {"per_device_train_batch_size": 8, "learning_rate": 1e-4}
    run = Run(tmp_path / "run", args, updates=UPDATES, callbacks=[watch])
    run.recipe = run.recipe.model_copy(
        update={
            "checkpoint": run.recipe.checkpoint.model_copy(update={"every_steps": 5, "keep": 2})
        }
    )
    assert policy_stage.steps_per_update(run.trainer.args) == 1
    run.kept()
    memory, handles, folders, size = np.array(watch.rows, dtype=float).T
    assert len(memory) == UPDATES
    x = np.arange(UPDATES - WARM)
    slope, start = np.polyfit(x, memory[WARM:], 1)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    longest, shortest = max(map(len, lines)), min(map(len, lines))
    print(
        f"\nmemory {start / 1e6:.1f} MB after {WARM} updates, slope {slope:.0f} bytes an update, "
        f"last less first {(memory[-1] - memory[WARM]) / 1e6:.2f} MB; handles "
        f"{handles[WARM:].min():.0f} to {handles.max():.0f}; checkpoints {folders.max():.0f}, "
        f"{size[WARM:].min() / 1e3:.0f} to {size[WARM:].max() / 1e3:.0f} kB; log {len(lines)} "
        f"lines of {shortest} to {longest} bytes"
    )
    assert slope * UPDATES < 0.02 * memory[WARM], "memory grows by more than 2 % in 500 updates"
    assert handles[WARM:].max() <= handles[:WARM].max(), "files are left open"
    assert folders.max() <= 2, "checkpoint.keep"
    # Each holds what the watch reads of the log, so it grows as the log does, and by no more.
    grown, logged = (size.max() - size[WARM:].min()) / 2, sum(map(len, lines))
    assert grown <= 1.2 * logged, "checkpoints grow by more than the log"
    assert len(lines) == UPDATES and longest < 1.5 * shortest
