# SPDX-License-Identifier: Apache-2.0
"""From the recipe's sources to datasets in TRL's formats, split by prompt, with every row counted.

A prompt is on the same side of the split in all sets: `bucket` looks at the seed and at the first
user turn only, so prompts that are prefixes of one conversation stay together, and what a reward
model was trained on is never what it is tested on. Evaluation prompts are in no other set.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lora_rlhf.errors import DataError
from lora_rlhf.estimates import Estimate, share_interval
from lora_rlhf.recipe.schema import DataSource, Recipe

from .closed_world import checkers, generator
from .filters import Kept, bucket, clean, expand, first_turn, fit, neutralise, prompt_key
from .row_formats import Example, Turns, examples, plain_texts, text_of
from .sources import Row, Skips, described, read

if TYPE_CHECKING:
    import datasets

__all__ = [
    "Prepared", "bucket", "comparisons", "demonstrations", "first_turn", "prompts", "texts",
]  # fmt: skip

_SIMULATED = "none: simulated, by the task's exact checker with noise"

Sampler = Callable[[list[Turns], int, int], list[list[str]]]
"""(prompts, k, seed) -> k completions for each prompt."""

Loaded = dict[str, Kept]
"""Sets by name, before they are split: what one run has read, it does not read again."""


@dataclass(frozen=True)
class Prepared:
    """One set, ready for a trainer.

    Attributes:
        train: Rows to train on.
        held_out: Rows to measure on; no first user turn of theirs is trained on in any set.
        report: For `record.data[SET]`: `sources`, `counts` ({filter: {before, after}}), `train`,
            `held_out`, `special_tokens_in_text`, `notes`, and `labeler_agreement`, `instructions`
            or `evaluate` where there is one. Plain JSON, without folders of this machine.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    report: dict[str, Any]


def demonstrations(recipe: Recipe, tokenizer: Any, loaded: Loaded | None = None) -> Prepared:
    """The set for SFT, with columns `prompt` and `completion` (both text, or both messages).

    Raises:
        DataError: A source cannot be read or does not fit, or too few rows are left.
        TokenizerError: Messages, but the tokenizer has no chat template.
    """
    kept = _load(recipe, tokenizer, "demonstrations", {} if loaded is None else loaded)
    return _prepared(recipe, kept, *_sides(recipe, kept.rows))


def comparisons(
    recipe: Recipe,
    tokenizer: Any,
    sampler: Sampler | None = None,
    part: Literal["all", "proxy", "held_out_model"] = "all",
    loaded: Loaded | None = None,
) -> Prepared:
    """The set for the reward model: `prompt`, `chosen`, `rejected`, `group`, perhaps `margin`.

    `group` is an int that is the same for all pairs of one prompt. Held-out rows of a task have
    `gold_margin` too, what its exact checker gives the chosen completion less the rejected one.

    Args:
        recipe: The run's recipe.
        tokenizer: Decides between text and messages, and counts tokens.
        sampler: Draws the completions that the simulated labelers of a task rank.
        part: The proxy reward model and the held-out one train on halves with no prompt in
            common; both are measured on the same held-out rows.
        loaded: What the run has read already.

    Raises:
        DataError: A source cannot be read or does not fit, or too few rows are left.
        TokenizerError: Messages, but the tokenizer has no chat template.
        ValueError: A task source without a sampler, or a sampler that returns something else.
    """
    kept = _load(recipe, tokenizer, "comparisons", {} if loaded is None else loaded, sampler)
    train, held_out = _sides(recipe, kept.rows)
    if part != "all":
        middle = (1 + recipe.data.held_out) / 2
        train = kept.filter(
            f"part {part}",
            train,
            lambda row: (bucket(row["prompt"], recipe.seed) < middle) == (part == "proxy"),
        )
    if all(row["item"] for row in held_out):
        for row in held_out:
            item = checkers.Item.from_dict(json.loads(row["item"]))
            chosen, rejected = (
                checkers.check(item, text_of(row[k])).reward for k in ("chosen", "rejected")
            )
            row["gold_margin"] = chosen - rejected
    return _prepared(recipe, kept, train, held_out)


