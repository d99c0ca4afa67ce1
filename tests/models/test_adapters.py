# SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import small
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small import EPISODES
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from lora_rlhf.errors import AdapterError, NonFiniteError
from lora_rlhf.models import scoring
from lora_rlhf.models.adapters import expected_outputs, load_role, read_check, save_role

ROLES = ("policy", "reference", "reward", "value", "held_out")
CLASSES = {
    "policy": AutoModelForCausalLM, "reference": AutoModelForCausalLM,
    "reward": AutoModelForSequenceClassification, "held_out": AutoModelForSequenceClassification,
    "value": AutoModelForTokenClassification,
}  # fmt: skip
TENSORS = {"policy": 28, "reference": 28, "reward": 29, "held_out": 29, "value": 30}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A backbone with every role, all different, and the folder where each is saved."""
    backbone = small.backbone("llama", *ROLES)
    backbone.reward_offset["reward"] = 0.5
    home = tmp_path_factory.mktemp("adapters")
    return backbone, {role: save_role(backbone, role, home / role) for role in ROLES}


def plain(role, folder, base=None):
    """The role, loaded without this package."""
    options = {} if CLASSES[role] is AutoModelForCausalLM else {"num_labels": 1}
    model = CLASSES[role].from_pretrained(base or small.base_folder(), **options)
    model.config.pad_token_id = AutoTokenizer.from_pretrained(folder).pad_token_id
    return PeftModel.from_pretrained(model, folder).eval()


def run(model, check):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(check["input_ids"]),
            attention_mask=torch.tensor(check["attention_mask"]),
        ).logits


def shown(role, logits):
    """The entry of check.json for these logits."""
    if role in ("reward", "held_out"):
        return {"score": logits[:, 0].tolist()}
    if role == "value":
        return {"value_last": logits[:, -1, 0].tolist()}
    return {"logits_last": logits[:, -1, :8].tolist()}


# ----------------------------------------------------------------------- save


@pytest.mark.parametrize("role", ROLES)
def test_a_folder_holds_just_this_role(saved, role):
    backbone, folders = saved
    tensors = load_file(folders[role] / "adapter_model.safetensors")
    own = dict(backbone.role_parameters(role))
    assert len(tensors) == TENSORS[role] and tensors.keys() == own.keys()
    assert all(torch.equal(tensors[name], own[name]) for name in own)
    assert not any(adapter in name.split(".") for name in tensors for adapter in ("default", role))


@pytest.mark.parametrize("role", ROLES)
def test_plain_peft_gives_the_same_numbers_to_the_bit(saved, role):
    """Loaded with nothing of this package; the difference in float32 is 0.0."""
    backbone, folders = saved
    check = read_check(folders[role])
    assert shown(role, run(plain(role, folders[role]), check)) == check["expected"]
    data = small.batch(backbone)
    with torch.no_grad(), backbone.role(role):
        ours = backbone.views[role](**data).logits
    theirs = run(plain(role, folders[role]), {k: v.tolist() for k, v in data.items()})
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [n for n in small.ARCHITECTURES if n != "llama"])
def test_every_architecture_loads_with_plain_peft(name, tmp_path):
    roles = ["policy", "reward"] + (["value"] if name not in small.NO_TOKEN_CLASS else [])
    backbone = small.backbone(name, *roles)
    for role in roles:
        folder = save_role(backbone, role, tmp_path / role)
        check = read_check(folder)
        model = plain(role, folder, small.base_folder(name))
        assert shown(role, run(model, check)) == check["expected"], role


def test_opt_has_no_token_class_and_its_value_adapter_says_so(tmp_path):
    backbone = small.backbone("opt", "value")
    folder = save_role(backbone, "value", tmp_path / "value")
    assert "plain PEFT drops the bias" in json.loads((folder / "reward.json").read_text())["head"]
    with torch.no_grad():
        backbone.head("value").bias.fill_(3.0)
    load_role(backbone, "value", folder)
    assert float(backbone.head("value").bias.detach()) == 0.0


def test_half_precision_and_4bit_are_saved_in_float32_and_load_again(tmp_path):
    for kind in ({"dtype": "bfloat16"}, {"load_in_4bit": True}):
        backbone = small.backbone("llama", *ROLES, **kind)
        for role in ROLES:
            folder = save_role(backbone, role, tmp_path / role)
            tensors = load_file(folder / "adapter_model.safetensors")
            assert {t.dtype for t in tensors.values()} == {torch.float32}
            before = backbone.state_hash(role)
            small.nudge(backbone, role, std=0.3)
            load_role(backbone, role, folder)
            assert backbone.state_hash(role) == before
            assert expected_outputs(backbone, role)["expected"] == read_check(folder)["expected"]


def test_the_reward_note_says_how_to_read_a_score(saved):
    _, folders = saved
    note = json.loads((folders["reward"] / "reward.json").read_text())
    assert note["reward_offset"] == 0.5 and note["pad_token_id"] == small.PAD
    assert "no bias" in note["head"]
    assert "bias" in json.loads((folders["value"] / "reward.json").read_text())["head"]
    assert not (folders["policy"] / "reward.json").exists()


def test_the_check_has_padded_and_unpadded_rows(saved):
    """A loader that ignores padding, or pads with eos, must get other numbers."""
    _, folders = saved
    check = read_check(folders["reward"])
    lengths = [sum(row) for row in check["attention_mask"]]
    assert len(set(lengths)) == 2 and max(lengths) == len(check["attention_mask"][0])
    json.dumps(check)


def test_the_saved_config_is_the_same_in_every_process(tmp_path):
    """PEFT keeps target modules as a set, whose order depends on the process's hash seed."""
    made = small.backbone("llama", "policy")
    folder = save_role(made, "policy", tmp_path / "policy")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(made.target_modules)


