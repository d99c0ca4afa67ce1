# SPDX-License-Identifier: Apache-2.0
"""Differentially private training of the SFT and reward adapters: DP-SGD.

Source: Abadi et al. 2016 (1607.00133), algorithm 1. Every optimizer step draws a Poisson sample of
the examples, clips the gradient of each one, adds Gaussian noise to the sum, and divides it by the
expected size of the sample. An example is a demonstration, or a prompt with all its comparisons.
The accountant is opacus's (PRV, 2106.02848), for adding or removing one example.

Gradients are computed one example at a time, so that they are right for every architecture,
in 4-bit and with gradient checkpointing. Noise and samples are drawn from a secret seed, because
anyone who knew it could subtract the noise. The seed is in the run's checkpoints and nowhere else.
"""

from __future__ import annotations

import functools
import hashlib
import math
import secrets
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lora_rlhf.distributed.world import world
from lora_rlhf.errors import CheckpointError, DataError, RecipeError
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import PrivacySection, Recipe
from lora_rlhf.runtime import optional_packages

from .resumable_trainer import ResumableTrainer

ACCOUNTANT = "prv"
"""Name of the accountant in opacus."""


def check_args(section: str, recipe: Recipe, args: Any) -> None:
    """Reject arguments that private training cannot follow.

    Raises:
        RecipeError: An argument changes how examples are drawn or combined, or augmented rows would
            give one example more than the budget.
        SetupError: opacus is not installed.
    """
    if getattr(recipe, section).privacy.epsilon is None:
        return
    if world().size > 1:
        raise RecipeError(
            f"{section}.privacy.epsilon with several processes is not supported yet",
            remedy="use one process",
        )
    if any(recipe.data.augment.model_dump().values()):
        raise RecipeError(
            f"data.augment makes several examples of one, and {section}.privacy.epsilon holds for "
            "one",
            remedy="leave data.augment out",
        )
    optional_packages.load("opacus.accountants", f"{section}.privacy", "privacy")
    remedies = {
        "gradient_accumulation_steps": "raise per_device_train_batch_size: examples are computed "
        "one at a time, so memory stays the same",
        "train_sampling_strategy": "leave it out: each step draws its own random sample",
        "packing": "leave it out: an example must stay by itself",
        "padding_free": "leave it out: an example must stay by itself",
    }
    usual = {"gradient_accumulation_steps": 1, "train_sampling_strategy": "random"}
    for name, remedy in remedies.items():
        value = getattr(args, name, None)
        if value and value != usual.get(name):
            raise RecipeError(
                f"{section}.args.{name} = {value!r} cannot be used with {section}.privacy.epsilon",
                remedy=remedy,
            )


class PoissonSample:
    """Batches of row numbers: each of N rows is in a batch with the same probability.

    The sampler is its own `sampler`, through which accelerate announces the epoch. An empty
    sample becomes [-1].

    Args:
        rows: N.
        expected: Expected size of a batch; the probability is expected / N.
    """

    def __init__(self, rows: int, expected: int, seed: str) -> None:
        self.rows, self.expected, self.seed = rows, min(expected, rows), seed
        self.epoch, self.sampler = 0, self
        self.batch_size, self.drop_last = self.expected, False

    @property
    def rate(self) -> float:
        """Probability of a row to be in a batch."""
        return self.expected / self.rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches are drawn."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // self.expected)

    def __iter__(self) -> Iterator[list[int]]:
        generator = _generator(self.seed, f"sample {self.epoch}")
        for _ in range(len(self)):
            drawn = torch.rand(self.rows, generator=generator, dtype=torch.float64) < self.rate
            yield drawn.nonzero().flatten().tolist() or [-1]


