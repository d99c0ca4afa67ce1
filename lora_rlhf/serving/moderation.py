# SPDX-License-Identifier: Apache-2.0
"""Moderation of prompts, earlier turns and answers; a text that cannot be checked is blocked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import regex  # type: ignore[import-untyped]  # unlike `re`, it can stop after a time

from lora_rlhf.data import harm, refusal
from lora_rlhf.errors import LoraRlhfError, UsageError, first_line
from lora_rlhf.recipe.loader import load_section
from lora_rlhf.recipe.schema import Rules, Section
from lora_rlhf.runs.disk import make_place

from . import output_checks
from .sentence_gate import SentenceGate

POLICY = Path(__file__).with_name("moderation.yaml")

Action = Literal["allow", "log", "warn", "block"]
Where = Literal["prompt", "history", "answer"]
_MEASURED = (
    "With 95 % intervals, on XSTest's 450 prompts (request) and on people's labels of 450 answers "
    "to them (text, compliance), left out of training in ten folds, at the nearest measured "
    "threshold below. The other detectors are not measured."
)
_ORDER = {action: n for n, action in enumerate(("allow", "log", "warn", "block"))}


class Category(Section):
    """One category of a policy: a detector, its threshold, and the action at each place."""

    detector: Literal["request", "text", "compliance", "foreign", "words", "regex", "personal"]
    threshold: float = 0.5
    """Score from which the category applies, 0 to 1."""
    prompt: Action = "allow"
    history: Action = "allow"
    answer: Action = "allow"
    words: list[str] = []
    """Words and phrases, found in any spelling that `data.harm.plain` undoes."""
    patterns: list[str] = []
    """Regular expressions, searched in the text as it is."""
    kinds: list[str] = []
    """Kinds of personal data, as `data.personal_data.KINDS` names them; none: all."""

    def rules(self) -> Rules:
        """Check that each detector has the list that it needs."""
        if not 0 < self.threshold <= 1:
            yield f"the threshold is {self.threshold:g}, not above 0 and at most 1", "threshold"
        for key, detector in (("words", "words"), ("patterns", "regex")):
            if bool(getattr(self, key)) != (self.detector == detector):
                yield f"{key}: belong to the detector {detector}, which needs them", key
        if not all(harm.plain(word).strip() for word in self.words):
            yield "a word is empty", "words"
        if self.kinds and self.detector != "personal":
            yield "kinds: belong to the detector personal", "kinds"
        if self.detector == "compliance" and {self.prompt, self.history} != {"allow"}:
            yield "the detector compliance reads answers only", "prompt"
        for pattern in self.patterns:
            try:
                regex.compile(pattern)
            except regex.error as error:
                yield f"{pattern!r:.100} is no regular expression: {error}", "patterns"


class Policy(Section):
    """A moderation policy."""

    log_text: bool = False
    """Whether the log has the texts as well."""
    seconds: float = 5.0
    """Time for the check of one text; a longer check blocks."""
    max_characters: int = 200_000
    """A longer text blocks."""
    categories: dict[str, Category]

    def rules(self) -> Rules:
        """Check that the limits are above zero."""
        if self.seconds <= 0 or self.max_characters <= 0:
            yield "limits must be above 0", "seconds", "max_characters"


@dataclass(frozen=True)
class Decision:
    """Action on a text: the strictest one of all categories that apply.

    `category` is the one that decided; of an allowed text, the one that came closest ("": none).
    """

    action: Action
    category: str = ""
    score: float = 0.0
    threshold: float = 0.0
    detector: str = ""
    problem: str = ""

    @property
    def reason(self) -> str:
        """One line for people."""
        if self.problem:
            return f"not checked, and blocked for that: {self.problem}"
        return (
            f"{self.category}: {self.score:.2f}, {self.action} from {self.threshold:g} "
            f"(detector {self.detector})"
        )


class Blocked(LoraRlhfError):
    """A text that moderation blocked; `decision` says why."""

    def __init__(self, decision: Decision) -> None:
        super().__init__(decision.reason)
        self.decision = decision


class Moderation:
    """A policy with its detectors; safe to use from several threads.

    Args:
        log: Gets one dict for each decision: a JSON Lines file, or a function.
    """

    def __init__(
        self, policy: Policy, log: Path | Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.policy = policy
        self._log, self._lock = log, threading.Lock()
        self._searched = {
            name: [*map(regex.compile, category.patterns), *map(_spelled, category.words)]
            for name, category in policy.categories.items()
        }
        for name in ("personal", "foreign"):  # a missing package is an error now, not at each check
            if any(one.detector == name for one in policy.categories.values()):
                _finder() if name == "personal" else _foreign("a", "")

    @classmethod
    def load(
        cls, path: Path | None = None, log: Path | Callable[[dict[str, Any]], None] | None = None
    ) -> Moderation:
        """Load a policy file; None: the packaged one.

        Raises:
            UsageError: It cannot be read, or a key or value is wrong.
            SetupError: A category needs a package that is not installed.
        """
        remedy = f"correct the policy; {POLICY.name} of the package is an example (docs/use.md)"
        loaded = load_section(Policy, Path(path or POLICY), remedy)
        if isinstance(log, Path):  # else every text would be blocked: it cannot be logged
            make_place(log)
        return cls(loaded, log)

    @classmethod
    def opened(
        cls, policy: str | Path | None, log: Path | Callable[[dict[str, Any]], None] | None = None
    ) -> Moderation | None:
        """Load a policy file, or the packaged one for `default`; None for `off`."""
        if policy in (None, "off"):
            return None
        return cls.load(None if policy == "default" else Path(str(policy)), log)

    def check(self, text: str, where: Where, prompt: str = "") -> Decision:
        """Decide on a text, and log the decision; whatever goes wrong blocks.

        Args:
            where: `history` is the earlier turns of a conversation.
            prompt: The question, for an answer.
        """
        decision = self._decide(text, where, prompt)
        try:
            self._write(decision, text, where)
        except Exception as error:
            problem = f"the decision cannot be logged: {first_line(error)}"
            return Decision("block", "failed", problem=problem)
        return decision

    def gate(self, prompt: str = "") -> SentenceGate:
        """A gate for a streamed answer, which raises `Blocked`."""

        def check(text: str) -> None:
            if (decision := self.check(text, "answer", prompt)).action == "block":
                raise Blocked(decision)

        return SentenceGate(check)

    def page(self) -> list[str]:
        """Lines of Markdown: each category with its actions and its measured errors."""
        lines = [
            "| category | detector | from | prompt | history | answer | precision | recall "
            "| specificity |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        validation = harm.parameters()["validation"]
        for name, one in self.policy.categories.items():
            measured = validation.get(one.detector, {}).get("thresholds", {})
            lower = [t for t in measured if float(t) <= one.threshold]
            rates = measured[max(lower, key=float)] if lower else {}
            cells = [name, one.detector, f"{one.threshold:g}", one.prompt, one.history, one.answer]
            cells += [_rate(rates.get(k)) for k in ("precision", "recall", "specificity")]
            lines.append(f"| {' | '.join(cells)} |")
        return [*lines, "", _MEASURED]

    def _decide(self, text: str, where: Where, prompt: str) -> Decision:
        if len(text) > self.policy.max_characters:
            problem = f"{len(text)} characters, at most {self.policy.max_characters} are read"
            return Decision("block", "failed", problem=problem)
        decisions: list[Decision] = []

        def work() -> None:
            try:
                decisions.append(self._strictest(text, where, prompt))
            except TimeoutError:
                pass
            except Exception as error:
                problem = f"a detector failed: {type(error).__name__}: {first_line(error)}"
                decisions.append(Decision("block", "failed", problem=problem))

        # A detector that hangs keeps this thread, which does not keep the program.
        thread = threading.Thread(target=work, daemon=True, name="moderation")
        thread.start()
        thread.join(self.policy.seconds)
        if decisions:
            return decisions[0]
        problem = f"the check took over {self.policy.seconds:g} s"
        return Decision("block", "failed", problem=problem)

    def _strictest(self, text: str, where: Where, prompt: str) -> Decision:
        best = Decision("allow")
        end = time.monotonic() + self.policy.seconds
        scores: dict[str, float] = {}  # of detectors without a list of their own
        for name, category in self.policy.categories.items():
            action: Action = getattr(category, where)
            if action == "allow":
                continue
            kind = category.detector
            if kind in ("words", "regex"):
                score = self._search(name, kind, text, end)
            elif kind == "personal":
                score = _personal(text, category.kinds)
            else:
                scores[kind] = score = scores.get(kind, -1.0)
                if score < 0:
                    scores[kind] = score = _SCORES[kind](text, prompt)
            if not 0 <= score <= 1:
                raise ValueError(f"{kind} gave the score {score}")
            if score < category.threshold:
                action = "allow"
            made = Decision(action, name, round(score, 4), category.threshold, kind)
            best = max(best, made, key=_rank)
        return best

    def _search(self, name: str, kind: str, text: str, end: float) -> float:
        text = harm.plain(text) if kind == "words" else text
        for pattern in self._searched[name]:
            if pattern.search(text, timeout=max(0.001, end - time.monotonic())):
                return 1.0
        return 0.0

    def _write(self, decision: Decision, text: str, where: Where) -> None:
        if self._log is None:
            return
        entry = {"time": round(time.time(), 3), "where": where, **asdict(decision)}
        entry["characters"] = len(text)
        if self.policy.log_text:
            entry["text"] = text
        if callable(self._log):
            self._log(entry)
            return
        line = json.dumps(entry, ensure_ascii=False)
        with self._lock, self._log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")


def _spelled(word: str) -> Any:
    """The expression for a word or phrase in plain text, its letters perhaps apart."""
    letters = r"[\s._*-]{0,2}".join(map(regex.escape, "".join(harm.plain(word).split())))
    return regex.compile(rf"(?<![^\W_]){letters}(?![^\W_])")


def _rate(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "-"
    return "{value:.2f} [{low:.2f}, {high:.2f}]".format(**measured)


def _rank(decision: Decision) -> tuple[int, float]:
    return _ORDER[decision.action], decision.score / (decision.threshold or 1)


def _compliance(answer: str, prompt: str) -> float:
    """Harm of the prompt, unless the answer refuses; an answer that cannot be read does not."""
    harm_asked = harm.probability(prompt, "request")
    refused = refusal.probability(prompt, answer, harm_asked)
    return harm_asked * (1 - (refused or 0.0))


def _foreign(text: str, _: str) -> float:
    """The probability that a text is not in English, which the other detectors cannot read."""
    if not any(map(str.isalpha, text)):
        return 0.0
    code, sure = output_checks.most_likely_language(text)
    return max(float(refusal.foreign(text)), 0.0 if code == "en" else sure)


_SCORES: dict[str, Callable[[str, str], float]] = {
    "request": lambda text, _: harm.probability(text, "request"),
    "text": lambda text, _: harm.probability(text, "text"),
    "compliance": _compliance,
    "foreign": _foreign,
}


def _finder() -> Any:
    from lora_rlhf.data import personal_data  # its packages are optional

    return personal_data.loaded()


def _personal(text: str, kinds: Iterable[str]) -> float:
    return float(any(not kinds or span.kind in kinds for span in _finder().spans(text)))


def moderate(
    texts: Iterable[str],
    policy: str | Path | None = None,
    *,
    where: Where = "prompt",
    prompt: str = "",
) -> list[Decision]:
    """Decisions of a moderation policy (default: the packaged one) on texts.

    Args:
        where: prompt, history or answer.
        prompt: The question, for answers.

    Raises:
        UsageError: The policy is wrong, or `where`.
    """
    if where not in get_args(Where):
        raise UsageError(f"where is {where!r}", expected=", ".join(get_args(Where)))
    guard = Moderation.load(Path(policy) if policy else None)
    return [guard.check(text, where, prompt) for text in texts]
