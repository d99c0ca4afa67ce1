# SPDX-License-Identifier: Apache-2.0
"""A run backed up on the Hub: another machine continues it, and no fault of the Hub affects it."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import killed
import pytest
import torch
from damage import flip_bit
from hub_server import turn_to
from huggingface_hub import constants
from recording import RecordingProgress
from small import base_folder

from lora_rlhf import pipeline
from lora_rlhf.errors import HubError
from lora_rlhf.hub import backup
from lora_rlhf.recipe.loader import parse_recipe
from lora_rlhf.runs import checkpoint
from lora_rlhf.runs.checkpoint import PARTS, TRAINER_STATE
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.record import Record
from lora_rlhf.training import checkpoint_callback

pytestmark = pytest.mark.hub

SETS = ("checkpoint.hub=acme/kept", "checkpoint.hub_minutes=0")
real_sleep = time.sleep
SHORT = "sft.args.num_train_epochs=1"


@pytest.fixture(autouse=True)
def here(server, monkeypatch, tmp_path):
    """Clients of this process turned to the local Hub."""
    turn_to(server, monkeypatch, tmp_path)


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def newest_files(server) -> dict[str, bytes]:
    """The files of the newest commit."""
    return server.repos["acme/kept"].files


# --- a whole short run ---------------------------------------------------------------------------


def wait_at(recipe, out: Path, stage: str, step: int) -> None:
    """Run as far as a step of a stage, and stay there until what it saved is on the Hub."""
    real = checkpoint_callback.CheckpointCallback.save

    def save(self, trainer, notes=None):
        real(self, trainer, notes)
        while self.name == stage and trainer.state.global_step == step:
            self.record.on_saved(False)
            time.sleep(0.05)

    checkpoint_callback.CheckpointCallback.save = save
    pipeline.run(recipe, out, until=stage)


@pytest.mark.parametrize(
    ("stage", "step"), [("sft", 3), pytest.param("ppo", 6, marks=pytest.mark.slow)]
)
def test_a_lost_machine_is_replaced_by_another(server, tmp_path, capfd, stage, step):
    """The first is killed; the other has recipe and data, in another folder, and no run."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        killed.write(folder)
    pipeline.run(killed.recipe(first, SHORT), first / "whole", until=stage)
    child = killed.start(wait_at, killed.recipe(first, SHORT, *SETS), first / "run", stage, step)
    newest = f"checkpoints/{stage}/step-{step:08d}/manifest.json"
    while "acme/kept" not in server.repos or newest not in newest_files(server):
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    assert killed.wait(child) == -signal.SIGKILL
    sent = newest_files(server)
    assert server.repos["acme/kept"].private and b"Checkpoints of" in sent["README.md"]
    for name, content in sent.items():
        assert str(tmp_path).encode() not in content, name
    shutil.rmtree(first / "run")
    progress = RecordingProgress()
    capfd.readouterr()
    pipeline.run(
        killed.recipe(second, SHORT, *SETS), second / "run", until=stage, progress=progress
    )
    assert "LFS" not in capfd.readouterr().err, "a bar across the line of the stage"
    assert [line for line in progress.lines if line.startswith("fetched from acme/kept: ")]
    assert f"{stage}: continuing from step-{step:08d}" in progress.lines
    here, whole = (killed.bits(folder) for folder in (second / "run", first / "whole"))
    paths = [bits["record"].pop("recipe_sha256") for bits in (here, whole)]
    assert here == whole and len({*paths}) == 2  # the recipe names another folder
    assert Record.read(second / "run").data["clock"]["backup"]["failed"] == 0
    done = newest_files(server)
    assert not [name for name in done if name.startswith("checkpoints/")], "the stage is done"
    assert f"adapters/{'policy' if stage == 'ppo' else stage}/adapter_model.safetensors" in done


