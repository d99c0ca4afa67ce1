# SPDX-License-Identifier: Apache-2.0
"""The sections of a card on training: LoRA, data, SFT, reward model, reinforcement learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .card_facts import Facts
from .card_limits import LENGTH_KEYS
from .card_markdown import MISSING, at, bullets, cell, code, interval, is_number, number, table

_SHOWN = {
    "ppo": {"updates": "Updates", "episodes": "Episodes", "kl_coef": "KL coefficient",
            "kl_last": "KL to SFT in the last rollout, before its update, nats per sequence"},
    "dpo": {"comparisons": "Comparisons", "epochs": "Epochs", "optimizer_steps": "Optimizer steps",
            "beta": "beta of the implicit KL to SFT", "train_loss": "Training loss"},
}  # fmt: skip
"""What of the stage's entry is told: for DPO, and for all that have rollouts."""

_CURVES = {
    "KL to SFT, nats per sequence": ("kl/sequence", "kl"),
    "score, before the KL penalty": ("reward/score", "rewards/gold", "score", "reward"),
    "length of completions, tokens": LENGTH_KEYS,
}
_CURVES_DPO = {
    "loss": ("loss",), "share of comparisons whose chosen answer gained more": ("accuracy",),
    "margin, beta times the difference of log-ratios": ("margin",),
}  # fmt: skip


def gate_verdict(facts: Facts) -> str | None:
    """In plain words, that the reward model did not pass its gate, and why; else nothing."""
    if facts.get("stages.reward.gate") not in ("warned", "failed"):
        return None
    reason = facts.get("stages.reward.gate_reason")
    why = f"Reason: {cell(reason)}." if reason else "The reason was not recorded."
    if facts.get(f"stages.{facts.algorithm}.status") and not _gold(facts):
        what = {"dpo": "", "best_of_n": "answers were chosen by"}
        used = what.get(facts.algorithm, "the policy was trained on")
        why += f" The recipe said to warn only, so {used} it all the same." if used else ""
    return f"The reward model did not pass its gate: it may be no better than guessing. {why}"


def _gold(facts: Facts) -> bool:
    return bool(facts.get(f"stages.{facts.algorithm}.reward") == "gold")


def digest(facts: Facts, role: str) -> str:
    """The sha256 of a role's weights, from its stage or from the sealed files."""
    stage = {"policy": facts.algorithm, "value": facts.algorithm}.get(role, role)
    key = "value_adapter_sha256" if role == "value" else "adapter_sha256"
    # Not through a dotted path: the file name has dots of its own.
    sealed = facts.record.data.get("files", {}).get(f"adapters/{role}/adapter_model.safetensors")
    found = facts.get(f"stages.{stage}.{key}") or sealed
    return f"sha256 {code(found)}" if found else f"sha256 {MISSING}"


def reward_source(facts: Facts) -> str:
    """What the policy was rewarded by."""
    if _gold(facts):
        return "the gold reward, an exact checker; not the reward model"
    if facts.algorithm == "dpo":
        return "none; DPO learns from the comparisons themselves"
    return f"the reward adapter, {digest(facts, 'reward')}"


def lora(facts: Facts) -> str:
    """Shape and size of the adapter."""
    get = facts.get("lora", {}).get
    per_role = get("parameters_per_role")
    trained = per_role
    if isinstance(per_role, Mapping):  # the frozen SFT adapter goes by its part in training
        trained = per_role.get(
            facts.role, per_role.get("reference") if facts.role == "sft" else None
        )
    modules = ", ".join(code(name) for name in get("target_modules") or []) or MISSING
    items = [
        f"Rank {number(get('r'))}, alpha {number(get('alpha'))}",
        f"Adapted layers: {number(get('adapted_layers'))} of {number(get('total_layers'))}, from "
        f"the top (asked for: a share of {number(get('top_fraction'))})",
        f"Adapted modules: {modules}",
        f"Trainable parameters: {number(trained)}",
    ]
    if facts.role in ("reward", "value"):
        head = facts.head.get("head")
        items.append(f"Head: {cell(head) if head else 'its kind was ' + MISSING}")
    return bullets(items)


