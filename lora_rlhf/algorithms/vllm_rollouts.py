# SPDX-License-Identifier: Apache-2.0
"""PPO's completions from a vLLM server on another GPU or machine (`ppo.rollout_server`).

The trainer sends the policy's adapter after each update, a few MB and never the merged model, and
gets token ids with log-probs back. `serving/rollout_server.py` is the other side.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import math
import os
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import torch

from lora_rlhf.distributed.world import world
from lora_rlhf.errors import SetupError, UsageError, first_line
from lora_rlhf.models import adapters
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.models.sampler import Sampled
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.runtime import devices

KEY = "LORA_RLHF_ROLLOUT_KEY"
"""Variable with the key of the rollout server."""

PROTOCOL = 1

_AT_ONCE = 256
"""Requests that wait for the server at the same time; vLLM batches them."""

_SECONDS = 600.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would see the key
_START = "start it with `lora-rlhf rollout-server RECIPE`, then run the same command again"


def described(recipe: Recipe) -> dict[str, Any]:
    """The settings in which trainer and server must agree."""
    model = recipe.model
    return {
        "protocol": PROTOCOL,
        # A local folder may have another place on the other machine.
        "base": os.path.basename(model.id) if os.path.isabs(model.id) else model.id,
        "revision": model.revision,
        "dtype": str(devices.pick_dtype(model.dtype)).removeprefix("torch."),
        "load_in_4bit": model.load_in_4bit,
        "rank": recipe.lora.r,
    }


def packed(backbone: Backbone) -> bytes:
    """The policy's adapter as a zip archive of PEFT's two files; the same weights, the same bytes.

    Raises:
        NonFiniteError: A weight is NaN or infinite.
    """
    files = adapters.as_files(backbone, "policy")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


class RolloutServer:
    """A client of the rollout server.

    Args:
        url: Its address.
        key: Default: the variable LORA_RLHF_ROLLOUT_KEY.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self.url, self._key = url.rstrip("/"), key or os.environ.get(KEY, "")
        self.version = ""

    def check(self, recipe: Recipe) -> None:
        """Check that the server answers and has the recipe's base model.

        Raises:
            SetupError: It cannot be reached, or refuses the key.
            UsageError: It was started for another recipe.
        """
        theirs, ours = self._ask("GET", "/info"), described(recipe)
        different = {k: (theirs.get(k), v) for k, v in ours.items() if theirs.get(k) != v}
        if different:
            listed = "; ".join(f"{k}: {a!r} there, {b!r} here" for k, (a, b) in different.items())
            raise UsageError(
                f"the rollout server was started for another recipe or version: {listed}",
                where=self.url,
                expected="the same base model, precision and LoRA rank",
                remedy="start it with this recipe: `lora-rlhf rollout-server RECIPE`; if the two "
                "machines choose different precisions, set model.dtype",
            )

    def send(self, backbone: Backbone) -> str:
        """Send the policy's adapter, unless the server has it; returns its sha256.

        Raises:
            SetupError: The server cannot be reached, or received other bytes.
        """
        body = packed(backbone)
        digest = hashlib.sha256(body).hexdigest()
        if digest != self.version:
            answer = self._ask("PUT", f"/adapters/{digest}", body)
            if answer.get("sha256") != digest:
                raise SetupError(
                    f"the rollout server loaded an adapter with sha256 {answer.get('sha256')}",
                    where=self.url,
                    expected=f"the one that was sent, {digest}",
                    remedy="restart the server, then run the same command again",
                )
            self.version = digest
        return digest

    def sample(
        self,
        backbone: Backbone,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
    ) -> list[Sampled]:
        """Sample one completion of each prompt with the adapter that was sent last.

        The first process of the run asks for all.

        Raises:
            SetupError: The server cannot be reached, or its answer cannot be used.
        """
        ask = self.request(
            backbone, prompts, max_new_tokens=max_new_tokens, temperature=temperature
        )
        return world().of_first(ask)

    def request(
        self,
        backbone: Backbone,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        stopped: threading.Event | None = None,
    ) -> Callable[[], list[Sampled]]:
        """Prepare what `sample` asks for, as a function that may be called in a thread.

        Each completion has a seed of its own, drawn here from torch's global random state.

        Args:
            stopped: Once it is set, nothing more is asked for.
        """
        seeds = torch.randint(2**31 - 1, (len(prompts),)).tolist()
        eos, version = sorted(backbone.eos_ids), self.version

        def one(prompt: Sequence[int], seed: int) -> Sampled:
            if stopped is not None and stopped.is_set():
                raise self._problem("the completions are no longer needed")
            body = {
                "model": version, "prompt": list(prompt), "max_tokens": max_new_tokens,
                "temperature": temperature, "seed": seed, "stop_token_ids": eos, "logprobs": 0,
                "return_token_ids": True,
            }  # fmt: skip
            return self._sampled(self._ask("POST", "/v1/completions", json.dumps(body).encode()))

        def ask() -> list[Sampled]:
            with ThreadPoolExecutor(min(_AT_ONCE, max(len(prompts), 1))) as pool:
                return list(pool.map(one, prompts, seeds))

        return ask

    def _sampled(self, answer: dict[str, Any]) -> Sampled:
        try:
            [choice] = answer["choices"]
            ids = [int(i) for i in choice["token_ids"]]
            logprobs = [float(x) for x in choice["logprobs"]["token_logprobs"]]
        except (KeyError, TypeError, ValueError) as error:
            raise self._problem(f"its answer cannot be read: {first_line(error)!r}") from None
        if not ids or len(ids) != len(logprobs) or not all(map(math.isfinite, logprobs)):
            raise self._problem(f"{len(ids)} tokens came with {len(logprobs)} log-probs")
        return Sampled(ids, torch.tensor(logprobs))

    def _ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            with DIRECT.open(request, timeout=_SECONDS) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            text = error.read(2000).decode(errors="replace")
            if error.code == 401:
                raise SetupError(
                    "the rollout server refused the key",
                    where=self.url,
                    remedy=f"set {KEY} to the key that `lora-rlhf rollout-server` printed",
                ) from None
            raise self._problem(f"it refused {path}: {error.code}: {text:.300}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._problem(f"{path} failed: {first_line(error)}") from None
        if not isinstance(answer, dict):
            raise self._problem(f"{path} answered no JSON object")
        return answer

    def _problem(self, text: str) -> SetupError:
        return SetupError(f"the rollout server: {text}", where=self.url, remedy=_START)


class Ahead:
    """Completions of the next rollout, sampled by a thread while this one trains.

    Args:
        prompts: The next rollout's prompts, as token ids.
        ask: Returns their completions; called in a thread of the first process.
        policy: Copies of the weights that sample.
        stopped: The event that makes `ask` stop.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        ask: Callable[[], list[Sampled]],
        policy: dict[str, torch.Tensor],
        stopped: threading.Event,
    ) -> None:
        self.prompts, self.policy, self._stopped = prompts, policy, stopped
        self._rows: list[Sampled] | None = None
        self._error: BaseException | None = None

        def work() -> None:
            try:
                self._rows = ask()
            except BaseException as error:  # raised again where the completions are used
                self._error = error

        self._thread = threading.Thread(target=work, daemon=True)
        if world().first:
            self._thread.start()

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Self:
        """Return what `state_dict` described, with the same completions."""
        logprobs = map(torch.tensor, state["logprobs"])
        rows = [Sampled(i, x) for i, x in zip(state["ids"], logprobs, strict=True)]
        return cls(state["prompts"], lambda: rows, state["policy"], threading.Event())

    def state_dict(self) -> dict[str, Any] | None:
        """Wait for the completions, and return all as plain data; None if they did not come."""
        self._join()
        if self._rows is None:
            return None
        return {
            "prompts": self.prompts,
            "policy": self.policy,
            "ids": [row.ids for row in self._rows],
            # No tensors: a trainer that goes on moves those to its device, and these stay here.
            "logprobs": [row.logprobs.tolist() for row in self._rows],
        }

    def rows(self) -> list[Sampled]:
        """Wait for the completions; the same in all processes.

        Raises:
            SetupError: The server could not be reached, or its answer could not be used.
        """
        return world().of_first(self._own)

    def stop(self) -> None:
        """Ask for nothing more."""
        self._stopped.set()

    def _own(self) -> list[Sampled]:
        self._join()
        if self._error is not None:
            raise self._error
        assert self._rows is not None
        return self._rows

    def _join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()
