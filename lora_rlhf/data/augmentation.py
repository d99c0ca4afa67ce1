# SPDX-License-Identifier: Apache-2.0
"""More training rows: instructions worded differently, and people swapped for other people.

New rows are marked in a column `augmented`, and are made of training rows only. The same swaps
test labels: does a preference change with the identity alone?
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

from lora_rlhf.estimates import share_interval

from . import identity_terms
from .filters import FilteredSet
from .row_formats import text_of, transcript
from .tokenization import Turns

_WRAPPERS = (
    "I need help with this: {}", "Here is my request. {}", "{} Thank you.", "Task: {}",
    "Please help me with the following. {}", "{} Take your time.", "Hi! {}",
)  # fmt: skip
_ORDERS = ("Please {}", "Could you please {}", "I would like you to {}", "Your task: {}")
"""Templates for instructions that begin with a verb."""

_VERBS = frozenset(
    "write give list explain describe tell summarize summarise translate create make name rewrite "
    "generate find compare suggest answer classify identify compose draft outline provide show "
    "define calculate convert edit help say use return".split()
)
_COLUMNS = ("prompt", "completion", "chosen", "rejected")

_GENDER: dict[str, str] = {"him": "her"}
for _a, _b in identity_terms.PRONOUNS:
    _GENDER |= {_a: _b, _b: _a}
_NAMES = {
    name: gender
    for gender, names in identity_terms.NAMES.items()
    for name in names
    if name not in identity_terms.ALSO_WORDS
}
_GROUPS = {
    group.lower(): (kind, groups, number)
    for kind, groups in identity_terms.GROUPS.items()
    for number, group in enumerate(groups)
}
_ONLY_PEOPLE = ("black", "white", "straight")
_PERSON = re.compile(rf"\s+(?:{'|'.join(identity_terms.PEOPLE)})s?\b", re.IGNORECASE)
_TERM = re.compile(r"[^\W\d_]+")
_OWNED = re.compile(
    r"\s+(?!(?:and|or|but|to|for|at|in|on|by|with|from|as|if|when|about|that|the|a|an|is|was|"
    r"again|back|up|out|too)\b)\w",
    re.IGNORECASE,
)
"""Text after `her` or `his` that makes it a possessive: a word that begins a noun phrase."""


def _kind(match: re.Match[str]) -> str:
    """Return the kind of identity term that a word is: her, gender, name, group, or none."""
    word = match[0]
    if word in _NAMES:
        return "name"
    low = word.lower()
    if low in ("her", "hers", "his"):
        return "her"
    person = low not in _ONLY_PEOPLE or _PERSON.match(match.string, match.end())
    return "gender" if low in _GENDER else "group" if low in _GROUPS and person else ""


def swapped(texts: list[str], rng: random.Random) -> list[str] | None:
    """Swap people in the texts of one row, everywhere alike; None if they name nobody.

    Gender and names change together; a group becomes another one of its kind.
    """
    terms = [(match[0], _kind(match)) for text in texts for match in _TERM.finditer(text)]
    kinds = {kind for _, kind in terms}
    if kinds == {""} or not kinds:
        return None
    change_people = kinds - {"", "group"} and ("group" not in kinds or rng.random() < 0.5)
    named = sorted({word for word, kind in terms if kind == "name"})
    names: dict[str, str] = {}
    for name in named:
        free = [n for n, g in _NAMES.items() if g != _NAMES[name] and n not in named]
        if not (left := [n for n in free if n not in names.values()]):
            return None  # a list of more names than there are to swap with
        names[name] = rng.choice(left)
    steps = {kind: rng.randrange(1, len(all_)) for kind, all_ in identity_terms.GROUPS.items()}

    def other(match: re.Match[str]) -> str:
        kind, word = _kind(match), match[0]
        if kind == "group" and not change_people:
            of, groups, number = _GROUPS[word.lower()]
            return groups[(number + steps[of]) % len(groups)]
        if not kind or kind == "group" or not change_people:
            return word
        return names[word] if kind == "name" else _cased(_other_gender(match), word)

    return [_TERM.sub(other, text) for text in texts]


def _other_gender(match: re.Match[str]) -> str:
    word = match[0].lower()
    if word in _GENDER:
        return _GENDER[word]
    owned = bool(_OWNED.match(match.string, match.end()))
    if word == "her":
        return "his" if owned else "him"
    return "his" if word == "hers" else "her" if owned else "hers"


def _cased(word: str, like: str) -> str:
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word.capitalize() if like[0].isupper() else word


def without_identity(text: str) -> str:
    """Replace names, pronouns and groups by their kind, so that twins become equal."""

    def plain(match: re.Match[str]) -> str:
        kind, word = _kind(match), match[0].lower()
        if kind == "group":
            return f"[{_GROUPS[word][0]}]"
        if kind == "gender":
            return "[her]" if word == "him" else f"[{min(word, _GENDER[word])}]"
        return f"[{kind}]" if kind else match[0]

    return _TERM.sub(plain, text)


def paraphrased(instruction: str, rng: random.Random) -> str:
    """Word an instruction differently by a template; white space around it stays."""
    text = instruction.strip()
    first = text.split(" ", 1)[0]
    order = first.lower() in _VERBS
    template = rng.choice(_ORDERS + _WRAPPERS if order else _WRAPPERS)
    if template in _ORDERS:
        text = text[0].lower() + text[1:]
    return instruction.replace(instruction.strip(), template.format(text), 1)


def _paraphrase(row: dict[str, Any], rng: random.Random) -> dict[str, Any] | None:
    prompt: Turns = row["prompt"]
    if isinstance(prompt, str):
        return None if transcript(prompt) else {**row, "prompt": paraphrased(prompt, rng)}
    last = prompt[-1]
    if last["role"] != "user":
        return None
    return {**row, "prompt": [*prompt[:-1], {**last, "content": paraphrased(last["content"], rng)}]}


def _swap(row: dict[str, Any], rng: random.Random) -> dict[str, Any] | None:
    """Swap people in all texts of a row."""
    texts: list[str] = []
    columns = [column for column in _COLUMNS if column in row]

    def collect(text: str) -> str:
        texts.append(text)
        return text

    for column in columns:
        _each(row[column], collect)
    new = swapped(texts, rng)
    if new is None or new == texts:
        return None
    following = iter(new)
    return {**row, **{c: _each(row[c], lambda _: next(following)) for c in columns}}


def _each(turns: Turns, change: Callable[[str], str]) -> Turns:
    if isinstance(turns, str):
        return change(turns)
    return [{**turn, "content": change(turn["content"])} for turn in turns]


MAKERS = {"paraphrases": _paraphrase, "identities": _swap}
"""Key of `data.augment` -> the function that makes a row of a row, or None."""


def new_rows(
    rows: list[dict[str, Any]], shares: dict[str, float], seed: str, name: str
) -> list[dict[str, Any]]:
    """Make new rows, at most a share of the given ones; tasks and tool calls stay as they are."""
    made: list[dict[str, Any]] = []
    for kind, share in shares.items():
        rng, most = random.Random(f"{seed}/{name}/{kind}"), int(share * len(rows))
        count = 0
        for row in rng.sample(rows, len(rows)) if most else ():
            fixed = row["item"] or "tool_calls" in json.dumps(row)
            new = None if fixed else MAKERS[kind](row, rng)
            if new is not None and count < most:
                count += 1
                made.append({**new, "augmented": kind})
    groups: dict[str, int] = {}
    for row in made:  # comparisons number their prompts
        if "group" in row:
            start = max(one["group"] for one in rows) + 1
            row["group"] = groups.setdefault(json.dumps(row["prompt"]), start + len(groups))
    return made


def identity_test(kept: FilteredSet) -> None:
    """Report comparisons that are alike but for an identity, and how many preferences differ."""
    twins: dict[str, dict[str, bool]] = {}
    only_identity = 0
    for row in kept.rows:
        if row["item"]:
            continue
        prompt, chosen, rejected = (text_of(row[c]) for c in ("prompt", "chosen", "rejected"))
        plain = [without_identity(text) for text in (prompt, chosen, rejected)]
        if plain == [prompt, chosen, rejected]:
            continue
        if plain[1] == plain[2]:
            only_identity += 1
            continue
        key = json.dumps([plain[0], sorted(plain[1:])])
        twins.setdefault(key, {})[json.dumps([prompt, *sorted((chosen, rejected))])] = (
            plain[1] < plain[2]
        )
    changed, groups = [], []
    for number, prefers in enumerate(twins.values()):
        votes = list(prefers.values())
        pairs = [a != b for i, a in enumerate(votes) for b in votes[i + 1 :]]
        changed += pairs
        groups += [number] * len(pairs)
    entry: dict[str, Any] = {"twins": len(changed), "answers_differ_in_identity": only_identity}
    if changed:
        entry["changed"] = share_interval(changed, groups)
        share = f"{sum(changed)} of {len(changed)} preferences differ between comparisons that are"
        kept.notes[f"{share} alike but for names, pronouns or groups"] += len(changed)
    kept.more["identity_test"] = entry
