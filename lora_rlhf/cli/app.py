# SPDX-License-Identifier: Apache-2.0
"""The command `lora-rlhf`: verbs that train, evaluate, label, report and publish.

Results go to stdout, progress and errors to stderr. Exit codes: 0; the codes of errors.py; 129, 130
and 143 for an interrupted run; 1 for an unexpected error. Heavy libraries are imported in verbs.
"""

from __future__ import annotations

import functools
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_rlhf.distributed import launch
from lora_rlhf.errors import DataError, FitError, UsageError, counted

from . import shell
from .command_group import (
    DryRun,
    From,
    Json,
    Out,
    RecipePath,
    Redo,
    RepoId,
    RunPath,
    Set,
    Warm,
    app,
    command,
    data_group,
)


def main() -> None:
    """Run the command line."""
    launch.mute()
    app(prog_name="lora-rlhf")


# --- verbs over recipes --------------------------------------------------------------------------


@shell.processes()
def _train(
    path: Path,
    out: Path | None,
    overrides: list[str] | None,
    dry_run: bool,
    until: str = "card",
    start_from: Path | None = None,
    warm_start: bool = False,
    redo: str | None = None,
) -> None:
    from lora_rlhf.recipe.loader import dump_recipe, load_recipe, located, locating

    run, verb = _run_of(path), "run" if until == "card" else until
    if run is not None and out is None:
        again = f"lora-rlhf {verb} {shlex.quote(str(path))} --out {shlex.quote(str(run))}"
        raise UsageError(
            f"{run} is a run, not a recipe",
            expected="a recipe, as a YAML file or its folder",
            remedy=f"continue it with `{again}`, or start the recipe again with another --out",
        )
    recipe = load_recipe(path, overrides, until=until)
    out = out or Path("runs") / recipe.name
    pipeline = shell.room("pipeline")
    from lora_rlhf.reports import tables
    from lora_rlhf.runs.progress import Progress

    progress = Progress()
    options = {
        "until": until, "start_from": start_from, "warm_start": warm_start, "redo": redo
    }  # fmt: skip
    if dry_run:
        if wrong := pipeline.check(recipe, out, progress=progress, **options):
            shell.echo("\n".join(str(located(e, path, overrides)) for e in wrong), err=True)
            raise typer.Exit(wrong[0].exit_code)
        shell.echo(dump_recipe(recipe), nl=False)
        shell.echo(f"OK: `{verb}` can start in {out}", err=True)
        return
    try:
        with locating(path, overrides):
            record = pipeline.run(recipe, out, progress=progress, **options)
    finally:
        progress.end()
    tables.show(record)


def _run_of(path: Path) -> Path | None:
    """Return the run directory if it, or the recipe inside it, was given as a recipe."""
    folder = path if path.is_dir() else path.parent
    inside = path.is_dir() or path.name == "recipe.yaml"
    from lora_rlhf.runs.record import is_run

    return folder if inside and is_run(folder) else None


def _recipe_verb(name: str, until: str, help: str) -> None:
    """Register a verb that runs a recipe up to a stage."""

    def verb(
        recipe: RecipePath,
        out: Out = None,
        overrides: Set = None,
        start_from: From = None,
        warm_start: Warm = False,
        redo: Redo = None,
        dry_run: DryRun = False,
    ) -> None:
        _train(recipe, out, overrides, dry_run, until, start_from, warm_start, redo)

    verb.__doc__ = help
    command(name)(verb)


_recipe_verb(
    "run",
    "card",
    """Run a whole recipe, or continue it.

    SFT, reward model, PPO (or another `algorithm`), evaluation, cards. Finished stages are skipped.
    """,
)


