# SPDX-License-Identifier: Apache-2.0
"""GRPO and RLOO: TRL's trainers and losses, on our backbone and reward.

PPO's penalty for a missing eos, the frozen SFT adapter as reference, PPO's metric names, and the
identities are added. Sources: GRPO 2402.03300, RLOO 2402.14740. PPO and RLOO subtract the KL (k1)
from the reward, GRPO adds it (k3) to the loss, so equal coefficients are not equal strengths.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from transformers import set_seed

from lora_rlhf._trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from lora_rlhf.distributed.world import world
from lora_rlhf.estimates import repetition
from lora_rlhf.models import fused_layers, sampler, scoring
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.runs.progress import Progress
from lora_rlhf.training.fit import fit
from lora_rlhf.training.stage_context import StageContext
from lora_rlhf.training.trl_config import build, effective, trainer_args

from . import custom_reward, identities, policy_stage, reward_functions
from .objectives import kl_estimates, masked_mean
from .policy_trainer import CLONE, RolloutTrainer, TiedReferenceTrainer
from .ppo import minibatches, ppo_metrics, ppo_stage
from .ppo.minibatches import model_inputs

_RENAMED = {"entropy": "policy/entropy", "clip_ratio/region_mean": "policy/clip_fraction"}
"""TRL's name -> ours, where both mean the same."""
METRICS = {"reward/groups_without_spread": "share of prompts whose completions all score the same"}
"""Logged in addition to PPO's: a group of equal scores gives no gradient."""


def run(context: StageContext, args: GRPOConfig | RLOOConfig, prompts: Dataset) -> None:
    """Optimise the policy with the recipe's algorithm; saves `adapters/policy`.

    Args:
        prompts: Column `prompt`, and `item` where a task's gold checker is used or logged.

    Raises:
        IdentityError: A start-up identity does not hold.
    """
    recipe, backbone, record, progress = context
    name = recipe.algorithm
    with record.stage(name) as entry:
        set_seed(recipe.seed)
        backbone.copy_role("reference", "policy")
        functions, weights = reward_functions.of_recipe(recipe, backbone, prompts)
        functions.append(reward_functions.eos_penalty(backbone, recipe.ppo.missing_eos_penalty))
        args.reward_weights = [*weights, 1.0]
        per_update = policy_stage.steps_per_update(args)
        build_trainer = functools.partial(
            _KINDS[name][1],
            backbone,
            args=args,
            reward_funcs=functions,
            train_dataset=prompts,
            progress=progress,
        )
        with backbone.training("policy"):
            fused = fused_layers.layers(backbone)
            trainer, result = fit(context, build_trainer, name, unit=per_update, around=fused)
        updates = result.global_step // per_update
        entry |= {
            "updates": updates,
            **custom_reward.describe(recipe),
            "kl_coef": args.beta,
            "num_generations": args.num_generations,
            "episodes": updates * args.generation_batch_size,
            "missing_eos_penalty": recipe.ppo.missing_eos_penalty,
            "optimizer_steps": result.global_step,
            "identities": trainer.identities,
            "args": effective(args),
        }
        entry |= policy_stage.last_kl(record, name)
        entry["adapter_sha256"] = context.save_adapter("policy")


def arguments(recipe: Recipe, out: Path) -> Any:
    """Build TRL's config of this stage: PPO's arguments, overridden by the algorithm's `args:`.

    Raises:
        RecipeError: A key is set elsewhere, or batch sizes do not fit together.
    """
    name = recipe.algorithm
    section = getattr(recipe, name)
    shared = ppo_stage.budget(recipe, out, rollouts=True)
    merged = trainer_args(recipe, out, name, shared, section.args)
    updates = recipe.ppo.updates if section.updates is None else section.updates
    beta = recipe.ppo.kl_coef if section.kl_coef is None else section.kl_coef
    own = {"beta": beta, "num_generations": section.num_generations}
    steps = policy_stage.rollout_steps(name, merged, updates)
    return build(name, _KINDS[name][0], {**merged, **own, **steps})


