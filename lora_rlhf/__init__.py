# SPDX-License-Identifier: Apache-2.0
"""InstructGPT-style RLHF on one consumer GPU, on one frozen backbone."""
