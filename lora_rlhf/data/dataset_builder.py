# SPDX-License-Identifier: Apache-2.0
"""Build datasets in TRL's formats from the recipe's sources, split by prompt, every row counted.

A prompt is on the same side of the split in all sets, because `filters.bucket` depends on the seed
and the first user turn only. Prefixes of one conversation stay together, and no reward model is
tested on its training prompts. Evaluation prompts are in no other set.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from lora_rlhf.errors import DataError, first_line
from lora_rlhf.recipe.schema import DataSource, Recipe

from . import (
    augmentation,
    contamination,
    helpsteer,
    label_pool,
    message_trees,
    near_duplicates,
    personal_data,
    summaries,
)
from .closed_world import generator, labelers
from .closed_world.checkers import Item, check
from .filters import (
    REFUSES,
    FilteredSet,
    break_control_tokens,
    bucket,
    call_tools,
    check_losses,
    check_written,
    drop_too_long,
    drop_useless,
    expand,
    follow_template,
    note_damage,
    note_length,
    pair_labels,
    prompt_key,
)
from .row_formats import Example, examples, text_of
from .sources import Row, Skips, described, locate, read
from .tokenization import Turns, prompt_ids

if TYPE_CHECKING:
    import datasets

_SIMULATED = "none: simulated, by the task's exact checker with noise"

Sampler = Callable[[list[Turns], int, int], list[list[str]]]
"""(prompts, k, seed) -> k completions for each prompt."""

Loaded = dict[str, FilteredSet]
"""Sets by name, before the split; a run passes one dict, and so reads every source once."""

_Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """One set, ready for a trainer.

    Attributes:
        train: Rows to train on.
        held_out: Rows to measure on; no set trains on their first user turns.
        report: For `record.data[SET]`: `sources`, `counts` ({filter: {before, after}}), `train`,
            `held_out`, `read_as`, `rows`, `special_tokens_in_text`, `notes`, and
            `labeler_agreement`, `instructions` or `evaluate` if there is one. Plain JSON, without
            local folders.
        lines: What a run prints of the set, with one row as the model sees it.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    report: dict[str, Any]
    lines: list[str] = field(default_factory=list)


def demonstrations(recipe: Recipe, tokenizer: Any, loaded: Loaded | None = None) -> Prepared:
    """Build the set for SFT: `prompt` and `completion`, both text or both messages.

    Raises:
        DataError: A source cannot be read or does not fit, or too few rows are left.
        TokenizerError: Messages, but the tokenizer has no chat template.
    """
    loaded = {} if loaded is None else loaded
    kept = _load(recipe, tokenizer, "demonstrations", loaded)
    train, held_out = _split(recipe, kept)
    train = _trained(recipe, tokenizer, kept, train, loaded)
    return _prepared(recipe, tokenizer, kept, train, held_out)


def comparisons(
    recipe: Recipe,
    tokenizer: Any,
    sampler: Sampler | None = None,
    part: Literal["all", "proxy", "held_out_model"] = "all",
    loaded: Loaded | None = None,
) -> Prepared:
    """Build the set for the reward model: `prompt`, `chosen`, `rejected`, `group`, `margin`.

    `group` numbers the prompts; `margin` is left out unless every row has one. Held-out rows of a
    task also have `gold_margin`: the gold reward of chosen minus that of rejected.

    Args:
        sampler: Draws the completions that the simulated labelers of a task rank.
        part: The proxy reward model and the held-out one train on halves with no prompt in
            common; both are measured on the same held-out rows.

    Raises:
        DataError: A source cannot be read or does not fit, or too few rows are left.
        TokenizerError: Messages, but the tokenizer has no chat template.
        ValueError: A task source without a sampler, or a wrong number of completions from it.
    """
    loaded = {} if loaded is None else loaded
    kept = _load(recipe, tokenizer, "comparisons", loaded, sampler)
    train, held_out = _split(recipe, kept)
    if part != "all":
        middle = (1 + recipe.data.held_out) / 2
        train = kept.filter(
            f"part {part}",
            train,
            lambda row: (bucket(row["prompt"], recipe.seed) < middle) == (part == "proxy"),
        )
    train = _trained(recipe, tokenizer, kept, train, loaded)
    if all(row["item"] for row in held_out):
        for row in held_out:
            item = Item.from_dict(json.loads(row["item"]))
            chosen, rejected = (check(item, text_of(row[k])).reward for k in ("chosen", "rejected"))
            row["gold_margin"] = chosen - rejected
    return _prepared(recipe, tokenizer, kept, train, held_out)


