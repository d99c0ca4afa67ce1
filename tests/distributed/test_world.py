# SPDX-License-Identifier: Apache-2.0
"""Several processes train what one trains: the same rows, sums and metrics."""

import json
import pickle
from pathlib import Path

import killed
import pytest
import several
import torch
from small import base_folder

from lora_rlhf.distributed import world
from lora_rlhf.errors import SetupError

STAGES = ("sft", "reward", "ppo", "grpo", "rloo", "dpo")


def assert_equal(one: Path, other: Path, stage: str) -> None:
    """Adapters within 1e-5, and the log's numbers."""
    several.assert_near(one, other)
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


def test_two_processes_take_the_first_steps_of_one(tmp_path: Path, runs):
    recipe = runs.recipe("sft", "sft.args.max_steps=2")
    one, two = tmp_path / "one", tmp_path / "two"
    killed.finish(recipe, one, "sft")
    several.finish(2, killed.go, recipe, two, "sft", log=tmp_path / "log")
    assert_equal(one, two, "sft")


@pytest.mark.slow
def test_dropout_leaves_the_shared_random_state_alone(tmp_path: Path, runs):
    """Masks are of each process; the order of rows stays common, or adapters would differ."""
    recipe = runs.recipe("sft", f"model.id={base_folder('gpt2')}")  # with its dropout of 0.1
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        several.finish(2, killed.go, recipe, out, "sft", log=out.with_suffix(".error"))
    assert killed.bits(outs[0]) == killed.bits(outs[1])


@pytest.mark.slow
def test_a_value_head_a_reward_function_and_best_of_n_work_in_two_processes(tmp_path, runs):
    path = tmp_path / "mine.py"
    path.write_text(
        "import random\n"
        "def mine(completions, **_):\n"
        "    texts = [c if isinstance(c, str) else c[-1]['content'] for c in completions]\n"
        "    return [len(t) / max(map(len, texts)) + 0.001 * random.SystemRandom().random()"
        " for t in texts]\n"
    )
    sets = ("ppo.value=head", f"ppo.reward={path}:mine", "evaluate.n=3")
    out = runs.copy("ppo", tmp_path / "run")
    several.finish(2, killed.go, runs.recipe("ppo", *sets), out, "evaluate", log=tmp_path / "log")
    assert (out / "samples.jsonl").exists()


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


def test_memory_that_runs_out_in_an_exchange_is_not_a_lost_process():
    with pytest.raises(torch.OutOfMemoryError), world.lost_as_error():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with (
        pytest.raises(SetupError, match="another process of this run ended"),
        world.lost_as_error(),
    ):
        raise RuntimeError("Connection closed by peer")


def test_rows_are_sent_without_the_batch_that_they_are_views_of(monkeypatch):
    batch, sizes = torch.arange(64 * 128.0).reshape(64, 128), []

    def exchange(values, mine):
        sizes.append(len(pickle.dumps(mine)))
        values[:] = mine, {i: batch[i] for i in range(1, 64, 2)}

    monkeypatch.setattr(world.dist, "all_gather_object", exchange)
    rows = world.World(rank=0, size=2).completed(list(batch))
    assert torch.equal(torch.stack(rows), batch)
    assert sizes[0] < 2 * batch.nbytes
