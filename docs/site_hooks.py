# SPDX-License-Identifier: Apache-2.0
"""Hooks of the documentation's site: pages made from code, and links out of the folder docs/.

`commands.md` comes from the command line, `errors.md` from errors.py. A link to a file of the
repository that is not a page becomes its path.
"""

import inspect
import posixpath
import re
from typing import Any

import typer
from mkdocs.structure.files import File

import lora_rlhf
from lora_rlhf import errors
from lora_rlhf.cli.app import app


def _verbs(command: Any, name: str) -> list[tuple[str, Any]]:
    if hasattr(command, "commands"):
        return [
            one for key, sub in command.commands.items() for one in _verbs(sub, f"{name} {key}")
        ]
    return [(name, command)]


def _metavar(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def commands() -> str:
    """Return the page of all commands."""
    text = "# Commands\n\n`--debug` with any of them shows tracebacks.\n"
    for name, command in _verbs(typer.main.get_command(app), "lora-rlhf"):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        usage = " ".join([name, *map(_metavar, arguments)])
        text += f"\n## `{name}`\n\n{inspect.cleandoc(command.help or '')}\n\n    {usage}\n"
        rows = [(_metavar(p), _cell(getattr(p, "help", "") or "")) for p in arguments]
        rows += [(", ".join(p.opts), _cell(p.help or "")) for p in options]
        if any(about for _, about in rows):
            text += "\n| | |\n|---|---|\n" + "".join(f"| `{key}` | {why} |\n" for key, why in rows)
    return text


def error_pages() -> str:
    """Return the page of all errors, by class."""
    text = (
        "# Errors\n\nA message has the problem first, with its place; then what was expected; then "
        "what to do. `--debug`\nadds the traceback.\n\n"
        "| error | exit code | meaning | for example |\n|---|---|---|---|\n"
    )
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.LoraRlhfError):
            what, _, example = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
            example = "" if example.startswith("Secrets") else example
            text += f"| `{name}` | {kind.exit_code} | {_cell(what)} | {_cell(example)} |\n"
    codes = ", ".join(f"{code} ({name})" for name, code in errors.INTERRUPTED.items())
    return text + f"\nInterrupted runs end with {codes}; the same command continues them.\n"


def python() -> str:
    """Return the page of the public functions and classes, each from where it is defined."""
    text = "# Python\n\nEvery command is a function. Nothing heavy is imported before it is used.\n"
    for name in sorted(set(lora_rlhf.__all__) - {"__version__"}):
        home = getattr(getattr(lora_rlhf, name), "__module__", "lora_rlhf")
        text += f"\n::: {home}.{name}\n    options:\n      heading_level: 2\n"
    return text


_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?!https?://|mailto:|#)[^)\s#]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from code."""
    made = {"commands.md": commands(), "errors.md": error_pages(), "python.md": python()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace links to what is no page of the site by the path in the repository."""

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match[2]))
        if files.get_file_from_path(target) is not None:
            return match[0]
        path = posixpath.normpath(posixpath.join("docs", target))
        return f"{match[1]} (`{path}`)"

    return _LINK.sub(link, markdown)
