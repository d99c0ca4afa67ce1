# SPDX-License-Identifier: Apache-2.0
"""Exports: what a folder holds is what was trained, or there is no folder."""

import json
import shutil

import pytest
import small
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lora_rlhf
from lora_rlhf.errors import DamageError, DiskError, UsageError
from lora_rlhf.exports import export_card, export_run, merging
from lora_rlhf.models import adapters
from lora_rlhf.models.plain_adapters import PlainAdapters
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.record import Record
from lora_rlhf.serving import loaded_run
from lora_rlhf.training.reward import ensemble

EPISODE = [5, 6, 7], [8, 9, small.EOS]


@pytest.fixture(scope="module")
def run(runs):
    return runs.after("evaluate")


@pytest.fixture(scope="module")
def backbone(run):
    return loaded_run.load(run)[0]


def test_a_merged_policy_answers_as_the_run_does_in_plain_transformers(run, backbone, tmp_path):
    out = tmp_path / "made" / "policy"
    entry = lora_rlhf.export(run, out)
    assert entry["merging"]["kl_per_token"] <= 1e-9 and entry["merging"]["top1_agreement"] == 1
    assert entry == json.loads((out / "export.json").read_text())
    assert entry["files"].keys() == {p.name for p in out.iterdir()} - {"export.json"}
    for name, file in entry["files"].items():
        assert file == {"bytes": (out / name).stat().st_size, "sha256": sha256(out / name)}
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([EPISODE[0] + EPISODE[1]])
    with backbone.role("policy"), torch.no_grad():
        wanted = backbone.causal(input_ids=ids).logits
        assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-4)
    assert not any("lora" in name for name in model.state_dict())
    assert AutoTokenizer.from_pretrained(out).chat_template == backbone.tokenizer.chat_template
    config, card = (out / "config.json").read_text(), (out / "README.md").read_text()
    assert json.loads(config)["rope_theta"] == model.config.rope_parameters["rope_theta"]
    assert str(run) not in config + card + (out / "export.json").read_text()
    assert "kl per token" in card and entry["adapter_sha256"][:16] in card


def test_a_merged_reward_model_scores_as_the_run_does(run, backbone, tmp_path):
    entry = lora_rlhf.export(run, tmp_path / "reward", role="reward")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    section = Record.read(run).recipe().reward
    [wanted] = ensemble.scores(backbone, [EPISODE], section).rewards
    with torch.no_grad():
        score = model(input_ids=torch.tensor([EPISODE[0] + EPISODE[1]])).logits
    assert score.shape == (1, 1)
    assert float(score) + model.config.reward_offset == pytest.approx(wanted, abs=1e-4)
    assert entry["reward_offset"] == model.config.reward_offset != 0
    assert entry["merging"]["largest_score_difference"] < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"role": "value"}, "policy, sft, reward"), ({"to": "onnx"}, "gguf-adapter, mlx, ollama"),
     ({"dtype": "q8_0"}, "float32, bfloat16, float16"),
     ({"role": "reward", "to": "gguf"}, "cannot return scores")],
)  # fmt: skip
def test_what_is_refused_before_anything_is_loaded(run, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(merging, "merge_role", None)
    with pytest.raises(UsageError, match=message):
        lora_rlhf.export(run, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_role_that_no_stage_made_is_refused(runs, tmp_path):
    with pytest.raises(UsageError, match="no finished policy"):
        lora_rlhf.export(runs.after("sft"), tmp_path / "out")


def test_an_existing_folder_stays_as_it_is(run, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        lora_rlhf.export(run, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_changed_adapter_is_not_exported(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "adapters/policy/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DamageError, match="sha256"):
        lora_rlhf.export(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_seen_before_and_while_writing(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(export_run, "_free", lambda folder: 1000)
        patch.setattr(merging, "merge_role", None)
        with pytest.raises(DiskError, match="GB free"):
            lora_rlhf.export(run, tmp_path / "out")

    def full(*_):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # of safetensors

    monkeypatch.setattr(merging, "save", full)
    with pytest.raises(DiskError, match="No space left on device"):
        lora_rlhf.export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch, error):
    def stop(*_):
        assert list(tmp_path.glob(".out-*.tmp/model.safetensors"))
        raise error

    monkeypatch.setattr(export_card, "render", stop)
    with pytest.raises(error):
        lora_rlhf.export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_changes_the_model_is_refused_and_never_chosen(run, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"merged in bfloat16, the model differs too much: KL \d"):
        lora_rlhf.export(run, tmp_path / "out", dtype="bfloat16")
    assert not list(tmp_path.iterdir())
    real = merging.merge_role

    def stored_in_16_bits(*args):
        made = real(*args)
        made.stored_dtype = "bfloat16"
        return made

    monkeypatch.setattr(merging, "merge_role", stored_in_16_bits)
    assert lora_rlhf.export(run, tmp_path / "out")["dtype"] == "float32"


def test_a_merge_that_changes_the_model_is_refused(run, tmp_path, monkeypatch):
    real = PlainAdapters.merged

    def wrong(self, name, folder):
        model = real(self, name, folder)
        torch.nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
        return model

    monkeypatch.setattr(PlainAdapters, "merged", wrong)
    with pytest.raises(UsageError, match="at most 1e-05 a token"):
        lora_rlhf.export(run, tmp_path / "out")


def test_a_base_in_4_bit_is_dequantised_and_never_merged_in_4_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    made = small.backbone("llama", "policy", load_in_4bit=True)
    folder = adapters.save_role(made, "policy", tmp_path / "policy")
    base = small.base(small.base_folder("llama"), load_in_4bit=True, dtype="float32")
    plain = PlainAdapters(base)
    plain.load("policy", folder)
    with plain.active("policy"):
        before = merging.logits(base.causal, [EPISODE])
    model = plain.merged("policy", folder)
    assert not getattr(model, "is_quantized", False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    far = merging.distances(before, merging.logits(model, [EPISODE]))
    assert far["kl_per_token"] < 1e-9 and far["largest_logit_difference"] < 1e-4


def test_the_distance_of_two_distributions():
    a, b = torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    far = merging.distances([a], [b])
    p = torch.tensor([0.5, 0.5])
    q = torch.tensor([0.0, 1.0]).softmax(0)
    assert far["kl_per_token"] == pytest.approx(float((p * (p / q).log()).sum()) / 2)
    assert far["largest_logit_difference"] == 1
    assert far["top1_agreement"] == 0.5 and far["tokens"] == 2


def test_without_an_evaluation_the_held_out_demonstrations_are_measured(runs):
    record = Record.read(runs.after("ppo"))
    assert not record.done("evaluate")
    rows = merging.held_out(record, merging.load_base(record), "policy")
    assert rows and all(prompt and answer for prompt, answer in rows)
