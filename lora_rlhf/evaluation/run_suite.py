# SPDX-License-Identifier: Apache-2.0
"""Evaluate targets by a suite: sample, judge, tabulate, and write `report.json`.

Each (target, prompt set) is sampled once and kept in `DIR/answers`; an interrupted evaluation
continues with what is missing, and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_rlhf.errors import DataError, UsageError, first_line
from lora_rlhf.estimates import Estimate
from lora_rlhf.hub.targets import Target
from lora_rlhf.recipe.schema import ModelSection
from lora_rlhf.redaction import safe
from lora_rlhf.reports import evaluation_report
from lora_rlhf.runs.disk import check_writable, write_atomically
from lora_rlhf.runs.record import is_run
from lora_rlhf.runs.samples import prompt_text
from lora_rlhf.runtime import devices, environment, interrupts

from . import alignment_tax, counterfactual, prompt_sets, stress, suite_tables
from . import kept as saved
from .answers import digest
from .engine import Answer, Engine
from .judges import AT_RANDOM, Judge, JudgeSpec, People, ScoringJudge, describe
from .language_judges import ServedModel
from .metrics.metric import Metric
from .metrics.registry import METRICS
from .prompt_sets import COUNTERFACTUAL, PromptSet, Row
from .server import Server
from .suite import SetSection, Suite
from .verdicts import Pairs, Verdicts

VERSION = 1
"""Version of `report.json`."""

_SAMPLES = 200
"""Rows of each set that the report shows."""

_SAMPLES_CHANGED = 20
"""Rows of each set of changed prompts that the report shows."""

_LABELS = 60
"""Rows of each set in `to_label.jsonl` for each reason; a judge needs 50 labels."""


@dataclass
class Evaluation:
    """One evaluation while it is made.

    Attributes:
        reference: Name of the target that others are compared with.
        validations: Judge -> its record against people's labels, from `lora-rlhf judge`.
        most: Most prompts of each set, if the user asked for fewer than the suite has.
    """

    targets: list[Target]
    suite: Suite
    suite_file: Path
    out: Path
    reference: str
    price_per_hour: float | None = None
    most: int | None = None
    validations: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    say: Callable[[str], object] = lambda line: None
    answers: dict[tuple[str, str], list[Answer]] = field(default_factory=dict)
    values: dict[tuple[str, str], dict[str, list[float | None]]] = field(default_factory=dict)
    at_random: dict[tuple[str, str], list[bool]] = field(default_factory=dict)
    grades: dict[str, alignment_tax.Grades] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)
    not_measured: list[dict[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Part of the evaluation -> its seconds, those of interrupted processes included."""

    @contextlib.contextmanager
    def timed(self, part: str, kept: dict[str, Any] | None = None) -> Iterator[None]:
        """Add the seconds of a part; `kept` keeps them for an evaluation that goes on later."""
        started = time.perf_counter()
        yield
        spent = round(time.perf_counter() - started, 3)
        self.seconds[part] = self.seconds.get(part, 0.0) + spent
        if kept is not None:
            kept.setdefault("seconds", {})[part] = spent

    def __post_init__(self) -> None:
        names = [target.name for target in self.targets]
        if self.reference not in names:
            raise UsageError(
                f"--against {self.reference!r} is not a target",
                expected=f"one of: {', '.join(names)}",
            )