@command("demo")
def _demo_verb(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Random seed for the whole run.")] = 0,
    overrides: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Run the packaged recipe: offline, in minutes.

    The whole pipeline on the packaged tiny model, on a CPU or a GPU.
    """
    from lora_rlhf import tiny

    if not overrides:  # which may name a model or data on the Hub
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _train(tiny.recipe(), out, [f"seed={seed}", *(overrides or [])], dry_run)


@command("sweep")
def _sweep_verb(
    path: RecipePath,
    out: Annotated[Path, typer.Option(help="Folder of the sweep.")],
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,VALUE", help="Values of a recipe key; repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of each setting.")] = 5,
    processes: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    overrides: Set = None,
) -> None:
    """Run a recipe at several settings and seeds; compare them.

    SFT and the reward model are trained once for all settings that share them. The same command
    continues the sweep: finished runs are kept, failed ones are named and tried again. The
    comparison is printed, and written to sweep.md and sweep.json.
    """
    sweeps = shell.room("sweeps")
    from lora_rlhf.reports import sweep_report

    say = functools.partial(shell.echo, err=True)
    options = {"seeds": seeds, "processes": processes, "overrides": overrides or ()}
    report = sweeps.sweep(path, grid or (), out, say=say, **options)
    sweep_report.show(report)
    shell.echo(f"report    {out / 'sweep.md'}")
    if codes := [one["exit_code"] for one in report["runs"] if one["state"] != "done"]:
        raise typer.Exit(codes[0])


Gpus = Annotated[str | None, typer.Option(metavar="NxSIZE", help="Several equal GPUs: 2x24GB.")]


@command("plan")
def _plan_verb(
    path: RecipePath,
    gpu: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of the GPU: 16GB, 16GiB or 16.")
    ] = None,
    gpus: Gpus = None,
    overrides: Set = None,
    probe: Annotated[bool, typer.Option("--probe", help="Load the base and measure.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Model the time of an update on so many machines.")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(metavar="SPEED", help="With --workers: a worker's link; default 1Gbit."),
    ] = None,
    latency: Annotated[
        str | None, typer.Option(metavar="TIME", help="With --workers: default 0.1ms.")
    ] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="RUN", help="With --workers: measured seconds; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Plan the memory of a recipe, and the GPUs it fits.

    Reads the config of the base model; only --probe loads weights. With --gpu, the exit code is 0
    if the recipe fits as it is, and 7 if it does not; with --gpus for several processes, one on
    each, with the base whole or split. With --workers, the time of an update on
    several workers is modelled from the seconds of runs; a run in place of RECIPE is one of them.
    """
    from lora_rlhf.recipe.loader import load_recipe, locating

    if workers is None and (network or latency or runs):
        raise UsageError(
            "--network, --latency and --from are for --workers, which is missing",
            remedy="add --workers N, or leave them out",
        )
    given = shlex.join([str(path), *(p for one in overrides or () for p in ("--set", one))])
    recipe = load_recipe(path, overrides)
    if (run := _run_of(path)) is not None:
        shell.echo(f"{run} is a run directory: this plans its recipe", err=True)
        runs = [run, *(runs or ())]
    with locating(path, overrides):
        report = shell.room("planning.plan_report").report(
            recipe,
            path if path.is_dir() else path.parent,
            gpu,
            gpus=gpus,
            given=given,
            probe=probe,
            workers=workers,
            network=(network or "1Gbit", latency or "0.1ms"),
            runs=runs or (),
        )
    shell.echo(report.as_json() if as_json else report.as_text())
    if (gpu or gpus) is not None and not report.fits:
        raise typer.Exit(FitError.exit_code)


_recipe_verb("sft", "sft", "Run a recipe up to supervised fine-tuning.")
_recipe_verb("reward", "reward", "Run a recipe up to the reward model.")
_recipe_verb("ppo", "ppo", "Run a recipe up to PPO.")
_recipe_verb("policy", "policy", "Run a recipe up to the policy, by any `algorithm`.")


# --- verbs over models ---------------------------------------------------------------------------

Base = Annotated[str | None, typer.Option(help="Base model of adapters whose config names none.")]
Targets = Annotated[
    list[str],
    typer.Argument(
        metavar="TARGET...",
        help="Runs, RUN:policy, models and adapters (folders, Hub ids), URL#model; or one recipe.",
    ),
]
SuiteName = Annotated[str | None, typer.Option(help="A packaged suite, or a YAML file.")]
Against = Annotated[str | None, typer.Option(help="Reference target for all comparisons.")]
Judges = Annotated[
    list[str] | None,
    typer.Option("--judge", help="RUN:held_out, a reward or a language model; repeatable."),
]
Labels = Annotated[list[Path] | None, typer.Option(help="File of people's rankings; repeatable.")]
JudgeRecords = Annotated[
    list[Path] | None, typer.Option("--judge-record", help="Record of `judge`; repeatable.")
]
FewShot = Annotated[
    int, typer.Option(min=0, max=3, help="Examples for a base without a chat template.")
]
MostPrompts = Annotated[
    int | None, typer.Option(min=2, help="Most prompts of each set; default: the suite's.")
]
Price = Annotated[float | None, typer.Option(min=0.0, help="Price of this machine.")]


@command("evaluate")
def _evaluate_verb(
    targets: Targets,
    suite: SuiteName = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report or run.")] = None,
    against: Against = None,
    judges: Judges = None,
    labels: Labels = None,
    judge_records: JudgeRecords = None,
    base: Base = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit")] = False,
    few_shot: FewShot = 0,
    price_per_hour: Price = None,
    n: MostPrompts = None,
    overrides: Set = None,
    start_from: From = None,
    warm_start: Warm = False,
    dry_run: DryRun = False,
) -> None:
    """Compare models on a suite; or evaluate a recipe's run.

    A comparison writes report.json and report.html; if interrupted, it continues later.
    """
    if suite is None and len(targets) == 1 and _is_recipe(Path(targets[0]), out):
        of_targets = (against, judges, labels, judge_records, base, price_per_hour, n)
        if any(one is not None for one in of_targets) or load_in_4bit or few_shot:
            raise UsageError(
                f"{targets[0]} is a recipe, which reads only --out, --set, --from, --warm-start "
                "and --dry-run",
                expected="a run, such as its --out, for the other options",
            )
        _train(Path(targets[0]), out, overrides, dry_run, "evaluate", start_from, warm_start)
        return
    if overrides or start_from or warm_start or dry_run:
        raise UsageError("--set, --from, --warm-start and --dry-run are for a recipe")
    launch.refuse("`evaluate` with models")
    evaluate_targets = shell.room("evaluation.evaluate_targets")
    folder = evaluate_targets.evaluate_targets(
        targets,
        suite=suite,
        out=out,
        against=against,
        judge_names=judges,
        labels=labels or [],
        judge_records=judge_records or [],
        base=base,
        load_in_4bit=load_in_4bit,
        few_shot=few_shot,
        price_per_hour=price_per_hour,
        n=n,
        say=functools.partial(shell.echo, err=True),
    )
    shell.echo("\n".join(evaluate_targets.summary(folder)))


def _is_recipe(path: Path, out: Path | None) -> bool:
    """Return True for a recipe; a run directory counts as one only if it is also the --out."""
    run = _run_of(path)
    if path.is_dir() and run is not None:
        return out is not None and out.resolve() == run.resolve()
    return path.suffix in (".yaml", ".yml") or (path / "recipe.yaml").is_file()


@command("judge")
def _judge_verb(
    judge: Annotated[
        str, typer.Argument(help="RUN:held_out, a reward model, or a language model.")
    ],
    against: Annotated[
        Path | None, typer.Option(metavar="LABELS", help="Pairs with people's labels.")
    ] = None,
    train: Annotated[
        Path | None, typer.Option(metavar="LABELS", help="Train a LoRA on these labels instead.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Record, default judge.json; with --train, a new folder.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=0, help="Of --train; 0 calibrates only.")] = 2,
    n: Annotated[int | None, typer.Option(min=2, help="Number of pairs; default: all.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    base: Base = None,
) -> None:
    """Compare a judge with people's labels, or train a judge.

    Measures its accuracy, the agreement among people, and its biases. Give the record to
    `evaluate --judge-record`: without one, no reward or language model may decide a report.
    """
    room = shell.room("evaluation.evaluate_targets")
    if (against is None) == (train is None):
        raise UsageError("name --against or --train", expected="a file of people's labels")
    shared = {"n": n, "seed": seed, "base": base}
    if train is None:
        lines = room.check_judge(judge, against, out or Path("judge.json"), **shared)
    elif out is None:
        raise UsageError("--train needs --out", expected="a new folder for the adapter")
    else:
        say = functools.partial(shell.echo, err=True)
        lines = room.train_judge(judge, train, out, epochs=epochs, say=say, **shared)
    for line in lines:
        shell.echo(line)
    shell.say_ignored()


# --- feedback by people --------------------------------------------------------------------------


ExportForm = Annotated[
    str | None,
    typer.Option(
        "--as",
        help="Of --export: comparisons, consensus, majority, demonstrations, rankings or judge.",
    ),
]
ExportWithout = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Of --export: leave a labeler out; repeatable."),
]
Agreement = Annotated[
    bool, typer.Option("--agreement", help="Write agreement.html: verdicts on labelers.")
]
JudgeRankings = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Of --agreement: a judge's rankings; repeatable."),
]


TaskType = Annotated[
    str | None,
    typer.Option("--type", help="Of --new: ranking (default), pair, rating or demonstration."),
]


@command("label")
def _label_verb(
    folder: Annotated[Path, typer.Argument(metavar="PROJECT", help="Folder of the project.")],
    new: Annotated[
        Path | None, typer.Option(metavar="TASKS", help="Make the project from a file of tasks.")
    ] = None,
    add: Annotated[
        Path | None, typer.Option(metavar="TASKS", help="Add the tasks of a file.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the labels for a recipe, and stop.")
    ] = None,
    form: ExportForm = None,
    without: ExportWithout = None,
    agreement: Agreement = False,
    judge: JudgeRankings = None,
    kind: TaskType = None,
    labeler: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who labels; default: the page asks.")
    ] = None,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Label here, without a browser.")
    ] = False,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    host: Annotated[
        str, typer.Option(help="0.0.0.0 lets other machines in; needs a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8765,
    password: Annotated[
        str | None, typer.Option(envvar="LORA_RLHF_LABEL_PASSWORD", help="For labelers.")
    ] = None,
) -> None:
    """Label answers of models, in a browser or here.

    Serves the labelling page of a project on this machine; the printed address holds a token. With
    --new, --add, --export or --agreement it does that instead.
    """
    if export is None and (form is not None or without):
        raise UsageError("--as and --without are for --export")
    if judge and not agreement:
        raise UsageError("--judge is for --agreement")
    if new is None and kind is not None:
        raise UsageError("--type is for --new", remedy="a task file names the type of each task")
    from lora_rlhf.feedback import label_server, labeling

    if new is not None:
        shell.echo(labeling.make(folder, new, kind or "ranking"))
    if add is not None:
        shell.echo(labeling.add(folder, add))
    if export is not None:
        shell.echo(labeling.export(folder, export, form, without or ()))
    if agreement:
        shell.echo(labeling.agreement(folder, judge or ()))
    if terminal:
        labeling.sit(folder, labeler, input, shell.echo)
    elif new is None and add is None and export is None and not agreement:
        import webbrowser

        access = label_server.Access(host, port, password=password, labeler=labeler)
        opened = webbrowser.open if show else str
        labeling.serve(folder, access, shell.echo, opened)


Strategy = Annotated[
    str, typer.Option(help="random, disagreement, highest_reward, failures or novelty.")
]
Tasks = Annotated[int, typer.Option("--n", min=1, help="Number of tasks.")]
AnswersEach = Annotated[int, typer.Option("--k", min=2, max=9, help="Answers to each prompt.")]
OfModel = Annotated[str, typer.Option("--model", help="The model that answers: sft or policy.")]
Pool = Annotated[
    int | None,
    typer.Option(min=1, help="Prompts among which the strategy chooses; default: 4 times n."),
]
Seed = Annotated[int, typer.Option(min=0)]
OfReport = Annotated[
    Path | None,
    typer.Option("--report", help="Folder with a report.json, whose failures count."),
]


@command("tasks")
def _tasks_verb(
    run: RunPath,
    strategy: Strategy = "random",
    n: Tasks = 100,
    k: AnswersEach = 4,
    model: OfModel = "sft",
    out: Annotated[Path, typer.Option(help="Task file to write.")] = Path("tasks.jsonl"),
    pool: Pool = None,
    seed: Seed = 0,
    report: OfReport = None,
) -> None:
    """Make tasks for labelers out of a run.

    Answers of its SFT or policy to prompts that have no label yet. Answers are kept in answers/
    beside the file, so that nothing is sampled twice.
    """
    from lora_rlhf.runs.record import Record

    record = Record.read(run)  # refuses a wrong folder before the slow imports
    task_choice = shell.room("feedback.task_choice")
    choice = task_choice.Choice(strategy, n, k, model, pool, seed)
    say = functools.partial(shell.echo, err=True)
    failed = task_choice.failures(record, model, report) if report else None
    made = task_choice.make(run, choice, out, failed=failed, say=say)
    shell.echo(f"{counted(len(made), 'task')}: {out}")


@command("iterate")
def _iterate_verb(
    run: RunPath,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the round; default: RUN-round-NUMBER.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="A labelling project, a file of comparisons, or `simulated`.")
    ] = None,
    strategy: Strategy = "random",
    n: Tasks = 100,
    k: AnswersEach = 4,
    model: OfModel = "policy",
    start: Annotated[str, typer.Option(help="The policy goes on from: sft, or policy.")] = "sft",
    pool: Pool = None,
    seed: Seed = 0,
    overrides: Set = None,
) -> None:
    """Make the next round: tasks, labels, reward model, policy.

    Evaluates the run if it is not, makes tasks, waits for their labels, trains the reward model on
    old and new labels, and the policy from SFT or the last policy. The same command goes on.
    """
    from lora_rlhf.runs.record import Record

    rounds, pipeline = shell.room("feedback.rounds"), shell.room("pipeline")
    from lora_rlhf.reports import tables
    from lora_rlhf.runs.progress import Progress

    Record.read(rounds.find_run(run))
    choice = rounds.Choice(strategy, n, k, model, pool, seed)
    request = rounds.Round(choice, labels, start, overrides or ())
    out = out or rounds.next_folder(rounds.find_run(run))
    made = rounds.iterate(run, out, request, pipeline.run, Progress())
    if made is None:
        shell.echo(
            f"{out / 'tasks.jsonl'} waits for labels; give the same command with --labels, a file "
            "or a project of `lora-rlhf label`, to go on"
        )
        return
    tables.show(made)


ProjectPath = Annotated[Path, typer.Argument(metavar="PROJECT", help="Folder of the project.")]


@command("import", data_group)
def _data_import_verb(
    folder: ProjectPath,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The export, or Argilla's folder.")],
    tool: Annotated[
        str, typer.Option("--from", help="argilla, label-studio, open-webui or usage.")
    ],
    fields: Annotated[
        list[str] | None,
        typer.Option("--field", metavar="OURS=THEIRS", help="prompt=x, answer=y; repeatable."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Leave out a field or question; repeatable."),
    ] = None,
) -> None:
    """Import tasks and labels of another tool, or thumbs of `chat` and `serve`.

    People become pseudonyms. The project is made if there is none; `label --export` then writes
    what a recipe reads.
    """
    for line in shell.room("feedback.exchange").take(
        folder, path, tool, fields or (), ignore or ()
    ):
        shell.echo(line)


@command("export", data_group)
def _data_export_verb(
    folder: ProjectPath,
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write into.")],
    tool: Annotated[str, typer.Option("--to", help="argilla or label-studio.")],
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Tasks only, to be labelled there.")
    ] = False,
) -> None:
    """Write tasks and labels for another tool.

    Names of models stay here, and answers are in a random order.
    """
    shell.echo(shell.room("feedback.exchange").put(folder, out, tool, unlabelled))


@command("push", data_group)
def _data_push_verb(
    folder: ProjectPath,
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Dataset on the Hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; default: private.")
    ] = False,
    license: Annotated[str | None, typer.Option(help="Licence, such as cc-by-4.0.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Evaluation prompts to publish too.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Leave a labeler out; repeatable.")
    ] = None,
) -> None:
    """Publish labels and guidelines as a dataset with a card.

    Gold items, skipped tasks and tasks flagged as broken or personal data stay here.
    """
    publication = shell.room("feedback.publication")
    request = publication.Request(repo_id, public, license, prompts, tuple(without or ()))
    _say_pushed("dataset", publication.push(folder, request))


