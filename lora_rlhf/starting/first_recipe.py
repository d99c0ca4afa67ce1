# SPDX-License-Identifier: Apache-2.0
"""A commented recipe for a user's data: sets, algorithm, base and sizes, each with its reason.

If the data leave a choice open, the user is asked, or a default is taken and printed.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from lora_rlhf.runtime import optional_packages  # noqa: F401  # isort: skip
from lora_rlhf import tiny
from lora_rlhf.data import dataset_builder
from lora_rlhf.data.row_formats import text_of
from lora_rlhf.data.sources import excerpt
from lora_rlhf.data.tokenization import completion_ids, prompt_ids
from lora_rlhf.errors import DataError, LoraRlhfError, SetupError, UsageError, counted
from lora_rlhf.models import loading
from lora_rlhf.planning import bases, gpu_fit
from lora_rlhf.planning.memory_budget import format_bytes
from lora_rlhf.planning.plan import planner_for
from lora_rlhf.recipe.home import expanded
from lora_rlhf.recipe.loader import load_recipe, parse_recipe
from lora_rlhf.recipe.schema import DataSource, ModelSection, Recipe
from lora_rlhf.recipe.strict_yaml import dump_yaml, parse_yaml
from lora_rlhf.runs.disk import check_writable
from lora_rlhf.runtime import quiet

from . import shown_rows
from .columns import SETS, Ask, Taken, look, plain

Say = Callable[[str | Text], None]

_CHARACTERS = 3.5
"""Characters of a token, where the base's tokenizer is not here."""

_FEW, _SAMPLE = 30, 2_000


@dataclass
class _Draft:
    """The recipe as plain data, and a comment for a dotted key."""

    data: dict[str, Any]
    comments: dict[str, str] = field(default_factory=dict)

    def set(self, key: str, value: Any, comment: str = "") -> None:
        *path, last = key.split(".")
        section = self.data
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
        if comment:
            self.comments[key] = comment

    def text(self, head: Sequence[str]) -> str:
        """Write the YAML with its comments above their keys."""
        lines = dump_yaml(self.data).splitlines()
        _, places = parse_yaml("\n".join(lines), "recipe")
        above = {places[tuple(key.split("."))]: text for key, text in self.comments.items()}
        written = [f"# {excerpt(line, 200)}" for line in head]
        for number, line in enumerate(lines, start=1):
            if comment := above.get(number):
                indent = " " * (len(line) - len(line.lstrip()))
                written.append(f"{indent}# {excerpt(comment, 200)}")
            written.append(line)
        return "\n".join(written) + "\n"


@quiet.libraries()
def init(
    files: Sequence[str | Path] = (),
    *,
    hub: str | None = None,
    out: str | Path = "recipe.yaml",
    gpu: str | None = None,
    model: str | None = None,
    columns: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    force: bool = False,
    ask: Ask | None = None,
    say: Say | None = None,
) -> Recipe:
    """Write a commented recipe for files of data, or for a Hub dataset; return it.

    Args:
        files: CSV, JSON, JSONL or Parquet, .gz allowed.
        hub: A dataset on the Hub, or in its cache.
        gpu: Memory of the GPU, such as "16GB"; default: that of this machine.
        model: Base model; default: chosen for data and GPU.
        columns: Our column name -> the file's.
        ignore: Columns to leave unread.
        force: Replace an existing `out`.
        ask: Called as ask(question, allowed answers, default); None: likely answers are taken.
        say: Takes what is decided, line by line.

    Raises:
        UsageError: `out` exists, or there is no data.
        DataError: The data cannot be read, or nothing can be trained on them. If the recipe
            was already written, the message says so.
    """
    say, out = say or (lambda line: None), Path(out)
    out = out / "recipe.yaml" if out.is_dir() else out
    if out.exists() and not force:
        raise UsageError(f"{out} exists", remedy="give another --out, or --force to replace it")
    check_writable(out.parent)
    given = [DataSource(path=expanded(str(file))) for file in files]
    given += [DataSource(hub=hub)] if hub else []
    if not given:
        raise UsageError("there is no data", expected="files, or --hub ORG/NAME")
    size = gpu_fit.capacity(gpu) if gpu else None
    looked = [look(one, given=columns or {}, ignore=ignore, ask=ask) for one in given]
    for line in (line for one in looked for line in one.lines()):
        say(line)
    if missing := set((columns or {}).values()) - {c for one in looked for c in one.columns}:
        raise UsageError(
            f"no file has the column {min(missing)!r}", expected="--column OURS=THEIRS"
        )
    draft = _Draft({"name": _name(looked[0].name), "seed": 0})
    sets = _sets(draft, looked, say)
    base = _base(draft, sets, size, model, say)
    tokenizer = _tokenizer(base, say)
    _sizes(draft, sets, tokenizer, base.config)
    if base.section.id == "tiny":
        _rates(draft)
    _fit(draft, base, say)
    _relate(draft.data, out.parent)
    recipe = _write(draft, looked, out, base, say)
    _check(recipe, sets, tokenizer, out, say)
    return recipe


