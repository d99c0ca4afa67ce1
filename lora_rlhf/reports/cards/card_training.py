# SPDX-License-Identifier: Apache-2.0
"""The sections of a card on training: LoRA, data, SFT, reward model, reinforcement learning."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from .card_facts import Facts
from .card_limits import LENGTH_KEYS
from .card_markdown import MISSING, at, bullets, cell, code, interval, is_number, number, table

_SHOWN = {
    "ppo": {"updates": "Updates", "episodes": "Episodes", "kl_coef": "KL coefficient",
            "kl_last": "KL to SFT in the last rollout, before its update, in nats per sequence"},
    "dpo": {"comparisons": "Comparisons", "epochs": "Epochs", "optimizer_steps": "Optimizer steps",
            "beta": "beta of the implicit KL to SFT",
            "train_loss": "Training loss, mean over all steps"},
}  # fmt: skip
"""Values of the stage's entry and their labels; `ppo` stands for all algorithms with rollouts."""

_CURVES: dict[str, tuple[str, ...]] = {
    "KL to SFT, nats per sequence": ("kl/sequence", "kl"),
    "score, before the KL penalty": ("reward/score", "rewards/gold", "score", "reward"),
    "length of completions, tokens": LENGTH_KEYS,
}
_CURVES_DPO: dict[str, tuple[str, ...]] = {
    "loss": ("loss",), "share of comparisons whose chosen answer gained more": ("accuracy",),
    "margin, beta times the difference of log-ratios": ("margin",),
}  # fmt: skip

_REWARD_DETAILS = {
    "agreement_with_held_out": "Agreement of the two reward models on held-out comparisons",
    "held_out_accuracy": "Accuracy of the second reward model, kept for evaluation",
    "labeler_agreement": "Agreement of two labelers on such comparisons",
    "accuracy_against_gold": "Agreement with the exact checker",
    "gain_over_length": "Accuracy minus that of the better length rule",
}
"""Optional values of the reward stage and their labels."""


_PLOTS = ("evaluation", "reward_calibration", "training")
"""Pictures that a run draws."""


def gate_verdict(facts: Facts) -> str | None:
    """Explain why the reward model did not pass its gate; None if it passed."""
    if facts.get("stages.reward.gate") not in ("warned", "failed"):
        return None
    reason = facts.get("stages.reward.gate_reason")
    why = f"Reason: {cell(reason)}." if reason else "The reason was not recorded."
    if facts.get(f"stages.{facts.algorithm}.status") and not other_reward(facts):
        used = {"dpo": "", "best_of_n": "it chose the answers"}
        if done := used.get(facts.algorithm, "the policy was trained on it"):
            why += f" The recipe asked for a warning only, so {done} anyway."
    return f"The reward model did not pass its gate: it may be no better than guessing. {why}"


def other_reward(facts: Facts) -> str:
    """Return the reward that took the place of the reward model; empty if none did."""
    reward = facts.get(f"stages.{facts.algorithm}.reward") or "model"
    return "" if reward == "model" else str(reward)


def digest(facts: Facts, role: str) -> str:
    """Return the sha256 of a role's weights, from its stage or the hashes of the run's files."""
    stage = {"policy": facts.algorithm, "value": facts.algorithm}.get(role, role)
    key = "value_adapter_sha256" if role == "value" else "adapter_sha256"
    # Not by a dotted path, because the file name contains dots.
    sealed = facts.record.data.get("files", {}).get(f"adapters/{role}/adapter_model.safetensors")
    return f"sha256 {code(facts.get(f'stages.{stage}.{key}') or sealed)}"


def reward_source(facts: Facts) -> str:
    """Describe the source of the policy's reward."""
    if (reward := other_reward(facts)) and reward != "gold":
        sha = code(facts.get(f"stages.{facts.algorithm}.reward_sha256"))
        return f"the author's own function {code(reward)} (sha256 {sha}); not the reward model"
    if reward:
        return "the gold reward, an exact checker; not the reward model"
    if facts.algorithm == "dpo":
        return "none; DPO learns from the comparisons directly"
    return f"the reward adapter, {digest(facts, 'reward')}"


