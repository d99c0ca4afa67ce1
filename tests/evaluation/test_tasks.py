# SPDX-License-Identifier: Apache-2.0
"""Metrics of sampled answers: by hand, and against lm-eval."""

import json
import random

import pytest

from lora_rlhf.errors import DataError, SetupError
from lora_rlhf.evaluation.metrics import tasks
from lora_rlhf.evaluation.metrics.registry import METRICS
from lora_rlhf.evaluation.prompt_sets import INSTRUCTIONS, Row, load
from lora_rlhf.runtime import optional_packages


def score(name, answer, **reference):
    return METRICS[name].score(Row("1", "", "", reference), answer)


@pytest.mark.parametrize(
    ("answer", "answers", "exact", "f1"),
    [
        ("The  Eiffel-Tower!", ["eiffeltower"], 1, 1),
        ("in Paris, France", ["Lyon", "Paris"], 0, 0.5),
        ("a b b c", ["b b d"], 0, 2 * (2 / 3) * (2 / 3) / (4 / 3)),  # "a" is an article
        ("another", ["an other"], 0, 0),
        ("", [""], 1, 1),
        ("none", [""], 0, 0),
        ("the", ["Paris"], 0, 0),
    ],
)
def test_right_answers_by_squad_s_definitions(answer, answers, exact, f1):
    assert score("exact_match", answer, answers=answers) == exact
    assert score("f1", answer, answers=answers) == pytest.approx(f1)


@pytest.mark.slow  # rouge-score imports all of NLTK
def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    answers = ["the cats sat on a mat", "nothing in common"]
    # "the cat sat . mat" with stems: 4 of 4 words, 4 of 6 of the reference's.
    assert score("rouge_l", "The cat sat, mat", answers=answers) == pytest.approx(2 * 4 / 10)
    assert score("rouge_l", "", answers=answers) == 0


def test_bleu_and_chrf_by_hand():
    pytest.importorskip("sacrebleu")
    # BLEU: 4-grams to 1-grams of five words against six, brevity penalty e^(1 - 6/5).
    precisions = 5 / 5 * 4 / 4 * 3 / 3 * 2 / 2
    expected = 100 * precisions**0.25 * 2.718281828459045 ** (1 - 6 / 5)
    assert score("bleu", "the cats sat on a", answers=["the cats sat on a mat"]) == pytest.approx(
        expected
    )
    assert score("chrf", "ab", answers=["ab", "x"]) == pytest.approx(100)
    # chrF2 of "ac" with "ab": 1-grams 1/2 and 1/2, 2-grams 0; orders without n-grams do not count.
    assert score("chrf", "ac", answers=["ab"]) == pytest.approx(25)


SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("answer", "valid"),
    [('{"n": 1}', 1), ('```json\n{"n": 1}\n```', 1), ('```\n{"n": 1}\n``` ', 1), ('{"n": "1"}', 0),
     ("{}", 0), ('Here: {"n": 1}', 0), ('{"n": NaN}', 0), ("[" * 100_000, 0), ("", 0)],
)  # fmt: skip
def test_json_against_a_schema(answer, valid):
    pytest.importorskip("jsonschema")
    assert score("json_valid", answer, schema=SCHEMA) == valid


@pytest.mark.parametrize("schema", [{"type": "objekt"}, {"$ref": "http://127.0.0.1:9/schema.json"}])
def test_a_bad_schema_is_an_error_and_nothing_is_fetched(schema):
    pytest.importorskip("jsonschema")
    with pytest.raises(DataError, match=r"the schema of the prompt '1' is invalid"):
        score("json_valid", "{}", schema=schema)


def test_an_absent_package_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(
        SetupError, match="(?s)sentence_bleu needs the package sacrebleu.*lora-rlhf.eval"
    ):
        score("bleu", "a", answers=["a"])
    with pytest.raises(SetupError, match="x needs the package no_such"):
        optional_packages.load("no_such.module", "x", "eval")


# ------------------------------------------------------------------------------ IFEval

