# SPDX-License-Identifier: Apache-2.0
"""Judges and their validation against people's labels."""

import gzip
import json
import math
import random

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from lora_rlhf.errors import DataError, NonFiniteError
from lora_rlhf.evaluation import evaluate_targets, judge_validation, judges
from lora_rlhf.evaluation.judges import Pairs, People, Verdicts
from lora_rlhf.evaluation.prompt_sets import Row
from lora_rlhf.models import loading
from lora_rlhf.recipe.schema import ModelSection


class ByRule:
    """A judge that follows a rule on the two texts."""

    name, kind, independent = "rule", "model", True

    def __init__(self, rule, changed=None):
        self.rule, self.changed = rule, changed

    def compare(self, pairs):
        wins = [self.rule(a, b) for a, b in zip(pairs.first, pairs.second, strict=True)]
        return Verdicts(wins, changed=self.changed)


def labels(tmp_path, n=120, seed=0, kinds=("x", "y")):
    """Three people who like the letter `g`, one of them in three quarters of cases."""
    rng, lines = random.Random(seed), []
    for i in range(n):
        good, bad = "g" * rng.randint(1, 9), "b" * rng.randint(1, 9)
        a, b, best = (good, bad, "a") if rng.random() < 0.5 else (bad, good, "b")
        other = {"a": "b", "b": "a"}[best]
        votes = [best, best, best if rng.random() < 0.75 else other]
        lines.append({"prompt": f"p{i}", "a": a, "b": b, "labels": votes, "kind": kinds[i % 2]})
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_judge_that_agrees_with_people_may_decide(tmp_path):
    labelled, _ = judge_validation.read(labels(tmp_path))
    judge = ByRule(lambda a, b: float("g" in a))
    record = judge_validation.validate(judge, labelled, "labels")
    assert record["accuracy"]["value"] == 1 and record["n"] == 120
    assert record["by_kind"].keys() == {"x", "y"}
    assert 0.75 < record["ceiling"]["value"] < 1, "one in twelve votes is against the others"
    assert judges.trust(judge, record)[0]


@pytest.mark.parametrize(
    ("rule", "near"),
    [
        (lambda a, b: 1.0, 0.5),  # the first one always
        (lambda a, b: 0.5, 0.5),  # a tie always
        (lambda a, b: 0.5 if len(a) == len(b) else float(len(a) > len(b)), 0.5),
        (lambda a, b: float("b" in a), 0.0),
    ],
    ids=["first", "tie", "longer", "swapped labels"],
)
def test_a_judge_without_knowledge_decides_nothing(tmp_path, rule, near):
    labelled, _ = judge_validation.read(labels(tmp_path))
    judge = ByRule(rule)
    record = judge_validation.validate(judge, labelled, "labels")
    assert record["accuracy"]["value"] == pytest.approx(near, abs=0.15)
    trusted, why = judges.trust(judge, record)
    assert not trusted and "is not clearly above" in why


def test_too_few_labels_or_none_decide_nothing(tmp_path):
    judge = ByRule(lambda a, b: float("g" in a))
    labelled, _ = judge_validation.read(labels(tmp_path), n=40)
    record = judge_validation.validate(judge, labelled, "l")
    why = "it was compared with 40 labels by people, and 50 are needed"
    assert judges.trust(judge, record) == (False, why)
    assert "never been compared" in judges.trust(judge, None)[1]
    judge.independent = False
    assert "trained against it" in judges.trust(judge, None)[1]


def test_pairs_of_transcripts_are_read_in_a_random_order(tmp_path):
    begin = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant:"
    path = tmp_path / "pairs.jsonl.gz"
    row = json.dumps({"chosen": begin + " good", "rejected": begin + " bad"})
    path.write_bytes(gzip.compress((row + "\n").encode() * 40))
    labelled, _ = judge_validation.read(path)
    firsts = [one.first for one in labelled]
    assert 8 < firsts.count("good") < 32
    assert all((one.majority == 1) == (one.first == "good") for one in labelled)
    turns = labelled[0].row.prompt
    assert [t["content"] for t in turns] == ["a?", "b", "c?"]


