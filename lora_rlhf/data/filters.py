# SPDX-License-Identifier: Apache-2.0
"""Filter a set before training, and count the rows that each filter drops.

The order: break control tokens, turn rankings into pairs, drop ties, equal pairs, empty texts,
duplicates and contradictions, then rows that the chat template refuses or that are too long.
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
from dataclasses import dataclass, field, replace
from typing import Any

from lora_rlhf import redaction
from lora_rlhf.errors import DataError, counted, first_line
from lora_rlhf.recipe.schema import Recipe

from . import chat_template, tokenization, tool_calls
from .row_formats import Example, text_of, transcript
from .sources import Skips, excerpt
from .tokenization import Turns, split_alike

_JOINT = "\u200b"  # a zero-width space, which breaks a control token's spelling invisibly
_BATCH = 1_000
_SHOWN = 16  # prompts of a batch that show if the tokenizer changes some
_COMPARED = 64  # conversations of a set whose ids are compared with those of the whole text

REFUSES = "the chat template refuses"
"""The beginning of a note with the reason why a chat template refuses rows."""

_PARTS = ("prompt", "completion", "chosen", "rejected")
_NO_VALUE = frozenset("nan NaN <NA> #N/A #NAME? #NULL! #NUM! #REF! #VALUE! #DIV/0!".split())
"""Texts that programs write for an empty cell of a table, or for a formula that failed."""

_ENOUGH_PAIRS, _ONE_LENGTH = 20, 0.95  # pairs, and their share with the longer answer chosen

_INTENDED = ("limit", "broken", "label is false", "expanded to pairs", "ties")
"""Counts of rows that the recipe leaves out, and of pairs without a winner."""

_EARLIER = (
    "answers before the last one of a conversation are its context, and are not trained on; to "
    "train on each, give each a row that ends with it"
)

SECRET = "the text holds what looks like"
"""The beginning of a note about a secret; a run warns of these notes."""


@dataclass
class FilteredSet:
    """The remaining rows of one set, and the counts of dropped rows.

    A row is a dict: `prompt`, `item` ("" without a task), and `completion`, or `chosen`,
    `rejected`, `group` and perhaps `margin`. `tokens`: lengths of rows before the longest are cut.
    `dropped`: the first row that each filter dropped.
    """

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    special: int = 0
    changed: str = ""
    changed_prompt: str = ""
    lines: int = 0
    broken: int = 0
    agreement: dict[str, Any] | None = None
    instructions: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    tokens: list[float] = field(default_factory=list)
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)

    def filter(
        self, reason: str, rows: list[dict[str, Any]], good: Callable[[dict[str, Any]], bool]
    ) -> list[dict[str, Any]]:
        """Return the good rows, and count rows before and after under `reason`."""
        left = []
        for row in rows:
            if good(row):
                left.append(row)
            else:
                self.dropped.setdefault(reason, row)
        self.counts[reason] = {"before": len(rows), "after": len(left)}
        return left

    def count_broken(self, skips: Skips, lines: int) -> None:
        """Count the broken rows that were left out of a source with this many lines."""
        self.lines += lines
        self.broken += len(skips.seen)
        if skips.seen:
            where = skips.seen[0].where.rpartition(os.sep)[2]
            note = f"broken and left out (skip_bad), the first at {where}"
            self.notes[note] += len(skips.seen)
        if self.broken:
            self.counts["broken"] = {"before": self.lines, "after": self.lines - self.broken}

    def report(self) -> dict[str, Any]:
        """Return sources, counts and notes as plain JSON."""
        report = {
            "sources": self.sources,
            "read_as": list(self.layouts),
            "rows": self.lines,
            "counts": self.counts,
            "special_tokens_in_text": self.special,
            "notes": [f"{note} ({counted(n, 'row')})" for note, n in self.notes.items()],
        }
        if self.agreement:
            report["labeler_agreement"] = self.agreement
        if self.instructions:
            report["instructions"] = " / ".join(dict.fromkeys(self.instructions))
        return report | self.more

    def first(self, reason: str) -> str:
        """Return the first row that a filter dropped, with its place, as a line of an error."""
        row = self.dropped.get(reason)
        if not row or not row.get("_where"):
            return ""
        parts = (f"{k}: {excerpt(text_of(row[k]), 60)}" for k in _PARTS if k in row)
        return f"\n  {row['_where'].rpartition(os.sep)[2]}: {'; '.join(parts)}"

    def table(self) -> str:
        """Return the counts of filters that dropped rows, as lines of an error."""
        steps = [(reason, n) for reason, n in self.counts.items() if n["after"] != n["before"]]
        return "".join(f"\n  {reason}: {n['before']} -> {n['after']}" for reason, n in steps)


def bucket(prompt: Turns, seed: int) -> float:
    """Return a number in [0, 1) from the seed and the first user turn; see `prompt_key`.

    The same on every machine and in every set. Below `data.held_out`, a row is held out.
    """
    digest = hashlib.sha256(f"{seed}\n{prompt_key(prompt)}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def first_turn(prompt: Turns) -> str:
    """Return the first user turn of messages or of a transcript, otherwise the whole text."""
    turns = transcript(prompt) if isinstance(prompt, str) else prompt
    if turns is None:
        return str(prompt)
    return next((turn["content"] for turn in turns if turn["role"] == "user"), text_of(turns))


def prompt_key(prompt: Turns) -> str:
    """Return the first user turn, normalised: letter case, spaces and compatibility forms."""
    return normalised(first_turn(prompt))


def normalised(text: str) -> str:
    """Return a text without differences of letter case, spaces and compatibility forms."""
    return " ".join(unicodedata.normalize("NFKC", text.replace(_JOINT, "")).casefold().split())


def breaker(tokenizer: Any) -> Callable[[str], str]:
    """Return a function that puts a zero-width space into control tokens and turn markers.

    Encoding them as text later would not suffice: a rendered chat template is one string.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    # `### Answer:` is not a token, but a chat template may begin a turn with it, on a line's start.
    words, lines = (
        "|".join(sorted((re.escape(word) for word in each if len(word) > 1), key=len, reverse=True))
        for each in (special, chat_template.markers(tokenizer))
    )
    control = re.compile(f"{words or '(?!)'}|^(?:{lines or '(?!)'})", re.MULTILINE)
    return lambda text: control.sub(lambda match: match[0][0] + _JOINT + match[0][1:], text)


