# SPDX-License-Identifier: Apache-2.0
"""vLLM as the sampler of PPO's rollouts: it takes the policy's adapter and answers requests.

vLLM runs as a child process that only this machine reaches. This server stands before it: it
receives adapters as bytes, so that trainer and server need no common disk, writes them to a folder
of its own, has vLLM load them, and passes completion requests on.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import re
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lora_rlhf.algorithms import vllm_rollouts
from lora_rlhf.errors import LoraRlhfError, SetupError, UsageError, first_line
from lora_rlhf.models import loading
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.runtime import devices
from lora_rlhf.runtime.local_server import LOOPBACK, reached_at

from . import vllm_engine
from .api_server import Access
from .vllm_engine import Client, Served, VllmServer

FILES = ("adapter_config.json", "adapter_model.safetensors")

LARGEST = 4 << 30
"""Bytes of an adapter."""

_LARGEST_REQUEST = 64 << 20
_SECONDS = 600.0
_ADAPTER = re.compile(r"/adapters/(?P<sha256>[0-9a-f]{64})")


def command(recipe: Recipe, access: Access, python: str = "") -> list[str]:
    """The command that starts vLLM for a recipe's rollouts.

    vLLM must draw from the policy's own distribution: without the base's generation config, which
    may hold top-p or penalties, and with log-probs at the sampling temperature.
    """
    model = recipe.model
    base = loading.local_folder(model) or model.id
    more = ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    more += ["--revision", model.revision] if model.revision else []
    more += ["--quantization", "bitsandbytes"] if model.load_in_4bit else []
    rank, dtype = recipe.lora.r, str(devices.pick_dtype(model.dtype)).removeprefix("torch.")
    python = python or vllm_engine.interpreter()
    return vllm_engine.command(python, base, access, dtype, rank=rank, loras=1, more=more)


class Versions:
    """The policy's adapters that vLLM has: one at a time, named by its sha256."""

    def __init__(self, client: Client, folder: Path, rank: int) -> None:
        self._client, self._folder, self._rank = client, folder, rank
        self._lock = threading.Lock()
        self.current = ""

    def load(self, digest: str, body: bytes) -> str:
        """Replace the adapter; returns the sha256 of what was received.

        Raises:
            UsageError: The bytes are no adapter that vLLM can serve.
            SetupError: vLLM refused it.
        """
        received = hashlib.sha256(body).hexdigest()
        if received != digest:
            raise UsageError(f"the adapter arrived damaged: its sha256 is {received}")
        with self._lock:
            if digest == self.current:
                return digest
            folder = self._folder / digest
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._unpack(body, folder)
            if reason := vllm_engine.problem(folder, self._rank):
                raise UsageError(f"vLLM cannot serve this adapter: {reason}")
            if self.current:
                self._client.ask("/v1/unload_lora_adapter", {"lora_name": self.current})
                shutil.rmtree(self._folder / self.current, ignore_errors=True)
                self.current = ""
            self._client.load(Served(digest, folder))
            self.current = digest
        return received

    @staticmethod
    def _unpack(body: bytes, folder: Path) -> None:
        try:
            with zipfile.ZipFile(io.BytesIO(body)) as archive:
                if sorted(archive.namelist()) != sorted(FILES):
                    raise UsageError(f"an adapter of other files: {archive.namelist()[:5]}")
                if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
                    raise UsageError("the adapter is compressed; it is sent as it is")
                for name in FILES:
                    (folder / name).write_bytes(archive.read(name))
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
            raise UsageError(f"the adapter is not a zip archive: {error}") from None