def rounds(facts: Facts) -> list[str]:
    """Describe the rounds of feedback behind the labels, with the hashes that link them."""
    return [
        f"Round {number(at(one, 'number'))} of feedback: {number(at(one, 'rankings'))} rankings by "
        f"{cell(at(one, 'labels', MISSING))} (sha256 {code(at(one, 'labels_sha256'))}) of answers "
        f"of the {cell(at(one, 'model', MISSING))} of {cell(at(one, 'run', MISSING))} (record "
        f"sha256 {code(at(one, 'record_sha256'))}), prompts chosen by "
        f"{cell(at(one, 'strategy', MISSING))}; its policy started from {cell(at(one, 'start'))}"
        for one in facts.get("rounds", [])
    ]


def lora(facts: Facts) -> str:
    """Describe shape and size of the adapter."""
    get = facts.get("lora", {}).get
    trained = get("parameters_per_role")
    if isinstance(trained, Mapping):  # the frozen SFT adapter is recorded as the reference
        trained = trained.get(facts.role, trained.get("reference") if facts.role == "sft" else None)
    modules = ", ".join(code(name) for name in get("target_modules") or []) or MISSING
    items = [
        f"Rank {number(get('r'))}, alpha {number(get('alpha'))}",
        f"Adapted layers: {number(get('adapted_layers'))} of {number(get('total_layers'))}, from "
        f"the top (requested share: {number(get('top_fraction'))})",
        f"Adapted modules: {modules}",
        f"Trainable parameters: {number(trained)}",
    ]
    if facts.role in ("reward", "value"):
        items.append(f"Head: {cell(facts.head.get('head') or MISSING)}")
    return bullets(items)


def data(facts: Facts) -> str:
    """List sources with licences, the rows before and after each filter, and labelers."""
    rows, filters, notes = [], [], []
    for name, source in facts.sources():
        sha = str(at(source, "sha256", ""))[:16]
        kind, label, licence = (at(source, key, MISSING) for key in ("kind", "name", "license"))
        texts = [cell(kind), cell(label), cell(licence), number(at(source, "rows"))]
        rows.append([name, *texts, code(sha or None)])
        notes += [f"{name}: {note}" for note in _people(at(source, "labelers"))]
    for name, entry in facts.sets():
        for step, count in at(entry, "counts", {}).items():
            before, after = at(count, "before"), at(count, "after")
            if not (is_number(before) and is_number(after) and before == after):
                filters.append([name, cell(step), number(before), number(after)])
        notes += [f"{name}: {note}" for note in _notes(name, entry)]
    if not rows and not notes:
        return "The record names no data, so it is unknown what the adapter was trained on."
    head = ["set", "kind", "source", "licence", "rows", "sha256, beginning"]
    sources = table(head, rows) if rows else f"Sources were {MISSING}."
    steps = "No filter changed the rows."
    if filters:
        steps = table(["set", "filter", "rows before", "rows after"], filters)
    elif not any(at(entry, "counts") for _, entry in facts.sets()):
        steps = f"Counts per filter were {MISSING}."
    return "\n\n".join([sources, steps, bullets(notes)])


def _notes(name: str, entry: Mapping[str, Any]) -> list[str]:
    """Lines on the split of one data set, its labelers, and notes of the loader."""
    notes = []
    if name != "evaluate":
        train, held_out = number(at(entry, "train")), number(at(entry, "held_out"))
        notes.append(f"{train} for training, {held_out} held out")
    agreement = at(entry, "labeler_agreement", at(entry, "agreement"))
    if isinstance(agreement, Mapping) and "value" not in agreement:
        listed = ", ".join(f"{cell(key)} {number(value)}" for key, value in agreement.items())
        notes.append(f"share of pairs on which labelers agree: {listed}")
    elif agreement is not None or name.startswith("comparisons"):
        notes.append(f"share of pairs on which labelers agree: {interval(agreement)}")
    if name.startswith("comparisons"):
        notes.append(f"instructions to labelers: {cell(_instructions(entry))}")
    return [*notes, *_hygiene(entry), *(cell(note) for note in at(entry, "notes", []))]


