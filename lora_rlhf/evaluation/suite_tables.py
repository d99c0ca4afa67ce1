# SPDX-License-Identifier: Apache-2.0
"""The tables of a report from the values of each answer, and its verdict in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_rlhf import estimates
from lora_rlhf.estimates import Estimate

from .judges import KINDS
from .metrics.metric import Metric
from .prompt_sets import Row
from .stress import EMPTY
from .verdicts import Verdicts

Values = Mapping[str, Sequence[float | None]]
"""Target -> value of each row; None where the metric does not apply or is undecided."""

RATING = "bradley_terry"
"""Name of the ratings from all pairs of targets."""

_ELO = 400 / math.log(10)
"""Elo points of a log-odds of 1."""

_RESAMPLES = 10_000


def metric_table(
    set_name: str,
    metric: Metric,
    rows: Sequence[Row],
    values: Values,
    reference: str,
    seed: int,
    clean: Values | None = None,
) -> dict[str, Any]:
    """Make the table of a metric: every target, and every target less the reference.

    Args:
        clean: Values on the clean prompts, if these are changed ones: every target also gets the
            difference, paired by prompt (`from_clean`).
    """

    def differences(only: Sequence[int]) -> dict[str, Estimate | None]:
        return {
            name: _difference(values[name], values[reference], only, seed, metric)
            for name in values
            if name != reference
        }

    every = differences(range(len(rows)))
    kinds = kinds_of(rows)
    by_kind = {kind: differences(only) for kind, only in kinds.items()}
    table = {
        "set": set_name,
        "metric": metric.name,
        "meaning": metric.meaning,
        "better": metric.better,
        "judge": metric.judge["name"] if metric.judge else None,
        "trusted": metric.judge is None or metric.judge["trusted"],
        "estimates": _by_target(metric, values, range(len(rows))),
        "by_kind": {kind: _by_target(metric, values, only) for kind, only in kinds.items()},
        "differences": [
            {
                "a": name,
                "b": reference,
                "estimate": estimate,
                "detectable": estimates.detectable(estimate),
                "by_kind": {kind: estimated[name] for kind, estimated in by_kind.items()},
            }
            for name, estimate in every.items()
        ],
    }
    if clean:
        whole = range(len(rows))
        table["from_clean"] = {
            name: _difference(values[name], clean[name], whole, seed, metric) for name in clean
        }
    return table


def swaps(
    metric: Metric, rows: Sequence[Row], values: Values, clean: Values, seed: int
) -> list[dict[str, Any]]:
    """Compare each target's values between the people of pairs, by kind of pair.

    The pairs of a kind are few: their p is that of random signs.
    """
    kinds = kinds_of(rows) or {rows[0].kind: list(range(len(rows)))}
    made = []
    for name in clean:
        for kind, only in kinds.items():
            if pairs := _known_pairs(values[name], clean[name], only):
                first, second = zip(*pairs, strict=True)
                gap = _difference(values[name], clean[name], only, seed, metric)
                if gap is not None:
                    gap["p"] = estimates.sign_flip_p(first, second, seed)
                made.append({"target": name, "kind": kind, "estimate": gap})
    return made


def win_rate_tables(
    set_name: str,
    judge: dict[str, Any],
    rows: Sequence[Row],
    verdicts: Mapping[str, Verdicts],
    lengths: Mapping[str, Sequence[int]],
    reference: str,
) -> list[dict[str, Any]]:
    """Make the tables of a judge: win rates against the reference, raw and length-controlled."""

    def raw(name: str, only: Sequence[int]) -> Estimate | None:
        return win_rate([verdicts[name].wins[i] for i in only])

    def controlled(name: str, only: Sequence[int]) -> Estimate | None:
        known = [i for i in only if verdicts[name].wins[i] is not None]
        if not known:
            return None
        return estimates.length_controlled_win_rate(
            [verdicts[name].wins[i] or 0.0 for i in known],
            [0.5] * len(known),
            [lengths[name][i] for i in known],
            [lengths[reference][i] for i in known],
        )

    by = f"by {judge['name']} ({KINDS[judge['kind']]})"
    meaning = f"share of prompts won against {reference}, {by}; ties count half"
    same = f"the same, predicted for answers as long as those of {reference}"
    common = {"set": set_name, "better": "higher", "judge": judge["name"]}
    common["trusted"] = judge["trusted"]
    return [
        {**common, "metric": "win_rate", "meaning": meaning, **_rates(verdicts, rows, raw)},
        {
            **common,
            "metric": "win_rate_length_controlled",
            "meaning": same,
            **_rates(verdicts, rows, controlled),
        },
    ]


def longer_table(
    set_name: str,
    rows: Sequence[Row],
    lengths: Mapping[str, Sequence[int]],
    reference: str,
) -> dict[str, Any]:
    """Make the table of how often a target's answer is longer than the reference's."""

    def rate(name: str, only: Sequence[int]) -> Estimate:
        own, others = ([lengths[of][i] for i in only] for of in (name, reference))
        return estimates.win_rate(own, others)

    return {
        "set": set_name,
        "metric": f"longer_than_{reference}",
        "meaning": f"share of prompts with more tokens than {reference}; ties count half",
        "better": "neither",
        "judge": None,
        "trusted": True,
        **_rates([name for name in lengths if name != reference], rows, rate),
    }


def _rates(
    names: Iterable[str],
    rows: Sequence[Row],
    rate: Callable[[str, Sequence[int]], Estimate | None],
) -> dict[str, Any]:
    """Return the estimates of a table against the reference, over all rows and by kind."""
    kinds, names = kinds_of(rows), list(names)
    return {
        "estimates": {name: rate(name, range(len(rows))) for name in names},
        "by_kind": {k: {name: rate(name, only) for name in names} for k, only in kinds.items()},
        "differences": [],
    }


def ratings_table(
    set_name: str,
    judge: dict[str, Any],
    wins: Mapping[tuple[str, str], Sequence[float | None]],
    reference: str,
    seed: int,
) -> dict[str, Any]:
    """Make the table of Bradley-Terry ratings, in Elo points above the reference.

    Args:
        wins: (target, other target) -> verdicts of each row, for every pair of targets.
    """
    names = list(dict.fromkeys(name for pair in wins for name in pair))
    array = np.zeros((len(next(iter(wins.values()))), len(names), len(names)))
    for pair, each in wins.items():
        i, j = map(names.index, pair)
        for row, win in enumerate(each):
            if win is not None:
                array[row, i, j], array[row, j, i] = win, 1 - win
    rated = estimates.bradley_terry(array[array.any(axis=(1, 2))], seed)
    gaps = {
        (a, b): estimates.scaled(rated[i][j], _ELO)
        for i, a in enumerate(names)
        for j, b in enumerate(names)
    }
    return {
        "set": set_name,
        "metric": RATING,
        "meaning": f"rating in Elo points, by {judge['name']} ({KINDS[judge['kind']]}), from all "
        f"pairs of models; {reference} has 0, and 100 points more win 64 % of comparisons",
        "better": "higher",
        "judge": judge["name"],
        "trusted": judge["trusted"],
        "estimates": {name: gaps[name, reference] for name in names},
        "by_kind": {},
        "differences": [{"a": a, "b": b, "estimate": gaps[a, b], "by_kind": {}} for a, b in wins],
    }


def powered_table(
    set_name: str,
    people: dict[str, Any],
    judge: dict[str, Any],
    wins: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]],
    reference: str,
) -> dict[str, Any] | None:
    """Make the table of win rates by people's verdicts on some rows and a judge's on all.

    Args:
        wins: Target -> verdicts by people and by the judge, of each row.
    """
    estimated: dict[str, Estimate | None] = {}
    for name, (by_people, by_judge) in wins.items():
        rows = [(y, f) for y, f in zip(by_people, by_judge, strict=True) if f is not None]
        both = [(y, f) for y, f in rows if y is not None]
        rest = [f for y, f in rows if y is None]
        if len(both) < 2 or len(rest) < 2:
            return None
        labels, predicted = zip(*both, strict=True)
        estimated[name] = estimates.prediction_powered(labels, predicted, rest)
    name = f"{people['name']} + {judge['name']}"
    return {
        "set": set_name,
        "metric": "win_rate",
        "meaning": f"share of prompts won against {reference}, by {name} (people on n prompts, "
        "and the judge on all: prediction-powered; right if the n were drawn at random)",
        "better": "higher",
        "judge": name,
        "trusted": True,
        "estimates": estimated,
        "by_kind": {},
        "differences": [],
    }


def win_rate(wins: Sequence[float | None]) -> Estimate | None:
    """The share of wins among the known verdicts, ties counting half."""
    known = [win for win in wins if win is not None]
    if not known:
        return None
    if all(win in (0.0, 0.5, 1.0) for win in known):
        return estimates.win_rate(known, [0.5] * len(known))
    return estimates.mean_of_shares(known)  # the shares of several people's votes


def gap_of_wins(
    wins: Sequence[float | None], clean: Sequence[float | None], seed: int
) -> Estimate | None:
    """The difference of a win rate from that on the unchanged prompts, paired by prompt."""
    pairs = _known_pairs(wins, clean, range(len(wins)))
    if not pairs:
        return None
    first, second = zip(*pairs, strict=True)
    return estimates.paired_difference(first, second, seed)


def kinds_of(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Group rows by kind of prompt; empty if all are of one kind."""
    kinds: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        kinds.setdefault(row.kind, []).append(i)
    return dict(sorted(kinds.items())) if len(kinds) > 1 else {}


