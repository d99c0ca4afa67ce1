# SPDX-License-Identifier: Apache-2.0
"""GGUF files, read again by transformers' own loader of them, and by a real llama.cpp if there."""

import json
import os
import types
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_rlhf import tiny
from lora_rlhf.errors import SetupError, UsageError
from lora_rlhf.exports import gguf_model, gguf_tokenizer, merging, other_runtimes
from lora_rlhf.models import adapters
from lora_rlhf.models.plain_adapters import PlainAdapters

gguf = pytest.importorskip("gguf")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


def read(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.mark.parametrize(
    ("name", "more"),
    [("llama", {}), ("mistral", {}), ("qwen2", {}), ("qwen3", {"head_dim": 128}),
     ("llama", {"attention_bias": True, "rope_parameters": LLAMA3})],
)  # fmt: skip
def test_transformers_reads_the_same_model_from_the_file(name, more, tmp_path, monkeypatch):
    base = small.base(small.base_folder.__wrapped__(name, **more))
    monkeypatch.setattr(gguf_tokenizer, "fields", lambda *_: None)  # words are no bytes
    gguf_model.write(base, base.causal, tmp_path / "m.gguf", "float32", "m")
    fields, tensors = read(tmp_path / "m.gguf")
    arch = "llama" if name == "mistral" else name
    assert fields["general.architecture"] == arch
    if name == "mistral":  # llama.cpp has no sliding window for it
        assert fields["llama.context_length"] == base.causal.config.sliding_window == 8
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    if "rope_parameters" in more:  # which transformers does not read from a GGUF file
        factors = tensors["rope_freqs.weight"]
        inverse = base.causal.model.rotary_emb.inv_freq.numpy()
        plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
        assert np.allclose(plain / factors, inverse, rtol=1e-5)
        assert np.allclose(
            tensors["blk.0.attn_q.bias"].reshape(4, 8, 2).swapaxes(1, 2).reshape(-1),
            base.causal.model.layers[0].self_attn.q_proj.bias.numpy(),
        )
        return
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, base.causal(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("dtype", gguf_model.DTYPES)
def test_each_dtype_rounds_as_much_as_it_must(dtype, tmp_path):
    base = small.base("tiny", dtype="float32")
    gguf_model.write(base, base.causal, tmp_path / "m.gguf", dtype, "m")
    fields, tensors = read(tmp_path / "m.gguf")
    wanted = base.causal.model.layers[0].mlp.down_proj.weight.numpy()
    share = np.abs(tensors["blk.0.ffn_down.weight"] - wanted).mean() / np.abs(wanted).mean()
    low, high = {"float32": (0, 0), "float16": (0, 1e-3), "bfloat16": (0, 1e-2),
                 "q8_0": (1e-4, 2e-2), "q4_0": (2e-2, 0.2)}[dtype]  # fmt: skip
    assert low <= share <= high
    assert np.array_equal(
        tensors["blk.0.attn_norm.weight"],
        base.causal.model.layers[0].input_layernorm.weight.numpy(),
    )
    kind = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if "embd" in t.name)
    assert kind.tensor_type.name == ("Q8_0" if dtype == "q4_0" else gguf_model.DTYPES[dtype])
    assert fields["general.file_type"] == {"q4_0": 2, "q8_0": 7}.get(
        dtype, fields["general.file_type"]
    )


def test_the_tokenizer_of_the_tiny_model(tmp_path):
    base = small.base("tiny", dtype="float32")
    gguf_model.write(base, base.causal, tmp_path / "m.gguf", "q8_0", "m")
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"] == base.eos_ids[0]
    assert fields["tokenizer.ggml.token_type"][:6] == [3, 3, 3, 3, 3, 1]
    assert fields["tokenizer.ggml.tokens"] == base.tokenizer.convert_ids_to_tokens(range(2048))
    assert "tokenizer.ggml.bos_token_id" not in fields
    template = fields["tokenizer.chat_template"]
    assert "generation %}" not in template.replace("add_generation_prompt", "")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}]
    again = AutoTokenizer.from_pretrained(tiny.path())
    wanted = again.apply_chat_template(chat, tokenize=False)
    again.chat_template = template
    assert again.apply_chat_template(chat, tokenize=False) == wanted


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def split(regex):
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, BYTES]}


