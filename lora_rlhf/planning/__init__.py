# SPDX-License-Identifier: Apache-2.0
"""GPU memory of a recipe, counted before any weights are loaded."""
