# SPDX-License-Identifier: Apache-2.0
"""Faults, mostly silent, of several adapters on one backbone.

One test or more per trap; each was seen to fail with its guard taken out. The traps that belong to
the PPO update (two roles under gradient checkpointing, gradient clips, the optimizer's groups) are
in test_ppo_trainer.py.
"""

import ast
import copy
import functools
from pathlib import Path

import pytest
import small
import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from small import EPISODES
from source_tree import SourceTree
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

import lora_rlhf
from lora_rlhf._trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from lora_rlhf.errors import AdapterError
from lora_rlhf.models import adapters, scoring
from lora_rlhf.models.backbone import ADAPTERS
from lora_rlhf.models.base_model import BaseModel
from lora_rlhf.recipe.loader import parse_recipe
from lora_rlhf.recipe.schema import LoraSection, ModelSection
from lora_rlhf.runtime.devices import pick_dtype
from lora_rlhf.training.trl_config import trainer_args

ROLES = ("policy", "reference", "reward", "value")
QUIET = {
    "report_to": "none", "use_cpu": True, "bf16": False, "fp16": False, "save_strategy": "no",
    "disable_tqdm": True, "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
    "dataloader_pin_memory": False, "remove_unused_columns": False, "log_level": "error",
}  # fmt: skip


def sft(backbone, folder, **options):
    rows = [{"input_ids": p + c, "labels": [-100] * len(p) + c} for p, c in EPISODES]
    args = SFTConfig(
        output_dir=str(folder), **{**QUIET, "gradient_checkpointing": False, **options}
    )
    return SFTTrainer(
        model=backbone.views["policy"],
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=backbone.tokenizer,
    )


def reward(backbone, folder, **options):
    rows = [{"chosen_ids": p + c, "rejected_ids": p + c[1:]} for p, c in EPISODES]
    args = RewardConfig(
        output_dir=str(folder), **{**QUIET, "gradient_checkpointing": False, **options}
    )
    return RewardTrainer(
        model=backbone.views["reward"],
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=backbone.tokenizer,
    )


def values(backbone, role):
    return {n: p.detach().clone() for n, p in backbone.role_parameters(role)}


def moved(backbone, role, before):
    return {n for n, p in backbone.role_parameters(role) if not torch.equal(p, before[n])}


@functools.cache
def sources():
    """The package's modules, read."""
    return SourceTree.read(Path(lora_rlhf.__file__).parent)


def called(name):
    """Modules of the package that use an attribute of this name."""
    return {
        module
        for module, nodes in sources().nodes.items()
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr == name
    }


def test_every_module_is_searched_for_calls():
    assert len(sources().nodes) == len(list(Path(lora_rlhf.__file__).parent.rglob("*.py"))) > 100
    assert "models.backbone" in called("requires_grad_")


# ------------------------------------------------------------ what is adapted


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_the_head_is_never_adapted(name):
    """`target_modules="all-linear"`, resolved per view, adapts the value head; PEFT crashes."""
    backbone = small.backbone(name, *ROLES)
    for role, view in backbone.views.items():
        config = view.peft_config[backbone.views[role].active_adapter]
        assert set(config.target_modules) == set(backbone.target_modules), role
        assert not hasattr(view.get_base_model(), "score") or not isinstance(
            view.get_base_model().score, LoraLayer
        )
    for role in ("reward", "value"):
        assert type(backbone.head(role)) is nn.Linear
    inside = {n for n, m in backbone.decoder.named_modules() if isinstance(m, LoraLayer)}
    total = {
        n for v in backbone.views.values() for n, m in v.named_modules() if isinstance(m, LoraLayer)
    }
    assert len({n.split(".", 3)[-1] for n in total}) == len({n.split(".", 1)[-1] for n in inside})


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_the_value_head_has_no_dropout_and_a_bias(name):
    """Token classes have dropout 0.1 by default: values would be noise in training mode."""
    backbone = small.backbone(name, "value")
    view = backbone.views["value"]
    view.train()
    data = small.batch(backbone)
    with torch.no_grad(), backbone.role("value"):
        first = view(**data).logits
        assert all(torch.equal(first, view(**data).logits) for _ in range(3))
    assert backbone.head("value").bias is not None


# ----------------------------------------------------------------- what is saved