def run(
    evaluation: Evaluation, specs: Sequence[JudgeSpec] = (), others: Sequence[Judge] = ()
) -> dict[str, Any]:
    """Evaluate, write `report.json`, and return the report.

    Args:
        specs: Judges that need a model.
        others: Judges that need none.

    Raises:
        UsageError: A metric is unknown, or needs what its prompt set does not have.
        DataError: A prompt set cannot be read.
    """
    sets = _load_sets(evaluation)
    if not sets:
        why = "; ".join(one["why"] for one in evaluation.not_measured)
        raise DataError(f"no prompt set of {evaluation.suite_file.name} can be read: {why}")
    compared = [prompts for one, prompts in sets if one.win_rate]
    names = [*(judge.name for judge in others), *(spec.name for spec in specs)]
    _check_judges(evaluation, names, others, compared)
    _check_out(evaluation)
    evaluation.out.mkdir(parents=True, exist_ok=True)
    loaded = _loaded(specs, _of_targets(evaluation, sets), evaluation.out / "answers")
    with evaluation.timed("statistics"):
        tables = [t for one, prompts in sets for t in _metric_tables(evaluation, one, prompts)]
        tables += _task_tables(evaluation)
    by_name = {m.judge["name"]: m.judge for one, _ in sets for m in _metrics(one) if m.judge}
    described: list[dict[str, Any]] = [*by_name.values()]
    rows = {prompts.name: prompts.rows for _, prompts in sets}
    pairs = any(one.format == COUNTERFACTUAL for one, _ in sets)
    for judge in itertools.chain(others, loaded) if compared or pairs else ():
        evaluation.say(f"judging with {judge.name}")
        about = describe(judge, evaluation.validations.get(judge.name))
        described.append(about)
        with evaluation.timed(f"judge {judge.name}"):
            for prompts in compared:
                read = rows.get(prompts.clean)  # a judge is not to be misled by a change
                tables += _win_rates(evaluation, prompts, judge, about, read)
            tables += _rewards_of_swaps(evaluation, sets, judge)
        del judge  # with its base, before the next one is loaded
    clean = [prompts for prompts in compared if not prompts.clean]
    with evaluation.timed("statistics"):
        tables += _with_people(evaluation, clean, described)
        made = report(evaluation, [prompts for _, prompts in sets], described, tables)
    made["seconds"] = evaluation.seconds
    write_atomically(evaluation.out / "report.json", json.dumps(safe(made), indent=1) + "\n")
    tasks = [task for prompts in clean for task in _to_label(evaluation, prompts, described)]
    lines = "".join(json.dumps(safe(task)) + "\n" for task in tasks)
    write_atomically(evaluation.out / "to_label.jsonl", lines)
    return safe(made)


def _check_judges(
    evaluation: Evaluation,
    names: Sequence[str],
    others: Sequence[Judge],
    compared: Sequence[PromptSet],
) -> None:
    """Refuse judges of the same name, unused judge records, and rankings of other models."""
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(
            f"two judges are called {double!r}",
            expected="each judge once; the judge of a file of rankings has the file's name",
            remedy="leave one out, or rename the file",
        )
    if unknown := next((name for name in evaluation.validations if name not in names), None):
        raise UsageError(
            f"--judge-record is of the judge {unknown!r}, which is not used here",
            expected=f"one of: {', '.join(names)}",
            remedy="name the judge with --judge, or leave the record out",
        )
    ids = {prompts.name: {row.id for row in prompts.rows} for prompts in compared}
    for judge in others:
        if isinstance(judge, People):
            names = [target.name for target in evaluation.targets]
            evaluation.not_measured += judge.check(ids, names, evaluation.reference)


def _check_out(evaluation: Evaluation) -> None:
    """Refuse an --out that is a file, a run, or the folder of another evaluation."""
    out, now = evaluation.out, {target.name for target in evaluation.targets}
    check_writable(out.parent)
    given = ""
    if out.exists() and not out.is_dir():
        given = "it is a file"
    elif is_run(out):
        given = "it is a run"
    elif (out / evaluation_report.FILE).exists():
        try:
            before = evaluation_report.read(out)
        except UsageError as error:
            given = f"its {evaluation_report.FILE} cannot be read: {error.given}"
        else:
            lost = [one["name"] for one in before["targets"] if one["name"] not in now]
            if (suite := before["suite"]["name"]) != evaluation.suite.name:
                given = f"it holds a report on the suite {suite}"
            elif lost:
                given = f"it holds a report on {', '.join(lost)}"
    if given:
        raise UsageError(
            f"the report cannot be written to {out}: {given}",
            expected="a new folder, or that of an earlier evaluation of the same suite and targets",
            remedy="give another --out",
        )