class _Rows(torch.utils.data.Dataset[tuple[int, Any]]):
    """Rows with their numbers; row -1 stands for an empty sample."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.rows[max(index, 0)]


def _collate(collator: Callable[[list[Any]], Any], rows: list[tuple[int, Any]]) -> dict[str, Any]:
    """Collate rows; an empty sample holds a row that is not used, and is marked."""
    batch = dict(collator([row for _, row in rows]))
    return batch | {"empty": True} if rows[0][0] < 0 else batch


class _PrivateState:
    """The secret seed, and counts of examples: an entry of a checkpoint."""

    def __init__(self) -> None:
        self.seed, self.clipped, self.seen = secrets.token_hex(16), 0, 0

    def state_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class PrivateTraining(ResumableTrainer):
    """A resumable trainer that follows DP-SGD if `privacy` has an epsilon.

    Attributes:
        privacy: The recipe's section; without an epsilon the training is an ordinary one.
        times: Trainings on the same examples, which share the budget (an ensemble).
    """

    noise_multiplier = 0.0

    def __init__(
        self,
        backbone: Backbone,
        role: str,
        *,
        privacy: PrivacySection | None = None,
        times: int = 1,
        **options: Any,
    ) -> None:
        self.privacy, self.times = privacy or PrivacySection(), times
        if self.privacy.epsilon is not None:
            self.private = _PrivateState()
        super().__init__(backbone, role, **options)

    @property
    def delta(self) -> float:
        """The recipe's delta; by default a tenth of 1 / N, and 1e-5 where nothing is promised."""
        default = 1e-5 if self.privacy.epsilon is None else 0.1 / len(self.train_dataset)
        return self.privacy.delta or default

    def before_training(self) -> None:
        """Find the noise that spends the budget in all steps of this training.

        Raises:
            DataError: There are too few examples for the delta.
        """
        super().before_training()
        if self.privacy.epsilon is None:
            return
        rows = len(self.train_dataset)
        if self.delta >= 1 / rows:
            raise DataError(
                f"privacy.delta is {self.delta:g}, but there are {rows} examples",
                expected=f"a delta below 1 / {rows}: else publishing a whole example is private",
                remedy="lower privacy.delta, or leave it out",
            )
        steps = self.args.max_steps
        if steps <= 0:
            steps = math.ceil(self.args.num_train_epochs * len(self._sample()))
        self.noise_multiplier = noise_multiplier(
            self.privacy.epsilon, self.delta, self._sample().rate, steps * self.times
        )

    def get_train_dataloader(self) -> Any:
        """Return batches that are Poisson samples."""
        if self.privacy.epsilon is None:
            return super().get_train_dataloader()
        if self.warm_started:
            raise CheckpointError(
                "private training cannot start again from the adapters of a checkpoint: the steps "
                "that made them would not be counted",
                remedy="continue without --warm-start, or delete the stage's checkpoints",
            )
        loader = DataLoader(
            _Rows(self.train_dataset),
            batch_sampler=self._sample(),
            collate_fn=functools.partial(_collate, self.data_collator),
        )
        return self.accelerator.prepare(loader)

    def _sample(self) -> PoissonSample:
        expected = self.args.per_device_train_batch_size
        return PoissonSample(len(self.train_dataset), expected, self.private.seed)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Set the gradient to the noisy sum of the clipped gradients; return the mean loss."""
        if self.privacy.epsilon is None or return_outputs or not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        empty = inputs.pop("empty", False)
        parameters = list(self.loss_parameters())
        total = [torch.zeros_like(p) for p in parameters]
        losses = [] if empty else self._add_clipped(model, inputs, parameters, total)
        spread = self.noise_multiplier * self.privacy.clip_norm
        generator = _generator(self.private.seed, f"noise {self.state.global_step}")
        for parameter, gradient in zip(parameters, total, strict=True):
            # Drawn on the CPU, so that a run resumes to the same bits on another device.
            noise = torch.randn(gradient.shape, generator=generator, dtype=torch.float32)
            gradient += spread * noise.to(gradient)
            parameter.grad = gradient / self._sample().expected
        mean = torch.stack(losses).mean() if losses else torch.zeros((), device=self.args.device)
        return mean.requires_grad_()

    def _add_clipped(
        self, model: Any, inputs: Any, parameters: list[Any], total: list[Tensor]
    ) -> list[Tensor]:
        """Add each example's clipped gradient to `total`; return the losses.

        A gradient that is not finite counts as zero, so that no example has more weight.
        """
        losses = []
        for index in range(self.rows(inputs)):
            for parameter in parameters:
                parameter.grad = None
            loss = self.whole_loss(model, self.part(inputs, index, index + 1), False, None)
            with torch.autocast(self.args.device.type, enabled=False):
                self.accelerator.backward(loss)
            own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in own]))
            self.private.seen += 1
            if not torch.isfinite(norm):
                self.private.clipped += 1
                continue
            self.private.clipped += int(norm > self.privacy.clip_norm)
            weight = (self.privacy.clip_norm / norm.clamp(min=1e-12)).clamp(max=1.0)
            for gradient, part in zip(total, own, strict=True):
                gradient += weight * part
            losses.append(loss.detach())
        return losses

    def spent(self, steps: int) -> dict[str, Any] | None:
        """Return what a training of this many steps guarantees, for the record."""
        if self.privacy.epsilon is None:
            return None
        rate, clipped = self._sample().rate, self.private.clipped / max(self.private.seen, 1)
        return {
            "epsilon": epsilon(self.noise_multiplier, self.delta, rate, steps * self.times),
            "delta": self.delta,
            "examples": len(self.train_dataset),
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.privacy.clip_norm,
            "sample_rate": rate,
            "steps": steps,
            "trainings": self.times,
            "clipped": round(clipped, 4),
            "accountant": f"opacus {ACCOUNTANT}",
        }


def noise_multiplier(target: float, delta: float, rate: float, steps: int) -> float:
    """Return the least noise, in units of the clip norm, that spends at most `target`.

    Args:
        target: Epsilon.
        rate: Probability of an example to be in a step's sample.
    """
    find = optional_packages.load("opacus.accountants.utils", "privacy", "privacy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(
            find.get_noise_multiplier(
                target_epsilon=target,
                target_delta=delta,
                sample_rate=rate,
                steps=steps,
                accountant=ACCOUNTANT,
            )
        )


def epsilon(noise: float, delta: float, rate: float, steps: int) -> float:
    """Return the epsilon that `steps` noisy steps spend."""
    if not steps:
        return 0.0
    module = optional_packages.load("opacus.accountants", "privacy", "privacy")
    accountant = module.create_accountant(ACCOUNTANT)
    accountant.history = [(noise, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta=delta))


def _generator(seed: str, use: str) -> torch.Generator:
    """Make a generator for one use of the secret seed."""
    digest = hashlib.sha256(f"{seed} {use}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
