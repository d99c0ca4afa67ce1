# SPDX-License-Identifier: Apache-2.0
"""Write the tables of docs/scale.md from the model in planning/scale.py: `make docs`.

    python docs/make_scale.py                 # from the parts in docs/scale.json
    python docs/make_scale.py RUN RUN 2=RUN   # measure the demo's parts anew, from runs of it; and
                                              # compare them with a run by 2 processes

The seconds of SmolLM2-135M are those of case c in docs/benchmarks.md.
"""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_rlhf import tiny
from lora_rlhf.models.loading import find_config
from lora_rlhf.planning import scale
from lora_rlhf.planning.plan import planner_for
from lora_rlhf.recipe.loader import load_recipe
from lora_rlhf.runs.record import Record

DOCS = Path(__file__).resolve().parent
PAGE, STORED = DOCS / "scale.md", DOCS / "scale.json"
WORKERS = 1024
LINKS = (("1Gbit", "0.1ms"), ("25Gbit", "0.1ms"), ("1Gbit", "30ms"))
CASE_C = [
    "lora.top_fraction=1.0", "lora.r=16", "model.load_in_4bit=false", "ppo.value=adapter",
    "ppo.args={per_device_train_batch_size: 4, steps_per_generation: 4, num_iterations: 4, "
    "gradient_accumulation_steps: 1, max_completion_length: 64}", "data.max_prompt_tokens=64",
]  # fmt: skip
"""The settings of case c in docs/benchmarks.md."""
BASES = ("smollm2-135m-hh", "llama-3.2-1b-hh", "llama-3.1-8b-ultrafeedback")


def parts(data: dict[str, Any]) -> scale.Parts:
    """Build parts from their JSON."""
    names = ("rollout", "score", "micro")
    rollout, score, micro = (scale.Part(**data[name]) for name in names)
    return scale.Parts(rollout, score, micro, data["updates"])


def case_c(work: scale.Work, cv: scale.Parts) -> scale.Parts:
    """Read the seconds of case c; all are per row. The spread is that of the demo."""
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    text = text[text.index("<!-- case c -->") : text.index("<!-- end case c -->")]
    row = re.search(r"^\| ours \| float32 \| 1 \|(.*)$", text, re.MULTILINE)
    assert row, "docs/benchmarks.md has no row of case c"
    rollout, score, train = (float(cell) for cell in row[1].split("|")[1:4])
    micro = train / (work.steps * work.micro_batches * work.micro_rows)
    seconds = (rollout / work.episodes, score / work.episodes, micro)
    spread = (cv.rollout.cv, cv.score.cv, cv.micro.cv)
    return scale.Parts(*(scale.Part(0.0, s, c) for s, c in zip(seconds, spread, strict=True)), 5)


def recipe_of(path: Path, sets: list[str] | None = None) -> tuple[Any, Any, Any]:
    """Return a recipe, the config of its base, and its plan."""
    recipe = load_recipe(path, sets)
    config = find_config(recipe.model, path if path.is_dir() else path.parent)
    return recipe, config, planner_for(config, "cpu").plan(recipe)


def curves(made: scale.Scale) -> str:
    """Return the curves of a recipe whose batch grows, over all links."""
    out = ""
    for speed, latency in LINKS:
        link = scale.Network.parse(speed, latency)
        there = scale.Scale(made.parts, made.work, link, made.trained, made.whole, WORKERS)
        points, full = (there.curve(grown=True, full=full) for full in (False, True))
        head, rows = scale.table(points, full)
        rows = [row for row in rows if int(row[0]).bit_length() % 2]  # powers of four
        out += f"\n**{speed}/s, {latency}**: {scale.bend(points)}; all parameters: "
        out += f"{scale.bend(full)}.\n\n{_table(head, rows)}"
    return out


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def inputs(measured: scale.Parts) -> str:
    """Return the measured parts of the demo."""
    rows = [
        [name, f"{part.fixed:.4g}", f"{part.per_row:.4g}", f"{100 * part.cv:.1f} %"]
        for name, part in (
            ("rollout", measured.rollout), ("score", measured.score),
            ("micro-batch of the update", measured.micro),
        )
    ]  # fmt: skip
    return "\n" + _table(["section", "fixed, s", "per row, s", "coefficient of variation"], rows)


