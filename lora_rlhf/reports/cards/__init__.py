# SPDX-License-Identifier: Apache-2.0
"""Model cards, filled from the record of the run."""
