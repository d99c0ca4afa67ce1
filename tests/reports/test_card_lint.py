# SPDX-License-Identifier: Apache-2.0
"""Faults of a card have their line; cards of ours have none."""

import card_run
import pytest

from lora_rlhf.errors import UsageError
from lora_rlhf.reports.cards import card_lint, model_card

GOOD = """---
license: mit
base_model: org/base
model-index:
- name: x
  results:
  - metrics:
    - {type: win_rate, value: 0.6, args: {low: 0.5, high: 0.7}}
---

# A card

It beat SFT: 60 % [50, 70]. It is not better than people. Is it better than a dog?

```python
import peft
```
"""


def faults(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    return [line.split("README.md:")[1] for line in card_lint.lint(tmp_path)]


def test_a_good_card_has_none(tmp_path):
    assert faults(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("license: mit\n", "", "1: no license"),
        ("org/base", "/home/ada/base", "3: base_model '/home/ada/base' is no id"),
        ("org/base", "/home/ada/base", "3: what looks like a path of somebody's home"),
        ("license: mit", "license: unknown", "2: license: unknown is a placeholder"),
        ("value: 0.6", "value: high", "4: the metric win_rate has no number"),
        (", args: {low: 0.5, high: 0.7}", "", "4: the metric win_rate has no interval"),
        (": 60 % [50, 70]", "", "13: a claim without its interval: It beat SFT."),
        ("# A card", "[More Information Needed]", "11: a placeholder"),
        ("# A card", "A card", "1: no title"),
        ("# A card", "# A card\n![p](plots/none.png)", "12: a link to plots/none.png"),
        ("import peft", "import", "16: Python that does not parse"),
        ("---\nlicense", "license", "1: no metadata"),
        ("license: mit", "license: [", "the metadata is not YAML"),
        ("It is not", "hf_abcdefghijklmnopqrstuvwxyz0123456789 is not", "13: what looks like"),
    ],
)
def test_each_fault_has_its_line(tmp_path, old, new, fault):
    assert old in GOOD
    assert any(fault in line for line in faults(tmp_path, GOOD.replace(old, new, 1)))


@pytest.mark.parametrize("role", ["policy", "reward", "value", "sft"])
def test_our_own_cards_have_none(tmp_path, role):
    record = card_run.make_run(tmp_path / "run")
    text = model_card.render(record, role, {"base": "org/base", role: "org/mine"})
    (tmp_path / "plots").mkdir()
    for path in (record.folder / "plots").glob("*.png"):
        (tmp_path / "plots" / path.name).write_bytes(b"")
    assert faults(tmp_path, text) == []


@pytest.mark.parametrize("index", ["x", "[x]", "3"])
def test_metadata_of_another_form_are_a_fault(tmp_path, index):
    text = f"---\nbase_model: 3\nmodel-index: {index}\n---\n# A\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    faults = "\n".join(card_lint.lint(tmp_path))
    assert "3: model-index is no list of mappings" in faults
    assert "2: base_model 3 is no id on the Hub" in faults


def test_a_file_that_cannot_be_read_is_one_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        card_lint.lint(tmp_path / "none.md")
