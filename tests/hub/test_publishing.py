# SPDX-License-Identifier: Apache-2.0
"""Pushing: what leaves the machine, what never does, and whether others can load what arrives.

The push that is loaded again runs in processes of its own, as a user's would; what is refused and
what is retried is tested in this process, with the clients turned to the local Hub.
"""

import json
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import hub_run
import pytest
import yaml
from hub_server import HubServer, hub_env, turn_to
from huggingface_hub import constants

from lora_rlhf import pipeline
from lora_rlhf.errors import BaseModelError, HubError
from lora_rlhf.hub import publishing, repository, staging
from lora_rlhf.models.base_model import BaseModel
from lora_rlhf.recipe.loader import parse_recipe
from lora_rlhf.recipe.schema import LoraSection, ModelSection
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.record import Record

pytestmark = pytest.mark.hub

ALLOWED = {
    ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
    "check.json", "reward.json", "recipe.yaml", "record.json", "plots/training.png",
}  # fmt: skip


# --- the local Hub ----------------------------------------------------------------------------


@pytest.fixture
def server(server):
    server.add_repo("acme/base", {"config.json": b"{}"}, private=True)
    return server


@pytest.fixture
def here(server, monkeypatch, tmp_path):
    """Clients of this process turned to the local Hub; pauses are recorded, not waited for."""
    turn_to(server, monkeypatch, tmp_path)
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def writes(server):
    return [r for r in server.requests if r.method in ("POST", "PUT", "DELETE")]


# --- what arrives, and who can load it --------------------------------------------------------

PUSH = """
from lora_rlhf.hub import publishing as hub
from lora_rlhf.runs.record import Record
record = Record.read("run")
results = [hub.push_base(record, "acme/little-base")]
results += [hub.push(record, role, f"acme/little-{role}") for role in ROLES]
assert all(r["private"] for r in results), results
import sys
assert "torch" not in sys.modules
"""

LOAD = """
import re, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lora_rlhf":
            raise ImportError("this package must not be needed")

sys.meta_path.insert(0, Refuse())
import torch
from huggingface_hub import hf_hub_download

torch.set_num_threads(1)
for role in ROLES:
    path = hf_hub_download(f"acme/little-{role}", "README.md")
    blocks = re.findall(r"^```python\\n(.*?)^```", open(path).read(), re.S | re.M)
    assert len(blocks) == 3, blocks
    names = {}
    exec(blocks[0], names)
    exec(blocks[1], names)
    assert names["difference"] <= names["check"]["atol"], (role, names["difference"])
    with names["model"].disable_adapter(), torch.no_grad():
        bare = names["model"](input_ids=names["ids"], attention_mask=names["mask"]).logits
    bare = (bare[:, -1] if role != "reward" else bare).reshape(len(names["ids"]), -1)
    off = (bare[:, : names["expected"].shape[1]] - names["expected"]).abs().max()
    assert off > 0.01, "the check would not notice a missing adapter"
    if role == "reward":
        assert abs(names["reward"] - names["raw"] - 0.25) < 1e-6
    exec(blocks[2], merged := {})
    assert "lora" not in str(merged["merged"].state_dict().keys())
    with torch.no_grad():
        out = merged["merged"](input_ids=names["ids"], attention_mask=names["mask"]).logits
    out = (out[:, -1] if role != "reward" else out).reshape(len(names["ids"]), -1)
    assert (out[:, : names["expected"].shape[1]] - names["expected"]).abs().max() < 1e-4
assert "lora_rlhf" not in sys.modules
print("loaded")
"""


ROLES = ("policy", "reward", "value")


def python(code: str, server, tmp_path, where: Path) -> str:
    root = str(Path(__file__).resolve().parents[2])
    env = hub_env(server, tmp_path) | {"PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", f"ROLES = {ROLES}\n{textwrap.dedent(code)}"],
        env=env,
        cwd=where,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow  # two fresh interpreters; test_adapters.py loads with plain PEFT by default
