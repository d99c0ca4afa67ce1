# SPDX-License-Identifier: Apache-2.0
"""Personal data in a set: e-mail addresses, phone, card and account numbers, and names.

Presidio's recognisers find numbers and addresses; a spaCy model finds names where it is installed,
and lists of names with their cues do everywhere. Nothing is fetched from the network.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]  # it knows letters of all languages

from lora_rlhf import extras
from lora_rlhf.errors import SetupError, first_line
from lora_rlhf.recipe.schema import DataSection, DataSource, Recipe

from . import identity_terms, tool_calls
from .filters import SECRET, FilteredSet
from .row_formats import Example
from .sources import locate
from .tokenization import Turns

KINDS = {
    "EMAIL_ADDRESS": "e-mail addresses", "PHONE_NUMBER": "phone numbers",
    "CREDIT_CARD": "card numbers", "IBAN_CODE": "bank accounts", "IP_ADDRESS": "IP addresses",
    "US_SSN": "social security numbers", "PERSON": "names",
}  # fmt: skip
"""Kind of personal data, as Presidio calls it -> its name in notes."""

_USER, _EXTRA = "data.personal_data", "hygiene"
_NUMBERED = regex.compile(r"[@\d]")  # without one of these, only a name can be in a text
_SURE = 0.4  # Presidio's score of a phone number without a word such as "call" beside it
_KEY = "pseudonyms of personal data"

# Possessive, and from a word's start: linear time on any text.
_WORD = r"(?<!\p{L})(?=\p{Lu}\p{L}*\p{Ll})\p{Lu}\p{L}++(?:[-'’]\p{Lu}\p{L}++)*+"
_PART = regex.compile(
    r"(?!(?<=['’])s\b)[\p{L}\p{N}][\p{L}\p{M}\p{N}]*(?:[-'’](?!s\b)[\p{L}\p{M}\p{N}]+)*"
)
"""A word of a name that was recognised; 's after it is none."""
_RUN = regex.compile(rf"{_WORD}(?: (?:\p{{Lu}}\. )?{_WORD}){{0,3}}")
_CUE = regex.compile(
    r"(?:\b(?i:my name is|my name's|name's|call me|named|Mr|Mrs|Ms|Miss|Dr|Prof|Professor|Dear|"
    r"sincerely|regards|signed|yours|cheers|patient|name:|contact:|customer:|employee:)[.,]?)\s+$"
)
"""Words right before a name, after which any capitalised word is one."""
_HINT = regex.compile(
    r"(?:\b(?i:I am|I'm|this is|hi|hey|hello|thanks|thank you|from|by|with|and|ask|tell|meet|"
    r"wife|husband|son|daughter|brother|sister|mother|father|friend|boss|colleague)[.,:]?)\s+$"
)
"""Words before a name, after which a name that is also a word is one."""
_NO_NAME = frozenset(
    "I The A An And Or But Is Are Was He She It We You They Who What When Where Why How Sir Madam "
    "Team All Hiring Manager Customer Friend Friends Diary God Lord Lady Mom Dad Mother Father "
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March August "
    "September October November December In On At To Of For From With Please Can Could Would "
    "Committee Editor Reader Sirs Colleagues Everyone Doctor Professor Mr Mrs Ms Miss Dr Prof Dear "
    "Hi Hello Hey Thanks Thank My This Human Assistant User System".split()
)
_GIVEN = frozenset(name for names in identity_terms.NAMES.values() for name in names)
_SURE_NAMES = _GIVEN - identity_terms.ALSO_WORDS
_ANY_NAMES = _GIVEN | identity_terms.ALSO_WORDS


@dataclass(frozen=True)
class Span:
    """Personal data at a place of a text."""

    start: int
    end: int
    kind: str


class Finder:
    """Presidio's recognisers and, where it is installed, a model for names; loaded once."""

    def __init__(self, name_model: str) -> None:
        self._presidio = _presidio()
        self._names = _name_model(name_model)
        self.names_by = Path(name_model).name if self._names else "lists of names and their cues"

    def spans(self, text: str) -> list[Span]:
        """Return the personal data in a text, in its order and without overlaps."""
        people = [Span(start, end, "PERSON") for start, end in self._people(text)]
        return apart(self._numbers(text) + people)

    def _numbers(self, text: str) -> list[Span]:
        if not _NUMBERED.search(text):
            return []
        kinds = [kind for kind in KINDS if kind != "PERSON"]
        results = self._presidio.analyze(text, "en", entities=kinds, score_threshold=_SURE)
        results.sort(key=lambda one: (-one.score, one.start - one.end))
        return [Span(one.start, one.end, one.entity_type) for one in results]

    def _people(self, text: str) -> Iterable[tuple[int, int]]:
        if self._names is not None:
            entities = self._names(text).ents
            yield from (
                (e.start_char, e.end_char) for e in entities if e.label_ in ("PERSON", "PER")
            )
        yield from names(text)


