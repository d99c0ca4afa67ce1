# SPDX-License-Identifier: Apache-2.0
"""Prompts for base models without a chat template, with one to three examples.

The column "GPT-3 (prompted)" of InstructGPT (2203.02155, section 3.5): a base model that is shown
how instructions are answered, instead of being trained to.
"""

from __future__ import annotations

_EXAMPLES = (
    ("Name three colours of the rainbow.", "Red, green and violet are colours of the rainbow."),
    ("Which is larger, the sun or the moon?", "The sun is far larger than the moon."),
    ("Shorten this sentence: The meeting that we had planned was called off by the manager.",
     "The manager called off our meeting."),
)  # fmt: skip

_FORM = "Instruction: {}\nAnswer:"
_BREAK = "\n\n"


def without_template(prompt: str | list[dict[str, str]], examples: int) -> str:
    """Write a prompt as text: the examples, each with its answer, then the prompt.

    Without examples a text stays as it is.
    """
    if isinstance(prompt, str):
        text = prompt
    elif len(prompt) == 1:
        text = prompt[0]["content"]
    else:
        text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    if not examples:
        return text
    shown = [f"{_FORM.format(ask)} {answer}{_BREAK}" for ask, answer in _EXAMPLES[:examples]]
    return "".join(shown) + _FORM.format(text)


def completed(text: str) -> str:
    """Cut the continuation of a base model where it begins another instruction."""
    answer, marker, _ = text.partition("\nInstruction:")
    return answer.strip() if marker else text