def test_pushed_adapters_load_without_this_package(server, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    hub_run.make_finished(home, "value")
    python(PUSH, server, tmp_path, home)
    base = server.repos["acme/little-base"]
    assert base.private and len(base.commits) == 2
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(base.files)
    for role in ROLES:
        repo = server.repos[f"acme/little-{role}"]
        assert repo.private
        assert len(repo.commits) == 2  # the Hub's own first one, and one with all files
        assert set(repo.files) <= ALLOWED
        assert ALLOWED - set(repo.files) <= {"special_tokens_map.json", "reward.json"}
        assert ("reward.json" in repo.files) == (role == "reward")
        config = json.loads(repo.files["adapter_config.json"])
        assert config["base_model_name_or_path"] == "acme/little-base"
        assert config["revision"] == base.sha
        published = json.loads(repo.files["record.json"])["published"]
        assert set(published) == set(repo.files) - {".gitattributes", "record.json"}
        for name, data in repo.files.items():
            for private in (str(tmp_path), str(Path.home()) + "/"):
                assert private.encode() not in data, name
        meta = yaml.safe_load(repo.files["README.md"].decode().split("---\n")[1])
        assert meta["base_model"] == "acme/little-base"
        recipe = yaml.safe_load(repo.files["recipe.yaml"])
        assert recipe["data"]["prompts"][0]["path"] == "prompts.jsonl"
    assert python(LOAD, server, tmp_path, home).endswith("loaded\n")


def test_the_packaged_model_is_pushed_without_its_training_code(run, server, here):
    run.data["model"] |= {"id": "tiny", "hub_id": None, "license": "apache-2.0"}
    result = publishing.push_base(run, "acme/tiny")
    assert set(result["files"]) <= {"README.md", *staging.BASE, "model.safetensors"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(result["files"])
    assert Record.read(run.folder).data["model"]["hub_id"] == "acme/tiny"
    assert publishing.push(run, "policy", "acme/p")["private"]
    config = json.loads(server.repos["acme/p"].files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "acme/tiny"


# --- again and again --------------------------------------------------------------------------


def test_a_second_push_changes_nothing_and_a_new_card_is_one_commit(run, server, here):
    first = publishing.push(run, "policy", "acme/p")
    assert first["url"] == f"{server.url}/acme/p"
    again = publishing.push(run, "policy", "acme/p")
    assert again["commit"] == first["commit"] == server.repos["acme/p"].sha
    assert len(server.repos["acme/p"].commits) == 2
    run.data["clock"]["peak_memory_mb"] = 123.5
    publishing.push(run, "policy", "acme/p")
    assert len(server.repos["acme/p"].commits) == 3
    assert b"123.5" in server.repos["acme/p"].files["README.md"]
    assert len(server.sent("PUT", "^/_lfs/")) == 1  # the weights, once


def test_a_record_that_was_read_earlier_does_not_replace_the_newer_one(run, server, here):
    newer = Record.read(run.folder)
    newer.data["clock"]["peak_memory_mb"] = 123.5
    newer.save()
    publishing.push(run, "policy", "acme/p")
    kept = Record.read(run.folder).data["clock"]
    assert kept["peak_memory_mb"] == 123.5 and kept["pushed"]["policy"]["repo_id"] == "acme/p"
    assert b"123.5" in server.repos["acme/p"].files["README.md"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "whoami", 500), ("POST", "repos/create", 503), ("POST", "preupload", 502),
        ("POST", "objects/batch", 500), ("POST", "/commit/", 412), ("POST", "/commit/", 429),
        ("POST", "validate-yaml", 504), ("POST", "/commit/", 408), ("PUT", "^/_lfs/", 0),
        ("PUT", "^/_lfs/", -3), ("POST", "/commit/", -1),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (
            ("PUT", "^/_lfs/", 500), ("POST", "/commit/", 500), ("POST", "/commit/", 0),
            ("POST", "/commit/", -3), ("PUT", "^/_lfs/", -1), ("GET", "whoami", -1))),
    ],
)  # fmt: skip
def test_transient_faults_are_retried(run, server, here, impatient, method, path, status):
    server.fail_next(method, path, status, times=3)
    started = time.monotonic()
    publishing.push(run, "policy", "acme/p")
    assert here  # it paused
    assert time.monotonic() - started < 50, "a connection that is silent was waited for"
    assert [r.status for r in server.requests].count(status) == 3
    assert len(server.repos["acme/p"].commits) == 2
    assert set(server.repos["acme/p"].files) <= ALLOWED


@pytest.mark.parametrize("path", ["/commit/", "repos/create", "objects/batch"])
def test_a_lost_answer_makes_no_second_commit(run, server, here, path):
    server.fail_next("POST", path, 0, after=True)
    result = publishing.push(run, "policy", "acme/p")
    assert len(server.repos["acme/p"].commits) == 2
    assert result["commit"] == server.repos["acme/p"].sha


def test_retry_after_is_honoured(run, server, here):
    server.fail_next("POST", "/commit/", 429, headers={"Retry-After": "7"})
    publishing.push(run, "policy", "acme/p")
    assert 7 in here


