# SPDX-License-Identifier: Apache-2.0
"""Checks of a base's special tokens: pad is not eos, and every token has an embedding row."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_rlhf.errors import TokenizerError

_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<unk>")


def ensure_distinct_pad(tokenizer: PreTrainedTokenizerBase, causal: PreTrainedModel) -> None:
    """Give tokenizer and model a pad token that is not eos, without resizing the vocabulary."""
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            "the tokenizer has no eos token", remedy="use a base whose tokenizer has one"
        )
    declared = causal.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *([declared] if isinstance(declared, int) else declared or [])}
    rows, pad = causal.get_input_embeddings().num_embeddings, tokenizer.pad_token_id
    if pad is None or pad in eos or pad >= rows:
        tokenizer.pad_token = _unused_token(tokenizer, eos, rows)
    causal.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    causal.generation_config.pad_token_id = tokenizer.pad_token_id


def _unused_token(tokenizer: PreTrainedTokenizerBase, eos: set[int], rows: int) -> str:
    added = sorted(tokenizer.added_tokens_decoder.items())
    vocabulary, template = tokenizer.get_vocab(), _template_text(tokenizer)
    names = [n for n in _PAD_NAMES if n in vocabulary]
    for name in [*names, *(str(token.content) for _, token in added if token.special)]:
        index = vocabulary[name]
        taken = name in (tokenizer.bos_token, tokenizer.eos_token) or name in template
        if not taken and index not in eos and index < rows:
            return name
    raise TokenizerError(
        f"the pad token is {tokenizer.pad_token!r} and eos is {tokenizer.eos_token!r}",
        expected="a pad token of its own: the reward is read at the last token before the padding",
        remedy="set tokenizer.pad_token to an unused token, saved beside the base model",
    )


def check_embedding_rows(tokenizer: PreTrainedTokenizerBase, causal: PreTrainedModel) -> None:
    """Reject tokens that can occur but have no row in the embedding.

    A special token that the template does not write is harmless: texts contain no special tokens.
    """
    rows, template = causal.get_input_embeddings().num_embeddings, _template_text(tokenizer)
    bad = [
        token.content
        for index, token in tokenizer.added_tokens_decoder.items()
        if index >= rows and (not token.special or token.content in template)
    ]
    if tokenizer.eos_token_id >= rows:
        bad.append(tokenizer.eos_token)
    if bad:
        raise TokenizerError(
            f"the tokenizer has {bad[0]!r}, and the embedding of the model, of {rows} rows, has no "
            "row for it",
            expected="a tokenizer of this model: every token has its row",
            remedy="use the tokenizer that the model was trained with, or resize and train the "
            "embedding before this",
        )


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template and a chat that it rendered, since markers may depend on roles."""
    if not isinstance(tokenizer.chat_template, str):
        return ""
    chat = [{"role": role, "content": ""} for role in ("user", "assistant")]
    try:
        rendered = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # the template refuses this chat; the data filters report it
        rendered = ""
    return tokenizer.chat_template + rendered
