# SPDX-License-Identifier: Apache-2.0
"""What is taken out of a set before anybody trains on it, each kind counted by name.

Order: control tokens are broken, rankings become pairs, then ties, equal pairs, empty texts,
duplicates, labels both ways, and whatever the chat template refuses or a token limit excludes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lora_rlhf import redaction
from lora_rlhf.errors import DataError, first_line
from lora_rlhf.recipe.schema import Recipe

from . import chat_template, tokenization
from .row_formats import Example, Turns, text_of, transcript
from .sources import Skips

_JOINT = "\u200b"  # zero-width space: breaks a control token's spelling, and nobody sees it
_BATCH = 1_000

SECRET = "the text holds what looks like"
"""How a note about a secret begins; a run says it aloud."""


@dataclass
class Kept:
    """The rows of one set that are still there, and the count of those that are not.

    A row is a dict: `prompt`, `item` ("" without a task), and `completion`, or `chosen`,
    `rejected`, `group` and perhaps `margin`.
    """

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    special: int = 0
    lines: int = 0
    lost: int = 0
    agreement: dict[str, Any] | None = None
    instructions: list[str] = field(default_factory=list)

    def filter(
        self, reason: str, rows: list[dict[str, Any]], good: Callable[[dict[str, Any]], bool]
    ) -> list[dict[str, Any]]:
        """The good rows; how many there were before and after is kept under `reason`."""
        left = [row for row in rows if good(row)]
        self.counts[reason] = {"before": len(rows), "after": len(left)}
        return left

    def broken(self, skips: Skips, lines: int) -> None:
        """Count the rows of a source that were left out because they are broken.

        Args:
            lines: That the source has, with those that could not be read.
        """
        self.lines += lines
        self.lost += len(skips.seen)
        if skips.seen:
            where = skips.seen[0].where.rpartition(os.sep)[2]
            note = f"broken and left out (skip_bad), the first at {where}"
            self.notes[note] += len(skips.seen)
        if self.lost:
            self.counts["broken"] = {"before": self.lines, "after": self.lines - self.lost}

    def report(self) -> dict[str, Any]:
        """All of it, as plain JSON."""
        found = {
            "sources": self.sources,
            "counts": self.counts,
            "special_tokens_in_text": self.special,
            "notes": [f"{note} ({n} rows)" for note, n in self.notes.items()],
        }
        if self.agreement:
            found["labeler_agreement"] = self.agreement
        if self.instructions:
            found["instructions"] = " / ".join(dict.fromkeys(self.instructions))
        return found

    def table(self) -> str:
        """The counts as lines of text, for an error; what changed nothing is left out."""
        steps = [(reason, n) for reason, n in self.counts.items() if n["after"] != n["before"]]
        return "".join(f"\n  {reason}: {n['before']} -> {n['after']}" for reason, n in steps)


def bucket(prompt: Turns, seed: int) -> float:
    """A number in [0, 1) from the seed and the first user turn, letter case and spaces aside.

    The same on every machine and in every set. Below `data.held_out`, a row is held out.
    """
    digest = hashlib.sha256(f"{seed}\n{prompt_key(prompt)}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def first_turn(prompt: Turns) -> str:
    """What the user said first: in messages, in a transcript, or else the whole text."""
    turns = transcript(prompt) if isinstance(prompt, str) else prompt
    if turns is None:
        return str(prompt)
    return next((turn["content"] for turn in turns if turn["role"] == "user"), text_of(turns))


def prompt_key(prompt: Turns) -> str:
    """The first user turn, letter case, spaces and compatibility forms aside."""
    text = unicodedata.normalize("NFKC", first_turn(prompt).replace(_JOINT, "")).casefold()
    return " ".join(text.split())


def breaker(tokenizer: Any) -> Callable[[str], str]:
    """A function that breaks control tokens, and the marks of turns, that stand in a text.

    A zero-width space after the first character does it, whoever tokenises later: a chat template
    and its content are one string by then.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    # `### Answer:` is no token: it is what the chat template writes where another turn begins.
    special.update(chat_template.markers(tokenizer))
    words = sorted((re.escape(word) for word in special if len(word) > 1), key=len, reverse=True)
    control = re.compile("|".join(words) or r"(?!)")
    return lambda text: control.sub(lambda match: match[0][0] + _JOINT + match[0][1:], text)


