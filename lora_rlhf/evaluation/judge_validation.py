# SPDX-License-Identifier: Apache-2.0
"""Compare a judge with people's labels: accuracy, the people's own agreement, and biases.

Each pair is shown in a random order, so that a judge that always prefers the first answer is right
half of the time. A judge's tie counts half. Pairs that people did not decide, or that cannot be
judged, are left out and counted.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_rlhf import estimates
from lora_rlhf.data import row_formats, sources
from lora_rlhf.errors import DataError, reason
from lora_rlhf.estimates import Estimate
from lora_rlhf.recipe.schema import DataSource
from lora_rlhf.runs.samples import prompt_text

from .judge_probes import probe
from .judges import Judge
from .prompt_sets import Row
from .verdicts import Pairs, Verdicts

VERSION = 1


@dataclass(frozen=True)
class Labelled:
    """A pair of answers with people's verdicts: 1 (the first is better), 0, or 0.5 for a tie."""

    row: Row
    first: str
    second: str
    votes: tuple[float, ...]

    @property
    def majority(self) -> float | None:
        """The verdict of most people; None for a tie or without a majority."""
        [(most, count), *rest] = Counter(self.votes).most_common()
        return None if most == 0.5 or (rest and rest[0][1] == count) else most


class _Unusable(Exception):
    """A pair that cannot be judged, with the reason under which it is counted."""


def read(path: Path, seed: int = 0, n: int | None = None) -> tuple[list[Labelled], Counter[str]]:
    """Read labels; the seed shuffles them, draws n, and orders the two answers.

    JSON Lines of {"prompt", "a", "b", "labels": ["a", "b", "tie"], "kind"}; pairs {"chosen",
    "rejected"} as Anthropic's HH (`Human:` and `Assistant:` turns), also gzipped; or PandaLM's test
    set (three raters).

    Returns:
        The pairs, and how many of the file are left out, by reason: those that training drops too.

    Raises:
        DataError: A row is none of these, with file and line.
    """
    made: list[Labelled] = []
    left_out: Counter[str] = Counter()
    rows = sources.read(DataSource(path=str(path)), sources.Skips())
    for number, (where, row) in enumerate(rows, 1):
        try:
            made.append(_usable(_labelled(row, str(number))))
        except _Unusable as unusable:
            left_out[str(unusable)] += 1
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"not a labelled pair: {reason(error)}",
                where=where,
                expected='{"prompt": …, "a": …, "b": …, "labels": ["a", "b" or "tie"]}',
                remedy="labels of a project: `lora-rlhf label PROJECT --export FILE --as judge`",
            ) from None
    rng = random.Random(seed)
    rng.shuffle(made)
    return [_swapped(one) if rng.random() < 0.5 else one for one in made[:n]], left_out


def _usable(one: Labelled) -> Labelled:
    if not (isinstance(one.first, str) and isinstance(one.second, str) and one.votes):
        raise ValueError("two texts and a label are needed")
    if not prompt_text(one.row.prompt).strip():
        raise _Unusable("no prompt")
    if not (one.first.strip() and one.second.strip()):
        raise _Unusable("an empty answer")
    if one.first == one.second:
        raise _Unusable("equal answers")
    return one


_VOTES = {"a": 1.0, "b": 0.0, "tie": 0.5}
_PANDALM = {"1": 1.0, "2": 0.0, "0": 0.5}


def _labelled(row: dict[str, Any], number: str) -> Labelled:
    if "annotator1" in row:  # PandaLM
        prompt = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        votes = tuple(_PANDALM[str(row[f"annotator{i}"])] for i in (1, 2, 3))
        kind = str(row.get("motivation_app", ""))
        texts = [str(row[f"response{i}"]) for i in (1, 2)]  # one is the JSON true
        return Labelled(Row(number, kind, prompt), texts[0], texts[1], votes)
    if "chosen" in row and isinstance(row["chosen"], str):
        first, second = (_last_answer(row[key]) for key in ("chosen", "rejected"))
        if first[0] != second[0]:
            raise _Unusable("answers that differ before their last turn")
        return Labelled(Row(number, "", first[0]), first[1], second[1], (1.0,))
    votes = tuple(_VOTES[label] for label in row["labels"])
    kind = str(row.get("kind", ""))
    return Labelled(Row(number, kind, row["prompt"]), row["a"], row["b"], votes)


def _last_answer(text: str) -> tuple[list[row_formats.Message], str]:
    """Split a transcript into the turns before the last answer, and that answer."""
    turns = row_formats.transcript(text)
    if not turns:
        raise ValueError("no transcript of `Human:` and `Assistant:` turns")
    if turns[-1]["role"] != "assistant":
        raise _Unusable("answers of another role than the assistant")
    return turns[:-1], turns[-1]["content"]


def _swapped(one: Labelled) -> Labelled:
    return Labelled(one.row, one.second, one.first, tuple(1 - vote for vote in one.votes))


