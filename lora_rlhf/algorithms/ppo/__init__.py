# SPDX-License-Identifier: Apache-2.0
"""PPO with a KL penalty, a value adapter and PPO-ptx."""
