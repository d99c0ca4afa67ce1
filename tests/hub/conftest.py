# SPDX-License-Identifier: Apache-2.0
"""The local Hub, clients turned to it, and a finished run to publish."""

import shutil
from pathlib import Path

import pytest
from hub_run import make_finished
from hub_server import HubServer
from huggingface_hub import constants

from lora_rlhf.hub import repository
from lora_rlhf.runs.record import Record


@pytest.fixture
def server():
    with HubServer(user="tester", token="hf_test", orgs=("acme",)) as server:
        yield server


@pytest.fixture
def impatient(monkeypatch):
    """A silent connection is given up after less than a second."""
    monkeypatch.setattr(repository, "_SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    repository._limit_silence.cache_clear()
    yield
    monkeypatch.undo()
    repository._limit_silence.cache_clear()


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A finished run on a base that exists only here, beside it."""
    return make_finished(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def run(finished, tmp_path) -> Record:
    """A copy of it to modify, whose base is on the Hub."""
    shutil.copytree(finished, tmp_path / "run")
    record = Record.read(tmp_path / "run")
    record.data["model"] |= {"hub_id": "acme/base"}
    record.save()
    return record
