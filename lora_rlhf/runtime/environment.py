# SPDX-License-Identifier: Apache-2.0
"""Versions and devices, for records and bug reports, without secrets and paths."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform

from lora_rlhf.errors import first_line

_FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "CUDA_VISIBLE_DEVICES")
_PRESENT = ("HF_TOKEN", "LORA_RLHF_DATA", "HF_HOME", "HF_ENDPOINT")
_PACKAGES = ("lora-rlhf", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate",
             "datasets", "huggingface_hub")  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of the packages that determine a run's results."""
    installed = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def changed_versions(before: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """Return the versions in `now` that differ from those in `before`."""
    return {name: version for name, version in now.items() if before.get(name) != version}


def describe() -> dict[str, str]:
    """List versions, device, dtype, 4-bit support, and environment variables that matter."""
    return {
        **versions(),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        **_devices(),
        **{name: os.environ[name] for name in _FLAGS if name in os.environ},
        **{name: "set" if os.environ.get(name) else "not set" for name in _PRESENT},
    }


def _devices() -> dict[str, str]:
    try:
        import torch

        from .devices import pick_device, pick_dtype
    except (ImportError, OSError) as error:
        return {"device": f"unknown: {first_line(error)}"}
    device = pick_device()
    facts = {"device": str(device), "dtype auto": str(pick_dtype("auto")).split(".")[-1]}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts["gpu"] = (
            f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, "
            f"compute capability {gpu.major}.{gpu.minor}, CUDA {torch.version.cuda}"
        )
    facts["4-bit"] = _four_bit(device)
    try:
        from lora_rlhf import _trl  # noqa: F401

        facts["trl fits"] = "yes"
    except Exception as error:
        facts["trl fits"] = f"no: {first_line(error)}"
    return facts


def _four_bit(device: object) -> str:
    """Try to quantise a small tensor; bitsandbytes may be importable and still not work."""
    try:
        import bitsandbytes.functional as quantisation
        import torch

        packed, state = quantisation.quantize_4bit(
            torch.linspace(-1, 1, 4096, device=str(device)), quant_type="nf4"
        )
        back = quantisation.dequantize_4bit(packed, state)
    except Exception as error:
        from .optional_packages import BROKEN

        why = BROKEN.get("bitsandbytes") or first_line(error)
        return f"no: {type(error).__name__}: {why}"
    return "yes" if back.isfinite().all() else "no: NaN after quantising"
