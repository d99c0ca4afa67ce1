# SPDX-License-Identifier: Apache-2.0
"""`lora-rlhf evaluate TARGET...` and `lora-rlhf judge`, for the command line and for Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_rlhf.errors import DataError, UsageError, counted, reason
from lora_rlhf.hub import targets
from lora_rlhf.hub.targets import Target
from lora_rlhf.reports import evaluation_report, html_report
from lora_rlhf.runs.disk import make_place, write_atomically
from lora_rlhf.runtime import environment, quiet

from . import judge_training, judge_validation, judges, run_suite
from . import suite as suites
from .engine import Engine
from .language_judges import LanguageModel, ServedModel


@quiet.libraries()
def evaluate_targets(
    names: Sequence[str],
    *,
    suite: str | None = None,
    out: Path | None = None,
    against: str | None = None,
    judge_names: Sequence[str] | None = None,
    labels: Sequence[Path] = (),
    judge_records: Sequence[Path] = (),
    base: str | None = None,
    load_in_4bit: bool = False,
    few_shot: int = 0,
    price_per_hour: float | None = None,
    n: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Evaluate targets; returns the folder with `report.json` and `report.html`.

    Args:
        names: Targets, as a user names them.
        suite: Default: `closed-world` if every target is of a run of the packaged recipe, else
            `quick`.
        out: Default: `evaluations/<suite>`, with `n` `evaluations/<suite>-n<n>`.
        against: Name of the reference; default: the first run's SFT, else the first target.
        judge_names: Default: the reward models of the targets' runs.
        n: Most prompts of each set, 2 or more; default: as the suite has it.

    Raises:
        UsageError: A target, suite, metric or judge cannot be used.
    """
    environment.settle()
    if note := environment.note():
        say(note)
    named = targets.parse(names, base=base, load_in_4bit=load_in_4bit, few_shot=few_shot)
    targets.check_text(named)
    chosen, file = _suite(suite, named, n)
    folder = out or Path("evaluations") / chosen.name
    evaluation = run_suite.Evaluation(
        targets=named,
        suite=chosen,
        suite_file=file,
        out=folder,
        reference=against or _reference(named),
        price_per_hour=price_per_hour,
        most=n,
        validations=_validations(judge_records),
        say=say,
    )
    if judge_names is None:
        specs = judges.of_targets(named)
    else:
        specs = judges.parse(judge_names, base)
    others: list[judges.Judge] = [
        judges.Checker(),
        *judges.people_of([str(path) for path in labels]),
    ]
    report = run_suite.run(evaluation, specs, others)
    _write(evaluation, report)
    return folder


def _suite(name: str | None, named: Sequence[Target], n: int | None) -> tuple[suites.Suite, Path]:
    """Return the suite, shortened to n prompts of each set if asked for, and its file."""
    if n is not None and n < 2:
        raise UsageError(f"n is {n}", expected="2 or more prompts of each set")
    tiny = all(one.base is not None and one.base.id == "tiny" for one in named)
    chosen, file = suites.load(name or ("closed-world" if tiny else "quick"))
    return chosen if n is None else chosen.shortened(n), file


def _write(evaluation: run_suite.Evaluation, report: dict[str, Any]) -> None:
    """Write the report and its page, with the seconds that the page takes."""
    with evaluation.timed("page"):
        html_report.write(report, evaluation.out / html_report.NAME)
    report["seconds"] = evaluation.seconds
    write_atomically(evaluation.out / evaluation_report.FILE, json.dumps(report, indent=1) + "\n")
    html_report.write(report, evaluation.out / html_report.NAME)


def _reference(named: Sequence[Target]) -> str:
    sft = [one.name for one in named if one.name.endswith(":sft")]
    return (sft or [named[0].name])[0]