class RolloutServer:
    """The server, with vLLM as its child; closing it ends both.

    Args:
        vllm: vLLM's server, started already.
    """

    def __init__(self, recipe: Recipe, vllm: VllmServer, access: Access) -> None:
        self.access, self.vllm = access, vllm
        self.info = vllm_rollouts.described(recipe)
        self._folder = tempfile.TemporaryDirectory(prefix="lora-rlhf-rollouts-")
        rank = next(known for known in vllm_engine.RANKS if known >= recipe.lora.r)
        self.versions = Versions(vllm.client, Path(self._folder.name), rank)
        try:
            handler = type("Handler", (_Handler,), {"owner": self})
            self._http = _Http((access.host, access.port), handler)
        except OSError as error:
            self.close()
            raise SetupError(
                f"port {access.port} of {access.host} cannot be used: {first_line(error)}",
                remedy="stop the other server, or give another --port",
            ) from None
        self.port: int = self._http.server_address[1]
        threading.Thread(target=self._end_with_vllm, daemon=True).start()

    @property
    def url(self) -> str:
        """The address for `ppo.rollout_server`."""
        return reached_at(self.access.host, self.port)

    def lines(self) -> list[str]:
        """Lines for people: what the trainer needs."""
        return [
            f"rollout server for {self.info['base']} at {self.url}",
            f"on the trainer: export {vllm_rollouts.KEY}={self._shown_key()}",
            f"and: lora-rlhf run RECIPE --set ppo.rollout_server={self.url}",
        ]

    def _shown_key(self) -> str:
        own = os.environ.get(vllm_rollouts.KEY) == self.access.key
        return "(the key that is set here)" if own else self.access.key

    def run(self) -> None:
        """Serve until Ctrl-C, or until vLLM ends."""
        code = None
        try:
            self._http.serve_forever()
            code = self.vllm.process.poll()  # before we end it ourselves
        except KeyboardInterrupt:
            pass
        finally:
            self.close()
        if code:
            raise SetupError(
                f"vLLM ended with exit code {code}; its lines are above",
                remedy="start the rollout server again, then continue the run",
            )

    def _end_with_vllm(self) -> None:
        self.vllm.process.wait()
        self._http.shutdown()

    def close(self) -> None:
        """End vLLM and delete the received adapters."""
        self.vllm.close()
        if hasattr(self, "_http"):
            self._http.server_close()  # a request that waits to be accepted ends now
        self._folder.cleanup()

    def passed_on(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Send a request to vLLM; returns its status and body."""
        request = urllib.request.Request(
            self.vllm.client.url + path,
            body,
            {
                "Content-Type": "application/json",
                "Authorization": f"Bearer {self.vllm.access.key}",
            },
        )
        try:
            with vllm_rollouts.DIRECT.open(request, timeout=_SECONDS) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except (OSError, http.client.HTTPException) as error:
            return 502, first_line(error).encode()


class _Handler(BaseHTTPRequestHandler):
    """Requests of the trainer."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    owner: RolloutServer

    def do_GET(self) -> None:
        if self._admitted() and self._known(self.path == "/info"):
            self._answer(200, self.owner.info | {"adapter": self.owner.versions.current})

    def do_PUT(self) -> None:
        match = _ADAPTER.fullmatch(self.path)
        if not self._admitted() or not self._known(match is not None):
            return
        assert match is not None
        if (body := self._body(LARGEST)) is None:
            return
        try:
            received = self.owner.versions.load(match["sha256"], body)
        except LoraRlhfError as error:
            return self._answer(
                400 if isinstance(error, UsageError) else 502, {"error": str(error)}
            )
        self._answer(200, {"sha256": received})

    def do_POST(self) -> None:
        if not self._admitted() or not self._known(self.path == "/v1/completions"):
            return
        if (body := self._body(_LARGEST_REQUEST)) is not None:
            self._send(*self.owner.passed_on(self.path, body))

    def _admitted(self) -> bool:
        if self.owner.access.admits(self.headers.get("Authorization", "")):
            return True
        self.close_connection = True
        self._answer(401, {"error": "the key is missing or wrong"})
        return False

    def _known(self, known: bool) -> bool:
        if not known:
            self.close_connection = True
            self._answer(404, {"error": f"unknown path {self.path[:100]}"})
        return known

    def _body(self, limit: int) -> bytes | None:
        """Read the body; None after an answer that says why not."""
        given = self.headers.get("Content-Length", "")
        if not given.isdecimal() or int(given) > limit:
            self.close_connection = True
            self._answer(413, {"error": f"a body of at most {limit} bytes is expected"})
            return None
        return self.rfile.read(int(given))

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing: a rollout has hundreds of requests."""


class _Http(ThreadingHTTPServer):
    """A thread for each connection; a rollout's requests come at the same moment."""

    daemon_threads = True
    request_queue_size = 1024


def access(host: str = LOOPBACK, port: int = 0) -> Access:
    """Address and key of a rollout server: LORA_RLHF_ROLLOUT_KEY, or a new one on this machine.

    Raises:
        UsageError: Other machines can reach it, and there is no key; or the key is too short.
    """
    return Access(host, port, variable=vllm_rollouts.KEY)


def serve(recipe: Recipe, access: Access, python: str = "") -> RolloutServer:
    """Start vLLM for a recipe's rollouts, and the server before it.

    Args:
        python: Interpreter of the environment that has vLLM; default: that in LORA_RLHF_VLLM.

    Raises:
        RecipeError: The base model cannot be found.
        SetupError: vLLM does not start, or the port is not free.
    """
    inner = vllm_engine.with_port(Access(LOOPBACK, 0, ""))
    vllm = VllmServer(command(recipe, inner, python), inner)
    return RolloutServer(recipe, vllm, access)
