# SPDX-License-Identifier: Apache-2.0
"""Passages of people's documents, and the passages that fit a question best.

Text, Markdown and HTML need no package; PDF needs pypdf, and the search bm25s (extra `ground`). The
index lives in memory. What a browser would not show of an HTML file is not read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from lora_rlhf import extras
from lora_rlhf.data import sources
from lora_rlhf.errors import DataError, first_line, reason

PASSAGE = 700
"""Characters of a passage, unless a paragraph's last sentence ends a little later."""

MOST_FILES, MOST_BYTES = 10_000, 50_000_000
MOST_PAGES, MOST_CHARACTERS = 2_000, 50_000_000
"""Pages of one PDF, and characters of all texts together: a small file can hold very many."""
_RANK = 60.0  # Cormack et al. 2009, reciprocal rank fusion

Embed = Callable[[Sequence[str]], Any]
"""Unit vectors of texts, one row each."""


@dataclass(frozen=True)
class Passage:
    """A piece of a document: `document[start:end]` of its text as it is read."""

    text: str
    file: str
    place: str  # headings, or `page N`; "" if there are none
    start: int
    end: int

    @property
    def where(self) -> str:
        """File, place and characters, as shown to people."""
        return f"{', '.join(filter(None, (self.file, self.place)))}, {self.start}-{self.end}"


Section = tuple[str, int, str]
"""Place, offset of the first character, text."""


def _text(path: Path) -> list[Section]:
    return [("", 0, sources.whole_text(path))]


def _markdown(path: Path) -> list[Section]:
    text, fenced = sources.whole_text(path), False
    headings: list[tuple[int, str]] = []
    made: list[Section] = []
    start = offset = 0
    for line in text.splitlines(keepends=True):
        fenced ^= line.lstrip().startswith(("```", "~~~"))
        heading = None if fenced else re.match(r"(#{1,6})\s+(\S.*)", line[:300])
        if heading:
            made.append((_path(headings), start, text[start:offset]))
            headings = [one for one in headings if one[0] < len(heading[1])]
            headings.append((len(heading[1]), heading[2].rstrip("# \t\r\n")))
            start = offset + len(line)
        offset += len(line)
    return [*made, (_path(headings), start, text[start:])]


def _path(headings: Sequence[tuple[int, str]]) -> str:
    return " > ".join(text for _, text in headings)


_UNSEEN = {"script", "style", "template", "noscript", "head", "svg", "iframe", "object", "select"}
_VOID = set("area base br col embed hr img input link meta source track wbr".split())
_BREAK = set("p div br li tr h1 h2 h3 h4 h5 h6 section article table ul ol dl dt dd pre hr".split())
_ENDS = set("p li dt dd tr".split())
_HIDING = re.compile(
    r"display:none|visibility:(?:hidden|collapse)|opacity:0?\.?0*(?:;|$)|font-size:0(?![.\d]*[1-9])"
    r"|(?:left|top|text-indent):-\d{3}|clip:rect\(0"
)