def test_the_config_names_the_hub_id_when_there_is_one(tmp_path):
    backbone = small.backbone("llama", "reward", hub_id="someone/base")
    folder = save_role(backbone, "reward", tmp_path / "reward")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/base"
    assert config["inference_mode"] is True and config["task_type"] == "SEQ_CLS"
    assert isinstance(config["target_modules"], list)
    assert backbone.views["reward"].peft_config["reward"].inference_mode is False


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_adapter_is_never_saved(tmp_path, bad):
    backbone = small.backbone("llama", "policy")
    folder = save_role(backbone, "policy", tmp_path / "policy")
    before = (folder / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        backbone.role_parameters("policy")[5][1][0, 0] = bad
    with pytest.raises(NonFiniteError, match="1 tensors hold NaN"):
        save_role(backbone, "policy", folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_an_interrupted_save_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    backbone = small.backbone("llama", "policy")
    folder = save_role(backbone, "policy", tmp_path / "policy")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    small.nudge(backbone, "policy", std=0.5)
    monkeypatch.setattr(type(backbone.tokenizer), "save_pretrained", boom)
    with pytest.raises(RuntimeError, match="boom"):
        save_role(backbone, "policy", folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.undo()
    save_role(backbone, "policy", folder)
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    load_role(backbone, "policy", folder)


def boom(*_, **__):
    raise RuntimeError("boom")


# ----------------------------------------------------------------------- load


@pytest.mark.parametrize("role", ROLES)
def test_a_saved_role_loads_into_a_fresh_backbone(saved, role):
    backbone, folders = saved
    fresh = small.backbone()
    load_role(fresh, role, folders[role])
    assert fresh.state_hash(role) == backbone.state_hash(role)
    assert expected_outputs(fresh, role) == read_check(folders[role])
    assert fresh.reward_offset == (
        {role: 0.5 * (role == "reward")}
        if "re" in role and role != "reference" or role == "held_out"
        else {}
    )


def test_loading_in_a_stage_keeps_the_declaration(saved):
    backbone, folders = small.backbone("llama", "policy"), saved[1]
    with backbone.training("policy"):
        load_role(backbone, "reward", folders["reward"])
        backbone.assert_trainable()


def test_a_plain_peft_adapter_of_the_same_shape_loads(tmp_path):
    """Somebody's SFT adapter, made with PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(small.base_folder())
    backbone = small.backbone()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=backbone.target_modules,
        init_lora_weights=False,
    )
    theirs = get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path)
    load_role(backbone, "reference", tmp_path)
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor([[5, 6, 7]])).logits
        with backbone.role("reference"):
            assert torch.equal(backbone.causal(input_ids=torch.tensor([[5, 6, 7]])).logits, want)


def missing(folder):
    (folder / "adapter_model.safetensors").unlink()


def no_config(folder):
    (folder / "adapter_config.json").unlink()


def truncated(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"")


def not_a_number(folder):
    change(folder, lambda t: t[last(t)].view(-1)[:1].fill_(float("nan")))


def other_shape(folder):
    change(folder, lambda t: t.update({last(t): t[last(t)][:, :-1].contiguous()}))


def a_tensor_short(folder):
    change(folder, lambda t: t.pop(last(t)))


def a_tensor_more(folder):
    change(folder, lambda t: t.update({"base_model.model.extra.lora_A.weight": torch.ones(1)}))


def headless(folder):
    change(folder, lambda t: t.pop("base_model.model.score.weight"))


def two_labels(folder):
    change(folder, lambda t: t.update({k: torch.cat([v, v]) for k, v in t.items() if "score" in k}))


def other_base(folder):
    write(folder / "check.json", {"base_fingerprint": "0" * 64})


def other_alpha(folder):
    write(folder / "adapter_config.json", {"lora_alpha": 16})


def other_scale(folder):
    write(folder / "adapter_config.json", {"use_rslora": True})


def garbled(folder):
    (folder / "check.json").write_text("{not json")


def last(tensors):
    """The last LoRA tensor: those before it have passed the checks when it fails."""
    return max(n for n in tensors if "lora_B" in n)


def change(folder, edit):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def write(path, changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def untouched():
    """Backbones without and with the role: a failed load must change neither."""
    return {True: small.backbone(), False: small.backbone("llama", "reward")}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "holds no adapter"),
        (no_config, "holds no adapter"),
        (truncated, "cannot be read"),
        (empty, "cannot be read"),
        (not_a_number, "NaN or infinity"),
        (other_shape, r"has shape \(32, 3\)"),
        (a_tensor_short, "lacks base_model"),
        (a_tensor_more, "has an unknown base_model.model.extra"),
        (headless, "lacks base_model.model.score.weight"),
        (two_labels, "its head base_model.model.score.weight gives 2 numbers"),
        (other_base, "another base model"),
        (other_alpha, "has lora_alpha 16"),
        (other_scale, "has use_rslora True"),
        (garbled, "check.json cannot be read"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_clear_error(
    saved, untouched, tmp_path, damage, message, fresh
):
    """The role stays unchanged: not half loaded, and not added."""
    folder = Path(shutil.copytree(saved[1]["reward"], tmp_path / "reward"))
    damage(folder)
    backbone = untouched[fresh]
    before = None if fresh else backbone.state_hash("reward")
    with pytest.raises(AdapterError, match=message):
        load_role(backbone, "reward", folder)
    assert backbone.has("reward") is not fresh
    assert fresh or backbone.state_hash("reward") == before
    assert backbone.reward_offset == {}


def test_the_remedy_for_a_headless_reward_adapter_is_its_head(saved, tmp_path):
    folder = save_role(saved[0], "reward", tmp_path / "reward")
    headless(folder)
    with pytest.raises(AdapterError) as caught:
        load_role(small.backbone(), "reward", folder)
    assert "modules_to_save" in caught.value.remedy


@pytest.mark.parametrize(
    "options", [{"r": 8}, {"top_fraction": 0.5}, {"target_modules": ["q_proj"]}]
)
def test_another_lora_section_is_refused(saved, options):
    with pytest.raises(AdapterError) as caught:
        load_role(small.backbone(**options), "policy", saved[1]["policy"])
    assert "lora: section" in caught.value.remedy


def test_another_base_of_the_same_shape_is_refused(saved):
    """The shapes fit and PEFT would load it: a different model would come out, silently."""
    other = small.backbone(folder=small.base_folder(seed=1))
    with pytest.raises(AdapterError, match="another base model"):
        load_role(other, "policy", saved[1]["policy"])


def test_a_missing_folder_is_the_same_error(tmp_path):
    with pytest.raises(AdapterError, match="holds no adapter"):
        load_role(small.backbone(), "policy", tmp_path / "nothing")


def test_the_offset_travels_with_the_reward_adapter(saved):
    backbone, folders = saved
    fresh = small.backbone()
    load_role(fresh, "reward", folders["reward"])
    assert fresh.reward_offset["reward"] == 0.5
    assert scoring.scores(fresh, EPISODES) == scoring.scores(backbone, EPISODES)


def test_an_adapter_that_changes_nothing_is_warned_about(saved, tmp_path, caplog):
    """A LoRA starts at 0; the head of a reward may differ."""
    folder = Path(shutil.copytree(saved[1]["reward"], tmp_path / "reward"))
    load_role(small.backbone(), "reward", folder)
    assert not caplog.records
    change(folder, lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k])
    load_role(small.backbone(), "reward", folder)
    [record] = caplog.records
    assert f"{folder}/adapter_model.safetensors changes nothing" in record.getMessage()


@pytest.mark.parametrize("error", [Exception("No space left on device (os error 28)"),
                                   SafetensorError("Error: No space left on device (os error 28)"),
                                   OSError(errno.ENOSPC, "No space left on device")])  # fmt: skip
def test_a_full_disk_is_one_kind_of_error_and_leaves_the_earlier_adapter(
    tmp_path, monkeypatch, error
):
    """tokenizers and safetensors raise their own classes for it."""
    made = small.backbone("llama", "policy")
    before = save_role(made, "policy", tmp_path / "policy")

    def full(*_, **__):
        raise error

    monkeypatch.setattr(made.tokenizer, "save_pretrained", full)
    with pytest.raises(OSError) as caught:
        save_role(made, "policy", tmp_path / "policy")
    assert caught.value.errno == errno.ENOSPC
    assert (before / "tokenizer.json").exists() and os.listdir(tmp_path) == ["policy"]
