# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: complete or absent, verified, reported when skipped; one process per run."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import killed
import pytest
import torch
from damage import edit, flip_bit
from recording import RecordingProgress
from safetensors.torch import load_file

from lora_rlhf import pipeline
from lora_rlhf.errors import BusyError, CheckpointError
from lora_rlhf.runs import checkpoint, run_lock, tensor_tree
from lora_rlhf.runs.checkpoint import PARTS, TRAINER_STATE
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.record import Record
from lora_rlhf.training import checkpoint_callback


@tensor_tree.checkpointable_tuple
class Pair(NamedTuple):
    left: torch.Tensor
    right: int


def put(parent: Path, step: int, **notes) -> Path:
    """Write a small complete checkpoint."""
    parts = {name: {"x": torch.full((3,), float(step))} for name in PARTS}
    return checkpoint.write(parent, step, parts, {TRAINER_STATE: "{}"}, {"seed": 0}, notes)


# --- the format ----------------------------------------------------------------------------------


def test_round_trip_is_bit_exact():
    rows = torch.arange(12.0).view(4, 3)
    data = {
        "a": rows[1:3],
        "b": [rows[0], None, True, 3, 0.1, float("nan"), "text"],
        "c": {1: {"exp_avg": torch.tensor([1e-45, -0.0, float("inf")])}, "$tensor": 2},
        "d": (1, (2, Pair(torch.tensor([1, 2], dtype=torch.uint8), 5))),
        "e": torch.tensor(7),
        "f": torch.tensor([1.5], dtype=torch.bfloat16),
    }
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(tensor_tree.pack(data, tensors))
    back = tensor_tree.unpack(json.loads(text), tensors)

    def same(x, y):
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and x.shape == y.shape
            assert (
                x.contiguous()
                .view(torch.uint8 if x.ndim else x.dtype)
                .equal(y.view(torch.uint8 if y.ndim else y.dtype))
            )
        elif isinstance(x, dict):
            assert list(x) == list(y)
            for key in x:
                same(x[key], y[key])
        elif isinstance(x, list | tuple):
            assert type(x) is type(y) and len(x) == len(y)
            for one, other in zip(x, y, strict=True):
                same(one, other)
        else:
            assert x == y or (x != x and y != y)
            assert type(x) is type(y)

    same(data, back)
    with pytest.raises(TypeError, match="cannot hold set"):
        tensor_tree.pack({"a": {1}}, {})


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path):
    folder = put(tmp_path, 1)
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    for path in folder.glob("*.safetensors"):
        load_file(path)


def test_newest_complete_checkpoint_is_used_and_old_ones_are_pruned(tmp_path: Path):
    for step in (9, 10, 100):
        put(tmp_path, step)
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    newest, skipped = checkpoint.newest(tmp_path)
    assert newest is not None and newest.step == 100 and skipped == {}
    assert newest.part("roles")["x"].tolist() == [100, 100, 100]
    assert checkpoint.newest(tmp_path / "nowhere") == (None, {})


# --- damaged checkpoints -------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def unlink(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("name", [f"{p}.{s}" for p in PARTS for s in ("json", "safetensors")])
@pytest.mark.parametrize(
    ("harm", "why"),
    [(flip_bit, "has another sha256"), (truncate, "bytes, not"), (unlink, "it lacks")],
)
def test_every_damaged_file_is_named_and_never_loaded(tmp_path: Path, name: str, harm, why: str):
    put(tmp_path, 1)
    harm(put(tmp_path, 2) / name)
    newest, skipped = checkpoint.newest(tmp_path)
    assert newest is not None and newest.step == 1
    [(folder, fault)] = skipped.items()
    assert folder == "step-00000002" and name in fault and why in fault
    harm(tmp_path / "step-00000001" / name)
    with pytest.raises(CheckpointError, match=f"no checkpoint is complete.*{name}") as caught:
        checkpoint.newest(tmp_path)
    assert "--warm-start" in caught.value.remedy and caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "is missing"), ("{", "cannot be read"), ("[]", "cannot be read"),
     ('{"schema": 9, "step": 1, "run": {}, "notes": {}, "files": {}}', "schema 9"),
     ('{"schema": 2, "step": 1, "run": {}, "notes": {}, "files": {}}', "it was changed")],
)  # fmt: skip
def test_incomplete_manifest_is_refused(tmp_path: Path, content: str | None, why: str):
    path = put(tmp_path, 1) / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    assert why in str(checkpoint.verify(path.parent))