_SIGNS = (
    (0.0, "\ufffd", "characters were lost when the text was converted (\ufffd)"),
    (0.0, "[\u00c2\u00c3][\x80-\xbf]|\u00e2(?:\u20ac|\x80).",
     "the text looks decoded wrongly, as \u00c3\u00a9 for \u00e9"),
    (0.0, "\r", "the text has line breaks of Windows or of an old Mac (\\r)"),
    (0.0, "_x000[DdAa]_", "the text holds _x000D_, as Excel writes line breaks"),
    (0.0, r"\[object Object\]", "the text holds [object Object], as JavaScript writes a value"),
    (0.1, r"(?:\A|\u200b)b(['\"])[^\u200b]*\1(?:\Z|\u200b)", "the text is Python's b'..'"),
    (0.1, r"(?:\A|\u200b)\['[^\u200b]*'\](?:\Z|\u200b)", "the text is Python's ['..']"),
    (0.1, r"\u200b(?:None|null|NULL|undefined)(?:\Z|\u200b)", "the answer is None, an empty cell"),
    (0.3, r"\{\{? ?(?:question|prompt|input|instruction|query|context|text) ?\}",
     "the text holds a name in braces, such as {question}, in the place of a value"),
    (0.1, r"&(?:amp|lt|gt|quot|nbsp|#\d{2,4});", "the text holds HTML entities, such as &amp;"),
    (0.1, r"\A(?=[^\n]*\Z).*\\n(?![a-z])",  # code has line breaks too, and LaTeX \nabla
     r"the text holds \n in the place of line breaks"),
)  # fmt: skip
"""Share of the rows above which a sign of a faulty conversion is noted, the sign, the note."""

_CUT_LENGTH, _CUT_SHARE = 50, 0.1


