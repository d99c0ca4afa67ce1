# SPDX-License-Identifier: Apache-2.0
"""A chat-completions server on loopback, which repeats the last turn in capitals."""

import contextlib
import http.server
import json
import threading

from lora_rlhf.hub import targets


class ChatServer(http.server.ThreadingHTTPServer):
    """`reply` may be replaced; `seen` holds path and body of every request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen, self.headers = [], []
        self.reply = lambda asked: said(asked["messages"][-1]["content"].upper())

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1#m"

    def target(self):
        [target] = targets.parse([self.url])
        return target


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, asked))
        self.server.headers.append(self.headers["Authorization"])
        body = self.server.reply(asked)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def said(text):
    """The body of a reply."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    made = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    return json.dumps(made | {"choices": [choice], "usage": usage}).encode()


@contextlib.contextmanager
def serve():
    server = ChatServer()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