def prompts(recipe: Recipe, tokenizer: Any, loaded: Loaded | None = None) -> Prepared:
    """Build the set for rollouts and, as `held_out`, for the evaluation: `prompt`.

    Prompts of a task also have `item`: JSON for `checkers.Item.from_dict`. The held-out side is
    `data.evaluate` if the recipe has it.

    Raises:
        DataError: A source cannot be read or does not fit, or too few rows are left.
        TokenizerError: Messages, but the tokenizer has no chat template.
    """
    loaded = {} if loaded is None else loaded
    kept = _load(recipe, tokenizer, "prompts", loaded)
    side, held_out = _split(recipe, kept)
    train = _trained(recipe, tokenizer, kept, side, loaded)
    if not recipe.data.evaluate:
        return _prepared(recipe, tokenizer, kept, train, held_out)
    evaluate = _load(recipe, tokenizer, "evaluate", loaded)
    # Prompts that other sets hold out stay excluded, so that no set is tested on training prompts.
    kept.counts["held out in other sets"] = {"before": len(kept.rows), "after": len(side)}
    return _prepared(recipe, tokenizer, kept, train, evaluate.rows, evaluate.report())


def unlabelled(recipe: Recipe, tokenizer: Any) -> tuple[_Rows, list[Turns]]:
    """Return the prompts without a comparison (`prompt`, `item`), and the prompts that have one.

    One prompt of each conversation, on both sides of the split, since comparisons are split in the
    same way; none of `data.evaluate`.
    """
    kept, labelled = FilteredSet("comparisons"), list[Turns]()
    for index, source in enumerate(recipe.data.comparisons):
        if not source.task:
            parsed = _parse(recipe, source, f"comparisons/{index}", tokenizer, None, kept)
            labelled += [example.prompt for _, example in parsed]
    seen = {prompt_key(prompt) for prompt in labelled}
    rows = {prompt_key(r["prompt"]): r for r in _load(recipe, tokenizer, "prompts", {}).rows}
    return [row for key, row in rows.items() if key not in seen], labelled


def texts(
    recipe: Recipe, tokenizer: Any, loaded: Loaded | None = None
) -> tuple[list[list[int]], dict[str, Any]]:
    """Tokenise `data.text` for PPO-ptx, in pieces of at most `data.max_tokens`, with its report.

    A document ends with an eos; a longer one is cut into pieces. A last piece of a single token is
    dropped, since it predicts nothing.

    Raises:
        DataError: A source cannot be read, more rows than its `skip_bad` hold no text, or nothing
            is left.
    """
    kept, pieces, count = FilteredSet("text"), [], 0
    for index, source in enumerate(recipe.data.text):
        skips = Skips(source.skip_bad)
        rows = read(source, skips)
        lines = len(rows) + len(skips.seen)
        parsed = examples(rows, "text", False, kept.notes, skips, source, kept.layouts)
        documents = [one for one in parsed if one]
        kept.count_broken(skips, lines)
        kept.sources.append(described(source, rows))
        random.Random(f"{recipe.seed}/text/{index}").shuffle(documents)
        documents = [one for one in documents[: source.limit] if text_of(one.prompt).strip()]
        documents = near_duplicates.drop(kept, personal_data.clean(kept, documents, recipe), recipe)
        documents = _uncontaminated(recipe, tokenizer, kept, documents, loaded or {})
        break_control_tokens(kept, documents, tokenizer)
        count += len(documents)
        for document in documents:
            [text] = prompt_ids(tokenizer, [document.prompt])
            ids = [*text, tokenizer.eos_token_id]
            step = recipe.data.max_tokens
            pieces += [ids[i : i + step] for i in range(0, len(ids), step)]
    whole = [piece for piece in pieces if len(piece) > 1]
    if not whole:
        raise DataError("data.text holds no text", remedy="give it text, or set ppo.ptx_coef to 0")
    totals = {"documents": count, "pieces": len(whole), "tokens": sum(map(len, whole))}
    return whole, {**kept.report(), **totals}