def _name(name: str) -> str:
    stem = re.sub(r"[^a-zA-Z0-9._-]+", "-", name.rpartition("/")[2].split(".")[0]).strip("-._")
    return stem or "first"


def _relate(data: dict[str, Any], folder: Path) -> None:
    """Write files and a local base as they are seen from the recipe's folder."""
    for source in (s for name in SETS for s in data["data"].get(name, ())):
        if "path" in source:
            source["path"] = _from(folder, source["path"])
    base = data["model"]["id"]
    if os.path.isabs(base):
        inside = os.path.relpath(base, os.path.abspath(folder))
        data["model"]["id"] = base if inside.startswith(os.pardir) else f"./{inside}"


def _from(folder: Path, path: str) -> str:
    """Return a path relative to the recipe or to LORA_RLHF_DATA if it lies there, else absolute."""
    whole = os.path.abspath(path)
    if data := os.environ.get("LORA_RLHF_DATA"):
        below = os.path.relpath(whole, os.path.abspath(data))
        if not below.startswith(os.pardir):
            return f"data://{Path(below).as_posix()}"
    inside = os.path.relpath(whole, os.path.abspath(folder))
    return whole if inside.startswith(os.pardir) else inside


# --- sets and algorithm --------------------------------------------------------------------------


@dataclass
class _Sets:
    """Examples of each set, and the last stage that the data suffice for."""

    examples: dict[str, list[Any]]
    until: str


def _sets(draft: _Draft, looked: list[Taken], say: Say) -> _Sets:
    """Choose which file serves as what, and what is trained."""
    serving = {name: [one for one in looked if name in one.sources] for name in SETS}
    pairs = serving["comparisons"]
    own = [one for one in serving["demonstrations"] if one not in pairs]
    shown, why = own or pairs, ""
    if not shown:
        raise DataError(
            "there are prompts only, and nothing to learn an answer from",
            expected="demonstrations (prompt and answer) or comparisons (a better and a worse one)",
            remedy="let people write answers, `lora-rlhf label PROJECT --new TASKS --type "
            "demonstration`, or add a file with answers; if a column here has answers, name it: "
            "--column completion=NAME, or --column chosen=NAME --column rejected=NAME",
        )
    if not own:
        why = "no demonstrations of their own: SFT trains on the better answers of the comparisons"
        say(why)
    names = {"demonstrations": shown, "comparisons": pairs}
    only = [one for one in looked if [*one.sources] == ["prompts"]]
    names["prompts"] = only or [*dict.fromkeys([*pairs, *own])]
    examples: dict[str, list[Any]] = {}
    for name, files in names.items():
        if files:
            sources = [plain(one.sources[name]) for one in files]
            draft.set(f"data.{name}", sources)
            examples[name] = [e for one in files for e in one.examples[name] if e.good]
        if name == "comparisons":
            examples[name] = [e for one in files for e in one.examples[name]]
    if why:
        draft.comments["data.demonstrations"] = why
    if not only:
        draft.comments["data.prompts"] = "prompts of the rollouts: those of the same files"
    if min(map(len, (examples["demonstrations"], examples["prompts"]))) < 4:
        raise DataError(
            f"too few: {counted(len(examples['demonstrations']), 'demonstration')} and "
            f"{counted(len(examples['prompts']), 'prompt')}",
            where=looked[0].name,
            expected="at least a few dozen rows, and some hundred for a result to mean something",
            remedy="give more rows",
        )
    return _Sets(examples, _algorithm(draft, bool(pairs), say))


