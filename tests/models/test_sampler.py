# SPDX-License-Identifier: Apache-2.0
"""Plain sampling: transformers' own tokens when greedy, the model's distribution when not."""

import pytest
import small
import torch
from small import EOS

from lora_rlhf.models import decode_graph, memory, sampler, scoring, trunk

SLIDING = ("mistral", "gemma2", "gemma3_text")
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]


def halved(name="llama", **options):
    layers = {"n_layer": 4} if name == "gpt2" else {"num_hidden_layers": 4}
    torch.manual_seed(0)
    return small.backbone(name, "policy", top_fraction=0.5, **layers, **options)


def eos_often(made, bias=2.0):
    """Completions of different lengths: eos is about as likely as the best of the others."""
    head = made.causal.get_output_embeddings()
    head.register_forward_hook(
        lambda m, a, out: out + bias * torch.nn.functional.one_hot(torch.tensor(EOS), out.shape[-1])
    )
    return made


@pytest.mark.parametrize(("name", "keep"), small.with_each(True, False))
def test_greedy_tokens_are_those_of_transformers(name, keep):
    made = eos_often(halved(name), 1.0)
    with made.role("policy"):
        found = sampler.sample(made, PROMPTS, max_new_tokens=9, temperature=0, keep_states=keep)
        for prompt, mine in zip(PROMPTS, found, strict=True):
            out = made.causal.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)).long(),
                do_sample=False,
                max_new_tokens=9,
            )
            assert mine.ids == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("name", "temperature"), small.with_each(0.6, 1.0))
def test_log_probs_and_states_are_the_trainers(name, temperature):
    made = eos_often(halved(name))
    options = {"max_new_tokens": 9, "temperature": temperature, "seed": 3, "keep_states": True}
    with made.role("policy"):
        found = sampler.sample(made, PROMPTS * 4, **options)
    # The head's hook is no part of heads.py, which multiplies with the weights itself.
    lengths = {len(x.ids) for x in found}
    assert len(lengths) > 2, "the test needs rows that leave at different times"
    for prompt, mine in zip(PROMPTS * 4, found, strict=True):
        ids = torch.tensor([prompt + mine.ids])
        states = scoring.trunk_states(made, ids, torch.ones_like(ids))[0]
        assert mine.states.shape == states.shape
        torch.testing.assert_close(mine.states, states, rtol=1e-4, atol=1e-5)
        with torch.no_grad(), made.role("policy"):
            logits = made.causal(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(mine.ids)[:, None])[:, 0]
        torch.testing.assert_close(mine.logprobs, wanted, rtol=1e-4, atol=1e-5)


def test_removing_ended_rows_does_not_change_the_others(monkeypatch):
    made = eos_often(halved())
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 0}
    found = {}
    for leave in (0.0, 0.5, 2.0):  # at once, by halves, never
        monkeypatch.setattr(sampler, "_MIN_ENDED", leave)
        for keep in (False, True):
            with made.role("policy"):
                rows = sampler.sample(made, PROMPTS * 4, keep_states=keep, **options)
            found[leave, keep] = [row.ids for row in rows]
    assert len({str(ids) for ids in found.values()}) == 1


@pytest.mark.parametrize("name", [n for n in small.ARCHITECTURES if n not in SLIDING])
@pytest.mark.parametrize("keep", [False, True])
def test_steps_of_fixed_shapes_sample_the_same(name, keep, monkeypatch):
    made = eos_often(halved(name))
    options = {"max_new_tokens": 9, "temperature": 1.0, "seed": 3, "keep_states": keep}
    with made.role("policy"):
        grown = sampler.sample(made, PROMPTS * 3, **options)
        monkeypatch.setattr(decode_graph, "DEVICES", ("cpu",))
        steps = []
        own = decode_graph.DecodeGraph.step
        monkeypatch.setattr(decode_graph.DecodeGraph, "step", lambda *a: steps.append(1) or own(*a))
        found = sampler.sample(made, PROMPTS * 3, **options)
    assert len(steps) == 8 + keep, "it was not used"
    for a, b in zip(grown, found, strict=True):
        assert a.ids == b.ids
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=1e-4, atol=1e-5)
        if keep:
            torch.testing.assert_close(a.states, b.states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SLIDING)
