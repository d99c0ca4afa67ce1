# SPDX-License-Identifier: Apache-2.0
"""Try chat templates, which are untrusted programs, in a process with limited time and memory.

Also reads the markers that a template writes around a turn.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from lora_rlhf.errors import TokenizerError

from . import tool_calls

_log = logging.getLogger(__name__)

SECONDS = 5
"""Processor time that a template may take for `_CHAT`; ordinary ones take milliseconds."""

_BYTES = 2**30
_MAX_CHARACTERS = 1_000_000

_CHAT = [
    {"role": "user", "content": "\x02first\x03"},
    {"role": "assistant", "content": "\x02second\x03"},
    {"role": "user", "content": "\x02third\x03"},
]
_BETWEEN = re.compile("\x02(?:first|second|third)\x03")

# Renders as transformers does, in a process that imports nothing from this package and, because of
# -I, nothing from the working directory. It prints `ready` before the template runs and `tried`
# after it: a failure in between is the template's.
_TRIAL = r"""
import datetime, json, sys
try:
    import resource
except ImportError:
    resource = None  # on Windows only the timeout limits it
given = json.load(sys.stdin)
sys.path += given["libraries"]
import jinja2, jinja2.ext, jinja2.sandbox

class Generation(jinja2.ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

def refuse(message):
    raise jinja2.TemplateError(message)

def tried(call, **arguments):
    try:
        return call(**arguments)
    except MemoryError:
        sys.exit(3)
    except Exception:
        pass  # it refuses a chat, or is broken: reported when it is used

made = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
)
made.filters["tojson"] = lambda value, **options: json.dumps(value)
made.globals.update(
    raise_exception=refuse, strftime_now=lambda form: datetime.datetime.now().strftime(form)
)
try:
    resource and resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource and resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
except (ValueError, OSError):
    pass
print("ready", flush=True)
template = tried(made.from_string, source=given["template"])
for chat in (given["chat"][:1], given["chat"][:2], given["chat"]) if template else ():
    for prompt in (True, False):
        chosen = dict(messages=chat, add_generation_prompt=prompt, tools=None, documents=None)
        tried(template.render, **{**given["tokens"], **chosen})
