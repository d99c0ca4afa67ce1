# SPDX-License-Identifier: Apache-2.0
"""Generate prompts of the closed-world task, and good and flawed completions for them.

A prompt is a short record of facts and an instruction in plain English. It holds all information
that an answer needs, so that each answer has an exact gold reward, even from a pretrained model.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from . import vocabulary
from .checkers import Item
from .vocabulary import FAMILIES, FLAWS, POOLS, RECORD, SPLITS


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(content: str) -> str:
    """Return the split of a content, which is a record or a request without its wording."""
    bucket = _digest(content) % 10  # half for pre-training, a tenth for each other split
    return SPLITS[max(0, bucket - 4)]


def _phrase(attr: str, value: str) -> str:
    text = vocabulary.PHRASES[attr].format(v=value)
    return text.replace(" a ", " an ") if value[0] in "aeiou" else text


def _sentence(item: Item, attr: str, value: str | None = None) -> str:
    return f"{item.name} {_phrase(attr, value or dict(item.facts)[attr])}."


def _make_record(family: str, rng: random.Random) -> tuple[str, dict[str, Any]]:
    name = rng.choice(POOLS["name"])
    attrs = rng.sample(vocabulary.ATTRS, rng.randint(3, 5) + 1)
    spare = attrs.pop()
    values = {a: rng.choice(POOLS[a]) for a in attrs}
    k = rng.randint(2, 3)
    keys: list[str] = []
    attribute = spare if family == "not_stated" else rng.choice(attrs)
    if family == "json":
        keys = rng.sample(["name", *attrs], k)
    if family == "max_words":  # at least one pair must fit: name + phrase + "and" + phrase
        lengths = sorted(len(_phrase(a, v).split()) for a, v in values.items())
        k = max(rng.randint(7, 12), 2 + lengths[0] + lengths[1])
    if rng.random() < 0.5:
        text = "; ".join([f"name: {name}", *(f"{a}: {v}" for a, v in values.items())]) + "."
    else:
        text = " ".join(f"{name} {_phrase(a, v)}." for a, v in values.items())
    form = rng.choice(vocabulary.INSTRUCTIONS[family])
    question = vocabulary.QUESTIONS[attribute].format(n=name)
    shown = " and ".join([", ".join(keys[:-1]), keys[-1]]) if keys else ""
    prompt = f"Record: {text}\n" + form.format(n=name, a=attribute, q=question, k=k, keys=shown)
    content = json.dumps([name, sorted(values.items())])
    return content, {
        "prompt": prompt,
        "name": name,
        "facts": (("name", name), *values.items()),
        "attribute": attribute if family in ("answer", "not_stated") else "",
        "answer": values[attribute] if family == "answer" else "",
        "keys": tuple(keys),
        "limit": k if family in ("bullets", "max_words") else 0,
    }


def _make_polite(family: str, rng: random.Random) -> tuple[str, dict[str, Any]]:
    verb, thing = rng.choice(vocabulary.VERBS), rng.choice(vocabulary.OBJECTS)
    day, room = rng.choice(vocabulary.DAYS), rng.choice(POOLS["room"])
    where = f"by {day}" if rng.random() < 0.3 else f"in room {room}"
    request = f"{verb} the {thing} {where}"
    rude = _rude(request, rng)
    prompt = rng.choice(vocabulary.INSTRUCTIONS[family]).format(r=rude)
    keys = (verb, thing, where.split()[-1].lower())
    return request, {"prompt": prompt, "answer": request, "keys": keys}


def _make_topic(family: str, rng: random.Random) -> tuple[str, dict[str, Any]]:
    name, city = rng.choice(POOLS["name"]), rng.choice(POOLS["city"])
    topic, text = rng.choice(vocabulary.HARMFUL if family == "refuse" else vocabulary.BENIGN)
    prompt = rng.choice(vocabulary.INSTRUCTIONS[family]).format(n=name, c=city, x=topic)
    # Words that show that an answer is about the topic; short words would match any text.
    keys = tuple(dict.fromkeys(w for w in text.lower().strip(".").split() if len(w) > 3))
    return f"{name}|{city}|{topic}", {"prompt": prompt, "name": name, "answer": text, "keys": keys}


_MAKERS: dict[str, Callable[[str, random.Random], tuple[str, dict[str, Any]]]] = {
    **dict.fromkeys(RECORD, _make_record),
    "polite": _make_polite,
    **dict.fromkeys(("refuse", "benign"), _make_topic),
}


def items(n: int, seed: int, split: str, families: Sequence[str] | None = None) -> list[Item]:
    """Return `n` items with unique prompts, the families in turn; the same for the same seed.

    Splits share no contents (`split_of`), whatever the seed.

    Raises:
        ValueError: An unknown split or family, or fewer distinct prompts than `n`.
    """
    chosen = tuple(FAMILIES if families is None else families)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")
    if not chosen or set(chosen) - set(FAMILIES):
        raise ValueError(f"unknown families {chosen}; some of {', '.join(FAMILIES)}")
    rng = random.Random(f"items/{seed}/{split}")
    seen: set[str] = set()
    made: list[Item] = []
    misses = 0
    while len(made) < n:
        family = chosen[len(made) % len(chosen)]
        content, parts = _MAKERS[family](family, rng)
        if split_of(content) != split or parts["prompt"] in seen:
            misses += 1
            if misses > 5_000:  # chance of this with half of a split left: 0.95 ** 5000
                raise ValueError(f"{family}/{split} has not enough distinct prompts for n={n}")
            continue
        misses = 0
        seen.add(parts["prompt"])
        ident = f"{family}-{_digest(family + parts['prompt']):016x}"
        made.append(Item(id=ident, family=family, **parts))
    return made


def _facts(item: Item) -> dict[str, str]:
    return {a: v for a, v in item.facts if a != "name"}


def _other(pool: Sequence[str], value: str, rng: random.Random) -> str:
    return rng.choice([v for v in pool if v != value])


def _denial(item: Item, rng: random.Random) -> str:
    return rng.choice(vocabulary.DENIALS).format(n=item.name, a=item.attribute)


def _bullets(facts: dict[str, str], chosen: Sequence[str]) -> str:
    return "\n".join(f"- {a}: {facts[a]}" for a in chosen)


def _pair(item: Item, facts: dict[str, str], rng: random.Random) -> str:
    phrases = {a: _phrase(a, v) for a, v in facts.items()}
    fit = [
        (a, b)
        for a in phrases
        for b in phrases
        if a != b and len(f"{phrases[a]} {phrases[b]}".split()) + 2 <= item.limit
    ]
    a, b = rng.choice(fit)
    return f"{item.name} {phrases[a]} and {phrases[b]}."


def _write(item: Item, facts: dict[str, str], rng: random.Random) -> str:
    """Write a completion that would be right if `facts` were the record."""
    if item.family == "answer":
        value = facts[item.attribute]
        short = f"{item.name}'s {item.attribute} is {value}."
        return rng.choice((_sentence(item, item.attribute, value), short))
    if item.family == "not_stated":
        return _denial(item, rng)
    if item.family == "bullets":
        return _bullets(facts, rng.sample(sorted(facts), item.limit))
    if item.family == "json":
        return json.dumps({k: {"name": item.name, **facts}[k] for k in item.keys})
    if item.family == "max_words":
        return _pair(item, facts, rng)
    if item.family == "polite":
        return rng.choice(vocabulary.POLITE).format(r=item.answer)
    return rng.choice(vocabulary.REFUSALS) if item.family == "refuse" else item.answer


def good(item: Item, rng: random.Random) -> str:
    """Write a completion with reward 1."""
    return _write(item, _facts(item), rng)


def _invent(item: Item, rng: random.Random) -> str:
    facts = _facts(item)
    if item.family == "polite":
        thing = item.keys[1]
        wrong = item.answer.replace(thing, _other(vocabulary.OBJECTS, thing, rng))
        return rng.choice(vocabulary.POLITE).format(r=wrong)
    if item.family == "not_stated":
        return _sentence(item, item.attribute, rng.choice(POOLS[item.attribute]))
    wrong_facts = {a: _other(POOLS[a], v, rng) for a, v in facts.items()}
    # At most one fact stays true, so that every completion invents some.
    kept = rng.choice([a for a in facts if a != item.attribute])
    if item.family in ("bullets", "max_words"):
        wrong_facts[kept] = facts[kept]
    if item.family == "json" and rng.random() < 0.5:  # a single wrong key
        keys = [k for k in item.keys if k != "name"]
        changed = rng.choice(keys)
        wrong_facts = {**facts, changed: wrong_facts[changed]}
    return _write(item, wrong_facts, rng)


def _ramble(item: Item, rng: random.Random) -> str:
    text = good(item, rng)
    if item.family in ("answer", "not_stated"):
        others = [a for a in _facts(item) if a != item.attribute]
        text = " ".join([text, *(_sentence(item, a) for a in rng.sample(others, 2))])
    return " ".join([text, *rng.sample(vocabulary.FILLERS, 1 if item.family in RECORD else 2)])


def _misformat(item: Item, rng: random.Random) -> str:
    facts = _facts(item)
    if item.family == "json":
        return ", ".join(f"{k}: {dict(item.facts)[k]}" for k in item.keys)
    if item.family == "bullets":
        chosen = rng.sample(sorted(facts), item.limit)
        pairs = ", ".join(f"{a}: {facts[a]}" for a in chosen)
        return rng.choice((pairs, " ".join(_sentence(item, a) for a in chosen)))
    text = " ".join(_sentence(item, a) for a in facts)
    while len(text.split()) <= item.limit:
        text += " " + rng.choice(vocabulary.FILLERS)
    return text


def _omit(item: Item, rng: random.Random) -> str:
    if item.family == "polite":
        return rng.choice(vocabulary.POLITE).format(r=" ".join(item.answer.split()[:3]))
    if item.family == "json":
        return json.dumps({item.keys[0]: dict(item.facts)[item.keys[0]]})
    facts = _facts(item)
    one = rng.choice(sorted(facts))
    return _bullets(facts, [one]) if item.family == "bullets" else _sentence(item, one)


def _rude(request: str, rng: random.Random) -> str:
    text = rng.choice(vocabulary.RUDE).format(r=request)
    return text[0].upper() + text[1:]


_FLAWED: dict[str, Callable[[Item, random.Random], str]] = {
    "invent": _invent,
    "ramble": _ramble,
    "format": _misformat,
    "omit": _omit,
    "deny": _denial,
    "refuse": lambda item, rng: rng.choice(vocabulary.REFUSALS),
    "comply": lambda item, rng: rng.choice(("", "Sure. ", "Of course. ")) + item.answer,
    "rude": lambda item, rng: _rude(item.answer, rng),
}


def flawed(item: Item, rng: random.Random, kind: str | None = None) -> str:
    """Write a completion with one flaw of `FLAWS[item.family]`: `kind`, or a random one."""
    kinds = FLAWS[item.family]
    if kind is not None and kind not in kinds:
        raise ValueError(f"no flaw {kind!r} in family {item.family!r}; one of {', '.join(kinds)}")
    return _FLAWED[kind or rng.choice(kinds)](item, rng)


def demonstrations(n: int, seed: int, flawed_share: float = 0.15) -> list[dict[str, Any]]:
    """Return `n` demonstrations, of which a share is flawed, as from careless writers."""
    rng = random.Random(f"demonstrations/{seed}")
    rows = []
    for item in items(n, seed, "demonstrations"):
        write = flawed if rng.random() < flawed_share else good
        rows.append({"prompt": item.prompt, "completion": write(item, rng), "item": item.to_dict()})
    return rows