def _load(
    recipe: Recipe, tokenizer: Any, name: str, loaded: Loaded, sampler: Sampler | None = None
) -> FilteredSet:
    """Return a set before the split, with its own copy of the counts; read it if it is new."""
    if name not in loaded:
        loaded[name] = _read(recipe, tokenizer, name, loaded, sampler)
    return replace(loaded[name], counts=dict(loaded[name].counts))


def _read(
    recipe: Recipe, tokenizer: Any, name: str, loaded: Loaded, sampler: Sampler | None
) -> FilteredSet:
    """Read, convert, filter and mix the sources of one set."""
    sources: list[DataSource] = getattr(recipe.data, name)
    if not sources:
        raise DataError(
            f"the recipe names no {name}",
            expected=f"data.{name}: with at least one task:, path: or hub:",
            remedy="a file of comparisons also serves as demonstrations and as prompts: name the "
            "same file under each",
        )
    kept = FilteredSet(name)
    labelled = [
        pair
        for index, source in enumerate(sources)
        for pair in _parse(recipe, source, f"{name}/{index}", tokenizer, sampler, kept)
    ]
    mixed = [example for _, example in labelled]
    kept.counts["limit"] = {"before": kept.lines - kept.broken, "after": len(mixed)}
    if name == "comparisons":
        mixed = pair_labels(kept, mixed)
    if name == "demonstrations":
        mixed = call_tools(kept, mixed)
    if bad := sum(not e.good for e in mixed) if name == "demonstrations" else 0:
        mixed = [example for example in mixed if example.good]
        kept.counts["label is false"] = {"before": len(mixed) + bad, "after": len(mixed)}
    mixed = _of_users(recipe, kept, mixed)
    mixed = near_duplicates.drop(kept, personal_data.clean(kept, mixed, recipe), recipe)
    if len(sources) > 1:
        random.Random(f"{recipe.seed}/{name}").shuffle(mixed)
    if name == "comparisons":
        kept.agreement = _labeler_agreement(labelled) or kept.agreement
    note_damage(kept, mixed)
    break_control_tokens(kept, mixed, tokenizer)
    check_written(kept, mixed, tokenizer, recipe.data.max_lost)
    follow_template(kept, mixed, tokenizer)
    kept.rows = expand(kept, mixed)
    drop_useless(kept)
    drop_too_long(kept, recipe, tokenizer)
    if name == "comparisons" and recipe.data.identity_test:
        augmentation.identity_test(kept)
    if name != "evaluate" and not all(source.task for source in recipe.data.evaluate):
        # Not needed between splits of a task, which share no prompts.
        held_out = _load(recipe, tokenizer, "evaluate", loaded).rows
        keys = {prompt_key(row["prompt"]) for row in held_out}
        kept.rows = kept.filter(
            "in the evaluation set", kept.rows, lambda row: prompt_key(row["prompt"]) not in keys
        )
    if not all(source.task for source in sources):  # a task's samples are the model's behaviour
        check_losses(kept, recipe.data.max_lost)
        if name == "comparisons":
            note_length(kept)
    return kept


