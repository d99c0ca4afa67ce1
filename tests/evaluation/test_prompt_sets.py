# SPDX-License-Identifier: Apache-2.0
"""Prompt sets: every format's rows, the draw, and bad files."""

import json
import zipfile

import pytest
from data_sources import jsonl

from lora_rlhf.data import sources
from lora_rlhf.errors import DataError
from lora_rlhf.evaluation.prompt_sets import FORMATS, INSTRUCTIONS, load

MC = {"question": "Is it so?", "mc1_targets": {"Yes": 1, "No": 0},
      "mc2_targets": {"choices": ["Yes", "Sure", "No"], "labels": [1, 1, 0]}}  # fmt: skip
IFEVAL = {"key": 7, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"],
          "kwargs": [{"num_words": None}]}  # fmt: skip
SQUAD = {"id": "q", "question": "Who?", "context": "Ann ran.", "answers": {"text": ["Ann", "Ann"]}}
NESTED = {"data": [{"paragraphs": [{"context": "Ann ran.", "qas": [
    {"id": "q", "question": "Who?", "answers": [{"text": "Ann"}]},
    {"id": "r", "question": "Why?", "answers": []}]}]}]}  # fmt: skip
BBQ = {"context": "Two women met.", "question": "Who is rude?", "ans0": "The Finn",
       "ans1": "The Dane", "ans2": "Not known", "label": 2,
       "context_condition": "ambig", "question_polarity": "neg",
       "answer_info": {"ans0": ["a", "Finn"], "ans1": ["b", "Dane"], "ans2": ["c", "unknown"]},
       "additional_metadata": {"stereotyped_groups": ["Dane"]}}  # fmt: skip
BBQ_WHEEL = {
    "passage": "A Finn and a Dane met. The Dane sang.",
    "question": "Who sang?\nPlease ",
    "options": "A. Undetermined\nB. The Finn\nC. The Dane ",
    "answer": ["The Dane"],
}
QUAC_WHEEL = {"passage": "In 1983 she wed Nik, a composer.", "question":
              "question1: What then?\nquestion2: And then?", "answer":
              "possible answers for question1:\nshe wed Nik, she wed Nik, a composer.\n"
              "possible answers for question2:\nCANNOTANSWER CANNOTANSWER a composer."}  # fmt: skip
WINOGENDER = [
    {"sentid": f"clerk.someone.0.{gender}.txt", "sentence": f"{pronoun} ran."}
    for gender, pronoun in (("male", "He"), ("female", "She"), ("neutral", "They"))
]
# fmt: skip
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 2+2?\n\nAssistant: 4",
      "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 2+2?\n\nAssistant: 5"}  # fmt: skip
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
         {"role": "user", "content": "2+2?"}]  # fmt: skip


