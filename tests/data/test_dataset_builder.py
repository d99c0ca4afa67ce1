# SPDX-License-Identifier: Apache-2.0
"""Datasets for the stages: the split by prompt, the closed-world task, and real comparisons."""

import json
import os
import subprocess
import sys

import pytest
from data_sources import (
    PAIRS,
    PREFS,
    Words,
    all_rows,
    answer,
    jsonl,
    make_tokenizer,
    recipe,
    removed,
    user,
)

from lora_rlhf.data import dataset_builder, filters
from lora_rlhf.data.closed_world import checkers, generator
from lora_rlhf.errors import DataError

# --- the split -----------------------------------------------------------------------------------


def test_prefixes_of_a_conversation_are_on_one_side_in_all_sets(tmp_path, chat):
    rows = []
    for i in range(80):
        for depth in range(3):
            more = [t for d in range(depth) for t in (*answer(f"r{d}"), *user(f"s{d}"))]
            prompt = user(f"q{i}") + more
            rows.append({"prompt": prompt, "chosen": answer("good"), "rejected": answer("bad")})
    path = jsonl(tmp_path / "d.jsonl", rows)
    given = recipe(demonstrations=path, comparisons=path, prompts=path, held_out=0.3)
    check_sides_apart(
        dataset_builder.demonstrations(given, chat),
        dataset_builder.comparisons(given, chat),
        dataset_builder.prompts(given, chat),
    )
    assert len(dataset_builder.prompts(given, chat).held_out) % 3 == 0


def check_sides_apart(*sets):
    sides = [
        [
            {filters.first_turn(p).casefold() for p in side["prompt"]}
            for side in (s.train, s.held_out)
        ]
        for s in sets
    ]
    for a in sides:
        for b in sides:
            assert a[0] and b[1] and not a[0] & b[1]


def test_both_reward_models_share_no_training_prompt_and_all_held_out_rows(tmp_path, plain):
    path = jsonl(tmp_path / "d.jsonl", PREFS)
    given = recipe(comparisons=path, held_out=0.4)  # so the middle of the rest is 0.7, not 0.5
    whole, proxy, other = (
        dataset_builder.comparisons(given, plain, part=part)
        for part in ("all", "proxy", "held_out_model")
    )
    a, b = set(proxy.train["prompt"]), set(other.train["prompt"])
    assert min(len(a), len(b)) > 0.7 * max(len(a), len(b)) and not a & b
    assert a | b == set(whole.train["prompt"])
    assert list(proxy.held_out) == list(other.held_out) == list(whole.held_out)
    assert proxy.report["counts"]["part proxy"] == {"before": len(whole.train), "after": len(a)}


def test_evaluation_prompts_are_in_no_other_set(tmp_path, plain):
    path = jsonl(tmp_path / "d.jsonl", PREFS)
    evaluate = jsonl(tmp_path / "e.jsonl", [{"prompt": f"Q{i} "} for i in range(10)])
    given = recipe(demonstrations=path, comparisons=path, prompts=path, evaluate=evaluate)
    prepared = dataset_builder.prompts(given, plain)
    assert len(prepared.held_out) == 10
    assert prepared.report["evaluate"]["sources"][0]["name"] == "e.jsonl"
    sets = (
        dataset_builder.demonstrations(given, plain),
        dataset_builder.comparisons(given, plain),
        prepared,
    )
    check_sides_apart(*sets)
    assert all(removed(s, "in the evaluation set") == 10 for s in sets)
    with pytest.raises(DataError, match="leave data.evaluate out"):
        dataset_builder.prompts(recipe(prompts=path, evaluate=path), plain)


def test_limit_takes_a_seeded_sample_that_differs_by_seed(tmp_path, plain):
    path = str(jsonl(tmp_path / "d.jsonl", PAIRS))
    source = {"path": path, "limit": 30}
    prepared = {
        seed: dataset_builder.demonstrations(
            recipe(seed, demonstrations=source, held_out=0.2), plain
        )
        for seed in (1, 2)
    }
    prompts = {seed: [row["prompt"] for row in all_rows(f)] for seed, f in prepared.items()}
    assert len(prompts[1]) == 30 and set(prompts[1]) != set(prompts[2])
    assert set(prompts[1]) != {f"q{i}" for i in range(30)}
    assert prepared[1].report["counts"]["limit"] == {"before": 60, "after": 30}
    again = dataset_builder.demonstrations(recipe(1, demonstrations=source, held_out=0.2), plain)
    assert list(again.train) == list(prepared[1].train) and again.report == prepared[1].report


