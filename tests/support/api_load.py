# SPDX-License-Identifier: Apache-2.0
"""Many clients at once on a chat-completions server: errors, times, tokens, memory of the server.

    python tests/support/api_load.py URL KEY MODEL SECONDS [PID]

asks any such server; MODEL may be several, with commas between them.
"""

import asyncio
import json
import os
import sys
import time

import httpx
import numpy as np
import psutil

PROMPTS = ["What is in the red box?", "Who works as a pilot?", "Name a colour.", "Say hello."]


async def _client(number, web, models, end, seen):
    """One request after the other, every second one as a stream."""
    count = 0
    while time.monotonic() < end:
        body = {
            "model": models[(number + count) % len(models)],
            "messages": [{"role": "user", "content": PROMPTS[(number + count) % len(PROMPTS)]}],
            "max_tokens": 16, "temperature": 1.0, "seed": number, "stream": count % 2 == 1,
        }  # fmt: skip
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        start, tokens = time.monotonic(), 0
        try:
            async with web.stream("POST", "chat/completions", json=body) as answer:
                lines = [line async for line in answer.aiter_lines() if line]
            answer.raise_for_status()
            if body["stream"]:
                events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
                tokens = sum((e.get("usage") or {}).get("completion_tokens", 0) for e in events)
            else:
                tokens = json.loads("".join(lines))["usage"]["completion_tokens"]
        except (httpx.HTTPError, KeyError, ValueError) as error:
            seen["errors"].append(repr(error)[:200])
        seen["times"].append(time.monotonic() - start)
        seen["tokens"] += tokens
        count += 1


async def _memory(pid, end, seen):
    while time.monotonic() < end:
        seen["rss"].append(psutil.Process(pid).memory_info().rss / 2**20)
        await asyncio.sleep(max(0.2, (end - time.monotonic()) / 40))


async def _all(url, key, models, seconds, clients, pid):
    seen = {"errors": [], "times": [], "tokens": 0, "rss": []}
    limits = httpx.Limits(max_connections=clients)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits) as web:
        begun = time.monotonic()
        end = begun + seconds
        work = [_client(n, web, models, end, seen) for n in range(clients)]
        await asyncio.gather(*work, *([_memory(pid, end, seen)] if pid else []))
        wall = time.monotonic() - begun
    p50, p95 = np.quantile(seen["times"], [0.5, 0.95])
    return {
        "clients": clients, "wall_s": wall, "requests": len(seen["times"]),
        "errors": seen["errors"], "p50_s": float(p50), "p95_s": float(p95),
        "tokens_per_s": seen["tokens"] / wall, "rss_mib": seen["rss"],
    }  # fmt: skip


def measure(url, key, models, seconds, clients=32, pid=None):
    """Ask for so many seconds; answers that are under way at their end are waited for."""
    return asyncio.run(_all(url.rstrip("/") + "/", key, models, seconds, clients, pid))


if __name__ == "__main__":
    url, key, models, seconds, *pid = sys.argv[1:]
    found = measure(url, key, models.split(","), float(seconds), pid=int(pid[0]) if pid else None)
    rss = found.pop("rss_mib")
    found["rss_mib"] = [round(r) for r in rss[:: max(1, len(rss) // 8)]]
    print(
        json.dumps({**found, "errors": found["errors"][:3], "load": os.getloadavg()[0]}, indent=1)
    )