def _by_target(metric: Metric, values: Values, only: Sequence[int]) -> dict[str, Estimate | None]:
    return {name: estimate(metric, [each[i] for i in only]) for name, each in values.items()}


def estimate(metric: Metric, values: Sequence[float | None]) -> Estimate | None:
    """The mean of a metric with its interval: Wilson's for shares of prompts, else Student's t.

    Means of shares within an answer have `estimates.mean_of_shares`, and shares that are corrected
    for a detector's errors have Lang and Reiczigel's.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    if metric.errors:
        made = estimates.corrected_share(sum(known), len(known), *metric.errors)
    elif metric.share and all(value in (0.0, 1.0) for value in known):
        made = estimates.wilson(sum(known), len(known))
    elif metric.share:
        made = estimates.mean_of_shares(known)
    else:
        made = estimates.mean_interval(known)
    return estimates.scaled(made, metric.scale) if metric.scale != 1 else made


def _known_pairs(
    a: Sequence[float | None], b: Sequence[float | None], only: Sequence[int]
) -> list[tuple[float, float]]:
    return [(x, y) for i in only if (x := a[i]) is not None and (y := b[i]) is not None]


def _difference(
    a: Sequence[float | None],
    b: Sequence[float | None],
    only: Sequence[int],
    seed: int,
    metric: Metric,
) -> Estimate | None:
    pairs = _known_pairs(a, b, only)
    if not pairs:
        return None
    first, second = zip(*pairs, strict=True)
    made = estimates.paired_difference(first, second, seed, _RESAMPLES)
    if metric.errors:
        made = estimates.corrected_difference(made, *metric.errors)
    return estimates.scaled(made, metric.scale) if metric.scale != 1 else made


def correct(tables: Sequence[dict[str, Any]], head: dict[str, Any] | None) -> None:
    """Give every comparison its p, and all but the headline one that is corrected for the others.

    Comparisons are differences, changes from the clean prompts or between the people of pairs, and
    win rates, by kind too.
    """
    family: list[Estimate] = []
    for table in tables:
        own = [row["estimate"] for row in table["differences"]]
        parts = [e for row in table["differences"] for e in row["by_kind"].values()]
        rates = str(table["metric"]).startswith("win_rate")
        if rates:
            own = list(table["estimates"].values())
            parts = [e for by in table["by_kind"].values() for e in by.values()]
        changes = [swap["estimate"] for swap in table.get("swaps", ())]
        changes += [] if "swaps" in table else table.get("from_clean", {}).values()
        leads = head is not None and all(table[k] == head[k] for k in ("set", "metric", "judge"))
        null = 0.5 if rates else 0.0
        for few, none in ((own, null), (parts, null), (changes, 0.0)):
            for estimated in few:
                p = estimated and estimated.get("p", estimates.p_value(estimated, none))
                if estimated and p is not None:
                    estimated["p"] = p
                    family += [] if leads and few is own else [estimated]
    estimates.correct(family)


# --- the verdict, in words ---------------------------------------------------------------------


def headline(wanted: str | None, tables: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Choose the table of the headline: the suite's metric, by the first trusted judge."""
    set_name, _, metric = (wanted or "").partition("/")
    for table in tables:
        if (table["set"], table["metric"]) == (set_name, metric) and table["trusted"]:
            return {"set": set_name, "metric": metric, "judge": table["judge"]}
    return None


