# SPDX-License-Identifier: Apache-2.0
"""Cards, doctor, plots, tables and comparisons, made from the run directory alone."""
