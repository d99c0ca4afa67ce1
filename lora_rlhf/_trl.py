# SPDX-License-Identifier: Apache-2.0
"""The one door to TRL: nothing else in the package imports it.

TRL renames and deletes monthly. What this package subclasses or calls of TRL's inside is listed in
`SEAMS` and checked when this module is imported, so that a version that does not fit is refused
before a run and not in the middle of one.
"""

from __future__ import annotations

import inspect
import os

# TRL's trainers report their use to the Hub; a library built on them must not do so unasked.
# Other libraries may have read the variable before it is set here: `ResumableTrainer` asks again.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import trl
from transformers import Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.kernels import ChunkedLogProbFunction, chunked_logprob
from trl.trainer.utils import add_fused_lm_head, split_tensor_dict

from lora_rlhf.errors import SetupError

__all__ = [
    "SEAMS",
    "SUPPORTED",
    "ChunkedLogProbFunction",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "add_fused_lm_head",
    "check_seams",
    "chunked_logprob",
    "split_tensor_dict",
    "telemetry_asked",
]

SUPPORTED = ("1.16",)
"""The minor versions of TRL on which tests/test_trl_seams.py passed."""

SEAMS: dict[type, dict[str, tuple[str, ...]]] = {
    Trainer: {
        "_save_checkpoint": ("model", "trial"),
        "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
        "_load_optimizer_and_scheduler": ("checkpoint",),
        "_load_rng_state": ("checkpoint",),
        "_init_training_state": ("resume_from_checkpoint",),
        "_run_epoch": ("resume_from_checkpoint", "steps_trained_in_current_epoch"),
    },
    GRPOTrainer: {
        "_generate": ("prompts",),
        "_generate_single_turn": ("prompt_ids",),
        "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
        "_generate_and_score_completions": ("inputs",),
        "_prepare_inputs": ("generation_batch",),
        "_compute_loss": ("model", "inputs"),
        "_get_per_token_logps_and_entropies": (
            "model",
            "input_ids",
            "attention_mask",
            "batch_size",
        ),
        "training_step": ("model", "inputs", "num_items_in_batch"),
        "_clip_grad_norm": ("model",),
        "create_optimizer": (),
        "create_scheduler": ("num_training_steps", "optimizer"),
        "log": ("logs",),
        "_send_telemetry": (),
    },
    RLOOTrainer: {
        "_generate": ("prompts",),
        "_generate_single_turn": ("prompt_ids",),
        "_get_per_token_logps_and_entropies": ("model", "input_ids", "batch_size"),
        "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
        "_generate_and_score_completions": ("inputs",),
        "_clip_grad_norm": ("model",),
        "log": ("logs",),
    },
    DPOTrainer: {
        "_prepare_dataset": ("dataset",),
        "_compute_loss": ("model", "inputs", "return_outputs"),
        "_clip_grad_norm": ("model",),
        "log": ("logs",),
    },
    SFTTrainer: {"_prepare_dataset": ("dataset",), "compute_loss": ("model", "inputs")},
    RewardTrainer: {
        "_prepare_dataset": ("dataset",),
        "_set_signature_columns_if_needed": (),
        "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
        "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
        "log": ("logs",),
    },
}
"""Methods that this package overrides or relies on, with the parameters it counts on."""


def telemetry_asked() -> bool:
    """Whether the user has said, with HF_HUB_DISABLE_TELEMETRY=0, that TRL may tell of its use."""
    return os.environ.get("HF_HUB_DISABLE_TELEMETRY", "1").upper() in ("0", "FALSE", "NO", "OFF")


def check_seams() -> None:
    """Raise if the installed TRL lacks a seam.

    Raises:
        SetupError: Naming the missing method or parameter and the supported versions.
    """
    for owner, methods in SEAMS.items():
        for name, parameters in methods.items():
            method = getattr(owner, name, None)
            found = inspect.signature(method).parameters if method is not None else {}
            missing = [p for p in parameters if p not in found]
            if method is None or missing:
                lacks = f"has no parameter {missing[0]!r}" if method is not None else "is missing"
                raise SetupError(
                    f"trl {trl.__version__}: {owner.__name__}.{name} {lacks}",
                    expected=f"trl {', '.join(v + '.*' for v in SUPPORTED)}",
                    remedy=f'pip install "trl=={SUPPORTED[-1]}.*"',
                )


check_seams()
