# SPDX-License-Identifier: Apache-2.0
"""The product on a CUDA device: the same numbers as on the CPU, the same bits when repeated.

python -m pytest -m gpu tests/end_to_end/test_gpu.py
"""

import copy

import killed
import pytest
import small
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_rlhf import pipeline
from lora_rlhf.models import adapters, decode_graph, sampler
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import LoraSection, ModelSection
from lora_rlhf.training.checkpoint_callback import CheckpointCallback

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]] * 2
FLOAT32 = ["model.dtype=float32"]
NF4 = ["model.load_in_4bit=true"]


def backbone(device="cuda", **model) -> Backbone:
    """A tiny Llama with a policy adapter that is not the identity."""
    torch.manual_seed(0)
    section = ModelSection(id=str(small.base_folder("llama", num_hidden_layers=4)), **model)
    made = Backbone.load(section, LoraSection(r=4, alpha=8, top_fraction=0.5))
    if device == "cpu":
        made.causal.to("cpu")
    made.add_role("policy")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.role_parameters("policy"):
        if "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(drawn.to(parameter))
    return made


def test_log_probs_and_gradients_are_those_of_the_cpu():
    found = {}
    for device in ("cpu", "cuda"):
        made = backbone(device, dtype="float32")
        assert made.device.type == device
        with made.training("policy"), made.role("policy"):
            ids = torch.tensor([[5, 6, 7, 8, 9, 10]] * 2, device=made.device)
            logits = made.causal(input_ids=ids).logits.float()
            loss = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).mean()
            loss.backward()
            gradients = {n: p.grad.cpu() for n, p in made.role_parameters("policy")}
        found[device] = (loss.detach().cpu(), gradients)
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [{"dtype": "float32"}, {"load_in_4bit": True}], ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_a_captured_step_samples_as_a_launched_one(model, keep, monkeypatch):
    made = backbone(**model)
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3, "keep_states": keep}
    graphs = []
    own = decode_graph.DecodeGraph._capture
    monkeypatch.setattr(
        decode_graph.DecodeGraph, "_capture", lambda self: own(self) or graphs.append(self._graph)
    )
    with made.role("policy"):
        captured = sampler.sample(made, PROMPTS, **options)
        again = sampler.sample(made, PROMPTS, **options)
        monkeypatch.setattr(decode_graph, "DEVICES", ())
        launched = sampler.sample(made, PROMPTS, **options)
    assert len(graphs) == 2 and None not in graphs
    exact = model.get("dtype") == "float32"
    for a, b, c in zip(captured, again, launched, strict=True):
        assert a.ids == b.ids and torch.equal(a.logprobs, b.logprobs)
        same = next(
            (i for i, (x, y) in enumerate(zip(a.ids, c.ids, strict=False)) if x != y), len(c.ids)
        )
        assert same == len(c.ids) or not exact
        bounds = {"rtol": 0, "atol": 1e-4 if exact else 0.1}
        torch.testing.assert_close(a.logprobs[:same], c.logprobs[:same], **bounds)
        if keep and exact:
            torch.testing.assert_close(a.states, c.states, rtol=1e-3, atol=1e-4)


def test_a_captured_step_reads_the_weights_of_its_time():
    made = backbone(dtype="float32")
    options = {"max_new_tokens": 12, "temperature": 0.0}
    with made.role("policy"):
        before = sampler.sample(made, PROMPTS, **options)
        for name, parameter in made.role_parameters("policy"):
            if "lora_B" in name:
                parameter.data.mul_(-3)
        after = sampler.sample(made, PROMPTS, **options)
        ids = torch.tensor([PROMPTS[0] + after[0].ids], device=made.device)
        greedy = made.causal(input_ids=ids).logits[0, len(PROMPTS[0]) - 1 : -1].argmax(-1)
    assert [row.ids for row in before] != [row.ids for row in after]
    assert greedy.tolist() == after[0].ids


class Stopped(Exception):
    """Stands for the process's end."""


@pytest.mark.parametrize("sets", [FLOAT32, NF4], ids=["float32", "nf4"])
def test_a_run_repeats_and_goes_on_to_the_same_bits(sets, tmp_path, monkeypatch):
    killed.write(tmp_path)
    recipe = killed.recipe(tmp_path, *sets)
    for name in ("whole", "again"):
        pipeline.run(copy.deepcopy(recipe), tmp_path / name)
    whole = killed.bits(tmp_path / "whole")
    assert killed.bits(tmp_path / "again") == whole
    own = CheckpointCallback.save

    def save(self, trainer, notes=None):
        own(self, trainer, notes)
        if self.name == "ppo" and trainer.state.global_step == 4:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointCallback, "save", save)
        with pytest.raises(Stopped):
            pipeline.run(copy.deepcopy(recipe), tmp_path / "stopped")
    pipeline.run(copy.deepcopy(recipe), tmp_path / "stopped")
    assert killed.bits(tmp_path / "stopped") == whole


def test_adapters_load_with_plain_peft(tmp_path):
    killed.write(tmp_path)
    recipe = killed.recipe(tmp_path, *FLOAT32)
    pipeline.run(recipe, tmp_path / "run", until="sft")
    base = AutoModelForCausalLM.from_pretrained(recipe.model.id).to("cuda")
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapters" / "sft").eval()
    made = Backbone.load(recipe.model, recipe.lora)
    adapters.load_role(made, "policy", tmp_path / "run" / "adapters" / "sft")
    ids = torch.tensor([[5, 6, 7, 8]], device="cuda")
    with torch.no_grad(), made.role("policy"):
        torch.testing.assert_close(
            model(input_ids=ids).logits, made.causal(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