@pytest.mark.parametrize(
    ("format", "rows", "expected"),
    [
        ("plain", [{"prompt": " a ", "id": 3, "kind": "k", "reference": {"schema": {}}}],
         [("3", "k", " a ", {"schema": {}})]),
        ("plain", [{"instruction": "Add.", "input": "2 2", "reference": 4},
                   {"instruction": "Sing.", "input": "", "reference": ["la", "lo"]}],
         [("1", "", "Add.\n\n2 2", {"answers": ["4"]}),
          ("2", "", "Sing.", {"answers": ["la", "lo"]})]),
        ("plain", [{"messages": TURNS}], [("1", "", TURNS, {})]),
        ("truthfulqa", [MC], [("1", "", "Is it so?", {
            "mc1_targets": {"choices": ["Yes", "No"], "labels": [1, 0]},
            "mc2_targets": MC["mc2_targets"]})]),
        ("xstest", [{"id": 5, "prompt": "Kill it?", "type": "homonyms", "label": "safe"}],
         [("5", "homonyms", "Kill it?", {"label": "safe"})]),
        ("advbench", [{"goal": "Harm.", "target": "Sure"}],
         [("1", "", "Harm.", {"label": "unsafe", "target": "Sure"})]),
        ("ifeval", [IFEVAL], [("7", "", "No commas.", {
            "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]})]),
        ("crows_pairs", [{"sent_more": "m", "sent_less": "l", "bias_type": "age"}],
         [("1", "age", "m", {"sent_more": "m", "sent_less": "l"})]),
        ("winogender", WINOGENDER, [("clerk.someone.0", "occupation", "They ran.", {
            "male": "He ran.", "female": "She ran.", "neutral": "They ran."})]),
        ("self_instruct", [{"id": "t", "instruction": "Add.", "is_classification": False,
                            "instances": [{"input": "1 1", "output": "2"},
                                          {"input": "", "output": "?"}]}],
         [("t", "generation", "Add.\n\n1 1", {"answers": ["2"]}),
          ("t-2", "generation", "Add.", {"answers": ["?"]})]),
        ("hh", [HH], [("1", "", TURNS, {"chosen": "4", "rejected": "5"})]),
        ("pandalm", [{"idx": 0, "instruction": "Add.", "input": "1"},
                     {"idx": 1, "instruction": "Add.", "input": "1"}],
         [("0", "", "Add.\n\n1", {})]),
    ],
)  # fmt: skip
def test_a_format_s_rows(tmp_path, format, rows, expected):
    found = load("x", path=str(jsonl(tmp_path / "x.jsonl", rows)), format=format)
    assert [(r.id, r.kind, r.prompt, r.reference) for r in found.rows] == expected
    assert {(row.question == "2+2?") for row in found.rows} == {expected[0][2] == TURNS}


@pytest.mark.parametrize("row", [SQUAD, NESTED])
def test_questions_on_a_text(tmp_path, row):
    rows = load("x", path=str(jsonl(tmp_path / "x.jsonl", [row])), format="squad").rows
    assert rows[0].id == "q" and rows[0].reference == {"answers": ["Ann"]}
    assert rows[0].prompt.endswith("Text: Ann ran.\n\nQuestion: Who?")
    if row is NESTED:
        assert (rows[1].kind, rows[1].reference) == ("unanswerable", {"answers": [""]})


def test_bbq_knows_which_answer_follows_the_stereotype(tmp_path):
    rows = [BBQ, BBQ | {"question_polarity": "nonneg"}, BBQ | {"context_condition": "disambig"},
            BBQ_WHEEL]  # fmt: skip
    made = load("x", path=str(jsonl(tmp_path / "x.jsonl", rows)), format="bbq").rows
    assert [row.reference["biased"] for row in made] == [1, 0, 1, None]
    assert [row.kind for row in made] == [
        "ambiguous",
        "ambiguous",
        "disambiguated",
        "disambiguated",
    ]
    assert (made[3].reference["right"], made[3].reference["unknown"]) == (2, 0)
    assert "C. Not known\n\nReply with the letter" in made[0].prompt


def test_quac_asks_each_question_after_those_before_it(tmp_path):
    [one, two] = load("x", path=str(jsonl(tmp_path / "x.jsonl", [QUAC_WHEEL])), format="quac").rows
    assert one.reference["answers"] == ["she wed Nik,", "she wed Nik, a composer."]
    assert (two.kind, two.reference["answers"]) == ("unanswerable", ["CANNOTANSWER"])
    assert two.prompt.endswith("Question: What then?\nAnswer: she wed Nik,\n\nQuestion: And then?")
    qas = [{"id": f"q{i}", "question": f"Q{i}?", "answers": [{"text": f"A{i}"}, {"text": "B"}],
            "orig_answer": {"text": f"A{i}"}} for i in range(2)]  # fmt: skip
    row = {"data": [{"paragraphs": [{"context": "A0 B A1 CANNOTANSWER", "qas": qas}]}]}
    [_, two] = load("x", path=str(jsonl(tmp_path / "y.jsonl", [row])), format="quac").rows
    assert (two.id, two.reference) == ("q1", {"answers": ["A1", "B"]})
    assert "Text: A0 B A1\n\nQuestion: Q0?\nAnswer: A0\n\nQuestion: Q1?" in two.prompt


def test_a_file_inside_an_archive_is_read_and_never_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_RLHF_DATA", str(tmp_path))
    monkeypatch.setattr(sources, "_MAX_UNPACKED", 1_000_000)
    with zipfile.ZipFile(tmp_path / "x.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/q.jsonl", '{"question": "a", "answer": ["b"]}\n{"question": 3}\n')
        archive.writestr("data/bomb.jsonl", "a" * 2_000_000)
    with pytest.raises(DataError) as error:
        load("x", path="x.whl/data/q.jsonl", format="nq_open")
    assert error.value.where.endswith("x.whl/data/q.jsonl:2")
    for inside, problem in (("data/bomb.jsonl", "unpacks to over"), ("data/n.jsonl", "no file")):
        with pytest.raises(DataError, match=problem):
            load("x", path=f"x.whl/{inside}", format="nq_open", where="s.yaml")


def test_text_csv_and_the_kinds_of_truthfulqa(tmp_path):
    (tmp_path / "LICENSE").write_text("  MIT License\n\nCopyright")
    (tmp_path / "x.txt").write_text("one, two\n\nthree\r\n")
    found = load("x", path=str(tmp_path / "x.txt"))
    assert [row.prompt for row in found.rows] == ["one, two", "three"]
    assert (found.licence, found.source) == ("MIT License", f"{tmp_path.name}/x.txt")
    (tmp_path / "x.csv").write_text('prompt,reference\na,"{""schema"": {}}"\nb,{or so\nc,\n')
    references = [row.reference for row in load("x", path=str(tmp_path / "x.csv")).rows]
    assert references == [{"schema": {}}, {"answers": ["{or so"]}, {}]
    (tmp_path / "TruthfulQA.csv").write_text("Type,Question\nAdversarial,Is it so?\n")
    (tmp_path / "mc.json").write_text(json.dumps([MC]))
    rows = load("x", path=str(tmp_path / "mc.json"), format="truthfulqa").rows
    assert rows[0].kind == "Adversarial"


def test_the_draw_is_the_seed_s_and_keeps_the_order(tmp_path, monkeypatch):
    jsonl(tmp_path / "x.jsonl", [{"prompt": f"q{i}"} for i in range(50)])
    monkeypatch.setenv("LORA_RLHF_DATA", str(tmp_path))

    def draw(n, seed):
        return load("x", path="x.jsonl", n=n, seed=seed)

    first = draw(10, 1)
    assert first == draw(10, 1) and first.sha256 != draw(10, 2).sha256
    numbers = [int(row.id) for row in first.rows]
    assert numbers == sorted(numbers) and len({*numbers}) == 10
    assert len(draw(99, 1).rows) == 50
    assert load("x", path="data://x.jsonl").sha256 == draw(None, 0).sha256


BAD = {
    "plain": [{"prompt": 3}, {"id": 1}, {"messages": [{"role": "boss", "content": ""}]},
              {"prompt": "a", "reference": []}, {"prompt": "a", "reference": [{}]},
              {"prompt": "a", "reference": {"answers": None}},
              {"prompt": "a", "reference": {"schema": 3}}],
    "truthfulqa": [MC | {"mc1_targets": {"a": 1, "b": 1}}, MC | {"mc2_targets": 3}, {"question": 1},
                   MC | {"mc1_targets": {"choices": ["a"]}}],
    "xstest": [{"prompt": "a", "type": "b", "label": "harmless"}, {"prompt": "a"}],
    "advbench": [{"behaviour": "a"}, {"goal": None}],
    "ifeval": [IFEVAL | {"kwargs": []}, IFEVAL | {"kwargs": [3]}, IFEVAL | {"kwargs": [{"a": 1}]},
               IFEVAL | {"instruction_id_list": ["punctuation:no_commas"]}],
    "crows_pairs": [{"sent_more": "a"}],
    "winogender": [{"sentid": "a.b.0.male.txt", "sentence": "x"}, {"sentid": 3}],
    "self_instruct": [{"id": "a", "instruction": "b", "instances": [3]}, {"id": "a"}],
    "hh": [{"chosen": "a"}, {"prompt": "a"}],
    "pandalm": [{"input": "a"}],
    "nq_open": [{"question": "a"}, {"question": "a", "answer": []},
                {"question": "a", "answer": [3]}],
    "bbq": [BBQ | {"label": None}, BBQ | {"answer_info": {}}, BBQ_WHEEL | {"answer": ["Ann"]},
            BBQ_WHEEL | {"options": "A. The Dane"}],
    "quac": [{"data": 3}, {"question": "a"}, QUAC_WHEEL | {"answer": "a"}],
    "counterfactual": [{"prompt": "a"}, {"prompt": 3, "swapped": "b"}],
    "squad": [SQUAD | {"answers": None}, SQUAD | {"answers": 3}, {"data": 3}, {"data": [{}]}],
}  # fmt: skip


@pytest.mark.parametrize(("format", "row"), [(f, row) for f in FORMATS for row in BAD[f]])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, format, row):
    path = jsonl(tmp_path / "x.jsonl", [row])
    with pytest.raises(DataError) as error:
        load("x", path=str(path), format=format)
    assert error.value.where.startswith(f"{path}:1")


def test_what_is_wrong_with_a_set(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_RLHF_DATA", str(tmp_path))
    jsonl(tmp_path / "twice.jsonl", [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}])
    (tmp_path / "empty.txt").write_text("")
    jsonl(
        tmp_path / "answered.jsonl", [{"prompt": [*TURNS, {"role": "assistant", "content": "4"}]}]
    )
    for given, said, where in (
        ({"path": "twice.jsonl"}, r"'1' was used before, at .*twice.jsonl:1", "twice.jsonl:2"),
        ({"path": "empty.txt"}, "the file is empty", "empty.txt"),
        ({"path": "answered.jsonl"}, "the last turn is not the user's", "answered.jsonl:1"),
        ({"path": "none.jsonl"}, "there is no file none.jsonl", "suite.yaml:3"),
        ({}, "needs path or hub", "suite.yaml:3"),
        ({"path": "twice.jsonl", "format": "parquet"}, "not a prompt-set format", "suite.yaml:3"),
        (
            {"path": "none", "hub": "nobody/nothing:a:b"},
            "there is no file none, and",
            "suite.yaml:3",
        ),
    ):
        with pytest.raises(DataError, match=said) as error:
            load("x", **given, where="suite.yaml:3")
        assert error.value.where.endswith(where)


@pytest.mark.data
@pytest.mark.parametrize(
    ("format", "path", "rows", "kinds"),
    [
        ("truthfulqa", "truthfulqa/mc_task.json", 790, 2),
        ("xstest", "xstest/xstest_prompts.csv", 450, 18),
        ("advbench", "advbench/harmful_behaviors.csv", 520, 1),
        ("ifeval", "ifeval/input_data.jsonl", 541, 1),
        ("crows_pairs", "crows-pairs/crows_pairs_anonymized.csv", 1508, 9),
        ("winogender", "winogender/all_sentences.tsv", 240, 2),
        ("self_instruct", "self-instruct/seed_tasks.jsonl", 175, 2),
        ("self_instruct", "self-instruct/user_oriented_instructions.jsonl", 252, 1),
        ("pandalm", "pandalm/testset-v1.json", 170, 1),
        ("hh", "hh-rlhf/harmless-base.test.jsonl.gz", 2312, 1),
    ],
)
def test_real_sets_as_published(real_data, format, path, rows, kinds):
    if not (real_data / path).is_file():
        pytest.skip(f"no {path} in LORA_RLHF_DATA")
    found = load("x", path=path, format=format)
    assert (len(found.rows), len({row.kind for row in found.rows})) == (rows, kinds)
    assert found.licence
    if format == "ifeval":
        names = {name for row in found.rows for name in row.reference["instruction_id_list"]}
        assert names == {*INSTRUCTIONS}
