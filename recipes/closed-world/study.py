# SPDX-License-Identifier: Apache-2.0
"""Run the study of learning and over-optimisation in docs/learning.md.

    python recipes/closed-world/study.py --out runs/study

Finished runs are kept and not repeated, so the command can be stopped and run again. The runs of a
seed share base, SFT and reward model. `--part` runs one part, `--seeds` fewer seeds.

    gold        PPO against the exact checker: the optimiser alone
    algorithms  PPO, GRPO, RLOO, DPO and best of n against the learned reward
    curves      long PPO runs at several KL coefficients, and best of n, against sqrt(KL)
    settings    PPO and RLOO at the settings that were tried; differences from the recipe's PPO
    noise       signal to noise of one rollout's policy gradient at SFT, by kind of advantage
    lora        adapters on 1, 1/2 and 1/4 of the layers; ranks 1, 4 and 16
    privacy     private reward models: accuracy, epsilon promised and epsilon found by an audit
    strategies  accuracy of the reward model against labels spent, by choice of the prompts
    rounds      three rounds of 350 rankings against one of 1,050

A seed decides all randomness: records, demonstrations, labelers, samples, LoRA.
"""

import argparse
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

import lora_rlhf
from lora_rlhf import estimates, tiny
from lora_rlhf.algorithms.best_of_n import best_of_n_kl
from lora_rlhf.algorithms.objectives import explained_variance, gae, masked_mean, whiten
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.data.closed_world import checkers
from lora_rlhf.data.dataset_builder import prompts as read_prompts
from lora_rlhf.evaluation import overoptimization
from lora_rlhf.feedback import rounds as feedback_rounds
from lora_rlhf.feedback import task_choice
from lora_rlhf.models import scoring
from lora_rlhf.reports import compare, kinds
from lora_rlhf.runs.samples import prompt_text
from lora_rlhf.runtime import quiet
from lora_rlhf.serving import loaded_run
from lora_rlhf.training.reward import ensemble

ALGORITHMS = ("ppo", "grpo", "rloo", "dpo", "best_of_n")
KL_COEFS = [0.0, 0.05, 0.2]
LONG = 60
_CLIPPED = ["ppo.clip_value=0.2", "ppo.value_learning_rate=null"]
SETTINGS = {
    "ppo": [], "ppo-clipped-value": _CLIPPED, "ppo-1.5e-3": ["ppo.args.learning_rate=1.5e-3"],
    "ppo-2e-3-kl-0.15": ["ppo.args.learning_rate=2e-3", "ppo.kl_coef=0.15"],
    "rloo": ["algorithm=rloo"], "rloo-kl-0.15": ["algorithm=rloo", "rloo.kl_coef=0.15"],
}  # fmt: skip
LORA = {
    "fraction-1": [], "fraction-1-2": ["lora.top_fraction=0.5"],
    "fraction-1-4": ["lora.top_fraction=0.25"],
    "rank-1": ["lora.r=1", "lora.alpha=2"], "rank-4": ["lora.r=4", "lora.alpha=8"],
}  # fmt: skip
EPSILONS = (None, 8.0, 3.0, 1.0)
PRIVACY = [
    "data.comparisons.0.n=200",
    "reward.privacy.canaries=1000", "reward.args.num_train_epochs=4", "reward.gate=warn",
    "reward.args.per_device_train_batch_size=64",
]  # fmt: skip
METRICS = (
    "gold_reward", "gold_reward_minus_sft", "win_rate", "false_abstention", "missed_abstention",
    "proxy_reward", "kl", "length",
)  # fmt: skip


def one(sets: list[str], out: Path, start: Path | None = None, until: str = "card") -> Any:
    """Return the record of one run, after running it unless it is finished."""
    recipe = lora_rlhf.load_recipe(tiny.recipe(), sets)
    print("run", out, flush=True)
    return lora_rlhf.run(recipe, out, start_from=start, until=until)