def prompts(recipe: Recipe, tokenizer: Any, loaded: Loaded | None = None) -> Prepared:
    """The prompts of the rollouts, and those of the evaluation as `held_out`; column `prompt`.

    Prompts of a task have a column `item` too: JSON that `tasks.Item.from_dict` takes. The
    held-out side is `data.evaluate` where that is given.

    Raises:
        DataError: A source cannot be read or does not fit, or too few rows are left.
        TokenizerError: Messages, but the tokenizer has no chat template.
    """
    loaded = {} if loaded is None else loaded
    kept = _load(recipe, tokenizer, "prompts", loaded)
    train, held_out = _sides(recipe, kept.rows)
    if not recipe.data.evaluate:
        return _prepared(recipe, kept, train, held_out)
    evaluate = _load(recipe, tokenizer, "evaluate", loaded)
    # Still without the rows that other sets hold out: nothing is tuned on what a set is tested on.
    kept.counts["held out in other sets"] = {"before": len(kept.rows), "after": len(train)}
    found = _prepared(recipe, kept, train, evaluate.rows)
    found.report["evaluate"] = evaluate.report()
    return found


def texts(recipe: Recipe, tokenizer: Any) -> tuple[list[list[int]], dict[str, Any]]:
    """Token ids of `data.text` for PPO-ptx, in pieces of at most `data.max_tokens`; its report.

    A document ends with an eos; one that is longer is cut, and nothing of it is lost but a last
    piece of one token, which predicts nothing.

    Raises:
        DataError: A source cannot be read, more rows than its `skip_bad` hold no text, or nothing
            is left.
    """
    kept, pieces, documents = Kept("text"), [], 0
    for index, source in enumerate(recipe.data.text):
        skips = Skips(source.skip_bad)
        rows = read(source, skips)
        lines = len(rows) + len(skips.seen)
        good = plain_texts(rows, skips)
        kept.broken(skips, lines)
        kept.sources.append(described(source, rows))
        random.Random(f"{recipe.seed}/text/{index}").shuffle(good)
        found = [Example(text) for text in good[: source.limit] if text.strip()]
        neutralise(kept, found, tokenizer)
        documents += len(found)
        for example in found:
            ids = [*tokenizer(example.prompt)["input_ids"], tokenizer.eos_token_id]
            step = recipe.data.max_tokens
            pieces += [ids[i : i + step] for i in range(0, len(ids), step)]
    whole = [piece for piece in pieces if len(piece) > 1]
    if not whole:
        raise DataError("data.text holds no text", remedy="give it text, or set ppo.ptx_coef to 0")
    report = {
        **kept.report(),
        "documents": documents,
        "pieces": len(whole),
        "tokens": sum(map(len, whole)),
    }
    return whole, report


def _load(
    recipe: Recipe, tokenizer: Any, name: str, loaded: Loaded, sampler: Sampler | None = None
) -> Kept:
    """One set, nothing split yet: read once, and given out with counts of its own."""
    if name not in loaded:
        loaded[name] = _read(recipe, tokenizer, name, loaded, sampler)
    return replace(loaded[name], counts=dict(loaded[name].counts))


