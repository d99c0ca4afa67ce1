# SPDX-License-Identifier: Apache-2.0
"""The reward model's trainer, with a ranking of K completions as one batch element.

Source: InstructGPT (2203.02155), section 3.5 and eq. 1. All comparisons of a prompt are in one
element, with a total weight of 1. Shuffled separately, each completion would be seen K - 1 times
per epoch, which overfits; together, K forwards serve up to K (K - 1) / 2 pairs.

B prompts in a batch, N completions in total, P pairs in total, L tokens of the longest completion.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_rlhf._trl import RewardTrainer
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.training.private_training import PrivateTraining

MAX_COMPLETIONS = 16
"""Most completions in one element; a prompt with more becomes several elements."""

_Pair = tuple[tuple[int, ...], tuple[int, ...], float]
"""Ids of winner and loser, prompts included, and the margin."""


def rankings(backbone: Backbone, rows: Dataset, *, whole: bool = False) -> Dataset:
    """Group rows of pairs by prompt, in the order in which prompts first appear.

    Args:
        rows: `prompt`, `chosen`, `rejected`, optionally `margin`, and `group`, which is equal for
            all pairs of one prompt; without `group` every pair is a prompt of its own.
        whole: Keep a prompt in one element even if it has more than `MAX_COMPLETIONS`.

    Returns:
        `completions`: ids of prompt + completion + eos, each once; `pairs`: [winner, loser] as
        positions in it; `margins`: one per pair, 0 by default; `length`: of the longest.
    """
    groups: dict[Any, list[_Pair]] = {}
    for number, row in enumerate(rows):
        prompt = backbone.encode_prompt(row["prompt"])
        chosen, rejected = (
            tuple(prompt + backbone.encode_completion(row[side])) for side in ("chosen", "rejected")
        )
        if chosen != rejected:  # different texts may have the same ids
            pair = (chosen, rejected, float(row.get("margin") or 0.0))
            groups.setdefault(row.get("group", f"row {number}"), []).append(pair)
    most = sys.maxsize if whole else MAX_COMPLETIONS
    return Dataset.from_list(
        [element for pairs in groups.values() for element in _elements(pairs, most)]
    )


def _elements(pairs: list[_Pair], most: int) -> Iterator[dict[str, Any]]:
    """Make one element of a prompt's pairs, or several of at most `most` completions."""
    position: dict[tuple[int, ...], int] = {}
    start = 0
    for stop, (chosen, rejected, _) in enumerate(pairs):
        if len(position.keys() | {chosen, rejected}) > most:
            yield _element(position, pairs[start:stop])
            position, start = {}, stop
        for ids in (chosen, rejected):
            position.setdefault(ids, len(position))
    yield _element(position, pairs[start:])


def _element(position: dict[tuple[int, ...], int], pairs: list[_Pair]) -> dict[str, Any]:
    return {
        "completions": [list(ids) for ids in position],
        "pairs": [[position[chosen], position[rejected]] for chosen, rejected, _ in pairs],
        "margins": [margin for *_, margin in pairs],
        "length": max(map(len, position)),
    }


