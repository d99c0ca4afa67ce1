# SPDX-License-Identifier: Apache-2.0
"""Sample and score a rollout, reusing log-probs and trunk states from generation.

Sampling computes the log-prob of every token and the output states of the frozen trunk. Both are
reused if they agree with the training forward on the first rollout; if not (half precision), the
training forward computes them once. Each role then runs its adapted layers over the episodes,
sorted by length.

N episodes, P and T tokens of the longest prompt and completion, H hidden size.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_rlhf.distributed.world import world
from lora_rlhf.models import sampler, scoring, trunk
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.models.sampler import Sampled
from lora_rlhf.models.scoring import Episode
from lora_rlhf.recipe.schema import PpoSection
from lora_rlhf.runtime import oom

from . import identities
from .vllm_rollouts import Ahead, RolloutServer

PARITY = 1e-4
"""Largest difference in nats, at any token, up to which the sampler's numbers are reused."""

_COMPARED = 16
"""Episodes of the first rollout that are compared."""

SCORING_FACTOR = 2
"""Size of a scoring batch in training micro-batches; scoring keeps no activations."""


@dataclass
class Scorer:
    """Sampler and scorer of one PPO run's rollouts.

    Attributes:
        size: Episodes of a training micro-batch.
        identities: Receives the measured difference.
        say: Reports to the user why something is not reused.
        trunk: Whether passes start from kept trunk states; decided on the first rollout.
        trusted: Whether the sampler's log-probs and states are reused; decided there too.
        server: Samples instead of this process, if there is one; its log-probs are never reused.
        server_difference: Of the last rollout: the largest |server's log-prob - trainer's|, in half
            precision the mean.
        staleness: Updates by which the policy that sampled the last rollout was behind.
    """

    backbone: Backbone
    ppo: PpoSection
    temperature: float
    size: int
    identities: dict[str, float]
    say: Callable[[str], None]
    trunk: bool | None = None
    trusted: bool | None = None
    server: RolloutServer | None = None
    server_difference: float = 0.0
    staleness: int = 0
    ahead: Ahead | None = None
    episodes: list[Episode] = field(default_factory=list)
    states: list[Tensor] | None = None
    _sampled: list[Sampled] | None = None
    _earlier: dict[str, Tensor] | None = None  # the policy that sampled ahead

    def __post_init__(self) -> None:
        if trunk.depth(self.backbone) == 0 or self.ppo.trunk_states == "off":
            self.trunk = False
        if self.ppo.rollout_server:
            self.server, self.trusted = RolloutServer(self.ppo.rollout_server), False

    def state_dict(self) -> dict[str, Any]:
        """Return the decisions of the first rollout, and completions that were sampled ahead."""
        trusted = None if self.server is not None else self.trusted  # of our sampler
        ahead = {} if self.ahead is None else {"ahead": self.ahead.state_dict()}
        return {"trunk": self.trunk, "trusted": trusted, **ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.trunk = state["trunk"]
        self.ahead = Ahead.restored(state["ahead"]) if state.get("ahead") else None
        # A continued run may have a server now, or none any more.
        self.trusted = False if self.server is not None else state["trusted"]

    def sample(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Sample completions of the active role; keeps log-probs and states for `begin`."""
        if self.server is not None:
            self._sampled = self._sample_there(self.server, prompts, max_new_tokens)
            return [sampled.ids for sampled in self._sampled]
        self._sampled = sampler.sample(
            self.backbone,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            keep_states=self.trunk is not False and self.trusted is not False,
        )
        return [sampled.ids for sampled in self._sampled]

    def _sample_there(
        self, server: RolloutServer, prompts: list[list[int]], max_new_tokens: int
    ) -> list[Sampled]:
        """Take the completions that were sampled ahead, or have the newest policy sample."""
        ahead, self.ahead, self._earlier = self.ahead, None, None
        rows, self.staleness = None, 0
        if ahead is not None and ahead.prompts == prompts:
            rows, self._earlier, self.staleness = ahead.rows(), ahead.policy, 1
        if world().first:
            server.send(self.backbone)
        if rows is None:
            if ahead is not None:
                ahead.stop()
            rows = server.sample(
                self.backbone,
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=self.temperature,
            )
        return rows

    def sample_ahead(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        """Let the server sample the next rollout's completions by the policy that it has now."""
        assert self.server is not None
        stopped = threading.Event()
        ask = self.server.request(
            self.backbone,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            stopped=stopped,
        )
        policy = {n: p.detach().clone() for n, p in self.backbone.role_parameters("policy")}
        self.ahead = Ahead(prompts, ask, policy, stopped)

    def close(self) -> None:
        """End requests whose completions nobody will use."""
        if self.ahead is not None:
            self.ahead.stop()
        self.ahead = None

    def begin(self, episodes: list[Episode]) -> list[Tensor] | None:
        """Decide what is reused; return each episode's trunk states (L, H), if there is a trunk.

        States of episodes of other processes are empty.

        Raises:
            IdentityError: The sampler's log-probs are not those of the trained policy.
        """
        self.episodes, self.states = episodes, None
        if self.trunk is None:
            self._compare_trunk()
        if self.trusted is None and self._sampled is not None:
            self._compare_sampler(self._sampled)
        if self.trunk:
            kept = {i: s.states for i, s in enumerate(self._sampled or ()) if s.states is not None}
            if self.trusted and len(kept) == len(world().own(len(episodes))):
                self.states = [kept.get(i, torch.empty(0)) for i in range(len(episodes))]
            else:
                self.states = self._trunk_pass()
            if self.ppo.trunk_states == "cpu":
                self.states = [states.cpu() for states in self.states]
        return self.states

    def score(self, out: dict[str, Any], *, exact: bool) -> Tensor:
        """Add old log-probs, old values and trunk states to a rollout.

        Args:
            out: Padded ids and masks; `old_logprobs` and `old_values` (N, T), `prompt_states`
                (N, P, H) and `completion_states` (N, T, H) are added, with `ppo.max_staleness`
                `sampled_logprobs` (N, T) too.
            exact: Compute the policy's log-probs with the reference's code path, reusing none.

        Returns:
            The reference's log-probs, (N, T).
        """
        size, mask_nt = SCORING_FACTOR * self.size, out["completion_mask"]
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
        if self.server is not None and self._sampled is not None:
            self._check_server(self._sampled, logprobs)
        reference = scoring.episode_logprobs(
            self.backbone, self.episodes, "reference", size, self.temperature, self.states
        )
        if not values:
            values = scoring.episode_values(self.backbone, self.episodes, size, self.states)
        out["old_logprobs"], out["old_values"] = _pad(logprobs, mask_nt), _pad(values, mask_nt)
        if self.ppo.max_staleness and self._sampled is not None:
            drawn = [
                s.logprobs[-len(row) :] for s, row in zip(self._sampled, logprobs, strict=True)
            ]
            out["sampled_logprobs"] = _pad(drawn, mask_nt)
        if self.states is not None and world().size == 1:
            out |= self._padded_states(out)
        self._sampled = self._earlier = self.states = None  # `out` holds them now
        return _pad(reference, mask_nt)

    @torch.no_grad()
    def _policy_and_values(self, size: int) -> tuple[list[Tensor], list[Tensor]]:
        """Compute both in one pass: the value is a head on the policy's states."""
        logprobs, values = ([torch.empty(0)] * len(self.episodes) for _ in range(2))

        def visit(batch: scoring.Batch) -> None:
            states = scoring.completion_states(self.backbone, *batch.inputs, batch.states)
            logprobs_bt, _ = scoring.logprobs_of(self.backbone, states, batch.ids, self.temperature)
            batch.scatter(logprobs_bt, self.episodes, logprobs)
            batch.scatter(scoring.values_of(self.backbone, states), self.episodes, values)

        with self.backbone.role("policy"):
            scoring.for_each_batch(self.backbone, self.episodes, size, self.states, visit)
        return world().completed(logprobs), world().completed(values)

    def _check_server(self, sampled: list[Sampled], logprobs: list[Tensor]) -> None:
        """Compare the server's log-probs with the trainer's, of the policy that sampled.

        If that is an earlier one, its weights are put back for the first episodes.

        Raises:
            IdentityError: They differ: the server has another adapter, base or temperature.
        """
        if self._earlier is not None:
            sampled, episodes = sampled[:_COMPARED], self.episodes[:_COMPARED]
            with self.backbone.weights("policy", self._earlier):
                logprobs = scoring.episode_logprobs(
                    self.backbone, episodes, "policy", self.size, self.temperature
                )
        drawn = [s.logprobs[-len(row) :] for s, row in zip(sampled, logprobs, strict=True)]
        gap = (torch.cat(drawn) - torch.cat(logprobs).cpu()).abs()
        dtype = self.backbone.causal.dtype
        self.server_difference = identities.sampler_is_the_policy(gap, dtype)
        self.identities.setdefault("sampler_difference", self.server_difference)

    def _trunk_pass(self) -> list[Tensor]:
        """Compute every episode's trunk states, (L, H) each."""
        out: list[Tensor] = [torch.empty(0)] * len(self.episodes)

        def visit(batch: scoring.Batch) -> None:
            states = scoring.trunk_states(self.backbone, batch.ids, batch.mask)
            for row, i in zip(states, batch.index, strict=True):
                out[i] = row[len(row) - sum(map(len, self.episodes[i])) :].clone()

        scoring.for_each_batch(
            self.backbone, self.episodes, SCORING_FACTOR * self.size, None, visit
        )
        return out

    def _padded_states(self, out: dict[str, Any]) -> dict[str, Tensor]:
        """Pad like the rollout's ids: prompts on the left, completions on the right."""
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

    @torch.no_grad()
    def _compare_trunk(self) -> None:
        """Keep states only if passes that start from them equal full passes bit for bit."""
        first = scoring.by_length(self.episodes)[: self.size]
        self.backbone.backoff.for_each_batch("scoring", first, len(first), self._compare_trunk_on)

    def _compare_trunk_on(self, index: Sequence[int]) -> None:
        if self.trunk is False:
            return
        batch = scoring.batch(self.backbone, self.episodes, index)
        whole = scoring.hidden_states(self.backbone, batch.ids, batch.mask)
        try:
            states = scoring.trunk_states(self.backbone, batch.ids, batch.mask)
            part = scoring.hidden_states(self.backbone, batch.ids, batch.mask, states)
        except Exception as error:  # an unknown architecture may raise anything
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
        self.say(f"ppo: {name} cannot start from kept trunk states ({reason}); passes run in full")

    def _compare_sampler(self, sampled: list[Sampled]) -> None:
        """Reuse the sampler's log-probs and states only if the training forward agrees."""
        rows = range(min(_COMPARED, len(sampled)))
        episodes = [self.episodes[i] for i in rows]
        pass_over = functools.partial(
            scoring.episode_logprobs, self.backbone, episodes, "policy", self.size, self.temperature
        )
        whole = torch.cat(pass_over()).cpu()
        drawn = torch.cat([sampled[i].logprobs[-len(self.episodes[i][1]) :] for i in rows])
        if len(drawn) != len(whole):  # an empty prompt: no token predicts the first one
            self.trusted = False
            return
        gap = (drawn - whole).abs()
        self.identities["sampler_difference"] = identities.sampler_is_the_policy(
            gap, self.backbone.causal.dtype
        )
        worst = float(gap.max())
        kept = [s.states for s in sampled[: len(rows)]]
        if self.trunk and (world().size > 1 or kept[0] is not None):
            states = [torch.empty(0) if one is None else one for one in kept]
            reused = torch.cat(pass_over(states)).cpu()
            worst = max(worst, float((reused - whole).abs().max()))
        self.trusted = worst <= PARITY
        if not self.trusted:
            self.say(
                f"ppo: the sampler's numbers differ from the trainer's by up to {worst:.2g} nats "
                f"(more than {PARITY:g}): log-probs and trunk states are computed again"
            )


def _pad(rows: list[Tensor], mask_nt: Tensor) -> Tensor:
    """Pad rows with 0 to (N, T); each ends where its mask ends."""
    out = torch.zeros(mask_nt.shape, dtype=torch.float32, device=mask_nt.device)
    for i, (row, end) in enumerate(zip(rows, mask_nt.sum(dim=1).tolist(), strict=True)):
        out[i, end - len(row) : end] = row
    return out
