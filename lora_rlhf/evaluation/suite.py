# SPDX-License-Identifier: Apache-2.0
"""Suites: the prompt sets, metrics and judges of an evaluation, as typed YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lora_rlhf.data import contamination
from lora_rlhf.data.filters import FilteredSet
from lora_rlhf.data.row_formats import text_of
from lora_rlhf.errors import UsageError
from lora_rlhf.recipe.loader import load_section
from lora_rlhf.recipe.schema import Recipe, Rules, Section

from . import prompt_sets

_SHIPPED = Path(__file__).parent / "suites"


Change = Literal[
    "typos", "case", "white_space", "homoglyphs", "long_context", "injection", "repetition", "empty"
]
"""Changes of prompts; `stress` makes them."""


class SetSection(Section):
    """A prompt set with what is measured on it."""

    name: str
    """Name in tables; unique in the suite."""
    format: str
    """Reader of the rows, such as `plain`, `truthfulqa` or `closed_world`."""
    path: str | None = None
    """File, relative to the suite, or below the folder that LORA_RLHF_DATA names."""
    hub: str | None = None
    """Hub id of the data set, read if there is no local file."""
    n: int | None = Field(None, ge=2)
    """Rows drawn with the suite's seed; default: all."""
    metrics: list[str] = Field(default_factory=list)
    """Metrics of each answer, or of log-probabilities."""
    win_rate: bool = False
    """Compare answers with those of the reference target, by every judge that can."""
    stress: list[Change] = Field(default_factory=list)
    """Changes of the prompts; every metric is measured on the changed prompts too."""

    def rules(self) -> Rules:
        """Metrics and changes are named once, and there is something to measure under changes."""
        if len({*self.metrics}) < len(self.metrics):
            yield f"set {self.name}: metrics names one twice", "metrics"
        if len({*self.stress}) < len(self.stress) or (self.stress and not self.metrics):
            yield f"set {self.name}: stress needs metrics, and names each change once", "stress"


class LmEvalSection(Section):
    """Tasks of lm-eval, for the alignment tax: what a policy lost against SFT and base."""

    tasks: list[str] = Field(min_length=1)
    path: str | None = None
    """Folder with task files of your own, in the place of lm-eval's."""
    n: int | None = Field(None, ge=2)
    """First documents of each task; default: all."""
    few_shot: int | None = Field(None, ge=0)
    """Default: the task's own."""
    batch_size: int = Field(8, ge=1)


class Suite(Section):
    """An evaluation: what is asked, how it is answered, and which number decides."""

    version: Literal[1] = 1
    """Version of this format."""
    name: str
    seed: int = Field(0, ge=0)
    temperature: float = Field(0.0, ge=0)
    """0: greedy, so that an evaluation repeats."""
    max_new_tokens: int = Field(128, ge=1)
    batch_size: int = Field(32, ge=1)
    """Prompts generated at once."""
    headline: str | None = None
    """`SET/METRIC` that the verdict is about, chosen before anything is measured."""
    sets: list[SetSection] = Field(min_length=1)
    lm_eval: LmEvalSection | None = None

    def shortened(self, n: int) -> Suite:
        """Return the suite with at most n prompts of each set, under a name that says so."""

        def fewer(of: Any) -> dict[str, int]:
            return {"n": min(n, of.n or n)}

        sets = [one.model_copy(update=fewer(one)) for one in self.sets]
        tasks = self.lm_eval and self.lm_eval.model_copy(update=fewer(self.lm_eval))
        changed = {"name": f"{self.name}-n{n}", "sets": sets, "lm_eval": tasks}
        return self.model_copy(update=changed)

    def rules(self) -> Rules:
        """Names are unique, and the headline is measured."""
        names = [one.name for one in self.sets]
        if double := next((name for name in names if names.count(name) > 1), None):
            yield f"two sets are called {double!r}", "sets"
        if self.headline is None:
            return
        name, _, metric = self.headline.partition("/")
        known = {s.name: [*s.metrics, *(["win_rate"] if s.win_rate else [])] for s in self.sets}
        if metric not in known.get(name, []):
            yield f"headline: {self.headline!r} is not measured by any set", "headline"


def shipped() -> list[str]:
    """Return the names of the packaged suites."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load(name: str) -> tuple[Suite, Path]:
    """Load a packaged suite by name, or a YAML file; returns it with its file.

    Raises:
        UsageError: There is no such suite, or a key or value is wrong, with file and line.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = _SHIPPED / f"{name}.yaml"
    if not path.is_file():
        raise UsageError(
            f"there is no suite {name!r}",
            expected=f"a YAML file, or one of: {', '.join(shipped())}",
            remedy="check --suite, or data.contamination_suites of the recipe",
        )
    return load_section(Suite, path, "correct the suite; docs/evaluation.md lists the keys"), path


def prompts_at_hand(recipe: Recipe) -> dict[str, FilteredSet]:
    """Return the prompts of `data.contamination_suites` whose files are here, as one set.

    Raises:
        UsageError: There is no such suite.
        DataError: A prompt set cannot be read.
    """
    kept = FilteredSet(contamination.SUITES)
    names = recipe.data.contamination_suites if recipe.data.contamination != "keep" else []
    for name in names:
        suite, file = load(name)
        for one in suite.sets:
            beside = file.parent / (one.path or "")
            path = str(beside) if one.path and beside.is_file() else one.path
            if path and one.name not in kept.layouts and prompt_sets.find(path):
                rows = prompt_sets.load(one.name, path=path, format=one.format).rows
                texts = (text_of(row.prompt) for row in rows)
                kept.rows += [{"prompt": text, "set": one.name} for text in texts]
                kept.layouts[one.name] += len(rows)
    return {contamination.SUITES: kept}
