# SPDX-License-Identifier: Apache-2.0
"""LoRA adapter folders on one base by plain PEFT, of any origin, rank and target modules.

`backbone` holds the roles of a run, all of one shape, to train them; this reads what others saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_rlhf.errors import AdapterError, first_line
from lora_rlhf.runtime import paths

from . import adapters
from .base_model import BaseModel
from .views import build_view


class PlainAdapters:
    """Adapters by name on one base; they are switched, and merged only for an export."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self._policies: PeftModel | None = None
        self._scorers: dict[str, tuple[PeftModel, float]] = {}

    def load(self, name: str, folder: Path) -> None:
        """Load a policy under `name`, unless it is loaded already.

        Raises:
            AdapterError: The folder holds no LoRA of this base.
        """
        if self._policies is not None and peft_name(name) in self._policies.peft_config:
            return
        adapters.check_base(self.base, folder)
        with self._errors(folder, "a LoRA adapter of this base, saved by PEFT"):
            if self._policies is None:
                self._policies = self._from(self.base.causal, name, folder)
            else:
                self._policies.load_adapter(str(folder), adapter_name=peft_name(name))
        self.base.causal.requires_grad_(False)
        self.base.causal.eval()

    def load_scorer(self, name: str, folder: Path) -> None:
        """Load a reward model with its head and, if `reward.json` has one, its offset.

        Raises:
            AdapterError: The folder holds no reward model of this base.
        """
        if name in self._scorers:
            return
        adapters.check_base(self.base, folder)
        view = build_view(self.base.causal, per_token=False)
        view.config.pad_token_id = self.base.tokenizer.pad_token_id
        with self._errors(folder, "an adapter with a score head, saved by PEFT"):
            model = self._from(view, name, folder)
            note = folder / "reward.json"
            offset = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
            self._scorers[name] = (model, float(offset.get("reward_offset", 0.0)))
        model.requires_grad_(False)
        model.eval()

    @contextlib.contextmanager
    def _errors(self, folder: Path, expected: str) -> Iterator[None]:
        paths.reject_escaping_links(folder, AdapterError)
        if not (folder / "adapter_model.safetensors").is_file():
            raise AdapterError(
                f"{folder} holds no adapter_model.safetensors",
                expected="safetensors; pickles (.bin) are not read",
            )
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise AdapterError(
                f"{folder} cannot be loaded on {self.base.model_section.id}: {first_line(error)}",
                expected=expected,
                remedy="name the right base with --base",
            ) from error

    def _from(self, model: Any, name: str, folder: Path) -> PeftModel:
        return PeftModel.from_pretrained(model, str(folder), adapter_name=peft_name(name))

    @contextlib.contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Use a policy inside the context; None: the base alone."""
        if name is not None:
            assert self._policies is not None
            self._policies.set_adapter(peft_name(name))
            yield
            return
        # Reward models live in the same layers.
        peft = self._policies or next((model for model, _ in self._scorers.values()), None)
        with peft.disable_adapter() if peft else contextlib.nullcontext():
            yield

    def offset(self, name: str) -> float:
        """Return what is added to each score of a reward model."""
        return self._scorers[name][1]

    def merged(self, name: str, folder: Path) -> Any:
        """Merge a policy, or a reward model with its head, into the base; return the plain model.

        A base in 4-bit is dequantised first: PEFT would round the sum to 4 bits again. Nothing else
        of this object can be used afterwards.
        """
        peft: Any = self._scorers[name][0] if name in self._scorers else self._policies
        if self.base.is_4bit:
            plain = peft.unload()
            self.base.causal.dequantize()
            peft = self._from(plain, name, folder)
        return peft.merge_and_unload(safe_merge=True, adapter_names=[peft_name(name)]).eval()

    @contextlib.contextmanager
    def training(self, rank: int, folder: Path) -> Iterator[list[nn.Parameter]]:
        """Put a new LoRA on the base, which is active inside; then save it and take it off."""
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=2 * rank,
            target_modules=self.base.target_modules,
            base_model_name_or_path=self.base.model_section.hub_id or self.base.causal.name_or_path,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            model: Any = get_peft_model(self.base.causal, config)
        try:
            yield [weight for weight in model.parameters() if weight.requires_grad]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT looks for the base's config on the Hub
                model.save_pretrained(str(folder))
        finally:
            model.unload()

    @torch.no_grad()
    def scores(self, name: str, rows: Sequence[list[int]], batch_size: int) -> list[float]:
        """Score rows of ids at their last token, with the offset, in their order."""
        model, offset = self._scorers[name]
        model.set_adapter(peft_name(name))
        whole = model.get_base_model()
        head = whole.score if hasattr(whole, "score") else whole.classifier
        out = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            ids, mask = right_padded([rows[i] for i in part], self.base)
            states = self.base.decoder(input_ids=ids, attention_mask=mask, use_cache=False)
            ends = states.last_hidden_state[torch.arange(len(part)), mask.sum(dim=1) - 1]
            for i, score in zip(part, head(ends.float()).squeeze(-1).tolist(), strict=True):
                out[i] = score + offset
        return out


def right_padded(rows: Sequence[list[int]], base: BaseModel) -> tuple[Tensor, Tensor]:
    """Stack rows of ids with their masks, padded on the right, on the base's device."""
    tensors = [torch.tensor(row) for row in rows]
    pad = base.tokenizer.pad_token_id
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)
    return ids.to(base.device), mask.to(base.device)


def peft_name(name: str) -> str:
    """Return the name that PEFT has for an adapter, which a torch module may have."""
    return f"a{hashlib.sha256(name.encode()).hexdigest()[:16]}"