@pytest.mark.parametrize(
    ("pre", "name"),
    [(split(QWEN2), "qwen2"), (split(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), "llama-bpe"),
     ({**BYTES, "use_regex": True}, "gpt-2"),
     ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                             {**BYTES, "use_regex": True}]}, "smollm")],
)  # fmt: skip
def test_known_ways_to_split_a_text(pre, name):
    assert gguf_tokenizer.pre_type({"model": {"type": "BPE"}, "pre_tokenizer": pre}) == name


@pytest.mark.parametrize(
    "spec",
    [{"model": {"type": "WordLevel"}, "pre_tokenizer": BYTES},
     {"model": {"type": "BPE", "byte_fallback": True}, "pre_tokenizer": None},
     {"model": {"type": "BPE"}, "pre_tokenizer": split(r"\w+")},
     {"model": {"type": "BPE"}, "pre_tokenizer": {**BYTES, "add_prefix_space": True}}],
)  # fmt: skip
def test_unknown_tokenizers_are_refused(spec):
    with pytest.raises(UsageError, match="cannot be written into a GGUF file"):
        gguf_tokenizer.pre_type(spec)


def test_other_architectures_are_refused():
    with pytest.raises(UsageError, match="gemma2 cannot be written here"):
        gguf_model.architecture(small.base(small.base_folder("gemma2")).causal.config)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The tiny model with a random adapter, merged."""
    made = small.backbone(folder=tiny.path())
    made.add_role("policy")
    small.nudge(made, "policy", std=0.02)
    folder = adapters.save_role(made, "policy", tmp_path_factory.mktemp("adapter") / "policy")
    base = small.base("tiny", dtype="float32")
    plain = PlainAdapters(base)
    plain.load("policy", folder)
    texts = ("Who is Ana?", "Record: name: Hugo; age: 57.", "Say 1, 2 and 3.")
    rows = [
        (base.encode_prompt([{"role": "user", "content": t}]), base.encode_completion("Ana is 12."))
        for t in texts
    ]
    with plain.active("policy"):
        before = merging.logits(base.causal, rows)
    return merging.Merged(base, plain.merged("policy", folder), folder, rows, before, "float32")


def test_an_adapter_as_gguf_is_the_same_change_of_the_base(merged, tmp_path):
    gguf_model.write_adapter(merged.base, merged.folder, tmp_path / "a.gguf", "a")
    fields, tensors = read(tmp_path / "a.gguf")
    config = json.loads((merged.folder / "adapter_config.json").read_text())
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    scale = fields["adapter.lora.alpha"] / config["r"]
    untouched = small.base("tiny", dtype="float32").causal.model.layers[2]
    for ours, theirs in (("self_attn.q_proj", "attn_q"), ("mlp.up_proj", "ffn_up")):
        name = f"blk.2.{theirs}.weight"
        change = scale * tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        if theirs == "attn_q":
            change = change.reshape(4, 16, 2, 128).swapaxes(1, 2).reshape(128, 128)
        after = merged.model.model.layers[2].get_submodule(ours).weight
        assert np.allclose(
            change, (after - untouched.get_submodule(ours).weight).detach().numpy(), atol=1e-5
        )


class FakeLlama:
    """llama-cpp-python on a model of transformers; `shift` moves its logits, `split` its ids."""

    shift, split = 0, 0

    def __init__(self, model_path, lora_path, n_ctx, n_threads, logits_all, verbose):
        assert Path(model_path).is_file() and logits_all

    def reset(self):
        self.n_tokens = 0

    def eval(self, ids):
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0]
        self.scores = torch.roll(logits, self.shift, -1).numpy()
        self.n_tokens = len(ids)

    def tokenize(self, text, add_bos, special):
        assert special and not add_bos
        return self.tokenizer(text.decode(), add_special_tokens=False)["input_ids"][self.split :]

    def close(self):
        pass


@pytest.fixture
def llama(merged, monkeypatch, tmp_path):
    """A stand-in for llama-cpp-python, and a file."""
    fake = type("Fake", (FakeLlama,), {"model": merged.model, "tokenizer": merged.base.tokenizer})
    monkeypatch.delenv(other_runtimes.NODE, raising=False)
    monkeypatch.setattr(other_runtimes.importlib.util, "find_spec", lambda name: True)
    module = types.SimpleNamespace(Llama=fake)
    monkeypatch.setattr(other_runtimes.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(other_runtimes, "version", lambda name: "0")
    (tmp_path / "m.gguf").touch()
    return fake


def test_a_runtime_that_agrees_verifies(merged, llama, tmp_path):
    found = other_runtimes.llama_cpp(merged, tmp_path / "m.gguf")
    assert found["verified"] and found["top1_agreement"] == 1
    assert found["mean_logprob_difference"] < 1e-4
    assert found["tokens"] == sum(len(answer) for _, answer in merged.rows)
    assert found["texts_tokenized_alike"] == found["texts_tokenized"] == 4


def test_a_runtime_that_answers_or_reads_otherwise_refuses(merged, llama, tmp_path):
    llama.shift = 1
    with pytest.raises(UsageError, match=r"0.00% of \d+ tokens"):
        other_runtimes.llama_cpp(merged, tmp_path / "m.gguf")
    llama.shift, llama.split = 0, 1
    with pytest.raises(UsageError, match="splits 3 of 3 prompts into other tokens"):
        other_runtimes.llama_cpp(merged, tmp_path / "m.gguf")


def test_without_a_runtime_the_export_says_that_it_is_not_verified(merged, monkeypatch, tmp_path):
    monkeypatch.delenv(other_runtimes.NODE, raising=False)
    monkeypatch.setattr(other_runtimes.importlib.util, "find_spec", lambda name: None)
    for found in (
        other_runtimes.llama_cpp(merged, tmp_path / "m.gguf"),
        other_runtimes.mlx(merged, tmp_path),
    ):
        assert not found["verified"] and "on this machine" in found["why"]
    monkeypatch.setenv(other_runtimes.NODE, str(tmp_path))
    with pytest.raises(SetupError, match=r"has no node-llama-cpp|node is missing"):
        other_runtimes.llama_cpp(merged, tmp_path / "m.gguf")


@pytest.mark.slow
@pytest.mark.skipif(other_runtimes.NODE not in os.environ, reason="no llama.cpp here")
@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_a_real_llama_cpp_gives_the_same_answers(merged, tmp_path, dtype):
    gguf_model.write(merged.base, merged.model, tmp_path / "m.gguf", dtype, "m")
    found = other_runtimes.llama_cpp(merged, tmp_path / "m.gguf")
    assert found["verified"] and found["texts_tokenized_alike"] == found["texts_tokenized"]
    assert found["mean_logprob_difference"] < {"float32": 0.01, "q8_0": 0.2}[dtype]
    base = small.base("tiny", dtype="float32")
    gguf_model.write(base, base.causal, tmp_path / "base.gguf", "float32", "base")
    gguf_model.write_adapter(merged.base, merged.folder, tmp_path / "a.gguf", "a")
    found = other_runtimes.llama_cpp(merged, tmp_path / "base.gguf", tmp_path / "a.gguf")
    assert found["verified"] and found["mean_logprob_difference"] < 0.01


@pytest.mark.slow
@pytest.mark.skipif(other_runtimes.NODE not in os.environ, reason="no llama.cpp here")
@pytest.mark.parametrize(
    ("name", "more"),
    [("qwen2", {}), ("qwen3", {"head_dim": 32}), ("mistral", {"sliding_window": 256}),
     ("llama", {"attention_bias": True, "rope_parameters": LLAMA3}),
     ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}})],
)  # fmt: skip
def test_a_real_llama_cpp_reads_every_architecture(name, more, tmp_path):
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "vocab_size": 2048}
    folder = small.base_folder.__wrapped__(name, **ids, **more)
    AutoTokenizer.from_pretrained(tiny.path()).save_pretrained(folder)
    base, text = small.base(folder), "Record: name: Hugo; age: 57; instrument: clarinet. " * 5
    prompt = base.encode_prompt([{"role": "user", "content": text}])
    rows = [(prompt, base.encode_completion("Hugo plays 3 clarinets, doesn't he?"))]
    before = merging.logits(base.causal, rows)
    gguf_model.write(base, base.causal, tmp_path / "m.gguf", "float32", "m")
    plain = merging.Merged(base, base.causal, tmp_path, rows, before, "float32")
    checked = other_runtimes.llama_cpp(plain, tmp_path / "m.gguf")
    assert checked["verified"] and checked["mean_logprob_difference"] < 0.01