def _parse(
    recipe: Recipe,
    source: DataSource,
    number: str,
    tokenizer: Any,
    sampler: Sampler | None,
    kept: FilteredSet,
) -> list[tuple[Any, Example]]:
    """Return (labeler or None, example) for the usable rows of one source, shuffled and limited."""
    skips, chat = Skips(source.skip_bad), bool(tokenizer.chat_template)
    task = source.task is not None
    rows = _task_rows(recipe, source, kept, chat, sampler) if task else read(source, skips)
    kept.sources.append(described(source, rows))
    if source.path:
        people, stale = label_pool.beside(locate(source.path))
        if people:
            kept.sources[-1]["labelers"] = people
        elif stale:
            kept.notes[stale] += len(rows)
    if not task:
        rows = [*message_trees.rows_of(rows, kept.name, source.lang, kept.notes)]
        rows = helpsteer.rows_of(rows, kept.notes)
    if kept.name == "comparisons" and (task or source.labeler_instructions):
        kept.instructions.append(source.labeler_instructions or _SIMULATED)
    lines = len(rows) + len(skips.seen)
    order = list(range(len(rows)))
    if not task:  # a task's rows keep the order of its families
        random.Random(f"{recipe.seed}/{number}").shuffle(order)
    order = order[: source.limit]
    chosen = sorted(order)  # parsed in the file's order, so that errors show its first rows
    of_file = None if task else source
    given = [rows[i] for i in chosen]
    layouts = Counter({f"{source.task} task": len(rows)}) if task else Counter[str]()
    parsed = examples(given, kept.name, chat, kept.notes, skips, of_file, None if task else layouts)
    kept.layouts += layouts
    at = {i: example for i, example in zip(chosen, parsed, strict=True) if example is not None}
    for example in at.values():  # a column `item` of a file is not an item of the task
        example.item = example.item if task else ""
    kept.count_broken(skips, lines)
    return [(rows[i][1].get("labeler"), at[i]) for i in order if i in at]


def _task_rows(
    recipe: Recipe, source: DataSource, kept: FilteredSet, chat: bool, sampler: Sampler | None
) -> list[Row]:
    """Generate rows of the closed-world task; comparisons are also sampled and ranked."""
    try:
        if kept.name == "demonstrations":
            rows = generator.demonstrations(source.n, recipe.seed)
        else:
            items = generator.items(source.n, recipe.seed, kept.name)
            rows = [{"prompt": item.prompt, "item": item.to_dict()} for item in items]
    except ValueError as error:
        raise DataError(f"{source.task}, n: {source.n}: {error}", remedy="lower n") from None
    for row in rows:
        row["item"] = json.dumps(row["item"], sort_keys=True)
        text = row["prompt"]
        row["prompt"] = [{"role": "user", "content": text}] if chat else text + "\n"
    if kept.name == "comparisons":
        if sampler is None:
            raise ValueError("comparisons of a task need a sampler")
        k = source.completions
        sampled = sampler([row["prompt"] for row in rows], k, recipe.seed)
        if len(sampled) != len(rows) or any(len(completions) != k for completions in sampled):
            raise ValueError(f"the sampler must give {k} completions for each prompt")
        ranked, kept.agreement = labelers.rank_all(items, sampled, source.agreement, recipe.seed)
        for row, completions, ranks in zip(rows, sampled, ranked, strict=True):
            row["completions"], row["ranks"] = list(completions), ranks
    return [(f"{source.task} row {number}", row) for number, row in enumerate(rows, start=1)]


def _labeler_agreement(labelled: list[tuple[Any, Example]]) -> dict[str, Any] | None:
    """Measure how labelers agree on pairs that several of them judged (column `labeler`).

    Every two labelers of a pair are one outcome; ties are left out. Measured before duplicates and
    contradictions are dropped. None if no pair was judged twice.
    """
    votes: dict[tuple[str, str, str], dict[str, bool]] = {}
    for labeler, example in labelled:
        answers = () if labeler is None else example.answers
        for a, b in itertools.combinations(range(len(answers)), 2):
            ranks = example.ranks or []
            first, second = (json.dumps(answers[i]) for i in (a, b))
            if first == second or ranks[a] == ranks[b]:
                continue
            key = (json.dumps(example.prompt), min(first, second), max(first, second))
            votes.setdefault(key, {})[str(labeler)] = (ranks[a] < ranks[b]) == (first < second)
    same = [
        (key[0], a == b)
        for key, by_labeler in votes.items()
        for a, b in itertools.combinations(by_labeler.values(), 2)
    ]
    if not same:
        return None
    names = {labeler for by_labeler in votes.values() for labeler in by_labeler}
    agreement = labelers.measured([agree for _, agree in same], [prompt for prompt, _ in same])
    return {**agreement, "labelers": len(names)}