def neutralise(kept: Kept, found: list[Example], tokenizer: Any) -> None:
    """Break control tokens that stand in the texts, so that they are encoded as text; count them.

    An eos at the very end of an answer is taken away, since trainers add their own. What looks
    like a secret is left as it is, and counted.
    """
    broken, eos = breaker(tokenizer), tokenizer.eos_token

    def mend(turns: Turns, answer: bool) -> Turns:
        if isinstance(turns, str):
            return broken(turns.removesuffix(eos) if answer and eos else turns)
        return [{**turn, "content": str(mend(turn["content"], answer))} for turn in turns]

    for example in found:
        before = _JOINT.join(text_of(turns) for turns in (example.prompt, *example.answers))
        example.prompt = mend(example.prompt, False)
        example.answers = [mend(answer, True) for answer in example.answers]
        after = _JOINT.join(text_of(turns) for turns in (example.prompt, *example.answers))
        kept.special += after.count(_JOINT) > before.count(_JOINT)
        for kind in redaction.found(before):
            kept.notes[f"{SECRET} {kind}; take it out, or a model learns it by heart"] += 1
    if kept.special:
        note = "control tokens of the tokenizer in the text were broken by a zero-width space"
        kept.notes[note] += kept.special


def expand(found: list[Example], name: str, kept: Kept) -> list[dict[str, Any]]:
    """The examples as rows of the set: rankings become all their strict pairs, ties are counted."""
    groups: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    pairs = 0
    for example in found:
        row: dict[str, Any] = {"prompt": example.prompt, "item": example.item}
        ranks = example.ranks or [0.0] * len(example.answers)
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
        if name == "prompts":
            rows.append(row)
        elif name == "demonstrations":
            best: Turns = example.answers[order[0]] if order else ""
            if not isinstance(best, str):  # turns before the last one are part of the question
                row["prompt"], best = [*row["prompt"], *best[:-1]], best[-1:]
            rows.append({**row, "completion": best})
        else:
            row["group"] = groups.setdefault(json.dumps(example.prompt), len(groups))
            for a, b in itertools.combinations(order, 2):
                pairs += 1
                if ranks[a] < ranks[b]:
                    pair = {"chosen": example.answers[a], "rejected": example.answers[b]}
                    rows.append({**row, **pair, "margin": example.margin})
    if name == "comparisons":
        kept.counts["expanded to pairs"] = {"before": len(found), "after": pairs}
        kept.counts["ties"] = {"before": pairs, "after": len(rows)}
        if any(row["margin"] is None for row in rows):
            if any(row["margin"] is not None for row in rows):
                kept.notes["margin left out: not every row has one"] += len(rows)
            for row in rows:
                del row["margin"]
    return rows