def row(record: Any, name: str, seed: int) -> dict[str, Any]:
    """Return a run's results for the tables."""
    evaluation = record.data["evaluation"]
    model = "best_of_n" if "best_of_n" in evaluation else "policy"
    seconds = {k: v["seconds"] for k, v in record.data["clock"]["stages"].items()}
    return {
        "name": name,
        "seed": seed,
        "sft": evaluation["sft"]["gold_reward"],
        "sft_false_abstention": evaluation["sft"]["false_abstention"],
        "worse": list(kinds.clearly_worse(kinds.of_record(record)[model])),
        **{metric: evaluation[model].get(metric) for metric in METRICS},
        "accuracy": record.data["stages"].get("reward", {}).get("accuracy"),
        "seconds": seconds,
    }


def shared(seed: int, out: Path) -> Path:
    """Train SFT and reward model of one seed, and return their run directory."""
    folder = out / f"seed-{seed}" / "shared"
    one([f"seed={seed}"], folder, until="reward")
    return folder


def gold(seed: int, out: Path) -> list[dict[str, Any]]:
    sets = [f"seed={seed}", "ppo.reward=gold", "data.comparisons=[]", "ppo.updates=24"]
    return [row(one(sets, out / f"seed-{seed}" / "gold"), "gold", seed)]


def algorithms(seed: int, out: Path) -> list[dict[str, Any]]:
    start, rows = shared(seed, out), []
    for algorithm in ALGORITHMS:
        sets = [f"seed={seed}", f"algorithm={algorithm}"]
        rows.append(row(one(sets, out / f"seed-{seed}" / algorithm, start), algorithm, seed))
    return rows


def settings(seed: int, out: Path) -> list[dict[str, Any]]:
    start, rows = shared(seed, out), []
    for name, more in SETTINGS.items():
        where = out / f"seed-{seed}" / name
        rows.append(row(one([f"seed={seed}", *more], where, start), name, seed))
    folders = [out / f"seed-{seed}" / name for name in SETTINGS]
    for differ in compare.run(folders)["differences"] if len(folders) > 1 else ():
        print(seed, differ["of"], differ["less"], differ["metric"], cell(differ["estimate"]))
    return rows


def lora(seed: int, out: Path) -> list[dict[str, Any]]:
    rows = []
    for name, more in LORA.items():
        sets = [f"seed={seed}", *more]
        # All layers at rank 16 is the recipe itself: the PPO run of `algorithms`.
        where = out / f"seed-{seed}" / (name if more else "ppo")
        start = None if more else shared(seed, out)
        rows.append(row(one(sets, where, start), name, seed))
    return rows


def privacy(seed: int, out: Path) -> list[dict[str, Any]]:
    first, rows = base(seed, out), []
    start = (first / "adapters" / "sft").resolve()
    test = sampled_gold(first, "reference", seed + 1, TEST, 4)
    for epsilon in EPSILONS:
        sets = [f"seed={seed}", *PRIVACY, f"sft.from={start}", "sft.args={}"]
        sets += [] if epsilon is None else [f"reward.privacy.epsilon={epsilon}"]
        name = f"epsilon-{epsilon or 'none'}"
        where = out / f"seed-{seed}" / name
        stage = one(sets, where, until="reward").data["stages"]["reward"]
        result = {key: stage.get(key) for key in ("memorisation", "privacy")}
        rows.append({**accuracy(where, name, seed, 200, test), **result})
    return rows


def curves(seed: int, out: Path) -> list[dict[str, Any]]:
    start, rows = shared(seed, out), []
    for coef in KL_COEFS:
        sets = [f"seed={seed}", f"ppo.kl_coef={coef}", f"ppo.updates={LONG}", "ppo.watch=off"]
        where = out / f"seed-{seed}" / f"long-{coef}"
        result = row(one(sets, where, start), f"long-{coef}", seed)
        lines = lora_rlhf.Record.read(where).metrics("ppo")
        result["curve"] = [
            {
                "d": math.sqrt(max(line["kl/sequence_k3"], 0.0)),
                "proxy": line["reward/score"],
                "gold": line["rewards/gold"],
            }
            for line in lines
        ]
        rows.append(result)
    path = out / f"seed-{seed}" / "best_of_n.json"
    if not path.exists():
        path.write_text(json.dumps(best_of_n(start)) + "\n")
    rows.append({"name": "best_of_n", "seed": seed, "curve": json.loads(path.read_text())})
    return rows