def validate(
    judge: Judge,
    labelled: Sequence[Labelled],
    source: str,
    left_out: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Compare a judge with the people's majority.

    Args:
        left_out: Reason -> pairs of the source that are not in `labelled`.

    Returns:
        `n` pairs on which people decided; `left_out`, the others by reason; `accuracy`; `constant`,
        the accuracy of preferring the longer or the shorter answer, the higher one; `ceiling`, how
        often one person agrees with the others; `position`, the share of verdicts that change with
        the order; `calibration_error`, the mean distance between its certainty and its accuracy, if
        it has log-odds; `accuracy_of_mean_odds`, that of the mean of both orders' log-odds, which
        breaks the ties of verdicts that change with the order; `failed`, its requests without a
        verdict; `longer`, how often the judge and how often people prefer the longer answer; the
        accuracy `by_kind`; `probes`, how often it prefers an answer that was made worse.

    Raises:
        DataError: Fewer than two pairs are left.
    """
    left_out = dict(left_out or {})
    judged, verdicts = _judged(judge, labelled, source, left_out)
    wins, known = zip(*judged, strict=True)
    right = [1 - abs(win - (one.majority or 0.0)) for win, one in judged]
    longer = [_longer(one) for one in known]
    kinds: dict[str, list[int]] = {}
    for i, one in enumerate(known):
        kinds.setdefault(one.row.kind, []).append(i)
    mine = [x * win + (1 - x) * (1 - win) for x, win in zip(longer, wins, strict=True)]
    best_first = [one if one.majority else _swapped(one) for one in known]
    theirs = [1 - abs(x - (o.majority or 0.0)) for x, o in zip(longer, known, strict=True)]
    return {
        "version": VERSION,
        "judge": judge.name,
        "labels": source,
        "sha256": hashlib.sha256(repr(labelled).encode()).hexdigest(),
        "n": len(known),
        "left_out": left_out,
        "accuracy": _share(right),
        "constant": max(value := estimates.mean_of_shares(theirs)["value"], 1 - value),
        "ceiling": _ceiling(labelled),
        "position": verdicts.changed,
        **_of_margins(_margins(verdicts, labelled)),
        "failed": verdicts.failed,
        "longer": {"judge": _share(mine), "people": _share(theirs)},
        "probes": probe(judge, [(o.row, o.first, o.second) for o in best_first]),
        "by_kind": {
            kind: _share([right[i] for i in at])
            for kind, at in sorted(kinds.items())
            if len(kinds) > 1
        },
    }


def _judged(
    judge: Judge, labelled: Sequence[Labelled], source: str, left_out: dict[str, int]
) -> tuple[list[tuple[float, Labelled]], Verdicts]:
    """Return the pairs with a verdict, and all verdicts; count the others."""
    decided = [o for o in labelled if o.majority is not None]
    rows = [one.row for one in decided]
    first, second = [one.first for one in decided], [one.second for one in decided]
    verdicts = judge.compare(Pairs(rows, first, second))
    if verdicts is None:
        raise DataError(f"{judge.name} cannot judge {source}", expected="free text")
    judged = [(w, o) for w, o in zip(verdicts.wins, decided, strict=True) if w is not None]
    for why, n in (
        ("people are undecided", len(labelled) - len(decided)),
        (
            "without a verdict" if verdicts.failed else "over the judge's context",
            len(decided) - len(judged),
        ),
    ):
        if n:
            left_out[why] = n
    if len(judged) < 2:
        why = counts(left_out) or "there are no others"
        raise DataError(
            f"pairs of {source} that can be judged: {len(judged)} ({why})", expected="2 or more"
        )
    return judged, verdicts


def _margins(verdicts: Verdicts, labelled: Sequence[Labelled]) -> list[float]:
    """Return the mean log-odds of both orders that the judge gives to people's choice."""
    decided = [one for one in labelled if one.majority is not None]
    return [
        odds if one.majority else -odds
        for odds, one in zip(verdicts.odds or (), decided, strict=bool(verdicts.odds))
        if odds is not None
    ]


def _of_margins(margins: Sequence[float]) -> dict[str, Any]:
    if not margins:
        return {"calibration_error": None, "accuracy_of_mean_odds": None}
    return {
        "calibration_error": estimates.calibration_error(estimates.calibration(margins)),
        "accuracy_of_mean_odds": estimates.win_rate(margins, [0.0] * len(margins)),
    }


def _longer(one: Labelled) -> float:
    a, b = len(one.first), len(one.second)
    return 0.5 if a == b else float(a > b)


def _share(values: Sequence[float]) -> Estimate:
    return estimates.mean_of_shares(values)


def _ceiling(labelled: Sequence[Labelled]) -> Estimate | None:
    """Measure how often one person agrees with the majority of the others."""
    agreed = []
    for one in labelled:
        if len(one.votes) < 3:
            continue
        for i, vote in enumerate(one.votes):
            others = Labelled(one.row, "", "", one.votes[:i] + one.votes[i + 1 :]).majority
            if others is not None and vote != 0.5:
                agreed.append(float(vote == others))
    return estimates.mean_of_shares(agreed) if agreed else None


def counts(left_out: Mapping[str, int]) -> str:
    """Write counts by reason on one line."""
    return ", ".join(f"{reason}: {n}" for reason, n in left_out.items())