class _GroupTrainer(RolloutTrainer, TiedReferenceTrainer):
    """GRPO and RLOO on our backbone; the last reward function is the penalty for a missing eos."""

    _buffered_inputs: list[dict[str, Any]] | None
    _ids_alone = False  # RLOO's `_generate_single_turn` returns no log-probs

    def __init__(self, backbone: Backbone, *, progress: Progress, **options: Any) -> None:
        self.progress = progress
        self._prompt_ids: list[list[int]] = []
        self._sampled: list[sampler.Sampled] = []
        self._computed: dict[str, Tensor] = {}
        super().__init__(backbone, **options)

    def _generate(self, prompts: list[Any]) -> Any:
        self.progress.phase("rollout")
        out = super()._generate(prompts)
        self._prompt_ids = out[0]
        return out

    def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **options: Any) -> Any:
        if not self.samples_itself:
            return super()._generate_single_turn(prompt_ids, *rest, **options)
        with self.backbone.role("policy"):
            self._sampled = sampler.sample(
                self.backbone,
                prompt_ids,
                max_new_tokens=self.max_completion_length,
                temperature=self.temperature,
            )
        ids = [sampled.ids for sampled in self._sampled]
        return ids if self._ids_alone else (ids, None)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """Return TRL's next micro-batch; episodes of one optimizer step are sorted by length."""
        before, window = self._buffered_inputs, self.args.gradient_accumulation_steps
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        made = self._buffered_inputs
        if made is not None and made is not before and window > 1 and self.can_be_sorted():
            self._buffered_inputs = made = minibatches.sorted_windows(made, window)
            inputs = made[self._step % self.args.steps_per_generation]
        return inputs

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **options: Any,
    ) -> Any:
        """Compute log-probs and entropies as PPO does; TRL computes logits of prompts as well."""
        given = input_ids, attention_mask, logits_to_keep
        if options.get("compute_aux_loss"):  # of a mixture of experts
            return super()._get_per_token_logps_and_entropies(model, *given, batch_size, **options)
        if torch.is_grad_enabled():
            logprobs_bt, entropies_bt = self._forward(*given)
        else:
            logprobs_bt, entropies_bt = self._batches(*given, batch_size)
            clone = self.backbone.views["policy"].active_adapter == CLONE
            self._computed["reference" if clone else "policy"] = logprobs_bt
        return logprobs_bt, entropies_bt if options.get("compute_entropy") else None, None

    def _forward(self, ids: Tensor, mask: Tensor, tokens: int) -> list[Tensor]:
        """Compute log-probs and entropies (B, T) without columns that are padding in every row.

        Padding gets 0, whichever rows are computed together: TRL multiplies exp(reference - policy)
        by the mask, and infinity times 0 would be NaN.
        """
        columns, kept = minibatches.valid_columns(mask, tokens)
        ids, mask = ids[:, columns], mask[:, columns]
        states = scoring.completion_states(self.backbone, ids, mask, kept)
        bonus = getattr(self, "_entropy_bonus_enabled", False)
        both = scoring.logprobs_of(self.backbone, states, ids, self.temperature, bonus)
        padding = mask[:, -kept:] == 0
        return [functional.pad(part.masked_fill(padding, 0), (0, tokens - kept)) for part in both]

    @torch.no_grad()
    def _batches(
        self, ids: Tensor, mask: Tensor, tokens: int, size: int | None = None
    ) -> list[Tensor]:
        """Compute what `_forward` does, on rows sorted by length that the processes share."""
        both_2bt = torch.zeros(2, len(ids), tokens, device=ids.device)

        def visit(index: Sequence[int]) -> None:
            rows = torch.tensor(index, device=ids.device)
            both_2bt[:, rows] = torch.stack(self._forward(ids[rows], mask[rows], tokens))

        order = sorted(world().own(len(ids)), key=mask.sum(dim=1).tolist().__getitem__)
        self.backbone.backoff.for_each_batch("scoring", order, size or len(ids), visit)
        return [torch.stack(world().completed(list(part))) for part in both_2bt]

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        self.progress.phase("score")
        # Reward functions score the sampled ids: decoding and encoding again may change them.
        rows = [{**row, "prompt_ids": p} for row, p in zip(inputs, self._prompt_ids, strict=True)]
        rewards: Tensor = super()._calculate_rewards(
            rows, prompts, completions, completion_ids_list
        )
        scores_b = self.checked_rewards(rewards, prompts)[:, :-1].sum(dim=1)
        shares = [share for share in repetition(completion_ids_list) if share is not None]
        ended = [bool(ids) and ids[-1] in self.eos_token_ids for ids in completion_ids_list]
        self.note(
            {
                "reward/score": float(scores_b.mean()),
                "reward/score_std": float(scores_b.std(correction=0)),
                "completions/length": sum(map(len, completion_ids_list)) / len(completion_ids_list),
                "completions/eos_rate": sum(ended) / len(ended),
                "completions/repetition": sum(shares) / len(shares) if shares else float("nan"),
            }
        )
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._computed.clear()  # those of an evaluation
        out: dict[str, Any] = super()._generate_and_score_completions(inputs)
        self._observe(out)
        self._computed.clear()
        self.progress.phase("update")
        return out

    @torch.no_grad()
    def _observe(self, out: dict[str, Any]) -> None:
        """Check and log the KL to SFT as PPO measures it, whatever estimator the loss uses."""
        policy_bt, reference_bt = (self._logprobs(out, role) for role in ("policy", "reference"))
        mask_bt = out["completion_mask"]
        if self.state.global_step == 0 and not self.warm_started:
            self.identities["kl_at_start"] = identities.policy_equals_reference(
                policy_bt, reference_bt, mask_bt
            )
        self._check_sampler(policy_bt, mask_bt)
        kl = kl_estimates(policy_bt, reference_bt, mask_bt)
        self.note(
            {
                "kl/sequence": float(kl.k1.sum(dim=1).mean()),
                "kl/coef": self.args.beta,
                "kl/k1": float(masked_mean(kl.k1, mask_bt)),
                "kl/k3": float(masked_mean(kl.k3, mask_bt)),
            }
        )

    def _logprobs(self, out: dict[str, Any], role: str) -> Tensor:
        """Return a role's log-probs (B, T) of a rollout; TRL's loss has asked for some already."""
        if role in self._computed:
            return self._computed[role]
        with self.backbone.role(role):
            return self._batches(*model_inputs(out), self.args.per_device_train_batch_size)[0]

    def _check_sampler(self, policy_bt: Tensor, mask_bt: Tensor) -> None:
        """Compare the sampler's log-probs with the trainer's on the first rollout."""
        sampled, self._sampled = self._sampled, []
        if not sampled or "sampler_difference" in self.identities:
            return
        differences = [
            (drawn.logprobs.to(row.device) - row[mask.bool()]).abs()
            for drawn, row, mask in zip(sampled, policy_bt, mask_bt, strict=True)
            if int(mask.sum()) == len(drawn.ids)  # TRL may mask completions that were cut off
        ]
        if differences:
            self.identities["sampler_difference"] = identities.sampler_is_the_policy(
                torch.cat(differences), self.backbone.causal.dtype
            )

    def can_be_split(self) -> bool:
        """Forbid splitting with GRPO's entropy bonus or quantile, which are taken over all rows."""
        bonus = getattr(self, "_entropy_bonus_enabled", False)
        quantile = getattr(self, "top_entropy_quantile", 1.0)
        return super().can_be_split() and not bonus and quantile == 1.0

    def can_be_sorted(self) -> bool:
        """Return False if an episode's weight depends on the others of its micro-batch."""
        return self.can_be_split() and getattr(self, "loss_type", None) != "bnpo"

    def share(self, piece: Any, inputs: Any, num_items_in_batch: Any) -> float:
        """Return the share of the tokens or rows that TRL averages over; 1 where it sums."""
        kind = getattr(self, "loss_type", None)  # RLOO has none: a mean over completions
        if kind in ("dapo", "cispo", "vespo"):
            return 1.0
        if kind == "bnpo":
            tokens, total = (max(int(x["completion_mask"].sum()), 1) for x in (piece, inputs))
            return tokens / total
        return self.rows(piece) / self.rows(inputs)

    def renamed(self, metrics: dict[str, list[float]]) -> dict[str, list[float]]:
        """Use PPO's names, and drop metrics that PPO does not log."""
        ours = {_RENAMED.get(name, name): values for name, values in metrics.items()}
        kept = ppo_metrics.kept(ours)
        kept["reward/groups_without_spread"] = ours.get("frac_reward_zero_std", [])
        return {name: values for name, values in kept.items() if values}


class GroupGRPO(_GroupTrainer, GRPOTrainer):
    """TRL's GRPO on our backbone."""

    _tag_names = ["lora-rlhf", "grpo"]
    by_token = _GroupTrainer.by_token | {"clip_ratio/region_mean"}  # RLOO's is a mean over rows


class GroupRLOO(_GroupTrainer, RLOOTrainer):
    """TRL's RLOO on our backbone."""

    _tag_names = ["lora-rlhf", "rloo"]
    _ids_alone = True


_KINDS: dict[str, tuple[Any, Any]] = {
    "grpo": (GRPOConfig, GroupGRPO), "rloo": (RLOOConfig, GroupRLOO),
}  # fmt: skip
