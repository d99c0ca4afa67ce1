# SPDX-License-Identifier: Apache-2.0
"""Precision and recall of the verdicts on labelers, over many simulated teams of twelve.

    PYTHONPATH=tests/support python tests/benchmarks/verdicts.py FIRST_SEED LAST_SEED

Prints the rows of the table in docs/feedback.md.
"""

import sys
from collections import Counter

from simulated_team import team

from lora_rlhf.feedback.labeler_verdicts import judge_labelers

TEAMS = {
    "60 labels, half of the tasks by two": {"each": 60, "overlap": 0.5},
    "30 labels, a fifth by two (the defaults)": {"each": 30, "overlap": 0.2},
    "100 labels, a fifth by two (the defaults)": {"each": 100, "overlap": 0.2},
    "200 labels, a fifth by two (the defaults)": {"each": 200, "overlap": 0.2},
    "40 labels, all tasks by three": {"each": 40, "overlap": 1.0, "per_overlap": 3},
    "60 labels, all by five": {"each": 60, "overlap": 1.0, "per_overlap": 5},
    "30 labels, all by all, no gold": {
        "each": 30, "overlap": 1.0, "per_overlap": 12, "gold_share": 0.0},
    "100 pairs, half by two": {"each": 100, "overlap": 0.5, "kind": "pair"},
    "60 labels, half by two, people of unequal skill": {
        "each": 60, "overlap": 0.5, "skill_spread": 0.5},
    "60 labels, half by two, people agree on 62 %": {"each": 60, "overlap": 0.5, "agreement": 0.62},
    "60 labels, half by two, the left-taker and the copy are random in 15 %": {
        "each": 60, "overlap": 0.5, "deviation": 0.15},
    "60 labels, half by two, the judge never errs": {
        "each": 60, "overlap": 0.5, "judge_noise": 0.0},
}  # fmt: skip
HABITS = ("honest", "spammer", "liar", "left", "copy")


def main(first, last):
    print("| team | " + " | ".join(HABITS) + " | precision | recall |")
    print("|---" * (len(HABITS) + 3) + "|")
    for title, given in TEAMS.items():
        people, named = Counter(), Counter()
        for seed in range(first, last):
            made = team(seed, **given)
            for verdict in judge_labelers(made.tasks, made.labels, made.judge):
                people[made.habits[verdict.labeler]] += 1
                named[made.habits[verdict.labeler]] += verdict.named
        bad = named.total() - named["honest"]
        cells = [f"{named[habit]} of {people[habit]}" for habit in HABITS]
        cells += [f"{bad / named.total():.3f}", f"{bad / (people.total() - people['honest']):.2f}"]
        print(f"| {title} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
