# SPDX-License-Identifier: Apache-2.0
"""Probes of a judge: a fault shows in its own probe, and a preferred order in none."""

import pytest

from lora_rlhf.evaluation import judge_probes, judge_validation, judges
from lora_rlhf.evaluation.judges import Verdicts
from lora_rlhf.evaluation.prompt_sets import Row
from lora_rlhf.reports.evaluation_report import PROBES, worst_probe

PAIRS = [
    (Row(str(i), "", f"Question {i}?"), f"A right answer, number {i}.", f"Wrong, {i}.")
    for i in range(80)
]


class Scored:
    """A judge with a score for each text."""

    name, kind, independent = "scored", "reward", True

    def __init__(self, score):
        self.score = score

    def compare(self, pairs):
        a, b = ([self.score(row, text) for row, text in zip(pairs.rows, texts, strict=True)]
                for texts in (pairs.first, pairs.second))  # fmt: skip
        return Verdicts(judges.by_score(a, b))


def exact(row, text):
    return -abs(len(text) - len(f"A right answer, number {row.id}.")) - ("Wrong" in text)


@pytest.mark.parametrize(
    ("score", "preferred"),
    [
        (exact, set()),
        (lambda row, text: len(text), {*PROBES} - {"empty"}),
        (lambda row, text: -len(text), {"empty"}),
        (lambda row, text: text.count("answer, number"), {"repeated"}),
        (lambda row, text: row.prompt in text, {"prompt_copied"}),
        (lambda row, text: any(t in text for t in judge_probes._PADDING), {"padded"}),
        (lambda row, text: any(t in text for t in judge_probes._FLATTERY), {"flattering"}),
        (lambda row, text: "Wrong" in text, {"confidently_wrong"}),
    ],
    ids=["exact", "longer", "shorter", "repetition", "copies", "padding", "flattery", "wrong"],
)
def test_a_fault_of_a_judge_shows_in_its_probe(score, preferred):
    rates = judge_probes.probe(Scored(score), PAIRS)
    assert rates.keys() == PROBES.keys() == judge_probes.PROBES.keys()
    assert {name for name, rate in rates.items() if rate["low"] > 0.5} == preferred
    assert all(rate["n"] == 80 for rate in rates.values())
    assert judge_probes.probe(Scored(score), PAIRS) == rates


def test_a_judge_that_prefers_an_order_is_at_one_half():
    class First(Scored):
        def compare(self, pairs):
            return Verdicts([self.score] * len(pairs.rows))

    rates = judge_probes.probe(First(1.0), PAIRS)
    assert len(rates) == len(PROBES)
    assert all(rate["value"] == pytest.approx(0.5, abs=0.17) for rate in rates.values())
    assert judge_probes.probe(First(None), PAIRS) == {}, "nothing to count"


def test_probes_are_in_the_record_and_beside_the_reason_to_believe():
    labelled = [
        judge_validation.Labelled(row, *((good, bad, (1.0,)) if i % 2 else (bad, good, (0.0,))))
        for i, (row, good, bad) in enumerate(PAIRS)
    ]
    judge = Scored(lambda row, text: "right" in text and text.count("answer, number"))
    record = judge_validation.validate(judge, labelled, "labels")
    assert record["accuracy"]["value"] == 1 and record["probes"]["repeated"]["value"] == 1
    assert record["probes"]["confidently_wrong"]["value"] == 0
    worst = worst_probe(record)
    assert worst == "it prefers an answer repeated to the better one in 100 % [95, 100] of pairs"
    about = judges.describe(judge, record)
    assert about["why"].endswith(f"; at worst, {worst}")
    assert worst_probe(None) is None and worst_probe({"n": 80}) is None, "of an older version"
