# SPDX-License-Identifier: Apache-2.0
"""The local Hub is one: the real clients, in a process of their own, cannot tell.

What runs there is a `client_*` function of this file, started by `client(...)`, so that the
environment is set before huggingface_hub is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer, hub_env

pytestmark = pytest.mark.hub

HERE = Path(__file__).parent
CARD = "---\nbase_model: acme/base\nlibrary_name: peft\ntags: [lora]\n---\n# x\n"


@pytest.fixture
def hub():
    with HubServer(user="tester", token="hf_test", orgs=("acme",)) as server:
        yield server


def client(hub: HubServer, tmp_path: Path, name: str) -> dict:
    """Run one `client_*` function below against this Hub; what it returns comes back."""
    code = f"import test_hub_protocol as t; t.report(t.{name}())"
    env = hub_env(hub, tmp_path) | {"PYTHONPATH": f"{HERE}:{HERE.parent / 'support'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def report(result: dict) -> None:
    print("\n" + json.dumps(result), flush=True)
    os._exit(0)  # torch takes a second to leave


def error_of(call, *args, **kwargs) -> str:
    """The name and HTTP status of what a call raises."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", "")
        return f"{type(error).__name__} {status}".strip()
    return "nothing"


def adapter_folder(where: str, card: str = CARD) -> Path:
    """Something of an adapter's shape: a small text, a card, a file that goes through LFS."""
    folder = Path(where)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"r": 2}')
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "README.md").write_text(card)
    return folder


# --- a backbone and its adapter, there and back ------------------------------------------------


def client_round_trip() -> dict:
    import torch
    from huggingface_hub import HfApi, snapshot_download
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    api, ids = HfApi(), torch.arange(12).view(2, 6)
    base = LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()
    base.push_to_hub("acme/base", private=True)
    base = AutoModelForCausalLM.from_pretrained("acme/base")
    policy = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False)).eval()
    with torch.no_grad():
        before = policy(ids).logits
    policy.save_pretrained("policy")
    url = api.create_repo("acme/policy", private=True)
    first = api.upload_folder(repo_id="acme/policy", folder_path="policy")
    again = api.upload_folder(repo_id="acme/policy", folder_path="policy")
    info = api.model_info("acme/policy", files_metadata=True)
    pinned = api.model_info("acme/policy", revision=first.oid)
    folder = Path(snapshot_download("acme/policy"))
    fresh = AutoModelForCausalLM.from_pretrained("acme/base")
    loaded = PeftModel.from_pretrained(fresh, "acme/policy").eval()
    with torch.no_grad():
        gap = (loaded(ids).logits - before).abs().max().item()
        with loaded.disable_adapter():
            moved = (before - loaded(ids).logits).abs().max().item()
    lfs = {s.rfilename: s.lfs.size for s in info.siblings if s.lfs}
    return {
        "url": url,
        "oids": [first.oid, again.oid, info.sha, pinned.sha, folder.name],
        "gap": gap,
        "private": info.private,
        "lfs": lfs,
        "siblings": [s.rfilename for s in info.siblings],
        "snapshot": [p.name for p in folder.iterdir()],
        "base": loaded.peft_config["default"].base_model_name_or_path,
        "adapted": moved > 0.01,
    }


@pytest.mark.slow
def test_backbone_and_adapter_there_and_back(hub, tmp_path):
    got = client(hub, tmp_path, "client_round_trip")
    repo = hub.repos["acme/policy"]
    names = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert got["url"] == f"{hub.url}/acme/policy"
    assert repo.private and got["private"] and hub.repos["acme/base"].private
    assert set(got["oids"]) == {repo.sha}, "the second upload made a commit"
    assert set(repo.files) == set(got["siblings"]) == names
    assert set(got["snapshot"]) == names
    weights = repo.files["adapter_model.safetensors"]
    assert (tmp_path / "policy" / "adapter_model.safetensors").read_bytes() == weights
    assert got["lfs"] == {"adapter_model.safetensors": len(weights)}
    assert repo.lfs_paths == {"adapter_model.safetensors"}
    assert got["gap"] < 1e-6 and got["adapted"] and got["base"] == "acme/base"
    assert len(hub.sent("PUT", "^/_lfs/")) == 2, "one per safetensors file, none when repeated"


# --- the rules ---------------------------------------------------------------------------------


def client_rules() -> dict:
    from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download

    api, nobody = HfApi(), HfApi(token=False)
    folder = adapter_folder("x")
    who = api.whoami()
    api.create_repo("acme/x", private=True)
    first = api.create_repo("x", exist_ok=True)
    twice = api.create_repo("x", exist_ok=True)
    head = api.upload_folder(repo_id="acme/x", folder_path=folder)
    adding = [CommitOperationAdd("more/notes.txt", b"1")]
    more = api.create_commit("acme/x", adding, commit_message="m", parent_commit=head.oid)
    old = Path(snapshot_download("acme/x", revision=head.oid))
    late = [CommitOperationAdd("late.txt", b"2")]
    local = adapter_folder("local", CARD.replace("acme/base", "/home/someone/base"))
    out = {
        "who": [who["name"], [org["name"] for org in who["orgs"]]],
        "urls": [first, twice],
        "tags": api.model_info("acme/x").tags,
        "tree": sorted(e.path for e in api.list_repo_tree("acme/x", recursive=True)),
        "top": sorted(e.path for e in api.list_repo_tree("acme/x")),
        "exists": [api.file_exists("acme/x", f) for f in ("README.md", "absent")],
        "old": sorted(p.name for p in old.iterdir()),
        "now": Path(snapshot_download("acme/x")).name == more.oid,
        "taken": error_of(api.create_repo, "x"),
        "stranger": error_of(api.create_repo, "other/x"),
        "their repo": error_of(api.upload_folder, repo_id="other/open", folder_path=folder),
        "their secret": error_of(api.model_info, "other/secret"),
        "nobody": error_of(nobody.model_info, "acme/x"),
        "nobody reads": error_of(nobody.hf_hub_download, "other/open", "config.json"),
        "nobody writes": error_of(nobody.create_repo, "other/x"),
        "absent repo": error_of(api.model_info, "acme/absent"),
        "absent revision": error_of(api.model_info, "acme/x", revision="0" * 40),
        "absent file": error_of(api.hf_hub_download, "acme/x", "absent"),
        "absent folder": error_of(lambda: list(api.list_repo_tree("acme/x", "absent"))),
        "local base": error_of(api.upload_folder, repo_id="acme/x", folder_path=local),
        "late": error_of(
            api.create_commit, "acme/x", late, commit_message="m", parent_commit=head.oid
        ),
    }
    api.update_repo_settings("acme/x", private=False)
    out["public"] = error_of(nobody.model_info, "acme/x")
    api.delete_file("more/notes.txt", "acme/x")
    api.delete_repo("tester/x")
    return out


