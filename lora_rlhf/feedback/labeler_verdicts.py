# SPDX-License-Identifier: Apache-2.0
"""A verdict on each labeler, with its reasons; the screening test; consensus of several labelers.

The verdicts rest on one model of raters. Two people who judge the same two answers agree more often
than chance because both see some of what makes the first one better: the expected product of their
verdicts (1 and -1) is `r_i r_j`, with a reliability r from -1 (always the opposite) over 0 (chance)
to 1, one for each. Gold items are a rater with r = 1. Ties carry no direction and are left out.
"""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from lora_rlhf import extras
from lora_rlhf.data import answer_format
from lora_rlhf.estimates import Estimate, mean_interval, share_interval, t_quantile, wilson

from .agreement import comparisons, current
from .labels import OVERALL, Label, Task

FEWEST_TASKS = 8
"""Tasks in common with others (or with gold) below which nothing is said of a labeler."""

USEFUL = 0.75
"""Share of the team's reliability that somebody who is named must be shown to lie below."""

LOWEST_TEAM = 0.4
"""Reliability that is assumed of a team at least: a team agrees on 58 % of pairs then."""

SAME_SIDE = 0.75
"""Lower limit of the share of choices of one side (or of one answer) from which one is named."""

ALIKE = 0.9
"""Share of equal verdicts from which one labeler may be a copy of another, or of a judge."""

LONGER = "the rule “the longer answer”"
_GOLD = "\0gold"

SCREENING = {"flags": 0.75, "rankings": 0.75, "demonstrations": 6.0}
"""Soft cut-offs if the project sets none, as InstructGPT's (B.1)."""


@dataclass(frozen=True)
class Screened:
    """One part of the screening test: agreement, its cut-off, and what follows."""

    estimate: Estimate
    cut_off: float

    @property
    def result(self) -> str:
        """Return `below` if the whole interval is below the cut-off, `unclear`, or `passed`."""
        high = self.estimate["high"]
        if self.estimate["value"] >= self.cut_off:
            return "passed"
        return "below" if high is not None and high < self.cut_off else "unclear"


@dataclass(frozen=True)
class Verdict:
    """Result for one person, from their labels.

    Args:
        reasons: Kind (`chance`, `side`, `copies`, `against`) -> a sentence; empty: not named.
        note: What limits the verdict, such as too few labels; empty if nothing does.
        agreement: Share of pairs on which others who judged them too agree; ties are left out.
        gold: Share of the pairs of gold items that are right.
        reliability: r of the model of raters; None without tasks in common with others.
        first_shown: Share of choices for the answer that was shown first.
    """

    labeler: str
    labels: int
    skipped: int
    seconds: float | None
    reasons: dict[str, str] = field(default_factory=dict)
    note: str = ""
    agreement: Estimate | None = None
    gold: Estimate | None = None
    reliability: Estimate | None = None
    first_shown: Estimate | None = None
    screening: dict[str, Screened] = field(default_factory=dict)

    @property
    def named(self) -> bool:
        """True if the owner should look at this labeler before using the labels."""
        return bool(self.reasons)


def judge_labelers(
    tasks: Sequence[Task],
    labels: Sequence[Label],
    judges: Sequence[Label] = (),
    cut_offs: Mapping[str, float] | None = None,
) -> list[Verdict]:
    """Return the verdict on each labeler, in alphabetical order.

    Args:
        judges: What automatic judges say of the same tasks, as labels; `labeler` is the judge.
        cut_offs: Of the screening test; see `SCREENING`.
    """
    given = current(tasks, labels)
    people = sorted({label.labeler for _, label in given})
    table = _Table(tasks, given, current(tasks, judges), people)
    copies = table.copies()
    table.drop(copies)
    screened = screen(tasks, labels, cut_offs)
    shown = _Shown(given)
    made = []
    for name in people:
        mine = [(task, label) for task, label in given if label.labeler == name]
        reasons = {"copies": copies[name].sentence} if name in copies else {}
        reasons |= _same_text(name, given)
        first = shown.first(name)
        reasons |= shown.same_side(name)
        skill, note = table.reliability(name), ""
        agreement, gold = table.agreement(name)
        if skill is None:
            note = f"fewer than {FEWEST_TASKS} tasks in common with others"
        else:
            alike = table.like_somebody(name)
            worth, note = _worth(skill, table.team(name), agreement, gold, alike)
            reasons |= worth
        seconds = [label.seconds for _, label in mine if label.value is not None]
        made.append(
            Verdict(
                labeler=name,
                labels=len(seconds),
                skipped=len(mine) - len(seconds),
                seconds=statistics.median(seconds) if seconds else None,
                reasons=reasons,
                note=note,
                agreement=agreement,
                gold=gold,
                reliability=skill,
                first_shown=first,
                screening=screened.get(name, {}),
            )
        )
    return made


