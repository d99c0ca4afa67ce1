# SPDX-License-Identifier: Apache-2.0
"""Verbs that come before a run: a first recipe, and a look at its data."""