def _name_model(name: str) -> Any:
    """Load a spaCy model for names; None if it is the default one and not installed.

    Raises:
        SetupError: The recipe names another one that cannot be loaded.
    """
    spacy = extras.load("spacy", _USER, _EXTRA)
    if not spacy.util.is_package(name) and name == DataSection.model_fields["name_model"].default:
        return None
    try:
        return spacy.load(name)
    except Exception as error:  # a broken model raises anything
        raise SetupError(
            f"data.name_model: {name} cannot be loaded: {first_line(error)}",
            expected="an installed spaCy model, or the folder of one",
            remedy="install it, or leave data.name_model out: then lists of names are used",
        ) from None


@functools.cache
def loaded(name_model: str = DataSection.model_fields["name_model"].default) -> Finder:
    """The finder with a model for names, loaded once."""
    return Finder(name_model)


def _presidio() -> Any:
    """Return Presidio's engine on a blank pipeline, which splits words and loads no weights."""
    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    presidio = extras.load("presidio_analyzer", _USER, _EXTRA)
    known = extras.load("presidio_analyzer.predefined_recognizers", _USER, _EXTRA)
    engines = extras.load("presidio_analyzer.nlp_engine", _USER, _EXTRA)
    blank = extras.load("spacy", _USER, _EXTRA).blank("en")
    blank.max_length = 2**31  # it only splits words
    engine = engines.SpacyNlpEngine()
    engine.nlp = {"en": blank}
    # Presidio's own recogniser of e-mail addresses downloads the list of public suffixes.
    mail = presidio.PatternRecognizer(
        "EMAIL_ADDRESS", patterns=known.EmailRecognizer.PATTERNS, context=["mail", "email"]
    )
    others = (
        known.PhoneRecognizer,
        known.CreditCardRecognizer,
        known.IbanRecognizer,
        known.IpRecognizer,
        known.UsSsnRecognizer,
    )
    registry = presidio.RecognizerRegistry([mail, *(kind() for kind in others)])
    return presidio.AnalyzerEngine(registry, engine, supported_languages=["en"])


def apart(spans: list[Span]) -> list[Span]:
    """Return the spans in text order; where two overlap, the later of the list keeps the rest."""
    covered, kept = bytearray(max((one.end for one in spans), default=0)), []
    for one in spans:
        for free in re.finditer(b"\0+", bytes(covered[one.start : one.end])):
            kept.append(Span(one.start + free.start(), one.start + free.end(), one.kind))
        covered[one.start : one.end] = b"\1" * (one.end - one.start)
    return sorted(kept, key=lambda one: one.start)


def names(text: str) -> list[tuple[int, int]]:
    """Return the places of names, by lists of names and by the words before them."""
    places: list[tuple[int, int]] = []
    for run in _RUN.finditer(text):
        words = [(m.start(), m.end(), m[0]) for m in regex.finditer(_WORD, run[0])]
        before = text[max(0, run.start() - 30) : run.start()]
        first = next((i for i in range(len(words)) if _begins(words, i, before)), None)
        if first is None:
            continue
        last = first
        while last + 1 < len(words) and words[last + 1][2] not in _NO_NAME:
            last += 1
        places.append((run.start() + words[first][0], run.start() + words[last][1]))
    # A name that was recognised is one everywhere in the text, unless it is also a word.
    recognised = {part for start, end in places for part in regex.findall(_WORD, text[start:end])}
    recognised -= identity_terms.ALSO_WORDS
    if recognised:
        again = regex.compile(rf"\b(?:{'|'.join(map(regex.escape, sorted(recognised)))})\b")
        places += [match.span() for match in again.finditer(text)]
    return places


def _begins(words: list[tuple[int, int, str]], i: int, before: str) -> bool:
    """Tell if a name begins with a capitalised word of a run of them."""
    word, after = words[i][2], words[i + 1][2] if i + 1 < len(words) else ""
    if word in _NO_NAME:
        return False
    cue = " ".join(one for _, _, one in words[:i]) + " " if i else before
    sure = word in _SURE_NAMES or ("-" in word and word.split("-")[0] in _ANY_NAMES)
    if sure or after in identity_terms.SURNAMES or _CUE.search(cue):
        return True
    return word in _ANY_NAMES and bool(_HINT.search(cue))


