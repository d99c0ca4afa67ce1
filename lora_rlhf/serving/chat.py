# SPDX-License-Identifier: Apache-2.0
"""A conversation with the models of a run: answers as they come, comparisons, judgements."""

from __future__ import annotations

import html
import importlib
import inspect
import json
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_rlhf.data import answer_format
from lora_rlhf.errors import UsageError, counted
from lora_rlhf.recipe import suggestions
from lora_rlhf.recipe.schema import SEEDS

from . import instructions, usage_store
from .inference import BEST_OF_N, Completion, InferenceEngine, Request
from .moderation import Blocked, Moderation
from .structured import Constraint

if TYPE_CHECKING:
    from .moderation import Where

KL_LEVELS = (0.1, 0.5, 1.0, 2.0)
"""Nats of a token from which its colour is the next stronger one."""

_REDS = ("", "#fff0f0", "#ffd6d6", "#ffadad", "#ff7a7a")


class Grounding(Protocol):
    """Sources for answers: passages go into the prompt, citations into the answer."""

    def knows(self, question: str) -> bool:
        """Tell if any passage may answer the question; else no model is asked."""

    def prompt(self, question: str) -> str:
        """Return the question with the passages that may answer it."""

    def finish(self, question: str, answer: str) -> str:
        """Return the answer with citations, and without what the policy forbids."""


@dataclass
class Answer:
    """One model's answer.

    Attributes:
        mark: Why the answer is not whole: stopped, cut off, or blocked; empty if it is.
        problem: How it breaks the JSON schema that was asked for, or the moderation's warning.
        kl: Its tokens, each with the KL to SFT in nats; empty if not measured.
        dropped_turns: Turns at the start of the history that did not fit the context.
    """

    text: str
    model: str
    seed: int
    id: str = ""
    tokens: int = 0
    seconds: float = 0.0
    reward: float | None = None
    mark: str = ""
    problem: str = ""
    kl: list[tuple[str, float]] = field(default_factory=list)
    dropped_turns: int = 0
    shown: bool = False

    def __str__(self) -> str:
        return self.text

    @property
    def facts(self) -> str:
        """Model, tokens, seconds, reward and KL on one line."""
        parts = [
            self.model,
            counted(self.tokens, "token"),
            f"{self.seconds:.1f} s",
            f"seed {self.seed}",
        ]
        if self.reward is not None:
            parts.append(f"reward {self.reward:.2f}")
        if self.kl:
            parts.append(f"KL {sum(value for _, value in self.kl) / len(self.kl):.3f} a token")
        return " · ".join([*parts, *filter(None, (self.mark, self.problem))])

    def _repr_html_(self) -> str:
        """Show the answer in a notebook; its facts alone if it was streamed into the cell."""
        body, self.shown = "" if self.shown else self.html(), False
        return f"{body}<small>{html.escape(self.facts)}</small>"

    def html(self) -> str:
        """Return the text as HTML, tokens coloured by their KL if it was measured."""
        spans = (
            f'<span style="background:{_REDS[level(value)]}" title="KL {value:.2f}">'
            f"{html.escape(token)}</span>"
            for token, value in self.kl
        )
        body = "".join(spans) if self.kl else html.escape(self.text)
        return f'<div style="white-space:pre-wrap">{body}</div>'


def level(kl: float) -> int:
    """Return the strength of a token's colour, 0 to 4."""
    return sum(kl >= bound for bound in KL_LEVELS)


class Comparison(list[Answer]):
    """Answers of several models to one question."""

    def _repr_html_(self) -> str:
        rows = (
            f"<td style='text-align:left;vertical-align:top'>{a._repr_html_()}</td>" for a in self
        )
        return f"<table><tr>{''.join(rows)}</tr></table>"


