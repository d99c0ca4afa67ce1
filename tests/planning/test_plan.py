# SPDX-License-Identifier: Apache-2.0
"""Memory planned from a config, against what the real model allocates."""

import contextlib
import copy
import functools
import json
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch
from huggingface_hub import constants
from transformers import AutoConfig, LlamaConfig
from typer.testing import CliRunner

from lora_rlhf import tiny
from lora_rlhf.cli import app
from lora_rlhf.errors import BaseModelError, FitError, RecipeError, UsageError
from lora_rlhf.models import fused_layers, loading
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.planning import (
    dry_run,
    gpu_fit,
    memory_budget,
    meta_backbone,
    plan,
    plan_report,
    probe,
)
from lora_rlhf.recipe.loader import load_recipe
from lora_rlhf.recipe.schema import LoraSection, ModelSection, PpoSection, Recipe
from lora_rlhf.training import microbatch_splitting

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.parent for path in (ROOT / "recipes").rglob("recipe.yaml"))
assert len(RECIPES) >= 3, "without recipes nothing would be tested"
TOLERANCE = 0.1

DEEP: dict[str, dict[str, int]] = {"llama": {"num_hidden_layers": 3}}
"""Layers instead of the usual two; half of them, rounded up, are adapted."""
SETTINGS = [
    ("llama", False, 1.0, False), ("llama", False, 0.5, True), ("gpt2", True, 1.0, False),
    *(pytest.param(*other, marks=pytest.mark.slow) for other in (
        ("gemma2", False, 0.5, False), ("gpt2", False, 0.5, False), ("gpt2", True, 0.5, True),
        ("gemma2", False, 1.0, True), ("llama", True, 0.5, False), ("gemma2", True, 1.0, False))),
]  # fmt: skip
"""Architecture, checkpointing, share of adapted layers, 4-bit."""

TRAINED = {
    dry_run.language_model: ("policy",), dry_run.ranking: ("reward",),
    dry_run.update: ("policy", "value"),
}  # fmt: skip
PHASES = [dry_run.prefill, dry_run.decode, dry_run.score, dry_run.rewards, *TRAINED]


def folder_of(name: str) -> str:
    return (
        str(tiny.path()) if name == "tiny" else str(small.base_folder(name, **DEEP.get(name, {})))
    )


def sections(name: str, fraction: float, four_bit: bool, checkpointing: bool = False):
    model = ModelSection(
        id=folder_of(name),
        dtype="float32",
        load_in_4bit=four_bit,
        gradient_checkpointing=checkpointing,
    )
    return model, LoraSection(r=4, alpha=8, top_fraction=fraction)


def with_roles(made: Backbone) -> Backbone:
    for role in ("policy", "reference", "reward", "value"):
        made.add_role(role)
    return made


@functools.cache
def weightless(name: str, fraction: float, four_bit: bool) -> Backbone:
    model, lora = sections(name, fraction, four_bit)
    config = AutoConfig.from_pretrained(folder_of(name))
    return with_roles(meta_backbone.backbone(config, model, lora, torch.float32))


def measured(real: Backbone, batch: dry_run.Batch, phase: dry_run.Phase) -> int:
    meter = probe.Meter(torch.device("cpu"), 0)
    with fused_layers.layers(real) if batch.rollout else contextlib.nullcontext():
        meter.start()
        with microbatch_splitting.in_one_block(dry_run.trained(real)):  # as trainers do
            phase(real, batch)
        return meter.lap()


# --------------------------------------------------------------------- the phases, one by one


@pytest.mark.parametrize(("name", "checkpointing", "fraction", "four_bit"), SETTINGS)
def test_the_bytes_of_a_phase_are_known_from_the_config(name, checkpointing, fraction, four_bit):
    bare = weightless(name, fraction, four_bit)
    real = with_roles(Backbone.load(*sections(name, fraction, four_bit)))
    assert bare.memory_report() == real.memory_report()
    rows = 1 if four_bit else 6  # one row has no padding, and so no mask
    batch = dry_run.Batch(rows, 20, 12, kept=fraction < 1, rollout=fraction < 1)
    for phase in PHASES:
        trained = TRAINED.get(phase, ())
        with dry_run.stage(bare, trained, checkpointing=checkpointing):
            planned = dry_run.count(bare, "cpu", batch, phase)
        with dry_run.stage(real, trained, checkpointing=checkpointing):
            assert planned == pytest.approx(measured(real, batch, phase), rel=0.03), phase.__name__