print("tried", flush=True)
"""


class _UntriedError(Exception):
    """A template that could not be tried, for a reason other than the template itself."""


def check(tokenizer: Any) -> None:
    """Refuse a chat template that costs too much, and warn if it cannot be tried.

    Raises:
        TokenizerError: The template is too long, or takes too much time or memory.
    """
    for template, tokens in _templates(tokenizer):
        fault = f"has {len(template):,} characters" if len(template) > _MAX_CHARACTERS else ""
        try:
            fault = fault or _try(template, tokens)
        except _UntriedError as error:
            _log.warning("%s: it is used untried", error)
        if fault:
            raise TokenizerError(
                f"the chat template {fault}",
                expected=f"a template that renders three turns within {SECONDS} seconds and "
                f"{_BYTES / 2**30:.0f} GiB",
                remedy="use another base model, or correct its template; do not trust the source "
                "of this one",
            )


def _templates(tokenizer: Any) -> list[tuple[str, str]]:
    """Return each template, and the special tokens for its rendering as JSON."""
    template = tokenizer.chat_template
    tokens = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    each = template.values() if isinstance(template, dict) else [template] if template else []
    return [(one, json.dumps(tokens, sort_keys=True)) for one in each]


@functools.cache
def _try(template: str, tokens: str) -> str:
    """Render the template in another process and return its fault; empty if it has none.

    Raises:
        _UntriedError: No process could be started, or it ended before the template ran.
    """
    code = _TRIAL.replace("SECONDS", str(SECONDS)).replace("BYTES", str(_BYTES))
    given = {"template": template, "chat": _CHAT, "tokens": json.loads(tokens)}
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH")}
    ended, errors = f"{SECONDS * 4} seconds were over", b""
    try:
        given["libraries"] = _libraries()
        done = subprocess.run(
            [sys.executable or "", "-I", "-c", code],
            input=json.dumps(given).encode(),
            capture_output=True,
            timeout=4 * SECONDS,
            env=kept,
        )
        output, errors, ended = done.stdout.split(), done.stderr, f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").split()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise _UntriedError(f"the chat template could not be tried ({reason})") from None
    if b"ready" not in output:
        raise _UntriedError(f"the chat template could not be tried ({ended} before it ran)")
    if b"tried" in output:
        return ""
    memory = ended == "exit code 3" or b"MemoryError" in errors
    return "asks for too much memory" if memory else "does not end"


def _libraries() -> list[str]:
    """Return the folders of jinja2 and its dependency for the isolated process."""
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = {Path(spec.origin).resolve().parents[1] for spec in specs if spec and spec.origin}
    return sorted(str(folder) for folder in folders if folder != Path.cwd())


def usual(tokenizer: Any) -> str:
    """Return the template that is used for messages, of several named ones too; else empty."""
    template = tokenizer.chat_template
    return str(template.get("default", "") if isinstance(template, dict) else template or "")


def _render(tokenizer: Any, turns: int, **options: Any) -> str:
    """Render the first turns of `_CHAT`; empty if the template refuses."""
    if not usual(tokenizer):
        return ""
    try:
        return str(tokenizer.apply_chat_template(_CHAT[:turns], tokenize=False, **options))
    except Exception:  # whatever a template raises
        return ""


def markers(tokenizer: Any) -> list[str]:
    """Return the lines that the chat template writes around a turn, such as `### Answer:`.

    Lines below four characters, or of letters only, are left out: they could be part of a text.
    """
    parts = [part.split("\n") for part in _BETWEEN.split(_render(tokenizer, 3))]
    if len(parts) < 2:
        return []
    # Only the lines beside a turn: a system prompt may come before the first one.
    near = [parts[0][-1:], *parts[1:-1], parts[-1][:1]]
    lines = [line.strip() for part in near for line in part]
    return sorted({n for n in lines if len(n) >= 4 and not n.replace(" ", "").isalpha()})


def note(tokenizer: Any) -> str | None:
    """Return a note for the record: the template could not be tried, or rewrites earlier turns."""
    notes = [prefix_note(tokenizer)]
    for template, tokens in _templates(tokenizer):
        if "strftime_now" in template:
            notes.append("the chat template writes the date, so prompts change from day to day")
        try:
            _try(template, tokens)
        except _UntriedError as error:
            notes.append(str(error))
    return "; ".join(filter(None, notes)) or None


def prefix_note(tokenizer: Any) -> str | None:
    """Return how the template rewrites earlier turns once more turns follow; None if it does not.

    Training stays consistent, since every stage renders prompts whole and encodes answers apart,
    but in a chat of many turns the policy sees other text than in training.
    """
    prompted = _render(tokenizer, 1, add_generation_prompt=True)
    answered, more = _render(tokenizer, 2), _render(tokenizer, 3)
    for before, after in ((prompted, answered), (answered, more)):
        if prompted and answered and more and not after.startswith(before):
            cut = len(os.path.commonprefix([before, after]))
            a, b = (text[cut : cut + 40].translate({2: None, 3: None}) for text in (before, after))
            return f"the chat template does not keep what it wrote before: {a!r} becomes {b!r}"
    return None


def unwritten(tokenizer: Any, prompt: Any) -> dict[str, Any] | None:
    """Return the first turn of a prompt that is not in its text; None if all are, or if it fails.

    White space does not count, nor reasoning in earlier answers, nor what is about tools.
    """
    try:
        messages, tools = tool_calls.for_template(prompt)
        written = str(
            tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False
            )
        )
    except Exception:  # refused: a filter counts these rows
        return None
    text = "".join(written.split())
    turns: list[dict[str, Any]] = prompt
    for turn in turns:
        content = turn["content"].rpartition("</think>")[2]
        forms = (content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1])
        if turn["role"] != "tool" and not any("".join(form.split()) in text for form in forms):
            return turn
    return None


def tail(tokenizer: Any) -> str:
    """Return what the chat template writes after an answer; empty if it does not render one."""
    return _BETWEEN.split(_render(tokenizer, 2))[-1]


def turn_end(tokenizer: Any) -> str | None:
    """Return the token with which the chat template ends an answer; None without one."""
    rest = tail(tokenizer).lstrip()
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    return max((t for t in tokens if t and rest.startswith(t)), key=len, default=None)


def continuation(tokenizer: Any, turns: list[dict[str, str]], tail: str) -> tuple[str, str]:
    """Return the text that the template writes for the last turn after its generation prompt.

    Args:
        tail: What the template writes after an answer; see `tail`.

    Returns:
        The text without `tail`, and a note of how it differs from the turn's own; empty if it does
        not.
    """
    given = turns[-1]["content"]
    try:
        messages, tools = tool_calls.for_template(turns)
        opened = tokenizer.apply_chat_template(
            messages[:-1], tools=tools, add_generation_prompt=True, tokenize=False
        )
        whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    except Exception:  # refused: a filter counts these rows
        return given, ""
    if whole.startswith(opened) and whole.endswith(tail):
        text = whole[len(opened) : len(whole) - len(tail)]
        if text == given:
            return text, ""
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        control = {str(token) for token in added if token.special}
        if any(token in text and token not in given for token in control):
            # Answers are encoded as text, so the token would be spelled out.
            return (
                given,
                "answers are trained as given: the chat template writes control tokens "
                "before them, after its generation prompt if it has one",
            )
        if text.strip() == given.strip():
            return text, "white space around answers is as the chat template writes it"
        return text, "answers are trained as the chat template writes them"
    if opened.rstrip().endswith("<think>"):
        reason, closed, rest = given.rpartition("</think>")
        reason = reason.strip().removeprefix("<think>").strip("\n")
        text = f"{reason}\n</think>{rest}" if closed else f"\n</think>\n\n{given}"
        return text, "the generation prompt opens <think>, and answers close it"
    return (
        given,
        "answers are trained as given: the chat template does not write them after its "
        "generation prompt",
    )
