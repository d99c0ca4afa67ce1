# SPDX-License-Identifier: Apache-2.0
"""What all benchmark programs share: shapes, cases, options, clocks, and how they are driven.

Imported by programs in three environments (ours and the two peers'), so it needs nothing but
torch, transformers and tokenizers, and of those only what all three versions have.

A program either runs `--updates` updates by itself or, with `--worker`, one whenever it reads the
line `update` on stdin: then run.py can alternate between programs without paying their start-up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

for _name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRL_EXPERIMENTAL_SILENCE"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PAD, EOS, BOS, UNKNOWN, FIRST_WORD = 0, 1, 2, 3, 4
PHASES = ("generate", "score", "train")


class Shape(NamedTuple):
    """A Llama, by its sizes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    head: int | None = None

    @property
    def attention(self) -> int:
        """Width of all query heads together."""
        return self.heads * (self.head or self.hidden // self.heads)


PRESETS = {
    "tiny": Shape(64, 128, 2, 4, 2, 512),
    "small": Shape(256, 768, 8, 8, 4, 4096),
    "smol135": Shape(576, 1536, 30, 9, 3, 49152, tied=True),  # SmolLM2-135M
    "llama1b": Shape(2048, 8192, 16, 32, 8, 128256, tied=True),  # Llama-3.2-1B
    "llama3b": Shape(3072, 8192, 28, 24, 8, 128256, tied=True),  # Llama-3.2-3B
    "llama8b": Shape(4096, 14336, 32, 32, 8, 128256),  # Llama-3-8B
    "qwen14b": Shape(5120, 13824, 48, 40, 8, 152064),  # Qwen2.5-14B, without its biases
    "mistral24b": Shape(5120, 32768, 40, 32, 8, 131072, head=128),  # Mistral-Small-24B
    "qwen32b": Shape(5120, 27648, 64, 40, 8, 152064),  # Qwen2.5-32B, without its biases
}

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

CASES: dict[str, dict[str, Any]] = {
    "tiny": {
        "preset": "tiny", "num_prompts": 4, "prompt_len": 8, "response_len": 8, "ppo_epochs": 2,
        "minibatch": 2, "lora_targets": "q_proj,v_proj",
    },
    "a": {
        "preset": "small", "num_prompts": 8, "prompt_len": 32, "response_len": 32,
        "ppo_epochs": 2, "minibatch": 4, "lora_targets": "q_proj,v_proj",
    },
    "b": {
        "preset": "smol135", "num_prompts": 4, "prompt_len": 32, "response_len": 32,
        "ppo_epochs": 2, "minibatch": 2, "lora_targets": "q_proj,v_proj",
    },
    "c": {
        "preset": "smol135", "num_prompts": 16, "prompt_len": 64, "response_len": 64,
        "ppo_epochs": 4, "minibatch": 4, "lora_targets": "all-linear",
    },
}  # fmt: skip
"""`tiny` is for the tests: it says nothing about speed."""


def parser(description: str) -> argparse.ArgumentParser:
    """The options that ours and the peers have in common."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--preset", choices=PRESETS, default="small")
    made.add_argument("--num-prompts", type=int, default=8, help="sequences per rollout")
    made.add_argument("--prompt-len", type=int, default=32)
    made.add_argument("--response-len", type=int, default=32, help="all of them, whatever comes")
    made.add_argument("--ppo-epochs", type=int, default=2)
    made.add_argument("--minibatch", type=int, default=4, help="sequences per optimizer step")
    made.add_argument("--updates", type=int, default=5, help="measured, after one to warm up")
    made.add_argument("--lora-r", type=int, default=16, help="alpha is twice that, dropout 0")
    made.add_argument("--lora-targets", default="q_proj,v_proj", help="a list, or all-linear")
    made.add_argument("--learning-rate", type=float, default=1e-5)
    made.add_argument("--temperature", type=float, default=1.0)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--worker", action="store_true", help="one update per line `update` on stdin")
    return made


def options(made: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check; also settles the number of threads, before torch is imported."""
    found = made.parse_args(argv)
    if found.num_prompts % found.minibatch:
        made.error("--num-prompts must be a multiple of --minibatch")
    os.environ.setdefault("OMP_NUM_THREADS", str(found.threads))
    return found


def targets(found: argparse.Namespace) -> str | list[str]:
    """`target_modules` for PEFT."""
    return (
        found.lora_targets if found.lora_targets == "all-linear" else found.lora_targets.split(",")
    )


def llama_options(shape: Shape) -> dict[str, Any]:
    """Keyword arguments of `LlamaConfig`."""
    return {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        **({} if shape.head is None else {"head_dim": shape.head}),
        "max_position_embeddings": 2048,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
        "tie_word_embeddings": shape.tied,
        "attn_implementation": "sdpa",
    }


def tokenizer(words: int, eos: int = EOS) -> Any:
    """A word a token: `w5` is id 5. `eos` may lie beyond the model's rows: it is never sampled."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = {PAD: "<pad>", BOS: "<s>", UNKNOWN: "<unk>", eos: "</s>"}
    vocabulary = {named.get(i, f"w{i}"): i for i in range(max(words, eos + 1))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        padding_side="left",
    )


def prompts(found: argparse.Namespace, count: int) -> list[list[int]]:
    """Random ids, `--prompt-len` each."""
    import torch

    generator = torch.Generator().manual_seed(found.seed)
    words = PRESETS[found.preset].vocabulary
    shape = (count, found.prompt_len)
    rows: list[list[int]] = torch.randint(FIRST_WORD, words, shape, generator=generator).tolist()
    return rows


# --- memory --------------------------------------------------------------------------------------


def _status(key: str) -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(key + ":"))
    return int(line.split()[1]) / 1024


def resident_mb() -> float:
    """Resident memory now."""
    return _status("VmRSS")


def peak_mb() -> float:
    """The most resident memory since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Start the high-water mark again from here, where the kernel allows it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def tensor_mb(tensors: Any) -> float:
    """MB of these tensors, memory that they share counted once."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values()) / 2**20


# --- clocks --------------------------------------------------------------------------------------


class Updates:
    """Times updates by phase, in CPU and wall seconds, and waits for orders between them.

    What is in no phase counts as training: optimizer, logging, garbage collection.
    """

    def __init__(self, found: argparse.Namespace, synchronize: Any = None) -> None:
        self.options, self.worker, self.synchronize = found, found.worker, synchronize
        self.records: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.heard: Callable[[str], None] | None = None  # told of every new phase
        # Libraries print to stdout; the answers go there alone.
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        sys.stdout.flush()
        os.dup2(2, 1)
        forget_peak()
        self.before_models = resident_mb()
        self.after_models = self.before_models

    def models_are_made(self, impl: str, **facts: Any) -> None:
        """Note who this is."""
        self.after_models = resident_mb()
        self.facts = {"impl": impl, **facts}

    def answer(self, found: dict[str, Any]) -> None:
        """One line of JSON to whoever drives this program."""
        self._answers.write(json.dumps(found) + "\n")
        self._answers.flush()

    def begin(self) -> str:
        """Wait for the order to make an update, and start the clocks; returns the order.

        Does not return when there is nothing more to do: the summary is printed and the process
        ends.
        """
        order = self._order()
        if order == "stop":
            self.answer(self.summary())
            sys.stderr.flush()
            os._exit(0)  # trainers of three libraries need not be unwound
        self._asked = order
        self._phase, self._spent = "train", {name: [0.0, 0.0] for name in PHASES}
        self._mark = self._now()
        return order

    def _order(self) -> str:
        while self.worker:
            self.answer({"ready": len(self.records)})
            order = sys.stdin.readline().strip()
            if not order.startswith("matmul"):
                return order or "stop"
            sizes = [int(size) for size in order.split()[1:]]
            seconds = 0.02 if self.options.preset == "tiny" else 0.5  # for the tests
            self.answer({"matmul": matmul_rate(*sizes, seconds=seconds)})
        return "update" if len(self.records) <= self.options.updates else "stop"

    def _now(self) -> tuple[float, float]:
        if self.synchronize is not None:
            self.synchronize()
        return time.process_time(), time.perf_counter()

    def enter(self, phase: str) -> None:
        """From here on it is `phase`."""
        now = self._now()
        for kind in (0, 1):
            self._spent[self._phase][kind] += now[kind] - self._mark[kind]
        if self.heard is not None:
            self.heard(phase)
        self._phase, self._mark = phase, now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """For the time of a call, it is `name`."""
        before = self._phase
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def timed(self, name: str, function: Any) -> Any:
        """`function`, its time counted as phase `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def end(self, **more: Any) -> None:
        """The update is over."""
        self.enter("train")
        record: dict[str, Any] = {"update": len(self.records), "order": self._asked}
        for kind, unit in enumerate(("cpu", "wall")):
            record[unit] = {name: round(self._spent[name][kind], 4) for name in PHASES}
            record[unit]["total"] = round(sum(record[unit].values()), 4)
        self.records.append({**record, "peak_mb": round(peak_mb(), 1), **more})
        if self.worker:
            self.answer(self.records[-1])
        else:
            print(json.dumps(self.records[-1]), file=sys.stderr, flush=True)

    def summary(self) -> dict[str, Any]:
        """The final line: settings, medians over the measured updates, memory."""
        measured = [record for record in self.records[1:] if record["order"] == "update"]
        found: dict[str, Any] = {**self.facts, **vars(self.options)}
        for unit in ("cpu", "wall") if measured else ():
            for name in (*PHASES, "total"):
                median = statistics.median(record[unit][name] for record in measured)
                found[f"{unit}_{name}_s"] = round(median, 4)
        for name in ("cuda_peak_mb", "cuda_reserved_mb"):
            if measured and name in measured[-1]:
                found[name] = measured[-1][name]
        return {
            **found,
            "measured_updates": len(measured),
            "rss_before_models_mb": round(self.before_models, 1),
            "rss_after_models_mb": round(self.after_models, 1),
            "peak_rss_mb": round(peak_mb(), 1),
            "peak_above_imports_mb": round(peak_mb() - self.before_models, 1),
        }


def matmul_rate(rows: int, inner: int, columns: int, seconds: float) -> float:
    """GFLOP/s, by CPU seconds, of a plain float32 product (rows, inner) x (inner, columns)."""
    import torch

    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    out, times = torch.empty(rows, columns), []
    torch.mm(a, b, out=out)
    start = time.process_time()
    while time.process_time() - start < seconds or len(times) < 5:
        before = time.process_time()
        torch.mm(a, b, out=out)
        times.append(time.process_time() - before)
    return 2 * rows * inner * columns / statistics.median(times) / 1e9
