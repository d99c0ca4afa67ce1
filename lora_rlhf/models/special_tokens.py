# SPDX-License-Identifier: Apache-2.0
"""A base's special tokens: the end of an answer, a pad that is not eos, a row for every token."""

from __future__ import annotations

from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_rlhf.data import chat_template
from lora_rlhf.errors import TokenizerError

_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<unk>")


def append_nothing(tokenizer: PreTrainedTokenizerBase) -> str:
    """Remove what the tokenizer appends to every text, such as an eos; returns a note on it.

    It would stand between a prompt and its answer.
    """
    text, whole = (tokenizer("a", add_special_tokens=a)["input_ids"] for a in (False, True))
    starts = [i for i in range(len(whole)) if whole[i : i + len(text)] == text]
    if not text or not starts or starts[0] + len(text) == len(whole):
        return ""
    before = [(tokenizer.convert_ids_to_tokens(i), i) for i in whole[: starts[0]]]
    after = tokenizer.convert_ids_to_tokens(whole[starts[0] + len(text) :])
    tokenizer.add_eos_token = False
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*(token for token, _ in before), "$A"], special_tokens=before
    )
    return f"the tokenizer appends {' '.join(after)!r} to every text; prompts are left without it"


def end_turns(tokenizer: PreTrainedTokenizerBase, causal: PreTrainedModel) -> str:
    """Make the token with which the chat template ends an answer the eos; returns a note of it.

    SFT, reward model and policy end an answer with the tokenizer's eos. Earlier ones stay eos of
    the model, so that they end an answer too.
    """
    end, before = chat_template.turn_end(tokenizer), tokenizer.eos_token
    if end is None or end == before:
        return ""
    ids = end_ids(tokenizer, causal) if before is not None else []
    tokenizer.eos_token = end
    causal.generation_config.eos_token_id = list(dict.fromkeys([tokenizer.eos_token_id, *ids]))
    return f"answers end with {end!r}, as in the chat template; the tokenizer's eos is {before!r}"


def end_ids(tokenizer: PreTrainedTokenizerBase, causal: PreTrainedModel) -> list[int]:
    """Return every id that ends an answer: the tokenizer's eos, which is taught, then the model's.

    One set for SFT, reward, rollouts, evaluation and the code on a card.
    """
    declared = causal.generation_config.eos_token_id
    ids = [declared] if isinstance(declared, int) else declared or []
    return list(dict.fromkeys([tokenizer.eos_token_id, *ids]))


def ensure_distinct_pad(tokenizer: PreTrainedTokenizerBase, causal: PreTrainedModel) -> None:
    """Give tokenizer and model a pad token that is not eos, without resizing the vocabulary."""
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            "the tokenizer has no eos token", remedy="use a base whose tokenizer has one"
        )
    eos = set(end_ids(tokenizer, causal))
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
    pad = tokenizer.pad_token_id
    if pad is None:
        cause, add = "the tokenizer has no pad token", True
    elif pad >= rows:
        cause = f"the pad token {tokenizer.pad_token!r} has the id {pad}, and the embedding has "
        cause, add = f"{cause}{rows} rows: it was not resized", False
    else:
        cause, add = f"the pad token {tokenizer.pad_token!r} also ends an answer", True
    code = "tokenizer.add_special_tokens({'pad_token': '<|pad|>'}); " * add
    raise TokenizerError(
        f"{cause}, and no unused special token can take its place",
        expected="a pad token of its own: the reward is read at the last token before the padding",
        remedy="give the base one, once, in Python with transformers' `tokenizer` and `model` of "
        f"it: {code}model.resize_token_embeddings(len(tokenizer)); then save both into a folder by "
        "save_pretrained, and name it as model.id",
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
    added = tokenizer.added_tokens_decoder
    bad += [
        word for word, i in tokenizer.get_vocab().items() if i >= rows and i not in added
    ]  # of another model: any text may hold them
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
    template = chat_template.usual(tokenizer)
    if not template:
        return ""
    chat = [{"role": role, "content": ""} for role in ("user", "assistant")]
    try:
        rendered = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # the template refuses this chat; the data filters report it
        rendered = ""
    return template + rendered