def _validations(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    records = {}
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            records[str(record["judge"])] = record
            accuracy = record["accuracy"]
            record["n"] + record["constant"] + accuracy["value"] + (accuracy["low"] or 0)
            evaluation_report.worst_probe(record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"not a record of a judge: {reason(error)}",
                where=str(path),
                expected="the --out of `lora-rlhf judge`",
            ) from None
    return records


def summary(folder: Path) -> Iterator[str]:
    """Yield the verdict of a report, what it lacks by reason, and where it is."""
    report = evaluation_report.read(folder)
    yield from report["verdict"]
    reasons: dict[str, list[str]] = {}
    for gap in report["not_measured"]:
        reasons.setdefault(gap["why"], []).append(gap["what"])
    for why, [first, *more] in reasons.items():
        yield f"not measured: {first}{f' and {len(more)} more' if more else ''}: {why}"
    yield f"report  {folder / 'report.html'}"


@quiet.libraries()
def check_judge(
    name: str, labels: Path, out: Path, *, n: int | None, seed: int, base: str | None
) -> list[str]:
    """Compare a judge with people's labels, write the record, and return a summary of it."""
    make_place(out)
    environment.settle()
    labelled, left_out = judge_validation.read(labels, seed, n)
    spec = _one_judge(name, base)
    engine = None
    if spec.base is not None:
        engine = Engine(spec.base, [spec.target] if spec.target else [])
    judge = spec.load(engine)
    if isinstance(judge, ServedModel):
        judge.keep = out.with_name(f"{out.name}.answers")
    return [*_recorded(judge, labelled, str(labels), out, left_out), f"record  {out}"]


def _one_judge(name: str, base: str | None) -> judges.JudgeSpec:
    [spec, *more] = judges.parse([name], base)
    if more:
        raise UsageError(f"{name} is {1 + len(more)} models", remedy=f"name one: {name}:policy")
    return spec


@quiet.libraries()
def train_judge(
    name: str,
    labels: Path,
    out: Path,
    *,
    epochs: int,
    n: int | None,
    seed: int,
    base: str | None,
    say: Callable[[str], object] = lambda line: None,
) -> list[str]:
    """Train a model as a judge on people's labels; the folder gets adapter and record."""
    environment.settle()
    spec = _one_judge(name, base)
    if spec.target is None or spec.target.kind != "model" or spec.rubric != "pairwise":
        raise UsageError(f"{name} cannot be trained", expected="a model, in a folder or on the Hub")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"--out {out} exists", expected="a new folder for the adapter")
    labelled, left_out = judge_validation.read(labels, seed, n)
    parts = judge_training.split(labelled, seed, str(labels))
    assert spec.base is not None
    engine = Engine(spec.base, [])
    judge_training.train(engine, parts[0], out, epochs=epochs, seed=seed, say=say)
    [trained] = targets.parse([str(out)], base=spec.base.id)
    engine.add(trained)
    judge = LanguageModel(trained.name, engine, trained)
    judge_training.calibrate(judge, parts[1], out)
    source = f"{labels}, prompts left out of training"
    summary = _recorded(judge, parts[2], source, out / "judge.json", left_out)
    return [*summary, f"adapter {out}, record {out / 'judge.json'}"]


def _recorded(
    judge: judges.Judge,
    labelled: Sequence[judge_validation.Labelled],
    source: str,
    out: Path,
    left_out: Mapping[str, int],
) -> list[str]:
    record = judge_validation.validate(judge, labelled, source, left_out)
    record["environment"] = environment.result_variables()
    write_atomically(out, json.dumps(record, indent=1) + "\n")
    return [*_summary_of(judge.name, judge, record)]


def _summary_of(name: str, judge: judges.Judge, record: dict[str, Any]) -> Iterator[str]:
    """Yield what a judge's record says."""
    trusted, why = judges.trust(judge, record)
    accuracy, people = record["accuracy"], record["longer"]["people"]["value"]
    yield (
        f"{name} agrees with people on {accuracy['value']:.3f} "
        f"[{accuracy['low']:.3f}, {accuracy['high']:.3f}] of {counted(record['n'], 'pair')}"
    )
    if record["left_out"]:
        counts = judge_validation.counts(record["left_out"])
        yield f"left out: {counted(sum(record['left_out'].values()), 'pair')} ({counts})"
    if record["ceiling"]:
        yield f"one person agrees with the other people on {record['ceiling']['value']:.3f}"
    yield f"always preferring the longer answer agrees with people on {people:.3f}"
    if record["position"] is not None:
        yield f"{record['position']:.1%} of its verdicts change with the order (counted as ties)"
    if mean := record["accuracy_of_mean_odds"]:
        interval = f"{mean['value']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]"
        yield f"without that rule, by the mean of its log-odds in both orders: {interval}"
        yield f"its certainty is off by {record['calibration_error']:.3f} on average"
    for why, failed in record["failed"].items():
        yield f"requests without a verdict, {why}: {failed}; the same command asks them again"
    if worst := evaluation_report.worst_probe(record):
        yield f"of {len(record['probes'])} probes, the worst: {worst}"
    yield f"it {'may' if trusted else 'may not'} decide a report: {why}"