def _of_users(recipe: Recipe, kept: FilteredSet, mixed: list[Example]) -> list[Example]:
    """Keep at most `data.max_prompts_per_user` prompts of one user, where rows name their users."""
    users = [example.user for example in mixed if example.user]
    if not users:
        return mixed
    most = recipe.data.max_prompts_per_user
    prompts_of: dict[str, set[str]] = {}
    left = []
    for example in mixed:
        own = prompts_of.setdefault(example.user, set())
        own |= {prompt_key(example.prompt)} if len(own) < most else set()
        if not example.user or prompt_key(example.prompt) in own:
            left.append(example)
    reason = f"over data.max_prompts_per_user = {most}"
    kept.counts[reason] = {"before": len(mixed), "after": len(left)}
    kept.more["users"] = len({*users})
    if len(users) < len(mixed):
        kept.notes["rows that name no user are split by prompt"] += len(mixed) - len(users)
    return left


def _split(recipe: Recipe, kept: FilteredSet) -> tuple[_Rows, _Rows]:
    """Split by user where a row names one, else by prompt; no held-out prompt is trained on."""
    sides: tuple[_Rows, _Rows] = ([], [])
    for row in kept.rows:
        side = bucket(row.get("user") or row["prompt"], recipe.seed) < recipe.data.held_out
        sides[side].append(row)
    train, held_out = sides
    if any(row.get("user") for row in kept.rows):
        keys = {prompt_key(row["prompt"]) for row in held_out}
        reason = "prompts that a held-out user wrote too"
        train = kept.filter(reason, train, lambda row: prompt_key(row["prompt"]) not in keys)
    return train, held_out


def _trained(
    recipe: Recipe, tokenizer: Any, kept: FilteredSet, train: _Rows, loaded: Loaded
) -> _Rows:
    """Return the training rows without evaluation prompts and with augmented rows."""
    train = _unasked(recipe, tokenizer, kept, train, loaded)
    if recipe.data.contamination != "keep" and not all(row["item"] for row in train):
        sets = _evaluation_prompts(recipe, tokenizer, loaded)
        train = contamination.clean(kept, train, sets, recipe.data.contamination)
        lost = {key: n for key, n in kept.counts.items() if key == contamination.OVERLAP}
        check_losses(FilteredSet(kept.name, counts=lost), recipe.data.max_lost)
    shares = recipe.data.augment.model_dump()
    if not any(shares.values()):
        return train
    made = augmentation.new_rows(train, shares, f"{recipe.seed}/augment", kept.name)
    keys = {
        prompt_key(row["prompt"])
        for name in ("evaluate", "prompts")
        for row in (loaded[name].rows if name in loaded else ())
    }
    made = [
        row
        for row in made
        if bucket(row["prompt"], recipe.seed) >= recipe.data.held_out
        and prompt_key(row["prompt"]) not in keys
    ]
    limited = FilteredSet(kept.name, made)
    data = recipe.data.model_copy(update={"max_lost": 1.0})
    drop_too_long(limited, recipe.model_copy(update={"data": data}), tokenizer)
    kept.more["augmented"] = dict(Counter(map(_marked, limited.rows)))
    marked = [{**row, "augmented": _marked(row)} for row in (*train, *limited.rows)]
    random.Random(f"{recipe.seed}/augmented/{kept.name}").shuffle(marked)
    return marked


def _unasked(
    recipe: Recipe, tokenizer: Any, kept: FilteredSet, train: _Rows, loaded: Loaded
) -> _Rows:
    """Return the rows of a set whose prompts are not held out by the users of `data.prompts`.

    Where prompts are split by prompt, all sets agree on the side of each anyway.
    """
    files = not all(source.task for source in recipe.data.prompts)
    if kept.name == "prompts" or recipe.data.evaluate or not files:
        return train
    try:
        prompts = _load(recipe, tokenizer, "prompts", loaded)
    except DataError:  # an error of the stages that read them, which may not be asked for
        kept.notes["data.prompts cannot be read, so its held-out users are unknown"] += 1
        return train
    if "users" not in prompts.more:
        return train
    keys = {prompt_key(row["prompt"]) for row in _split(recipe, prompts)[1]}
    reason = "in the evaluation set"
    return kept.filter(reason, train, lambda row: prompt_key(row["prompt"]) not in keys)


