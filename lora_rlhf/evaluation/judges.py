# SPDX-License-Identifier: Apache-2.0
"""Judges: which of two answers to a prompt is better, by a checker, a reward model, a language
model or people.

A judge gives a pair of answers 1 (the first is better), 0 (the second is) or 0.5 (a tie), or None
where it cannot tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_rlhf.data import sources
from lora_rlhf.data.closed_world.checkers import Item, check
from lora_rlhf.errors import BaseModelError, DataError, UsageError, counted, first_line, reason
from lora_rlhf.hub import targets
from lora_rlhf.hub.targets import Target
from lora_rlhf.recipe.schema import DataSource, ModelSection
from lora_rlhf.reports import evaluation_report
from lora_rlhf.runs.record import Record, is_run
from lora_rlhf.runs.samples import prompt_text
from lora_rlhf.runtime.devices import pick_device

from .engine import Engine
from .language_judges import LanguageModel, Rubric, ServedModel, calibration_of
from .prompt_sets import Row
from .server import Server
from .verdicts import Pairs, Scores, Verdicts, by_score

KINDS = {
    "checker": "the task's exact checker",
    "reward": "a reward model",
    "model": "a language model",
    "people": "people",
}


class Judge(Protocol):
    """Something that compares answers."""

    name: str
    kind: str
    independent: bool
    """False for the reward model that a target was trained against."""

    def compare(self, pairs: Pairs) -> Verdicts | None:
        """Compare answers to the rows; None if this judge cannot judge this set."""


class ScoringJudge:
    """A judge that scores each answer by itself, and compares the scores."""

    def compare(self, pairs: Pairs) -> Verdicts | None:
        """Compare by the score; None if an answer to these rows has none."""
        if not self.can_score(pairs.rows):
            return None
        first, second = (self.scores(pairs.rows, side) for side in (pairs.first, pairs.second))
        return Verdicts(by_score(first, second))

    def can_score(self, rows: Sequence[Row]) -> bool:
        """Tell if answers to these rows can be scored."""
        return True

    def scores(self, rows: Sequence[Row], texts: Sequence[str]) -> Scores:
        """Score the answers to the rows."""
        raise NotImplementedError


@dataclass
class Checker(ScoringJudge):
    """The closed world's exact checker."""

    name: str = "checker"
    kind: str = "checker"
    independent: bool = True

    def can_score(self, rows: Sequence[Row]) -> bool:
        """Tell if all rows are of the closed world."""
        return all("item" in row.reference for row in rows)

    def scores(self, rows: Sequence[Row], texts: Sequence[str]) -> Scores:
        """Return the gold rewards."""
        items = [Item.from_dict(row.reference["item"]) for row in rows]
        return [check(item, text).reward for item, text in zip(items, texts, strict=True)]


@dataclass
class RewardModel(ScoringJudge):
    """A reward adapter on the engine's base; each answer is scored once."""

    name: str
    engine: Engine
    independent: bool
    batch_size: int = 32
    kind: str = "reward"
    _known: dict[tuple[str, str], float | None] = field(default_factory=dict)

    def scores(self, rows: Sequence[Row], texts: Sequence[str]) -> Scores:
        """Score the answers to the rows."""
        keys = [(prompt_text(row.prompt), text) for row, text in zip(rows, texts, strict=True)]
        new = list(dict.fromkeys(key for key in keys if key not in self._known))
        prompts = {prompt_text(row.prompt): row.prompt for row in rows}
        scored = self.engine.rewards(
            self.name, [prompts[p] for p, _ in new], [t for _, t in new], self.batch_size
        )
        self._known.update(zip(new, scored, strict=True))
        return [self._known[key] for key in keys]


AT_RANDOM = "drawn at random"
"""Reason of the rows whose rankings may correct a judge."""