def _of_targets(
    evaluation: Evaluation, sets: Sequence[tuple[SetSection, PromptSet]]
) -> Engine | None:
    """Let every target answer, base by base; returns the last base, which stays in memory."""
    answering: Engine | Server | None = None
    for section, group in _by_base(evaluation.targets):
        answering = None  # before the next base is loaded
        with evaluation.timed("loading models"):
            answering = Server(group[0]) if section is None else Engine(section, group)
        for target in group:
            measured = [
                prompts
                for one, prompts in sets
                if _of_target(evaluation, answering, target, one, prompts)
            ]
            _of_tasks(evaluation, answering, target)
            if measured:
                with evaluation.timed("latency"):
                    cost = answering.measure(target, measured[0].rows, evaluation.suite)
                evaluation.costs[target.name] = cost.report(evaluation.price_per_hour)
    return answering if isinstance(answering, Engine) else None


def _loaded(specs: Sequence[JudgeSpec], engine: Engine | None, answers: Path) -> Iterator[Judge]:
    """Load judges one after the other, those on the base in memory first."""
    here = engine.base.model_section if engine else None
    for spec in sorted(specs, key=lambda spec: (spec.base != here, str(spec.base))):
        if spec.base is None:
            judge = spec.load(None)
            if isinstance(judge, ServedModel):
                judge.keep = answers / f"judge-{digest(spec.name)[:16]}.json"
            yield judge
            continue
        if engine is None or engine.base.model_section != spec.base:
            del engine
            engine = Engine(spec.base, [])
        if spec.target is not None:
            engine.add(spec.target)
        yield spec.load(engine)


def _by_base(targets: Sequence[Target]) -> list[tuple[ModelSection | None, list[Target]]]:
    """Group targets by their base; each server is a group of its own."""
    groups: list[tuple[ModelSection | None, list[Target]]] = []
    for target in targets:
        own = [group for section, group in groups if section is not None and section == target.base]
        if own:
            own[0].append(target)
        else:
            groups.append((target.base, [target]))
    return sorted(groups, key=lambda group: group[0] is not None)  # the last base stays in memory


def _load_sets(evaluation: Evaluation) -> list[tuple[SetSection, PromptSet]]:
    """Read every prompt set; one that is not on this machine is listed as not measured."""
    loaded, suite = [], evaluation.suite
    for one in suite.sets:
        if unknown := [name for name in one.metrics if name not in METRICS]:
            raise UsageError(
                f"set {one.name}: unknown metric {unknown[0]!r}",
                where=str(evaluation.suite_file),
                expected=f"one of: {', '.join(sorted(METRICS))}",
            )
        try:
            prompts = prompt_sets.load(
                one.name,
                path=_beside(evaluation.suite_file, one.path),
                hub=one.hub,
                format=one.format,
                n=one.n,
                seed=suite.seed,
                where=str(evaluation.suite_file),
                generated=counterfactual.generated if one.format == COUNTERFACTUAL else None,
            )
        except prompt_sets.NotHereError as error:
            evaluation.not_measured.append({"what": one.name, "why": error.given})
            evaluation.say(f"{one.name} is not measured: {error.given}")
            continue
        for name in one.metrics:
            missing = [
                (key, row.id)
                for row in prompts.rows
                for key in METRICS[name].needs
                if key not in row.reference
            ]
            if missing:
                raise UsageError(
                    f"set {one.name}: {name} needs {missing[0][0]!r}, which {len(missing)} of its "
                    f"{len(prompts.rows)} rows do not have, the first {missing[0][1]!r}",
                    where=str(evaluation.suite_file),
                    remedy="take the metric out, or give rows with that reference",
                )
        loaded += [(one, prompts), *_changed(evaluation, one, prompts)]
    return loaded