class Chat:
    """A conversation that goes on from call to call.

    Attributes:
        engine: The loaded models.
        model: Name of the one that answers; `models` lists them.
        exchanges: Questions with their answers.
        seed: Of the next answer; it grows by one with each.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        *,
        model: str = "",
        system: str = "",
        temperature: float = 1.0,
        seed: int = 0,
        max_tokens: int | None = None,
        schema: Any = None,
        usage: usage_store.UsageStore | None = None,
        moderation: Moderation | None = None,
        grounding: Grounding | None = None,
    ) -> None:
        self.engine, self.usage = engine, usage
        self.moderation, self.grounding = moderation, grounding
        self.exchanges: list[tuple[str, Answer]] = []
        self.system, self.last_question = system, ""
        self.use_model(model or engine.default)
        self.set_schema(schema)
        self.set_temperature(temperature)
        self.set_seed(seed)
        self.set_tokens(max_tokens)

    # --- settings --------------------------------------------------------------------------------

    @property
    def models(self) -> list[str]:
        """Names of the models that can answer."""
        return list(self.engine.models)

    def use_model(self, name: str) -> None:
        """Let another model answer from now on."""
        if name not in self.engine.models:
            near = suggestions.nearest(name, self.models)
            raise UsageError(f"there is no model {name!r}{near}", expected=", ".join(self.models))
        self.model = name

    def set_schema(self, schema: Any) -> None:
        """Ask for answers that are JSON of this schema; None: for text."""
        if schema is not None:
            try:
                answer_format.validate({"json_schema": schema})
            except ValueError as error:
                raise UsageError(f"the schema cannot be used: {error}") from None
        self.schema = schema

    def set_temperature(self, value: float) -> None:
        """Set the temperature; 0 is greedy decoding."""
        if not 0 <= value <= 10:
            raise UsageError(f"temperature {value:g}", expected="0 to 10")
        self.temperature = value

    def set_seed(self, value: int) -> None:
        """Set the seed of the next answer."""
        if not 0 <= value < SEEDS:
            raise UsageError(f"seed {value}", expected=f"0 to {SEEDS - 1}")
        self.seed = value

    def set_tokens(self, value: int | None) -> None:
        """Set the most tokens of an answer; None: the engine's."""
        if value is not None and not 1 <= value < self.engine.context:
            raise UsageError(
                f"tokens {value}", expected=f"1 to {self.engine.context - 1}, below the context"
            )
        self.max_tokens = value

    # --- conversation ----------------------------------------------------------------------------

    @property
    def history(self) -> list[dict[str, str]]:
        """The conversation so far, as messages."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in self.exchanges:
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": answer.text})
        return turns

    @property
    def last(self) -> Answer:
        """The last answer."""
        if not self.exchanges:
            raise UsageError("there is no answer yet", remedy="ask something first")
        return self.exchanges[-1][1]

    def ask(self, text: str) -> Answer:
        """Ask, and return the whole answer; a notebook's cell shows it as it comes."""
        cell = _Cell()
        for part in self.stream(text):
            cell.write(part)
        answer = self.last
        answer.shown = cell.live
        return answer

    def stream(self, text: str) -> Generator[str, None, None]:
        """Ask, and yield the answer as it comes; closing the generator stops the model.

        Raises:
            UsageError: The question is empty, too long, or blocked by the moderation.
        """
        if not text.strip():
            raise UsageError("the question is empty")
        self.last_question = text
        warning = self._moderate(text, recorded=True)
        if self.grounding and not self.grounding.knows(text):
            says = self.grounding.finish(text, "")
            answer = Answer(says, self.model, self.seed, usage_store.new_id(), problem=warning)
            self.exchanges.append((text, answer))
            yield answer.text
            return
        messages = [*self.history, {"role": "user", "content": self._asked(text)}]
        answer = Answer("", self.model, self.seed, usage_store.new_id(), mark="stopped")
        answer.problem = warning
        self.seed = (self.seed + 1) % SEEDS
        stream = self.engine.stream(self._request(messages, self.model, answer.seed))
        gate = self.moderation.gate(text) if self.moderation else None
        try:
            for delta in stream:
                part = gate.feed(delta.text) if gate else delta.text
                answer.text += part
                if part and not self.grounding:
                    yield part
            rest = gate.finish() if gate else ""
            answer.text, answer.mark = answer.text + rest, ""
            if self.grounding:
                answer.text = rest = self.grounding.finish(text, answer.text)
            if rest:
                yield rest
        except Blocked as error:
            answer.mark = f"blocked: {error.decision.category}"
        except Exception:  # nothing of it is kept
            answer.mark = "failed"
            raise
        finally:
            stream.close()
            if answer.mark != "failed":
                self._complete(answer, text, messages, stream.completion)

    def _complete(
        self,
        answer: Answer,
        question: str,
        messages: Sequence[dict[str, str]],
        completion: Completion,
    ) -> None:
        _measure(answer, completion)
        if not (answer.mark or self.moderation or self.grounding):
            answer.text = completion.choices[0].text  # a base may go on with turns of its own
        valid = None
        if self.schema is not None:
            problems = answer_format.problems(answer.text, {"json_schema": self.schema})
            answer.problem = "; ".join(filter(None, [answer.problem, *problems]))
            valid = not problems
        if answer.text or not answer.mark:
            self.exchanges.append((question, answer))
        self._record(
            messages,
            id=answer.id,
            model=answer.model,
            status=499 if answer.mark == "stopped" else 200,
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=answer.tokens,
            seconds=answer.seconds,
            queue_s=completion.queue_s,
            first_token_s=completion.first_token_s,
            blocked=answer.mark.startswith("blocked"),
            valid=valid,
        )

    def _record(self, messages: Sequence[dict[str, str]], *, model: str, **numbers: Any) -> None:
        if self.usage is not None:
            version = self.engine.models[model].adapter
            use = usage_store.Use(
                kind="chat", model=model, version=version, prompt=messages, **numbers
            )
            self.usage.record(use)

    def _asked(self, text: str) -> str:
        return self.grounding.prompt(text) if self.grounding else text

    def _moderate(self, text: str, recorded: bool = False) -> str:
        """Refuse a question that the moderation blocks; return its warning, if any.

        Args:
            recorded: A blocked question is a row of the usage store, as in `serve`.
        """
        if self.moderation is None:
            return ""
        warnings = []
        earlier = "\n".join(question for question, _ in self.exchanges)
        checks: tuple[tuple[Where, str], ...] = (("prompt", text), ("history", earlier))
        for where, what in checks:
            decision = self.moderation.check(what, where) if what else None
            if decision is not None and decision.action == "block":
                if recorded:
                    messages = [*self.history, {"role": "user", "content": text}]
                    self._record(messages, id=usage_store.new_id(), model=self.model, blocked=True)
                raise UsageError(
                    f"the {where} is blocked: {decision.reason}",
                    remedy="ask something else" if where == "prompt" else "/clear the history",
                )
            if decision is not None and decision.action == "warn":
                warnings.append(f"warning on the {where}: {decision.reason}")
        return "; ".join(warnings)

    def _request(self, messages: Sequence[dict[str, str]], model: str, seed: int) -> Request:
        shaped = Constraint("json_schema", self.schema) if self.schema is not None else None
        return Request(
            tuple(messages),
            model=model,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=seed,
            constraint=shaped,
            scored=self.engine.has_reward,
        )

    def retry(self) -> Generator[str, None, None]:
        """Ask the last question again with the next seed, in place of its answer."""
        return self.edit(self.last_question)

    def edit(self, text: str) -> Generator[str, None, None]:
        """Ask another question in place of the last one."""
        if not self.last_question:
            raise UsageError("there is no question yet", remedy="ask something first")
        kept = self.exchanges
        if kept and kept[-1][0] == self.last_question:
            self.exchanges = kept[:-1]
        count = len(self.exchanges)
        try:
            yield from self.stream(text)
        finally:
            if len(self.exchanges) == count:  # refused, or stopped before the first word
                self.exchanges = kept

    def clear(self) -> None:
        """Forget the conversation; the system message stays."""
        self.exchanges, self.last_question = [], ""
        self.engine.forget()

    # --- around the conversation -----------------------------------------------------------------

    def compare(self, text: str | None = None) -> Comparison:
        """Let every model answer the last question, or another; the conversation stays as it was.

        Each answer has its reward, if there is a reward model, and the KL of each token to SFT.
        """
        question = text or self.last_question
        if not question:
            raise UsageError("there is no question yet", remedy="/compare QUESTION")
        self._moderate(question)
        before = self.history
        if text is None and self.exchanges and self.exchanges[-1][0] == question:
            before = before[:-2]
        messages = [*before, {"role": "user", "content": self._asked(question)}]
        names = [
            name
            for name, model in self.engine.models.items()
            if self.temperature > 0 or model.kind != BEST_OF_N  # greedy samples are all the same
        ]
        requests = [self._request(messages, name, self.seed) for name in names]
        handles = [self.engine.submit(request) for request in requests]
        answers = Comparison()
        for name, handle in zip(names, handles, strict=True):
            answers.append(self._measured(name, question, messages, handle.result()))
        self.seed = (self.seed + 1) % SEEDS
        return answers

    def _measured(
        self, name: str, question: str, messages: list[dict[str, str]], completion: Completion
    ) -> Answer:
        choice = completion.choices[0]
        answer = Answer(choice.text, name, self.seed)
        _measure(answer, completion)
        run, mark, _ = name.rpartition(":")
        against = f"{run}{mark}sft"
        if against in self.models:
            kept = messages[:1] if messages[0]["role"] == "system" else []
            kept += messages[len(kept) + completion.dropped_turns :]
            values = self.engine.per_token_kl(kept, choice.ids, name, against=against)
            answer.kl = _pieces(self.engine, choice.ids, values)
        if self.moderation is not None:
            decision = self.moderation.check(answer.text, "answer", prompt=question)
            if decision.action == "block":
                answer.text, answer.kl, answer.mark = "", [], f"blocked: {decision.category}"
        return answer

    def good(self, comment: str = "") -> None:
        """Save a thumb up on the last answer in the usage store, with the conversation."""
        self._thumb(True, comment)

    def bad(self, comment: str = "") -> None:
        """Save a thumb down on the last answer; `feedback` makes a task for labelers of it."""
        self._thumb(False, comment)

    def _thumb(self, good: bool, comment: str) -> None:
        if self.usage is None:
            raise UsageError(
                "no usage store is open", remedy="start the chat with --usage FILE (Python: usage=)"
            )
        answer = self.last
        self.usage.thumb(
            answer.id,
            good,
            comment,
            self.history[:-1],
            answer.text,
            model=answer.model,
            version=self.engine.models[answer.model].adapter,
        )

    def save(self, path: str | Path) -> None:
        """Write the conversation: a row of messages for a recipe (.jsonl), or a page (.md).

        Raises:
            UsageError: The file exists, cannot be written, or has another ending.
        """
        path = Path(path)
        if path.suffix == ".jsonl":
            text = json.dumps({"messages": self.history}, ensure_ascii=False) + "\n"
        elif path.suffix == ".md":
            text = "".join(f"**{t['role']}**\n\n{t['content']}\n\n" for t in self.history)
        else:
            raise UsageError(f"{path} ends in {path.suffix!r}", expected=".jsonl or .md")
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise UsageError(f"{path} exists", remedy="choose another name") from None
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from None

    def template(self) -> str:
        """Return the text that the model sees for the last question, control tokens included."""
        turns = self.history
        if turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if not turns or turns[-1]["role"] != "user":
            turns = [*turns, {"role": "user", "content": "QUESTION"}]
        turns[-1]["content"] = self._asked(turns[-1]["content"])
        return self.engine.rendered(turns)

    def __repr__(self) -> str:
        return f"Chat({self.model}, {counted(len(self.exchanges), 'answer')})"

    def _repr_html_(self) -> str:
        return "".join(
            f"<p><b>{html.escape(question)}</b></p>{answer._repr_html_()}"
            for question, answer in self.exchanges
        )

    def close(self) -> None:
        """Free the models and close the usage store."""
        self.engine.close()
        if self.usage is not None:
            self.usage.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _measure(answer: Answer, completion: Completion) -> None:
    choice = completion.choices[0]
    answer.tokens = len(choice.ids)
    answer.seconds = completion.seconds - completion.queue_s
    answer.reward, answer.dropped_turns = choice.reward, completion.dropped_turns
    if not answer.mark and choice.finish_reason == "length":
        answer.mark = f"cut off at {counted(answer.tokens, 'token')}"