def note_damage(kept: FilteredSet, examples: list[Example]) -> None:
    """Note signs that a program converted or cut the texts of files; they stay as they are."""
    texts = [
        _JOINT.join(text_of(turns) for turns in (one.prompt, *one.answers))
        for one in examples
        if not one.item
    ]
    for share, sign, what in _SIGNS:
        rows = sum(bool(re.search(sign, text)) for text in texts)
        if rows > share * len(texts):
            kept.notes[f"{what}, and is trained on as it is"] += rows
    answers = {text_of(a) for one in examples if not one.item for a in one.answers}
    longest = max(map(len, answers), default=0)
    cut = sum(len(answer) == longest for answer in answers)
    if longest >= _CUT_LENGTH and cut > max(2, _CUT_SHARE * len(answers)):
        kept.notes[f"answers have exactly {longest:,} characters, as if they were cut there"] += cut


def break_control_tokens(kept: FilteredSet, examples: list[Example], tokenizer: Any) -> None:
    """Break control tokens in prompts, so that they are encoded as text, and count the rows.

    Answers stay as they are, because they are encoded as text apart from the template; an eos that
    ends one is removed, since trainers add their own, and a bos before a prompt. Apparent secrets
    are kept and counted.
    """
    broken, eos, bos = breaker(tokenizer), tokenizer.eos_token, tokenizer.bos_token

    def cleaned(turns: Turns) -> Turns:
        if isinstance(turns, str):
            return broken(turns)
        keys = ("content", *tool_calls.TURN_KEYS)
        return [{k: broken(v) if k in keys else v for k, v in turn.items()} for turn in turns]

    def ended(answer: Turns) -> Turns:
        if isinstance(answer, str):
            return answer.removesuffix(eos) if eos else answer
        last = {**answer[-1], "content": str(ended(answer[-1]["content"]))}
        return [*cleaned(answer[:-1]), last]  # earlier turns belong to the prompt

    for example in examples:
        if bos and isinstance(example.prompt, str) and example.prompt.startswith(bos):
            example.prompt = example.prompt.removeprefix(bos)
            kept.notes[f"prompts began with {bos}, which was removed: the tokenizer writes it"] += 1
        before = _JOINT.join(text_of(turns) for turns in (example.prompt, *example.answers))
        example.prompt = cleaned(example.prompt)
        example.answers = [ended(answer) for answer in example.answers]
        after = _JOINT.join(text_of(turns) for turns in (example.prompt, *example.answers))
        kept.special += after.count(_JOINT) > before.count(_JOINT)
        for kind in redaction.count_secrets(before):
            kept.notes[f"{SECRET} {kind}; take it out, or a model learns it by heart"] += 1
    if kept.special:
        note = "control tokens of the tokenizer in the text were broken by a zero-width space"
        kept.notes[note] += kept.special


def check_written(
    kept: FilteredSet, examples: list[Example], tokenizer: Any, max_lost: float
) -> None:
    """Note conversations of which the chat template does not write every turn, or stop.

    That is a property of the template and of the roles, or of long texts, so some rows show it.

    Raises:
        DataError: More than `max_lost` of the examples have such a turn.
    """
    given = [one for one in examples if isinstance(one.prompt, list) and not one.item]
    roles: dict[tuple[str, ...], Example] = {}
    for one in given:
        turns: list[Any] = [*one.prompt]
        roles.setdefault(tuple(turn["role"] for turn in turns), one)
    longest = sorted(given, key=lambda one: -len(text_of(one.prompt)))[:8]
    some = [*given[:_COMPARED], *[*roles.values()][:_COMPARED], *longest]
    if not any(chat_template.unwritten(tokenizer, one.prompt) for one in some):
        return
    lost = [
        (one, turn) for one in given if (turn := chat_template.unwritten(tokenizer, one.prompt))
    ]
    (first, turn), share = lost[0], len(lost) / len(given)
    problem = f"the chat template leaves out or changes what the {turn['role']} says, such as "
    problem += repr(excerpt(turn["content"], 60))
    if share <= max_lost:
        kept.notes[problem] += len(lost)
        return
    remedy = "use a base whose template writes every turn"
    if turn["role"] == "system":
        remedy = f"write it into the first turn of the user, or {remedy}"
    raise DataError(
        f"{problem} ({share:.0%} of the {kept.name})",
        where=first.where,
        expected=f"a template that writes each turn, for all but {max_lost:.0%} of the rows "
        "(data.max_lost)",
        remedy=f"{remedy}; data.max_lost: {math.ceil(share * 100) / 100:g} trains without",
    )


