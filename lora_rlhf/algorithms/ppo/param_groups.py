# SPDX-License-Identifier: Apache-2.0
"""PPO's optimizer: two parameter groups, warm-up from a tenth, and the scale of float16 losses."""

from __future__ import annotations

from typing import Any

import torch

from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import PpoSection

FLOAT16_SCALE = 1024.0
"""Factor of losses in float16, where a gradient below 6e-8 is 0.

A loss divided by thousands of tokens gives such gradients: at 4,096 tokens their cosine to
float32's was 0.998, at 32,768 it was 0.956, and 1.000 with this factor (test_ppo_trainer.py).
"""


def loss_scale(backbone: Backbone) -> float:
    """Factor of the loss: 1 except in float16. Gradients are divided by it before clipping."""
    return FLOAT16_SCALE if backbone.causal.dtype == torch.float16 else 1.0


def groups(backbone: Backbone, args: Any, ppo: PpoSection) -> list[dict[str, Any]]:
    """Group the policy's adapter, and the value's adapter and head, each with its learning rate."""
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
    """Warm up from a tenth of the rate in `steps`, then keep it constant (2203.02155, C.4)."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 0.1 + 0.9 * step / steps)
    )
