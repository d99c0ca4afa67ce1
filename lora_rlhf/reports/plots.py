# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run, from its record and its log only: `plots/*.png`.

The same record gives the same bytes: no date, no version, no style of the user's. What was not
logged is not drawn, and a picture with nothing to show is not written. matplotlib is imported when
the first picture is drawn, through its file renderer; no window system is touched.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_rlhf.recipe.stage_keys import ALGORITHMS
from lora_rlhf.runs.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[list[float], list[float]]
"""x and y of one line, of equal length, finite."""

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
"""Title ({}: the algorithm), stages, logged keys, unit of y: one panel each, where logged."""

EVALUATION = {
    "gold_reward": "gold reward", "win_rate": "win rate against SFT", "success": "success",
    "hallucination": "hallucination", "incidents_per_1000": "incidents per 1,000 harmful",
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
    """Draw every picture there is something for; returns the files written."""
    drawn = (training(record), evaluation(record), reward_calibration(record))
    return [path for path in drawn if path is not None]


def training(record: Record) -> Path | None:
    """`plots/training.png`: the curves of every stage, and score against sqrt(KL)."""
    panels: list[Callable[[Axes], None]] = []
    for title, stages, keys, unit in PANELS:
        for stage in stages:
            lines = record.metrics(stage)
            found = {key: xy for key in keys if (xy := _series(lines, "step", key))[0]}
            if found:
                panels.append(_curves(title.format(stage.upper()), "step", unit, found))
    for stage in POLICY_STAGES:
        found = _frontier(record.metrics(stage))
        if found:
            title = f"{stage.upper()}: score against distance"
            panels.append(_curves(title, "sqrt(KL to SFT in nats)", "reward", found, "."))
    return _save(record.folder / "plots" / "training.png", panels)


def evaluation(record: Record) -> Path | None:
    """`plots/evaluation.png`: each metric as bars by model, with the 95 % intervals."""
    found = record.data.get("evaluation") or {}
    panels = []
    for metric, title in EVALUATION.items():
        bars = {m: e for m, values in found.items() if (e := _whole(values.get(metric)))}
        if bars:
            panels.append(_bars(title, bars, list(found)))
    return _save(record.folder / "plots" / "evaluation.png", panels)


def reward_calibration(record: Record) -> Path | None:
    """`plots/reward_calibration.png`: how often the reward model is right where it says so."""
    stage = record.data.get("stages", {}).get("reward") or {}
    bins = [b for b in stage.get("calibration") or [] if b.get("n")]

    def draw(axes: Axes) -> None:
        axes.plot([0.5, 1], [0.5, 1], color="#8c8c8c", linestyle="--", label="calibrated")
        x, y = [b["predicted"] for b in bins], [b["observed"] for b in bins]
        errors = None
        if all(_number(b.get("observed_low")) is not None for b in bins):
            low = [max(0.0, b["observed"] - b["observed_low"]) for b in bins]
            errors = [low, [max(0.0, b["observed_high"] - b["observed"]) for b in bins]]
        axes.errorbar(x, y, yerr=errors, fmt="o-", color=_COLORS[1], capsize=3, label="observed")
        for b in bins:
            axes.annotate(
                f"n={b['n']}",
                (b["predicted"], b["observed"]),
                fontsize=6,
                xytext=(3, -9),
                textcoords="offset points",
            )
        _label(axes, "reward model: calibration", "stated confidence", "share right")
        axes.legend(fontsize=7)

    return _save(record.folder / "plots" / "reward_calibration.png", [draw] if bins else [])


def comparison(report: dict[str, Any], path: Path) -> Path | None:
    """Reward over sqrt(KL) of the runs that `compare.run` put side by side, as a PNG at `path`.

    Best of n stands at its bound, hollow: its true KL is smaller (2210.10760, figure 1).
    """
    metric = report["metric"]
    points = []
    for row in report["rows"]:
        found = row["metrics"]
        kl = found.get("kl") or found.get("kl_bound")
        if row["algorithm"] == "SFT":
            kl = {"value": 0.0, "low": None, "high": None, "n": 0}
        if metric in found and kl is not None:
            points.append((row, kl, found[metric]))

    def draw(axes: Axes) -> None:
        for color, (row, kl, reward) in zip(itertools.cycle(_COLORS), points, strict=False):
            inside = "white" if "kl_bound" in row["metrics"] else color
            axes.errorbar(
                [_root(kl["value"])],
                [reward["value"]],
                xerr=_whiskers(kl, _root),
                yerr=_whiskers(reward),
                fmt="o",
                capsize=3,
                color=color,
                label=row["label"]
                if row["label"] == row["algorithm"]
                else f"{row['algorithm']}: {row['label']}",
                markerfacecolor=inside,
            )
        title = "reward over distance from SFT, 95 % intervals"
        _label(axes, title, "sqrt(KL to SFT in nats)", str(metric).replace("_", " "))
        axes.legend(fontsize=6)

    return _save(path, [draw] if points else [])


def _root(kl: float) -> float:
    return math.sqrt(max(0.0, kl))


def _whiskers(
    estimate: dict[str, Any], scale: Callable[[float], float] = float
) -> list[list[float]] | None:
    """Distances down and up from the value to its interval; None where it has none."""
    value, low, high = (_number(estimate.get(key)) for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return None
    middle = scale(value)
    return [[max(0.0, middle - scale(low))], [max(0.0, scale(high) - middle)]]


# --- data --------------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    """A finite number, or None for text such as "nan", for NaN, and for what is not there."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _whole(estimate: Any) -> dict[str, Any] | None:
    """The estimate where its value is a number."""
    usable = isinstance(estimate, dict) and _number(estimate.get("value")) is not None
    return estimate if usable else None


def _series(lines: Sequence[dict[str, Any]], x_key: str, y_key: str) -> Series:
    points = [(_number(line.get(x_key)), _number(line.get(y_key))) for line in lines]
    kept = [(x, y) for x, y in points if x is not None and y is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def _frontier(lines: Sequence[dict[str, Any]]) -> dict[str, Series]:
    """Proxy and gold reward over sqrt(KL), as in Gao et al. 2022 (2210.10760, figure 1)."""
    found = {}
    for key in ("reward/score", "rewards/gold"):
        kl, reward = _series(lines, "kl/sequence", key)
        if kl:  # a sampled KL may fall below 0 near the start; it is drawn at 0
            found[key] = ([math.sqrt(max(0.0, x)) for x in kl], reward)
    return found


# --- drawing -----------------------------------------------------------------------------------


def _curves(
    title: str, x: str, y: str, found: dict[str, Series], style: str = "-"
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for color, (key, (xs, ys)) in zip(_COLORS[1:], found.items(), strict=False):
            look = ".-" if style == "-" and len(xs) < 30 else style
            axes.plot(xs, ys, look, color=color, linewidth=1.2, label=key)
        _label(axes, title, x, y)
        if len(found) > 1:
            axes.legend(fontsize=7)

    return draw


def _bars(title: str, bars: dict[str, dict[str, Any]], models: list[str]) -> Callable[[Axes], None]:
    """Bars in the order of `models`; a model keeps its colour in every panel."""

    def draw(axes: Axes) -> None:
        for x, (model, estimate) in enumerate(bars.items()):
            value, errors = float(estimate["value"]), _whiskers(estimate)
            color = _COLORS[models.index(model) % len(_COLORS)]
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


@contextlib.contextmanager
def _plain_style() -> Iterator[type[Figure]]:
    """matplotlib as shipped, whatever the user's style file says; the caller's style comes back."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield Figure


def _save(path: Path, panels: Sequence[Callable[[Axes], None]]) -> Path | None:
    """Draw panels in a grid; a picture of an earlier try is removed where there are none."""
    if not panels:
        path.unlink(missing_ok=True)
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = max(_WIDTH * columns, 4.5), _HEIGHT * rows + 0.3
    with _plain_style() as figure_class:
        figure = figure_class(figsize=(width, height))
        # Margins in inches, not matplotlib's layout engines: those take seconds for 15 panels.
        figure.subplots_adjust(
            left=0.65 / width,
            right=1 - 0.15 / width,
            bottom=0.5 / height,
            top=1 - 0.3 / height,
            wspace=0.32,
            hspace=0.5,
        )
        for number, draw in enumerate(panels, start=1):
            draw(figure.add_subplot(rows, columns, number))
        # None removes matplotlib's own version from the file.
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
    return path