def test_a_failing_hub_changes_nothing_and_is_reported_once(server, tmp_path, no_pauses):
    killed.write(tmp_path)
    pipeline.run(killed.recipe(tmp_path, SHORT), tmp_path / "whole", until="sft")
    server.fail_next("POST", "/commit/", 500, times=10_000)
    progress, recipe = RecordingProgress(), killed.recipe(tmp_path, SHORT, *SETS)
    pipeline.run(recipe, tmp_path / "run", until="sft", progress=progress)
    assert killed.bits(tmp_path / "run") == killed.bits(tmp_path / "whole")
    counts = Record.read(tmp_path / "run").data["clock"]["backup"]
    assert counts["sent"] == 0 and counts["failed"] > 1
    lines = [line for line in progress.lines if "its checkpoints are only local" in line]
    assert len(lines) == 1 and "HTTP 500" in lines[0] and "next checkpoint tries again" in lines[0]
    again = f"lora-rlhf run {tmp_path}/run/recipe.yaml --out {tmp_path}/run"
    assert again in progress.lines[-1]
    assert set(newest_files(server)) == {".gitattributes"}  # nothing, or all with its card
    server._faults.clear()
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    pipeline.run(parse_recipe(text, "recipe.yaml"), tmp_path / "run", until="sft")
    assert {"README.md", "adapters/sft/adapter_model.safetensors"} <= set(newest_files(server))


# --- a run that has no training ------------------------------------------------------------------


def recipe_in(data: Path, *sets: str):
    data.mkdir(exist_ok=True)
    if not (data / "prompts.jsonl").exists():
        killed.write(data, 4)
    return killed.recipe(data, *SETS, *sets)


def short_run(folder: Path, recipe) -> Record:
    """As if SFT were done, and the reward model at step 3."""
    record = Record.open(folder, recipe)
    with record.stage("sft"):
        adapter = record.adapter("sft")
        adapter.mkdir(parents=True)
        base = {"base_model_name_or_path": recipe.model.id}
        (adapter / "adapter_config.json").write_text(json.dumps(base))
        (adapter / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    record.log("sft", 1, {"loss": 1.0})
    save_checkpoint(record, 3)
    return record


def save_checkpoint(record: Record, number: int) -> None:
    parts = {name: {"x": torch.full((3,), float(number))} for name in PARTS}
    run = {"data.prompts.0.path": str(record.recipe().data.prompts[0].path)}
    checkpoint.write(
        record.checkpoints("reward"), number, parts, {TRAINER_STATE: "{}"}, run, {"lines": 0}
    )


def send(recipe, record: Record, progress: RecordingProgress | None = None) -> RecordingProgress:
    progress = progress or RecordingProgress()
    remote = backup.prepare(recipe, record.folder, progress)
    with backup.uploading(remote, recipe, record, progress):
        record.on_saved(False)
    return progress


def fetch(recipe, out: Path) -> Record:
    out.mkdir(exist_ok=True)
    assert backup.prepare(recipe, out, RecordingProgress()) is not None
    return Record.open(out, recipe)


def tree(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): sha256(p) for p in files}


def test_a_fetch_returns_the_uploaded_bits_and_nothing_else_is_uploaded(server, tmp_path):
    recipe = recipe_in(tmp_path / "data")
    record = short_run(tmp_path / "run", recipe)
    before = tree(record.folder)
    (record.folder / ".env").write_text("x")
    (record.folder / "adapters" / "sft" / "optimizer.pt").write_bytes(b"x")
    save_checkpoint(record, 4)  # only the newest goes
    shutil.copytree(record.checkpoints("reward") / "step-00000004", tmp_path / "step")
    os.symlink("/etc/hostname", record.folder / "samples.jsonl")
    (record.checkpoints("reward") / "step-00000005.tmp").mkdir()
    send(recipe, record)
    assert not {".env", "samples.jsonl", "adapters/sft/optimizer.pt"} & set(newest_files(server))
    fetch(recipe, tmp_path / "other")
    fetched = tree(tmp_path / "other")
    assert {name for name in fetched if "/step-" in name} == {
        f"checkpoints/reward/step-00000004/{path.name}" for path in (tmp_path / "step").iterdir()
    }
    same = [n for n in before if "/step-" not in n and not n.startswith("record.json")]
    assert len(same) == 5 and {n: fetched[n] for n in same} == {n: before[n] for n in same}
    manifest = "checkpoints/reward/step-00000004/manifest.json"
    assert fetched[manifest] == sha256(tmp_path / "step" / "manifest.json")
    # On a machine where the data lie elsewhere, the paths are those of that machine.
    elsewhere = recipe_in(tmp_path / "data2")
    fetch(elsewhere, tmp_path / "third")
    lines = json.loads((tmp_path / "third" / manifest).read_text())["run"]
    assert lines == {"data.prompts.0.path": str(tmp_path / "data2" / "prompts.jsonl")}