def _algorithm(draft: _Draft, compared: bool, say: Say) -> str:
    if compared:
        comment = "or dpo (no reward model), grpo, rloo, best_of_n: docs/recipes.md"
        draft.set("algorithm", "ppo", comment)
        return "run"
    missing = (
        "no comparisons, so no reward model and no PPO yet: `lora-rlhf sft` trains on the answers; "
        "then `lora-rlhf tasks` and `lora-rlhf label` make comparisons of its answers"
    )
    say(missing)
    draft.comments["data"] = missing
    return "sft"


# --- base and sizes ------------------------------------------------------------------------------


@dataclass
class _Base:
    """The base model with its config, and the GPU that it is planned for (None: a CPU)."""

    section: ModelSection
    config: Any
    gpu: int | None
    others: list[bases.Base]


def _base(draft: _Draft, sets: _Sets, gpu: int | None, model: str | None, say: Say) -> _Base:
    """Take the user's base, or choose one for the language of the data and the GPU."""
    if gpu is None and torch.cuda.is_available():
        gpu = int(torch.cuda.mem_get_info()[1])
    place = f"a GPU of {gpu / 1e9:g} GB" if gpu else "this CPU (no GPU here; or give --gpu)"
    if model:
        folder = Path(expanded(model))
        draft.set("model.id", os.path.abspath(folder) if folder.is_dir() else model, "as you said")
        section = ModelSection(id=draft.data["model"]["id"])
        return _Base(section, bases.config_of(section)[0], gpu, [])
    texts = [text_of(e.prompt) for e in sets.examples["demonstrations"][:100]]
    english, why = _is_english(texts)
    first, *others = bases.for_gpu(gpu, english)
    comment = f"chosen for {place} and {why}; any other instruct model: --model"
    draft.set("model.id", first.id, comment)
    say(f"base model: {first.id}, {comment}")
    section = ModelSection(id=first.id)
    return _Base(section, bases.config_of(section)[0], gpu, others)


_ENGLISH = frozenset("the of and to is in that you it what how for are do can i".split())


def _is_english(texts: list[str]) -> tuple[bool, str]:
    """Tell by the commonest words; other languages need a base that was trained on them."""
    words = re.findall(r"[^\W\d_]+", " ".join(texts).lower())
    share = sum(word in _ENGLISH for word in words) / max(len(words), 1)
    english = share >= 0.1
    return english, "English data" if english else "data that are not plainly English"


def _tokenizer(base: _Base, say: Say) -> Any:
    try:
        return loading.find_tokenizer(base.section, base.config)
    except SetupError as error:
        if Path(base.section.id).is_dir() or base.section.id == "tiny":
            raise
        say(
            f"{base.section.id}: no tokenizer of it is here, so lengths are estimated "
            f"({excerpt(error.given, 120)}); `data` and a run need it: {error.remedy}"
        )
        return None


