# SPDX-License-Identifier: Apache-2.0
"""Instructions to a trained model: summarize, rewrite, translate, extract, classify, answer.

A template makes the prompt, the answer is checked for what was asked, and one that fails is drawn
again with another seed.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from lora_rlhf.data import answer_format, sources
from lora_rlhf.errors import DataError, UsageError, counted, first_line
from lora_rlhf.recipe import suggestions

from . import instruction_templates, output_checks, usage_store
from .inference import Completion, Handle, InferenceEngine, Request
from .instruction_templates import OPTIONS, Template
from .moderation import Moderation
from .output_checks import Check, Length
from .structured import Constraint

RETRY_TEMPERATURE = 0.7
"""Of tries after the first one, which is greedy, unless a temperature is given."""

_MODERATION = "moderation"
_AT_ONCE = 64  # requests in the engine, which lets 256 wait

Long = Literal["refuse", "split"]
_BOUNDARIES = (r"\n\s*\n", r"\n", r"(?<=[.!?])\s+", r"\s+")
"""Places at which a long text is cut: paragraphs, else lines, sentences, words."""


@dataclass(frozen=True)
class Result:
    """The best attempt at an instruction, with its checks.

    Attributes:
        text: Empty if moderation blocked the text or its answer.
        tries: Attempts that were made; tokens and seconds are of all of them.
        parts: Parts in which a long text was done; 1: in one.
    """

    text: str
    checks: list[Check]
    tries: int
    model: str
    template: str
    template_sha256: str
    seed: int
    parts: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    reward: float | None = None
    completion_id: str = ""

    @property
    def passed(self) -> bool:
        """Tell whether no check failed."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """One sentence for each check that failed."""
        return [f"{c.name}: {c.problem}" for c in self.checks if c.passed is False]

    @property
    def warnings(self) -> list[str]:
        """Reasons of moderation for a warning; the answer is given all the same."""
        return [c.problem for c in self.checks if c.name == _MODERATION and c.passed]

    def __str__(self) -> str:
        return self.text

    def record(self) -> dict[str, Any]:
        """Return the result as plain data."""
        checks = [{k: v for k, v in vars(check).items() if v != ""} for check in self.checks]
        return {**vars(self), "passed": self.passed, "checks": checks}


@dataclass(frozen=True)
class Instruction:
    """A template with its options; `carry_out` applies it to texts.

    Attributes:
        examples: Pairs of a text and its answer, which the model is shown as earlier turns.
        tries: Most attempts for each text.
    """

    template: Template
    options: Mapping[str, Any]
    examples: Sequence[tuple[str, str]] = ()
    model: str = ""
    tries: int = 3
    seed: int = 0
    temperature: float | None = None
    max_tokens: int | None = None
    best_of: int = 1
    long: Long = "refuse"
    wanted: Mapping[str, Any] = field(init=False)
    constraint: Constraint | None = field(init=False)

    def __post_init__(self) -> None:
        options = {name: value for name, value in self.options.items() if value}
        unknown = set(options) - set(OPTIONS)
        if unknown:
            raise UsageError(f"unknown option {min(unknown)!r}", expected=", ".join(OPTIONS))
        self.template.check_options(options)
        if (form := options.get("format")) not in (None, *output_checks.FORMATS):
            raise UsageError(f"--format {form!r}", expected=", ".join(output_checks.FORMATS))
        if len(self.examples) > 3:
            raise UsageError(f"{len(self.examples)} examples", expected="1 to 3")
        if self.tries < 1:
            raise UsageError(f"tries {self.tries}", expected="1 or more")
        if self.long not in get_args(Long):
            raise UsageError(f"--long {self.long!r}", expected="refuse or split")
        wanted: dict[str, Any] = {**dict.fromkeys(map(str, self.template.checks), True), **options}
        if "to" in options:
            output_checks.language_code(options["to"])
            wanted |= {"same_language": False, "quotes": False}
        constraint = None
        if labels := options.get("labels"):
            if len(set(labels)) < 2 or not all(isinstance(n, str) and n.strip() for n in labels):
                raise UsageError(
                    f"--labels {labels}", expected="two or more different ones, such as a,b,c"
                )
            constraint = Constraint("choice", list(labels))
        elif (schema := options.get("schema")) is not None:
            try:
                answer_format.validate({"json_schema": schema})
            except ValueError as error:
                raise UsageError(f"the schema cannot be used: {error}") from None
            constraint = Constraint("json_schema", schema)
        elif form == "json":
            constraint = Constraint("json", None)
        elif form == "bullets":
            constraint = _bullets(options.get("length"))
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "wanted", wanted)
        object.__setattr__(self, "constraint", constraint)

    def messages(self, text: str) -> tuple[dict[str, str], ...]:
        """Return the turns that the model sees for a text."""
        shown = dict(self.options)
        if "schema" in shown:
            shown["schema"] = json.dumps(shown["schema"], ensure_ascii=False)
        if "length" in shown:
            shown |= {"length": str(shown["length"]), "count": shown["length"].high}
        turns: list[dict[str, str]] = []
        for given, answer in self.examples:
            turns += _turn("user", self.template.fill(given, **shown)), _turn("assistant", answer)
        return (*turns, _turn("user", self.template.fill(text, **shown)))


def _bullets(length: Length | None) -> Constraint:
    """The form of lines that begin with "- ", as many as the length asks for."""
    line, low, high = r"- [^\s-][^\n]*", 1, None
    if length is not None and length.unit == "bullets":
        low, high = max(1, length.low), length.high
    more = f"{low - 1},{'' if high is None else high - 1}"
    return Constraint("regex", rf"{line}(\n{line}){{{more}}}")


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


Failed = Callable[[int, int, Result], None]
"""Called for an attempt that failed: index of its text, number of the attempt, result."""


def _ignore(text: int, attempt: int, result: Result) -> None:
    pass


def carry_out(
    engine: InferenceEngine,
    instruction: Instruction,
    texts: Sequence[str],
    *,
    usage: usage_store.UsageStore | None = None,
    moderation: Moderation | None = None,
    failed: Failed = _ignore,
) -> list[Result]:
    """Apply an instruction to texts: all at once, then those that failed a check again.

    A text that moderation blocks is not given to the model; an answer that it blocks has failed.

    Raises:
        UsageError: A text is empty or does not fit the context, or an option cannot be used.
    """
    if empty := [number for number, text in enumerate(texts, start=1) if not text.strip()]:
        raise UsageError(f"text {empty[0]} of {len(texts)} is empty", expected="texts to work on")
    best: dict[int, Result] = {}
    warned: dict[int, list[Check]] = {}
    for i, text in enumerate(texts if moderation else ()):
        turns = instruction.messages(text)
        warned[i] = _moderated(moderation, turns[-1]["content"])
        if any(not check.passed for check in warned[i]):
            best[i] = _unanswered(engine, instruction, warned[i])
            failed(i, 0, best[i])
            if usage is not None:
                _keep(usage, engine, instruction, best[i], turns)
    pending = [i for i in range(len(texts)) if i not in best]
    parts = {i: _parts(engine, instruction, texts[i]) for i in pending}
    merged = list(texts)
    for i, cut in parts.items():
        if len(cut) > 1:
            merged[i] = _reduced(engine, instruction, cut)
    for attempt in range(instruction.tries):
        requests = [_request(engine, instruction, merged[i], attempt) for i in pending]
        done = _completions(engine, requests)
        for i, request, completion in zip(list(pending), requests, done, strict=True):
            result = _result(instruction, texts[i], completion, request, attempt, len(parts[i]))
            checks = _moderated(moderation, result.text, request.messages[-1]["content"])
            if any(not check.passed for check in checks):
                result = replace(result, text="")
            result = replace(result, checks=[*result.checks, *warned.get(i, ()), *checks])
            before = best.get(i, result)
            spent = {
                name: getattr(result, name) + (getattr(before, name) if attempt else 0)
                for name in ("prompt_tokens", "completion_tokens", "seconds")
            }
            better = len(result.problems) < len(before.problems)
            best[i] = replace(result if better else before, tries=attempt + 1, **spent)
            if result.passed:
                pending.remove(i)
            else:
                failed(i, attempt + 1, result)
            if usage is not None and (result.passed or attempt + 1 == instruction.tries):
                _keep(usage, engine, instruction, best[i], request.messages)
        if not pending:
            break
    return [best[i] for i in range(len(texts))]


def _moderated(moderation: Moderation | None, text: str, prompt: str | None = None) -> list[Check]:
    """Return the check of a prompt, or of the answer to one, that moderation blocks or warns of."""
    if moderation is None:
        return []
    where: Literal["prompt", "answer"] = "prompt" if prompt is None else "answer"
    decision = moderation.check(text, where, prompt or "")
    done = {"block": "is blocked", "warn": "is doubtful"}.get(decision.action)
    why = f"the {where} {done}: {decision.reason}"
    return [Check(_MODERATION, decision.action == "warn", why)] if done else []


def _unanswered(engine: InferenceEngine, instruction: Instruction, checks: list[Check]) -> Result:
    model, template = instruction.model or engine.default, instruction.template
    made = Result("", checks, 0, model, template.name, template.sha256, instruction.seed)
    return replace(made, completion_id=usage_store.new_id())


def _completions(engine: InferenceEngine, requests: Iterable[Request]) -> Iterator[Completion]:
    """Answer requests in their order, without more at once than an engine lets wait."""
    handles: deque[Handle] = deque()
    try:
        for request in requests:
            if len(handles) == _AT_ONCE:
                yield handles.popleft().result()
            handles.append(engine.submit(request))
        while handles:
            yield handles.popleft().result()
    finally:
        for handle in handles:
            handle.cancel()


def _longest(engine: InferenceEngine, instruction: Instruction) -> int:
    """Return the most tokens of an answer; a run's own limit may be that of short rollouts."""
    return instruction.max_tokens or max(engine.max_tokens, min(256, engine.context // 4))


def _request(engine: InferenceEngine, instruction: Instruction, text: str, attempt: int) -> Request:
    temperature = instruction.temperature
    if temperature is None:
        temperature = RETRY_TEMPERATURE if attempt or instruction.best_of > 1 else 0.0
    return Request(
        instruction.messages(text),
        model=instruction.model,
        max_tokens=_longest(engine, instruction),
        temperature=temperature,
        seed=instruction.seed + attempt,
        best_of=instruction.best_of,
        constraint=instruction.constraint,
    )


def _result(
    instruction: Instruction,
    text: str,
    completion: Completion,
    request: Request,
    attempt: int,
    parts: int,
) -> Result:
    choice = completion.choices[0]
    answer = choice.text.strip()
    checks = output_checks.run(answer, instruction.wanted, text)
    if choice.finish_reason == "length":
        checks.append(
            Check("whole", False, f"cut off after {counted(completion.completion_tokens, 'token')}")
        )
    return Result(
        answer,
        checks,
        attempt + 1,
        completion.model,
        instruction.template.name,
        instruction.template.sha256,
        request.seed or 0,
        parts,
        completion.prompt_tokens,
        completion.completion_tokens,
        completion.seconds,
        choice.reward,
        usage_store.new_id(),
    )


def _keep(
    usage: usage_store.UsageStore,
    engine: InferenceEngine,
    instruction: Instruction,
    result: Result,
    turns: Sequence[dict[str, str]],
) -> None:
    form = [c.passed for c in result.checks if c.name in ("schema", "labels", "format")]
    usage.record(
        usage_store.Use(
            id=result.completion_id,
            kind="do",
            model=result.model,
            version=engine.models[result.model].adapter if result.model in engine.models else "",
            prompt_tokens=result.prompt_tokens,
            completion_tokens=result.completion_tokens,
            seconds=result.seconds,
            blocked=any(c.name == _MODERATION and not c.passed for c in result.checks),
            valid=all(form) if form and instruction.constraint else None,
            completed=result.passed,
            prompt=turns,
        )
    )


# --- long texts ----------------------------------------------------------------------------------


def _parts(engine: InferenceEngine, instruction: Instruction, text: str) -> list[str]:
    """Cut a text into parts that fit the context, at paragraphs where there are any."""
    room = engine.context - _longest(engine, instruction)
    tokens = engine.count_tokens(instruction.messages(text))
    if tokens <= room:
        return [text]
    shell = engine.count_tokens(instruction.messages(""))
    if instruction.long == "split" and not instruction.template.split:
        raise UsageError(
            f"the template {instruction.template.name} has no `split: true`",
            remedy="leave --long out, or write `split: true` into a copy of the template",
        )
    if instruction.long != "split" or shell >= room or len(text.split()) < 2:
        remedy = "fewer --tokens" if shell >= room else "a shorter text, or fewer --tokens"
        if instruction.template.split and shell < room:
            remedy += ", or `--long split`, which does it in parts"
        raise UsageError(
            f"the prompt has {tokens:,} tokens ({shell:,} of them without the text)",
            expected=f"at most {max(room, 0):,}: the context of {engine.context:,} less "
            f"{engine.context - room:,} for the answer",
            remedy=remedy,
        )
    left, right = _halves(text)
    return [*_parts(engine, instruction, left), *_parts(engine, instruction, right)]


def _halves(text: str) -> tuple[str, str]:
    text = text.strip()
    for boundary in _BOUNDARIES:
        cuts = [match.span() for match in re.finditer(boundary, text)]
        if cuts:
            start, end = min(cuts, key=lambda cut: abs(cut[0] - len(text) / 2))
            return text[:start], text[end:]
    return text[: len(text) // 2], text[len(text) // 2 :]


def _reduced(engine: InferenceEngine, instruction: Instruction, parts: Sequence[str]) -> str:
    """Do each part, and the joined results again until they fit the context."""
    free = {k: v for k, v in instruction.options.items() if k not in ("length", "format")}
    each = replace(instruction, options=free)
    while len(parts) > 1:
        requests = [_request(engine, each, part, 0) for part in parts]
        answers = [made.choices[0].text.strip() for made in _completions(engine, requests)]
        done = "\n\n".join(answers)
        before = sum(map(len, parts))
        parts = _parts(engine, instruction, done)
        if len(parts) > 1 and len(done) >= before:
            raise UsageError(
                "the results of the parts are not shorter than the text",
                remedy="use another model, or fewer --tokens",
            )
    return parts[0]


# --- the verb ------------------------------------------------------------------------------------


def read_examples(path: Path) -> list[tuple[str, str]]:
    """Read 1 to 3 pairs of a text and its answer: JSON Lines with `input` and `output`.

    Raises:
        DataError: The file has none, more than three, or something else.
    """
    expected = 'one to three lines such as {"input": "...", "output": "..."}'
    pairs = []
    for where, line in sources.text_lines(path):
        try:
            row = json.loads(line)
            pair = (row["input"], row["output"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(first_line(error), where=where, expected=expected) from None
        if not all(isinstance(text, str) and text.strip() for text in pair):
            raise DataError("input and output are not both text", where=where, expected=expected)
        pairs.append(pair)
    if not 1 <= len(pairs) <= 3:
        raise DataError(f"{len(pairs)} examples", where=str(path), expected=expected)
    return pairs


def read_schema(path: Path) -> Any:
    """Read a JSON schema.

    Raises:
        DataError: The file is not JSON, or not a schema.
    """
    try:
        schema = json.loads(sources.whole_text(path))
        answer_format.validate({"json_schema": schema})
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"not a JSON schema: {first_line(error)}",
            where=str(path),
            expected='such as {"type": "object", "properties": {"name": {"type": "string"}}}',
        ) from None
    return schema


def make(
    verb: str,
    *,
    template: str | Path | None = None,
    length: str | int | None = None,
    labels: str | Iterable[str] | None = None,
    schema: Any = None,
    examples: str | Path | Sequence[tuple[str, str]] | None = None,
    tone: str | None = None,
    format: str | None = None,
    to: str | None = None,
    question: str | None = None,
    **settings: Any,
) -> Instruction:
    """Make an instruction from options as people write them.

    Args:
        verb: summarize, rewrite, translate, extract, classify or answer.
        template: File of a template of one's own.
        length: Such as `50 words`, `30-50 words`, `2 sentences`, `3 bullets`.
        labels: Of `classify`; a text is split at commas.
        schema: A JSON schema, or its file.
        examples: Pairs of a text and its answer, or a file of them.
        settings: The other fields of Instruction.

    Raises:
        UsageError: An option is unknown, or cannot be used.
    """
    known = {one.name for one in fields(Instruction) if one.init} - {"options"}
    suggestions.check_names(settings, known | {*OPTIONS}, "do")
    if isinstance(labels, str):
        labels = [label.strip() for label in labels.split(",") if label.strip()]
    if isinstance(schema, str | Path):
        schema = read_schema(Path(schema))
    if isinstance(examples, str | Path):
        examples = read_examples(Path(examples))
    options = {
        "tone": tone, "format": format, "to": to, "question": question, "schema": schema,
        "length": Length.parse(str(length)) if length is not None else None,
        "labels": list(labels) if labels is not None else None,
    }  # fmt: skip
    path = Path(template) if template is not None else None
    loaded = instruction_templates.load(verb, path)
    return Instruction(loaded, options, examples or (), **settings)


def do(
    verb: str,
    text: str | Sequence[str],
    *,
    run: Any,
    usage: str | Path | None = None,
    moderation: str | Path | None = "off",
    failed: Failed = _ignore,
    **options: Any,
) -> Any:
    """Summarize, rewrite, translate, extract from, classify or answer about one text or several.

    `lora_rlhf.do("summarize", text, run="runs/mine", length="50 words")`

    Args:
        run: A run, an adapter or a model, perhaps with `:model`; or an InferenceEngine.
        usage: File of the usage store; None: nothing is recorded.
        moderation: `off`, `default`, or the file of a policy.
        options: Those of `instructions.make`: template, tone, format, length, to, labels, schema,
            question, examples, model, tries, seed, temperature, max_tokens, best_of, long.

    Returns:
        A Result, or for several texts a list of them:
        `str(result)` is the answer, `passed` and `problems` its checks.
    """
    model, target = options.pop("model", ""), run
    if not isinstance(run, InferenceEngine):
        target, named = split_target(run)
        model = model or named
    instruction = make(verb, model=model, **options)
    gate, texts = Moderation.opened(moderation), [text] if isinstance(text, str) else list(text)
    store = nullcontext() if usage is None else usage_store.UsageStore(Path(usage))
    with loaded(target) as engine, store as kept:
        results = carry_out(engine, instruction, texts, usage=kept, moderation=gate, failed=failed)
    return results[0] if isinstance(text, str) else results


def write_all(folder: Path, files: Sequence[Path], results: Sequence[Result]) -> None:
    """Write each result into a new folder, under the name of its file."""
    folder.mkdir(parents=True)
    taken: set[str] = set()
    for file, result in zip(files, results, strict=True):
        names = (f"{file.stem}-{number}" for number in itertools.count(2))
        name = next(one for one in itertools.chain([file.stem], names) if one not in taken)
        taken.add(name)
        (folder / f"{name}.txt").write_text(f"{result.text}\n", encoding="utf-8")


def split_target(target: str | Path) -> tuple[str, str]:
    """Split `RUN:model` into both; the model is empty if none is named."""
    place, mark, model = str(target).rpartition(":")
    if not mark or Path(str(target)).exists() or not Path(place).exists() or "/" in model:
        return str(target), ""
    return place, model


@contextmanager
def loaded(target: Any) -> Iterator[InferenceEngine]:
    """Load an engine and close it; one that is loaded already stays open."""
    if isinstance(target, InferenceEngine):
        yield target
        return
    engine = InferenceEngine.load([target])
    try:
        yield engine
    finally:
        engine.close()
