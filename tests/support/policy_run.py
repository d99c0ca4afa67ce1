# SPDX-License-Identifier: Apache-2.0
"""Little runs of GRPO, RLOO and DPO on tiny random models."""

from datasets import Dataset
from ppo_run import ARGS, prompts, roles

from lora_rlhf.algorithms import dpo, grpo_rloo
from lora_rlhf.recipe.schema import DataSection, DataSource, ModelSection, PpoSection, Recipe
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.training.stage_context import StageContext

COMPARISONS = Dataset.from_list(
    [
        {"prompt": f"w{5 + i}", "chosen": "w9 w10", "rejected": f"w{11 + i} w12 w13"}
        for i in range(8)
    ]
)


def recipe(algorithm, args=None, *, seed=0, ppo=None, **section):
    own = {"args": args or {}} if algorithm != "best_of_n" else {}
    data = DataSection(comparisons=[DataSource(path="x.jsonl")])
    ppo = {"updates": 2, "args": {**ARGS, "steps_per_generation": 2}, **(ppo or {})}
    return Recipe(
        name="little",
        seed=seed,
        algorithm=algorithm,
        model=ModelSection(id="tiny"),
        data=data,
        ppo=PpoSection(**ppo),
        **{algorithm: {**own, **section}},
    )


def run(folder, asked, made=None):
    made, record = made or roles(), Record.open(folder, asked)
    context = StageContext(asked, made, record, Progress(quiet=True))
    if asked.algorithm == "dpo":
        dpo.run(context, dpo.arguments(asked, folder), COMPARISONS)
    else:
        grpo_rloo.run(context, grpo_rloo.arguments(asked, folder), prompts())
    return made, record
