# SPDX-License-Identifier: Apache-2.0
"""Verbs that use a trained run: answers, chat, templates, server, export."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_rlhf.errors import ChecksError, UsageError

from . import shell
from .command_group import Json, RecipePath, RunPath, Set, command


@command("generate")
def _generate_verb(
    run: RunPath,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The prompt.")],
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy decoding.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: as in the rollouts.")
    ] = None,
) -> None:
    """Answer a prompt with base, SFT and policy side by side.

    With the reward of each answer, if the run has a reward model.
    """
    from lora_rlhf.runs.record import Record

    Record.read(run)  # refuses a wrong folder before the slow imports
    loaded = shell.room("serving.loaded_run")
    from lora_rlhf.reports import tables

    tables.show_answers(
        loaded.generate(
            run, text, temperature=temperature, seed=seed, max_new_tokens=max_new_tokens
        )
    )
    shell.say_ignored()


Targets = Annotated[
    list[str],
    typer.Argument(metavar="TARGET...", help="Runs, RUN:policy, adapters and models, of one base."),
]
UsageFile = Annotated[
    Path, typer.Option("--usage", metavar="FILE", help="File for usage figures and thumbs.")
]
NoUsage = Annotated[bool, typer.Option("--no-usage", help="Keep no usage figures and no thumbs.")]
ModerationFile = Annotated[
    str, typer.Option(metavar="FILE", help="A policy file, default, or off.")
]

Sources = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE|DIR", help="Answer from these documents only; repeatable."),
]
Unsupported = Annotated[
    str, typer.Option(help="Sentences that the sources do not support: mark, drop or refuse.")
]
Base = Annotated[str | None, typer.Option(help="Base of adapters whose config names none.")]
In4Bit = Annotated[bool, typer.Option("--load-in-4bit")]


@command("serve")
def _serve_verb(
    targets: Targets,
    host: Annotated[
        str, typer.Option(help="0.0.0.0 lets other machines in; needs LORA_RLHF_API_KEY.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8000,
    base: Base = None,
    load_in_4bit: In4Bit = False,
    usage: UsageFile = Path("lora-rlhf-usage.sqlite"),
    no_usage: NoUsage = False,
    moderation: ModerationFile = "default",
    moderation_log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Decisions as JSON Lines, without texts.")
    ] = None,
    body: Annotated[int, typer.Option("--max-body", min=1, help="Limit in bytes.")] = 1_000_000,
    prompt: Annotated[
        int | None, typer.Option("--max-prompt-tokens", min=1, help="Default: the context.")
    ] = None,
    answer: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Longest answer; default: the context."),
    ] = None,
    queue: Annotated[
        int, typer.Option("--max-queue", min=1, help="Requests running and waiting; then 429.")
    ] = 64,
    seconds: Annotated[
        float, typer.Option("--max-seconds", min=0.1, help="Time for one request; then 503.")
    ] = 300.0,
    drain: Annotated[
        float, typer.Option("--drain-seconds", min=0.0, help="For running requests at the end.")
    ] = 30.0,
    engine: Annotated[
        str, typer.Option(help="own or vllm; LORA_RLHF_VLLM names vLLM's Python.")
    ] = "own",
) -> None:
    """Serve a chat-completions API for all models of a run.

    Base, SFT, policy and adapters; each request names its model. It listens on this machine
    only and needs a key: LORA_RLHF_API_KEY, or a new one that is printed. After a signal
    running requests may end; a second signal stops at once.
    """
    if engine != "own":
        return _serve_vllm(engine, targets, (host, port), base, moderation)
    server = shell.room("serving.api_server")
    limits = server.Limits(body, prompt, answer, queue, seconds, drain)
    made = server.serve(
        *targets,
        host=host,
        port=port,
        base=base,
        load_in_4bit=load_in_4bit,
        usage=None if no_usage else usage,
        moderation=moderation,
        moderation_log=moderation_log,
        limits=limits,
    )
    for line in made.lines():
        shell.echo(line)
    made.run()


def _serve_vllm(
    engine: str, targets: list[str], at: tuple[str, int], base: str | None, moderation: str
) -> None:
    if engine != "vllm":
        raise UsageError(f"engine {engine!r}", expected="own or vllm")
    if moderation != "off":
        raise UsageError(
            "vLLM's server has no moderation, usage figures or limits of this package",
            remedy="add `--moderation off`, or leave --engine out",
        )
    server = shell.room("serving.vllm_engine")
    made = server.serve(targets, server.Access(*at), base=base)
    for line in made.lines():
        shell.echo(line)
    made.run()


@command("rollout-server")
def _rollout_server_verb(
    path: RecipePath,
    overrides: Set = None,
    host: Annotated[str, typer.Option(help="Other than 127.0.0.1: with a key only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8001,
) -> None:
    """Sample PPO's rollouts with vLLM, for a run elsewhere.

    The run is on another GPU or machine. LORA_RLHF_VLLM names the Python that has vLLM. The key
    is LORA_RLHF_ROLLOUT_KEY, or a new one that is printed.
    """
    from lora_rlhf.recipe.loader import load_recipe

    recipe = load_recipe(path, overrides)
    server = shell.room("serving.rollout_server")
    made = server.serve(recipe, server.access(host, port))
    for line in made.lines():
        shell.echo(line)
    made.run()


@command("usage")
def _usage_verb(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="The --usage of chat, do or serve.")
    ] = Path("lora-rlhf-usage.sqlite"),
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two models to compare; default: both, if there are two."),
    ] = None,
    as_json: Json = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Plot the numbers as a PNG.")
    ] = None,
) -> None:
    """Report usage and thumbs of chat, do and serve.

    Requests, times, tokens, blocked answers and thumbs, for each adapter and version, with 95 %
    intervals.
    """
    from lora_rlhf.serving import usage_report

    report = usage_report.report(path, compare)
    if plot is not None:
        from lora_rlhf.reports import plots

        plots.usage(report, plot)
        shell.echo(f"plot: {plot}", err=True)
    if as_json:
        shell.echo(json.dumps(report, indent=1))
    else:
        from lora_rlhf.reports import tables

        tables.show_usage(report)


@command("moderate")
def _moderate_verb(
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Without one: show the policy.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: the packaged policy.")
    ] = None,
    where: Annotated[str, typer.Option(help="Kind: prompt, history or answer.")] = "prompt",
    prompt: Annotated[str, typer.Option(help="The question that an answer is for.")] = "",
) -> None:
    """Show a moderation policy, or its decisions on texts.

    With the measured errors of its detectors.
    """
    moderation = shell.room("serving.moderation")
    if not texts:
        for line in moderation.Moderation.load(policy).page():
            shell.echo(line)
    for decision in moderation.moderate(texts or (), policy, where=where, prompt=prompt):
        shell.echo(f"{decision.action}  {decision.reason}")


Schema = Annotated[
    Path | None, typer.Option("--schema", metavar="FILE", help="JSON schema of the answer.")
]


@command("chat")
def _chat_verb(
    targets: Targets,
    model: Annotated[str, typer.Option(help="Who answers first; default: the last trained.")] = "",
    system: Annotated[str, typer.Option(metavar="TEXT", help="System message.")] = "",
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy decoding.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first answer.")] = 0,
    tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    schema: Schema = None,
    sources: Sources = None,
    unsupported: Unsupported = "mark",
    moderation: ModerationFile = "off",
    usage: UsageFile = Path("lora-rlhf-usage.sqlite"),
    no_usage: NoUsage = False,
    base: Base = None,
    load_in_4bit: In4Bit = False,
) -> None:
    """Talk with a run's models in the terminal.

    Answers stream. /help lists the commands: change or compare models, give thumbs, and more.
    Over a pipe each line of the input is a question or a command; answers go to stdout.
    """
    terminal = shell.room("serving.chat_terminal")
    from lora_rlhf.serving import chat, instructions

    read = instructions.read_schema(schema) if schema else None
    grounding = None
    if sources:
        grounding = shell.room("serving.grounding").Grounding.open(sources, unsupported)
    with chat.chat(
        *targets,
        model=model,
        system=system,
        temperature=temperature,
        seed=seed,
        max_tokens=tokens,
        schema=read,
        grounding=grounding,
        moderation=moderation,
        usage=None if no_usage else usage,
        base=base,
        load_in_4bit=load_in_4bit,
    ) as talk:
        refused = terminal.run(talk)
    shell.say_ignored()
    if refused:
        raise typer.Exit(UsageError.exit_code)


Verb = Annotated[
    str | None, typer.Argument(help="summarize, rewrite, translate, extract, classify or answer.")
]
Texts = Annotated[list[Path] | None, typer.Argument(metavar="FILE...", help="Texts; - is stdin.")]
With = Annotated[
    str | None, typer.Option("--with", metavar="RUN[:MODEL]", help="Run, adapter or model.")
]
OwnTemplate = Annotated[Path | None, typer.Option(metavar="FILE", help="A template of your own.")]
Show = Annotated[
    str | None, typer.Option(metavar="VERB", help="Print the template of a verb, and stop.")
]
Tone = Annotated[str | None, typer.Option(help="Such as formal.")]
Form = Annotated[str | None, typer.Option(help="text, bullets, json or line.")]
AtLength = Annotated[
    str | None, typer.Option(help="50 words, 30-50 words, 2 sentences or 3 bullets.")
]
To = Annotated[str | None, typer.Option(metavar="LANGUAGE", help="Such as German.")]
Choices = Annotated[str | None, typer.Option("--labels", metavar="A,B,C", help="For classify.")]
Question = Annotated[str | None, typer.Option(metavar="TEXT", help="For answer.")]
Examples = Annotated[
    Path | None, typer.Option(metavar="FILE", help="1 to 3 lines of input and output.")
]
Tries = Annotated[int, typer.Option(min=1, help="Most attempts, if checks fail.")]
Warmth = Annotated[
    float | None, typer.Option(min=0.0, help="Default: greedy, then 0.7 in later attempts.")
]
Tokens = Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")]
BestOf = Annotated[int, typer.Option(min=1, help="Samples; the reward model chooses one.")]
Long = Annotated[str, typer.Option(help="If a text is too long: refuse or split.")]
NewOut = Annotated[Path | None, typer.Option(help="New file, or folder for several texts.")]


@command("do")
def _do_verb(
    verb: Verb = None,
    files: Texts = None,
    run: With = None,
    template: OwnTemplate = None,
    show: Show = None,
    tone: Tone = None,
    format: Form = None,
    length: AtLength = None,
    to: To = None,
    labels: Choices = None,
    schema: Schema = None,
    question: Question = None,
    sources: Sources = None,
    unsupported: Unsupported = "mark",
    examples: Examples = None,
    tries: Tries = 3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    temperature: Warmth = None,
    tokens: Tokens = None,
    best_of: BestOf = 1,
    long: Long = "refuse",
    out: NewOut = None,
    as_json: Json = False,
    moderation: ModerationFile = "off",
    usage: UsageFile = Path("lora-rlhf-usage.sqlite"),
    no_usage: NoUsage = False,
) -> None:
    """Summarize, rewrite, translate, extract, classify, answer.

    Each answer is checked for what was asked, and tried again if a check fails. The exit code is 6
    if one still fails; the best attempt is printed all the same. `do answer --sources` answers from
    documents: it cites passages, and checks each sentence against them.
    """
    if show is not None:
        from lora_rlhf.serving import instruction_templates

        shell.echo(instruction_templates.source(show), nl=False)
        return
    if verb is None or not (files or sources) or run is None:
        raise UsageError("a verb, a FILE and --with are needed", expected=_DO)
    options = {
        "template": template, "tone": tone, "format": format, "length": length, "to": to,
        "labels": labels, "schema": schema, "question": question, "examples": examples,
        "tries": tries, "seed": seed, "temperature": temperature, "max_tokens": tokens,
        "best_of": best_of, "long": long, "moderation": moderation,
    }  # fmt: skip
    store = None if no_usage else usage
    if sources:
        _ground(verb, files, sources, unsupported, run, options, store, out, as_json)
    else:
        _do(verb, files or [], run, options, store, out, as_json)


_GROUND_OPTIONS = ("question", "seed", "temperature", "max_tokens", "moderation")
_DO = "lora-rlhf do summarize report.txt --with runs/mine"


def _ground(
    verb: str,
    files: list[Path] | None,
    sources: list[Path],
    unsupported: str,
    run: str,
    options: dict[str, Any],
    usage: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    kept = {key: options.pop(key) for key in _GROUND_OPTIONS}
    usual = {"tries": 3, "best_of": 1, "long": "refuse"}
    other = [f"--{k}" for k, v in options.items() if v != usual.get(k)]
    if verb != "answer" or files or other or not kept["question"]:
        given = ", ".join([*([] if verb == "answer" else [verb]), *map(str, files or []), *other])
        raise UsageError(
            f"--sources with {given}" if given else "--sources without --question",
            expected="lora-rlhf do answer --question TEXT --sources DIR --with RUN; --seed, "
            "--temperature, --tokens and --moderation are allowed too",
        )
    _check_new(out)
    made = shell.room("serving.grounding").ground(
        kept.pop("question"),
        sources,
        run=run,
        unsupported=unsupported,
        usage=usage,
        **{key: value for key, value in kept.items() if value is not None},
    )
    for warning in made.warnings:
        shell.echo(f"warning: {warning}", err=True)
    if made.blocked:
        raise ChecksError(made.blocked)
    text = json.dumps(made.to_dict(), ensure_ascii=False) if as_json else made.shown()
    if out is None:
        shell.echo(text)
    else:
        out.write_text(f"{text}\n", encoding="utf-8")
    shell.say_ignored()
    if unsupported == "refuse" and made.unsupported:
        raise ChecksError("the answer is refused", remedy="--unsupported mark shows it")


def _check_new(out: Path | None) -> None:
    """Refuse an --out that exists, and make its folder, before anything is computed."""
    from lora_rlhf.runs.disk import make_place

    if out is not None:
        if out.exists():
            raise UsageError(f"{out} exists", remedy="choose another --out")
        make_place(out)


def _do(
    verb: str,
    files: list[Path],
    run: str,
    options: dict[str, Any],
    usage: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    from lora_rlhf.data import sources
    from lora_rlhf.serving import instruction_templates

    instruction_templates.load(verb, options["template"])  # refused before the slow imports
    texts = [sys.stdin.read() if str(f) == "-" else sources.whole_text(f) for f in files]
    if empty := [file for file, text in zip(files, texts, strict=True) if not text.strip()]:
        raise UsageError("the file is empty", where=str(empty[0]))
    _check_new(out)
    room = shell.room("serving.instructions")

    def failed(index: int, attempt: int, result: Any) -> None:
        tried = f"try {attempt}: " if attempt else ""
        shell.echo(f"{files[index]}: {tried}{'; '.join(result.problems)}", err=True)

    results = room.do(verb, texts, run=run, usage=usage, failed=failed, **options)
    names = [str(file) for file in files]
    for name, result in zip(names, results, strict=True):
        for warning in result.warnings:
            shell.echo(f"{name}: warning: {warning}", err=True)
    if as_json:
        rows = ({"file": n, **r.record()} for n, r in zip(names, results, strict=True))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif len(files) == 1:
        text = f"{results[0].text}\n"
    else:
        parts = zip(names, results, strict=True)
        text = "\n".join(f"==> {name} <==\n{result.text}\n" for name, result in parts)
    if out is None:
        shell.echo(text, nl=False)
    elif as_json or len(files) == 1:
        out.write_text(text, encoding="utf-8")
    else:
        room.write_all(out, files, results)
    shell.say_ignored()
    wrong = [result for result in results if not result.passed]
    if wrong:
        raise ChecksError(
            f"answers that fail a check: {len(wrong)} of {len(results)}, tries: {options['tries']}",
            remedy="more --tries or --tokens, an easier --length or --format, or another model",
        )


@command("export")
def _export_verb(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="New folder of the export.")],
    role: Annotated[str, typer.Option(help="policy, sft or reward.")] = "policy",
    to: Annotated[
        str, typer.Option(help="merged (transformers), gguf, gguf-adapter, mlx or ollama.")
    ] = "merged",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; for GGUF also q8_0 or q4_0. Default: the base's "
            "own if that loses nothing, else float32; for GGUF float16."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a trained role for another runtime, such as GGUF.

    It is merged, measured and verified in that runtime. The export is refused if the merged
    model differs by a KL above 1e-5 a token, or if llama.cpp or mlx-lm has another most
    probable token for over 1 % of held-out tokens. llama.cpp is found through the variable
    LORA_RLHF_LLAMA_CPP (a folder with `npm install node-llama-cpp`) or llama-cpp-python.
    """
    from lora_rlhf.runs.record import Record

    Record.read(run)  # refuses a wrong folder before the slow imports
    module, say = shell.room("exports.export_run"), functools.partial(shell.echo, err=True)
    made = module.export(run, out, role=role, to=to, dtype=dtype, say=say)
    if as_json:
        shell.echo(json.dumps(made, indent=1))
    else:
        for line in module.lines(made, out):
            shell.echo(line)


@command("score")
def _score_verb(
    run: RunPath,
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON Lines; -: standard input.")],
    out: Annotated[Path | None, typer.Option(help="Write JSON Lines here too.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers scored at once.")] = 32,
    as_json: Json = False,
) -> None:
    """Rank answers by the run's reward model.

    Each line has a `prompt` (a text or messages) and `answers` (a list of texts), or `prompt` and
    `answer`; lines of one prompt are ranked together.
    """
    from lora_rlhf.runs.record import Record

    Record.read(run)
    module = shell.room("serving.scoring_files")
    warn = functools.partial(shell.echo, err=True)
    report = module.score(run, file, out=out, batch_size=batch_size, say=warn)
    if as_json:
        shell.echo(json.dumps(report, indent=1))
    else:
        for line in module.lines(report):
            shell.echo(line)