FAULTS = [
    ("POST", "/commit/", 412, 1), ("POST", "/commit/", 429, 2), ("PUT", "^/_lfs/", 0, 3),
    ("POST", "/commit/", -1, 1), ("GET", "/tree/|/revision/|kept$", 502, 1),
    ("PUT", "^/_lfs/", -3, 3),
    *(pytest.param(*other, marks=pytest.mark.slow) for other in (
        ("POST", "/commit/", 500, 2), ("POST", "/commit/", 0, 2), ("PUT", "^/_lfs/", 500, 3),
        ("PUT", "^/_lfs/", -1, 1), ("POST", "objects/batch", 503, 3), ("POST", "preupload", 504, 2),
        ("POST", "repos/create", 500, 2))),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "status", "times"), FAULTS)
def test_an_upload_survives_transient_faults(
    server, tmp_path, no_pauses, impatient, method, path, status, times
):
    recipe = recipe_in(tmp_path / "data")
    record, progress = short_run(tmp_path / "run", recipe), RecordingProgress()
    remote = backup.prepare(recipe, record.folder, progress)
    server.fail_next(method, path, status, times=times)
    started = time.monotonic()
    with backup.uploading(remote, recipe, record, progress):
        pass
    assert record.data["clock"]["backup"] == {"repo_id": "acme/kept", "sent": 1, "failed": 0}
    assert time.monotonic() - started < 50, "a connection that is silent was waited for"
    assert len([r for r in server.requests if r.status == status]) >= 1
    assert len(server.repos["acme/kept"].commits) == 2
    fetch(recipe, tmp_path / "other")


@pytest.mark.parametrize("path", ["/commit/", "repos/create"])
def test_a_lost_answer_makes_no_second_commit(server, tmp_path, no_pauses, path):
    """The second try must not ask again for a file to be deleted that is gone."""
    recipe = recipe_in(tmp_path / "data")
    record = short_run(tmp_path / "run", recipe)
    send(recipe, record)
    save_checkpoint(record, 4)
    server.fail_next("POST", path, 0, after=True)
    assert not send(recipe, record).lines
    assert len(server.repos["acme/kept"].commits) == 3
    assert "checkpoints/reward/step-00000003/manifest.json" not in newest_files(server)


@pytest.mark.parametrize("status", [500, pytest.param(0, marks=pytest.mark.slow), -1, -2])
def test_a_fetch_survives_transient_faults(server, tmp_path, no_pauses, impatient, status):
    recipe = recipe_in(tmp_path / "data")
    send(recipe, short_run(tmp_path / "run", recipe))
    server.fail_next("GET", "resolve/.*adapter_model", status, times=2)
    other = fetch(recipe, tmp_path / "other")
    name = "adapters/sft/adapter_model.safetensors"
    assert sha256(other.folder / name) == sha256(tmp_path / "run" / name)


def test_the_weights_of_a_finished_stage_are_uploaded_once(server, tmp_path):
    recipe = recipe_in(tmp_path / "data")
    record = short_run(tmp_path / "run", recipe)
    for number in (4, 5):
        save_checkpoint(record, number)
        send(recipe, record)
    content = (record.adapter("sft") / "adapter_model.safetensors").read_bytes()
    assert [r.body for r in server.sent("PUT", "^/_lfs/")].count(content) == 1


