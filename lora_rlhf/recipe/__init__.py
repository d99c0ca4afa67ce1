# SPDX-License-Identifier: Apache-2.0
"""Every key of a recipe: typed, loaded from YAML, checked, described once."""