def test_a_sliding_window_has_no_steps_of_fixed_shapes(name, monkeypatch):
    monkeypatch.setattr(decode_graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(decode_graph.DecodeGraph, "step", lambda *a: pytest.fail("used"))
    made = halved(name)
    with made.role("policy"):
        sampler.sample(made, PROMPTS, max_new_tokens=3, temperature=1.0)


def test_ended_rows_cost_nothing():
    made = eos_often(halved(), 3.0)
    sizes = []
    made.layers[0].register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[0]))
    with made.role("policy"):
        found = sampler.sample(made, PROMPTS * 8, max_new_tokens=30, temperature=1.0, seed=1)
    lengths = [len(x.ids) for x in found]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < len(lengths) / 2
    assert sum(sizes) < 1.5 * sum(lengths) < len(lengths) * max(lengths)


def test_the_distribution_is_the_models():
    """20,000 first tokens of one prompt against the softmax: chi-square at 1 in 10,000."""
    from scipy.stats import chi2

    made, n = halved(), 20_000
    with made.role("policy"):
        found = sampler.sample(made, [[5, 6]] * n, max_new_tokens=1, temperature=0.8, seed=0)
        with torch.no_grad():
            logits = made.causal(input_ids=torch.tensor([[5, 6]])).logits[0, -1]
    p = (logits / 0.8).softmax(-1).double()
    counts = torch.bincount(torch.tensor([x.ids[0] for x in found]), minlength=len(p)).double()
    often = p * n >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([p[often], p[~often].sum()[None]]) * n
    statistic = float(((observed - expected).square() / expected.clamp(min=1e-9)).sum())
    assert statistic < chi2.ppf(0.9999, int(often.sum()))


def test_tokens_of_probability_0_are_never_drawn():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.4999999, 0.5, 1 - 2**-24])
    tokens, logprobs = sampler.draw(logits, 1.0, uniform)
    assert tokens.tolist() == [0, 0, 2, 2]
    assert logprobs.tolist() == pytest.approx([-0.6931472] * 4)


def test_a_seed_leaves_the_global_random_state_alone():
    made = halved()
    with made.role("policy"):
        state = torch.get_rng_state()
        sampler.sample(made, PROMPTS, max_new_tokens=3, temperature=1.0, seed=0)
        assert torch.equal(state, torch.get_rng_state())
        sampler.sample(made, PROMPTS, max_new_tokens=3, temperature=1.0)
        assert not torch.equal(state, torch.get_rng_state())


def test_order_and_batch_size_do_not_matter_when_greedy():
    made = eos_often(halved(), 1.0)
    options = {"max_new_tokens": 7, "temperature": 0}
    with made.role("policy"):
        whole = [x.ids for x in sampler.sample(made, PROMPTS, **options)]
        cut = [x.ids for x in sampler.sample(made, PROMPTS, batch_size=1, **options)]
        turned = [x.ids for x in sampler.sample(made, PROMPTS[::-1], batch_size=3, **options)]
    assert whole == cut == turned[::-1]
    assert sampler.sample(made, [], **options) == []


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_the_bytes_of_the_cache_are_counted_right(name):
    made, length = halved(name), 11
    with torch.no_grad():
        out = made.causal(input_ids=torch.ones(1, length).long(), use_cache=True)
    cache = getattr(out, "cache", None) or out.past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert memory.kv_bytes(made.causal) * length == held


def test_how_many_rows_fit(monkeypatch):
    """Eight tenths of the free memory, one row at least; on a CPU there is no limit."""
    made = halved()
    assert memory.rows_that_fit(made.causal, 100, 64) == 64
    monkeypatch.setattr(type(made.causal), "device", property(lambda self: torch.device("cuda", 0)))
    row = 100 * memory.kv_bytes(made.causal)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 3 * row)
    for free, rows in ((10 * row, 8), (1000 * row, 64), (0, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, free=free: (free // 2, free))
        cached = 3 * row + free - free // 2
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_, cached=cached: cached)
        assert memory.rows_that_fit(made.causal, 100, 64) == rows


def test_training_mode_is_put_back():
    made = halved()
    made.causal.train()
    sampler.sample(made, PROMPTS, max_new_tokens=2, temperature=1.0)
    assert made.causal.training and trunk.depth(made) == 2


def test_sampling_is_plain_whatever_the_base_prefers():
    """transformers' `generate` would fill every field that is left open from the base's config."""
    base = small.base(small.base_folder())
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3, "batch_size": 4}
    prompts = [[5, 6], [7], [8, 9, 10]]
    plain = sampler.sample(base, prompts, **options)
    own = base.causal.generation_config
    own.min_p, own.suppress_tokens, own.min_new_tokens = 0.9, list(range(20, 60)), 12
    found = sampler.sample(base, prompts, **options)
    assert [x.ids for x in found] == [x.ids for x in plain]
    assert base.causal.generation_config is own