def test_another_process_prepares_the_same(tmp_path, plain):
    path = jsonl(tmp_path / "d.jsonl", PAIRS)
    code = (
        "import json, sys; from types import SimpleNamespace as N\n"
        "from lora_rlhf.data import dataset_builder as data\n"
        "from lora_rlhf.recipe.schema import Recipe\n"
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules\n"
        f"r = Recipe.model_validate({recipe(demonstrations=path).model_dump()!r})\n"
        "class T:\n"
        "    chat_template = eos_token = bos_token = None\n"
        "    all_special_tokens, eos_token_id = [], 0\n"
        "    texts = []\n"
        "    def __call__(self, texts, **k):\n"
        "        self.texts += texts\n"
        "        first = len(self.texts) - len(texts)\n"
        "        return {'input_ids': [[first + i] for i in range(len(texts))]}\n"
        "    def decode(self, ids, **k): return self.texts[ids[0]]\n"
        "    def batch_decode(self, ids, **k): return [self.decode(one) for one in ids]\n"
        "p = data.demonstrations(r, T()); print(json.dumps([list(p.train), p.report]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "77"},
    )
    here = dataset_builder.demonstrations(recipe(demonstrations=path), plain)
    assert json.loads(run.stdout) == [list(here.train), here.report]


def test_the_report_describes_the_data_without_any_folder(tmp_path, plain):
    rows = list(PAIRS)
    path = jsonl(tmp_path / "d.jsonl", rows)
    report = dataset_builder.demonstrations(recipe(demonstrations=path), plain).report
    assert str(tmp_path) not in json.dumps(report)
    [source] = report["sources"]
    digest = source.pop("sha256")
    assert source == {"kind": "file", "name": "d.jsonl", "license": None, "rows": 60}
    jsonl(tmp_path / "d.jsonl", [dict(reversed(row.items())) for row in rows])
    report = dataset_builder.demonstrations(recipe(demonstrations=path), plain).report
    assert report["sources"][0]["sha256"] == digest  # the order of columns means nothing
    rows[5] = {**rows[5], "completion": "changed"}
    jsonl(tmp_path / "d.jsonl", rows)
    report = dataset_builder.demonstrations(recipe(demonstrations=path), plain).report
    assert report["sources"][0]["sha256"] != digest


# --- the closed-world task -----------------------------------------------------------------------

TASK = {"task": "closed-world", "n": 60}


def test_task_sets_share_no_prompt_and_carry_their_items(chat):
    given = recipe(demonstrations=TASK, comparisons=TASK, prompts=TASK, evaluate={**TASK, "n": 30})
    prepared = dataset_builder.prompts(given, chat)
    assert len(prepared.held_out) == 30 and len(prepared.train) > 40
    for row in all_rows(prepared):
        item = checkers.Item.from_dict(json.loads(row["item"]))
        assert row["prompt"] == user(item.prompt)
    sets = (
        dataset_builder.demonstrations(given, chat),
        dataset_builder.comparisons(given, chat, Sampling()),
        prepared,
    )
    check_sides_apart(*sets)
    assert set(sets[0].train.column_names) == {"prompt", "completion"}
    assert sets[0].report["sources"][0]["kind"] == "task"
    assert sets[0].report["notes"] == []


class Sampling:
    """Good and flawed completions in turn, as a sampler."""

    def __call__(self, prompts, k, seed):
        import random

        rng = random.Random(seed)
        self.items = generator.items(len(prompts), seed, "comparisons")
        assert [p[0]["content"] for p in prompts] == [i.prompt for i in self.items]
        self.texts = [
            [(generator.flawed if j % 2 else generator.good)(item, rng) for j in range(k)]
            for item in self.items
        ]
        return self.texts


def test_task_comparisons_are_ranked_by_a_labeler_who_is_mostly_right(chat):
    sampling = Sampling()
    source = {**TASK, "n": 200, "agreement": 0.73}
    prepared = dataset_builder.comparisons(recipe(comparisons=source), chat, sampling)
    gold = {i.prompt: i for i in sampling.items}
    right = wrong = 0
    for row in all_rows(prepared):
        item = gold[row["prompt"][0]["content"]]
        a, b = (checkers.check(item, row[k][0]["content"]).reward for k in ("chosen", "rejected"))
        right, wrong = right + (a > b), wrong + (a < b)
    assert 0.75 < right / (right + wrong) < 0.95  # p^2 + (1-p)^2 = 0.73 at p = 0.84
    agreement = prepared.report["labeler_agreement"]
    assert agreement["asked"] == 0.73 and abs(agreement["measured"] - 0.73) < 0.08
    assert agreement["pairs"] > 500
    assert "item" not in prepared.train.column_names
    perfect = dataset_builder.comparisons(
        recipe(comparisons={**source, "agreement": 1.0}), chat, Sampling()
    )
    assert perfect.report["labeler_agreement"]["measured"] == 1.0


