# SPDX-License-Identifier: Apache-2.0
"""Rank the answers in a file by a run's reward model, with what is known about its accuracy."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_rlhf.runtime import optional_packages  # noqa: F401  # isort: skip
from lora_rlhf.data import sources
from lora_rlhf.data.filters import breaker
from lora_rlhf.data.tokenization import Turns
from lora_rlhf.errors import DataError, UsageError
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.models.scoring import Episode
from lora_rlhf.reports import tables
from lora_rlhf.runs.disk import make_place, write_atomically
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import quiet
from lora_rlhf.training.reward import ensemble, reward_stage

_SHAPE = '{"prompt": text or messages, "answers": [texts]}, or {"prompt": …, "answer": text}'
_ROLES = ("system", "user", "assistant")
_SHOWN = 60


@dataclass
class _Prompt:
    """A prompt with its answers, each with the line that has it."""

    where: str
    turns: Turns
    answers: list[tuple[str, str]] = field(default_factory=list)


@quiet.libraries()
def score(
    run: str | Path,
    file: str | Path,
    *,
    out: str | Path | None = None,
    batch_size: int = 32,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Score and rank answers by the reward model of a run.

    Args:
        file: JSON Lines: a prompt and its answers each, or one answer; `-` is standard input.
        out: JSON Lines to write: one for each answer, in the order of the file.
        say: Called with a line where memory runs out, or an answer gets no score.

    Returns:
        `answers` (`prompt` number from 1, `where`, `rank`, `reward`, `text`; `std` over the members
        of an ensemble; `note` where there is no score), `accuracy` of the reward model on held-out
        comparisons (None if it was not judged), `gate`, and `members`.

    Raises:
        UsageError: The run has no reward model.
        DataError: A line is not as it should be.
    """
    if out is not None and Path(out).resolve() == Path(file).resolve():
        raise UsageError(f"{out} is the file of answers", expected="another file to write")
    if out is not None:
        make_place(Path(out))
    record = Record.read(run)
    stage = record.data["stages"].get("reward", {})
    if not record.done("reward") or "adapter_sha256" not in stage:
        raise UsageError(
            f"{record.folder} has no reward model", expected="a run whose stage `reward` is done"
        )
    prompts = list(_read(str(file)))
    recipe = record.recipe()
    backbone = Backbone.load(record.model_section(recipe), recipe.lora)
    backbone.backoff.say = say  # type: ignore[assignment]
    reward_stage.load(backbone, record)
    rows = _scored(backbone, prompts, recipe.reward, batch_size)
    for row in rows:
        if "note" in row:
            say(f"{row['where']}: no score: {row['note']}")
    report = {
        "run": str(record.data.get("name", "run")),
        "accuracy": stage.get("accuracy"),
        "gate": stage.get("gate"),
        "members": len(ensemble.roles(recipe.reward)),
        "answers": rows,
    }
    if out is not None:
        write_atomically(Path(out), "".join(json.dumps(row) + "\n" for row in rows))
    return report


def _read(name: str) -> Iterator[_Prompt]:
    """Read the prompts of a file; rows of one prompt and one answer are joined."""
    if name == "-":
        name, text = "standard input", _standard_input()
    else:
        text = sources.whole_text(Path(name))
    joined: dict[str, _Prompt] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {error}", where=where, expected=_SHAPE) from None
        prompt, answers = _row(where, row)
        key = json.dumps(prompt)
        known = joined.setdefault(key, _Prompt(where, prompt))
        known.answers += [(where, answer) for answer in answers]
    if not joined:
        raise DataError("it holds no rows", where=name, expected=_SHAPE)
    kinds = {isinstance(prompt.turns, str) for prompt in joined.values()}
    for each in joined.values() if len(kinds) > 1 else ():
        if isinstance(each.turns, str):  # one layout for the tokenizer
            each.turns = [{"role": "user", "content": each.turns}]
    yield from joined.values()


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}", where="standard input") from None


