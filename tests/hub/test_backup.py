# SPDX-License-Identifier: Apache-2.0
"""A run kept on the Hub: another machine goes on with it, and no fault of the Hub touches it."""

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
from hub_server import HubServer, turn_to
from huggingface_hub import constants
from recording import RecordingProgress
from small import base_folder

from lora_rlhf import pipeline
from lora_rlhf.errors import HubError
from lora_rlhf.hub import backup, repository, snapshot
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


@pytest.fixture
def server():
    with HubServer(user="tester", token="hf_test", orgs=("acme",)) as server:
        yield server


@pytest.fixture(autouse=True)
def here(server, monkeypatch, tmp_path):
    """This process's clients turned to the local Hub."""
    turn_to(server, monkeypatch, tmp_path)


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def heads(server) -> dict[str, bytes]:
    """What the newest commit holds."""
    return server.repos["acme/kept"].files


# --- a whole little run --------------------------------------------------------------------------


def wait_at(asked, out: Path, stage: str, step: int) -> None:
    """Run as far as a step of a stage, and stay there until what it saved is on the Hub."""
    real = checkpoint_callback.CheckpointCallback.save

    def save(self, trainer, notes=None):
        real(self, trainer, notes)
        while self.name == stage and trainer.state.global_step == step:
            self.record.on_saved(False)
            time.sleep(0.05)

    checkpoint_callback.CheckpointCallback.save = save
    pipeline.run(asked, out, until=stage)


