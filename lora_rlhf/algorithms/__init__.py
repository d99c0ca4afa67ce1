# SPDX-License-Identifier: Apache-2.0
"""From a reward to a policy: PPO, GRPO and RLOO, DPO, best-of-n."""