def _row(where: str, row: Any) -> tuple[Turns, list[str]]:
    """Check a line; return its prompt and its answers."""

    def refuse(what: str) -> DataError:
        return DataError(f"{what}: {sources.excerpt(row)}", where=where, expected=_SHAPE)

    if not isinstance(row, dict):
        raise refuse("not an object")
    if ("answers" in row) == ("answer" in row):
        raise refuse("it needs one of answers and answer")
    answers = row["answers"] if "answers" in row else [row["answer"]]
    if not isinstance(answers, list) or not answers:
        raise refuse("answers is not a list with at least one text")
    prompt: Any = row.get("prompt")
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    good = bool(turns) and all(
        isinstance(turn, dict)
        and turn.keys() == {"role", "content"}
        and turn["role"] in _ROLES
        and isinstance(turn["content"], str)
        for turn in turns
    )
    if not good:
        raise refuse("prompt is neither a text nor a list of messages with role and content")
    if not all(isinstance(answer, str) for answer in answers):
        raise refuse("an answer is not a text")
    for text in (*answers, *(str(turn["content"]) for turn in turns)):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise refuse("a text holds half of a character (a lone surrogate)") from None
    return prompt, answers


def _scored(
    backbone: Backbone, prompts: Sequence[_Prompt], section: Any, batch_size: int
) -> list[dict[str, Any]]:
    """Score all answers that fit the context, and rank those of each prompt."""
    context = getattr(backbone.causal.config.get_text_config(), "max_position_embeddings", None)
    plain, chat = breaker(backbone.tokenizer), bool(backbone.tokenizer.chat_template)
    rows: list[dict[str, Any]] = []
    episodes: list[Episode] = []
    fitting: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts, start=1):
        ids = _prompt_ids(backbone, prompt, plain, chat)
        for where, answer in prompt.answers:
            row: dict[str, Any] = {"prompt": number, "where": where, "rank": None, "reward": None}
            row["text"] = answer
            rows.append(row)
            episode = ids, backbone.encode_completion(answer)
            tokens = len(episode[0]) + len(episode[1])
            if context is not None and tokens > context:
                row["note"] = f"{tokens} tokens with the prompt, and the context has {context}"
                continue
            episodes.append(episode)
            fitting.append(row)
    given = ensemble.scores(backbone, episodes, section, batch_size) if episodes else ([], [])
    for row, reward, std in zip(fitting, *given, strict=True):
        row["reward"] = round(reward, 6)
        if len(ensemble.roles(section)) > 1:
            row["std"] = round(std, 6)
    for row in fitting:  # equal rewards share a rank
        beside = [other["reward"] for other in fitting if other["prompt"] == row["prompt"]]
        row["rank"] = 1 + sum(reward > row["reward"] for reward in beside)
    return rows


def _prompt_ids(
    backbone: Backbone, prompt: _Prompt, plain: Callable[[str], str], chat: bool
) -> list[int]:
    turns: Any = prompt.turns
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}] if chat else plain(turns)
    elif not chat:
        raise DataError(
            "the prompt is messages, and the base has no chat template",
            where=prompt.where,
            expected="a prompt of text",
        )
    if chat:
        turns = [{**turn, "content": plain(turn["content"])} for turn in turns]
    try:
        return backbone.encode_prompt(turns)
    except Exception as error:  # whatever a template raises
        raise DataError(
            f"the chat template refuses the prompt: {error}", where=prompt.where
        ) from None


def lines(report: dict[str, Any]) -> Iterator[str]:
    """Write a report as text: the best answer of each prompt first."""
    spread = report["members"] > 1
    order = sorted(
        report["answers"], key=lambda r: (r["prompt"], r["rank"] or len(r["where"]) + 99)
    )
    table = []
    for row in order:
        text = " ".join(row["text"].split())
        cut = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
        reward = "no score" if row["reward"] is None else f"{row['reward']:.3f}"
        std = [f"{row['std']:.3f}" if "std" in row else ""] if spread else []
        table.append([str(row["prompt"]), str(row["rank"] or ""), reward, *std, cut])
    yield from tables.aligned(["prompt", "rank", "reward", *["std"] * spread, "answer"], table)
    yield ""
    if accuracy := report["accuracy"]:
        yield (
            f"This reward model prefers the better of two held-out answers in "
            f"{accuracy['value']:.1%} of {accuracy['n']} comparisons "
            f"[{accuracy['low']:.1%}, {accuracy['high']:.1%}]"
            + ("." if report["gate"] == "passed" else f"; its gate: {report['gate']}.")
        )
    else:
        yield "How often this reward model is right was not measured."
    if spread:
        yield f"std: the standard deviation over the {report['members']} members of the ensemble."
