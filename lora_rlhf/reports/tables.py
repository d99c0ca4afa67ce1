# SPDX-License-Identifier: Apache-2.0
"""Results that commands print: rich tables on a terminal, plain text elsewhere."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_rlhf.errors import counted
from lora_rlhf.estimates import Estimate, detectable, differs
from lora_rlhf.recipe.stage_keys import ALGORITHMS, stage_names
from lora_rlhf.redaction import printable, safe
from lora_rlhf.runs import samples
from lora_rlhf.runs.metric_names import DIFFERENCES, JUDGES, METRICS
from lora_rlhf.runs.progress import clock
from lora_rlhf.runs.record import Record

from . import kinds

_WIDTH, _MOST = 100, 60  # columns of a screen, and lines of one list
"""Widest line of the results by kind without a terminal."""

_COMPARED = (
    "algorithm", "seeds", "episodes", "comparisons", "samples_per_answer", "seconds",
    "seconds_per_answer",
)  # fmt: skip
"""Rows below the metrics in a comparison."""


def show(record: Record, console: Console | None = None) -> None:
    """Print the results of a run: evaluation, verdict, KL, and paths."""
    console = console or Console(highlight=False)
    evaluation = record.data["evaluation"]
    if evaluation and record.done("evaluate"):
        _print_table(console, *rows(evaluation))
        by_kind = kinds.of_record(record)
        if shown := [m for m in ("sft", "policy", "best_of_n") if by_kind.get(m)]:
            _print_kinds(console, {m: (evaluation.get(m, {}), by_kind[m]) for m in shown})
        say(console, " ".join(verdict(record)))
        if by_kind:
            say(
                console,
                "Each interval is of its number alone. What is called clearly worse is so after "
                "correction for the number of comparisons, the win rate apart, as in report.html.",
            )
        kl = evaluation.get("policy", {}).get("kl")
        if kl:
            say(console, f"KL of the policy to SFT: {cell(kl)}, in nats per sequence")
        if drawn := record.data["stages"]["evaluate"].get("samples_per_answer"):
            n = drawn["best_of_n"]
            say(console, f"every answer of best of n costs {n} samples of SFT")
        say(console, "")
    stages = [name for name, entry in record.data["stages"].items() if entry["status"] == "done"]
    lines = [("run", str(record.folder)), ("finished", ", ".join(stages) or "no stage yet")]
    lines += [("card", str(path)) for path in sorted(record.folder.glob("adapters/*/README.md"))]
    lines += [("plot", str(path)) for path in sorted(record.folder.glob("plots/*.png"))]
    lines += [("report", str(page))] if (page := record.folder / "report.html").exists() else []
    if record.done("sft"):
        run = shlex.quote(str(record.folder))
        lines.append(("try it", f"lora-rlhf generate {run} {_a_prompt(record)}"))
    for name, value in lines:
        say(console, f"{name:9s} {safe(value)}")


def _a_prompt(record: Record) -> str:
    """Return a prompt of the evaluation, which the models can answer, quoted for a shell."""
    rows = samples.read(record).values() if (record.folder / "samples.jsonl").exists() else ()
    prompts = (str(line["prompt"]) for row in rows for line in row.values())
    short = (shlex.quote(p) for p in prompts if p.isprintable() and len(p) <= 100)
    return next(short, '"your text"')


def stage_line(record: Record, stage: str) -> str:
    """Sum up a finished stage in one line: its result and its time."""
    entry, names = record.data["stages"][stage], stage_names(record.algorithm)
    seconds = record.data["clock"]["stages"].get(stage, {}).get("seconds", 0.0)
    done = "copied; it took" if "from_run" in entry else "done in"
    head = f"{names.index(stage) + 1}/{len(names)} {stage} {done} {clock(seconds)}"
    lines = [line for line in record.metrics(stage) if "reward/score" in line]
    results = []
    if "skipped" in entry:
        results.append(f"skipped: {entry['skipped']}")
    if "train_loss" in entry:
        results.append(f"mean loss {entry['train_loss']:.3g}")
    if "held_out_loss" in entry:
        results.append(f"held-out loss {entry['held_out_loss']:.3g}")
    if "from" in entry:
        results.append(f"taken from {entry['from']['adapter']}")
    if "accuracy" in entry:
        results.append(f"held-out accuracy {cell(entry['accuracy'])}")
    if "gate" in entry:
        reason = entry.get("gate_reason")
        results.append(f"gate {entry['gate']}{f' ({reason})' if reason else ''}")
    if lines:
        first, last = (float(line["reward/score"]) for line in (lines[0], lines[-1]))
        results.append(f"score {first:.3g} -> {last:.3g}")
    if "kl_last" in entry:
        results.append(f"KL to SFT {float(entry['kl_last']):.3g} nats")
    if stage == "evaluate":
        results.append(
            f"{counted(entry['prompts'], 'prompt')} for each of {', '.join(entry['models'])}"
        )
    return ": ".join([head, ", ".join(results)]) if results else head


def verdict(
    record: Record, by_kind: Mapping[str, Mapping[str, kinds.Metrics]] | None = None
) -> list[str]:
    """Say if the policy beat SFT, by its win rate's interval, and on which kinds it got worse.

    Args:
        by_kind: Results by kind, if the record does not hold them yet.
    """
    accuracy = record.data["stages"].get("reward", {}).get("held_out_accuracy")
    by_kind = kinds.of_record(record) if by_kind is None else by_kind
    return sentences(record.data["evaluation"], record.algorithm, by_kind, accuracy)


def sentences(
    evaluation: Mapping[str, Mapping[str, Any]],
    algorithm: str = "ppo",
    by_kind: Mapping[str, Mapping[str, kinds.Metrics]] | None = None,
    accuracy: Estimate | None = None,
) -> list[str]:
    """Return the sentences of `verdict`, the headline first.

    Args:
        accuracy: Accuracy of the held-out reward model on held-out comparisons.
    """
    who, model = ALGORITHMS[algorithm], "best_of_n" if algorithm == "best_of_n" else "policy"
    metrics, own = evaluation.get(model, {}), (by_kind or {}).get(model, {})
    hidden = kinds.sentences(who, metrics, evaluation.get("sft", {}), own)
    return [_by_win_rate(metrics, algorithm, accuracy), *hidden.values()]


def _by_win_rate(metrics: Mapping[str, Any], algorithm: str, accuracy: Estimate | None) -> str:
    who = ALGORITHMS[algorithm]
    metric = next((name for name in JUDGES if metrics.get(name)), None)
    unknown = f"It is unknown whether {who} beat SFT:"
    if metric is None:
        return f"{unknown} this run has no win rate."
    value, low, high, n = (metrics[metric][key] for key in ("value", "low", "high", "n"))
    judge = f"by {JUDGES[metric]}"
    if metric == "win_rate_proxy":
        if algorithm == "dpo":
            judge = "by a reward model that learned from the same comparisons"
        judge += ", which proves little"
    by_chance = False
    if metric == "win_rate_held_out" and accuracy and accuracy["low"] is not None:
        judge += f", right on {cell(accuracy)} held-out comparisons"
        by_chance = accuracy["low"] <= 0.5
    rate = f"win rate {100 * value:.1f} %"
    if low is None or high is None:
        return f"{unknown} {rate} {judge}, with no interval (n={n})."
    rate += f" [{100 * low:.1f}, {100 * high:.1f}] {judge}, n={n}"
    if by_chance:
        return f"{unknown} {rate}; this judge is not clearly better than chance."
    if low > 0.5:
        return f"{who} beat SFT: {rate}; the 95 % interval lies above 50 %."
    if high < 0.5:
        return f"{who} did worse than SFT: {rate}; the 95 % interval lies below 50 %."
    least = 100 * (detectable(metrics[metric]) or 0)
    return (
        f"{who} was not shown to beat SFT: {rate}; the 95 % interval includes 50 %. So many "
        f"prompts show a difference of {least:.1f} points in 8 of 10 evaluations."
    )


def show_comparison(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report of `compare.run`: table, differences with their intervals, notes."""
    console = console or Console(highlight=False)
    header, table = rows({row["label"]: row["metrics"] for row in report["rows"]})
    for name in _COMPARED:
        cells = [_plain(row[name]) for row in report["rows"]]
        if any(cells):
            table.append([name, *cells])
    _print_table(console, header, table)
    if any(row["by_kind"] for row in report["rows"]):
        by_kind = {row["label"]: (row["metrics"], row["by_kind"]) for row in report["rows"]}
        _print_kinds(console, by_kind)
    if (by_kind_table := differences_by_kind(report["differences"]))[1]:
        _print_columns(console, *by_kind_table)
        say(console, "* clear after correction for the number of kinds and metrics")
    each = [*differences(report["differences"])]
    more = [f"and {len(each) - _MOST} more differences: add --json"] * (len(each) > _MOST)
    for line in (*each[:_MOST], *more, *report["notes"]):
        say(console, line)


