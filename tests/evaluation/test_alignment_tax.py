# SPDX-License-Identifier: Apache-2.0
"""lm-eval's tasks on the engine's base, with its adapters switched."""

import json

import pytest

from lora_rlhf.errors import UsageError
from lora_rlhf.evaluation import alignment_tax, evaluate_targets
from lora_rlhf.evaluation.engine import Engine
from lora_rlhf.evaluation.suite import LmEvalSection
from lora_rlhf.hub import targets

pytest.importorskip("lm_eval", reason="needs lm-eval, from the extra `eval`")

TASK = """task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def section(tmp_path):
    rows = [
        {"text": f"w{5 + i} w{6 + i}", "choices": [f"w{10 + i}", "w9"], "label": i % 2}
        for i in range(8)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    return LmEvalSection(tasks=["words"], path=str(tmp_path)), rows


@pytest.mark.slow  # the next test runs the same tasks
def test_grades_are_the_models_own_choices(runs, section):
    run, (wanted, rows) = runs.after("evaluate"), section
    named = targets.parse([str(run)])
    engine = Engine(named[0].base, named)
    found = []
    for target in named:
        grades = alignment_tax.grades(engine, target, wanted, seed=0)["words"]["acc"]
        options = engine.options(target)
        chosen = []
        for row in rows:
            sums = options.logprobs(row["text"], [f" {choice}" for choice in row["choices"]])
            chosen.append(float(sums.index(max(sums)) == row["label"]))
        assert grades == chosen, target.name
        found.append(grades)
    assert len({tuple(each) for each in found}) > 1, "the adapters were switched"
    with pytest.raises(UsageError, match="lm-eval cannot run nothing"):
        alignment_tax.grades(
            engine, named[0], LmEvalSection(tasks=["nothing"], path=wanted.path), seed=0
        )


def test_tasks_are_tables_with_paired_differences(runs, section, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5"}\n{"prompt": "w6"}\n')
    suite = tmp_path / "tax.yaml"
    suite.write_text(
        f"version: 1\nname: tax\nmax_new_tokens: 2\n"
        f"sets: [{{name: x, format: plain, path: {tmp_path / 'prompts.jsonl'}}}]\n"
        f"lm_eval: {{tasks: [words], path: {tmp_path}}}\n"
    )
    run, out = runs.after("evaluate"), tmp_path / "out"
    evaluate_targets.evaluate_targets([str(run)], suite=str(suite), out=out)
    report = json.loads((out / "report.json").read_text())
    [table] = report["tables"]
    assert (table["set"], table["metric"]) == ("words", "words acc")
    assert [row["a"].split(":")[1] for row in table["differences"]] == ["base", "policy"]
    assert all(row["estimate"]["n"] == 8 for row in table["differences"])
    monkeypatch.setattr(alignment_tax, "grades", lambda *_: pytest.fail("they were kept"))
    evaluate_targets.evaluate_targets([str(run)], suite=str(suite), out=out)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write('{"text": "w9", "choices": ["w5", "w6"], "label": 0}\n')
    monkeypatch.setattr(alignment_tax, "grades", lambda *_: {"words": {"acc": [1.0] * 9}})
    evaluate_targets.evaluate_targets([str(run)], suite=str(suite), out=out)
    assert json.loads((out / "report.json").read_text())["sets"][-1]["n"] == 9