class _Html(HTMLParser):
    """The text that a browser shows, cut at headings."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.made: list[Section] = []
        self.headings: list[tuple[int, str]] = []
        self.open: list[tuple[str, bool]] = []  # elements, and if they hide what is inside
        self.parts: list[str] = []
        self.start = self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BREAK and self.open and self.open[-1][0] in ("p", tag) and tag in _ENDS:
            self._close()  # HTML lets people leave out </p> and </li>
        given = dict(attrs)
        style = re.sub(r"\s|/\*.*?\*/", "", (given.get("style") or "")[:2_000]).lower()
        hides = tag in _UNSEEN or "hidden" in given or bool(_HIDING.search(style))
        if re.fullmatch("h[1-6]", tag) and not self.hidden:
            self.cut()
        if tag in _BREAK:
            self.handle_data("\n" if tag == "br" else "\n\n")
        if tag not in _VOID:
            self.open.append((tag, hides))
            self.hidden += hides

    def handle_endtag(self, tag: str) -> None:
        if re.fullmatch("h[1-6]", tag) and not self.hidden:
            title = " ".join("".join(self.parts).split())[:80]
            self.headings = [one for one in self.headings if one[0] < int(tag[1])]
            self.headings.append((int(tag[1]), title))
            self.start += sum(map(len, self.parts))
            self.parts = []
        if any(name == tag for name, _ in self.open[-100:]):
            while self._close() != tag:
                pass
        if tag in _BREAK:
            self.handle_data("\n\n")

    def _close(self) -> str:
        tag, hides = self.open.pop()
        self.hidden -= hides
        return tag

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if not data.strip("\n") else re.sub(r"\s+", " ", data))

    def cut(self) -> None:
        """End the section."""
        text = "".join(self.parts)
        self.made.append((_path(self.headings), self.start, text))
        self.start, self.parts = self.start + len(text), []


def _html(path: Path) -> list[Section]:
    reader = _Html()
    text = re.sub(r"<!--(?:(?!-->).)*+(?:-->|$)", "", sources.whole_text(path), flags=re.DOTALL)
    end = text.rfind(">") + 1
    reader.feed(text[:end] + text[end:].replace("<", "&lt;"))  # the parser retries each open tag
    reader.close()
    reader.cut()
    return reader.made


def _pdf(path: Path) -> list[Section]:
    pypdf = extras.load("pypdf", f"reading {path.name}", "ground")
    made: list[Section] = []
    start = 0
    try:
        for number, page in enumerate(pypdf.PdfReader(path).pages, 1):
            if number > MOST_PAGES or start > MOST_CHARACTERS:
                raise _too_much(path, f"{MOST_PAGES:,} pages of a PDF" * (number > MOST_PAGES))
            made.append((f"page {number}", start, page.extract_text()))
            start += len(made[-1][2])
    except DataError:
        raise
    except Exception as error:  # a broken or an encrypted file raises anything
        raise DataError(
            f"the PDF cannot be read: {first_line(error)}",
            where=str(path),
            expected="a complete PDF without a password",
        ) from None
    return made


def _too_much(path: Path, most: str = "") -> DataError:
    most = most or f"{MOST_CHARACTERS:,} characters of text in all sources"
    return DataError(
        "more than can be read", where=str(path), expected=most, remedy="give fewer or split them"
    )


READERS: dict[str, Callable[[Path], list[Section]]] = {
    ".txt": _text, ".text": _text, ".md": _markdown, ".markdown": _markdown,
    ".html": _html, ".htm": _html, ".xhtml": _html, ".pdf": _pdf,
}  # fmt: skip


def _files(given: Path) -> list[Path]:
    """The readable files of a folder: no hidden ones, and no links that lead out of it."""
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise DataError("there is no such file or folder", where=str(given))
    root, files = given.resolve(), []
    for folder, inner, names in os.walk(given):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        files += [
            path
            for name in sorted(names)
            if not name.startswith(".") and (path := Path(folder, name)).suffix.lower() in READERS
            if path.is_file() and path.resolve().is_relative_to(root)
        ]
    return files


def read(given: str | Path | Sequence[str | Path]) -> list[Passage]:
    """Read documents, and cut them in passages.

    Args:
        given: Files, or folders, of which all files with a known ending are read.

    Raises:
        DataError: A file cannot be read, or there is no text.
        SetupError: A PDF file, and pypdf is not installed.
    """
    paths = [Path(one) for one in ([given] if isinstance(given, str | Path) else given)]
    made: list[Passage] = []
    characters = 0
    for top in paths:
        files = _files(top)
        if len(files) > MOST_FILES:
            raise DataError(
                f"{len(files):,} files", where=str(top), expected=f"{MOST_FILES:,} at most"
            )
        for path in files:
            name = path.name if path == top else path.relative_to(top).as_posix()
            sections = _sections(path)
            characters += sum(len(text) for _, _, text in sections)
            if characters > MOST_CHARACTERS:
                raise _too_much(path)
            made += _passages(name, sections)
    if not made:
        raise DataError(
            "the sources hold no text",
            where=", ".join(map(str, paths)),
            expected=f"files ending in {', '.join(READERS)}",
        )
    return made


def _sections(path: Path) -> list[Section]:
    reader = READERS.get(path.suffix.lower(), _text)
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise DataError(
                f"{size / 1e6:.0f} MB", where=str(path), expected=f"{MOST_BYTES / 1e6:.0f} MB"
            )
        return reader(path)
    except OSError as error:
        raise DataError(f"the file cannot be read: {reason(error)}", where=str(path)) from None


def _passages(file: str, sections: Sequence[Section]) -> Iterator[Passage]:
    for place, offset, text in sections:
        for start, end in _pieces(text):
            yield Passage(text[start:end], file, place, offset + start, offset + end)


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Join paragraphs, and sentences of long ones, up to the length of a passage."""
    start = end = -1
    for first, last in _units(text):
        if end > start and last - start > PASSAGE:
            yield start, end
            start = -1
        if start < 0:
            start = first
        end = last
    if end > start >= 0:
        yield start, end


