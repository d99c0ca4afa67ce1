# SPDX-License-Identifier: Apache-2.0
"""Plans for several GPUs: bytes by hand, what is chosen, and what is refused."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from small import backbone
from transformers import LlamaConfig, MixtralConfig
from typer.main import get_command
from typer.testing import CliRunner

from lora_rlhf.cli import app
from lora_rlhf.distributed import world
from lora_rlhf.errors import RecipeError, UsageError
from lora_rlhf.planning import gpu_fit, plan, probe, several_gpus
from lora_rlhf.planning.plan import Cards, Planner
from lora_rlhf.recipe.loader import parse_recipe

TEXT = (
    "name: x\nmodel: {id: tiny}\ndata: {max_tokens: 48, max_prompt_tokens: 16, "
    "prompts: [{task: closed-world}], demonstrations: [{task: closed-world}], "
    "comparisons: [{task: closed-world}]}\n"
    "ppo: {args: {per_device_train_batch_size: 4, steps_per_generation: 2, "
    "max_completion_length: 16}}\n"
)
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
LAYER = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
"""Bytes in bfloat16 of q and o, k and v, and the MLP."""
REST = 2 * (2 * 256 * 64 + (2 * 4 + 1) * 64)
"""Of embedding, LM head and norms."""
ROTARY = 2 * 4 * 8
"""Of the frequencies of the positions, twice."""


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(LlamaConfig(**SIZE, **HEADS, tie_word_embeddings=False), "cuda")


def recipe(*sets: str):
    return parse_recipe(TEXT, "recipe.yaml", list(sets))


def test_a_part_of_each_layer_and_one_layer_are_held(planner):
    whole, shared, four = (
        plan.Estimate(planner, recipe(), None, cards)
        for cards in (Cards(2), Cards(2, sharded=True), Cards(4, sharded=True))
    )
    assert whole.backbone == REST + ROTARY + 4 * LAYER
    assert shared.backbone == REST + ROTARY + 2 * LAYER + LAYER
    assert four.backbone == REST + ROTARY + LAYER + LAYER
    assert shared.layers_split == 4 * LAYER


def test_gradients_are_held_twice_while_they_are_summed(planner):
    """With large adapters and short rows nothing in an update takes more."""
    short = recipe(
        "lora.r=64", "data.max_tokens=12", "data.max_prompt_tokens=4",
        "ppo.args.max_completion_length=4", "ppo.args.per_device_train_batch_size=2",
    )  # fmt: skip
    adapter = 4 * 64 * 4 * (2 * 128 + 2 * 96 + 3 * 192)
    head = 4 * 64
    alone, two = (planner.plan(short, None, Cards(n)).phases for n in (1, 2))
    assert two["ppo update"].activations == 2 * (2 * adapter + head)
    assert alone["ppo update"].activations < two["ppo update"].activations
    long = recipe("lora.r=1")  # activations take more
    alone, two = (planner.plan(long, None, Cards(n)).phases for n in (1, 2))
    assert two["ppo update"].activations > 2 * plan.Estimate(planner, long, None).gradients(
        "policy", "value"
    )


def test_the_bucket_of_a_real_exchange_is_what_is_planned(monkeypatch):
    made = backbone("llama", "policy", "value")
    parameters = [p for role in ("policy", "value") for _, p in made.role_parameters(role)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    monkeypatch.setattr(world.dist, "all_reduce", lambda *_, **__: None)
    meter = probe.Meter(torch.device("cpu"), 0)
    meter.start()
    world.World(0, 2).add_gradients(parameters)
    measured = meter.lap()
    planner = Planner(made.causal.config, "cpu")
    estimate = plan.Estimate(planner, recipe(f"lora.r={made.lora_section.r}"), None, Cards(2))
    assert measured == pytest.approx(estimate.gradients("policy", "value"), rel=0.01)


def test_a_process_has_its_share_of_every_batch(planner):
    few = recipe("evaluate.n=8")
    alone, two = (planner.plan(few, None, Cards(n)) for n in (1, 2))
    assert (alone.micro_batch, two.micro_batch) == (4, 2)
    assert (alone.sampled_at_once, two.sampled_at_once) == (8, 4)
    for name, phase in two.phases.items():
        assert name == "load" or phase.total < alone.phases[name].total, name
    assert planner.plan(few) == alone


def test_the_whole_base_is_chosen_where_it_fits_and_else_the_shared_one(planner):
    made = several_gpus.plan(planner, recipe(), "2x24GB", "r.yaml --set seed=3")
    assert made.choice == "whole"
    assert made.command == (
        "torchrun --nproc_per_node 2 -m lora_rlhf run r.yaml --set seed=3 --out runs/x"
    )
    assert made.per_pass == 2 * LAYER
    trained = plan.Estimate(planner, recipe(), None).moments // 2  # policy and value, N = 2
    assert made.per_step == trained
    assert made.split.needed < made.whole.needed
    between = f"2x{(made.whole.needed + made.split.needed) // 2 / 1e9:.6f}GB"
    tight = several_gpus.plan(planner, recipe(), between, "r.yaml")
    assert tight.choice == "split" and tight.command.endswith("--set model.shard=true")
    assert "split the base" in "\n".join(tight.lines())
    assert next(tight.lines()).endswith(" GB, each with 2 rows of a micro-batch")
    four = several_gpus.plan(planner, recipe(), "4x24GB", "r.yaml")
    assert next(four.lines()) == "4 GPUs of 24 GB, each with 1 row of a micro-batch"
    small = several_gpus.plan(planner, recipe("model.shard=true"), "2x0.1GB", "r.yaml")
    assert small.choice is None and small.remedy is None
    assert "in either way, even with every change" in "\n".join(small.lines())
    again = several_gpus.plan(planner, recipe("model.shard=true"), "2x24GB", "r.yaml")
    assert again.command.endswith("--set model.shard=false")


def test_experts_cannot_be_shared():
    config = MixtralConfig(**SIZE | {"num_hidden_layers": 1}, **HEADS, num_local_experts=2)
    made = several_gpus.plan(Planner(config, "cuda"), recipe(), "2x24GB", "r.yaml")
    assert made.split is None and made.choice == "whole"
    assert "MixtralForCausalLM cannot be split" in "\n".join(made.lines())


@pytest.mark.parametrize(
    "text", ["2", "24GB", "1x24GB", "0x24GB", "2x", "2x24GB,1x16GB", "2x24GB+2x8GB", "9999x1GB"]
)
def test_what_is_no_number_of_equal_gpus_is_refused(text):
    with pytest.raises(UsageError, match="--gpus .* is not a number of equal GPUs"):
        several_gpus.parse(text)


def test_memory_without_meaning_and_batches_that_do_not_divide_are_refused(planner):
    with pytest.raises(UsageError, match="--gpus '24XB' is not a size"):
        several_gpus.parse("2x24XB")
    fitting = ["sft.args.per_device_train_batch_size=6", "ppo.args.per_device_train_batch_size=3"]
    with pytest.raises(
        RecipeError, match="reward.args.*: 8 rows cannot be shared equally by 3 processes"
    ):
        several_gpus.plan(planner, recipe(*fitting), "3x24GB", "r.yaml")
    assert several_gpus.parse(" 8 x 16GiB ") == (8, 16 * 2**30)
    assert gpu_fit.capacity("16") == 16 * 10**9


def test_the_verb_prints_both_and_its_command_parses(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    run = CliRunner().invoke
    done = run(app.app, ["plan", str(path), "--gpus", "2x24GB", "--set", "seed=2", "--json"])
    assert done.exit_code == 0, done.output
    several = json.loads(done.stdout)["several"]
    assert several["choice"] == "whole" and several["split"]["backbone"] > 0
    words = shlex.split(several["command"])
    assert words[:5] == ["torchrun", "--nproc_per_node", "2", "-m", "lora_rlhf"]
    assert words[6:9] == [str(path), "--set", "seed=2"]
    parsed = get_command(app.app).commands["run"].make_context("run", words[6:])
    assert Path(parsed.params["out"]) == Path("runs/x")
    assert run(app.app, ["plan", str(path), "--gpus", "2x0.2GB"]).exit_code == 7
    both = run(app.app, ["plan", str(path), "--gpus", "2x24GB", "--gpu", "24GB"])
    assert both.exit_code == 2 and "exclude each other" in both.output


def test_changes_with_which_it_fits_are_in_the_command(planner):
    long = ["data.max_tokens=4096", "sft.args.per_device_train_batch_size=16", "model.shard=true"]
    needs = several_gpus.plan(planner, recipe(*long), "2x24GB", "r.yaml")
    least = min(needs.whole.needed, needs.split.needed)
    made = several_gpus.plan(planner, recipe(*long), f"2x{(least - 4096) / 1e9:.9f}GB", "r.yaml")
    assert made.choice is None
    way, fitted = made.remedy
    again = recipe(*long, *(f"{key}={value}".lower() for key, value in fitted.changes.items()))
    after = several_gpus.plan(planner, again, f"2x{made.capacity / 1e9:.9f}GB", "r.yaml")
    assert getattr(after, way).needed <= made.capacity < getattr(made, way).needed
    assert made.command.count("model.shard") == 1
    assert all(option in made.command for option in gpu_fit.as_options(fitted.changes))
    assert "changed like this" in "\n".join(made.lines())


def test_rows_are_halved_only_as_far_as_each_process_has_one(planner):
    sets = ("sft.args.per_device_train_batch_size=6", "reward.args.per_device_train_batch_size=1")
    rows = recipe(*sets, "data.max_tokens=4096")
    worst = planner.plan(rows)
    assert worst.worst == "sft"
    assert gpu_fit.micro_batches(planner, rows, worst, processes=1)
    assert not gpu_fit.micro_batches(planner, rows, worst, processes=2)


def test_all_batches_that_do_not_divide_are_named_in_one_error(planner):
    with pytest.raises(RecipeError, match="of 3 stages cannot be shared equally") as caught:
        several_gpus.plan(planner, recipe(), "3x24GB", "r.yaml")
    text = str(caught.value)
    assert all(f"{name}.args.per_device_train" in text for name in ("sft", "reward", "ppo"))
