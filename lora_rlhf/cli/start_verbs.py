# SPDX-License-Identifier: Apache-2.0
"""Verbs that come before a run: a first recipe, and a look at its data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_rlhf.errors import UsageError

from . import shell
from .command_group import Json, RecipePath, Set, command, data_group


@command("init")
def _init_verb(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE...", help="CSV, JSON, JSONL or Parquet; .gz allowed."),
    ] = None,
    hub: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="A Hub dataset instead of files.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Recipe to write.")] = Path("recipe.yaml"),
    gpu: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Such as 16GB; default: the GPU of this machine."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model, a folder or a Hub id; default: by GPU and data.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column", metavar="OURS=THEIRS", help="prompt=x, completion=y, chosen=z; repeatable."
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Column to leave unread; repeatable.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; take likely answers.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing recipe.")] = False,
) -> None:
    """Write a first recipe for your data.

    Says what each column is used for, picks a base model and sizes that fit the GPU, and shows rows
    as the model will see them.
    """
    pairs = [text.partition("=") for text in columns or ()]
    if bad := [ours for ours, sign, theirs in pairs if not (sign and theirs)]:
        raise UsageError(f"--column {bad[0]}", expected="OURS=THEIRS, such as prompt=Question")
    if out.is_file() and not force:  # before the slow imports
        raise UsageError(f"{out} exists", remedy="give another --out, or --force to replace it")
    shell.room("starting.first_recipe").init(
        files or (),
        hub=hub,
        out=out,
        gpu=gpu,
        model=model,
        columns={ours: theirs for ours, _, theirs in pairs},
        ignore=ignore or (),
        force=force,
        ask=_ask if sys.stdin.isatty() and not yes else None if yes else _refuse,
        say=_say(),
    )


@command("show", data_group)
def _data_show_verb(
    path: RecipePath,
    overrides: Set = None,
    rows: Annotated[int, typer.Option(min=0, help="Random rows that are shown.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random rows.")] = 0,
    as_json: Json = False,
) -> None:
    """Show the data of a recipe; `data RECIPE` does the same.

    Rows kept and lost by filter, token lengths, length bias and duplicates of comparisons, and rows
    as the model sees them. Loads no weights. The exit code is 3 if a run would stop at the data.
    """
    from lora_rlhf.errors import DataError
    from lora_rlhf.recipe.loader import load_recipe

    recipe = load_recipe(path, overrides, until="sft")
    room = shell.room("starting.data_view")
    folder = path if path.is_dir() else path.parent
    view = room.show_data(recipe, folder, seed=seed, rows=rows)
    if as_json:
        shell.echo(view.as_json())
    else:
        say = _say()
        for line in view.lines():
            say(line)
    if not view.runs:
        raise typer.Exit(DataError.exit_code)


def _say() -> Any:
    """Return a function that prints a line, coloured where the terminal allows it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)

    def say(line: Any) -> None:
        if isinstance(line, Text):
            console.print(line)
        else:
            shell.echo(line)

    return say


def _ask(question: str, answers: Sequence[str], default: str) -> str:
    """Ask on the terminal until the answer is one of those allowed."""
    from lora_rlhf.redaction import printable

    shown = f"{printable(question)} [{' / '.join(map(printable, answers))}]"
    while True:
        answer = str(typer.prompt(shown, default=default))
        if not answers or answer in answers:
            return answer
        shell.echo(f"please answer one of: {', '.join(answers)}", err=True)


def _refuse(question: str, answers: Sequence[str], default: str) -> str:
    raise UsageError(
        f"nobody is there to answer (no terminal): {question}",
        expected=f"one of {', '.join(answers)}",
        remedy="--yes takes the likely answer; --column OURS=THEIRS or --ignore COLUMN decides",
    )
