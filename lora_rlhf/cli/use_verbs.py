# SPDX-License-Identifier: Apache-2.0
"""Verbs that use a trained run: answers, chat, templates, server, export."""

from __future__ import annotations

from typing import Annotated

import typer

from . import shell
from .command_group import RunPath, command


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
