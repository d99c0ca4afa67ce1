# SPDX-License-Identifier: Apache-2.0
"""From what run.py measured to tables, and into the page."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import flops

PEERS = {"trl112": "TRL 1.12.0 PPO", "trl011": "TRL 0.11.4 multi-adapter"}
PARTS = ("total", *common.PHASES)


def median(entry: dict[str, Any], part: str, unit: str = "cpu") -> float:
    """Of one part of the update, over the rounds."""
    return statistics.median(record[unit][part] for record in entry["rounds"])


def ratios(entries: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """ours -> peer -> part -> [median, lowest, highest] of peer / ours, taken round by round."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    peers = [e for e in entries if e["name"] in PEERS]
    for ours in entries:
        if ours["dtype"] != "float32" or ours["name"] in PEERS:
            continue
        for peer in peers:
            parts = found.setdefault(ours["name"], {}).setdefault(peer["name"], {})
            for part in PARTS:
                each = [
                    theirs["cpu"][part] / mine["cpu"][part]
                    for theirs, mine in zip(peer["rounds"], ours["rounds"], strict=True)
                    if mine["cpu"][part]
                ]
                if each:
                    parts[part] = [statistics.median(each), min(each), max(each)]
    return found


def joined(files: list[dict[str, Any]]) -> dict[str, Any]:
    """The programs of several measurements of one case; ratios are those inside each of them."""
    first, *others = files
    for other in others:
        if other["case"] != first["case"] or other["machine"]["processor"] != processor_of(first):
            raise SystemExit("these are not of one case on one processor")
        first["programs"] += other["programs"]
        first["ratios"] |= other["ratios"]
    return first


def processor_of(found: dict[str, Any]) -> str:
    """On which it was measured."""
    return str(found["machine"]["processor"])


def markdown(found: dict[str, Any]) -> str:
    """All tables of one case."""
    machine = found["machine"]
    parts = [
        f"`{found['preset']}`, {found['num_prompts']} × ({found['prompt_len']} + "
        f"{found['response_len']}) tokens, {found['ppo_epochs']} epochs, minibatch "
        f"{found['minibatch']}, LoRA r=16 on {found['lora_targets'].replace(',', ', ')}. "
        f"{found['rounds']} rounds on {machine['processor']}, one thread; CPU seconds, medians.",
        _seconds(found["programs"], found["rounds"]),
    ]
    if found["ratios"]:
        parts += [
            "How many times faster, float32 against float32: median (lowest to highest) of "
            "the rounds.",
            _ratio_table(found["ratios"]),
            "Peak memory above the imports, as a share of the peer's.",
            _peak_table(found["programs"]),
        ]
    accounted = [e for e in found["programs"] if "flops" in e]
    if accounted:
        parts += [_LIMIT, _limit_table(found, accounted), _rest_table(accounted)]
    return "\n\n".join(parts) + "\n"


_LIMIT = (
    "How close scoring and training together come to the limit: operations that the update needs "
    "by the formula in `tests/benchmarks/flops.py`, operations done by torch's counter (which "
    "omits attention), needed operations per second, and these as a share of the fastest plain "
    "float32 product of the same process and round."
)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _seconds(entries: list[dict[str, Any]], usual: int) -> str:
    rows = []
    for entry in entries:
        rounds = len(entry["rounds"])
        dtype = entry["dtype"] if rounds == usual else f"{entry['dtype']} ({rounds} rounds)"
        total, generate, score, train = (median(entry, part) for part in PARTS)
        facts = entry["facts"]
        rows.append(
            [
                PEERS.get(entry["name"], "ours"),
                dtype,
                entry["fraction"] or "–",
                *(f"{seconds:.2f}" for seconds in (total, generate, score, train)),
                f"{generate / total:.0%}",
                f"{peak(entry):.0f}",
                f"{facts['model_tensors_mb']:.0f}",
            ]
        )
    return table(
        [
            "",
            "dtype",
            "top fraction",
            "update, s",
            "generate",
            "score",
            "train",
            "share of generation",
            "peak MB above imports",
            "MB of model tensors",
        ],
        rows,
    )


def peak(entry: dict[str, Any]) -> float:
    """Megabytes of resident memory above the imports, at the highest."""
    highest = max(record["peak_mb"] for record in entry["rounds"])
    return float(highest - entry["facts"]["rss_before_models_mb"])


def _peak_table(entries: list[dict[str, Any]]) -> str:
    peers = [e for e in entries if e["name"] in PEERS]
    ours = [e for e in entries if e["name"] not in PEERS and e["dtype"] in _IN_FLOAT32]
    rows = [
        [_IN_FLOAT32[e["dtype"]], e["fraction"], *(f"{peak(e) / peak(p):.2f}" for p in peers)]
        for e in ours
    ]
    return table(["", "top fraction", *(f"of {PEERS[p['name']]}" for p in peers)], rows)