def best_of_n(run: Path, samples: int = 64, prompts: int = 128) -> list[dict[str, float]]:
    """Return proxy and gold reward of the best of n SFT samples, for n = 1, 2, 4 ... `samples`."""
    print("best of n from", run, flush=True)
    backbone, record = loaded_run.load(run)
    recipe = lora_rlhf.load_recipe(run / "recipe.yaml")
    rows = read_prompts(recipe, backbone.tokenizer).held_out.select(range(prompts))
    items = [checkers.Item.from_dict(json.loads(item)) for item in rows["item"]]
    ids = [backbone.encode_prompt(p) for p in rows["prompt"] for _ in range(samples)]
    answers = backbone.generate(
        ids,
        "reference",
        max_new_tokens=recipe.ppo.args["max_completion_length"],
        seed=recipe.seed,
        batch_size=256,
    )
    proxy = ensemble.scores(backbone, list(zip(ids, answers, strict=True)), recipe.reward).rewards
    truth = [
        checkers.check(items[i // samples], backbone.decode(answer)).reward
        for i, answer in enumerate(answers)
    ]
    cut = range(0, len(answers), samples)
    tables = [[x[i : i + samples] for i in cut] for x in (proxy, truth)]
    points = []
    n = 1
    while n <= samples:
        best = overoptimization.best_of_n(*tables, n)
        d = math.sqrt(best_of_n_kl(n))
        points.append({"n": n, "d": d, "proxy": best[0], "gold": best[1]})
        n *= 2
    return points


def noise(seed: int, out: Path) -> list[dict[str, Any]]:
    """Measure signal to noise of one rollout's policy gradient at SFT, by kind of advantage."""
    start = shared(seed, out)
    backbone, _ = loaded_run.load(start)
    recipe = lora_rlhf.load_recipe(start / "recipe.yaml")
    prompts = read_prompts(recipe, backbone.tokenizer).train["prompt"]
    measured, fresh = (sampled(backbone, recipe, prompts[i : i + 192]) for i in (0, 192))
    grouped = sampled(backbone, recipe, prompts[:192], grouped=True)
    rows: list[dict[str, Any]] = []
    for name, (rollouts, epochs) in VALUES.items():
        ppo_stage.start_roles(backbone, recipe)
        for kind, each, same in (("", measured, SAMPLES), (GROUPED, grouped, 1)):
            with backbone.training("policy", "value"):
                if not kind:
                    fit_value(backbone, fresh[:rollouts], epochs)
                first = name == next(iter(VALUES))
                parts = [rollout_gradients(backbone, one, name, first) for one in each]
            explained = fmean(part for _, part in parts)
            for a in parts[0][0]:
                rows.append(noise_row(seed, a + kind, [v[a] for v, _ in parts], explained, same))
    return rows


GROUPED = "; 16 prompts x 4"
"""Mark of rollouts with all answers to a prompt, as RLOO's; the others have 64 prompts."""


def noise_row(
    seed: int, advantage: str, vectors: list[Tensor], explained: float, same: int = 4
) -> dict[str, Any]:
    """Return signal, from products of gradients on different prompts, over noise of one rollout.

    Args:
        same: Rollouts on the same prompts, one such set after the other.
    """
    total = fmean(float(v @ v) for v in vectors)
    blocks = torch.stack(vectors).view(same, -1, len(vectors[0])).mean(0)
    n = len(blocks)
    signal = (float((blocks.sum(0) ** 2).sum()) - float((blocks**2).sum())) / (n * (n - 1))
    result = {"name": advantage, "seed": seed, "snr": signal / (total - signal)}
    result["explained"] = explained if "value" in advantage else None
    print(result, flush=True)
    return result


VALUES = {
    "value as it starts": (0, 0), "value after 1 rollout x 1": (1, 1),
    "value after 1 rollout x 8": (1, 8), "value after 8 rollouts x 3": (8, 3),
}  # fmt: skip
"""Fit of the value before the policy moves -> rollouts of 64 episodes of SFT, passes over them."""


SAMPLES = 4
"""Answers to each prompt."""

RAW = "not whitened"


class Rollout(NamedTuple):
    """Answers to 64 prompts, their scores, and the mean score of the prompt's other samples."""

    batch: scoring.Batch
    mask_bt: Tensor
    scores_b: Tensor
    others_b: Tensor


def sampled(backbone: Any, recipe: Any, prompts: list[Any], grouped: bool = False) -> list[Rollout]:
    """Sample rollouts of 64 episodes from SFT, in all SAMPLES answers to each prompt.

    Args:
        grouped: The answers to a prompt are in one rollout, not in one each.
    """
    ids = [backbone.encode_prompt(p) for p in prompts] * SAMPLES
    limit = recipe.ppo.args["max_completion_length"]
    answers = backbone.generate(ids, "reference", max_new_tokens=limit, seed=recipe.seed)
    episodes = list(zip(ids, answers, strict=True))
    scores = torch.tensor(ensemble.scores(backbone, episodes, recipe.reward).rewards)
    ended = torch.tensor([a[-1] in backbone.eos_ids for a in answers])
    scores = scores - recipe.ppo.missing_eos_penalty * (~ended).float()
    table = scores.view(SAMPLES, -1)
    others = ((table.sum(0) - table) / (SAMPLES - 1)).flatten()
    order = torch.arange(len(ids)).view(SAMPLES, -1)
    rollouts = []
    for part in (order.T if grouped else order).flatten().split(64):
        batch = scoring.batch(backbone, episodes, part.tolist())
        lengths = torch.tensor([len(answers[i]) for i in batch.index])
        mask_bt = torch.arange(batch.tokens, 0, -1) <= lengths.unsqueeze(1)  # completions end last
        rollouts.append(Rollout(batch, mask_bt, scores[part], others[part]))
    return rollouts


def fit_value(backbone: Any, rollouts: list[Rollout], epochs: int, rate: float = 2e-3) -> None:
    """Fit the value to the scores of rollouts, 64 episodes a step."""
    parameters = [p for _, p in backbone.role_parameters("value")]
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.95), weight_decay=0.0)
    for one in rollouts * epochs:
        with backbone.role("value"):
            values_bt = scoring.token_values(backbone, *one.batch.inputs)
            error_bt = values_bt - one.scores_b.unsqueeze(1)
            masked_mean(error_bt**2, one.mask_bt).backward()
        optimizer.step()
        optimizer.zero_grad()


