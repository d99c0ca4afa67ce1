# SPDX-License-Identifier: Apache-2.0
"""Whole runs on a tiny random base, in seconds, some of them broken on purpose.

Prompts and completions are made of the words of `small.tokenizer`. The better completion of a
comparison holds `GOOD`, the worse one `BAD`, unless a fault says otherwise.
"""

import json
import random
from pathlib import Path

from small import base_folder

from lora_rlhf import pipeline
from lora_rlhf.errors import DivergedError
from lora_rlhf.recipe.loader import parse_recipe
from lora_rlhf.runs.record import Record

GOOD, BAD, FILLER = "w20", "w30", [f"w{i}" for i in range(40, 60)]

RECIPE = """
name: little
model: {{id: "{base}"}}
lora: {{r: 4, alpha: 8}}
data:
  demonstrations: [{{path: demonstrations.jsonl}}]
  comparisons: [{{path: comparisons.jsonl}}]
  prompts: [{{path: prompts.jsonl}}]
  held_out: 0.25
sft: {{args: {{per_device_train_batch_size: 16, num_train_epochs: 3, learning_rate: 2e-2}}}}
reward: {{gate: warn, args: {{per_device_train_batch_size: 16, learning_rate: 1e-2}}}}
ppo:
  updates: 4
  value_warmup_updates: 1
  args: {{per_device_train_batch_size: 16, steps_per_generation: 1, max_completion_length: 12,
    learning_rate: 1e-3, warmup_steps: 0}}
evaluate: {{n: 32}}
"""


def prompt(rng: random.Random) -> str:
    return " ".join(f"w{rng.randint(5, 15)}" for _ in range(rng.randint(2, 4)))


def completion(rng: random.Random, word: str, length: int) -> str:
    words = [word, *rng.choices(FILLER, k=length - 1)]
    rng.shuffle(words)
    return " ".join(words)


def comparison(rng: random.Random, fault: str | None) -> dict[str, str]:
    """`shuffled`: a coin decides. `length`: the longer one wins, whatever it says."""
    if fault == "length":
        words, lengths = rng.choices([GOOD, BAD], k=2), rng.sample(range(2, 10), 2)
        pair = [completion(rng, w, n) for w, n in zip(words, sorted(lengths)[::-1], strict=True)]
    else:
        pair = [completion(rng, word, rng.randint(3, 6)) for word in (GOOD, BAD)]
        if fault == "shuffled":
            rng.shuffle(pair)
    return {"prompt": prompt(rng), "chosen": pair[0], "rejected": pair[1]}


def write(folder: Path, fault: str | None, n: int) -> None:
    rng = random.Random(0)
    rows = {
        "demonstrations": [
            {"prompt": prompt(rng), "completion": completion(rng, rng.choice([GOOD, BAD]), 4)}
            for _ in range(n)
        ],
        "comparisons": [comparison(rng, fault) for _ in range(n)],
        "prompts": [{"prompt": prompt(rng)} for _ in range(n)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def run(
    folder: Path,
    *overrides: str,
    fault: str | None = None,
    until: str = "reward",
    n: int = 160,
    out: str = "run",
) -> Record:
    """A run in `folder/out` as far as it came; the record says why PPO stopped."""
    write(folder, fault, n)
    text = RECIPE.format(base=base_folder("llama"))
    recipe = parse_recipe(text, "recipe.yaml", list(overrides), folder)
    try:
        return pipeline.run(recipe, folder / out, until=until)
    except DivergedError:
        return Record.read(folder / out)
