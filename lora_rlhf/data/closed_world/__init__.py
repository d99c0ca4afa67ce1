# SPDX-License-Identifier: Apache-2.0
"""The closed-world task: prompts, exact checkers, gold reward and simulated labelers."""