class People:
    """Rankings by people, from a JSON Lines file.

    Each line: {"set": name, "id": of the row, "ranking": [["policy"], ["sft", "base"]]}, best
    first, equally good targets together. Several lines on one row are several people. A `why` other
    than "drawn at random", as in `to_label.jsonl`, marks a row that was chosen.
    """

    kind, independent = "people", True

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self._ranks: dict[tuple[str, str], list[dict[str, int]]] = {}
        self._chosen: set[tuple[str, str]] = set()
        for place, row in sources.read(DataSource(path=str(path)), sources.Skips()):
            if "ranking" in row and row["ranking"] is None:
                continue  # a task of to_label.jsonl that nobody has done
            try:
                places = _places(row["ranking"])
                key = (str(row["set"]), str(row["id"]))
                self._ranks.setdefault(key, []).append(places)
                if row.get("why", AT_RANDOM) != AT_RANDOM:
                    self._chosen.add(key)
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"not a ranking: {reason(error)}",
                    where=place,
                    expected='{"set": "quick", "id": "1", "ranking": [["policy"], ["sft"]]}',
                ) from None

    def check(
        self, sets: Mapping[str, Collection[str]], names: Collection[str], reference: str
    ) -> list[dict[str, str]]:
        """Find a ranking that can be used; return what cannot be, as `what` and `why`.

        Args:
            sets: Set whose answers are compared -> ids of its rows.

        Raises:
            DataError: None is of these prompts, or none of the reference and another model.
        """
        here = [
            places
            for (name, row), ranked in self._ranks.items()
            if row in sets.get(name, ())
            for places in ranked
        ]
        if any(reference in places and len(places.keys() & {*names}) > 1 for places in here):
            return [*self._unused(here, names)]
        models = sorted({name for places in here for name in places})
        raise DataError(
            f"no ranking is of {reference} and another model here, but of {', '.join(models)}"
            if here
            else "no ranking is of a prompt whose answers are compared here",
            where=str(self.path),
            expected=f"models: {', '.join(names)}; sets: {', '.join(sets) or 'none'}",
            remedy="rank the tasks of this evaluation's to_label.jsonl",
        )

    def _unused(
        self, here: Sequence[Mapping[str, int]], names: Collection[str]
    ) -> Iterator[dict[str, str]]:
        """Count the rankings of other prompts, and those that name a model that is not here."""
        count = sum(map(len, self._ranks.values()))
        if elsewhere := count - len(here):
            what = f"{elsewhere} of {counted(count, 'ranking')} in {self.path.name}"
            yield {"what": what, "why": "not of a prompt whose answers are compared here"}
        unknown = Counter(name for places in here for name in places if name not in names)
        for name, n in unknown.items():
            where = f"{n} of {counted(len(here), 'ranking')} ({self.path.name})"
            what = f"{sources.excerpt(name, 60)} in {where}"
            yield {"what": what, "why": f"no model of this evaluation: {', '.join(names)}"}

    def compare(self, pairs: Pairs) -> Verdicts | None:
        """Average the people's verdicts on each row; None where nobody ranked both."""
        a, b = pairs.names
        keys = [(pairs.set_name, row.id) for row in pairs.rows]
        wins: list[float | None] = []
        for key in keys:
            votes = [
                0.5 if places[a] == places[b] else float(places[a] < places[b])
                for places in self._ranks.get(key, [])
                if a in places and b in places
            ]
            wins.append(sum(votes) / len(votes) if votes else None)
        if all(win is None for win in wins):
            return None
        return Verdicts(wins, at_random=[key not in self._chosen for key in keys])


def _places(ranking: list[list[str]]) -> dict[str, int]:
    """Return the place of each model."""
    named = [name for tied in ranking for name in tied]
    if not all(isinstance(tied, list) for tied in ranking) or len({*named}) < len(named):
        raise ValueError("ranking is a list of lists, and names each model once")
    return {str(name): place for place, tied in enumerate(ranking) for name in tied}


@dataclass
class Classifier(ScoringJudge):
    """Any Hugging Face sequence classifier with one label, such as a published reward model."""

    name: str
    where: str
    batch_size: int = 8
    independent: bool = True
    kind: str = "reward"
    _model: Any = None

    @torch.no_grad()
    def scores(self, rows: Sequence[Row], texts: Sequence[str]) -> Scores:
        """Score the answers to the rows."""
        if self._model is None:
            self._load()
        tokenizer, out = self._tokenizer, []
        for start in range(0, len(rows), self.batch_size):
            part = range(start, min(start + self.batch_size, len(rows)))
            whole = [self._text(rows[i], texts[i]) for i in part]
            inputs = tokenizer(
                whole,
                padding=True,
                truncation=True,
                return_tensors="pt",
                add_special_tokens=not tokenizer.chat_template,
            ).to(self._model.device)
            out += self._model(**inputs).logits[:, 0].float().tolist()
        return out

    def _text(self, row: Row, answer: str) -> str:
        turns = row.prompt
        if isinstance(turns, str):
            turns = [{"role": "user", "content": turns}]
        if not self._tokenizer.chat_template:
            return f"{prompt_text(turns)}\n\n{answer}"
        turns = [*turns, {"role": "assistant", "content": answer}]
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False))

    def _load(self) -> None:
        options: dict[str, Any] = {"trust_remote_code": False}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.where, **options)
            model = AutoModelForSequenceClassification.from_pretrained(
                self.where, use_safetensors=True, **options
            )
        except Exception as error:  # the libraries raise many classes
            raise BaseModelError(
                f"the judge {self.where} cannot be loaded: {first_line(error)}",
                expected="a sequence classifier in safetensors, with its tokenizer",
            ) from error
        if model.config.num_labels != 1:
            raise UsageError(
                f"the judge {self.where} has {model.config.num_labels} labels",
                expected="one label: a score that grows with the quality",
            )
        self._tokenizer.truncation_side = "left"  # the answer is at the end
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        model.config.pad_token_id = self._tokenizer.pad_token_id
        self._model = model.to(pick_device()).eval()


def people_of(texts: Sequence[str]) -> list[People]:
    """Read the files of people's rankings that a user named."""
    judges = []
    for text in texts:
        path = Path(text)
        if not path.is_file():
            raise UsageError(f"there is no file {text}", expected="JSON Lines of rankings")
        judges.append(People(path.stem, path))
    return judges


