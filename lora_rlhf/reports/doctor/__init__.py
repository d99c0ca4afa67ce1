# SPDX-License-Identifier: Apache-2.0
"""Diagnose a run: the stage at fault, and what to try."""
