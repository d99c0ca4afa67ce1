# SPDX-License-Identifier: Apache-2.0
"""All metrics by name."""

from __future__ import annotations

from . import bias, closed_world, tasks, truth
from .metric import Metric

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (*closed_world.METRICS, *truth.METRICS, *tasks.METRICS, *bias.METRICS)
}
