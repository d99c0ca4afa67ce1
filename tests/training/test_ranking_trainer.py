# SPDX-License-Identifier: Apache-2.0
"""Rankings as batch elements: the loss is the published one, whatever shares the batch."""

import functools
import inspect
import itertools
import json
import random

import pytest
import torch
from datasets import Dataset
from small import backbone, nudge, tokenizer
from torch.nn.functional import logsigmoid

from lora_rlhf._trl import SEAMS, RewardConfig, RewardTrainer
from lora_rlhf.data import dataset_builder
from lora_rlhf.models import scoring
from lora_rlhf.recipe.schema import ModelSection, Recipe
from lora_rlhf.training.reward import ranking_trainer
from lora_rlhf.training.reward.ranking_trainer import (
    RankingTrainer,
    collate,
    ranking_loss,
    rankings,
)


def words(rng, n):
    return " ".join(f"w{rng.randrange(5, 45)}" for _ in range(n))


def pairs_of(sizes, seed=0, margins=False):
    """Rows of pairs: one ranking of K completions for each K in `sizes`, shuffled together."""
    rng, rows = random.Random(seed), []
    for group, k in enumerate(sizes):
        prompt = words(rng, 1 + group % 4)
        best_first = [words(rng, 1 + (i * 3 + group) % 7) + f" w{50 + i}" for i in range(k)]
        for a, b in itertools.combinations(best_first, 2):
            rows.append({"prompt": prompt, "chosen": a, "rejected": b, "group": group})
            if margins:
                rows[-1]["margin"] = rng.random()
    rng.shuffle(rows)
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    return backbone("llama", "reward")


def explicit(made, rows):
    """Eq. 1 as it is written: every pair on its own, left-padded, weight 1 / pairs of a prompt."""
    groups = {}
    for row in rows:
        prompt = made.encode_prompt(row["prompt"])
        gap = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([[0] * 3 + prompt + made.encode_completion(row[side])])
            mask = (torch.arange(ids.shape[1]) >= 3).long()[None]
            gap.append(scoring.last_token_scores(made, ids, mask, "reward")[0])
        loss = -logsigmoid(gap[0] - gap[1] - (row.get("margin") or 0))
        groups.setdefault(row["group"], []).append(loss)
    return torch.stack([torch.stack(losses).mean() for losses in groups.values()]).mean()


def trainer(made, rows, folder, kind=RankingTrainer, **args):
    args = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        **args,
    }
    config = RewardConfig(output_dir=str(folder), **args)
    if kind is not RankingTrainer:
        view, tokenizer = made.views["reward"], made.tokenizer
        return kind(model=view, args=config, train_dataset=rows, processing_class=tokenizer)
    dataset, collator = rankings(made, rows), functools.partial(collate, pad_token_id=0)
    return kind(made, "reward", args=config, train_dataset=dataset, data_collator=collator)


def gradients(made):
    found = torch.cat([p.grad.flatten() for _, p in made.role_parameters("reward")])
    for _, parameter in made.role_parameters("reward"):
        parameter.grad = None
    return found


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2, 6), (3,)])
def test_loss_and_gradient_are_those_of_the_pairs_one_by_one(made, tmp_path, sizes, margins):
    rows = pairs_of(sizes, margins=margins)
    elements = rankings(made, rows)
    assert sorted(len(e["completions"]) for e in elements) == sorted(sizes)
    with made.training("reward"):
        batch = collate(list(elements), 0)
        assert batch["input_ids"].shape[0] == sum(sizes), "K forwards, not K (K - 1)"
        loss = trainer(made, rows, tmp_path).whole_loss(made.views["reward"], batch)
        loss.backward()
        ours = gradients(made)
        wanted = explicit(made, rows)
        wanted.backward()
        theirs = gradients(made)
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    assert (ours - theirs).abs().max() < 1e-6
    assert theirs.abs().max() > 1e-3, "the test could not tell"


