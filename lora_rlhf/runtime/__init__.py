# SPDX-License-Identifier: Apache-2.0
"""Files, devices, signals and memory backoff: the machine under a run."""
