# SPDX-License-Identifier: Apache-2.0
"""docs/details.md against the code, and those of its details that no other test holds."""

import ast
import functools
import importlib
import json
import math
import re
from pathlib import Path

import pytest
import small
import torch
from peft.tuners.lora import LoraLayer
from ppo_run import ARGS, Run, prompts, recipe, roles

from lora_rlhf.algorithms import grpo_rloo, identities, reward_functions
from lora_rlhf.algorithms import objectives as o
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.errors import AdapterError, RecipeError
from lora_rlhf.models import adapters
from lora_rlhf.recipe import schema
from lora_rlhf.recipe.schema import DataSection, DataSource, ModelSection, PpoSection, Recipe
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.training import sft
from lora_rlhf.training.reward import reward_stage
from lora_rlhf.training.stage_context import StageContext
from lora_rlhf.training.trl_config import trainer_args

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "details.md").read_text(encoding="utf-8")
MODULES = {
    path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "lora_rlhf").rglob("*.py")
    if path.stem != "__init__"
}
"""Stem -> dotted name; stems are unique, see test_architecture.py."""
STAGES = {"sft": sft, "reward": reward_stage, "ppo": ppo_stage}


ITEM = re.compile(r"^(\d+)\. (.+\n(?: +\S.*\n)*)", re.MULTILINE)
"""A number, and its line with the indented ones after it."""


def items():
    """Number -> text of each detail, its lines joined."""
    return {int(number): " ".join(text.split()) for number, text in ITEM.findall(PAGE)}


def named(text, pattern):
    """What stands between backticks and looks like the pattern, as tuples of its groups."""
    return [
        m.groups() for code in re.findall(r"`([^`]+)`", text) if (m := re.fullmatch(pattern, code))
    ]


PLACE = r"([a-z_]+)((?:\.\w+)+)"
TEST = r"(test_\w+\.py)::(\w+)"
SETTING = r"([a-z_]+(?:\.\w+)+): (\S+)"


# --------------------------------------------------------------------------- the page


def test_sixty_details_in_order():
    numbers = [int(n) for n in re.findall(r"^(\d+)\. ", PAGE, re.MULTILINE)]
    assert numbers == list(range(1, 61)) == list(items())
    for number, text in ITEM.findall(PAGE):
        assert text.count("\n") <= 5, f"{number} has more than five lines"
        assert not re.search(r"^ +(\d+\.|[-+*]) ", text, re.MULTILINE), f"{number}: a new list"
    assert max(map(len, PAGE.splitlines())) <= 120


def test_every_place_in_the_code_exists():
    for number, text in items().items():
        assert named(text, PLACE) or text.startswith("**Not done"), (
            f"{number} names no place in the code"
        )
    for module, rest in named(PAGE, PLACE):
        path = rest[1:].split(".")
        assert resolves(module, path) or is_key(module, path), f"{module}{rest}"


def resolves(module, path):
    if module not in MODULES:
        return False
    place = importlib.import_module(MODULES[module])
    for name in path:
        fields = getattr(place, "__dataclass_fields__", {})
        if not hasattr(place, name) and name not in fields:
            return False
        place = getattr(place, name, None)
    return True


def is_key(section, path):
    """Whether the recipe has this key."""
    if section not in Recipe.model_fields:
        return False
    kind = Recipe.model_fields[section].annotation
    return path[0] in kind.model_fields and (len(path) == 1 or path[0] == "args")


@functools.cache
def functions_of(path):
    [file] = (ROOT / "tests").rglob(path)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def test_every_test_exists():
    for number, text in items().items():
        assert named(text, TEST) or re.match(r"\*\*(Not done|Partly)", text), f"{number}: no test"
    assert len(named(PAGE, TEST)) == PAGE.count("::") > 90, "one is written in another way"
    for path, name in named(PAGE, TEST):
        assert name.startswith("test_") and name in functions_of(path), f"{path}::{name}"


def test_what_is_not_done_is_listed_at_the_top():
    marks = {
        word: [n for n, text in items().items() if text.startswith(f"**{word}")]
        for word in ("Not done", "Partly")
    }
    top = PAGE[: PAGE.index("\n1. ")]
    for word, numbers in marks.items():
        [line] = re.findall(rf"^{word}: ([\d, ]+)\.", top, re.MULTILINE)
        assert [int(n) for n in line.split(",")] == numbers


def test_every_default_on_the_page_is_the_codes():
    shown = named(PAGE, SETTING)
    assert len(shown) >= 25
    for key, value in shown:
        assert default(key.split(".")) == plain(value), key