def clean(kept: Kept) -> None:
    """Drop and count what teaches nothing or the wrong thing."""
    rows = kept.rows
    if kept.name == "comparisons":
        rows = kept.filter("chosen equal to rejected", rows, lambda r: r["chosen"] != r["rejected"])

    def asks(row: dict[str, Any]) -> bool:
        prompt = row["prompt"]
        last = isinstance(prompt, str) or (prompt and prompt[-1]["role"] in ("user", "tool"))
        return bool(last and first_turn(prompt).strip() and text_of(prompt).strip())

    rows = kept.filter("no prompt, or none that ends with a question", rows, asks)
    if kept.name == "demonstrations":
        rows = kept.filter(
            "empty completion", rows, lambda r: bool(text_of(r["completion"]).strip())
        )
    if kept.name == "comparisons":

        def answered(row: dict[str, Any]) -> bool:
            # A sampled empty answer is a thing that the policy does; in a file it is a gap.
            rejected = row["item"] or text_of(row["rejected"]).strip()
            return bool(text_of(row["chosen"]).strip() and rejected)

        rows = kept.filter("empty chosen or rejected", rows, answered)
    texts = [
        key for key in ("prompt", "completion", "chosen", "rejected") if rows and key in rows[0]
    ]
    seen: set[str] = set()

    def new(row: dict[str, Any]) -> bool:
        mark = json.dumps([row[key] for key in texts])
        fresh = mark not in seen
        seen.add(mark)
        return fresh

    rows = kept.filter("duplicate", rows, new)
    if kept.name == "comparisons":
        backwards = {json.dumps([row["prompt"], row["rejected"], row["chosen"]]) for row in rows}

        def undisputed(row: dict[str, Any]) -> bool:
            return json.dumps([row["prompt"], row["chosen"], row["rejected"]]) not in backwards

        rows = kept.filter("labelled both ways", rows, undisputed)
    kept.rows = rows


def fit(kept: Kept, recipe: Recipe, tokenizer: Any) -> None:
    """Drop and count rows over the token limits: of the ids that a stage will learn from.

    The chat template's own tokens and the eos that ends a completion are among them.

    Raises:
        DataError: More than `data.max_lost` of the rows are too long.
    """
    name = "max_prompt_tokens" if kept.name in ("prompts", "evaluate") else "max_tokens"
    limit = getattr(recipe.data, name)
    for batch in (kept.rows[i : i + _BATCH] for i in range(0, len(kept.rows), _BATCH)):
        sizes = _prompt_sizes(kept, batch, tokenizer)
        answers = [0] * len(batch)
        for column in ("completion", "chosen", "rejected"):
            if column in batch[0]:
                ids = tokenization.completion_ids(tokenizer, [_last(row[column]) for row in batch])
                answers = [max(n, len(i) + 1) for n, i in zip(answers, ids, strict=True)]
        for row, prompt, answer in zip(batch, sizes, answers, strict=True):
            row["_tokens"] = prompt + answer
    known = "refused by the chat template"
    rows = kept.filter(known, kept.rows, lambda row: row["_tokens"] < math.inf)
    reason = f"over data.{name} = {limit}"
    kept.rows = kept.filter(reason, rows, lambda row: row["_tokens"] <= limit)
    lost = 1 - len(kept.rows) / len(rows) if rows else 0.0
    if lost > recipe.data.max_lost:
        middle = sorted(row["_tokens"] for row in rows)[len(rows) // 2]
        raise DataError(
            f"of the {kept.name}, {lost:.0%} of the rows are {reason}" + kept.table(),
            expected=f"at most {recipe.data.max_lost:.0%} (data.max_lost); half of the rows have "
            f"up to {middle:.0f} tokens, the longest {max(row['_tokens'] for row in rows):.0f}",
            remedy=f"raise data.{name}, or set data.max_lost to {math.ceil(lost * 100) / 100:g} to "
            "do without them",
        )


def _prompt_sizes(kept: Kept, batch: list[dict[str, Any]], tokenizer: Any) -> list[float]:
    """Tokens of each row's prompt; without end where the chat template refuses it."""

    def size(prompts: list[Turns]) -> list[float]:
        return [len(ids) for ids in tokenization.prompt_ids(tokenizer, prompts)]

    try:
        return size([row["prompt"] for row in batch])
    except Exception:  # a template raises what it likes, at some of them: find out which
        found: list[float] = []
        for row in batch:
            try:
                found += size([row["prompt"]])
            except Exception as error:
                kept.notes[f"the chat template refuses: {first_line(error)}"] += 1
                found.append(math.inf)
        return found


def _last(answer: Turns) -> str:
    """The text that a completion's ids are those of."""
    return answer if isinstance(answer, str) else answer[-1]["content"]
