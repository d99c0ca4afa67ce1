# SPDX-License-Identifier: Apache-2.0
"""The data of a recipe: rows kept and lost, token lengths, pairs, and rows as the model sees them.

From the base's tokenizer alone; no weights are loaded.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from lora_rlhf.runtime import optional_packages  # noqa: F401  # isort: skip
from lora_rlhf.data import dataset_builder, near_duplicates
from lora_rlhf.data.dataset_builder import Loaded, Prepared
from lora_rlhf.data.filters import FilteredSet, check_losses, normalised
from lora_rlhf.data.row_formats import text_of
from lora_rlhf.data.tokenization import completion_ids, prompt_ids
from lora_rlhf.errors import DataError, SetupError
from lora_rlhf.estimates import share_interval
from lora_rlhf.evaluation import suite
from lora_rlhf.models import loading
from lora_rlhf.planning import bases
from lora_rlhf.recipe.loader import check_recipe
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.reports.doctor.findings import rate
from lora_rlhf.reports.tables import aligned
from lora_rlhf.runtime import quiet

from . import shown_rows

_QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
_BINS, _BAR = 10, 40
_SIMILAR, _MOST_PROMPTS = 0.8, 20_000


@dataclass
class SetView:
    """One set: its report, lengths, pairs and rows, or why it cannot be built.

    Attributes:
        tokens: Prompt and answer of each row before the cut at `limit`.
        lengths: Part -> quantiles of its tokens in the kept rows.
        stops: The error that a run would stop with; empty if it goes on.
    """

    name: str
    report: dict[str, Any] = field(default_factory=dict)
    line: str = ""
    limit: int = 0
    tokens: list[int] = field(default_factory=list)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    pairs: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, dict[str, Any], list[Text]]] = field(default_factory=list)
    stops: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON; rows are the texts that the model sees."""
        rows = [{"which": w, **row, "shown": [t.plain for t in s]} for w, row, s in self.rows]
        cut = sum(n > self.limit for n in self.tokens)
        tokens = {"limit": self.limit, "cut": cut, "rows": len(self.tokens)}
        own = {key: getattr(self, key) for key in ("report", "lengths", "pairs", "stops")}
        return {"set": self.name, **own, "tokens": tokens, "rows": rows}

    def lines(self) -> Iterator[Text]:
        """Yield the set for people."""
        yield Text(self.line or self.name, style="bold")
        if self.stops:
            yield Text(f"  a run would stop: {self.stops}", style="red")
        steps = [
            [f"  {reason}", f"{n['before']:,}", f"{n['after']:,}", f"{n['before'] - n['after']:,}"]
            for reason, n in self.report.get("counts", {}).items()
            if n["before"] != n["after"]
        ]
        if steps:
            yield from map(Text, aligned(["  filter", "before", "after", "lost"], steps))
        for note in self.report.get("notes", ()):
            yield Text(f"  {note}", style="dim")
        yield from self._token_lines()
        for key, value in self.pairs.items():
            yield Text(f"  {key}: {rate(value) if isinstance(value, dict) else value}")
        for which, _, shown in self.rows:
            yield Text(f"  {which}:", style="bold")
            yield from shown

    def _token_lines(self) -> Iterator[Text]:
        if self.lengths:
            head = [
                "  tokens",
                *("min" if q == 0 else "max" if q == 1 else f"{q:.0%}" for q in _QUANTILES),
            ]
            rows = [
                [f"  {part}", *(f"{n:g}" for n in q.values())] for part, q in self.lengths.items()
            ]
            yield from map(Text, aligned(head, rows))
        if not self.tokens:
            return
        least, most = min(self.tokens), max(self.tokens)
        step = -(-(most - least + 1) // _BINS)
        counts = [0] * _BINS
        for n in self.tokens:
            counts[(n - least) // step] += 1
        cut = sum(n > self.limit for n in self.tokens)
        share = cut / len(self.tokens)
        yield Text(f"  rows by tokens, {cut:,} ({share:.1%}) over the limit of {self.limit:,}:")
        for number, count in enumerate(counts):
            low, high = least + number * step, least + (number + 1) * step - 1
            bar = "█" * -(-_BAR * count // max(counts))
            style = "red" if low > self.limit else "yellow" if high > self.limit else "green"
            if low <= most:
                yield Text.assemble(f"  {low:6,}-{high:<6,} {count:7,} ", (bar, style))


@dataclass
class View:
    """The data of a recipe, set by set."""

    sets: list[SetView]

    @property
    def runs(self) -> bool:
        """True if no set would stop a run."""
        return not any(one.stops for one in self.sets)

    def as_json(self) -> str:
        """Return it for machines."""
        return json.dumps([one.as_dict() for one in self.sets], indent=1, ensure_ascii=False)

    def lines(self) -> Iterator[Text]:
        """Yield it for people."""
        for one in self.sets:
            yield from one.lines()
            yield Text()

    def __str__(self) -> str:
        return "\n".join(line.plain for line in self.lines())


@quiet.libraries()
def show_data(recipe: Recipe, folder: str | Path = ".", *, seed: int = 0, rows: int = 1) -> View:
    """Build the sets of a recipe as a run does, and describe them; print the result to read it.

    Args:
        folder: The recipe's folder; a config.json in it is used.
        seed: Of the random rows.
        rows: Number of random rows that are shown, beside the first and the longest.

    Raises:
        SetupError: The base's tokenizer is not here.
    """
    check_recipe(recipe)
    config, _ = bases.config_of(recipe.model, Path(folder))
    tokenizer = loading.find_tokenizer(recipe.model, config)
    loaded: Loaded = suite.prompts_at_hand(recipe)
    chosen = random.Random(seed)
    sets = []
    for name in ("demonstrations", "comparisons", "prompts", "text"):
        if getattr(recipe.data, name):
            sets.append(_view(recipe, tokenizer, name, loaded, chosen, rows))
    return View(sets)


def _view(
    recipe: Recipe, tokenizer: Any, name: str, loaded: Loaded, chosen: random.Random, rows: int
) -> SetView:
    made = SetView(name)
    if name == "comparisons" and any(source.task for source in recipe.data.comparisons):
        made.line = "comparisons: answers of the SFT model, sampled and ranked in the run"
        return made
    data = recipe.data.model_copy(update={"max_lost": 1.0})
    lenient = recipe.model_copy(update={"data": data})
    try:
        if name == "text":
            pieces, made.report = dataset_builder.texts(lenient, tokenizer, loaded)
            made.line = "text: {documents:,} documents, {pieces:,} pieces, {tokens:,} tokens"
            made.line = made.line.format(**made.report)
            made.limit, made.tokens = data.max_tokens, [len(piece) for piece in pieces]
            return made
        prepared = getattr(dataset_builder, name)(lenient, tokenizer, loaded=loaded)
    except DataError as error:
        made.stops = str(error)
        return made
    kept = loaded[name]
    made.report, made.line = prepared.report, prepared.lines[0]
    made.limit = data.max_prompt_tokens if name == "prompts" else data.max_tokens
    made.tokens = [int(n) for n in kept.tokens]
    try:
        check_losses(kept, recipe.data.max_lost)
    except DataError as error:
        made.stops = f"{error.given.splitlines()[0]}; {error.remedy}"
    made.lengths = _lengths(kept, tokenizer)
    if name == "comparisons":
        made.pairs = _pairs(kept, prepared, tokenizer)
    made.rows = list(_rows(prepared, kept, tokenizer, chosen, rows))
    return made


def _lengths(kept: FilteredSet, tokenizer: Any) -> dict[str, dict[str, int]]:
    """Return quantiles of the tokens of each part; an answer's final eos counts."""
    parts = {"prompt": [len(i) for i in prompt_ids(tokenizer, [r["prompt"] for r in kept.rows])]}
    for column in ("completion", "chosen", "rejected"):
        if kept.rows and column in kept.rows[0]:
            texts = [_answer(row[column]) for row in kept.rows]
            parts[column] = [len(ids) + 1 for ids in completion_ids(tokenizer, texts)]
    quantiles = {}
    for part, tokens in parts.items():
        ordered = sorted(tokens)
        last = len(ordered) - 1
        quantiles[part] = {f"{q:g}": ordered[round(q * last)] for q in _QUANTILES}
    return quantiles


def _answer(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer[-1]["content"])


def _pairs(kept: FilteredSet, prepared: Prepared, tokenizer: Any) -> dict[str, Any]:
    """Measure length bias and duplicates of comparisons."""
    sizes = [
        [len(i) for i in completion_ids(tokenizer, [_answer(row[column]) for row in kept.rows])]
        for column in ("chosen", "rejected")
    ]
    untied = [(a > b, row["group"]) for a, b, row in zip(*sizes, kept.rows, strict=True) if a != b]
    made: dict[str, Any] = {"prompts": len({row["group"] for row in kept.rows})}
    if untied:
        outcomes, groups = zip(*untied, strict=True)
        made["the longer answer is chosen"] = share_interval(outcomes, groups)
        made["pairs of equal length"] = len(kept.rows) - len(untied)
        difference = sum(a - b for a, b in zip(*sizes, strict=True)) / len(kept.rows)
        made["tokens that chosen is longer, mean"] = round(difference, 1)
    for reason in ("chosen equal to rejected", "duplicate", "labelled both ways"):
        n = kept.counts.get(reason, {"before": 0, "after": 0})
        made[f"{reason}, left out"] = n["before"] - n["after"]
    texts = list(dict.fromkeys(normalised(text_of(r["prompt"])) for r in kept.rows))[:_MOST_PROMPTS]
    with contextlib.suppress(SetupError):  # without the extra `hygiene`
        first = near_duplicates.originals(texts, _SIMILAR)
        alike = sum(number != one for number, one in enumerate(first))
        of = f"of {len(texts):,} prompts resemble an earlier one (Jaccard {_SIMILAR})"
        made["near-duplicates"] = f"{alike:,} {of}"
    return made


def _rows(
    prepared: Prepared, kept: FilteredSet, tokenizer: Any, chosen: random.Random, count: int
) -> Iterator[tuple[str, dict[str, Any], list[Text]]]:
    """Yield the first row to train on, the longest kept one, and random ones."""
    columns = ("prompt", "completion", "chosen", "rejected")
    some = [prepared.train[chosen.randrange(len(prepared.train))] for _ in range(count)]
    longest = max(kept.rows, key=lambda row: row["_tokens"])
    named = [("first", prepared.train[0]), (f"longest, {longest['_tokens']} tokens", longest)]
    for which, row in [*named, *(("random", row) for row in some)]:
        shown = {column: row[column] for column in columns if column in row}
        yield which, shown, list(shown_rows.lines(row, tokenizer))
