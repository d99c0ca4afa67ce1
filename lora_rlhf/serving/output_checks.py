# SPDX-License-Identifier: Apache-2.0
"""Checks that an answer is what was asked for: length, form, language, label, JSON, quotations.

Each check passes, fails with one sentence, or cannot tell (a text too short to have a language).
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_rlhf import extras
from lora_rlhf.data import answer_format
from lora_rlhf.data.sources import excerpt
from lora_rlhf.errors import UsageError

FORMATS = ("text", "bullets", "json", "line")

LANGUAGES = {
    "Afrikaans": "af", "Albanian": "sq", "Arabic": "ar", "Armenian": "hy", "Azerbaijani": "az",
    "Basque": "eu", "Belarusian": "be", "Bengali": "bn", "Bosnian": "bs", "Bulgarian": "bg",
    "Catalan": "ca", "Chinese": "zh", "Croatian": "hr", "Czech": "cs", "Danish": "da",
    "Dutch": "nl", "English": "en", "Esperanto": "eo", "Estonian": "et", "Finnish": "fi",
    "French": "fr", "Galician": "gl", "Georgian": "ka", "German": "de", "Greek": "el",
    "Hebrew": "he", "Hindi": "hi", "Hungarian": "hu", "Icelandic": "is", "Indonesian": "id",
    "Irish": "ga", "Italian": "it", "Japanese": "ja", "Korean": "ko", "Latin": "la",
    "Latvian": "lv", "Lithuanian": "lt", "Macedonian": "mk", "Malay": "ms", "Norwegian": "no",
    "Persian": "fa", "Polish": "pl", "Portuguese": "pt", "Romanian": "ro", "Russian": "ru",
    "Serbian": "sr", "Slovak": "sk", "Slovenian": "sl", "Spanish": "es", "Swahili": "sw",
    "Swedish": "sv", "Tamil": "ta", "Telugu": "te", "Thai": "th", "Turkish": "tr",
    "Ukrainian": "uk", "Urdu": "ur", "Vietnamese": "vi", "Welsh": "cy",
}  # fmt: skip

_ALIKE = ({"no", "nn", "da"}, {"bs", "hr", "sr"}, {"id", "ms"}, {"zh", "yue", "wuu"},
          {"ar", "ary", "arz"}, {"de", "lb"}, {"en", "pcm"}, {"pt", "gl"})  # fmt: skip
"""Languages that the detector confuses; one counts as the other."""

_SURE = 0.6
"""Probability from which a detected language counts."""

_QUOTED = re.compile(r'"([^"\n]+)"|“([^”\n]+)”|„([^“”\n]+)[“”]|«([^»\n]+)»')
_ELLIPSIS = re.compile(r"\s*(?:\.\.\.|…|\[…\]|\[\.\.\.\])\s*")
_LEFT_OUT = 200
"""Characters that the ellipses of one quotation may stand for together: a long sentence."""
_SENTENCE = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")


@dataclass(frozen=True)
class Check:
    """One check of an answer; `passed` is None if it cannot be decided."""

    name: str
    passed: bool | None
    problem: str = ""


@dataclass(frozen=True)
class Length:
    """A range of words, sentences or bullets."""

    low: int
    high: int
    unit: str = "words"

    @classmethod
    def parse(cls, text: str) -> Length:
        """Parse `50 words`, `30-50 words`, `2 sentences`, `3 bullets` or a number of words.

        Raises:
            UsageError: It is none of these.
        """
        match = re.fullmatch(
            r"(?:(\d{1,6})\s*(?:-|–|to)\s*)?(\d{1,6})\s*(word|sentence|bullet)?s?",
            text.strip().lower(),
        )
        low, high = (int(match[1] or 0), int(match[2])) if match else (1, 0)
        if match is None or not 0 < high or low > high:
            raise UsageError(
                f"--length {text!r}",
                expected="such as `50 words`, `30-50 words`, `2 sentences` or `3 bullets`",
            )
        unit = f"{match[3] or 'word'}s"
        return cls(high if unit == "bullets" and not match[1] else low, high, unit)

    def __str__(self) -> str:
        unit = self.unit if self.high > 1 else self.unit[:-1]
        if self.low == self.high:
            return f"{self.high} {unit}"
        return f"{self.low} to {self.high} {unit}" if self.low else f"at most {self.high} {unit}"

    def problem(self, text: str) -> str:
        """Return how the text violates it; empty if it does not."""
        lines = [line for line in text.splitlines() if line.strip()]
        count = {
            "words": len(text.split()),
            "sentences": sum(bool(part.strip()) for part in _SENTENCE.split(text)),
            "bullets": sum(bool(_BULLET.match(line)) for line in lines),
        }[self.unit]
        inside = self.low <= count <= self.high
        return "" if inside else f"{count} {self.unit}, {self} asked for"


def run(answer: str, wanted: Mapping[str, Any], source: str = "") -> list[Check]:
    """Run the checks of all that was asked for.

    Args:
        wanted: `length` (a Length), `format`, `to` (a language), `labels`, `schema`, and the names
            `quotes`, `numbers`, `in_source`, `shorter` and `same_language` as true.
        source: Text that the answer is about.

    Raises:
        ValueError, SetupError: The schema is invalid, or a package is missing.
    """
    checks = [_check("not empty", "" if answer.strip() else "the answer is empty")]
    if not answer.strip():
        return checks
    for name, find in _CHECKS.items():
        if (value := wanted.get(name)) not in (None, False):
            problem = find(answer, value, source)
            checks.append(Check(name, None) if problem is None else _check(name, problem))
    return checks


def _check(name: str, problem: str) -> Check:
    return Check(name, not problem, problem)


def _format(answer: str, form: str, source: str) -> str:
    if form == "json":
        return "; ".join(answer_format.problems(answer, {"json_schema": True}))
    if form == "bullets":
        return "; ".join(answer_format.problems(answer, {"bullets": True}))
    if form == "line":
        return "more than one line" if "\n" in answer.strip() else ""
    marked = [
        line for line in answer.splitlines() if re.match(r"\s*(?:[-*•] |#+ |```|[{\[])", line)
    ]
    return (
        f"plain text asked for, but there is the line {excerpt(marked[0], 40)!r}" if marked else ""
    )


def _schema(answer: str, schema: Any, source: str) -> str:
    return "; ".join(answer_format.problems(answer, {"json_schema": schema}))


def _label(answer: str, labels: Any, source: str) -> str:
    right = answer.strip() in labels
    return "" if right else f"{excerpt(answer.strip(), 40)!r} is none of {', '.join(labels)}"


def _shorter(answer: str, _: Any, source: str) -> str:
    mine, whole = len(answer.split()), len(source.split())
    return "" if mine < whole else f"{mine} words, and the text itself has {whole}"


# --- language ------------------------------------------------------------------------------------


def language_code(name: str) -> str:
    """Return the ISO code of a language's English name, or of a code itself.

    Raises:
        UsageError: The detector does not know it.
    """
    codes = {known.lower(): code for known, code in LANGUAGES.items()}
    code = codes.get(name.strip().lower(), name.strip().lower())
    if code not in _detector().labels:
        raise UsageError(
            f"unknown language {name!r}", expected="an English name or an ISO code: German, de"
        )
    return code


@functools.cache
def _detector() -> Any:
    langid = extras.load("py3langid.langid", "the check of a language", "serve")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def detect(text: str) -> str | None:
    """Return the ISO code of a text's language; None if it is too short to tell."""
    code, sure = most_likely_language(text)
    return code if sure >= _SURE else None


