# SPDX-License-Identifier: Apache-2.0
"""The frozen trunk: passes that start from kept states are whole passes, to the bit."""

import pytest
import small
import torch
from ppo_run import Run, roles
from small import EPISODES

from lora_rlhf.models import scoring, trunk

ROLES = ("policy", "reference", "reward", "value")
LAYERS = {"gpt2": {"n_layer": 4}}


def halved(name, **options):
    layers = LAYERS.get(name, {"num_hidden_layers": 4})
    torch.manual_seed(0)
    return small.backbone(name, *ROLES, top_fraction=0.5, **layers, **options)


def rows(made):
    data = small.batch(made)
    return data["input_ids"], data["attention_mask"]


@pytest.mark.parametrize("name", small.ARCHITECTURES)
def test_kept_states_give_the_same_bits(name):
    made = halved(name)
    ids, mask = rows(made)
    valid = mask.bool()
    kept = scoring.trunk_states(made, ids, mask)
    assert trunk.depth(made) == 2
    for role in ROLES:
        with torch.no_grad(), made.role(role):
            whole = scoring.hidden_states(made, ids, mask)
            part = scoring.hidden_states(made, ids, mask, kept)
        assert torch.equal(whole[valid], part[valid]), role
    with torch.no_grad(), made.role("policy"):  # and the states do matter
        other = scoring.hidden_states(made, ids, mask, kept + 1)
    assert not torch.allclose(other[valid], whole[valid])


@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_bits(options, checkpointing):
    made = halved("llama", **options)
    ids, mask = rows(made)
    found = []
    for kept in (None, scoring.trunk_states(made, ids, mask)):
        with made.training("policy"):
            if checkpointing:
                made.causal.gradient_checkpointing_enable({"use_reentrant": False})
                made.causal.train()
            logprobs, _ = scoring.completion_logprobs(made, ids, mask, 5, 1.0, kept)
            logprobs.sum().backward()
            found.append([p.grad.clone() for _, p in made.role_parameters("policy")])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(g.abs().max() > 0 for g in found[0])


def test_the_layers_below_do_not_run():
    made = halved("llama")
    ids, mask = rows(made)
    calls = []
    for i, layer in enumerate(made.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: calls.append(i))
    kept = scoring.trunk_states(made, ids, mask)
    assert calls == [0, 1]
    calls.clear()
    with torch.no_grad():
        scoring.hidden_states(made, ids, mask, kept)
    assert calls == [2, 3]


def test_an_error_inside_leaves_the_layers_as_they_were():
    made = halved("llama")
    ids, mask = rows(made)
    with torch.no_grad():
        before = scoring.hidden_states(made, ids, mask)
    with pytest.raises(RuntimeError, match="stop"), trunk.start_from(made, torch.zeros(1)):
        raise RuntimeError("stop")
    with pytest.raises(RuntimeError, match="stop"), trunk.alone(made):
        raise RuntimeError("stop")
    with torch.no_grad():
        assert torch.equal(before, scoring.hidden_states(made, ids, mask))
    assert not any("forward" in layer.__dict__ for layer in made.layers)


def test_scores_and_log_probs_start_from_each_episodes_own_states():
    """Batches are cut and padded anew: states go with their episodes."""
    made = halved("llama")
    states = []
    for prompt, completion in EPISODES:
        ids = torch.tensor([prompt + completion])
        states.append(scoring.trunk_states(made, ids, torch.ones_like(ids))[0])
    for size in (1, 2, 3):
        found = scoring.scores(made, EPISODES, "reward", size, states)
        assert found == pytest.approx(scoring.scores(made, EPISODES, "reward", size), abs=1e-5)
        for role in ("policy", "reference"):
            kept = scoring.episode_logprobs(made, EPISODES, role, size, states=states)
            whole = scoring.episode_logprobs(made, EPISODES, role, size)
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(kept, whole, strict=True))


# ------------------------------------------------------------------ inside PPO


def run(folder, *, made=None, args=None, **section):
    made = made or roles(top_fraction=0.5, num_hidden_layers=4)
    args = {"steps_per_generation": 2, "num_iterations": 2, "learning_rate": 1e-3, **(args or {})}
    return Run(folder, args, made=made, updates=3, **section)


def test_ppo_ends_at_the_same_bits_wherever_the_states_are_kept(tmp_path):
    found = {}
    for where in ("off", "device", "cpu"):
        made = run(tmp_path / where, trunk_states=where).go()
        assert made.trainer.scorer.trunk is (where != "off")
        assert ("prompt_states" in made.trainer._rollout) == (where != "off")
        found[where] = made.weights()
    for name, tensor in found["device"].items():
        assert torch.equal(tensor, found["cpu"][name]), name
        # Whole passes take the trunk's states from another batch: the same up to a rounding.
        torch.testing.assert_close(tensor, found["off"][name], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_with_accumulation_and_a_value_head_too(tmp_path):
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    found = {}
    for where in ("off", "device"):
        found[where] = run(tmp_path / where, trunk_states=where, args=args, value="head").go()
    for name, tensor in found["device"].weights().items():
        torch.testing.assert_close(tensor, found["off"].weights()[name], rtol=1e-3, atol=2e-5)


def test_an_architecture_that_reads_lower_layers_switches_the_trunk_off(tmp_path):
    """A top layer that reads what the lowest one made, as some models do."""
    made = roles(top_fraction=0.5, num_hidden_layers=4)
    seen = {}
    made.causal.get_input_embeddings().register_forward_hook(lambda *_: seen.clear())
    made.layers[0].mlp.register_forward_hook(lambda m, a, out: seen.update(out=out))
    made.layers[3].mlp.register_forward_hook(lambda m, a, out: out + seen.get("out", 0))
    made_run, said = run(tmp_path / "r", made=made), []
    made_run.trainer.scorer.say = said.append
    made_run.go()
    assert made_run.trainer.scorer.trunk is False
    assert len(said) == 1 and "LlamaForCausalLM cannot start from kept trunk states" in said[0]


@pytest.mark.parametrize("name", small.ARCHITECTURES)
def test_skipping_the_top_mlp_of_prompts_changes_nothing(name):
    made = halved(name)
    ids, mask = rows(made)
    tokens, seen = 3, []
    mlp = getattr(made.layers[-1], "mlp", None)
    if mlp is not None:
        mlp.register_forward_hook(lambda m, args, out: seen.append(out))
    with made.training("policy"):
        whole = scoring.hidden_states(made, ids, mask)[:, -tokens - 1 : -1]
        whole.square().sum().backward()
        want = [p.grad.clone() for _, p in made.role_parameters("policy")]
        made.views["policy"].zero_grad()
        part = scoring.completion_states(made, ids, mask, tokens)
        part.square().sum().backward()
        found = [p.grad.clone() for _, p in made.role_parameters("policy")]
    torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-6)
    if mlp is not None:
        assert not seen[1][:, : -tokens - 1].any() and seen[0][:, 0].any()
