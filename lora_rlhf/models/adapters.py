# SPDX-License-Identifier: Apache-2.0
"""Adapter folders: a role saved as a plain PEFT adapter that loads without this package.

adapter_config.json, adapter_model.safetensors    at the folder's root, as PEFT expects
tokenizer files                                   with the pad token of the role's training
check.json                                        ids, and the outputs plain PEFT gives for them
reward.json                                       reward roles: {"reward_offset", "pad_token_id",
                                                  "stacked" (adapters side by side in one), …}
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lora_rlhf.data.padding import pad_left
from lora_rlhf.errors import AdapterError, NonFiniteError
from lora_rlhf.runtime import paths

from . import fingerprints
from .backbone import ADAPTERS, REWARDS, Backbone
from .base_model import BaseModel
from .views import has_token_class

_LARGEST_OFFSET = 1e30
_log = logging.getLogger(__name__)
_OTHER_LORA = "use the lora: section of the adapter's training"
_CHECK_KEYS = {"base_fingerprint": str, "dtype": str, "load_in_4bit": bool, "base_sample": list,
               "expected": dict, "atol": float | int}  # fmt: skip
"""Keys of `check.json` that are read, and their types."""
_CHECK_TEXTS = ("The record does not say.", "Hello! How can I help you today?")


def save_role(backbone: Backbone, role: str, folder: str | Path) -> Path:
    """Save one role's adapter and head to `folder` atomically, and return the folder.

    PEFT's own `save_pretrained` would write every role's LoRA into the file (it filters by the
    view's adapters, and other views' adapters live in the same layers) and put adapters that are
    not called "default" into a sub-folder.

    Raises:
        NonFiniteError: A tensor holds NaN or infinity; nothing is written.
        AdapterError: The number of tensors does not fit the adapter's shape.
    """
    folder = Path(folder)
    weights = _weights(backbone, role)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        # `save_file` would make a file that only its owner may read.
        (temporary / "adapter_model.safetensors").write_bytes(weights)
        _config(backbone, role).save_pretrained(str(temporary))
        backbone.tokenizer.save_pretrained(str(temporary))
        _write_json(temporary / "check.json", expected_outputs(backbone, role))
        if note := _head_note(backbone, role):
            _write_json(temporary / "reward.json", note)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # tokenizers and safetensors have no OSError: "No space left on device (os error 28)".
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from None
        raise
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    return folder


def _weights(backbone: Backbone, role: str) -> bytes:
    """Return the content of adapter_model.safetensors."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in backbone.role_parameters(role)}
    if bad := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise NonFiniteError(
            f"{role}: {len(bad)} tensors hold NaN or infinity, the first is {bad[0]}",
            remedy="a broken adapter is never saved; lower the learning rate",
        )
    names = [name for name, _ in backbone.causal.named_parameters() if ".lora_" in name]
    adapted = {name.rsplit(".lora_", 1)[0] for name in names}
    expected = 2 * len(adapted) + sum("lora_" not in name for name in tensors)
    if len(tensors) != expected:
        raise AdapterError(f"{role} has {len(tensors)} tensors", expected=f"{expected}")
    return save(tensors, metadata={"format": "pt"})


def as_files(backbone: Backbone, role: str) -> dict[str, bytes]:
    """Return PEFT's two files of a role as name -> content, for another process.

    Raises:
        NonFiniteError: A tensor holds NaN or infinity.
        AdapterError: The number of tensors does not fit the adapter's shape.
    """
    config = _config(backbone, role).to_dict()
    text = json.dumps(config, default=sorted, sort_keys=True)
    return {
        "adapter_config.json": text.encode(),
        "adapter_model.safetensors": _weights(backbone, role),
    }


def _config(backbone: Backbone, role: str) -> Any:
    """Return the PEFT config to save, which names the base's Hub id or else its local folder."""
    config = copy.copy(backbone.views[role].peft_config[ADAPTERS[role]])
    where = backbone.model_section.hub_id or getattr(backbone.causal, "loaded_from", None)
    if where:  # the config in memory has no local path, because trackers upload it
        config.base_model_name_or_path = where
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set's order differs by process
    return config


