# SPDX-License-Identifier: Apache-2.0
"""A generated `report.json` of an evaluation: any number of prompts, three models, two sets."""

import random

TARGETS = ("base", "sft", "policy")
KINDS = ("question", "not stated", "list", "harmful")
WORDS = ("the record says that Anna keeps nine grey horses in the north yard of Oslo since spring "
         "and no letter of hers names another place").split()  # fmt: skip

SCRIPT = "<script>document.title = 'broken'; fetch('https://example.org/x')</script>"
"""An answer that must stay text."""


def interval(value, half, n):
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def sentence(draw, words):
    return " ".join(draw.choice(WORDS) for _ in range(words)).capitalize() + "."


def table(draw, metric, better, *, set="closed-world", judge=None, trusted=True, scale=1.0, n=64):
    level = {name: scale * (0.3 + 0.2 * i) for i, name in enumerate(TARGETS)}

    def difference(a, b, half):
        return interval(level[a] - level[b] + draw.gauss(0, half / 4), half, n)

    half = 0.9 * scale / n**0.5
    return {
        "set": set, "metric": metric, "judge": judge, "trusted": trusted, "better": better,
        "meaning": f"Mean {metric} of all {n} prompts.",
        "estimates": {name: interval(x + draw.gauss(0, half / 4), half, n)
                      for name, x in level.items()},
        "by_kind": {kind: {name: interval(draw.gauss(x, half), 2 * half, n // 4)
                           for name, x in level.items()} for kind in KINDS},
        "differences": [
            {"a": a, "b": b, "estimate": difference(a, b, half),
             "by_kind": {kind: difference(a, b, 2 * half) for kind in KINDS}}
            for a, b in (("policy", "sft"), ("sft", "base"))
        ],
    }  # fmt: skip


def sample(draw, number, words, metrics):
    def answer(level):
        values = {name: float(draw.random() < level) for name in metrics} | {
            "gold_reward": draw.gauss(level, 1)
        }
        return {"text": sentence(draw, words), "tokens": 2 * words, "finished": number % 9 > 0,
                "values": values}  # fmt: skip

    return {
        "set": "closed-world" if number % 4 else "truth", "id": f"row-{number}",
        "kind": KINDS[number % len(KINDS)] if number % 4 else "", "why": "",
        "prompt": f"Question {number}. {sentence(draw, words // 2)}",
        "answers": {name: answer(0.3 + 0.2 * i) for i, name in enumerate(TARGETS)},
    }  # fmt: skip


def report(prompts=64, words=20, metrics=("correct", "invented"), seed=0):
    """Make a report; sample 1 has a script as its policy's answer, sample 2 an undecided value."""
    draw = random.Random(seed)
    judge = "reward model (held out)"
    samples = [sample(draw, number, words, metrics) for number in range(prompts)]
    samples[1]["answers"]["policy"]["text"] = SCRIPT
    samples[1]["why"] = "judges disagree most here"
    samples[2]["answers"]["policy"]["values"]["gold_reward"] = None
    del samples[3]["answers"]["base"]
    tables = [
        table(draw, "gold_reward", "higher", n=prompts),
        *(table(draw, metric, better, n=prompts)
          for metric, better in zip(metrics, 9 * ("higher", "lower"), strict=False)),
        table(draw, "win_rate", "higher", judge=judge, trusted=False, n=prompts),
        table(draw, "length", "neither", scale=100, n=prompts),
        table(draw, "mc1", "higher", set="truth", n=prompts // 4),
    ]  # fmt: skip
    tables[-1]["from_clean"] = {"policy": interval(-0.25, 0.1, prompts // 4), "base": None}
    tables[-1]["estimates"]["base"] = tables[-1]["differences"][1]["estimate"] = None
    headline = "policy beats sft by its gold reward: the paired difference lies above 0."
    return {
        "version": 1,
        "suite": {"name": "quick", "file": "suites/quick.yaml", "seed": 0, "temperature": 1.0,
                  "max_new_tokens": 64},
        "created": "2026-11-27T21:00:00+00:00", "device": "cpu",
        "packages": {"lora-rlhf": "0.1.0", "torch": "2.13.0"},
        "headline": {"metric": "gold_reward", "set": "closed-world", "judge": None,
                     "sentence": headline},
        "verdict": [headline, "sft beats base in the same way.",
                    "Whether policy invents less than sft is not known: the interval includes 0."],
        "targets": [
            {"name": name, "kind": "run", "base": "tiny", "id": f"runs/demo:{name}", "few_shot": 0}
            for name in TARGETS
        ],
        "sets": [
            {"name": "closed-world", "n": prompts * 3 // 4,
             "kinds": dict.fromkeys(KINDS[1:], prompts // 4),
             "source": "generated, seed 7", "licence": "Apache-2.0", "sha256": "ab" * 32},
            {"name": "truth", "n": prompts // 4, "kinds": {"": prompts // 4},
             "source": "someone/truth", "licence": "MIT", "sha256": "cd" * 32},
        ],
        "tables": tables,
        "judges": [
            {"name": "checker", "kind": "checker", "validation": None, "trusted": True,
             "why": "An exact checker of the task: it cannot be wrong about a fact of the record."},
            {"name": judge, "kind": "reward", "trusted": False,
             "validation": {"accuracy": interval(0.55, 0.08, 150), "raters": 3,
                            "by category": {"harmless": 0.61, "helpful": 0.49}, "chance": True,
                            "probes": {"padded": interval(0.7, 0.1, 100)}},
             "why": "Its accuracy against people's labels may be that of chance."},
        ],
        "samples": samples,
        "costs": {
            name: {"p50_s": 0.21 + i / 10, "p95_s": 0.9, "tokens_per_second": 210.5 - i,
                   "peak_bytes": 512 * 2**20, "per_1000": None if i else 0.12}
            for i, name in enumerate(TARGETS)
        },
        "not_measured": [{"what": "Toxic continuations", "why": "The detector is not installed."}],
    }  # fmt: skip
