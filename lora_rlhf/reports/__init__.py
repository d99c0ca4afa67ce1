# SPDX-License-Identifier: Apache-2.0
"""What people read, made from the run directory alone."""