def test_gradients_are_counted_beside_the_activations_on_a_cpu_only():
    bare = weightless("llama", 1.0, False)
    batch, counts = dry_run.Batch(1, 2, 2), {}
    with dry_run.stage(bare, ("policy", "value"), checkpointing=True):
        moved = sum(p.nbytes for p in dry_run.trained(bare))
        for device in ("cpu", "cuda"):
            counts[device] = dry_run.count(bare, device, batch, dry_run.policy_step)
    assert counts["cpu"] > moved > 0.6 * counts["cuda"], "gradients are most of a short batch"
    assert counts["cpu"] - counts["cuda"] > 0.4 * moved


def test_checkpointing_a_trunk_and_4_bit_each_save_memory():
    counts = {}
    for fraction, checkpointing in ((1.0, False), (1.0, True), (0.5, False)):
        bare = weightless("llama", fraction, False)
        with dry_run.stage(bare, ("policy", "value"), checkpointing=checkpointing):
            batch = dry_run.Batch(6, 20, 12)
            counts[fraction, checkpointing] = dry_run.count(bare, "cpu", batch, dry_run.update)
    assert counts[1.0, True] < 0.8 * counts[1.0, False]
    assert counts[0.5, False] < 0.8 * counts[1.0, False]
    packed, whole = (weightless("llama", 1.0, q).memory_report()["backbone"] for q in (True, False))
    assert packed < 0.5 * whole


def test_the_meter_counts_released_bytes_and_scratch_space():
    meter = probe.Meter(torch.device("cpu"), 1000)
    meter.start()
    kept = torch.zeros(1000)
    torch.zeros(5000)
    assert meter.lap() == pytest.approx(1000 + 4 * 6000, abs=200)
    assert meter.now == pytest.approx(1000 + 4 * 1000, abs=200)
    del kept


# ------------------------------------------------------------------------ the trainer, for real


def recipe_of(name: str, checkpointing: bool, fraction: float, four_bit: bool, **ppo) -> Recipe:
    model, lora = sections(name, fraction, four_bit, checkpointing)
    args = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "learning_rate": 1e-3,
        "max_completion_length": 16,
        **ppo.pop("args", {}),
    }
    return Recipe(
        name="probe",
        model=model,
        lora=lora,
        data={"comparisons": [{"path": "x.jsonl"}], "max_prompt_tokens": 24, "max_tokens": 48},
        ppo=PpoSection(**ppo, args=args),
    )


@pytest.mark.parametrize(
    ("name", "checkpointing", "fraction", "four_bit"),
    [
        ("gpt2", False, 1.0, False),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (
            ("llama", True, 0.5, False), ("tiny", False, 1.0, False), ("tiny", True, 0.5, False),
            ("llama", False, 0.5, False), ("gemma2", True, 0.5, True))),
    ],
)  # fmt: skip
def test_a_probe_measures_what_was_planned(name, checkpointing, fraction, four_bit):
    recipe = recipe_of(name, checkpointing, fraction, four_bit)
    planned = plan.Planner(loading.find_config(recipe.model), "cpu").plan(recipe)
    phases = {p.phase: p for p in probe.run(recipe, planned)}
    assert set(phases) == {"sft", "reward", "ppo sampling", "ppo scoring", "ppo update"}
    for phase in phases.values():
        assert abs(phase.ratio - 1) < TOLERANCE, phase