def test_rules(hub, tmp_path):
    hub.add_repo("other/open", {"config.json": b"{}"})
    hub.add_repo("other/secret", private=True)
    got = client(hub, tmp_path, "client_rules")
    names = [".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert got == {
        "who": ["tester", ["acme"]],
        "urls": [f"{hub.url}/tester/x"] * 2,
        "tags": ["lora"],
        "tree": [*names, "more", "more/notes.txt"],
        "top": [*names, "more"],
        "exists": [True, False],
        "old": names,
        "now": True,
        "taken": "HfHubHTTPError 409",
        "stranger": "HfHubHTTPError 403",
        "their repo": "HfHubHTTPError 403",
        "their secret": "RepositoryNotFoundError 404",
        "nobody": "RepositoryNotFoundError 401",
        "nobody reads": "nothing",
        "nobody writes": "HfHubHTTPError 401",
        "absent repo": "RepositoryNotFoundError 404",
        "absent revision": "RevisionNotFoundError 404",
        "absent file": "RemoteEntryNotFoundError 404",
        "absent folder": "RemoteEntryNotFoundError 404",
        "local base": "ValueError",
        "late": "HfHubHTTPError 412",
        "public": "nothing",
    }
    assert set(hub.repos) == {"acme/x", "other/open", "other/secret"}
    assert set(hub.repos["acme/x"].files) == set(names) and not hub.repos["acme/x"].private


def client_no_rights() -> dict:
    from huggingface_hub import HfApi

    return {
        name: [
            error_of(api.whoami),
            error_of(api.model_info, "acme/x"),
            error_of(api.create_repo, "acme/y"),
        ]
        for name, api in (("reads", HfApi()), ("wrong", HfApi(token="hf_wrong")))
    }


def test_a_token_that_may_only_read_and_a_wrong_one(tmp_path):
    with HubServer(role="read") as hub:
        hub.add_repo("acme/x", private=True)
        got = client(hub, tmp_path, "client_no_rights")
        assert got["reads"] == ["nothing", "nothing", "HfHubHTTPError 403"]
        assert got["wrong"] == ["HfHubHTTPError 401"] * 3
        assert set(hub.repos) == {"acme/x"}


# --- a bad day ---------------------------------------------------------------------------------


def client_bad_day() -> dict:
    from huggingface_hub import HfApi

    api, folder = HfApi(), adapter_folder("x")
    api.create_repo("acme/x")
    push = {"repo_id": "acme/x", "folder_path": folder}
    return {"tries": [error_of(api.upload_folder, **push) for _ in range(4)]}


def test_faults_are_injected_and_the_upload_is_resumed(hub, tmp_path):
    hub.fail_next("PUT", "^/_lfs/", 403)  # a status that the client does not retry by itself
    hub.fail_next("POST", "/commit/main$", 500)
    hub.fail_next("POST", "/commit/main$", 0, after=True)  # committed, and the answer lost
    got = client(hub, tmp_path, "client_bad_day")
    dropped = "RemoteProtocolError"
    assert got["tries"] == ["RuntimeError", "HfHubHTTPError 500", dropped, "nothing"]
    assert [r.status for r in hub.sent("PUT", "^/_lfs/")] == [403, 200]
    assert [r.status for r in hub.sent("POST", "/commit/main$")] == [500, 0]
    assert len(hub.repos["acme/x"].commits) == 2


# --- data --------------------------------------------------------------------------------------


def client_data() -> dict:
    import datasets
    from huggingface_hub import HfApi

    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b"}] * 3)
    rows.push_to_hub("acme/pairs", private=True)
    back = datasets.load_dataset("acme/pairs", split="train")
    info = HfApi().dataset_info("acme/pairs")
    missing = error_of(datasets.load_dataset, "acme/absent")
    return {"rows": back.to_list(), "private": info.private, "sha": info.sha, "missing": missing}


@pytest.mark.slow  # a process that imports datasets
def test_data_there_and_back(hub, tmp_path):
    got = client(hub, tmp_path, "client_data")
    repo = hub.repos["datasets/acme/pairs"]
    assert got["rows"] == [{"prompt": "a", "chosen": "b"}] * 3
    assert got["private"] and repo.private and got["sha"] == repo.sha
    assert any(path.endswith(".parquet") for path in repo.lfs_paths)
    assert got["missing"] == "DatasetNotFoundError"
