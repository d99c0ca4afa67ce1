# SPDX-License-Identifier: Apache-2.0
"""The card of an export, as the text of its README.md."""

from __future__ import annotations

from typing import Any

import yaml

from lora_rlhf.redaction import safe
from lora_rlhf.reports.cards.card_facts import Facts, licence
from lora_rlhf.reports.cards.card_limits import limits
from lora_rlhf.reports.cards.card_markdown import bullets, cell, code, number, table
from lora_rlhf.runs.record import Record

_USES = {
    "merged": "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained(".")\n'
    'tokenizer = AutoTokenizer.from_pretrained(".")\n```',
    "reward": "```python\nfrom transformers import AutoModelForSequenceClassification\n\n"
    'model = AutoModelForSequenceClassification.from_pretrained(".")\n'
    "# reward = model(**inputs).logits[0, 0] + model.config.reward_offset\n```",
    "gguf": "```bash\nllama-cli -m FILE.gguf\n```",
    "gguf-adapter": "The file holds the adapter alone. It needs a GGUF file of the base:\n\n"
    "```bash\nllama-cli -m BASE.gguf --lora adapter.gguf\n```",
    "mlx": "```bash\nmlx_lm.generate --model . --prompt 'Hello'\n```",
    "ollama": "```bash\nollama create NAME -f Modelfile\nollama run NAME\n```",
}


def render(record: Record, entry: dict[str, Any]) -> str:
    """Write the card from the fields of `export.json`."""
    facts, role = Facts(record, entry["role"]), entry["role"]
    chosen, reason = licence(facts)
    head = {
        "library_name": {"mlx": "mlx"}.get(entry["to"], "transformers"),
        "license": chosen,
        "base_model": facts.base,
        "tags": ["lora-rlhf", entry["to"], role],
    }
    meta = yaml.safe_dump({k: v for k, v in head.items() if v}, sort_keys=False)
    measured = {**entry["merging"]}
    rows = measured.pop("rows")
    words = [(name.replace("_", " "), number(value)) for name, value in measured.items()]
    kind = "reward model" if role == "reward" else "model"
    four = " The base was in 4-bit; it was dequantised, and then merged."
    text = (
        f"---\n{meta}---\n\n# {cell(entry['run'])}, {role}, as {entry['to']}\n\n"
        f"The {kind} of role {code(role)} of a run of `lora-rlhf`: base {code(entry['base'])}, "
        f"adapter with sha256 {code(entry['adapter_sha256'][:16])}, {entry['dtype']}."
        f"{four * entry['dequantised_from_4bit']}\n\n"
        f"## Use\n\n{_USES['reward' if role == 'reward' else entry['to']]}\n\n"
        f"## What merging changed\n\nUnmerged against merged, on {rows} held-out answers, in "
        f"float32:\n\n{table(['measure', 'value'], words)}\n\n"
        f"## Verified\n\n{_checked(entry)}\n\n"
        f"## Licence\n\n{code(chosen) if chosen else 'None'}: {cell(reason)} Base: "
        f"{cell(entry['base_license'] or 'not recorded')}.\n\n"
        f"## Limits\n\n{bullets(limits(facts))}\n"
    )
    return safe(text)


def _checked(entry: dict[str, Any]) -> str:
    check = dict(entry["check"])
    if not check.pop("verified"):
        return f"**Not verified**: {cell(check['why'])}."
    by, extra = check.pop("by"), cell(entry.get("ollama", ""))
    if not check:
        return f"Loaded again by {by}; the numbers above are those of the file."
    words = [(name.replace("_", " "), number(value)) for name, value in check.items()]
    return f"By {cell(by)}, against the unmerged model:\n\n{table(['measure', 'value'], words)}" + (
        f"\n\n{extra}" if extra else ""
    )