def default(path):
    section, key, *rest = path
    if key == "args":
        made = Recipe(name="x", model={"id": "tiny"})
        stage = STAGES[section]
        return trainer_args(made, Path("run"), section, stage._DEFAULTS, {})[rest[0]]
    return getattr(getattr(Recipe(name="x", model={"id": "tiny"}), section), key)


def plain(value):
    try:
        return ast.literal_eval(
            {"true": "True", "false": "False", "null": "None"}.get(value, value)
        )
    except ValueError:
        return value


def test_the_page_stands_by_itself():
    assert "/work" not in PAGE and "checklist" not in PAGE
    for link in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
    assert "The N+ Implementation Details of RLHF with PPO" in PAGE


# ------------------------------------------------------------- details without a test


def test_learning_rates_are_those_of_adapters():
    """LoRA wants about ten times the rate of full fine-tuning, 1e-6 to 1e-5 in PPO."""
    assert 1e-5 <= ppo_stage._DEFAULTS["learning_rate"] <= 1e-4
    assert 1e-4 <= reward_stage._DEFAULTS["learning_rate"] <= 2e-4
    assert reward_stage._DEFAULTS["num_train_epochs"] == 1
    assert 1e-4 <= sft._DEFAULTS["learning_rate"] <= 5e-4


@pytest.mark.parametrize(("r", "alpha"), [(1, 2), (16, 32), (64, 16)])
def test_any_rank_with_the_scale_alpha_over_r(r, alpha):
    made = small.backbone("llama", "policy", "reward", r=r, alpha=alpha)
    layers = [m for m in made.decoder.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == 14
    for layer in layers:
        for adapter in ("default", "reward"):
            assert layer.lora_A[adapter].weight.shape[0] == r
            assert layer.scaling[adapter] == alpha / r


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rollouts_use_the_cache_and_training_does_not(tmp_path, checkpointing):
    run = Run(tmp_path / "r", model={"gradient_checkpointing": checkpointing})
    seen = {True: set(), False: set()}

    def look(module, args, kwargs):
        # Its name until transformers 5.23, and since.
        cached = any(kwargs.get(key) is not None for key in ("past_key_values", "cache"))
        seen[torch.is_grad_enabled()].add((args[0].shape[1] == 1, cached))

    run.backbone.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    run.go()
    assert (True, True) in seen[False], "a token is sampled at the cost of one token"
    assert seen[True] == {(False, False)}


def test_an_adapter_of_the_other_quantisation_is_refused(tmp_path):
    made = small.backbone("llama", "policy")
    folder = adapters.save_role(made, "policy", tmp_path / "policy")
    check = json.loads((folder / "check.json").read_text())
    assert check["load_in_4bit"] is False and check["base_fingerprint"] == made.fingerprint
    other = small.backbone("llama", load_in_4bit=True)
    with pytest.raises(AdapterError, match="load_in_4bit False, and this base has True"):
        adapters.load_role(other, "policy", folder)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_sampler_and_log_probs_share_the_temperature(tmp_path, temperature):
    run = Run(tmp_path / "r", {"temperature": temperature})
    ids = [run.backbone.encode_prompt(p) for p in ("w5", "w6 w7 w8")]
    sampler = run.trainer.generation_config
    assert sampler.temperature == run.trainer.temperature == temperature
    assert identities.sampler_agrees(run.backbone, ids, sampler, run.trainer.temperature) < 1e-4
    run.go()
    assert run.trainer.identities["ratio_at_start"] < 1e-5


def test_more_than_four_passes_over_a_rollout_are_refused(tmp_path):
    little = recipe({"num_iterations": 5})
    with pytest.raises(RecipeError, match="num_iterations: 5") as caught:
        ppo_stage.arguments(little, tmp_path)
    assert "at most 4" in caught.value.expected and "ppo.updates" in caught.value.remedy
    little = recipe({"num_iterations": 4})
    assert ppo_stage.arguments(little, tmp_path).num_iterations == 4


def test_no_penalty_is_allowed_and_less_than_none_is_not():
    assert PpoSection(kl_coef=0.0).kl_coef == 0
    with pytest.raises(ValueError, match="kl_coef"):
        PpoSection(kl_coef=-0.1)
    assert schema.GroupSection(num_generations=2).num_generations == 2
    with pytest.raises(ValueError, match="num_generations"):
        schema.GroupSection(num_generations=1)


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_rloos_baseline_leaves_the_sample_out(tmp_path, monkeypatch, name):
    """RLOO: reward less the mean of the others of its group. GRPO keeps the group's own mean."""
    little = Recipe(
        name="little",
        algorithm=name,
        model=ModelSection(id="tiny"),
        data=DataSection(comparisons=[DataSource(path="x.jsonl")]),
        ppo=PpoSection(
            updates=1,
            kl_coef=0.0,
            missing_eos_penalty=0.0,
            args={**ARGS, "steps_per_generation": 2},
        ),
    )
    given, advantages = [], []

    def score(completion_ids, **_):
        given.extend(float(sum(ids) % 11) for ids in completion_ids)
        return list(given)

    monkeypatch.setattr(reward_functions, "of_recipe", lambda *_: ([score], [1.0]))
    kind = grpo_rloo._KINDS[name][1]
    real = kind._observe
    monkeypatch.setattr(
        kind,
        "_observe",
        lambda self, out: (advantages.append(out["advantages"]), real(self, out))[1],
    )
    record = Record.open(tmp_path / "run", little)
    context = StageContext(little, roles(), record, Progress(quiet=True))
    grpo_rloo.run(context, grpo_rloo.arguments(little, tmp_path), prompts())
    groups = torch.tensor(given).reshape(-1, 4)
    others = (groups.sum(1, keepdim=True) - groups) / 3
    mean, std = groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
    wanted = groups - others if name == "rloo" else (groups - mean) / (std + 1e-4)
    assert groups.std() > 0.5, "the test could not tell"
    torch.testing.assert_close(advantages[0].reshape(-1, 4).cpu(), wanted, rtol=1e-4, atol=1e-4)
    if name == "rloo":  # the mean with the sample itself in it is short by the factor (k - 1) / k
        torch.testing.assert_close((groups - mean), wanted * 3 / 4)


# ------------------------------------------------- OpenAI's published formulas, by hand


def test_openais_published_formulas_on_one_episode():
    """Two tokens through lm-human-preferences' train_policy.py, worked by hand.

    log p = (-1, -2), reference (-1.5, -1): KL (0.5, -1). beta 0.2, score 1: rewards -0.1, 0.2 + 1.
    V = (0.5, 0.4), gamma 1, lambda 0.95: delta = (-0.1 + 0.4 - 0.5, 1.2 - 0.4) = (-0.2, 0.8), so
    A = (-0.2 + 0.95 · 0.8, 0.8) = (0.56, 0.8) and the returns are (1.06, 1.2).
    Whitened: mean 0.68, deviation 0.12, so (-1, 1). Rewards, mean 0.55 and deviation 0.65, whitened
    without a shift of the mean: (-1 + 0.55, 1 + 0.55).
    Both ratios 1.5, clip 0.2: max(1.5, 1.2) = 1.5 and max(-1.5, -1.2) = -1.2, clipped. Mean 0.15.
    New V = (0.9, 0.3), clip 0.2: 0.9 becomes 0.7; max(0.16², 0.36²) = 0.1296, clipped; 0.9² = 0.81.
    Half of their mean: 0.2349. approxkl: half of ln² 1.5.
    KL of the sequence -0.5, target 6: the error is cut to -0.2; 64 episodes, horizon 10,000.
    """
    mask = torch.ones(1, 2)
    old, reference, values = (torch.tensor([x]) for x in ([-1, -2.0], [-1.5, -1], [0.5, 0.4]))
    kl = o.kl_estimates(old, reference, mask)
    rewards = o.token_rewards(torch.tensor([1.0]), kl.k1, mask, 0.2)
    close(rewards, [-0.1, 1.2])
    advantages, returns = o.gae(rewards, values, mask, 1.0, 0.95)
    close(advantages, [0.56, 0.8])
    close(returns, [1.06, 1.2])
    white = o.whiten(advantages, mask)
    close(white, [-1, 1])
    close(o.whiten(rewards, mask, shift_mean=False), [-0.45, 1.55])
    new = old + math.log(1.5)
    policy = o.policy_loss(new, old, white, mask, 0.2, 0.2)
    assert float(policy.loss_sum) / 2 == pytest.approx(0.15, abs=1e-5)
    close(policy.clipped_bt, [0, 1])
    value = o.value_loss(torch.tensor([[0.9, 0.3]]), values, returns, mask, 0.2)
    assert float(value.loss_sum) / 2 == pytest.approx(0.2349, abs=1e-5)
    close(value.clipped_bt, [1, 0])
    change = o.kl_estimates(new, old, mask).k2
    assert float(change.mean()) == pytest.approx(math.log(1.5) ** 2 / 2, abs=1e-6)
    sequence = float(kl.k1.sum())
    assert o.adapted_kl_coef(0.2, sequence, 6.0, 10_000, 64) == pytest.approx(0.199744)


def close(actual, wanted):
    torch.testing.assert_close(
        actual, torch.tensor([wanted], dtype=torch.float32), rtol=0, atol=1e-5
    )
