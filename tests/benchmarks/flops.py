# SPDX-License-Identifier: Apache-2.0
"""How many floating-point operations a PPO update needs, by formula.

A product of (m, k) and (k, n) counts 2 m k n. S tokens of prompts and completions, C of them of
completions; P the weights of one layer's linear modules, R those of its LoRA factors; H the width
of the attention, V the vocabulary, h the hidden size; A adapted layers, F frozen ones below them.

    a layer forward            2 P S + attention, 2 R S more with an adapter
    attention forward          4 H for each of a sequence's L (L + 1) / 2 pairs of tokens
    an adapted layer backward  2 P S for the gradient of its input (the weights are frozen),
                               4 R S for LoRA (gradients of input and weights), 2 x attention
    the lowest adapted layer   no gradient of what comes from below: without the input gradients of
                               q, k, v and of their LoRA A
    the highest layer          its MLP for completions and what predicts their first token only, but
                               for the reward, whose pass is whole
    the LM head                2 h V C forward, 2 h V C backward (its weight is frozen)

    score   F layers once; A layers for each of policy, reference, reward and value; the LM head for
            policy and reference
    train   each epoch: A layers forward and backward for policy and for value, the LM head forward
            and backward for the policy

What a program need not do is not counted: recomputation, padding, the frozen layers again, norms,
activations, softmax, the optimizer. Where a rollout brings the frozen layers' states or the
policy's log-probs along from sampling, scoring needs fewer passes, and the caller says so.
"""

from __future__ import annotations

import common


def linear_sizes(shape: common.Shape) -> dict[str, tuple[int, int]]:
    """(in, out) of the linear modules of one layer."""
    keys = shape.kv_heads * shape.attention // shape.heads
    h, i = shape.hidden, shape.intermediate
    return {
        "q_proj": (h, shape.attention),
        "k_proj": (h, keys),
        "v_proj": (h, keys),
        "o_proj": (shape.attention, h),
        "gate_proj": (h, i),
        "up_proj": (h, i),
        "down_proj": (i, h),
    }


def needed(
    shape: common.Shape,
    *,
    adapted: int,
    targets: tuple[str, ...],
    r: int,
    sequences: int,
    prompt: int,
    completion: int,
    epochs: int,
    role_passes: float = 4,
    trunk_passes: float = 1,
) -> dict[str, float]:
    """Operations of `score` and `train` of one update.

    Args:
        adapted: Layers with adapters, from the top.
        targets: Modules with LoRA, by last name.
        role_passes: Roles whose forward scoring needs: 4, or 3 with the policy's from sampling.
        trunk_passes: Passes through the frozen layers that scoring needs: 1, or 0.
    """
    sizes = linear_sizes(shape)
    length = prompt + completion
    tokens, predicted = sequences * length, sequences * completion
    weights = sum(i * o for i, o in sizes.values())
    lora = sum(r * sum(sizes[name]) for name in targets)
    attention = sequences * 4 * shape.attention * length * (length + 1) / 2
    plain = 2 * weights * tokens + attention
    forward = plain + 2 * lora * tokens
    backward = 2 * weights * tokens + 4 * lora * tokens + 2 * attention
    first = ("q_proj", "k_proj", "v_proj")
    unneeded = 2 * tokens * sum(sizes[n][0] * sizes[n][1] for n in first)
    unneeded += 2 * tokens * sum(r * sizes[n][0] for n in first if n in targets)
    mlp = ("gate_proj", "up_proj", "down_proj")
    skipped, m = sequences * (prompt - 1), sum(sizes[n][0] * sizes[n][1] for n in mlp)
    m_lora = sum(r * sum(sizes[n]) for n in mlp if n in targets)
    saved = 2 * (m + m_lora) * skipped
    head = 2 * shape.hidden * shape.vocabulary * predicted
    heads = 2 - max(0.0, 4 - role_passes)
    trunk = trunk_passes * (shape.layers - adapted) * plain
    saved_backward = (2 * m + 4 * m_lora) * skipped
    pair = adapted * (forward + backward) - unneeded - saved - saved_backward
    roles = role_passes * adapted * forward - (role_passes - 1) * saved
    return {"score": trunk + roles + heads * head, "train": epochs * (2 * pair + 2 * head)}
