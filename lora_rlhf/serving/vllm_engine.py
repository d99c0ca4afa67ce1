# SPDX-License-Identifier: Apache-2.0
"""vLLM's own server with our adapters: started, loaded under new names, checked by log-prob."""

from __future__ import annotations

import http.client
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_rlhf.algorithms.vllm_rollouts import DIRECT
from lora_rlhf.errors import AdapterError, SetupError, UsageError, first_line
from lora_rlhf.hub import targets
from lora_rlhf.models import loading

from .api_server import KEY, Access
from .inference import InferenceEngine, Request

PYTHON = "LORA_RLHF_VLLM"
"""Variable with the interpreter of the environment that has vLLM."""

OPTIONS = "LORA_RLHF_VLLM_OPTIONS"
"""Variable with more options of vLLM's server, such as `--gpu-memory-utilization 0.3`."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank."""

TOLERANCE = {"float32": 0.01, "auto": 0.3}
"""Largest difference of a token's log-prob, by the dtype of both engines; half precision: auto."""

_PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.")
_TOKENS, _SECONDS = 12, 60.0
_UNKNOWN = (
    "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora",
    "trainable_token_indices",
)  # fmt: skip
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "lora_ga")  # they change no weight of the base


@dataclass(frozen=True)
class Reference:
    """Token ids, and our engine's log-probs of the last of them."""

    ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Served:
    """An adapter with its name in vLLM, which holds the sha256: a version never reuses a name.

    vLLM keeps cache blocks by name; under an old one it may answer with those of old weights.
    """

    name: str
    folder: Path
    references: tuple[Reference, ...] = ()
    dtype: str = "auto"
    """Of our engine: float32, or auto."""


