# SPDX-License-Identifier: Apache-2.0
"""Adapters come back from the Hub as they were pushed; pushes with a report, and collections."""

import json

import pytest
from hub_server import turn_to

from lora_rlhf.errors import HubError, UsageError
from lora_rlhf.hub import publishing, pulling, targets
from lora_rlhf.runs.disk import sha256, write_atomically

pytestmark = pytest.mark.hub


@pytest.fixture
def pushed(run, server, monkeypatch, tmp_path):
    """The local Hub with a policy."""
    turn_to(server, monkeypatch, tmp_path)
    server.add_repo("acme/base", {"config.json": b"{}"}, private=True)
    publishing.push(run, "policy", "acme/mine")
    return server


def test_an_adapter_comes_back_as_it_was(run, pushed, tmp_path):
    made = pulling.pull("acme/mine", tmp_path / "there")
    assert (made.base, made.verified, len(made.commit)) == ("acme/base", True, 40)
    ours = run.adapter("policy") / "adapter_model.safetensors"
    assert sha256(made.folder / ours.name) == sha256(ours)
    assert (made.folder / "README.md").is_file() and (made.folder / "check.json").is_file()
    [target] = targets.parse([str(made.folder)])
    assert (target.kind, target.base.id) == ("adapter", "acme/base")
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".pull")} == set()


def test_a_file_that_was_changed_after_the_push_is_refused(pushed, tmp_path):
    repo = pushed.repos["acme/mine"]
    record = json.loads(repo.files["record.json"])
    record["published"]["adapter_config.json"] = "0" * 64
    pushed.add_repo("acme/bad", {**repo.files, "record.json": json.dumps(record).encode()})
    with pytest.raises(HubError, match="adapter_config.json of acme/bad is not what its record"):
        pulling.pull("acme/bad", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_record_of_another_form_verifies_nothing(pushed, tmp_path):
    files = pushed.repos["acme/mine"].files
    pushed.add_repo("acme/odd", {**files, "record.json": b'{"published": ["adapter_model"]}'})
    assert not pulling.pull("acme/odd", tmp_path / "odd").verified


@pytest.mark.parametrize(
    ("repo", "files", "problem"),
    [
        ("acme/none", None, "cannot be read"),
        ("acme/empty", {"README.md": b"# no"}, "holds no adapter"),
        ("acme/text", {"adapter_config.json": b"[1"}, "is not a JSON object"),
        ("not an id", None, "cannot be read"),
    ],
)
def test_what_is_no_adapter_is_one_error(pushed, tmp_path, repo, files, problem):
    if files is not None:
        pushed.add_repo(repo, files)
    with pytest.raises(HubError, match=problem):
        pulling.pull(repo, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_existing_folder_is_left_alone(pushed, tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(UsageError, match="exists"):
        pulling.pull("acme/mine", tmp_path / "x")


def test_pushes_make_a_collection_once(run, pushed):
    ids = ["acme/mine", "datasets/acme/labels"]
    url = publishing.collect(run, "My run", ids)
    assert url == publishing.collect(run, "My run", ids)
    [collection] = pushed.collections.values()
    assert collection["private"] and url.endswith(collection["slug"])
    assert collection["items"] == [
        {"id": "acme/mine", "type": "model"},
        {"id": "acme/labels", "type": "dataset"},
    ]


def test_the_report_goes_along_only_if_it_is_wanted(run, pushed):
    assert "report.html" not in pushed.repos["acme/mine"].files
    import example_report

    write_atomically(run.folder / "report.json", json.dumps(example_report.report(prompts=4)))
    run.note(run.folder / "report.json")
    run.seal()
    publishing.push(run, "policy", "acme/mine", report=True)
    files = pushed.repos["acme/mine"].files
    assert {"report.json", "report.html"} <= set(files)
    assert b"<script src" not in files["report.html"]
