# SPDX-License-Identifier: Apache-2.0
"""From people's files and Hub datasets to token datasets that every stage shares."""
