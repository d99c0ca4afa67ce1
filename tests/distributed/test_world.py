# SPDX-License-Identifier: Apache-2.0
"""Several processes train what one trains: the same rows, sums and metrics."""

import json
from pathlib import Path

import killed
import pytest
import several
from safetensors.torch import load_file

STAGES = ("sft", "reward", "ppo", "grpo", "rloo", "dpo")


def assert_equal(one: Path, other: Path, stage: str) -> None:
    """Adapters within 1e-5, and the log's numbers."""
    adapters = sorted(one.glob("adapters/*/adapter_model.safetensors"))
    assert adapters
    for path in adapters:
        a, b = load_file(path), load_file(other / path.relative_to(one))
        worst = max(float((a[name] - b[name]).abs().max()) for name in a)
        assert worst < 1e-5, f"{path.parent.name}: {worst}"
    logs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, other)
    ]
    for mine, theirs in zip(*logs, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"clock"}:
            assert mine[name] == theirs[name] or float(mine[name]) == pytest.approx(
                float(theirs[name]), abs=2e-5, rel=1e-4
            ), (stage, name)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_several_processes_train_what_one_trains(tmp_path: Path, runs, stage: str, size: int):
    one, recipe = runs.after(stage), runs.recipe(stage)
    outs = [runs.copy(stage, tmp_path / name) for name in ("a", "b")]
    for out in outs if size == 2 else outs[:1]:
        several.finish(size, killed.go, recipe, out, stage, log=out.with_suffix(".error"))
        assert_equal(one, out, stage)
    if size == 2:
        assert killed.bits(outs[0]) == killed.bits(outs[1])
