# SPDX-License-Identifier: Apache-2.0
"""A reward function of the user's own: found beside the recipe, called as TRL does, checked."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import killed
import pytest
import small

from lora_rlhf import pipeline
from lora_rlhf.algorithms import custom_reward, reward_functions
from lora_rlhf.data import dataset_builder
from lora_rlhf.errors import DataError, RecipeError
from lora_rlhf.recipe.loader import dump_recipe, load_recipe, parse_recipe
from lora_rlhf.recipe.schema import DataSource

TEXT = "name: x\nmodel: {id: tiny}\n"


def recipe(folder: Path, code: str, given: str = "mine:score"):
    (folder / "recipe.yaml").write_text(f"{TEXT}ppo: {{reward: '{given}'}}\n")
    (folder / "mine.py").write_text(code)
    return load_recipe(folder)


def test_it_is_found_beside_the_recipe_from_anywhere(tmp_path, monkeypatch):
    made = recipe(tmp_path, "import beside\ndef score(completions): return [beside.N]\n")
    (tmp_path / "beside.py").write_text("N = 3\n")
    monkeypatch.chdir("/")
    assert made.ppo.function == (str(tmp_path / "mine.py"), "score")
    again = parse_recipe(dump_recipe(made), "run")
    assert again == made
    assert custom_reward.load(again)(prompts=["p"], completions=["c"]) == [3.0]
    assert recipe(tmp_path, "", "./mine.py:score").ppo.function == made.ppo.function


def test_it_gets_what_trl_gives(tmp_path):
    code = "def score(prompts, completions, completion_ids, **more):\n    return [len(more)]\n"
    function = custom_reward.load(recipe(tmp_path, code))
    options = {"completion_ids": [[1]], "prompt_ids": [[2]], "trainer_state": 1, "trunk_states": 1}
    assert function(prompts=["p"], completions=["c"], **options) == [2.0]
    code = "async def score(completions):\n    return [0.5 for _ in completions]\n"
    assert custom_reward.load(recipe(tmp_path, code))(prompts=["p"], completions=["c"]) == [0.5]


def test_it_gets_the_other_columns_of_the_prompts(tmp_path):
    """In training, where TRL passes on the columns of the data set, and in the evaluation."""
    code = "def score(completions, solution, **more):\n    return [c == s for c, s in "
    made = recipe(tmp_path, code + "zip(completions, solution)]\n")
    rows = [{"prompt": f"q{i}", "solution": f"a{i}", "prompt_ids": "x"} for i in range(40)]
    rows += [{"prompt": "alone"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"prompts": [DataSource(path=str(tmp_path / "p.jsonl"))]}
    made = made.model_copy(update={"data": made.data.model_copy(update=data)})
    plain = small.tokenizer(markers=())
    prepared = dataset_builder.prompts(made, plain)
    assert set(prepared.train.column_names) == {"prompt", "solution"}
    kept = [*prepared.train, *prepared.held_out]
    assert {(row["prompt"], row["solution"]) for row in kept} == {
        (row["prompt"], row.get("solution")) for row in rows
    }
    words = SimpleNamespace(decode=lambda ids: f"a{ids[0]}")
    given = [{"prompt": "q1", "solution": "a1"}, {"prompt": "q2", "solution": "a1"}]
    found = reward_functions.scores(made, words, given, [([], [1]), ([], [2])], 8)
    assert found == [1.0, 0.0]
    without = made.model_copy(update={"ppo": made.ppo.model_copy(update={"reward": "model"})})
    assert dataset_builder.prompts(without, plain).train.column_names == ["prompt"]


@pytest.mark.parametrize(
    ("body", "where", "message"),
    [
        ("return [1.0]", "", "returned 1 numbers for 2"),
        ("return [1.0, float('nan')]", "", "returned nan for the completion 'd'"),
        ("return [1.0, float('inf')]", "", "returned inf"),
        ("return [1.0, None]", ":2", "score failed: TypeError"),
        ("return 1.0", "", "score failed: TypeError"),
        ("return [1/0 for c in completions]", ":2", "score failed: ZeroDivisionError"),
    ],
)
def test_its_result_is_checked(body, where, message, tmp_path):
    function = custom_reward.load(recipe(tmp_path, f"def score(completions):\n    {body}\n"))
    with pytest.raises(RecipeError, match=message) as caught:
        function(prompts=["p", "q"], completions=["c", "d"])
    if "Zero" in message:
        assert caught.value.where == f"{tmp_path / 'mine.py'}{where}"


@pytest.mark.parametrize(
    ("code", "line", "message"),
    [
        (
            "def scores(): pass\n",
            "",
            "no function 'score'\n  expected: one of its functions: scores",
        ),
        ("import nothing_like_it\n", ":1", "cannot be imported: ModuleNotFoundError"),
        ("x = 1\ndef score(:\n", ":2", "cannot be imported: SyntaxError"),
    ],
)
def test_a_file_without_it_is_refused_with_its_line(code, line, message, tmp_path):
    with pytest.raises(RecipeError, match=message) as caught:
        custom_reward.load(recipe(tmp_path, code))
    assert caught.value.where == f"{tmp_path / 'mine.py'}{line}"


def test_what_is_no_function_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"ppo.reward = 'modle'.*module:function"):
        recipe(tmp_path, "", "modle")
    made = recipe(tmp_path, "", "gone:score")
    (error,) = [e for e in pipeline.check(made, tmp_path / "run") if "gone.py" in str(e)]
    assert isinstance(error, RecipeError)


SHORT = """def score(prompts, completions, **_):
    return [-len(messages[-1]["content"].split()) for messages in completions]
"""


@pytest.mark.parametrize(
    "algorithm",
    ["ppo", *(pytest.param(a, marks=pytest.mark.slow) for a in ("best_of_n", "grpo", "rloo"))],
)
def test_every_algorithm_optimises_it(algorithm, runs: killed.Runs, tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(SHORT)
    out = runs.copy("ppo", tmp_path / "run")
    sets = [f"ppo.reward={path}:score", f"algorithm={algorithm}", "ppo.updates=2", "evaluate.n=6"]
    made = runs.recipe("ppo", *sets)
    assert pipeline.check(made, out, until="evaluate") == []
    record = pipeline.run(made, out, until="evaluate")
    entry = record.data["stages"][algorithm]
    assert entry["reward"] == "mine.py:score"
    assert entry["reward_sha256"] == hashlib.sha256(SHORT.encode()).hexdigest()
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["proxy_reward"] for row in rows] == [
        -len(row["completion"].split()) for row in rows
    ]
    if algorithm == "best_of_n":
        means = {
            m: record.data["evaluation"][m]["proxy_reward"]["value"] for m in ("sft", algorithm)
        }
        assert means[algorithm] > means["sft"], "the shortest of 16"
    else:
        assert all(line["rewards/score"] <= 0 for line in record.metrics(algorithm))
    del record.data["stages"]["evaluate"]
    record.save()
    path.write_text(SHORT + "\n")
    with pytest.raises(DataError, match="mine.py:score has changed"):
        pipeline.run(made, out, until="evaluate")