def test_a_file_holds_one_role_even_beside_a_foreign_adapter(tmp_path):
    """PEFT filters by the view's own adapters, and all adapters live in the same layers.

    Its `save_pretrained` writes every role's LoRA into the file: 141 tensors instead of 29.
    """
    backbone = small.backbone("llama", *ROLES, "held_out")
    config = copy.deepcopy(backbone.views["policy"].peft_config["default"])
    backbone.views["policy"].add_adapter("ref", config)
    backbone.activate([])
    counts = {"policy": 28, "reference": 28, "reward": 29, "value": 30, "held_out": 29}
    for role, count in counts.items():
        folder = adapters.save_role(backbone, role, tmp_path / role)
        tensors = load_file(folder / "adapter_model.safetensors")
        assert len(tensors) == count
        for name, module in backbone.decoder.named_modules():
            if isinstance(module, LoraLayer):
                key = f"base_model.model.model.{name}.lora_B.weight"
                assert torch.equal(tensors[key], module.lora_B[ADAPTERS[role]].weight), role


def test_too_many_tensors_are_not_saved(tmp_path, monkeypatch):
    """The count is checked, so that a PEFT that names things otherwise cannot mix the roles."""
    backbone = small.backbone("llama", *ROLES)
    both = backbone.role_parameters("policy") + [
        (f"other.{n}", p) for n, p in backbone.role_parameters("reference")
    ]
    monkeypatch.setattr(backbone, "role_parameters", lambda role: both)
    with pytest.raises(AdapterError, match="policy has 56 tensors"):
        adapters.save_role(backbone, "policy", tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("role", ["reference", "reward", "value"])
def test_the_adapter_is_at_the_root_of_its_folder(tmp_path, role):
    """PEFT puts adapters that are not called "default" into a sub-folder: not found there."""
    folder = adapters.save_role(small.backbone("llama", *ROLES), role, tmp_path / role)
    assert (folder / "adapter_config.json").is_file()
    assert (folder / "adapter_model.safetensors").is_file()
    assert not [p for p in folder.iterdir() if p.is_dir()]


def test_a_reward_adapter_reloads_unaided(tmp_path):
    """PEFT saves neither num_labels nor the pad id; a config.json beside it breaks Auto*.

    What is left to say is `num_labels=1` and the pad id, which the saved tokenizer knows.
    """
    backbone = small.backbone("llama", *ROLES)
    folder = adapters.save_role(backbone, "reward", tmp_path / "reward")
    assert not (folder / "config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    check = adapters.read_check(folder)
    assert check["pad_token_id"] == tokenizer.pad_token_id
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=tokenizer.pad_token_id
    ).eval()
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(check["input_ids"]),
            attention_mask=torch.tensor(check["attention_mask"]),
        ).logits
    assert logits[:, 0].tolist() == check["expected"]["score"]


# ------------------------------------------------------------------ TRL's "ref"


def test_trl_finds_the_policy_by_the_name_it_looks_for(tmp_path):
    """DPO always, GRPO with beta != 0, look up "default": a KeyError for an adapter called policy.

    They clone it as `ref`, which must neither be saved nor stay in memory.
    """
    backbone = small.backbone("llama", "reference", "policy", "reward")
    size = backbone.memory_report()["total"]
    rows = [{"prompt": "w5", "chosen": "w6", "rejected": "w7"}, {"prompt": "w8"}]
    with backbone.training("policy"):
        args = GRPOConfig(
            output_dir=str(tmp_path),
            beta=0.1,
            num_generations=2,
            gradient_checkpointing=False,
            **QUIET,
        )
        GRPOTrainer(
            model=backbone.views["policy"],
            args=args,
            processing_class=backbone.tokenizer,
            reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
            train_dataset=Dataset.from_list([{"prompt": "w5"}]),
        )
        assert "ref" in backbone.views["policy"].peft_config
        folder = adapters.save_role(backbone, "policy", tmp_path / "policy")
    assert len(load_file(folder / "adapter_model.safetensors")) == 28
    assert "ref" not in backbone.views["policy"].peft_config
    assert backbone.memory_report()["total"] == size
    with backbone.training("policy"):
        backbone.assert_trainable()
        DPOTrainer(
            model=backbone.views["policy"],
            processing_class=backbone.tokenizer,
            args=DPOConfig(output_dir=str(tmp_path), gradient_checkpointing=False, **QUIET),
            train_dataset=Dataset.from_list(rows[:1] * 4),
        )
    assert not any(p.requires_grad for p in backbone._all_parameters())
    assert small.active(backbone) is None


# -------------------------------------------------------------- gradients, roles


