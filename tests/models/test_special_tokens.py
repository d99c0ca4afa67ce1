# SPDX-License-Identifier: Apache-2.0
"""A pad token apart from eos, for tokenizers that bring one and for those that do not."""

import json

import pytest
import small
from tokenizers import processors
from transformers import AutoTokenizer

from lora_rlhf.errors import TokenizerError


def test_a_pad_token_of_its_own_is_kept():
    base = small.base(small.base_folder())
    assert base.tokenizer.pad_token == "<pad>"
    assert base.causal.config.pad_token_id == base.causal.generation_config.pad_token_id == 0


def test_pad_equal_to_eos_becomes_a_reserved_token(tmp_path):
    """As SmolLM2: pad is eos, but the vocabulary has special tokens that no template uses."""
    words = ("<reserved_0>", "</s>", "<s>")
    base = small.base(small.with_tokenizer(tmp_path, small.tokenizer("</s>", words)))
    assert base.tokenizer.pad_token == "<reserved_0>"
    assert base.tokenizer.pad_token_id not in base.eos_ids
    assert base.causal.config.pad_token_id == base.tokenizer.pad_token_id
    assert base.causal.generation_config.pad_token_id == base.tokenizer.pad_token_id
    assert base.causal.get_input_embeddings().num_embeddings == small.VOCABULARY


def test_a_token_called_pad_is_preferred_to_other_reserved_ones(tmp_path):
    words = ("<reserved_0>", "</s>", "<pad>", "<unk>")
    base = small.base(small.with_tokenizer(tmp_path, small.tokenizer("</s>", words)))
    assert base.tokenizer.pad_token == "<pad>"


def test_without_a_free_token_there_is_no_pad_and_loading_stops(tmp_path):
    """As GPT-2: its one special token is eos, bos and unk at once."""
    folder = small.with_tokenizer(tmp_path, small.tokenizer(None, ("w0", "</s>"), markers=()))
    with pytest.raises(TokenizerError, match="the tokenizer has no pad token") as caught:
        small.base(folder)
    assert "add_special_tokens({'pad_token'" in caught.value.remedy
    assert "resize_token_embeddings" in caught.value.remedy


def test_a_pad_without_a_row_and_a_pad_that_ends_answers_have_their_own_messages(tmp_path):
    tokenizer = small.tokenizer(None, ("w0", "</s>"), markers=())
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(TokenizerError, match="64 rows: it was not resized") as caught:
        small.base(small.with_tokenizer(tmp_path / "a", tokenizer))
    assert "add_special_tokens" not in caught.value.remedy
    tokenizer = small.tokenizer("</s>", ("w0", "</s>"), markers=())
    with pytest.raises(TokenizerError, match="'</s>' also ends an answer"):
        small.base(small.with_tokenizer(tmp_path / "b", tokenizer))


def test_the_templates_end_of_turn_is_taught_and_ends_answers(tmp_path):
    """As Gemma: the tokenizer's eos ends a document, the template ends a turn with another one."""
    words = ("<pad>", "</s>", "<end_of_turn>", "<unk>")
    tokenizer = small.tokenizer("<pad>", words)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end_of_turn> {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    base = small.base(small.with_tokenizer(tmp_path, tokenizer))
    assert base.eos_ids == base.causal.generation_config.eos_token_id == [2, 1]
    assert base.encode_completion("w5") == [5, 2]
    [note] = base.describe()["token_notes"]
    assert "<end_of_turn>" in note and "</s>" in note


def test_nothing_is_appended_to_a_prompt(tmp_path):
    tokenizer = small.tokenizer()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=["w9", "$A", "</s>"], special_tokens=[("w9", 9), ("</s>", 1)]
    )
    base = small.base(small.with_tokenizer(tmp_path / "base", tokenizer))
    assert base.encode_prompt("w5 w6") == [9, 5, 6]
    assert "appends '</s>'" in base.source["token_notes"][0]
    base.tokenizer.save_pretrained(tmp_path / "saved")  # beside an adapter, for the card's code
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("w5")["input_ids"] == [9, 5]


def test_markers_of_the_chat_template_are_never_the_pad(tmp_path):
    """The template makes `<user>` from the role's name: it is nowhere in the template's text."""
    tokenizer = small.tokenizer(None, ("w0", "</s>"))
    assert "<user>" not in tokenizer.chat_template
    with pytest.raises(TokenizerError):
        small.base(small.with_tokenizer(tmp_path, tokenizer))


def test_a_pad_outside_the_embedding_is_replaced(tmp_path):
    """Some tokenizers add `<pad>` behind the last row of the embedding: an index error on a GPU."""
    tokenizer = small.tokenizer("</s>")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == small.VOCABULARY
    base = small.base(small.with_tokenizer(tmp_path, tokenizer))
    assert base.tokenizer.pad_token_id < small.VOCABULARY
    assert base.tokenizer.pad_token == "<pad>"


def test_a_second_eos_of_the_model_may_not_be_the_pad(tmp_path):
    """Chat models end a turn with one token and a text with another: both end a completion."""
    words = ("<pad>", "</s>", "<end_of_turn>", "<unk>")
    folder = small.with_tokenizer(tmp_path, small.tokenizer("<end_of_turn>", words))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "pad_token_id": 2}')
    base = small.base(folder)
    assert base.eos_ids == [1, 2]
    assert base.tokenizer.pad_token == "<pad>"


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = small.tokenizer()
    tokenizer.eos_token = None
    folder = small.with_tokenizer(tmp_path, tokenizer)
    with pytest.raises(TokenizerError, match="no eos"):
        small.base(folder)


def test_a_tokenizer_with_more_words_than_the_embedding_has_rows_is_refused(tmp_path):
    """Of another model: any text may hold such a word, which is an IndexError in the embedding."""
    tokenizer = small.tokenizer("<pad>", ("<pad>", "</s>", "<unk>"), markers=())
    config = json.loads((small.base_folder() / "config.json").read_text())
    words = tokenizer.get_vocab()
    assert max(words.values()) < config["vocab_size"]
    folder = small.with_tokenizer(tmp_path, tokenizer)
    file = folder / "tokenizer.json"
    read = json.loads(file.read_text())
    read["model"]["vocab"]["beyond"] = config["vocab_size"]
    file.unlink()
    file.write_text(json.dumps(read))
    with pytest.raises(TokenizerError, match="'beyond'.* has no row"):
        small.base(folder)
