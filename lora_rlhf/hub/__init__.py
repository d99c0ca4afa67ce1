# SPDX-License-Identifier: Apache-2.0
"""What leaves the machine: staged, checked, pushed; and runs backed up on the Hub."""
