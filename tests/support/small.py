# SPDX-License-Identifier: Apache-2.0
"""Tiny random models for tests: a base folder per architecture, and backbones on it."""

import atexit
import copy
import functools
import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_rlhf.data.padding import pad_left
from lora_rlhf.models.backbone import ADAPTERS, Backbone
from lora_rlhf.models.base_model import BaseModel
from lora_rlhf.recipe.schema import LoraSection, ModelSection

VOCABULARY = 64
PAD, EOS = 0, 1
_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"  # as Phi-3's does
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

HIDDEN = 64
_HIDDEN = {
    "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
_GROUPED = {**_HIDDEN, "num_key_value_heads": 2}
ARCHITECTURES = {
    "llama": {**_GROUPED, "tie_word_embeddings": True},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "mistral": {**_GROUPED, "sliding_window": 8},
    "gemma2": {**_GROUPED, "head_dim": 16, "final_logit_softcapping": 0.5, "sliding_window": 8},
    "gemma3_text": {**_GROUPED, "head_dim": 16, "sliding_window": 8},
    "phi3": {**_GROUPED, "pad_token_id": PAD},
    "gpt_neox": _HIDDEN,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 64},
}  # fmt: skip
"""model_type -> what makes its config tiny; every one keeps its dropout defaults."""


def with_each(first: object, other: object) -> list[object]:
    """Cases (architecture, value): each with the first value, Llama with both; the rest is slow."""
    return [
        pytest.param(name, value, marks=[pytest.mark.slow] * (value is other and name != "llama"))
        for value in (first, other)
        for name in ARCHITECTURES
    ]


NO_TOKEN_CLASS = ("opt", "gemma3_text")
"""Those whose value head sits in their sequence class."""

EPISODES = [([5, 6, 7], [8, 9, EOS]), ([5, 6, 7, 10, 11], [8, EOS]), ([12], [13, 14, 15, 16, EOS])]
"""Prompts and completions of different lengths, the last one without room for padding errors."""


@functools.cache
def _home() -> Path:
    home = Path(tempfile.mkdtemp(prefix="lora-rlhf-small-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home


def tokenizer(
    pad: str | None = "<pad>",
    words: tuple[str, ...] = ("<pad>", "</s>", "<unk>"),
    markers: tuple[str, ...] = ("<user>", "<assistant>"),
) -> PreTrainedTokenizerFast:
    """A word a token: `w5` is id 5. The markers of the chat template have the last ids."""
    names = [*words, *(f"w{i}" for i in range(len(words), VOCABULARY - len(markers)))]
    inner = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token=words[-1]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([n for n in [*words, *markers] if n.startswith("<")])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, eos_token="</s>", unk_token=words[-1]
    )
    made.chat_template = _TEMPLATE if markers else None
    return made


@functools.cache
def base_folder(name: str = "llama", seed: int = 0, **overrides: object) -> Path:
    """A saved random model with its tokenizer; made once per session."""
    folder = _home() / f"{name}-{len(list(_home().iterdir()))}"
    options = {
        "vocab_size": VOCABULARY,
        "pad_token_id": PAD,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        **ARCHITECTURES[name],
        **overrides,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options))
        # The default std of 0.02 leaves logits, and so every difference, near 0.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.15)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def with_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, **overrides: object) -> Path:
    """A base saved in `folder` with another tokenizer beside its weights."""
    AutoModelForCausalLM.from_pretrained(base_folder(**overrides)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def base(folder: str | Path, **model: object) -> BaseModel:
    """The base in a folder, without any role."""
    return BaseModel.load(ModelSection(id=str(folder), **model), LoraSection())


def active(backbone: Backbone) -> str | None:
    """Return the role whose adapter is active in every layer; None for the base model."""
    names = {tuple(layer.active_adapters) for layer in backbone._lora_layers()}
    assert len(names) <= 1, f"layers disagree on the active adapter: {sorted(names)}"
    adapter = names.pop() if names else ()
    return next((role for role, name in ADAPTERS.items() if (name,) == adapter), None)


_BACKBONES: dict[tuple[object, ...], Backbone] = {}


def backbone(
    name: str = "llama",
    *roles: str,
    folder: str | Path | None = None,
    r: int = 4,
    alpha: int = 8,
    top_fraction: float = 1.0,
    target_modules: list[str] | None = None,
    dtype: str = "float32",
    load_in_4bit: bool = False,
    hub_id: str | None = None,
    **overrides: object,
) -> Backbone:
    """A backbone with these roles, each of them nudged off the identity so that all differ.

    Adding a role takes PEFT longer than copying the whole: backbones on the bases of this file are
    made once for each last `torch.manual_seed`, from which their adapters are drawn, and copied.
    """
    model = ModelSection(
        id=str(folder or base_folder(name, **overrides)),
        dtype=dtype,
        load_in_4bit=load_in_4bit,
        hub_id=hub_id,
    )
    lora = LoraSection(r=r, alpha=alpha, top_fraction=top_fraction, target_modules=target_modules)
    if folder or load_in_4bit:
        return _backbone(model, lora, roles)
    seed = torch.initial_seed()
    key = (model.model_dump_json(), lora.model_dump_json(), roles, seed)
    if key not in _BACKBONES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _BACKBONES[key] = _backbone(model, lora, roles)
    return copied(_BACKBONES[key])


def copied(made: Backbone) -> Backbone:
    """A copy; most of its time would go into thousands of modules' dictionaries without hooks."""
    memo: dict[int, object] = {}
    seen: set[torch.nn.Module] = set()
    for view in (made.causal, *made.views.values()):
        for _, module in view.named_modules(seen):
            memo |= {id(d): OrderedDict() for d in vars(module).values() if d == OrderedDict()}
    return copy.deepcopy(made, memo)


def _backbone(model: ModelSection, lora: LoraSection, roles: tuple[str, ...]) -> Backbone:
    made = Backbone.load(model, lora)
    for role in roles:
        made.add_role(role)
    nudge(made, *roles)
    return made


@torch.no_grad()
def nudge(made: Backbone, *roles: str, std: float = 0.1) -> None:
    """Move the LoRA of each role away from the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(made.views))
        for role in roles:
            for name, parameter in made.role_parameters(role):
                if "lora_B" in name:
                    parameter.normal_(std=std)


def batch(made: Backbone, episodes=EPISODES) -> dict[str, torch.Tensor]:
    """The episodes as one left-padded batch."""
    ids, mask = pad_left([p + c for p, c in episodes], made.tokenizer.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}
