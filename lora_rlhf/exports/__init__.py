# SPDX-License-Identifier: Apache-2.0
"""A trained model, written for other people's runtimes."""
