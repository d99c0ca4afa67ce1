# SPDX-License-Identifier: Apache-2.0
"""The loaded base: its description, the layout of tokens, its layers."""

import json

import pytest
import small
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from lora_rlhf.errors import BaseModelError
from lora_rlhf.models.base_model import decoder_layers, linear_names
from lora_rlhf.recipe.schema import ModelSection


def test_a_folder_has_no_revision(monkeypatch):
    """`revision` has no effect on a folder, so the record must not name it."""
    base = small.base(small.base_folder())
    monkeypatch.setattr(base.causal.config, "_commit_hash", "abc", raising=False)
    assert base.describe()["revision"] is None
    monkeypatch.setattr(base, "model_section", ModelSection(id="a/b", revision="main"))
    assert base.describe()["revision"] == "abc"


def test_the_description_is_complete_and_can_be_written_to_a_record():
    base = small.base(small.base_folder(), hub_id="someone/base")
    found = json.loads(json.dumps(base.describe()))
    assert found["hub_id"] == "someone/base" and found["dtype"] == "float32"
    assert found["layers"] == 2 and found["hidden_size"] == 64
    assert found["parameters"] == sum(p.numel() for p in base.causal.parameters())
    assert found["pad_id"] == small.PAD and found["eos_ids"] == [small.EOS]
    assert found["source"] == "local folder" and found["license"] is None
    assert len(found["chat_template_sha256"]) == 64


@pytest.fixture(scope="module")
def base():
    return small.base(small.base_folder())


def test_a_prompt_ends_where_the_model_has_to_answer(base):
    chat = [{"role": "user", "content": "w5 w6"}]
    assert base.encode_prompt(chat) == [62, 5, 6, 63]
    assert base.encode_prompt("w5 w6") == [5, 6]


def test_a_completion_is_what_the_policy_would_have_to_sample(base):
    assert base.encode_completion("w5 w6") == [5, 6, small.EOS]
    assert base.encode_completion([{"role": "assistant", "content": "w5"}]) == [5, small.EOS]


def test_control_tokens_written_in_a_completion_stay_text(base):
    """Otherwise data could open a user's turn in the middle of an answer."""
    assert base.tokenizer("w5 <user> w6")["input_ids"] == [5, 62, 6]
    assert 62 not in base.encode_completion("w5 <user> w6")


def test_decoding_leaves_special_tokens_out(base):
    assert base.decode([62, 5, 6, 1, 0]) == "w5 w6"


@pytest.mark.parametrize("name", small.ARCHITECTURES)
def test_layers_and_linear_names_are_found(name):
    causal = AutoModelForCausalLM.from_pretrained(small.base_folder(name))
    layers = decoder_layers(causal)
    names = linear_names(layers, None)
    assert len(layers) == 2 and 3 <= len(names) <= 7
    assert not set(names) & {"lm_head", "embed_out", "score", "classifier"}


def test_unknown_target_modules_are_named():
    with pytest.raises(BaseModelError, match="q_prj") as caught:
        small.backbone(target_modules=["q_prj"])
    assert "q_proj" in caught.value.expected
    assert small.backbone(target_modules=["v_proj", "q_proj"]).target_modules == [
        "q_proj",
        "v_proj",
    ]


def test_a_model_without_layers_is_refused():
    causal = AutoModelForCausalLM.from_pretrained(small.base_folder())
    causal.config.num_hidden_layers = 7
    with pytest.raises(BaseModelError, match="no list of 7 layers"):
        decoder_layers(causal)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_last_tokens_head_is_one_product_in_half_precision(dtype):
    """Without a contiguous input it is a batch of products, each with a copy of the head."""
    base = small.base(small.base_folder(), dtype=dtype)
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    states = torch.randn(3, 5, small.HIDDEN).to(base.causal.dtype)
    with torch.no_grad(), Names():
        found = base.causal.lm_head(states[:, -1:])
    assert "aten.mm.default" in names and "aten.bmm.default" not in names
    wanted = states[:, -1].float() @ base.causal.lm_head.weight.float().t()
    torch.testing.assert_close(found[:, 0].float(), wanted, rtol=2e-2, atol=2e-2)
