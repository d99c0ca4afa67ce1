# SPDX-License-Identifier: Apache-2.0
"""A base whose layers are shared: outputs and training as of a whole one, with half the bytes."""

import os
import shutil
import signal
from pathlib import Path

import killed
import pytest
import several
import small
import torch
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM

from lora_rlhf import pipeline, preflight
from lora_rlhf.distributed.shards import Shards
from lora_rlhf.distributed.world import World, joined, world
from lora_rlhf.errors import BaseModelError, IdentityError, RecipeError, SetupError
from lora_rlhf.models import decode_graph, sharded_layers
from lora_rlhf.models.memory import tensor_bytes
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime.oom import BatchSizeBackoff

SHARED = "model.shard=true"
BASES = [("llama", False), ("llama", True), ("gpt2", False)]
"""Architecture, 4-bit: every kind of module whose matrix is shared."""


def matrix_bytes(base) -> int:
    return tensor_bytes(m.weight.data for y in base.layers for m in sharded_layers.matrices(y))


# ------------------------------------------------------------------------- in one process


def test_one_process_shares_nothing(runs):
    with pytest.raises(SetupError, match="this run is one process"):
        preflight.check_processes(runs.recipe("ppo", SHARED))
    base = small.base(small.base_folder())
    base.causal.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(SetupError, match="lies on 0, 1 by a device_map, in one process"):
        sharded_layers.check(base)


def test_another_sampler_is_refused(runs):
    sets = (SHARED, "ppo.args.cache_implementation=static")
    with pytest.raises(RecipeError, match="cache_implementation is set, and model.shard"):
        preflight.check_launch(runs.recipe("ppo", *sets), ["ppo"])


def test_experts_are_refused(monkeypatch):
    options = {"vocab_size": small.VOCABULARY, "num_local_experts": 4}
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    base = small.base(small.base_folder())
    base.causal = MixtralForCausalLM(MixtralConfig(**options, **size, **heads))
    base.layers = base.causal.model.layers
    monkeypatch.setattr(sharded_layers, "world", lambda: World(0, 2))
    with pytest.raises(BaseModelError, match="MixtralForCausalLM cannot be split .*MixtralExperts"):
        sharded_layers.check(base)


# ------------------------------------------------------------------------- in several


def _fetch() -> None:
    """Blocks fetched by three processes in their own order and number, between exchanges."""
    with joined() as here:
        shards, generator = Shards(here, torch.device("cpu")), torch.Generator().manual_seed(0)
        blocks = []
        for size in (1, 1000, 4096):
            bits = torch.randint(-(2**31), 2**31 - 1, (size,), generator=generator)
            floats = bits.to(torch.int32).view(torch.float32)  # NaN of every kind among them
            codes = bits.to(torch.uint8).view(-1, 1)
            blocks.append((floats, codes, *shards.add([floats, codes])))
        held = sum(part.nbytes for part in shards.parts)
        assert held < 0.4 * sum(f.nbytes + c.nbytes for f, c, *_ in blocks)

        def check(number: int) -> None:
            floats, codes, _, (first, second) = blocks[number]
            whole = shards.fetch(number)
            assert torch.equal(whole[first:][: floats.nbytes], floats.view(torch.uint8))
            assert torch.equal(whole[second:][: codes.nbytes], codes.view(-1))

        for turn in range(3):
            for i in range(turn * here.rank):
                check((i + here.rank) % 3)
            assert here.gathered(here.rank) == [0, 1, 2]
            assert here.of_first(lambda: check(2) or "yes") == "yes"
        assert shards.fetch(2) is shards.fetch(2), "the last block is kept"
        weight = torch.nn.Parameter(torch.zeros(2))
        weight.grad = torch.ones(2)
        here.add_gradients([weight])
        assert weight.grad.tolist() == [3, 3]


def test_processes_fetch_blocks_in_any_order(tmp_path):
    several.finish(3, _fetch, log=tmp_path / "log")