def _pieces(
    engine: InferenceEngine, ids: Sequence[int], values: Sequence[float]
) -> list[tuple[str, float]]:
    """Return the text of each token with its value; bytes of one character are one piece."""
    pieces: list[tuple[str, float]] = []
    before, most = "", 0.0
    for end, value in enumerate(values, 1):
        whole, most = engine.base.decode(ids[:end]), max(most, value)
        if len(whole) > len(before) and not whole.endswith("\ufffd"):
            pieces.append((whole[len(before) :], most))
            before, most = whole, 0.0
    return pieces


class _Cell:
    """The output of a notebook's cell, which grows as the answer comes; nothing elsewhere."""

    def __init__(self) -> None:
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        self.live, self.text, self._handle = hasattr(shell, "kernel"), "", None

    def write(self, part: str) -> None:
        """Show more text."""
        self.text += part
        if not self.live:
            return
        display = importlib.import_module("IPython.display")
        body = display.HTML(Answer(self.text, "", 0).html())
        if self._handle is None:
            self._handle = display.display(body, display_id=True)
        else:
            self._handle.update(body)


def chat(
    *targets: str | Path,
    model: str = "",
    usage: str | Path | None = None,
    base: str | None = None,
    load_in_4bit: bool = False,
    moderation: str | Path | None = "off",
    **settings: Any,
) -> Chat:
    """Load runs, adapters or models on one backbone, and return a conversation with them.

    `talk = lora_rlhf.chat("runs/mine"); talk.ask("What is in the box?"); talk.compare()`

    Args:
        targets: Runs, `RUN:model`, adapter folders and models, all of one base.
        model: The one that answers first; default: the last one trained.
        usage: File of the usage store; None: nothing is recorded, and there are no thumbs.
        moderation: `off`, `default`, or the file of a policy.
        settings: system, temperature, seed, max_tokens, schema and grounding, as of `Chat`.
    """
    if not targets:
        raise UsageError("no run, adapter or model is named")
    known = inspect.signature(Chat).parameters.keys() - {"engine"}
    suggestions.check_names(settings, known, "chat")
    places, named = list(targets), ""
    if len(places) == 1:  # all models of the run, of which this one answers first
        places[0], named = instructions.split_target(places[0])
    gate = Moderation.opened(moderation)
    engine = InferenceEngine.load(places, base=base, load_in_4bit=load_in_4bit, sharing=False)
    try:
        store = None if usage is None else usage_store.opened(Path(usage))
        return Chat(engine, model=model or named, usage=store, moderation=gate, **settings)
    except BaseException:
        engine.close()
        raise