def _changed(
    evaluation: Evaluation, one: SetSection, prompts: PromptSet
) -> Iterator[tuple[SetSection, PromptSet]]:
    """Make the sets of changed prompts, on which the same metrics are measured."""
    deaf = [name for name in one.metrics if not METRICS[name].reads_prompt]
    if one.stress and deaf:
        raise UsageError(
            f"set {one.name}: {deaf[0]} ignores the prompt, so changed prompts do not matter",
            where=str(evaluation.suite_file),
            remedy="take stress out of this set",
        )
    if one.format == COUNTERFACTUAL:
        made = counterfactual.swapped(prompts)
        yield one.model_copy(update={"name": made.name, "win_rate": False, "stress": []}), made
    for kind in one.stress:
        made = stress.changed(prompts, kind, evaluation.suite.seed)
        own = [m.name for m in stress.METRICS if set(m.needs) <= set(made.rows[0].reference)]
        update = {"name": made.name, "metrics": one.metrics + own, "stress": []}
        yield one.model_copy(update=update), made


def _metrics(one: SetSection) -> list[Metric]:
    return [METRICS[name] for name in one.metrics]


def _beside(suite_file: Path, path: str | None) -> str | None:
    """Return a path relative to the suite's folder, if such a file lies there."""
    if path is not None and (beside := suite_file.parent / path).is_file():
        return str(beside)
    return path


# --- one target, one set ------------------------------------------------------------------------


def _of_target(
    evaluation: Evaluation,
    engine: Engine | Server,
    target: Target,
    one: SetSection,
    prompts: PromptSet,
) -> bool:
    """Sample the answers and compute the values of one target on one set, or reuse kept ones.

    Returns:
        False if the prompts are too long for the target's context.
    """
    interrupts.stop_if_requested()
    metrics, key, suite = _metrics(one), (one.name, target.name), evaluation.suite
    sampled = one.win_rate or any(metric.score for metric in metrics)
    if (sampled or prompts.clean) and isinstance(engine, Engine):
        if why := engine.too_long(target, prompts.rows, suite):
            what = f"{target.name} on {one.name}"
            evaluation.not_measured.append({"what": what, "why": why})
            evaluation.values[key] = {m.name: [None] * len(prompts.rows) for m in metrics}
            return False
    identity = {
        "target": target.describe(),
        "base": engine.identity,
        "prompts": prompts.sha256,
        "suite": [suite.seed, suite.temperature, suite.max_new_tokens, suite.batch_size],
    }
    where = evaluation.out / "answers" / f"{digest([target.name, one.name])[:16]}.json", identity
    kept = saved.take(*where)
    evaluation.seconds |= kept.get("seconds", {})
    if sampled:
        if "answers" not in kept:
            evaluation.say(f"{target.name} answers {len(prompts.rows)} prompts of {one.name}")
            with evaluation.timed(f"answers of {target.name} on {one.name}", kept):
                kept["answers"] = _sampled(evaluation, engine, target, prompts, kept, where)
            saved.put(*where, kept)
        evaluation.answers[key] = [Answer(**each) for each in kept["answers"]]
    by_metric = kept.setdefault("asked", {})
    for metric in metrics:
        if metric.ask is None or metric.name in by_metric:
            continue
        if isinstance(engine, Server):
            by_metric[metric.name] = [None] * len(prompts.rows)
            why = "a server does not return log-probabilities of texts"
            what = f"{metric.name} of {target.name} on {one.name}"
            evaluation.not_measured.append({"what": what, "why": why})
        else:
            evaluation.say(f"{target.name}: log-probabilities for {metric.name} on {one.name}")
            given = [engine.options(target)] * len(prompts.rows)
            with evaluation.timed(f"{metric.name} of {target.name} on {one.name}", kept):
                by_metric[metric.name] = _each(metric, prompts, given)
            saved.put(*where, kept)
    with evaluation.timed("metrics of the answers"):
        evaluation.values[key] = {
            metric.name: list(by_metric[metric.name])
            if metric.ask is not None
            else _each(metric, prompts, [answer.text for answer in evaluation.answers[key]])
            for metric in metrics
        }
    return True


