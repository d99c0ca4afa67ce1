# SPDX-License-Identifier: Apache-2.0
"""Intervals cover the truth of simulated evaluations, those that once failed above all."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "scripts" / "interval_coverage.py"
spec = importlib.util.spec_from_file_location("interval_coverage", FILE)
interval_coverage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interval_coverage)


@pytest.mark.parametrize(
    ("kind", "case", "n", "least"),
    [
        ("paired difference of shares (Tango)", "all equal but 2 %", 30, 0.93),  # BCa: 0.43
        ("paired difference of shares (Tango)", "10 % gained, 2 % lost", 100, 0.92),
        ("paired difference of win rates (Tango)", "20 % changed", 30, 0.92),  # BCa: 0.84
        ("paired difference of win rates (Tango)", "5 % changed", 30, 0.93),  # BCa: 0.72
        ("people and a judge", "nearly always", 30, 0.90),  # of a mean: 0.75
        ("people and a judge", "judge says yes", 100, 0.91),
        ("share of prompts (Wilson)", "p = 0.02", 100, 0.92),
        ("win rate", "60 %, 40 % ties", 100, 0.92),
    ],
)
def test_intervals_cover_the_truth(kind, case, n, least):
    found = interval_coverage.coverage(interval_coverage.CASES[kind][case], n, 300, seed=1)
    assert least <= found <= 1


def test_every_case_can_be_simulated():
    for cases in interval_coverage.CASES.values():
        for case in cases.values():
            assert interval_coverage.coverage(case, 30, 2) <= 1
