# SPDX-License-Identifier: Apache-2.0
"""`python -m lora_rlhf` is `lora-rlhf`, for where the script is not on the PATH."""

from lora_rlhf.cli.app import main

main()
