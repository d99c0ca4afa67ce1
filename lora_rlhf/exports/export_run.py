# SPDX-License-Identifier: Apache-2.0
"""Export a role of a run: merged, measured, verified if possible; written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from lora_rlhf import extras
from lora_rlhf.errors import DiskError, UsageError
from lora_rlhf.recipe.stage_keys import stage_of_role
from lora_rlhf.redaction import safe
from lora_rlhf.reports.cards.card_facts import hub_base
from lora_rlhf.runs.disk import check_writable, sha256, write_atomically
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import quiet

from . import export_card, gguf_model, merging, modelfile, other_runtimes
from .merging import Merged

TARGETS = ("merged", "gguf", "gguf-adapter", "mlx", "ollama")
ROLES = ("policy", "sft", "reward")
DTYPES = {
    **dict.fromkeys(("merged", "mlx"), ("float32", "bfloat16", "float16")),
    **{to: tuple(gguf_model.DTYPES) for to in ("gguf", "ollama")},
    "gguf-adapter": ("float32",),
}
"""Target -> dtypes of its file."""

KL = 1e-5
"""Largest mean KL a token between unmerged and merged."""

SCORE = 1e-3
"""Largest difference of a score between unmerged and merged reward model."""

_SPARE = 1.1
_ADAPTER = "adapter.gguf"


@quiet.libraries()
def export(
    run: str | Path,
    out: str | Path,
    *,
    role: Literal["policy", "sft", "reward"] = "policy",
    to: Literal["merged", "gguf", "gguf-adapter", "mlx", "ollama"] = "merged",
    dtype: str | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Write a role of a finished run in the form of another runtime; return its export.json.

    Args:
        out: New folder.
        say: Called with a line at each step.
        dtype: float32, bfloat16 or float16; for GGUF also q8_0 or q4_0. Default: the base's own if
            the merged weights lose nothing in it, else float32; for GGUF float16.

    Raises:
        UsageError: There is no such role or target, `out` exists, or the export differs too much
            from what was trained.
        DamageError: The adapter is not as the run wrote it.
        DiskError: It does not fit the disk.
    """
    started, out, record = time.perf_counter(), Path(out), Record.read(run)
    _check(record, role, to, dtype, out)
    if to in ("gguf", "gguf-adapter", "ollama"):
        extras.load("gguf", f"--to {to}", "export")
    merged = merging.merge_role(record, role)
    if to in ("gguf", "gguf-adapter", "ollama"):
        gguf_model.architecture(merged.model.config.get_text_config())
    measured = merged.differences(merged.model)
    say(f"merged: {_words(measured)}")
    _refuse_far(measured, "float32")
    with _whole(out) as folder:
        facts = {"merging": measured, **_write(record, merged, folder, to, dtype, say)}
        licence = str(record.data["model"].get("license") or "")
        entry = {
            "run": str(record.data.get("name", "run")),
            "role": role,
            "to": to,
            "base": hub_base(record.data["model"]) or Path(str(record.data["model"]["id"])).name,
            "base_license": licence or None,
            "adapter_sha256": sha256(merged.folder / "adapter_model.safetensors"),
            "dequantised_from_4bit": bool(record.data["model"].get("load_in_4bit")),
            **facts,
            "seconds": round(time.perf_counter() - started, 1),
        }
        entry = dict(json.loads(json.dumps(safe(entry))))
        write_atomically(folder / "README.md", export_card.render(record, entry))
        files = sorted(p for p in folder.iterdir() if p.is_file())
        entry["files"] = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        write_atomically(folder / "export.json", json.dumps(entry, indent=1) + "\n")
    return entry