def test_two_roles_in_one_step_both_get_their_gradient():
    """`set_adapter` turns requires_grad off for the others: their gradient is dropped, silently."""
    backbone = small.backbone("llama", *ROLES)
    data = small.batch(backbone)

    def gradient(*roles):
        with backbone.training("policy", "value"):
            loss = torch.zeros(())
            for role in roles:
                with backbone.role(role):
                    loss = loss + scoring.hidden_states(backbone, **data).square().sum()
            loss.backward()
            return {
                r: [p.grad.clone() for n, p in backbone.role_parameters(r) if "lora_" in n]
                for r in roles
            }

    both, policy, value = gradient("policy", "value"), gradient("policy"), gradient("value")
    for alone in (policy, value):
        for role, grads in alone.items():
            assert all(torch.allclose(a, b) for a, b in zip(grads, both[role], strict=True)), role
            assert all(float(g.abs().sum()) > 0 for g in grads)
    assert called("set_adapter") <= {"models.plain_adapters"}, "which trains nothing"


@pytest.mark.parametrize("name", ["default", "reference", "value"])
def test_a_foreign_set_adapter_is_noticed(name):
    """TRL and PEFT call it here and there; what trains is checked before each optimizer step."""
    backbone = small.backbone("llama", "policy", "reference", "value")
    view = backbone.views["value" if name == "value" else "policy"]
    with backbone.training("policy", "value"):
        backbone.assert_trainable()
        view.set_adapter(name)
        with pytest.raises(AdapterError, match="is frozen|is trainable"):
            backbone.assert_trainable()
        backbone.apply_trainable()
        backbone.assert_trainable()


@pytest.mark.parametrize("order", [("policy", "value"), ("value", "policy"),
                                   ("reference", "value", "policy")])  # fmt: skip
def test_the_value_head_is_in_the_policys_tree(order):
    """Or the optimizer, clipping and `zero_grad` of a trainer on the policy's view all miss it."""
    backbone = small.backbone("llama", *order)
    view, head = backbone.views["policy"], backbone.head("value")
    inside = {id(p) for p in view.parameters()}
    assert {id(p) for _, p in backbone.role_parameters("value")} <= inside
    with backbone.training("policy", "value"):
        for p in head.parameters():
            p.grad = torch.ones_like(p)
        view.zero_grad()
        assert all(p.grad is None for p in head.parameters())
    assert len(backbone.role_parameters("policy")) == 28, (
        "but it is no part of the policy's adapter"
    )
    backbone.drop_role("value")
    assert not any(p is q for p in head.parameters() for q in view.parameters())


@pytest.mark.parametrize("stale", ["policy", None])
def test_the_reward_trainer_trains_the_rewards_adapter(tmp_path, stale):
    """With another adapter active only the head gets a gradient, and there is no error."""
    backbone = small.backbone("llama", *ROLES)
    with backbone.role(stale):
        before = {role: values(backbone, role) for role in ROLES}
        with backbone.training("reward"):
            assert small.active(backbone) == "reward"
            reward(backbone, tmp_path).train()
        assert small.active(backbone) == stale
    assert moved(backbone, "reward", before["reward"]) == set(before["reward"])
    for role in ("policy", "reference", "value"):
        assert moved(backbone, role, before[role]) == set(), role


def test_no_stale_adapter_is_left_after_an_error():
    """A stale adapter makes the reference equal the policy: KL = 0 from then on, and no error."""
    backbone = small.backbone("llama", *ROLES)
    policy = scoring.sequence_logprobs(backbone, EPISODES, "policy")
    reference = scoring.sequence_logprobs(backbone, EPISODES, "reference")
    assert policy != reference
    for outer in ("policy", None):
        with backbone.role(outer):
            with pytest.raises(RuntimeError), backbone.role("reference"):
                with backbone.role("value"):
                    raise RuntimeError
            assert small.active(backbone) == outer
    assert scoring.sequence_logprobs(backbone, EPISODES, "policy") == policy
    assert scoring.sequence_logprobs(backbone, EPISODES, "reference") == reference


def test_the_base_model_is_reached_without_disable_adapter():
    """Leaving it re-enables gradients on a frozen active adapter (peft#3447)."""
    assert called("disable_adapter") <= {"models.plain_adapters"}, "which trains nothing"
    backbone = small.backbone("llama", *ROLES)
    plain = BaseModel.load(ModelSection(id=str(small.base_folder())), LoraSection()).causal
    data = small.batch(backbone)
    with backbone.training("policy", "value"):
        with torch.no_grad(), backbone.role(None):
            assert torch.equal(backbone.causal(**data).logits, plain(**data).logits)
        backbone.assert_trainable()
        with backbone.role("reference"):
            with backbone.views["reference"].disable_adapter():
                pass
            with pytest.raises(AdapterError, match="is trainable|is frozen"):
                backbone.assert_trainable()