def _head_note(backbone: Backbone, role: str) -> dict[str, Any]:
    """Return the content of `reward.json`; empty for a role without a head."""
    note: dict[str, Any] = {"pad_token_id": backbone.tokenizer.pad_token_id}
    if role in REWARDS:
        return {
            "reward_offset": backbone.reward_offset.get(role, 0.0),
            **note,
            "head": "score, no bias; reward = logits + reward_offset",
            "stacked": backbone.stacked(role),
        }
    if role != "value":
        return {}
    head = "per token, with a bias"
    if not has_token_class(backbone.causal):
        head += "; this architecture has no token class, plain PEFT drops the bias"
    return {**note, "head": head}


@torch.no_grad()
def load_role(backbone: Backbone, role: str, folder: str | Path) -> None:
    """Load a folder of `save_role`, or a plain PEFT adapter of the same shape, into a role.

    Raises:
        AdapterError: The folder or a tensor is missing, unreadable, of another shape or scale,
            not finite, trained on another base, or without the role's head. The role is unchanged.
    """
    tensors, stacked, offset = read_role(backbone, role, folder)
    path = Path(folder) / "adapter_model.safetensors"
    is_new = not backbone.has(role)
    if is_new:
        backbone.add_role(role, stacked=stacked)
    parameters = dict(backbone.role_parameters(role))
    try:
        _check_tensors(tensors, parameters, role, path)
    except AdapterError:
        if is_new:
            backbone.drop_role(role)
        raise
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
    if not any(bool(t.any()) for name, t in tensors.items() if "lora_B" in name):
        _log.warning(
            "%s changes nothing: every lora_B in it is 0, so the %s is the base model; was its "
            "learning rate 0, or was it saved before its training?",
            path,
            role,
        )
    if offset is not None:
        backbone.reward_offset[role] = offset


def read_role(
    backbone: Backbone, role: str, folder: str | Path
) -> tuple[dict[str, Tensor], int, float | None]:
    """Read a folder for `load_role`; return its tensors, stacked adapters, and reward offset.

    Raises:
        AdapterError: As `load_role`, as far as it can be told without adding the role.
    """
    folder = Path(folder)
    path = folder / "adapter_model.safetensors"
    paths.reject_escaping_links(folder, AdapterError)
    if not path.is_file() or not (folder / "adapter_config.json").is_file():
        raise AdapterError(
            f"{folder} holds no adapter",
            expected="adapter_config.json and adapter_model.safetensors; never a pickle (.bin)",
            remedy="check the path; a stage that was interrupted leaves none",
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{path} cannot be read: {error}", remedy="train the stage again"
        ) from None
    check_base(backbone, folder)
    stacked, offset = _read_note(folder, role)
    _check_scale(backbone, folder, stacked)
    return tensors, stacked, offset


def _read_note(folder: Path, role: str) -> tuple[int, float | None]:
    """Read from `reward.json` how many adapters are stacked, and the offset if there is one."""
    note = _read_json(folder / "reward.json")
    stacked = note.get("stacked", 1) if role in REWARDS else 1
    if stacked not in range(1, len(REWARDS)):
        raise AdapterError(
            f"{folder}: reward.json has stacked {stacked}", expected=f"1 to {len(REWARDS) - 1}"
        )
    if "reward_offset" not in note:
        return stacked, None
    offset = note["reward_offset"]
    is_number = isinstance(offset, int | float) and not isinstance(offset, bool)
    if not is_number or not abs(offset) < _LARGEST_OFFSET:
        raise AdapterError(
            f"{folder}: reward.json has reward_offset {offset!r:.80}",
            expected="a finite number",
            remedy="restore the original file: rewards are counted from this offset",
        )
    return stacked, float(offset)


def check_base(backbone: BaseModel, folder: Path) -> None:
    """Check that the adapter was trained on this base, in any dtype, equally quantised."""
    check = read_check(folder)
    if check.get("base_fingerprint", backbone.fingerprint) == backbone.fingerprint:
        return
    now = backbone.is_4bit
    then = check.get("load_in_4bit", now)
    if now != then:
        raise AdapterError(
            f"{folder} was trained with load_in_4bit {then}, and this base has {now}",
            expected=f"model.load_in_4bit: {str(then).lower()}",
            remedy="load the base with this setting; quantisation changes an adapter's outputs",
        )
    dtype = str(backbone.causal.dtype).removeprefix("torch.")
    known = check.get("base_sample")
    if known and check.get("dtype") != dtype and fingerprints.nearly_same(known, backbone.causal):
        return
    raise AdapterError(
        f"{folder} was made on another base model",
        expected=f"base fingerprint {backbone.fingerprint[:12]}",
        remedy="load the base named in its adapter_config.json",
    )