def _sampled(
    evaluation: Evaluation,
    engine: Engine | Server,
    target: Target,
    prompts: PromptSet,
    kept: dict[str, Any],
    where: tuple[Path, dict[str, Any]],
) -> list[dict[str, Any]]:
    """Sample the answers; those of a server are kept one by one, as it may fail."""
    if isinstance(engine, Engine):
        return [asdict(one) for one in engine.answer(target, prompts.rows, evaluation.suite)]
    by_row = kept.setdefault("by_row", {})
    save = functools.partial(saved.put, *where, kept)
    answers = engine.answer(target, prompts.rows, evaluation.suite, by_row, save)
    del kept["by_row"]
    return [asdict(one) for one in answers]


def _each(metric: Metric, prompts: PromptSet, given: Sequence[Any]) -> list[float | None]:
    """Compute a metric of each row from its answer, or from what gives log-probabilities."""
    value: Callable[[Row, Any], float | None] | None = metric.score or metric.ask
    assert value is not None
    values: list[float | None] = []
    for row, one in zip(prompts.rows, given, strict=True):
        try:
            values.append(value(row, one))
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise DataError(
                f"{metric.name} cannot use the reference of row {row.id!r} of {prompts.name}: "
                f"{type(error).__name__}: {first_line(error)}",
                where=prompts.source,
                expected=f"a reference with {', '.join(metric.needs)}, as {metric.name} reads it",
                remedy="correct the row; answers that were sampled are kept",
            ) from error
    return values


def _of_tasks(evaluation: Evaluation, engine: Engine | Server, target: Target) -> None:
    """Run lm-eval's tasks of the suite on a target, or reuse kept grades."""
    section = evaluation.suite.lm_eval
    if section is None:
        return
    if isinstance(engine, Server):
        why = "a server does not return log-probabilities of texts"
        evaluation.not_measured.append({"what": f"lm-eval on {target.name}", "why": why})
        return
    identity = {
        "target": target.describe(),
        "base": engine.identity,
        "lm_eval": [section.model_dump(mode="json"), alignment_tax.digest(section)],
        "seed": evaluation.suite.seed,
    }
    path = evaluation.out / "answers" / f"{digest([target.name, 'lm-eval'])[:16]}.json"
    kept = saved.take(path, identity)
    evaluation.seconds |= kept.get("seconds", {})
    if "grades" not in kept:
        evaluation.say(f"{target.name}: lm-eval runs {', '.join(section.tasks)}")
        with evaluation.timed(f"lm-eval on {target.name}", kept):
            seed = evaluation.suite.seed
            kept["grades"] = alignment_tax.grades(engine, target, section, seed)
        saved.put(path, identity, kept)
    evaluation.grades[target.name] = kept["grades"]


