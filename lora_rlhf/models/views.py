# SPDX-License-Identifier: Apache-2.0
"""Hugging Face head classes that share the backbone's tensors and add only a head.

    score        AutoModelForSequenceClassification   linear head, no bias, read at the last token
    value        AutoModelForTokenClassification      linear head with a bias, at every token

Architectures without a token class (OPT) carry the value head in their sequence class.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

from lora_rlhf.errors import BaseModelError, first_line

_QUANTISATION = ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method")


def has_token_class(causal: PreTrainedModel) -> bool:
    """Tell if transformers has a per-token head class for this architecture."""
    return type(causal.config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING


def build_view(causal: PreTrainedModel, *, per_token: bool) -> PreTrainedModel:
    """Build a head class over the tensors of `causal`, with a new float32 head.

    The head is drawn with std 1/sqrt(d + 1) (2403.17031), its bias is 0, and dropout is 0: token
    classes have 0.1 by default.

    Raises:
        BaseModelError: The architecture has no linear head called score or classifier.
    """
    config = copy.deepcopy(causal.config)
    config.num_labels = 1
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    token = per_token and has_token_class(causal)
    auto = AutoModelForTokenClassification if token else AutoModelForSequenceClassification
    try:
        with torch.device("meta"):
            view: PreTrainedModel = auto.from_config(config)
    except ValueError as error:
        raise BaseModelError(
            f"{type(causal).__name__} has no class with a head: {first_line(error)}",
            expected="an architecture that transformers can classify sequences with",
        ) from error
    setattr(view, view.base_model_prefix, causal.base_model)
    for module in view.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    names = [n for n in ("score", "classifier") if isinstance(getattr(view, n, None), nn.Linear)]
    if not names:
        raise BaseModelError(
            f"{type(view).__name__} has no linear head called score or classifier",
            expected="a decoder-only architecture",
        )
    hidden = getattr(view, names[0]).in_features
    head = nn.Linear(hidden, 1, bias=per_token, device=causal.device, dtype=torch.float32)
    nn.init.normal_(head.weight, std=1 / math.sqrt(hidden + 1))
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    setattr(view, names[0], head)
    for attribute in _QUANTISATION:
        if hasattr(causal, attribute):
            setattr(view, attribute, getattr(causal, attribute))
    view.generation_config = causal.generation_config
    return view.eval()


def head_wrapper(view: Any) -> Any:
    """Return PEFT's wrapper of a view's head, with `modules_to_save` and the original head."""
    base = view.get_base_model()
    return base.score if hasattr(base, "score") else base.classifier


def to_head_dtype(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast 16-bit hidden states to the head's float32; a forward pre-hook."""
    return (args[0].float(), *args[1:])
