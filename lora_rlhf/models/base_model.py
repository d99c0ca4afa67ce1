# SPDX-License-Identifier: Apache-2.0
"""The frozen base model: found, loaded once, quantised, named; and the layout of its tokens."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from lora_rlhf.data import chat_template, tokenization  # installed: before anything of transformers
from lora_rlhf.errors import BaseModelError, SetupError, TokenizerError, first_line
from lora_rlhf.recipe.schema import LoraSection, ModelSection
from lora_rlhf.redaction import safe
from lora_rlhf.runtime import optional_packages, paths
from lora_rlhf.runtime.devices import pick_device, pick_dtype
from lora_rlhf.runtime.oom import BatchSizeBackoff

from .fingerprints import fingerprint

DROPOUTS = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout",
            "dropout", "activation_dropout", "layerdrop", "attention_probs_dropout_prob",
            "hidden_dropout_prob", "classifier_dropout", "token_dropout")  # fmt: skip
"""Keys of configs that hold a dropout; all are 0 here."""

_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<unk>")


@dataclass
class BaseModel:
    """A causal language model with its tokenizer, frozen.

    Attributes:
        causal: The base model with its LM head; its tensors exist once.
        tokenizer: With a pad token apart from eos, padding on the left.
        source: Where the weights came from and their licence, for the record.
        backoff: Limits of batch sizes since memory ran out.
    """

    causal: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model_section: ModelSection
    lora_section: LoraSection
    source: dict[str, Any]

    def __post_init__(self) -> None:
        self.backoff = BatchSizeBackoff()
        self.layers = decoder_layers(self.causal)
        count = math.ceil(len(self.layers) * self.lora_section.top_fraction)
        self.adapted_layers = list(range(len(self.layers) - count, len(self.layers)))
        self.target_modules = linear_names(self.layers, self.lora_section.target_modules)
        self.fingerprint = fingerprint(self.causal)
        self.causal.requires_grad_(False)
        self.causal.eval()

    @classmethod
    def load(cls, model: ModelSection, lora: LoraSection) -> Self:
        """Load base model and tokenizer once, quantised where the recipe says so.

        Raises:
            BaseModelError: The model cannot be found or read, or is no causal language model.
            TokenizerError: There is no pad token apart from eos.
            SetupError: 4-bit was asked for and bitsandbytes cannot be used.
        """
        where = _locate(model)
        source = _source(where, model)
        device, dtype = pick_device(), pick_dtype(model.dtype)
        plain: dict[str, Any] = {"revision": model.revision, "trust_remote_code": False}
        options = {**plain, "use_safetensors": True}  # else it reads pickles where there are none
        if model.load_in_4bit:
            options["quantization_config"] = nf4(dtype)
        try:
            config = AutoConfig.from_pretrained(where, **plain)
            tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left", **plain)
            for name in DROPOUTS:
                if isinstance(getattr(config, name, None), float):
                    setattr(config, name, 0.0)
            causal = AutoModelForCausalLM.from_pretrained(
                where, config=config, dtype=dtype, device_map={"": device}, **options
            )
        except torch.OutOfMemoryError:  # the model is fine
            raise
        except Exception as error:  # whatever the libraries raise: a truncated file is their own
            if "gated repo" in str(error):
                raise BaseModelError(
                    f"{model.id} is gated, and this token is not on its list",
                    expected="a base that may be read, or whose terms were accepted",
                    remedy="accept them on its page on the Hub, then `hf auth login`, or give "
                    "HF_TOKEN of who did",
                ) from error
            raise BaseModelError(
                f"cannot load {model.id}: {first_line(error)}",
                expected="a causal language model, complete: `tiny`, a local folder, or a Hub id",
                remedy="check model.id, and a folder's files against the original; a folder beside "
                "the recipe is written ./folder; without a network, give a local folder; only "
                "safetensors are read, and code beside them is never run",
            ) from error
        chat_template.check(tokenizer)
        for named in (causal, causal.config, tokenizer):  # trackers and the tokenizer write it down
            named.name_or_path = safe(where)
        causal.loaded_from = where  # for adapters on this disk, where ~ would be no path
        if model.load_in_4bit:
            _settle_4bit(causal)
        _distinct_pad(tokenizer, causal)
        _within_rows(tokenizer, causal)
        return cls(causal, tokenizer, model, lora, source)

    @property
    def device(self) -> torch.device:
        """Where the backbone lives."""
        device: torch.device = self.causal.device
        return device

    @property
    def decoder(self) -> nn.Module:
        """Tokens to hidden states: the base model without its LM head."""
        decoder: nn.Module = self.causal.base_model
        return decoder

    @property
    def eos_ids(self) -> list[int]:
        """Every id that ends a completion: the tokenizer's first, then the model's."""
        ids = self.causal.generation_config.eos_token_id
        declared = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        own = self.tokenizer.eos_token_id
        return [own, *(i for i in declared if i != own)]

    def describe(self) -> dict[str, Any]:
        """What the record says of the base model."""
        template = self.tokenizer.chat_template
        text = template if isinstance(template, str) else json.dumps(template)
        return {
            "id": safe(self.model_section.id),
            "hub_id": self.model_section.hub_id,
            "revision": None
            if _is_local(self.model_section)
            else getattr(self.causal.config, "_commit_hash", None) or self.model_section.revision,
            "fingerprint": self.fingerprint,
            "dtype": str(self.causal.dtype).removeprefix("torch."),
            "load_in_4bit": self.model_section.load_in_4bit,
            "parameters": self.causal.num_parameters(),
            "layers": len(self.layers),
            "hidden_size": self.causal.config.get_text_config().hidden_size,
            "chat_template_sha256": hashlib.sha256(text.encode()).hexdigest() if template else None,
            "eos_ids": self.eos_ids,
            "pad_id": self.tokenizer.pad_token_id,
            **self.source,
            **(
                {"chat_template_note": note} if (note := chat_template.note(self.tokenizer)) else {}
            ),
        }

    def encode_prompt(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Ids of a prompt, up to where the model has to answer; as TRL's rollouts tokenise it."""
        return tokenization.prompt_ids(self.tokenizer, [prompt])[0].tolist()

    def encode_completion(self, completion: str | list[dict[str, str]]) -> list[int]:
        """Ids of a completion and the eos: just what the policy would have to sample.

        SFT, reward model and PPO all use this layout, so the reward model reads its score at the
        same token in training and in PPO. Control tokens written in the text stay text.
        """
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        return [
            *tokenization.completion_ids(self.tokenizer, [text])[0],
            self.tokenizer.eos_token_id,
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def cut_at_eos(self, ids: list[int]) -> list[int]:
        """Everything up to the first eos."""
        ends = [ids.index(eos) for eos in self.eos_ids if eos in ids]
        return ids[: min(ends) + 1] if ends else ids


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, longest), padded on the left; the mask is by length, never by id."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _locate(model: ModelSection) -> str:
    if model.id == "tiny":
        from lora_rlhf import tiny

        return str(tiny.path())
    path = Path(os.path.expanduser(model.id))
    if path.is_absolute() or model.id.startswith("."):
        if not os.path.isfile(path / "config.json"):
            raise BaseModelError(
                f"{model.id} holds no config.json",
                expected="a folder saved by transformers",
                remedy="check model.id",
            )
    if path.is_dir():  # where transformers finds it, too
        paths.reject_escaping_links(path, BaseModelError)
        paths.reject_escaping_shards(path, BaseModelError)
    return str(path) if path.is_absolute() or model.id.startswith(".") else model.id


