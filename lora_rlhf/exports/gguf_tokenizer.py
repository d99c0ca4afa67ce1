# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE tokenizer as the fields of a GGUF file."""

from __future__ import annotations

import json
import re
from typing import Any

from lora_rlhf.errors import UsageError
from lora_rlhf.models import special_tokens
from lora_rlhf.models.base_model import BaseModel

_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_ENDS = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"

_PRE = {
    ("ByteLevel+",): "gpt-2",
    ("Digits", "ByteLevel+"): "smollm",
    (rf"{_CASES}{_WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+{_ENDS}", "ByteLevel"): "qwen2",
    (rf"{_CASES}{_WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+{_ENDS}",
     "ByteLevel"): "llama-bpe",
    (rf"{_CASES}{_WORD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+{_ENDS}",
     "ByteLevel"): "qwen35",
    (rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+"
     r"[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+", "ByteLevel"): "tekken",
}  # fmt: skip
"""Steps of a `pre_tokenizer` -> the name under which llama.cpp has the same ones."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_TAG = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


def fields(base: BaseModel, writer: Any) -> None:
    """Add tokens, merges, special tokens and the chat template to a GGUF writer.

    Raises:
        UsageError: llama.cpp has no tokenizer like this one.
    """
    tokenizer = base.tokenizer
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_type(spec))
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    added, tokens, kinds = tokenizer.added_tokens_decoder, [], []
    for index in range(base.causal.get_input_embeddings().num_embeddings):
        tokens.append(names.get(index, f"[PAD{index}]"))
        kind = _NORMAL if index in names else _UNUSED
        if index in added:
            kind = _CONTROL if added[index].special else _USER_DEFINED
        kinds.append(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = spec["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    ends = special_tokens.end_ids(tokenizer, base.causal)
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(False)
    if template := chat_template(tokenizer):
        writer.add_chat_template(template)


def adds_bos(tokenizer: Any) -> bool:
    """Tell whether the tokenizer puts a bos before a text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def chat_template(tokenizer: Any) -> str:
    """Return the chat template without transformers' own tag `generation`; empty if there is none.

    The tag becomes a condition that is always true, with the same control of white space.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default", "")
    return _TAG.sub(
        lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", template or ""
    )


def pre_type(spec: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a `tokenizer.json` splits a text.

    Raises:
        UsageError: It has no such name.
    """
    model, pre = spec["model"], spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre]) if pre.get("type") == "Sequence" else [pre]
    byte_level = model.get("type") == "BPE" and not model.get("byte_fallback")
    known = _PRE.get(tuple(_step(step) for step in steps)) if byte_level else None
    if known is None:
        kinds = ", ".join(str(step.get("type")) for step in steps)
        raise UsageError(
            f"the tokenizer ({model.get('type')}; splits a text by {kinds}) cannot be written into "
            "a GGUF file",
            expected=f"a byte-level BPE that llama.cpp knows: {', '.join(_PRE.values())}",
            remedy="export `--to merged`, and convert that folder with llama.cpp's own script",
        )
    return known


def _step(step: dict[str, Any]) -> str:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "ByteLevel+" if step.get("use_regex", True) else "ByteLevel"
    if kind == "Digits" and step.get("individual_digits"):
        return "Digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step.get("pattern", {}).get("Regex"))
    return f"another {kind}"