def collate(elements: list[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Collate the completions of B prompts into one flat batch, padded on the right.

    Models that count positions from the left edge (GPT-2, OPT) then see the same positions in
    every batch.

    Returns:
        `input_ids`, `attention_mask` (N, L); `pairs` (P, 2) rows of them, winner first;
        `margins` (P,); `weights` (P,), 1 / pairs of its prompt; `prompts` (B,), pairs of each.
    """
    rows: list[Tensor] = []
    pairs: list[Tensor] = []
    for element in elements:
        pairs.append(torch.tensor(element["pairs"]) + len(rows))
        rows += [torch.tensor(ids) for ids in element["completions"]]
    masks = [torch.ones_like(ids) for ids in rows]
    margins = [margin for element in elements for margin in element["margins"]]
    counts = torch.tensor([len(element["pairs"]) for element in elements])
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence(masks, batch_first=True),
        "pairs": torch.cat(pairs),
        "margins": torch.tensor(margins, dtype=torch.float32),
        "weights": (1 / counts.double()).float().repeat_interleave(counts),
        "prompts": counts,
    }


def ranking_loss(rewards: Tensor, pairs: Tensor, margins: Tensor, weights: Tensor) -> Tensor:
    """Sum eq. 1 over prompts, in float32: -weight · log sigmoid(r_w - r_l - margin).

    Args:
        rewards: (N,)
        pairs: (P, 2) positions of winner and loser.
        margins: (P,) required lead of the winner (2307.09288, section 3.2.2).
        weights: (P,)
    """
    winners, losers = rewards.float()[pairs].unbind(dim=1)
    return -(weights * nn.functional.logsigmoid(winners - losers - margins)).sum()


class RankingTrainer(PrivateTraining, RewardTrainer):
    """TRL's RewardTrainer on rows of `rankings`: `per_device_train_batch_size` counts prompts.

    Every prompt of an optimizer step has the same weight, however the step is split into batches.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the prompts of the whole step

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """Return the dataset unchanged: `rankings` has encoded it."""
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        if getattr(self, "_signature_columns", None) is None:
            self._signature_columns = ["completions", "pairs", "margins", "length"]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the batches of one optimizer step, and the mean of prompts over processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        prompts = torch.tensor([sum(len(b["prompts"]) for b in batches)], device=device)
        # Gradients are averaged over processes, so each divides by the mean number of prompts.
        return batches, self.accelerator.gather(prompts).float().mean()

    def whole_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Average `ranking_loss` over prompts."""
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        rewards = outputs.logits.squeeze(-1).float()
        pairs, weights = inputs["pairs"], inputs["weights"]
        loss = ranking_loss(rewards, pairs, inputs["margins"], weights)
        if self.args.center_rewards_coefficient is not None:
            centred = (weights * rewards[pairs].sum(dim=1) ** 2).sum()
            loss = loss + self.args.center_rewards_coefficient * centred
        prompts = len(inputs["prompts"])
        self._note(inputs, rewards.detach())
        loss = loss / (prompts if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def rows(self, inputs: Any) -> int:
        """Count prompts: a ranking is one element and is not split."""
        return len(inputs["prompts"])

    def part(self, inputs: Any, start: int, stop: int) -> Any:
        """Select some prompts with their pairs and completions."""
        counts = inputs["prompts"].tolist()
        first, last = sum(counts[:start]), sum(counts[:stop])
        pairs = inputs["pairs"][first:last]
        low, high = int(pairs.min()), int(pairs.max()) + 1
        return {
            "input_ids": inputs["input_ids"][low:high],
            "attention_mask": inputs["attention_mask"][low:high],
            "pairs": pairs - low,
            **{name: inputs[name][first:last] for name in ("margins", "weights")},
            "prompts": inputs["prompts"][start:stop],
        }

    def metric_weight(self, name: str, piece: Any) -> float:
        """Count prompts, and completions for the mean reward."""
        return len(piece["input_ids"]) if name == "mean_reward" else self.rows(piece)

    def share(self, piece: Any, inputs: Any, num_items_in_batch: Any) -> float:
        """Return the share of prompts; 1 if the loss is divided by those of the whole step."""
        if num_items_in_batch is not None:
            return 1.0
        return len(piece["prompts"]) / len(inputs["prompts"])

    def _note(self, inputs: Any, rewards: Tensor) -> None:
        """Log TRL's metrics as means over prompts instead of pairs."""
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._total_train_tokens += int(inputs["attention_mask"].sum())
        gaps = rewards[inputs["pairs"]] @ rewards.new_tensor([1.0, -1.0])
        weights = inputs["weights"] / len(inputs["prompts"])
        metrics = self._metrics[mode]
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["min_reward"].append(float(rewards.min()))
        metrics["mean_reward"].append(float(rewards.mean()))
        metrics["max_reward"].append(float(rewards.max()))
        metrics["accuracy"].append(float((weights * (gaps > 0)).sum()))
        metrics["margin"].append(float((weights * gaps).sum()))