def data(facts: Facts) -> str:
    """Sources with licences, rows before and after each filter that changed them, labelers."""
    rows, notes = [], []
    for name, source in facts.sources():
        sha = str(at(source, "sha256", ""))
        rows.append(
            [
                name,
                cell(at(source, "kind", MISSING)),
                cell(at(source, "name", MISSING)),
                cell(at(source, "license", MISSING)),
                number(at(source, "rows")),
                code(sha[:16]) if sha else MISSING,
            ]
        )
    counts = [
        (name, key, [at(n, when) for when in ("before", "after")])
        for name, entry in facts.sets()
        for key, n in at(entry, "counts", {}).items()
    ]
    filters = [[name, cell(key), *map(number, n)] for name, key, n in counts if _changed(*n)]
    for name, entry in facts.sets():
        train, held_out = number(at(entry, "train")), number(at(entry, "held_out"))
        if name != "evaluate":
            notes.append(f"{name}: used for training {train}, held out {held_out}")
        agreement = at(entry, "labeler_agreement", at(entry, "agreement"))
        if isinstance(agreement, Mapping) and "value" not in agreement:
            listed = ", ".join(f"{cell(k)} {number(v)}" for k, v in agreement.items())
            notes.append(f"{name}: share of pairs on which labelers agree: {listed}")
        elif agreement is not None or name.startswith("comparisons"):
            notes.append(f"{name}: share of pairs on which labelers agree: {interval(agreement)}")
        if name.startswith("comparisons"):
            told = cell(at(entry, "instructions", MISSING))
            notes.append(f"{name}: instructions to labelers: {told}")
        notes += [f"{name}: {cell(note)}" for note in at(entry, "notes", [])]
    if not rows and not notes:
        return "The record names no data, so this card cannot say what the adapter was trained on."
    head = ["set", "kind", "source", "licence", "rows", "sha256, first part"]
    parts = [table(head, rows) if rows else f"Sources were {MISSING}."]
    none = "No filter changed the rows." if counts else f"Counts per filter were {MISSING}."
    parts.append(
        table(["set", "filter", "rows before", "rows after"], filters) if filters else none
    )
    return "\n\n".join([*parts, bullets(notes)])


def _changed(before: Any, after: Any) -> bool:
    """Whether a step took or made rows; one whose counts are no numbers is shown."""
    return not (is_number(before) and is_number(after) and before == after)


def _flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in data.items():
        nested = isinstance(value, Mapping)
        flat += _flat(value, f"{prefix}{key} ") if nested else [(f"{prefix}{key}", value)]
    return flat


def _settings(args: Any) -> str:
    """The arguments of a trainer that took effect, on one line."""
    told = _flat(args) if isinstance(args, Mapping) else []
    return ", ".join(f"{cell(key)} {number(value)}" for key, value in told) or MISSING


def sft(facts: Facts) -> str:
    """The supervised stage."""
    get = facts.get("stages.sft", {}).get
    if not get("status"):
        return "The record holds no SFT stage."
    return bullets(
        [
            f"Steps: {number(get('steps'))}",
            f"Training loss: {number(get('train_loss'))}",
            f"Held-out loss: {interval(get('held_out_loss'), short=True)}",
            f"Settings, defaults included: {_settings(get('args'))}",
        ]
    )


def reward(facts: Facts) -> str:
    """How good the reward model is, and whether it passed its gate."""
    stage = facts.get("stages.reward", {})
    if not stage.get("status"):
        return "The record holds no reward-model stage: its accuracy is unknown, or there is none."
    if stage.get("skipped"):
        return f"There is none: {cell(stage['skipped'])}."
    passed = "passed" if stage.get("gate") == "passed" else f"it was {MISSING} whether it passed"
    items = [
        f"Held-out accuracy: {interval(stage.get('accuracy'))}",
        f"Accuracy of always preferring the longer answer: "
        f"{interval(stage.get('accuracy_length_baseline'))}",
        f"Reward offset (add it to the raw score; demonstrations then average zero): "
        f"{number(stage.get('offset'))}",
        f"Spread of its scores, standard deviation: {number(stage.get('score_std'))}",
        f"Gate (clearly better than chance and than length?): {gate_verdict(facts) or passed}",
        f"Settings, defaults included: {_settings(stage.get('args'))}",
    ]
    if stage.get("agreement_with_held_out") is not None:
        same = interval(stage["agreement_with_held_out"])
        items.append(f"Share of comparisons on which both reward models prefer the same: {same}")
    if stage.get("held_out_accuracy") is not None:
        items.append(
            f"Accuracy of the second reward model, kept for evaluation: "
            f"{interval(stage['held_out_accuracy'])}"
        )
    items += _reward_details(stage)
    bins = []
    for b in stage.get("calibration") or []:
        share = {
            "value": at(b, "observed"),
            "low": at(b, "observed_low"),
            "n": at(b, "n"),
            "high": at(b, "observed_high"),
        }
        edges = f"{number(at(b, 'low'))} to {number(at(b, 'high'))}"
        bins.append([edges, number(at(b, "predicted")), interval(share, short=True)])
    calibration = f"Calibration was {MISSING}."
    if bins:
        head = ["stated confidence", "its mean", "share right, with 95 % interval"]
        calibration = "Calibration on held-out comparisons:\n\n" + table(head, bins)
    return f"{bullets(items)}\n\n{calibration}"


