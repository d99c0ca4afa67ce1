# SPDX-License-Identifier: Apache-2.0
"""A finished run as the stages leave it, written in milliseconds, for tests of cards."""

import copy
import json
import re
from pathlib import Path

import yaml

from lora_rlhf.runs.record import Record

ROLES = ("sft", "reward", "policy", "value")
HOSTILE = (
    "| a | b |\n---\n# Title\n<script>alert(1)</script> [x](javascript:alert(1)) `code` **bold**\n"
    "![i](https://evil.example/i.png) www.evil.example @somebody \u202ereversed\x00 $x$ \\| {{ y }}"
)


def estimate(value, low, high, n):
    return {"value": value, "low": low, "high": high, "n": n}


RECORD = {
    "schema": 1,
    "name": "little-run",
    "seed": 7,
    "recipe_sha256": "ab" * 32,
    "versions": {"torch": "2.13.1", "peft": "0.21.2"},
    "model": {
        "id": "acme/base", "hub_id": None, "revision": "c0ffee" * 6 + "c0ff",
        "fingerprint": "fe" * 32, "dtype": "float32", "load_in_4bit": False,
        "parameters": 3141592, "layers": 6, "hidden_size": 192, "chat_template_sha256": "cd" * 32,
        "eos_ids": [2], "pad_id": 11, "source": "Hub", "license": "apache-2.0",
    },
    "lora": {
        "r": 16, "alpha": 33, "top_fraction": 0.51, "target_modules": ["q_proj", "up_proj"],
        "adapted_layers": 4, "total_layers": 6,
        "parameters_per_role": {"reference": 5551, "policy": 5552, "reward": 5553, "value": 5554},
    },
    "data": {
        "demonstrations": {
            "sources": [{"kind": "task", "name": "closed-world", "license": "Apache-2.0",
                         "rows": 257, "sha256": "0a" * 32}],
            "counts": {"limit": {"before": 257, "after": 251},
                       "too long": {"before": 251, "after": 243}},
            "train": 219, "held_out": 24, "notes": ["a field was empty (3 rows)"],
        },
        "comparisons": {
            "sources": [{"kind": "hub", "name": "acme/pairs", "license": "mit", "rows": 1021,
                         "sha256": "0b" * 32}],
            "counts": {"tied": {"before": 1021, "after": 997}},
            "train": 907, "held_out": 90, "notes": [],
            "labeler_agreement": {"asked": 0.73, "measured": 0.7411, "pairs": 613},
        },
        "prompts": {
            "sources": [{"kind": "file", "name": "prompts.jsonl", "license": "mit", "rows": 401,
                         "sha256": "0c" * 32}],
            "counts": {"limit": {"before": 401, "after": 399}}, "train": 359, "held_out": 40,
            "notes": [],
        },
    },
    "stages": {
        "sft": {"status": "done", "steps": 61, "train_loss": 1.234, "held_out_loss": 1.357,
                "adapter_sha256": "5f" * 32,
                "args": {"learning_rate": 2.34e-4, "lr_scheduler_type": "cosine", "max_length": 511,
                         "packing": False}},
        "reward": {
            "status": "done", "accuracy": estimate(0.6789, 0.6123, 0.7391, 201),
            "accuracy_length_baseline": estimate(0.5432, 0.4748, 0.6097, 202), "offset": -0.3217,
            "score_std": 0.8765, "gate": "passed", "adapter_sha256": "6f" * 32,
            "args": {"learning_rate": 1.23e-4, "adam_beta2": 0.9871, "num_train_epochs": 1.5},
            "calibration": [{"low": 0.5, "high": 0.55, "predicted": 0.5274, "observed": 0.5163,
                             "observed_low": 0.4, "observed_high": 0.62, "n": 93}],
        },
        "ppo": {
            "status": "done", "updates": 41, "episodes": 1312, "reward": "model", "kl_coef": 0.047,
            "identities": {"kl_at_start": 0.0, "ratio_at_start": 1.00031}, "kl_last": 4.567,
            "adapter_sha256": "7f" * 32, "value_adapter_sha256": "8f" * 32,
            "args": {"learning_rate": 3.5e-05, "epsilon": 0.1987, "max_completion_length": 47},
        },
        "evaluate": {
            "status": "done", "max_new_tokens": 29,
            "by_kind": {
                "base": {"answer": {"success": estimate(0.2345, 0.1456, 0.3567, 66)}},
                "sft": {"answer": {"success": estimate(0.4567, 0.3678, 0.5789, 67)}},
                "policy": {
                    "answer": {"success": estimate(0.1357, 0.0713, 0.2468, 68),
                               "gold_reward_minus_sft": estimate(-0.361, -0.479, -0.243, 68)},
                    "free | text": {"success": estimate(0.8135, 0.7024, 0.8913, 69),
                                    "gold_reward_minus_sft": estimate(0.271, 0.133, 0.409, 69)}},
            },
        },
    },
    "evaluation": {
        "base": {"gold_reward": estimate(-0.412, -0.502, -0.322, 128),
                 "length": estimate(38.1, 34.4, 41.8, 128)},
        "sft": {"gold_reward": estimate(0.113, 0.029, 0.197, 128),
                "proxy_reward": estimate(0.021, -0.044, 0.086, 128),
                "length": estimate(21.7, 19.9, 23.5, 128)},
        "policy": {"gold_reward": estimate(0.314, 0.233, 0.395, 128),
                   "proxy_reward": estimate(0.617, 0.533, 0.701, 128),
                   "win_rate": estimate(0.634, 0.551, 0.709, 128),
                   "length": estimate(22.9, 21.1, 24.7, 128)},
    },
    "files": {},
    "clock": {
        "started": "2026-01-02T03:04:05+00:00", "host": {"cores": 8, "machine": "x86_64"},
        "stages": {"sft": {"seconds": 71.375}, "reward": {"seconds": 53.125},
                   "ppo": {"seconds": 301.875}},
        "memory": {"total": 12582913}, "peak_memory_mb": 787.5,
        "evaluation": {"policy": {"seconds": 9.5, "tokens_per_second": 311.3}},
    },
}  # fmt: skip

