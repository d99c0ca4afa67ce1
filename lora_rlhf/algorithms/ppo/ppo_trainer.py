# SPDX-License-Identifier: Apache-2.0
"""PPO on TRL's GRPOTrainer, which samples, batches and logs.

It adds the value role, a per-token KL penalty in the reward, GAE, the clipped value loss,
shuffling per epoch, separate gradient clipping, and the start-up identities. A rollout is
`steps_per_generation` micro-batches; each PPO epoch (`num_iterations`) shuffles and splits it anew;
an optimizer step takes `gradient_accumulation_steps` micro-batches and divides by their valid
tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from lora_rlhf._trl import GRPOTrainer
from lora_rlhf.algorithms import identities
from lora_rlhf.algorithms.identities import FrozenRolesCheck
from lora_rlhf.algorithms.objectives import (
    RunningMoments,
    gae,
    importance_weights,
    kl_estimates,
    masked_mean,
    masked_sum,
    policy_loss,
    scaled_scores,
    token_rewards,
    value_loss,
    whiten,
)
from lora_rlhf.algorithms.policy_trainer import RolloutTrainer
from lora_rlhf.algorithms.rollout import Scorer
from lora_rlhf.models import scoring
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import PpoSection
from lora_rlhf.runs.progress import Progress
from lora_rlhf.training.trl_config import PPOConfig

from . import minibatches, ppo_metrics, ptx
from .minibatches import model_inputs, trunk_states
from .ppo_controller import PPOController
from .prompt_order import PromptOrder
from .ptx import TextMix

MAX_MEAN_RATIO = 10.0
"""Mean ratio above which a micro-batch (or piece) is left out of the update."""

FLOAT16_SCALE = 1024.0
"""Factor of losses in float16, where a gradient below 6e-8 is 0.