def _uncontaminated(
    recipe: Recipe, tokenizer: Any, kept: FilteredSet, documents: list[Example], loaded: Loaded
) -> list[Example]:
    """Return the documents of plain text that overlap no evaluation prompt."""
    if recipe.data.contamination == "keep":
        return documents
    rows = [{"prompt": one.prompt, "item": "", "document": one} for one in documents]
    sets = _evaluation_prompts(recipe, tokenizer, loaded)
    left = contamination.clean(kept, rows, sets, recipe.data.contamination)
    return [row["document"] for row in left]


def _marked(row: dict[str, Any]) -> str:
    """Return how a row was made by augmentation; "" for a given one."""
    return str(row.get("augmented", ""))


def _evaluation_prompts(recipe: Recipe, tokenizer: Any, loaded: Loaded) -> dict[str, list[str]]:
    """Return the texts of all prompts that something is evaluated on, by set."""
    rows: _Rows = []
    if recipe.data.evaluate:
        rows = _load(recipe, tokenizer, "evaluate", loaded).rows
    elif recipe.data.prompts:
        rows = _split(recipe, _load(recipe, tokenizer, "prompts", loaded))[1]
    sets = {"evaluate": [text_of(row["prompt"]) for row in rows if not row["item"]]}
    for row in loaded[contamination.SUITES].rows if contamination.SUITES in loaded else ():
        sets.setdefault(row["set"], []).append(row["prompt"])
    return {name: texts for name, texts in sets.items() if texts}


def _prepared(
    recipe: Recipe,
    tokenizer: Any,
    kept: FilteredSet,
    train: _Rows,
    held_out: _Rows,
    evaluate: dict[str, Any] | None = None,
) -> Prepared:
    if min(len(train), len(held_out)) < 2:
        lost = {reason: n["before"] - n["after"] for reason, n in kept.counts.items()}
        worst = max(lost, key=lost.__getitem__)
        remedy = f"give more rows, or another share than data.held_out = {recipe.data.held_out}"
        alike = len({prompt_key(row["prompt"]) for row in (*train, *held_out)}) == 1
        if alike:
            remedy = "all rows have the same first user turn, by which they are split: write what "
            remedy += "is the same in each into a system message, or give other conversations too"
        if worst == "in the evaluation set":
            remedy = "leave data.evaluate out: then a share of the prompts is held out instead"
        elif lost[worst] > (len(train) + len(held_out) if alike else 0):
            remedy = f"most rows were dropped as: {worst}; correct that, or give more rows"
        refused = [note for note in kept.notes if note.startswith(REFUSES)]
        raise DataError(
            f"too few {kept.name}: {len(train)} rows are left to train on and {len(held_out)} to "
            f"test on{kept.table()}{kept.first(worst)}"
            + "".join(f"\n  {note}" for note in refused[:3]),
            expected="two or more on either side",
            remedy=remedy,
        )
    report = {**kept.report(), "train": len(train), "held_out": len(held_out)}
    report |= {"evaluate": evaluate} if evaluate else {}
    lines = summaries.lines(kept.name, report, train[0], tokenizer)
    if recipe.ppo.function:
        train, held_out = _with_columns(train), _with_columns(held_out)
    return Prepared(_dataset(train), _dataset(held_out), report, lines)


def _with_columns(rows: _Rows) -> _Rows:
    """Give rows of prompts the other columns of their file, which a reward function may take."""
    names = dict.fromkeys(name for row in rows for name in row.get("columns", ()))
    return [{**dict.fromkeys(names), **row.get("columns", {}), **row} for row in rows]


def _dataset(rows: _Rows) -> datasets.Dataset:
    import datasets
    from pyarrow import lib  # type: ignore[import-untyped]

    prompts_only = not {"chosen", "completion"} & rows[0].keys()
    dropped = {"_tokens", "user", "columns", "_where"}
    if not (prompts_only and any(row["item"] for row in rows)):
        dropped.add("item")
    kept = [{key: value for key, value in row.items() if key not in dropped} for row in rows]
    try:
        return datasets.Dataset.from_list(kept)
    except (lib.ArrowInvalid, lib.ArrowTypeError) as error:
        raise DataError(
            f"a column of the prompts holds values of several types: {first_line(error)}",
            expected="one type in each column, which the reward function gets",
            remedy="write all its values as text, or leave it out with `ignore: [column]`",
        ) from None