def test_uploads_respect_hub_minutes_and_do_not_block_the_run(server, tmp_path, no_pauses):
    recipe = recipe_in(tmp_path / "data", "checkpoint.hub_minutes=60")
    record, progress = short_run(tmp_path / "run", recipe), RecordingProgress()
    with backup.uploading(
        backup.prepare(recipe, record.folder, progress), recipe, record, progress
    ):
        for number in (4, 5, 6):
            save_checkpoint(record, number)
            record.on_saved(False)
        sent = (
            [n for n in newest_files(server) if "/step-" in n]
            if "acme/kept" in server.repos
            else []
        )
        assert all("step-00000004" in name for name in sent)  # the first; or still under way
    assert record.data["clock"]["backup"]["sent"] == 2  # the first, and what was left at the end
    assert "checkpoints/reward/step-00000006/manifest.json" in newest_files(server)


@pytest.mark.parametrize(
    "kept", [None, pytest.param(500, marks=pytest.mark.slow), 403, "of the user"]
)
def test_the_history_of_a_finished_run_is_one_commit(server, tmp_path, no_pauses, kept):
    """Unless the Hub refuses, or something else lies in the history."""
    recipe = recipe_in(tmp_path / "data")
    record = short_run(tmp_path / "run", recipe)
    send(recipe, record)
    assert len(server.repos["acme/kept"].commits) == 2, "an unfinished run keeps its history"
    record = Record.read(record.folder)
    with record.stage("card"):
        record.seal()
    if kept == "of the user":
        commits = server.repos["acme/kept"].commits
        commits[0] = commits[0]._replace(message=kept)
    elif kept:
        server.fail_next("POST", "super-squash", kept, times=9)
    lines = send(recipe, record).lines
    assert len(server.repos["acme/kept"].commits) == (3 if kept else 1)
    assert len(lines) == bool(kept)
    if kept:
        assert "the history of acme/kept is kept: " in lines[0] and str(kept) in lines[0]
    assert record.data["clock"]["backup"] == {"repo_id": "acme/kept", "sent": 1, "failed": 0}
    assert fetch(recipe, tmp_path / "other").done("sft")


# --- refused before training ---------------------------------------------------------------------


def test_another_run_is_never_overwritten(server, tmp_path):
    recipe = recipe_in(tmp_path / "data")
    send(recipe, short_run(tmp_path / "run", recipe))
    other = short_run(tmp_path / "other", recipe)
    other.data["clock"]["started"] = "2020-01-01T00:00:00+00:00"
    other.save()
    with pytest.raises(HubError, match="checkpoints of another run: little, seed 0, started") as e:
        backup.prepare(recipe, other.folder, RecordingProgress())
    assert "another checkpoint.hub" in e.value.remedy
    assert len(server.repos["acme/kept"].commits) == 2


def test_a_run_of_another_recipe_is_not_continued(server, tmp_path):
    recipe = recipe_in(tmp_path / "data")
    send(recipe, short_run(tmp_path / "run", recipe))
    out = tmp_path / "other"
    out.mkdir()
    with pytest.raises(HubError, match="acme/kept holds a run of another recipe:\n.*seed: 0 -> 1"):
        backup.prepare(recipe_in(tmp_path / "data", "seed=1"), out, RecordingProgress())
    assert not any(out.iterdir())


