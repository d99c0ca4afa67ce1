# SPDX-License-Identifier: Apache-2.0
"""Questions on a record for real models: right, invented, not stated, and unclear."""

import pytest

from lora_rlhf.evaluation import prompt_sets
from lora_rlhf.evaluation.metrics import plain_records
from lora_rlhf.evaluation.metrics.registry import METRICS
from lora_rlhf.evaluation.prompt_sets import Row

FACTS = [["name", "Kofi"], ["color", "purple"], ["room", "461"], ["job", "pilot"]]
STATED = Row("1", "stated", "q", {"record": {"attribute": "color", "answer": "purple",
                                             "facts": FACTS}})  # fmt: skip
MISSING = Row("2", "not stated", "q", {"record": {"attribute": "age", "answer": "",
                                                  "facts": FACTS}})  # fmt: skip


@pytest.mark.parametrize(
    ("row", "answer", "outcome"),
    [
        (STATED, "Kofi's color is purple.", "right"),
        (STATED, "PURPLE", "right"),
        (STATED, "It is green.", "invented"),
        (STATED, "Purple or green.", "invented"),
        (STATED, "The record doesn’t say.", "not stated"),
        (STATED, "I do not know.", "not stated"),
        (STATED, "", "not stated"),
        (STATED, "Kofi is a pilot in room 461.", "unclear"),
        (MISSING, "Kofi's age is not stated.", "not stated"),
        (MISSING, "The record does not mention it.", "not stated"),
        (MISSING, "He is 41 years old.", "invented"),
        (MISSING, "Kofi is in room 461.", "unclear"),
        (MISSING, "Kofi's age is given in the record.", "unclear"),
    ],
)
def test_answers_are_sorted(row, answer, outcome):
    assert plain_records.outcome(row, answer) == outcome


def test_straw_models_land_where_they_must():
    rows = prompt_sets.load("r", format="plain_records", n=40, seed=3).rows
    assert len(rows) == 40 and {row.kind for row in rows} == {"stated", "not stated"}
    names = ("record_right", "record_invented", "record_abstained_right", "record_abstained_wrong",
             "record_unclear")  # fmt: skip

    def means(answer):
        made = []
        for name in names:
            values = [METRICS[name].score(row, answer(row)) for row in rows]
            known = [value for value in values if value is not None]
            made.append(sum(known) / len(known))
        return made

    def value(row):
        return row.reference["record"]["answer"]

    assert means(lambda row: "It is not stated.") == [0, 0, 1, 1, 0]
    assert means(lambda row: value(row) or "That is not stated.") == [1, 0, 1, 0, 0]
    assert means(lambda row: "")[1] == 0
    assert means(lambda row: "What a nice question!") == [0, 0, 0, 0, 1]

    def other(row):
        pool = plain_records.POOLS[row.reference["record"]["attribute"]]
        return next(v for v in pool if v not in str(row.reference["record"]["facts"]))

    wrong = means(other)
    assert wrong == [0, 1, 0, 0, 0]
