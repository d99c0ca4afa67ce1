# SPDX-License-Identifier: Apache-2.0
"""A rollout's episodes and what the roles say of them; nothing that is known is computed again.

While it samples, the policy has already computed the log-prob of every token and the states that
leave the frozen trunk. Both are used where a comparison with the training forward, on the first
rollout, finds no difference that matters; elsewhere (half precision) the training forward computes
them, once. Each role then runs its adapted layers over the episodes, sorted by length.

N episodes, P and T tokens of the longest prompt and completion, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_rlhf.models import sampler, scoring, trunk
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.models.sampler import Sampled
from lora_rlhf.models.scoring import Episode
from lora_rlhf.recipe.schema import PpoSection
from lora_rlhf.runtime import oom

from . import identities

PARITY = 1e-4
"""Largest difference in nats, at any token, up to which the sampler's numbers are the trainer's."""

_COMPARED = 16
"""Episodes of the first rollout on which they are compared."""

MORE = 2
"""Scoring keeps no activations, so this many training micro-batches go at once."""


@dataclass
class Scorer:
    """Samples and scores rollouts for one PPO run.

    Attributes:
        size: Episodes of a training micro-batch.
        identities: Where what was compared is noted.
        say: Tells the user what was switched off, and why.
        trunk: Whether passes start from kept trunk states; settled on the first rollout.
        trusted: Whether the sampler's log-probs and states are used; settled there too.
    """

    backbone: Backbone
    ppo: PpoSection
    temperature: float
    size: int
    identities: dict[str, float]
    say: Callable[[str], None]
    trunk: bool | None = None
    trusted: bool | None = None
    episodes: list[Episode] = field(default_factory=list)
    states: list[Tensor] | None = None
    _sampled: list[Sampled] | None = None

    def __post_init__(self) -> None:
        if trunk.depth(self.backbone) == 0 or self.ppo.trunk_states == "off":
            self.trunk = False

    def state_dict(self) -> dict[str, bool | None]:
        """What was settled on the first rollout, for a checkpoint."""
        return {"trunk": self.trunk, "trusted": self.trusted}

    def load_state_dict(self, found: dict[str, bool | None]) -> None:
        """Put back what `state_dict` gave."""
        self.trunk, self.trusted = found["trunk"], found["trusted"]

    def sample(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Completions of the active role, and their log-probs and states kept for `begin`."""
        self._sampled = sampler.sample(
            self.backbone,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            keep_states=self.trunk is not False and self.trusted is not False,
        )
        return [sampled.ids for sampled in self._sampled]

    def begin(self, episodes: list[Episode]) -> list[Tensor] | None:
        """Take up a rollout: settle what may be reused, and find the trunk states of each episode.

        Returns:
            (L, H) of each episode, for the reward functions; None without a trunk.

        Raises:
            IdentityError: The sampler is not the policy that is trained.
        """
        self.episodes, self.states = episodes, None
        if self.trunk is None:
            self._settle_trunk()
        if self.trusted is None and self._sampled is not None:
            self._settle_sampler(self._sampled)
        if self.trunk:
            found = [s.states for s in self._sampled or () if s.states is not None]
            use = self.trusted and len(found) == len(episodes)
            self.states = found if use else self._trunk_pass()
            if self.ppo.trunk_states == "cpu":
                self.states = [states.cpu() for states in self.states]
        return self.states

    def score(self, out: dict[str, Any], *, exact: bool) -> Tensor:
        """Add old log-probs, old values and trunk states to a rollout.

        Args:
            out: Padded ids and masks; what is added is `old_logprobs` and `old_values` (N, T),
                `prompt_states` (N, P, H) and `completion_states` (N, T, H).
            exact: Compute the policy's log-probs as the reference's are, whatever is known of them.

        Returns:
            The reference's log-probs, (N, T).
        """
        size, mask_nt = MORE * self.size, out["completion_mask"]
        known = self._sampled if self.trusted and not exact else None
        values: list[Tensor] = []
        if self.ppo.value == "head":
            logprobs, values = self._policy_and_values(size)
        elif known is not None:
            logprobs = [s.logprobs for s in known]
        else:
            logprobs = scoring.episode_logprobs(
                self.backbone, self.episodes, "policy", size, self.temperature, self.states
            )
        reference = scoring.episode_logprobs(
            self.backbone, self.episodes, "reference", size, self.temperature, self.states
        )
        if not values:
            values = scoring.episode_values(self.backbone, self.episodes, size, self.states)
        out["old_logprobs"], out["old_values"] = _pad(logprobs, mask_nt), _pad(values, mask_nt)
        if self.states is not None:
            out |= self._padded_states(out)
        self._sampled = self.states = None  # the rollout has them now
        return _pad(reference, mask_nt)

    @torch.no_grad()
    def _policy_and_values(self, size: int) -> tuple[list[Tensor], list[Tensor]]:
        """Where the value is a head on the policy's states: both from one pass."""
        logprobs, values = ([torch.empty(0)] * len(self.episodes) for _ in range(2))

        def visit(batch: scoring.Batch) -> None:
            states = scoring.completion_states(self.backbone, *batch.inputs, batch.states)
            found, _ = scoring.logprobs_of(self.backbone, states, batch.ids, self.temperature)
            batch.scatter(found, self.episodes, logprobs)
            batch.scatter(scoring.values_of(self.backbone, states), self.episodes, values)

        with self.backbone.role("policy"):
            scoring.for_each_batch(self.backbone, self.episodes, size, self.states, visit)
        return logprobs, values

    def _trunk_pass(self) -> list[Tensor]:
        """The trunk's states of every episode, (L, H) each, in one pass over its layers."""
        out: list[Tensor] = [torch.empty(0)] * len(self.episodes)

        def visit(batch: scoring.Batch) -> None:
            for row, i in zip(self._trunk(batch), batch.index, strict=True):
                out[i] = row[len(row) - sum(map(len, self.episodes[i])) :].clone()

        scoring.for_each_batch(self.backbone, self.episodes, MORE * self.size, None, visit)
        return out

    def _trunk(self, batch: scoring.Batch) -> Tensor:
        return scoring.trunk_states(self.backbone, batch.ids, batch.mask)

    def _padded_states(self, out: dict[str, Any]) -> dict[str, Tensor]:
        """As the rollout's ids are padded: prompts on the left, completions on the right."""
        assert self.states is not None
        like = self.states[0]
        (n, p), t = out["prompt_ids"].shape, out["completion_ids"].shape[1]
        prompts, completions = (like.new_zeros((n, w, like.shape[1])) for w in (p, t))
        for i, ((prompt, completion), states) in enumerate(
            zip(self.episodes, self.states, strict=True)
        ):
            prompts[i, p - len(prompt) :] = states[: len(prompt)]
            completions[i, : len(completion)] = states[len(prompt) :]
        return {"prompt_states": prompts, "completion_states": completions}

    # -------------------------------------------------------------- settling

    @torch.no_grad()
    def _settle_trunk(self) -> None:
        """Keep states only if passes that start from them give the very bits of whole ones."""
        first = scoring.by_length(self.episodes)[: self.size]
        self.backbone.backoff.for_each_batch("scoring", first, len(first), self._settle_trunk_on)

    def _settle_trunk_on(self, index: Sequence[int]) -> None:
        if self.trunk is False:
            return
        batch = scoring.batch(self.backbone, self.episodes, index)
        whole = scoring.hidden_states(self.backbone, batch.ids, batch.mask)
        try:
            part = scoring.hidden_states(self.backbone, batch.ids, batch.mask, self._trunk(batch))
        except Exception as error:  # whatever an unknown architecture makes of it
            if oom.is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {error}"
        else:
            valid = batch.mask.bool()
            if torch.equal(whole[valid], part[valid]):
                self.trunk = True
                return
            reason = f"outputs differ by {float((whole[valid] - part[valid]).abs().max()):.2g}"
        self.trunk = False
        name = type(self.backbone.causal).__name__
        self.say(f"ppo: {name} cannot start from kept trunk states ({reason}): every pass is whole")

    def _settle_sampler(self, sampled: list[Sampled]) -> None:
        """Compare the sampler's log-probs and states with the training forward's."""
        rows = range(min(_COMPARED, len(sampled)))
        episodes = [self.episodes[i] for i in rows]
        asked = (self.backbone, episodes, "policy", self.size, self.temperature)
        whole = torch.cat(scoring.episode_logprobs(*asked)).cpu()
        drawn = torch.cat([sampled[i].logprobs[-len(self.episodes[i][1]) :] for i in rows])
        if len(drawn) != len(whole):  # an empty prompt: nothing predicts its first token
            self.trusted = False
            return
        gap = (drawn - whole).abs()
        self.identities["sampler_difference"] = identities.sampler_is_the_policy(
            gap, self.backbone.causal.dtype
        )
        worst = float(gap.max())
        states = [s.states for s in sampled[: len(rows)]]
        if self.trunk and states[0] is not None:
            caught = torch.cat(scoring.episode_logprobs(*asked, states)).cpu()  # type: ignore[arg-type]
            worst = max(worst, float((caught - whole).abs().max()))
        self.trusted = worst <= PARITY
        if not self.trusted:
            self.say(
                f"ppo: the sampler's numbers differ from the trainer's by up to {worst:.2g} nats "
                f"(more than {PARITY:g}): log-probs and trunk states are computed once more"
            )


def _pad(rows: list[Tensor], mask_nt: Tensor) -> Tensor:
    """(N, T) from rows that end where each mask ends; 0 elsewhere."""
    out = torch.zeros(mask_nt.shape, dtype=torch.float32, device=mask_nt.device)
    for i, (row, end) in enumerate(zip(rows, mask_nt.sum(dim=1).tolist(), strict=True)):
        out[i, end - len(row) : end] = row
    return out
