# SPDX-License-Identifier: Apache-2.0
"""report.json is checked when it is read: one clear error that names the file."""

import json

import example_report
import pytest

from lora_rlhf.errors import UsageError
from lora_rlhf.reports import evaluation_report


@pytest.fixture
def report():
    return example_report.report(prompts=8)


def fault(folder, text):
    (folder / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        evaluation_report.read(folder)
    assert str(folder / "report.json") in str(caught.value)
    assert "to do:" in str(caught.value)
    return str(caught.value)


def test_a_whole_report_is_read_as_it_is(tmp_path, report):
    report["tables"][0]["added later"] = 1
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert evaluation_report.read(tmp_path) == report


def test_without_a_report(tmp_path):
    with pytest.raises(UsageError, match=r"no report\.json") as caught:
        evaluation_report.read(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{\n\n,", ":3: not JSON"), ("[]", "no JSON object"), ("{}", "version None"),
     ('{"version": 2}', "version 2"), ('{"version": true}', "version True"),
     ('{"version": 1}', "suite: missing (and 12 more faults)")],
)  # fmt: skip
def test_another_file_or_version(tmp_path, text, message):
    assert message in fault(tmp_path, text)


def change(report, path, value=None):
    *parents, last = path
    for key in parents:
        report = report[key]
    if value is None:
        del report[last]
    else:
        report[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [(("tables", 1, "metric"), None, "tables[1].metric: missing"),
     (("samples", 0, "answers", "sft", "text"), None, "samples[0].answers.sft.text: missing"),
     (("headline", "sentence"), None, "headline.sentence: missing"),
     (("tables", 0, "estimates", "sft", "value"), float("nan"), "estimates.sft.value: "),
     (("tables", 0, "estimates", "sft", "value"), "0.5", "estimates.sft.value: "),
     (("tables", 0, "better"), "larger", "tables[0].better: "),
     (("targets",), [], "targets: "),
     (("tables", 0, "set"), "elsewhere", "the set 'elsewhere' is used but not listed"),
     (("tables", 0, "differences", 0, "a"), "gpt", "the target 'gpt' is used but not listed"),
     (("costs", "gpt"), {"p50_s": None, "p95_s": None, "tokens_per_second": None,
                         "peak_bytes": None, "per_1000": None}, "the target 'gpt'")],
)  # fmt: skip
def test_a_fault_names_its_place(tmp_path, report, path, value, message):
    change(report, path, value)
    assert message in fault(tmp_path, json.dumps(report))
