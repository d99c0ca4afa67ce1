# SPDX-License-Identifier: Apache-2.0
"""PPO updates of ours and of the peers, alternating: one table and one JSON file a case.

    taskset -c 0 python tests/benchmarks/run.py --case a --json a.json --page docs/benchmarks.md

Every program is a process that makes one update on command. After a warm-up each, a round is one
update of every program, the order turning from round to round; a ratio is taken inside a round, and
what is printed is its median over the rounds with the lowest and the highest. One thread, CPU
seconds. Environments of the peers are made in `--venv-dir` where they are not there yet.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import common
import report
from peers import environments

HERE = Path(__file__).resolve().parent

DTYPES = {
    "float32": [], "checkpointing": ["--checkpointing"], "bfloat16": ["--dtype", "bfloat16"],
    "4-bit": ["--four-bit"],
}  # fmt: skip
"""How ours is run, and the options for it; checkpointing and 4-bit compute in float32."""

_MATMUL = "matmul 2048 2048 2048"


class Program(NamedTuple):
    """One column of the comparison."""

    name: str
    command: list[str]
    dtype: str
    fraction: Fraction | None


class Worker:
    """A program that runs and waits; it makes one update when it is asked to."""

    def __init__(self, program: Program, log: Path) -> None:
        self.program, self.log = program, log
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _path(program)}
        self.process = subprocess.Popen(
            program.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            stderr=log.open("w"),
            env=environment,
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"{self.program.name} ended with {code}:\n{tail}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, order: str) -> dict[str, Any]:
        """What it answers to one order."""
        assert self.process.stdin is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        found = self._read()
        if order != "stop":
            self._read()  # that it is ready again
        return found

    def stop(self) -> dict[str, Any]:
        """Its summary; the process is over."""
        found = self.ask("stop")
        self.process.wait()
        return found

    def kill(self) -> None:
        """End the process whatever it is doing."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _path(program: Program) -> str:
    return "" if program.fraction is None else str(HERE.parents[1])


def programs(options: argparse.Namespace) -> list[Program]:
    """Those of this run, the peers first."""
    case = common.CASES[options.case]
    shared = ["--worker", "--threads", "1", "--updates", str(options.rounds + 3)]
    for key, value in case.items():
        shared += [f"--{key.replace('_', '-')}", str(value)]
    found = []
    for name, (script, _) in environments.PEERS.items():
        if name in options.only:
            python = environments.python_of(name, options.venv_dir)
            found.append(Program(name, [python, str(script), *shared], "float32", None))
    for dtype, more in DTYPES.items():
        for fraction in options.fractions if dtype in options.only else ():
            command = [sys.executable, str(HERE / "ours.py"), *shared, *more]
            command += ["--top-fraction", str(fraction)]
            found.append(Program(f"ours {dtype} {fraction}", command, dtype, fraction))
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all programs; those that are compared run side by side."""
    every = programs(options)
    compared = [p for p in every if p.dtype == "float32"]
    entries: list[dict[str, Any]] = []
    for together in (compared, [p for p in every if p not in compared]):
        if together:
            entries += _rounds(together, options)
    return {
        "case": options.case,
        **common.CASES[options.case],
        "rounds": options.rounds,
        "machine": {
            "processor": report.processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load_at_end": os.getloadavg(),
        },
        "programs": entries,
        "ratios": report.ratios(entries),
    }


def _rounds(together: list[Program], options: argparse.Namespace) -> list[dict[str, Any]]:
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, program in enumerate(together):
                workers.append(Worker(program, Path(folder) / f"{number}.log"))
                workers[-1].ask("update")
            measured: dict[str, list[dict[str, Any]]] = {p.name: [] for p in together}
            for turn in range(options.rounds):
                for worker in workers[turn % len(workers) :] + workers[: turn % len(workers)]:
                    found = worker.ask("update")
                    if _is_accounted(worker.program):
                        found["matmul"] = {
                            order: worker.ask(order)["matmul"] for order in _matmuls(options)
                        }
                    measured[worker.program.name].append(found)
                    _say(f"round {turn + 1}: {worker.program.name} {found['cpu']['total']:.2f} s")
            entries = []
            for worker in workers:
                looked = {}
                if _is_accounted(worker.program):
                    looked = {order: worker.ask(order) for order in ("flops", "profile")}
                entries.append(
                    {
                        "name": worker.program.name,
                        "dtype": worker.program.dtype,
                        "fraction": str(worker.program.fraction or ""),
                        **looked,
                        "rounds": measured[worker.program.name],
                        "facts": worker.stop(),
                    }
                )
            return entries
        finally:
            for worker in workers:
                worker.kill()


def _is_accounted(program: Program) -> bool:
    return program.fraction is not None and program.dtype == "float32"


def _matmuls(options: argparse.Namespace) -> list[str]:
    """Products of the shapes of a minibatch's MLP, and a large square one."""
    case = common.CASES[options.case]
    shape = common.PRESETS[case["preset"]]
    rows = case["minibatch"] * (case["prompt_len"] + case["response_len"])
    return [
        f"matmul {rows} {shape.hidden} {shape.intermediate}",
        f"matmul {rows} {shape.intermediate} {shape.hidden}",
        _MATMUL if options.case != "tiny" else "matmul 64 64 64",
    ]


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", choices=common.CASES, default="a")
    parser.add_argument("--fractions", default="1,1/2,1/4", help="of the layers, with adapters")
    parser.add_argument("--rounds", type=int, default=5)
    every = [*environments.PEERS, *DTYPES]
    parser.add_argument("--only", default=",".join(every), help="some of " + ",".join(every))
    parser.add_argument("--venv-dir", type=Path, default=environments.default_folder())
    parser.add_argument("--json", type=Path, help="write all that was measured")
    parser.add_argument("--page", type=Path, help="put the tables between the page's markers")
    parser.add_argument(
        "--from-json",
        type=Path,
        nargs="+",
        help="measure nothing: the tables of such a file; of more, programs of the same case",
    )
    options = parser.parse_args(argv)
    options.fractions = [Fraction(text) for text in options.fractions.split(",")]
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(every):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}")
    if options.from_json:
        found = report.joined([json.loads(path.read_text()) for path in options.from_json])
    else:
        found = measure(options)
    text = report.markdown(found)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.page:
        report.into_page(options.page, f"case {found['case']}", text)


if __name__ == "__main__":
    main()
