# SPDX-License-Identifier: Apache-2.0
"""PPO-ptx: plain text mixed into PPO's updates, against forgetting.

Source: InstructGPT (2203.02155), eq. 2, third term. Its coefficient 27.8 depends on OpenAI's own
scaling of the loss and diverges elsewhere. Here the loss is a mean over the text tokens of an
optimizer step: with a coefficient of 1, the text weighs as much as the episodes.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from torch import Tensor

from lora_rlhf.algorithms.objectives import masked_sum
from lora_rlhf.data.padding import pad_left
from lora_rlhf.models import scoring
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.runs.tensor_tree import checkpointable_tuple


@checkpointable_tuple
class TextBatch(NamedTuple):
    """Texts of one micro-batch: ids and mask (B, L), left-padded; number of predicted tokens."""

    ids: Tensor
    mask: Tensor
    tokens: int

    def part(self, start: int, stop: int) -> TextBatch:
        """Select some of the texts."""
        mask = self.mask[start:stop]
        return TextBatch(self.ids[start:stop], mask, int((mask.sum(dim=1) - 1).sum()))


class TextMix:
    """Batches of `size` texts, of two or more tokens each, reshuffled after each pass."""

    def __init__(self, rows: list[list[int]], size: int, seed: int, pad_id: int) -> None:
        self.rows, self.size, self.pad_id = rows, min(size, len(rows)), pad_id
        self._random = random.Random(f"{seed}/ptx")
        self._order: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the rest of this pass's order, and the random state."""
        return {"order": self._order, "random": self._random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._order = state["order"]
        self._random.setstate(state["random"])

    def next(self, backbone: Backbone) -> TextBatch:
        """Return the next batch, on the backbone's device."""
        while len(self._order) < self.size:
            fresh = list(range(len(self.rows)))
            self._random.shuffle(fresh)
            self._order += fresh
        taken, self._order = self._order[: self.size], self._order[self.size :]
        ids, mask = pad_left([self.rows[i] for i in taken], self.pad_id)
        tokens = sum(len(self.rows[i]) - 1 for i in taken)
        return TextBatch(ids.to(backbone.device), mask.to(backbone.device), tokens)


def loss_sum(backbone: Backbone, batch: TextBatch) -> Tensor:
    """Sum the negative log-likelihood of predicted tokens under the active role. Shape ()."""
    tokens = batch.ids.shape[1] - 1
    logprobs_bt, _ = scoring.completion_logprobs(backbone, batch.ids, batch.mask, tokens, 1.0)
    # The first token of a text is not predicted: only padding precedes it.
    predicted_bt = batch.mask[:, 1:] * batch.mask[:, :-1]
    return -masked_sum(logprobs_bt, predicted_bt)
