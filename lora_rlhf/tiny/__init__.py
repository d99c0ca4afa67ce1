# SPDX-License-Identifier: Apache-2.0
"""The shipped tiny model: a Llama that learned the closed-world task, poorly on purpose.

``AutoModelForCausalLM.from_pretrained(path())`` and ``AutoTokenizer.from_pretrained(path())`` load
it. The weights are stored in bf16; ask for ``dtype=torch.float32`` on a CPU.
"""

from pathlib import Path


def path() -> Path:
    """Return the folder that holds the model and its tokenizer."""
    return Path(__file__).resolve().parent


def recipe() -> Path:
    """Return the recipe of `lora-rlhf demo`."""
    return path() / "recipe.yaml"
