# SPDX-License-Identifier: Apache-2.0
"""The virtual environments of the peers: what each needs, and making one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

PEERS = {
    "trl112": (
        HERE / "trl112_ppo.py",
        ["trl==1.12.0", "transformers==5.23.0", "peft==0.21.2"],
    ),
    "trl011": (
        HERE / "trl011_multiadapter.py",
        ["trl==0.11.4", "transformers==4.45.2", "peft==0.13.2", "accelerate==0.34.2",
         "datasets==3.6.0", "rich"],
    ),
}  # fmt: skip
"""Name -> program and pins; torch 2.13.0 comes first, so that nothing pulls another one."""

TORCH = "torch==2.13.0"


def default_folder() -> Path:
    """Where environments are kept between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lora-rlhf-benchmarks"


def python_of(name: str, folder: Path) -> str:
    """The interpreter of a peer's environment, made now where there is none."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        print(f"making {folder / name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        for packages in ([TORCH], PEERS[name][1]):
            subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    return str(python)
