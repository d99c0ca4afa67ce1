# SPDX-License-Identifier: Apache-2.0
"""An inference engine without a model: what a function returns, word by word."""

import re
import time
from types import SimpleNamespace

from lora_rlhf.serving.inference import Choice, Completion, Delta, InferenceEngine, Model


def echo(request):
    last = request.messages[-1]["content"]
    return f"{request.model} says: {last} ({request.seed})"


class ScriptedEngine(InferenceEngine):
    """Tokens are words; the context counts them over all turns, and drops whole turns like it."""

    def __init__(self, say=echo, context=200, pause=0.0):
        self.say, self.context, self.pause = say, context, pause
        kinds = {"base": "base", "sft": "sft", "policy": "policy", "best-of-n": "best-of-n"}
        self.models = {n: Model(n, "" if n == "base" else f"sha-{n}", k) for n, k in kinds.items()}
        self.default, self.max_tokens, self.requests, self.closed = "policy", 50, [], False
        self.base = SimpleNamespace(decode=lambda ids: "".join(f"t{i} " for i in ids))

    has_reward = True

    def forget(self):
        pass

    def count_tokens(self, messages):
        return sum(len(turn["content"].split()) for turn in messages)

    def rendered(self, messages):
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in messages)

    def _words(self, request):
        self.requests.append(request)
        turns, dropped = list(request.messages), 0
        while self.count_tokens(turns) + self.max_tokens > self.context and len(turns) > 2:
            del turns[:2]
            dropped += 2
        words = re.findall(r"\s*\S+\s*$|\s*\S+", self.say(request))
        return words[: request.max_tokens or self.max_tokens], dropped

    def _completion(self, request, words, dropped, finish):
        text, count = "".join(words), len(words)
        choice = Choice(text, list(range(count)), finish, None, float(count))
        return Completion([choice], request.model or self.default, 5, count, 0.0, 0.1, 0.2, dropped)

    def submit(self, request, on_delta=None):
        words, dropped = self._words(request)
        full = len(words) == (request.max_tokens or self.max_tokens)
        done = self._completion(request, words, dropped, "length" if full else "stop")
        return SimpleNamespace(result=lambda timeout=None: done)

    def stream(self, request):
        return _Stream(self, request)

    def per_token_kl(self, messages, ids, model="", against="sft"):
        return [float(i) for i in ids]

    def score(self, messages, texts):
        return [float(len(text)) for text in texts]

    def close(self):
        self.closed = True


class _Stream:
    def __init__(self, engine, request):
        self.engine, self.request, self.given = engine, request, []
        self.words, self.dropped = engine._words(request)
        self.closed = False

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.engine.pause)
        if len(self.given) == len(self.words):
            raise StopIteration
        self.given.append(self.words[len(self.given)])
        return Delta(0, self.given[-1])

    def close(self):
        self.closed = True

    @property
    def completion(self):
        finish = "stop" if len(self.given) == len(self.words) else "cancelled"
        return self.engine._completion(self.request, self.given, self.dropped, finish)