def _outputs(base) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient that goes down through all layers."""
    embedded = base.causal.get_input_embeddings()(torch.arange(2, 14).view(2, -1))
    embedded = embedded.detach().requires_grad_()
    logits = base.causal(inputs_embeds=embedded, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), embedded.grad


def _share(name: str, four_bit: bool) -> None:
    """A base before and after it is shared, then with a part that was damaged."""
    with joined():
        base = small.base(small.base_folder(name), load_in_4bit=four_bit, dtype="float32")
        before, fingerprint, whole = _outputs(base), base.fingerprint, matrix_bytes(base)
        everything = base.causal.num_parameters()
        sharded_layers.shard(base)
        for _ in range(1 + world().rank):  # not equally many in each process
            for a, b in zip(before, _outputs(base), strict=True):
                assert float((a - b).abs().max()) <= 1e-6 * float(a.abs().max())
        assert matrix_bytes(base) < 0.01 * whole
        assert sum(part.nbytes for part in base.shards.parts) == pytest.approx(whole / 2, rel=0.02)
        del base.fingerprint  # cached
        assert base.fingerprint == fingerprint and base.causal.num_parameters() == everything
        decode_graph.DEVICES = ("cpu",)
        assert not decode_graph.is_possible(base, DynamicCache(config=base.causal.config))
        world().gathered(None)

        real = Shards.add

        def damaged(self, tensors):
            at = real(self, tensors)
            if world().rank == 1:  # as if codes that look like NaN were made equal
                self.parts[-1][::99] = 127
            return at

        Shards.add = damaged
        base = small.base(small.base_folder(name), load_in_4bit=four_bit, dtype="float32")
        with pytest.raises(IdentityError, match="logits differ by"):
            sharded_layers.shard(base)

        Shards.add, logits = real, sharded_layers._logits

        def unlike_in_the_last(base, device):
            lost = base.shards is not None and world().rank == world().size - 1
            return logits(base, device) * (torch.nan if lost else 1)

        sharded_layers._logits = unlike_in_the_last
        base = small.base(small.base_folder(name), load_in_4bit=four_bit, dtype="float32")
        with pytest.raises(IdentityError, match="logits differ by nan"):
            sharded_layers.shard(base)


@pytest.mark.parametrize(
    ("name", "four_bit"),
    [BASES[1], *(pytest.param(*b, marks=pytest.mark.slow) for b in BASES[::2])],
)
def test_a_shared_base_computes_what_a_whole_one_does(tmp_path, name, four_bit):
    small.base_folder(name)
    several.finish(2, _share, name, four_bit, log=tmp_path / "log")


def test_two_processes_with_half_a_base_train_what_one_trains(tmp_path, runs):
    one, two = tmp_path / "one", tmp_path / "two"
    steps = "sft.args.max_steps=2"
    killed.finish(runs.recipe("sft", steps), one, "sft")
    shared = runs.recipe("sft", steps, SHARED)
    several.finish(2, killed.go, shared, two, "sft", log=tmp_path / "log")
    several.assert_near(one, two)
    base = small.base(small.base_folder("llama"))
    held = [Record.read(out).data["clock"]["memory"]["backbone"] for out in (one, two)]
    assert held[1] == pytest.approx(held[0] - matrix_bytes(base) / 2, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    ["model.load_in_4bit=true", "model.gradient_checkpointing=true", "lora.top_fraction=0.5",
     "gpt2"],
)  # fmt: skip
def test_a_whole_run_on_a_shared_base(tmp_path, runs, setting):
    if setting == "gpt2":
        still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        setting = f"model.id={small.base_folder('gpt2', **still)}"
    one, two = tmp_path / "one", tmp_path / "two"
    killed.finish(runs.recipe("ppo", setting), one, "ppo")
    shared = runs.recipe("ppo", setting, SHARED)
    several.finish(2, killed.go, shared, two, "ppo", log=tmp_path / "log")
    several.assert_near(one, two)


def _uneven(recipe, out: Path, stage: str) -> None:
    """One process runs three times as many passes as the other."""
    if os.environ["RANK"] == "1":
        BatchSizeBackoff.rows = lambda self, kind, wanted: 1
    pipeline.run(recipe, out, until=stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "ppo", "grpo", "dpo", "evaluate"])
def test_processes_need_not_run_equally_many_passes(tmp_path, runs, stage):
    out = runs.copy(stage, tmp_path / "run")
    recipe = runs.recipe(stage, SHARED)
    several.finish(2, _uneven, recipe, out, stage, log=tmp_path / "log")
    several.assert_near(runs.after(stage), out)


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_run_goes_on(tmp_path, runs):
    """With the base shared again, to the same bits; and with a whole base in one process."""
    out, whole = runs.copy("ppo", tmp_path / "run"), runs.copy("ppo", tmp_path / "whole")
    recipe = runs.recipe("ppo", SHARED)
    os.environ["KILLED_LOG"] = str(tmp_path / "log")
    children = several.launch(2, _die_alone, recipe, out)
    assert [killed.wait(child) for child in children] == [1, -signal.SIGKILL]
    assert "another process of this run ended" in (tmp_path / "log.0").read_text()
    alone = shutil.copytree(out, tmp_path / "alone")
    several.finish(2, killed.go, recipe, out, "ppo", log=tmp_path / "log")
    several.finish(2, killed.go, recipe, whole, "ppo", log=tmp_path / "log")
    assert killed.bits(out)["weights"] == killed.bits(whole)["weights"]
    killed.finish(runs.recipe("ppo"), alone, "ppo")
    several.assert_near(runs.after("ppo"), alone)


def _die_alone(recipe, out: Path) -> None:
    """End process 1 when it has saved step 6 of PPO, in the middle of a rollout."""
    if os.environ["RANK"] == "1":
        killed.die_after_save(recipe, out, "ppo", 6)
    else:
        pipeline.run(recipe, out, until="ppo")