def _instructions(entry: Mapping[str, Any]) -> str:
    """Return the instructions to labelers, or the guidelines that stand for them."""
    versions = [
        sha for one in at(entry, "sources", []) for sha in at(at(one, "labelers"), "guidelines", [])
    ]
    shown = ", ".join(sorted({str(sha)[:16] for sha in versions if sha}))
    given = f"the guidelines with sha256 {shown}, shown before the first label" if shown else ""
    return str(at(entry, "instructions", given or MISSING))


def _hygiene(entry: Mapping[str, Any]) -> Iterator[str]:
    """Lines on users, personal data, overlap with evaluation prompts, and rows made of rows."""
    if users := at(entry, "users"):
        yield f"written by {number(users)} users, who are on one side of the split each"
    if personal := at(entry, "personal_data"):
        yield (
            f"personal data ({cell(at(personal, 'action'))}): {number(at(personal, 'rows'))} rows; "
            f"{_some(at(personal, 'found'))}; names by {cell(at(personal, 'names_by'))}"
        )
    if overlap := at(entry, "contamination"):
        against, rows = (_some(at(overlap, key)) for key in ("against", "rows"))
        yield f"compared with evaluation prompts ({against}); rows that overlap: {rows}"
    if made := at(entry, "augmented"):
        yield f"rows made by augmentation, marked in the column augmented: {_some(made)}"
    if test := at(entry, "identity_test"):
        changed = interval(at(test, "changed")) if at(test, "twins") else "no such comparisons"
        yield f"preferences that differ with names, pronouns or groups alone: {changed}"


def _some(counts: Any) -> str:
    return _listed(counts) if counts else "none"


def _people(pool: Any) -> list[str]:
    """Lines on the people who gave the labels of a file, in counts."""
    if not isinstance(pool, Mapping):
        return []
    left_out = number(at(pool, "left_out", 0))
    notes = [
        f"labelled by {number(at(pool, 'people'))} people, {number(at(pool, 'labels'))} labels "
        f"({_listed(at(pool, 'by_type'))}); labels of {left_out} more people were left out"
    ]
    if kinds := at(pool, "by_kind"):
        notes.append(f"labels by kind of prompt: {_listed(kinds)}")
    for part, numbers in at(pool, "agreement", {}).items():
        raw, kendall = (interval(at(numbers, key)) for key in ("raw", "kendall"))
        notes.append(
            f"agreement on {cell(part)}: raw {raw}, Krippendorff's alpha "
            f"{number(at(numbers, 'alpha'))}, Kendall's tau {kendall}"
        )
    screening = _listed(at(pool, "screening"))
    notes.append(f"people by result of the screening test: {screening}")
    doubts = at(pool, "verdicts") or {"none": number(at(pool, "people"))}
    notes.append(f"people by what speaks against their labels: {_listed(doubts)}")
    for key, what in (("flags", "flags"), ("groups", "people by self-described group")):
        if at(pool, key):
            notes.append(f"{what}: {_listed(at(pool, key))}")
    shown = ", ".join(code(str(sha)[:16]) for sha in at(pool, "guidelines", [])) or MISSING
    return [*notes, f"guidelines by sha256, beginning: {shown}"]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield f"{cell(f'{prefix}{key}')} {number(value)}"


def _listed(values: Any) -> str:
    """Nested settings or results on one line, as `key value`."""
    return ", ".join(_flat(values) if isinstance(values, Mapping) else ()) or MISSING


def _taken(adapter: Mapping[str, Any]) -> str:
    name, sha = code(at(adapter, "adapter")), code(at(adapter, "sha256"))
    return f"Not trained in this run: the author's adapter {name} (sha256 {sha}) was used as it is."