def test_a_permanent_fault_names_the_command_to_try_again(run, server, here):
    before = {p: sha256(p) for p in run.folder.rglob("*") if p.is_file()}
    server.fail_next("POST", "/commit/", 500, times=10_000)
    with pytest.raises(HubError) as caught:
        publishing.push(run, "policy", "acme/p", public=True)
    assert f"lora-rlhf push {run.folder} --policy acme/p --public" in str(caught.value)
    assert "HTTP 500" in str(caught.value) and "hf_test" not in str(caught.value)
    assert len(server.sent("POST", "/commit/")) <= 1 + len(repository.PAUSES) + 5
    assert set(server.repos["acme/p"].files) == {".gitattributes"}  # nothing, or all with a card
    assert before == {p: sha256(p) for p in run.folder.rglob("*") if p.is_file()}


def test_an_unreachable_hub_is_a_hub_error(run, here, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="nothing that was trained is lost"):
        publishing.push(run, "policy", "acme/p")
    assert here == list(repository.PAUSES)


def test_a_large_base_is_one_commit_and_resumes_after_a_fault(run, server, here, tmp_path):
    """40 shards; after a permanent fault, only what is missing is sent again."""
    base = Path(run.data["model"]["id"])
    big, shards = tmp_path / "big", 40
    shutil.copytree(base, big)
    weights = (big / "model.safetensors").read_bytes()
    (big / "model.safetensors").unlink()
    size = int.from_bytes(weights[:8], "little")
    for i in range(1, shards + 1):  # the same tensors under another length of header: other files
        header = weights[8 : 8 + size] + b" " * (8 * i)
        name = f"model-{i:05d}-of-{shards:05d}.safetensors"
        (big / name).write_bytes(len(header).to_bytes(8, "little") + header + weights[8 + size :])
    run.data["model"] |= {"id": str(big), "weights": {}}
    third = sorted(big.glob("model-*"))[2]
    server.fail_next("PUT", sha256(third), 500, times=10_000)
    with pytest.raises(HubError, match="--base acme/big"):
        publishing.push_base(run, "acme/big")
    assert set(server.repos["acme/big"].files) == {".gitattributes"}
    server._faults.clear()
    done = {r.path for r in server.sent("PUT", "^/_lfs/") if r.status == 200}
    before = len(server.requests)
    result = publishing.push_base(run, "acme/big")
    sent = [r.path for r in server.requests[before:] if r.method == "PUT"]
    assert len(sent) == shards - len(done) and not done & {*sent}
    assert len(result["files"]) > shards and len(server.repos["acme/big"].commits) == 2
    assert {"README.md", third.name} <= set(server.repos["acme/big"].files)


@pytest.mark.parametrize("fault", [500, 403, -1])
def test_a_failed_push_leaves_the_run_done(run, server, here, impatient, monkeypatch, fault):
    """Exit code 0, what happened and the exact command on the screen; the next call pushes."""
    lines = []
    progress = SimpleNamespace(say=lines.append)
    wanted = recipe(hub={"policy": "acme/p", "reward": "acme/r"})
    server.fail_next("POST", "acme/p/commit/", fault, times=10_000)
    pipeline._push(wanted, run, progress)
    assert f"`lora-rlhf push {run.folder} --policy acme/p`" in lines[0]
    assert "the policy adapter is not pushed" in lines[0] and "pushed reward to" in lines[1]
    assert set(server.repos["acme/p"].files) == {".gitattributes"}
    server._faults.clear()
    pipeline._push(wanted, Record.read(run.folder), progress)
    assert "pushed policy to" in lines[2] and len(lines) == 3
    assert "README.md" in server.repos["acme/p"].files


def test_a_gated_base_says_where_to_request_access(server, here):
    server.add_repo("acme/shy", {"config.json": b"{}"})
    server.gated.add("acme/shy")
    with pytest.raises(BaseModelError, match="acme/shy is gated") as caught:
        BaseModel.load(ModelSection(id="acme/shy"), LoraSection())
    assert "accept its terms on its page" in caught.value.remedy and caught.value.exit_code == 4


# --- visibility -------------------------------------------------------------------------------


def test_repositories_are_private_unless_asked_otherwise(run, server, here):
    assert publishing.push(run, "policy", "acme/p")["private"] is True
    result = publishing.push(run, "reward", "tester/r", public=True)
    assert result["private"] is False and not server.repos["tester/r"].private
    assert result["notes"] == ["acme/base is private: others cannot load this adapter"]


def test_a_private_push_to_a_public_repository_is_refused(run, server, here):
    server.add_repo("acme/p", private=False)
    with pytest.raises(HubError, match="public repository"):
        publishing.push(run, "policy", "acme/p")
    assert not writes(server)


