# SPDX-License-Identifier: Apache-2.0
"""Private training: clipped by example, noise that spends the budget, exact resume, an audit."""

import functools
import math
import random

import numpy as np
import pytest
import reward_run
import torch
from datasets import Dataset
from scipy import stats
from small import backbone

from lora_rlhf.data.dataset_builder import Prepared
from lora_rlhf.errors import DataError, RecipeError
from lora_rlhf.recipe.loader import parse_recipe
from lora_rlhf.reports.cards import card_training
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.training import canaries, private_training, sft
from lora_rlhf.training.private_training import PoissonSample
from lora_rlhf.training.reward import ranking_trainer, reward_stage
from lora_rlhf.training.stage_context import StageContext

pytest.importorskip("opacus", reason="the extra `privacy` is not installed")

WORDS = [f"w{i}" for i in range(5, 60)]
ROWS = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(5, 25)]


def train(folder, rows=ROWS, **sets):
    """Run SFT on the small Llama; returns the backbone and the record."""
    overrides = [f"{key}={value}" for key, value in sets.items()]
    recipe = parse_recipe("name: x\nmodel: {id: tiny}\n", "x", overrides)
    record = Record.open(folder, recipe)
    made, data = backbone("llama"), Dataset.from_list(list(rows))
    args = sft.arguments(recipe, record.folder)
    prepared = Prepared(data, data.select(range(2)), {})
    sft.run(StageContext(recipe, made, record, Progress(quiet=True)), args, prepared)
    return made, record


PRIVATE = {
    "sft.privacy.epsilon": 8,
    "sft.args.per_device_train_batch_size": 5,
    "sft.args.warmup_steps": 0,
}


@pytest.fixture
def quick(monkeypatch):
    """No search for the noise."""
    monkeypatch.setattr(private_training, "noise_multiplier", lambda *_: 0.8)
    monkeypatch.setattr(private_training, "epsilon", lambda *_: 8.0)


def analytic_gaussian(noise, delta):
    """Epsilon of one Gaussian mechanism, exactly (Balle and Wang 2018, theorem 8)."""
    low, high = 0.0, 100.0
    for _ in range(100):
        eps = (low + high) / 2
        left, right = 1 / (2 * noise) - eps * noise, -1 / (2 * noise) - eps * noise
        spent = stats.norm.cdf(left) - math.exp(eps) * stats.norm.cdf(right)
        low, high = (eps, high) if spent > delta else (low, eps)
    return high


@pytest.mark.parametrize("noise, steps", [(2.0, 1), (4.0, 9)])
def test_the_accountant_agrees_with_the_exact_gaussian_mechanism(noise, steps):
    """Without sampling, T steps are one Gaussian mechanism with noise / sqrt(T)."""
    spent = private_training.epsilon(noise, 1e-5, 1.0, steps)
    exact = analytic_gaussian(noise / math.sqrt(steps), 1e-5)
    assert exact - 1e-3 <= spent <= exact * 1.02 + 0.02


def test_the_noise_spends_the_budget_and_no_more():
    noise = private_training.noise_multiplier(3.0, 1e-5, 0.01, 200)
    assert 2.9 <= private_training.epsilon(noise, 1e-5, 0.01, 200) <= 3.0


def test_samples_are_poisson_secret_and_repeat_with_their_seed():
    sample = PoissonSample(200, 10, "seed")
    batches = [b for epoch in range(40) for b in (sample.set_epoch(epoch), list(sample))[1]]
    sizes = np.array([len(b) for b in batches])
    assert len(sample) == 20 and abs(sizes.mean() - 10) < 0.5
    assert abs(sizes.var() - 10 * 0.95) < 1.5  # not the same size each time
    assert list(sample) == list(sample)
    assert list(PoissonSample(200, 10, "other")) != list(PoissonSample(200, 10, "seed"))
    assert all(list(PoissonSample(3, 1, str(i))) for i in range(5))  # an empty sample is a batch


def test_each_step_adds_at_most_the_clip_norm_of_an_example(tmp_path, monkeypatch):
    """Without noise, with and without one example: gradients differ by clip / expected size."""
    monkeypatch.setattr(private_training, "noise_multiplier", lambda *_: 0.0)
    monkeypatch.setattr(private_training, "epsilon", lambda *_: 8.0)
    seen = []

    def keep(self, *args, **options):
        loss = real(self, *args, **options)
        if torch.is_grad_enabled():
            seen.append([p.grad.clone() for p in self.loss_parameters()])
        return loss

    real = private_training.PrivateTraining.compute_loss
    monkeypatch.setattr(private_training.PrivateTraining, "compute_loss", keep)
    monkeypatch.setattr(private_training.secrets, "token_hex", lambda _: "same")
    odd = {"prompt": "w9", "completion": " w200" * 12}
    sets = {**PRIVATE, "sft.privacy.clip_norm": 0.01, "sft.args.max_steps": 1}
    sets["sft.args.per_device_train_batch_size"] = 4
    for number, rows in enumerate((ROWS[:4], [*ROWS[:3], odd])):
        train(tmp_path / str(number), rows, **sets)
    a, b = seen
    change = math.sqrt(sum(float(((x - y) ** 2).sum()) for x, y in zip(a, b, strict=True)))
    assert 0 < change <= 2 * 0.01 / 4 + 1e-6  # one example replaced: removed and added
    norm = math.sqrt(sum(float((x**2).sum()) for x in a))
    assert norm <= 0.01 + 1e-6