A loss divided by thousands of tokens gives such gradients: at 4,096 tokens their cosine to
float32's was 0.998, at 32,768 it was 0.956, and 1.000 with this factor (test_ppo_trainer.py).
"""


class PPOTrainer(RolloutTrainer, GRPOTrainer):
    """PPO for the roles of one backbone; use it inside `backbone.training("policy", "value")`.

    Args:
        args: TRL's arguments; `epsilon` is the policy's clip range, and `temperature` applies to
            sampling and log-probs.
        reward_funcs: Called with `prompt_ids` in addition to TRL's arguments; a function whose
            weight in `args.reward_weights` is 0 is only logged.
        text: Batches of text for PPO-ptx, if `ppo.ptx_coef` is above 0.
    """

    _tag_names = ["lora-rlhf", "ppo"]
    _name = "PPO"
    entries = {
        **RolloutTrainer.entries, "_rollout": "_rollout", "policy_updates": "policy_updates",
        "scorer": "scorer", "steering": "controller", "text": "text", "_moments": "_moments",
        "_moved": "frozen_check",
    }  # fmt: skip
    by_token = frozenset(
        name for name in ppo_metrics.METRICS if name.startswith(("policy/", "value/"))
    ) - {"policy/skipped"}
    lr_scheduler: Any
    _buffered_inputs: list[dict[str, Any]] | None

    def __init__(
        self,
        backbone: Backbone,
        *,
        args: PPOConfig,
        ppo: PpoSection,
        progress: Progress,
        text: TextMix | None = None,
        **options: Any,
    ) -> None:
        self.ppo, self.progress, self.text = ppo, progress, text
        self.policy_updates = 0
        self._rollout: dict[str, Tensor] = {}
        self._scores_b = torch.empty(0)
        self._policy_states: tuple[Any, Tensor] | None = None
        self._order: PromptOrder | None = None
        # Gradients are divided by it before clipping.
        self._scale = FLOAT16_SCALE if backbone.causal.dtype == torch.float16 else 1.0
        self._moments = RunningMoments() if ppo.normalize_reward else None
        super().__init__(backbone, args=args, **options)
        size = args.per_device_train_batch_size
        self.scorer = Scorer(backbone, ppo, self.temperature, size, self.identities, progress.say)
        self.controller = PPOController(backbone, ppo, progress, args.generation_batch_size)
        self.add_callback(self.controller)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        check = send_to_device(state.pop("_moved"), self.args.device)
        super().load_state_dict(state)
        self.scorer.identities = self.identities
        if check is not None:
            self.frozen_check = FrozenRolesCheck(self.backbone, "ppo", **check)

    def after_training(self) -> None:
        """Load the selected policy."""
        self.controller.finish()

    @property
    def update(self) -> int:
        """Index of the current rollout, from 0."""
        return self._step // (self.args.steps_per_generation * self.num_iterations)

    @property
    def warming_up(self) -> bool:
        """True while only the value learns."""
        return self.update < self.ppo.value_warmup_updates

    def _generate(self, prompts: list[Any]) -> Any:
        self.progress.phase("rollout")
        out = super()._generate(prompts)
        prompt_ids, completion_ids, extra_fields = out[0], out[1], out[5]
        states = self.scorer.begin(list(zip(prompt_ids, completion_ids, strict=True)))
        # TRL passes extra fields to the reward functions, which score the sampled ids: decoding
        # and encoding again may change them.
        extra_fields["prompt_ids"] = prompt_ids
        if states is not None:
            extra_fields["trunk_states"] = states
        return out

    def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **options: Any) -> Any:
        if not self.samples_itself:
            return super()._generate_single_turn(prompt_ids, *rest, **options)
        completions = self.scorer.sample(prompt_ids, self.max_completion_length)
        if self._order is not None and self.update + 1 < self.ppo.updates:
            rows = [self.train_dataset[i]["prompt"] for i in self._order.following(self.update)]
            self.scorer.sample_ahead(self._tokenize_prompts(rows)[0], self.max_completion_length)
        return completions, None

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        if self.ppo.max_staleness and self.scorer.server is not None:
            sampler = self._order = PromptOrder(sampler)
        return sampler

    def train(self, *args: Any, **options: Any) -> Any:
        """Train as Trainer does; nothing is sampled any more when it ends, however it ends."""
        try:
            return super().train(*args, **options)
        finally:
            self.scorer.close()

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        self.progress.phase("score")
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scores_b = self.checked_rewards(rewards, prompts).sum(dim=1)
        return rewards

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        out = {
            k: out[k] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        }
        mask_bt = out["completion_mask"]
        last_b = (mask_bt.sum(dim=1) - 1).clamp(min=0).long().unsqueeze(1)
        eos = torch.tensor(self.eos_token_ids, device=last_b.device)
        ended_b = torch.isin(out["completion_ids"].gather(1, last_b).squeeze(1), eos)
        # Until the policy is updated, its log-probs must equal the reference's bit for bit.
        reference_bt = self.scorer.score(out, exact=self.policy_updates == 0)
        finite = self.check_finite("log-probs", out["old_logprobs"], reference_bt, rollout=True)
        finite = self.check_finite("values", out["old_values"], rollout=True) and finite
        if finite and self.policy_updates == 0 and not self.warm_started:
            self.identities["kl_at_start"] = identities.policy_equals_reference(
                out["old_logprobs"], reference_bt, mask_bt
            )
        scores_b = scaled_scores(self._scores_b, self._moments, self.ppo.clip_reward)
        scores_b = scores_b - self.ppo.missing_eos_penalty * (~ended_b).float()
        kl = kl_estimates(out["old_logprobs"], reference_bt, mask_bt)
        rewards_bt = token_rewards(scores_b, kl.k1, mask_bt, self.controller.kl_coef)
        advantages_bt, out["returns"] = gae(
            rewards_bt, out["old_values"], mask_bt, self.ppo.gamma, self.ppo.lam
        )
        out["advantages"] = whiten(advantages_bt, mask_bt)
        self.note(ppo_metrics.rollout(out, self._scores_b, ended_b, kl, rewards_bt))
        self.note({"kl/coef": self.controller.kl_coef})
        if self.scorer.server is not None:
            self.note({"policy/server_difference": self.scorer.server_difference})
        if "sampled_logprobs" in out:
            self._weigh(out)
        if self._moments is not None:
            self.note({"reward/scale": self._moments.std})
        self.controller.before_update(self.update)
        self.progress.phase("update")
        return out

    def _weigh(self, out: dict[str, Any]) -> None:
        """Add the tokens' importance weights, (N, T), to a rollout that the server sampled."""
        mask_bt, drawn_bt = out["completion_mask"], out.pop("sampled_logprobs")
        most = self.args.vllm_importance_sampling_clip_max
        weights_bt, out["weights"] = importance_weights(
            out["old_logprobs"], drawn_bt, mask_bt, most
        )
        self.note({"policy/staleness": float(self.scorer.staleness)})
        self.note(ppo_metrics.importance(weights_bt, out["weights"], mask_bt))

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, mask: Tensor, tokens: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, None]:
        # TRL calls this for its own loss, which PPO replaces: the result is not used.
        empty = torch.zeros(len(input_ids), tokens, device=input_ids.device)
        return empty, empty, None

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """Return the next micro-batch; make a new rollout when the last one is used up."""
        micro, window = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        if self._step % (micro * self.num_iterations) == 0 or not self._rollout:
            # Trunk states are large: free the last rollout before the next is made.
            self._rollout, self._buffered_inputs = {}, None
            self._rollout = self._generate_and_score_completions(generation_batch)
        if self._step % micro == 0 or self._buffered_inputs is None:
            self._buffered_inputs = minibatches.split(self._rollout, micro, window)
            if self.text is not None:
                minibatches.add_text(self._buffered_inputs, self.text, window, self.backbone)
        batch: dict[str, Any] = self._buffered_inputs[self._step % micro]
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Compute the policy's clipped loss over the valid tokens of the whole minibatch."""
        self._policy_states = None
        if self.warming_up:
            return self._zero_loss()
        ids, mask, tokens = model_inputs(inputs)
        kept_blh = trunk_states(inputs, ids.device)
        states_bth = scoring.completion_states(self.backbone, ids, mask, tokens, kept_blh)
        self._policy_states = inputs, states_bth.detach()
        logprobs_bt, entropy_bt = scoring.logprobs_of(
            self.backbone, states_bth, ids, self.temperature, self.ppo.entropy_coef > 0
        )
        mask_bt, old_bt = inputs["completion_mask"], inputs["old_logprobs"]
        clip = self.epsilon_low, self.epsilon_high
        advantages_bt, weights_bt = inputs["advantages"], inputs.get("weights")
        result = policy_loss(logprobs_bt, old_bt, advantages_bt, mask_bt, *clip, weights_bt)
        per_rollout = self.args.steps_per_generation * self.num_iterations
        if self.check_finite("log-probs", logprobs_bt) and self._step % per_rollout == 0:
            dtype, first = self.backbone.causal.dtype, "ratio_at_start" not in self.identities
            # In half precision later ratios are only logged: rounding must not stop a run.
            enforce = first or dtype == torch.float32
            off = identities.ratio_is_one(result.ratio_bt, mask_bt, dtype, enforce=enforce)
            self.note({"policy/ratio_start": off})
            if first:
                # Before `ratio_at_start`: if this runs out of memory, the step is repeated.
                self.frozen_check = FrozenRolesCheck.take(
                    self.backbone, "ppo", ("policy", "value"), inputs, self.temperature
                )
                self.identities["ratio_at_start"] = off
        self.note(ppo_metrics.policy(result, logprobs_bt, old_bt, entropy_bt, mask_bt))
        skipped = float(masked_mean(result.ratio_bt, mask_bt)) > MAX_MEAN_RATIO
        self.note({"policy/skipped": float(skipped)})
        if skipped:
            return self._zero_loss()
        loss_sum = result.loss_sum
        if self.ppo.entropy_coef:
            loss_sum = loss_sum - self.ppo.entropy_coef * masked_sum(entropy_bt, mask_bt)
        return self._scale * loss_sum / inputs["window_tokens"]

    def part(self, inputs: Any, start: int, stop: int) -> Any:
        """Select some episodes, without padding that only others needed."""
        return minibatches.trim(super().part(inputs, start, stop))

    def metric_weight(self, name: str, piece: Any) -> float:
        """Count tokens, of text for PPO-ptx."""
        tokens = isinstance(piece, ptx.TextBatch)
        return piece.tokens if tokens else super().metric_weight(name, piece)

    def loss_parameters(self) -> list[torch.nn.Parameter]:
        """Return the policy's parameters: the value has its own loss."""
        return [p for _, p in self.backbone.role_parameters("policy")]

    def _zero_loss(self) -> Tensor:
        """Return 0 without a graph to the policy, which then has no gradient and cannot move."""
        return torch.zeros((), device=self.backbone.device, requires_grad=True)

    def add_gradient(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """Run forward and backward of the policy, then of the value, each inside its own role.

        With gradient checkpointing the backward recomputes under the active adapter, so a common
        backward would recompute one of the two wrongly.
        """
        warming_up = self.warming_up
        loss: Tensor = super().add_gradient(model, inputs, num_items_in_batch)
        batch = self.micro_batch
        if "text" in batch and not warming_up:
            text, tokens = batch["text"], batch["window_text_tokens"]
            step = functools.partial(self._ptx, window_tokens=tokens)
            self.in_pieces(text, len(text.ids), text.part, step, self.loss_parameters())
        self.in_pieces(
            batch,
            self.rows(batch),
            functools.partial(self.part, batch),
            self._value_step,
            [p for _, p in self.backbone.role_parameters("value")],
        )
        if not warming_up and self.accelerator.sync_gradients:
            self.policy_updates += 1
        return loss / self._scale

    def _ptx(self, text: ptx.TextBatch, window_tokens: int) -> None:
        """Run forward and backward of the language-model loss."""
        with self.backbone.role("policy"):
            loss_sum = ptx.loss_sum(self.backbone, text)
            self.accelerator.backward(self._scale * self.ppo.ptx_coef * loss_sum / window_tokens)
        self.note({"policy/ptx_loss": float(loss_sum.detach()) / text.tokens})

    def _value_step(self, batch: dict[str, Any]) -> None:
        """Run forward and backward of the value."""
        mask_bt = batch["completion_mask"]
        with self.backbone.role("policy" if self.ppo.value == "head" else "value"):
            old_bt, returns_bt = batch["old_values"], batch["returns"]
            values_bt = self._values(batch)
            result = value_loss(values_bt, old_bt, returns_bt, mask_bt, self.ppo.clip_value)
            loss_value = self.ppo.vf_coef * result.loss_sum / batch["window_tokens"]
            self.accelerator.backward(self._scale * loss_value)
        self.note(
            {
                "value/loss": float(result.loss_sum.detach()) / max(int(mask_bt.sum()), 1),
                "value/clip_fraction": float(masked_mean(result.clipped_bt, mask_bt)),
            }
        )

    def _values(self, batch: dict[str, Any]) -> Tensor:
        """Compute values (B, T); with a value head, no gradient reaches the policy's states."""
        ids, mask, tokens = model_inputs(batch)
        kept_blh = trunk_states(batch, ids.device)
        if self.ppo.value == "adapter":
            return scoring.token_values(self.backbone, ids, mask, tokens, trunk_states=kept_blh)
        if self._policy_states is not None and self._policy_states[0] is batch:
            return scoring.values_of(self.backbone, self._policy_states[1])
        with torch.no_grad():  # during value warm-up the policy had no forward
            states_bth = scoring.completion_states(self.backbone, ids, mask, tokens, kept_blh)
        return scoring.values_of(self.backbone, states_bth)

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """Clip policy and value separately: their norms differ by orders of magnitude."""
        self.backbone.assert_trainable()
        norms = {}
        limits = {"policy": self.args.max_grad_norm, "value": self.ppo.max_grad_norm_value}
        for role, most in limits.items():
            parameters = [p for _, p in self.backbone.role_parameters(role)]
            for gradient in (p.grad for p in parameters if p.grad is not None):
                gradient.div_(self._scale)
            norms[role] = self.accelerator.clip_grad_norm_(parameters, most)
            norm = self.checked_norm("ppo", float(norms[role]), role)
            self.note({f"{role}/grad_norm": norm})
        return norms["policy"]

    def after_optimizer_step(self) -> None:
        """Update the policy's moving average before the check of the first update."""
        if self.policy_updates:
            self.controller.after_policy_step()
        super().after_optimizer_step()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create one optimizer with a group per role, each with its learning rate."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            shared, decay = self.args.learning_rate, self.args.weight_decay
            rates = {"policy": shared, "value": self.ppo.value_learning_rate or shared}
            groups = [
                {
                    "params": [p for _, p in self.backbone.role_parameters(role)],
                    "lr": rate,
                    "weight_decay": decay,
                }
                for role, rate in rates.items()
            ]
            self.optimizer = kind(groups, **options)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create TRL's schedule, but warm up to a constant from a tenth (2203.02155, C.4)."""
        warmup = self.args.get_warmup_steps(num_training_steps)
        if self.args.lr_scheduler_type != "constant_with_warmup" or not warmup:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.create_optimizer(),
                lambda step: min(1.0, 0.1 + 0.9 * step / warmup),
            )
        return self.lr_scheduler

    def renamed(self, metrics: dict[str, list[float]]) -> dict[str, list[float]]:
        """Keep PPO's metrics and drop GRPO's."""
        return ppo_metrics.kept(metrics)
