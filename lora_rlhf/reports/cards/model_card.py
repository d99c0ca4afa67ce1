# SPDX-License-Identifier: Apache-2.0
"""The model card of one adapter, written from the record alone: no network, no torch.

Every number comes from the run. What was not recorded is named as missing, never filled in.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from lora_rlhf.errors import UsageError
from lora_rlhf.redaction import safe
from lora_rlhf.runs.metric_names import METRICS
from lora_rlhf.runs.record import Record
from lora_rlhf.runs.samples import sample_table

from . import card_snippets
from . import card_training as training
from .card_facts import MODELS, ROLES, Facts, front_matter, licence
from .card_limits import limits
from .card_markdown import MISSING, at, bullets, cell, code, interval, number, paragraph, table

_WHAT = {
    "policy": "the policy: the language model that people talk to, trained from the SFT adapter by "
    "{algorithm} on {signal}, with {penalty} to that SFT adapter",
    "reward": "the reward model: a score for a whole conversation, trained from the SFT adapter on "
    "comparisons of two answers",
    "value": "the value model: the expected return after every token, which PPO needs while it "
    "trains; it writes no text and is of use only for training on",
    "sft": "the supervised start: the base, fine-tuned on demonstrations, before any reward",
}
_TITLES = {"policy": "policy", "reward": "reward model", "value": "value model", "sft": "SFT"}
_START = {
    "sft": ("a new LoRA on the base", None),
    "reward": ("a copy of the SFT adapter", "sft"),
    "policy": ("a trainable copy of the SFT adapter", "sft"),
    "value": ("a copy of the reward adapter", "reward"),
}


def render(record: Record, role: str, repo_ids: dict[str, str] | None = None) -> str:
    """The card of the adapter of `role`, as the text of its README.md.

    Args:
        record: The run; `samples.jsonl`, `metrics.jsonl`, `recipe.yaml` and the adapter's small
            JSON files are read from its folder where they are there.
        role: policy, reward, value or sft.
        repo_ids: Hub ids by role, and by `base`, where the adapters are or will be; without the
            role's own, the code on the card reads the folder that the card lies in.

    Raises:
        UsageError: There is no such role.
    """
    if role not in ROLES:
        raise UsageError(f"the role {role!r}", expected=f"one of {', '.join(ROLES)}")
    facts = Facts.gather(record, role, repo_ids)
    writes, after_rl = role in ("policy", "sft"), role in ("policy", "value")
    sections = {
        "": _summary(facts),
        "Lineage": _lineage(facts),
        "LoRA": training.lora(facts),
        "Data": training.data(facts),
        "Supervised fine-tuning": training.sft(facts) if role == "sft" else "",
        "Reward model": training.reward(facts) if role != "sft" else "",
        _method_title(facts): training.reinforcement(facts) if after_rl else "",
        "Evaluation": _evaluation(facts) if writes else "",
        "Samples": _samples(facts) if writes else "",
        "Limits": bullets(limits(facts)),
        "Cost": _cost(facts),
        "How to load": card_snippets.how_to_load(facts),
        "How to merge": card_snippets.how_to_merge(facts),
        "How to reproduce": card_snippets.how_to_reproduce(facts),
    }
    text = front_matter(facts)
    for title, body in sections.items():
        if body:
            text += f"\n## {title}\n\n{body}\n" if title else f"\n{body}\n"
    text = safe(text)
    ModelCard(text)  # a card that the Hub's own reader cannot parse must not leave this function
    return text


def _method_title(facts: Facts) -> str:
    return "Preference optimisation" if facts.algorithm == "dpo" else "Reinforcement learning"


def write(record: Record, repo_ids: dict[str, str] | None = None) -> list[Path]:
    """Write README.md into the folder of every role that the run has; the paths written."""
    written = []
    for role in ROLES:
        if (record.adapter(role) / "adapter_config.json").is_file():
            path = record.adapter(role) / "README.md"
            path.write_text(render(record, role, repo_ids), encoding="utf-8", newline="\n")
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
    parts = [
        f"# {cell(title)}: {_TITLES[facts.role]}",
        f"A LoRA adapter for {base}. It is {what}. Made by `lora-rlhf`, after InstructGPT.",
    ]
    if facts.own("authors"):
        parts.append(f"By {cell(facts.own('authors'))}.")
    if facts.own("intended_use"):
        parts.append(f"**Intended use.** {paragraph(facts.own('intended_use'))}")
    else:
        parts.append("**Intended use.** Not stated by the author of the recipe.")
    chosen, why = licence(facts)
    parts.append(f"**Licence.** {cell(chosen) + '. ' if chosen else ''}{why}")
    if facts.role != "sft" and (verdict := training.gate_verdict(facts)):
        parts.append(f"> **Warning.** {verdict}")
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
    identity = code(facts.get("model.id", "unnamed"))
    if facts.base and facts.base != facts.get("model.id"):
        identity += f", on the Hub {code(facts.base)}"
    elif not facts.base:
        identity += ", which is on no Hub: it exists only where the run was made"
        if card_snippets.is_packaged(facts):
            identity = f"{code('tiny')}, the model shipped in the package `lora-rlhf`"
    quantised = "4-bit NF4 while training" if facts.get("model.load_in_4bit") else "no"
    start, parent = _START[facts.role]
    if facts.role == "value" and facts.get(f"stages.{facts.algorithm}.reward") == "gold":
        start, parent = "a copy of the SFT adapter with a new head", "sft"
    items = [
        f"Base: {identity}",
        f"Base, source: {cell(facts.get('model.source', MISSING))}",
        f"Base, revision: {code(facts.get('model.revision'))}",
        f"Base, fingerprint of its weights: {code(facts.get('model.fingerprint'))}",
        f"Base, size: {number(get('parameters'))} parameters, {number(get('layers'))} layers of "
        f"width {number(get('hidden_size'))}",
        *(f"Base, made from: {cell(get('original'))}" for _ in [0] if get("original")),
        f"Base, licence: {cell(facts.get('model.license', MISSING))}",
        f"Precision: {code(facts.get('model.dtype'))}; quantised: {quantised}",
        f"Chat template: sha256 {code(facts.get('model.chat_template_sha256'))}",
        f"Padding token {number(facts.get('model.pad_id'))}, end tokens "
        f"{', '.join(number(i) for i in facts.get('model.eos_ids', [])) or MISSING}",
        f"This adapter: {training.digest(facts, facts.role)}",
        f"It started as {start}" + (f", {training.digest(facts, parent)}" if parent else ""),
    ]
    if facts.role == "policy":
        items.append(
            f"The reference of its KL penalty: the SFT adapter, {training.digest(facts, 'sft')}"
        )
        items.append(f"The reward it was trained on: {training.reward_source(facts)}")
    return bullets(items)


def _evaluation(facts: Facts) -> str:
    found = facts.get("evaluation", {})
    models = [name for name in MODELS if found.get(name)] + [n for n in found if n not in MODELS]
    if not models:
        return "No evaluation is recorded: how good this adapter is, the card cannot say."
    there = {metric for model in models for metric in found[model]}
    metrics = [name for name in METRICS if name in there] + sorted(there - set(METRICS))
    rows = [
        [
            cell(metric).replace("_", " "),
            *(
                interval(found[model].get(metric), short=True) if metric in found[model] else ""
                for model in models
            ),
            METRICS.get(metric, ""),
        ]
        for metric in metrics
    ]
    names = [MODELS.get(model, cell(model)) for model in models]
    text = table(["metric", *names, "what it is"], rows)
    return (
        f"{text}\n\nThe same held-out prompts and seeds for all. In brackets the 95 % interval; n "
        "is what it rests on; an empty cell means that the metric does not apply."
    )


def _samples(facts: Facts) -> str:
    wanted = at(facts.recipe, "evaluate.samples", 8)
    rows = sample_table(facts.record, wanted, facts.role)
    if not rows:
        return "No completions were kept, so none can be shown."
    shown = [model for model in MODELS if any(model in row["answers"] for row in rows)]
    lines = []
    for row in rows:
        answers = [row["answers"].get(model, {}).get("completion") for model in shown]
        texts = [MISSING if text is None else cell(text) or "(empty)" for text in answers]
        score = row["answers"][facts.role].get("score")
        lines.append([row["why"], cell(row["prompt"]), *texts, number(score)])
    head = ["why shown", "prompt", *(MODELS[model] for model in shown), f"score of {facts.role}"]
    note = "The worst answers by score, then the first prompts; not picked by hand."
    if not any(row["why"] == "worst" for row in rows):
        note = (
            "No scores were kept, so the worst cannot be picked out; the first prompts are shown."
        )
    return f"{note}\n\n{table(head, lines)}"


def _cost(facts: Facts) -> str:
    stages = {name: at(entry, "seconds") for name, entry in facts.get("clock.stages", {}).items()}
    rows = [[cell(name), number(seconds)] for name, seconds in stages.items()]
    speed = facts.get("clock.evaluation", {})
    machine = dict(facts.get("clock.host", {}))
    made_do = machine.pop("makes_do", None) or []
    host = [f"{cell(key)} {number(value)}" for key, value in machine.items()]
    items = [
        f"Machine: {', '.join(host) or MISSING}",
        *(f"Made do: {cell(note)}" for note in made_do),
        *(
            f"Evaluating {MODELS.get(model, cell(model))}: "
            f"{number(at(entry, 'tokens_per_second'))} tokens per second"
            for model, entry in speed.items()
        ),
        f"Started: {cell(facts.get('clock.started', MISSING))}",
    ]
    # A card written in the run itself knows no end yet; some machines report no peak.
    ends = {"Finished": "finished", "Peak memory, MB": "peak_memory_mb"}
    items += [
        f"{label}: {number(facts.get(f'clock.{key}'))}"
        for label, key in ends.items()
        if facts.get(f"clock.{key}") is not None
    ]
    if total := facts.get("clock.memory.total"):
        items.append(f"Model, adapters and heads in memory, bytes: {number(total)}")
    timed = table(["stage", "seconds"], rows) if rows else f"Times per stage were {MISSING}."
    return f"{timed}\n\n{bullets(items)}"