def most_likely_language(text: str) -> tuple[str, float]:
    """The ISO code of a text's language, and its probability among the known ones."""
    code, sure = _detector().classify(_prose(text))
    return str(code), float(sure)


def _language(answer: str, wanted: str, source: str) -> str | None:
    code, seen = language_code(wanted), detect(answer)
    if seen is None:
        return None
    alike = seen == code or any({seen, code} <= group for group in _ALIKE)
    names = {code: name for name, code in LANGUAGES.items()}
    return "" if alike else f"it is in {names.get(seen, seen)}, not in {names.get(code, code)}"


def _same_language(answer: str, _: Any, source: str) -> str | None:
    code = detect(source)
    return None if code is None else _language(answer, code, source)


# --- quotations ----------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """Return a text with one form of quotation marks, dashes and white space."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub("[“”„«»‟]", '"', re.sub("[‘’‚‛`´]", "'", text))
    return " ".join(re.sub("[‐-―−]", "-", text).split())


def missing_quotes(answer: str, source: str) -> list[str]:
    """Return the quotations of an answer that are not in the source, word for word.

    White space, the form of quotation marks and dashes, the case of the first letter and a final
    punctuation mark may differ; an ellipsis stands for at most a long sentence.
    """
    quotes = [next(filter(None, groups)) for groups in _QUOTED.findall(_prose(answer))]
    return [quote for quote in quotes if not stands_in(quote, source)]