def follow_template(kept: FilteredSet, examples: list[Example], tokenizer: Any) -> None:
    """Make answers the text that the chat template writes after its generation prompt.

    Prompt and answer, encoded apart, then equal the template's text of the whole conversation: a
    template may begin answers with a space, trim them, or put reasoning into <think>. Where their
    ids differ from those of the whole text, it is noted.
    """
    if not any(isinstance(example.prompt, list) for example in examples):
        return
    tail, untrained = chat_template.tail(tokenizer), Counter[str]()
    for example in examples:
        changed = set()
        for answer in example.answers:
            if isinstance(answer, str) or answer[-1]["role"] != "assistant":
                continue
            turns = [*example.prompt, *answer]
            if any(key in turn for turn in turns for key in tool_calls.TURN_KEYS):
                text, why = tool_calls.rendered(tokenizer, turns, tail)
                untrained.update([why] if why else [])
                if text:
                    answer[-1] = {"role": "assistant", "content": text}
                    changed.add("tool calls are trained as the chat template writes them")
                if text or why:
                    continue
            given = answer[-1]["content"]
            written, how = chat_template.continuation(tokenizer, turns, tail)
            if written != given:
                answer[-1] = {**answer[-1], "content": written}
            changed |= {how} - {""}
        for how in changed:
            kept.notes[how] += 1
    _note_other_ids(kept, examples, tokenizer)
    if untrained:
        why, count = untrained.most_common(1)[0]
        raise DataError(
            f"the chat template of this base does not support the tool calls of {kept.name}: "
            f"{why} ({counted(count, 'row')})",
            expected="a template that writes tools, tool calls and their results as text",
            remedy="use a base whose template does, or write calls and results into the content; "
            "`ignore: [tools]` leaves out the list of tools only",
        )


def _note_other_ids(kept: FilteredSet, examples: list[Example], tokenizer: Any) -> None:
    """Note how many answers begin inside a token of the template's text; none of the first: none.

    That is a property of the template's last characters, so a few rows show if there are any.
    """

    def other(example: Example) -> bool:
        turns: list[Any] = [*example.prompt, *example.answers[0]]
        try:
            return not split_alike(tokenizer, turns[:-1], turns[-1]["content"])
        except Exception:  # a conversation that the template refuses is counted by another filter
            return False

    given = [
        one
        for one in examples
        if isinstance(one.prompt, list) and one.answers and isinstance(one.answers[0], list)
    ]
    if any(map(other, given[:_COMPARED])):
        note = "encoded as one text, the end of the template and the beginning of the answer would "
        note += "become one token: programs that encode whole conversations see other ids there"
        kept.notes[note] += sum(map(other, given))


def call_tools(kept: FilteredSet, examples: list[Example]) -> list[Example]:
    """Add a demonstration for each tool call inside a conversation, with the turns before it.

    Calls are trained on then; what tools returned is only ever part of a prompt.
    """
    more = []
    for one in examples:
        each = [*one.answers[0][:-1]] if one.answers and isinstance(one.answers[0], list) else []
        turns = [*one.prompt, *each] if isinstance(one.prompt, list) else []
        for i in tool_calls.answers_within(turns):
            more.append(replace(one, prompt=turns[:i], answers=[turns[i : i + 1]], ranks=None))
    if more:
        kept.notes["tool calls inside a conversation are demonstrations of their own"] += len(more)
    return [*examples, *more]


def pair_labels(kept: FilteredSet, examples: list[Example]) -> list[Example]:
    """Make one ranking of the answers to a prompt that are labelled as good or bad.

    Raises:
        DataError: No prompt has answers of both kinds.
    """
    groups: dict[str, list[Example]] = {}
    for one in examples:
        if one.labelled:
            groups.setdefault(json.dumps(one.prompt), []).append(one)
    if not groups:
        return examples
    both = [group for group in groups.values() if len({one.good for one in group}) == 2]
    count = sum(map(len, groups.values()))
    if not both:
        raise DataError(
            f"no prompt has both an answer labelled good and one labelled bad (prompts: "
            f"{len(groups):,}, rows: {count:,})",
            expected="comparisons: a better and a worse answer to the same prompt",
            remedy="list the file under data.demonstrations, with the same `columns:`, which "
            "trains on the good answers; or collect a second answer to these prompts",
        )
    reason = "prompts whose answers are all labelled alike"
    kept.counts[reason] = {"before": count, "after": sum(map(len, both))}
    kept.notes["answers labelled good were paired with bad ones to the same prompt"] += len(both)
    ranked = [
        replace(
            group[0],
            answers=[answer for one in group for answer in one.answers],
            ranks=[1.0 if one.good else 2.0 for one in group],
        )
        for group in both
    ]
    return [*(one for one in examples if not one.labelled), *ranked]


