# SPDX-License-Identifier: Apache-2.0
"""Chat templates are programs of somebody else's: tried out of the way before they are used.

A template that does not come to an end, or asks for all the memory, is found in a process of its
own, with limits. What a template writes round a turn is read off one that it renders.
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

_log = logging.getLogger(__name__)

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
# Isolated (-I): nothing of the folder that it is started in is imported. `ready` is said before
# anything of the template runs, and `tried` after it: what lies between is the template's doing.
_TRIAL = r"""
import datetime, json, sys
try:
    import resource
except ImportError:
    resource = None  # Windows: the time on the clock is all that bounds it
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

def tried(call, **words):
    try:
        return call(**words)
    except MemoryError:
        sys.exit(3)
    except Exception:
        pass  # it refuses a chat, or is broken: told where it is used

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
    for asked in (True, False):
        chosen = dict(messages=chat, add_generation_prompt=asked, tools=None, documents=None)
        tried(template.render, **{**given["tokens"], **chosen})
print("tried", flush=True)
"""

_costs: dict[tuple[str, str], str] = {}
"""What was found of a template and its words: one that could not be tried is not here."""


class _UntriedError(Exception):
    """Why a template could not be tried: a fault of this machine, and none of the template."""


def check(tokenizer: Any) -> None:
    """Refuse a chat template that cannot be let near the data.

    One that cannot be tried on this machine is let through, with a warning.

    Raises:
        TokenizerError: It is too long, or takes too much time or memory.
    """
    for template, words in _templates(tokenizer):
        why = f"has {len(template):,} characters" if len(template) > _LONGEST else ""
        try:
            why = why or _trial(template, words)
        except _UntriedError as error:
            _log.warning("%s: it is used untried", error)
        if why:
            raise TokenizerError(
                f"the chat template {why}",
                expected=f"for a chat of three turns a text, within {SECONDS} seconds and "
                f"{_BYTES / 2**30:.0f} GiB",
                remedy="use another base, or mend the template beside it; do not trust where it "
                "comes from",
            )


def _templates(tokenizer: Any) -> list[tuple[str, str]]:
    """Each template, and the special tokens that it is rendered with as JSON."""
    found = tokenizer.chat_template
    words = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    each = found.values() if isinstance(found, dict) else [found] if found else []
    return [(template, json.dumps(words, sort_keys=True)) for template in each]


def _trial(template: str, words: str) -> str:
    """What is wrong with the costs of a template; empty where nothing is.

    Raises:
        _UntriedError: No process could be started, or it ended before the template ran.
    """
    if (template, words) not in _costs:
        _costs[template, words] = _run(template, words)
    return _costs[template, words]


def _run(template: str, words: str) -> str:
    code = _TRIAL.replace("SECONDS", str(SECONDS)).replace("BYTES", str(_BYTES))
    given = {"template": template, "chat": _CHAT, "tokens": json.loads(words)}
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH")}
    returned, errors = None, b""
    try:
        given["libraries"] = _libraries()
        done = subprocess.run(
            [sys.executable or "", "-I", "-c", code],
            input=json.dumps(given).encode(),
            capture_output=True,
            timeout=4 * SECONDS,
            env=kept,
        )
        said, returned, errors = done.stdout.split(), done.returncode, done.stderr
    except subprocess.TimeoutExpired as over:
        said = (over.stdout or b"").split()
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise _UntriedError(f"the chat template could not be tried ({why})") from None
    if b"ready" not in said:
        late = f"{SECONDS * 4} seconds were over"
        what = late if returned is None else f"exit code {returned}"
        raise _UntriedError(f"the chat template could not be tried ({what} before it ran)")
    if b"tried" in said:
        return ""
    memory = returned == 3 or b"MemoryError" in errors
    return "asks for too much memory" if memory else "does not end"


def _libraries() -> list[str]:
    """Where jinja2 and what it needs lie, for a process that sees only its own packages."""
    found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = {Path(spec.origin).resolve().parents[1] for spec in found if spec and spec.origin}
    return sorted(str(folder) for folder in folders if folder != Path.cwd())


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


def note(tokenizer: Any) -> str | None:
    """What a record says of the template: that it could not be tried, what it rewrites, or None."""
    found = [prefix_note(tokenizer)]
    for template, words in _templates(tokenizer):
        try:
            _trial(template, words)
        except _UntriedError as error:
            found.append(str(error))
    return "; ".join(filter(None, found)) or None


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