def test_a_private_repository_stays_private(run, server, here):
    server.add_repo("acme/p", private=True)
    result = publishing.push(run, "policy", "acme/p", public=True)
    assert server.repos["acme/p"].private and result["private"]
    assert "stays so" in result["notes"][0]


# --- refused before anything is sent ----------------------------------------------------------


@pytest.mark.parametrize("repo_id", ["p", "a/b/c", "acme/p q", "acme/..", "/p", "acme/", ""])
def test_a_bad_repository_id(run, server, here, repo_id):
    with pytest.raises(HubError, match="organisation/name"):
        publishing.push(run, "policy", repo_id)
    assert not server.requests


def test_no_token(run, server, here, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login"):
        publishing.push(run, "policy", "acme/p")
    assert not server.requests


def test_a_wrong_token_is_not_printed(run, server, here):
    with pytest.raises(HubError, match="HTTP 401") as caught:
        publishing.push(run, "policy", "acme/p", token="hf_wrong_secret")
    assert "hf_wrong_secret" not in str(caught.value)
    assert not writes(server)


def test_offline_names_what_is_skipped(run, server, here, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="push of the policy adapter to acme/p is skipped"):
        publishing.push(run, "policy", "acme/p")
    assert not server.requests


def test_another_namespace_is_refused(run, server, here):
    with pytest.raises(HubError, match="not a member of strangers"):
        publishing.push(run, "policy", "strangers/p")
    assert not writes(server)


def test_a_read_only_token_is_refused(run, server, here):
    server.role = "read"
    with pytest.raises(HubError, match="only read"):
        publishing.push(run, "policy", "acme/p")
    assert not writes(server)


def test_a_fine_grained_token_needs_write_access_there(run, server, here, monkeypatch):
    def token(name, *permissions):
        scoped = [{"entity": {"name": name}, "permissions": list(permissions)}]
        access = {"role": "fineGrained", "fineGrained": {"scoped": scoped}}
        me = {"name": "tester", "orgs": [{"name": "acme"}], "auth": {"accessToken": access}}
        monkeypatch.setattr(repository.HfApi, "whoami", lambda self: me)

    for entity, permission in (("acme", "repo.content.read"), ("tester", "repo.write")):
        token(entity, permission)
        with pytest.raises(HubError, match="fine-grained"):
            publishing.push(run, "policy", "acme/p")
    assert not writes(server)
    token("acme", "repo.content.read", "repo.write")
    assert publishing.push(run, "policy", "acme/p")["commit"]


def test_a_base_that_is_not_on_the_hub_is_refused(run, server, here):
    run.data["model"]["hub_id"] = "acme/elsewhere"
    with pytest.raises(HubError, match=f"push {run.folder} --base acme/elsewhere"):
        publishing.push(run, "policy", "acme/p")
    assert not writes(server)


def test_a_local_base_is_refused(run, server, here):
    run.data["model"]["hub_id"] = None
    with pytest.raises(HubError, match="--base org/name.*model.hub_id"):
        publishing.push(run, "policy", "acme/p")
    assert not server.requests


# --- before training --------------------------------------------------------------------------


def recipe(**sections):
    text = yaml.safe_dump({"name": "x", "model": {"id": "acme/base"}} | sections)
    return parse_recipe(text, "recipe.yaml")


def test_check_pushes_sends_no_request_if_nothing_is_to_be_pushed(server, here):
    assert publishing.check_pushes(recipe()) == []
    assert not server.requests


def test_check_pushes_writes_nothing(server, here):
    assert publishing.check_pushes(recipe(hub={"policy": "acme/p", "reward": "tester/r"})) == []
    assert server.sent("GET", "whoami") and not writes(server)


def test_check_pushes_offline_names_what_is_skipped(server, here, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    [note] = publishing.check_pushes(recipe(hub={"policy": "acme/p"}))
    assert "not pushed: policy to acme/p" in note
    assert not server.requests


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"hub": {"policy": "strangers/p"}}, "not a member of strangers"),
        ({"hub": {"policy": "p"}}, "organisation/name"),
        ({"hub": {"policy": "acme/p"}, "model": {"id": "tiny"}}, "--base org/name"),
        ({"hub": {"policy": "acme/p"}, "model": {"id": "/no/where"}}, "--base org/name"),
        ({"hub": {"policy": "acme/p"}, "model": {"id": "acme/none"}}, "is not on the Hub"),
        ({"hub": {"policy": "acme/open"}}, "public repository"),
    ],
)
def test_check_pushes_refuses_before_training(server, here, sections, match):
    server.add_repo("acme/open", private=False)
    with pytest.raises(HubError, match=match):
        publishing.check_pushes(recipe(**sections))
    assert not writes(server)


