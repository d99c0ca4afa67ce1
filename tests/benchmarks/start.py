# SPDX-License-Identifier: Apache-2.0
"""Start-up: CPU seconds of `--help`, and of `run` on the tiny model until its first SFT step.

    taskset -c 0 python tests/benchmarks/start.py --page docs/benchmarks.md

The run is the closed-world recipe; its first line in `metrics.jsonl` is the first step. What it
prints goes between the page's markers.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "lora_rlhf"]
RECIPE = ROOT / "recipes" / "closed-world" / "recipe.yaml"
_TICK = os.sysconf("SC_CLK_TCK")


def help_seconds() -> tuple[float, float]:
    """CPU and wall seconds of `lora-rlhf --help`."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL, env=_environment())
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def first_step_seconds(recipe: Path = RECIPE) -> tuple[float, float]:
    """CPU and wall seconds of `lora-rlhf run` until its first SFT step is logged."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "run" / "metrics.jsonl"
        start = time.perf_counter()
        process = subprocess.Popen(
            [*COMMAND, "run", str(recipe), "--out", str(metrics.parent)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        try:
            while not (metrics.exists() and "\n" in metrics.read_text()):
                if process.poll() is not None:
                    raise SystemExit(f"the run ended: {process.stderr and process.stderr.read()}")
                time.sleep(0.01)
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / _TICK, time.perf_counter() - start
        finally:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--page", type=Path, help="put the table between the page's markers")
    options = parser.parse_args(argv)
    rows = []
    for name, measure in (
        ("`lora-rlhf --help`", help_seconds),
        ("`lora-rlhf run`, tiny model, to the first SFT step", first_step_seconds),
    ):
        found = [measure() for _ in range(options.rounds + 1)][1:]  # the first fills disk caches
        cells = (statistics.median(column) for column in zip(*found, strict=True))
        rows.append([name, *(f"{seconds:.2f}" for seconds in cells)])
    text = report.table(["", "CPU seconds", "wall seconds"], rows)
    text += f"\n\nMedians of {options.rounds} on {report.processor()}, one thread."
    print(text)
    if options.page:
        report.into_page(options.page, "start", text)


if __name__ == "__main__":
    main()
