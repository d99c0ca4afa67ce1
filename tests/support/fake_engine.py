# SPDX-License-Identifier: Apache-2.0
"""An inference engine without a model: it says the words of the prompt again, one at a time."""

import threading
import time
from concurrent.futures import Future

from lora_rlhf.errors import UsageError
from lora_rlhf.serving.inference import Choice, Completion, Delta, Handle, Model, TokenLogprob


class FakeEngine:
    """Each request has a thread; `pause` seconds lie between two words.

    While `held` returns true for the words that were said, the next one waits.
    """

    context, max_tokens, default, has_reward = 100, 20, "policy", True

    def __init__(self, pause=0.0):
        self.pause = pause
        self.models = {
            "base": Model("base", "", "base"),
            "policy": Model("policy", "ab" * 32, "policy"),
        }
        self.requests, self.cancelled = [], threading.Event()
        self.held = lambda told: False
        self.texts = []  # the answers by index, instead of the prompt's words

    def count_tokens(self, messages):
        if messages[-1]["role"] != "user":
            raise UsageError("the conversation does not end with a turn of the user")
        return sum(len(turn["content"].split()) for turn in messages)

    def submit(self, request, on_delta=None):
        self.requests.append(request)
        handle = Handle(Future(), threading.Event())
        threading.Thread(target=self._answer, args=(request, on_delta, handle), daemon=True).start()
        return handle

    def _answer(self, request, on_delta, handle):
        try:
            handle._future.set_result(self._completion(request, on_delta, handle))
        except Exception as error:
            handle._future.set_exception(error)

    def _completion(self, request, on_delta, handle):
        start = time.monotonic()
        words = request.messages[-1]["content"].split()
        if words[0] == "fail":
            raise RuntimeError("a very private question")
        words, choices = words[: request.max_tokens], []
        for index in range(request.n):
            told = []
            for word in self.texts[index].split() if self.texts else words:
                while self.held(told) and not handle._cancelled.is_set():
                    time.sleep(0.01)
                if handle._cancelled.is_set():
                    break
                time.sleep(self.pause)
                told.append(word)
                if on_delta:
                    on_delta(Delta(index, word + " ", self._logprobs(request, [word]) or ()))
            if handle._cancelled.is_set():
                self.cancelled.set()
            full = "length" if len(told) == request.max_tokens else "stop"
            finish = "cancelled" if handle._cancelled.is_set() else full
            logprobs = self._logprobs(request, [*told, "<end>"])
            text, valid = " ".join(told), request.constraint and True
            choices.append(Choice(text, [1] * len(told), finish, logprobs, 0.5, valid))
        tokens, seconds = len(words) * request.n, time.monotonic() - start
        return Completion(
            choices, request.model or "policy", self.count_tokens(request.messages), tokens,
            0.001, 0.002, seconds, 0,
        )  # fmt: skip

    def _logprobs(self, request, words):
        if request.logprobs is None:
            return None
        top = [("x", -1.0)] * request.logprobs
        return [TokenLogprob(word, 1, float("-inf"), top) for word in words]

    def close(self):
        pass
