# SPDX-License-Identifier: Apache-2.0
"""The command group that all verbs register with, and the options that several verbs share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lora_rlhf.distributed import launch
from lora_rlhf.recipe import home
from lora_rlhf.runtime import quiet

from . import shell

_debug = False

_SHARED = ("run", "demo", "sft", "reward", "ppo", "policy", "evaluate")
"""Verbs that several processes may share."""

SECTIONS = {
    "Start": ("init", "demo", "data", "plan", "env"),
    "Train": ("run", "sft", "reward", "ppo", "policy", "sweep", "doctor"),
    "Evaluate": ("evaluate", "judge", "compare", "report"),
    "Ask people": ("label", "tasks", "iterate"),
    "Use": ("generate", "chat", "do", "serve", "usage", "moderate", "score", "export",
            "rollout-server"),
    "Share": ("card", "lint-card", "push", "pull"),
}  # fmt: skip
"""Verbs by the section of `--help` that lists them."""


class _Group(TyperGroup):
    """Command group that accepts `--debug` anywhere, and escapes what it quotes in its errors."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Parse the options before the verb."""
        with shell.escaped_usage_errors():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Parse the verb's own options, and call it."""
        with shell.escaped_usage_errors():
            return super().invoke(ctx)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the verbs by section."""
        width = max(map(len, self.commands))
        limit = formatter.width - 6 - width
        for title, verbs in SECTIONS.items():
            texts = [self.commands[verb].get_short_help_str(limit) for verb in verbs]
            with formatter.section(title):
                formatter.write_dl(
                    [(verb.ljust(width), text) for verb, text in zip(verbs, texts, strict=True)]
                )

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(a for a in args[:end] if a != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="lora-rlhf",
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help needs no import of rich
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _DataGroup(TyperGroup):
    """The verbs of `data`; a recipe in place of one means `show`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Insert `show` before a path."""
        if args[0] not in self.commands and (
            args[0].endswith((".yaml", ".yml")) or Path(home.expanded(args[0])).exists()
        ):
            args = ["show", *args]
        return super().resolve_command(ctx, args)


data_group = typer.Typer(
    cls=_DataGroup, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)
app.add_typer(
    data_group,
    name="data",
    help="Show a recipe's data; import, export, publish labels.",
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file, or its folder.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The --out of an earlier run.")]
Out = Annotated[Path | None, typer.Option(help="Run directory; default: runs/<recipe name>.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; repeatable."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything before training; print the recipe."),
]
From = Annotated[
    Path | None,
    typer.Option("--from", metavar="RUN", help="Copy SFT and reward of a run, if they match."),
]
Warm = Annotated[
    bool,
    typer.Option(
        "--warm-start", help="Restart the interrupted stage from its adapters; not an exact resume."
    ),
]
Redo = Annotated[
    str | None,
    typer.Option("--redo", metavar="STAGE", help="Drop a stage and the later ones; run them."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RepoId = Annotated[str | None, typer.Option(metavar="ORG/NAME")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        shell.echo(f"lora-rlhf {version('lora-rlhf')}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it and stop."),
    ] = False,
) -> None:
    """InstructGPT-style RLHF on one GPU: SFT, a reward model and PPO as LoRA on one backbone.

    Start with `lora-rlhf demo`: the whole pipeline on a packaged model, offline, in minutes.
    """
    global _debug
    _debug = debug


_MAY_BE_PATHS = frozenset(
    "targets files base model suite against judge judges labels moderation run".split()
)
"""Parameters of text that may be a path."""


def _at_home(name: str, value: Any) -> Any:
    """Return an argument with its paths expanded; other text stays as it is."""
    if isinstance(value, list):
        return [_at_home(name, one) for one in value]
    if isinstance(value, Path):
        return home.given(value)
    return home.expanded(value) if isinstance(value, str) and name in _MAY_BE_PATHS else value


def command(
    name: str, group: typer.Typer = app
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a verb whose errors become a message and an exit code."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            with shell.errors_as_text(_debug), shell.signals_raise():
                quiet.loud = _debug
                if not _debug:
                    quiet.process()
                if name not in _SHARED:
                    launch.refuse(f"`{name}`")
                function(*args, **{k: _at_home(k, value) for k, value in kwargs.items()})

        group.command(name)(guarded)
        return guarded

    return register
