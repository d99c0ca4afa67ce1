# SPDX-License-Identifier: Apache-2.0
"""The label server under load and under `kill -9`: no acknowledged label is lost.

`pytest -m slow -s` prints the figures of docs/reliability.md.
"""

import os
import random
import signal
import threading
import time

import httpx
import label_client
import pytest


def work_and_kill(made, kills, count):
    """Label through a server that is killed at random moments; returns the acknowledged ones."""
    rng, saved, struck = random.Random(0), set(), []

    def strike(child):
        struck.append(child)
        os.kill(child, signal.SIGKILL)

    points = [*sorted(rng.sample(range(1, int(0.95 * count)), kills)), None]
    for point in points:
        with label_client.running(made) as (child, url):
            try:
                with label_client.sign_in(url, "anna") as web:
                    for label in label_client.judge(web, "tab"):
                        saved.add(label)
                        if point is not None and len(saved) >= point:
                            threading.Timer(rng.uniform(0, 0.05), strike, [child]).start()
                            point = None
            except httpx.TransportError:
                assert child in struck
    assert len(struck) == kills
    with made.store() as store:
        labels = store.labels()
    assert len({label.task for label in labels}) == len(labels) == count
    assert saved <= {label.id for label in labels}
    return saved


def test_a_killed_server_loses_no_acknowledged_label(tmp_path):
    made = label_client.make(tmp_path / "p", 100)
    assert len(work_and_kill(made, 2, 100)) >= 98


def load(made, people, count, pause=lambda: 0.0):
    """Let so many people label at once; returns the seconds of every request."""
    times, saved = [], []

    def work(number):
        with label_client.sign_in(url, f"labeler {number}") as web:
            saved.extend(label_client.judge(web, f"tab {number}", times, pause))

    with label_client.running(made) as (_, url):
        threads = [threading.Thread(target=work, args=(n,)) for n in range(people)]
        start = time.monotonic()
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        seconds = time.monotonic() - start
    with made.store() as store:
        labels = store.labels()
    assert {label.id for label in labels} == {*saved} and len(saved) == len(labels) == count
    assert len({label.task for label in labels}) == count
    return sorted(times), seconds


def test_several_labelers_at_once_lose_nothing(tmp_path):
    load(label_client.make(tmp_path / "p", 40), 4, 40)


@pytest.mark.slow
def test_twenty_labelers_at_once(tmp_path):
    """Each takes half a second to a second and a half to judge; people take ten times longer."""
    made = label_client.make(tmp_path / "p", 5_000)
    times, seconds = load(made, 20, 5_000, lambda: random.uniform(0.5, 1.5))
    p50, p95, p99 = (1000 * times[int(share * len(times))] for share in (0.5, 0.95, 0.99))
    print(
        f"\n20 labelers, 5,000 labels in {seconds:.0f} s, {len(times)} requests: median "
        f"{p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms, longest {times[-1] * 1000:.0f} ms"
    )
    assert p95 < 200
