# SPDX-License-Identifier: Apache-2.0
"""Values of labels: what each type of task takes, and what it refuses."""

import pytest

from lora_rlhf.feedback import labels


@pytest.mark.parametrize(
    ("kind", "value", "answers", "kept"),
    [
        ("ranking", {"ranks": [5, 2, 2]}, 3, {"ranks": [3, 1, 1]}),
        ("pair", {"strength": -3}, 2, {"strength": -3}),
        ("demonstration", {"text": " a\n"}, 0, {"text": " a\n"}),
    ],
)
def test_a_value_is_kept_in_one_form(kind, value, answers, kept):
    assert labels.check_value(kind, value, answers) == kept


def test_a_rating_answers_all_eleven_questions():
    value = labels.check_value("rating", {"overall": 7, "questions": {"opinion": True}}, 1)
    assert len(value["questions"]) == 11
    assert [key for key, yes in value["questions"].items() if yes] == ["opinion"]


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        ("ranking", {"ranks": [1, 2]}, "expected 3"),
        ("ranking", {"ranks": [1, 2, 0]}, "whole numbers from 1"),
        ("ranking", {"ranks": [1, 2, True]}, "whole numbers from 1"),
        ("ranking", {"ranks": [1, 2, 3], "best": 1}, "unknown key 'best'"),
        ("pair", {"strength": 4}, "-3 to 3"),
        ("pair", {"strength": 0.5}, "-3 to 3"),
        ("rating", {"overall": 0}, "1 to 7"),
        ("rating", {"overall": 1, "questions": {"nice": True}}, "unknown question 'nice'"),
        ("rating", {"overall": 1, "questions": {"opinion": 1}}, "true or false"),
        ("demonstration", {"text": " \n"}, "empty"),
        ("demonstration", {"text": "x" * 100_001}, "100000 at most"),
        ("demonstration", ["x"], "not a JSON object"),
        ("poll", {}, "expected one of"),
    ],
)
def test_a_value_of_another_form_is_refused(kind, value, problem):
    with pytest.raises(ValueError, match=problem):
        labels.check_value(kind, value, 3)
