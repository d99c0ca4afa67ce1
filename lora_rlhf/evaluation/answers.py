# SPDX-License-Identifier: Apache-2.0
"""The answers of one model, and their cache on disk until all models are evaluated.

checkpoints/evaluate/MODEL.json holds the answers and scores with their sha256 and the identity of
the run, so that an interrupted evaluation goes on with the models that are missing.
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
    """One model's completions of N prompts, in prompt order, with their scores."""

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

    @property
    def speed(self) -> dict[str, float]:
        """The time of generation, for the record's `clock`."""
        tokens_per_second = round(sum(self.lengths) / max(self.seconds, 1e-9), 1)
        return {"seconds": round(self.seconds, 3), "tokens_per_second": tokens_per_second}


_KEPT = ("ids", "texts", "finished", "seconds", "scores", "kl")  # verdicts are fast to recompute


class AnswerCache:
    """The finished answers of one evaluation, on disk.

    Args:
        identity: Flat description of the run; answers of a different run are not used. None: no
            cache.
        say: Called with a message on each cached file: it is used, or why it is not.
    """

    def __init__(
        self, record: Record, identity: dict[str, Any] | None, say: Callable[[str], object]
    ) -> None:
        self.record, self.say = record, say
        self.identity = json.loads(json.dumps(identity))  # equal to what is read from a file
        self.folder: Path = record.checkpoints("evaluate")
        self._started, self._before = time.perf_counter(), 0.0

    def take(self, model: str) -> Answers | None:
        """Return the answers that an earlier process saved for a model, if they are valid."""
        path = self.folder / f"{model}.json"
        if self.identity is None or not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kept = content["kept"]
            if content["sha256"] != digest(kept):
                raise ValueError("its sha256 differs")
            if kept["run"] != self.identity:
                raise ValueError("it belongs to a different run")
            answers = Answers(**{name: kept[name] for name in _KEPT})
            spent = float(kept["spent"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.say(f"evaluate: {path.name} is not used, {model} is evaluated again: {error}")
            return None
        self.say(f"evaluate: {model} was done before")
        clock = self.record.data["clock"]
        clock["resumed"] = [*clock.get("resumed", []), {"training": "evaluate", "from": path.name}]
        self._before = max(self._before, spent)
        clock.setdefault("before", {})["evaluate"] = self._before
        return answers

    def put(self, model: str, answers: Answers) -> None:
        """Save the answers of a model."""
        if self.identity is None:
            return
        spent = self._before + time.perf_counter() - self._started
        kept = {name: getattr(answers, name) for name in _KEPT}
        kept |= {"run": self.identity, "spent": spent}
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"sha256": digest(kept), "kept": kept})
        write_atomically(self.folder / f"{model}.json", text)
        self.record.on_saved(False)


def digest(content: Any) -> str:
    """Return the sha256 of JSON content, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
