# SPDX-License-Identifier: Apache-2.0
"""KL controller, early stopping and policy selection, run after each update of PPO.

Sources: adaptive KL: 1909.08593; moving average of the policy, here of the adapter only:
InstructGPT (2203.02155, C.4); early stopping by KL and by a held-out reward model: 2210.10760.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_rlhf.algorithms.objectives import adapted_kl_coef
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import PpoSection
from lora_rlhf.reports import alarms
from lora_rlhf.runs.progress import Progress

_STATE = ("kl_coef", "entry", "lines", "_before", "_kept", "_best_reward", "_average")

_SMOOTHED = 3
"""Rollouts over which the held-out reward is averaged to compare policies."""


class PPOController(TrainerCallback):
    """Sets the KL coefficient, acts on alarms, stops training, and selects the final policy.

    Attributes:
        entry: For the record: why training stopped, which update's policy was kept, the alarms.
    """

    def __init__(
        self, backbone: Backbone, section: PpoSection, progress: Progress, episodes_per_update: int
    ) -> None:
        self.backbone, self.section, self.progress = backbone, section, progress
        self.episodes_per_update = episodes_per_update
        self.kl_coef = section.kl_coef
        self.entry: dict[str, Any] = {}
        self.lines: list[dict[str, float]] = []
        self._before: tuple[int, list[Tensor]] | None = None
        self._kept: tuple[int, list[Tensor]] | None = None
        self._best_reward = float("-inf")
        self._warned: set[str] = set()
        self._average: list[Tensor] | None = None
        if section.ema is not None:
            self._average = self._policy()

    def before_update(self, update: int) -> None:
        """Copy the policy before it is updated: its rollout is what the log line measures."""
        if self.section.kl_budget is not None or self.section.watch == "best":
            self._before = (update, self._policy())

    @torch.no_grad()
    def after_policy_step(self) -> None:
        """Update the moving average of the policy."""
        if self._average is not None and self.section.ema is not None:
            for mean, now in zip(self._average, self._parameters(), strict=True):
                mean.lerp_(now.detach(), 1 - self.section.ema)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Adapt the KL coefficient and stop training, by the log line of an update."""
        line = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if "kl/sequence" not in line:
            return
        self.lines.append(line)
        kl, target = line["kl/sequence"], self.section.kl_target
        if target is not None and math.isfinite(kl):
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, kl, target, self.section.kl_horizon, self.episodes_per_update
            )
        if self._over_budget(kl) or self._act_on_alarms():
            control.should_training_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return coefficient, log, and the policies that may be selected."""
        return {name: getattr(self, name) for name in _STATE} | {"_warned": sorted(self._warned)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name in _STATE:
            setattr(self, name, state[name])
        self._warned = set(state["_warned"])

    def finish(self) -> None:
        """Load the selected policy after training."""
        weights = self._average
        if self._kept is not None and ("stopped" in self.entry or self.section.watch == "best"):
            update, weights = self._kept
            self.entry["policy_of_update"] = update
        if weights is not None:
            with torch.no_grad():
                for parameter, value in zip(self._parameters(), weights, strict=True):
                    parameter.copy_(value)
        if self._average is not None:
            self.entry["ema"] = self.section.ema

    def _over_budget(self, kl: float) -> bool:
        budget = self.section.kl_budget
        if budget is None or not math.isfinite(kl):
            return False
        if kl <= budget:
            if self.section.watch != "best":
                self._kept = self._before
            return False
        update = len(self.lines) - 1
        self.entry["stopped"] = f"KL {kl:.3g} above the budget of {budget:g} at update {update}"
        self.progress.say(f"ppo: stopped, {self.entry['stopped']}; an earlier policy is kept")
        return True

    def _act_on_alarms(self) -> bool:
        """Report new alarms and act on them by `ppo.watch`; returns True to stop."""
        action = self.section.watch
        if action == "off":
            return False
        if action == "best":
            self._keep_best()
        new = [s for s in alarms.signs(self.lines) if s.name not in self._warned]
        for sign in new:
            self._warned.add(sign.name)
            line = {"update": len(self.lines) - 1, "sign": sign.name, "message": sign.message}
            self.entry.setdefault("signs", []).append(line)
            self.progress.say(f"watch: {sign.message}")
        serious = [s for s in new if s.serious]
        if not serious or action == "warn":
            return False
        if action == "raise_kl":
            self.kl_coef = max(2 * self.kl_coef, 0.01)
            self.progress.say(f"watch: kl_coef is now {self.kl_coef:.3g}")
            self._warned -= {s.name for s in serious}  # reported again if it continues
            return False
        self.entry["stopped"] = f"{serious[0].name} at update {len(self.lines) - 1}"
        return True

    def _keep_best(self) -> None:
        lines = self.lines[-_SMOOTHED:]
        rewards = [x for line in lines if (x := line.get("rewards/held_out")) is not None]
        if rewards and fmean(rewards) > self._best_reward:
            self._best_reward, self._kept = fmean(rewards), self._before

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for _, p in self.backbone.role_parameters("policy")]

    def _policy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._parameters()]