def _worth(
    skill: Estimate,
    team: float,
    agreement: Estimate | None,
    gold: Estimate | None,
    alike: bool,
) -> tuple[dict[str, str], str]:
    """Return the reasons to name somebody by their reliability, and a note."""
    low, high = skill["value"] - _half(skill), skill["value"] + _half(skill)
    parts = [("the others", agreement), ("gold items", gold)]
    shown = " and ".join(f"with {who} on {_percent(e)}" for who, e in parts if e)
    parties = [estimate for _, estimate in parts if estimate]
    worse = any((e["high"] or 1.0) < 0.5 for e in parties) or all(e["value"] < 0.5 for e in parties)
    better = alike or any((e["low"] or 0.0) > 0.5 for e in parties)
    if high < 0 and worse:
        return {
            "against": f"answers against the others: agrees {shown} of pairs; perhaps 1 was taken "
            "for the worst rank"
        }, ""
    if low > 0:
        return {}, ""
    if better and high < USEFUL * team:  # the team has more than one taste
        return {}, "better than chance, but unlike most of the team: perhaps of another taste"
    if high < USEFUL * team:
        return {"chance": f"no better than chance: agrees {shown} of pairs"}, ""
    return {}, "too few labels in common with others to tell from chance"


def _half(estimate: Estimate) -> float:
    return (estimate["high"] or 0.0) - estimate["value"]


def _percent(estimate: Estimate) -> str:
    low, high = estimate["low"], estimate["high"]
    limits = "" if low is None or high is None else f" [{low:.0%}, {high:.0%}]"
    return f"{estimate['value']:.0%}{limits}"


# --- the model of raters -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Copy:
    of: str
    sentence: str


