# SPDX-License-Identifier: Apache-2.0
"""PPO on TRL's rollout machinery: GRPOTrainer samples, batches and logs; what PPO adds is here.

Added: the value role, a per-token KL penalty in the reward, GAE, the clipped value loss, shuffling
per epoch, separate gradient clips, and the start-up identities. A rollout is `steps_per_generation`
micro-batches; each PPO epoch (`num_iterations`) shuffles and splits it anew; an optimizer step
takes `gradient_accumulation_steps` micro-batches and divides by their valid tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from . import guards, heads, ppo_log
from ._trl import GRPOConfig, GRPOTrainer, split_tensor_dict
from .backbone import Backbone
from .sections import PpoSection
from .errors import NonFiniteError
from .objectives import (
    gae,
    kl_estimates,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from .progress import Progress

RewardFunction = Callable[..., list[float]]

MAX_MEAN_RATIO = 10.0
"""A micro-batch whose mean ratio is above this moves the policy nowhere: it is left out."""


@dataclass
class PPOConfig(GRPOConfig):
    """GRPO's config, which refuses one completion per prompt; PPO needs no group."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            # TRL's last check but those of vLLM's importance sampling, which PPO does not use.
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise


class PPOTrainer(GRPOTrainer):
    """PPO for the roles of one backbone. Use it inside `backbone.training("policy", "value")`.

    Args:
        backbone: With the roles policy, reference and value (and reward, if the reward function
            scores with it).
        args: TRL's arguments; `epsilon` is the policy's clip range, `temperature` that of sampling
            and of log-probs.
        ppo: The PPO section of the recipe.
        reward_funcs: Called as TRL calls reward functions, with `prompt_ids` beside
            `completion_ids`; one whose weight in `args.reward_weights` is 0 is only logged.
    """

    _tag_names = ["lora-rlhf", "ppo"]
    _name = "PPO"
    optimizer: torch.optim.Optimizer | None
    _buffered_inputs: list[dict[str, Any]] | None

    def __init__(
        self,
        backbone: Backbone,
        args: PPOConfig,
        ppo: PpoSection,
        reward_funcs: list[RewardFunction],
        train_dataset: Dataset,
        progress: Progress,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.backbone, self.ppo, self.progress = backbone, ppo, progress
        self.identities: dict[str, float] = {}
        self.policy_updates = 0
        self._moved: guards.MovedOnly | None = None
        self._rollout: dict[str, Tensor] = {}
        self._scores_b = torch.empty(0)
        with backbone.float32_kept():
            super().__init__(
                model=backbone.views["policy"],
                reward_funcs=list(reward_funcs),
                args=args,
                train_dataset=train_dataset,
                processing_class=backbone.tokenizer,
                callbacks=callbacks,
            )
        self.remove_callback(PrinterCallback)
        self.add_callback(_AfterStep(self))

    # ------------------------------------------------------------------ rollout

    @property
    def update(self) -> int:
        """Index of the current rollout, from 0."""
        return self._step // (self.args.steps_per_generation * self.num_iterations)

    @property
    def warming_up(self) -> bool:
        """Whether only the value learns for now."""
        return self.update < self.ppo.value_warmup_updates

    def _generate(self, prompts: list[Any]) -> Any:
        self.progress.phase("rollout")
        out = super()._generate(prompts)
        # TRL hands extra fields on to the reward functions: they score the very ids that were
        # sampled, and nothing is tokenised twice.
        prompt_ids, extra_fields = out[0], out[5]
        extra_fields["prompt_ids"] = prompt_ids
        return out

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        self.progress.phase("score")
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        weights = self.reward_weights.to(rewards.device)
        # A weight of 0 is for logging: its NaN (not applicable) must not reach the score.
        self._scores_b = torch.where(weights != 0, rewards * weights, 0.0).sum(dim=1)
        bad = (~torch.isfinite(self._scores_b)).nonzero().flatten().tolist()
        if bad:
            raise NonFiniteError(
                f"the reward of {len(bad)} episodes is not a number; the first prompt is "
                f"{str(prompts[bad[0]])[:200]!r}",
                expected="a finite number per completion",
                remedy="mend the reward function or the reward model",
            )
        return rewards

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        out = {
            k: out[k] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        }
        size = self.args.per_device_train_batch_size
        with self.backbone.role("policy"):
            out["old_logprobs"] = self._in_batches(out, size, self._logprobs)
        with self.backbone.role("reference"):
            reference_bt = self._in_batches(out, size, self._logprobs)
        with self.backbone.role("value"):
            out["old_values"] = self._in_batches(out, size, self._values)
        mask_bt = out["completion_mask"]
        if self.policy_updates == 0:
            self.identities["kl_at_start"] = guards.policy_equals_reference(
                out["old_logprobs"], reference_bt, mask_bt
            )
        scores_b = self._scores_b - self.ppo.missing_eos_penalty * (~self._ended(out)).float()
        kl = kl_estimates(out["old_logprobs"], reference_bt, mask_bt)
        rewards_bt = token_rewards(scores_b, kl.k1, mask_bt, self.ppo.kl_coef)
        advantages_bt, out["returns"] = gae(
            rewards_bt, out["old_values"], mask_bt, self.ppo.gamma, self.ppo.lam
        )
        out["advantages"] = whiten(advantages_bt, mask_bt)
        ended_b = self._ended(out)
        self._note(ppo_log.rollout(out, self._scores_b, ended_b, kl, rewards_bt))
        self._note({"kl/coef": self.ppo.kl_coef})
        self.progress.phase("update")
        return out

    def _ended(self, batch: dict[str, Tensor]) -> Tensor:
        """Which episodes end with an eos, by their last valid token. Shape (B,)."""
        last_b = (batch["completion_mask"].sum(dim=1) - 1).clamp(min=0).long().unsqueeze(1)
        eos = torch.tensor(self.eos_token_ids, device=last_b.device)
        return torch.isin(batch["completion_ids"].gather(1, last_b).squeeze(1), eos)

    def _in_batches(
        self, batch: dict[str, Tensor], size: int, function: Callable[..., Tensor]
    ) -> Tensor:
        parts = [
            function(*_inputs({k: v[i : i + size] for k, v in batch.items()}))
            for i in range(0, batch["prompt_ids"].shape[0], size)
        ]
        return torch.cat(parts)

    def _logprobs(self, ids: Tensor, mask: Tensor, tokens: int) -> Tensor:
        return heads.completion_logprobs(self.backbone, ids, mask, tokens, self.temperature)[0]

    def _values(self, ids: Tensor, mask: Tensor, tokens: int) -> Tensor:
        return heads.token_values(self.backbone, ids, mask, tokens)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor, None]:
        # TRL asks for old log-probs here when it thinks it needs them; ours are computed once,
        # above, so that they never depend on that. What it gets is thrown away: no forward.
        empty = torch.zeros(input_ids.shape[0], logits_to_keep, device=input_ids.device)
        return empty, empty, None

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """One micro-batch: a new rollout when the last is used up, a new shuffle every epoch."""
        micro = self.args.steps_per_generation
        if self._step % (micro * self.num_iterations) == 0 or not self._rollout:
            self._rollout = self._generate_and_score_completions(generation_batch)
        if self._step % micro == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._split(self._rollout)
        batch: dict[str, Any] = self._buffered_inputs[self._step % micro]
        return batch

    def _split(self, rollout: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Shuffle, cut into micro-batches, trim their padding, and count each window's tokens."""
        order = torch.randperm(rollout["prompt_ids"].shape[0])
        shuffled = {k: v[order.to(v.device)] for k, v in rollout.items()}
        batches = split_tensor_dict(shuffled, self.args.steps_per_generation)
        window = self.args.gradient_accumulation_steps
        for start in range(0, len(batches), window):
            tokens = sum(int(b["completion_mask"].sum()) for b in batches[start : start + window])
            for batch in batches[start : start + window]:
                batch["window_tokens"] = max(tokens, 1)
        return [_trim(batch) for batch in batches]

    # ------------------------------------------------------------------- update

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The policy's clipped loss over the valid tokens of the whole minibatch."""
        self._micro_batch = inputs
        if self.warming_up:
            return self._no_loss()
        ids, mask, tokens = _inputs(inputs)
        logprobs_bt, entropy_bt = heads.completion_logprobs(
            self.backbone, ids, mask, tokens, self.temperature
        )
        mask_bt = inputs["completion_mask"]
        result = policy_loss(
            logprobs_bt, inputs["old_logprobs"], inputs["advantages"], mask_bt,
            self.epsilon_low, self.epsilon_high,
        )  # fmt: skip
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            off = guards.ratio_is_one(result.ratio_bt, mask_bt, self.backbone.causal.dtype)
            self._note({"policy/ratio_start": off})
            if "ratio_at_start" not in self.identities:
                self.identities["ratio_at_start"] = off
                self._moved = guards.MovedOnly(self.backbone, inputs, self.temperature)
        self._note(ppo_log.policy(result, logprobs_bt, inputs["old_logprobs"], entropy_bt, mask_bt))
        skipped = float(masked_mean(result.ratio_bt, mask_bt)) > MAX_MEAN_RATIO
        self._note({"policy/skipped": float(skipped)})
        if skipped:
            return self._no_loss()
        return result.loss_sum / inputs["window_tokens"]

    def _no_loss(self) -> Tensor:
        """Zero without a graph to the policy: it gets no gradient and cannot move."""
        return torch.zeros((), device=self.backbone.device, requires_grad=True)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """The policy's forward and backward, then the value's, each inside its own role.

        One backward per role: with gradient checkpointing the recomputation runs under whichever
        adapter is active then, and a common backward would recompute one of them wrongly.
        """
        warming_up = self.warming_up
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        batch = self._micro_batch
        ids, mask, tokens = _inputs(batch)
        mask_bt = batch["completion_mask"]
        with self.backbone.role("value"):
            values_bt = heads.token_values(self.backbone, ids, mask, tokens)
            result = value_loss(
                values_bt, batch["old_values"], batch["returns"], mask_bt, self.ppo.clip_value
            )
            self.accelerator.backward(self.ppo.vf_coef * result.loss_sum / batch["window_tokens"])
        self._note({
            "value/loss": float(result.loss_sum.detach()) / max(int(mask_bt.sum()), 1),
            "value/clip_fraction": float(masked_mean(result.clipped_bt, mask_bt)),
        })  # fmt: skip
        if not warming_up and self.accelerator.sync_gradients:
            self.policy_updates += 1
        return loss

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """Clip policy and value apart: their norms differ by more than an order of magnitude."""
        self.backbone.assert_trainable()
        norms = {}
        for role, most in (
            ("policy", self.args.max_grad_norm),
            ("value", self.ppo.max_grad_norm_value),
        ):
            parameters = [p for _, p in self.backbone.role_parameters(role)]
            norms[role] = self.accelerator.clip_grad_norm_(parameters, most)
            if not bool(torch.isfinite(norms[role])):
                raise NonFiniteError(
                    f"optimizer step {self.state.global_step}: the gradient of the {role} is "
                    f"{float(norms[role])}",
                    expected="a finite number",
                    remedy="lower ppo.args.learning_rate; nothing of this stage was saved",
                )
            self._note({f"{role}/grad_norm": float(norms[role])})
        return norms["policy"]

    def after_optimizer_step(self) -> None:
        """Check, after the first step of the policy, that just it and the value moved."""
        assert self.optimizer is not None
        # A learning rate that warms up from 0 makes a first step that moves nothing.
        if self._moved is not None and self.optimizer.param_groups[0]["lr"] > 0:
            self.identities |= self._moved.check()
            self._moved = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One optimizer, two groups: the policy's adapter; the value's adapter and head."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [
                {
                    "params": [p for _, p in self.backbone.role_parameters(role)],
                    "lr": rate,
                    "weight_decay": self.args.weight_decay,
                }
                for role, rate in (
                    ("policy", self.args.learning_rate),
                    ("value", self.ppo.value_learning_rate or self.args.learning_rate),
                )
            ]
            self.optimizer = kind(groups, **options)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    # ------------------------------------------------------------------ logging

    def _note(self, numbers: dict[str, float]) -> None:
        """Keep numbers for the next line of the log, which averages them."""
        for name, number in numbers.items():
            self._metrics["train"][name].append(number)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's averages under our names; what GRPO logs and PPO has no use for is left out."""
        self._metrics["train"] = defaultdict(list, ppo_log.kept(self._metrics["train"]))
        logs.pop("grad_norm", None)
        super().log(logs, start_time)


class _AfterStep(TrainerCallback):
    """Tells the trainer that the optimizer has made a step."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer between the optimizer's step and the scheduler's."""
        self.trainer.after_optimizer_step()


def _inputs(batch: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Ids and mask of prompt and completion, and the number of completion columns."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return ids, mask, batch["completion_ids"].shape[1]


def _trim(batch: dict[str, Any]) -> dict[str, Any]:
    """Without the padding columns that are padding in every row."""
    skip = int((batch["prompt_mask"].sum(dim=0) > 0).int().argmax())
    keep = max(int(batch["completion_mask"].sum(dim=1).max()), 1)
    return {
        k: v
        if not isinstance(v, Tensor)
        else v[:, skip:]
        if k.startswith("prompt")
        else v[:, :keep]
        for k, v in batch.items()
    }
