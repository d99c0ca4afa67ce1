# SPDX-License-Identifier: Apache-2.0
"""Measure rows per second and peak memory of a large set under each filter of `data:`.

    python scripts/measure_hygiene.py --rows 1000000 --page docs/benchmarks.md

Every line of the table is a process of its own. Memory is the peak resident memory minus that
after the imports; seconds are CPU seconds at one thread, with the reading of the file.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILTERS: dict[str, dict[str, object]] = {
    "none (read, parse, tokenize)": {},
    "common_prefix: 40": {"common_prefix": 40},
    "near_duplicates: 0.8": {"near_duplicates": 0.8},
    "contamination: drop, against 5,000 prompts": {"contamination": "drop"},
    "augment: {paraphrases: 0.1, identities: 0.1}": {
        "augment": {"paraphrases": 0.1, "identities": 0.1}
    },
    "personal_data: redact": {"personal_data": "redact"},
}
"""Line of the table -> keys of `data:`; measured on a twentieth of the rows."""

_START, _END = "<!-- hygiene -->", "<!-- end of hygiene -->"


def write_rows(folder: Path, rows: int) -> None:
    """Write short demonstrations, every tenth with a person and a number, and 5,000 questions."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in "ba de ki lo mu ne pa ri so tu".split() for b in
             "bal den kit lom mun nep par ris sot tul vex zan".split()]  # fmt: skip
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for i in range(rows):
            prompt = " ".join(rng.choices(words, k=12))
            if i % 10 == 0:
                prompt += f" Ask Alice or call +1 212-736-{i % 10_000:04}"
            answer = " ".join(rng.choices(words, k=6))
            file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(5_000):
            file.write(json.dumps({"prompt": " ".join(rng.choices(words, k=12))}) + "\n")


def one(folder: Path, data: dict[str, object]) -> None:
    """Prepare the set in this process, and print the measurements as JSON."""
    from transformers import AutoTokenizer

    import lora_rlhf
    from lora_rlhf.data import dataset_builder
    from lora_rlhf.data.personal_data import Finder
    from lora_rlhf.recipe.schema import Recipe

    import datasets  # noqa: F401  # isort: skip
    import datasketch  # noqa: F401  # isort: skip

    files = {"demonstrations": "rows.jsonl", "evaluate": "questions.jsonl"}
    sources = {name: [{"path": str(folder / file)}] for name, file in files.items()}
    recipe = Recipe.model_validate(
        {"name": "m", "model": {"id": "tiny"}, "data": {**sources, **data, "max_lost": 1.0}}
    )
    tokenizer = AutoTokenizer.from_pretrained(Path(lora_rlhf.__file__).parent / "tiny")
    if "personal_data" in data:
        Finder(recipe.data.name_model).spans("one 1")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    prepared = dataset_builder.demonstrations(recipe, tokenizer)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    left = prepared.report["train"] + prepared.report["held_out"]
    print(json.dumps({"mb": (peak - before) / 1024, "s": seconds, "left": left}))


def main() -> None:
    """Measure each filter in a process, and print the table or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(Path(options.one[0]), json.loads(options.one[1]))
        return
    columns = "filter | rows | left | rows a CPU second | CPU seconds | peak MB | kB a row"
    lines = [f"| {columns} |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    cases: list[tuple[str, dict[str, object], int]] = [("none", {}, options.rows)]
    cases += [(name, data, options.rows // 20) for name, data in FILTERS.items()]
    with tempfile.TemporaryDirectory() as folder:
        for name, data, rows in cases:
            write_rows(Path(folder), rows)
            command = [sys.executable, __file__, "--one", folder, json.dumps(data)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            kb = found["mb"] * 1024 / rows
            lines.append(
                f"| `{name}` | {rows:,} | {found['left']:,} | {rows / found['s']:,.0f} | "
                f"{found['s']:,.0f} | {found['mb']:,.0f} | {kb:.2f} |"
            )
            print(lines[-1], flush=True)
    table = f"{options.rows:,} rows of about 12 + 6 words, the shipped tokenizer.\n\n" + "\n".join(
        lines
    )
    if options.page:
        page = options.page.read_text(encoding="utf-8")
        head, _, rest = page.partition(_START)
        text = f"{head}{_START}\n\n{table}\n\n{_END}{rest.partition(_END)[2]}"
        options.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