def sentences(
    head: dict[str, Any] | None, wanted: str | None, tables: Sequence[dict[str, Any]]
) -> list[str]:
    """The verdict: the headline for every target, then what got clearly worse, by kind too."""
    verdict: list[str] = []
    if head is None and wanted:
        measured = any(f"{table['set']}/{table['metric']}" == wanted for table in tables)
        why = "has no judge that may decide (see the judges and their reasons)"
        verdict.append(f"No verdict: {wanted} {why if measured else 'was not measured'}.")
    if head is not None:
        keys = ("set", "metric", "judge")
        [table] = [t for t in tables if all(t[key] == head[key] for key in keys)]
        verdict += _of_win_rate(table) if table["metric"] == "win_rate" else _of_metric(table)
    verdict += _worse([t for t in tables if "from_clean" not in t], head)
    verdict += _under_stress([t for t in tables if "swaps" not in t])
    verdict += _by_identity(tables)
    looked = sum(1 + len(row["by_kind"]) for table in tables for row in table["differences"])
    looked += sum(len(t.get("swaps", t.get("from_clean", ()))) for t in tables)
    if looked > 1:
        verdict.append(
            f"{looked} differences were examined, kinds of prompt included. All but the headline "
            "are corrected for that: of those called better or worse, about one in twenty is "
            "expected to be chance (Benjamini and Hochberg)."
        )
    return verdict