# --- verbs over runs -----------------------------------------------------------------------------


@command("card")
def _card_verb(
    run: RunPath,
    role: Annotated[
        str | None,
        typer.Option(help="Print the card of policy, reward, value or sft; write nothing."),
    ] = None,
) -> None:
    """Write the model cards of a run again.

    From the record alone, offline; what it lacks is named on the card.
    """
    from lora_rlhf.reports.cards import model_card
    from lora_rlhf.runs.record import Record

    if role is not None:
        shell.echo(model_card.render(Record.read(run), role), nl=False)
        return
    for path in model_card.rewrite(run):
        shell.echo(path)


@command("report")
def _report_verb(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run, or an evaluation's --out.")],
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Rebuild report.html from report.json.

    DIR is a run or an evaluation, or its report.json. The page is one file and needs no network.
    """
    from lora_rlhf.reports import evaluation_report, html_report
    from lora_rlhf.runs.record import Record, is_run

    if folder.name == evaluation_report.FILE and folder.is_file():
        folder = folder.parent
    if is_run(folder):
        page = html_report.of_run(Record.read(folder))
    else:
        page = folder / html_report.NAME
        html_report.write(evaluation_report.read(folder), page)
    shell.echo(page)
    if show:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            shell.echo("no browser was found: open the file yourself", err=True)


@command("doctor")
def _doctor_verb(
    run: RunPath,
    as_json: Json = False,
    rebuild_record: Annotated[
        bool,
        typer.Option("--rebuild-record", help="Rebuild a lost record.json from the other files."),
    ] = False,
) -> None:
    """Find the stage of a run that is at fault, and what to try.

    From the record and the log alone. The exit code is always 0.
    """
    from lora_rlhf.reports.doctor import doctor
    from lora_rlhf.runs.record import Record

    if rebuild_record:
        from lora_rlhf.runs import repair

        repair.rebuild(run)
    record = Record.read(run)
    findings = doctor.examine(record)
    if as_json:
        shell.echo(doctor.as_json(record, findings))
    else:
        doctor.show(record, findings)


@command("push")
def _push_verb(
    run: RunPath,
    policy: RepoId = None,
    reward: RepoId = None,
    value: RepoId = None,
    sft: RepoId = None,
    base: RepoId = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make new repositories public; default: private.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Add the evaluation's report to the policy.")
    ] = False,
    collection: Annotated[
        str | None, typer.Option(metavar="TITLE", help="Put what is pushed into a collection.")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="ORG/NAME", help="Of --collection: a dataset too; repeatable."),
    ] = None,
) -> None:
    """Publish adapters and cards on the Hub.

    Without options, to the repositories of the recipe's `hub:`. A report holds prompts and answers.

    A base model that exists only here (the tiny one, or a local folder) goes first, with --base.
    """
    from lora_rlhf.hub import publishing
    from lora_rlhf.runs.record import Record
    from lora_rlhf.runs.run_lock import locked

    Record.read(run)
    with locked(run):
        record = Record.read(run)
        named = {"policy": policy, "reward": reward, "value": value, "sft": sft}
        pushes, public = publishing.push_targets(record, named, public=public, base=base)
        if base:
            _say_pushed("base", publishing.push_base(record, base, public=public))
        for role, repo_id in pushes.items():
            with_report = report and role == "policy"
            pushed = publishing.push(record, role, repo_id, public=public, report=with_report)
            _say_pushed(role, pushed)
        if collection and pushes:
            items = [*pushes.values(), *(f"datasets/{one}" for one in dataset or ())]
            shell.echo(f"collection {publishing.collect(record, collection, items, public=public)}")


def _say_pushed(role: str, result: dict[str, Any]) -> None:
    seen = "private" if result["private"] else "public"
    shell.echo(f"{role:6s} {result['url']} ({seen}, commit {result['commit']})")
    for note in result["notes"]:
        shell.echo(f"note: {note}", err=True)


@command("pull")
def _pull_verb(
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="An adapter on the Hub.")],
    out: Annotated[Path | None, typer.Option(help="New folder; default: adapters/NAME.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag.")] = None,
) -> None:
    """Download an adapter for `chat`, `evaluate` and `serve`.

    Its files are checked against the record that was pushed with it.
    """
    from lora_rlhf.hub import pulling

    made = pulling.pull(repo_id, out, revision=revision)
    checked = "checked against its record" if made.verified else "it has no record to check"
    shell.echo(f"{made.folder}: commit {made.commit}, on {made.base or 'no named base'}; {checked}")


@command("lint-card")
def _lint_card_verb(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A model card, or its folder.")],
) -> None:
    """Find faults of a model card.

    Metadata, placeholders, links, claims without an interval. The exit code is 3 if there are any.
    """
    from lora_rlhf.reports.cards import card_lint

    faults = card_lint.lint(path)
    shell.echo("\n".join(faults) or f"{path}: no fault was seen")
    if faults:
        raise typer.Exit(DataError.exit_code)


@command("compare")
def _compare_verb(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Two or more finished runs.")
    ],
    as_json: Json = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Plot reward over KL as a PNG.")
    ] = None,
) -> None:
    """Compare finished runs: is PPO worth it here?

    Reward, win rate, KL, length and cost, and paired differences if runs share SFT and prompts.

    Runs of one recipe that differ only in the seed are one row: the mean over seeds.
    """
    import json

    from lora_rlhf.reports import compare
    from lora_rlhf.runs.record import finite

    report = compare.run(runs)
    if plot is not None:
        from lora_rlhf.reports import plots

        plots.comparison(report, plot)
        shell.echo(f"plot: {plot}", err=True)
    if as_json:
        shell.echo(json.dumps(finite(report), indent=1))
    else:
        from lora_rlhf.reports import tables

        tables.show_comparison(report)


@command("env")
def _env_verb() -> None:
    """Print versions and device, for bug reports.

    Without secrets and paths.
    """
    from lora_rlhf.runtime import environment

    with shell.loading():
        facts = environment.describe()
    for name, value in facts.items():
        shell.echo(f"{name:16s} {value}")


from . import start_verbs, use_verbs  # noqa: E402, F401  # they come last in --help
