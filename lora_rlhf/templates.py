# SPDX-License-Identifier: Apache-2.0
"""Chat templates are programs of somebody else's: tried out of the way before they are used.

A template that does not come to an end, or asks for all the memory, is found in a process of its
own, with limits. What a template writes round a turn is read off one that it renders.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from typing import Any

from .errors import TokenizerError

SECONDS = 5
"""Of processor time that a template may take for the chat below; honest ones take milliseconds."""

_BYTES = 2**30
_LONGEST = 1_000_000

_CHAT = [
    {"role": "user", "content": "\x02first\x03"},
    {"role": "assistant", "content": "\x02second\x03"},
    {"role": "user", "content": "\x02third\x03"},
]  # one that ends with an answer is rendered too
_BETWEEN = re.compile("\x02(?:first|second|third)\x03")

# Runs in a process of its own, and imports nothing of this package: as transformers renders.
_TRIAL = r"""
import json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
except (ImportError, ValueError, OSError):
    pass
import jinja2, jinja2.ext, jinja2.sandbox

class Generation(jinja2.ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

def refuse(message):
    raise jinja2.TemplateError(message)

given = json.load(sys.stdin)
made = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
)
made.filters["tojson"] = lambda value, **options: json.dumps(value)
made.globals.update(raise_exception=refuse, strftime_now=lambda form: form)
try:
    template = made.from_string(given["template"])
    for chat in (given["chat"][:1], given["chat"][:2], given["chat"]):
        template.render(
            messages=chat, add_generation_prompt=True, tools=None, documents=None, **given["tokens"]
        )
except MemoryError:
    sys.exit(3)
except Exception:
    pass  # it refuses a chat, or is broken: told where it is used
"""


def check(tokenizer: Any) -> None:
    """Refuse a chat template that cannot be let near the data.

    Raises:
        TokenizerError: It is too long, or takes too much time or memory.
    """
    found = tokenizer.chat_template
    templates = found.values() if isinstance(found, dict) else [found] if found else []
    words = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    for template in templates:
        why = f"has {len(template):,} characters" if len(template) > _LONGEST else ""
        if why := why or _trial(template, json.dumps(words, sort_keys=True)):
            raise TokenizerError(
                f"the chat template {why}",
                expected=f"for a chat of three turns a text, within {SECONDS} seconds and "
                f"{_BYTES / 2**30:.0f} GiB",
                remedy="use another base, or mend the template beside it; do not trust where it "
                "comes from",
            )


@functools.cache
def _trial(template: str, words: str) -> str:
    """What is wrong with the costs of a template; empty where nothing is."""
    code = _TRIAL.replace("SECONDS", str(SECONDS)).replace("BYTES", str(_BYTES))
    given = {"template": template, "chat": _CHAT, "tokens": json.loads(words)}
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(given), text=True, capture_output=True,
            timeout=4 * SECONDS, env=kept | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode == 3 or "MemoryError" in done.stderr:
        return "asks for too much memory"
    return "does not end" if done.returncode < 0 else ""


def markers(tokenizer: Any) -> list[str]:
    """What the chat template writes before and after what is said, line by line: `### Answer:`.

    Only what cannot be a word of a text: of four characters or more, and not of letters alone.
    """
    if not isinstance(tokenizer.chat_template, str):
        return []
    try:
        rendered = str(tokenizer.apply_chat_template(_CHAT, tokenize=False))
    except Exception:  # whatever a template raises: it takes no such chat
        return []
    parts = [part.split("\n") for part in _BETWEEN.split(rendered)]
    if len(parts) < 2:
        return []
    # Of what stands first and last only the line at the turn: a system prompt may be before it.
    near = [parts[0][-1:], *parts[1:-1], parts[-1][:1]]
    lines = [line.strip() for part in near for line in part]
    return sorted({n for n in lines if len(n) >= 4 and not n.replace(" ", "").isalpha()})


def prefix_note(tokenizer: Any) -> str | None:
    """Where a template writes earlier turns otherwise once more is said: both ways; else None.

    Nothing here stands on it: every prompt is rendered whole, in every stage, and an answer is
    encoded by itself. But a chat of many turns is then not what the policy was trained to go on.
    """
    if not isinstance(tokenizer.chat_template, str):
        return None
    try:
        render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
        asked = str(render(_CHAT[:1], add_generation_prompt=True))
        answered, more = str(render(_CHAT[:2])), str(render(_CHAT))
    except Exception:  # whatever a template raises: it takes no such chat
        return None
    for before, after in ((asked, answered), (answered, more)):
        if not after.startswith(before):
            cut = len(os.path.commonprefix([before, after]))
            a, b = (_plain(text[cut : cut + 40]) for text in (before, after))
            return f"the chat template does not keep what it wrote before: {a!r} becomes {b!r}"
    return None


def _plain(text: str) -> str:
    return text.replace("\x02", "").replace("\x03", "")
