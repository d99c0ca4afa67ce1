# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning on demonstrations, through `trl.SFTTrainer` on the policy's view.

The finished adapter is saved as `adapters/sft` and becomes the frozen reference of PPO.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import set_seed

from lora_rlhf._trl import SFTConfig, SFTTrainer
from lora_rlhf.data.dataset_builder import Prepared
from lora_rlhf.errors import AdapterError, IdentityError
from lora_rlhf.models import adapters
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.runs.record import Record

from . import canaries
from .fit import fit
from .private_training import PrivateTraining, check_args
from .stage_context import StageContext
from .trl_config import build, effective, trainer_args

_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "num_train_epochs": 2, "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine", "warmup_steps": 5, "logging_steps": 5,
}  # fmt: skip

_OTHER_DTYPE = 0.5
"""Largest difference of a logit between two dtypes of one base, a few roundings of bfloat16."""


class ResumableSFTTrainer(PrivateTraining, SFTTrainer):
    """TRL's SFT, with the loss on held-out rows after training."""

    held_out_loss: float

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """Return nats, weighed by tokens: not smoothed, nor by rows as Trainer weighs batches."""
        plain = {"compute_loss_func": None, "label_smoother": None}
        kept, kind = {name: getattr(self, name) for name in plain}, self.args.loss_type
        self.__dict__.update(plain)
        self.args.loss_type = "nll"
        try:
            loss, logits, labels = super().prediction_step(model, inputs, *args, **options)
        finally:
            self.__dict__.update(kept)
            self.args.loss_type = kind
        tokens_a_row = float((inputs["labels"] != -100).sum()) / len(inputs["labels"])
        return loss * (tokens_a_row / self._held_out_tokens_a_row), logits, labels

    @functools.cached_property
    def _held_out_tokens_a_row(self) -> float:
        rows = self.eval_dataset["labels"]
        return float(sum(label != -100 for row in rows for label in row) / len(rows))

    def share(self, piece: Any, inputs: Any, num_items_in_batch: Any) -> float:
        """Return the share of tokens; 1 if the loss is divided by the tokens of the whole step."""
        if num_items_in_batch is not None:
            return 1.0
        tokens, total = (int((x["labels"] != -100).sum()) for x in (piece, inputs))
        return tokens / max(total, 1)

    def after_training(self) -> None:
        """Evaluate on the held-out rows, all of them."""
        self.args.dataloader_drop_last = False
        self.held_out_loss = self.evaluate()["eval_loss"]


def run(context: StageContext, args: SFTConfig, data: Prepared | None) -> None:
    """Train on demonstrations, or take `sft.from`; leaves equal roles `policy` and `reference`.

    The loss is on completion tokens only, the eos included.

    Raises:
        IdentityError: The saved adapter gives other outputs when it is loaded again.
    """
    recipe, backbone, record, _ = context
    with record.stage("sft") as entry:
        set_seed(recipe.seed)
        if recipe.sft.start:
            entry["from"] = context.take_adapter("policy", recipe.sft.start)
            entry["adapter_sha256"] = context.save_adapter("policy", "sft")
            load(backbone, record)
            return
        assert data is not None  # without `from` it is an error to have none
        backbone.add_role("policy")
        planted = canaries.draw(recipe.sft.privacy.canaries, recipe.seed, data.train)
        build_trainer = functools.partial(
            ResumableSFTTrainer,
            backbone,
            "policy",
            privacy=recipe.sft.privacy,
            args=args,
            train_dataset=tokenize(backbone, canaries.plant(data.train, planted)),
            eval_dataset=tokenize(backbone, data.held_out),
        )
        with backbone.training("policy"):
            trainer, result = fit(context, build_trainer, "sft")
        if spent := trainer.spent(result.global_step):
            entry["privacy"] = spent
        if planted:
            entry["memorisation"] = canaries.audit_sft(backbone, planted, trainer.delta)
        entry |= {
            "held_out_loss": trainer.held_out_loss,
            "chance_loss": math.log(backbone.causal.config.get_text_config().vocab_size),
            "steps": result.global_step,
            "train_loss": result.training_loss,
            "args": effective(args),
            "adapter_sha256": context.save_adapter("policy", "sft"),
        }
        load(backbone, record)


def arguments(recipe: Recipe, out: Path) -> SFTConfig:
    """Build TRL's config of this stage.

    Raises:
        RecipeError: TRL refuses `sft.args`.
    """
    args = build("sft", SFTConfig, trainer_args(recipe, out, "sft", _DEFAULTS, recipe.sft.args))
    check_args("sft", recipe, args)
    return args  # type: ignore[no-any-return]


def load(backbone: Backbone, record: Record) -> None:
    """Load roles `policy` and `reference` from the finished stage.

    Raises:
        DamageError: The adapter is not as the run wrote it.
        IdentityError: The adapter's outputs differ from those saved with it.
    """
    folder = record.verified("adapters/sft")
    adapters.load_role(backbone, "reference", folder)
    if not backbone.has("policy"):
        backbone.add_role("policy")
    backbone.copy_role("reference", "policy")
    saved = adapters.read_check(folder)
    if not saved:
        raise AdapterError(f"{folder} lacks check.json", remedy="train the stage again")
    for role in ("policy", "reference"):
        now = adapters.expected_outputs(backbone, role)
        # Sums differ between CPUs, and rounding between dtypes, so a tolerance is needed.
        atol = saved["atol"] if saved["dtype"] == now["dtype"] else _OTHER_DTYPE
        for name, values in saved["expected"].items():
            if not np.allclose(values, now["expected"][name], rtol=0, atol=atol):
                raise IdentityError(
                    f"adapters/sft, loaded again as {role}, gives other outputs than when it was "
                    "saved",
                    expected=f"a difference of at most {atol}",
                    remedy="stage at fault: sft. Was the folder, the base or a library changed?",
                )


def tokenize(backbone: Backbone, rows: Dataset) -> Dataset:
    """Encode rows: ids, labels (-100 on the prompt), and length for batches of similar length."""

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt = backbone.encode_prompt(row["prompt"])
        completion = backbone.encode_completion(row["completion"])
        ids = prompt + completion
        return {"input_ids": ids, "labels": [-100] * len(prompt) + completion, "length": len(ids)}

    return Dataset.from_list([encode(row) for row in rows])