def differences(given: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Write the paired differences of a comparison, one line each."""
    for one in given:
        result = f"not comparable: {one['why_not']}"
        if one["estimate"] is not None:
            result = cell(one["estimate"], difference=True)
            result += f" seeds, paired in {one['pairs']}" if one["pairs"] > 1 else ", paired"
            result += _corrected(one["estimate"])
        metric = one["metric"].replace("_", " ")
        yield f"{metric} of {one['of']} minus that of {one['less']}: {result}"


def differences_by_kind(
    given: Sequence[Mapping[str, Any]],
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the paired differences by kind of prompt; a `*` marks the clear ones."""
    names = sorted({kind for one in given for kind in one["by_kind"]})
    lines = []
    for one in given:
        shown = {
            kind: "*" * abs(differs(estimate)) + cell(estimate, difference=True)
            for kind, estimate in one["by_kind"].items()
        }
        if shown:
            lines.append([f"{one['of']} less {one['less']}", *(shown.get(k, "") for k in names)])
    metric = given[0]["metric"] if given else ""
    return [f"{metric}, difference", *kinds.columns(names)[1:]], lines


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def show_answers(answers: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Print generated answers: side by side on a terminal, otherwise one by one."""
    console = console or Console(highlight=False)
    rewarded = any("reward" in answer for answer in answers)
    if not console.is_terminal:
        for answer in answers:
            reward = f"  reward {answer['reward']:.3f}" if "reward" in answer else ""
            say(console, f"[{answer['model']}]  tokens {answer['tokens']}{reward}")
            say(console, printable(answer["text"]) + "\n")
        return
    table = Table(box=box.ROUNDED, expand=True)
    for answer in answers:
        table.add_column(Text(answer["model"]), ratio=1, overflow="fold")
    table.add_row(*(Text(printable(answer["text"])) for answer in answers), end_section=True)
    table.add_row(*(Text(f"{answer['tokens']} tokens", style="dim") for answer in answers))
    if rewarded:
        scores = (answer.get("reward") for answer in answers)
        table.add_row(*(Text("" if s is None else f"reward {s:.3f}") for s in scores))
    console.print(table)


def show_usage(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report of `usage_report.report`: a column for each adapter, and differences."""
    console = console or Console(highlight=False)
    groups = report["groups"]
    names = list(dict.fromkeys(name for group in groups for name in group["metrics"]))
    table = [["requests", *(str(group["requests"]) for group in groups)]]
    table.append(["status", *(_counts(group["statuses"]) for group in groups)])
    table.append(["tokens", *(f"{group['tokens']:,}" for group in groups)])
    for name in names:
        table.append([name, *(cell(group["metrics"].get(name)) for group in groups)])
    _print_table(console, ["", *(group["name"] for group in groups)], table)
    for one in report["differences"]:
        result = f"{cell(one['estimate'], difference=True)}, {one['how']}"
        result += _corrected(one["estimate"])
        say(console, f"{one['metric']} of {one['of']} minus that of {one['less']}: {result}")


def _corrected(estimate: Estimate) -> str:
    p = estimate.get("p_corrected")
    return "" if p is None else f", p {p:.2g} corrected for the number of comparisons"


def _counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))