@pytest.mark.slow
def test_accumulation_counts_the_gradients_of_an_earlier_micro_batch():
    recipe = recipe_of("tiny", True, 1.0, False, args={"gradient_accumulation_steps": 2})
    once = recipe_of("tiny", True, 1.0, False)
    more = {}
    for device in ("cuda", "cpu"):  # on a CPU they are one block, allocated at the start
        planner = plan.Planner(loading.find_config(recipe.model), device)
        both = (planner.plan(r).phases["ppo update"].total for r in (recipe, once))
        more[device] = next(both) - next(both)
    assert more["cuda"] > 0 == more["cpu"]
    [update] = [p for p in probe.run(recipe, planner.plan(recipe)) if p.phase == "ppo update"]
    assert abs(update.ratio - 1) < TOLERANCE


def test_only_ppo_recipes_are_probed():
    recipe = recipe_of("tiny", False, 1.0, False).model_copy(update={"algorithm": "grpo"})
    with pytest.raises(UsageError, match="algorithm is grpo"):
        probe.run(recipe, None)  # before the plan is used


# ------------------------------------------------------------------------------------ the plan


def smollm2(layers: int = 30, **lora: object) -> tuple[LlamaConfig, Recipe]:
    """A plan takes as long as its layers; few are enough for tests of what uses one."""
    folder = ROOT / "recipes" / "smollm2-135m-hh"
    recipe = load_recipe(folder)
    recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update=lora)})
    return meta_backbone.with_layers(AutoConfig.from_pretrained(folder), layers), recipe


@pytest.mark.slow
def test_a_deep_model_is_planned_from_a_few_layers(monkeypatch: pytest.MonkeyPatch):
    config, recipe = smollm2(20, top_fraction=0.5)
    few = plan.Planner(config, "cpu").plan(recipe)
    monkeypatch.setattr(plan, "_MOST_LAYERS", 100)
    whole = plan.Planner(config, "cpu").plan(recipe)
    for name, phase in few.phases.items():
        assert phase.total == pytest.approx(whole.phases[name].total, rel=0.01), name


def test_a_base_that_is_stored_in_4_bit_is_planned_so():
    config, recipe = smollm2(1)
    quantised, plain = (
        gpu_fit.changed(recipe, {"model.load_in_4bit": value}) for value in (True, False)
    )
    expected = plan.Planner(config, "cuda").plan(quantised)
    stored = copy.deepcopy(config)
    stored.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    planner = plan.Planner(stored, "cuda")
    assert planner.plan(plain).backbone == expected.backbone
    assert gpu_fit.four_bit(planner, plain, expected) == {}


def test_the_parameters_of_a_base_are_counted_exactly():
    """SmolLM2-135M has 134,515,008 parameters, the embedding tied; Llama 3 8B 8,030,261,248."""
    config, recipe = smollm2()
    recipe = recipe.model_copy(
        update={"model": ModelSection(id="a/b", dtype="bfloat16", load_in_4bit=False)}
    )
    rope = 576 // 9 // 2 * 4  # inverse frequencies, kept twice
    estimate = plan.Estimate(plan.Planner(config, "cuda"), recipe, None)
    assert estimate.backbone == 2 * 134_515_008 + 2 * rope
    made = meta_backbone.backbone(LLAMA["8B"], recipe.model, recipe.lora, torch.bfloat16)
    assert sum(p.numel() for p in made.causal.parameters()) == 8_030_261_248


@pytest.fixture(scope="module")
def planner() -> plan.Planner:
    """Of two layers of SmolLM2 on a GPU; what it has counted is kept between tests."""
    return plan.planner_for(smollm2(2)[0], "cuda")


def test_roles_and_phases_are_those_of_the_algorithm(planner: plan.Planner):
    _, recipe = smollm2()
    names = {
        "ppo": {"ppo sampling", "ppo scoring", "ppo update"},
        "dpo": {"dpo update"},
        "rloo": {"rloo sampling", "rloo scoring", "rloo update"},
        "best_of_n": set(),
    }
    for algorithm, own in names.items():
        planned = planner.plan(recipe.model_copy(update={"algorithm": algorithm}))
        assert set(planned.phases) == {"load", "sft", "reward", "evaluate"} | own
        assert ("value" in planned.roles) == (algorithm == "ppo")
    section = recipe.reward.model_copy(update={"ensemble": 3})
    roles = planner.plan(recipe.model_copy(update={"reward": section})).roles
    assert [r for r in roles if r.startswith("reward")] == ["reward", "reward_1", "reward_2"]