@pytest.mark.parametrize(
    "name",
    ["adapters/sft/adapter_model.safetensors", "record.json",
     "checkpoints/reward/step-00000003/optimizer.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("gone", [False, True])
def test_a_changed_file_is_named_and_not_used(server, tmp_path, name, gone):
    recipe = recipe_in(tmp_path / "data")
    send(recipe, short_run(tmp_path / "run", recipe))
    commit = server.repos["acme/kept"].commits[-1]
    (tmp_path / "file").write_bytes(commit.tree[name].data)
    flip_bit(tmp_path / "file")
    blob = commit.tree.pop(name)
    if not gone:
        commit.tree[name] = blob._replace(data=(tmp_path / "file").read_bytes())
    out = tmp_path / "other"
    out.mkdir()
    with pytest.raises(HubError, match=f"{name} is not as it was sent"):
        backup.prepare(recipe, out, RecordingProgress())
    assert not any(out.iterdir())


def test_a_damaged_checkpoint_is_not_uploaded(server, tmp_path):
    recipe = recipe_in(tmp_path / "data")
    record = short_run(tmp_path / "run", recipe)
    flip_bit(record.checkpoints("reward") / "step-00000003" / "roles.safetensors")
    assert "roles.safetensors has another sha256" in send(recipe, record).lines[0]
    assert "acme/kept" not in server.repos


def test_an_index_with_a_path_outside_is_refused(server, tmp_path):
    recipe = recipe_in(tmp_path / "data")
    send(recipe, short_run(tmp_path / "run", recipe))
    tree = server.repos["acme/kept"].commits[-1].tree
    index = json.loads(tree["backup.json"].data)
    index["files"]["../outside"] = "0" * 64
    tree["backup.json"] = tree["backup.json"]._replace(data=json.dumps(index).encode())
    (tmp_path / "other").mkdir()
    with pytest.raises(HubError, match=r"it names \.\./outside"):
        backup.prepare(recipe, tmp_path / "other", RecordingProgress())


@pytest.mark.parametrize(
    ("spoil", "match"),
    [(lambda server, patch: server.add_repo("acme/kept"), "is a public repository"),
     (lambda server, patch: patch.delenv("HF_TOKEN"), "no token for the checkpoint backup"),
     (lambda server, patch: setattr(server, "role", "read"), "only read access to acme"),
     (lambda server, patch: setattr(server, "orgs", ()), "not a member of acme"),
     (lambda server, patch: patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9"), "failed")],
)  # fmt: skip
def test_a_backup_that_cannot_work_is_refused_before_training(
    server, tmp_path, no_pauses, monkeypatch, spoil, match
):
    spoil(server, monkeypatch)
    with pytest.raises(HubError, match=match) as caught:
        pipeline.run(recipe_in(tmp_path / "data"), tmp_path / "run")
    assert caught.value.exit_code == 4 and not (tmp_path / "run").exists()
    assert not server.sent("POST")


def test_offline_trains_and_says_so(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    progress = RecordingProgress()
    assert backup.prepare(recipe_in(tmp_path / "data"), tmp_path / "run", progress) is None
    assert "neither fetched from nor sent to acme/kept" in progress.lines[0] and not server.requests


# --- secrets, and a fetch that is killed ---------------------------------------------------------


@pytest.mark.parametrize("where", ["metrics.jsonl", "skipped.jsonl", "recipe.yaml"])
def test_a_secret_is_not_uploaded(server, tmp_path, monkeypatch, where):
    monkeypatch.setenv("SOME_API_KEY", "canary-canary-canary")
    recipe = recipe_in(tmp_path / "data")
    record = short_run(tmp_path / "run", recipe)
    with (record.folder / where).open("a") as file:
        file.write('{"stage": "sft", "step": 2, "x": "canary-canary-canary"}\n')
    [line, last] = send(recipe, record).lines
    assert where in line and "SOME_API_KEY" in line and "canary" not in line + last
    assert "acme/kept" not in server.repos
    assert not [r for r in server.requests if b"canary" in r.body]


def test_no_token_and_no_home_folder_is_uploaded_or_saved(server, tmp_path, monkeypatch):
    token = "hf_" + "a" * 30
    server.token = token
    monkeypatch.setenv("HF_TOKEN", token)
    recipe = recipe_in(tmp_path / "data")
    record = short_run(tmp_path / "run", recipe)
    send(recipe, record)
    local = [p.read_bytes() for p in record.folder.rglob("*.*")]
    contents = [*newest_files(server).values(), *local]
    assert len(contents) > 20 and not [c for c in contents if token.encode() in c]
    for name, content in newest_files(server).items():
        for path in (str(tmp_path), str(Path.home()) + "/", str(base_folder("llama"))):
            assert path.encode() not in content, (name, path)


@pytest.mark.parametrize("at", [0, pytest.param(3, marks=pytest.mark.slow), 8])
def test_a_fetch_that_was_killed_is_repeated(server, tmp_path, at):
    recipe = recipe_in(tmp_path / "data")
    send(recipe, short_run(tmp_path / "run", recipe))

    def die() -> None:
        real, count = Path.replace, [0]

        def replace(self, target):
            if "adapters" in str(self) or "checkpoints" in str(self):
                count[0] += 1
                if count[0] > at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(self, target)

        Path.replace = replace
        backup.prepare(recipe, out, RecordingProgress())

    out = tmp_path / "other"
    out.mkdir()
    (out / "recipe.yaml").write_text("")  # of a run that was killed before it had a record
    assert killed.wait(killed.start(die)) == -signal.SIGKILL
    assert (out / backup.FETCHED).exists() and not (out / "record.json").exists()
    fetch(recipe, out)
    assert not (out / backup.FETCHED).exists()
    assert (out / "checkpoints/reward/step-00000003/manifest.json").exists()


# --- one run, two machines -----------------------------------------------------------------------


def test_an_older_copy_does_not_replace_the_run_on_the_hub(server, tmp_path):
    """Started on a laptop, continued elsewhere for hours, then started on the laptop again."""
    recipe = recipe_in(tmp_path / "data")
    laptop = short_run(tmp_path / "laptop", recipe)
    send(recipe, laptop)
    other = fetch(recipe, tmp_path / "other")
    save_checkpoint(other, 7)
    send(recipe, other)
    before = server.repos["acme/kept"].sha
    match = (
        "acme/kept is ahead of .*there sft done, reward at step 7; here sft done, reward at step 3"
    )
    with pytest.raises(HubError, match=match) as caught:
        backup.prepare(recipe, laptop.folder, RecordingProgress())
    assert caught.value.exit_code == 4 and server.repos["acme/kept"].sha == before
    assert "another --out" in caught.value.remedy and "delete the repo" in caught.value.remedy
    save_checkpoint(laptop, 8)  # as far, or further: it goes on
    send(recipe, laptop)
    assert "checkpoints/reward/step-00000008/manifest.json" in newest_files(server)


def test_a_finished_stage_counts_more_than_any_step_before_it(tmp_path):
    record = short_run(tmp_path / "run", recipe_in(tmp_path / "data"))
    assert backup._progress(record, backup._steps(record.folder)) == [1, 3]
    with record.stage("reward"):
        pass
    assert backup._progress(record, backup._steps(record.folder)) == [2, 0]
    for stage in ("ppo", "evaluate", "card"):  # a card is made again where only a card changes
        with record.stage(stage):
            pass
    assert backup._progress(record, backup._steps(record.folder)) == [4, 0]


def test_a_process_that_was_replaced_stops_uploading_and_says_so_once(server, tmp_path, no_pauses):
    recipe = recipe_in(tmp_path / "data")
    record, progress = short_run(tmp_path / "run", recipe), RecordingProgress()
    remote = backup.prepare(recipe, record.folder, progress)
    with backup.uploading(remote, recipe, record, progress):
        record.on_saved(True)
        while len(server.repos["acme/kept"].commits if server.repos else ()) < 2:
            real_sleep(0.02)
        other = fetch(recipe, tmp_path / "other")
        save_checkpoint(other, 7)
        send(recipe, other)
        newest = server.repos["acme/kept"].sha
        for number in (8, 9):
            save_checkpoint(record, number)
            record.on_saved(True)
            real_sleep(0.3)
    assert server.repos["acme/kept"].sha == newest
    lines = [line for line in progress.lines if "its checkpoints are no longer sent" in line]
    assert len(lines) == 1 and progress.lines[-1] == lines[0] and "reward at step 7" in lines[0]
    assert record.data["clock"]["backup"]["failed"] == 1


@pytest.mark.parametrize("status", [409, 412])
def test_a_commit_between_check_and_upload_is_noticed(
    server, tmp_path, no_pauses, monkeypatch, status
):
    """The Hub refuses the upload, which names its parent commit; then the head is checked again."""
    recipe = recipe_in(tmp_path / "data")
    record, other = short_run(tmp_path / "run", recipe), None
    send(recipe, record)
    other = fetch(recipe, tmp_path / "other")
    save_checkpoint(other, 7)
    save_checkpoint(record, 5)
    progress, real, seen = RecordingProgress(), backup._Uploader._check_parent, []

    def ours(self, newest):
        real(self, newest)
        if self.record is record and not seen:
            seen.append(newest)
            monkeypatch.setattr(backup._Uploader, "_check_parent", real)
            if status == 409:
                server.fail_next("POST", "/commit/", 409, times=1)
                server.repos["acme/kept"].commit(heads_of_other(), "of another")
            else:
                send(recipe, other)

    def heads_of_other():
        tree = dict(server.repos["acme/kept"].commits[-1].tree)
        index = json.loads(tree["backup.json"].data) | {"writer": "another"}
        return tree | {"backup.json": tree["backup.json"]._replace(data=json.dumps(index).encode())}

    monkeypatch.setattr(backup._Uploader, "_check_parent", ours)
    send(recipe, record, progress)
    assert seen and "checkpoints/reward/step-00000005/manifest.json" not in newest_files(server)
    assert [r.status for r in server.sent("POST", "/commit/")].count(status) == 1
    assert record.data["clock"]["backup"]["failed"] == 1, "one look was enough"
    assert (
        len([line for line in progress.lines if "its checkpoints are no longer sent" in line]) == 1
    )


# --- paths, and where the copy lies --------------------------------------------------------------


@pytest.mark.parametrize(
    ("home", "text", "sent"),
    [("/", '{"a": "x/y", "b": "/etc/z"}', None),
     ("/home/ann", '{"a": "/home/anna/shared", "b": "/srv/home/ann"}', None),
     ("/home/ann", '{"a": "/home/ann/b", "c": "in\\n/home/ann, x"}',
      '{"a": "@@home@@/b", "c": "in\\n@@home@@, x"}')],
)  # fmt: skip
def test_only_whole_paths_are_replaced(tmp_path, monkeypatch, home, text, sent):
    recipe = recipe_in(tmp_path / "data")
    monkeypatch.setenv("HOME", home)
    path, words = tmp_path / "x.json", backup._placeholders(recipe, tmp_path / "run")
    path.write_text(text)
    assert backup._swap(path, "x.json", words) is (sent is not None)
    assert path.read_text() == (sent or text)
    backup._swap(path, "x.json", {word: other for other, word in words.items()})
    assert path.read_text() == text


def test_the_copy_is_hard_linked_and_not_part_of_the_run(server, tmp_path, monkeypatch):
    recipe = recipe_in(tmp_path / "data")
    record, seen = short_run(tmp_path / "run", recipe), []
    real = backup._make_ready

    def look(folder, *rest):
        weights = "adapters/sft/adapter_model.safetensors"
        seen.append((folder, (folder / weights).samefile(record.folder / weights)))
        record.seal()
        return real(folder, *rest)

    monkeypatch.setattr(backup, "_make_ready", look)
    assert not send(recipe, record).lines
    assert seen == [(record.folder / "backup.tmp", True)] and not seen[0][0].exists()
    assert not [name for name in record.data["files"] if "backup" in name]
    assert "adapters/sft/adapter_model.safetensors" in record.data["files"]
    (record.folder / "backup.tmp" / "adapters").mkdir(parents=True)  # a second signal
    backup.prepare(recipe, record.folder, RecordingProgress())
    assert not (record.folder / "backup.tmp").exists()


def test_the_path_of_the_base_is_hidden_and_sealed_again_after_a_fetch(
    server, tmp_path, monkeypatch
):
    recipe = recipe_in(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    record, name = short_run(tmp_path / "run", recipe), "adapters/sft/adapter_config.json"
    config = {"base_model_name_or_path": str(tmp_path / "me" / "base")}
    (record.folder / name).write_text(json.dumps(config))
    record.seal()
    send(recipe, record)
    assert json.loads(newest_files(server)[name])["base_model_name_or_path"] == "@@home@@/base"
    monkeypatch.setenv("HOME", str(tmp_path / "you"))
    other = fetch(recipe, tmp_path / "other")
    config = json.loads((other.folder / name).read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "you" / "base")
    assert other.data["files"][name] == sha256(other.folder / name)