@dataclass(frozen=True)
class JudgeSpec:
    """A judge that needs a model, before the model is loaded.

    Attributes:
        base: Base of a reward adapter or of a language model; None for a classifier or a server.
        folder: Folder of the reward adapter, or of the classifier.
    """

    name: str
    kind: str
    base: ModelSection | None
    folder: str | None = None
    target: Target | None = None
    independent: bool = True
    rubric: Rubric = "pairwise"

    def load(self, engine: Engine | None) -> Judge:
        """Make the judge, on the engine of its base; a classifier and a server need none."""
        if self.target is not None and self.target.url is not None:
            return ServedModel(self.name, Server(self.target), self.rubric)
        if engine is None:
            return Classifier(self.name, str(self.folder))
        if self.target is not None:
            fitted = calibration_of(self.target)
            return LanguageModel(self.name, engine, self.target, self.rubric, *fitted)
        engine.adapters.load_scorer(self.name, Path(str(self.folder)))
        return RewardModel(self.name, engine, self.independent)


def of_targets(named: Sequence[Target]) -> list[JudgeSpec]:
    """The reward models of the targets' runs: the held-out one, and the one that was optimised."""
    specs: dict[Path, JudgeSpec] = {}
    for target in named:
        if target.kind != "run" or target.run is None:
            continue
        for role in ("held_out", "reward"):
            folder = Record.read(target.run).verified(f"adapters/{role}")
            if (folder / "adapter_config.json").is_file() and folder.resolve() not in specs:
                name = f"{target.name.rpartition(':')[0]}:{role}"
                specs[folder.resolve()] = JudgeSpec(
                    name, "reward", target.base, str(folder), independent=role == "held_out"
                )
    return list(specs.values())


def parse(texts: Sequence[str], base: str | None = None) -> list[JudgeSpec]:
    """Resolve judges that a user named.

    `RUN:held_out` and `RUN:reward` are reward models of a run; a folder or Hub id of a sequence
    classifier or of a reward adapter is one too; any other target is a language-model judge, which
    compares two answers, or grades each by itself as `pointwise:TARGET`.
    """
    specs = []
    for text in texts:
        run, _, role = text.rpartition(":")
        if run and role in ("held_out", "reward") and is_run(Path(run)):
            own = [s for s in of_targets(targets.parse([f"{run}:base"])) if s.name.endswith(role)]
            if not own:
                raise UsageError(f"{run} has no reward model {role!r}")
            specs += own
            continue
        config = Path(text) / "config.json"
        if config.is_file() and "SequenceClassification" in config.read_text(encoding="utf-8"):
            specs.append(JudgeSpec(Path(text).name, "reward", None, text))
            continue
        rubric, named = _rubric(text)
        for target in targets.parse([named], base=base):
            if target.adapter is not None and "SEQ_CLS" in (
                target.adapter / "adapter_config.json"
            ).read_text(encoding="utf-8"):
                specs.append(JudgeSpec(target.name, "reward", target.base, str(target.adapter)))
                continue
            name = target.name if rubric == "pairwise" else f"{rubric}:{target.name}"
            specs.append(JudgeSpec(name, "model", target.base, target=target, rubric=rubric))
    return specs


def _rubric(text: str) -> tuple[Rubric, str]:
    """Split `pointwise:TARGET`."""
    rubric, _, rest = text.partition(":")
    return ("pointwise", rest) if rubric == "pointwise" and rest else ("pairwise", text)


def describe(judge: Judge | JudgeSpec, validation: dict[str, Any] | None) -> dict[str, Any]:
    """Describe a judge for the report, with the reason why it may or may not be believed."""
    trusted, why = trust(judge, validation)
    if worst := evaluation_report.worst_probe(validation):
        why += f"; at worst, {worst}"
    return {
        "name": judge.name,
        "kind": judge.kind,
        "validation": validation,
        "trusted": trusted,
        "why": why,
    }


FEWEST_LABELS = 50
"""Human labels that a judge must have been compared with before it may head a report."""


def trust(judge: Judge | JudgeSpec, validation: dict[str, Any] | None) -> tuple[bool, str]:
    """Return if a judge may decide the verdict of a report, and why."""
    if judge.kind in ("checker", "people"):
        return True, f"it is {KINDS[judge.kind]}"
    if not judge.independent:
        return False, "a target was trained against it, so a win by it proves little"
    if validation is None:
        return False, "it has never been compared with people's labels; run `lora-rlhf judge`"
    n, low = validation["n"], validation["accuracy"]["low"]
    if n < FEWEST_LABELS:
        return False, f"it was compared with {n} labels by people, and {FEWEST_LABELS} are needed"
    floor = max(0.5, validation["constant"])
    if low is None or low <= floor:
        return False, (
            f"its accuracy against people {validation['accuracy']['value']:.2f} is not clearly "
            f"above {floor:.2f}, which guessing, or judging by length alone, reaches"
        )
    return True, f"it agrees with people on {validation['accuracy']['value']:.0%} of {n} labels"