def test_a_manifest_that_leads_outside_is_refused(tmp_path: Path):
    folder = put(tmp_path / "run", 1)
    (tmp_path / "secret").write_text("x")
    entry = {"bytes": 1, "sha256": sha256(tmp_path / "secret")}
    edit(folder / "manifest.json", lambda data: data["files"].update({"../../secret": entry}))
    assert checkpoint.verify(folder) == "it lacks ../../secret"


# --- in a run ------------------------------------------------------------------------------------


@pytest.fixture
def half(runs: killed.Runs) -> Path:
    """A run that was killed in the middle of a rollout of PPO."""
    return runs.half()


def again(half: Path, out: Path, *sets: str, harm=None) -> RecordingProgress:
    """Resume a copy of the killed run, up to the first step of PPO."""
    shutil.copytree(half, out)
    if harm is not None:
        harm(out / "checkpoints" / "ppo")
    progress = RecordingProgress()
    pipeline.run(killed.recipe(half.parent, *sets), out, until="ppo", progress=progress)
    return progress


@pytest.fixture(scope="module")
def gone_on(runs: killed.Runs, tmp_path_factory) -> SimpleNamespace:
    """The resumed run, and the steps of its second process."""
    out, steps, real = (
        tmp_path_factory.mktemp("on") / "run",
        [],
        checkpoint_callback.CheckpointCallback.on_step_end,
    )

    def look(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        real(self, args, state, control, **kwargs)

    checkpoint_callback.CheckpointCallback.on_step_end = look
    try:
        progress = again(runs.half(), out)
    finally:
        checkpoint_callback.CheckpointCallback.on_step_end = real
    return SimpleNamespace(folder=out, steps=steps, lines=progress.lines)


def test_finished_updates_are_not_done_again(half: Path, gone_on):
    """12 steps in all, 6 of them before the kill, which left a rollout in flight."""
    folder = half / "checkpoints/ppo/step-00000006"
    held = json.loads((folder / "trainer.json").read_text())
    assert held["kept"]["_buffered_inputs"] and held["kept"]["_rollout"]
    assert gone_on.steps == list(range(7, 13))
    assert "ppo: continuing from step-00000006" in gone_on.lines
    record = Record.read(gone_on.folder)
    assert [line["step"] for line in record.metrics("ppo")] == [1, 2, 3]
    assert record.data["clock"]["resumed"] == [{"training": "ppo", "from": "step-00000006"}]
    before = json.loads((folder / "manifest.json").read_text())["notes"]["seconds"]
    spent = record.data["clock"]["stages"]["ppo"]["seconds"]
    assert spent > before, "the time of both processes counts"


def test_an_older_one_is_used_where_the_newest_is_broken(half: Path, gone_on, tmp_path: Path):
    progress = again(
        half, tmp_path / "a", harm=lambda p: flip_bit(p / "step-00000006" / "optimizer.safetensors")
    )
    unused = [line for line in progress.lines if "is not used" in line]
    assert unused == [
        "ppo: checkpoint step-00000006 is not used: optimizer.safetensors has another "
        "sha256 than its manifest says"
    ]
    assert "ppo: continuing from step-00000005" in progress.lines
    assert killed.bits(tmp_path / "a") == killed.bits(gone_on.folder)


def test_an_undamaged_run_with_stray_files_goes_on_to_the_same_bits(half: Path, gone_on, tmp_path):
    """Notes among the adapters, two checkpoints swapped, NULs after the log."""

    def disturb(folder: Path) -> None:
        newest, older = folder / "step-00000006", folder / "step-00000005"
        newest.rename(folder / "x")
        older.rename(newest)
        (folder / "x").rename(older)
        run = folder.parents[1]
        for name in ("notes.txt", "adapters/sft/notes.txt", "adapters/other.txt"):
            (run / name).write_text("mine")
        with (run / "metrics.jsonl").open("ab") as log:
            log.write(bytes(99))

    again(half, tmp_path / "a", harm=disturb)
    assert killed.bits(tmp_path / "a") == killed.bits(gone_on.folder)


def test_another_number_of_threads_is_said(half: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pipeline.torch, "get_num_threads", lambda: 2)
    lines = again(half, tmp_path / "a").lines
    assert any(line.startswith("2 threads instead of 1") for line in lines)
    assert Record.read(tmp_path / "a").data["clock"]["threads"] == 2


def reseal(folder: Path) -> None:
    """Update the hashes of an edited checkpoint."""
    sums = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in folder.iterdir()}
    del sums["manifest.json"]
    edit(folder / "manifest.json", lambda data: data.update(files=sums))


