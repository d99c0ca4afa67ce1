# SPDX-License-Identifier: Apache-2.0
"""32 clients at once on the tiny model: no error, and memory that stays as it is."""

import os
import signal

import api_load
import killed
import numpy as np
import pytest

from lora_rlhf.serving import api_server

KEY = "k" * 20


def served(path, ready):
    made = api_server.serve("tiny", key=KEY, usage=path, moderation="off")
    os.write(ready, f"{made.url}\n".encode())
    made.run()


@pytest.mark.parametrize(
    "seconds", [2, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_32_clients(tmp_path, seconds, monkeypatch):
    monkeypatch.setenv("KILLED_LOG", str(tmp_path / "error"))
    read, write = os.pipe()
    child = killed.start(served, tmp_path / "usage.sqlite", write)
    os.close(write)
    with os.fdopen(read) as lines:
        url = lines.readline().strip()
    found = api_load.measure(url, KEY, ["base"], seconds, pid=child)
    os.kill(child, signal.SIGTERM)
    code = killed.wait(child)
    error = (tmp_path / "error").read_text() if (tmp_path / "error").exists() else ""
    assert code == 0, error or f"exit code {code} without an exception"
    assert found["errors"] == [] and found["requests"] >= 32 and found["tokens_per_s"] > 0
    if seconds > 60:
        rss = np.array(found["rss_mib"])
        quarter = len(rss) // 4
        assert np.median(rss[-quarter:]) < 1.05 * np.median(rss[quarter : 2 * quarter]), rss
