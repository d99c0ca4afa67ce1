# SPDX-License-Identifier: Apache-2.0
"""The only module that imports TRL.

TRL changes its internal methods often. Those that this package overrides or calls are listed in
`SEAMS` and checked on import, so that an unsupported version is refused before a run.
"""

from __future__ import annotations

import inspect
import os

# TRL's trainers report their use to the Hub, which this package turns off by default. A library may
# have read the variable before it is set here, so `ResumableTrainer` checks it again.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import trl
from transformers import Trainer
from trl import DPOConfig as DPOConfig
from trl import DPOTrainer as DPOTrainer
from trl import GRPOConfig as GRPOConfig
from trl import GRPOTrainer as GRPOTrainer
from trl import RewardConfig as RewardConfig
from trl import RewardTrainer as RewardTrainer
from trl import RLOOConfig as RLOOConfig
from trl import RLOOTrainer as RLOOTrainer
from trl import SFTConfig as SFTConfig
from trl import SFTTrainer as SFTTrainer
from trl.kernels import ChunkedLogProbFunction as ChunkedLogProbFunction
from trl.kernels import chunked_logprob as chunked_logprob
from trl.trainer.utils import RepeatSampler as RepeatSampler
from trl.trainer.utils import add_fused_lm_head as add_fused_lm_head
from trl.trainer.utils import split_tensor_dict as split_tensor_dict

from lora_rlhf.errors import SetupError

SUPPORTED = ("1.16",)
"""The minor versions of TRL on which tests/contracts/test_trl_seams.py passed."""

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
        "_tokenize_prompts": ("prompts",),
        "_get_train_sampler": ("dataset",),
        "train": ("resume_from_checkpoint",),
        "_generate_single_turn": ("prompt_ids",),
        "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
        "_generate_and_score_completions": ("inputs",),
        "_prepare_inputs": ("generation_batch",),
        "_compute_loss": ("model", "inputs"),
        "_get_per_token_logps_and_entropies": (
            "model",
            "input_ids",
            "attention_mask",
            "logits_to_keep",
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
        "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask"),
        "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
        "_generate_and_score_completions": ("inputs",),
        "_prepare_inputs": ("generation_batch",),
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
"""Methods that this package overrides or calls, with the parameters that it uses."""


def telemetry_allowed() -> bool:
    """Return whether the user allows TRL's telemetry, with HF_HUB_DISABLE_TELEMETRY=0."""
    return os.environ.get("HF_HUB_DISABLE_TELEMETRY", "1").upper() in ("0", "FALSE", "NO", "OFF")


def check_seams() -> None:
    """Check that the installed TRL has every seam.

    Raises:
        SetupError: A method or a parameter is missing.
    """
    for owner, methods in SEAMS.items():
        for name, parameters in methods.items():
            method = getattr(owner, name, None)
            known = inspect.signature(method).parameters if method is not None else {}
            missing = [p for p in parameters if p not in known]
            if method is None or missing:
                lacks = f"has no parameter {missing[0]!r}" if method is not None else "is missing"
                raise SetupError(
                    f"trl {trl.__version__}: {owner.__name__}.{name} {lacks}",
                    expected=f"trl {', '.join(v + '.*' for v in SUPPORTED)}",
                    remedy=f'pip install "trl=={SUPPORTED[-1]}.*"',
                )


check_seams()
