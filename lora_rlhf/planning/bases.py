# SPDX-License-Identifier: Apache-2.0
"""Base models that `init` offers: shapes from which memory is planned without their config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_rlhf.errors import BaseModelError
from lora_rlhf.models.loading import find_config
from lora_rlhf.recipe.schema import ModelSection


@dataclass(frozen=True)
class Base:
    """An instruct model on the Hub, not gated, Apache-2.0.

    Attributes:
        parameters: As on its page; `config` has as many.
        english: Trained on English only.
    """

    id: str
    parameters: int
    english: bool
    kind: str
    shape: tuple[int, int, int, int, int, int, bool]

    def config(self) -> Any:
        """Return its config, of which only what takes memory is the model's own."""
        from transformers import AutoConfig

        own = {"head_dim": 128} if self.kind == "qwen3" else {}
        shape = dict(zip(_SHAPE, self.shape, strict=True))
        return AutoConfig.for_model(self.kind, max_position_embeddings=8192, **shape, **own)


_SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
_SMOL, _QWEN = "HuggingFaceTB/SmolLM2-", "Qwen/Qwen"
BASES = (
    Base(f"{_SMOL}135M-Instruct", 134_515_008, True, "llama", (576, 1536, 30, 9, 3, 49152, True)),
    Base(f"{_SMOL}360M-Instruct", 361_821_120, True, "llama", (960, 2560, 32, 15, 5, 49152, True)),
    Base(f"{_QWEN}2.5-0.5B-Instruct", 494_032_768, False, "qwen2",
         (896, 4864, 24, 14, 2, 151936, True)),
    Base(f"{_QWEN}2.5-1.5B-Instruct", 1_543_714_304, False, "qwen2",
         (1536, 8960, 28, 12, 2, 151936, True)),
    Base(f"{_SMOL}1.7B-Instruct", 1_711_376_384, True, "llama",
         (2048, 8192, 24, 32, 32, 49152, True)),
    Base(f"{_QWEN}3-4B-Instruct-2507", 4_022_468_096, False, "qwen3",
         (2560, 9728, 36, 32, 8, 151936, True)),
    Base(f"{_QWEN}2.5-7B-Instruct", 7_615_616_512, False, "qwen2",
         (3584, 18944, 28, 28, 4, 152064, False)),
)  # fmt: skip
"""Smallest first, with their `_SHAPE`."""

_SHARE = 0.35
"""Largest share of a GPU that 16-bit weights may take: PPO on a larger base would take days."""

_SMALLEST_GPU = 3 * 10**9


def for_gpu(gpu: int | None, english: bool) -> list[Base]:
    """Return the bases for a GPU of so many bytes (None: a CPU), the most capable first."""
    fitting = [
        b for b in BASES if gpu and gpu >= _SMALLEST_GPU and 2 * b.parameters <= _SHARE * gpu
    ]
    fitting = fitting or [BASES[0 if english else 2]]
    return [b for b in reversed(fitting) if english or not b.english] or [BASES[2]]


def config_of(model: ModelSection, folder: Path | None = None) -> tuple[Any, bool]:
    """Return a base's config: its own if it is here or can be fetched, else from the table.

    Returns:
        The config, and True if it is from the table.

    Raises:
        BaseModelError: It is neither here nor in the table.
    """
    try:
        return find_config(model, folder), False
    except BaseModelError:
        if base := next((b for b in BASES if b.id == model.id), None):
            return base.config(), True
        raise
