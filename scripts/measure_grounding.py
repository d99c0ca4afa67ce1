#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure how many invented answers the check of grounded answers removes, and how many right ones.

    python scripts/measure_grounding.py runs/smollm2:policy --n 64

Questions of `plain_records`, greedy decoding, `unsupported="drop"`: with the plain prompt, checked
against the question's own record; and by `ground`, which finds two passages among all records. The
same answers are judged before and after the check, so the differences are paired.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from lora_rlhf import estimates
from lora_rlhf.evaluation import prompt_sets
from lora_rlhf.evaluation.metrics.plain_records import outcome
from lora_rlhf.serving import grounding, instructions
from lora_rlhf.serving.inference import Request
from lora_rlhf.serving.retrieval import Index, read


def record_of(row: prompt_sets.Row) -> tuple[str, str]:
    """The record and the question of a prompt."""
    record, question = row.prompt.split("Record: ", 1)[1].split("\n", 1)
    return record.strip(), question.strip()


def index_of(folder: Path, records: list[str]) -> Index:
    """An index of these records, each a file."""
    for number, text in enumerate(records):
        (folder / f"{number:04}.txt").write_text(text + "\n")
    return Index(read(folder))


def answered(target: str, n: int, most: int) -> dict[str, list[tuple[Any, grounding.Grounded]]]:
    """Answer every question in both ways; rows with their checked answers by way."""
    by_name = {}
    for row in prompt_sets.load("records", format="plain_records", n=20 * n).rows:
        by_name.setdefault(row.reference["record"]["name"], row)  # else a search finds both people
    rows = list(by_name.values())[:n]
    ways: dict[str, list[tuple[Any, grounding.Grounded]]] = {"plain": [], "sources": []}
    name, model = instructions.split_target(target)
    with instructions.loaded(name) as engine, tempfile.TemporaryDirectory() as folder:
        (shared := Path(folder, "all")).mkdir()
        every = index_of(shared, [record_of(row)[0] for row in rows])
        for number, row in enumerate(rows):
            record, question = record_of(row)
            (own := Path(folder, str(number))).mkdir()
            turn = ({"role": "user", "content": row.prompt},)
            asked = Request(messages=turn, model=model, temperature=0, max_tokens=48)
            written = engine.generate(asked).choices[0].text
            opened = grounding.Grounding.open(index_of(own, [record]), "drop", most=1)
            ways["plain"].append((row, opened.check(question, written)))
            found = grounding.Grounding.open(every, "drop", most=most)
            made = grounding.answer(engine, question, found, model=model, max_tokens=48)
            ways["sources"].append((row, made))
    return ways


def figures(pairs: list[tuple[Any, grounding.Grounded]]) -> dict[str, Any]:
    """Shares before and after the check, their paired differences, and the answers."""
    before = [outcome(row, made.written) for row, made in pairs]
    after = [outcome(row, made.text) for row, made in pairs]
    answers = [
        {"prompt": row.prompt, "written": made.written, "shown": made.text, "was": was, "is": now}
        for was, now, (row, made) in zip(before, after, pairs, strict=True)
    ]
    table: dict[str, Any] = {"n": len(pairs)}
    table["stated"] = sum(row.kind == "stated" for row, _ in pairs)
    for name in ("right", "invented", "not stated", "unclear"):
        was, now = ([float(one == name) for one in ones] for ones in (before, after))
        table[name] = {
            "before": estimates.wilson(sum(was), len(was)),
            "after": estimates.wilson(sum(now), len(now)),
            "difference": estimates.paired_difference(now, was, seed=0),
        }
    return table | {"answers": answers}


def main() -> None:
    """Measure, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("target", help="a run or a model of it, such as runs/mine:policy")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--most", type=int, default=2, help="passages that are shown")
    options = parser.parse_args()
    ways = answered(options.target, options.n, options.most)
    print(json.dumps({way: figures(pairs) for way, pairs in ways.items()}, indent=1))


if __name__ == "__main__":
    main()