class Pseudonyms:
    """Pseudonyms that are the same for the same person in all sets and on every machine.

    Their key is a hash of the raw sources, so that only somebody who has these can compute the
    pseudonym of a name; the hashes that a record publishes do not give it away.
    """

    def __init__(self, recipe: Recipe) -> None:
        key = hashlib.sha256(f"{_KEY}\n{recipe.seed}".encode())
        for name in ("demonstrations", "comparisons", "prompts", "text", "evaluate"):
            for source in getattr(recipe.data, name):
                _add(key, source)
        self._key = key.digest()

    def of(self, kind: str, text: str) -> str:
        """Return the pseudonym of personal data; a name's words have one each."""
        if kind == "PERSON":
            return str(_PART.sub(lambda word: self._one("NAME", word[0]), text))
        return self._one(kind.removesuffix("_NUMBER").removesuffix("_ADDRESS"), text)

    def _one(self, kind: str, text: str) -> str:
        plain = "".join(char for char in text.casefold() if char.isalnum())
        mac = hmac.new(self._key, f"{kind}\n{plain}".encode(), hashlib.sha256)
        return f"[{kind}_{mac.hexdigest()[:6].upper()}]"

    def redact(self, text: str, spans: list[Span]) -> str:
        """Replace the spans of a text by pseudonyms."""
        for one in reversed(spans):
            if not any(map(str.isalnum, text[one.start : one.end])):
                continue  # a space that is left between two others
            text = (
                text[: one.start] + self.of(one.kind, text[one.start : one.end]) + text[one.end :]
            )
        return text


def _add(key: Any, source: DataSource) -> None:
    """Add the bytes of a source to the key; a dataset of the Hub is public, so its name will do."""
    if source.path is None:
        key.update(f"{source.hub or source.task}".encode())
        return
    with locate(source.path).open("rb") as file:
        while block := file.read(2**20):
            key.update(block)


def clean(
    kept: FilteredSet, examples: list[Example], recipe: Recipe, finder: Finder | None = None
) -> list[Example]:
    """Count personal data in the examples, and redact, drop or warn of it as the recipe says.

    Examples of a task, whose people are invented, are left as they are.
    """
    action = recipe.data.personal_data
    given = [example for example in examples if not example.item]
    if action == "keep" or not given:
        return examples
    finder = finder or loaded(recipe.data.name_model)
    pseudonyms = Pseudonyms(recipe) if action == "redact" else None
    counts: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    affected: set[int] = set()
    for number, example in enumerate(examples):
        if example.item:
            continue
        local: Counter[str] = Counter()

        def changed(text: str, local: Counter[str] = local) -> str:
            spans = finder.spans(text)
            local.update(one.kind for one in spans)
            return pseudonyms.redact(text, spans) if pseudonyms else text

        example.prompt = _each(example.prompt, changed)
        example.answers = [_each(answer, changed) for answer in example.answers]
        counts += local
        rows.update(local.keys())
        affected |= {number} if local else set()
    count = {kind: counts[kind] for kind in KINDS if counts[kind]}
    entry = {"action": action, "rows": len(affected), "found": count, "names_by": finder.names_by}
    kept.more["personal_data"] = entry
    if action == "drop":
        left = [one for number, one in enumerate(examples) if number not in affected]
        kept.counts["personal data"] = {"before": len(examples), "after": len(left)}
        return left
    for kind, name in KINDS.items():
        if rows[kind] and action == "redact":
            kept.notes[f"{name} were replaced by pseudonyms"] += rows[kind]
        elif rows[kind]:
            kept.notes[f"{SECRET} {name}; see data.personal_data"] += rows[kind]
    return examples


def count(texts: Iterable[str]) -> Counter[str] | None:
    """Count personal data in texts, by name of its kind; None without the extra `hygiene`."""
    try:
        finder = loaded()
    except SetupError:
        return None
    return Counter(KINDS[one.kind] for text in texts for one in finder.spans(text))


def _each(turns: Turns, change: Callable[[str], str]) -> Turns:
    """Change the content of every turn, and the values in its tool calls."""
    if isinstance(turns, str):
        return change(turns)
    changed = [{**turn, "content": change(turn["content"])} for turn in turns]
    for turn in changed:
        if "tool_calls" in turn:
            turn["tool_calls"] = tool_calls.dump(_leaves(json.loads(turn["tool_calls"]), change))
    return changed


def _leaves(value: Any, change: Callable[[str], str]) -> Any:
    """Change the texts and numbers inside of JSON."""
    if isinstance(value, dict):
        return {key: _leaves(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_leaves(inner, change) for inner in value]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    new = change(str(value))
    return value if new == str(value) else new
