# SPDX-License-Identifier: Apache-2.0
"""Compute device, dtype and limitations of this machine."""

from __future__ import annotations

import platform
from typing import Any

import torch


def pick_device() -> torch.device:
    """Pick the first CUDA device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str) -> torch.dtype:
    """Pick the compute dtype; `auto`: float32 on a CPU, bfloat16 from capability 8.0, else float16.

    `torch.cuda.is_bf16_supported()` is not used: it is true on a T4, which emulates bfloat16.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(0) >= (8, 0) else torch.float16


def device_name() -> str:
    """Name the GPU, or the processor's kind and its vector instructions: sums depend on them."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _emulates_bfloat16() -> bool:
    """True on an x86 processor that computes in bfloat16 by way of float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)  # not every torch has it
    able: dict[str, Any] = capabilities()
    x86 = able.get("architecture") == "x86_64"
    return x86 and not (able.get("avx512_bf16") or able.get("amx_bf16"))


def hardware_limitations(dtype: torch.dtype) -> list[str]:
    """List the limitations of this machine for a base that was loaded in `dtype`."""
    if not torch.cuda.is_available():
        apple = "an Apple GPU (MPS) is not used, " if torch.backends.mps.is_available() else ""
        limitations = [f"no CUDA GPU: {apple}everything runs on the CPU"]
        if dtype == torch.bfloat16 and _emulates_bfloat16():
            limitations.append(
                "this processor has no instructions for bfloat16: it is emulated, and several "
                "times slower than float32; model.dtype: auto takes float32"
            )
        return limitations
    limitations, (major, minor) = [], torch.cuda.get_device_capability(0)
    if (major, minor) < (8, 0):
        how = {
            torch.float16: "float16 with scaled losses in its place",
            torch.bfloat16: "it is emulated, and slow; model.dtype: auto takes float16",
        }.get(dtype, "computing in float32 is slow")
        limitations.append(f"the GPU (compute capability {major}.{minor}) has no bfloat16: {how}")
    if (count := torch.cuda.device_count()) > 1:
        limitations.append(f"{count} GPUs are visible: only the first is used")
    return limitations
