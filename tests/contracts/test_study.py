# SPDX-License-Identifier: Apache-2.0
"""The study of the demo: signal to noise of the policy gradient, and kinds that got worse."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ppo_run import roles
from small import EOS, EPISODES

from lora_rlhf.models import scoring
from lora_rlhf.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def study():
    path = ROOT / "recipes" / "closed-world" / "study.py"
    spec = importlib.util.spec_from_file_location("study", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_signal_to_noise_of_known_gradients(study):
    """Length 2 along a common axis, and 3 along an axis of its own: 4 over 9."""
    count = study.SAMPLES * 3
    own = 3 * torch.eye(count + 1)[1:]
    signal = torch.zeros(count + 1)
    signal[0] = 2
    row = study.noise_row(0, "any", list(own + signal), 0.5)
    assert row["snr"] == pytest.approx(4 / 9) and row["explained"] is None
    same_prompts = torch.zeros(count, 2)  # what only answers to the same prompts share is no signal
    same_prompts[:, 0] = torch.tensor([3.0, -3.0, 0.0] * study.SAMPLES)
    assert study.noise_row(0, "value", list(same_prompts), 0.5)["snr"] < 0
    alike = study.noise_row(0, "value", list(same_prompts), 0.5, same=1)  # each on its own prompts
    assert alike["snr"] == pytest.approx(-1 / count)


def test_rollouts_of_groups_have_all_answers_to_a_prompt(study, monkeypatch):
    backbone = roles()
    prompts = [f"w{5 + i}" for i in range(32)]
    monkeypatch.setattr(
        study.ensemble, "scores", lambda _, e, __: SimpleNamespace(rewards=[1.0] * len(e))
    )
    answers = [[9 + i // 32, EOS] for i in range(128)]
    monkeypatch.setattr(type(backbone), "generate", lambda *_, **__: answers)
    recipe = Recipe(name="little", model={"id": "tiny"}, ppo={"args": {"max_completion_length": 2}})
    plain, grouped = (study.sampled(backbone, recipe, prompts, g) for g in (False, True))
    for rollouts, different in ((plain, 32), (grouped, 16)):
        assert len(rollouts) == 2
        for one in rollouts:
            assert len({tuple(row[:-2].tolist()) for row in one.batch.ids}) == different
            if different == 16:
                assert one.batch.ids[:4, -2].tolist() == [9, 10, 11, 12]


def test_gradients_of_a_rollout_are_those_of_its_completions(study):
    """Against log-probs of each episode alone; a fit of the value changes its advantages."""
    backbone = roles()
    backbone.add_role("value", copy_from="reward")
    batch = scoring.batch(backbone, EPISODES, range(len(EPISODES)))
    lengths = torch.tensor([len(completion) for _, completion in EPISODES])
    mask_bt = torch.arange(batch.tokens, 0, -1) <= lengths.unsqueeze(1)
    kept = batch.ids[:, -batch.tokens :][mask_bt].tolist()
    assert kept == [token for _, completion in EPISODES for token in completion]
    assert kept.count(EOS) == len(EPISODES)
    scores = torch.tensor([1.0, -2.0, 0.5])
    one = study.Rollout(batch, mask_bt, scores, torch.tensor([0.5, 0.0, 0.25]))
    with backbone.training("policy", "value"):
        vectors, _ = study.rollout_gradients(backbone, one, "v", True)
        parameters = [p for _, p in backbone.role_parameters("policy")]
        tokens, advantage = int(lengths.sum()), torch.tensor([0.5, -2.0, 0.25])
        flat = torch.repeat_interleave(advantage, lengths)
        white = (advantage - flat.mean()) / flat.std(unbiased=False)
        total = torch.zeros(sum(p.numel() for p in parameters))
        for i, weight in enumerate(white):
            alone = scoring.batch(backbone, EPISODES, [i])
            logprobs, _ = scoring.completion_logprobs(backbone, *alone.inputs, 1.0)
            parts = torch.autograd.grad(logprobs.sum() * weight / tokens, parameters)
            total += torch.cat([part.flatten() for part in parts])
        torch.testing.assert_close(
            vectors["mean of the prompt's other samples"], total, rtol=1e-3, atol=1e-6
        )
        raw = torch.zeros_like(total)
        for i, weight in enumerate(advantage):
            alone = scoring.batch(backbone, EPISODES, [i])
            logprobs, _ = scoring.completion_logprobs(backbone, *alone.inputs, 1.0)
            parts = torch.autograd.grad(logprobs.sum() * weight / tokens, parameters)
            raw += torch.cat([part.flatten() for part in parts])
        name = f"mean of the prompt's other samples, {study.RAW}"
        torch.testing.assert_close(vectors[name], raw, rtol=1e-3, atol=1e-6)
        before = vectors["v, lambda 1"]
        study.fit_value(backbone, [one], 3)
        after = study.rollout_gradients(backbone, one, "v", False)[0]["v, lambda 1"]
        assert not torch.equal(before, after)
