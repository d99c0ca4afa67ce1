# SPDX-License-Identifier: Apache-2.0
"""Files around the code: workflows call make targets that exist, versions agree, YAML parses."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
YAML = sorted(ROOT.glob(".github/**/*.yml")) + [
    ROOT / "CITATION.cff",
    ROOT / ".pre-commit-config.yaml",
]


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_parses(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_workflows_call_make_targets_that_exist_and_nothing_else():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in ROOT.glob(".github/workflows/*.yml"):
        for name, job in yaml.safe_load(path.read_text())["jobs"].items():
            matrix = job.get("strategy", {}).get("matrix", {})
            called = set(matrix.get("target", []))
            called |= {one["target"] for one in matrix.get("include", [])}
            for step in job["steps"]:
                if run := step.get("run"):
                    assert run.startswith("make "), (path.name, name, run)
                    called |= set(re.findall(r"^make ([a-z-]+)$", run))
            assert called and called <= targets, (name, called - targets)


def test_the_citation_has_the_version_of_the_package():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version[1]