@pytest.mark.parametrize(
    ("stage", "step"), [("sft", 3), pytest.param("ppo", 6, marks=pytest.mark.slow)]
)
def test_a_machine_that_is_lost_is_replaced_by_another(server, tmp_path, capfd, stage, step):
    """Killed for real; the other has the recipe and the data, in another folder, and no run."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        killed.write(folder)
    pipeline.run(killed.recipe(first, SHORT), first / "whole", until=stage)
    child = killed.start(wait_at, killed.recipe(first, SHORT, *SETS), first / "run", stage, step)
    newest = f"checkpoints/{stage}/step-{step:08d}/manifest.json"
    while "acme/kept" not in server.repos or newest not in heads(server):
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    assert killed.wait(child) == -signal.SIGKILL
    sent = heads(server)
    assert server.repos["acme/kept"].private and b"Checkpoints of" in sent["README.md"]
    for name, content in sent.items():
        assert str(tmp_path).encode() not in content, name
    shutil.rmtree(first / "run")
    said = RecordingProgress()
    capfd.readouterr()
    pipeline.run(killed.recipe(second, SHORT, *SETS), second / "run", until=stage, progress=said)
    assert "LFS" not in capfd.readouterr().err, "a bar across the line of the stage"
    assert [line for line in said.lines if line.startswith("fetched from acme/kept: ")]
    assert f"{stage}: going on from step-{step:08d}" in said.lines
    here, whole = (killed.bits(folder) for folder in (second / "run", first / "whole"))
    paths = [bits["record"].pop("recipe_sha256") for bits in (here, whole)]
    assert here == whole and len({*paths}) == 2  # the recipe names another folder
    assert Record.read(second / "run").data["clock"]["backup"]["failed"] == 0
    done = heads(server)
    assert not [name for name in done if name.startswith("checkpoints/")], "the stage is done"
    assert f"adapters/{'policy' if stage == 'ppo' else stage}/adapter_model.safetensors" in done


def test_a_hub_that_fails_changes_nothing_and_is_told_once(server, tmp_path, no_pauses):
    killed.write(tmp_path)
    pipeline.run(killed.recipe(tmp_path, SHORT), tmp_path / "whole", until="sft")
    server.fail_next("POST", "/commit/", 500, times=10_000)
    said, asked = RecordingProgress(), killed.recipe(tmp_path, SHORT, *SETS)
    pipeline.run(asked, tmp_path / "run", until="sft", progress=said)
    assert killed.bits(tmp_path / "run") == killed.bits(tmp_path / "whole")
    counts = Record.read(tmp_path / "run").data["clock"]["backup"]
    assert counts["sent"] == 0 and counts["failed"] > 1
    told = [line for line in said.lines if "its checkpoints are only here" in line]
    assert len(told) == 1 and "HTTP 500" in told[0] and "next checkpoint tries again" in told[0]
    again = f"lora-rlhf run {tmp_path}/run/recipe.yaml --out {tmp_path}/run"
    assert again in said.lines[-1]
    assert set(heads(server)) == {".gitattributes"}  # nothing, or all with its card
    server._faults.clear()
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    pipeline.run(parse_recipe(text, "recipe.yaml"), tmp_path / "run", until="sft")
    assert {"README.md", "adapters/sft/adapter_model.safetensors"} <= set(heads(server))


# --- a run that has no training ------------------------------------------------------------------


def asked(data: Path, *sets: str):
    data.mkdir(exist_ok=True)
    if not (data / "prompts.jsonl").exists():
        killed.write(data, 4)
    return killed.recipe(data, *SETS, *sets)


def little(folder: Path, recipe) -> Record:
    """As if SFT were done, and the reward model at step 3."""
    record = Record.open(folder, recipe)
    with record.stage("sft"):
        adapter = record.adapter("sft")
        adapter.mkdir(parents=True)
        base = {"base_model_name_or_path": recipe.model.id}
        (adapter / "adapter_config.json").write_text(json.dumps(base))
        (adapter / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    record.log("sft", 1, {"loss": 1.0})
    step(record, 3)
    return record


def step(record: Record, number: int) -> None:
    parts = {name: {"x": torch.full((3,), float(number))} for name in PARTS}
    run = {"data.prompts.0.path": str(record.recipe().data.prompts[0].path)}
    checkpoint.write(
        record.checkpoints("reward"), number, parts, {TRAINER_STATE: "{}"}, run, {"lines": 0}
    )


def send(recipe, record: Record, said: RecordingProgress | None = None) -> RecordingProgress:
    said = said or RecordingProgress()
    remote = backup.prepare(recipe, record.folder, said)
    with backup.kept(remote, recipe, record, said):
        record.on_saved(False)
    return said


def fetch(recipe, out: Path) -> Record:
    out.mkdir(exist_ok=True)
    assert backup.prepare(recipe, out, RecordingProgress()) is not None
    return Record.open(out, recipe)


def tree(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): sha256(p) for p in files}


def test_what_is_sent_comes_back_with_its_bits_and_nothing_else_goes(server, tmp_path):
    recipe = asked(tmp_path / "data")
    record = little(tmp_path / "run", recipe)
    before = tree(record.folder)
    (record.folder / ".env").write_text("x")
    (record.folder / "adapters" / "sft" / "optimizer.pt").write_bytes(b"x")
    step(record, 4)  # only the newest goes
    shutil.copytree(record.checkpoints("reward") / "step-00000004", tmp_path / "step")
    os.symlink("/etc/hostname", record.folder / "samples.jsonl")
    (record.checkpoints("reward") / "step-00000005.tmp").mkdir()
    send(recipe, record)
    assert not {".env", "samples.jsonl", "adapters/sft/optimizer.pt"} & set(heads(server))
    fetch(recipe, tmp_path / "other")
    found = tree(tmp_path / "other")
    assert {name for name in found if "/step-" in name} == {
        f"checkpoints/reward/step-00000004/{path.name}" for path in (tmp_path / "step").iterdir()
    }
    same = [n for n in before if "/step-" not in n and n not in ("record.json",)]
    assert len(same) == 4 and {n: found[n] for n in same} == {n: before[n] for n in same}
    manifest = "checkpoints/reward/step-00000004/manifest.json"
    assert found[manifest] == sha256(tmp_path / "step" / "manifest.json")
    # On a machine where the data lie elsewhere, the paths are those of that machine.
    elsewhere = asked(tmp_path / "data2")
    fetch(elsewhere, tmp_path / "third")
    told = json.loads((tmp_path / "third" / manifest).read_text())["run"]
    assert told == {"data.prompts.0.path": str(tmp_path / "data2" / "prompts.jsonl")}


FAULTS = [
    ("POST", "/commit/", 500, 2), ("POST", "/commit/", 412, 1), ("POST", "/commit/", 429, 2),
    ("POST", "/commit/", 0, 2), ("PUT", "^/_lfs/", 500, 3), ("PUT", "^/_lfs/", 0, 3),
    ("PUT", "^/_lfs/", -1, 1), ("POST", "/commit/", -1, 1), ("POST", "objects/batch", 503, 3),
    ("GET", "/tree/|/revision/|kept$", 502, 1), ("POST", "preupload", 504, 2),
    ("POST", "repos/create", 500, 2), ("PUT", "^/_lfs/", -3, 3),
]  # fmt: skip


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(repository, "_SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    repository._limit_silence.cache_clear()
    yield
    monkeypatch.undo()
    repository._limit_silence.cache_clear()


@pytest.mark.parametrize(("method", "path", "status", "times"), FAULTS)
def test_passing_faults_of_an_upload(
    server, tmp_path, no_pauses, impatient, method, path, status, times
):
    recipe = asked(tmp_path / "data")
    record, said = little(tmp_path / "run", recipe), RecordingProgress()
    remote = backup.prepare(recipe, record.folder, said)
    server.fail_next(method, path, status, times=times)
    started = time.monotonic()
    with backup.kept(remote, recipe, record, said):
        pass
    assert record.data["clock"]["backup"] == {"repo_id": "acme/kept", "sent": 1, "failed": 0}
    assert time.monotonic() - started < 20, "a connection that is silent was waited for"
    assert len([r for r in server.requests if r.status == status]) >= 1
    assert len(server.repos["acme/kept"].commits) == 2
    fetch(recipe, tmp_path / "other")


@pytest.mark.parametrize("path", ["/commit/", "repos/create"])
def test_a_lost_answer_makes_no_second_commit(server, tmp_path, no_pauses, path):
    """The second try must not ask again for a file to be deleted that is gone."""
    recipe = asked(tmp_path / "data")
    record = little(tmp_path / "run", recipe)
    send(recipe, record)
    step(record, 4)
    server.fail_next("POST", path, 0, after=True)
    assert not send(recipe, record).lines
    assert len(server.repos["acme/kept"].commits) == 3
    assert "checkpoints/reward/step-00000003/manifest.json" not in heads(server)


@pytest.mark.parametrize("status", [500, 0, -1, -2])
def test_passing_faults_of_a_fetch(server, tmp_path, no_pauses, impatient, status):
    recipe = asked(tmp_path / "data")
    send(recipe, little(tmp_path / "run", recipe))
    server.fail_next("GET", "resolve/.*adapter_model", status, times=2)
    other = fetch(recipe, tmp_path / "other")
    name = "adapters/sft/adapter_model.safetensors"
    assert sha256(other.folder / name) == sha256(tmp_path / "run" / name)


def test_the_weights_of_a_finished_stage_go_once(server, tmp_path):
    recipe = asked(tmp_path / "data")
    record = little(tmp_path / "run", recipe)
    for number in (4, 5):
        step(record, number)
        send(recipe, record)
    content = (record.adapter("sft") / "adapter_model.safetensors").read_bytes()
    assert [r.body for r in server.sent("PUT", "^/_lfs/")].count(content) == 1


def test_a_run_is_not_kept_waiting_and_sends_at_most_so_often(server, tmp_path, no_pauses):
    recipe = asked(tmp_path / "data", "checkpoint.hub_minutes=60")
    record, said = little(tmp_path / "run", recipe), RecordingProgress()
    with backup.kept(backup.prepare(recipe, record.folder, said), recipe, record, said):
        for number in (4, 5, 6):
            step(record, number)
            record.on_saved(False)
        sent = [n for n in heads(server) if "/step-" in n] if "acme/kept" in server.repos else []
        assert all("step-00000004" in name for name in sent)  # the first; or still under way
    assert record.data["clock"]["backup"]["sent"] == 2  # the first, and what was left at the end
    assert "checkpoints/reward/step-00000006/manifest.json" in heads(server)


# --- refused before training ---------------------------------------------------------------------


def test_another_run_is_never_written_over(server, tmp_path):
    recipe = asked(tmp_path / "data")
    send(recipe, little(tmp_path / "run", recipe))
    other = little(tmp_path / "other", recipe)
    other.data["clock"]["started"] = "2020-01-01T00:00:00+00:00"
    other.save()
    with pytest.raises(HubError, match="checkpoints of another run: little, seed 0, started") as e:
        backup.prepare(recipe, other.folder, RecordingProgress())
    assert "another checkpoint.hub" in e.value.remedy
    assert len(server.repos["acme/kept"].commits) == 2


def test_a_run_of_another_recipe_is_not_gone_on_with(server, tmp_path):
    recipe = asked(tmp_path / "data")
    send(recipe, little(tmp_path / "run", recipe))
    out = tmp_path / "other"
    out.mkdir()
    with pytest.raises(HubError, match="acme/kept holds a run of another recipe:\n.*seed: 0 -> 1"):
        backup.prepare(asked(tmp_path / "data", "seed=1"), out, RecordingProgress())
    assert not any(out.iterdir())


@pytest.mark.parametrize(
    "name",
    ["adapters/sft/adapter_model.safetensors", "record.json",
     "checkpoints/reward/step-00000003/optimizer.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("gone", [False, True])
def test_what_was_changed_there_is_named_and_not_used(server, tmp_path, name, gone):
    recipe = asked(tmp_path / "data")
    send(recipe, little(tmp_path / "run", recipe))
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


def test_a_broken_checkpoint_is_not_sent(server, tmp_path):
    recipe = asked(tmp_path / "data")
    record = little(tmp_path / "run", recipe)
    flip_bit(record.checkpoints("reward") / "step-00000003" / "roles.safetensors")
    assert "roles.safetensors has another sha256" in send(recipe, record).lines[0]
    assert "acme/kept" not in server.repos


def test_an_index_that_leads_outside(server, tmp_path):
    recipe = asked(tmp_path / "data")
    send(recipe, little(tmp_path / "run", recipe))
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
     (lambda server, patch: patch.delenv("HF_TOKEN"), "no token for keeping checkpoints"),
     (lambda server, patch: setattr(server, "role", "read"), "may only read in acme"),
     (lambda server, patch: setattr(server, "orgs", ()), "no member of acme"),
     (lambda server, patch: patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9"), "failed")],
)  # fmt: skip
def test_what_cannot_be_kept_is_told_before_training(
    server, tmp_path, no_pauses, monkeypatch, spoil, match
):
    spoil(server, monkeypatch)
    with pytest.raises(HubError, match=match) as caught:
        pipeline.run(asked(tmp_path / "data"), tmp_path / "run")
    assert caught.value.exit_code == 4 and not (tmp_path / "run").exists()
    assert not server.sent("POST")


def test_offline_trains_and_says_so(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = RecordingProgress()
    assert backup.prepare(asked(tmp_path / "data"), tmp_path / "run", said) is None
    assert "neither come from nor go to acme/kept" in said.lines[0] and not server.requests


# --- secrets, and a fetch that is killed ---------------------------------------------------------


@pytest.mark.parametrize("where", ["metrics.jsonl", "skipped.jsonl", "recipe.yaml"])
def test_a_secret_is_not_sent(server, tmp_path, monkeypatch, where):
    monkeypatch.setenv("SOME_API_KEY", "canary-canary-canary")
    recipe = asked(tmp_path / "data")
    record = little(tmp_path / "run", recipe)
    with (record.folder / where).open("a") as file:
        file.write('{"stage": "sft", "step": 2, "x": "canary-canary-canary"}\n')
    [line, last] = send(recipe, record).lines
    assert where in line and "SOME_API_KEY" in line and "canary" not in line + last
    assert "acme/kept" not in server.repos
    assert not [r for r in server.requests if b"canary" in r.body]


def test_no_token_and_no_home_is_in_what_is_sent_or_kept(server, tmp_path, monkeypatch):
    token = "hf_" + "a" * 30
    server.token = token
    monkeypatch.setenv("HF_TOKEN", token)
    recipe = asked(tmp_path / "data")
    record = little(tmp_path / "run", recipe)
    send(recipe, record)
    found = [*heads(server).values(), *(p.read_bytes() for p in record.folder.rglob("*.*"))]
    assert len(found) > 20 and not [c for c in found if token.encode() in c]
    for name, content in heads(server).items():
        for path in (str(tmp_path), str(Path.home()) + "/", str(base_folder("llama"))):
            assert path.encode() not in content, (name, path)


@pytest.mark.parametrize("at", [0, 3, 8])
def test_killed_in_a_fetch_it_is_fetched_again(server, tmp_path, at):
    recipe = asked(tmp_path / "data")
    send(recipe, little(tmp_path / "run", recipe))

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


def test_an_older_copy_of_the_run_does_not_replace_what_is_there(server, tmp_path):
    """Begun on a laptop, gone on with elsewhere for hours, then started on the laptop again."""
    recipe = asked(tmp_path / "data")
    laptop = little(tmp_path / "laptop", recipe)
    send(recipe, laptop)
    other = fetch(recipe, tmp_path / "other")
    step(other, 7)
    send(recipe, other)
    before = server.repos["acme/kept"].sha
    match = (
        "acme/kept is ahead of .*there sft done, reward at step 7; here sft done, reward at step 3"
    )
    with pytest.raises(HubError, match=match) as caught:
        backup.prepare(recipe, laptop.folder, RecordingProgress())
    assert caught.value.exit_code == 4 and server.repos["acme/kept"].sha == before
    assert "another --out" in caught.value.remedy and "delete the repo" in caught.value.remedy
    step(laptop, 8)  # as far, or further: it goes on
    send(recipe, laptop)
    assert "checkpoints/reward/step-00000008/manifest.json" in heads(server)


def test_a_finished_stage_is_further_than_any_step_before_it(tmp_path):
    record = little(tmp_path / "run", asked(tmp_path / "data"))
    assert snapshot.progress(record) == [1, 3]
    with record.stage("reward"):
        pass
    assert snapshot.progress(record) == [2, 0]
    for stage in ("ppo", "evaluate", "card"):  # a card is made again where only a card changes
        with record.stage(stage):
            pass
    assert snapshot.progress(record) == [4, 0]


def test_a_session_thought_dead_stops_sending_and_says_so_once(server, tmp_path, no_pauses):
    recipe = asked(tmp_path / "data")
    record, said = little(tmp_path / "run", recipe), RecordingProgress()
    remote = backup.prepare(recipe, record.folder, said)
    with backup.kept(remote, recipe, record, said):
        record.on_saved(True)
        while len(server.repos["acme/kept"].commits if server.repos else ()) < 2:
            real_sleep(0.02)
        other = fetch(recipe, tmp_path / "other")
        step(other, 7)
        send(recipe, other)
        newest = server.repos["acme/kept"].sha
        for number in (8, 9):
            step(record, number)
            record.on_saved(True)
            real_sleep(0.3)
    assert server.repos["acme/kept"].sha == newest
    told = [line for line in said.lines if "nothing more of it is sent" in line]
    assert len(told) == 1 and said.lines[-1] == told[0] and "reward at step 7" in told[0]
    assert record.data["clock"]["backup"]["failed"] == 1


@pytest.mark.parametrize("status", [409, 412])
def test_a_commit_between_the_look_and_the_upload_is_seen(
    server, tmp_path, no_pauses, monkeypatch, status
):
    """The Hub refuses the upload, since it names the commit it builds on; then one looks again."""
    recipe = asked(tmp_path / "data")
    record, other = little(tmp_path / "run", recipe), None
    send(recipe, record)
    other = fetch(recipe, tmp_path / "other")
    step(other, 7)
    step(record, 5)
    said, real, seen = RecordingProgress(), backup._Sender._ours, []

    def ours(self, newest):
        real(self, newest)
        if self.record is record and not seen:
            seen.append(newest)
            monkeypatch.setattr(backup._Sender, "_ours", real)
            if status == 409:
                server.fail_next("POST", "/commit/", 409, times=1)
                server.repos["acme/kept"].commit(heads_of_other(), "of another")
            else:
                send(recipe, other)

    def heads_of_other():
        tree = dict(server.repos["acme/kept"].commits[-1].tree)
        index = json.loads(tree["backup.json"].data) | {"writer": "another"}
        return tree | {"backup.json": tree["backup.json"]._replace(data=json.dumps(index).encode())}

    monkeypatch.setattr(backup._Sender, "_ours", ours)
    send(recipe, record, said)
    assert seen and "checkpoints/reward/step-00000005/manifest.json" not in heads(server)
    assert [r.status for r in server.sent("POST", "/commit/")].count(status) == 1
    assert record.data["clock"]["backup"]["failed"] == 1, "one look was enough"
    assert len([line for line in said.lines if "nothing more of it is sent" in line]) == 1


# --- paths, and where the copy lies --------------------------------------------------------------


@pytest.mark.parametrize(
    ("home", "text", "sent"),
    [("/", '{"a": "x/y", "b": "/etc/z"}', None),
     ("/home/ann", '{"a": "/home/anna/shared", "b": "/srv/home/ann"}', None),
     ("/home/ann", '{"a": "/home/ann/b", "c": "in\\n/home/ann, x"}',
      '{"a": "@@home@@/b", "c": "in\\n@@home@@, x"}')],
)  # fmt: skip
def test_only_whole_paths_are_replaced(tmp_path, monkeypatch, home, text, sent):
    recipe = asked(tmp_path / "data")
    monkeypatch.setenv("HOME", home)
    path, words = tmp_path / "x.json", snapshot.paths(recipe, tmp_path / "run")
    path.write_text(text)
    assert snapshot.swap(path, "x.json", words) is (sent is not None)
    assert path.read_text() == (sent or text)
    snapshot.swap(path, "x.json", {word: other for other, word in words.items()})
    assert path.read_text() == text


def test_the_copy_lies_on_the_disk_of_the_run_and_is_no_part_of_it(server, tmp_path, monkeypatch):
    recipe = asked(tmp_path / "data")
    record, seen = little(tmp_path / "run", recipe), []
    real = snapshot.make_ready

    def look(folder, *rest):
        weights = "adapters/sft/adapter_model.safetensors"
        seen.append((folder, (folder / weights).samefile(record.folder / weights)))
        record.seal()
        return real(folder, *rest)

    monkeypatch.setattr(snapshot, "make_ready", look)
    assert not send(recipe, record).lines
    assert seen == [(record.folder / "backup.tmp", True)] and not seen[0][0].exists()
    assert not [name for name in record.data["files"] if "backup" in name]
    assert "adapters/sft/adapter_model.safetensors" in record.data["files"]
    (record.folder / "backup.tmp" / "adapters").mkdir(parents=True)  # a second signal
    backup.prepare(recipe, record.folder, RecordingProgress())
    assert not (record.folder / "backup.tmp").exists()


def test_an_adapters_base_is_not_told_and_is_vouched_for_where_it_is_fetched(
    server, tmp_path, monkeypatch
):
    recipe = asked(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    record, name = little(tmp_path / "run", recipe), "adapters/sft/adapter_config.json"
    config = {"base_model_name_or_path": str(tmp_path / "me" / "base")}
    (record.folder / name).write_text(json.dumps(config))
    record.seal()
    send(recipe, record)
    assert json.loads(heads(server)[name])["base_model_name_or_path"] == "@@home@@/base"
    monkeypatch.setenv("HOME", str(tmp_path / "you"))
    other = fetch(recipe, tmp_path / "other")
    found = json.loads((other.folder / name).read_text())
    assert found["base_model_name_or_path"] == str(tmp_path / "you" / "base")
    assert other.data["files"][name] == sha256(other.folder / name)
