# SPDX-License-Identifier: Apache-2.0
"""Labelling projects with little tasks, a server in a child process, and labelers as programs."""

import contextlib
import json
import os
import signal
import time

import httpx
import killed

from lora_rlhf.feedback import project
from lora_rlhf.feedback.label_server import Access, LabelServer
from lora_rlhf.feedback.labels import Answer, Task

TEXT = "An answer of ordinary length, with a reason and an example, as models give them. " * 6


def make(folder, count, **settings):
    """A project with so many rankings of four answers."""
    made = project.create(folder, project.Settings(name="load", overlap=0.0, **settings))
    with made.store() as store:
        answers = tuple(Answer(f"m{k}", f"{k}: {TEXT}") for k in range(4))
        turns = [({"role": "user", "content": f"Question {i}?"},) for i in range(count)]
        store.add_tasks(Task(f"t{i}", "ranking", turns[i], answers) for i in range(count))
    return made


def serve(made, ready, access=None):
    """Serve until killed; write the address to a pipe once the port is open."""
    server = LabelServer(made, access or Access())
    os.write(ready, json.dumps([server.url, server.access.port]).encode() + b"\n")
    server.run()


@contextlib.contextmanager
def running(made, access=None):
    """Serve in a child, which is killed in the end; yields its process id and its address."""
    read, write = os.pipe()
    child = killed.start(serve, made, write, access)
    try:
        os.close(write)
        with os.fdopen(read) as lines:
            url, _ = json.loads(lines.readline())
        yield child, url
    finally:
        os.kill(child, signal.SIGKILL)
        killed.wait(child)


@contextlib.contextmanager
def sign_in(url, name):
    """A labeler who has read the guidelines."""
    with httpx.Client(base_url=url.split("?")[0], timeout=30) as web:
        web.get(url)
        web.post("/api/labeler", json={"name": name}).raise_for_status()
        sha256 = web.get("/api/state").json()["guidelines"]["sha256"]
        web.post("/api/guidelines", json={"sha256": sha256}).raise_for_status()
        yield web


def judge(web, tab, times=None, pause=lambda: 0.0):
    """Label until nothing is left; yields the number of each label that was acknowledged."""
    while True:
        given = timed(web, "/api/next", {"tab": tab}, times)
        if given.get("done"):
            return
        time.sleep(pause())
        name = given["assignment"]["id"]
        body = {"assignment": name, "tab": tab, "submission": f"{tab}/{name}"}
        made = timed(web, "/api/label", body | {"value": {"ranks": [1, 2, 2, 4]}}, times)
        yield made["label"]["id"]


def timed(web, path, body, times):
    start = time.perf_counter()
    answer = web.post(path, json=body)
    if times is not None:
        times.append(time.perf_counter() - start)
    answer.raise_for_status()
    return answer.json()
