# SPDX-License-Identifier: Apache-2.0
"""Feedback by people: tasks, labels, labelers, rounds."""
