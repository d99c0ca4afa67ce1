# SPDX-License-Identifier: Apache-2.0
"""A labelling project with its server in a child process, which can be killed and started again."""

import os
import signal
import socket
import time

from lora_rlhf.feedback import project
from lora_rlhf.feedback.label_server import Access, LabelServer
from lora_rlhf.feedback.labels import Answer, Task


def task(kind, prompt, *answers, checks=None):
    """A task without its id; `Sitting` counts them."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Task(
        id="",
        type=kind,
        prompt=tuple(turns),
        answers=tuple(Answer(f"model {i}", text) for i, text in enumerate(answers)),
        checks=checks,
    )


class Sitting:
    """A project of these tasks; `start` serves it, always on the same port."""

    def __init__(
        self,
        folder,
        tasks,
        name="Tea",
        guidelines="# Ours\n\nBe kind.\n",
        embedded=False,
        **settings,
    ):
        self.embedded = embedded
        values = {"name": name, "overlap": 0.0, "gold_share": 0.0, **settings}
        self.project = project.create(folder, project.Settings(**values))
        self.write_guidelines(guidelines)
        with self.project.store() as store:
            named = (Task(**{**vars(one), "id": f"t{i}"}) for i, one in enumerate(tasks))
            store.add_tasks(list(named))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def write_guidelines(self, text):
        (self.project.folder / "guidelines.md").write_text(text, encoding="utf-8")

    def start(self, token="secret"):
        access = Access(port=self.port, token=token, embedded=self.embedded)
        self.url = f"http://127.0.0.1:{self.port}/?token={token}"
        self.child = os.fork()
        if not self.child:
            try:
                LabelServer(self.project, access).run()
            finally:
                os._exit(1)
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                assert time.monotonic() < end, "the server does not start"
                time.sleep(0.02)

    def kill(self):
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)

    def labels(self, current=True):
        with self.project.store(readonly=True) as store:
            return store.labels(current)