def test_an_answer_of_pandalm_that_is_the_json_true_is_a_text(tmp_path):
    row = {"instruction": "Is it?", "input": "1 = 1", "response1": True, "response2": "No."}
    path = tmp_path / "pandalm.json"
    path.write_text(json.dumps([row | {f"annotator{i}": 1 for i in (1, 2, 3)}]))
    [one], _ = judge_validation.read(path)
    assert {one.first, one.second} == {"True", "No."} and one.majority == float(one.first == "True")


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"prompt": "p", "a": "x", "b": "y", "labels": ["c"]}', '{"chosen": "x"}',
     '{"prompt": "p", "a": "x", "b": "y", "labels": []}',
     '{"prompt": "p", "a": "x", "b": null, "labels": ["a"]}'],
)  # fmt: skip
def test_a_row_that_is_no_labelled_pair_is_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "p", "a": "x", "b": "y", "labels": ["a"]}\n' + line + "\n")
    with pytest.raises(DataError, match=r"bad.jsonl:2: (not|expected|a JSON)"):
        judge_validation.read(path)


def test_ties_of_people_are_left_out():
    one = judge_validation.Labelled(Row("1", "", "p"), "a", "b", (1.0, 0.0))
    assert one.majority is None
    assert judge_validation.Labelled(one.row, "a", "b", (1.0, 0.0, 1.0)).majority == 1
    with pytest.raises(DataError, match=r"can be judged: 0 \(people are undecided: 1\)"):
        judge_validation.validate(ByRule(lambda a, b: 1.0), [one], "labels")