def test_trunk_states_are_kept_where_the_recipe_says(planner: plan.Planner):
    _, recipe = smollm2()
    one = 24 * (56 + 40) * 576 * 2  # episodes, tokens, hidden size, bfloat16

    def trunk(where: str) -> list[int]:
        section = recipe.ppo.model_copy(update={"trunk_states": where})
        phases = planner.plan(recipe.model_copy(update={"ppo": section})).phases
        return [phases[f"ppo {name}"].trunk_states for name in ("sampling", "scoring", "update")]

    assert trunk("device") == [2 * one] * 3
    assert trunk("cpu") == [2 * one, 0, 0]
    assert trunk("off") == [0, 0, 0]


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("folder", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_can_be_planned_from_its_folder_alone(
    folder: Path, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With the Hub allowed, but no network and an empty cache; by default the weights only."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    recipe = load_recipe(folder)
    config = loading.find_config(recipe.model, folder)
    if whole:
        assert plan.planner_for(config, "cuda").plan(recipe).peak > 1e7
    planner = plan.Planner(meta_backbone.with_layers(config, 1), "cuda")
    estimate = plan.Estimate(planner, recipe, None)
    assert estimate.resident > estimate.backbone > 1e5
    assert (
        planner.backbone(recipe, 1, 1).memory_report()["roles"]["policy"] == estimate.adapter > 1e4
    )


def test_a_missing_config_is_an_error_with_its_remedy(tmp_path: Path):
    recipe = recipe_of("tiny", False, 1.0, False)
    recipe = recipe.model_copy(update={"model": ModelSection(id="nobody/nothing")})
    with pytest.raises(BaseModelError, match="beside the recipe"):
        loading.find_config(recipe.model, tmp_path)
    other = {"model_type": "llama", "_name_or_path": "somebody/something"}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(BaseModelError, match="somebody/something"):
        loading.find_config(recipe.model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert loading.find_config(recipe.model, tmp_path).model_type == "llama"


# ------------------------------------------------------------------------------ fitting a GPU

LLAMA = {
    "1B": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""The shapes of Llama 3.2 1B and Llama 3 8B."""


def plain(**model: object) -> Recipe:
    return Recipe(
        name="x", model=ModelSection(id="a/b", **model), data={"comparisons": [{"path": "x.jsonl"}]}
    )


def test_a_recipe_is_changed_until_it_fits():
    planner = plan.Planner(meta_backbone.with_layers(LLAMA["1B"], 2), "cuda")
    gpu = 8 * 10**9
    assert planner.plan(plain(), gpu).needed > gpu
    fit = gpu_fit.fit(planner, plain(), gpu)
    assert fit.changes and next(iter(fit.changes)) == "model.gradient_checkpointing"
    again = planner.plan(gpu_fit.changed(plain(), fit.changes), gpu)
    assert again.needed == fit.plan.needed <= gpu
    assert fit.micro_batch is not None
    estimate = plan.Estimate(planner, fit.recipe, gpu)
    assert estimate.update(fit.micro_batch).total <= memory_budget.largest_peak(gpu)
    assert estimate.update(fit.micro_batch + 1).total > memory_budget.largest_peak(gpu)


@pytest.mark.slow
def test_a_gpu_without_room_for_the_4_bit_base_is_given_up():
    config = meta_backbone.with_layers(LLAMA["1B"], 2)
    recipe = plain(load_in_4bit=True, gradient_checkpointing=True)
    assert gpu_fit.fit(plan.Planner(config, "cuda"), recipe, 10**9).changes is None


def test_a_base_that_is_too_large_is_quantised_first():
    """Best of n: it has the fewest phases, and the order of the remedies is that of all."""
    recipe = plain().model_copy(update={"algorithm": "best_of_n"})
    planner, gpu = plan.Planner(meta_backbone.with_layers(LLAMA["8B"], 2), "cuda"), 59 * 10**8
    fit = gpu_fit.fit(planner, recipe, gpu)
    assert fit.changes and next(iter(fit.changes)) == "model.load_in_4bit"
    assert fit.plan.needed <= gpu


@pytest.mark.parametrize(
    ("text", "count"), [("16GB", 16e9), ("16", 16e9), ("16GiB", 2**34), (" 7.5 gb", 7.5e9)]
)
def test_sizes_of_gpus(text: str, count: float):
    assert gpu_fit.capacity(text) == count


@pytest.mark.parametrize("text", ["", "big", "16 parsecs", "0", "-3GB", "1.2.3", "nan"])
def test_a_text_that_is_not_a_size_is_refused(text: str):
    with pytest.raises(UsageError, match="--gpu"):
        gpu_fit.capacity(text)


# --------------------------------------------------------------------------- command and runs


def invoke(*args: object):
    return CliRunner().invoke(app.app, ["plan", *map(str, args)], prog_name="lora-rlhf")


@pytest.mark.slow
def test_the_command_says_whether_a_gpu_is_enough():
    folder = ROOT / "recipes" / "smollm2-135m-hh"
    done = invoke(folder, "--gpu", "8GB")
    assert done.exit_code == 0 and "fits 8 GB" in done.output and "<- peak" in done.output
    done = invoke(folder, "--gpu", "1.7GB", "--json")
    assert done.exit_code == FitError.exit_code
    output = json.loads(done.stdout)
    [gpu] = output["cards"]
    assert not gpu["fits"] and output["plan"]["needed"] > gpu["bytes"] >= gpu["needed"]


def test_the_command_reports_errors_of_recipe_and_options():
    assert invoke(tiny.recipe(), "--set", "ppo.args.nothing=1").exit_code == RecipeError.exit_code
    assert invoke(tiny.recipe(), "--gpu", "wide").exit_code == UsageError.exit_code


def test_a_base_of_inits_table_is_planned_without_its_config(monkeypatch, tmp_path):
    """`init` wrote recipes that `plan` could not plan; no config has another code than no fit."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    fitted = SimpleNamespace(unchanged=False, changes=None, capacity=1, micro_batch=None)
    monkeypatch.setattr(plan_report, "fit", lambda planner, *_: fitted)
    fitted.plan = SimpleNamespace(needed=2)
    path = tmp_path / "r.yaml"
    path.write_text((ROOT / "recipes" / "smollm2-135m-hh" / "recipe.yaml").read_text())
    done = invoke(path, "--gpu", "8GB", "--set", "model.id=HuggingFaceTB/SmolLM2-1.7B-Instruct")
    assert done.exit_code == FitError.exit_code == 7, done.output
    assert "SmolLM2-1.7B-Instruct is not on this machine: its shape is from" in done.stdout
    done = invoke(path, "--gpu", "8GB", "--set", "model.id=a/b", "--set", "model.revision=x")
    assert done.exit_code == BaseModelError.exit_code == 4
    assert "`hf download a/b config.json --revision x`" in done.stderr
    assert "unset HF_HUB_OFFLINE" in done.stderr


@pytest.mark.parametrize("most", [1, 2, 37, 4999])
def test_the_largest_micro_batch_is_searched_by_halves(monkeypatch, most):
    """Two small batches say little of large ones; one row less at a time took half an hour."""
    counted = []

    class Estimate:
        def __init__(self, *_):
            self.policy = SimpleNamespace(per_device_train_batch_size=4)

        def update(self, rows):
            counted.append(rows)
            return SimpleNamespace(total=rows if rows <= 4 and most > 4 else 10**6 * rows // most)

    monkeypatch.setattr(gpu_fit, "Estimate", Estimate)
    monkeypatch.setattr(gpu_fit, "largest_peak", lambda gpu: 10**6)
    recipe = load_recipe(tiny.recipe())
    assert gpu_fit.largest_micro_batch(None, recipe, 10**9) == most
    assert len(counted) < 30