def _reward_details(stage: Mapping[str, Any]) -> list[str]:
    """Accuracy by parts, what it is to be held against, and the members of an ensemble."""
    items = []
    shown = {
        "labeler_agreement": "How often two labelers agree on such comparisons",
        "accuracy_against_gold": "Share in which it prefers what the exact checker does",
        "gain_over_length": "Accuracy above the better rule by length alone",
    }
    items += [f"{label}: {interval(stage[key])}" for key, label in shown.items() if stage.get(key)]
    for name, part in (stage.get("accuracy_by_length") or {}).items():
        chosen = "is as long as the other" if name == "equal" else f"is the {cell(name)} one"
        items.append(f"Accuracy where the chosen answer {chosen}: {interval(part)}")
    for kind in ("score", "label", "gold"):
        for part in stage.get(f"accuracy_by_{kind}_margin") or []:
            edges = f"{number(at(part, 'from'))} to {number(at(part, 'to'))}"
            items.append(f"Accuracy where the {kind} margin is {edges}: {interval(part)}")
    if stage.get("calibration_error") is not None:
        items.append(f"Expected calibration error: {number(stage['calibration_error'])}")
    if found := stage.get("ensemble"):
        each = "; ".join(interval(one, short=True) for one in at(found, "accuracy", []))
        how, count = cell(at(found, "combine", MISSING)), number(at(found, "members"))
        items += [
            f"Ensemble: {count} reward models, combined by {how}; accuracy and offset above are "
            "those of the combination",
            f"Accuracy of each member: {each or MISSING}",
            f"Disagreement, standard deviation over members: {interval(at(found, 'disagreement'))}",
        ]
        if at(found, "combine") == "warm":
            items.append("The adapter is their average; its rank is that of all members together")
        else:
            items.append("The adapter `reward` is the first member; alone it is not the reward")
    return items


def reinforcement(facts: Facts) -> str:
    """Settings, checks and curves of the stage that made the policy."""
    stage = facts.get(f"stages.{facts.algorithm}", {})
    if not stage.get("status"):
        return "The record holds no reinforcement-learning stage."
    items = [f"Algorithm: {facts.algorithm_name}", f"Reward: {reward_source(facts)}"]
    shown = _SHOWN.get(facts.algorithm, _SHOWN["ppo"])
    items += [f"{label}: {interval(stage.get(key), short=True)}" for key, label in shown.items()]
    settings = {**at(facts.recipe, facts.algorithm, {})}
    settings |= settings.pop("args", None) or {}
    settings = {k: v for k, v in settings.items() if is_number(v)} | at(stage, "args", {})
    settings = {key: value for key, value in settings.items() if key not in shown}
    items.append(f"Settings, defaults included: {_settings(settings)}")
    items += [f"Alarm: {cell(alarm)}" for alarm in stage.get("alarms") or []]
    if identities := stage.get("identities"):
        listed = [f"{cell(key)} {number(value)}" for key, value in _flat(identities)]
        items.append("Identities checked at the start: " + ", ".join(listed))
    else:
        items.append(f"Identities checked at the start: {MISSING}")
    rows = []
    for label, names in (_CURVES_DPO if facts.algorithm == "dpo" else _CURVES).items():
        values = facts.curve(*names)
        rows.append(
            [label, number(values[0]), number(values[-1])] if values else [label, MISSING, MISSING]
        )
    head = ["curve", "first update", "last update"]
    if facts.algorithm == "dpo":
        head = ["curve", "first step logged", "last"]
    text = f"{bullets(items)}\n\n{table(head, rows)}"
    folder = "plots" if facts.published else "../../plots"
    plots = sorted((facts.record.folder / "plots").glob("*.png"))
    return "\n\n".join([text, *(f"![{cell(p.stem)}]({folder}/{p.name})" for p in plots)])
