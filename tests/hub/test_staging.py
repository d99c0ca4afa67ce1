# SPDX-License-Identifier: Apache-2.0
"""What may not leave the machine is found before anything is sent; no network is needed to know."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hub_run import make_finished

from lora_rlhf.errors import HubError, UsageError
from lora_rlhf.hub import staging
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.record import Record


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return make_finished(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def run(finished, tmp_path) -> Record:
    """A copy to spoil, with a base on the Hub."""
    shutil.copytree(finished, tmp_path / "run")
    record = Record.read(tmp_path / "run")
    record.data["model"] |= {"hub_id": "acme/base"}
    record.save()
    return record


def refused(run, tmp_path, match, role="policy"):
    (tmp_path / "staged").mkdir()
    with pytest.raises(HubError, match=match):
        staging.stage_adapter(run, role, "acme/p", tmp_path / "staged")


def resealed(run):
    run.data["files"] = {}
    run.seal()
    return run


def test_nothing_is_staged_of_an_unfinished_stage(run, tmp_path):
    run.data["stages"]["ppo"]["status"] = "interrupted"
    refused(run, tmp_path, "has not finished the stage that makes the policy")


def test_nothing_is_staged_of_a_run_that_is_not_sealed(run, tmp_path):
    run.data["files"] = {}
    refused(run, tmp_path, "does not say yet")


def test_an_unknown_role(run, tmp_path):
    with pytest.raises(UsageError, match="one of policy"):
        staging.stage_adapter(run, "judge", "acme/p", tmp_path)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "check.json"]
)
def test_a_file_that_changed_since_the_run(run, tmp_path, name):
    path = run.adapter("policy") / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(run, tmp_path, f"adapters/policy/{name} is not the file")


def test_a_recipe_that_changed_since_the_run(run, tmp_path):
    path = run.folder / "recipe.yaml"
    path.write_text(path.read_text() + "seed: 9\n")
    refused(run, tmp_path, "recipe.yaml is not the file")


@pytest.mark.parametrize("name", ["samples.jsonl", "metrics.jsonl"])
def test_what_the_card_is_made_from_must_be_what_the_run_wrote(run, tmp_path, name):
    path = run.folder / name
    path.write_text(path.read_text().replace("0.", "9.") + "\n")
    refused(run, tmp_path, f"{name} is not the file")


def test_the_published_record_tells_nothing_of_other_repositories_or_errors(run, tmp_path):
    run.data["clock"]["pushed"] = {"reward": {"repo_id": "acme/secret-reward", "commit": "abc"}}
    run.data["stages"]["value"] = {"status": "interrupted", "error": {"message": "in /x/y.json"}}
    (tmp_path / "staged").mkdir()
    staging.stage_adapter(run, "policy", "acme/p", tmp_path / "staged")
    text = (tmp_path / "staged" / "record.json").read_text()
    assert "secret-reward" not in text and "y.json" not in text
    assert json.loads(text)["clock"]["metrics_sha256"]
    assert "pushed" in run.data["clock"] and "error" in run.data["stages"]["value"]


def test_a_missing_file(run, tmp_path):
    (run.adapter("policy") / "adapter_model.safetensors").unlink()
    refused(run, tmp_path, "lacks adapter_model.safetensors")


def test_a_link_is_not_followed(run, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    path = run.adapter("policy") / "check.json"
    path.unlink()
    path.symlink_to(secret)
    refused(resealed(run), tmp_path, "check.json is a link")


def spoil(path: Path, value: float, dtype: str = "F32"):
    """Write `value` into the last number of a safetensors file, or one of another type."""
    data = path.read_bytes()
    if dtype == "F32":
        path.write_bytes(data[:-4] + struct.pack("<f", value))
        return
    raw = (np.array([1.0, value], "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    if dtype == "F16":
        raw = np.array([1.0, value], "<f2").tobytes()
    header = json.dumps({"lora_A": {"dtype": dtype, "shape": [2], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.5])
def test_weights_that_are_not_finite(run, tmp_path, value, dtype):
    path = run.adapter("policy") / "adapter_model.safetensors"
    spoil(path, value, dtype)
    if value == 2.5:
        staging.finite(path)
        return
    refused(resealed(run), tmp_path, "holds NaN or infinity")


@pytest.mark.parametrize("keep", [4, 12, 400, -8])
def test_weights_that_are_cut_short(run, tmp_path, keep):
    path = run.adapter("policy") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(resealed(run), tmp_path, "no readable safetensors file")


SECRETS = {
    "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH": "a Hugging Face token",
    "sk-proj-abcdef1234567890abcd": "an API key",
    "AKIAIOSFODNN7EXAMPLE": "an AWS key",
    "/home/alice/data/": "a path of somebody's home",
    "/Users/alice/x": "a path of somebody's home",
    "-----BEGIN RSA PRIVATE KEY-----": "a private key",
}


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_in_any_text_is_refused_and_not_shown(run, tmp_path, secret):
    record = run
    path = record.adapter("policy") / "check.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": f"x {secret} y"}))
    (tmp_path / "staged").mkdir()
    with pytest.raises(
        HubError, match=f"check.json holds what looks like {SECRETS[secret]}"
    ) as caught:
        staging.stage_adapter(resealed(record), "policy", "acme/p", tmp_path / "staged")
    assert secret not in str(caught.value)


def test_a_secret_in_a_sample_is_on_no_card_and_stops_no_push(run, tmp_path):
    """The card is written without it; samples themselves are never published."""
    text = (run.folder / "samples.jsonl").read_text()
    token = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"
    (run.folder / "samples.jsonl").write_text(text.replace("ordinary answer", token))
    (tmp_path / "staged").mkdir()
    names = staging.stage_adapter(resealed(run), "policy", "acme/p", tmp_path / "staged")
    found = "".join((tmp_path / "staged" / name).read_text(errors="replace") for name in names)
    assert token not in found and "samples.jsonl" not in names
    card = (tmp_path / "staged" / "README.md").read_text()
    assert "&#42;&#42;&#42;" in card or "***" in card


def test_a_secret_of_the_environment_is_found(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    path = run.adapter("policy") / "chat_template.jinja"
    path.write_text(path.read_text() + "{# correct-horse-battery #}")
    refused(resealed(run), tmp_path, "chat_template.jinja holds.*SOME_API_KEY")


def test_ordinary_words_are_no_secrets(tmp_path):
    words = "hf_transfer hf_hub_download risk-sk-averse task-1234567890123456 /home and /root"
    (tmp_path / "a.txt").write_text(words)
    staging.scan(tmp_path, ["a.txt"])


def test_a_base_that_is_not_what_the_run_was_trained_on(run, finished, tmp_path):
    weights = finished.parent / "base" / "model.safetensors"
    run.data["model"]["weights"] = {weights.name: sha256(weights)}
    (tmp_path / "a").mkdir()
    assert weights.name in staging.stage_base(run, tmp_path / "a")
    run.data["model"]["weights"] = {weights.name: "0" * 64}
    with pytest.raises(HubError, match="is not what the run was trained on"):
        staging.stage_base(run, tmp_path / "a")


def test_a_base_folder_without_a_model(run, tmp_path):
    for identity in (str(tmp_path / "none"), str(tmp_path)):
        run.data["model"]["id"] = identity
        with pytest.raises(HubError, match="there is no folder|holds no model"):
            staging.stage_base(run, tmp_path)