_LONG = re.compile(
    rf"\S(?:.{{0,{PASSAGE - 2}}}?[.!?…]+[\"'”’)\]]*(?=\s)|.{{0,{PASSAGE - 2}}}(?=\s|$)"
    rf"|.{{{PASSAGE - 1}}})",
    re.DOTALL,
)


def _units(text: str) -> Iterator[tuple[int, int]]:
    for paragraph in re.finditer(r"\S(?:[^\n]|\n(?!\s*\n))*", text):
        block = paragraph[0].rstrip()
        if len(block) <= PASSAGE:
            yield paragraph.start(), paragraph.start() + len(block)
            continue
        for part in _LONG.finditer(block):
            yield paragraph.start() + part.start(), paragraph.start() + part.end()


class Index:
    """Passages in memory, searched by words (BM25) and, with `embed`, by meaning as well."""

    def __init__(self, passages: Sequence[Passage], embed: Embed | None = None) -> None:
        package = extras.load("bm25s", "a search in sources", "ground")
        self.passages, self._embed = list(passages), embed
        texts = [f"{p.place} {p.text}" for p in self.passages]  # a heading names what follows
        words = [_words(text) for text in texts]
        self._bm25 = package.BM25() if any(words) else None
        if self._bm25 is not None:
            self._bm25.index(words, show_progress=False)
        self._vectors = None if embed is None else np.asarray(embed(texts))

    def search(self, question: str, most: int = 4) -> list[Passage]:
        """Return the passages nearest to a question, best first; none that shares no word.

        With embeddings, the two orders are merged by reciprocal rank.
        """
        ranks, words = np.zeros(len(self.passages)), _words(question)
        if self._bm25 is not None and words:
            by_words = self._bm25.get_scores(words)
            order = np.argsort(-by_words, kind="stable")
            order = order[by_words[order] > 0]
            ranks[order] += 1 / (_RANK + np.arange(len(order)))
        if self._embed is not None and self._vectors is not None:
            near = self._vectors @ np.asarray(self._embed([question]))[0]
            order = np.argsort(-near, kind="stable")[: 5 * most]
            ranks[order] += 1 / (_RANK + np.arange(len(order)))
        best = np.argsort(-ranks, kind="stable")[:most]
        return [self.passages[i] for i in best if ranks[i] > 0]


_COMMON = frozenset(
    "a an and are as at be but by do does for from has have how if in into is it its no not of on "
    "or such that the their then there these they this to was what when where which who why will "
    "with you your i me my we our".split()
)


def _words(text: str) -> list[str]:
    """The words of a text that tell something, without case and the commonest endings."""
    words = (word for word in re.findall(r"\w+", text.casefold()) if word not in _COMMON)
    return [_stem(word) for word in words]


def _stem(word: str) -> str:
    for ending in ("ing", "es", "ed", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) > 2:
            return word.removesuffix(ending)
    return word


def embeddings(model: str) -> Embed:
    """Load a sentence-transformers model as `Index` wants it.

    Raises:
        SetupError: The package is not installed, or the model is not here.
    """
    package = extras.load("sentence_transformers", "embeddings of sources", "ground")
    loaded = package.SentenceTransformer(model)
    return lambda texts: loaded.encode(
        list(texts), normalize_embeddings=True, show_progress_bar=False
    )
