# SPDX-License-Identifier: Apache-2.0
"""A conversation in a terminal or over a pipe: lines in, answers and commands out."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_rlhf.errors import LoraRlhfError, UsageError
from lora_rlhf.recipe import suggestions
from lora_rlhf.redaction import printable
from lora_rlhf.runtime.interrupts import Interrupted

from . import instructions
from .chat import KL_LEVELS, Answer, Chat, Comparison, level

_COLOURS = ("", "on #4a2020", "on #702020", "on #9a2020", "on #d02020")
_NARROWEST = 26
"""Columns for each answer from which a comparison is side by side."""

Ask = Callable[[str, str], str]
"""Shows a prompt, perhaps with a text to edit, and returns a line; EOFError ends the chat."""


class Terminal:
    """A chat by lines. Answers go to `out`; notes, facts and refusals go to `notes`.

    Args:
        ask: Reads a line.
        live: People sit before it: answers to commands name what to do next.
    """

    def __init__(
        self, chat: Chat, ask: Ask, out: Console, notes: Console, *, live: bool = False
    ) -> None:
        self.chat, self.ask, self.out, self.notes, self.live = chat, ask, out, notes, live
        self.refused = 0
        self._cut = False

    def talk(self) -> int:
        """Answer lines until /quit or the end of the input; return the number of refused ones."""
        models = ", ".join(self.chat.models)
        self._note(f"{self.chat.model} answers; models: {models}. /help lists the commands.")
        while True:
            try:
                line = self._read(f"{self.chat.model}> ")
                if line.strip():
                    self._do(line)
            except EOFError:
                return self.refused
            except Interrupted:  # SIGTERM or SIGHUP
                raise
            except KeyboardInterrupt:
                self._note("Ctrl-D or /quit ends the chat.")
            except LoraRlhfError as error:
                self.refused += 1
                self._note(str(error))

    def _read(self, prompt: str) -> str:
        """Read a line, or the lines between two that are three quotation marks."""
        line = self.ask(prompt, "")
        if line.strip() != '"""':
            return line
        lines: list[str] = []
        while (line := self.ask("... ", "")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines)

    def _do(self, line: str) -> None:
        if not line.startswith("/") or line.startswith("//"):
            self._show(self.chat.stream(line.removeprefix("/")))
            return
        name, _, rest = line[1:].partition(" ")
        method = getattr(self, f"_cmd_{name}", None) if name.isidentifier() else None
        if method is None:
            near = suggestions.nearest(name, COMMANDS)
            near = near.replace("mean ", "mean /")
            raise UsageError(f"unknown command /{name}{near or '; /help lists them'}")
        method(rest.strip())

    # --- output ----------------------------------------------------------------------------------

    def _note(self, text: str) -> None:
        self.notes.print(Text(printable(text), style="dim"), soft_wrap=True)

    def _print(self, text: str) -> None:
        self.out.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def _show(self, parts: Generator[str, None, None]) -> None:
        """Write an answer as it comes; Ctrl-C stops it, and what came is kept."""
        shown = False
        try:
            for part in parts:
                self.out.file.write(printable(part))
                self.out.file.flush()
                shown = True
        except Interrupted:
            raise
        except KeyboardInterrupt:
            parts.close()
            if not shown:
                self._note("stopped before the first word; the question is not kept")
                return
        finally:
            if shown:
                self.out.file.write("\n")
                self.out.file.flush()
        if self.chat.exchanges:
            answer = self.chat.last
            self._note(f"({answer.facts})")
            if answer.dropped_turns and not self._cut:
                self._cut = True
                self._note(
                    f"the conversation is longer than the context of {self.chat.engine.context} "
                    f"tokens: the model no longer sees its first {answer.dropped_turns} turns"
                )

    def _compared(self, answers: Comparison) -> None:
        coloured = self.out.color_system is not None
        if self.out.is_terminal and self.out.width >= _NARROWEST * len(answers):
            table = Table(box=box.ROUNDED, expand=True)
            for answer in answers:
                table.add_column(Text(answer.model), ratio=1, overflow="fold")
            table.add_row(*(_text(answer) for answer in answers), end_section=True)
            table.add_row(*(Text(_facts(answer), style="dim") for answer in answers))
            self.out.print(table)
        else:
            for answer in answers:
                self.out.print(Text(f"[{printable(answer.model)}]", style="bold"), soft_wrap=True)
                self.out.print(_text(answer), soft_wrap=True)
                self.out.print(Text(printable(_facts(answer)), style="dim"), soft_wrap=True)
        if coloured and any(answer.kl for answer in answers):
            legend = Text("KL to SFT of a token: ")
            for bound in KL_LEVELS:
                legend.append(f" {bound:g}+ ", style=_COLOURS[level(bound)])
            self.out.print(legend)

    # --- commands --------------------------------------------------------------------------------

    def _cmd_help(self, _: str) -> None:
        width = max(len(f"/{name} {usage}") for name, (usage, _) in COMMANDS.items())
        for name, (usage, text) in COMMANDS.items():
            self._print(f"{f'/{name} {usage}'.ljust(width)}  {text}")
        self._print('"""  begins and ends a text of several lines; // begins one with a /')
        self._print("Ctrl-C stops an answer; Ctrl-D ends the chat.")

    def _cmd_system(self, text: str) -> None:
        if text:
            self.chat.system = "" if text == "off" else text
        self._note(f"system: {self.chat.system or 'none'}")

    def _cmd_model(self, name: str) -> None:
        if name:
            self.chat.use_model(name)
            self._note(f"{name} answers")
        else:
            for each in self.chat.models:
                self._print(f"{'*' if each == self.chat.model else ' '} {each}")

    def _cmd_compare(self, text: str) -> None:
        self._compared(self.chat.compare(text or None))

    def _cmd_retry(self, _: str) -> None:
        self._show(self.chat.retry())

    def _cmd_edit(self, text: str) -> None:
        if not self.chat.last_question:
            raise UsageError("there is no question yet", remedy="ask something first")
        if not (text or self.live):  # the next line is another question or command
            raise UsageError("/edit needs the changed question", expected="/edit TEXT")
        self._show(self.chat.edit(text or self.ask("edit> ", self.chat.last_question)))

    def _cmd_save(self, path: str) -> None:
        if not path:
            raise UsageError("/save needs a file", expected="/save FILE.jsonl or /save FILE.md")
        self.chat.save(path)
        self._note(f"saved in {path}")

    def _cmd_template(self, _: str) -> None:
        self._print(self.chat.template())

    def _cmd_good(self, comment: str) -> None:
        self.chat.good(comment)
        self._note("saved: good")

    def _cmd_bad(self, comment: str) -> None:
        self.chat.bad(comment)
        self._note("saved: bad")

    def _cmd_seed(self, text: str) -> None:
        if text:
            self.chat.set_seed(int(_number(text, "seed")))
        self._note(f"seed of the next answer: {self.chat.seed}")

    def _cmd_temperature(self, text: str) -> None:
        if text:
            self.chat.set_temperature(_number(text, "temperature"))
        self._note(f"temperature {self.chat.temperature:g}")

    def _cmd_tokens(self, text: str) -> None:
        if text:
            self.chat.set_tokens(int(_number(text, "tokens")))
        self._note(
            f"at most {self.chat.max_tokens or self.chat.engine.max_tokens} tokens an answer"
        )

    def _cmd_format(self, path: str) -> None:
        if path:
            self.chat.set_schema(None if path == "off" else instructions.read_schema(Path(path)))
        self._note("answers are text" if self.chat.schema is None else "answers are JSON")

    def _cmd_clear(self, _: str) -> None:
        self.chat.clear()
        self._cut = False
        self._note("the conversation is forgotten")

    def _cmd_quit(self, _: str) -> None:
        raise EOFError