def _read(
    recipe: Recipe, tokenizer: Any, name: str, loaded: Loaded, sampler: Sampler | None
) -> Kept:
    """Read, convert, filter and mix the sources of one set."""
    sources: list[DataSource] = getattr(recipe.data, name)
    if not sources:
        raise DataError(
            f"the recipe names no {name}",
            expected=f"data.{name}: with at least one task:, path: or hub:",
            remedy="a file of comparisons also serves as demonstrations and as prompts: name the "
            "same file under each",
        )
    kept = Kept(name)
    found: list[Example] = []
    labelled: list[tuple[str, Example]] = []
    chat = bool(tokenizer.chat_template)
    wanted = "prompts" if name == "evaluate" else name
    read_rows = 0
    for index, source in enumerate(sources):
        skips = Skips(source.skip_bad)
        if source.task:
            rows = _task_rows(recipe, source, name, chat, sampler, kept)
        else:
            rows = read(source, skips)
        kept.sources.append(described(source, rows))
        if name == "comparisons" and (source.task or source.labeler_instructions):
            kept.instructions.append(source.labeler_instructions or _SIMULATED)
        lines = len(rows) + len(skips.seen)
        order = list(range(len(rows)))
        if not source.task:  # a task's rows come in the turn of its families, and stay in it
            random.Random(f"{recipe.seed}/{name}/{index}").shuffle(order)
        order = order[: source.limit]
        chosen = sorted(order)  # read in the file's order, so that errors show its first rows
        parsed = examples([rows[i] for i in chosen], wanted, chat, kept.notes, skips)
        at = {i: example for i, example in zip(chosen, parsed, strict=True) if example is not None}
        for example in at.values():  # a file's column `item` is its own, and no item of the task
            example.item = example.item if source.task else ""
        kept.broken(skips, lines)
        read_rows += lines - len(skips.seen)
        found += [at[i] for i in order if i in at]
        who = [(rows[i][1].get("labeler"), at[i]) for i in order if i in at]
        labelled += [(str(labeler), example) for labeler, example in who if labeler is not None]
    kept.counts["limit"] = {"before": read_rows, "after": len(found)}
    if len(sources) > 1:
        random.Random(f"{recipe.seed}/{name}").shuffle(found)
    if name == "comparisons" and labelled:
        kept.agreement = _overlap(labelled) or kept.agreement
    neutralise(kept, found, tokenizer)
    kept.rows = expand(found, wanted, kept)
    clean(kept)
    fit(kept, recipe, tokenizer)
    if name != "evaluate":
        _keep_apart(kept, recipe, tokenizer, loaded)
    return kept


def _task_rows(
    recipe: Recipe,
    source: DataSource,
    name: str,
    chat: bool,
    sampler: Sampler | None,
    kept: Kept,
) -> list[Row]:
    """Rows of the closed-world task; comparisons are sampled, scored and ranked here."""
    try:
        if name == "demonstrations":
            made = generator.demonstrations(source.n, recipe.seed)
        else:
            items = generator.items(source.n, recipe.seed, name)
            made = [{"prompt": item.prompt, "item": item.to_dict()} for item in items]
    except ValueError as error:
        raise DataError(f"{source.task}, n: {source.n}: {error}", remedy="lower n") from None
    for row in made:
        row["item"] = json.dumps(row["item"], sort_keys=True)
        row["prompt"] = (
            [{"role": "user", "content": row["prompt"]}] if chat else row["prompt"] + "\n"
        )
    if name == "comparisons":
        if sampler is None:
            raise ValueError("comparisons of a task need a sampler")
        _rank(made, items, sampler, recipe.seed, source, kept)
    return [(f"{source.task} row {number}", row) for number, row in enumerate(made, start=1)]


def _rank(
    rows: list[dict[str, Any]],
    items: list[checkers.Item],
    sampler: Sampler,
    seed: int,
    source: DataSource,
    kept: Kept,
) -> None:
    """Add sampled `completions` and a simulated labeler's `ranks`, and note how labelers agree.

    The labeler is calibrated on the pairs that were really drawn, so that two of them agree on
    the share that the recipe states; how often they did is measured on the same pairs.
    """
    sampled = sampler([row["prompt"] for row in rows], source.completions, seed)
    if len(sampled) != len(rows) or any(len(texts) != source.completions for texts in sampled):
        raise ValueError(f"the sampler must give {source.completions} completions for each prompt")
    gold = [
        [checkers.check(item, text).reward for text in texts]
        for item, texts in zip(items, sampled, strict=True)
    ]
    gaps = [pair for rewards in gold for pair in itertools.combinations(rewards, 2)]
    gaps = [(a, b) for a, b in gaps if a != b]
    if source.agreement >= 1 or not gaps:  # nothing to calibrate: the gold order itself
        labeler = generator.Labeler(source.agreement, temperature=1e-6)
    else:
        labeler = generator.Labeler.calibrated(source.agreement, gaps)
    first, second = (random.Random(f"{seed}/labeler/{who}") for who in "ab")
    same: list[bool] = []
    right: list[bool] = []
    where: list[int] = []
    for number, (row, texts, rewards) in enumerate(zip(rows, sampled, gold, strict=True)):
        ranks = labeler.rank(rewards, first), labeler.rank(rewards, second)
        row["completions"], row["ranks"] = list(texts), ranks[0]
        for a, b in itertools.combinations(range(len(texts)), 2):
            if rewards[a] != rewards[b]:
                chose = [rank[a] < rank[b] for rank in ranks]
                same.append(chose[0] == chose[1])
                right.append(chose[0] == (rewards[a] > rewards[b]))
                where.append(number)
    kept.agreement = {"asked": source.agreement, "measured": None, "pairs": len(same)}
    if same:
        # What a model that knew the gold reward would score: two labelers agree less often.
        kept.agreement |= _measured(same, where) | {"gold_right": sum(right) / len(right)}