def problem(folder: Path, max_rank: int = RANKS[-1]) -> str:
    """The reason why vLLM cannot serve an adapter as what it is; empty: it can."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        rank = max([int(config["r"]), *(config.get("rank_pattern") or {}).values()])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its adapter_config.json cannot be read: {first_line(error)}"
    init = config.get("init_lora_weights", True)
    reasons = {
        f"it is of type {config.get('peft_type')}, not LoRA": config.get("peft_type") != "LORA",
        "it has a head for scores (modules_to_save, or another task than CAUSAL_LM): reward and "
        "value models write no text": (
            config.get("modules_to_save") or config.get("task_type", "CAUSAL_LM") != "CAUSAL_LM"
        ),
        f"its rank {rank} is above --max-lora-rank {max_rank}": rank > max_rank,
        "it uses DoRA": config.get("use_dora"),
        "it has a bias": config.get("lora_bias") or config.get("bias", "none") != "none",
        f"init_lora_weights {init!r} changes the base's weights": (
            isinstance(init, str) and init.lower() not in _PLAIN_INITS
        ),
    }
    reasons |= {f"vLLM does not know {key}": config.get(key) for key in _UNKNOWN}
    return next((reason for reason, holds in reasons.items() if holds), "")


class Client:
    """vLLM's HTTP API, as far as adapters need it."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url, self._key = url.rstrip("/"), key

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET a path, or POST a body to it; JSON if the answer is JSON.

        Raises:
            SetupError: It cannot be reached, or refuses.
        """
        request = urllib.request.Request(
            self.url + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        try:
            with DIRECT.open(request, timeout=_SECONDS) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            message = error.read(2000).decode(errors="replace")
            raise SetupError(f"vLLM refused {path}: {error.code}: {message:.300}") from None
        except (OSError, http.client.HTTPException) as error:
            raise SetupError(f"vLLM at {self.url} cannot be reached: {first_line(error)}") from None
        with suppress(ValueError):
            return json.loads(text)
        return text

    def models(self) -> list[str]:
        """Names that requests can use."""
        return [str(one["id"]) for one in self.ask("/v1/models")["data"]]

    def load(self, served: Served) -> float:
        """Load an adapter while the server runs, and check it; it is unloaded if it is wrong.

        Returns:
            The largest difference of a log-prob from our engine's.

        Raises:
            AdapterError: Its log-probs are not those of our engine.
            SetupError: vLLM refused it.
        """
        if served.name not in self.models():
            path = str(served.folder.resolve())
            self.ask("/v1/load_lora_adapter", {"lora_name": served.name, "lora_path": path})
        worst = max((self._difference(served.name, one) for one in served.references), default=0.0)
        if not worst <= TOLERANCE[served.dtype]:
            self.ask("/v1/unload_lora_adapter", {"lora_name": served.name})
            raise AdapterError(
                f"{served.name}: a log-prob in vLLM differs by {worst:.3g} from our engine's",
                where=str(served.folder),
                expected=f"at most {TOLERANCE[served.dtype]:g}",
                remedy="serve it without --engine vllm, or merge it into the base",
            )
        return worst

    def _difference(self, name: str, reference: Reference) -> float:
        body = {"model": name, "prompt": reference.ids, "max_tokens": 1, "prompt_logprobs": 1}
        [choice] = self.ask("/v1/completions", body)["choices"]
        n = len(reference.logprobs)
        rows = zip(choice["prompt_logprobs"][-n:], reference.ids[-n:], strict=True)
        theirs = [float(row[str(token)]["logprob"]) for row, token in rows]
        apart = [abs(a - b) for a, b in zip(theirs, reference.logprobs, strict=True)]
        return max(apart) if all(map(math.isfinite, apart)) else math.inf


def prepare(
    names: Sequence[str | Path], base: str | None = None, check: bool = True
) -> tuple[str, list[Served]]:
    """The base's folder or id and the adapters of runs, RUN:policy and adapter folders.

    With `check` our own engine computes log-probs first, and is closed again.

    Raises:
        UsageError: There are several bases, or there is no adapter, or one that vLLM cannot serve.
    """
    named = targets.parse(list(map(str, names)), base=base, servers=False)
    sections = [target.base for target in named if target.base is not None]
    places = {str(loading.local_folder(section) or section.id) for section in sections}
    if len(places) != 1 or any(section.load_in_4bit for section in sections):
        raise UsageError(
            f"vLLM serves one base, not in 4-bit; given: {', '.join(sorted(places))}",
            expected="runs and adapters of one base that was not trained in 4-bit",
        )
    served = []
    for target in named:
        if target.adapter is None:
            continue
        if reason := problem(target.adapter):
            raise UsageError(f"vLLM cannot serve {target.name}: {reason}")
        sums = target.describe()
        weights, config = (str(sums[f"adapter_{key}"]) for key in ("sha256", "config_sha256"))
        served.append(Served(f"{target.name}@{weights[:12]}-{config[:4]}", target.adapter))
    if not served:
        raise UsageError(
            "no adapter is named", expected="a run, RUN:policy or the folder of an adapter"
        )
    return places.pop(), _referenced(served, names, base) if check else served


def _referenced(
    served: Sequence[Served], names: Sequence[str | Path], base: str | None
) -> list[Served]:
    """Let our engine answer with each adapter, and keep ids and log-probs."""
    engine = InferenceEngine.load(names, base=base)
    try:
        made = []
        dtype = "float32" if "float32" in str(engine.base.causal.dtype) else "auto"
        for one in served:
            weights = one.name.rpartition("@")[2][:12]
            model = next(m.name for m in engine.models.values() if m.adapter.startswith(weights))
            references = []
            for text in _PROMPTS:
                turns = ({"role": "user", "content": text},)
                request = Request(turns, model, max_tokens=_TOKENS, temperature=0.0, logprobs=0)
                [choice] = engine.generate(request).choices
                values = [token.logprob for token in choice.logprobs or ()]
                ids = [*map(int, engine._encode(turns)), *choice.ids[: len(values)]]
                references.append(Reference(ids, values))
            kept = tuple(r for r in references if r.logprobs)
            made.append(replace(one, references=kept, dtype=dtype))
        return made
    finally:
        engine.close()


def serving_command(python: str, base: str, served: Sequence[Served], access: Access) -> list[str]:
    """The command that serves these adapters."""
    ranks = [json.loads((s.folder / "adapter_config.json").read_text("utf-8")) for s in served]
    highest = max(max([r["r"], *(r.get("rank_pattern") or {}).values()]) for r in ranks)
    template = served[0].folder / "chat_template.jinja"
    more = ["--chat-template", str(template)] if template.is_file() else []
    loras = max(2, len(served))
    return command(python, base, access, served[0].dtype, rank=highest, loras=loras, more=more)


def command(
    python: str,
    base: str,
    access: Access,
    dtype: str,
    *,
    rank: int,
    loras: int,
    more: Sequence[str] = (),
) -> list[str]:
    """The command that starts vLLM's server; its key goes through the environment."""
    made = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", base,
        "--served-model-name", "base", "--dtype", dtype,
        "--host", access.host, "--port", str(access.port),
        "--enable-lora", "--max-loras", str(loras),
        "--max-lora-rank", str(next(known for known in RANKS if known >= rank)),
        *more, *shlex.split(os.environ.get(OPTIONS, "")),
    ]  # fmt: skip
    return made


