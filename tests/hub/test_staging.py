# SPDX-License-Identifier: Apache-2.0
"""What may not be published is refused before anything is sent, without a network."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from lora_rlhf.errors import DamageError, HubError, UsageError
from lora_rlhf.hub import staging
from lora_rlhf.runs.disk import sha256


def assert_refused(run, tmp_path, match, role="policy"):
    (tmp_path / "staged").mkdir()
    with pytest.raises((HubError, DamageError), match=match):
        staging.stage_adapter(run, role, "acme/p", tmp_path / "staged")


def resealed(run):
    run.data["files"] = {}
    run.seal()
    return run


def test_an_unfinished_stage_is_refused(run, tmp_path):
    run.data["stages"]["ppo"]["status"] = "interrupted"
    assert_refused(run, tmp_path, "has not finished the stage that makes the policy")


def test_a_run_that_is_not_sealed_is_refused(run, tmp_path):
    run.data["files"] = {}
    assert_refused(run, tmp_path, "does not list the run")


def test_an_unknown_role_is_refused(run, tmp_path):
    with pytest.raises(UsageError, match="one of policy"):
        staging.stage_adapter(run, "judge", "acme/p", tmp_path)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "check.json"]
)
def test_a_file_changed_since_the_run_is_refused(run, tmp_path, name):
    path = run.adapter("policy") / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert_refused(run, tmp_path, f"adapters/policy/{name}: its sha256 is not")


def test_a_recipe_changed_since_the_run_is_refused(run, tmp_path):
    path = run.folder / "recipe.yaml"
    path.write_text(path.read_text() + "seed: 9\n")
    assert_refused(run, tmp_path, "recipe.yaml: its sha256 is not")


@pytest.mark.parametrize(
    ("name", "why"), [("samples.jsonl", "its sha256 is not"), ("metrics.jsonl", "the lines of ppo")]
)
def test_samples_and_log_changed_since_the_run_are_refused(run, tmp_path, name, why):
    path = run.folder / name
    path.write_text(path.read_text().replace("0.", "9."))
    assert_refused(run, tmp_path, f"{name}: {why}")


def test_the_published_record_names_no_other_repositories_and_no_errors(run, tmp_path):
    run.data["clock"]["pushed"] = {"reward": {"repo_id": "acme/secret-reward", "commit": "abc"}}
    run.data["stages"]["value"] = {"status": "interrupted", "error": {"message": "in /x/y.json"}}
    (tmp_path / "staged").mkdir()
    staging.stage_adapter(run, "policy", "acme/p", tmp_path / "staged")
    text = (tmp_path / "staged" / "record.json").read_text()
    assert "secret-reward" not in text and "y.json" not in text
    assert json.loads(text)["clock"]["log"]["ppo"]["sha256"]
    assert "pushed" in run.data["clock"] and "error" in run.data["stages"]["value"]


def test_a_missing_file_is_refused(run, tmp_path):
    (run.adapter("policy") / "adapter_model.safetensors").unlink()
    assert_refused(run, tmp_path, "lacks adapter_model.safetensors")


def test_a_link_is_not_followed(run, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    path = run.adapter("policy") / "check.json"
    path.unlink()
    path.symlink_to(secret)
    assert_refused(resealed(run), tmp_path, "check.json is a link or not a regular file")


def set_last_value(path: Path, value: float, dtype: str = "F32"):
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
def test_weights_that_are_not_finite_are_refused(run, tmp_path, value, dtype):
    path = run.adapter("policy") / "adapter_model.safetensors"
    set_last_value(path, value, dtype)
    if value == 2.5:
        staging.check_finite(path)
        return
    assert_refused(resealed(run), tmp_path, "holds NaN or infinity")


@pytest.mark.parametrize("keep", [4, 12, 400, -8])
def test_truncated_weights_are_refused(run, tmp_path, keep):
    path = run.adapter("policy") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(resealed(run), tmp_path, "is not a readable safetensors file")


SECRETS = {
    "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH": "a Hugging Face token",
    "sk-proj-abcdef1234567890abcd": "an API key",
    "AKIAIOSFODNN7EXAMPLE": "an AWS key",
    "/home/alice/data/": "a path of somebody's home",
    "/Users/alice/x": "a path of somebody's home",
    "-----BEGIN RSA PRIVATE KEY-----": "a private key",
}


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_in_any_text_is_refused_and_not_printed(run, tmp_path, secret):
    record = run
    path = record.adapter("policy") / "check.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": f"x {secret} y"}))
    (tmp_path / "staged").mkdir()
    with pytest.raises(
        HubError, match=f"check.json holds what looks like {SECRETS[secret]}"
    ) as caught:
        staging.stage_adapter(resealed(record), "policy", "acme/p", tmp_path / "staged")
    assert secret not in str(caught.value)


def test_a_secret_in_a_sample_is_masked_on_the_card_and_does_not_stop_the_push(run, tmp_path):
    """The card is written without it; samples themselves are never published."""
    text = (run.folder / "samples.jsonl").read_text()
    token = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"
    (run.folder / "samples.jsonl").write_text(text.replace("ordinary answer", token))
    (tmp_path / "staged").mkdir()
    names = staging.stage_adapter(resealed(run), "policy", "acme/p", tmp_path / "staged")
    published = "".join((tmp_path / "staged" / name).read_text(errors="replace") for name in names)
    assert token not in published and "samples.jsonl" not in names
    card = (tmp_path / "staged" / "README.md").read_text()
    assert "&#42;&#42;&#42;" in card or "***" in card


def test_the_value_of_a_secret_variable_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    path = run.adapter("policy") / "chat_template.jinja"
    path.write_text(path.read_text() + "{# correct-horse-battery #}")
    assert_refused(resealed(run), tmp_path, "chat_template.jinja holds.*SOME_API_KEY")


def test_ordinary_words_are_not_secrets(tmp_path):
    words = "hf_transfer hf_hub_download risk-sk-averse task-1234567890123456 /home and /root"
    (tmp_path / "a.txt").write_text(words)
    staging.scan(tmp_path, ["a.txt"])


def test_another_base_than_the_run_was_trained_on_is_refused(run, finished, tmp_path):
    weights = finished.parent / "base" / "model.safetensors"
    run.data["model"]["weights"] = {weights.name: sha256(weights)}
    (tmp_path / "a").mkdir()
    assert weights.name in staging.stage_base(run, tmp_path / "a")
    run.data["model"]["weights"] = {weights.name: "0" * 64}
    with pytest.raises(HubError, match="is not what the run was trained on"):
        staging.stage_base(run, tmp_path / "a")


def test_a_base_folder_without_a_model_is_refused(run, tmp_path):
    for identity in (str(tmp_path / "none"), str(tmp_path)):
        run.data["model"]["id"] = identity
        with pytest.raises(HubError, match="there is no folder|holds no model"):
            staging.stage_base(run, tmp_path)