def test_people_rank_targets(tmp_path):
    path = tmp_path / "people.jsonl"
    lines = [
        {"set": "s", "id": "1", "ranking": [["policy"], ["sft", "base"]]},
        {"set": "s", "id": "1", "ranking": [["sft"], ["policy"]]},
        {"set": "s", "id": "2", "ranking": [["policy", "sft"]], "why": "the judges disagree"},
        {"set": "t", "id": "3", "ranking": [["policy"], ["sft"]]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [Row(i, "", "p") for i in ("1", "2", "3")]
    people, names = People("people", path), ("policy", "sft")
    found = people.compare(Pairs(rows, "aaa", "bbb", "s", names))
    assert found.wins == [0.5, 0.5, None] and found.at_random == [True, False, True]
    assert people.compare(Pairs(rows, "aaa", "bbb", "u", names)) is None
    path.write_text(path.read_text() + '{"set": "s"}\n')
    with pytest.raises(DataError, match=r"people.jsonl:5: not a ranking"):
        People("people", path)
    path.write_text('{"set": "s", "id": "1", "ranking": ["policy", "sft"]}\n')
    with pytest.raises(DataError, match=r"people.jsonl:1: not a ranking.*a list of lists"):
        People("people", path)


def test_people_who_ranked_something_else_are_an_error(tmp_path):
    path = tmp_path / "people.jsonl"
    undone = {"set": "s", "id": "2", "ranking": None}
    lines = [undone, {"set": "s", "id": "1", "ranking": [["policy"], ["sft"]], "note": "\u2028"}]
    path.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    people = People("people", path)
    people.check({"s": {"1", "2"}}, ["sft", "policy"], "sft")
    for sets, names, message in (
        ({"s": {"2"}}, ["sft", "policy"], "no ranking is of a prompt"),
        ({}, ["sft", "policy"], "no ranking is of a prompt"),
        ({"s": {"1"}}, ["sft", "polcy"], "no ranking is of sft and another model here, but of pol"),
    ):
        with pytest.raises(DataError, match=message):
            people.check(sets, names, "sft")


def test_models_and_prompts_that_are_not_here_are_counted(tmp_path):
    """A misspelt model beside known ones was left out without a word."""
    path = tmp_path / "people.jsonl"
    lines = [
        {"set": "s", "id": "1", "ranking": [["policy"], ["sft"]]},
        {"set": "s", "id": "2", "ranking": [["polcy"], ["sft"]]},
        {"set": "s", "id": "3", "ranking": [["policy"], ["sft", "polcy"]]},
        {"set": "t", "id": "1", "ranking": [["policy"], ["sft"]]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    here, names = {"s": {"1", "2", "3"}}, ["sft", "policy"]
    assert People("people", path).check(here, names, "sft") == [
        {
            "what": "1 of 4 rankings in people.jsonl",
            "why": "not of a prompt whose answers are compared here",
        },
        {
            "what": "polcy in 2 of 3 rankings (people.jsonl)",
            "why": "no model of this evaluation: sft, policy",
        },
    ]
    path.write_text(json.dumps(lines[0]) + "\n")
    assert People("people", path).check(here, names, "sft") == []


def test_a_score_that_is_no_number_is_no_loss(monkeypatch):
    with pytest.raises(NonFiniteError, match="a judge's score is nan"):
        judges.by_score([0.0, math.nan], [1.0, 1.0])


def test_pairs_that_cannot_be_judged_are_counted_and_no_stop(tmp_path):
    ask, answer = "\n\nHuman: a?", "\n\nAssistant:"
    good = {"chosen": f"{ask}{answer} good", "rejected": f"{ask}{answer} bad"}
    early = {**good, "rejected": f"{ask}{answer} no\n\nHuman: why?{answer} bad"}
    rows = [
        *[good] * 5,
        *[early] * 4,
        {**good, "chosen": good["chosen"] + "\n\nHuman: thanks"},
        *[{**good, "rejected": ask + answer}] * 3,
        *[{**good, "rejected": good["chosen"]}] * 2,
        {"prompt": " ", "a": "x", "b": "y", "labels": ["a"]},
        {"prompt": "p", "a": "x", "b": "y", "labels": ["a", "b"]},
        {"prompt": "p", "a": "long", "b": "y", "labels": ["a"]},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled, left_out = judge_validation.read(path)
    judge = ByRule(lambda a, b: None if "long" in (a, b) else float("good" in a))
    record = judge_validation.validate(judge, labelled, "labels", left_out)
    assert (record["n"], record["accuracy"]["value"]) == (5, 1.0)
    assert record["left_out"] == {
        "answers that differ before their last turn": 4,
        "answers of another role than the assistant": 1,
        "an empty answer": 3,
        "equal answers": 2,
        "no prompt": 1,
        "people are undecided": 1,
        "over the judge's context": 1,
    }
    said = list(evaluate_targets._summary_of("rule", judge, record))
    assert said[1].startswith("left out: 13 pairs (") and "equal answers: 2" in said[1]
    with pytest.raises(DataError, match=r"can be judged: 0 \(over the judge's context: 6\)"):
        decided = [one for one in labelled if one.majority is not None]
        judge_validation.validate(ByRule(lambda a, b: None), decided, "labels")


def test_the_shorter_answer_is_a_constant_too(tmp_path):
    rows = [{"prompt": f"p{i}", "a": "b", "b": "bb", "labels": ["a"]} for i in range(60)]
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(rows))
    judge = ByRule(lambda a, b: float(len(a) < len(b)))
    record = judge_validation.validate(judge, judge_validation.read(path)[0], "labels")
    assert record["accuracy"]["value"] == 1 and record["constant"] == 1
    assert not judges.trust(judge, record)[0]


def test_a_classifier_reads_the_end_of_a_long_text(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(loading.local_folder(ModelSection(id="tiny")))
    sizes = dict.fromkeys(("num_labels", "num_hidden_layers", "num_attention_heads"), 1)
    sizes |= {"vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 8}
    config = LlamaConfig(**sizes)
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(tmp_path)
    [spec] = judges.parse([str(tmp_path)])
    judge, row = spec.load(None), Row("1", "", "Which room is it? " * 9)
    found = judge.scores([row] * 3, ["It is in room 4.", "no " * 30 + "blue", "It is in room 4."])
    assert found[0] == pytest.approx(found[2]) and found[0] != pytest.approx(found[1], abs=1e-6)
