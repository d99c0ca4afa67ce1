# SPDX-License-Identifier: Apache-2.0
"""An Ollama Modelfile: the chat template as a Go template, stop tokens, parameters, licence.

A chat template is a program. Those of most families only write fixed text around each turn, by its
role; that text is read off rendered chats, and the Go template is written only if it gives what
the chat template gives for other chats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_rlhf.errors import UsageError
from lora_rlhf.models import special_tokens
from lora_rlhf.models.base_model import BaseModel

from . import gguf_tokenizer

_Turns = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Shape:
    """Layout of a chat: `start`, then each turn between the two texts of its role.

    Attributes:
        around: Role -> text before and after a turn's content.
        opening: What is written last, before the answer.
        system: The system prompt that the template writes if a chat has none; may be empty.
    """

    start: str
    around: dict[str, tuple[str, str]]
    opening: str
    system: str = ""

    def render(self, turns: _Turns) -> str:
        """Render a chat as Ollama does with the Go template and the Modelfile's SYSTEM."""
        given: list[Mapping[str, str]] = list(turns)
        if self.system and given[0]["role"] != "system":
            given.insert(0, {"role": "system", "content": self.system})
        around = [(*self.around[turn["role"]], turn["content"]) for turn in given]
        return self.start + "".join(a + text + b for a, b, text in around) + self.opening

    def go(self) -> str:
        """Write it as a Go template over `.Messages`."""
        branches = [
            f'{"else if" if i else "if"} eq .Role "{role}" }}}}{_literal(a)}{{{{ .Content }}}}'
            f"{_literal(b)}{{{{ "
            for i, (role, (a, b)) in enumerate(self.around.items())
        ]
        turns = "{{ range .Messages }}{{ " + "".join(branches) + "end }}{{ end }}"
        return _literal(self.start) + turns + _literal(self.opening)


def write(base: BaseModel, gguf: str, licence: str, context: int) -> str:
    """Write the Modelfile of a GGUF file.

    Raises:
        UsageError: The chat template cannot be written in Go.
    """
    layout = shape(base.tokenizer)
    if layout.start == base.tokenizer.bos_token and gguf_tokenizer.adds_bos(base.tokenizer):
        layout = Shape("", layout.around, layout.opening, layout.system)  # llama.cpp adds it
    ends = [base.tokenizer.decode([i]) for i in special_tokens.end_ids(base.tokenizer, base.causal)]
    # The policy was trained on plain samples; Ollama's defaults draw from another distribution.
    plain = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repeat_penalty": 1}
    lines = [f"FROM ./{gguf}", f"TEMPLATE {_quoted(layout.go())}"]
    if layout.system:
        lines.append(f"SYSTEM {_quoted(layout.system)}")
    lines += [f"PARAMETER stop {_quoted(str(end))}" for end in ends]
    lines += [f"PARAMETER {key} {value}" for key, value in plain.items()]
    lines.append(f"PARAMETER num_ctx {context}")
    if licence:
        lines.append(f"LICENSE {_quoted(licence)}")
    return "\n".join(lines) + "\n"


def shape(tokenizer: Any) -> Shape:
    """Read the shape of a chat template off rendered chats, and try it on others.

    Raises:
        UsageError: There is no template, or it does more than write text around turns.
    """
    if not gguf_tokenizer.chat_template(tokenizer):
        raise _no_template("the base has no chat template", "a chat model")

    def rendered(turns: _Turns, opened: bool = True) -> str:
        options = {"tokenize": False, "add_generation_prompt": opened}
        return str(tokenizer.apply_chat_template([*turns], **options))

    try:
        bos = tokenizer.bos_token if gguf_tokenizer.adds_bos(tokenizer) else ""
        layout = _read_off(rendered, bos)
        tried = [_chat("Hi?"), _chat("1 < 2", "{{ x }}", "Why\nso?")]
        if "system" in layout.around:
            tried += [[{"role": "system", "content": "Be brief."}, *chat] for chat in tried]
        for chat in tried:
            if layout.render(chat) != rendered(chat):
                raise ValueError(f"{rendered(chat)[-200:]!r}, not {layout.render(chat)[-200:]!r}")
    except ValueError as error:
        what = "the chat template does more than write fixed text around turns"
        raise _no_template(
            f"{what}: {error}", "one like those of SmolLM2, Qwen2 or Llama 3"
        ) from None
    return layout


def _read_off(rendered: Callable[..., str], bos: str) -> Shape:
    """Find the texts around marked turns; ValueError where they are not fixed."""
    a, b, c, s = ("\x01a\x01", "\x01b\x01", "\x01c\x01", "\x01s\x01")
    head, user_end = _split(rendered(_chat(a), False), a)
    opening = _without_start(_split(rendered(_chat(a)), a)[1], user_end)
    _, between, again, _ = _split(rendered(_chat(a, b, c)), a, b, c)
    answer_end = _split(rendered(_chat(a, b), False), a, b)[2]
    user_start = _without_start(again, answer_end)
    around = {
        "user": (user_start, user_end),
        "assistant": (_without_start(between, user_end), answer_end),
    }
    start = head.removesuffix(user_start)
    if len(start) + len(user_start) != len(head):
        raise ValueError("the first turn does not begin like the others")
    try:
        whole = rendered([{"role": "system", "content": s}, *_chat(a)], False)
    except Exception:  # some refuse a system prompt
        return Shape(start, around, opening)
    system_start, before_user, _ = _split(whole, s, a)
    system_end = before_user.removesuffix(user_start)
    default = ""
    if system_start.startswith(start):
        system_start = system_start.removeprefix(start)
    else:
        default = _without_start(start, system_start).removesuffix(system_end)
        start = bos if bos and system_start.startswith(bos) else ""
        system_start = system_start.removeprefix(start)
    return Shape(start, {"system": (system_start, system_end), **around}, opening, default)


def _chat(*texts: str) -> list[dict[str, str]]:
    roles = [("user", "assistant")[i % 2] for i in range(len(texts))]
    return [{"role": r, "content": text} for r, text in zip(roles, texts, strict=True)]


def _split(text: str, *marks: str) -> list[str]:
    parts = []
    for mark in marks:
        part, marked, text = text.partition(mark)
        if not marked:
            raise ValueError("a turn is left out, or changed")
        parts.append(part)
    return [*parts, text]


def _without_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(f"{text[:80]!r} where {start[:80]!r} was expected")
    return text.removeprefix(start)


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    if '"""' in text:
        raise _no_template('a text holds """, which ends a text of a Modelfile', "another base")
    return f'"""{text}"""'


def _no_template(what: str, expected: str) -> UsageError:
    return UsageError(
        f"no Modelfile can be written: {what}",
        expected=expected,
        remedy="export `--to gguf`, and write the TEMPLATE of a Modelfile by hand",
    )
