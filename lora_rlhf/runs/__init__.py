# SPDX-License-Identifier: Apache-2.0
"""A run on disk: record, log, checkpoints, samples, and stages reused from another run."""
