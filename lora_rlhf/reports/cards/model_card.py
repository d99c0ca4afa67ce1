# SPDX-License-Identifier: Apache-2.0
"""The model card of one adapter, from the record alone; missing values are "not recorded"."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from lora_rlhf.errors import UsageError
from lora_rlhf.redaction import safe
from lora_rlhf.reports import kinds
from lora_rlhf.reports.tables import sentences
from lora_rlhf.runs.disk import write_atomically
from lora_rlhf.runs.metric_names import METRICS
from lora_rlhf.runs.record import Record
from lora_rlhf.runs.run_lock import locked
from lora_rlhf.runs.samples import sample_table

from . import card_snippets
from . import card_training as training
from .card_facts import MODELS, ROLES, Facts, front_matter, licence
from .card_limits import limits
from .card_markdown import (
    MISSING,
    at,
    bullets,
    cell,
    code,
    interval,
    is_number,
    number,
    paragraph,
    table,
)

_WHAT = {
    "policy": "the policy, which is the language model that answers people. It was trained from "
    "the SFT adapter with {algorithm} on {signal}, with {penalty} towards that SFT adapter",
    "reward": "the reward model, which scores a whole conversation. It was trained from the SFT "
    "adapter on comparisons of two answers",
    "value": "the value model, which predicts the expected return after every token. PPO needs it "
    "during training; it writes no text and is only of use for further training",
    "sft": "the supervised start, which is the base fine-tuned on demonstrations before any reward",
}
_TITLES = {"policy": "policy", "reward": "reward model", "value": "value model", "sft": "SFT"}
_START = {
    "sft": ("a new LoRA on the base", None),
    "reward": ("a copy of the SFT adapter", "sft"),
    "policy": ("a trainable copy of the SFT adapter", "sft"),
    "value": ("a copy of the reward adapter", "reward"),
}
"""Role -> its state before training, and the role that it was copied from."""


def render(record: Record, role: str, repo_ids: dict[str, str] | None = None) -> str:
    """Return the card of the adapter of `role`, as the text of its README.md.

    Args:
        record: The run; `samples.jsonl`, `metrics.jsonl`, `recipe.yaml` and the adapter's small
            JSON files are read from its folder, if they exist.
        role: policy, reward, value or sft.
        repo_ids: Hub ids by role, and of `base`; without an id for `role`, the code on the card
            loads the adapter from the folder of the card.

    Raises:
        UsageError: The role is unknown.
    """
    if role not in ROLES:
        raise UsageError(f"the role {role!r}", expected=f"one of {', '.join(ROLES)}")
    facts = Facts(record, role, repo_ids)
    writes, after_rl = role in ("policy", "sft"), role in ("policy", "value")
    method = "Preference optimisation" if facts.algorithm == "dpo" else "Reinforcement learning"
    first = {
        "": _summary(facts),
        "How to load": card_snippets.how_to_load(facts),
        "Limits": bullets(limits(facts)),
    }
    folded = {
        "Lineage": _lineage(facts),
        "LoRA": training.lora(facts),
        "Data": training.data(facts),
        "Supervised fine-tuning": training.sft(facts) if role == "sft" else "",
        "Reward model": training.reward(facts) if role != "sft" else "",
        method: training.reinforcement(facts) if after_rl else "",
        "Evaluation": _evaluation(facts) if writes else "",
        "Samples": _samples(facts) if writes else "",
        "Cost": _cost(facts),
        "How to merge": card_snippets.how_to_merge(facts),
        "How to reproduce": card_snippets.how_to_reproduce(facts),
    }
    names = ", ".join(title.lower() for title, body in folded.items() if body)
    text = front_matter(facts) + _sections(first)
    text += (
        f"\n<details>\n<summary>All details: {names}</summary>\n{_sections(folded)}\n</details>\n"
    )
    text = safe(text)
    ModelCard(text)  # raises if the Hub could not parse the card
    return text


def _sections(sections: dict[str, str]) -> str:
    heads = {title: f"## {title}\n\n" if title else "" for title in sections}
    return "".join(f"\n{heads[title]}{body}\n" for title, body in sections.items() if body)


def _result(facts: Facts) -> list[str]:
    """Return the point of the card, one sentence with its figure; nothing for SFT and value."""
    if facts.role == "policy":
        judge = facts.get("stages.reward.held_out_accuracy")
        known = isinstance(judge, dict) and is_number(judge.get("low"))
        metrics = facts.get("evaluation.policy") or {}
        finite = {name: one for name, one in metrics.items() if is_number(at(one, "value"))}
        accuracy: Any = judge if known else None
        sentence = sentences({"policy": finite}, facts.algorithm, accuracy=accuracy)[0]
        return [f"**Is it better than SFT?** {cell(sentence)}"]
    if facts.role == "reward":
        accuracy = interval(facts.get("stages.reward.accuracy"))
        return [f"**Is it any good?** Accuracy on held-out comparisons: {accuracy}; chance is 0.5."]
    return []


def rewrite(run: str | Path) -> list[Path]:
    """Write the cards of a run again, and seal it with them; return their paths.

    Raises:
        UsageError: The run has no adapter yet.
        BusyError: Another process works in it.
    """
    with locked(Path(run)):
        record = Record.read(run)  # as it is now that no other process writes it
        if not (written := write(record)):
            raise UsageError(f"{run} has no adapter yet", remedy="continue it with `lora-rlhf run`")
        record.seal()
    return written


def write(record: Record, repo_ids: dict[str, str] | None = None) -> list[Path]:
    """Write README.md into the folder of every adapter of the run; return the paths."""
    written = []
    for role in ROLES:
        if (record.adapter(role) / "adapter_config.json").is_file():
            path = record.adapter(role) / "README.md"
            write_atomically(path, render(record, role, repo_ids))
            written.append(path)
    return written


def _summary(facts: Facts) -> str:
    title = facts.own("title") or facts.get("name", "A run")
    compared = facts.algorithm == "dpo"
    what = _WHAT[facts.role].format(
        algorithm=facts.algorithm_name,
        signal="comparisons of two answers" if compared else "a reward",
        penalty="an implicit KL penalty" if compared else "a KL penalty",
    )
    base = code(facts.base or facts.get("model.id", "base"))
    chosen, why = licence(facts)
    use = paragraph(facts.own("intended_use") or "Not stated by the author of the recipe.")
    parts = [
        f"# {cell(title)}: {_TITLES[facts.role]}",
        f"A LoRA adapter for {base}: {what}. Made with `lora-rlhf`, following InstructGPT.",
        *_result(facts),
        *([f"By {cell(facts.own('authors'))}."] if facts.own("authors") else []),
        f"**Intended use.** {use}",
        f"**Licence.** {cell(chosen) + '. ' if chosen else ''}{why}",
    ]
    if facts.role != "sft" and (warning := training.gate_verdict(facts)):
        parts.append(f"> **Warning.** {warning}")
    others = [
        f"{_TITLES.get(role, role)}: {code(repo)}"
        for role, repo in facts.repo_ids.items()
        if role != facts.role and role != "base"
    ]
    if others:
        parts.append("**Other adapters of the same run.** " + ", ".join(others))
    return "\n\n".join(parts)


def _lineage(facts: Facts) -> str:
    get = facts.get("model", {}).get
    identity = code(get("id") or "unnamed")
    if facts.packaged:
        identity = f"{code('tiny')}, the model shipped in the package `lora-rlhf`"
    elif not facts.base:
        identity += ", which is not on the Hub and exists only where the run was made"
    elif facts.base != get("id"):
        identity += f", on the Hub {code(facts.base)}"
    quantised = "quantised to 4-bit NF4 during training" if get("load_in_4bit") else "not quantised"
    start, parent = _START[facts.role]
    if facts.role == "value" and training.other_reward(facts):
        start, parent = "a copy of the SFT adapter with a new head", "sft"
    items = [
        f"Base: {identity}",
        f"Source of the base: {cell(get('source') or MISSING)}",
        f"Revision of the base: {code(get('revision'))}",
        f"Fingerprint of the base's weights: {code(get('fingerprint'))}",
        f"Size of the base: {number(get('parameters'))} parameters, {number(get('layers'))} layers "
        f"of width {number(get('hidden_size'))}",
        *([f"Original of the base: {cell(get('original'))}"] if get("original") else []),
        f"Licence of the base: {cell(get('license') or MISSING)}",
        f"Precision: {code(get('dtype'))}, {quantised}",
        f"Chat template: sha256 {code(get('chat_template_sha256'))}",
        f"Padding token {number(get('pad_id'))}, end tokens "
        f"{', '.join(number(i) for i in get('eos_ids') or []) or MISSING}",
        f"This adapter: {training.digest(facts, facts.role)}",
        f"Started as {start}" + (f", {training.digest(facts, parent)}" if parent else ""),
    ]
    if facts.role == "policy":
        items.append(
            f"Reference of its KL penalty: the SFT adapter, {training.digest(facts, 'sft')}"
        )
        items.append(f"Reward that it was trained on: {training.reward_source(facts)}")
    return bullets([*items, *training.rounds(facts)])


def _evaluation(facts: Facts) -> str:
    results = facts.get("evaluation", {})
    models = [name for name in MODELS if results.get(name)]
    models += [name for name in results if name not in MODELS]
    if not models:
        return "No evaluation is recorded, so the quality of this adapter is unknown."
    known = {metric for model in models for metric in results[model]}
    metrics = [name for name in METRICS if name in known] + sorted(known - set(METRICS))

    def shown(model: str, metric: str) -> str:
        return interval(results[model][metric], short=True) if metric in results[model] else ""

    rows = [
        [
            cell(metric).replace("_", " "),
            *(shown(model, metric) for model in models),
            METRICS.get(metric, ""),
        ]
        for metric in metrics
    ]
    head = ["metric", *(MODELS.get(model, cell(model)) for model in models), "meaning"]
    return (
        f"{table(head, rows)}\n\nAll models answered the same held-out prompts with the same "
        "seeds. Brackets hold the 95 % interval, n is the number of observations, and an empty "
        "cell means that the metric does not apply." + "".join(_by_kind(facts, models))
    )


def _by_kind(facts: Facts, models: list[str]) -> Iterator[str]:
    """The same by kind of prompt: the adapter of the card, and the model that it started from."""
    by_model = kinds.of_record(facts.record)
    for model in {"sft": ("base", "sft")}.get(facts.role, ("sft", *models[2:])):
        if own := by_model.get(model):
            measured = kinds.values(facts.get(f"evaluation.{model}", {}), own)
            rows = [
                [
                    cell(m).replace("_", " "),
                    *("" if v is None else interval(v, short=True) for v in vs),
                ]
                for m, vs in measured
            ]
            head = ["metric", *map(cell, kinds.columns(own))]
            yield f"\n\nBy kind of prompt, {MODELS.get(model, cell(model))}:\n\n{table(head, rows)}"


def _samples(facts: Facts) -> str:
    wanted = at(facts.recipe, "evaluate.samples", 8)
    rows = sample_table(facts.record, wanted, facts.role)
    if not rows:
        return "No completions were recorded."
    shown = [model for model in MODELS if any(model in row["answers"] for row in rows)]
    lines = []
    for row in rows:
        answers = [row["answers"].get(model, {}).get("completion") for model in shown]
        texts = [MISSING if text is None else cell(text) or "(empty)" for text in answers]
        score = row["answers"][facts.role].get("score")
        lines.append([row["why"], cell(row["prompt"]), *texts, number(score)])
    head = ["why shown", "prompt", *(MODELS[model] for model in shown), f"score of {facts.role}"]
    note = "No scores were recorded, so the first prompts are shown instead of the worst answers."
    if any(row["why"] == "worst" for row in rows):
        note = "The answers with the lowest scores, then the first prompts; none picked by hand."
    return f"{note}\n\n{table(head, lines)}"


def _cost(facts: Facts) -> str:
    get, speed = facts.get("clock", {}).get, facts.get("clock.evaluation", {})
    stages = get("stages") or {}
    machine = dict(get("host") or {})
    limitations = machine.pop("makes_do", None) or []
    host = [f"{cell(key)} {number(value)}" for key, value in machine.items()]
    items = [
        f"Machine: {', '.join(host) or MISSING}",
        *(f"Limitation of the machine: {cell(note)}" for note in limitations),
        *(
            f"Evaluation of {MODELS.get(model, cell(model))}: "
            f"{number(at(entry, 'tokens_per_second'))} tokens per second"
            for model, entry in speed.items()
        ),
        f"Started: {cell(get('started') or MISSING)}",
    ]
    # Unknown on a card that is written during the run, and on machines without a peak.
    known = {
        "Finished": get("finished"),
        "Peak memory, MB": get("peak_memory_mb"),
        "Model, adapters and heads in memory, bytes": facts.get("clock.memory.total") or None,
    }
    items += [f"{label}: {number(value)}" for label, value in known.items() if value is not None]
    rows, copied = [], False
    for name, entry in stages.items():
        origin = at(facts.get(f"stages.{name}", {}), "from_run.name")
        copied = copied or origin is not None
        label = f"{cell(name)} (copied from the run {cell(origin)})" if origin else cell(name)
        rows.append([label, number(at(entry, "seconds"))])
    times = table(["stage", "seconds"], rows) if rows else f"The time of each stage is {MISSING}."
    if copied:
        times += (
            "\n\nA copied stage took its seconds in the other run; this run did not spend them."
        )
    return f"{times}\n\n{bullets(items)}"
