# SPDX-License-Identifier: Apache-2.0
"""Seconds per token of sampling, each step launched by Python against a captured CUDA graph.

    python tests/benchmarks/decoding.py --preset llama8b --four-bit --dtype bfloat16 --rows 8,32

Both sample the same prompts with the same seed in turn, `--rounds` times; the capture counts. On a
CPU the second one takes steps of fixed shapes without a capture, which is slower.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line of JSON for each number of rows."""
    made = common.parser(__doc__ or "")
    made.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    made.add_argument("--four-bit", action="store_true", help="NF4, double quantisation")
    made.add_argument("--rows", default="8", help="rows at once, a list")
    made.add_argument("--rounds", type=int, default=3)
    made.set_defaults(top_fraction=1.0, checkpointing=False)
    found = common.options(made, argv)
    import models
    import torch

    from lora_rlhf.runtime.devices import pick_device

    torch.manual_seed(found.seed)
    device = pick_device()
    backbone = models.backbone(found, device)
    models.add_roles(backbone)
    for rows in map(int, found.rows.split(",")):
        prompts = common.prompts(found, rows)
        with backbone.role("reference"):
            measured = compare(backbone, prompts, found)
        line = {"preset": found.preset, "rows": rows, "tokens": found.response_len, **measured}
        print(json.dumps(line), flush=True)


def compare(backbone: Any, prompts: list[list[int]], found: Any) -> dict[str, Any]:
    """Median milliseconds per step of both, their ratio by round, and how far results differ."""
    import torch

    from lora_rlhf.models import decode_graph, sampler

    times: dict[str, list[float]] = {"eager": [], "graph": []}
    drawn: dict[str, Any] = {}
    for _ in range(found.rounds + 1):
        for name, devices in (("eager", ()), ("graph", (backbone.device.type,))):
            decode_graph.DEVICES = devices
            start = time.perf_counter()
            drawn[name] = sampler.sample(
                backbone, prompts, max_new_tokens=found.response_len, temperature=1.0, seed=0
            )
            if backbone.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / found.response_len * 1e3)
    pairs = list(zip(drawn["eager"], drawn["graph"], strict=True))
    same = [_equal(a.ids, b.ids) for a, b in pairs]
    apart = [
        float((a.logprobs[:n] - b.logprobs[:n]).abs().max())
        for (a, b), n in zip(pairs, same, strict=True)
        if n
    ]
    ratios = [a / b for a, b in zip(times["eager"], times["graph"], strict=True)][1:]
    return {
        **{f"{name}_ms": round(statistics.median(each[1:]), 2) for name, each in times.items()},
        "faster": round(statistics.median(ratios), 2),
        "lowest": round(min(ratios), 2),
        "highest": round(max(ratios), 2),
        "equal_tokens": f"{sum(same)}/{found.response_len * len(pairs)}",
        "logprobs_apart": round(max(apart, default=0.0), 5),
    }


def _equal(a: list[int], b: list[int]) -> int:
    """Count equal tokens up to the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


if __name__ == "__main__":
    main()
