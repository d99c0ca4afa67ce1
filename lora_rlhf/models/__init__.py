# SPDX-License-Identifier: Apache-2.0
"""One frozen backbone, its roles as LoRA adapters, sampling and scoring."""
