# SPDX-License-Identifier: Apache-2.0
"""Parse rows of every known layout into a prompt and its ranked answers.

Text becomes messages if the tokenizer has a chat template.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lora_rlhf.errors import DataError, TokenizerError
from lora_rlhf.recipe.schema import COLUMNS, DataSource

from . import answer_format, tool_calls, unread_columns
from .sources import Row, Skips, excerpt
from .tokenization import Turns

Message = dict[str, str]

LAYOUTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "demonstrations": (
        ("prompt", "completion"),
        ("messages",),
        ("prompt", "completions", "ranks"),
        ("prompt", "completions", "scores"),
        ("chosen", "rejected"),
    ),
    "comparisons": (
        ("prompt", "completions", "ranks"),
        ("prompt", "completions", "scores"),
        ("chosen", "rejected"),
        ("prompt", "completion", "label"),
    ),
    "prompts": (("prompt",), ("messages",), ("chosen", "rejected")),
    "text": (("text",),),
}
"""Set -> the layouts that it accepts, tried in this order.

{"prompt": "2 + 2?", "completion": "4"}
{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
{"prompt": "2 + 2?", "completions": ["5", "4"], "ranks": [2, 1]}
{"prompt": "2 + 2?", "completions": ["5", "4"], "scores": [0.5, 9]}
{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
{"prompt": "2 + 2?", "completion": "4", "label": true}

Beside a prompt, `input` is appended to it; beside prompt or messages, `system` goes before them,
and in demonstrations `tools` is given to the chat template.
"""
LAYOUTS["evaluate"] = LAYOUTS["prompts"]

ROLES = ("system", "user", "assistant", "tool")
_ROLES = {
    **{role: role for role in ROLES}, "human": "user", "prompter": "user", "developer": "system",
    **dict.fromkeys(("gpt", "bot", "chatgpt", "model", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response"), "tool"),
}  # fmt: skip
"""What files call a role, letter case apart -> ours."""
_KNOWN_NAMES = {
    "prompt": ("instruction", "question", "query", "goal", "input", "user_message", "user",
               "customer_question", "user_question", "frage", "kundenfrage", "anfrage",
               "anweisung", "aufgabe", "pregunta", "eingabe"),
    "completion": ("response", "output", "answer", "target", "best_answer", "reply",
                   "assistant_message", "assistant", "antwort", "ausgabe", "réponse", "reponse",
                   "respuesta"),
    "chosen": ("preferred", "winner", "response_chosen", "chosen_response", "better",
               "better_answer", "better_reply", "better_response", "good_answer", "good_reply",
               "good_response", "bevorzugt", "bessere_antwort", "gute_antwort", "besser"),
    "rejected": ("dispreferred", "loser", "response_rejected", "rejected_response", "worse",
                 "worse_answer", "worse_reply", "worse_response", "bad_answer", "bad_reply",
                 "bad_response", "abgelehnt", "schlechtere_antwort", "schlechte_antwort",
                 "schlechter"),
    "messages": ("conversation", "conversations", "dialog", "dialogue", "chat", "turns"),
    "completions": ("responses", "answers", "outputs", "antworten"),
    "ranks": ("rank", "ranking", "rankings"),
    "scores": ("ratings", "rewards"),
    "label": ("rating", "thumbs", "thumb", "vote", "feedback", "good", "liked", "correct",
              "kto_tag", "desirable", "bewertung", "daumen"),
}  # fmt: skip
"""Ours -> what files call it, letter case, spaces and hyphens apart."""

_MESSAGES = ("prompt", "completion", "messages", "chosen", "rejected")
_TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPTS_READ = "HH-RLHF transcripts were read as messages"
_SERIALISED = re.compile(r"\s*\[\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")
_ONE_TURN = re.compile(r"\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")
_WRAPPED = re.compile(
    r"\s*(?:\"\s*(?:\[\s*)?\{|\{\s*\"(?:messages|conversations?)\"\s*:|"
    r"\[\s*\{(?=[^}]*['\"](?:role|from)['\"]\s*:)(?=[^}]*['\"](?:content|value)['\"]\s*:))"
)
"""Turns written as text twice, inside an object, or after other keys."""

_TURN = re.compile(
    r"<\|(?:im_start|user|system|start_header_id|header_start|start_of_role|START_OF_TURN_TOKEN|"
    r"start\|>(?:system|developer|user)<\|message)\|>|\[INST\]|<start_of_turn>|<\uff5cUser\uff5c>"
)
_ASKED = re.compile(
    r"(?<!\w)(?:USER|User|HUMAN|Human|<human>|Instruction|Instruct):|\u7528\u6237[:\uff1a]"
)
_ANSWERED = re.compile(
    r"(?<![^\s#])(?:ASSISTANT|Assistant|Bot|BOT|<bot>|AI|Response|Output):|\u52a9\u624b[:\uff1a]"
)
"""Tokens and words with which templates begin a turn."""

_BEGINS = re.compile(
    r"\s*(<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>|"
    r"<start_of_turn>model\n|\[/INST\]|<\|assistant\|>|(?:### ?)?(?:ASSISTANT|Assistant|Response):)"
)
"""The beginning of an answer that some template writes, and of none that people write."""

_OPENS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "</s>", "<eos>")
_INSIDE = re.compile("|".join(re.escape(e) for e in _ENDS if e != "</s>") + f"|{_TURN.pattern}")
"""Tokens around turns, which an answer holds if it is several turns written as one text."""

_NOT_TRAINED = ("function_call", "reasoning_content", "reasoning", "thinking",
                "images", "image", "audio")  # fmt: skip
"""Keys of a turn whose content no stage would see."""


_TRAINED, _MASKED = ("weight", "train", "training", "loss"), ("mask", "masked")
"""Keys by which other programs leave an answer out of the loss: as false or 0, as true or 1."""

_RESERVED = ("prompts", "completions", "completion", "completion_ids", "prompt_ids", "item",
             "trunk_states", "trainer_state", "environments", "log_extra",
             "log_metric")  # fmt: skip
"""Names that a reward function gets from elsewhere than from a column."""


@dataclass
class Example:
    """One prompt and its answers; `ranks` (lowest = best) is None without a comparison.

    `good` is the row's label, if it is `labelled`; `system` goes before the prompt; `user` is who
    wrote the prompt, if that is known; `where` its place; `columns` are the other columns of a
    prompt's row.
    """

    prompt: Turns
    answers: list[Turns] = field(default_factory=list)
    ranks: list[float] | None = None
    margin: float | None = None
    item: str = ""
    system: str = ""
    good: bool = True
    labelled: bool = False
    user: str = ""
    where: str = ""
    columns: dict[str, Any] = field(default_factory=dict)


class _Unfit(Exception):
    """A row that cannot be used; collected, so that one error shows several."""


def examples(
    rows: list[Row],
    name: str,
    chat: bool,
    notes: Counter[str],
    skips: Skips,
    source: DataSource | None = None,
    layouts: Counter[str] | None = None,
) -> list[Example | None]:
    """Parse the rows of one source into examples for a set, in their order.

    Args:
        rows: As `sources.read` returns them.
        name: demonstrations, comparisons, prompts, evaluate or text (read as prompts).
        chat: The tokenizer has a chat template.
        notes: Counts converted rows by kind of conversion, for the report.
        skips: Takes rows that do not fit, up to its limit; the result then has None in their place.
        source: A file or Hub dataset, whose unread columns are checked; None for a task.
        layouts: Counts the rows by the name of their layout.

    Raises:
        DataError: Columns are missing, null or of a wrong type, with the first five such rows; a
            column that is not read looks needed; prompts are conversations written as one text.
        TokenizerError: The rows hold messages, but there is no chat template.
    """
    rows = unfolded(rows, set(source.ignore) if source is not None else set(), notes)
    present = {key for _, row in rows for key, value in row.items() if value is not None}
    layout = next((one for one in LAYOUTS[name] if present.issuperset(one)), None)
    if layout is None:
        raise _no_layout(rows, name)
    if source is not None and name != "text":
        unread_columns.check(rows, layout, name, source)
    mapped = name == "demonstrations" and source is not None and "label" in source.columns
    dialogue = source is not None and source.dialogue_as_text
    parsed, bad = list[Example | None](), list[tuple[str, str]]()
    for where, row in rows:
        try:
            example = _parse(row, layout, chat, notes)
            example.where = where
            example.labelled = mapped or "label" in layout
            example.good = not example.labelled or _label(row)
            _add_columns(example, row, layout, name)
            parsed.append(example)
        except _Unfit as error:
            bad.append((where, str(error)))
            parsed.append(None)
    _skip(bad, skips, rows, f"rows do not fit {' + '.join(layout)}", _accepted(name))
    if source is not None and name != "text":
        _take_off(rows, parsed, notes, chat, dialogue)
        parsed = _of_form(rows, parsed, source, skips)
    fitting = [(where, one) for (where, _), one in zip(rows, parsed, strict=True) if one]
    for where, example in fitting:
        _as_chat(example, notes, dialogue) if chat else _as_text(example, where)
    if name != "comparisons" and layout == ("chosen", "rejected"):
        chosen = name == "demonstrations"
        what = "demonstrations are the chosen answers" if chosen else "prompts are those"
        notes[f"{what} of a comparison file"] += len(fitting)
    if layouts is not None:
        layouts[" + ".join(layout)] += len(rows)
    return parsed


def _skip(
    bad: list[tuple[str, str]], skips: Skips, rows: list[Row], problem: str, expected: str
) -> None:
    """Skip the rows that cannot be used, or show five of them."""
    if len(bad) <= skips.most - len(skips.seen):
        skips.seen += [DataError(text, where=where) for where, text in bad]
        return
    remedy = (
        f"correct or remove these rows, or skip them by `skip_bad: {len(skips.seen) + len(bad)}`"
    )
    if len(bad) == len(rows):
        others = [v for k, v in rows[0][1].items() if k not in COLUMNS]
        remedy = "write all rows in this form"
        remedy += ", or map the right columns with `columns:`" * any(
            isinstance(value, str | list) for value in others
        )
    raise DataError(
        f"{len(bad)} of {len(rows)} {problem}{_shown(bad)}",
        where=bad[0][0],
        expected=expected,
        remedy=remedy,
    )


def _of_form(
    rows: list[Row], parsed: list[Example | None], source: DataSource, skips: Skips
) -> list[Example | None]:
    """Skip the rows whose answer, the best one of several, breaks the set's `format:`."""
    if source.format is None:
        return parsed
    checks = source.format.checks
    try:
        answer_format.validate(checks)
    except ValueError as error:
        raise DataError(f"format: {error}", expected="checks that can be carried out") from None
    bad: dict[int, str] = {}
    for number, example in enumerate(parsed):
        if example and example.good and example.answers:
            ranks = example.ranks or [0.0]
            text = _last(example.answers[ranks.index(min(ranks))]).strip()
            if problems := answer_format.problems(text, checks):
                bad[number] = f"{'; '.join(problems)}: {excerpt(text)}"
    listed = [(rows[number][0], reason) for number, reason in bad.items()]
    expected = f"answers of the form {excerpt(checks, 120)}"
    _skip(listed, skips, rows, "answers break `format:`", expected)
    return [None if number in bad else example for number, example in enumerate(parsed)]


def _check_rendered(rows: list[Row], parsed: list[Example | None]) -> None:
    """Refuse prompts that are conversations in the form of some template, written as one text."""
    rendered = [
        (where, example.prompt)
        for (where, _), example in zip(rows, parsed, strict=False)
        if example and isinstance(example.prompt, str)
        if _rendered(example.prompt) and not transcript(example.prompt)
    ]
    if 2 * len(rendered) > len(rows):
        raise DataError(
            f"{len(rendered)} of {len(rows)} prompts are conversations written as one text"
            + _shown([(where, excerpt(prompt)) for where, prompt in rendered[:1]]),
            where=rendered[0][0],
            expected="messages (role and content), or the question alone: the base's own chat "
            "template writes the turns",
            remedy="write the turns as `messages`, or use a base without a chat template; if they "
            "are a task's material, such as one to summarize: `dialogue_as_text: true`",
        )


def _rendered(text: str) -> bool:
    """Tell if a text begins like a turn of some template, or asks for one of the assistant."""
    if _TURN.search(text):
        return True
    question, answers = _ASKED.search(text), [*_ANSWERED.finditer(text)]
    if not question or not answers or question.start() > answers[-1].start():
        return False
    first = re.sub("|".join(map(re.escape, _OPENS)), "", text[: question.start()])
    return not first.strip("# \n") or answers[-1].end() == len(text.rstrip())


def _check_answers(rows: list[Row], parsed: list[Example | None], notes: Counter[str]) -> None:
    """Refuse answers that are several turns written as one text; note a few of them."""
    given = [(where, one) for (where, _), one in zip(rows, parsed, strict=True) if one]
    several = [
        (where, _last(answer), match[0])
        for where, one in given
        for answer in one.answers[:1]
        if (match := _INSIDE.search(_last(answer)))
    ]
    for *_, token in several:
        notes[f"answers hold {token}, with which a template parts turns: trained on as text"] += 1
    if 2 * len(several) > len(given):
        where, answer, token = several[0]
        raise DataError(
            f"{len(several)} of {len(given)} answers are several turns written as one text, parted "
            f"by {token}" + _shown([(where, excerpt(answer))]),
            where=where,
            expected="one answer; the base's own chat template writes the turns",
            remedy="write the turns as `messages`, or cut the answers at the first such token",
        )


def _take_off(
    rows: list[Row],
    parsed: list[Example | None],
    notes: Counter[str],
    chat: bool,
    dialogue: bool,
) -> None:
    """Remove what frames prompts and answers, and refuse several turns written as one text."""
    if chat:
        if not dialogue:
            _check_rendered(rows, parsed)
        _take_off_opens(parsed, notes)
    _take_off_prompts(parsed, notes)
    if chat:
        _take_off_begins(parsed, notes)
    _take_off_ends(parsed, notes)
    _check_answers(rows, parsed, notes)


def _take_off_opens(parsed: list[Example | None], notes: Counter[str]) -> None:
    """Remove a token with which some base begins a text, if most prompts begin with it."""
    texts = [one for one in parsed if one and isinstance(one.prompt, str) and one.prompt.strip()]
    for token in _OPENS:
        opened = [one for one in texts if str(one.prompt).lstrip().startswith(token)]
        if 2 * len(opened) > len(texts):
            for one in opened:
                one.prompt = str(one.prompt).lstrip().removeprefix(token)
                one.answers = [
                    answer.lstrip().removeprefix(token) if isinstance(answer, str) else answer
                    for answer in one.answers
                ]
            notes[f"prompts began with {token}, which was removed"] += len(opened)


def _take_off_begins(parsed: list[Example | None], notes: Counter[str]) -> None:
    """Remove what some template writes before an answer, if most answers begin with it."""
    given = [one for one in parsed if one and one.answers]
    begun = [one for one in given if all(_BEGINS.match(_last(a)) for a in one.answers)]
    if 2 * len(begun) > len(given):
        for one in begun:
            match = _BEGINS.match(_last(one.answers[0]))
            notes[
                f"answers began with {excerpt(match[1]) if match else ''}, which was removed"
            ] += 1
            one.answers = [
                _BEGINS.sub("", answer, count=1)
                if isinstance(answer, str)
                else [*answer[:-1], {**answer[-1], "content": _BEGINS.sub("", _last(answer), 1)}]
                for answer in one.answers
            ]


def _take_off_prompts(parsed: list[Example | None], notes: Counter[str]) -> None:
    """Remove the prompt from answers that repeat it: always turns, text if most answers do."""
    both = [one for one in parsed if one and isinstance(one.prompt, str) and one.prompt.strip()]
    texts = [
        one
        for one in both
        if one.answers
        and all(isinstance(a, str) and _rest(one.prompt, a) is not None for a in one.answers)
    ]
    repeated = texts if 2 * len(texts) > len(both) else []
    repeated += [
        one
        for one in parsed
        if one and any(_rest(one.prompt, a) for a in one.answers if isinstance(a, list))
    ]
    for one in repeated:
        rests = [_rest(one.prompt, answer) for answer in one.answers]
        pairs = zip(rests, one.answers, strict=True)
        one.answers = [answer if rest is None else rest for rest, answer in pairs]
    if repeated:
        notes["answers began with their prompt, which was removed"] += len(repeated)


def _take_off_ends(parsed: list[Example | None], notes: Counter[str]) -> None:
    """Remove a token with which some base ends a turn, if most answers end with it."""
    given = [one for one in parsed if one and one.answers]
    for token in _ENDS:
        ended = [one for one in given if all(_last(a).endswith(token) for a in one.answers)]
        if 2 * len(ended) > len(given):
            for one in ended:
                one.answers = [
                    answer.rstrip().removesuffix(token)
                    if isinstance(answer, str)
                    else [*answer[:-1], {**answer[-1], "content": _last(answer)[: -len(token)]}]
                    for answer in one.answers
                ]
            notes[f"answers ended with {token}, which was removed"] += len(ended)


def _last(answer: Turns) -> str:
    return (answer if isinstance(answer, str) else answer[-1]["content"]).rstrip()


def _rest(prompt: Turns, answer: Turns) -> Turns | None:
    """Return an answer without the prompt with which it begins; None if it does not."""
    if isinstance(answer, str):
        start = prompt.strip() if isinstance(prompt, str) else ""
        text = answer.lstrip()
        return text[len(start) :] if start and text.startswith(start) else None
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    same = [
        a["role"] == b["role"] and a["content"].strip() == b["content"].strip()
        for a, b in zip(turns, answer, strict=False)
    ]
    return answer[len(turns) :] if turns and len(answer) > len(turns) and all(same) else None


def transcript(text: str) -> list[Message] | None:
    r"""Parse an HH-RLHF transcript (`\n\nHuman: ...\n\nAssistant: ...`); None for other text."""
    text = text.replace("\r\n", "\n")  # a CSV that went through Windows
    if not _TRANSCRIPT.match(text):
        return None
    parts = _SPEAKER.split("\n\n" + text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": words.strip()}
        for speaker, words in zip(parts[::2], parts[1::2], strict=True)
    ]


def text_of(turns: Turns) -> str:
    """Return the content of all turns, one turn a line."""
    return turns if isinstance(turns, str) else "\n".join(turn["content"] for turn in turns)


def unfolded(rows: list[Row], ignored: set[str], notes: Counter[str]) -> list[Row]:
    """Return rows with the columns that the layouts are looked for in."""
    return [(where, _unfolded(row, ignored, notes)) for where, row in rows]


def _unfolded(row: dict[str, Any], ignored: set[str], notes: Counter[str]) -> dict[str, Any]:
    """Read lists that a cell holds as text, and ShareGPT's turns of `from` and `value`.

    TRL's `maybe_convert_to_chatml` would keep the roles `human` and `gpt`, and load torch.
    """
    converted = _ultrafeedback({k: v for k, v in row.items() if k not in ignored}, notes)
    sharegpt, serialised, row_notes = False, False, set[str]()
    if "conversations" in converted:
        converted.setdefault("prompt" if "chosen" in row else "messages", row["conversations"])
    for column in (*_MESSAGES, "completions", "ranks", "scores"):
        turns = converted.get(column)
        if isinstance(turns, str) and (
            column not in _MESSAGES
            or any(form.match(turns) for form in (_SERIALISED, _ONE_TURN, _WRAPPED))
        ):
            turns = _deserialised(turns, column)
            serialised |= not isinstance(turns, str)
            converted[column] = turns
        if isinstance(turns, dict) and column in _MESSAGES and (listed := _in_turns(turns)):
            turns = converted[column] = listed
            row_notes.add("lists of roles and of contents were read as turns")
        turns = [turns] if isinstance(turns, dict) else turns
        if not isinstance(turns, list) or not turns or column not in _MESSAGES:
            continue
        if all(isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in turns):
            turns = [
                {k: v for k, v in turn.items() if k not in ("from", "value")}
                | {"role": _ROLES.get(str(turn["from"]).casefold(), turn["from"])}
                | {"content": turn["value"]}
                for turn in turns
            ]
            sharegpt = True
        if all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
            converted[column] = [_as_ours(turn, row_notes) for turn in turns]
    if sharegpt:
        notes["turns of from and value (ShareGPT) were read as messages"] += 1
    if serialised:
        notes["lists written as text were read as lists"] += 1
    notes.update(row_notes)
    return converted


def _in_turns(lists: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the turns of lists of equal length, which `datasets` makes of a list of objects."""
    named = {"role", "content"} <= lists.keys() or {"from", "value"} <= lists.keys()
    if not named or not all(isinstance(one, list) for one in lists.values()):
        return []
    if len({len(one) for one in lists.values()}) != 1:
        return []
    return [dict(zip(lists, turn, strict=True)) for turn in zip(*lists.values(), strict=True)]


def _as_call(turn: dict[str, Any]) -> dict[str, Any]:
    """Return ShareGPT's turn `function_call` as a turn of the assistant with tool calls."""
    try:
        calls = json.loads(str(turn["content"]))
    except ValueError:
        return turn  # refused with its place, as a role that is not known
    calls = calls if isinstance(calls, list) else [calls]
    return {**turn, "role": "assistant", "content": "", "tool_calls": calls}


def _as_ours(turn: dict[str, Any], row_notes: set[str]) -> dict[str, Any]:
    """Return a turn with a role of ours, and content parts of text only as one text; note both."""
    if str(turn["role"]).casefold() == "function_call":
        turn = _as_call(turn)
        row_notes.update(["turns function_call were read as tool calls"] * ("tool_calls" in turn))
    role, content = turn["role"], turn["content"]
    ours = _ROLES.get(role.casefold(), role) if isinstance(role, str) else role
    if ours != role:
        row_notes.add(f"the role {excerpt(role)} was read as {ours}")
    if isinstance(content, list) and content:
        parts = [part for part in content if isinstance(part, dict)]
        texts = [part.get("text") for part in parts if part.get("type", "text") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            row_notes.add("turns whose content is a list of texts were joined")
            content = "".join(map(str, texts))
    return {**turn, "role": ours, "content": content}


def _ultrafeedback(row: dict[str, Any], notes: Counter[str]) -> dict[str, Any]:
    """Read UltraFeedback's own columns, those of Argilla's first pairs of it, and OpenAI's pairs.

    A completion scores the mean of its ratings (1 to 5) of four aspects; its `overall_score` is not
    read, since some of them were stored wrongly.
    """
    if row.keys() >= {"instruction", "chosen_response", "rejected_response"}:
        names = {"instruction": "prompt", "chosen_response": "chosen"}
        names["rejected_response"] = "rejected"
        notes["UltraFeedback's columns were read"] += 1
        return {names.get(key, key): value for key, value in row.items()}
    answers, given = row.get("completions"), row.get("input")
    if row.keys() >= {"preferred_output", "non_preferred_output"} and isinstance(given, dict):
        notes["OpenAI's columns of preferences were read"] += 1
        names = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
        own = {names.get(key, key): value for key, value in row.items() if key != "input"}
        return {"prompt": given.get("messages"), "tools": given.get("tools"), **own}
    if "instruction" not in row or not isinstance(answers, list):
        return row
    if not all(isinstance(a, dict) and {"response", "annotations"} <= a.keys() for a in answers):
        return row
    rated = [(answer["response"], _mean_rating(answer["annotations"])) for answer in answers]
    kept = [(text, score) for text, score in rated if score is not None]
    if len(kept) < len(rated):
        notes["answers of UltraFeedback without a rating were left out"] += len(rated) - len(kept)
    notes["UltraFeedback's columns were read"] += 1
    left_out = ("instruction", "correct_answers", "incorrect_answers", "models")
    return {
        **{key: value for key, value in row.items() if key not in left_out},
        "prompt": row["instruction"],
        "completions": [text for text, _ in kept],
        "scores": [score for _, score in kept],
    }


def _mean_rating(annotations: Any) -> float | None:
    """Return the mean of the ratings of one answer; None if there are none."""
    ratings = []
    for aspect in annotations.values() if isinstance(annotations, dict) else ():
        given = str(aspect.get("Rating") if isinstance(aspect, dict) else None).strip()
        if given.isdigit():
            ratings.append(int(given))
    return sum(ratings) / len(ratings) if ratings else None


def _deserialised(text: str, column: str) -> Any:
    """Read a list, or turns, from JSON or from Python's notation; other text stays as it is.

    A turn of the user as an answer is text, and so are objects that are no turns: the answer, or
    the prompt, is JSON.
    """
    value = _literal(text)
    if isinstance(value, str) and value != text:
        value = _literal(value)  # written as text twice
    if isinstance(value, dict) and {*value} & {"messages", "conversations", "conversation"}:
        value = next(iter(value.values())) if len(value) == 1 else text
    if isinstance(value, list):
        answer = column in ("completion", "chosen", "rejected")
        if column not in _MESSAGES or (_SERIALISED.match(text) and not answer):
            return value
        roles = [*map(_role, value)]
        ended = not answer or roles[-1:] == ["assistant"] or _SERIALISED.match(text)
        return value if all(roles) and ended else text
    keys = {*value} if isinstance(value, dict) else set()
    role = _role(value) if keys in ({"role", "content"}, {"from", "value"}) else ""
    turn = role == "assistant" if column in ("completion", "chosen", "rejected") else bool(role)
    return value if turn else text


def _literal(text: str) -> Any:
    """Return the value that a text is in JSON or in Python's notation; the text if it is none."""
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return parse(text)
    return text


def _role(turn: Any) -> str:
    """Return the role of a turn, as we call it; empty for anything else."""
    if not isinstance(turn, dict) or not ("content" in turn or "value" in turn):
        return ""
    return _ROLES.get(str(turn.get("role", turn.get("from"))).casefold(), "")


def _accepted(name: str) -> str:
    layouts = ", or ".join(" + ".join(layout) for layout in LAYOUTS[name])
    kinds = "" if name == "text" else " (text or messages; chosen may include the prompt)"
    return f"for {name}, the columns {layouts}{kinds}"


def _shown(rows: list[tuple[str, str]]) -> str:
    return "".join(f"\n  {where.rpartition(os.sep)[2]}: {text}" for where, text in rows[:5])


def _no_layout(rows: list[Row], name: str) -> DataError:
    """Create the error for a source that fits no layout, and suggest a mapping of columns."""
    columns = [key for key in rows[0][1] if isinstance(key, str)]
    remedy = "write the rows with these columns; `columns:` cannot make them"
    first = rows[0][1]
    usable = [key for key in columns if isinstance(first[key], str | list)]
    if len(usable) >= min(map(len, LAYOUTS[name])):
        remedy = "map the columns in the recipe with `columns: {our name: the file's name}`"
    remedy = _written_otherwise(first, name) or remedy
    for layout in LAYOUTS[name]:
        guess = mapping(columns, layout, rows)
        if guess is not None and not any(_is_texts(first[guess[c]]) for c in _ONE & guess.keys()):
            remedy = f"try `columns: {{{', '.join(f'{a}: {b}' for a, b in guess.items())}}}`"
            break
    return DataError(
        f"no usable columns for {name}; found: {', '.join(columns)}"
        + _shown([(where, excerpt(row)) for where, row in rows[:5]]),
        where=rows[0][0],
        expected=_accepted(name),
        remedy=remedy,
    )


_ONE = {"prompt", "completion", "chosen", "rejected"}
"""Columns of one text or one conversation."""


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(x, str) for x in value)


def _written_otherwise(first: dict[str, Any], name: str) -> str:
    """Say how rows of a known form that no mapping can read are written; empty for other rows."""
    better = "`chosen` and the other one as `rejected`" if name == "comparisons" else "`completion`"
    stems: dict[str, list[str]] = {}
    for key, value in first.items():
        of_two = re.fullmatch(r"(.+?)[_ -]?[abAB012]", key) if isinstance(key, str) else None
        if of_two and isinstance(value, str | list):
            stems.setdefault(of_two[1], []).append(key)
    for two in stems.values():
        if len(two) == 2 and name in ("demonstrations", "comparisons"):
            return (
                f"write rows of `prompt` and, of {two[0]!r} and {two[1]!r}, the better one as "
                f"{better}; `columns:` cannot choose between them"
            )
    bad = next((key for key in first if "reject" in str(key)), "")
    if bad and "messages" in first and name == "comparisons":
        return (
            f"write the turns of 'messages' before the last as `prompt`, the last as `chosen`, and "
            f"{bad!r} as `rejected`"
        )
    for key, value in first.items():
        if _is_texts(value):
            return (
                f"{key!r} is a list of texts: write the better one of two as {better}, or all as "
                "`completions` with their `ranks` or `scores`; turns of a talk as `messages`"
            )
    if [*first] == ["text"] and name != "text":
        remedy = "split each text into `prompt` and the answer; plain text itself serves as "
        return f"{remedy}data.text, beside other data"
    return ""


def mapping(columns: list[str], layout: tuple[str, ...], rows: list[Row]) -> dict[str, str] | None:
    """Return `columns:` for a layout, by the usual names of columns; None if one is missing.

    The prompt beside a pair, `input` and `system` are found too.
    """
    plain = {"_".join(re.findall(r"[^\W_]+", name.casefold())): name for name in reversed(columns)}
    guess = {
        ours: next((plain[n] for n in (ours, *_KNOWN_NAMES.get(ours, ())) if n in plain), "")
        for ours in layout + (("prompt",) if "chosen" in layout else ())
    }
    guess |= {ours: ours for ours in guess if ours in columns}
    if not all(guess[ours] for ours in layout):
        return None
    more = {} if layout == ("messages",) else _parts(columns, guess, rows)
    return {a: b for a, b in guess.items() if b not in ("", a)} | more


def _parts(columns: list[str], guess: dict[str, str], rows: list[Row]) -> dict[str, str]:
    """Find the columns that would be read beside those of a mapping: `input` and `system`."""
    filled = {
        key for _, row in rows for key, value in row.items() if value and isinstance(value, str)
    }
    left = [key for key in columns if key not in guess.values() and key in filled]
    names = {
        ours: next((name for name in unread_columns.PARTS[ours] if name in left), "")
        for ours in ("input", "system")
    }
    return {ours: name for ours, name in names.items() if name}


def _parse(
    row: dict[str, Any], layout: tuple[str, ...], chat: bool, notes: Counter[str]
) -> Example:
    if layout == ("prompt",):
        example = Example(_question(row))
    elif layout == ("text",):
        example = Example(_text(row, "text"))
    elif layout == ("messages",):
        messages = _turns(row, "messages")
        if isinstance(messages, str):
            raise _Unfit(f"column 'messages' must be messages, not text: {excerpt(messages)}")
        cut = len(messages) - (messages[-1]["role"] == "assistant")
        example = Example(messages[:cut], [messages[cut:]] if messages[cut:] else [])
    elif layout[:2] == ("prompt", "completion"):
        example = Example(_question(row), [_turns(row, "completion")])
    elif layout == ("chosen", "rejected"):
        margin = _margin(row)
        example = _pair(row, chat, notes)
        example.ranks, example.margin = [1, 2], margin
    else:
        example = _ranking(row, layout[-1])
    item = row.get("item")
    example.item = item if isinstance(item, str) else ""
    example.user = _user(row)
    if layout != ("text",) and row.get("system") not in (None, ""):
        example.system = _text(row, "system")
        first = example.prompt[0] if isinstance(example.prompt, list) and example.prompt else {}
        if first.get("role") == "system" and first["content"] != example.system:
            raise _Unfit("column 'system' differs from the system message of the conversation")
    return example


def _add_columns(example: Example, row: dict[str, Any], layout: tuple[str, ...], name: str) -> None:
    """Keep the row's list of tools on the first turn of the prompt, and its other columns."""
    example.columns = {k: v for k, v in row.items() if k not in (*layout, *_RESERVED)}
    turns = [
        t for each in (example.prompt, *example.answers) if isinstance(each, list) for t in each
    ]
    if name != "demonstrations":
        if any("tool_calls" in turn for turn in turns):
            raise _Unfit(
                "a turn has 'tool_calls', which only demonstrations may hold: write what it means "
                "into the content, as the chat template does"
            )
        return
    try:
        tools = tool_calls.list_of_tools(row.get("tools"))
    except ValueError as error:
        raise _Unfit(f"column 'tools': {error}: {excerpt(row['tools'])}") from None
    if tools and example.prompt:
        text, turns = example.prompt, [{"role": "user", "content": str(example.prompt)}]
        first, *rest = turns if isinstance(text, str) else text
        example.prompt = [{**first, "tools": tools}, *rest]


def _question(row: dict[str, Any]) -> Turns:
    """Return the prompt, with the column `input` below it, as Alpaca's rows have it."""
    prompt = _turns(row, "prompt")
    if row.get("input") in (None, ""):
        return prompt
    given = _text(row, "input")
    if not given.strip() or given.strip() in text_of(prompt):
        return prompt
    if not isinstance(prompt, str):
        raise _Unfit("column 'input' needs a prompt of text, not of messages: write it into one")
    return f"{prompt}\n\n{given}"


def _text(row: dict[str, Any], column: str) -> str:
    if not isinstance(row.get(column), str):
        raise _Unfit(f"column {column!r} must be text: {excerpt(row.get(column))}")
    return _valid(row[column], column)


def _user(row: dict[str, Any]) -> str:
    """Return who wrote the prompt; "" where the row does not say."""
    user = row.get("user")
    if user is not None and (isinstance(user, bool) or not isinstance(user, str | int)):
        raise _Unfit(f"column 'user' must be a name or a number: {excerpt(user)}")
    return str(user if user is not None else "").strip()


def _label(row: dict[str, Any]) -> bool:
    judged = unread_columns.label(row.get("label"))
    if judged is None:
        raise _Unfit(f"column 'label' must be true or false: {excerpt(row.get('label'))}")
    return judged


def _turns(row: dict[str, Any], column: str) -> Turns:
    """Return a checked text or list of messages: `role`, `content`, and what is about tools."""
    value = row.get(column)
    if isinstance(value, str):
        if _SERIALISED.match(value) and _literal(value) == value:
            raise _Unfit(f"column {column!r} holds messages as invalid JSON: {excerpt(value)}")
        return _valid(value, column)
    if value is None:
        raise _Unfit(f"column {column!r} is missing")
    if not isinstance(value, list) or not value:
        kind = type(value).__name__
        raise _Unfit(f"column {column!r} must be text or messages, not {kind}: {excerpt(value)}")
    turns = []
    for turn in value:
        left = [k for k in _NOT_TRAINED if isinstance(turn, dict) and turn.get(k)]
        if isinstance(turn, dict) and (turn is value[-1] or turn.get("tool_calls")):
            left += [k for k in _TRAINED if turn.get(k, 1) == 0]  # other turns are context
            left += [k for k in _MASKED if turn.get(k)]
        if left:
            raise _Unfit(
                f"column {column!r}: a turn has {left[0]!r}, which no stage reads: write what it "
                f"means into the content, as the chat template does: {excerpt(turn)}"
            )
        if isinstance(turn, str):
            several = "one text" if len(value) == 1 else "`completions` with `ranks` or `scores`"
            raise _Unfit(f"column {column!r} is a list of texts: write it as {several}")
        content = turn.get("content") if isinstance(turn, dict) else None
        try:
            about_tools = tool_calls.of_turn(turn) if isinstance(turn, dict) else {}
        except ValueError as error:
            raise _Unfit(f"column {column!r}: {error}: {excerpt(turn)}") from None
        content = "" if content is None and "tool_calls" in about_tools else content
        if not isinstance(content, str) or turn.get("role") not in ROLES:
            raise _Unfit(
                f"column {column!r}: {excerpt(turn)} is no message with text as content "
                f"and one of the roles {', '.join(ROLES)}"
            )
        kept = {"role": turn["role"], "content": content, **about_tools}
        turns.append({key: _valid(text, column) for key, text in kept.items()})
    return turns


def _valid(text: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise _Unfit(
            f"column {column!r} holds half of a character (a lone surrogate): {excerpt(around)}"
        ) from None
    return text


def _ranking(row: dict[str, Any], column: str) -> Example:
    """Parse answers with ranks (1 is the best) or scores (the highest is the best)."""
    answers, given = row.get("completions"), row.get(column)
    if not isinstance(answers, list) or len(answers) < 2:
        raise _Unfit(f"column 'completions' must be a list of two or more: {excerpt(answers)}")
    numbers = [unread_columns.number(rank) for rank in given] if isinstance(given, list) else []
    finite = [rank for rank in numbers if rank is not None]
    if not len(finite) == len(numbers) == len(answers):
        wanted = f"a list of {len(answers)} numbers"
        raise _Unfit(f"column {column!r} must be {wanted}: {excerpt(given)}")
    if column == "ranks":
        best = finite.count(min(finite))  # equal ranks count as the first, the mean or the last
        if min(finite) not in (1, (best + 1) / 2, best) or max(finite) > len(answers):
            raise _Unfit(
                f"column 'ranks': {excerpt(given)} are not ranks of {len(answers)} answers, from 1 "
                f"(the best) to {len(answers)}; if they are scores, of which the highest is the "
                "best, map them to `scores`"
            )
        scores = row.get("scores")
        scores = [unread_columns.number(x) for x in scores] if isinstance(scores, list) else []
        rated = [(r, x) for r, x in zip(finite, scores, strict=False) if x is not None]
        if any(r < s and x < y for r, x in rated for s, y in rated):
            raise _Unfit(
                f"columns 'ranks' (1 is the best) and 'scores' (the highest is the best) "
                f"contradict each other: {excerpt(given)} and {excerpt(row['scores'])}"
            )
    turns = [_turns({"completions": answer}, "completions") for answer in answers]
    return Example(_question(row), turns, finite if column == "ranks" else [-x for x in finite])


def _margin(row: dict[str, Any]) -> float | None:
    """Return the column `margin`, which is text in a CSV; None for an empty cell."""
    value = row.get("margin")
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    margin = unread_columns.number(value)
    if margin is None:
        raise _Unfit(f"column 'margin' must be a finite number: {excerpt(value)}")
    if margin < 0:
        raise _Unfit(f"column 'margin' is {margin:g}, so the rejected answer would be better")
    return margin


def _pair(row: dict[str, Any], chat: bool, notes: Counter[str]) -> Example:
    """Parse a chosen and a rejected answer, with a prompt column or a common beginning."""
    for column in ("chosen", "rejected"):
        named = row.get(column)
        if isinstance(named, str) and isinstance(row.get(named), str):
            raise _Unfit(f"column {column!r} names an answer ({named}): write the answer itself")
    chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        both = transcript(chosen), transcript(rejected)
        if both[0] and both[1]:
            prompt, answers = _shared(both[0], both[1])
            if chat:
                notes[_TRANSCRIPTS_READ] += 1
                return _of_conversation(row, prompt, answers, notes)
            question = _as_transcript(prompt) + "\n\nAssistant:" if prompt else ""
            texts = [_as_transcript(answer).removeprefix("\n\nAssistant:") for answer in answers]
            return Example(question, list(texts))
        if row.get("prompt") is None:
            cut = _shared_text(chosen, rejected)
            return Example(chosen[:cut], [chosen[cut:], rejected[cut:]])
    elif isinstance(chosen, str) or isinstance(rejected, str):
        raise _Unfit("columns 'chosen' and 'rejected': one is text, the other messages")
    elif row.get("prompt") is None or chosen[0]["role"] != "assistant":
        # UltraFeedback and others have a prompt column and repeat the prompt in chosen.
        prompt, answers = _shared(chosen, rejected)
        return _of_conversation(row, prompt, answers, notes)
    return Example(_question(row), [chosen, rejected])


def _of_conversation(
    row: dict[str, Any], shared: list[Message], answers: list[list[Message]], notes: Counter[str]
) -> Example:
    """Return a pair whose answers hold their prompt; a column prompt may hold turns before it."""
    value = row.get("prompt")  # a number, such as an id, or an empty list holds no turns
    given = _question(row) if value and isinstance(value, str | list) else ""
    if shared and isinstance(given, list) and given[-len(shared) :] == shared:
        shared = given
    turns = transcript(given) or given if isinstance(given, str) else given
    text, whole = (" ".join(text_of(one).split()) for one in (turns, shared))
    if text not in whole:
        notes["the column prompt differs from the turns before the answers, which are read"] += 1
    return Example(shared, list(answers))


def _as_transcript(messages: list[Message]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in messages)


def _shared(a: list[Message], b: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Split off the common first turns, up to a question; neither rest is empty."""
    cut = 0
    while cut < min(len(a), len(b)) - 1 and a[cut] == b[cut]:
        cut += 1
    while cut and a[cut - 1]["role"] == "assistant":
        cut -= 1
    return a[:cut], [a[cut:], b[cut:]]


def _shared_text(a: str, b: str) -> int:
    """Return the length of the common beginning, cut at the end of a word."""
    cut = min(len(os.path.commonprefix([a, b])), len(a) - 1, len(b) - 1)
    while cut > 0 and not a[cut - 1].isspace() and not (a[cut] + b[cut]).isspace():
        cut -= 1
    return len(a[: max(0, cut)].rstrip())


def _as_chat(example: Example, notes: Counter[str], dialogue: bool) -> None:
    """Wrap text into messages: one user turn, one assistant turn, or the turns of a transcript.

    Args:
        dialogue: A conversation in the prompt is a task's material, and stays one turn.
    """
    turns = transcript(example.prompt) if isinstance(example.prompt, str) else None
    turns = None if dialogue else turns
    texts = [text for text in (example.prompt, *example.answers) if isinstance(text, str)]
    stripped = not turns and any(text != text.strip() for text in texts)
    if isinstance(example.prompt, str):
        if turns:
            if turns[-1] == {"role": "assistant", "content": ""}:
                turns = turns[:-1]
            notes[_TRANSCRIPTS_READ] += 1
        elif not example.item:
            notes["plain text was wrapped into one user and one assistant message"] += 1
        example.prompt = turns or [{"role": "user", "content": example.prompt.strip()}]
    example.answers = [
        [{"role": "assistant", "content": answer.strip()}] if isinstance(answer, str) else answer
        for answer in example.answers
    ]
    if stripped and not example.item:
        notes["white space around prompts or answers was removed"] += 1
    if example.system and example.prompt and example.prompt[0]["role"] != "system":
        example.prompt = [{"role": "system", "content": example.system}, *example.prompt]


def _as_text(example: Example, where: str) -> None:
    if not all(isinstance(turns, str) for turns in (example.prompt, *example.answers)):
        tools = any("tools" in turn for turn in example.prompt)
        raise TokenizerError(
            f"the data holds {'tools' if tools else 'messages'}, but the tokenizer has no chat "
            "template",
            where=where,
            expected="a tokenizer with a chat template, or columns of plain text",
            remedy="choose an instruct model, or turn the messages into text yourself"
            + "; `ignore: [tools]` leaves them out" * tools,
        )
    if example.system:
        example.prompt = f"{example.system}\n\n{example.prompt}"
