# SPDX-License-Identifier: Apache-2.0
"""Training on TRL's trainers: exact resume, guards, SFT and the reward model."""