COMMANDS = {
    "help": ("", "list the commands"),
    "system": ("[TEXT|off]", "show or set the system message"),
    "model": ("[NAME]", "show the models, or choose the one that answers"),
    "compare": ("[TEXT]", "answers of all models to the last question, or to TEXT"),
    "retry": ("", "answer the last question again, with the next seed"),
    "edit": ("[TEXT]", "change the last question, and ask it again"),
    "save": ("FILE", "write the conversation: .jsonl (a row for a recipe) or .md"),
    "template": ("", "show the exact text that the model sees"),
    "good": ("[COMMENT]", "save a thumb up on the last answer"),
    "bad": ("[COMMENT]", "save a thumb down on the last answer"),
    "seed": ("[N]", "seed of the next answer; it grows by one with each"),
    "temperature": ("[X]", "0 is greedy decoding"),
    "tokens": ("[N]", "most tokens of an answer"),
    "format": ("[FILE|off]", "answers as JSON of the schema in FILE"),
    "clear": ("", "forget the conversation"),
    "quit": ("", "end"),
}


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
        if name != "temperature" and value != int(value):
            raise ValueError
        return value
    except (ValueError, OverflowError):
        raise UsageError(f"/{name} {text}", expected="a number") from None


def _text(answer: Answer) -> Text:
    if not answer.kl:
        return Text(printable(answer.text))
    text = Text()
    for token, kl in answer.kl:
        text.append(printable(token), style=_COLOURS[level(kl)])
    return text


def _facts(answer: Answer) -> str:
    _, _, facts = answer.facts.partition(" · ")
    most = max(answer.kl, key=lambda pair: pair[1], default=None)
    if most is not None and most[1] >= KL_LEVELS[0]:
        facts += f" · most at {most[0].strip()!r} ({most[1]:.2f})"
    return facts


# --- the terminal itself -------------------------------------------------------------------------


def run(chat: Chat) -> int:
    """Talk on this process's streams; return the number of lines that were refused over a pipe."""
    live = sys.stdin.isatty() and sys.stdout.isatty()
    colour = None if live and "NO_COLOR" not in os.environ else False
    out = Console(highlight=False, no_color=colour is False or None)
    notes = Console(stderr=True, highlight=False, no_color=colour is False or None)
    ask = _line_editor() if live else _pipe
    with _ctrl_c():
        refused = Terminal(chat, ask, out, notes, live=live).talk()
    return 0 if live else refused


def _pipe(prompt: str, text: str) -> str:
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"the line is not UTF-8: {error}") from None


def _line_editor() -> Ask:
    """Return prompt_toolkit's editor, or readline's: history by arrow keys."""
    try:
        toolkit = importlib.import_module("prompt_toolkit")
        completion = importlib.import_module("prompt_toolkit.completion")
        words = completion.WordCompleter([f"/{name}" for name in COMMANDS], sentence=True)
        session = toolkit.PromptSession(
            completer=words, complete_while_typing=False, reserve_space_for_menu=4
        )
        return lambda prompt, text: str(session.prompt(prompt, default=text))
    except ImportError:
        pass
    readline = None
    with contextlib.suppress(ImportError):  # not on Windows
        readline = importlib.import_module("readline")

    def ask(prompt: str, text: str) -> str:
        if readline is not None:
            readline.set_startup_hook(lambda: readline.insert_text(text))
        return input(prompt)

    return ask


@contextlib.contextmanager
def _ctrl_c() -> Iterator[None]:
    """Let each Ctrl-C raise KeyboardInterrupt; the shell's handler would end the program."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
