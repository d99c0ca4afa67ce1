# SPDX-License-Identifier: Apache-2.0
"""Load an export in the runtime that it is for, where that is installed, and compare its answers.

llama.cpp    through node-llama-cpp, if the variable LORA_RLHF_LLAMA_CPP names the folder in which
             `npm install node-llama-cpp` was run; else through llama-cpp-python, if it is installed
MLX          through mlx-lm, if it is installed
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_rlhf.errors import SetupError, UsageError
from lora_rlhf.models.scoring import Episode

from .merging import Merged, distances

NODE = "LORA_RLHF_LLAMA_CPP"
"""Environment variable with the folder of node-llama-cpp."""

AGREEMENT = 0.99
"""Least share of tokens with the same most probable one."""

_SECONDS = 3600
_KEPT = ("PATH", "HOME", "SYSTEMROOT", "LD_LIBRARY_PATH", "TMPDIR", "TEMP")
_TEXT = "It's 12:30, don't you know?\n\n  x = f(3.14)\tCafé Ω 日本語 🙂 — end."
"""A text with digits, white space and other scripts, for the tokenizer."""


def llama_cpp(merged: Merged, model: Path, adapter: Path | None = None) -> dict[str, Any]:
    """Compare llama.cpp's answers with those of the unmerged model.

    Raises:
        UsageError: Another token is the most probable one too often, or a prompt is split into
            other tokens.
        SetupError: llama.cpp is installed, and cannot be used.
    """
    base, rows = merged.base, merged.rows
    decode = base.tokenizer.decode
    prompts = [str(decode(prompt, skip_special_tokens=False)) for prompt, _ in rows]
    texts = [*prompts, _TEXT]
    if os.environ.get(NODE):
        by, answers = _by_node(Path(os.environ[NODE]), model, adapter, rows, texts)
    elif importlib.util.find_spec("llama_cpp") is not None:
        by, answers = _by_python(model, adapter, rows, texts)
    else:
        missing = f"{NODE} names no folder with node-llama-cpp, and llama-cpp-python is not here"
        return {"verified": False, "why": f"no llama.cpp on this machine: {missing}"}
    same, far = [], []
    for before, (_, answer), row in zip(merged.before, rows, answers["rows"], strict=True):
        logprobs = torch.as_tensor(before).log_softmax(-1)
        same += (logprobs.argmax(-1) == torch.tensor(row["tops"])).tolist()
        chosen = logprobs.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        far += (chosen - torch.tensor(row["logprobs"])).abs().tolist()
    ids = [base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    split = [prompt for prompt, a, b in zip(texts, ids, answers["texts"], strict=True) if a != b]
    return _judged(
        {
            "by": f"llama.cpp by {by}",
            "rows": len(rows),
            "tokens": len(same),
            "top1_agreement": sum(same) / len(same),
            "mean_logprob_difference": sum(far) / len(far),
            "texts_tokenized_alike": len(texts) - len(split),
            "texts_tokenized": len(texts),
        },
        [text for text in split if text != _TEXT],
    )


def mlx(merged: Merged, folder: Path) -> dict[str, Any]:
    """Compare the answers of mlx-lm, which loads the folder, with those of the unmerged model.

    Raises:
        UsageError: Another token is the most probable one too often.
    """
    if importlib.util.find_spec("mlx_lm") is None:
        return {"verified": False, "why": "mlx-lm is not installed on this machine"}
    core = importlib.import_module("mlx.core")
    model, _ = importlib.import_module("mlx_lm.utils").load_model(folder)
    after = []
    for prompt, answer in merged.rows:
        given = model(core.array([prompt + answer])).astype(core.float32)
        after.append(torch.from_numpy(np.array(given))[0, -len(answer) - 1 : -1])
    measured = distances(merged.before, after)
    return _judged({"by": f"mlx-lm {version('mlx-lm')}", **measured}, [])


def _judged(measured: dict[str, Any], split: Sequence[str]) -> dict[str, Any]:
    """Add that an export is verified.

    Raises:
        UsageError: It is not good enough.
    """
    by, share = measured["by"], measured["top1_agreement"]
    if split:
        raise UsageError(
            f"{by} splits {len(split)} of {measured['rows']} prompts into other tokens, the first "
            f"{split[0]!r:.80}",
            expected="the tokens that the model was trained on",
            remedy="export `--to merged`, which takes the tokenizer as it is",
        )
    if share < AGREEMENT:
        raise UsageError(
            f"{by} has the same most probable token for {share:.2%} of {measured['tokens']} tokens",
            expected=f"at least {AGREEMENT:.0%} on held-out prompts",
            remedy="choose a --dtype that rounds less, such as float16",
        )
    return {"verified": True, **measured}


def _by_node(
    home: Path, model: Path, adapter: Path | None, rows: Sequence[Episode], texts: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    module, node = home / "node_modules/node-llama-cpp/dist/index.js", shutil.which("node")
    if node is None or not module.is_file():
        raise SetupError(
            f"{NODE} is {home}, and " + ("it has no node-llama-cpp" if node else "node is missing"),
            expected="node, and a folder in which `npm install node-llama-cpp` was run",
            remedy=f"install it there, or unset {NODE} to export unverified",
        )
    given = {
        "module": str(module.resolve()),
        "model": str(model.resolve()),
        "adapter": str(adapter.resolve()) if adapter else None,
        "context": _context(rows),
        "threads": torch.get_num_threads(),
        "rows": [{"prompt": prompt, "answer": answer} for prompt, answer in rows],
        "texts": texts,
    }
    script = Path(__file__).with_name("llama_cpp_check.mjs")
    kept = {key: os.environ[key] for key in _KEPT if key in os.environ}
    try:
        done = subprocess.run(
            [node, str(script)],
            input=json.dumps(given).encode(),
            capture_output=True,
            timeout=_SECONDS,
            env=kept,
        )
        answers = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        why = done.stderr.decode(errors="replace")[-300:] if isinstance(error, ValueError) else ""
        raise SetupError(
            f"node-llama-cpp in {home} cannot load the export: {why or error}",
            expected="a llama.cpp that loads it",
            remedy=f"unset {NODE} to export unverified, or report this",
        ) from None
    return f"node-llama-cpp {answers['version']}", answers


def _by_python(
    model: Path, adapter: Path | None, rows: Sequence[Episode], texts: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    module: Any = importlib.import_module("llama_cpp")
    llama = module.Llama(
        model_path=str(model),
        lora_path=str(adapter) if adapter else None,
        n_ctx=_context(rows),
        n_threads=torch.get_num_threads(),
        logits_all=True,
        verbose=False,
    )
    out = []
    for prompt, answer in rows:
        llama.reset()
        llama.eval(prompt + answer[:-1])
        scores = torch.from_numpy(llama.scores[len(prompt) - 1 : llama.n_tokens].copy())
        chosen = scores.log_softmax(-1)[torch.arange(len(answer)), answer]
        out.append({"tops": scores.argmax(-1).tolist(), "logprobs": chosen.tolist()})
    ids = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    llama.close()
    return f"llama-cpp-python {version('llama-cpp-python')}", {"rows": out, "texts": ids}


def _context(rows: Sequence[Episode]) -> int:
    return max(len(prompt) + len(answer) for prompt, answer in rows) + 8