def _is_local(model: ModelSection) -> bool:
    """Whether transformers takes the id for a folder, which has no revision."""
    return model.id == "tiny" or os.path.isdir(os.path.expanduser(model.id))


def _source(where: str, model: ModelSection) -> dict[str, Any]:
    """Where the weights came from and their licence; SOURCE.json beside them says so, if any."""
    if model.id == "tiny":
        return {"source": "the tiny model packaged with lora-rlhf", "license": "apache-2.0"}
    note = Path(where) / "SOURCE.json"
    if os.path.isfile(note):
        try:
            found = json.loads(note.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError(f"a JSON {type(found).__name__}")
        except (OSError, ValueError, RecursionError) as error:
            raise BaseModelError(
                f"cannot be read: {first_line(error)}",
                where=str(note),
                expected="a JSON object with source and license, in UTF-8",
                remedy="mend the file, or remove it: it only says where the weights came from",
            ) from None
        return {
            "license": None,
            **{k: found[k] for k in ("source", "license", "sha256", "original") if k in found},
        }
    return {"source": "local folder" if _is_local(model) else "Hub", "license": None}


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """How a base is quantised: NF4, its scales quantised too, computing in `dtype`.

    Raises:
        SetupError: bitsandbytes is not there.
    """
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise SetupError(
            f"model.load_in_4bit needs bitsandbytes: "
            f"{optional_packages.BROKEN.get('bitsandbytes') or error}",
            remedy="pip install bitsandbytes, or set model.load_in_4bit to false",
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _settle_4bit(causal: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking weights on the first no-grad forward (its AVX512-BF16 path).

    The repacked weights cannot be dequantised for backward: gradients after it are wrong, silently.
    """
    import bitsandbytes as bnb

    for module in causal.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _distinct_pad(tokenizer: PreTrainedTokenizerBase, causal: PreTrainedModel) -> None:
    """Give tokenizer and model a pad token that is no eos, without resizing the vocabulary."""
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            "the tokenizer has no eos token", remedy="use a base whose tokenizer has one"
        )
    declared = causal.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *([declared] if isinstance(declared, int) else declared or [])}
    rows = causal.get_input_embeddings().num_embeddings
    if (
        tokenizer.pad_token_id is None
        or tokenizer.pad_token_id in eos
        or tokenizer.pad_token_id >= rows
    ):
        reserved = [
            t.content for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special
        ]
        vocabulary = tokenizer.get_vocab()
        taken = {tokenizer.bos_token, tokenizer.eos_token}
        template = _template_text(tokenizer)
        free = [
            name
            for name in [*(n for n in _PAD_NAMES if n in vocabulary), *reserved]
            if name not in taken
            and name not in template
            and vocabulary[name] not in eos
            and vocabulary[name] < rows
        ]
        if not free:
            raise TokenizerError(
                f"the pad token is {tokenizer.pad_token!r} and eos is {tokenizer.eos_token!r}",
                expected="a pad token of its own: the reward is read at the last token but pads",
                remedy="set tokenizer.pad_token to an unused token, saved beside the base model",
            )
        tokenizer.pad_token = free[0]
    causal.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    causal.generation_config.pad_token_id = tokenizer.pad_token_id


def _within_rows(tokenizer: PreTrainedTokenizerBase, causal: PreTrainedModel) -> None:
    """Refuse tokens that were added behind the last row of the embedding, and that can occur.

    A text is kept free of special tokens, so one that no template writes does no harm.
    """
    rows, template = causal.get_input_embeddings().num_embeddings, _template_text(tokenizer)
    bad = [
        token.content
        for index, token in tokenizer.added_tokens_decoder.items()
        if index >= rows and (not token.special or token.content in template)
    ]
    if bad or tokenizer.eos_token_id >= rows:
        raise TokenizerError(
            f"the tokenizer has {(bad or [tokenizer.eos_token])[0]!r}, and the embedding of the "
            f"model, of {rows} rows, has no row for it",
            expected="a tokenizer of this model: every token has its row",
            remedy="use the tokenizer that the model was trained with, or resize and train the "
            "embedding before this",
        )


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template and what it makes of a chat: some put markers together from the roles."""
    if not isinstance(tokenizer.chat_template, str):
        return ""
    chat = [{"role": role, "content": ""} for role in ("user", "assistant")]
    try:
        rendered = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # whatever it raises: it takes no such chat, and says so of the data
        rendered = ""
    return tokenizer.chat_template + rendered


def decoder_layers(causal: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers, by its length: every architecture names it as it likes."""
    count = causal.config.get_text_config().num_hidden_layers
    for module in causal.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise BaseModelError(
        f"{type(causal).__name__} has no list of {count} layers", expected="a decoder-only model"
    )


def linear_names(layers: nn.ModuleList, wanted: list[str] | None) -> list[str]:
    """Last names of the linear modules inside the layers, resolved once and passed to every role.

    PEFT's "all-linear" would be resolved per view and adapt the head of some of them.
    """
    found = {
        name.rpartition(".")[2]
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    unknown = set(wanted or ()) - found
    if unknown:
        raise BaseModelError(
            f"lora.target_modules names {sorted(unknown)}", expected=f"some of {sorted(found)}"
        )
    return sorted(wanted or found)