def test_check_pushes_says_how_to_publish_a_local_base(server, here):
    wanted = recipe(hub={"policy": "acme/p"}, model={"id": "tiny"})
    with pytest.raises(HubError, match="train without `hub:` first"):
        publishing.check_pushes(wanted)


def test_check_pushes_finds_the_published_base_in_the_record(run, server, here):
    wanted = recipe(hub={"policy": "acme/p"}, model={"id": "tiny"})
    assert publishing.check_pushes(wanted, run) == []  # the record names acme/base
    run.data["model"]["hub_id"] = None
    with pytest.raises(HubError, match="--base org/name"):
        publishing.check_pushes(wanted, run)


def test_check_pushes_sends_no_request_for_what_is_pushed_already(run, server, here, monkeypatch):
    publishing.push(run, "policy", "acme/p")
    before = len(server.requests)
    monkeypatch.delenv("HF_TOKEN")
    assert publishing.check_pushes(recipe(hub={"policy": "acme/p"}), Record.read(run.folder)) == []
    assert len(server.requests) == before
    with pytest.raises(HubError, match="no token"):
        publishing.check_pushes(recipe(hub={"policy": "acme/other"}), run)


@pytest.mark.parametrize(
    ("card", "licence"),
    [({"license": "mit"}, "mit"), ({"license": "other", "license_name": "own"}, "own"),
     ({"license": "other"}, "other"), ({"license": ["a", "b"]}, None), ({}, None), (None, None)],
)  # fmt: skip
def test_the_licence_of_a_base_is_read_from_its_card(server, here, monkeypatch, card, licence):
    requests = []

    def model_info(self, repo_id, **options):
        requests.append((repo_id, options["revision"]))
        return SimpleNamespace(card_data=card, private=False)

    monkeypatch.setattr(repository.HfApi, "model_info", model_info)
    assert repository.base_licence({"id": "acme/base", "revision": "c0ffee"}) == licence
    assert requests == [("acme/base", "c0ffee")]


def test_a_licence_out_of_reach_is_none(server, here, monkeypatch):
    assert repository.base_licence({"id": "acme/nowhere", "revision": None}) is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(server.requests)
    assert repository.base_licence({"id": "acme/base", "revision": None}) is None
    assert len(server.requests) == before


def test_check_pushes_needs_a_token_with_write_access(server, here, monkeypatch):
    wanted = recipe(hub={"policy": "acme/p"})
    server.role = "read"
    with pytest.raises(HubError, match="only read"):
        publishing.check_pushes(wanted)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no token"):
        publishing.check_pushes(wanted)


NONSENSE = [
    ("GET", "whoami", []), ("GET", "whoami", "hello"), ("GET", "whoami", {"orgs": [{}]}),
    ("GET", "whoami", {"orgs": 7, "auth": []}), ("GET", "/api/models/", []),
    ("GET", "/api/models/", {}), ("GET", "/api/models/", "<html>"), ("POST", "repos/create", []),
    ("POST", "/commit/", []), ("POST", "/commit/", {}), ("POST", "preupload", {}),
    ("POST", "preupload", []),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body"), NONSENSE)
def test_an_answer_that_makes_no_sense_is_one_error(run, server, here, method, path, body):
    server.fail_next(method, path, 200, times=99, body=body)
    with pytest.raises(HubError) as caught:
        publishing.push(run, "policy", "acme/p")
    assert "acme/" in str(caught.value) and caught.value.remedy


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "whoami"), ("GET", "/api/models/"), ("POST", "repos/create"), ("POST", "/commit/")],
)
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_elsewhere_is_one_error_and_takes_no_token(
    run, server, here, method, path, status
):
    with HubServer(user="stranger") as elsewhere:
        to = {"Location": f"{elsewhere.url}/api/trap"}
        server.fail_next(method, path, status, times=99, headers=to)
        with pytest.raises(HubError) as caught:
            publishing.push(run, "policy", "acme/p")
        assert "acme/" in str(caught.value) and caught.value.remedy
        assert not any("authorization" in request.headers for request in elsewhere.requests)


def test_escapes_of_the_hubs_error_do_not_reach_the_screen(run, server, here):
    text = "\x1b]0;owned\x07\x9b31m\u202e"
    server.fail_next("GET", "whoami", 403, times=99, body={"error": text})
    with pytest.raises(HubError, match="owned") as caught:
        publishing.push(run, "policy", "acme/p")
    assert not set(text) & set("\x1b\x07\x9b\u202e") & set(str(caught.value))