class _Table:
    """The decided verdicts of every rater (rows) on every question (columns): 1, -1, or 0."""

    def __init__(
        self,
        tasks: Sequence[Task],
        given: Sequence[tuple[Task, Label]],
        judged: Sequence[tuple[Task, Label]],
        people: Sequence[str],
    ) -> None:
        self.people, self.last = list(people), len(people)
        judges = [LONGER, *sorted({label.labeler for _, label in judged})]
        self.names = [_GOLD, *people, *judges]  # rows: 0, 1 to last, and more
        self.first = {(task.id, one.labeler): one.id for task, one in given}
        row = {name: number for number, name in enumerate(self.names[: 1 + self.last])}
        judge = {name: 1 + self.last + number for number, name in enumerate(judges)}
        ballots = [(task, row[one.labeler], one.value) for task, one in given]
        ballots += [(task, 0, task.gold) for task in tasks if task.gold]
        ballots += [(task, judge[one.labeler], one.value) for task, one in judged]
        ballots += [(task, judge[LONGER], value) for task, value in _longer(tasks)]
        cells = list(_directions(ballots))
        column = {key: n for n, key in enumerate(dict.fromkeys(key for _, key, _ in cells))}
        task_of = {name: n for n, name in enumerate(dict.fromkeys(key[0] for key in column))}
        self.tasks = list(task_of)
        self.task = np.array([task_of[key[0]] for key in column], dtype=int)
        self.x = np.zeros((len(self.names), len(column)))
        for rater, key, verdict in cells:
            self.x[rater, column[key]] = verdict
        self.trust = np.zeros(len(self.names), dtype=bool)  # whose verdicts measure others
        self.trust[: 1 + self.last] = True
        self.r = self._fit()

    def _fit(self) -> Any:
        """Estimate r of gold and people in turns with what they say together."""
        start, weight = 0.7, 2.0  # so many questions at the start's r are assumed
        r = np.where(self.trust, start, 0.0)
        voted = self.x[: 1 + self.last]
        for _ in range(100):
            r[0] = 1.0
            belief = self._belief(r)
            new = r.copy()
            for i in range(1, 1 + self.last):
                given = voted[i] != 0
                y = np.tanh((belief[given] - _odds(r[i]) * voted[i][given]) / 2)
                new[i] = (voted[i][given] @ y + weight * start) / (y @ y + weight)
            new = np.where(self.trust, np.clip(new, -1, 1), 0.0)
            moved, r = abs(new - r)[1:].max(initial=0.0), (r + new) / 2
            if moved < 1e-4:
                break
        r[0] = 1.0
        return r

    def _belief(self, r: Any) -> Any:
        """Return the log-odds that the later answer is the better one, by all trusted raters."""
        return (_odds(r) * self.trust) @ self.x

    def drop(self, copies: Mapping[str, _Copy]) -> None:
        """Measure nobody by those who copy."""
        for name in copies:
            self.trust[self._row(name)] = False
        self.r = self._fit()

    def _row(self, name: str) -> int:
        return 1 + self.people.index(name)

    def _of(self, rater: int, without: int = 0) -> Estimate | None:
        """Estimate r of one rater from the trusted others (without one), with an interval by task.

        Others who give the chance (1 + y) / 2 to one side expect the product with y to be r y^2.
        """
        odds = _odds(self.r) * self.trust
        odds[rater] = 0.0
        if without:
            odds[without] = 0.0
        given = self.x[rater] != 0
        y = np.tanh(odds @ self.x[:, given] / 2)
        up = np.bincount(self.task[given], self.x[rater][given] * y)
        down = np.bincount(self.task[given], y * y)
        used = down > 0
        up, down = up[used], down[used]
        if used.sum() < FEWEST_TASKS:
            return None
        value = float(up.sum() / down.sum())
        error = mean_interval((up - value * down) / down.mean())
        half = float(error["high"] or 0.0) - error["value"]
        # Tasks weigh unequally: fewer degrees of freedom.
        size = round(down.sum() ** 2 / (down @ down))
        half *= t_quantile(max(1, size - 1)) / t_quantile(len(down) - 1)
        return {"value": value, "low": value - half, "high": value + half, "n": int(used.sum())}

    def reliability(self, name: str) -> Estimate | None:
        """Return r of a person, from gold and the other people; None if nobody can tell."""
        # Two people who disagree do not show which of them is wrong.
        row = self._row(name)
        common = (abs(self.x) @ abs(self.x[row])) * self.trust > 0
        common[row] = False
        return self._of(row) if common[0] or common.sum() > 1 else None

    def team(self, name: str) -> float:
        """Return the median reliability of the other people."""
        others = [self.r[self._row(other)] for other in self.people if other != name]
        return max(LOWEST_TEAM, statistics.median(others)) if others else LOWEST_TEAM

    def like_somebody(self, name: str) -> bool:
        """Tell if a person clearly agrees with some of the people, who may be few.

        Those with whom they agree in one half of the tasks are weighed by it in the other half.
        """
        row = self._row(name)
        people = [one for one in range(1, 1 + self.last) if one != row and self.trust[one]]
        product = self.x[people] * self.x[row]
        common = (product != 0).any(axis=0)
        product, task = product[:, common], self.task[common]
        half = np.random.default_rng(0).permutation(len(self.tasks))[task] % 2 == 0
        totals = np.zeros(len(self.tasks))
        for here in (half, ~half):
            seen = product[:, here]
            weight = np.maximum(seen.sum(axis=1), 0) / (abs(seen).sum(axis=1) + 1)
            totals += np.bincount(task[~here], weight @ product[:, ~here], len(self.tasks))
        totals = totals[np.unique(task)]
        return totals.size > 1 and (mean_interval(totals)["low"] or 0.0) > 0

    def agreement(self, name: str) -> tuple[Estimate | None, Estimate | None]:
        """Return the shares of pairs on which a person agrees with others, and with gold."""
        row, others = self._row(name), range(1, 1 + self.last)
        return self._share(row, [one for one in others if one != row]), self._share(row, [0])

    def _share(self, row: int, others: Iterable[int]) -> Estimate | None:
        outcomes, clusters = [], []
        for other in others:
            product = self.x[row] * self.x[other]
            outcomes.append(product[product != 0] > 0)
            clusters.append(self.task[product != 0])
        same = np.concatenate(outcomes or [np.zeros(0)])
        return share_interval(same, np.concatenate(clusters).tolist()) if same.size else None

    # -- copies

    def copies(self) -> dict[str, _Copy]:
        """Return those whose verdicts equal another's more often than both their r allow.

        Of two people, the one whose labels came later is the copy; both are, if that is mixed.
        """
        known: dict[str, _Copy] = {}
        for i, other in itertools.combinations(range(1, len(self.names)), 2):
            if i > self.last:
                break
            product = self.x[i] * self.x[other]
            opposite = other == 1 + self.last and product.sum() < 0  # the shorter answer
            same = self._alike(i, other, -product if opposite else product)
            if same is None:
                continue
            text = f"on {same:.0%} of {int(abs(product).sum())} pairs that both judged"
            me, name = self.names[i], self.names[other]
            name = name.replace("longer", "shorter") if opposite else name
            later = 1.0 if other > self.last else self._later(i, other, product)
            if later > 0.2:
                known.setdefault(me, _Copy(name, f"answers as {name} does, {text}"))
            if later < 0.8:
                known.setdefault(name, _Copy(me, f"answers as {me} does, {text}"))
        return known

    def _later(self, i: int, other: int, product: Any) -> float:
        """Return the share of common tasks that rater i labelled after the other."""
        common = [self.tasks[task] for task in {*self.task[product != 0]}]
        a, b = self.names[i], self.names[other]
        return sum(self.first[task, a] > self.first[task, b] for task in common) / len(common)

    def _alike(self, i: int, other: int, product: Any) -> float | None:
        """Return the share of equal verdicts of two raters if it is beyond what r explains."""
        common = product != 0
        if not common.any() or (product[common] > 0).mean() < ALIKE:
            return None
        tasks = len({*self.task[common]})
        if tasks < FEWEST_TASKS:
            return None
        equal = share_interval(product[common] > 0, self.task[common].tolist())
        same, low = equal["value"], equal["low"] or 0.0
        if same == 1 and equal["n"] > 2 * tasks:  # each pair as half an observation
            low = wilson(equal["n"] / 2, equal["n"] / 2)["low"] or 0.0  # type: ignore[arg-type]
        mine, theirs = self._of(i, without=other), self._of(other, without=i)
        if mine and theirs:
            a, b = (min(1.0, abs(one["value"])) for one in (mine, theirs))
            error = math.hypot(same - low, b * _half(mine) / 2, a * _half(theirs) / 2)
            # All are compared: one team in a thousand may have a copy by chance.
            with_people = self.last * (self.last - 1) / 2
            with_judges = self.last * (len(self.names) - 1 - self.last)
            pairs = with_people if other <= self.last else with_judges
            wider = NormalDist().inv_cdf(1 - 0.001 / pairs) / NormalDist().inv_cdf(0.975)
            if same - wider * error > (1 + a * b) / 2:
                return same
        # Nobody else comes near: not even a person who never errs is expected to be as equal.
        people = [one for one in range(1, 1 + self.last) if one not in (i, other)]
        usual = self.x[people] * self.x[other]
        if same > 0.99 and low > 0.9 and usual.any():
            return same if abs(usual.sum()) / abs(usual).sum() < 2 * ALIKE - 1 else None
        return None