def test_the_record_has_what_was_spent_and_no_two_runs_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(private_training, "ACCOUNTANT", "rdp")  # found in less time, and once
    for name in ("noise_multiplier", "epsilon"):
        monkeypatch.setattr(
            private_training, name, functools.cache(getattr(private_training, name))
        )
    sets = {**PRIVATE, "sft.args.max_steps": 1, "sft.args.per_device_train_batch_size": 2}
    runs = [train(tmp_path / str(i), **sets) for i in range(2)]
    entries = [record.data["stages"]["sft"]["privacy"] for _, record in runs]
    assert entries[0] == {**entries[1], "clipped": entries[0]["clipped"]}
    assert 7.9 < entries[0]["epsilon"] <= 8 and entries[0]["delta"] == 0.1 / len(ROWS)
    assert entries[0]["examples"] == 20 and entries[0]["sample_rate"] == 0.1
    assert (
        runs[0][1].data["stages"]["sft"]["adapter_sha256"]
        != (runs[1][1].data["stages"]["sft"]["adapter_sha256"])
    )


def holding(folder, seed):
    """Return the files that hold the secret seed."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path for path in files if seed.encode() in path.read_bytes()}


@pytest.mark.slow
def test_a_private_run_that_was_stopped_ends_in_the_same_bits(quick, tmp_path, monkeypatch):
    """The secret seed is in the checkpoints of the stopped run, and in no other file."""
    seed = "51" * 16
    monkeypatch.setattr(private_training.secrets, "token_hex", lambda _: seed)
    sets = {**PRIVATE, "sft.args.max_steps": 6, "checkpoint.every_steps": 1}
    _, whole = train(tmp_path / "whole", **sets)
    count = []

    def stop(*_):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt

    original = private_training.PrivateTraining._add_clipped
    monkeypatch.setattr(
        private_training.PrivateTraining,
        "_add_clipped",
        lambda self, *a: (stop(), original(self, *a))[1],
    )
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", **sets)
    kept = holding(tmp_path / "stopped", seed)
    assert kept and all("checkpoints" in path.parts for path in kept)
    monkeypatch.setattr(private_training.secrets, "token_hex", lambda _: "another process")
    _, stopped = train(tmp_path / "stopped", **sets)
    a, b = (record.data["stages"]["sft"] for record in (whole, stopped))
    assert a["adapter_sha256"] == b["adapter_sha256"] and a["privacy"] == b["privacy"]
    assert all("checkpoints" in path.parts for path in holding(tmp_path, seed))


@pytest.mark.parametrize(
    "sets, message",
    [
        ({"sft.args.gradient_accumulation_steps": 2}, "raise per_device_train_batch_size"),
        ({"sft.args.train_sampling_strategy": "group_by_length"}, "its own random sample"),
    ],
)
def test_arguments_that_break_the_guarantee_are_refused(tmp_path, sets, message):
    with pytest.raises(RecipeError, match=message):
        train(tmp_path, **PRIVATE, **sets)


def test_a_delta_that_allows_publishing_a_row_is_refused(tmp_path):
    with pytest.raises(DataError, match="below 1 / 20"):
        train(tmp_path, **PRIVATE, **{"sft.privacy.delta": 0.06})


def test_ppo_has_no_private_training_and_says_why():
    text = "name: x\nmodel: {id: tiny}\nppo: {privacy: {epsilon: 1}}\n"
    with pytest.raises(RecipeError, match="each of its rollouts depends on all earlier ones"):
        parse_recipe(text, "x")


def test_dpo_with_a_private_reward_model_is_refused():
    text = "name: x\nmodel: {id: tiny}\nalgorithm: dpo\nreward: {privacy: {epsilon: 1}}\n"
    with pytest.raises(RecipeError, match="reward.privacy does not protect"):
        parse_recipe(text, "x")


@pytest.mark.parametrize("stage", [sft, reward_stage])
def test_augmented_rows_would_have_more_than_the_budget(tmp_path, stage):
    text = "name: x\nmodel: {id: tiny}\ndata: {augment: {paraphrases: 0.1}}\n"
    text += "sft: {privacy: {epsilon: 1}}\nreward: {privacy: {epsilon: 1}}\n"
    with pytest.raises(RecipeError, match="makes several examples of one"):
        stage.arguments(parse_recipe(text, "x"), tmp_path)


@pytest.fixture
def in_words(monkeypatch):
    """Canaries of words that the small tokenizer knows."""

    def code(draws):
        return " ".join(draws.choices(WORDS, k=2))

    def draw(count, seed, rows):
        draws = random.Random(seed)
        coins = [draws.random() < 0.5 for _ in range(count)]
        return [canaries.Canary(code(draws), code(draws), code(draws), coin) for coin in coins]

    monkeypatch.setattr(canaries, "_code", code)
    monkeypatch.setattr(canaries, "draw", draw)


@pytest.mark.slow  # twenty epochs
def test_canaries_are_planted_by_coins_and_found_where_training_is_not_private(in_words, tmp_path):
    sets = {"sft.privacy.canaries": 60, "sft.args.num_train_epochs": 20}
    sets |= {"sft.args.learning_rate": 1e-2, "sft.args.per_device_train_batch_size": 25}
    _, record = train(tmp_path, **sets)
    entry = record.data["stages"]["sft"]["memorisation"]
    assert 15 < entry["planted"] < 45 and entry["canaries"] == 60
    assert entry["epsilon_at_least"] > 0.5
    bits = {when: e["bits"] for when, e in entry["exposure"].items()}
    assert bits["planted_after"] > bits["planted_before"] + 1
    assert bits["planted_after"] > bits["not_planted_after"] + 1


def test_the_audit_is_the_papers_and_does_not_overstate():
    """With delta 0: a binomial tail. Under randomized response, in at most 5 % above the truth."""
    tail = stats.binom.sf(79, 100, 1 / (1 + math.exp(-1.0)))
    assert canaries.p_value(1000, 100, 80, 1.0, 0.0) == pytest.approx(tail)
    assert canaries.p_value(1000, 100, 80, 1.0, 1e-4) > tail
    draws, over = np.random.default_rng(0), 0
    for _ in range(40):
        planted = draws.random(100) < 0.5
        right = draws.random(100) < 1 / (1 + math.exp(-1.0))
        scores = np.where(planted == right, 1.0, -1.0) * draws.random(100)
        over += canaries.audit(scores, planted, 0.0)["epsilon_at_least"] > 1.0
    assert over <= 4


def test_without_a_budget_or_canaries_nothing_changes(tmp_path):
    _, record = train(tmp_path / "a", **{"sft.args.max_steps": 2})
    entry = record.data["stages"]["sft"]
    assert "privacy" not in entry and "memorisation" not in entry


def test_a_private_reward_model_counts_a_prompt_with_its_comparisons_as_one(
    quick, in_words, tmp_path
):
    """A prompt keeps all its completions in one element, and canaries are prompts of their own."""
    section = {"args": {**reward_run.ARGS, "max_steps": 2}, "gate": "warn"}
    section["privacy"] = {"epsilon": 8.0, "canaries": 10}
    recipe = reward_run.recipe(**section)
    record = Record.open(tmp_path, recipe)
    made = backbone("llama", "policy", "reference")
    data = reward_run.prepared(reward_run.last_word, n=20)
    context = StageContext(recipe, made, record, Progress(quiet=True))
    args = reward_stage.arguments(recipe, tmp_path)
    reward_stage.run(context, args, data, reward_run.DEMONSTRATIONS)
    entry = record.data["stages"]["reward"]
    prompts = len(set(data.train["group"])) + entry["memorisation"]["planted"]
    assert entry["privacy"]["examples"] == entry["prompts"] == prompts
    assert entry["memorisation"]["canaries"] == 10
    assert entry["privacy"]["steps"] == 2


def test_a_prompt_with_many_completions_stays_one_private_example():
    made = backbone("llama")
    few = {"prompt": "w5", "group": 0, "rejected": "w60"}
    pairs = [{**few, "chosen": f"w{i}"} for i in range(6, 30)]
    rows = Dataset.from_list(pairs)
    assert len(ranking_trainer.rankings(made, rows)) == 2
    assert len(ranking_trainer.rankings(made, rows, whole=True)) == 1


def test_the_card_states_what_is_protected_and_what_is_not():
    spent = {"epsilon": 7.98, "delta": 1e-4, "examples": 900, "noise_multiplier": 0.6}
    audit = {"canaries": 100, "planted": 49, "epsilon_at_least": 1.25}
    items = card_training._privacy({"privacy": spent, "memorisation": audit}, "demonstration")
    text = "\n".join(items)
    assert "epsilon 7.98" in text and "one demonstration of 900" in text
    assert "Not covered" in text and "at least 1.25" in text
    assert card_training._privacy({}, "demonstration") == []


@pytest.mark.parametrize("columns", [("completion",), ("chosen", "rejected")])
@pytest.mark.parametrize("turns", [False, True])
def test_canaries_have_the_form_of_the_other_rows(columns, turns):
    def form(role, text):
        return [{"role": role, "content": text}] if turns else text

    row = {"prompt": form("user", "a"), "group": 4, "margin": 1.0, "item": "x"}
    rows = Dataset.from_list([row | {name: form("assistant", name) for name in columns}] * 2)
    drawn = canaries.draw(20, 3, rows)
    together = canaries.plant(rows, drawn)
    planted = [canary for canary in drawn if canary.planted]
    assert 0 < len(planted) < 20 and together.features == rows.features
    last = together[-1]
    assert last["prompt"] == planted[-1].prompt and len(together) == 2 + len(planted)
    assert last[columns[0]] == form("assistant", planted[-1].code)
    assert len(set(together["group"])) == 1 + len(planted) and last["margin"] == 0.0