_IN_FLOAT32 = {"float32": "ours", "checkpointing": "ours, gradient checkpointing"}


def _ratio_table(found: dict[str, Any]) -> str:
    rows = []
    for ours, peers in found.items():
        for peer, parts in peers.items():
            cells = [
                "{:.2f} ({:.2f} to {:.2f})".format(*parts[part]) if part in parts else "–"
                for part in PARTS
            ]
            rows.append([ours.rsplit(" ", 1)[1], PEERS[peer], *cells])
    return table(["our top fraction", "against", "update", "generate", "score", "train"], rows)


def accounting(found: dict[str, Any], entry: dict[str, Any]) -> dict[str, float]:
    """Needed and counted operations of score and train, their rate, and the plain product's."""
    shape = common.PRESETS[found["preset"]]
    facts, counted = entry["facts"], entry["flops"]
    names = found["lora_targets"]
    targets = common.LINEAR if names == "all-linear" else tuple(names.split(","))
    length = found["prompt_len"] + found["response_len"]
    tokens = found["num_prompts"] * length
    partly = facts["adapted_layers"] < shape.layers
    passes = counted["tokens"]["highest"].get("score", 0) / tokens
    trunk = counted["tokens"]["lowest"].get("score", 0) / tokens if partly else 0.0
    need = flops.needed(
        shape,
        adapted=facts["adapted_layers"],
        targets=targets,
        r=facts["lora_r"],
        sequences=found["num_prompts"],
        prompt=found["prompt_len"],
        completion=found["response_len"],
        epochs=found["ppo_epochs"],
        role_passes=min(passes, 4.0),
        trunk_passes=min(trunk, 1.0),
    )
    needed = need["score"] + need["train"]
    rates = [needed / (r["cpu"]["score"] + r["cpu"]["train"]) / 1e9 for r in entry["rounds"]]
    plain = [max(r["matmul"].values()) for r in entry["rounds"]]
    done = sum(counted["flops"].get(part, 0) for part in ("score", "train"))
    return {
        "needed": needed,
        "done": done,
        "role_passes": passes,
        "trunk_passes": trunk,
        "rate": statistics.median(rates),
        "plain": statistics.median(plain),
        "share": statistics.median(a / b for a, b in zip(rates, plain, strict=True)),
    }


def _limit_table(found: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    rows = []
    for entry in entries:
        sums = accounting(found, entry)
        seconds = median(entry, "score") + median(entry, "train")
        rows.append(
            [
                entry["fraction"],
                f"{sums['needed'] / 1e9:.1f}",
                f"{sums['done'] / 1e9:.1f}",
                f"{sums['role_passes']:.2f}",
                f"{sums['trunk_passes']:.2f}",
                f"{seconds:.2f}",
                f"{sums['rate']:.1f}",
                f"{sums['plain']:.1f}",
                f"{sums['share']:.0%}",
            ]
        )
    return table(
        [
            "top fraction",
            "needed, GFLOP",
            "done, GFLOP",
            "passes of roles in score",
            "passes of frozen layers in score",
            "score + train, s",
            "GFLOP/s of what is needed",
            "plain product, GFLOP/s",
            "share",
        ],
        rows,
    )


def _rest_table(entries: list[dict[str, Any]]) -> str:
    """Where the time of score and train goes: the profile's shares."""
    kinds = list(dict.fromkeys(k for e in entries for k in e["profile"]["seconds_by_kind"]))
    rows = []
    for entry in entries:
        profile = entry["profile"]
        spent, whole = profile["seconds_by_kind"], profile["profiled_seconds"]
        rest = max(0.0, whole - sum(spent.values()))
        rows.append(
            [
                entry["fraction"],
                *(f"{spent.get(k, 0.0) / whole:.0%}" for k in kinds),
                f"{rest / whole:.0%}",
            ]
        )
    return (
        "Where the time goes: inside operators by kind (torch's profiler over scoring and the "
        "first four optimizer steps of one more update), and between operators.\n\n"
        + table(["top fraction", *kinds, "interpreter and profiler"], rows)
    )


def processor() -> str:
    """What this machine calls its processor."""
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def into_page(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- end name -->`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    old = page.read_text(encoding="utf-8")
    if begin not in old or end not in old:
        raise SystemExit(f"{page} has no markers {begin.strip()} and {end}")
    head, tail = old.split(begin, 1)[0], old.split(end, 1)[1]
    page.write_text(f"{head}{begin}\n{text.strip()}\n\n{end}{tail}", encoding="utf-8")
