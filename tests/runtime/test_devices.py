# SPDX-License-Identifier: Apache-2.0
"""What a run does on machines that this one is not: old GPUs, several, Apple's, no bitsandbytes."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import killed
import pytest
import torch
from recording import RecordingProgress
from safetensors.torch import load_file

from lora_rlhf import pipeline
from lora_rlhf.models import loading
from lora_rlhf.reports.cards import model_card
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import devices
from lora_rlhf.training import sft, trl_config

LITTLE = ("checkpoint.every_minutes=null", "checkpoint.every_steps=null", "evaluate.n=4",
          "reward.held_out_model=false", "ppo.updates=2", "ppo.ptx_coef=0", "ppo.ema=null",
          "ppo.value_warmup_updates=0", "data.text=[]", "sft.args.num_train_epochs=1",
          "reward.gate=warn")  # fmt: skip


def cuda(count: int, capability=(9, 0)) -> SimpleNamespace:
    return SimpleNamespace(
        is_available=lambda: bool(count),
        device_count=lambda: count,
        get_device_capability=lambda *_: capability,
        is_bf16_supported=lambda *_, **__: True,
    )


@pytest.fixture
def gpus(monkeypatch):
    """Fake GPUs; everything else of torch, and the tensors, are of this CPU."""

    def there(count: int, capability=(9, 0), mps: bool = False) -> None:
        class Torch:
            def __getattr__(self, name):
                return getattr(torch, name)

        fake = Torch()
        fake.cuda = cuda(count, capability)
        fake.backends = SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps))
        monkeypatch.setattr(devices, "torch", fake)
        monkeypatch.setattr(loading, "pick_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(devices, "pick_device", lambda: torch.device("cpu"))

    return there


@pytest.mark.parametrize(
    ("count", "capability", "mps", "dtype", "limitations"),
    [
        (1, (9, 0), False, torch.bfloat16, []),
        (0, None, False, torch.float32, ["no CUDA GPU: everything runs on the CPU"]),
        (0, None, True, torch.float32, ["no CUDA GPU: an Apple GPU (MPS) is not used, everything "
                                        "runs on the CPU"]),
        (1, (7, 5), False, torch.float16, ["the GPU (compute capability 7.5) has no bfloat16: "
                                           "float16 with scaled losses in its place"]),
        (1, (7, 5), False, torch.bfloat16, ["the GPU (compute capability 7.5) has no bfloat16: it "
                                            "is emulated, and slow; model.dtype: auto takes "
                                            "float16"]),
        (2, (8, 6), False, torch.bfloat16, ["2 GPUs are visible: only the first is used"]),
    ],
)  # fmt: skip
def test_hardware_limitations_are_named(gpus, count, capability, mps, dtype, limitations):
    gpus(count, capability, mps)
    assert devices.hardware_limitations(dtype) == limitations


@pytest.mark.parametrize(
    ("able", "emulates"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
        ({}, False),
    ],
)
def test_a_processor_that_emulates_bfloat16_is_named(gpus, monkeypatch, able, emulates):
    gpus(0, None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    slow = ["this processor has no instructions for bfloat16: it is emulated, and several times "
            "slower than float32; model.dtype: auto takes float32"]  # fmt: skip
    assert devices.hardware_limitations(torch.bfloat16)[1:] == slow * emulates
    assert devices.hardware_limitations(torch.float32)[1:] == []


def test_a_t4_trains_in_float16_with_float32_adapters(gpus, tmp_path):
    """All stages that train, on a CPU that is presented as a T4."""
    gpus(1, (7, 5))
    killed.write(tmp_path)
    progress = RecordingProgress()
    recipe = killed.recipe(tmp_path, *LITTLE)
    record = pipeline.run(recipe, tmp_path / "run", until="ppo", progress=progress)
    note = "the GPU (compute capability 7.5) has no bfloat16"
    assert record.data["model"]["dtype"] == "float16" and record.done("ppo")
    assert [line for line in progress.lines if line.startswith(note)]
    assert record.data["clock"]["host"]["makes_do"][0].startswith(note)
    for role in ("sft", "reward", "policy", "value"):
        assert f"Limitation of the machine: {note}" in model_card.render(record, role)
        tensors = load_file(record.adapter(role) / "adapter_model.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.float32}
        assert all(t.isfinite().all() for t in tensors.values())
        assert any(t.abs().max() > 0 for n, t in tensors.items() if "lora_B" in n), role
    assert len(record.metrics("ppo")) == 2 and "skipped" not in json.dumps(record.data["stages"])


def test_apple_gpu_is_not_used(monkeypatch, tmp_path):
    """transformers would take it by itself, and the backbone would be on the CPU."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: None)  # accelerate's, and harmless there
    killed.write(tmp_path)
    progress, recipe = RecordingProgress(), killed.recipe(tmp_path, *LITTLE)
    config = sft.arguments(recipe, tmp_path)
    assert config.device.type == "cpu"
    record = pipeline.run(recipe, tmp_path / "run", until="sft", progress=progress)
    assert record.done("sft")
    assert (
        "no CUDA GPU: an Apple GPU (MPS) is not used, everything runs on the CPU" in progress.lines
    )