def _check_scale(backbone: Backbone, folder: Path, stacked: int) -> None:
    """Check the LoRA scale, which the shapes of the tensors do not show."""
    config = _read_json(folder / "adapter_config.json")
    alpha = stacked * backbone.lora_section.alpha
    expected = {"lora_alpha": alpha, "use_rslora": False, "alpha_pattern": {}}
    for key, value in expected.items():
        if (config.get(key) or value) != value:
            given = f"{folder} has {key} {config[key]}"
            raise AdapterError(given, expected=f"{key} {value}", remedy=_OTHER_LORA)


def _check_tensors(
    tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], role: str, path: Path
) -> None:
    missing = sorted(parameters.keys() - tensors.keys())
    extra = sorted(tensors.keys() - parameters.keys())
    if missing or extra:
        name, what = (missing[0], "lacks") if missing else (extra[0], "has an unknown")
        headless = bool(missing) and all("lora_" not in n for n in missing)
        raise AdapterError(
            f"{path} {what} {name}",
            expected=f"the {len(parameters)} tensors of a {role} adapter",
            remedy="a reward or value adapter must be saved with its head (modules_to_save)"
            if headless
            else _OTHER_LORA,
        )
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            if "lora_" not in name and tensors[name].shape[1:] == parameter.shape[1:]:
                raise AdapterError(
                    f"{path}: its head {name} gives {tensors[name].shape[0]} numbers",
                    expected=f"{parameter.shape[0]}: one score, which grows with the quality",
                    remedy="train the reward model with num_labels=1",
                )
            raise AdapterError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}",
                expected=f"{tuple(parameter.shape)}",
                remedy=_OTHER_LORA,
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise AdapterError(
                f"{path}: {name} holds NaN or infinity", remedy="train the stage again"
            )


@torch.no_grad()
def expected_outputs(backbone: Backbone, role: str) -> dict[str, Any]:
    """Compute `check.json`: ids with and without padding, and the outputs plain PEFT must give."""
    rows = [backbone.encode_completion(text) for text in _CHECK_TEXTS]
    ids, mask = pad_left(rows, backbone.tokenizer.pad_token_id)
    view = backbone.views[role]
    with backbone.role(role):
        batch = {"input_ids": ids.to(backbone.device), "attention_mask": mask.to(backbone.device)}
        padded = view(**batch).logits.float().cpu()
        if role in REWARDS:
            key, outputs = "score", padded[:, 0].tolist()
        elif role == "value":
            # (B, L, 1), or (B, 1) at the last token from a sequence class; rows are padded left.
            key, outputs = "value_last", padded.reshape(len(rows), -1)[:, -1].tolist()
        else:
            key, outputs = "logits_last", padded[:, -1, :8].tolist()
    return {
        "role": role,
        "base_fingerprint": backbone.fingerprint,
        "dtype": str(backbone.causal.dtype).removeprefix("torch."),
        "load_in_4bit": backbone.is_4bit,
        "base_sample": backbone.base_sample,
        "input_ids": ids.tolist(),
        "attention_mask": mask.tolist(),
        "pad_token_id": int(backbone.tokenizer.pad_token_id),
        "expected": {key: outputs},
        "atol": 1e-5 if backbone.causal.dtype == torch.float32 else 0.1,
    }


def read_check(folder: Path) -> dict[str, Any]:
    """Read the `check.json` of an adapter folder; empty if there is none.

    Raises:
        AdapterError: A key is missing, or of another type.
    """
    check = _read_json(folder / "check.json")
    for key, kind in _CHECK_KEYS.items() if check else ():
        if not isinstance(check.get(key), kind):
            raise AdapterError(
                f"{folder / 'check.json'} has {key} {check.get(key)!r:.80}",
                remedy="restore the original file, or remove it",
            )
    return check


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    return data if isinstance(data, dict) else {}