def say(console: Console, text: str) -> None:
    """Print one line without markup or wrapping, so that paths can be copied."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def aligned(header: Sequence[str], table: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a plain table, two spaces between columns."""
    lines = [header, *table]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _blocks(header: Sequence[str], table: Sequence[Sequence[str]]) -> Iterator[Iterator[str]]:
    """Split a wide table into tables of some of its columns, each with the first one beside it.

    Lines that say nothing about a table's columns are left out of it.
    """
    widths = [max(len(line[i]) for line in [header, *table]) for i in range(len(header))]
    shown: list[int] = []

    def part(columns: list[int]) -> tuple[list[str], list[list[str]]]:
        first, *rest = ([line[0], *(line[i] for i in columns)] for line in [header, *table])
        return first, [line for line in rest if any(line[1:])]

    for i in range(1, len(header)):
        if shown and widths[0] + sum(2 + widths[k] for k in [*shown, i]) > _WIDTH:
            yield aligned(*part(shown))
            shown = []
        shown.append(i)
    yield aligned(*part(shown))


def _print_table(console: Console, header: list[str], table: list[list[str]]) -> None:
    if not console.is_terminal:
        for line in aligned(header, table):
            say(console, line)
        say(console, "\nBrackets hold the 95 % interval; n is the number of observations.")
        return
    wide = _rich_table(header, table, " ")
    unlimited = console.options.update(max_width=10_000)  # rich caps its measure at the width
    fits = console.measure(wide, options=unlimited).minimum <= console.width
    console.print(wide if fits else _rich_table(header, table, "\n"))


