#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Fit the detectors of harmful requests and answers, and write `data/harm.json`.

    python scripts/train_harm_detector.py DATA [--out FILE]

DATA has `xstest/`, `advbench/`, `hh-rlhf/`, `self-instruct/` and `truthfulqa/`, as their authors
publish them. People labelled XSTest's prompts and its completions. AdvBench's texts are harmful by
construction; a prompt of HH's red team counts as harmful if the packaged detector finds that one of
its two answers refuses; prompts of HH (helpful), Self-Instruct and TruthfulQA count as harmless.
Precision and recall are those on XSTest left out: in ten folds, by leaving out a whole kind of
prompt with its contrast, and by leaving out all of XSTest. Needs scikit-learn (extra `eval`).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from lora_rlhf import estimates
from lora_rlhf.data import harm, refusal

FILES = (
    "xstest/xstest_prompts.csv", "xstest/completions_mistralinstruct.csv",
    "advbench/harmful_behaviors.csv", "advbench/harmful_strings.csv",
    "hh-rlhf/harmless-base.test.jsonl.gz", "hh-rlhf/helpful-base.test.jsonl.gz",
    "self-instruct/user_oriented_instructions.jsonl", "self-instruct/seed_tasks.jsonl",
    "truthfulqa/TruthfulQA.csv",
)  # fmt: skip
STRENGTH = {"request": 10.0, "text": 10.0}
RAREST, FOLDS, PEOPLE_WEIGHT = 3, 10, 4.0

Example = tuple[str, int]
"""Text, and 1 if it is harmful."""


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _dialogues(path: Path, key: str = "chosen") -> list[tuple[str, str]]:
    """First question of each dialogue and its answer."""
    found = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            turn = json.loads(line)[key].split("\n\nHuman:")[1]
            question, _, answer = turn.partition("\n\nAssistant:")
            found.append((question.strip(), answer.split("\n\nHuman:")[0].strip()))
    return found


def _unique(texts: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text.strip()]


def kind(name: str) -> str:
    """A kind of XSTest's prompts, its contrast being of it."""
    name = name.removeprefix("contrast_")
    return "discrimination" if "discr" in name else name.split("_")[0] if "priv" in name else name


def requests(folder: Path) -> tuple[list[Example], list[str], dict[str, list[Example]]]:
    """XSTest's prompts, their types, and the prompts of other sources."""
    people = [(r["prompt"], int(r["label"] == "unsafe")) for r in _table(folder / FILES[0])]
    types = [row["type"] for row in _table(folder / FILES[0])]
    red = [
        question
        for question, answer in _dialogues(folder / FILES[4])
        if refusal.refused(question, answer, 1.0)
    ]
    instructions = [
        f"{row['instruction']}\n{row['instances'][0]['input']}"
        for file in FILES[6:8]
        for row in map(json.loads, (folder / file).read_text(encoding="utf-8").splitlines())
    ]
    texts = {
        "AdvBench behaviours": [row["goal"] for row in _table(folder / FILES[2])],
        "HH red team, refused": red,
        "HH helpful": [question for question, _ in _dialogues(folder / FILES[5])],
        "Self-Instruct": instructions,
        "TruthfulQA": [row["Question"] for row in _table(folder / FILES[8])],
    }
    return people, types, {
        name: [(text, int(name in list(texts)[:2])) for text in _unique(given)]
        for name, given in texts.items()
    }  # fmt: skip


def answers(folder: Path) -> tuple[list[Example], list[str], dict[str, list[Example]]]:
    """XSTest's completions, harmful where people say that an unsafe prompt was complied with."""
    rows = _table(folder / FILES[1])
    people = [
        (r["completion"], int(r["type"].startswith("contrast") and r["final_label"][0] == "1"))
        for r in rows
    ]
    instructions = [
        row["instances"][0]["output"]
        for file in FILES[6:8]
        for row in map(json.loads, (folder / file).read_text(encoding="utf-8").splitlines())
    ]
    texts = {
        "AdvBench strings": [row["target"] for row in _table(folder / FILES[3])],
        "HH helpful": [answer for _, answer in _dialogues(folder / FILES[5])],
        "Self-Instruct": instructions,
    }
    return people, [row["type"] for row in rows], {
        name: [(text, int(name == "AdvBench strings")) for text in _unique(given)]
        for name, given in texts.items()
    }  # fmt: skip