def test_a_prompt_counts_the_same_whatever_else_is_in_the_batch(made):
    """The sum over a batch is the sum of its prompts alone, in any order."""
    elements = list(rankings(made, pairs_of((5, 2, 3, 9), margins=True)))

    def loss(*chosen):
        batch = collate([elements[i] for i in chosen], 0)
        with torch.no_grad(), made.role("reward"):
            logits = made.views["reward"](
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits.squeeze(-1)
        return float(ranking_loss(logits, batch["pairs"], batch["margins"], batch["weights"]))

    alone = [loss(i) for i in range(4)]
    assert loss(0, 1, 2, 3) == pytest.approx(sum(alone), abs=1e-5)
    assert loss(3, 1) == pytest.approx(alone[1] + alone[3], abs=1e-5)


def test_plain_pairs_are_learned_as_trl_learns_them(made, tmp_path):
    rows = pairs_of((2, 2, 2, 2))
    ids = Dataset.from_list(
        [
            {
                f"{side}_ids": made.encode_prompt(row["prompt"]) + made.encode_completion(row[side])
                for side in ("chosen", "rejected")
            }
            for row in rows
        ]
    )
    with made.training("reward"), torch.no_grad():
        theirs = trainer(made, ids, tmp_path, RewardTrainer)
        wanted = theirs.compute_loss(made.views["reward"], theirs.data_collator(list(ids)))
        ours = trainer(made, rows, tmp_path)
        found = ours.whole_loss(made.views["reward"], collate(list(rankings(made, rows)), 0))
    assert float(found) == pytest.approx(float(wanted), abs=1e-6)
    for name in ("accuracy", "margin", "min_reward", "max_reward", "num_tokens"):
        want = pytest.approx(theirs._metrics["train"][name], abs=1e-5)
        assert ours._metrics["train"][name] == want, name


def test_the_loss_is_float32_under_half_precision_scores():
    rewards = torch.tensor([8.0, 7.99], dtype=torch.bfloat16)
    loss = ranking_loss(rewards, torch.tensor([[0, 1]]), torch.zeros(1), torch.ones(1))
    assert loss.dtype == torch.float32
    far = ranking_loss(
        torch.tensor([-300.0, 300.0]), torch.tensor([[0, 1]]), torch.zeros(1), torch.ones(1)
    )
    assert float(far) == 600.0  # no overflow, no zero gradient


@pytest.mark.parametrize("batch", [(4, 1), (2, 2), (1, 4)])
def test_accumulation_weighs_every_prompt_of_a_step_the_same(tmp_path, batch):
    """Seven prompts: steps of four and of three, whose last batch is not full."""
    size, accumulation = batch
    torch.manual_seed(0)
    model = backbone("llama", "reward")
    with model.training("reward"):
        one = trainer(
            model,
            pairs_of((2, 5, 3, 2, 4, 2, 6)),
            tmp_path,
            max_steps=-1,
            num_train_epochs=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            seed=3,
            logging_steps=1,
            max_grad_norm=1e9,
            remove_unused_columns=size == 4,
        )
        losses = one.train().global_step, [line["loss"] for line in one.state.log_history[:-1]]
    after = torch.cat([p.detach().flatten() for _, p in model.role_parameters("reward")])
    known = _seen.setdefault("whole", (losses, after))
    assert losses[0] == 2
    assert losses[1] == pytest.approx(known[0][1], abs=1e-5)
    assert (after - known[1]).abs().max() < 1e-5
    assert _seen["whole"][0][1][0] != pytest.approx(_seen["whole"][0][1][1], abs=1e-3)


_seen = {}


def test_every_method_of_trls_that_is_overridden_is_a_seam():
    ours = {n for n, v in vars(RankingTrainer).items() if inspect.isfunction(v)}
    assert {n for n in ours if hasattr(RewardTrainer, n)} <= SEAMS[RewardTrainer].keys()
    assert RewardTrainer.loss_is_scaled_for_ga is False  # and read: see the accumulation test


# ------------------------------------------------------------------------------- elements


def test_completions_are_kept_once_in_the_order_they_appear(made):
    rows = Dataset.from_list(
        [
            {"prompt": "w5", "chosen": "w6", "rejected": "w7", "group": 4, "margin": 0.5},
            {"prompt": "w8", "chosen": "w9", "rejected": "w6", "group": 2, "margin": None},
            {"prompt": "w5", "chosen": "w7", "rejected": "w10", "group": 4, "margin": 0.25},
        ]
    )
    first, second = rankings(made, rows)
    ids = [made.encode_prompt("w5") + made.encode_completion(w) for w in ("w6", "w7", "w10")]
    assert first["completions"] == ids
    assert first["pairs"] == [[0, 1], [1, 2]] and first["margins"] == [0.5, 0.25]
    assert second["pairs"] == [[0, 1]] and second["margins"] == [0.0]
    assert first["length"] == max(map(len, ids))


def test_rows_without_a_group_are_prompts_of_their_own(made):
    rows = pairs_of((3,)).remove_columns("group")
    assert [e["pairs"] for e in rankings(made, rows)] == [[[0, 1]]] * 3


def test_a_prompt_with_too_many_completions_becomes_several(made, monkeypatch):
    monkeypatch.setattr(ranking_trainer, "MAX_COMPLETIONS", 4)
    elements = rankings(made, pairs_of((9,)))
    assert all(len(e["completions"]) <= 4 for e in elements)
    assert sum(len(e["pairs"]) for e in elements) == 36


def test_ties_teach_nothing_and_lose_no_weight(made, tmp_path):
    """Ranks 1, 1, 2: two pairs of three are left, and together they weigh as one prompt."""
    path = tmp_path / "ranked.jsonl"
    rows = [
        {"prompt": f"w{10 + i}", "completions": ["w5", "w6 w7", "w8"], "ranks": [1, 1, 2]}
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(
        name="ties",
        model=ModelSection(id="tiny"),
        data={"comparisons": [{"path": str(path)}], "held_out": 0.3},
    )
    found = dataset_builder.comparisons(recipe, tokenizer(markers=()))
    assert found.report["counts"]["ties"] == {"before": 90, "after": 60}
    elements = rankings(made, found.train)
    assert len(elements) == len(found.train) / 2
    assert {tuple(map(tuple, e["pairs"])) for e in elements} == {((0, 1), (2, 1))}
    assert collate(list(elements), 0)["weights"].unique().tolist() == [0.5]


def test_the_trainer_learns(tmp_path):
    torch.manual_seed(1)
    model = backbone("llama", "reward")
    nudge(model, "reward", std=0.01)
    rows = pairs_of((4,) * 16)  # w50 beats w51 beats w52
    with model.training("reward"):
        one = trainer(
            model, rows, tmp_path, max_steps=10, learning_rate=2e-2, warmup_steps=0, logging_steps=2
        )
        one.train()
    logs = [line for line in one.state.log_history if "accuracy" in line]
    assert logs[-1]["accuracy"] > 0.95 and logs[-1]["loss"] < 0.3 < 0.5 < logs[0]["loss"]
