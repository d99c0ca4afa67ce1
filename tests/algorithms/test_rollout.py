# SPDX-License-Identifier: Apache-2.0
"""What a rollout computes and what it does not: nothing that is known is computed again."""

import pytest
import small
import torch
from ppo_run import Run, roles

from lora_rlhf.algorithms import rollout
from lora_rlhf.errors import IdentityError
from lora_rlhf.models import sampler, scoring

ARGS = {"steps_per_generation": 2, "num_iterations": 2, "learning_rate": 1e-3}


def run(folder, *, args=None, top_fraction=0.5, made=None, **section):
    made = made or roles(top_fraction=top_fraction, num_hidden_layers=4)
    return Run(folder, {**ARGS, **(args or {})}, made=made, **{"updates": 3, **section})


def counted(made):
    """Calls of the lowest layer's and the top layer's MLP, by role, generation apart."""
    calls = {}

    def count(place):
        def hook(module, args, out):
            kind = "decode" if args[0].shape[1] == 1 else "pass"
            key = (place, small.active(made), kind)
            calls[key] = calls.get(key, 0) + args[0].shape[0]

        return hook

    for place, layer in (("trunk", made.layers[0]), ("top", made.layers[-1])):
        layer.mlp.register_forward_hook(count(place))
    return calls


def test_after_the_first_update_each_role_makes_one_pass_over_its_own_layers(tmp_path):
    """Eight episodes an update, two epochs. The prompt of each is read while sampling: the one
    pass of the policy and of the trunk that scoring would repeat."""
    base = roles(top_fraction=0.5, num_hidden_layers=4)

    def reward(completion_ids, prompt_ids, trunk_states, **_):
        episodes = list(zip(prompt_ids, completion_ids, strict=True))
        return scoring.scores(base, episodes, states=trunk_states)

    made = run(tmp_path / "r", made=base, rewards=(reward,))
    calls = counted(made.backbone)
    before = []
    log = made.trainer.log

    def at_log(logs, *rest):
        before.append(dict(calls))
        return log(logs, *rest)

    made.trainer.log = at_log
    made.go()
    last = {k: before[2][k] - before[1].get(k, 0) for k in before[2] if k[2] == "pass"}
    last = {k: v for k, v in last.items() if v}
    assert last == {
        ("trunk", "policy", "pass"): 8,  # prefill
        ("top", "policy", "pass"): 8 + 2 * 8,  # and two epochs
        ("top", "reference", "pass"): 8,
        ("top", "reward", "pass"): 8,
        ("top", "value", "pass"): 8 + 2 * 8,
    }


@pytest.mark.parametrize("top_fraction", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
def test_the_samplers_numbers_equal_those_of_a_pass(tmp_path, top_fraction):
    made = run(tmp_path / "r", top_fraction=top_fraction)
    scorer, found = made.trainer.scorer, []
    score = scorer.score

    def compare(out, *, exact):
        sampled = scorer._sampled
        reference = score(out, exact=exact)
        whole = scoring.episode_logprobs(made.backbone, scorer.episodes, "policy", 4)
        gaps = [
            float((out["old_logprobs"][i, : len(row)] - row).abs().max())
            for i, row in enumerate(whole)
        ]
        same = all(
            torch.equal(out["old_logprobs"][i, : len(s.ids)], s.logprobs)
            for i, s in enumerate(sampled)
        )
        found.append((max(gaps), same))
        return reference

    scorer.score = compare
    made.go()
    assert scorer.trusted and max(gap for gap, _ in found) < 1e-5
    assert not found[0][1], "while the policy is SFT its log-probs are computed as SFT's are"
    assert [same for _, same in found[1:]] == [True, True]
    assert made.trainer.identities["kl_at_start"] == 0


def test_a_sampler_that_is_slightly_off_is_reported_and_not_reused(tmp_path, monkeypatch):
    plain = run(tmp_path / "plain").go()
    draw = sampler.draw

    def off(*args):
        tokens, logprobs = draw(*args)
        return tokens, logprobs + 5e-4

    monkeypatch.setattr(sampler, "draw", off)
    made, said = run(tmp_path / "off"), []
    made.trainer.scorer.say = said.append
    made.go()
    assert made.trainer.scorer.trusted is False and made.trainer.scorer.trunk is True
    assert len(said) == 1 and "computed again" in said[0]
    for name, tensor in plain.weights().items():  # the run is what it would have been
        torch.testing.assert_close(tensor, made.weights()[name], rtol=1e-3, atol=2e-5)


def test_a_sampler_of_another_distribution_stops_the_run(tmp_path):
    made = run(tmp_path / "r")
    made.trainer.scorer.temperature = 1.0
    inner = sampler.sample
    made.trainer.scorer.sample = lambda prompts, longest: _at(made, inner, prompts, longest)
    with pytest.raises(IdentityError, match="stage at fault: rollout"):
        made.go()


def _at(made, inner, prompts, longest):
    scorer = made.trainer.scorer
    scorer._sampled = inner(made.backbone, prompts, max_new_tokens=longest, temperature=1.4)
    return [sampled.ids for sampled in scorer._sampled]


@pytest.mark.parametrize(
    ("options", "parity"),
    [({"dtype": "bfloat16"}, rollout.PARITY), ({"load_in_4bit": True}, 0.0),
     *(pytest.param(*other, marks=pytest.mark.slow) for other in
       (({"dtype": "bfloat16"}, 0.0), ({"load_in_4bit": True}, rollout.PARITY)))],
)  # fmt: skip
def test_other_precisions_keep_every_identity(tmp_path, monkeypatch, options, parity):
    """Whether the sampler is trusted is decided by numbers, not by the dtype."""
    monkeypatch.setattr(rollout, "PARITY", parity)
    made = run(tmp_path / "r", made=roles(top_fraction=0.5, num_hidden_layers=4, **options)).go()
    assert made.trainer.scorer.trunk is True and made.trainer.scorer.trusted is not None
    assert made.trainer.identities["kl_at_start"] == 0
    assert made.trainer.identities["mean_abs_log_ratio_after_first_update"] > 0


def test_a_recipe_can_choose_transformers_sampling(tmp_path):
    """`cache_implementation` is an argument of its `generate`: log-probs are then computed."""
    made = run(tmp_path / "r", args={"cache_implementation": "dynamic"})
    assert not made.trainer.samples_itself
    made.go()
    assert made.trainer.scorer.trusted is None and made.trainer.scorer.trunk is True
    assert made.lines[-1]["kl/sequence"] != 0


def test_padding_follows_each_rows_end():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0])]  # the second lost its first token
    assert rollout._pad(rows, mask).tolist() == [[1, 2, 0], [0, 5, 6]]