def _task_tables(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Make the tables of lm-eval's tasks, of the targets that were asked."""
    graded = evaluation.grades
    if not graded:
        return []
    first = next(iter(graded.values()))
    reference = evaluation.reference if evaluation.reference in graded else next(iter(graded))
    return [
        suite_tables.metric_table(
            task,
            alignment_tax.metric_of(task, name),
            alignment_tax.rows_of(task, len(values)),
            {target: grades[task][name] for target, grades in graded.items()},
            reference,
            evaluation.suite.seed,
        )
        for task, by_metric in first.items()
        for name, values in by_metric.items()
    ]


def _task_sets(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Describe lm-eval's tasks for the report's list of prompt sets."""
    first: alignment_tax.Grades = next(iter(evaluation.grades.values()), {})
    return [
        {
            "name": task,
            "n": len(next(iter(by_metric.values()), [])),
            "kinds": {},
            "source": f"lm-eval's task {task}",
            "licence": "",
            "sha256": "",
        }
        for task, by_metric in first.items()
    ]


# --- tables -------------------------------------------------------------------------------------


def _metric_tables(
    evaluation: Evaluation, one: SetSection, prompts: PromptSet
) -> list[dict[str, Any]]:
    """Make the table of each metric; on changed prompts, with the change from the clean ones."""

    def values(set_name: str, metric: str) -> dict[str, list[float | None]]:
        each = {t.name: evaluation.values[set_name, t.name] for t in evaluation.targets}
        return {name: known[metric] for name, known in each.items() if metric in known}

    return [
        _table(
            evaluation,
            prompts,
            METRICS[name],
            values(one.name, name),
            values(prompts.clean, name) if prompts.clean else None,
        )
        for name in one.metrics
    ]


def _table(
    evaluation: Evaluation,
    prompts: PromptSet,
    metric: Metric,
    values: suite_tables.Values,
    clean: suite_tables.Values | None,
) -> dict[str, Any]:
    """Make the table of a metric, with the comparison of identities if the set has swapped them."""
    seed, rows = evaluation.suite.seed, prompts.rows
    table = suite_tables.metric_table(
        prompts.name, metric, rows, values, evaluation.reference, seed, clean
    )
    if clean and counterfactual.SWAPPED in metric.needs:
        table["swaps"] = suite_tables.swaps(metric, rows, values, clean, seed)
    return table


def _rewards_of_swaps(
    evaluation: Evaluation, sets: Sequence[tuple[SetSection, PromptSet]], judge: Judge
) -> Iterator[dict[str, Any]]:
    """Make the tables of a reward model's scores on pairs of prompts about two people."""
    if not isinstance(judge, ScoringJudge) or judge.kind != "reward":
        return
    by_name: dict[str, suite_tables.Values] = {}
    metric = counterfactual.reward_metric(judge.name)
    for one, prompts in sets:
        if one.format != COUNTERFACTUAL:
            continue
        scores = {}
        for name, answers in _answers(evaluation, prompts).items():
            interrupts.stop_if_requested()
            scores[name] = judge.scores(prompts.rows, [answer.text for answer in answers])
        by_name[prompts.name] = scores
        yield _table(evaluation, prompts, metric, scores, by_name.get(prompts.clean))


def _answers(evaluation: Evaluation, prompts: PromptSet) -> dict[str, list[Answer]]:
    """Return the answers of the targets that answered a set."""
    keys = {target.name: (prompts.name, target.name) for target in evaluation.targets}
    return {n: evaluation.answers[key] for n, key in keys.items() if key in evaluation.answers}


def _win_rates(
    evaluation: Evaluation,
    prompts: PromptSet,
    judge: Judge,
    about: dict[str, Any],
    rows: Sequence[Row] | None = None,
) -> list[dict[str, Any]]:
    """Make the tables of one judge on one set; none if it cannot judge this set.

    Args:
        rows: What the judge reads as the prompts, such as the unchanged ones under stress.
    """
    answers = _answers(evaluation, prompts)
    if evaluation.reference not in answers:
        return []
    rows = rows or prompts.rows
    texts = {name: [a.text for a in each] for name, each in answers.items()}
    lengths = {name: [a.tokens for a in each] for name, each in answers.items()}
    reference = evaluation.reference
    verdicts: dict[str, Verdicts] = {}
    for name in answers:
        if name == reference:
            continue
        interrupts.stop_if_requested()
        pair = (name, reference)
        made = judge.compare(Pairs(rows, texts[name], texts[reference], prompts.name, pair))
        if made is not None:
            verdicts[name] = made
            _note_failures(evaluation, f"{judge.name} on {name} in {prompts.name}", made)
            evaluation.values[prompts.name, name][f"wins by {judge.name}"] = made.wins
            if made.at_random is not None:
                evaluation.at_random[prompts.name, judge.name] = made.at_random
    if changed := {n: v.changed for n, v in verdicts.items() if v.changed is not None}:
        about.setdefault("changed_with_order", {})[prompts.name] = changed
    if not verdicts:
        return []
    tables = suite_tables.win_rate_tables(
        prompts.name, about, prompts.rows, verdicts, lengths, reference
    )
    if prompts.clean:
        tables[0]["from_clean"] = _wins_from_clean(evaluation, prompts, judge.name, verdicts)
        return tables
    pairs = {(name, reference): made.wins for name, made in verdicts.items()}
    if len(pairs) > 1 and len(pairs) == len(texts) - 1:
        for pair in itertools.combinations(verdicts, 2):
            interrupts.stop_if_requested()
            one, other = (texts[name] for name in pair)
            made = judge.compare(Pairs(rows, one, other, prompts.name, pair))
            if made is None:
                return tables
            pairs[pair] = made.wins
        seed = evaluation.suite.seed
        tables.append(suite_tables.ratings_table(prompts.name, about, pairs, reference, seed))
    return tables


def _wins_from_clean(
    evaluation: Evaluation, prompts: PromptSet, judge: str, verdicts: Mapping[str, Verdicts]
) -> dict[str, Estimate | None]:
    """Compare each target's verdicts with those on the unchanged prompts."""
    gaps = {}
    for name, made in verdicts.items():
        clean = evaluation.values[prompts.clean, name].get(f"wins by {judge}")
        if clean is not None:
            seed = evaluation.suite.seed
            gaps[name] = suite_tables.gap_of_wins(made.wins, clean, seed)
    return gaps


def _note_failures(evaluation: Evaluation, what: str, made: Verdicts) -> None:
    """List the requests to a judge that gave no verdict."""
    if made.failed:
        counts = ", ".join(f"{why}: {n}" for why, n in sorted(made.failed.items()))
        why = f"requests without a verdict ({counts}); the same command asks again for the missing"
        evaluation.not_measured.append({"what": what, "why": why})
        evaluation.say(f"{what}: {why}")


def _with_people(
    evaluation: Evaluation, sets: Sequence[PromptSet], judges: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Make the tables of people's verdicts on some rows together with each judge's on all."""
    names = [t.name for t in evaluation.targets if t.name != evaluation.reference]
    made = []
    for prompts in sets:
        by = {name: evaluation.values[prompts.name, name] for name in names}
        for people in (one for one in judges if one["kind"] == "people"):
            for judge in (one for one in judges if one["kind"] != "people"):
                ours, theirs = (f"wins by {one['name']}" for one in (people, judge))
                drawn = evaluation.at_random.get((prompts.name, people["name"]), [])
                wins = {
                    name: (
                        [w if at else None for w, at in zip(values[ours], drawn, strict=True)],
                        values[theirs],
                    )
                    for name, values in by.items()
                    if ours in values and theirs in values
                }
                if wins:
                    made.append(
                        suite_tables.powered_table(
                            prompts.name, people, judge, wins, evaluation.reference
                        )
                    )
    return [table for table in made if table is not None]


# --- the report ---------------------------------------------------------------------------------


def report(
    evaluation: Evaluation,
    sets: Sequence[PromptSet],
    judges: list[dict[str, Any]],
    tables: list[dict[str, Any]],
) -> dict[str, Any]:
    """Make the content of `report.json`."""
    suite = evaluation.suite
    head = suite_tables.headline(suite.headline, tables)
    suite_tables.correct(tables, head)
    verdict = suite_tables.sentences(head, suite.headline, tables)
    if head is not None:
        head["sentence"] = verdict[0]
    if evaluation.most is not None:
        verdict.append(
            f"At most {evaluation.most} prompts of each set were used (--n): only larger "
            "differences show than with the whole suite."
        )
    return {
        "version": VERSION,
        "suite": {
            "name": suite.name,
            "file": evaluation.suite_file.name,
            "seed": suite.seed,
            "temperature": suite.temperature,
            "max_new_tokens": suite.max_new_tokens,
        },
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "packages": environment.versions(),
        "environment": environment.result_variables(),
        "device": str(devices.pick_device()),
        "headline": head,
        "verdict": verdict,
        "targets": [target.describe() for target in evaluation.targets],
        "sets": [
            {
                "name": prompts.name,
                "n": len(prompts.rows),
                "kinds": {k: len(i) for k, i in suite_tables.kinds_of(prompts.rows).items()},
                "source": prompts.source,
                "licence": prompts.licence,
                "sha256": prompts.sha256,
            }
            for prompts in sets
        ]
        + _task_sets(evaluation),
        "tables": tables,
        "judges": judges,
        "samples": [sample for prompts in sets for sample in _samples(evaluation, prompts)],
        "costs": evaluation.costs,
        "not_measured": evaluation.not_measured,
    }


def _samples(evaluation: Evaluation, prompts: PromptSet) -> list[dict[str, Any]]:
    """Rows with answers: half those where a target did worst, then the first; none by hand."""
    names = [*_answers(evaluation, prompts)]
    if not names:
        return []
    rows = range(len(prompts.rows))
    least = {i: _least(evaluation, prompts.name, names, i) for i in rows}
    ranked = sorted((i for i in rows if least[i] is not None), key=lambda i: least[i] or 0.0)
    most = _SAMPLES_CHANGED if prompts.clean else _SAMPLES
    worst = ranked[: most // 2]
    chosen = [(i, "among the worst") for i in worst]
    chosen += [(i, "among the first") for i in rows if i not in set(worst)]
    return [
        {
            "set": prompts.name,
            "id": prompts.rows[i].id,
            "kind": prompts.rows[i].kind,
            "prompt": prompt_text(prompts.rows[i].prompt),
            "answers": {
                name: {
                    **asdict(evaluation.answers[prompts.name, name][i]),
                    "values": {
                        metric: values[i]
                        for metric, values in evaluation.values[prompts.name, name].items()
                    },
                }
                for name in names
            },
            "why": why,
        }
        for i, why in chosen[:most]
    ]


def _to_label(
    evaluation: Evaluation, prompts: PromptSet, judges: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Choose answers for people: drawn at random, judges that disagree, and ties of a judge.

    Rankings of the random ones correct a judge (`estimates.prediction_powered`); the others find
    its faults, and would bias that estimate.
    """
    names = [*_answers(evaluation, prompts)]
    rows = range(len(prompts.rows))
    by_judge = [f"wins by {judge['name']}" for judge in judges if judge["kind"] != "people"]
    spread: dict[int, float] = {}
    ties: dict[int, int] = {}
    for i in rows:
        for name in names:
            values = evaluation.values[prompts.name, name]
            wins = [w for key in by_judge if key in values and (w := values[key][i]) is not None]
            if wins:
                spread[i] = max(spread.get(i, 0.0), max(wins) - min(wins))
                ties[i] = ties.get(i, 0) + wins.count(0.5)
    rng = random.Random(evaluation.suite.seed)
    chosen = dict.fromkeys(rng.sample(rows, min(_LABELS, len(rows))), AT_RANDOM)
    disputed = [i for i in sorted(spread, key=lambda i: -spread[i]) if spread[i] > 0]
    chosen = dict.fromkeys(disputed[:_LABELS], "the judges disagree") | chosen
    uncertain = [i for i in sorted(ties, key=lambda i: -ties[i]) if ties[i]]
    chosen = dict.fromkeys(uncertain[:_LABELS], "a judge is undecided") | chosen
    for i, why in chosen.items():
        shown = names[:]
        rng.shuffle(shown)
        yield {
            "set": prompts.name,
            "id": prompts.rows[i].id,
            "why": why,
            "prompt": prompt_text(prompts.rows[i].prompt),
            "answers": {name: evaluation.answers[prompts.name, name][i].text for name in shown},
            "ranking": None,
        }


def _least(evaluation: Evaluation, set_name: str, names: Sequence[str], row: int) -> float | None:
    """The sum of a row's values over metrics, lower being worse, of its worst target."""
    signs = {"higher": 1, "lower": -1, "neither": 0}
    sums = []
    for name in names:
        known = []
        for metric, values in evaluation.values[set_name, name].items():
            if (value := values[row]) is not None:
                if metric.startswith("wins by "):
                    known.append(value - 0.5)
                elif metric in METRICS:
                    known.append(signs[METRICS[metric].better] * value)
        if known:
            sums.append(sum(known))
    return min(sums, default=None)