def rollout_gradients(
    backbone: Any, one: Rollout, value: str, plain: bool
) -> tuple[dict[str, Tensor], float]:
    """Return the policy's gradient by kind of advantage, and the value's explained variance."""
    mask_bt, scores = one.mask_bt, one.scores_b.unsqueeze(1)
    with torch.no_grad(), backbone.role("value"):
        values_bt = scoring.token_values(backbone, *one.batch.inputs)
    rewards_bt = torch.zeros_like(values_bt)
    rewards_bt[:, -1] = one.scores_b
    relative_bt = (scores - one.others_b.unsqueeze(1)) * torch.ones_like(values_bt)
    flat_bt = torch.ones_like(values_bt)
    first = (values_bt * (mask_bt.cumsum(1) == 1)).sum(1, keepdim=True)
    short_bt = gae(rewards_bt, values_bt, mask_bt, 1.0, 0.95)[0]
    advantages = {
        f"{value}, lambda 0.95": short_bt,
        f"{value}, lambda 0.95, {RAW}": short_bt,
        f"{value}, lambda 1": scores - values_bt,
        f"{value}, beside the other samples": relative_bt - (values_bt - first),
    }
    if plain:
        advantages |= {"mean of the rollout": scores * flat_bt}
        advantages |= {
            "mean of the prompt's other samples": relative_bt,
            f"mean of the prompt's other samples, {RAW}": relative_bt,
        }
    parameters = [p for _, p in backbone.role_parameters("policy")]
    with backbone.role("policy"):
        logprobs_bt, _ = scoring.completion_logprobs(backbone, *one.batch.inputs, 1.0)
        vectors = {}
        for name, advantage_bt in advantages.items():
            used_bt = advantage_bt if name.endswith(RAW) else whiten(advantage_bt, mask_bt)
            loss = masked_mean(logprobs_bt * used_bt, mask_bt)
            parts = torch.autograd.grad(loss, parameters, retain_graph=True)
            vectors[name] = torch.cat([part.flatten() for part in parts])
    targets_bt = scores * flat_bt
    return vectors, explained_variance(values_bt, targets_bt, mask_bt)


