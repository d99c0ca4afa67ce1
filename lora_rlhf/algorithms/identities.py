# SPDX-License-Identifier: Apache-2.0
"""Identities that hold at the start of every correct run; a run that breaks one is stopped.

Each error names the stage at fault, and each check returns the number that it measured.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lora_rlhf.data.padding import pad_left
from lora_rlhf.errors import IdentityError
from lora_rlhf.models import scoring
from lora_rlhf.models.backbone import REWARDS, Backbone

from .objectives import masked_mean
from .ppo.minibatches import model_inputs

RATIO_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Bound on |ratio - 1| with unchanged weights: padding and batch size change the order of sums.

In float32 it bounds the largest over the tokens, in half precision their mean: rounding one large
logit in bfloat16 makes 0.1 nats or more, and among thousands of tokens some are always far off.
"""
SAMPLER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
"""Bound on |sampler's log-prob - trainer's log-prob| in nats, over the same tokens."""


def _typical(difference_bt: Tensor, mask_bt: Tensor, dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return float(torch.where(mask_bt.bool(), difference_bt, 0.0).max())
    return float(masked_mean(difference_bt, mask_bt))


def policy_equals_reference(policy: Tensor, reference: Tensor, mask: Tensor) -> float:
    """Check that log-probs are equal before the first update; returns the largest difference.

    Raises:
        IdentityError: The policy did not start as a copy of the SFT adapter, or the reference is
            not that adapter (2203.02155, eq. 2).
    """
    worst = float(torch.where(mask.bool(), (policy - reference).abs(), 0.0).max())
    if not worst <= 1e-6:
        raise IdentityError(
            f"before the first update, policy and reference differ by {worst:.3g} nats",
            expected="0: the policy starts as a copy of the frozen SFT adapter",
            remedy="stage at fault: sft. Was adapters/sft changed, another adapter loaded as "
            "policy, or dropout switched on?",
        )
    return worst


def ratio_is_one(
    ratio_bt: Tensor, mask_bt: Tensor, dtype: torch.dtype, *, enforce: bool = True
) -> float:
    """Measure |ratio - 1| on a rollout's first micro-batch, against a separate forward's log-probs.

    Raises:
        IdentityError: It is above `RATIO_TOLERANCE`: dropout is on, the temperature differs, or
            another adapter was active.
    """
    off = _typical((ratio_bt - 1).abs(), mask_bt, dtype)
    if enforce and not off <= RATIO_TOLERANCE[dtype]:
        raise IdentityError(
            f"before any update, the ratio of new to old probabilities is off 1 by {off:.3g}",
            expected=f"at most {RATIO_TOLERANCE[dtype]} in {dtype}",
            remedy="stage at fault: ppo. Dropout, another temperature, or a stale adapter",
        )
    return off


@torch.no_grad()
def sampler_agrees(
    backbone: Backbone, prompts: list[list[int]], sampler: GenerationConfig, temperature: float
) -> float:
    """Check transformers' sampler against the training forward; returns the difference in nats.

    The sampler's log-probs include every logits processor. The random state is restored.

    Raises:
        IdentityError: Padding, positions, temperature or a logits processor differ between the two.
    """
    ids, mask = pad_left(prompts, backbone.tokenizer.pad_token_id)
    ids, mask = ids.to(backbone.device), mask.to(backbone.device)
    config = copy.deepcopy(sampler)
    config.update(max_new_tokens=8, return_dict_in_generate=True, output_scores=True)
    was_training = backbone.causal.training
    backbone.causal.eval()
    cuda = [backbone.device] if backbone.device.type == "cuda" else []
    with backbone.role("policy"), torch.random.fork_rng(devices=cuda):
        out = backbone.causal.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        tokens = out.sequences.shape[1] - ids.shape[1]
        chosen = out.sequences[:, -tokens:]
        scores = torch.stack(out.scores, dim=1).float()
        sampled = scores.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        eos = torch.tensor(config.eos_token_id, device=chosen.device)
        ended = torch.isin(chosen, eos).int()
        valid = ended.cumsum(dim=1) - ended == 0  # up to and including the first eos
        full = torch.cat([mask, valid.to(mask.dtype)], dim=1)
        trained, _ = scoring.completion_logprobs(backbone, out.sequences, full, tokens, temperature)
    backbone.causal.train(was_training)
    return sampler_is_the_policy((sampled - trained).abs()[valid], backbone.causal.dtype)


def sampler_is_the_policy(difference: Tensor, dtype: torch.dtype) -> float:
    """Check |sampler's log-prob - trainer's log-prob|; returns its maximum (half precision: mean).

    Raises:
        IdentityError: It is above `SAMPLER_TOLERANCE`.
    """
    worst = _typical(difference, torch.ones_like(difference), dtype)
    if not worst <= SAMPLER_TOLERANCE[dtype]:
        raise IdentityError(
            f"the sampler's log-probs differ from the trainer's by {worst:.3g} nats",
            expected=f"at most {SAMPLER_TOLERANCE[dtype]} in {dtype}",
            remedy="stage at fault: rollout. Dropout, padding side, positions, temperature, or a "
            "processor in the base model's generation config",
        )
    return worst


@dataclass
class FrozenRolesCheck:
    """Check that the first update moved the trained roles and nothing else.

    `take` is called before that update, `check` after it. With a batch, the reference's log-probs
    on it must also stay equal bit for bit, which fails if another adapter is active.

    Attributes:
        frozen: Hash of each frozen role; None is the backbone.
        moving: Hash of each trained role.
    """

    backbone: Backbone
    stage: str
    frozen: dict[str | None, str]
    moving: dict[str, str]
    batch: dict[str, Tensor] | None = None
    temperature: float = 1.0
    reference_bt: Tensor | None = None

    @classmethod
    def take(
        cls,
        backbone: Backbone,
        stage: str,
        trained: Sequence[str],
        batch: dict[str, Tensor] | None = None,
        temperature: float = 1.0,
    ) -> FrozenRolesCheck:
        """Record hashes before the first update, and the reference's log-probs on a batch."""
        roles = [None, *(r for r in ("reference", *REWARDS) if backbone.has(r))]
        frozen = {role: backbone.state_hash(role) for role in roles}
        moving = {role: backbone.state_hash(role) for role in trained}
        made = cls(backbone, stage, frozen, moving, batch, temperature)
        if batch is not None:
            made.reference_bt = made._logprobs(batch, "reference")
        return made

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint between `take` and `check`."""
        names = ("frozen", "moving", "batch", "temperature", "reference_bt")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def _logprobs(self, batch: dict[str, Tensor], role: str) -> Tensor:
        ids, mask, tokens = model_inputs(batch)
        with self.backbone.role(role):
            logprobs_bt, _ = scoring.completion_logprobs(
                self.backbone, ids, mask, tokens, self.temperature
            )
        return logprobs_bt

    def check(self) -> dict[str, float]:
        """Compare with the state before the update; returns an entry for the record.

        Raises:
            IdentityError: A frozen role moved, or a trained one did not.
        """
        for role, digest in self.frozen.items():
            if self.backbone.state_hash(role) != digest:
                raise self._error(role or "backbone", "moved, but is frozen")
        for role, digest in self.moving.items():
            if self.backbone.state_hash(role) == digest:
                raise self._error(role, "did not move: it receives no gradient")
        if self.batch is None or self.reference_bt is None:
            return {"only_policy_moved": 1}
        mask_bt = self.batch["completion_mask"].bool()
        now_bt = self._logprobs(self.batch, "reference")
        if not torch.equal(
            torch.where(mask_bt, now_bt, 0), torch.where(mask_bt, self.reference_bt, 0)
        ):
            raise self._error(
                "reference", "gives other log-probs than before: a stale adapter is active"
            )
        difference = (self._logprobs(self.batch, "policy") - now_bt).abs()
        moved = float(masked_mean(difference, mask_bt))
        if not moved > 0:
            raise self._error("policy", "still equals the reference: KL would always be 0")
        return {"mean_abs_log_ratio_after_first_update": moved}

    def _error(self, role: str, what: str) -> IdentityError:
        return IdentityError(
            f"after the first update, the {role} {what}",
            expected=f"{' and '.join(self.moving)} moved; backbone, reference and reward did not",
            remedy=f"stage at fault: {self.stage}, role {role}. Please report it with record.json",
        )