def _check(record: Record, role: str, to: str, dtype: str | None, out: Path) -> None:
    for option, given, known in (("role", role, ROLES), ("to", to, TARGETS)):
        if given not in known:
            raise UsageError(f"--{option} {given!r}", expected=f"one of {', '.join(known)}")
    if dtype and dtype not in DTYPES[to]:
        raise UsageError(f"--dtype {dtype} with --to {to}", expected=", ".join(DTYPES[to]))
    if role == "reward" and to != "merged":
        raise UsageError(
            f"a reward model cannot be exported --to {to}: its runtime cannot return scores",
            expected="--to merged",
        )
    if not record.done(stage_of_role(role, record.algorithm)) or not record.adapter(role).is_dir():
        raise UsageError(
            f"{record.folder} has no finished {role} (algorithm: {record.algorithm})",
            expected=f"a role with a folder under {record.folder / 'adapters'}",
            remedy="continue the run with `lora-rlhf run`, or choose another --role",
        )
    members = record.data["stages"].get("reward", {}).get("ensemble", {}).get("roles", [])
    if role == "reward" and len(members) > 1:
        raise UsageError(
            f"the reward is an ensemble of {len(members)} models, and cannot be merged into one",
            expected="a single reward model, or reward.combine: warm, which averages the members",
        )
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists", expected="a new folder", remedy="give another --out")
    check_writable(out.parent)
    there = next(p for p in out.absolute().parents if p.exists())
    size = {"q8_0": 1.1, "q4_0": 0.7, "float16": 2, "bfloat16": 2}.get(dtype or "", 4)
    need, free = int(record.data["model"].get("parameters", 0) * size * _SPARE), _free(there)
    if need > free:
        raise DiskError(
            f"the export takes up to {need / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB free",
            remedy="make room, or choose a smaller --dtype",
        )


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Write into a hidden folder beside `out`, which gets its name if nothing failed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".tmp", dir=out.parent))
    try:
        yield folder
        mask = os.umask(0)
        os.umask(mask)
        for path in (folder, *folder.rglob("*")):  # safetensors' files are their owner's alone
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        folder.rename(out)
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if match := re.search(r"\(os error (\d+)\)", str(error)):  # of safetensors
            number = int(match[1])
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskError(
                f"cannot write the export: {os.strerror(number)}",
                expected=f"room for it in {out.parent}; nothing is left behind",
                remedy="make room, then export again",
            ) from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(
    record: Record,
    merged: Merged,
    folder: Path,
    to: str,
    dtype: str | None,
    say: Callable[[str], object],
) -> dict[str, Any]:
    if to in ("merged", "mlx"):
        facts = _transformers(merged, folder, dtype, say)
        check = {"by": "transformers", "verified": True}
        return {**facts, "check": check if to == "merged" else other_runtimes.mlx(merged, folder)}
    name = f"{record.data.get('name', 'run')}-{merged.folder.name}"
    if to == "gguf-adapter":
        gguf_model.write_adapter(merged.base, merged.folder, folder / _ADAPTER, name)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            whole = Path(place) / "base.gguf"
            base = merging.load_base(record)
            if base.is_4bit:
                base.causal.dequantize()
            gguf_model.write(base, base.causal, whole, "float16", "base")
            check = other_runtimes.llama_cpp(merged, whole, folder / _ADAPTER)
        return {"dtype": "float32", "check": check}
    dtype = dtype or "float16"
    file = re.sub(r"[^\w.-]+", "-", f"{name}-{gguf_model.DTYPES[dtype]}.gguf")
    say(f"writing {file}")
    gguf_model.write(merged.base, merged.model, folder / file, dtype, name)
    check = other_runtimes.llama_cpp(merged, folder / file)
    facts = {"dtype": dtype, "check": check}
    if to == "ollama":
        licence = str(record.data["model"].get("license") or "")
        context = int(merged.model.config.max_position_embeddings)
        text = modelfile.write(merged.base, file, licence, context)
        write_atomically(folder / "Modelfile", text)
        facts["ollama"] = "the Modelfile was not run: no Ollama was used; its GGUF: see check"
    return facts


def _transformers(
    merged: Merged, folder: Path, dtype: str | None, say: Callable[[str], object]
) -> dict[str, Any]:
    """Save in the first dtype whose file, loaded again, is near enough."""
    own = merged.stored_dtype if merged.stored_dtype in DTYPES["merged"] else "float32"
    tries = [dtype] if dtype else list(dict.fromkeys([own, "float32"]))
    for name in tries:
        say(f"writing in {name}")
        merging.save(merged, folder, getattr(torch, name))
        loaded = merging.load(folder, reward=merged.offset is not None, device=merged.base.device)
        measured = merged.differences(loaded)
        say(f"the file, loaded by transformers: {_words(measured)}")
        if name == tries[-1]:
            _refuse_far(measured, name)
        elif _is_far(measured):
            say(f"{name} would lose too much; float32 is written")
            continue
        break
    note = {} if merged.offset is None else {"reward_offset": merged.offset}
    return {"dtype": name, "merging": measured, **note}


def _is_far(measured: dict[str, Any]) -> bool:
    kl, score = measured.get("kl_per_token", 0.0), measured.get("largest_score_difference", 0.0)
    return not (kl <= KL and score <= SCORE)  # NaN is far


def _refuse_far(measured: dict[str, Any], dtype: str) -> None:
    if _is_far(measured):
        raise UsageError(
            f"merged in {dtype}, the model differs too much: {_words(measured)}",
            expected=f"a KL of at most {KL:g} a token, or scores that differ by at most {SCORE:g}",
            remedy="export with --dtype float32" if dtype != "float32" else "report this",
        )


def _words(measured: dict[str, Any]) -> str:
    if "kl_per_token" not in measured:
        far = measured["largest_score_difference"]
        return f"largest difference of a score {far:.2g} on {measured['rows']} answers"
    return (
        f"KL {measured['kl_per_token']:.2g} a token, largest logit difference "
        f"{measured['largest_logit_difference']:.2g} on {measured['tokens']} tokens of "
        f"{measured['rows']} held-out answers"
    )


def lines(entry: dict[str, Any], out: Path) -> Iterator[str]:
    """Write an export.json as text."""
    check, size = entry["check"], sum(file["bytes"] for file in entry["files"].values())
    yield (
        f"{out}: {entry['role']} as {entry['to']}, {entry['dtype']}, {size / 1e6:.1f} MB, "
        f"{entry['seconds']} s"
    )
    yield f"unmerged against merged: {_words(entry['merging'])}"
    if not check["verified"]:
        yield f"NOT VERIFIED: {check['why']}"
    elif "top1_agreement" in check:
        yield (
            f"verified by {check['by']}: the same most probable token for "
            f"{check['top1_agreement']:.2%} of {check['tokens']} tokens"
        )
    if "reward_offset" in entry:
        yield f"reward = score + {entry['reward_offset']:.6f} (reward_offset in config.json)"
