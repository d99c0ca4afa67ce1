# SPDX-License-Identifier: Apache-2.0
"""Versions and devices for records and bug reports; environment variables that change results."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform

from lora_rlhf.errors import SetupError, first_line

_FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "CUDA_VISIBLE_DEVICES")
_PRESENT = ("HF_TOKEN", "LORA_RLHF_DATA", "HF_HOME", "HF_ENDPOINT")
_PACKAGES = ("lora-rlhf", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate",
             "datasets", "huggingface_hub")  # fmt: skip


_OFF = ("", "0", "-1", "false", "no", "off", "n", "f")
_ONE_PROCESS = (
    "one process; `run` and the verbs of its stages also work under torchrun and accelerate launch",
    "use torchrun or accelerate launch only for `run` and the verbs of its stages, and no mpirun",
)
_PLAIN = (
    "plain PyTorch: this package trains without DeepSpeed, FSDP and Megatron",
    "unset the variable, which accelerate reads; if the base fits no single GPU, "
    "set model.shard: true",
)
_REFUSED = {
    **dict.fromkeys(
        ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
        (*_ONE_PROCESS, (*_OFF, "1")),
    ),
    **dict.fromkeys(("RANK", "LOCAL_RANK"), (*_ONE_PROCESS, _OFF)),
    **{
        f"ACCELERATE_USE_{name}": (*_PLAIN, _OFF)
        for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")
    },
}
"""Variable -> what a run expects, what to do, and the values that change nothing."""

_IGNORED = (
    "ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
    "FORK_LAUNCHED", "TORCHELASTIC_RUN_ID", "TRANSFORMERS_SDPA_FORCE_GQA", "XLA_USE_BF16",
    "XLA_DOWNCAST_BF16", "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
)  # fmt: skip
"""Beginnings of variables that would change results, and that the recipe decides instead."""

_RECORDED = (
    "OMP_NUM_THREADS", "MKL_", "OPENBLAS_", "KMP_", "GOMP_", "ATEN_CPU_CAPABILITY", "ONEDNN_",
    "DNNL_", "CUBLAS_", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUDNN_",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER", "PYTORCH_TUNABLEOP_",
    "FLASH_ATTENTION_DETERMINISTIC", "USE_HUB_KERNELS", "USE_TORCH_XLA", "PYTHONOPTIMIZE",
    "PYTHONHASHSEED", *_FLAGS[:3],
)  # fmt: skip
"""Beginnings of variables with which sums may round differently; a run leaves and records them."""

ignored: dict[str, str] = {}
"""Variables that were taken out of the environment of this process."""


def settle() -> None:
    """Take variables that would change a run's results out of the environment of this process.

    Raises:
        SetupError: A variable asks for something that a run cannot do.
    """
    for name, (expected, remedy, harmless) in _REFUSED.items():
        if (value := os.environ.get(name, "")).lower() not in harmless:
            raise SetupError(f"{name}={value} is set", expected=expected, remedy=remedy)
    for name in [name for name in os.environ if name.startswith(_IGNORED)]:
        ignored[name] = os.environ.pop(name)


def note() -> str:
    """Name the variables that are ignored; empty if there are none."""
    names = ", ".join(f"{name}={value}" for name, value in ignored.items())
    return f"ignored environment variables: {names} (they would change results)" if names else ""


def result_variables() -> dict[str, str]:
    """Return the variables that may change a run's bits, those that are ignored included."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(_RECORDED)}
    return dict(sorted((kept | ignored).items()))


_version = functools.cache(importlib.metadata.version)


def versions() -> dict[str, str]:
    """Return the versions of the packages that determine a run's results."""
    installed = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = _version(package)
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