def stands_in(quote: str, source: str) -> bool:
    """Tell whether a quotation's parts stand near each other in a text, whole words in order."""
    parts = [part.strip(" .,;:!?") or part for part in map(normalised, _ELLIPSIS.split(quote))]
    patterns = [_whole_words(part) for part in parts if part]
    whole, room = normalised(source), sum(map(len, parts)) + len(parts) + _LEFT_OUT
    for first in patterns[0].finditer(whole) if patterns else ():
        place, limit = first.end(), first.start() + room
        for pattern in patterns[1:]:
            match = pattern.search(whole, place, limit + 1)
            if match is None or match.end() > limit:
                break
            place = match.end()
        else:
            return True
    return False


def _whole_words(part: str) -> re.Pattern[str]:
    first = f"[{re.escape(part[0].lower() + part[0].upper())}]" if part[0].isalpha() else ""
    pattern = first + re.escape(part[1:]) if first else re.escape(part)
    return re.compile(rf"(?<!\w){pattern}(?!\w)")


def _quotes(answer: str, _: Any, source: str) -> str:
    missing = missing_quotes(answer, source)
    return (
        f"not in the text: {'; '.join(excerpt(quote, 60) for quote in missing)}" if missing else ""
    )


_NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
          "eleven", "twelve")  # fmt: skip


def _numbers(answer: str, _: Any, source: str) -> str:
    """Find numbers in digits that the text has neither in digits nor, up to twelve, in words."""
    known = {number.replace(",", "").rstrip(".") for number in _NUMBER.findall(source)}
    known |= {str(_WORDS.index(w)) for w in re.findall(r"[a-z]+", source.lower()) if w in _WORDS}
    new = [
        n for n in _NUMBER.findall(_prose(answer)) if n.replace(",", "").rstrip(".") not in known
    ]
    return f"not in the text: {', '.join(new)}" if new else ""


def _json(answer: str) -> list[str] | None:
    """Return the texts in a JSON object or array; None if the answer is neither."""
    try:
        value = json.loads(answer)
        return list(_leaves(value)) if isinstance(value, dict | list) else None
    except (ValueError, RecursionError):
        return None


def _prose(answer: str) -> str:
    texts = _json(answer)
    return answer if texts is None else "\n".join(texts)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    elif value is not None and not isinstance(value, bool):
        yield value if isinstance(value, str) else json.dumps(value)


def _in_source(answer: str, _: Any, source: str) -> str:
    values = _json(answer)
    if values is None:  # lines, without bullet and label
        lines = (_BULLET.sub("", line).strip() for line in answer.splitlines())
        values = [line.split(": ", 1)[-1] for line in lines]
    missing = [value for value in values if value.strip() and not stands_in(value, source)]
    return (
        f"not in the text: {'; '.join(excerpt(value, 60) for value in missing)}" if missing else ""
    )


_CHECKS: dict[str, Callable[[str, Any, str], str | None]] = {
    "length": lambda answer, length, source: length.problem(answer),
    "format": _format, "schema": _schema, "labels": _label, "to": _language, "quotes": _quotes,
    "numbers": _numbers, "in_source": _in_source, "shorter": _shorter,
    "same_language": _same_language,
}  # fmt: skip
NAMES = tuple(_CHECKS)