class VllmServer:
    """vLLM's server as a child process, with adapters that were checked.

    Args:
        command: The command that starts it.
        seconds: Time to start.

    Raises:
        SetupError: It did not start, or refused an adapter.
        AdapterError: An adapter's log-probs are not those of our engine.
    """

    def __init__(
        self,
        command: Sequence[str],
        access: Access,
        served: Sequence[Served] = (),
        seconds: float = 900.0,
    ) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", KEY)}
        environment |= {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_API_KEY": access.key,
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }
        try:
            self.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise SetupError(
                f"{command[0]} cannot be started: {first_line(error)}",
                remedy=f"set {PYTHON} to the Python of the environment that has vLLM",
            ) from None
        self.access = access
        self.client = Client(f"http://{access.host}:{access.port}", access.key)
        self.differences: dict[str, float] = {}
        try:
            self._wait(time.monotonic() + seconds)
            for one in served:
                self.differences[one.name] = self.client.load(one)
        except BaseException:
            self.close()
            raise

    def _wait(self, end: float) -> None:
        while time.monotonic() < end:
            if (code := self.process.poll()) is not None:
                raise SetupError(
                    f"vLLM ended with exit code {code} before it answered; its lines are above",
                    remedy="start its server there by hand; docs/use.md has the command",
                )
            with suppress(SetupError):
                self.client.models()
                return
            time.sleep(0.5)
        raise SetupError(
            "vLLM started, but did not answer in time",
            remedy="start its server there by hand; docs/use.md has the command",
        )

    def lines(self) -> list[str]:
        """Lines for people: address, key and models."""
        lines = [f"vLLM at {self.client.url}/v1", f"key: {self.client._key}", "model base"]
        for name, worst in self.differences.items():
            lines.append(f"model {name}: log-probs are ours within {worst:.2g}")
        return lines

    def run(self) -> None:
        """Serve until vLLM ends or a signal comes, which it gets too."""
        previous = signal.signal(signal.SIGTERM, lambda *_: self.process.terminate())
        try:
            self.process.wait()
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, previous)
            self.close()

    def close(self) -> None:
        """End the server, by force after 30 seconds."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve(
    names: Sequence[str | Path], access: Access, *, python: str = "", base: str | None = None
) -> VllmServer:
    """Start vLLM with the adapters of runs, each checked against our engine.

    Args:
        python: Interpreter of the environment that has vLLM; default: that in LORA_RLHF_VLLM.
    """
    access = with_port(access)
    place, served = prepare(names, base)
    made = serving_command(python or interpreter(), place, served, access)
    return VllmServer(made, access, served)


def interpreter() -> str:
    """The interpreter of the environment that has vLLM."""
    return os.environ.get(PYTHON, "python")


def with_port(access: Access) -> Access:
    """The same address with a free port, if its port is 0."""
    if access.port:
        return access
    with socket.create_server((access.host, 0)) as free:
        return replace(access, port=free.getsockname()[1])