def expand(kept: FilteredSet, examples: list[Example]) -> list[dict[str, Any]]:
    """Convert examples to rows of the set; a ranking becomes all its pairs without a tie."""
    groups: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    pairs = 0
    for example in examples:
        row: dict[str, Any] = {"prompt": example.prompt, "item": example.item}
        row["_where"] = example.where
        if example.user:
            row["user"] = example.user
        ranks = example.ranks or [0.0] * len(example.answers)
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
        if kept.name in ("prompts", "evaluate"):
            rows.append({**row, "columns": example.columns})
        elif kept.name == "demonstrations":
            best: Turns = example.answers[order[0]] if order else ""
            if not isinstance(best, str):  # turns before the last one belong to the prompt
                row["prompt"], best = [*row["prompt"], *best[:-1]], best[-1:]
            turns = row["prompt"] if isinstance(row["prompt"], list) else []
            if any(t["role"] == "assistant" and not t.get("tool_calls") for t in turns):
                kept.notes[_EARLIER] += 1
            rows.append({**row, "completion": best})
        else:
            row["group"] = groups.setdefault(json.dumps(example.prompt), len(groups))
            for a, b in itertools.combinations(order, 2):
                pairs += 1
                if ranks[a] < ranks[b]:
                    pair = {"chosen": example.answers[a], "rejected": example.answers[b]}
                    rows.append({**row, **pair, "margin": example.margin})
    if kept.name == "comparisons":
        kept.counts["expanded to pairs"] = {"before": len(examples), "after": pairs}
        kept.counts["ties"] = {"before": pairs, "after": len(rows)}
        if any(row["margin"] is None for row in rows):
            if any(row["margin"] is not None for row in rows):
                kept.notes["margin left out: not every row has one"] += len(rows)
            for row in rows:
                del row["margin"]
    return rows


def _by_assistant(row: dict[str, Any]) -> bool:
    answers = (row[k] for k in ("completion", "chosen", "rejected") if k in row)
    return all(isinstance(a, str) or (a and a[-1]["role"] == "assistant") for a in answers)


def _one_turn(row: dict[str, Any]) -> bool:
    answers = (row["chosen"], row["rejected"])
    return all(isinstance(answer, str) or len(answer) == 1 for answer in answers)


def _unanswered(row: dict[str, Any]) -> bool:
    return isinstance(row["prompt"], list) and row["completion"] == ""


def _no_value(row: dict[str, Any]) -> bool:
    return any(text_of(row[part]).strip() in _NO_VALUE for part in _PARTS if part in row)


