# SPDX-License-Identifier: Apache-2.0
"""What this machine can do, in words for a bug report; nothing secret and no path is in it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform

_FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "CUDA_VISIBLE_DEVICES")
_PRESENT = ("HF_TOKEN", "LORA_RLHF_DATA", "HF_HOME", "HF_ENDPOINT")


def describe() -> dict[str, str]:
    """Versions, device, dtype, 4-bit, and the settings that change what happens."""
    found = dict(versions())
    found["python"] = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    found["cores"] = str(os.cpu_count())
    found |= _devices()
    found |= {name: os.environ[name] for name in _FLAGS if name in os.environ}
    found |= {name: "set" if os.environ.get(name) else "not set" for name in _PRESENT}
    return found


def _devices() -> dict[str, str]:
    try:
        import torch

        from .devices import pick_device, pick_dtype
    except (ImportError, OSError) as error:
        return {"device": f"unknown: {_first_line(error)}"}
    device = pick_device()
    found = {"device": str(device), "dtype auto": str(pick_dtype("auto")).split(".")[-1]}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found["gpu"] = (
            f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB, "
            f"compute capability {facts.major}.{facts.minor}, CUDA {torch.version.cuda}"
        )
    found["4-bit"] = _four_bit(device)
    try:
        from lora_rlhf import _trl  # noqa: F401

        found["trl fits"] = "yes"
    except Exception as error:
        found["trl fits"] = f"no: {_first_line(error)}"
    return found


def _four_bit(device: object) -> str:
    """Quantise a small tensor: importing bitsandbytes alone proves nothing."""
    try:
        import bitsandbytes.functional as quantisation
        import torch

        packed, state = quantisation.quantize_4bit(
            torch.linspace(-1, 1, 4096, device=str(device)), quant_type="nf4"
        )
        back = quantisation.dequantize_4bit(packed, state)
    except Exception as error:
        from .optional_packages import BROKEN

        why = BROKEN.get("bitsandbytes") or _first_line(error)
        return f"no: {type(error).__name__}: {why}"
    return "yes" if back.isfinite().all() else "no: NaN after quantising"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_PACKAGES = ("lora-rlhf", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate",
             "datasets", "huggingface_hub")  # fmt: skip


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide what a run computes."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def changed_versions(before: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """Those of the versions `now` that are not those of `before`."""
    return {name: found for name, found in now.items() if before.get(name) != found}
