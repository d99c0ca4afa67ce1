# SPDX-License-Identifier: Apache-2.0
"""Metrics of the evaluation: one definition each, from answers or from log-probabilities."""
