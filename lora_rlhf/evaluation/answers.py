# SPDX-License-Identifier: Apache-2.0
"""What one model answered in the evaluation, kept from when it is done until all are.

checkpoints/evaluate/MODEL.json holds what took long, with the sha256 of it and what the run was:
an evaluation that was interrupted asks and judges only the models that are missing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_rlhf.data.closed_world.checkers import Verdict
from lora_rlhf.runs.disk import write_atomically
from lora_rlhf.runs.record import Record


@dataclass
class Answers:
    """One model's completions of N prompts, in prompt order, and what was found about each."""

    ids: list[list[int]]
    texts: list[str]
    finished: list[bool]
    seconds: float
    scores: dict[str, list[float]] = field(default_factory=dict)  # reward, held_out: centred
    kl: list[float] | None = None
    verdicts: list[Verdict | None] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """(N,) completion tokens, the end token included."""
        return [len(ids) for ids in self.ids]


_KEPT = ("ids", "texts", "finished", "seconds", "scores", "kl")
"""All but the verdicts, which a text is given again at once."""


class AnswerCache:
    """Where the answers of one evaluation are kept.

    Args:
        run: What must be equal for them to be used, as flat keys; None: nothing is kept.
        say: Told why something is not used, and what is.
    """

    def __init__(
        self, record: Record, run: dict[str, Any] | None, say: Callable[[str], object]
    ) -> None:
        self.record, self.run, self.say = record, json.loads(json.dumps(run)), say
        self.folder: Path = record.checkpoints("evaluate")
        self._started, self._before = time.perf_counter(), 0.0

    def take(self, model: str) -> Answers | None:
        """The answers of a model that an earlier process finished."""
        path = self.folder / f"{model}.json"
        if self.run is None or not path.exists():
            return None
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            if told["sha256"] != _sum(told["kept"]):
                raise ValueError("its sha256 is another")
            if told["kept"]["run"] != self.run:
                raise ValueError("it is of another run")
            found = Answers(**{name: told["kept"][name] for name in _KEPT})
            spent = float(told["kept"]["spent"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.say(f"evaluate: {path.name} is not used, {model} is evaluated again: {error}")
            return None
        self.say(f"evaluate: {model} was done before")
        clock = self.record.data["clock"]
        clock["resumed"] = [*clock.get("resumed", []), {"training": "evaluate", "from": path.name}]
        self._before = max(self._before, spent)
        clock.setdefault("before", {})["evaluate"] = self._before
        return found

    def put(self, model: str, found: Answers) -> None:
        """Keep the answers of a model that is done."""
        if self.run is None:
            return
        spent = self._before + time.perf_counter() - self._started
        kept = {name: getattr(found, name) for name in _KEPT} | {"run": self.run, "spent": spent}
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"sha256": _sum(kept), "kept": kept})
        write_atomically(self.folder / f"{model}.json", text)
        self.record.on_saved(False)


def _sum(kept: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