def _privacy(stage: Mapping[str, Any], example: str) -> list[str]:
    """Lines on what private training guarantees, and on what an audit found."""
    items = []
    if spent := stage.get("privacy"):
        get = functools.partial(at, spent)
        items.append(
            f"Differentially private (DP-SGD): epsilon {number(get('epsilon'))}, delta "
            f"{number(get('delta'))}, for adding or removing one {example} of "
            f"{number(get('examples'))}; noise multiplier {number(get('noise_multiplier'))}, clip "
            f"norm {number(get('clip_norm'))}, sample rate {number(get('sample_rate'))}, "
            f"{number(get('steps'))} steps, accountant {cell(get('accountant'))}. A person with k "
            f"of them has k times this epsilon"
        )
        items.append(
            "Not covered by it: the numbers on this card that were computed on the data (losses, "
            "accuracies, samples, the reward offset), and the prompts of later stages"
        )
    if audit := stage.get("memorisation"):
        get = functools.partial(at, audit)
        items.append(
            f"Memorisation: {number(get('canaries'))} random examples, of which a coin planted "
            f"{number(get('planted'))}; guessing which gives epsilon of at least "
            f"{number(get('epsilon_at_least'))} (95 % confidence; share of right guesses "
            f"{interval(get('right'))})"
        )
        for name, label in (("exposure", "exposure, in bits"), ("extracted", "share extracted")):
            if values := at(audit, name, {}):
                listed = ", ".join(
                    f"{cell(key.replace('_', ' '))} {number(at(value, 'bits', at(value, 'value')))}"
                    for key, value in values.items()
                )
                items.append(f"Memorisation, {label}: {listed}")
    return items


def sft(facts: Facts) -> str:
    """Describe the supervised stage."""
    get = facts.get("stages.sft", {}).get
    if not get("status"):
        return "The record has no SFT stage."
    if taken := get("from"):
        return _taken(taken)
    return bullets(
        [
            f"Steps: {number(get('steps'))}",
            f"Training loss, mean over all steps: {number(get('train_loss'))}",
            f"Held-out loss: {interval(get('held_out_loss'), short=True)}",
            *_guessing(get("chance_loss")),
            f"Settings, including defaults: {_listed(get('args'))}",
            *_privacy(facts.get("stages.sft", {}), "demonstration"),
        ]
    )


def _guessing(chance: float | None) -> list[str]:
    return [] if chance is None else [f"Loss of guessing, ln of the vocabulary: {number(chance)}"]


def reward(facts: Facts) -> str:
    """Describe accuracy and calibration of the reward model, and the result of its gate."""
    stage = facts.get("stages.reward", {})
    if not stage.get("status"):
        return "The record has no reward-model stage, so its accuracy is unknown."
    if stage.get("skipped"):
        return f"There is none: {cell(stage['skipped'])}."
    passed = stage["gate"] if stage.get("gate") in ("passed", "not judged") else MISSING
    items = [
        *([_taken(stage["from"])] if stage.get("from") else []),
        f"Held-out accuracy: {interval(stage.get('accuracy'))}",
        "Accuracy of always preferring the longer answer: "
        f"{interval(stage.get('accuracy_length_baseline'))}",
        "Reward offset (add it to the raw score; demonstrations then have a mean of zero): "
        f"{number(stage.get('offset'))}",
        f"Standard deviation of its scores: {number(stage.get('score_std'))}",
        "Gate (clearly better than chance and than a length rule?): "
        f"{gate_verdict(facts) or passed}",
        f"Settings, including defaults: {_listed(stage.get('args'))}",
        *_reward_details(stage),
        *_privacy(stage, "prompt with all its comparisons"),
    ]
    bins = []
    for b in stage.get("calibration") or []:
        names = {"value": "observed", "low": "observed_low", "high": "observed_high", "n": "n"}
        share = {key: at(b, name) for key, name in names.items()}
        edges = f"{number(at(b, 'low'))} to {number(at(b, 'high'))}"
        bins.append([edges, number(at(b, "predicted")), interval(share, short=True)])
    calibration = f"Calibration was {MISSING}."
    if bins:
        head = ["stated confidence", "its mean", "accuracy, with 95 % interval"]
        calibration = "Calibration on held-out comparisons:\n\n" + table(head, bins)
    return f"{bullets(items)}\n\n{calibration}"