def fits(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit Gao's coefficients of proxy and gold reward over all seeds, from the reward at d = 0."""
    fitted: dict[str, Any] = {}
    for name in dict.fromkeys(r["name"] for r in rows):
        fit = overoptimization.fit_best_of_n if name == "best_of_n" else overoptimization.fit_rl
        for kind in ("proxy", "gold"):
            d, reward = [], []
            for r in (r for r in rows if r["name"] == name):
                start = fmean(p[kind] for p in r["curve"][: 1 if name == "best_of_n" else 2])
                d += [p["d"] for p in r["curve"]]
                reward += [p[kind] - start for p in r["curve"]]
            fitted.setdefault(name, {})[kind] = fit(d, reward)._asdict()
    return fitted


def draw(rows: list[dict[str, Any]], fitted: dict[str, Any], path: Path) -> None:
    """Plot proxy and gold reward against sqrt(KL), with the fitted curves; one panel a name."""
    import matplotlib.pyplot as plt
    import numpy as np

    names = list(fitted)
    size = (4 * len(names), 3.6)
    figure, grid = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False)
    axes = list(grid[0])
    for axis, name in zip(axes, names, strict=True):
        for kind, colour in (("proxy", "tab:blue"), ("gold", "tab:orange")):
            points = [p for r in rows if r["name"] == name for p in r["curve"]]
            starts = [
                fmean(p[kind] for p in r["curve"][: 1 if name == "best_of_n" else 2])
                for r in rows
                if r["name"] == name
            ]
            d = np.array([p["d"] for p in points])
            axis.scatter(d, [p[kind] for p in points], s=8, color=colour, alpha=0.6, label=kind)
            x = np.linspace(1e-3, max(d.max(), 1e-2), 100)
            fit = fitted[name][kind]
            bend = x if name == "best_of_n" else np.log(x)
            curve = fmean(starts) + x * (fit["alpha"] - fit["beta"] * bend)
            axis.plot(x, curve, color=colour)
        axis.set_title(name.replace("long-", "PPO, KL coefficient "))
        axis.set_xlabel("sqrt(KL to SFT), nats$^{1/2}$")
    axes[0].set_ylabel("reward")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def base(seed: int, out: Path) -> Path:
    """Train SFT alone, before any label."""
    folder = out / f"seed-{seed}" / "base"
    one([f"seed={seed}", "data.comparisons=[]"], folder, until="sft")
    return folder


def sampled_gold(
    run: Path, role: str, seed: int, part: slice, k: int = 1
) -> tuple[list[str], list[list[str]], list[list[float]]]:
    """Return evaluation prompts, k answers of a role to each, and their gold rewards."""
    backbone, record = loaded_run.load(run)
    recipe = record.recipe()
    held_out = read_prompts(recipe, backbone.tokenizer).held_out
    rows = held_out.select(range(*part.indices(len(held_out))))
    ids = [backbone.encode_prompt(prompt) for prompt in rows["prompt"] for _ in range(k)]
    limit = recipe.ppo.args["max_completion_length"]
    drawn = backbone.generate(ids, role, max_new_tokens=limit, seed=seed, batch_size=256)
    texts = [backbone.decode(answer) for answer in drawn]
    answers = [texts[i : i + k] for i in range(0, len(texts), k)]
    items = [checkers.Item.from_dict(json.loads(item)) for item in rows["item"]]
    rewards = [
        [checkers.check(item, text).reward for text in each]
        for item, each in zip(items, answers, strict=True)
    ]
    return list(rows["prompt"]), answers, rewards


TEST = slice(200, 400)
"""Evaluation prompts on which reward models are compared with the checker."""

START, MORE = 80, (80,)
"""Rankings of random prompts that all strategies begin with; those that each one adds."""