class Fitted:
    """A logistic regression on the n-grams and patterns of some texts, classes weighing alike."""

    def __init__(self, examples: list[Example], weights: Any, strength: float) -> None:
        plain = [harm.plain(text) for text, _ in examples]
        counts = Counter(gram for text in plain for gram in harm.words_of(text))
        self.grams = sorted(gram for gram, n in counts.items() if n >= RAREST)
        labels = np.array([label for _, label in examples])
        for label in (0, 1):
            weights = np.where(labels == label, weights / weights[labels == label].sum(), weights)
        model = LogisticRegression(C=strength, max_iter=3000, tol=1e-6)
        model.fit(self.matrix(plain), labels, sample_weight=weights * len(examples) / 2)
        coefficients, n = model.coef_[0], len(self.grams)
        kept = {g: round(float(w), 2) for g, w in zip(self.grams, coefficients, strict=False)}
        self.parameters = {
            "bias": round(float(model.intercept_[0]), 3),
            "patterns": {
                name: round(float(w), 3)
                for name, w in zip(harm._PATTERNS, coefficients[n:], strict=True)
            },
            "words": {gram: w for gram, w in kept.items() if abs(w) >= 0.1},
        }

    def matrix(self, plain: list[str]) -> Any:
        """(N, n-grams and patterns) of N plain texts."""
        columns = {gram: i for i, gram in enumerate(self.grams)}
        names = {name: i for i, name in enumerate(harm._PATTERNS, len(columns))}
        made = sparse.lil_matrix((len(plain), len(columns) + len(names)))
        for i, text in enumerate(plain):
            grams = harm.words_of(text)
            for gram in grams & columns.keys():
                made[i, columns[gram]] = 1 / np.sqrt(len(grams))
            for name in harm.patterns_of(text):
                made[i, names[name]] = 1.0
        return made.tocsr()

    def probabilities(self, texts: Iterable[str], model: str = "request") -> list[float]:
        """As the package computes them."""
        return [harm.probability(text, model, {model: self.parameters}) for text in texts]


def rates(labels: Any, p: Any, threshold: float = 0.5) -> dict[str, Any]:
    """Precision, recall and specificity at a threshold."""
    said = np.asarray(p) >= threshold
    right = int((said & (labels == 1)).sum())
    return {
        "precision": estimates.wilson(right, int(said.sum())) if said.any() else None,
        "recall": estimates.wilson(right, int((labels == 1).sum())),
        "specificity": estimates.wilson(
            int((~said & (labels == 0)).sum()), int((labels == 0).sum())
        ),
    }


def evaluate(name: str, people: list[Example], types: list[str],
             others: dict[str, list[Example]]) -> dict[str, Any]:  # fmt: skip
    """Fit one detector and measure it on texts that were left out."""
    labels = np.array([label for _, label in people])
    half = [one for rows in others.values() for one in rows[::2]]
    rest = {source: rows[1::2] for source, rows in others.items()}

    def fitted(keep: Any, added: list[Example]) -> Fitted:
        chosen = [one for one, k in zip(people, keep, strict=True) if k]
        weights = np.array([PEOPLE_WEIGHT] * len(chosen) + [1.0] * len(added))
        return Fitted([*chosen, *added], weights, STRENGTH[name])

    def left_out(groups: Any) -> Any:
        p = np.zeros(len(people))
        for group in sorted(set(groups)):
            out = groups == group
            texts = [text for (text, _), o in zip(people, out, strict=True) if o]
            p[out] = fitted(~out, half).probabilities(texts, name)
        return p

    folds = np.random.default_rng(0).permutation(len(people)) % FOLDS
    p = left_out(folds)
    nothing = np.zeros(len(people), dtype=bool)
    model = fitted(~nothing, half)
    by_kind = {
        one: estimates.wilson(
            int(((p >= 0.5) == labels)[np.array(types) == one].sum()), types.count(one)
        )
        for one in dict.fromkeys(types)
    }
    elsewhere = {
        source: estimates.wilson(
            sum(x >= 0.5 for x in model.probabilities((t for t, _ in rows), name)), len(rows)
        )
        for source, rows in rest.items()
    }
    kinds = np.array([kind(one) for one in types])
    return {
        "n": len(people),
        **rates(labels, p),
        "thresholds": {str(t): rates(labels, p, t) for t in (0.3, 0.7, 0.9)},
        "a whole kind of prompt left out": rates(labels, left_out(kinds)),
        "all of XSTest left out": rates(
            labels, np.array(fitted(nothing, half).probabilities((t for t, _ in people), name))
        ),
        "right by type of prompt": by_kind,
        "called harmful elsewhere": elsewhere,
        "fitted": fitted(~nothing, [one for rows in others.values() for one in rows]).parameters,
    }


def train(folder: Path) -> dict[str, Any]:
    """Fit, validate, and return the content of `harm.json`."""
    digests = {f: hashlib.sha256((folder / f).read_bytes()).hexdigest()[:16] for f in FILES}
    measured = {"request": evaluate("request", *requests(folder)),
                "text": evaluate("text", *answers(folder))}  # fmt: skip
    models = {name: made.pop("fitted") for name, made in measured.items()}
    return {
        "provenance": {
            "labels": "XSTest (Röttger et al. 2024): 450 prompts, and 450 completions of "
            "Mistral-7B-Instruct",
            "script": "scripts/train_harm_detector.py",
            "files, first digits of SHA-256": digests,
            "note": "Weights of words and word pairs, no text of the sources. The patterns were "
            "written by somebody who had read XSTest's types: its figures favour them.",
        },
        "validation": measured,
        **models,
    }


def main() -> None:
    """Train, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("data", type=Path, nargs="?", default=os.environ.get("LORA_RLHF_DATA"))
    parser.add_argument("--out", type=Path, default=harm.PARAMETERS)
    options = parser.parse_args()
    made = train(Path(options.data))
    options.out.write_text(
        json.dumps(made, indent=0, ensure_ascii=False, separators=(",", ":")) + "\n",
        encoding="utf-8",
    )
    print(json.dumps(made["validation"], indent=1))


if __name__ == "__main__":
    main()
