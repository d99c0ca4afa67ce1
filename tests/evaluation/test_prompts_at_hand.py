# SPDX-License-Identifier: Apache-2.0
"""The prompts of evaluation suites that training data are compared with."""

import pytest
from data_sources import jsonl, recipe

from lora_rlhf.data.contamination import SUITES
from lora_rlhf.errors import UsageError
from lora_rlhf.evaluation.suite import prompts_at_hand

SUITE = """
version: 1
name: mine
sets:
  - {name: exam, format: plain, path: exam.jsonl, metrics: [exact_match]}
  - {name: away, format: plain, path: away.jsonl, hub: nobody/away, metrics: [exact_match]}
  - {name: world, format: closed_world, metrics: [exact_match]}
"""


def checking(*suites, action="drop"):
    given = recipe()
    update = {"contamination": action, "contamination_suites": [*map(str, suites)]}
    return given.model_copy(update={"data": given.data.model_copy(update=update)})


def test_prompts_of_files_at_hand_are_read_and_nothing_is_downloaded(tmp_path):
    (tmp_path / "mine.yaml").write_text(SUITE, encoding="utf-8")

    jsonl(tmp_path / "exam.jsonl", [{"prompt": "What is 2 + 2?"}])
    kept = prompts_at_hand(checking(tmp_path / "mine.yaml"))[SUITES]
    assert kept.rows == [{"prompt": "What is 2 + 2?", "set": "exam"}]
    assert prompts_at_hand(checking(tmp_path / "mine.yaml", action="keep"))[SUITES].rows == []
    with pytest.raises(UsageError, match="there is no suite 'other'"):
        prompts_at_hand(checking("other"))
