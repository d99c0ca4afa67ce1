# SPDX-License-Identifier: Apache-2.0
"""Tiny random bases with the architecture and the special tokens of a recipe's base, and rows.

The texts are our own; columns, folders and splits are those of the datasets' cards on the Hub.
"""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_rlhf import tiny

_IM = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SMOL = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe Smol.<|im_end|>\n{% endif %}" + _IM
)
_QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|eot_id|>"
    "{% for m in messages if m.role != 'system' %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
    "\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_FOLDED = (  # the system prompt goes into the first question; roles must alternate
    "{{ bos_token }}{% set first = messages[0].role == 'system' %}"
    "{% for m in (messages[1:] if first else messages) %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
    "{% set text = m.content | trim %}"
    "{% if first and loop.first %}{% set text = messages[0].content + '\n\n' + text %}{% endif %}"
)
_GEMMA = (
    _FOLDED + "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{{ text }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_MISTRAL = (
    _FOLDED + "{% if m.role == 'user' %}[INST] {{ text }}[/INST]"
    "{% else %} {{ text }}{{ eos_token }}{% endif %}{% endfor %}"
)

# Five special tokens in place of the tiny tokenizer's; more; bos, eos, pad; bos before every text.
_TOKENS = {
    "smollm2": ("<|endoftext|> <|im_start|> <|im_end|> <repo_name> <file_sep>", "", _SMOL,
                ("<|im_start|>", "<|im_end|>", "<|im_end|>"), False),
    "qwen3": ("<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|>",
              "<think> </think>", _QWEN, (None, "<|im_end|>", "<|endoftext|>"), False),
    "llama": ("<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
              "<|finetune_right_pad_id|>", _LLAMA, ("<|begin_of_text|>", "<|eot_id|>", None), True),
    "gemma": ("<pad> <eos> <bos> <start_of_turn> <end_of_turn>", "", _GEMMA,
              ("<bos>", "<eos>", "<pad>"), True),
    "mistral": ("<unk> <s> </s> [INST] [/INST]", "", _MISTRAL, ("<s>", "</s>", None), True),
}  # fmt: skip


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The packaged tiny tokenizer with the special tokens and a template of this family."""
    five, more, template, (bos, eos, pad), begins = _TOKENS[family]
    text = (tiny.path() / "tokenizer.json").read_text(encoding="utf-8")
    data = json.loads(text)
    for token, name in zip(data["added_tokens"], five.split(), strict=True):
        data["model"]["vocab"][name] = data["model"]["vocab"].pop(token["content"])
        token["content"] = name
    core = Tokenizer.from_str(json.dumps(data))
    thought = [AddedToken(name, special=False) for name in more.split() if "think" in name]
    core.add_tokens(thought)
    core.add_special_tokens([name for name in more.split() if "think" not in name])
    if begins:
        core.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, core.token_to_id(bos))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad
    )
    made.chat_template = template
    return made


def make(recipe_folder: Path, folder: Path) -> Path:
    """Save a tiny random base of the architecture in a recipe's config.json."""
    family = next(name for name in _TOKENS if recipe_folder.name.startswith(name))
    words = tokenizer(family)
    given = json.loads((recipe_folder / "config.json").read_text(encoding="utf-8"))
    heads, keys = given["num_attention_heads"], given["num_key_value_heads"]
    small = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": max(1, 4 * keys // heads),
        "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2,
        "max_window_layers": 2, "sliding_window": 8 if given.get("sliding_window") else None,
    }  # fmt: skip
    given |= {key: value for key, value in small.items() if key in given}
    given |= {"vocab_size": len(words), "bos_token_id": words.bos_token_id, "dtype": "float32"}
    given |= {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


_THINGS = ("a kite", "soup", "a poem", "a map", "a raft", "bread", "a song", "a fence")
_WAYS = ("for a child", "in winter", "without tools", "in one hour", "on a boat", "for a friend")
_MORE = ("", " and cheaply", " once more")
ASKED = [f"How do I make {t} {w}{m}?" for t in _THINGS for w in _WAYS for m in _MORE]


def _said(i: int) -> tuple[str, str]:
    return f"Start small, then add what number {i} needs.", f"No idea {i}."


def _hh(i: int, asked: str) -> dict:
    good, bad = _said(i)
    before = "\n\nHuman: Hello.\n\nAssistant: Hi, what is it?" * (i % 2)
    start = f"{before}\n\nHuman: {asked}\n\nAssistant:"
    return {"chosen": f"{start} {good}", "rejected": f"{start} {bad}"}


def _ultrafeedback(i: int, asked: str) -> dict:
    both = [
        [{"content": asked, "role": "user"}, {"content": text, "role": "assistant"}]
        for text in _said(i)
    ]
    return {
        "prompt": asked, "prompt_id": f"{i:064x}", "chosen": both[0], "rejected": both[1],
        "messages": both[0], "score_chosen": 8.5, "score_rejected": 4.0 + i % 2,
    }  # fmt: skip


def _post(asked: str) -> str:
    return f"SUBREDDIT: r/AskAll\n\nTITLE: {asked}\n\nPOST: I tried twice and it broke.\n\nTL;DR:"


def _tldr(i: int, asked: str) -> dict:
    return {"prompt": _post(asked), "completion": f" {_said(i)[0]}"}


def _tldr_preference(i: int, asked: str) -> dict:
    good, bad = _said(i)
    return {"prompt": _post(asked), "chosen": f" {good}", "rejected": f" {bad}"}


def _helpsteer2(i: int, asked: str) -> list[dict]:
    turns = "Hello.\n<extra_id_1>Assistant\nHi, what is it?\n<extra_id_1>User\n"
    others = {"correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1}
    prompt = turns * (i % 2) + asked
    return [
        {"prompt": prompt, "response": text, "helpfulness": score, **others}
        for text, score in zip(_said(i), (4, i % 5), strict=True)
    ]


def _helpsteer3(i: int, asked: str) -> dict:
    good, bad = _said(i)
    context = [{"role": "user", "content": asked}]
    if i % 2:
        context = [{"role": "user", "content": "Hello."},
                   {"role": "assistant", "content": "Hi, what is it?"}, *context]  # fmt: skip
    first = i % 3 == 0
    score = -2 if first else 1
    return {
        "domain": "general", "language": "english", "context": context,
        "response1": good if first else bad, "response2": bad if first else good,
        "overall_preference": score,
        "individual_preference": [
            {"score": score, "reasoning": "It is clearer.", "feedback1": "a", "feedback2": "b"}
        ],
    }  # fmt: skip


_SPLITS = ("train", "validation")
_HH = ("train", "test")
HUB = {
    ("Anthropic/hh-rlhf", None, "helpful-base"): (_hh, _HH),
    ("Anthropic/hh-rlhf", None, "harmless-base"): (_hh, _HH),
    ("HuggingFaceH4/ultrafeedback_binarized", None, None): (
        _ultrafeedback, ("train_prefs", "train_sft", "test_prefs", "test_sft", "train_gen",
                         "test_gen")),
    ("trl-lib/tldr", None, None): (_tldr, ("train", "validation", "test")),
    ("trl-lib/tldr-preference", None, None): (_tldr_preference, _SPLITS),
    ("nvidia/HelpSteer2", None, None): (_helpsteer2, _SPLITS),
    ("nvidia/HelpSteer3", "preference", None): (_helpsteer3, _SPLITS),
}  # fmt: skip
"""(dataset, configuration, folder) -> rows, and the splits that it has."""


def load_dataset(path, name=None, *, data_dir=None, split=None, revision=None):
    """Stand in for `datasets.load_dataset`: rows in the dataset's columns."""
    import datasets

    rows, splits = HUB[path, name, data_dir]
    assert split in splits, f"{path} has no split {split}"
    made = [rows(i, asked) for i, asked in enumerate(ASKED)]
    return datasets.Dataset.from_list(sum(made, []) if isinstance(made[0], list) else made)
