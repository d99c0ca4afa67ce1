# SPDX-License-Identifier: Apache-2.0
"""Run `lora-rlhf` as `python -m lora_rlhf`, without the script on the PATH."""

from lora_rlhf.cli.app import main

main()
