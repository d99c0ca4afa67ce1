# SPDX-License-Identifier: Apache-2.0
"""Every text is tokenised once and every source read once, however many stages need it."""

import json
from collections import Counter
from types import SimpleNamespace

import jinja2
import pytest
import small
from transformers import PreTrainedTokenizerFast

from lora_rlhf import pipeline
from lora_rlhf.algorithms import trainer_configs
from lora_rlhf.data import dataset_builder, filters, padding, tokenization
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import has_reward_model
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.training import sft
from lora_rlhf.training.reward import ranking_trainer, reward_metrics


@pytest.fixture
def encoded(monkeypatch):
    """Count how often each text is tokenised, by text and kind of encoding."""
    seen, call = Counter(), PreTrainedTokenizerFast.__call__

    def counting(self, text=None, *args, **kwargs):
        texts = [text] if isinstance(text, str) else text
        seen.update((one, kwargs.get("split_special_tokens", False)) for one in texts)
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    return seen


@pytest.fixture
def recipe(tmp_path):
    """Comparisons that serve as all sets, three for each prompt, and evaluation prompts."""
    words = [f"w{i}" for i in range(5, 55)]
    pairs = [
        {"prompt": f"{a} {b}", "chosen": f"{a} {a} {c}", "rejected": f"{b} {b} {c}"}
        for a, b in zip(words[:40], words[1:41], strict=True)
        for c in ("w58", "w59", "w60")
    ]
    evaluated = [{"prompt": f"{a} {a} {a}"} for a in words]
    sources = {}
    for name, rows in (("pairs", pairs), ("evaluated", evaluated)):
        sources[name] = [{"path": str(tmp_path / f"{name}.jsonl")}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = dict.fromkeys(("demonstrations", "comparisons", "prompts"), sources["pairs"])
    return Recipe.model_validate(
        {
            "name": "t",
            "model": {"id": str(small.base_folder())},
            "reward": {"held_out_model": True},
            "ppo": {"args": {"steps_per_generation": 1}},
            "data": {**sets, "evaluate": sources["evaluated"], "held_out": 0.2},
        }
    )


@pytest.mark.parametrize("chat", [False, True])
def test_the_stages_of_a_run_tokenise_each_text_once(recipe, encoded, chat, monkeypatch):
    # It encodes the first rows of each set once more, as one text.
    monkeypatch.setattr(filters, "_note_other_ids", lambda *_: None)
    backbone = small.backbone()
    if not chat:
        backbone.tokenizer.chat_template = None
    encoded.clear()
    loaded = {}
    shown = dataset_builder.demonstrations(recipe, backbone.tokenizer, loaded)
    evaluated = dataset_builder.prompts(recipe, backbone.tokenizer, loaded)
    judged = dataset_builder.comparisons(recipe, backbone.tokenizer, loaded=loaded)
    sft.tokenize(backbone, shown.train)
    sft.tokenize(backbone, shown.held_out)
    for _ in range(2):  # an ensemble of reward models
        ranking_trainer.rankings(backbone, judged.train)
    reward_metrics.Comparisons.encode(backbone, judged.held_out)
    for row in evaluated.held_out:
        backbone.encode_prompt(row["prompt"])
    assert len(encoded) > 200
    assert encoded.most_common(1)[0][1] == 1


def test_cached_ids_are_those_of_the_tokenizer():
    backbone = small.backbone()
    for text in ("w5 w6", "w5 <user> w7", ""):
        ids = backbone.tokenizer(text)["input_ids"]
        completion = backbone.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        for _ in range(2):
            assert backbone.encode_prompt(text) == ids
            assert backbone.encode_completion(text) == [*completion["input_ids"], small.EOS]
    first = backbone.encode_prompt("w5")
    first.append(99)  # a list of the caller's own
    assert backbone.encode_prompt("w5") == first[:-1]
    messages = [{"role": "user", "content": "w5"}]
    before = backbone.encode_prompt(messages)
    backbone.tokenizer.chat_template = "{{ messages[0].content }} w9"
    assert backbone.encode_prompt(messages) != before  # another template, another fingerprint


def test_a_refused_prompt_is_not_cached():
    tokenizer = small.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    for _ in range(2):
        with pytest.raises(jinja2.TemplateError):
            tokenization.prompt_ids(tokenizer, [[{"role": "user", "content": "w5"}]])


def test_a_run_reads_every_set_once(recipe, tmp_path, monkeypatch):
    reads, read = Counter(), dataset_builder.read

    def counting(source, *more):
        reads[source.path] += 1
        return read(source, *more)

    monkeypatch.setattr(dataset_builder, "read", counting)
    out = tmp_path / "run"
    configs, record = (
        trainer_configs.build(recipe, out, ("sft", "reward", "ppo")),
        Record.open(out, recipe),
    )
    made = SimpleNamespace(tokenizer=small.tokenizer())
    data = pipeline._Data(recipe, record, made, Progress(quiet=True))
    for read_one in data.checks(["sft", "reward", "ppo", "evaluate"], configs):
        read_one()
    assert has_reward_model(recipe)
    # Demonstrations, comparisons and prompts are three sets of one file.
    assert sorted(reads.values()) == [1, 3]


def test_sets_loaded_together_equal_sets_loaded_alone(recipe):
    tokenizer, loaded = small.tokenizer(), {}
    for prepare in (dataset_builder.demonstrations, dataset_builder.prompts):
        together, alone = prepare(recipe, tokenizer, loaded), prepare(recipe, tokenizer)
        assert together.report == alone.report
        assert list(together.train) == list(alone.train)
    for part in ("proxy", "held_out_model", "all"):
        together = dataset_builder.comparisons(recipe, tokenizer, part=part, loaded=loaded)
        alone = dataset_builder.comparisons(recipe, tokenizer, part=part)
        assert together.report == alone.report
        assert list(together.train) == list(alone.train)


def test_padding_is_on_the_left_and_masked_by_length():
    """Rows that hold the pad id themselves keep it: masks never look at ids."""
    ids, mask = padding.pad_left([[0, 5], [6, 0, 7, 0]], 0)
    assert ids.tolist() == [[0, 0, 0, 5], [6, 0, 7, 0]]
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