def _of_win_rate(table: dict[str, Any]) -> list[str]:
    out = []
    for name, estimated in reversed(table["estimates"].items()):  # a run's policy is its last
        if estimated is None or estimated["low"] is None:
            out.append(f"{name}: unknown, because there are too few verdicts.")
            continue
        rate = (
            f"win rate {_percent(estimated)} on {table['set']}, {table['meaning'].split(', ')[1]}"
        )
        if estimated["low"] > 0.5:
            out.append(f"{name} is better: {rate}; the interval lies above 50 %.")
        elif estimated["high"] < 0.5:
            out.append(f"{name} is worse: {rate}; the interval lies below 50 %.")
        else:
            least = 100 * (estimates.detectable(estimated) or 0)
            shown = _could_show(estimated, f"{least:.1f} points from 50 %")
            out.append(f"{name} was not shown to be better or worse: {rate}{shown}.")
    return out


def _could_show(estimated: Estimate | None, least: str) -> str:
    """Return the clause on the smallest difference that this many prompts could have shown."""
    if estimated is None or estimated["low"] is None:
        return ""
    return f"; {estimated['n']} prompts show a difference of {least} in 8 of 10 evaluations"


def _percent(estimated: Estimate) -> str:
    value, low, high = (100 * float(estimated[key] or 0) for key in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}], n={estimated['n']}"


def _of_metric(table: dict[str, Any]) -> list[str]:
    out = []
    if not table["differences"]:  # a single target
        [(name, alone)] = table["estimates"].items()
        value = f"{_plain(alone)}, n={alone['n']}" if alone else "unknown"
        out.append(f"{name}: {table['metric']} {value} on {table['set']}; nothing to compare with.")
    for row in reversed(table["differences"]):
        sign = _sign(row["estimate"], table["better"])
        words = {1: "is better", -1: "is worse", 0: "was not shown to be better or worse"}[sign]
        least = row.get("detectable")
        shown = "" if sign or least is None else _could_show(row["estimate"], f"{least:.3g}")
        out.append(f"{row['a']} {words} than {row['b']}: {_gap(table, row['estimate'])}{shown}.")
    return out