def drop_useless(kept: FilteredSet) -> None:
    """Drop and count equal pairs, empty texts, duplicates and contradictions."""
    rows = kept.rows
    comparing = kept.name == "comparisons"
    if comparing:
        rows = kept.filter("chosen equal to rejected", rows, lambda r: r["chosen"] != r["rejected"])
        # Stages encode one prompt and one answer: the turns before the last would be lost.
        rows = kept.filter("answers that differ before their last turn", rows, _one_turn)

    def asks(row: dict[str, Any]) -> bool:
        prompt = row["prompt"]
        last = isinstance(prompt, str) or (prompt and prompt[-1]["role"] in ("user", "tool"))
        return bool(last and first_turn(prompt).strip() and text_of(prompt).strip())

    rows = kept.filter("no prompt, or none that ends with a question", rows, asks)
    if comparing or kept.name == "demonstrations":
        rows = kept.filter("answers of another role than the assistant", rows, _by_assistant)
    if kept.name == "demonstrations":
        if any(map(_unanswered, rows)):
            reason = "no answer after the last question"
            rows = kept.filter(reason, rows, lambda r: not _unanswered(r))
        empty = "empty completion"
        rows = kept.filter(empty, rows, lambda r: bool(text_of(r["completion"]).strip()))
    if comparing:

        def answered(row: dict[str, Any]) -> bool:
            # A sampled empty answer is the policy's behaviour; in a file it is a gap.
            rejected = row["item"] or text_of(row["rejected"]).strip()
            return bool(text_of(row["chosen"]).strip() and rejected)

        rows = kept.filter("empty chosen or rejected", rows, answered)

    if any(map(_no_value, rows)):
        reason = "an empty or failed cell, such as nan or #REF!"
        rows = kept.filter(reason, rows, lambda r: not _no_value(r))
    seen: set[str] = set()

    def new(row: dict[str, Any]) -> bool:
        key = json.dumps([row[column] for column in _PARTS if column in row])
        fresh = key not in seen
        seen.add(key)
        return fresh

    rows = kept.filter("duplicate", rows, new)
    if comparing:
        swapped = {json.dumps([r["prompt"], r["rejected"], r["chosen"]]) for r in rows}

        def consistent(row: dict[str, Any]) -> bool:
            return json.dumps([row["prompt"], row["chosen"], row["rejected"]]) not in swapped

        rows = kept.filter("labelled both ways", rows, consistent)
    kept.rows = rows


def note_length(kept: FilteredSet) -> None:
    """Note comparisons in which nearly always the longer answer is the better one."""
    longer = sum(len(text_of(r["chosen"])) > len(text_of(r["rejected"])) for r in kept.rows)
    if len(kept.rows) >= _ENOUGH_PAIRS and longer >= _ONE_LENGTH * len(kept.rows):
        kept.notes[
            f"the better answer is the longer one in {longer / len(kept.rows):.0%} of the "
            "comparisons: a reward model learns length from them and may fail its gate before PPO; "
            "add comparisons in which the better answer is the shorter one"
        ] += longer


def check_losses(kept: FilteredSet, max_lost: float) -> None:
    """Stop if a filter dropped more than `data.max_lost` of the rows that it was given.

    A file of comparisons has several rows for a prompt, and for a pair that several people judged;
    dropping such duplicates loses nothing.

    Raises:
        DataError: A filter did.
    """
    judged = kept.agreement is not None  # by several people
    answers = {"prompt + completion", "messages"} & set(kept.layouts)
    several = kept.name in ("prompts", "evaluate") or judged
    several = several or kept.name == "demonstrations" and not answers
    for reason, n in kept.counts.items():
        lost = 1 - n["after"] / n["before"] if n["before"] else 0.0
        same = reason == "duplicate" and several or reason == "labelled both ways" and judged
        if lost <= max_lost or reason in _INTENDED or same:
            continue
        notes = [note for note in kept.notes if reason.startswith("refused") and REFUSES in note]
        remedy = "correct these rows"
        if reason.endswith("labelled alike"):
            remedy = "collect a better or a worse answer to these prompts"
        if "overlap" in reason:
            remedy = "choose other evaluation prompts, or `contamination: warn`"
        if "max_prompts_per_user" in reason:
            remedy = "raise it; if `user` is no column of users: `ignore: [user]`"
        if reason == "in the evaluation set":
            remedy = "leave data.evaluate out: then a share of the prompts is held out instead"
        raise DataError(
            f"{lost:.0%} of the {kept.name} are dropped as: {reason}{kept.table()}"
            + kept.first(reason)
            + "".join(f"\n  {note}" for note in notes[:3]),
            expected=f"at most {max_lost:.0%} (data.max_lost)",
            remedy=remedy
            + f", or set data.max_lost to {math.ceil(lost * 100) / 100:g} to do without them"
            * (n["after"] > 1),
        )