def exchanges() -> str:
    """Return the bytes and seconds of one exchange on some bases."""
    rows = []
    for name in BASES:
        recipe, config, plan = recipe_of(DOCS.parent / "recipes" / name)
        trained, whole = scale.exchanged(config, recipe, plan)
        row = [name, f"{recipe.lora.r}, {recipe.lora.top_fraction:g}"]
        for count in (trained, whole):
            sent = scale.NUMBER * count
            row.append(scale.format_bytes(sent))
            for speed in ("1Gbit", "25Gbit"):
                seconds = scale.Network.parse(speed, "0s").all_reduce(sent, WORKERS)[0]
                row.append(f"{seconds:.3g}")
        rows.append(row)
    head = ["recipe", "rank, layers", "adapters and heads", "1 Gbit/s, s", "25 Gbit/s, s"]
    return "\n" + _table([*head, "all parameters", "1 Gbit/s, s", "25 Gbit/s, s"], rows)


def render() -> str:
    """Return the page with its blocks as the model is now."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    measured = parts(stored)
    link = scale.Network.parse(*LINKS[0])
    recipe, config, plan = recipe_of(tiny.recipe())
    demo = scale.Scale(
        measured, scale.Work.of(recipe), link, *scale.exchanged(config, recipe, plan), WORKERS
    )
    recipe, config, plan = recipe_of(DOCS.parent / "recipes" / BASES[0], CASE_C)
    work = scale.Work.of(recipe)
    sizes = scale.exchanged(config, recipe, plan)
    smol = scale.Scale(case_c(work, measured), work, link, *sizes, WORKERS)
    text = PAGE.read_text(encoding="utf-8")
    blocks = {
        "inputs": inputs(measured), "demo": curves(demo), "smollm": curves(smol),
        "exchange": exchanges(), "check": checks(measured, stored["processes"]),
    }  # fmt: skip
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        assert pattern.search(text), f"{PAGE} has no block {name}"
        text = pattern.sub(lambda found, block=block: found[1] + block + "\n" + found[2], text)
    return text


def checks(measured: scale.Parts, runs: dict[str, dict[str, float]]) -> str:
    """Return the seconds of a process of several, beside the model's."""
    work, rows = scale.Work.of(load_recipe(tiny.recipe())), []
    for count, seconds in runs.items():
        own = [size // int(count) for size in (work.episodes, work.micro_rows)]
        micro = work.steps * work.micro_batches * measured.micro.seconds(own[1])
        modelled = measured.rollout.seconds(own[0]), measured.score.seconds(own[0]), micro
        pairs = [*zip(modelled, seconds.values(), strict=True)]
        pairs.append((sum(modelled), sum(seconds.values())))
        rows.append([count, *(f"{ours:.2f} / {theirs:.2f}" for ours, theirs in pairs)])
        rows[-1].append(f"{pairs[-1][1] / pairs[-1][0]:.2f}")
    head = ["processes", "rollout, s", "score, s", "update, s", "sum, s", "measured / modelled"]
    return "\n" + _table(head, rows)


def store(arguments: list[str]) -> None:
    """Measure the parts from runs of the demo, and what processes took from `NUMBER=RUN`."""
    counted = [text.partition("=") for text in arguments if "=" in text]
    runs = [Record.read(text) for text in arguments if "=" not in text]
    data = asdict(scale.Parts.measure(runs, load_recipe(tiny.recipe())))
    data["processes"] = {
        count: {
            name: fmean(line[name] for line in scale.phases(Record.read(run)))
            for name in ("rollout", "score", "update")
        }
        for count, _, run in [("1", "", arguments[0]), *counted]
    }
    STORED.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:]:
        store(sys.argv[1:])
    PAGE.write_text(render(), encoding="utf-8")
