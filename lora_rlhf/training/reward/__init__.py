# SPDX-License-Identifier: Apache-2.0
"""The reward model: ranking trainer, ensembles, held-out metrics and the gate before PPO."""