# ------------------------------------------------------------------------ 4-bit


@pytest.mark.parametrize(("role", "trainer"), [("policy", sft), ("reward", reward)])
def test_trls_rounding_to_bf16_does_not_reach_the_adapters(tmp_path, role, trainer):
    """Under 4-bit TRL casts what is trained to bf16: `RewardTrainer` crashes (float against a bf16
    head), and casting back afterwards has lost bits already: KL = 1.6e-3 before any update.
    """
    backbone = small.backbone("llama", *ROLES, load_in_4bit=True)
    before = {r: values(backbone, r) for r in ROLES}
    with backbone.training(role):
        with backbone.float32_kept():
            made = trainer(backbone, tmp_path)
            rounded = {p.dtype for _, p in backbone.role_parameters(role)}
        assert all(moved(backbone, r, before[r]) == set() for r in ROLES)
        assert {p.dtype for _, p in backbone.role_parameters(role)} == {torch.float32}
        assert rounded == {torch.bfloat16}, "TRL rounds no more: float32_kept may go"
        made.train()
    assert moved(backbone, role, before[role]) == set(before[role])


def test_4bit_weights_are_never_repacked(monkeypatch):
    """On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks weights on the first no-grad forward.

    Backward then dequantises nonsense (relative error 1.02 of the gradient), without an error.
    """
    import bitsandbytes as bnb

    # The layers ask when they are made; repacking itself takes such a CPU.
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    assert bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu
    backbone = small.backbone("llama", *ROLES, load_in_4bit=True)
    monkeypatch.undo()
    layers = [m for m in backbone.causal.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False] * 14

    def gradient():
        with backbone.training("policy"):
            scoring.hidden_states(backbone, **small.batch(backbone)).square().sum().backward()
            return [p.grad.clone() for _, p in backbone.role_parameters("policy")]

    packed = [layer.weight.detach().clone() for layer in layers]
    before = gradient()
    scoring.scores(backbone, EPISODES)
    backbone.generate([[5, 6]], "policy", max_new_tokens=3)
    assert all(torch.equal(a, b) for a, b in zip(before, gradient(), strict=True))
    assert all(torch.equal(a, m.weight) for a, m in zip(packed, layers, strict=True))


def test_nothing_is_ever_merged_into_the_base(tmp_path):
    """Merging into 4 bits rounds most of a small update away: KL 2e-3 of an effect of 3.6e-3."""
    for name in ("merge_adapter", "merge", "unmerge_adapter"):
        assert called(name) == set(), name
    assert called("merge_and_unload") == {"models.plain_adapters"}  # an export, dequantised before
    backbone = small.backbone("llama", *ROLES, load_in_4bit=True)
    before = backbone.state_hash(None)
    with backbone.training("policy"), backbone.float32_kept():
        sft(backbone, tmp_path)
    backbone.generate([[5, 6]], "policy", max_new_tokens=3)
    adapters.load_role(backbone, "policy", adapters.save_role(backbone, "policy", tmp_path / "p"))
    assert backbone.state_hash(None) == before
    assert not any(m.merged for m in backbone.causal.modules() if isinstance(m, LoraLayer))


# --------------------------------------------------------- gradient checkpointing


def litter(backbone):
    """What a trainer may leave on the shared modules."""
    modules = {id(m): m for v in backbone.views.values() for m in v.modules()}.values()
    return {
        "forward": [type(m).__name__ for m in modules if "forward" in m.__dict__],
        "hooks": len(backbone.causal.get_input_embeddings()._forward_hooks),
        "checkpointing": [m for m in modules if getattr(m, "gradient_checkpointing", False)],
        "training": [type(m).__name__ for m in modules if m.training],
        "gradients": sum(p.grad is not None for p in backbone._all_parameters()),
        "use_cache": backbone.causal.config.use_cache,
    }


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("role", "trainer"), [("policy", sft), ("reward", reward)])
def test_a_stage_leaves_nothing_on_the_backbone(tmp_path, role, trainer, checkpointing):
    """TRL checkpoints by default and hooks the embedding; Trainer hooks it again.

    It also patches `forward` and turns the cache off. What is left behind makes the next stage
    recompute, run its backward through the trunk, and generate slowly.
    """
    backbone = small.backbone("llama", "policy", "reward", top_fraction=0.5)
    with backbone.training(role):
        pass
    clean = litter(backbone)
    assert clean["training"] == clean["forward"] == clean["checkpointing"] == []
    with backbone.training(role):
        made = trainer(backbone, tmp_path, gradient_checkpointing=checkpointing)
        made.train()
        assert litter(backbone) != clean
        assert backbone.causal.base_model.layers[0].gradient_checkpointing is checkpointing
    assert litter(backbone) == clean
    seen = []
    hook = backbone.layers[0].register_forward_hook(
        lambda module, args, out: seen.append(
            (out[0] if isinstance(out, tuple) else out).requires_grad
        )
    )
    with backbone.training("policy"):
        backbone.causal.train()
        assert scoring.hidden_states(backbone, **small.batch(backbone)).requires_grad
    hook.remove()
    assert seen == [False], "the trunk needs no backward"


