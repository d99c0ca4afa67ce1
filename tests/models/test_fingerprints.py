# SPDX-License-Identifier: Apache-2.0
"""A base is recognised by its tensors, in any dtype, whatever adapters it carries."""

import weakref

import numpy as np
import pytest
import small
import torch
from torch import nn

from lora_rlhf.models import adapters, fingerprints
from lora_rlhf.models.fingerprints import fingerprint, nearly_same, sample


def test_the_fingerprint_knows_the_base_and_only_the_base():
    backbone = small.backbone()
    before = backbone.fingerprint
    assert small.base(small.base_folder()).fingerprint == before
    backbone.add_role("policy")
    backbone.add_role("value")
    small.nudge(backbone, "policy", "value")
    assert fingerprint(backbone.causal) == before, "adapters are not the base"
    assert small.base(small.base_folder(seed=1)).fingerprint != before
    assert small.base(small.base_folder(), load_in_4bit=True).fingerprint != before
    with torch.no_grad():
        backbone.layers[1].mlp.up_proj.base_layer.weight += 1e-6
    assert fingerprint(backbone.causal) != before


def test_the_fingerprint_samples_every_column():
    """A step that divides the row's length would sample only a few columns of a large matrix."""
    matrix = nn.Linear(4096, 64, bias=False)
    before = fingerprint(matrix)
    with torch.no_grad():
        matrix.weight[:, 3] += 1
    assert fingerprint(matrix) != before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_is_recognised_in_another_dtype(dtype):
    here = sample(small.base(small.base_folder()).causal)
    there = small.base(small.base_folder(), dtype=dtype)
    assert there.fingerprint != small.base(small.base_folder()).fingerprint  # values are rounded
    assert nearly_same(here, there.causal)
    assert not nearly_same(here, small.base(small.base_folder(seed=1), dtype=dtype).causal)


def test_weights_of_a_base_are_sampled_once(monkeypatch, tmp_path):
    """A base that processes share would be put together for each adapter that is saved."""
    monkeypatch.setattr(
        fingerprints, "sample", lambda causal, own=sample: calls.append(own(causal))
    )
    calls: list = []
    backbone = small.backbone("llama", "policy", "reference")
    for role in ("policy", "reference"):
        adapters.save_role(backbone, role, tmp_path / role)
    assert len(calls) == 1


def test_matrices_that_processes_share_are_put_together_one_at_a_time():
    class Piece:
        made: list = []

        def __init__(self, weight):
            self.values = weight.detach().numpy().copy()

        def whole(self):
            assert all(ref() is None for ref in Piece.made), "another matrix is still whole"
            array = np.copy(self.values)
            Piece.made.append(weakref.ref(array))
            return torch.from_numpy(array)

    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    before = fingerprint(layers), sample(layers)
    for layer in layers:
        layer.weight.piece = Piece(layer.weight)
        layer.weight.data = torch.full((1,), torch.nan).expand(4, 4)
    assert (fingerprint(layers), sample(layers)) == before
    assert len(Piece.made) == 6
