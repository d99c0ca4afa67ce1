# SPDX-License-Identifier: Apache-2.0
"""Head classes for architectures that have none."""

import pytest
import small
from transformers import XGLMConfig, XGLMForCausalLM

from lora_rlhf.errors import BaseModelError
from lora_rlhf.models.views import build_view


def test_an_architecture_without_a_head_class_is_refused():
    config = XGLMConfig(vocab_size=16, d_model=8, attention_heads=2, ffn_dim=8, num_layers=1)
    with pytest.raises(BaseModelError, match="no class with a head"):
        build_view(XGLMForCausalLM(config), per_token=False)


def test_an_error_without_a_message_is_named_by_its_class(monkeypatch):
    def fail(*_, **__):
        raise ValueError

    base = small.base(small.base_folder())
    monkeypatch.setattr(
        "lora_rlhf.models.views.AutoModelForSequenceClassification.from_config", fail
    )
    with pytest.raises(BaseModelError, match="no class with a head: ValueError"):
        build_view(base.causal, per_token=False)