@pytest.mark.parametrize("wanted", [False, True])
def test_checkpointing_is_what_the_recipe_says_in_every_stage(tmp_path, wanted):
    """TRL's own default is on; a stage that does not say it would get it."""
    text = f"name: x\nmodel:\n  id: tiny\n  gradient_checkpointing: {str(wanted).lower()}\n"
    recipe = parse_recipe(text, "recipe.yaml")
    for stage, config in (("sft", SFTConfig), ("reward", RewardConfig)):
        args = config(**trainer_args(recipe, tmp_path, stage, {}, {}))
        assert args.activation_checkpointing is wanted


# -------------------------------------------------------------------------- pads


def test_the_score_is_read_at_the_eos_and_not_before_it(tmp_path):
    """With pad == eos the class takes the eos for padding and reads one token early, silently."""
    folder = tmp_path / "base"
    small.tokenizer("</s>", ("<reserved>", "</s>", "<unk>")).save_pretrained(folder)
    for path in small.base_folder().iterdir():
        if "token" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    backbone = small.backbone("llama", "reward", folder=folder)
    assert backbone.tokenizer.pad_token_id != backbone.tokenizer.eos_token_id
    ours = scoring.scores(backbone, EPISODES)
    width = max(len(p + c) for p, c in EPISODES)
    for (prompt, completion), score in zip(EPISODES, ours, strict=True):
        row = prompt + completion
        # As TRL's RewardTrainer pads: on the right, with the tokenizer's pad.
        padded = row + [backbone.tokenizer.pad_token_id] * (width - len(row))
        mask = [1] * len(row) + [0] * (width - len(row))
        with torch.no_grad(), backbone.role("reward"):
            theirs = backbone.views["reward"](
                input_ids=torch.tensor([padded]), attention_mask=torch.tensor([mask])
            ).logits[0, 0]
            early = scoring.last_token_scores(
                backbone, torch.tensor([row[:-1]]), torch.ones(1, len(row) - 1).long(), "reward"
            )[0]
        assert float(theirs) == pytest.approx(score, abs=1e-5)
        assert abs(float(early) - score) > 1e-3, "the test could not tell"


def test_masks_go_by_length_and_never_by_id():
    """A text may hold the pad token: its score is still read at its last token."""
    backbone = small.backbone("llama", "reward")
    pad = backbone.tokenizer.pad_token_id
    episodes = [([5, pad, 7], [pad, 8, pad]), ([5, 6, 7, 9], [9, 9])]
    alone = [scoring.scores(backbone, [episode])[0] for episode in episodes]
    assert scoring.scores(backbone, episodes) == pytest.approx(alone, abs=1e-5)
    trimmed = scoring.scores(backbone, [([5, pad, 7], [pad, 8])])[0]
    assert abs(alone[0] - trimmed) > 1e-3


# ------------------------------------------------------------------------ dtypes


def test_a_t4_gets_float16(monkeypatch):
    """`torch.cuda.is_bf16_supported()` is True there, by emulation; TRL's cast crashes fp16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    assert pick_dtype("auto") is torch.float16
    assert called("is_bf16_supported") == set()


def test_a_bf16_base_feeds_float32_heads():
    """A float32 head on bf16 states is a dtype error; a bf16 head would round every score."""
    backbone = small.backbone("llama", *ROLES, dtype="bfloat16")
    data = small.batch(backbone)
    for role in ("reward", "value"):
        with torch.no_grad(), backbone.role(role):
            assert backbone.views[role](**data).logits.dtype == torch.float32
    assert isinstance(backbone.views["reward"], PeftModel)
