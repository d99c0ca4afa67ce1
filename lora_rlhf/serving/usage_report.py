# SPDX-License-Identifier: Apache-2.0
"""Product metrics from the usage store: requests, times, blocked, valid, thumbs, by adapter.

Every number has its 95 % interval. Requests with the same prompt are one cluster. Two adapters are
compared on the prompts that both answered, paired, or as independent samples where these are few.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_rlhf import estimates
from lora_rlhf.errors import UsageError
from lora_rlhf.estimates import Estimate

from . import usage_store
from .usage_store import UsageStore

FEWEST_PAIRS = 10
"""Prompts that two adapters must share to be compared on them."""

Row = dict[str, Any]

_SHARES: dict[str, Callable[[Row], bool | None | list[bool]]] = {
    "answered": lambda row: row["status"] == 200,
    "blocked": lambda row: row["blocked"] if row["status"] == 200 else None,
    "structured answers valid": lambda row: row["valid"],
    "tasks completed": lambda row: row["completed"],
    "thumbs up": lambda row: [*row["thumbs"].values()],
}
"""Name -> outcome of a request, None if it has none; a list has one for each judged answer."""

_NUMBERS: dict[str, Callable[[Row], float | None]] = {
    "seconds": lambda row: row["seconds"] if _generated(row) else None,
    "seconds to the first token": lambda row: row["first_token_s"] if _generated(row) else None,
    "seconds in the queue": lambda row: row["queue_s"] if _generated(row) else None,
    "answer tokens per request": lambda row: row["completion_tokens"] if _generated(row) else None,
}


def _generated(row: Row) -> bool:
    return bool(row["status"] == 200 and row["completion_tokens"] > 0)


def report(
    path: str | Path = usage_store.NAME, compare: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return what a store says of each adapter, and the differences of two of them.

    Args:
        compare: Two names as `groups` has them, or their models; default: if there are two.

    Raises:
        UsageError: There is no store, or no such adapter.
    """
    with UsageStore(path).open(readonly=True) as store:
        rows = store.uses()
    of_group: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        version = f"@{row['version'][:12]}" if row["version"] else ""
        of_group[f"{row['model'] or 'no model'}{version}"].append(row)
    ends = [datetime.fromtimestamp(row["created"], UTC) for row in rows[:1] + rows[-1:]]
    period = [end.isoformat(timespec="seconds") for end in ends]
    groups = [_group(name, given) for name, given in sorted(of_group.items())]
    pair = _pair(of_group, compare)
    return {"period": period, "groups": groups, "differences": _differences(of_group, *pair)}


def _group(name: str, rows: list[Row]) -> dict[str, Any]:
    metrics: dict[str, Estimate] = {}
    for metric, outcome in _SHARES.items():
        if given := _known(rows, outcome):
            values, prompts = zip(*given, strict=True)
            metrics[metric] = estimates.share_interval([float(v) for v in values], prompts)
    for metric, number in _NUMBERS.items():
        if not (given := _known(rows, number)):
            continue
        values, prompts = zip(*given, strict=True)
        if metric == "answer tokens per request":
            metrics[metric] = estimates.mean_interval(values, prompts)
        else:
            for share in (0.5, 0.95):
                title = f"{metric}, p{100 * share:.0f}"
                metrics[title] = estimates.quantile_interval(values, share, prompts)
    return {
        "name": name,
        "model": rows[0]["model"],
        "version": rows[0]["version"],
        "requests": len(rows),
        "kinds": dict(Counter(row["kind"] for row in rows)),
        "statuses": {str(s): n for s, n in Counter(row["status"] for row in rows).items()},
        "tokens": sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows),
        "metrics": metrics,
    }


def _known(rows: list[Row], value: Callable[[Row], Any]) -> list[tuple[float, str]]:
    """Return the values that are there, each with its prompt; a row without one stands alone."""
    known = []
    for row in rows:
        given = value(row)
        of_row = given if isinstance(given, list) else [given]
        prompt = row["prompt"] or str(row["row"])
        known += [(float(one), prompt) for one in of_row if one is not None]
    return known


def _pair(of_group: dict[str, list[Row]], compare: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the adapters to compare; none if none are chosen."""
    if compare is None:
        names = tuple(sorted(name for name in of_group if name != "no model"))
        return names if len(names) == 2 else ()
    chosen = []
    for wanted in compare:
        fitting = [name for name in of_group if wanted in (name, name.partition("@")[0])]
        if len(fitting) != 1:
            several = "has several versions" if fitting else "is not in the store"
            raise UsageError(f"{wanted!r:.80} {several}", expected=", ".join(fitting or of_group))
        chosen += fitting
    return tuple(chosen)


def _differences(of_group: dict[str, list[Row]], *pair: str) -> list[dict[str, Any]]:
    """Compare two adapters on every metric that both have."""
    made: list[dict[str, Any]] = []
    for metric, value in {**_SHARES, **_NUMBERS}.items() if pair else ():
        first, second = (_known(of_group[name], value) for name in pair)
        if not first or not second:
            continue
        estimate, how = _difference(first, second)
        of, less = pair
        title = f"mean {metric}" if metric in _NUMBERS else metric
        made.append({"metric": title, "of": of, "less": less, "estimate": estimate, "how": how})
    if len(made) > 1:
        estimates.correct([one["estimate"] for one in made])
    return made


def _difference(
    first: list[tuple[float, str]], second: list[tuple[float, str]]
) -> tuple[Estimate, str]:
    """Return the difference of means, and the way it was estimated."""
    means = []
    for given in (first, second):
        of_prompt: dict[str, list[float]] = defaultdict(list)
        for value, prompt in given:
            of_prompt[prompt].append(value)
        means.append({prompt: sum(v) / len(v) for prompt, v in of_prompt.items()})
    shared = [prompt for prompt in means[0] if prompt in means[1]]
    if len(shared) >= FEWEST_PAIRS:
        one, two = ([mean[prompt] for prompt in shared] for mean in means)
        return estimates.paired_difference(one, two, seed=0), f"paired on {len(shared)} prompts"
    # A prompt counts once: answers to one prompt are alike.
    one, two = ([*mean.values()] for mean in means)
    return estimates.unpaired_difference(one, two), "independent samples"
