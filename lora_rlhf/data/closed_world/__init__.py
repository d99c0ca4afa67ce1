# SPDX-License-Identifier: Apache-2.0
"""The closed-world task: generator, exact checkers with a gold reward, simulated labelers."""
