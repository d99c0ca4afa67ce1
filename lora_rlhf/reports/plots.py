# SPDX-License-Identifier: Apache-2.0
"""Plots of a run, from its record and log: `plots/*.png`.

The same record gives the same bytes: files do not depend on date, version or the user's style.
Metrics that were not logged are not drawn, and an empty plot is not written. matplotlib is imported
when the first plot is drawn, with its file renderer, so that no window system is needed.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_rlhf.recipe.stage_keys import ALGORITHMS
from lora_rlhf.runs.disk import make_place, write_atomically
from lora_rlhf.runs.record import Record

from .cards.card_markdown import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Callable[["Axes"], None]  # draws one panel
Series = tuple[list[float], list[float]]  # x and y of one curve: finite, of equal length

POLICY_STAGES = tuple(name for name in ALGORITHMS if name != "best_of_n")

PANELS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...] = (
    ("SFT: loss", ("sft",), ("loss", "eval_loss"), "nats per token"),
    ("reward model: loss", ("reward",), ("loss", "eval_loss"), "nats per comparison"),
    ("reward model: accuracy", ("reward",), ("accuracy", "eval_accuracy"), "share of comparisons"),
    ("{}: loss", ("dpo",), ("loss",), "nats per comparison"),
    ("{}: accuracy", ("dpo",), ("accuracy",), "share of comparisons"),
    ("{}: margin", ("dpo",), ("margin",), "beta x log-ratio"),
    ("{}: score", POLICY_STAGES, ("reward/score", "rewards/gold", "reward"), "reward"),
    ("{}: KL to SFT", POLICY_STAGES, ("kl/sequence",), "nats per sequence"),
    ("{}: KL to SFT, estimator k3", POLICY_STAGES, ("kl/k3", "kl"), "nats per token"),
    ("{}: value, explained variance", POLICY_STAGES, ("value/explained_variance",), "share"),
    ("{}: value loss", POLICY_STAGES, ("value/loss",), "loss"),
    ("{}: entropy", POLICY_STAGES, ("policy/entropy", "entropy"), "nats per token"),
    ("{}: length", POLICY_STAGES, ("completions/length", "completions/mean_length"), "tokens"),
    ("{}: ended by itself", POLICY_STAGES, ("completions/eos_rate",), "share of completions"),
    ("{}: clip fraction", POLICY_STAGES, ("policy/clip_fraction",), "share of tokens"),
    ("{}: largest ratio", POLICY_STAGES, ("policy/ratio_max",), "ratio"),
    ("{}: gradient norm", POLICY_STAGES, ("policy/grad_norm", "value/grad_norm"), "norm"),
)
"""One panel each: title ({}: the algorithm), stages, logged keys, unit of y."""

EVALUATION = {
    "gold_reward": "gold reward", "win_rate": "win rate against SFT", "success": "success",
    "hallucination": "hallucination", "false_abstention": "false abstention",
    "missed_abstention": "missed abstention", "incidents_per_1000": "incidents per 1,000 harmful",
    "over_refusal": "over-refusal", "constraint": "constraints kept",
    "held_out_reward": "held-out reward", "win_rate_held_out": "win rate, held-out model",
    "proxy_reward": "proxy reward", "win_rate_proxy": "win rate, reward model",
    "kl": "KL to SFT (nats per sequence)", "kl_bound": "KL to SFT, upper bound (nats)",
    "length": "tokens per answer", "eos_rate": "ended by itself", "repetition": "repetition",
}  # fmt: skip
"""Metric of the record -> title of its panel."""

_COLORS = ("#8c8c8c", "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3")
_WIDTH, _HEIGHT = 3.6, 2.6  # inches of one panel
_COLUMNS = 4


def run(record: Record) -> list[Path]:
    """Draw all plots; returns the files written."""
    drawn = (training(record), evaluation(record), reward_calibration(record))
    return [path for path in drawn if path is not None]


def training(record: Record) -> Path | None:
    """`plots/training.png`: the curves of every stage, and score against sqrt(KL)."""
    panels: list[Panel] = []
    for title, stages, keys, unit in PANELS:
        for stage in stages:
            lines = record.metrics(stage)
            curves = {key: xy for key in keys if (xy := _series(lines, "step", key))[0]}
            if curves:
                panels.append(_curves(title.format(stage.upper()), "step", unit, curves))
    for stage in POLICY_STAGES:  # as in Gao et al. 2022 (2210.10760, figure 1)
        curves = {}
        for key in ("reward/score", "rewards/gold"):
            kl, reward = _series(record.metrics(stage), "kl/sequence", key)
            if kl:
                curves[key] = ([_root(x) for x in kl], reward)
        if curves:
            title = f"{stage.upper()}: score against distance"
            panels.append(_curves(title, "sqrt(KL to SFT in nats)", "reward", curves, "."))
    return _save(record.folder / "plots" / "training.png", panels)


def evaluation(record: Record) -> Path | None:
    """`plots/evaluation.png`: each metric as bars by model, with the 95 % intervals."""
    models = {
        model: values
        for model, values in (record.data.get("evaluation") or {}).items()
        if isinstance(values, Mapping)
    }
    panels = []
    for metric, title in EVALUATION.items():
        estimates = {model: values.get(metric) or {} for model, values in models.items()}
        bars = {m: e for m, e in estimates.items() if is_number(e.get("value"))}
        if bars:
            panels.append(_bars(title, bars, list(models)))
    return _save(record.folder / "plots" / "evaluation.png", panels)


def reward_calibration(record: Record) -> Path | None:
    """`plots/reward_calibration.png`: accuracy of the reward model by its stated confidence."""
    stage = record.data.get("stages", {}).get("reward") or {}
    bins = [b for b in stage.get("calibration") or [] if b.get("n")]

    def draw(axes: Axes) -> None:
        axes.plot([0.5, 1], [0.5, 1], color="#8c8c8c", linestyle="--", label="calibrated")
        x, y = [b["predicted"] for b in bins], [b["observed"] for b in bins]
        names = {"value": "observed", "low": "observed_low", "high": "observed_high"}
        each = [_whiskers({key: b.get(name) for key, name in names.items()}) for b in bins]
        whiskers = [w for w in each if w is not None]
        errors = [[w[end][0] for w in whiskers] for end in (0, 1)]
        axes.errorbar(
            x,
            y,
            errors if len(whiskers) == len(bins) else None,
            fmt="o-",
            color=_COLORS[1],
            capsize=3,
            label="observed",
        )
        for b, point in zip(bins, zip(x, y, strict=True), strict=True):
            axes.annotate(f"n={b['n']}", point, (3, -9), textcoords="offset points", fontsize=6)
        _label(axes, "reward model: calibration", "stated confidence", "share right")
        axes.legend(fontsize=7)

    return _save(record.folder / "plots" / "reward_calibration.png", [draw] if bins else [])


def comparison(report: dict[str, Any], path: Path) -> Path | None:
    """Draw reward over sqrt(KL) of the report of `compare.run`, as a PNG at `path`.

    Best of n is drawn hollow, at its upper bound: its true KL is smaller (2210.10760, figure 1).
    """
    metric = report["metric"]
    points = []
    for row in report["rows"]:
        metrics = row["metrics"]
        kl = metrics.get("kl") or metrics.get("kl_bound")
        if row["algorithm"] == "SFT":
            kl = {"value": 0.0, "low": None, "high": None, "n": 0}
        if metric in metrics and kl is not None:
            points.append((row, kl, metrics[metric]))

    def draw(axes: Axes) -> None:
        for color, (row, kl, reward) in zip(itertools.cycle(_COLORS), points, strict=False):
            label, algorithm = row["label"], row["algorithm"]
            axes.errorbar(
                [_root(kl["value"])],
                [reward["value"]],
                xerr=_whiskers(kl, _root),
                yerr=_whiskers(reward),
                fmt="o",
                capsize=3,
                color=color,
                label=label if algorithm == "SFT" else f"{algorithm}: {label}",
                markerfacecolor="white" if "kl_bound" in row["metrics"] else color,
            )
        title = "reward over distance from SFT, 95 % intervals"
        _label(axes, title, "sqrt(KL to SFT in nats)", str(metric).replace("_", " "))
        axes.legend(fontsize=6)

    return _save(path, [draw] if points else [])


def usage(report: dict[str, Any], path: Path) -> Path | None:
    """Draw the report of `usage_report.report` as bars by adapter, as a PNG at `path`."""
    models = [group["name"] for group in report["groups"]]
    panels = []
    for metric in dict.fromkeys(name for group in report["groups"] for name in group["metrics"]):
        bars = {g["name"]: g["metrics"][metric] for g in report["groups"] if metric in g["metrics"]}
        panels.append(_bars(metric, bars, models))
    return _save(path, panels)


def _root(kl: float) -> float:
    """The distance from SFT; a sampled KL may be slightly negative and is then drawn at 0."""
    return math.sqrt(max(0.0, kl))


def _whiskers(
    estimate: dict[str, Any], scale: Callable[[float], float] = float
) -> list[list[float]] | None:
    """Distances from the value down and up to the ends of its interval; None without one."""
    ends = [estimate.get(key) for key in ("low", "value", "high")]
    if not all(map(is_number, ends)):
        return None
    low, value, high = (scale(float(end)) for end in ends if end is not None)
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _series(lines: Sequence[dict[str, Any]], x: str, y: str) -> Series:
    known = [line for line in lines if is_number(line.get(x)) and is_number(line.get(y))]
    return [line[x] for line in known], [line[y] for line in known]


def _curves(title: str, x: str, y: str, curves: dict[str, Series], style: str = "-") -> Panel:
    def draw(axes: Axes) -> None:
        for color, (key, (xs, ys)) in zip(_COLORS[1:], curves.items(), strict=False):
            look = ".-" if style == "-" and len(xs) < 30 else style
            axes.plot(xs, ys, look, color=color, linewidth=1.2, label=key)
        _label(axes, title, x, y)
        if len(curves) > 1:
            axes.legend(fontsize=7)

    return draw


def _bars(title: str, bars: dict[str, dict[str, Any]], models: list[str]) -> Panel:
    """One bar per model; a model has the same colour in every panel."""

    def draw(axes: Axes) -> None:
        for x, (model, estimate) in enumerate(bars.items()):
            color = _COLORS[models.index(model) % len(_COLORS)]
            value, errors = float(estimate["value"]), _whiskers(estimate)
            axes.bar([x], [value], yerr=errors, capsize=4, width=0.6, color=color)
        axes.set_xticks(range(len(bars)), list(bars))
        if title.startswith("win rate"):
            axes.axhline(0.5, color="black", linewidth=0.8, linestyle="--")
            axes.set_ylim(0, 1)
        sizes = sorted({int(estimate["n"]) for estimate in bars.values()})
        counts = "n = " + ", ".join(map(str, sizes)) if any(sizes) else "from a formula"
        _label(axes, title, counts, "")

    return draw


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _save(path: Path, panels: Sequence[Panel]) -> Path | None:
    """Draw panels in a grid with matplotlib's defaults; without panels, remove an older file."""
    if not panels:
        path.unlink(missing_ok=True)
        return None
    make_place(path)
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = max(_WIDTH * columns, 4.5), _HEIGHT * rows + 0.3
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(width, height))
        # Margins in inches: matplotlib's layout engines take seconds for 15 panels.
        left, right = 0.65 / width, 1 - 0.15 / width
        bottom, top = 0.5 / height, 1 - 0.3 / height
        figure.subplots_adjust(left, bottom, right, top, wspace=0.32, hspace=0.5)
        for number, draw in enumerate(panels, start=1):
            draw(figure.add_subplot(rows, columns, number))
        # None keeps matplotlib's version out of the file.
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
        write_atomically(path, picture.getvalue())
    return path