def drop_too_long(kept: FilteredSet, recipe: Recipe, tokenizer: Any) -> None:
    """Drop and count rows over the token limits, template tokens and the final eos included.

    Raises:
        DataError: More than `data.max_lost` of the rows are too long.
    """
    name = "max_prompt_tokens" if kept.name in ("prompts", "evaluate") else "max_tokens"
    limit = getattr(recipe.data, name)
    for batch in (kept.rows[i : i + _BATCH] for i in range(0, len(kept.rows), _BATCH)):
        answers = [0] * len(batch)
        for column in ("completion", "chosen", "rejected"):
            if column in batch[0]:
                turns = (row[column] for row in batch)
                last = [t if isinstance(t, str) else t[-1]["content"] for t in turns]
                ids = tokenization.completion_ids(tokenizer, last)
                _count_changed(kept, tokenizer, last, ids)
                answers = [max(n, len(i) + 1) for n, i in zip(answers, ids, strict=True)]
        sizes = _prompt_sizes(kept, batch, tokenizer)
        _count_changed_prompts(kept, tokenizer, batch, sizes)
        for row, prompt, answer in zip(batch, sizes, answers, strict=True):
            row["_tokens"] = prompt + answer
    refused = "refused by the chat template"
    rows = kept.filter(refused, kept.rows, lambda row: row["_tokens"] < math.inf)
    kept.tokens = [row["_tokens"] for row in rows]
    reason = f"over data.{name} = {limit}"
    kept.rows = kept.filter(reason, rows, lambda row: row["_tokens"] <= limit)
    lost = 1 - len(kept.rows) / len(rows) if rows else 0.0
    if lost > recipe.data.max_lost:
        tokens = sorted(row["_tokens"] for row in rows)
        raise DataError(
            f"{lost:.0%} of the {kept.name} are {reason}" + kept.table() + kept.first(reason),
            expected=f"at most {recipe.data.max_lost:.0%} (data.max_lost); half of the rows have "
            f"up to {tokens[len(rows) // 2]:.0f} tokens, the longest {tokens[-1]:.0f}",
            remedy=f"raise data.{name}, or set data.max_lost to {math.ceil(lost * 100) / 100:g} to "
            "do without them",
        )


def _count_changed(kept: FilteredSet, tokenizer: Any, texts: list[str], ids: list[Any]) -> None:
    """Count answers that do not decode to what was given, white space around them apart."""
    decoded = tokenizer.batch_decode(
        [list(one) for one in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    for given, read in zip(texts, decoded, strict=True):
        if given.strip() != read.strip():
            kept.changed = kept.changed or f"{excerpt(given, 60)!r} is {excerpt(read, 60)!r}"
            kept.notes[f"the tokenizer changes answers: {kept.changed} when decoded"] += 1


def _count_changed_prompts(
    kept: FilteredSet, tokenizer: Any, batch: list[dict[str, Any]], sizes: list[float]
) -> None:
    """Count prompts whose turns are not in what their ids decode to; none of the first: none."""

    def changed(row: dict[str, Any]) -> tuple[str, str] | None:
        [ids] = tokenization.prompt_ids(tokenizer, [row["prompt"]])
        decoded = tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        turns = [{"content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
        text = "".join(decoded.split())
        for turn in turns if chat_template.unwritten(tokenizer, turns) is None else ():
            if "".join(turn["content"].rpartition("</think>")[2].split()) not in text:
                return turn["content"], decoded
        return None

    given = [row for row, size in zip(batch, sizes, strict=True) if size < math.inf]
    if not any(map(changed, given[:_SHOWN])):
        return
    for pair in filter(None, map(changed, given)):
        kept.changed_prompt = kept.changed_prompt or " is ".join(
            repr(excerpt(text, 60)) for text in pair
        )
        kept.notes[f"the tokenizer changes prompts: {kept.changed_prompt} when decoded"] += 1


def _prompt_sizes(kept: FilteredSet, batch: list[dict[str, Any]], tokenizer: Any) -> list[float]:
    """Return the tokens of each row's prompt; infinity if the chat template refuses it."""
    prompts = [row["prompt"] for row in batch]
    try:
        return [len(ids) for ids in tokenization.prompt_ids(tokenizer, prompts)]
    except Exception as error:  # a template may raise anything: find the rows it refuses
        if len(batch) > 1:
            return [size for row in batch for size in _prompt_sizes(kept, [row], tokenizer)]
        kept.notes[f"{REFUSES}: {excerpt(first_line(error), 200)}"] += 1
        return [math.inf]