def test_of_two_gpus_a_trainer_sees_one():
    """Else transformers would replicate the backbone over both (DataParallel), and TRL refuse."""

    @dataclasses.dataclass
    class TwoGpus(trl_config.PPOConfig):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    given = {
        "output_dir": "x",
        "use_cpu": True,
        "bf16": False,
        "num_generations": 1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
    }
    assert TwoGpus(**given).n_gpu == 2
    assert trl_config.build("ppo", TwoGpus, given).n_gpu == 1


# --- bitsandbytes --------------------------------------------------------------------------------

BLOCK = """
import importlib.abc, sys
from importlib.machinery import ModuleSpec

class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name == "bitsandbytes" else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise {error}("libcudart.so.12: cannot open shared object file")

if "{error}" == "absent":
    sys.modules["bitsandbytes"] = None
else:
    sys.meta_path.insert(0, Broken())
sys.argv = ["lora-rlhf", *sys.argv[1:]]
from lora_rlhf.cli.app import main
main()
"""


def without(error: str, *args: object) -> tuple[int, str]:
    """The command where bitsandbytes is absent, or raises this when it is imported."""
    code = textwrap.dedent(BLOCK.format(error=error))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("error", ["absent", "ImportError", "RuntimeError", "OSError"])
def test_without_bitsandbytes_all_but_4bit_works(error, tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "closed-world"
    common = ("sft", recipe, "--set", "sft.args.max_steps=2", "--out")
    code, text = without(error, *common, tmp_path / "run")
    assert code == 0, text
    assert Record.read(tmp_path / "run").done("sft")
    code, text = without(error, *common, tmp_path / "four", "--set", "model.load_in_4bit=true")
    assert code == 4 and "model.load_in_4bit needs bitsandbytes: " in text
    assert "pip install bitsandbytes, or set model.load_in_4bit to false" in text
    assert error == "absent" or "libcudart.so.12" in text
    code, text = without(error, "plan", recipe)
    assert code == 0 and "unexpected" not in text, text
    code, text = without(error, "env")
    assert code == 0 and "trl fits         yes" in text
    assert error == "absent" or "libcudart.so.12" in text


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16),
     ((9, 0), torch.bfloat16)],
)  # fmt: skip
def test_auto_dtype_goes_by_compute_capability(monkeypatch, capability, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    assert devices.pick_dtype("auto") is wanted


def test_auto_dtype_on_a_cpu_is_float32_and_an_explicit_one_wins(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.pick_dtype("auto") is torch.float32
    assert devices.pick_dtype("bfloat16") is torch.bfloat16
