# SPDX-License-Identifier: Apache-2.0
"""The seams between this package and TRL's inside: a TRL on which this passes is supported."""

import ast
import inspect
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch
import trl

import lora_rlhf
from lora_rlhf._trl import (
    SEAMS,
    SUPPORTED,
    ChunkedLogProbFunction,
    GRPOConfig,
    GRPOTrainer,
    RewardTrainer,
    SFTTrainer,
    check_seams,
    split_tensor_dict,
)
from lora_rlhf.algorithms.ppo.ppo_trainer import PPOTrainer
from lora_rlhf.errors import SetupError

PACKAGE = Path(lora_rlhf.__file__).parent


# ------------------------------------------------------------------- the check


def test_the_installed_trl_is_a_supported_one():
    assert ".".join(trl.__version__.split(".")[:2]) in SUPPORTED
    check_seams()


def test_the_bound_in_pyproject_names_just_the_supported_minors():
    pyproject = PACKAGE.parent / "pyproject.toml"
    if not pyproject.is_file():
        pytest.skip("an installed package has no pyproject.toml")
    wanted = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    major, minor = map(int, SUPPORTED[-1].split("."))
    assert f"trl>={SUPPORTED[0]},<{major}.{minor + 1}" in wanted


def test_a_missing_seam_is_refused_with_the_versions_that_fit(monkeypatch):
    monkeypatch.setitem(SEAMS, GRPOTrainer, {"_gone": ("model",)})
    with pytest.raises(SetupError, match="GRPOTrainer._gone is missing") as caught:
        check_seams()
    assert caught.value.given.startswith(f"trl {trl.__version__}")
    assert caught.value.expected == "trl 1.16.*" and "1.16" in caught.value.remedy


def test_a_renamed_parameter_is_refused(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, batch: None)
    with pytest.raises(SetupError, match="_compute_loss has no parameter 'inputs'"):
        check_seams()


def test_every_method_of_trls_that_is_overridden_is_a_seam():
    """Or an override would silently be called no more after an upgrade."""
    ours = {n for n, v in vars(PPOTrainer).items() if inspect.isfunction(v)}
    theirs = {n for n in ours if hasattr(GRPOTrainer, n)} - {"__init__"}
    assert theirs <= SEAMS[GRPOTrainer].keys()


def test_import_disables_telemetry():
    """TRL's trainers report their use to the Hub by default."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRL_"))}
    text = (PACKAGE / "_trl.py").read_text()
    before = text[: text.index("import trl")]
    code = before[before.index("import os") :] + "\nprint(os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "1"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


# --------------------------------------------------------- what is counted on


@pytest.mark.parametrize("tile", [3, 7, 64])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 1.0), (None, 0.25)])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_log_probs_are_the_plain_ones_with_gradients(tile, softcap, scale, bias):
    """Positional arguments as `scoring.completion_logprobs` gives them; two outputs come first."""
    torch.manual_seed(0)
    states = torch.randn(5, 8, requires_grad=True)
    weight, offset = torch.randn(11, 8), torch.randn(11) if bias else None
    ids = torch.tensor([0, 10, 3, 5, 7])
    ours, entropy, *_ = ChunkedLogProbFunction.apply(
        states, weight, offset, ids, 0.7, tile, softcap, scale, ("entropy",)
    )
    ours.sum().backward()
    gradient, states.grad = states.grad, None
    logits = states @ weight.T + (0 if offset is None else offset)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = (logits / 0.7).log_softmax(-1)
    want = logp.gather(1, ids[:, None])[:, 0]
    want.sum().backward()
    assert torch.allclose(ours, want, atol=1e-5)
    assert torch.allclose(entropy, -(logp.exp() * logp).sum(-1), atol=1e-5)
    assert torch.allclose(gradient, states.grad, atol=1e-5)


def test_a_rollout_is_split_by_rows():
    parts = split_tensor_dict({"a": torch.arange(12).view(6, 2), "b": torch.arange(6)}, 3)
    assert [p["a"].tolist() for p in parts] == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
        [[8, 9], [10, 11]],
    ]
    assert [p["b"].tolist() for p in parts] == [[0, 1], [2, 3], [4, 5]]


def test_generate_returns_what_the_trainer_picks_from_by_position():
    """`PPOTrainer._generate` takes the prompts' ids first and the extra fields sixth."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._generate)))
    all_returns = [n.value for n in ast.walk(tree) if isinstance(n, ast.Return)]
    returns = [value for value in all_returns if isinstance(value, ast.Tuple)]
    assert returns
    for value in returns:
        names = [getattr(e, "id", "") for e in value.elts]
        assert names[0] == "prompt_ids" and names[5] == "extra_fields", names


def test_columns_that_are_tokenised_already_are_taken_as_they_are():
    """SFT and reward data come with ids, so that TRL tokenises nothing a second time."""
    assert "input_ids" in inspect.getsource(SFTTrainer._prepare_dataset)
    assert "chosen_ids" in inspect.getsource(RewardTrainer._prepare_dataset)


def test_grpo_config_has_the_fields_that_are_set():
    fields = GRPOConfig.__dataclass_fields__
    wanted = {
        "num_generations",
        "num_iterations",
        "steps_per_generation",
        "max_completion_length",
        "temperature",
        "epsilon",
        "beta",
        "gradient_checkpointing",
    }
    assert wanted <= fields.keys()
