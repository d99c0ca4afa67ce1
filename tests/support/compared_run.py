# SPDX-License-Identifier: Apache-2.0
"""Finished runs written in milliseconds, for tests that compare runs."""

import json

from lora_rlhf.recipe.loader import parse_recipe
from lora_rlhf.runs.record import Record

TEXT = (
    "name: x\nmodel: {id: tiny}\ndata: {prompts: [{task: closed-world}], "
    "comparisons: [{task: closed-world}]}\n"
)


def estimate(value, spread=0.1, n=4):
    return {"value": value, "low": value - spread, "high": value + spread, "n": n}


def make(
    folder, algorithm="ppo", seed=0, rewards=(0.5, 0.25, 0.0, 0.25), sft="aa", change=None, sets=(),
    kinds=(None, None, None, None),
):  # fmt: skip
    """Write a finished run whose policy has these gold rewards on four prompts."""
    recipe = parse_recipe(TEXT, "r.yaml", [f"algorithm={algorithm}", f"seed={seed}", *sets])
    record = Record.open(folder, recipe)
    model = "best_of_n" if algorithm == "best_of_n" else "policy"
    mean = sum(rewards) / len(rewards)
    metrics = {
        "gold_reward": estimate(mean),
        "proxy_reward": estimate(mean + 1),
        "win_rate": estimate(0.6),
        "length": estimate(12.0),
    }
    bound = {"value": 1.83, "low": None, "high": None, "n": 0}
    metrics |= {"kl_bound": bound} if model == "best_of_n" else {"kl": estimate(2.25)}
    base = {"gold_reward": estimate(0.1), "proxy_reward": estimate(0.0), "length": estimate(14.0)}
    record.data |= {"evaluation": {"base": dict(base), "sft": base, model: metrics}}
    record.data["model"]["fingerprint"] = "fe"
    own = {"n": 16} if model == "best_of_n" else {"episodes": 128}
    done = {"status": "done"}
    record.data["stages"] = {
        "sft": {**done, "adapter_sha256": sft},
        "reward": {**done, "adapter_sha256": "bb"},
        algorithm: {**done, **own},
        "evaluate": {**done, "prompts": 4, "seed": seed, "temperature": 1.0, "max_new_tokens": 9},
    }
    record.data["clock"] |= {
        "stages": {algorithm: {"seconds": 30.0}},
        "evaluation": {model: {"seconds": 2.0}},
    }
    with (record.folder / "samples.jsonl").open("w") as file:
        for i, reward in enumerate(rewards):
            for who, value in (("sft", 0.1), (model, reward)):
                line = {
                    "index": i,
                    "model": who,
                    "prompt": f"p{i}",
                    "completion": "c",
                    "gold_reward": value,
                    "proxy_reward": value + 1,
                    "family": kinds[i],
                }
                file.write(json.dumps(line) + "\n")
    if change is not None:
        change(record)
    record.save()
    return record.folder
