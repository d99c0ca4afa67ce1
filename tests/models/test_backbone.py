# SPDX-License-Identifier: Apache-2.0
import gc
import weakref

import pytest
import small
import torch
from peft.tuners.lora import LoraLayer
from small import EPISODES

from lora_rlhf.models import scoring
from lora_rlhf.models.backbone import ADAPTERS

ROLES = ("policy", "reference", "reward", "value", "held_out")
KINDS = {"fp32": {}, "bf16": {"dtype": "bfloat16"}, "nf4": {"load_in_4bit": True}}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def every(kind):
    """All roles on one backbone; tests that use it leave it as it was."""
    return small.backbone("llama", *ROLES, **kind)


def outputs(backbone, role):
    """Hidden states of the episodes as a role, through the shared decoder."""
    with torch.no_grad(), backbone.role(role):
        return scoring.hidden_states(backbone, **small.batch(backbone))


# ------------------------------------------------------- one backbone, once


@pytest.fixture(scope="module")
def with_bitsandbytes():
    """As in conftest.py, with bitsandbytes imported too: `alive` counts new tensors."""
    small.backbone("llama", *ROLES, load_in_4bit=True)
    gc.collect()
    gc.freeze()


def alive():
    """The storage of every tensor that Python can reach: address -> bytes."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    storages = [t.untyped_storage() for t in tensors if t.device.type != "meta"]
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}


@pytest.mark.usefixtures("with_bitsandbytes")
def test_memory_report_is_the_sum_of_all_tensors_that_exist(kind):
    """Measured from outside: every storage that came into being with the backbone."""
    before = alive()
    backbone = small.backbone("llama", *ROLES, folder=small.base_folder(), **kind)
    new = {at: size for at, size in alive().items() if at not in before}
    report = backbone.memory_report()
    # One table of the 4-bit format, 1 KiB, belongs to bitsandbytes and is there once per process.
    states = [getattr(p, "quant_state", None) for p in backbone.causal.parameters()]
    tables = {s.state2.code.data_ptr() for s in states if s is not None} - new.keys()
    assert sum(new.values()) + 1024 * len(tables) == report["total"]
    assert report["total"] == report["backbone"] + sum(report["roles"].values())
    assert report["roles"].keys() == set(ROLES)


def test_a_role_adds_the_memory_of_its_adapter_and_head_only():
    backbone = small.backbone("llama", "policy")
    base = backbone.memory_report()["backbone"]
    for role in ("reference", "reward", "value"):
        backbone.add_role(role)
        report = backbone.memory_report()
        assert report["backbone"] == base
        own = [p for _, p in backbone.role_parameters(role)]
        head = [p for p in own if p.shape[0] == 1]
        # PEFT keeps the head as it was beside the one that is trained.
        assert report["roles"][role] == 4 * sum(p.numel() for p in own + head)


def test_every_view_holds_the_same_tensors(every):
    base = {p.data_ptr() for _, p in every.causal.named_parameters()}
    for role, view in every.views.items():
        for name, parameter in view.named_parameters():
            if "score" not in name and "classifier" not in name and "value_head" not in name:
                assert parameter.data_ptr() in base, f"{role}: {name} is a copy"
    decoders = {id(view.get_base_model().base_model) for view in every.views.values()}
    assert decoders == {id(every.decoder)}


def test_views_are_the_hugging_face_classes(every):
    found = {role: type(view.get_base_model()).__name__ for role, view in every.views.items()}
    assert found == {
        "policy": "LlamaForCausalLM",
        "reference": "LlamaForCausalLM",
        "reward": "LlamaForSequenceClassification",
        "held_out": "LlamaForSequenceClassification",
        "value": "LlamaForTokenClassification",
    }
    assert every.views["policy"] is every.views["reference"]


def test_adapters_and_heads_are_float32_whatever_the_base(every):
    for role in ROLES:
        assert {p.dtype for _, p in every.role_parameters(role)} == {torch.float32}


def test_roles_hold_different_tensors_and_share_none(every):
    seen = {}
    for role in ROLES:
        for name, parameter in every.role_parameters(role):
            assert seen.setdefault(id(parameter), role) == role, name
    assert len(every.role_parameters("policy")) == 2 * 7 * 2
    assert [n for n, _ in every.role_parameters("reward") if "lora_" not in n] == [
        "base_model.model.score.weight"
    ]
    assert [n for n, _ in every.role_parameters("value") if "lora_" not in n] == [
        "base_model.model.score.weight",
        "base_model.model.score.bias",
    ]


# ----------------------------------------------------------------- add, copy


def test_a_fresh_role_is_the_base_model_exactly(kind):
    backbone = small.backbone(**kind)
    plain = outputs(backbone, None)
    backbone.add_role("policy")
    assert torch.equal(outputs(backbone, "policy"), plain)


def test_a_copy_computes_the_same_from_its_own_tensors(kind):
    backbone = small.backbone("llama", "reference", **kind)
    backbone.copy_role("reference", "policy")
    assert torch.equal(outputs(backbone, "policy"), outputs(backbone, "reference"))
    small.nudge(backbone, "policy", std=0.5)
    assert not torch.equal(outputs(backbone, "policy"), outputs(backbone, "reference"))
    backbone.copy_role("policy", "reference")
    assert torch.equal(outputs(backbone, "policy"), outputs(backbone, "reference"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_a_value_starts_as_the_reward_with_its_offset_as_bias(name):
    """So that the value of the last state is the reward that PPO sees, from the first update on.

    Heads are called `score` here and `classifier` there.
    """
    backbone = small.backbone(name, "reward")
    backbone.reward_offset["reward"] = 0.75
    backbone.add_role("value", copy_from="reward")
    scores = scoring.scores(backbone, EPISODES)
    data = small.batch(backbone)
    with torch.no_grad(), backbone.role("value"):
        # One more id, so that the state after the last token is asked for.
        longer = {
            "input_ids": torch.cat([data["input_ids"], data["input_ids"][:, -1:]], dim=1),
            "attention_mask": torch.cat([data["attention_mask"], torch.ones(3, 1).long()], dim=1),
        }
        values = scoring.token_values(backbone, **longer, tokens=1)[:, 0]
    assert torch.allclose(values, torch.tensor(scores) + 0.75, atol=1e-5)


def test_a_second_reward_model_takes_the_offset_with_the_weights():
    backbone = small.backbone("llama", "reward")
    backbone.reward_offset["reward"] = -2.0
    backbone.add_role("held_out", copy_from="reward")
    assert backbone.reward_offset == {"reward": -2.0, "held_out": -2.0}
    assert scoring.scores(backbone, EPISODES) == scoring.scores(backbone, EPISODES, "held_out")


def test_a_role_is_added_once():
    backbone = small.backbone("llama", "policy")
    with pytest.raises(ValueError, match="'policy' exists"):
        backbone.add_role("policy")


def test_a_reward_head_is_drawn_small():
    """std 1/sqrt(d + 1) (2403.17031, detail on the reward head's initialisation)."""
    backbone = small.backbone("llama", hidden_size=1024, intermediate_size=64, num_hidden_layers=1)
    backbone.add_role("reward")
    head = backbone.head("reward")
    assert head.bias is None and head.weight.shape == (1, 1024)
    assert float(head.weight.detach().std()) == pytest.approx(1 / 1025**0.5, rel=0.1)


# ---------------------------------------------------------------- drop a role


@pytest.mark.usefixtures("with_bitsandbytes")
@pytest.mark.parametrize("role", ["reward", "value", "held_out"])
def test_dropping_a_role_frees_its_tensors(role):
    backbone = small.backbone("llama", *ROLES)
    kept = {r: outputs(backbone, r) for r in ROLES if r != role}
    tensors = [weakref.ref(p) for _, p in backbone.role_parameters(role)]
    backbone.reward_offset[role] = 1.0
    before = alive()
    backbone.drop_role(role)
    after = alive()
    assert [t() for t in tensors] == [None] * len(tensors)
    assert sum(before.values()) - sum(after.values()) >= 32768
    assert not backbone.has(role) and role not in backbone.reward_offset
    assert {r: torch.equal(outputs(backbone, r), kept[r]) for r in kept} == dict.fromkeys(
        kept, True
    )
    assert not hasattr(backbone.views["policy"], "value_head") or role != "value"
    backbone.add_role(role)
    assert torch.equal(outputs(backbone, role), outputs(backbone, None))


@pytest.mark.usefixtures("with_bitsandbytes")
@pytest.mark.parametrize("first", [("policy", "reference"), ("reference", "policy")])
@pytest.mark.parametrize("role", ["policy", "reference"])
def test_policy_and_reference_can_be_dropped_in_any_order(first, role):
    """They share a view, whose forward looks up the configuration of a PEFT-active adapter."""
    backbone = small.backbone("llama", *first)
    other = next(r for r in first if r != role)
    kept = outputs(backbone, other)
    tensors = [weakref.ref(p) for _, p in backbone.role_parameters(role)]
    backbone.drop_role(role)
    gc.collect()
    assert [t() for t in tensors] == [None] * len(tensors)
    assert torch.equal(outputs(backbone, other), kept)
    with backbone.role(other), torch.no_grad():
        assert backbone.views[other](**small.batch(backbone)).logits.shape[0] == len(EPISODES)
    assert len(backbone.role_parameters(other)) == 28


# ------------------------------------------------------------------ switching


def test_each_role_computes_with_its_own_adapter(every):
    found = {role: outputs(every, role) for role in (None, *ROLES)}
    names = list(found)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.equal(found[a], found[b]), f"{a} computes what {b} computes"
    for role in reversed(names):
        assert torch.equal(outputs(every, role), found[role]), f"{role} depends on what came before"


def test_roles_nest_and_unwind(every):
    assert small.active(every) is None
    with every.role("policy"):
        assert small.active(every) == "policy"
        with every.role("value"):
            assert small.active(every) == "value"
            with every.role(None):
                assert small.active(every) is None
            assert small.active(every) == "value"
        assert small.active(every) == "policy"
    assert small.active(every) is None


def test_an_unknown_role_raises(every):
    with pytest.raises(KeyError), every.role("critic"):
        pass
    assert small.active(every) is None


def test_layers_that_disagree_are_noticed(every):
    with every.role("policy"):
        layer = next(m for m in every.decoder.modules() if isinstance(m, LoraLayer))
        layer._active_adapter = ["value"]
        with pytest.raises(AssertionError, match="disagree"):
            small.active(every)
    assert small.active(every) is None


def test_switching_leaves_requires_grad_as_declared(kind):
    backbone = small.backbone("llama", *ROLES, **kind)
    with backbone.training("policy", "value"):
        before = {id(p): p.requires_grad for p in backbone._all_parameters()}
        for role in (None, *ROLES):
            with backbone.role(role):
                assert {id(p): p.requires_grad for p in backbone._all_parameters()} == before
        assert {id(p): p.requires_grad for p in backbone._all_parameters()} == before
        backbone.assert_trainable()


# ------------------------------------------------------------------- training


def test_a_stage_trains_exactly_the_roles_it_names(kind):
    backbone = small.backbone("llama", *ROLES, **kind)
    with backbone.training("policy", "value"):
        assert small.active(backbone) == "policy"
        wanted = {id(p) for r in ("policy", "value") for _, p in backbone.role_parameters(r)}
        assert {id(p) for p in backbone._all_parameters() if p.requires_grad} == wanted
    assert not any(p.requires_grad for p in backbone._all_parameters())
    assert small.active(backbone) is None


@pytest.mark.parametrize("add", ["reward", "held_out"])
def test_adding_a_role_in_a_stage_keeps_the_declaration(add):
    backbone = small.backbone("llama", "policy", "value")
    with backbone.training("policy", "value"):
        backbone.add_role(add)
        backbone.assert_trainable()


def test_a_stage_cleans_up_after_a_failure():
    backbone = small.backbone("llama", "policy", "reward")
    base = backbone.causal
    plain = dict(base.__dict__)
    with pytest.raises(RuntimeError, match="boom"), backbone.training("policy"):
        base.train()
        base.forward = lambda **_: None
        base.enable_input_require_grads()  # TRL, and then Trainer:
        base.activation_checkpointing_enable()
        for _, p in backbone.role_parameters("policy"):
            p.grad = torch.ones_like(p)
        raise RuntimeError("boom")
    assert "forward" not in base.__dict__ and "forward" not in plain
    assert not base.is_activation_checkpointing
    assert not base.get_input_embeddings()._forward_hooks
    assert all(p.grad is None for p in backbone._all_parameters())
    assert not any(m.training for m in backbone.views["policy"].modules())
    assert not any(p.requires_grad for p in backbone._all_parameters())
    assert small.active(backbone) is None


def test_an_override_from_before_the_stage_stays():
    """A user's own wrapper of the model's forward was not left behind by the trainer."""
    backbone = small.backbone("llama", "policy")
    original = backbone.causal.forward
    backbone.causal.forward = own = lambda *a, **k: original(*a, **k)
    with backbone.training("policy"):
        backbone.causal.forward = None
    assert backbone.causal.forward is own


def test_state_hash_sees_every_bit_of_a_role_and_no_other(every):
    before = {role: every.state_hash(role) for role in (None, *ROLES)}
    assert len(set(before.values())) == len(before)
    parameter = every.role_parameters("reward")[3][1]
    with torch.no_grad():
        old = parameter[1, 2].clone()
        parameter[1, 2] = torch.nextafter(old, old + 1)
        after = {role: every.state_hash(role) for role in before}
        parameter[1, 2] = old
    assert {r for r in before if before[r] != after[r]} == {"reward"}
    assert {role: every.state_hash(role) for role in before} == before


# --------------------------------------------------------------- top fraction


@pytest.mark.parametrize(
    ("fraction", "layers", "adapted"),
    [(1.0, 3, [0, 1, 2]), (0.5, 3, [1, 2]), (0.34, 3, [1, 2]), (0.33, 3, [2]), (0.01, 3, [2]),
     (0.25, 4, [3]), (0.5, 4, [2, 3])],
)  # fmt: skip
def test_only_the_top_layers_are_adapted_rounded_up(fraction, layers, adapted):
    backbone = small.backbone(
        "llama", "policy", "reward", top_fraction=fraction, num_hidden_layers=layers
    )
    found = [
        i
        for i, layer in enumerate(backbone.layers)
        if any(isinstance(m, LoraLayer) for m in layer.modules())
    ]
    assert found == adapted == backbone.adapted_layers
    shape = backbone.describe_lora()
    assert shape["adapted_layers"] == len(adapted) and shape["total_layers"] == layers
    lora = 7 * len(adapted) * 2
    assert len(backbone.role_parameters("policy")) == lora
    assert len(backbone.role_parameters("reward")) == lora + 1


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_top_fraction_works_whatever_the_layers_are_called(name):
    backbone = small.backbone(name, "policy", "value", top_fraction=0.5)
    lower = {n for n, m in backbone.layers[0].named_modules() if isinstance(m, LoraLayer)}
    assert not lower and len(backbone.role_parameters("policy")) > 0


# ----------------------------------------------------------------- generation


def test_generation_is_the_argmax_of_the_role_asked_for(every):
    prompts = [p for p, _ in EPISODES]
    for role in (None, "policy", "reference"):
        found = every.generate(prompts, role, max_new_tokens=3, temperature=0, batch_size=2)
        for prompt, completion in zip(prompts, found, strict=True):
            ids = list(prompt)
            for token in completion:
                with torch.no_grad(), every.role(role):
                    logits = every.causal(input_ids=torch.tensor([ids])).logits[0, -1].float()
                assert logits[token] >= logits.max() - 0.05 * (every.causal.dtype != torch.float32)
                ids.append(token)
            assert completion and (len(completion) == 3 or completion[-1] == small.EOS)


def test_sampling_is_seeded_and_leaves_the_global_random_state():
    backbone = small.backbone("llama", "policy")
    prompts = [p for p, _ in EPISODES]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = backbone.generate(prompts, "policy", max_new_tokens=8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert backbone.generate(prompts, "policy", max_new_tokens=8, seed=1) == first
    assert backbone.generate(prompts, "policy", max_new_tokens=8, seed=2) != first
    assert small.active(backbone) is None


def test_completions_end_at_eos_and_hold_no_padding():
    backbone = small.backbone("llama", "policy")
    found = backbone.generate([[5]] * 200, "policy", max_new_tokens=12, temperature=2.0)
    ended = [c for c in found if small.EOS in c]
    assert ended and all(c.index(small.EOS) == len(c) - 1 for c in ended)
    assert all(len(c) == 12 for c in found if small.EOS not in c)
    assert {len(c) for c in ended} != {12}


# -------------------------------------------------------------- architectures


def unpadded(episode):
    prompt, completion = episode
    return torch.tensor([prompt + completion])


@pytest.mark.parametrize("name", small.ARCHITECTURES)
def test_every_role_runs_and_agrees_with_the_hugging_face_class(name):
    """Our log-probs, values and scores from a padded batch, against the class's own forward.

    The class sees one episode at a time without padding, so positions, masks, soft caps and heads
    must all be right in ours.
    """
    backbone = small.backbone(name, "policy", "reference", "reward", "value")
    data = small.batch(backbone)
    tokens = max(len(c) for _, c in EPISODES)
    for role in (None, "policy", "reference"):
        with torch.no_grad(), backbone.role(role):
            ours, entropy = scoring.completion_logprobs(
                backbone, **data, tokens=tokens, temperature=0.7
            )
            for row, (_, completion) in enumerate(EPISODES):
                ids, n = unpadded(EPISODES[row]), len(completion)
                logits = backbone.causal(input_ids=ids).logits[0, -n - 1 : -1] / 0.7
                logp = logits.log_softmax(-1)
                want = logp.gather(-1, torch.tensor(completion)[:, None])[:, 0]
                assert torch.allclose(ours[row, -n:], want, atol=1e-5), role
                assert torch.allclose(entropy[row, -n:], -(logp.exp() * logp).sum(-1), atol=1e-5)
    scores = scoring.scores(backbone, EPISODES)
    sums = scoring.sequence_logprobs(backbone, EPISODES, "policy", batch_size=2)
    for row, (_, completion) in enumerate(EPISODES):
        n = len(completion)
        with torch.no_grad(), backbone.role("reward"):
            want = backbone.views["reward"](input_ids=unpadded(EPISODES[row])).logits[0, 0]
        assert scores[row] == pytest.approx(float(want), abs=1e-5)
        with torch.no_grad(), backbone.role("value"):
            ours = scoring.token_values(backbone, **data, tokens=tokens)[row, -n:]
            # OPT has no token class: its sequence class shows the value of the last token only.
            for i in range(1, n + 1) if name in small.NO_TOKEN_CLASS else [0]:
                ids = unpadded(EPISODES[row])[:, : -i if i else None]
                logits = backbone.views["value"](input_ids=ids).logits
                want = logits[0, 0] if name in small.NO_TOKEN_CLASS else logits[0, -n - 1 : -1, 0]
                got = ours[-i] if name in small.NO_TOKEN_CLASS else ours
                assert torch.allclose(got, want, atol=1e-5)
        with torch.no_grad(), backbone.role("policy"):
            logits = backbone.causal(input_ids=unpadded(EPISODES[row])).logits[0, -n - 1 : -1]
            logp = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).sum()
        assert sums[row] == pytest.approx(float(logp), abs=1e-4)


@pytest.mark.parametrize("name", small.ARCHITECTURES)
def test_gradients_reach_exactly_the_active_role(name):
    backbone = small.backbone(name, "policy", "reference", "reward", "value")
    data = small.batch(backbone)
    with backbone.training("policy", "value"):
        scoring.completion_logprobs(backbone, **data, tokens=3, temperature=1.0)[0].sum().backward()
        with backbone.role("value"):
            scoring.token_values(backbone, **data, tokens=3).sum().backward()
        for role in ("policy", "value"):
            for n, p in backbone.role_parameters(role):
                assert p.grad is not None and bool(p.grad.abs().sum() > 0), f"{role}: {n}"
        others = [p for r in ("reference", "reward") for _, p in backbone.role_parameters(r)]
        assert all(p.grad is None for p in others)


def test_the_soft_cap_of_gemma_2_is_in_the_log_probs():
    """The test above would pass without the cap if the logits were small: they are not."""
    backbone = small.backbone("gemma2", "policy")
    with torch.no_grad(), backbone.role("policy"):
        states = scoring.hidden_states(backbone, **small.batch(backbone))
        bare = backbone.causal.get_output_embeddings()(states)
        capped = backbone.causal(**small.batch(backbone)).logits
    assert float(bare.abs().max()) > 1 > 0.5 >= float(capped.abs().max())


def test_no_future_warning_comes_out_of_our_calls(recwarn):
    small.backbone("gpt2", *ROLES).drop_role("reward")
    backbone = small.backbone("llama", *ROLES)
    with backbone.training("policy"):
        pass
    noise = [w for w in recwarn if "peft" in w.filename or issubclass(w.category, FutureWarning)]
    assert [str(w.message) for w in noise] == []


def test_roles_and_adapter_names():
    assert ADAPTERS["policy"] == "default"
    assert len(set(ADAPTERS.values())) == len(ADAPTERS)