def _reward_details(stage: Mapping[str, Any]) -> list[str]:
    """Agreements, accuracy on parts of the comparisons, and the members of an ensemble."""
    shown = {label: stage.get(key) for key, label in _REWARD_DETAILS.items()}
    items = [f"{label}: {interval(value)}" for label, value in shown.items() if value]
    for name, part in (stage.get("accuracy_by_length") or {}).items():
        which = "both answers are equally long"
        if name != "equal":
            which = f"the chosen answer is the {cell(name)} one"
        items.append(f"Accuracy where {which}: {interval(part)}")
    for kind in ("score", "label", "gold"):
        for part in stage.get(f"accuracy_by_{kind}_margin") or []:
            edges = f"{number(at(part, 'from'))} to {number(at(part, 'to'))}"
            items.append(f"Accuracy for {kind} margins from {edges}: {interval(part)}")
    if stage.get("calibration_error") is not None:
        items.append(f"Expected calibration error: {number(stage['calibration_error'])}")
    if ensemble := stage.get("ensemble"):
        each = "; ".join(interval(one, short=True) for one in at(ensemble, "accuracy", []))
        how, count = cell(at(ensemble, "combine", MISSING)), number(at(ensemble, "members"))
        adapter = "is only the first member, and not the whole reward"
        if how == "warm":
            adapter = "is the average of the members; its rank is the sum of theirs"
        items += [
            f"Ensemble: {count} reward models, combined by {how}; accuracy and offset above are "
            "those of the combination",
            f"Accuracy of each member: {each or MISSING}",
            "Disagreement, standard deviation over members: "
            f"{interval(at(ensemble, 'disagreement'))}",
            f"The adapter `reward` {adapter}",
        ]
    return items


def reinforcement(facts: Facts) -> str:
    """Describe settings, checks and curves of the stage that trained the policy."""
    stage = facts.get(f"stages.{facts.algorithm}", {})
    if not stage.get("status"):
        return "The record has no reinforcement-learning stage."
    shown = _SHOWN.get(facts.algorithm, _SHOWN["ppo"])
    recipe = dict(at(facts.recipe, facts.algorithm, {}))
    recipe |= recipe.pop("args", None) or {}
    settings = {k: v for k, v in recipe.items() if is_number(v)} | at(stage, "args", {})
    settings = {key: value for key, value in settings.items() if key not in shown}
    items = [
        f"Algorithm: {facts.algorithm_name}",
        f"Reward: {reward_source(facts)}",
        *(f"{label}: {interval(stage.get(key), short=True)}" for key, label in shown.items()),
        f"Settings, including defaults: {_listed(settings)}",
        *(f"Alarm {sign}" for sign in facts.signs()),
        f"Identities checked at the start: {_listed(stage.get('identities'))}",
    ]
    head, curves = ["curve", "first update", "last update"], _CURVES
    if facts.algorithm == "dpo":
        head, curves = ["curve", "first step logged", "last"], _CURVES_DPO
    rows = []
    for label, names in curves.items():
        values = facts.curve(*names)
        ends = [number(values[0]), number(values[-1])] if values else [MISSING, MISSING]
        rows.append([label, *ends])
    return "\n\n".join([bullets(items), table(head, rows), *_pictures(facts)])


def _pictures(facts: Facts) -> list[str]:
    """Show the plots that are pushed with a card; a local adapter folder may be moved from them."""
    drawn = (facts.record.folder / "plots" / f"{name}.png" for name in _PLOTS)
    plots = [path for path in drawn if path.is_file() and path.read_bytes()[:4] == b"\x89PNG"]
    if plots and not facts.published:
        return [f"Plots, in the run's folder `plots`: {', '.join(code(p.name) for p in plots)}"]
    return [f"![{cell(p.stem)}](plots/{p.name})" for p in plots]