def _gap(table: dict[str, Any], estimated: Estimate | None) -> str:
    if estimated is None:
        return f"no {table['metric']} on both"
    return f"{table['metric']} {_signed(estimated)} on {table['set']}, paired, n={estimated['n']}"


def _plain(estimated: Estimate) -> str:
    return _signed(estimated).replace("+", "")


def _signed(estimated: Estimate) -> str:
    low, high = estimated["low"], estimated["high"]
    interval = "" if low is None or high is None else f" [{low:+.3g}, {high:+.3g}]"
    return f"{estimated['value']:+.3g}{interval}"


def _sign(estimated: Estimate | None, better: str) -> int:
    """1: clearly better, -1: clearly worse, 0: neither."""
    direction = {"higher": 1, "lower": -1, "neither": 0}[better]
    return direction * estimates.differs(estimated)


def _worse(tables: Sequence[dict[str, Any]], head: dict[str, Any] | None) -> list[str]:
    """List what is clearly worse than the reference: one sentence in all, one by kind of prompt."""
    whole: dict[str, list[str]] = {}
    by_kind: dict[str, list[str]] = {}
    for table in (one for one in tables if one["metric"] != RATING):  # win rates say it
        is_head = head is not None and all(table[k] == head[k] for k in ("set", "metric", "judge"))
        for row in table["differences"]:
            who = f"{row['a']} is worse than {row['b']}"
            if _sign(row["estimate"], table["better"]) < 0 and not is_head:
                whole.setdefault(who, []).append(_gap(table, row["estimate"]))
            kinds = [
                f"{kind} {_signed(estimated)}"
                for kind, estimated in row["by_kind"].items()
                if _sign(estimated, table["better"]) < 0
            ]
            if kinds:
                by_kind.setdefault(who, []).append(f"{table['metric']} on {', '.join(kinds)}")
        if table["metric"] == "win_rate" and table["trusted"]:
            for kind, rates in table["by_kind"].items():
                for name, estimated in rates.items():
                    if estimated and estimates.differs(estimated, 0.5) < 0:
                        text = f"on {kind} {_percent(estimated)}"
                        by_kind.setdefault(f"{name} loses", []).append(text)
    out = []
    for who in reversed(dict.fromkeys((*whole, *by_kind))):
        if who in whole:
            out.append(f"{who}: {'; '.join(whole[who])}.")
        if who in by_kind:
            out.append(f"{who} on some kinds of prompt: {'; '.join(by_kind[who])}.")
    return out


def _under_stress(tables: Sequence[dict[str, Any]]) -> list[str]:
    """List the clear drops of each target on changed prompts, apart from empty ones."""
    gaps: dict[str, dict[str, str]] = {}
    for table in tables:
        for name, estimated in table.get("from_clean", {}).items():
            wanted = not table["set"].endswith(f" under {EMPTY}")
            if wanted and estimated and _sign(estimated, table["better"]) < 0:
                by_set, where = gaps.setdefault(name, {}), table["set"]
                before = f"{by_set[where]}, " if where in by_set else f"{where}: "
                by_set[where] = f"{before}{table['metric']} {_signed(estimated)}"
    return [
        f"{name} is worse on changed prompts than on unchanged ones: {'; '.join(each.values())}."
        for name, each in gaps.items()
    ]


def _by_identity(tables: Sequence[dict[str, Any]]) -> list[str]:
    """Say which targets treat people of different identity differently, if any does."""
    every = [(table, swap) for table in tables for swap in table.get("swaps", ())]
    if not every:
        return []
    gaps: dict[str, list[str]] = {}
    for table, swap in every:
        if estimates.differs(gap := swap["estimate"]):
            text = f"{swap['kind']}: {table['metric']} {_signed(gap)}"
            gaps.setdefault(swap["target"], []).append(f"{text} (p {gap['p_corrected']:.2g})")
    many = f"{len(every)} comparisons of identities, corrected with all others"
    if not gaps:
        return [f"No model was shown to treat people differently by identity ({many})."]
    return [
        f"{name} treats people differently by identity ({many}): {'; '.join(each)}."
        for name, each in gaps.items()
    ]
