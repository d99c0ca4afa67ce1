# SPDX-License-Identifier: Apache-2.0
"""Offline, quiet and on one thread, before any library is imported."""

import functools
import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # connections that end are tested

from pathlib import Path
from types import SimpleNamespace

import pytest
import typer.testing

# Collect seldom: tests make little garbage, and a full collection goes through all of torch.
gc.set_threshold(50_000, 50, 50)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_plans():
    """The plan of a tiny run takes longer than the run; planning/test_run_memory.py makes them."""
    with pytest.MonkeyPatch.context() as patch:
        if run_memory := sys.modules.get("lora_rlhf.planning.run_memory"):
            patch.setattr(run_memory, "before_run", lambda recipe: (None, "plan: none in tests"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_pictures():
    """Those of a tiny run take longer than a stage of it; end_to_end/test_pipeline.py draws."""
    with pytest.MonkeyPatch.context() as patch:
        if pipeline := sys.modules.get("lora_rlhf.pipeline"):
            patch.setattr(pipeline, "plots", SimpleNamespace(run=lambda record: []))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_tree_of_commands():
    """`CliRunner.invoke` builds the command of an app each time, which takes longer than most."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    """Processes are killed here, the machine never is: that needs the handle, not the platter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_names_for_tables():
    """datasets pickles each table to name the files of its cache; tables in memory have none."""
    with pytest.MonkeyPatch.context() as patch:
        if datasets := sys.modules.get("datasets"):
            patch.setattr(
                datasets.arrow_dataset,
                "generate_fingerprint",
                lambda _: datasets.fingerprint.generate_random_fingerprint(),
            )
        yield


@pytest.fixture(scope="session", autouse=True)
def _packages_are_looked_up_once():
    """accelerate looks on the disk for five packages in every optimizer step."""
    with pytest.MonkeyPatch.context() as patch:
        if imports := sys.modules.get("accelerate.utils.imports"):
            available = functools.cache(imports._is_package_available)
            patch.setattr(imports, "_is_package_available", available)
        yield


HEAVY = (
    "test_pipeline.py", "test_plan.py", "test_ppo_trainer.py", "test_backup.py",
    "test_run_suite.py", "test_oom.py", "test_backbone.py", "test_resume.py", "test_doctor.py",
    "test_interrupts.py", "test_nonfinite_guard.py", "test_several_gpus.py", "test_rollout.py",
    "test_refusals.py", "test_publishing.py", "test_adapters.py", "test_policy_trainer.py",
    "test_custom_reward.py",
)  # fmt: skip
"""The files that take longest. They begin, so that two workers end at about the same time."""

WATCHED = ("test_hostile.py", "test_fuzz.py")
"""Those that install a hook for audit events. It stays, and each `id()` calls it: they are late."""

LAST = ("cli", "serving")
"""Folders after them, so that two workers still end at about the same time."""

_absent = {*HEAVY, *WATCHED} - {path.name for path in Path(__file__).parent.rglob("test_*.py")}
assert not _absent, f"named here, and gone: {sorted(_absent)}"


ALIKE = ("qwen2", "mistral")
"""Architectures whose code is that of others: their cases in models/ are slow."""


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Lets the second worker begin at the other end of each folder.

    Rewriting a test file's assertions takes longer than importing it. What one worker has written
    to `__pycache__`, the other reads.
    """
    report = yield
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw1" and isinstance(collector, pytest.Directory):
        report.result.reverse()
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "models" and (case := getattr(item, "callspec", None)):
            if any(isinstance(value, str) and value in ALIKE for value in case.params.values()):
                item.add_marker(pytest.mark.slow)
    order = {name: number for number, name in enumerate(HEAVY, -len(HEAVY))}
    order |= dict.fromkeys(WATCHED, 1)

    def place(item):
        return order.get(item.path.name, 2 * (item.path.parent.name in LAST)), item.path

    items.sort(key=place)  # by the path too: both workers have to list the tests in one order


@pytest.fixture(scope="module", autouse=True)
def _quick_gc():
    """Hides what imports and caches hold so far from the garbage collector.

    Every trainer ends with a full collection, which then goes through what its test made only; and
    the children that tests fork copy fewer pages.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def chromium():
    """One browser for all tests of pages."""
    from headless import started

    with started() as browser:
        yield browser


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real human data, or a skip that says why."""
    folder = os.environ.get("LORA_RLHF_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LORA_RLHF_DATA names no folder with real data")
    return Path(folder)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Finished little runs that all test files share: copy one instead of training it again."""
    from killed import Runs

    top = tmp_path_factory.getbasetemp()
    return Runs((top.parent if "PYTEST_XDIST_WORKER" in os.environ else top) / "little-runs")


@pytest.fixture
def chat(monkeypatch):
    """A chat-completions server on loopback."""
    from chat_server import serve
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serve() as server:
        yield server
