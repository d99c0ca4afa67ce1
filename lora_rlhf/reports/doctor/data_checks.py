# SPDX-License-Identifier: Apache-2.0
"""Doctor checks of the data: tokenizer, dropped rows, agreement of labelers."""

from __future__ import annotations

from lora_rlhf.runs.record import Record

from .findings import Findings, Lines, direction, few_rows, finding

DROPPED = 0.5, 0.9
"""Share of the rows dropped by one filter above which there is a note, and a warning."""

CONTRADICTED = 0.05
"""Share of comparisons labelled both ways above which there is a warning."""

AGREEMENT = 0.6
"""Agreement of two labelers below which there is a warning; InstructGPT's was 0.73, chance 0.5."""


_INTENDED = ("limit", "part ", "held out in other sets", "in the evaluation set", "expanded")
"""Beginnings of the filters that the recipe asked for."""


def check(record: Record, lines: Lines) -> Findings:
    """Check the padding token, the rows dropped by filters and the agreement of labelers."""
    model = record.data["model"]
    if "rebuilt" in record.data:
        unknown = ", ".join(record.data["rebuilt"]["unknown"])
        yield finding("rebuilt", f"record.json was lost and rebuilt; not known: {unknown}")
    if model.get("pad_id") is not None and model["pad_id"] in model.get("eos_ids", []):
        yield finding("pad_is_eos", f"the padding token {model['pad_id']} is also an end token")
    for name, report in record.data["data"].items():
        for step, count in report.get("counts", {}).items():
            share = 1 - count["after"] / count["before"] if count["before"] else 0.0
            if step == "labelled both ways" and share > CONTRADICTED:
                what = f"{share:.0%} of {name} were labelled both ways and dropped"
                yield finding("contradictions", what, name, more=direction(record.data["data"]))
            elif share > DROPPED[0] and not step.startswith(_INTENDED):
                severity = "warning" if share > DROPPED[1] else "note"
                what = f"{share:.0%} of {name} were dropped: {step}"
                kind = "dropped" if step.startswith("over ") else "filtered"
                yield finding(kind, what, name, severity)
        yield from few_rows(name, report)
        agreement = (report.get("labeler_agreement") or {}).get("measured")
        if agreement is not None and agreement < AGREEMENT:
            what = f"two labelers of {name} agree on only {agreement:.0%} of pairs"
            yield finding("agreement", what, name)
