# SPDX-License-Identifier: Apache-2.0
"""All metrics by name."""

from __future__ import annotations

from .metric import Metric

METRICS: dict[str, Metric] = {}
