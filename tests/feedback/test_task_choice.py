# SPDX-License-Identifier: Apache-2.0
"""Tasks out of a run: the strategies against brute force, and answers that are sampled once."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from small import tokenizer
from typer.testing import CliRunner

from lora_rlhf.cli import app
from lora_rlhf.data import dataset_builder
from lora_rlhf.errors import DataError, UsageError
from lora_rlhf.feedback import task_choice
from lora_rlhf.feedback.task_choice import Choice
from lora_rlhf.models import sampler
from lora_rlhf.recipe.loader import parse_recipe
from lora_rlhf.runtime import interrupts
from lora_rlhf.serving import loaded_run
from lora_rlhf.training.reward import ensemble


def test_disagreement_is_the_spread_of_preferences():
    """Chances of 3/4 and 1/4 have a standard deviation of 1/4; offsets do not matter."""
    assert task_choice.disagreement(
        np.array([[math.log(3), 0.0], [0.0, math.log(3)]])
    ) == pytest.approx(0.25)
    assert task_choice.disagreement(np.array([[2.0, 0.0, 5.0], [9.0, 7.0, 12.0]])) == pytest.approx(
        0
    )
    wide, narrow = np.array([[4.0, 0.0], [-4.0, 0.0]]), np.array([[4.0, 0.0], [3.0, 0.0]])
    assert task_choice.disagreement(wide) > task_choice.disagreement(narrow) > 0


def test_farthest_first_agrees_with_brute_force():
    rng = np.random.default_rng(0)
    points, known = rng.normal(size=(12, 3)) / 4, rng.normal(size=(4, 3)) / 4
    taken, left = list(known), list(range(len(points)))
    for i, distance in task_choice.farthest_first(points, known):
        gaps = {j: min(np.linalg.norm(points[j] - t) for t in taken) for j in left}
        assert i == max(gaps, key=gaps.get) and distance == pytest.approx(gaps[i])
        taken.append(points[i])
        left.remove(i)
    assert not left


def test_nearest_serves_the_failures_in_turn():
    points = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.6, 0.6]])
    served = list(task_choice.nearest(points, np.array([[1.0, 0.0], [0.0, 1.0]])))
    assert served == [(0, 0), (2, 1), (1, 0), (3, 1)]
    assert list(task_choice.nearest(points, np.empty((0, 2)))) == []


def make(runs, out, strategy="random", n=6, **more):
    failed = ["w5 w6"] if strategy == "failures" else None
    choice = Choice(strategy, n, **{"k": 3, "model": "policy", **more})
    return task_choice.make(runs.after("ppo"), choice, out / "tasks.jsonl", failed=failed)


@pytest.fixture
def sampled(monkeypatch):
    """The prompts that were sampled, in calls."""
    calls, real = [], sampler.sample

    def sample(base, prompts, **options):
        calls.append(len(prompts))
        return real(base, prompts, **options)

    monkeypatch.setattr(task_choice.sampler, "sample", sample)
    return calls


def test_every_strategy_makes_tasks_and_samples_nothing_twice(runs, tmp_path, sampled):
    made = {one: make(runs, tmp_path, one, pool=12) for one in task_choice.STRATEGIES}
    assert sum(sampled) <= 12 * 3, "all strategies chose among the same 12 prompts"
    for strategy, each in made.items():
        assert len({task.id for task in each}) == 6
        assert all(2 <= len({a.text for a in task.answers}) == len(task.answers) for task in each)
        whys = {task.why for task in each}
        assert (whys == {"drawn at random"}) == (strategy == "random"), whys
    assert len({tuple(task.id for task in each) for each in made.values()}) > 3
    lines = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [task.id for task in made["novelty"]]
    assert lines[0]["ranking"] is None and lines[0]["type"] == "ranking"


def test_the_highest_rewards_and_disagreements_come_first(runs, tmp_path):
    backbone, record = loaded_run.load(runs.after("ppo"))

    def scores(made, *roles):
        choice = Choice(k=3, model="policy")
        answers = task_choice._Answers(record, backbone, choice, tmp_path / "answers", print)
        rows = [{"prompt": list(task.prompt)} for task in made]
        episodes = [
            [(backbone.encode_prompt(row["prompt"]), ids) for ids in answers.ids(row).values()]
            for row in rows
        ]
        return [ensemble.member_scores(backbone, each, roles) for each in episodes]

    best = make(runs, tmp_path, "highest_reward", n=12, pool=12)
    rewards = [each.max() for each in scores(best, "reward")]
    assert rewards == sorted(rewards, reverse=True) and rewards[0] > rewards[-1]
    apart = make(runs, tmp_path, "disagreement", n=12, pool=12)
    spread = [task_choice.disagreement(each) for each in scores(apart, "reward", "held_out")]
    assert spread == sorted(spread, reverse=True) and spread[0] > spread[-1]


def test_an_answer_depends_on_its_prompt_and_the_seed_alone(runs, tmp_path):
    few, many = make(runs, tmp_path / "a", n=3), make(runs, tmp_path / "b", n=9)
    assert few == many[:3]
    other = make(runs, tmp_path / "c", n=3, seed=1)
    assert [task.answers for task in other] != [task.answers for task in few]


def test_a_killed_command_goes_on_with_the_same_answers(runs, tmp_path, sampled, monkeypatch):
    monkeypatch.setattr(task_choice, "_AT_ONCE", 3)
    whole = make(runs, tmp_path / "whole")
    count, real = len(sampled), interrupts.stop_if_requested
    stops = iter([False, True])

    def stop():
        if next(stops, False):
            raise KeyboardInterrupt
        real()

    monkeypatch.setattr(task_choice.interrupts, "stop_if_requested", stop)
    with pytest.raises(KeyboardInterrupt):
        make(runs, tmp_path / "killed")
    assert not (tmp_path / "killed" / "tasks.jsonl").exists()
    assert make(runs, tmp_path / "killed") == whole and len(sampled) == 2 * count


def test_prompts_with_a_label_or_of_the_evaluation_are_left_out(tmp_path):
    """Also those whose labels are all ties, which no trainer sees."""
    rows = {
        "prompts": [{"prompt": f"w{i} w{i + 1}"} for i in range(5, 15)],
        "labels": [
            {"prompt": "W5  w6", "completions": ["w1", "w2"], "ranks": [1, 2]},
            {"prompt": "w6 w7", "completions": ["w1", "w2"], "ranks": [1, 1]},
        ],
        "evaluate": [{"prompt": "w7 w8"}],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    text = (
        "name: x\nmodel: {id: tiny}\ndata: {prompts: [{path: prompts.jsonl}], comparisons: "
        "[{path: labels.jsonl}], evaluate: [{path: evaluate.jsonl}]}"
    )
    recipe = parse_recipe(text, "recipe.yaml", folder=tmp_path)
    left, labelled = dataset_builder.unlabelled(recipe, tokenizer(markers=()))
    assert {row["prompt"] for row in left} == {f"w{i} w{i + 1}" for i in range(8, 15)}
    assert sorted(labelled) == ["W5  w6", "w6 w7"]


def test_failures_of_the_last_evaluation(tmp_path):
    """Those without success, worst first; without a checker the lowest quarter."""

    def record(lines):
        text = "".join(
            json.dumps({"index": i, "model": "sft", "completion": "", **line}) + "\n"
            for i, line in enumerate(lines)
        )
        (tmp_path / "samples.jsonl").write_text(text)
        return SimpleNamespace(folder=tmp_path, verified=lambda name: tmp_path / name)

    checked = [
        {"prompt": p, "score": s, "verdict": {"success": ok}}
        for p, s, ok in (("a", 0.5, False), ("b", 1.0, True), ("c", -1.0, False))
    ]
    assert task_choice.failures(record(checked), "sft") == ["c", "a"]
    scored = [{"prompt": f"p{i}", "score": -i} for i in range(8)]
    assert task_choice.failures(record(scored), "sft") == ["p7", "p6"]
    with pytest.raises(UsageError, match="no failures of policy"):
        task_choice.failures(record(scored), "policy")


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"strategy": "best"}, "strategy 'best'"),
        ({"model": "base"}, "model 'base'"),
        ({"k": 1}, "1 answers"),
        ({"n": 9, "pool": 4}, "a pool of 4"),
    ],
)
def test_a_choice_that_cannot_be_made(options, given):
    with pytest.raises(UsageError, match=given):
        Choice(**options)


def test_a_run_without_what_the_strategy_needs(runs, tmp_path):
    with pytest.raises(UsageError, match="has no finished policy"):
        task_choice.make(runs.after("reward"), Choice(model="policy"), tmp_path / "t.jsonl")
    with pytest.raises(UsageError, match="needs 1 reward models or more, and the run has 0"):
        task_choice.make(runs.after("sft"), Choice("highest_reward", 2), tmp_path / "t.jsonl")
    with pytest.raises(UsageError, match="no failures of sft"):
        task_choice.make(runs.after("sft"), Choice("failures", 2), tmp_path / "t.jsonl")


def test_a_run_with_no_prompt_left_is_told_so(runs, tmp_path):
    every = type("Every", (frozenset,), {"__contains__": lambda *_: True})()
    with pytest.raises(DataError, match="no prompt of data.prompts is without a comparison"):
        task_choice.make(runs.after("sft"), Choice(n=2), tmp_path / "t.jsonl", without=every)


def test_the_command_writes_tasks_and_says_how_many(runs, tmp_path):
    out, run = tmp_path / "tasks.jsonl", str(runs.after("ppo"))
    asked = ["tasks", run, "--n", "3", "--k", "3", "--model", "policy", "--out", str(out)]
    done = CliRunner().invoke(app.app, asked)
    assert (done.exit_code, done.stdout) == (0, f"3 tasks: {out}\n")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 3 and all(2 <= len(row["answers"]) <= 3 for row in rows)  # equal ones once
    for wrong, said in (
        (["tasks", str(tmp_path)], "is not a run"),
        ([*asked[:-1], str(tmp_path / "x"), "--strategy", "luck"], "highest_reward"),
        (["tasks", run, "--strategy", "failures"], "has no failures of sft"),
    ):
        refused = CliRunner().invoke(app.app, wrong)
        assert refused.exit_code == 2 and said in refused.stderr, refused.output
