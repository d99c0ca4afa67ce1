# SPDX-License-Identifier: Apache-2.0
"""The command line: verbs, exit codes, signals."""