def test_a_sampled_empty_answer_may_be_rejected_but_not_chosen(chat):
    def sampler(prompts, k, seed):
        items = generator.items(len(prompts), seed, "comparisons")
        import random

        return [
            ["", *[generator.good(item, random.Random(j)) for j in range(k - 1)]] for item in items
        ]

    prepared = dataset_builder.comparisons(
        recipe(comparisons={**TASK, "agreement": 1.0}), chat, sampler
    )
    assert all(row["rejected"][0]["content"] == "" for row in all_rows(prepared))
    assert all(row["chosen"][0]["content"] for row in all_rows(prepared))


def test_task_comparisons_need_a_sampler_with_the_right_number_of_completions(chat):
    with pytest.raises(ValueError, match="need a sampler"):
        dataset_builder.comparisons(recipe(comparisons=TASK), chat)
    with pytest.raises(ValueError, match="4 completions"):
        dataset_builder.comparisons(
            recipe(comparisons=TASK), chat, lambda p, k, s: [["x"] * 3] * len(p)
        )


def test_task_rows_are_text_without_a_chat_template(plain):
    row = dataset_builder.demonstrations(recipe(demonstrations=TASK), plain).train[0]
    assert isinstance(row["completion"], str) and row["prompt"].endswith("\n")


def test_instructions_to_labelers_reach_the_report(tmp_path, plain):
    path = str(jsonl(tmp_path / "d.jsonl", PREFS))
    source = {"path": path, "labeler_instructions": "Which is kinder?"}
    prepared = dataset_builder.comparisons(recipe(comparisons=[source, source]), plain)
    assert prepared.report["instructions"] == "Which is kinder?"
    other = {**source, "labeler_instructions": "Which is shorter?"}
    prepared = dataset_builder.comparisons(recipe(comparisons=[source, other]), plain)
    assert prepared.report["instructions"] == "Which is kinder? / Which is shorter?"
    assert "instructions" not in dataset_builder.comparisons(recipe(comparisons=path), plain).report
    prepared = dataset_builder.comparisons(recipe(comparisons=TASK), make_tokenizer(), Sampling())
    assert "simulated" in prepared.report["instructions"]


# --- real human comparisons ----------------------------------------------------------------------


@pytest.mark.data
def test_hh_comparisons_are_split_by_conversation(real_data, monkeypatch):
    monkeypatch.setenv("LORA_RLHF_DATA", str(real_data))
    files = [f"data://hh-rlhf/{name}-base.test.jsonl.gz" for name in ("helpful", "harmless")]
    given = recipe(
        demonstrations=files[0],
        comparisons=files,
        prompts=files,
        max_tokens=100_000,
        max_prompt_tokens=100_000,
        held_out=0.2,
    )
    chat, loaded = Words(), {}  # shared, as in a run
    pairs = dataset_builder.comparisons(given, chat, loaded=loaded)
    assert [source["rows"] for source in pairs.report["sources"]] == [2354, 2312]
    assert removed(pairs, "chosen equal to rejected") == 2
    assert "HH-RLHF transcripts were read as messages (4,666 rows)" in pairs.report["notes"]
    check_sides_apart(
        dataset_builder.demonstrations(given, chat, loaded),
        pairs,
        dataset_builder.prompts(given, chat, loaded),
    )
    assert 0.15 < len(pairs.held_out) / len(all_rows(pairs)) < 0.25
    assert all(
        "\n\nHuman:" not in turn["content"] for row in pairs.held_out for turn in row["chosen"]
    )


@pytest.mark.data
def test_well_known_data_files_are_read_with_a_column_mapping(real_data):
    for name, columns, rows in (
        ("advbench/harmful_behaviors.csv", {"prompt": "goal"}, 520),
        ("xstest/xstest_prompts.csv", {}, 450),
        ("ifeval/input_data.jsonl", {}, 541),
        ("truthfulqa/TruthfulQA.csv", {"prompt": "Question"}, 790),
        ("winogender/all_sentences.tsv", {"prompt": "sentence"}, 720),
        ("pandalm/testset-v1.json", {"prompt": "instruction"}, 999),
    ):
        source = {"path": str(real_data / name), "columns": columns}
        assert (
            dataset_builder.prompts(recipe(prompts=source), Words()).report["sources"][0]["rows"]
            == rows
        )
