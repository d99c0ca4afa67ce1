# SPDX-License-Identifier: Apache-2.0
"""All metrics by name."""

from __future__ import annotations

from lora_rlhf.evaluation import counterfactual, stress

from . import bias, closed_world, plain_records, safety, short_answers, tasks, truth
from .metric import Metric

METRICS: dict[str, Metric] = {
    metric.name: metric
    for module in (
        closed_world,
        plain_records,
        truth,
        short_answers,
        safety,
        tasks,
        bias,
        stress,
        counterfactual,
    )
    for metric in module.METRICS
}
