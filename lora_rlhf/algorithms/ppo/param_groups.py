# SPDX-License-Identifier: Apache-2.0
"""PPO's optimizer: two groups, a warm-up from a tenth, the scale of float16 losses."""

from __future__ import annotations

from typing import Any

import torch

from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import PpoSection

FLOAT16_SCALE = 1024.0
"""What losses are multiplied by in float16, where a gradient below 6e-8 is 0.

A loss divided by thousands of tokens gives such gradients: at 4,096 tokens their cosine to
float32's was 0.998, at 32,768 it was 0.956, and 1.000 with this scale (tests/test_ppo_trainer.py).
"""


def loss_scale(backbone: Backbone) -> float:
    """1 but in float16. Gradients are divided by it again before they are clipped."""
    return FLOAT16_SCALE if backbone.causal.dtype == torch.float16 else 1.0


def groups(backbone: Backbone, args: Any, ppo: PpoSection) -> list[dict[str, Any]]:
    """The policy's adapter, and the value's adapter and head, each with its learning rate."""
    rates = {"policy": args.learning_rate, "value": ppo.value_learning_rate or args.learning_rate}
    return [
        {
            "params": [p for _, p in backbone.role_parameters(role)],
            "lr": rate,
            "weight_decay": args.weight_decay,
        }
        for role, rate in rates.items()
    ]


def warm_up(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """From a tenth of the rate to all of it in `steps`, then constant (2203.02155, C.4)."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 0.1 + 0.9 * step / steps)
    )
