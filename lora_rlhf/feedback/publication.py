# SPDX-License-Identifier: Apache-2.0
"""A project's labels as a dataset on the Hub, with a card that is filled from the store."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from lora_rlhf.data import personal_data, row_formats, sources
from lora_rlhf.data.label_pool import SUFFIX
from lora_rlhf.errors import DataError, UsageError, counted
from lora_rlhf.hub import staging
from lora_rlhf.hub.repository import Repository
from lora_rlhf.recipe.schema import DataSource
from lora_rlhf.reports.cards.card_facts import slug
from lora_rlhf.reports.cards.card_markdown import cell, code
from lora_rlhf.runs.disk import sha256, write_atomically

from . import exchange, foreign_formats, label_files, project
from .labels import Label, Task, personal
from .project import Project

CONFIGS = {
    "comparisons": ("ranking", "pair", "rating"),
    "demonstrations": ("demonstration",),
}
"""Part of the dataset -> types of tasks whose labels it holds."""


@dataclass(frozen=True)
class Request:
    """Repository, licence and what is published beside the labels.

    Args:
        licence: As the Hub spells it; None: the card says that none is stated.
        prompts: File of evaluation prompts to publish as well.
        without: Labelers whose labels are left out.
    """

    repo_id: str
    public: bool = False
    licence: str | None = None
    prompts: Path | None = None
    without: tuple[str, ...] = ()


def push(folder: Path, request: Request, token: str | None = None) -> dict[str, Any]:
    """Publish a project's labels in one commit; private unless asked otherwise.

    Returns:
        `url`, `commit`, `files`, `private`, and `notes` for the user.

    Raises:
        DataError: There are no labels to publish.
        HubError: A check failed before anything was sent, or the Hub could not be reached.
    """
    there = project.load(folder)
    again = f"lora-rlhf data push {shlex.quote(str(folder))} {request.repo_id}"
    hub = Repository(
        request.repo_id, token, request.public, again, "the push of the dataset", kind="dataset"
    )
    with tempfile.TemporaryDirectory(prefix="lora-rlhf-data-") as name:
        files = stage(there, request, Path(name))
        hub.check_access()
        return hub.upload(Path(name), files, f"labels of {there.settings.name}")


def stage(there: Project, request: Request, folder: Path) -> list[str]:
    """Write the files of the dataset into a folder, check them, and return their names."""
    with there.store(readonly=True) as store:
        tasks, labels, groups = store.tasks(), store.labels(), store.labelers()
        guidelines = store.guidelines()
    key, names = exchange.pseudonym_key(there.folder), dict[str, str]()
    for labeler in {label.labeler for label in labels}:
        names[labeler] = foreign_formats.pseudonym(key, "labeler", labeler)
    if unknown := {*request.without} - {*names}:
        raise UsageError(f"there is no label by {min(unknown)!r}", remedy="check --without")
    without = {names[labeler] for labeler in request.without}
    renamed = [replace(label, labeler=names[label.labeler]) for label in labels]
    (folder / "data").mkdir()
    about: dict[str, dict[str, Any]] = {}
    for part, types in CONFIGS.items():
        if any(task.type in types and task.gold is None for task in tasks):
            about |= _part(there, part, folder, (tasks, renamed), groups, names, without)
    if not about:
        raise DataError("there are no labels to publish", where=str(there.folder))
    if request.prompts is not None:
        about["prompts"] = _prompts(request.prompts, folder / "data" / "prompts.jsonl")
    for sha, text in (guidelines or {there.guidelines().sha256: there.guidelines().text}).items():
        path = folder / "guidelines" / f"{sha[:16]}.md"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, text)
    held = personal_data.count(_texts(folder / "data"))
    card = _card(there, request, (tasks, labels), about, folder, _personal(tasks, labels, held))
    write_atomically(folder / "README.md", card)
    files = staging.file_names(folder)
    local = [str(there.folder.resolve())]
    staging.scan(folder, [name for name in files if name != "README.md"], local, paths=False)
    staging.scan(folder, ["README.md"], local)
    return files


def _part(
    there: Project,
    part: str,
    folder: Path,
    given: tuple[list[Task], list[Label]],
    groups: Mapping[str, str | None],
    names: Mapping[str, str],
    without: Collection[str],
) -> dict[str, dict[str, Any]]:
    """Write the labels of one part; returns its description, or nothing if it has no rows."""
    path = folder / "data" / f"{part}.jsonl"
    theirs = {names[who]: group for who, group in groups.items() if who in names}
    cut_offs = there.settings.screening.model_dump()
    try:
        summary = label_files.export(*given, path, part, without, theirs, cut_offs)
    except DataError as error:
        if error.given.startswith(label_files.NOTHING):
            return {}
        raise
    pool = json.loads(path.with_name(path.name + SUFFIX).read_text(encoding="utf-8"))
    return {part: {"summary": summary.split(": ", 1)[1], "pool": pool}}


def _prompts(given: Path, path: Path) -> dict[str, Any]:
    """Write evaluation prompts, each as turns and nothing else."""
    rows = sources.read(DataSource(path=str(given)), sources.Skips())
    parsed = row_formats.examples(rows, "prompts", True, Counter(), sources.Skips())
    lines = [json.dumps({"prompt": one.prompt}, ensure_ascii=False) for one in parsed if one]
    write_atomically(path, "\n".join(lines) + "\n")
    return {"summary": f"{len(lines)} evaluation prompts, never to be trained on"}


# --------------------------------------------------------------------------------- card


def _card(
    there: Project,
    request: Request,
    given: tuple[list[Task], list[Label]],
    about: Mapping[str, dict[str, Any]],
    folder: Path,
    about_people: list[str],
) -> str:
    meta: dict[str, Any] = {"pretty_name": there.settings.name}
    if request.licence:
        meta["license"] = slug(request.licence)
    meta["tags"] = ["lora-rlhf", "human-feedback", "rlhf"]
    split = {"prompts": "test"}
    meta["configs"] = [
        {
            "config_name": part,
            "data_files": [{"split": split.get(part, "train"), "path": f"data/{part}.jsonl"}],
        }
        for part in about
    ]
    first = next(iter(about))
    sections = {
        "What it holds": [f"- {code(part)}: {cell(one['summary'])}" for part, one in about.items()],
        "Who labelled": [line for part, one in about.items() for line in _people(part, one)],
        "How": _how(there, given),
        "Guidelines": _guidelines(given[1], folder),
        "Personal data": about_people,
        "Licence": [cell(request.licence or "Not stated: ask before you use it.")],
        "Versions": [
            f"- lora-rlhf {version('lora-rlhf')}, project format {there.settings.version}",
            *(f"- {code(f'data/{part}.jsonl')}: sha256 "
              f"{code(sha256(folder / 'data' / f'{part}.jsonl'))}" for part in about),
        ],
        "Use": [
            "```python\nimport datasets\n\n"
            f'rows = datasets.load_dataset("{request.repo_id}", "{first}")\n```',
            "",
            f"In a recipe: `{first}: [{{hub: {request.repo_id}, name: {first}}}]` under `data:`.",
        ],
    }  # fmt: skip
    text = "".join(f"\n## {title}\n\n" + "\n".join(s) + "\n" for title, s in sections.items())
    header = yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n\n# {cell(there.settings.name)}\n{text}"


def _people(part: str, one: Mapping[str, Any]) -> list[str]:
    """Return lines on the labelers of a part, in counts, and on their agreement."""
    if (pool := one.get("pool")) is None:
        return []
    kinds = ", ".join(f"{cell(kind)} {n}" for kind, n in pool["by_type"].items())
    people = "1 person" if pool["people"] == 1 else f"{pool['people']} people"
    lines = [
        f"- {code(part)}: {counted(pool['labels'], 'label')} by {people} ({kinds}); labels of "
        f"{pool['left_out']} more were left out"
    ]
    groups = ", ".join(f"{cell(group)} {n}" for group, n in pool["groups"].items())
    if groups:
        lines.append(f"- People by self-described group (of five or more): {groups}")
    for name, numbers in pool["agreement"].items():
        raw, alpha, tau = (numbers[key] for key in ("raw", "alpha", "kendall"))
        figures = [
            f"raw {_share(raw)}" if raw else "",
            f"Krippendorff's alpha {alpha:.2f}" if alpha is not None else "",
            f"Kendall's tau {_share(tau)}" if tau else "",
        ]
        lines.append(
            f"- Agreement on {cell(name)} ({counted(numbers['questions'], 'question')} with two "
            f"answers or more): {'; '.join(figure for figure in figures if figure)}"
        )
    if not pool["agreement"]:
        lines.append("- Agreement: not measured, since nothing was labelled twice")
    return lines


def _share(one: Mapping[str, Any]) -> str:
    low, high = one["low"], one["high"]
    between = f" [{low:.2f}, {high:.2f}]" if low is not None else ""
    return f"{one['value']:.2f}{between} (n = {one['n']})"


def _how(there: Project, given: tuple[list[Task], list[Label]]) -> list[str]:
    settings, (tasks, labels) = there.settings, given
    # After a colon comes what one task alone has, such as the text of a prompt that failed.
    why = Counter(
        task.why.partition(":")[0].strip() or "not recorded" for task in tasks if task.gold is None
    )
    days = sorted(label.created[:10] for label in labels if label.created)
    span = f", {days[0]} to {days[-1]}" if days else ""
    return [
        "- People saw a prompt and answers without names of models, in an order drawn for each of "
        "them, or used another tool whose export was imported",
        f"- {counted(len(tasks), 'task')}, of which "
        f"{sum(task.gold is not None for task in tasks)} with a known right value, which are not "
        f"published{span}",
        f"- {counted(settings.labels_per_task, 'label')} a task; "
        f"{settings.labels_per_overlap} for a share of {settings.overlap:g} of them",
        "- Prompts were chosen: " + ", ".join(f"{cell(key)} ({n})" for key, n in why.items()),
        f"- Both bad: {sum(label.both_bad for label in labels)}; skipped: "
        f"{sum(label.value is None for label in labels)}; notes of labelers are not published",
    ]


def _guidelines(labels: list[Label], folder: Path) -> list[str]:
    used = Counter(label.guidelines for label in labels)
    lines = [
        f"- [{path.stem}](guidelines/{path.name}): sha256 beginning {code(path.stem)}, "
        f"{counted(sum(n for sha, n in used.items() if sha.startswith(path.stem)), 'label')}"
        for path in sorted((folder / "guidelines").glob("*.md"))
    ]
    return lines + [f"- not recorded: {counted(used[''], 'label')}"] * bool(used[""])


def _personal(tasks: list[Task], labels: list[Label], held: Mapping[str, int] | None) -> list[str]:
    """Return lines on personal data: what labelers flagged, and what a program counted."""
    if held is None:
        searched = (
            "No program searched the texts for personal data, as the extra `hygiene` was not "
            "installed."
        )
    else:
        kinds = ", ".join(f"{kind} {n}" for kind, n in held.items()) or "none"
        searched = f"A program searched what is published for personal data and counted: {kinds}."
    return [
        f"Tasks left out because a labeler flagged their prompt or an answer to it: "
        f"{len(personal(tasks, labels))}. {searched} A recipe's `data.personal_data` can redact "
        "it. Labelers have pseudonyms that are not those they chose."
    ]


def _texts(folder: Path) -> Iterator[str]:
    """Yield every text in the rows of the data files."""
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:  # a text may hold other ends of a line
            for line in lines:
                yield from _leaves(json.loads(line))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
