# SPDX-License-Identifier: Apache-2.0
"""The packaged closed-world recipe, reduced to a run of seconds."""

from lora_rlhf import tiny
from lora_rlhf.recipe.loader import load_recipe
from lora_rlhf.recipe.schema import Recipe

REDUCED = [
    "data.demonstrations.0.n=40", "data.comparisons.0.n=32", "data.comparisons.0.completions=3",
    "data.prompts.0.n=60", "evaluate.n=12", "data.evaluate.0.n=12", "reward.gate=warn",
    "sft.args.num_train_epochs=1", "ppo.updates=3", "ppo.args.per_device_train_batch_size=4",
    "ppo.args.steps_per_generation=2", "ppo.args.max_completion_length=24",
]  # fmt: skip


def recipe(*sets: str) -> Recipe:
    """The reduced recipe with these overrides, as of `--set`."""
    return load_recipe(tiny.recipe(), [*REDUCED, *sets])
