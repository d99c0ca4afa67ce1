# SPDX-License-Identifier: Apache-2.0
"""The Hub: adapters and bases published, and runs backed up while they train."""
