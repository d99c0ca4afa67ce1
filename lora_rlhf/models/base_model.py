# SPDX-License-Identifier: Apache-2.0
"""The frozen base model, its tokenizer, and the layers and modules that carry adapters."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lora_rlhf.data import chat_template, tokenization
from lora_rlhf.distributed.shards import Shards
from lora_rlhf.errors import BaseModelError
from lora_rlhf.recipe.schema import LoraSection, ModelSection
from lora_rlhf.redaction import safe
from lora_rlhf.runtime import environment
from lora_rlhf.runtime.oom import BatchSizeBackoff

from . import fingerprints, loading, special_tokens


@dataclass
class BaseModel:
    """A causal language model with its tokenizer, frozen.

    Attributes:
        tokenizer: Pads on the left, with a pad token that is not an eos token.
        source: Origin and licence of the weights, for the record.
        backoff: Batch-size limits after memory ran out.
        shards: The layers' matrices, if processes share them.
        adapted_layers: Indices of the top layers, which carry adapters.
        target_modules: Names of the adapted linear modules inside those layers.
    """

    causal: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model_section: ModelSection
    lora_section: LoraSection
    source: dict[str, Any]

    def __post_init__(self) -> None:
        self.backoff = BatchSizeBackoff()
        self.shards: Shards | None = None  # set by `sharded_layers.shard`
        self.layers = decoder_layers(self.causal)
        count = math.ceil(len(self.layers) * self.lora_section.top_fraction)
        self.adapted_layers = list(range(len(self.layers) - count, len(self.layers)))
        self.target_modules = linear_names(self.layers, self.lora_section.target_modules)
        self.causal.requires_grad_(False)
        self.causal.eval()
        if self.causal.dtype != torch.float32:
            self.causal.get_output_embeddings().register_forward_pre_hook(_contiguous)

    @classmethod
    def load(cls, model: ModelSection, lora: LoraSection, on_host: bool = False) -> Self:
        """Load base model and tokenizer; raises the errors of `loading.load`.

        Environment variables that would change its outputs are refused or ignored first.

        Args:
            on_host: Load the weights into the host's memory, even if there is a GPU.
        """
        environment.settle()
        causal, tokenizer, source = loading.load(model, on_host=on_host)
        return cls(causal, tokenizer, model, lora, source)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash that identifies the base model."""
        return fingerprints.fingerprint(self.causal)

    @functools.cached_property
    def base_sample(self) -> list[float]:
        """Some of its weights, for `fingerprints.nearly_same`; a shared base is fetched once."""
        return fingerprints.sample(self.causal)

    @property
    def device(self) -> torch.device:
        """The device that holds the backbone."""
        device: torch.device = self.causal.device
        return device

    @property
    def is_4bit(self) -> bool:
        """True if the base is quantised to 4 bits, by the recipe or by its own config."""
        return bool(getattr(self.causal, "is_loaded_in_4bit", False))

    @property
    def decoder(self) -> nn.Module:
        """The base model without its LM head: tokens to hidden states."""
        decoder: nn.Module = self.causal.base_model
        return decoder

    @property
    def eos_ids(self) -> list[int]:
        """Every id that ends a completion: the tokenizer's first, then the model's."""
        return special_tokens.end_ids(self.tokenizer, self.causal)

    def describe(self) -> dict[str, Any]:
        """Describe the base model for the record."""
        section, config = self.model_section, self.causal.config
        template = self.tokenizer.chat_template
        text = template if isinstance(template, str) else json.dumps(template)
        entry: dict[str, Any] = {
            "id": safe(section.id),
            "hub_id": section.hub_id,
            "revision": None,  # a folder has none
            "fingerprint": self.fingerprint,
            "dtype": str(self.causal.dtype).removeprefix("torch."),
            "load_in_4bit": self.is_4bit,
            "parameters": self.causal.num_parameters(),
            "layers": len(self.layers),
            "hidden_size": config.get_text_config().hidden_size,
            "chat_template_sha256": hashlib.sha256(text.encode()).hexdigest() if template else None,
            "eos_ids": self.eos_ids,
            "pad_id": self.tokenizer.pad_token_id,
            **self.source,
        }
        if loading.local_folder(section) is None:
            entry["revision"] = getattr(config, "_commit_hash", None) or section.revision
        if note := chat_template.note(self.tokenizer):
            entry["chat_template_note"] = note
            entry["token_notes"] = [*entry.get("token_notes", []), note]
        return entry

    def encode_prompt(self, prompt: tokenization.Turns, *, cached: bool = True) -> list[int]:
        """Encode a prompt with its generation prompt, as TRL's rollouts do."""
        return tokenization.prompt_ids(self.tokenizer, [prompt], cached=cached)[0].tolist()

    def encode_completion(
        self, completion: tokenization.Turns, *, cached: bool = True
    ) -> list[int]:
        """Encode a completion with its eos: the tokens that the policy would have to sample.

        SFT, reward model and PPO share this layout, so the reward model reads its score at the
        same token in training and in PPO. Control tokens in the text are encoded as plain text.
        """
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        ids = tokenization.completion_ids(self.tokenizer, [text], cached=cached)[0]
        return [*ids, self.tokenizer.eos_token_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _contiguous(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Make the input of a half-precision head contiguous on the CPU.

    The last token's states of several rows are not, and torch then multiplies row by row with a
    copy of the head for each: 864 MB for 16 rows and SmolLM2's vocabulary.
    """
    if not args or args[0].device.type != "cpu":
        return None
    return args[0].contiguous(), *args[1:]


def decoder_layers(causal: PreTrainedModel) -> nn.ModuleList:
    """Find the list of decoder layers by its length, since its name depends on the architecture.

    Raises:
        BaseModelError: The model has no such list.
    """
    count = causal.config.get_text_config().num_hidden_layers
    for module in causal.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise BaseModelError(
        f"{type(causal).__name__} has no list of {count} layers", expected="a decoder-only model"
    )


def linear_names(layers: nn.ModuleList, wanted: list[str] | None) -> list[str]:
    """Resolve `lora.target_modules` to the last names of linear modules, once for all roles.

    PEFT would resolve "all-linear" per view, and adapt the head of some views.

    Raises:
        BaseModelError: No linear module has a wanted name.
    """
    names = {
        name.rpartition(".")[2]
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    if unknown := set(wanted or ()) - names:
        raise BaseModelError(
            f"lora.target_modules names {sorted(unknown)}", expected=f"some of {sorted(names)}"
        )
    return sorted(wanted or names)