def _print_kinds(
    console: Console, models: Mapping[str, tuple[kinds.Metrics, Mapping[str, kinds.Metrics]]]
) -> None:
    """Print each metric of some models, over all prompts and by kind; on a terminal values only."""
    names = list(dict.fromkeys(kind for _, own in models.values() for kind in own))
    lines = [
        [f"{metric}, {model}", *(cell(e, difference=metric in DIFFERENCES) for e in known)]
        for metric in METRICS
        for model, (all_prompts, own) in models.items()
        for _, known in kinds.values(all_prompts, {n: own.get(n, {}) for n in names}, [metric])
    ]
    _print_columns(console, ["by kind of prompt", *kinds.columns(names)], lines)
    if console.is_terminal:
        say(console, "The 95 % intervals by kind are on the cards and in record.json.\n")


def _print_columns(console: Console, header: Sequence[str], lines: Sequence[list[str]]) -> None:
    """Print estimates in many columns; on a terminal values only."""
    if not console.is_terminal:
        for part in _blocks(header, lines):
            for text in part:
                say(console, text)
            say(console, "")
        return
    rich = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)  # eight kinds fit 80 columns
    rich.add_column(header[0], min_width=18)
    for name in header[1:]:
        rich.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for metric, *cells in lines:
        rich.add_row(metric.replace("_", " "), *(text.partition(" ")[0] for text in cells))
    console.print(rich)


def _rich_table(header: list[str], table: list[list[str]], between: str) -> Table:
    """One row per metric; `between` separates value and interval: a space, or a line break."""
    lines = []
    for name, *cells in table:
        parts = [text.partition(" n=") for text in cells]
        counts = dict.fromkeys(n for _, _, n in parts if n)
        values = (value.replace(" [", f"{between}[") for value, _, _ in parts)
        lines.append([Text(name.replace("_", " ")), *map(Text, values), Text("/".join(counts))])
    rich = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    rich.add_column("metric", min_width=18)
    for i, name in enumerate([*header[1:], "n"], start=1):
        longest = max(max(map(len, str(line[i]).split("\n"))) for line in lines)
        style = {"policy": "bold", "best_of_n": "bold", "n": "dim"}.get(name, "")
        rich.add_column(name, justify="right", no_wrap=True, style=style, min_width=longest)
    for line in lines:
        rich.add_row(*line)
    return rich


def rows(evaluation: dict[str, dict[str, Estimate]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the record's `evaluation`: one row per metric, one column per model.

    Models keep the record's order, metrics that of METRICS; a missing metric is an empty cell.
    """
    known = dict.fromkeys(name for values in evaluation.values() for name in values)
    names = [name for name in METRICS if name in known]
    names += [name for name in known if name not in METRICS]
    table = [
        [name, *(cell(v.get(name), difference=name in DIFFERENCES) for v in evaluation.values())]
        for name in names
    ]
    return ["metric", *evaluation], table


def cell(estimate: Estimate | None, *, difference: bool = False) -> str:
    """Format as `0.41 [0.35, 0.47] n=128`; without an interval `0.41 n=1`; None is empty.

    A number from a formula has n = 0 and is shown as `0.41 (bound)`. A difference has at least
    three significant digits, so that a small one is not shown as 0.00.
    """
    if estimate is None:
        return ""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    largest = max(abs(float(x)) for x in (value, low, high) if x is not None)
    places = 2 if largest < 100 else 1 if largest < 1000 else 0

    def show(x: float) -> str:
        x, digits = round(float(x), 9), places  # a rounding error near 0 is 0
        if difference and x and math.isfinite(x):
            digits = max(places, 2 - math.floor(math.log10(abs(x))))
        return f"{round(x, digits) + 0.0:.{digits}f}"

    interval = "" if low is None or high is None else f" [{show(low)}, {show(high)}]"
    if not estimate["n"]:
        return f"{show(value)} (bound)"
    return f"{show(value)}{interval} n={estimate['n']}"
