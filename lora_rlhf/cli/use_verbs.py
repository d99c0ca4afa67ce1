# SPDX-License-Identifier: Apache-2.0
"""Verbs that use a trained run: answers, chat, templates, server, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import shell
from .command_group import Json, RunPath, command


@command("generate")
def _generate_verb(
    run: RunPath,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The prompt.")],
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy decoding.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: as in the rollouts.")
    ] = None,
) -> None:
    """Answer a prompt with base, SFT and policy side by side.

    With the reward of each answer, if the run has a reward model.
    """
    from lora_rlhf.runs.record import Record

    Record.read(run)  # refuses a wrong folder before the slow imports
    loaded = shell.room("serving.loaded_run")
    from lora_rlhf.reports import tables

    tables.show_answers(
        loaded.generate(
            run, text, temperature=temperature, seed=seed, max_new_tokens=max_new_tokens
        )
    )
    shell.say_ignored()


Targets = Annotated[
    list[str],
    typer.Argument(metavar="TARGET...", help="Runs, RUN:policy, adapters and models, of one base."),
]
UsageFile = Annotated[
    Path, typer.Option("--usage", metavar="FILE", help="File for numbers of use, and thumbs.")
]
NoUsage = Annotated[bool, typer.Option("--no-usage", help="Keep neither numbers nor thumbs.")]
ModerationFile = Annotated[
    str, typer.Option(metavar="FILE", help="A policy file, default, or off.")
]


@command("serve")
def _serve_verb(
    targets: Targets,
    host: Annotated[
        str, typer.Option(help="0.0.0.0 lets other machines in; needs LORA_RLHF_API_KEY.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    base: Annotated[
        str | None, typer.Option(help="Base of adapters whose config names none.")
    ] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit")] = False,
    usage: UsageFile = Path("lora-rlhf-usage.sqlite"),
    no_usage: NoUsage = False,
    moderation: ModerationFile = "default",
    moderation_log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Decisions as JSON Lines, without texts.")
    ] = None,
    body: Annotated[int, typer.Option("--max-body", min=1, help="Bytes of a request.")] = 1_000_000,
    prompt: Annotated[
        int | None, typer.Option("--max-prompt-tokens", min=1, help="Default: the context.")
    ] = None,
    answer: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Longest answer; default: the context."),
    ] = None,
    queue: Annotated[
        int, typer.Option("--max-queue", min=1, help="Requests in work and waiting; then 429.")
    ] = 64,
    seconds: Annotated[
        float, typer.Option("--max-seconds", min=0.1, help="For one request; then 503.")
    ] = 300.0,
    drain: Annotated[
        float, typer.Option("--drain-seconds", min=0.0, help="For running requests at the end.")
    ] = 30.0,
) -> None:
    """Serve base, SFT, policy and adapters: the chat-completions API.

    On this machine only, with a key: LORA_RLHF_API_KEY, or a new one that is printed. A signal lets
    running requests end; a second one stops at once.
    """
    server = shell.room("serving.api_server")
    limits = server.Limits(body, prompt, answer, queue, seconds, drain)
    made = server.serve(
        *targets,
        host=host,
        port=port,
        base=base,
        load_in_4bit=load_in_4bit,
        usage=None if no_usage else usage,
        moderation=moderation,
        moderation_log=moderation_log,
        limits=limits,
    )
    for line in made.lines():
        shell.echo(line)
    made.run()


@command("usage")
def _usage_verb(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="The --usage of chat, do or serve.")
    ] = Path("lora-rlhf-usage.sqlite"),
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two models to compare; default: if there are two."),
    ] = None,
    as_json: Json = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Plot the numbers as a PNG.")
    ] = None,
) -> None:
    """Report the use of models: requests, times, tokens, blocked, thumbs.

    For each adapter and version, with 95 % intervals, from the file of chat, do and serve.
    """
    import json

    from lora_rlhf.serving import usage_report

    report = usage_report.report(path, compare)
    if plot is not None:
        from lora_rlhf.reports import plots

        plots.usage(report, plot)
        shell.echo(f"plot: {plot}", err=True)
    if as_json:
        shell.echo(json.dumps(report, indent=1))
    else:
        from lora_rlhf.reports import tables

        tables.show_usage(report)


@command("moderate")
def _moderate_verb(
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="None: show the policy.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: the packaged policy.")
    ] = None,
    where: Annotated[str, typer.Option(help="prompt, history or answer.")] = "prompt",
    prompt: Annotated[str, typer.Option(help="The question, for answers.")] = "",
) -> None:
    """Show a moderation policy with its measured errors, or its decisions on texts."""
    moderation = shell.room("serving.moderation")
    if not texts:
        for line in moderation.Moderation.load(policy).page():
            shell.echo(line)
    for decision in moderation.moderate(texts or (), policy, where=where, prompt=prompt):
        shell.echo(f"{decision.action}  {decision.reason}")