def _sizes(draft: _Draft, sets: _Sets, tokenizer: Any, config: Any) -> None:
    """Set lengths by the data, and batches, updates and the held-out share by the rows."""
    small = len(sets.examples["prompts"]) < 40
    share = 0.3 if small else 0.2 if len(sets.examples["prompts"]) < 1_000 else 0.1
    draft.set("data.held_out", share, "share of the prompts that nothing trains on")
    prompts, answers, whole = _lengths(sets, tokenizer)
    room = int(getattr(config.get_text_config(), "max_position_embeddings", 2048) or 2048)
    longest = min(max(64, _rounded(int(1.5 * _quantile(answers, 0.95)), 256)), room // 2)
    fitting = "; 99 % of the rows fit" if tokenizer else "; estimated, for 99 % of the rows"
    prompt = min(_rounded(_quantile(prompts, 0.99), 1024), room - longest)
    both = min(_rounded(_quantile(whole, 0.99), 2048), room)
    draft.set("data.max_prompt_tokens", prompt, f"tokens; longer prompts are dropped{fitting}")
    draft.set("data.max_tokens", both, f"of prompt and answer{fitting}")
    draft.set("data.max_lost", 0.2, "the run stops if a filter drops more than this share")
    rows = len(sets.examples["demonstrations"])
    epochs = 3 if rows < 1_000 else 2 if rows < 5_000 else 1
    draft.set("sft.args", {"num_train_epochs": epochs})
    if sets.until == "sft":
        return
    few = len(sets.examples["comparisons"]) < 300
    comment = "a judge that PPO does not see, trained on the other half of the comparisons"
    draft.set(
        "reward.held_out_model", not few, comment if not few else "too few comparisons for it"
    )
    gate = "stop: no PPO if the reward model is not better than chance; warn: go on"
    draft.set("reward.gate", "stop", gate)
    trained = int(len(sets.examples["prompts"]) * (1 - share) * 0.9)
    steps = next((n for n in (4, 2, 1) if 8 * n <= trained), 1)
    size = 8 if trained >= 8 else max(1, trained // 2)
    updates = max(10, min(100, 4 * trained // (size * steps)))
    draft.set("ppo.updates", updates, f"rollouts of {size * steps} answers each")
    draft.set("ppo.kl_coef", 0.05, "higher: stays closer to SFT")
    args = {"per_device_train_batch_size": size, "steps_per_generation": steps}
    draft.set("ppo.args", args | {"max_completion_length": longest})
    draft.set("evaluate", {"n": 128, "batch_size": 32}, "at most so many held-out prompts")


def _rates(draft: _Draft) -> None:
    """Take the learning rates of the packaged recipe, which suit a model as small as `tiny`."""
    packaged = load_recipe(tiny.recipe())
    why = "the demo's, for a model as small as `tiny`; for a larger one, leave it out"
    for section in ("sft", "reward", draft.data.get("algorithm", "")):
        rate = getattr(packaged, section).args.get("learning_rate") if section else None
        if rate is not None and (section == "sft" or section in draft.data):
            draft.set(f"{section}.args.learning_rate", rate, why)
    if draft.data.get("algorithm") == "ppo":
        draft.set("ppo.value_learning_rate", packaged.ppo.value_learning_rate, why)


def _lengths(sets: _Sets, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Measure tokens of prompts, answers, and both, on a sample."""
    chosen = random.Random(0)
    prompts = _sample(chosen, sets.examples["prompts"])
    rows = _sample(chosen, sets.examples.get("comparisons") or sets.examples["demonstrations"])

    def of_prompts(examples: list[Any]) -> list[int]:
        if tokenizer is None:
            return [int(len(text_of(e.prompt)) / _CHARACTERS) + 16 for e in examples]
        kept = []
        for one in examples:
            with contextlib.suppress(Exception):  # the template refuses it: the check reports it
                kept.append(len(prompt_ids(tokenizer, [_fitted(one.prompt, tokenizer)])[0]))
        return kept or [64]

    def of_answer(answer: Any) -> int:
        text = answer if isinstance(answer, str) else text_of(answer[-1:])
        if tokenizer is None:
            return int(len(text) / _CHARACTERS) + 1
        return len(completion_ids(tokenizer, [text])[0]) + 1

    answers = [max(map(of_answer, e.answers), default=1) for e in rows]
    both = [p + a for p, a in zip(of_prompts(rows), answers, strict=False)]
    return of_prompts(prompts), answers, both


def _fitted(prompt: Any, tokenizer: Any) -> Any:
    """Return a prompt as the tokenizer takes it: text if it has no chat template."""
    return prompt if tokenizer.chat_template else text_of(prompt)


def _sample(chosen: random.Random, examples: list[Any]) -> list[Any]:
    return examples if len(examples) <= _SAMPLE else chosen.sample(examples, _SAMPLE)


def _quantile(values: list[int], share: float) -> int:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _rounded(tokens: int, most: int) -> int:
    """Round up to a multiple of 32, at most `most`."""
    return max(32, min(most, -(-tokens // 32) * 32))


def _fit(draft: _Draft, base: _Base, say: Say) -> None:
    """Change sizes until the recipe fits the GPU, on a smaller base if need be."""
    if base.gpu is None:
        if base.section.id != "tiny":
            draft.set("lora.top_fraction", 0.5, "half of the layers carry adapters: faster")
            draft.data["data"]["max_tokens"] = min(256, draft.data["data"]["max_tokens"])
            draft.data["data"]["max_prompt_tokens"] = min(
                128, draft.data["data"]["max_prompt_tokens"]
            )
            draft.data["data"]["max_lost"] = 0.9
            draft.comments["data.max_lost"] = "the lengths are sized for a CPU and drop more rows"
        return
    while True:
        recipe = parse_recipe(dump_yaml(draft.data), "draft", until="sft")
        fitted = gpu_fit.fit(planner_for(base.config, "cuda"), recipe, base.gpu)
        if fitted.changes is not None or not base.others:
            break
        smaller = base.others.pop(0)
        base.section, base.config = ModelSection(id=smaller.id), smaller.config()
        draft.set("model.id", smaller.id)
    gpu = f"{base.gpu / 1e9:g} GB"
    if fitted.changes is None:
        needed = format_bytes(fitted.plan.needed)
        raise UsageError(
            f"{base.section.id} needs {needed} at its smallest, more than {gpu}",
            remedy="give a smaller --model, or a larger --gpu",
        )
    for key, value in fitted.changes.items():
        draft.set(key, value)
        if ".args." not in key:
            draft.comments[key] = f"to fit {gpu}"
    changed = f" after {', '.join(fitted.changes)}" if fitted.changes else ""
    planned = f"needs {format_bytes(fitted.plan.needed)} of {gpu}{changed}, by `lora-rlhf plan`"
    draft.comments["model"] = planned
    say(f"memory: {planned}")


# --- writing and checking ------------------------------------------------------------------------


def _write(draft: _Draft, looked: list[Taken], out: Path, base: _Base, say: Say) -> Recipe:
    """Write the recipe; it is parsed before."""
    verb = "run" if "algorithm" in draft.data else "sft"
    path = shlex.quote(str(out))
    head = [
        f"Written by `lora-rlhf init` for {', '.join(one.name for one in looked)}.",
        "Every key that is left out has a default: docs/recipes.md. Next:",
        f"  lora-rlhf data {path}   # rows, lengths, what is trained on",
        f"  lora-rlhf {verb} {path}",
    ]
    for one in looked:
        head += [f"{one.name}:", *(f"  {c}: {r} ({w})" for c, (r, w) in one.columns.items())]
    order = ("name", "seed", "algorithm", "model", "lora", "data", "sft", "reward", "ppo")
    draft.data = {k: draft.data[k] for k in (*order, *draft.data) if k in draft.data}
    text = draft.text(head)
    recipe = parse_recipe(text, str(out), folder=out.resolve().parent, until=verb)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    say(f"{out} is written; next: lora-rlhf data {path}, then lora-rlhf {verb} {path}")
    return recipe


def _check(recipe: Recipe, sets: _Sets, tokenizer: Any, out: Path, say: Say) -> None:
    """Build the sets as a run does, and show rows of them."""
    builders: dict[str, Callable[..., dataset_builder.Prepared]] = {
        "demonstrations": dataset_builder.demonstrations,
        "comparisons": dataset_builder.comparisons,
        "prompts": dataset_builder.prompts,
    }
    loaded: dataset_builder.Loaded = {}
    wanted = [name for name in builders if sets.examples.get(name)]
    wanted = wanted if sets.until == "run" else ["demonstrations"]
    for name in wanted:
        if tokenizer is None:
            rows = [_as_row(name, example) for example in sets.examples[name][:3]]
        else:
            try:
                prepared = builders[name](recipe, tokenizer, loaded=loaded)
            except LoraRlhfError as error:
                raise DataError(
                    f"{out} is written, but cannot run yet: {error.given}",
                    where=error.where,
                    expected=error.expected,
                    remedy=error.remedy,
                ) from None
            say(prepared.lines[0])
            rows = list(prepared.train.select(range(min(3, len(prepared.train)))))
        if name == "prompts" and len(wanted) > 1:
            continue  # the same as those of the other sets, or without an answer to show
        for number, row in enumerate(rows, start=1):
            say(f"  {name}, row {number} as the model sees it:")
            for line in shown_rows.lines(row, tokenizer):
                say(line)


def _as_row(name: str, example: Any) -> dict[str, Any]:
    """Return an example as a row of its set, before any filter."""
    ranks = example.ranks or [0.0] * len(example.answers)
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    answers = [example.answers[i] for i in order]
    row: dict[str, Any] = {"prompt": example.prompt}
    if name == "demonstrations" and answers:
        row["completion"] = answers[0]
    if name == "comparisons" and len(answers) > 1:
        row |= {"chosen": answers[0], "rejected": answers[-1]}
    return row
