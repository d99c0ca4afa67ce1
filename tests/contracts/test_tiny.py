# SPDX-License-Identifier: Apache-2.0
"""The shipped tiny model, its tokenizer, and the script that trained it."""

import json
import random

import pytest
import torch
import train_tiny as pretraining
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_rlhf.data.closed_world import checkers, generator, vocabulary
from lora_rlhf.tiny import path

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Record: name: Mira; city: Oslo.\nWhere does Mira live?"},
    {"role": "assistant", "content": "Mira lives in Oslo."},
    {"role": "user", "content": "Ünïcode \U0001f642 {json} <tag>?"},
    {"role": "assistant", "content": "That is not stated."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(path(), dtype=torch.float32).eval()


def chat(tokenizer, messages, **kwargs):
    out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
    return list(out["input_ids"])


def test_the_shipped_weights_are_small_and_in_bf16():
    weights = load_file(path() / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert sum(w.numel() for w in weights.values()) <= 3_000_000
    assert (path() / "model.safetensors").stat().st_size <= 6_000_000


def test_the_shape_suits_trunks_and_4_bit_blocks(model):
    config = model.config
    assert config.model_type == "llama" and config.num_hidden_layers >= 6
    assert config.hidden_size % 64 == 0 and config.intermediate_size % 64 == 0
    assert config.tie_word_embeddings


def test_the_training_record_belongs_to_the_shipped_model(model):
    trained = json.loads((path() / "TRAINED.json").read_text())
    assert trained["finished"] and trained["step"] == trained["settings"]["steps"]
    assert trained["parameters"] == sum(p.numel() for p in model.parameters())
    assert trained["seconds"] > 0 and trained["loss"] > 0 and "torch" in trained["versions"]


def test_special_tokens_are_distinct_and_agree_with_the_model(tokenizer, model):
    ids = tokenizer.convert_tokens_to_ids(list(pretraining.SPECIAL))
    assert ids == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (0, 1)
    assert 1000 <= len(tokenizer) == model.config.vocab_size <= 2048


@pytest.mark.parametrize(
    "text",
    ["Mira lives in Oslo.", "- a\n- b", '{"age": 34}', "Ünïcode \U0001f642\x00\t", "  a  b "],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(range(5))


def test_most_values_are_one_token(tokenizer):
    values = [s + v for pool in vocabulary.POOLS.values() for v in pool for s in (" ", "")]
    assert sum(len(tokenizer.tokenize(v)) == 1 for v in values) / len(values) > 0.9


def test_a_dialogue_is_a_prefix_of_the_longer_one(tokenizer):
    for k in range(1, len(DIALOGUE)):
        short = chat(tokenizer, DIALOGUE[:k])
        assert chat(tokenizer, DIALOGUE)[: len(short)] == short
        if DIALOGUE[k]["role"] == "assistant":
            prompt = chat(tokenizer, DIALOGUE[:k], add_generation_prompt=True)
            longer = chat(tokenizer, DIALOGUE[: k + 1])
            assert longer[: len(prompt)] == prompt
            assert longer[-1] == tokenizer.eos_token_id and longer.count(1) == (k + 1) // 2


def test_the_generation_mask_covers_answers_and_their_end(tokenizer):
    out = tokenizer.apply_chat_template(
        DIALOGUE, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    masked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(masked) == "Mira lives in Oslo.<eos>That is not stated.<eos>"


def test_prompts_and_good_completions_are_short(tokenizer):
    rng = random.Random(0)
    for item in generator.items(400, 0, "evaluate"):
        prompt = [{"role": "user", "content": item.prompt}]
        assert len(chat(tokenizer, prompt, add_generation_prompt=True)) <= 96
        assert len(tokenizer(generator.good(item, rng))["input_ids"]) + 1 <= 40


def test_it_copies_from_records_yet_is_a_mediocre_assistant(model, tokenizer):
    trained = json.loads((path() / "TRAINED.json").read_text())["greedy"]
    torch.manual_seed(0)
    rewards = pretraining.evaluate(model, tokenizer, 120, temperature=1.0, split="evaluate")
    assert -0.4 < rewards["all"] < 0.5, rewards  # SFT and PPO have room above it
    assert trained["copied"] >= 0.95, trained
    greedy = pretraining.evaluate(model, tokenizer, 80, split="evaluate")  # prompts never seen
    assert min(greedy[name] for name in ("copied", "json", "bullets", "max_words")) > 0.8, greedy


def test_pretraining_text_mixes_good_and_bad_and_has_its_own_split():
    settings = pretraining.Settings()
    rows = pretraining.documents(settings, 0, 400)
    assert rows == pretraining.documents(settings, 0, 400)
    others = {i.prompt for s in vocabulary.SPLITS[1:] for i in generator.items(100, 0, s)}
    assert not others & {prompt for prompt, _ in rows}
    items = {i.prompt: i for i in generator.items(400, settings.seed * 100_003, "pretrain")}
    wins = [checkers.check(items[p], text).success for p, text in rows if p]
    assert 0.3 < sum(wins) / len(wins) < 0.5


def test_the_training_script_trains_and_exports(tmp_path):
    small = pretraining.Settings(
        steps=3,
        batch=4,
        warmup=1,
        vocabulary=400,
        hidden=64,
        layers=1,
        heads=2,
        intermediate=64,
        threads=1,
        sample=200,
        chunk=2,
        evaluated=8,
    )
    facts = pretraining.train(small, tmp_path / "out", fuse=False)
    again = pretraining.train(small, tmp_path / "again", fuse=False)
    assert facts["finished"] and facts["step"] == 3
    names = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "TRAINED.json",
    }
    assert {f.name for f in (tmp_path / "out").iterdir()} == names
    assert names <= {f.name for f in path().iterdir()}
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "again"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert facts["loss"] == again["loss"]
