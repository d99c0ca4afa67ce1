# SPDX-License-Identifier: Apache-2.0
"""Reward stages on tiny models, with labelers whose taste is known."""

import random

import numpy as np
import torch
from datasets import Dataset
from small import backbone

from lora_rlhf.data.dataset_builder import Prepared
from lora_rlhf.recipe.schema import ModelSection, Recipe
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.training.reward import reward_stage
from lora_rlhf.training.reward.reward_metrics import Comparisons
from lora_rlhf.training.stage_context import StageContext

ARGS = {"per_device_train_batch_size": 4, "learning_rate": 2e-2, "warmup_steps": 0}


def recipe(**section):
    section = {"args": ARGS, **section}
    return Recipe(name="little", model=ModelSection(id="tiny"), reward=section)


def words(rng, n):
    return " ".join(f"w{rng.randrange(5, 45)}" for _ in range(n))


def rows(better, n, seed, k=3):
    """Rankings of k random completions by `better`, as data.py leaves them; ties are out."""
    rng, pairs = random.Random(seed), []
    for group in range(n):
        prompt = words(rng, 2) + f" w{10 + group % 40}"
        texts = [words(rng, rng.choice((1, 2, 7, 8))) + f" w{50 + i}" for i in range(k)]
        rng.shuffle(texts)
        pairs += [
            {"prompt": prompt, "chosen": a, "rejected": b, "group": group}
            for a in texts
            for b in texts
            if better(a) > better(b)
        ]
    return Dataset.from_list(pairs)


def last_word(text):
    """Taste of these labelers: a low number of the last word, at any length."""
    return -int(text.split()[-1][1:])


def prepared(better, n=60, **report):
    return Prepared(rows(better, n, 1), rows(better, 40, 2), report)


DEMONSTRATIONS = Dataset.from_list(
    [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 3} w{50 - i}"} for i in range(5, 20)]
)


def run(folder, data, other=None, **section):
    torch.manual_seed(0)
    made = backbone("llama", "reference")
    chosen = recipe(held_out_model=other is not None, **section)
    record = Record.open(folder, chosen)
    args = reward_stage.arguments(chosen, folder)
    context = StageContext(chosen, made, record, Progress(quiet=True))
    reward_stage.run(context, args, data, DEMONSTRATIONS, other)
    return made, record


def comparisons(longer, prompts=None, **more):
    """N comparisons of 2 N completions; scores are given as [chosen, rejected] in turn."""
    n = len(longer)
    pairs = np.arange(2 * n).reshape(n, 2)
    return Comparisons([], pairs, list(prompts or range(n)), np.array(longer, float), **more)


def scores(margins):
    return np.array([[m, 0.0] for m in margins], float).ravel()
