# SPDX-License-Identifier: Apache-2.0
"""Merge an adapter into its base, and measure what that changed on the run's own held-out rows.

Everything is computed in float32, so that differences come from the weights and not from rounding
in a forward pass.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lora_rlhf.data import dataset_builder
from lora_rlhf.errors import NonFiniteError, UsageError
from lora_rlhf.models import loading
from lora_rlhf.models.base_model import BaseModel
from lora_rlhf.models.plain_adapters import PlainAdapters
from lora_rlhf.models.scoring import Episode
from lora_rlhf.runs import samples
from lora_rlhf.runs.disk import write_atomically
from lora_rlhf.runs.record import Record

_ROWS = 64
_BYTES = 256 * 1024**2
"""Memory for the logits of the unmerged model."""


@dataclass
class Merged:
    """An adapter merged into its base.

    Attributes:
        model: Plain transformers model in float32, without PEFT.
        folder: The adapter's folder.
        rows: Held-out prompts with answers, on which differences are measured.
        before: What the unmerged model gives for them: logits (t, V) of each answer, or rewards.
        stored_dtype: The dtype of the base's own file.
        offset: Reward role: added to each score.
    """

    base: BaseModel
    model: Any
    folder: Path
    rows: list[Episode]
    before: list[Any]
    stored_dtype: str
    offset: float | None = None

    def differences(self, model: Any) -> dict[str, Any]:
        """Compare a merged model, as it is in memory or in a file, with the unmerged one."""
        if self.offset is not None:
            after = scores(model, self.rows)
            pairs = zip(self.before, after, strict=True)
            far = max(abs(a - (b + self.offset)) for a, b in pairs)
            return {"rows": len(self.rows), "largest_score_difference": far}
        return distances(self.before, logits(model, self.rows))


def merge_role(record: Record, role: str) -> Merged:
    """Load a role on its base, keep its logits or scores, and merge it.

    Raises:
        DamageError: The adapter is not as the run wrote it.
        UsageError: The run has no text to measure with.
    """
    folder, base = record.verified(f"adapters/{role}"), load_base(record)
    given = loading.find_config(base.model_section, record.folder).get_text_config().dtype
    stored = str(given or "float32").removeprefix("torch.")
    plain, is_reward = PlainAdapters(base), role not in ("policy", "sft")
    rows = held_out(record, base, role)
    if is_reward:
        plain.load_scorer(role, folder)
        before: Any = plain.scores(role, [prompt + answer for prompt, answer in rows], 1)
        offset = plain.offset(role)
        return Merged(base, plain.merged(role, folder), folder, rows, before, stored, offset)
    plain.load(role, folder)
    size = 4 * base.causal.get_output_embeddings().weight.shape[0]
    while len(rows) > 1 and sum(len(answer) for _, answer in rows) * size > _BYTES:
        rows.pop()
    with plain.active(role):
        before = logits(base.causal, rows)
    return Merged(base, plain.merged(role, folder), folder, rows, before, stored)


def load_base(record: Record) -> BaseModel:
    """Load the base of a run to compute in float32, in 4-bit if the run did."""
    recipe = record.recipe()
    section = record.model_section(recipe).model_copy(update={"dtype": "float32"})
    return BaseModel.load(section, recipe.lora)


def held_out(record: Record, base: BaseModel, role: str) -> list[Episode]:
    """Return prompts that nothing trained on, each with an answer, as ids that fit the context.

    The evaluation's samples of the role's own answers, or else held-out rows of the data.
    """
    texts: list[tuple[Any, Any]] = []
    for lines in samples.read(record).values() if record.done("evaluate") else ():
        line = next((lines[m] for m in (role, "policy", "best_of_n", "sft") if m in lines), None)
        if line is not None:
            chat = base.tokenizer.chat_template
            prompt: Any = line["prompt"]
            prompt = [{"role": "user", "content": prompt}] if chat else prompt
            texts.append((prompt, line["completion"]))
    recipe = record.recipe()
    if not texts and recipe.data.demonstrations:
        held = dataset_builder.demonstrations(recipe, base.tokenizer).held_out
        texts = [(row["prompt"], row["completion"]) for row in held.take(min(_ROWS, len(held)))]
    context = getattr(base.causal.config.get_text_config(), "max_position_embeddings", 2048)
    rows = []
    for prompt, answer in texts[:_ROWS]:
        ids = base.encode_prompt(prompt)[-context // 2 :], base.encode_completion(answer)
        rows.append((ids[0], ids[1][: context // 2]))
    if not rows:
        raise UsageError(
            f"{record.folder} has no held-out text on which an export can be measured",
            expected="a finished evaluation, or demonstrations in the recipe",
            remedy="finish the run: `lora-rlhf run`",
        )
    return rows


@torch.no_grad()
def logits(model: Any, rows: Sequence[Episode]) -> list[Tensor]:
    """Compute the float32 logits that predict each answer's tokens, (t, V) for each row."""
    out = []
    for prompt, answer in rows:
        ids = torch.tensor([prompt + answer], device=model.device)
        out.append(model(input_ids=ids, use_cache=False).logits[0, -len(answer) - 1 : -1].cpu())
    return out


@torch.no_grad()
def scores(model: Any, rows: Sequence[Episode]) -> list[float]:
    """Score each row by a merged reward model, without its offset."""
    tensors = [torch.tensor([prompt + answer], device=model.device) for prompt, answer in rows]
    return [float(model(input_ids=ids).logits[0, 0]) for ids in tensors]


def distances(before: Sequence[Any], after: Sequence[Tensor]) -> dict[str, Any]:
    """Compare logits: KL(before || after) a token, the largest difference, and the top choice."""
    kl, same, far = [], [], 0.0
    for a, b in zip(before, after, strict=True):
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append((a.argmax(-1) == b.argmax(-1)).double())
        far = max(far, float((a - b).abs().max()))
    each = torch.cat(kl)
    return {
        "rows": len(kl),
        "tokens": len(each),
        "kl_per_token": float(each.mean()),
        "largest_kl_of_a_token": float(each.max()),
        "largest_logit_difference": far,
        "top1_agreement": float(torch.cat(same).mean()),
    }


def save(merged: Merged, folder: Path, dtype: torch.dtype) -> None:
    """Write a merged model with its tokenizer as a folder of transformers.

    Raises:
        NonFiniteError: A weight does not fit the dtype.
    """
    model = merged.model
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise NonFiniteError(
                f"{name} holds numbers too large for {str(dtype).removeprefix('torch.')}",
                remedy="export with --dtype float32",
            )
    model.config.dtype = dtype
    model.save_pretrained(str(folder))
    merged.base.tokenizer.save_pretrained(str(folder))
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    # Older transformers, and mlx-lm, do not read `rope_parameters`, and would take 10,000.
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    if merged.offset is not None:
        config |= {"reward_offset": merged.offset}
    write_atomically(path, json.dumps(config, indent=2) + "\n")


def load(folder: Path, *, reward: bool, device: torch.device) -> Any:
    """Load what `save` wrote by plain transformers, to compute in float32."""
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    model: Any = auto.from_pretrained(
        str(folder), dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    return model.to(device).eval()
