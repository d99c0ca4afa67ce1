# SPDX-License-Identifier: Apache-2.0
"""Labels by one person in a terminal, for machines without a browser."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from lora_rlhf.data import answer_format

from .labels import FLAGS, OVERALL, QUESTIONS, STRONGEST
from .project import Project
from .store import Assignment, AssignmentError, Store

LETTERS = "abcdefghi"

_HELP = {
    "ranking": "best first, ties with =: for example `b a=c`",
    "pair": f"the better one and how much: a1 to a{STRONGEST}, b1 to b{STRONGEST}, or = for a tie",
    "rating": f"overall {OVERALL[0]} to {OVERALL[1]}, then the numbers of what holds: `6 4 10`",
    "demonstration": "write the answer; a line with a single . ends it",
}
_COMMANDS = (
    "/skip · /undo · /bad (no answer is good enough) · /flag "
    + "|".join(FLAGS)
    + " · /note TEXT · /guidelines · /quit"
)


class _Done(Exception):
    """The task is dealt with, or the sitting is over."""


class Terminal:
    """One sitting of one labeler.

    Args:
        ask: Shows a prompt and returns a line; raises EOFError at the end.
        say: Shows a text.
    """

    def __init__(
        self,
        project: Project,
        store: Store,
        labeler: str,
        ask: Callable[[str], str],
        say: Callable[[str], None],
    ) -> None:
        self.project, self.store, self.labeler = project, store, labeler
        self.ask, self.say = ask, say
        self.tab = f"terminal-{secrets.token_hex(8)}"
        self.count = 0

    def sit(self) -> int:
        """Ask until nothing is left or the person ends it; returns the number of labels."""
        self.store.add_labeler(self.labeler)
        try:
            while True:
                self._read_guidelines()
                assignment = self.store.next_assignment(self.labeler, self.tab)
                if assignment is None:
                    self.say(
                        "Nothing is left for you to label now: tasks that others have open are not "
                        "offered. Thank you!"
                    )
                    break
                self._judge(assignment)
        except EOFError:
            pass
        finally:
            self.store.leave(self.labeler, self.tab)
        return self.count

    def _read_guidelines(self, again: bool = False) -> None:
        guidelines = self.project.guidelines()
        if again or self.store.acknowledged(self.labeler) != guidelines.sha256:
            self.say(guidelines.text.replace("Press `g`", "Enter `/guidelines`"))
            self.ask("Press Enter when you have read the guidelines. ")
            self.store.acknowledge(self.labeler, guidelines.text)

    def _judge(self, assignment: Assignment) -> None:
        task, progress = assignment.task, self.store.progress(self.labeler)
        self.say(f"\n--- {progress['done'] + 1} of {progress['total']} ---")
        for turn in task.prompt:
            self.say(f"[{turn['role']}] {turn['content']}")
        for place, index in enumerate(assignment.order):
            self.say(f"\n({LETTERS[place]}) {task.answers[index].text}")
        if task.type == "rating":
            self.say("".join(f"\n {n:2d} {q}" for n, q in enumerate(QUESTIONS.values(), 1)))
        more: dict[str, Any] = {"flags": [], "both_bad": False, "note": ""}
        if (previous := assignment.previous) is not None:
            more = {key: previous[key] for key in more}
            self.say(f"\nYour label so far: {_written(task.type, previous['value'])}; {more}")
        self.say(f"\n{_HELP[task.type]}\n{_COMMANDS}")
        while True:
            try:
                line = self.ask("> ").strip()
                if line.startswith("/"):
                    self._command(line, assignment, more)
                elif line:
                    self._submit(assignment, self._value(assignment, line), more)
            except (ValueError, AssignmentError) as error:
                self.say(f"{error}")
            except _Done:
                return

    def _submit(self, assignment: Assignment, value: dict[str, Any] | None, more: Any) -> None:
        self.store.submit(self.labeler, assignment.id, value, tab=self.tab, **more)
        self.count += 1
        raise _Done

    def _command(self, line: str, assignment: Assignment, more: dict[str, Any]) -> None:
        name, _, rest = line[1:].partition(" ")
        if name == "skip":
            self._submit(assignment, None, more)
        elif name == "undo":
            self.store.undo(self.labeler, self.tab)
            raise _Done
        elif name == "bad":
            more["both_bad"] = not more["both_bad"]
            self.say(f"no answer is good enough: {'yes' if more['both_bad'] else 'no'}")
        elif name == "flag":
            if rest not in FLAGS:
                raise ValueError(f"expected /flag with one of {', '.join(FLAGS)}")
            more["flags"] = sorted({*more["flags"]} ^ {rest})  # again: takes it back
            self.say(f"flags: {', '.join(more['flags'])}")
        elif name == "note":
            more["note"] = rest
            self.say(f"note: {rest}")
        elif name == "guidelines":
            self._read_guidelines(again=True)
        elif name == "quit":
            raise EOFError
        else:
            raise ValueError(f"there is no /{name}; {_COMMANDS}")

    def _value(self, assignment: Assignment, line: str) -> dict[str, Any]:
        kind, count = assignment.task.type, len(assignment.order)
        if kind == "ranking":
            return {"ranks": _ranks(line.lower(), count)}
        if kind == "pair":
            return {"strength": _strength(line.lower())}
        if kind == "rating":
            parts = line.replace(",", " ").split()
            if not all(part.isdecimal() for part in parts):
                raise ValueError(f"expected {_HELP['rating']}")
            overall, *numbers = map(int, parts)
            keys = dict(enumerate(QUESTIONS, 1))
            if unknown := [number for number in numbers if number not in keys]:
                raise ValueError(f"there is no question {unknown[0]}")
            return {"overall": overall, "questions": {keys[n]: True for n in numbers}}
        lines = [line]
        while (next_line := self.ask("")) != ".":
            lines.append(next_line)
        text = "\n".join(lines)
        if problems := answer_format.problems(text, assignment.task.checks or {}):
            raise ValueError(f"{'; '.join(problems)}: write it again")
        return {"text": text}


def _ranks(line: str, count: int) -> list[int]:
    groups = [part.split("=") for part in line.replace(">", " ").replace(" = ", "=").split()]
    letters = [letter for group in groups for letter in group]
    if sorted(letters) != list(LETTERS[:count]):
        raise ValueError(f"expected each of {' '.join(LETTERS[:count])} once; {_HELP['ranking']}")
    places: dict[str, int] = {}
    place = 1
    for group in groups:
        places |= dict.fromkeys(group, place)
        place += len(group)
    return [places[letter] for letter in LETTERS[:count]]


def _written(kind: str, value: dict[str, Any] | None) -> str:
    """Return a label as a labeler writes it."""
    if value is None:
        return "skipped"
    if kind == "ranking":
        by_rank: dict[int, list[str]] = {}
        for letter, rank in zip(LETTERS, value["ranks"], strict=False):
            by_rank.setdefault(rank, []).append(letter)
        return " ".join("=".join(by_rank[rank]) for rank in sorted(by_rank))
    if kind == "pair":
        strength = value["strength"]
        return "=" if not strength else f"{'b' if strength > 0 else 'a'}{abs(strength)}"
    if kind == "rating":
        held = value.get("questions") or {}
        numbers = [str(n) for n, key in enumerate(QUESTIONS, 1) if held.get(key)]
        return " ".join([str(value["overall"]), *numbers])
    return str(value["text"])


def _strength(line: str) -> int:
    if line == "=":
        return 0
    side, number = line[:1], line[1:] or "2"
    if side not in "ab" or not number.isdecimal() or not 1 <= int(number) <= STRONGEST:
        raise ValueError(f"expected {_HELP['pair']}")
    return int(number) * (1 if side == "b" else -1)