def _without_value_head(folder: Path) -> None:
    skeleton = json.loads((folder / "roles.json").read_text())
    gone = [name for name in skeleton["value"] if "lora_" not in name]
    assert gone
    for name in gone:
        del skeleton["value"][name]
    (folder / "roles.json").write_text(json.dumps(skeleton))


def _without_statistics(folder: Path) -> None:
    data = json.loads((folder / "trainer.json").read_text())
    del data["kept"]["_moments"]
    (folder / "trainer.json").write_text(json.dumps(data))


def _without_optimizer(folder: Path) -> None:
    data = json.loads((folder / "optimizer.json").read_text())
    del data["optimizer"]["state"]
    (folder / "optimizer.json").write_text(json.dumps(data))


def _without_random(folder: Path) -> None:
    (folder / "random.safetensors").unlink()


@pytest.mark.parametrize(
    ("harm", "why"),
    [(_without_value_head, "lacks base_model.model.score.weight of value"),
     (_without_statistics, "lacks the trainer's _moments"),
     (_without_optimizer, "its optimizer"), (_without_random, "random cannot be read")],
)  # fmt: skip
def test_exact_resume_is_refused_without_all_its_parts(half, tmp_path: Path, harm, why: str):
    def both(parent: Path) -> None:
        for folder in parent.glob("step-*"):
            harm(folder)
            reseal(folder)

    with pytest.raises(CheckpointError, match=why) as caught:
        again(half, tmp_path / "run", harm=both)
    assert "--warm-start" in caught.value.remedy
    assert not (tmp_path / "run" / "adapters" / "policy").exists()


def test_resume_is_refused_if_the_log_lost_lines(half: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(half, out)
    *lines, last = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert '"stage": "ppo"' in last
    (out / "metrics.jsonl").write_text("".join(lines))
    with pytest.raises(CheckpointError, match=r"metrics.jsonl has other lines"):
        pipeline.run(killed.recipe(half.parent), out, until="ppo")


# --- killed during a write -----------------------------------------------------------------------


def die_in_write(parent: Path, at: int, share: float) -> None:
    """Write checkpoint 2; the n-th file is written in part, then the process is killed."""
    real, count = checkpoint.write_synced, [0]

    def write(path: Path, content: bytes) -> None:
        count[0] += 1
        if count[0] == at:
            path.write_bytes(content[: int(share * len(content))])
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, content)

    checkpoint.write_synced = write
    if at > 10:  # after the last file: before the rename
        checkpoint.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
    put(parent, 2)


@pytest.mark.parametrize("at", range(1, 12))
@pytest.mark.parametrize("share", [0.0, 0.7])
def test_killed_at_22_offsets_of_a_write(tmp_path: Path, at: int, share: float):
    """A write is 4 parts of 2 files, 2 more files, and the rename."""
    put(tmp_path, 1)
    assert killed.wait(killed.start(die_in_write, tmp_path, at, share)) == -signal.SIGKILL
    newest, skipped = checkpoint.newest(tmp_path)
    assert newest is not None and newest.step == 1
    assert skipped == {"step-00000002.tmp": "it was not finished"}
    put(tmp_path, 2)
    assert checkpoint.newest(tmp_path)[0].step == 2


# --- one process per run -------------------------------------------------------------------------


def hold(folder: Path, tells: int) -> None:
    with run_lock.locked(folder):
        os.write(tells, b".")
        signal.pause()


def test_two_runs_in_one_directory(tmp_path: Path, half: Path):
    hears, tells = os.pipe()
    child = killed.start(hold, tmp_path / "run", tells)
    os.read(hears, 1)
    with pytest.raises(BusyError, match="another process works in") as caught:
        pipeline.run(killed.recipe(half.parent), tmp_path / "run")
    assert caught.value.exit_code == 4 and not list((tmp_path / "run").iterdir())
    os.kill(child, signal.SIGKILL)  # a killed process leaves no lock behind
    assert killed.wait(child) == -signal.SIGKILL
    with run_lock.locked(tmp_path / "run"):
        pass
