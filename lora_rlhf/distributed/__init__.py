# SPDX-License-Identifier: Apache-2.0
"""One run in several processes that split the rows of every batch."""
