# SPDX-License-Identifier: Apache-2.0
"""4-bit PPO at 1B and 8B on one CUDA device: peak memory, and seconds per sample by phase.

    python tests/benchmarks/gpu.py --json gpu.json --page docs/benchmarks.md

Random weights in the shape of Llama 3, NF4 with bfloat16 compute (float16 below capability 8.0),
LoRA r=16 on all linear layers, 8 and 16 × (256 + 256) tokens, one PPO epoch; then the same beside
the two further 4-bit backbones that separate reward and value models would be, which changes the
memory and not the work; then the largest shape of a ladder that stays under 16 and 24 GB.

It needs CUDA. `--smoke` runs all of it on a tiny shape on whatever there is, to see that it works;
what it prints then says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import report

HERE = Path(__file__).resolve().parent
MODELS = ("llama1b", "llama8b")
LADDER = ("qwen32b", "mistral24b", "qwen14b", "llama8b", "llama3b", "llama1b")
LIMITS_GB = (16, 24)
ROLLOUTS = (8, 16)
OUT_OF_MEMORY = "out of memory"


def run(preset: str, prompts: int, more: list[str], smoke: bool) -> dict[str, Any]:
    """One configuration in a process of its own; `failed` is its last words where it has none."""
    tokens, updates = ("8", "1") if smoke else ("256", "3")
    command = [
        sys.executable,
        str(HERE / "ours.py"),
        "--preset",
        preset,
        "--num-prompts",
        str(prompts),
        "--prompt-len",
        tokens,
        "--response-len",
        tokens,
        "--ppo-epochs",
        "1",
        "--minibatch",
        "2",
        "--lora-targets",
        "all-linear",
        "--four-bit",
        "--checkpointing",
        "--updates",
        updates,
        "--dtype",
        _dtype(),
        *more,
    ]
    print(" ".join(command[1:]), file=sys.stderr, flush=True)
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [""]
        if OUT_OF_MEMORY not in done.stderr:
            raise SystemExit("\n".join(words[-15:]))
        return {"preset": preset, "num_prompts": prompts, "failed": OUT_OF_MEMORY}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _dtype() -> str:

    from lora_rlhf.runtime.devices import pick_dtype

    return str(pick_dtype("auto")).removeprefix("torch.")


def _row(found: dict[str, Any], models: str) -> list[str]:
    head = [found["preset"], models, str(found["num_prompts"])]
    if "failed" in found:
        return [*head, found["failed"], *["–"] * 5]
    each = [
        found[f"wall_{part}_s"] / found["num_prompts"]
        for part in ("total", "generate", "score", "train")
    ]
    peak = found.get("cuda_peak_mb", found["peak_rss_mb"])
    return [*head, f"{peak / 1024:.2f}", *(f"{s:.3f}" for s in each), f"{each[1] / each[0]:.0%}"]


def compare(smoke: bool) -> tuple[list[dict[str, Any]], str]:
    """One backbone for all roles against three, for each model and rollout."""
    runs, rows = [], []
    for preset in ("tiny",) if smoke else MODELS:
        for prompts in (4,) if smoke else ROLLOUTS:
            for copies, models in ((0, "one backbone"), (2, "three separate")):
                runs.append(run(preset, prompts, ["--copies", str(copies)], smoke))
                rows.append(_row(runs[-1], models))
    heads = [
        "model",
        "models",
        "episodes",
        "peak GB",
        "s per sample",
        "generate",
        "score",
        "train",
        "share of generation",
    ]
    return runs, report.table(heads, rows)


def fits(smoke: bool) -> tuple[list[dict[str, Any]], str]:
    """For each limit of memory the largest shape that runs under it."""
    runs, rows = [], []
    for limit in LIMITS_GB:
        for preset in ("tiny",) if smoke else LADDER:
            found = run(preset, 4 if smoke else 8, ["--memory-gb", str(limit)], smoke)
            runs.append({**found, "limit_gb": limit})
            if "failed" not in found:
                peak = found.get("cuda_reserved_mb", found["peak_rss_mb"])
                rows.append([f"{limit} GB", preset, f"{peak / 1024:.2f}"])
                break
        else:
            rows.append([f"{limit} GB", "none of " + ", ".join(LADDER), "–"])
    return runs, report.table(["limit", "largest that runs", "reserved GB"], rows)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, with or without CUDA")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="put the tables between the page's markers")
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available() and not options.smoke:
        raise SystemExit("this needs a CUDA device; --smoke tries the programs on this machine")
    if options.smoke and options.page:
        parser.error("--smoke measures nothing that belongs on the page")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    sizes, first = compare(options.smoke)
    limits, second = fits(options.smoke)
    text = f"{device}, torch {torch.__version__}; wall seconds.\n\n{first}\n\n{second}\n"
    print(text)
    if options.json:
        found = {"device": device, "sizes": sizes, "limits": limits}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.page:
        report.into_page(options.page, "gpu", text)


if __name__ == "__main__":
    main()