RECIPE = {
    "name": "little-run",
    "model": {"id": "acme/base"},
    "data": {"prompts": [{"path": "/home/somebody/secret/prompts.jsonl"}]},
    "ppo": {"updates": 41, "gamma": 0.9875, "args": {"learning_rate": 3.5e-05}},
    "evaluate": {"samples": 4, "max_new_tokens": 24, "temperature": 1.0},
    "card": {"title": None, "license": None, "language": ["en"], "authors": "Some Body",
             "intended_use": "Trying things out.", "limits": None},
}  # fmt: skip

SCORES = {"sft": [0.5, -0.25, 0.75, 0.125], "policy": [0.625, -0.875, 0.9375, 0.375]}


def make_run(folder: Path, change=None, recipe=None, roles=ROLES) -> Record:
    """Write a run into `folder`; `change(data)` edits the record's data first."""
    data = copy.deepcopy(RECORD)
    if change is not None:
        change(data)
    record = Record(folder, data)
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "training.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe or RECIPE, sort_keys=False))
    for step, (kl, score, length) in enumerate([(0.0, 0.111, 20.25), (2.5, 0.333, 21.75)]):
        values = {"kl/sequence": kl, "reward/score": score, "completions/length": length}
        record.log("ppo", step + 1, values)
    write_samples(folder, "ordinary answer", HOSTILE)
    for role in roles:
        adapter = record.adapter(role)
        adapter.mkdir(parents=True)
        task = {"reward": "SEQ_CLS", "value": "TOKEN_CLS"}.get(role, "CAUSAL_LM")
        config = {"task_type": task, "base_model_name_or_path": "/home/somebody/base"}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        (adapter / "tokenizer_config.json").write_text("{}")
        (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        if role in ("reward", "value"):
            head = {"pad_token_id": 11, "head": "score, no bias"}
            head |= {"reward_offset": _offset(data)} if role == "reward" else {}
            (adapter / "reward.json").write_text(json.dumps(head))
    record.save()
    return record


def _offset(data):
    return data.get("stages", RECORD["stages"])["reward"]["offset"]


def write_samples(folder: Path, plain: str, worst: str) -> None:
    """Four prompts, base, SFT and policy each; the policy's answer to the second is the worst."""
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for i in range(4):
            for model in ("base", "sft", "policy"):
                text = (
                    worst if (model, i) == ("policy", 1) else f"{plain} of {model} to {'abcd'[i]}"
                )
                line = {"index": i, "model": model, "prompt": f"prompt {'abcd'[i]}"}
                line |= {"completion": text}
                if model in SCORES:
                    line["score"] = SCORES[model][i]
                file.write(json.dumps(line) + "\n")


def set_at(data, path, value):
    *keys, last = path.split(".")
    for key in keys:
        data = data[key]
    data[last] = value


def change(**values):
    """`stages__ppo__kl_last=3`: an edit of the record's data."""
    return lambda data: [set_at(data, k.replace("__", "."), v) for k, v in values.items()]


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text, title):
    """The cells of all tables of a section, line by line."""
    lines = [line for line in section(text, title).splitlines() if line.startswith("|")]
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]


def pythons(text):
    """The Python blocks of a card."""
    return re.findall(r"```python\n(.*?)```", text, re.S)