def _odds(r: Any) -> Any:
    """Return the log-odds of a verdict by a rater of reliability r, which nobody's reaches."""
    return 2 * np.arctanh(np.clip(r, -0.95, 0.95))


def _directions(
    ballots: Sequence[tuple[Task, int, Mapping[str, Any] | None]],
) -> Iterator[tuple[int, tuple[str, tuple[int, int]], int]]:
    """Yield (rater, question, verdict) of each ballot without its ties.

    The overall quality in a rating counts as above or below the rater's own median.
    """
    overall: dict[int, list[float]] = {}
    for _, rater, value in ballots:
        if value and "overall" in value:
            overall.setdefault(rater, []).append(value["overall"])
    middle = {rater: statistics.median(values) for rater, values in overall.items()}
    for task, rater, value in ballots:
        verdicts = comparisons(task, value)
        if task.type == "rating" and value:
            verdicts = {(0, 0): int(np.sign(value["overall"] - middle[rater]))}
        yield from ((rater, (task.id, pair), one) for pair, one in verdicts.items() if one)


def _longer(tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Yield what somebody would say who takes the longer answer."""
    for task in tasks:
        lengths = [len(answer.text) for answer in task.answers]
        if task.type == "ranking":
            yield task, {"ranks": [1 + sum(b > a for b in lengths) for a in lengths]}
        elif task.type == "pair":
            yield task, {"strength": int(np.sign(lengths[1] - lengths[0]))}


# --- sides and texts -----------------------------------------------------------------------------


class _Shown:
    """Choices of each labeler, as they were on the screen."""

    def __init__(self, given: Sequence[tuple[Task, Label]]) -> None:
        self.sides: dict[str, list[tuple[str, bool]]] = {}  # task, the earlier place was preferred
        self.values: dict[str, dict[str, Counter[str]]] = {}  # type of task -> answers
        for task, label in given:
            mine = self.sides.setdefault(label.labeler, [])
            places = {answer: place for place, answer in enumerate(label.order)}
            for (a, b), verdict in comparisons(task, label.value).items():
                if verdict and a in places and b in places:
                    mine.append((task.id, (verdict < 0) == (places[a] < places[b])))
            values = self.values.setdefault(label.labeler, {})
            for kind, value in _shown_value(task, label):
                values.setdefault(kind, Counter())[value] += 1
        self.chosen = Counter({who: sum(x for _, x in mine) for who, mine in self.sides.items()})
        self.all: dict[str, Counter[str]] = {}
        for values in self.values.values():
            for kind, counts in values.items():
                self.all.setdefault(kind, Counter()).update(counts)

    def first(self, name: str) -> Estimate | None:
        """Return how often the answer in the earlier place was preferred; ties are left out."""
        mine = self.sides[name]
        return share_interval([x for _, x in mine], [key for key, _ in mine]) if mine else None

    def same_side(self, name: str) -> dict[str, str]:
        """Return a reason if somebody nearly always chooses one place, or gives one answer.

        Not if others do so too: then it lies in the tasks, such as an order never shuffled.
        """
        first, size = self.first(name), sum(map(len, self.sides.values())) - len(self.sides[name])
        if first and first["low"] is not None and first["high"] is not None:
            usual = (self.chosen.total() - self.chosen[name]) / size if size else 0.5
            for side, low, typical, share in (
                ("first", first["low"], usual, first["value"]),
                ("last", 1 - first["high"], 1 - usual, 1 - first["value"]),
            ):
                if low > max(SAME_SIDE, typical + 0.1):
                    where = f"prefers the answer shown {side} in {share:.0%} of pairs"
                    return {"side": f"always the same side: {where}"}
        for kind, mine in self.values[name].items():
            [(value, count)], others = mine.most_common(1), self.all[kind] - mine
            usual = others[value] / max(1, others.total())
            if (wilson(count, mine.total())["low"] or 0) > max(SAME_SIDE, usual + 0.1):
                given = f"{value} in {count} of {mine.total()} labels"
                return {"side": f"always the same answer: {given}"}
        return {}


def _shown_value(task: Task, label: Label) -> Iterator[tuple[str, str]]:
    """Yield an answer as the labeler saw it, with the type (and number of answers) of the task."""
    value = label.value or {}
    if task.type == "pair" and value:
        yield "pair", f"strength {value['strength'] * (-1 if label.order == (1, 0) else 1)}"
    elif task.type == "ranking" and value and label.order:
        ranks = [value["ranks"][answer] for answer in label.order]
        yield f"ranking {len(ranks)}", f"ranks {ranks}"
    elif task.type == "rating" and value:
        yield "rating", f"overall {value['overall']}"


def _same_text(name: str, given: Sequence[tuple[Task, Label]]) -> dict[str, str]:
    """Return a reason if most demonstrations are another's, written before."""
    first: dict[tuple[str, str], Label] = {}
    mine = copied = 0
    for task, label in sorted(given, key=lambda pair: pair[1].id):
        if task.type != "demonstration" or not label.value:
            continue
        text = " ".join(label.value["text"].split()).casefold()
        earlier = first.setdefault((task.id, text), label)
        if label.labeler == name:
            mine += 1
            copied += earlier.labeler != name
    if copied >= 3 and copied > mine / 2:
        return {"copies": f"{copied} of {mine} demonstrations are another's, word for word"}
    return {}


# --- screening -----------------------------------------------------------------------------------


def screen(
    tasks: Sequence[Task], labels: Sequence[Label], cut_offs: Mapping[str, float] | None = None
) -> dict[str, dict[str, Screened]]:
    """Return the screening test of each labeler: `flags`, `rankings`, `demonstrations`.

    Flags: the share of gold items that state `flags` on which somebody flags or not as gold does;
    without such items, of the tasks that anybody flagged, as most others do. Rankings: the share of
    pairs in the order of gold, or else of the others; a tie counts half. Demonstrations: the mean
    overall quality that others give them, if tasks rate them (the answer's model is the labeler);
    one that breaks the format of its task counts 1. A part without data is absent.
    """
    limits = {**SCREENING, **(cut_offs or {})}
    given = current(tasks, labels)
    by_task: dict[str, list[tuple[Task, Label]]] = {}
    for task, label in given:
        by_task.setdefault(task.id, []).append((task, label))
    parts = {"flags": _flagging(by_task), "rankings": _ranking(by_task)}
    parts["demonstrations"] = _demonstrating(given)
    by_person: dict[str, dict[str, Screened]] = {}
    for part, people in parts.items():
        for name, outcomes in people.items():
            interval = mean_interval if part == "demonstrations" else share_interval
            estimate = interval([x for _, x in outcomes], [key for key, _ in outcomes])
            by_person.setdefault(name, {})[part] = Screened(estimate, limits[part])
    return by_person


_Outcomes = dict[str, list[tuple[str, float]]]
"""Labeler -> (task, outcome)."""


def _flagging(by_task: Mapping[str, Sequence[tuple[Task, Label]]]) -> _Outcomes:
    golden = {
        key: bool(given[0][0].gold["flags"])
        for key, given in by_task.items()
        if given[0][0].gold and "flags" in given[0][0].gold
    }
    outcomes: _Outcomes = {}
    for key, given in by_task.items():
        flagged = {label.labeler: bool(label.flags) for _, label in given}
        if golden and key not in golden:
            continue
        if not golden and not any(flagged.values()):
            continue
        for name, mine in flagged.items():
            others = [other for who, other in flagged.items() if who != name]
            if key in golden:
                outcomes.setdefault(name, []).append((key, float(mine == golden[key])))
            elif others:
                share = sum(others) / len(others)
                right = 0.5 if share == 0.5 else float(mine == (share > 0.5))
                outcomes.setdefault(name, []).append((key, right))
    return outcomes


def _ranking(by_task: Mapping[str, Sequence[tuple[Task, Label]]]) -> _Outcomes:
    by_gold: _Outcomes = {}
    by_others: _Outcomes = {}
    for key, given in by_task.items():
        verdicts = {label.labeler: comparisons(task, label.value) for task, label in given}
        gold = comparisons(given[0][0], given[0][0].gold)
        for name, mine in verdicts.items():
            others = [other for who, other in verdicts.items() if who != name]
            for pair, verdict in mine.items():
                if gold.get(pair):
                    by_gold.setdefault(name, []).append((key, 0.5 + verdict * gold[pair] / 2))
                for other in others:
                    if other.get(pair):
                        right = 0.5 + verdict * other[pair] / 2
                        by_others.setdefault(name, []).append((key, right))
    return by_others | by_gold


def _demonstrating(given: Sequence[tuple[Task, Label]]) -> _Outcomes:
    outcomes: _Outcomes = {}
    writers = {label.labeler for task, label in given if task.type == "demonstration"}
    for task, label in given:
        writer = task.answers[0].model if task.type == "rating" else ""
        if writer in writers and writer != label.labeler and label.value:
            outcomes.setdefault(writer, []).append((task.id, float(label.value["overall"])))
        if task.type == "demonstration" and task.checks and label.value:
            if answer_format.problems(label.value["text"], task.checks):
                outcomes.setdefault(label.labeler, []).append((task.id, float(OVERALL[0])))
    return outcomes


# --- consensus -----------------------------------------------------------------------------------


def consensus(
    tasks: Sequence[Task], labels: Sequence[Label]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what several labelers say together: by `majority`, and by a `model` of labelers.

    The model is crowd-kit's one-coin Dawid-Skene: it estimates how often each labeler is right, and
    weighs the votes accordingly. Rankings and pairs are voted on pair by pair (ties are no vote),
    and answers are ranked by the sum of their chances to be the better one; of a rating, its
    overall quality is voted on.

    Returns:
        Way -> task -> value in the form of `Label.value`, for tasks with two labels or more.
    """
    by_task: dict[str, list[tuple[Task, Label]]] = {}
    for task, label in current(tasks, labels):
        if label.value is not None and task.type != "demonstration":
            by_task.setdefault(task.id, []).append((task, label))
    several = [given for given in by_task.values() if len(given) > 1]
    made: dict[str, dict[str, dict[str, Any]]] = {"majority": {}, "model": {}}
    for rating in (False, True):
        cast: _Cast = []
        for task, label in itertools.chain(*several):
            if (task.type == "rating") != rating:
                continue
            verdicts = comparisons(task, label.value)
            if rating:
                verdicts = {(0, 0): int((label.value or {})["overall"])}
            cast += [
                (label.labeler, task.id, pair, verdict)
                for pair, verdict in verdicts.items()
                if verdict
            ]
        for way, shares in zip(made, (_majority(cast), _dawid_skene(cast)), strict=True):
            for given in several:
                task = given[0][0]
                if (task.type == "rating") == rating:
                    made[way][task.id] = _together(task, shares)
    return made


_Cast = list[tuple[str, str, tuple[int, ...], int]]
"""(labeler, task, question, vote)."""

_Shares = dict[tuple[str, tuple[int, ...]], dict[int, float]]
"""(task, question) -> chance of each verdict."""


def _majority(cast: _Cast) -> _Shares:
    shares: _Shares = {}
    for _, task, pair, verdict in cast:
        votes = shares.setdefault((task, pair), {})
        votes[verdict] = votes.get(verdict, 0.0) + 1.0
    return {
        key: {v: float(n == max(votes.values())) for v, n in votes.items()}
        for key, votes in shares.items()
    }


def _dawid_skene(cast: _Cast) -> _Shares:
    if not cast:
        return {}
    user = "the consensus of labelers"
    pandas = extras.load("pandas", user, "feedback")
    kit = extras.load("crowdkit.aggregation.classification.dawid_skene", user, "feedback")
    questions = {
        key: number for number, key in enumerate(dict.fromkeys((t, p) for _, t, p, _ in cast))
    }
    frame = pandas.DataFrame(
        [(questions[task, pair], who, verdict) for who, task, pair, verdict in cast],
        columns=["task", "worker", "label"],
    )
    with warnings.catch_warnings():  # crowd-kit uses pandas in ways that will change
        warnings.simplefilter("ignore")
        chances = kit.OneCoinDawidSkene(n_iter=100).fit_predict_proba(frame)
    return {
        key: {int(label): float(chances.at[number, label]) for label in chances.columns}
        for key, number in questions.items()
    }


def _together(task: Task, shares: _Shares) -> dict[str, Any]:
    if task.type == "rating":
        chances = shares[task.id, (0, 0)]
        return {"overall": min(v for v, n in chances.items() if n == max(chances.values()))}
    wins = [0.0] * len(task.answers)
    for a, b in itertools.combinations(range(len(wins)), 2):
        chances = shares.get((task.id, (a, b)), {})
        second, first = chances.get(1, 0.0), chances.get(-1, 0.0)
        share = second / (first + second) if first + second else 0.5
        wins[a] += round(1 - share, 6)
        wins[b] += round(share, 6)
    if task.type == "pair":
        return {"strength": int(np.sign(round(wins[1] - wins[0], 6)))}
    return {"ranks": [1 + sum(other > win + 1e-6 for other in wins) for win in wins]}