FOLLOWED = {
    "keywords:existence": ({"keywords": ["sea", "sun"]}, "Sun and sea", "Sun"),
    "keywords:frequency": (
        {"keyword": "sea", "frequency": 2, "relation": "at least"}, "sea, Sea", "sea",
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["sea"]}, "seaside", "the sea"),
    "keywords:letter_frequency": (
        {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, "# #", "#",
    ),
    "language:response_language": (
        {"language": "de"}, "Das ist ein ganz normaler Satz auf Deutsch.", "This is in English.",
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        "Dr. Who met Mr. T. today. Then he left.", "One. Two. Three.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, "a b c", "a b"),
    "length_constraints:nth_paragraph_first_word": (
        {"first_word": "sea", "num_paragraphs": 2, "nth_paragraph": 2}, "a\n\nSea b", "sea\n\na",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] [b]", "[a]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "a\nP.S. b", "a"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n* b", "* a"),
    "detectable_format:constrained_response": ({}, "My answer is yes.", "Yes."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 1}, "*a*", "a"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Part", "num_sections": 2}, "Part 1\na\nPart 2\nb", "Part 1",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "a"),
    "detectable_format:title": ({}, "<<a>>", "<a>"),
    "combination:two_responses": ({}, "a\n******\nb", "a"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it."}, "Say it. It.", "It."),
    "startend:end_checker": ({"end_phrase": "the end"}, "a, The end", "the end a"),
    "startend:quotation": ({}, '"a"', "a"),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, "A BIG dog", "A dog",
    ),
    "change_case:english_capital": ({}, "THIS IS A SENTENCE IN ENGLISH.", "This is one."),
    "change_case:english_lowercase": ({}, "this is a sentence in english.", "This is one."),
    "punctuation:no_comma": ({}, "a b", "a, b"),
}  # fmt: skip
"""Instruction -> arguments, an answer that follows it, one that does not."""


@pytest.mark.slow
def test_every_instruction_of_ifeval():
    pytest.importorskip("lm_eval")
    assert {name: {*FOLLOWED[name][0]} for name in FOLLOWED} == INSTRUCTIONS
    state = random.getstate()
    for name, (kwargs, good, bad) in FOLLOWED.items():
        reference = {"instruction_id_list": [name], "kwargs": [kwargs]}
        assert score("ifeval_strict", good, **reference) == 1, name
        assert score("ifeval_strict", bad, **reference) == 0, name
        assert score("ifeval_strict", " ", **reference) == 0, name
    both = {
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{}, {}],
    }
    assert score("ifeval_strict", "<<a>> b, c", **both) == 0
    assert score("ifeval_strict", "<<a>> b c", **both) == 1
    # Loose: the first line holds the comma, the last the title.
    assert score("ifeval_strict", "Sure, here:\n<<a>> b\n", **both) == 0
    assert score("ifeval_loose", "Sure, here:\n<<a>> b\n", **both) == 1
    assert random.getstate() == state, "nothing is drawn"


@pytest.mark.slow
@pytest.mark.data
def test_ifeval_equals_lm_eval_s_verdicts(real_data):
    pytest.importorskip("lm_eval")
    file = real_data / "ifeval" / "input_data.jsonl"
    if not file.is_file():
        pytest.skip("no ifeval/input_data.jsonl in LORA_RLHF_DATA")
    score("ifeval_strict", "a", instruction_id_list=["startend:quotation"], kwargs=[{}])
    from lm_eval.tasks.ifeval.utils import process_results

    raw = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = load("x", path=str(file), format="ifeval").rows
    answers = [good for _, good, _ in FOLLOWED.values()] + [bad for _, _, bad in FOLLOWED.values()]
    verdicts = set()
    for number, (row, document) in enumerate(zip(rows, raw, strict=True)):
        if any("letter" in k and not k["letter"].isalpha() for k in document["kwargs"]):
            continue  # lm-eval checks a random letter
        for answer in (
            answers[number % 50],
            row.prompt,
            "*Sure*\n" + "\n".join(answers[::7]) + "\n",
        ):
            theirs = process_results(document, [answer])
            ours = [
                bool(METRICS[f"ifeval_{how}"].score(row, answer)) for how in ("strict", "loose")
            ]
            assert ours == [theirs[f"prompt_level_{how}_acc"] for how in ("strict", "loose")]
            verdicts.add(tuple(ours))
    assert verdicts == {(False, False), (False, True), (True, True)}


def test_quacs_f1_leaves_each_reference_out_once():
    def f1(answer, *answers):
        return tasks.quac_f1(Row("1", "", "q", {"answers": answers}), answer)

    assert f1("Ann ran", "Ann ran") == 1
    assert f1("Ann ran", "Ann ran", "Bob") == pytest.approx(1 / 2)  # the other one alone, then both
    assert f1("Ann ran", "Ann ran", "Ann ran", "Bob") == 1
    assert f1("CANNOTANSWER", "CANNOTANSWER") == 1 and f1("Ann", "CANNOTANSWER") == 0
