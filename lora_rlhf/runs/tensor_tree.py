# SPDX-License-Identifier: Apache-2.0
"""Plain data with tensors in it, stored as JSON and safetensors; nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils._pytree import tree_leaves

_NAMED_TUPLES: dict[str, Callable[..., Any]] = {}


def checkpointable_tuple(kind: type) -> type:
    """Register a NamedTuple (class decorator), so that it is restored under its class name."""
    _NAMED_TUPLES[kind.__name__] = kind
    return kind


def read(folder: Path, name: str) -> Any:
    """Read data that was written with `files`, tensors on the CPU.

    Raises:
        OSError, ValueError, KeyError, SafetensorError: The files are missing or damaged.
    """
    skeleton = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    path = folder / f"{name}.safetensors"
    return unpack(skeleton, load_file(path) if path.exists() else {})


def files(name: str, data: Any) -> dict[str, bytes]:
    """Return the contents of `name.json`, and of `name.safetensors` if there are tensors."""
    tensors: dict[str, Tensor] = {}
    contents = {f"{name}.json": json.dumps(pack(data, tensors)).encode()}
    if tensors:
        contents[f"{name}.safetensors"] = save(tensors, metadata={"format": "pt"})
    return contents


def tensor_bytes(data: Any) -> int:
    """Count the bytes of all tensors in the data."""
    return sum(leaf.nbytes for leaf in tree_leaves(data) if isinstance(leaf, Tensor))


def pack(data: Any, tensors: dict[str, Tensor]) -> Any:
    """Turn `data` into JSON values, and put its tensors into `tensors` under numbers.

    Raises:
        TypeError: `data` holds something that is neither plain data nor a tensor.
    """
    if isinstance(data, Tensor):
        name = str(len(tensors))
        # A copy: slices of one rollout share memory, which the format refuses.
        tensors[name] = data.detach().cpu().clone().contiguous()
        return {"$tensor": name}
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, tuple):
        kind = type(data).__name__
        tag = {"$named": kind} if kind in _NAMED_TUPLES else {}
        return {"$tuple": [pack(item, tensors) for item in data], **tag}
    if isinstance(data, list):
        return [pack(item, tensors) for item in data]
    if isinstance(data, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in data):
            return {key: pack(item, tensors) for key, item in data.items()}
        return {"$dict": [[key, pack(item, tensors)] for key, item in data.items()]}
    raise TypeError(f"a checkpoint cannot hold {type(data).__name__}")


def unpack(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Reverse `pack`."""
    if isinstance(data, list):
        return [unpack(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    if "$tensor" in data:
        return tensors[data["$tensor"]]
    if "$tuple" in data:
        items = [unpack(item, tensors) for item in data["$tuple"]]
        return _NAMED_TUPLES[data["$named"]](*items) if "$named" in data else tuple(items)
    if "$dict" in data:
        return {key: unpack(item, tensors) for key, item in data["$dict"]}
    return {key: unpack(item, tensors) for key, item in data.items()}
