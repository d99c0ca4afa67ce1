# SPDX-License-Identifier: Apache-2.0
"""A full disk and a read-only folder: one line of error, and older checkpoints stay complete."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import killed
import pytest
import torch
import typer

from lora_rlhf import pipeline
from lora_rlhf.cli import shell
from lora_rlhf.errors import DiskError, SetupError, UsageError
from lora_rlhf.runs import checkpoint, disk
from lora_rlhf.runs.checkpoint import PARTS, TRAINER_STATE, newest
from lora_rlhf.training import checkpoint_callback


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def put(parent: Path, step: int, numbers: int) -> Path:
    parts = {name: {"x": torch.ones(numbers)} for name in PARTS}
    return checkpoint.write(parent, step, parts, {TRAINER_STATE: "{}"}, {}, {})


def test_full_disk_keeps_older_checkpoints(small_disk: Path):
    put(small_disk / "ppo", 1, 10_000)
    (small_disk / "other").write_bytes(b"x" * 300_000)
    with pytest.raises(DiskError, match="cannot write to .*ppo: .*MB free") as caught:
        put(small_disk / "ppo", 2, 20_000)
    assert caught.value.exit_code == 4
    assert [p.name for p in (small_disk / "ppo").iterdir()] == ["step-00000001"]
    assert newest(small_disk / "ppo")[0].step == 1
    (small_disk / "other").unlink()
    put(small_disk / "ppo", 2, 20_000)  # the state was in memory still
    assert newest(small_disk / "ppo")[0].step == 2


def test_disk_room_for_two_checkpoints_is_checked_first(small_disk: Path):
    checkpoint.check_room(small_disk, {"x": torch.ones(60_000)})
    with pytest.raises(DiskError, match="two checkpoints take 0.8 MB"):
        checkpoint.check_room(small_disk, {"x": torch.ones(100_000)})


def run(recipe, out: Path, stderr_file: Path) -> int:
    """Run the command line with its output in a file."""
    with stderr_file.open("w") as sys.stderr:
        try:
            with shell.errors_as_text(False):
                pipeline.run(recipe, out, until="ppo")
        except typer.Exit as error:
            return error.exit_code
    return 0


@pytest.mark.parametrize("looks", [pytest.param(True, marks=pytest.mark.slow), False])
def test_run_on_a_full_disk_ends_in_one_error_and_continues_with_room(
    runs: killed.Runs, tmp_path: Path, small_disk: Path, monkeypatch, looks: bool
):
    """The check before the run, or a failed write, ends it with one error."""
    if not looks:
        monkeypatch.setattr(checkpoint, "check_room", lambda *_: None)
    recipe, stderr_file = runs.recipe(), tmp_path / "stderr_file"
    assert killed.wait(killed.start(run, recipe, small_disk / "run", stderr_file)) == 4
    stderr = stderr_file.read_text()
    assert "\ncannot write to " in stderr and "MB free" in stderr
    assert "Traceback" not in stderr and "unexpected" not in stderr
    assert ("two checkpoints take" in stderr) == looks
    folder = small_disk / "run" / "checkpoints" / "sft"
    for path in folder.glob("step-*"):
        assert isinstance(checkpoint.verify(path), checkpoint.Checkpoint)
    moved = Path(shutil.copytree(small_disk / "run", tmp_path / "moved"))
    monkeypatch.undo()
    killed.finish(recipe, moved, "ppo")
    assert killed.bits(moved) == killed.bits(runs.after("ppo"))


def test_a_read_only_folder_is_one_error(runs: killed.Runs, tmp_path: Path, small_disk: Path):
    recipe, stderr_file = runs.recipe(), tmp_path / "stderr_file"
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        assert killed.wait(killed.start(run, recipe, small_disk / "run", stderr_file)) == 4
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert stderr_file.read_text().startswith("cannot write to ")
    assert "Read-only file system" in stderr_file.read_text()


def test_a_folder_that_becomes_read_only_while_it_trains(
    runs: killed.Runs, tmp_path: Path, small_disk: Path
):
    """The next write reports it, and existing files stay unchanged."""
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    recipe, stderr_file = runs.recipe(), tmp_path / "stderr_file"

    def closing(recipe, out, stderr_file) -> int:
        real = checkpoint_callback.CheckpointCallback.save

        def save(self, trainer, notes=None):
            real(self, trainer, notes)
            if trainer.state.global_step == 3:
                subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

        checkpoint_callback.CheckpointCallback.save = save
        return run(recipe, out, stderr_file)

    try:
        code = killed.wait(killed.start(closing, recipe, small_disk / "run", stderr_file))
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert code == 4 and "Read-only file system" in stderr_file.read_text()
    assert newest(small_disk / "run" / "checkpoints" / "sft")[0].step == 3


def test_the_place_of_a_file_is_made_or_refused(tmp_path: Path):
    disk.make_place(tmp_path / "a" / "b" / "new.txt")
    assert (tmp_path / "a" / "b").is_dir() and not (tmp_path / "a" / "b" / "new.txt").exists()
    (tmp_path / "file").write_text("")
    disk.make_place(tmp_path / "file")
    with pytest.raises(UsageError, match="a is a folder"):
        disk.make_place(tmp_path / "a")
    with pytest.raises(SetupError, match="cannot write to .*file: .*file is a file"):
        disk.make_place(tmp_path / "file" / "new.txt")
