# SPDX-License-Identifier: Apache-2.0
"""Rows, files and recipes for the tests of the data, and a byte-level tokenizer."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_rlhf.recipe.schema import Recipe

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PAIRS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(60)]
PREFS = [{"prompt": f"q{i}", "chosen": f"good{i}", "rejected": f"poor{i}"} for i in range(60)]


def make_tokenizer(template=TEMPLATE):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        ["user assistant what is a plan for the day? human"] * 4,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=SPECIAL[0], eos_token=SPECIAL[2]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL[1]]})
    tokenizer.chat_template = template
    return tokenizer


def recipe(seed=0, **sets):
    sets.setdefault("max_lost", 1.0)
    limits = ("held_out", "max_tokens", "max_prompt_tokens", "max_lost")
    limits = {k: sets.pop(k) for k in limits if k in sets}
    sources = {
        name: [s if isinstance(s, dict) else {"path": str(s)} for s in given]
        for name, given in ((n, g if isinstance(g, list) else [g]) for n, g in sets.items())
    }
    return Recipe.model_validate(
        {"name": "t", "seed": seed, "model": {"id": "tiny"}, "data": {**sources, **limits}}
    )


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user(text):
    return [{"role": "user", "content": text}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def all_rows(prepared):
    return [*prepared.train, *prepared.held_out]


def removed(prepared, reason):
    counts = prepared.report["counts"][reason]
    return counts["before"] - counts["after"]


class Words:
    """A tokenizer whose tokens are words: the byte-level one is slow on large files."""

    eos_token, bos_token, all_special_tokens = None, None, ()
    chat_template, eos_token_id = "a template", 0

    def __call__(self, texts, **_):
        if isinstance(texts, str):
            return {"input_ids": [0] * len(texts.split())}
        self.texts = texts
        return {"input_ids": [[0] * len(text.split()) for text in texts]}

    def batch_decode(self, ids, **_):
        return self.texts if len(self.texts) == len(ids) else [""] * len(ids)

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def apply_chat_template(self, messages, **_):
        return "".join(f"{turn['content']}\n" for turn in messages)
