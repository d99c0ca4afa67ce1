# SPDX-License-Identifier: Apache-2.0
"""`lora-rlhf doctor RUN`: the stage of a run that is at fault, and the remedy.

Reads only `record.json` and `metrics.jsonl`, without a model or torch, and hashes the other files.
A reward that does not rise may be due to the data, SFT, the reward model or PPO, and faults of one
stage cause symptoms in the next. Therefore findings are in the order of the stages, and the first
fault is to be fixed first.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_rlhf.errors import INTERRUPTED, counted
from lora_rlhf.recipe.stage_keys import stage_names
from lora_rlhf.reports.tables import say
from lora_rlhf.runs.record import Record

from . import data_checks, evaluation_checks, ppo_checks, reward_checks, sft_checks
from .findings import STAGES, Finding, Findings, Line, Lines

SEVERITIES = ("fault", "warning", "note")
_IN_VAIN = {
    "IdentityError": "an identity that holds in every correct run is violated, so no result of PPO "
    "could be trusted",
    "NonFiniteError": "NaN spreads to every weight, so nothing of the stage can be used",
}


def examine(record: Record) -> list[Finding]:
    """Return all findings about a run, ordered by stage and then by severity."""
    lines: Lines = {}
    for line in record.metrics():
        lines.setdefault(line["stage"], []).append(_numbers(line))
    lines["ppo"] = lines.get(record.algorithm, [])
    findings = {f.name: f for f in (*_damaged(record), *_stopped(record))}
    for module in (data_checks, sft_checks, reward_checks, ppo_checks, evaluation_checks):
        findings |= {f.name: f for f in module.check(record, lines)}
    if "learning_rate" in findings:  # answers that fell apart say nothing about the reward model
        for name in {"gold_falls", "paid_by_length", *(n for n in findings if "hacked" in n)}:
            if name in findings:
                why = "too large a learning rate alone explains this"
                findings[name] = replace(findings[name], severity="note", why=why)
    return sorted(
        findings.values(), key=lambda f: (STAGES.index(f.stage), SEVERITIES.index(f.severity))
    )


def verdict(findings: list[Finding]) -> str:
    """Name the stage at fault in one sentence, or count the warnings."""
    faults = [f for f in findings if f.severity == "fault"]
    if faults:
        return f"stage at fault: {faults[0].stage} ({faults[0].what})"
    warnings = sum(f.severity == "warning" for f in findings)
    return f"no fault found; {counted(warnings, 'warning') if warnings else 'no warnings'}"


def show(record: Record, findings: list[Finding], console: Console | None = None) -> None:
    """Print the findings as plain text."""
    console = console or Console(highlight=False)
    for f in findings:
        say(console, f"{f.stage}: {f.severity}: {f.what}")
        say(console, f"    why    {f.why}")
        say(console, f"    to do  {f.remedy}")
    stages = [f"{name} {entry['status']}" for name, entry in record.data["stages"].items()]
    say(console, f"\n{record.folder}: {', '.join(stages) or 'no stage was started'}")
    say(console, verdict(findings))


def as_json(record: Record, findings: list[Finding]) -> str:
    """Return name, verdict and findings as JSON."""
    rows = [{("try" if k == "remedy" else k): v for k, v in asdict(f).items()} for f in findings]
    report = {"name": record.data["name"], "verdict": verdict(findings), "findings": rows}
    return json.dumps(report, indent=1)


def _numbers(line: dict[str, Any]) -> Line:
    """The metrics of a log line, in which NaN and infinities are text."""
    return {
        key: float(value)
        for key, value in line.items()
        if value in ("nan", "inf", "-inf")
        or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def _damaged(record: Record) -> Findings:
    """Files that differ from what a finished stage wrote."""
    for damage in record.damages():
        place = damage.given.rsplit(":", 1)[0]
        role = Path(place).parent.name if "/adapters/" in place else "evaluate"
        stage = {"policy": "ppo", "value": "ppo"}.get(role, role if role in STAGES else "reward")
        why = "results that depend on this file are not those of the run"
        yield Finding(stage, "fault", f"damaged {place}", damage.given, why, damage.remedy)


def _stopped(record: Record) -> Findings:
    """Stages that ended early, and a run that ended outside of its stages, with the reason."""
    stages, ended = record.data["stages"], record.data["clock"].get("stopped")
    begun = [name for name, entry in stages.items() if entry["status"] == "interrupted"]
    for name in begun:
        yield _reason(record, name, stages[name].get("error") or ended)
    if ended and not begun:
        names = stage_names(record.algorithm)
        yield _reason(record, next((n for n in names if n not in stages), names[-1]), ended)


def _reason(record: Record, name: str, error: dict[str, Any] | None) -> Finding:
    """Say why the stage `name` has no result; the message of an error may name another stage."""
    again = "run the same command again; it repeats this stage"
    stage = "ppo" if name == record.algorithm else name if name in STAGES else "evaluate"
    if not error:
        why = "it has no result: it was killed, ran out of memory, or met an error"
        what = f"{name} did not finish, or is still running"
        return Finding(stage, "warning", "interrupted", what, why, again)
    kind = error["type"]
    first, *rest = str(error["message"]).splitlines() or [""]
    if kind in ("Interrupted", "KeyboardInterrupt", "OutOfTime"):
        by = f"by {first}" if first in INTERRUPTED else "by the user or its time budget"
        why, what = "nothing is wrong with it", f"{name} was stopped {by}"
        return Finding(stage, "note", "interrupted", what, why, "run the same command to continue")
    remedy = next((r.split(":", 1)[1].strip() for r in rest if "to do:" in r), again)
    stage = {"GateError": "reward", "DataError": "data"}.get(kind, stage)
    if blamed := re.search(r"stage at fault: (\w+)", remedy):
        stage = blamed[1] if blamed[1] in STAGES else "ppo"
    why = _IN_VAIN.get(kind, f"{name} has no result")
    what = f"{name} stopped with {kind}: {first}"
    return Finding(stage, "fault", f"stopped_{name}", what, why, remedy)