def _measured(same: Sequence[bool], prompts: Sequence[Any]) -> dict[str, Any]:
    """The share of pairs on which two labelers agree, with its interval, clustered by prompt."""
    found: Estimate = share_interval(same, prompts)
    return {
        "measured": found["value"],
        "low": found["low"],
        "high": found["high"],
        "pairs": found["n"],
    }


def _overlap(labelled: list[tuple[str, Example]]) -> dict[str, Any] | None:
    """How labelers agree where several judged the same two completions (column `labeler`).

    Every two labelers of a pair are one outcome; pairs that one of them tied are left out. None:
    no pair was judged twice. Taken before duplicates and contradictions are dropped.
    """
    votes: dict[tuple[str, str, str], dict[str, bool]] = {}
    for labeler, example in labelled:
        for a, b in itertools.combinations(range(len(example.answers)), 2):
            ranks = example.ranks or []
            first, second = (json.dumps(example.answers[i]) for i in (a, b))
            if first == second or ranks[a] == ranks[b]:
                continue
            key = (json.dumps(example.prompt), min(first, second), max(first, second))
            votes.setdefault(key, {})[labeler] = (ranks[a] < ranks[b]) == (first < second)
    same = [
        (key[0], a == b)
        for key, found in votes.items()
        for a, b in itertools.combinations(found.values(), 2)
    ]
    if not same:
        return None
    labelers = len({labeler for found in votes.values() for labeler in found})
    prompts = [prompt for prompt, _ in same]
    return {**_measured([agree for _, agree in same], prompts), "labelers": labelers}


def _keep_apart(kept: Kept, recipe: Recipe, tokenizer: Any, loaded: Loaded) -> None:
    """Drop and count rows whose prompt is one of the evaluation's."""
    if all(source.task for source in recipe.data.evaluate):  # a task's splits share no content
        return
    keys = {prompt_key(row["prompt"]) for row in _load(recipe, tokenizer, "evaluate", loaded).rows}
    reason = "in the evaluation set"
    kept.rows = kept.filter(reason, kept.rows, lambda row: prompt_key(row["prompt"]) not in keys)


def _sides(
    recipe: Recipe, rows: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for row in rows:
        sides[bucket(row["prompt"], recipe.seed) < recipe.data.held_out].append(row)
    return sides


def _prepared(
    recipe: Recipe, kept: Kept, train: list[dict[str, Any]], held_out: list[dict[str, Any]]
) -> Prepared:
    if min(len(train), len(held_out)) < 2:
        raise _too_few(recipe, kept, len(train), len(held_out))
    report = {**kept.report(), "train": len(train), "held_out": len(held_out)}
    return Prepared(_dataset(train), _dataset(held_out), report)


def _too_few(recipe: Recipe, kept: Kept, train: int, held_out: int) -> DataError:
    lost = {reason: n["before"] - n["after"] for reason, n in kept.counts.items()}
    worst = max(lost, key=lost.__getitem__)
    remedy = f"give more rows, or another share than data.held_out = {recipe.data.held_out}"
    if lost[worst] > 0:
        remedy = f"most rows went by: {worst}; mend that, or give more rows"
    if worst == "in the evaluation set":
        remedy = "leave data.evaluate out: then a share of the prompts is held out instead"
    return DataError(
        f"of the {kept.name}, {train} rows are left to train on and {held_out} to test on"
        + kept.table(),
        expected="two or more on either side",
        remedy=remedy,
    )


def _dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    import datasets

    prompts_only = not {"chosen", "completion"} & rows[0].keys()
    dropped = (
        {"_tokens"} if prompts_only and any(row["item"] for row in rows) else {"_tokens", "item"}
    )
    kept = [{key: value for key, value in row.items() if key not in dropped} for row in rows]
    return datasets.Dataset.from_list(kept)
