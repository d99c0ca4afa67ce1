# SPDX-License-Identifier: Apache-2.0
"""Before a run: a first recipe from a user's data, and a recipe's data as the model sees them."""