def strategies(seed: int, out: Path) -> list[dict[str, Any]]:
    """Train a reward model on the labels that each strategy asks for, and test it."""
    folder = out / f"seed-{seed}" / "strategies"
    if (done := folder / "result.json").exists():
        return list(json.loads(done.read_text()))
    start, folder_of = base(seed, out), folder.joinpath
    sets = [f"seed={seed}", f"sft={{from: {start / 'adapters' / 'sft'}}}", "reward.gate=warn"]

    def labelled(
        name: str, run: Path, choice: task_choice.Choice, noise: float | None
    ) -> tuple[Any, float]:
        file = folder_of(f"{name}.jsonl")
        if not file.exists():
            task_choice.make(run, choice, file, failed=failed, say=print)
        given = [json.loads(line) for line in file.read_text().splitlines()]
        recipe = lora_rlhf.Record.read(run).recipe()
        return feedback_rounds.simulated(recipe, given, seed + len(choice.strategy), noise)

    def trained(name: str, rows: list[Any], more: tuple[str, ...] = ()) -> Path:
        file = folder_of(f"{name}.labels.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        comparisons = f"data.comparisons=[{{path: {file.resolve()}}}]"
        one([*sets, comparisons, *more], folder_of(name), until="reward")
        return folder_of(name)

    prompts, _, rewards = sampled_gold(start, "reference", seed, slice(0, 200))
    failed = [prompt_text(p) for p, [r] in zip(prompts, rewards, strict=True) if r < 1]
    test = sampled_gold(start, "reference", seed + 1, TEST, 4)
    first, noise = labelled("start", start, task_choice.Choice("random", START, seed=seed), None)
    rows = [accuracy(trained("start", first), "start", seed, START, test)]
    several = trained("ensemble", first, ("reward.ensemble=3",))
    for strategy in task_choice.STRATEGIES:
        added, _ = labelled(
            strategy, several, task_choice.Choice(strategy, MORE[-1], seed=seed), noise
        )
        for n in MORE:
            run = trained(f"{strategy}-{n}", first + added[:n])
            rows.append(accuracy(run, strategy, seed, START + n, test))
    done.write_text(json.dumps(rows) + "\n")
    return rows


def accuracy(run: Path, name: str, seed: int, labels: int, test: Any) -> dict[str, Any]:
    """Return the share of pairs of test answers that a reward model orders as the checker does."""
    done = run.with_name(f"{run.name}.accuracy.json")
    if done.exists():
        return dict(json.loads(done.read_text()))
    backbone, record = loaded_run.load(run)
    episodes = [
        (backbone.encode_prompt(prompt), backbone.encode_completion(text))
        for prompt, answers, _ in zip(*test, strict=True)
        for text in answers
    ]
    scores = iter(ensemble.scores(backbone, episodes, record.recipe().reward).rewards)
    by_prompt: list[list[float]] = []
    for rewards in test[2]:
        each = [next(scores) for _ in rewards]
        by_prompt.append(
            [
                float((each[a] > each[b]) == (rewards[a] > rewards[b]))
                for a, b in itertools.combinations(range(len(rewards)), 2)
                if rewards[a] != rewards[b]
            ]
        )
    by_prompt = [right for right in by_prompt if right]
    groups = [number for number, right in enumerate(by_prompt) for _ in right]
    share = estimates.share_interval(sum(by_prompt, []), groups)
    print(name, seed, labels, share, flush=True)
    result = {"name": name, "seed": seed, "labels": labels, "accuracy": share}
    result["by_prompt"] = [fmean(right) for right in by_prompt]
    done.write_text(json.dumps(result) + "\n")
    return result


ARMS = {"one": (1050,), "three": (350, 350, 350)}
"""Rankings of each round."""


def rounds(seed: int, out: Path) -> list[dict[str, Any]]:
    """Label at once, or in rounds of which each asks for labels of the last policy's answers."""
    folder = out / f"seed-{seed}" / "rounds"
    if (done := folder / "result.json").exists():
        return list(json.loads(done.read_text()))
    start = base(seed, out)
    result: dict[str, Any] = {"name": "rounds", "seed": seed}
    result["sft"] = [r for [r] in sampled_gold(start, "reference", seed, slice(512))[2]]
    for arm, sizes in ARMS.items():
        run = start
        for number, n in enumerate(sizes, 1):
            where = folder / f"{arm}-{number}"
            kept = folder / "one-1" / "answers"
            if number == 1 and kept.exists() and not where.exists():  # of the same model
                shutil.copytree(kept, where / "answers")
            model = "sft" if number == 1 else "policy"
            choice = task_choice.Choice("random", n, model=model, seed=seed)
            request = feedback_rounds.Round(choice, "simulated", "sft", ("reward.gate=warn",))
            recipe = feedback_rounds.prepare(run, where, request, say=print)
            assert recipe is not None  # simulated labelers do not keep one waiting
            print("run", where, flush=True)
            run = where / "run"
            record = lora_rlhf.run(recipe, run, until="ppo")
            result[f"{arm}-{number} accuracy"] = record.data["stages"]["reward"]["accuracy"]
        result[arm] = [r for [r] in sampled_gold(run, "policy", seed, slice(512))[2]]
    done.write_text(json.dumps([result]) + "\n")
    return [result]


def strategy_tables(rows: list[dict[str, Any]]) -> str:
    """Write each strategy's accuracy by labels, and its difference from random over seeds."""
    by = {(r["name"], r["labels"], r["seed"]): r["accuracy"]["value"] for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    lines = ["## strategies", "", "| prompts chosen by | labels | accuracy | minus random |"]
    lines.append("|---|---|---|---|")
    for name, labels in dict.fromkeys((r["name"], r["labels"]) for r in rows):
        each = [by[name, labels, seed] for seed in seeds]
        gap = ""
        if name not in ("start", "random"):
            pairs = [by[name, labels, s] - by["random", labels, s] for s in seeds]
            gap = cell(estimates.mean_interval(pairs), 3)
        if gap and len(seeds) == 1:  # paired by prompt, which leaves the training's noise out
            of = {(r["name"], r["labels"]): r["by_prompt"] for r in rows}
            two = of[name, labels], of["random", labels]
            gap = cell(estimates.paired_difference(*two, seeds[0]), 3)
        lines.append(f"| {name} | {labels} | {cell(estimates.mean_interval(each), 3)} | {gap} |")
    return "\n".join([*lines, "", f"{len(seeds)} seeds; intervals over seeds, if several.", ""])


def round_tables(rows: list[dict[str, Any]]) -> str:
    """Write gold reward and win rates of both arms, paired by prompt, and over seeds."""
    lines = ["## rounds", "", "| seed | SFT | one round | three rounds | three minus one | "]
    lines[-1] += "three against one, win rate | one against SFT | three against SFT |"
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in rows:
        sft, one_, three = r["sft"], r["one"], r["three"]
        cells = [cell(estimates.mean_interval(x)) for x in (sft, one_, three)]
        cells.append(cell(estimates.paired_difference(three, one_, r["seed"])))
        pairs = ((three, one_), (one_, sft), (three, sft))
        cells += [cell(estimates.win_rate(a, b)) for a, b in pairs]
        lines.append(f"| {r['seed']} | {' | '.join(cells)} |")
    gaps = [fmean(r["three"]) - fmean(r["one"]) for r in rows]
    wins = [estimates.win_rate(r["three"], r["one"])["value"] for r in rows]
    lines += [
        "",
        f"Over seeds: three minus one {cell(estimates.mean_interval(gaps), 3)}, win rate ",
    ]
    lines[-1] += f"of three against one {cell(estimates.mean_interval(wins), 3)}."
    return "\n".join([*lines, ""])


def cell(estimate: Any, digits: int = 2) -> str:
    """Format an estimate as `0.55 [0.51, 0.58]`; empty if there is none."""
    if not estimate:
        return ""
    if estimate["low"] is None:
        return f"{estimate['value']:.{digits}f}"
    return "{value:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(**estimate, d=digits)


PARTS = {
    "gold": gold, "algorithms": algorithms, "curves": curves, "settings": settings, "noise": noise,
    "lora": lora, "privacy": privacy, "strategies": strategies, "rounds": rounds,
}  # fmt: skip


def tables(part: str, rows: list[dict[str, Any]], fitted: dict[str, Any]) -> str:
    """Write Markdown tables: every run, then the means over seeds with counts of clear wins."""
    if part in ("strategies", "rounds"):
        return strategy_tables(rows) if part == "strategies" else round_tables(rows)
    head = ["run", "seed", "SFT", "SFT: false abstention", *METRICS]
    head += ["kinds clearly worse", "reward model", "seconds"]
    lines = [f"## {part}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    full = [r for r in rows if r.get("gold_reward")]
    for r in full:
        cells = [r["name"], str(r["seed"]), cell(r["sft"]), cell(r["sft_false_abstention"])]
        cells += [*(cell(r[m]) for m in METRICS), ", ".join(r["worse"]) or "none"]
        cells += [cell(r["accuracy"]), f"{sum(r['seconds'].values()):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    if part == "noise":
        lines = [f"## {part}", "", "| advantage | seed | signal to noise | explained variance |"]
        lines.append("|---|---|---|---|")
        for r in rows:
            shown = "" if r["explained"] is None else f"{r['explained']:.2f}"
            lines.append(f"| {r['name']} | {r['seed']} | {r['snr']:.4f} | {shown} |")
        return "\n".join([*lines, ""])
    if part == "privacy":
        lines = [f"## {part}", "", "| run | seed | accuracy | promised | found, at least |"]
        lines[-1] += " right guesses | noise | clipped |"
        lines.append("|" + "---|" * 8)
        for r in rows:
            spent, audit = r["privacy"] or {}, r["memorisation"]
            cells = [r["name"], str(r["seed"]), cell(r["accuracy"], 3)]
            cells += [f"{spent.get('epsilon', math.inf):.2f}", f"{audit['epsilon_at_least']:.2f}"]
            cells += [f"{cell(audit['right'])} of {audit['guesses']}"]
            cells += [f"{spent.get('noise_multiplier', 0):.2f}", f"{spent.get('clipped', 0):.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, ""])
    lines += ["", f"| run | {' | '.join(METRICS)} | above SFT | wins |"]
    lines.append("|" + "---|" * (len(METRICS) + 3))
    for name in dict.fromkeys(r["name"] for r in full):
        mine = [r for r in full if r["name"] == name]
        means = [fmean(r[m]["value"] for r in mine) if mine[0].get(m) else None for m in METRICS]
        better = sum(r["gold_reward_minus_sft"]["low"] > 0 for r in mine)
        wins = sum(r["win_rate"]["low"] > 0.5 for r in mine)
        shown = ["" if x is None else f"{x:.2f}" for x in means]
        counts = f"{better} of {len(mine)} | {wins} of {len(mine)}"
        lines.append(f"| {name} | {' | '.join(shown)} | {counts} |")
    if fitted:
        lines += ["", "| curve | reward | alpha | beta | R squared |", "|---|---|---|---|---|"]
        for name, kinds in fitted.items():
            for kind, fit in kinds.items():
                numbers = " | ".join(f"{fit[k]:.2f}" for k in ("alpha", "beta", "r_squared"))
                lines.append(f"| {name} | {kind} | {numbers} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="20: seeds that chose nothing")
    parser.add_argument(
        "--setting", choices=SETTINGS, action="append", help="of `settings`; default: all"
    )
    parser.add_argument("--kl-coef", type=float, action="append", help="of `curves`; default: all")
    args = parser.parse_args()
    KL_COEFS[:] = args.kl_coef or KL_COEFS
    for name in SETTINGS.keys() - (args.setting or SETTINGS):
        del SETTINGS[name]
    quiet.process()
    parts = args.part or list(PARTS)
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for part in parts:  # a seed at a time, so that a study that is stopped has whole seeds
            rows[part] += PARTS[part](seed, args.out)
            result: dict[str, Any] = {"rows": rows[part]}
            if part == "curves":
                result["fits"] = fits(rows[part])
                draw(rows[part], result["fits"], args.out / "overoptimization.png")
            (args.out / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n")
            text = tables(part, rows[part], result.get("fits", {}))
            (args.out / f"{part}.md").write_text(text)
    for part in parts:
        print((args.out / f"{part}.md").read_text())


if __name__ == "__main__":
    main()
