# SPDX-License-Identifier: Apache-2.0
"""Find a base model and load it once: config, tokenizer, weights, 4-bit quantisation, provenance.

Only safetensors are read, and code beside the weights is never run.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import is_offline_mode

from lora_rlhf import tiny
from lora_rlhf.data import chat_template
from lora_rlhf.errors import BaseModelError, SetupError, first_line
from lora_rlhf.recipe.home import expanded
from lora_rlhf.recipe.schema import ModelSection
from lora_rlhf.redaction import safe
from lora_rlhf.runtime import optional_packages, paths
from lora_rlhf.runtime.devices import pick_device, pick_dtype

from . import special_tokens

_DROPOUTS = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout",
             "dropout", "activation_dropout", "layerdrop", "attention_probs_dropout_prob",
             "hidden_dropout_prob", "classifier_dropout", "token_dropout")  # fmt: skip
"""Dropout keys of transformers' configs."""

_POINTER = b"version https://git-lfs"

_FURTHER = {"num_nextn_predict_layers", "mtp_num_hidden_layers"}
"""Keys of configs whose files hold layers that transformers leaves out on purpose."""


def load(
    model: ModelSection, *, on_host: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Load base model and tokenizer, quantised if the recipe says so.

    Args:
        on_host: Load the weights into the host's memory, even if there is a GPU.

    Returns:
        The model, its tokenizer (padding on the left, with a pad token that is not an eos token),
        and the origin of the weights.

    Raises:
        BaseModelError: The model cannot be found or read, or is not a causal language model.
        TokenizerError: No eos, no unused token for padding, or a token without an embedding row.
        SetupError: 4-bit needs bitsandbytes, which cannot be used.
    """
    where = _locate(model)
    source = _source(model)
    device = torch.device("cpu") if on_host else pick_device()
    dtype = pick_dtype(model.dtype)
    plain: dict[str, Any] = {"revision": model.revision, "trust_remote_code": False}
    options = {**plain, "use_safetensors": True}  # never falls back to pickles
    if model.load_in_4bit:
        options["quantization_config"] = nf4(dtype)
    try:
        config = AutoConfig.from_pretrained(where, **plain)
        tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left", **plain)
        disable_dropout(config)
        causal, loading_info = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
            **options,
        )
    except torch.OutOfMemoryError:  # not an error of the model
        raise
    except Exception as error:  # the libraries raise many classes, one only for truncated files
        raise _load_error(model, error, "config.json, tokenizer and safetensors") from error
    if getattr(causal, "_hf_peft_config_loaded", False):
        raise _adapter_error(model)  # of a Hub id; transformers loads one beside the weights too
    _check_weights(model, causal, loading_info)
    notes = _prepared(tokenizer, causal)
    for named in (causal, causal.config, tokenizer):  # trackers and tokenizer files contain it
        named.name_or_path = safe(where)
    folder = local_folder(model)  # absolute, so that adapters on this disk find their base
    causal.loaded_from = os.path.abspath(folder) if folder else where
    if getattr(causal, "is_loaded_in_4bit", False):  # by the recipe or by its own config
        _forbid_repacking(causal)
    if notes:
        source["token_notes"] = notes
    return causal, tokenizer, source


def _check_weights(
    model: ModelSection, causal: PreTrainedModel, loading_info: Mapping[str, Any]
) -> None:
    """Refuse weights that the files lack, which would be random, that they have too many, or NaN.

    Raises:
        BaseModelError: There are such weights.
    """
    layers = causal.config.get_text_config().num_hidden_layers
    beyond = [
        name
        for name in loading_info["unexpected_keys"]
        if (number := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name))
        and int(number[1]) >= layers
    ]
    missing, problem = sorted(loading_info["missing_keys"]), ""
    if missing:
        few = " and ".join(missing[:2])
        problem = f"its files lack {len(missing):,} of its weights, such as {few}"
        if unexpected := sorted(loading_info["unexpected_keys"]):
            problem += f"; they hold others, such as {unexpected[0]}"
    elif beyond and not _FURTHER & {*causal.config.to_dict()}:
        problem = (
            f"its files hold weights of layers beyond its {layers}, such as {sorted(beyond)[0]}"
        )
    else:
        floats = (item for item in causal.named_parameters() if item[1].is_floating_point())
        bad = next((name for name, p in floats if not bool(torch.isfinite(p).all())), "")
        problem = f"its weight {bad} holds NaN or infinity" if bad else ""
    if problem:
        raise BaseModelError(
            f"{model.id}: {problem}",
            expected="weights that belong to its config.json: all of them, finite",
            remedy="compare the folder's files with the original, or save the model again by "
            "save_pretrained (a checkpoint of a trainer may name its weights otherwise)",
        )


def _prepared(tokenizer: PreTrainedTokenizerBase, causal: Any) -> list[str]:
    """Check the chat template, settle eos and pad; return notes on them."""
    chat_template.check(tokenizer)
    notes = [special_tokens.append_nothing(tokenizer), special_tokens.end_turns(tokenizer, causal)]
    special_tokens.ensure_distinct_pad(tokenizer, causal)
    special_tokens.check_embedding_rows(tokenizer, causal)
    return list(filter(None, notes))


def find_tokenizer(model: ModelSection, config: Any) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer as a run does, without the weights.

    Raises:
        BaseModelError: It cannot be found or read.
        TokenizerError: No eos, no unused token for padding, or a token without an embedding row.
    """
    where, plain = _locate(model), {"revision": model.revision, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left", **plain)
    except Exception as error:  # the libraries raise many classes
        raise _load_error(model, error, "tokenizer") from error
    try:
        generation = GenerationConfig.from_pretrained(where, revision=model.revision)
    except Exception:  # many bases have no such file
        generation = GenerationConfig.from_model_config(config)
    rows = SimpleNamespace(num_embeddings=config.get_text_config().vocab_size)
    stand_in = SimpleNamespace(
        config=copy.deepcopy(config),
        generation_config=generation,
        get_input_embeddings=lambda: rows,
    )
    _prepared(tokenizer, stand_in)
    return tokenizer


_NOT_FETCHED = "couldn't connect to"
"""In transformers' message if the Hub cannot be reached, or HF_HUB_OFFLINE is set."""


def _fetch(model: ModelSection, *files: str) -> str:
    """Return the remedy for files of a Hub id that are not in the cache."""
    revision = f" --revision {model.revision}" if model.revision else ""
    offline = "unset HF_HUB_OFFLINE, and " if is_offline_mode() else ""
    command = shlex.join(["hf", "download", model.id, *files])
    return (
        f"{offline}with a network, fetch them into the Hub's cache: `{command}{revision}`; or copy "
        "a folder with them here, and give it as model.id (beside the recipe: ./folder)"
    )


def _load_error(model: ModelSection, error: Exception, needed: str) -> BaseModelError:
    """Return an error for a base of which `needed` could not be loaded."""
    if _NOT_FETCHED in str(error):
        return BaseModelError(
            f"{model.id} is not on this machine, and the Hub was not reached",
            expected=f"its {needed}",
            remedy=f"check model.id; {_fetch(model)}",
        )
    if "gated repo" in str(error):
        return BaseModelError(
            f"{model.id} is gated, and this token is not on its list",
            expected="a base that may be read, or whose terms were accepted",
            remedy="accept its terms on its page on the Hub, then run `hf auth login`, or set "
            "HF_TOKEN to a token of the account that did",
        )
    return BaseModelError(
        f"cannot load {model.id}: {first_line(error)}",
        expected="a causal language model, complete: `tiny`, a local folder, or a Hub id",
        remedy="check model.id, and compare a folder's files with the original; a folder beside "
        "the recipe is written ./folder; without a network, give a local folder; only "
        "safetensors are read, and code beside them is never run",
    )


def _adapter_error(model: ModelSection) -> BaseModelError:
    return BaseModelError(
        f"{model.id} holds an adapter, which transformers would load into the base",
        expected="a whole model, without an adapter beside it",
        remedy="name the adapter's own base as model.id, and the adapter as `sft.from`; or merge "
        "the two; or take adapter_config.json out of a folder that is a whole model",
    )


def local_folder(model: ModelSection) -> str | None:
    """Return the base's folder; None if transformers looks its id up on the Hub."""
    path = str(tiny.path()) if model.id == "tiny" else expanded(model.id)
    return path if os.path.isdir(path) else None


def _locate(model: ModelSection) -> str:
    """Return the checked folder or the Hub id that transformers loads."""
    if model.id == "tiny":
        return str(tiny.path())
    path = Path(expanded(model.id))
    is_path = path.is_absolute() or model.id.startswith(".")
    if (path / "adapter_config.json").is_file():
        raise _adapter_error(model)
    if is_path and not os.path.isfile(path / "config.json"):
        raise BaseModelError(
            f"{model.id} holds no config.json",
            expected="a folder saved by transformers",
            remedy="check model.id; a run finds a base that was moved or renamed together with it",
        )
    if folder := local_folder(model):  # a relative id may be a folder too
        paths.reject_escaping_links(path, BaseModelError)  # before a file is opened
        _reject_pointers(Path(folder))
        paths.reject_escaping_shards(path, BaseModelError)
    return str(path) if is_path else model.id


def _reject_pointers(folder: Path) -> None:
    """Refuse a clone without Git LFS, whose large files are notes of where they are."""
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise BaseModelError(
                    "this is a pointer of Git LFS, not the file itself",
                    where=str(file),
                    expected="the files of a model",
                    remedy="run `git lfs install` and `git lfs pull` in its folder, or download "
                    "it with `hf download`",
                )


def _source(model: ModelSection) -> dict[str, Any]:
    """Return origin and licence of the weights, from SOURCE.json beside them if there is one."""
    if model.id == "tiny":
        return {"source": "the tiny model packaged with lora-rlhf", "license": "apache-2.0"}
    folder = local_folder(model)
    if folder is None:
        return {"source": "Hub", "license": None}
    note = Path(folder) / "SOURCE.json"
    if not os.path.isfile(note):
        return {"source": "local folder", "license": None}
    try:
        facts = json.loads(note.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError(f"a JSON {type(facts).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(
            f"cannot be read: {first_line(error)}",
            where=str(note),
            expected="a JSON object with source and license, in UTF-8",
            remedy="correct the file, or remove it: it only says where the weights came from",
        ) from None
    keys = ("source", "license", "sha256", "original")
    return {"license": None, **{k: facts[k] for k in keys if k in facts}}


def disable_dropout(config: Any) -> None:
    """Set every dropout of a config to 0."""
    for name in _DROPOUTS:
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Configure a 4-bit base: NF4 with double quantisation, computing in `dtype`.

    Raises:
        SetupError: bitsandbytes cannot be imported.
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


def _forbid_repacking(causal: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking weights on the first no-grad forward (its AVX512-BF16 path).

    Repacked weights cannot be dequantised for backward, so that gradients would be silently wrong.
    """
    import bitsandbytes as bnb

    for module in causal.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def find_config(model: ModelSection, recipe_folder: Path | None = None) -> Any:
    """Find the base's config without its weights.

    Tries the base's own folder, the Hub's cache, the recipe's folder (its `config.json` may stand
    in for a base that is not on this machine), and last the Hub.

    Raises:
        BaseModelError: None of them has the config.
    """
    folder = local_folder(model)
    options: dict[str, Any] = {"revision": model.revision, "trust_remote_code": False}
    tries = [(folder or model.id, {**options, "local_files_only": True})]
    beside = None
    if not folder:
        if recipe_folder is not None and (recipe_folder / "config.json").is_file():
            beside = str(recipe_folder)
            tries.append((beside, {"trust_remote_code": False}))
        tries.append((model.id, options))
    why = ""
    for source, given in tries:
        try:
            config = AutoConfig.from_pretrained(source, **given)
        except Exception as error:  # the libraries raise many classes for a missing file
            why = why or first_line(error)
            continue
        if source != beside:
            return config
        written = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
        if (name := str(written.get("_name_or_path", ""))) in ("", model.id):
            return config
        why = f"{source}/config.json belongs to {name}"
    fetch = "allow access to the Hub once"
    if _NOT_FETCHED in why:
        why, fetch = "the Hub was not reached", _fetch(model, "config.json")
    raise BaseModelError(
        f"no config of {model.id} is here: {why}",
        expected="config.json of the base: in its folder, in the Hub's cache, or beside the recipe",
        remedy=f"put the base's config.json beside the recipe, or {fetch}",
    )
