# SPDX-License-Identifier: Apache-2.0
"""One process in a run directory, on every file system, and only while it is in its place."""

import os
import shutil
import signal
import time
import types

import killed
import pytest

from lora_rlhf.errors import BusyError, SetupError
from lora_rlhf.runs import run_lock
from lora_rlhf.runs.run_lock import LOCK, locked


def no_locks(*_):
    raise OSError(95, "Operation not supported")


@pytest.fixture(params=["flock", "without flock", "without fcntl"])
def system(request, monkeypatch):
    """File systems and machines with and without locks on a folder."""
    if request.param == "without fcntl":
        monkeypatch.setattr(run_lock, "fcntl", None)
    elif request.param == "without flock":
        fake = types.SimpleNamespace(flock=no_locks, LOCK_EX=1, LOCK_NB=2)
        monkeypatch.setattr(run_lock, "fcntl", fake)
    return request.param


def hold(folder) -> None:
    with locked(folder):
        (folder / "held").touch()
        time.sleep(60)


@pytest.mark.usefixtures("system")
def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    folder = tmp_path / "run"
    child = killed.start(hold, folder)
    while not (folder / "held").exists():
        time.sleep(0.01)
    with pytest.raises(BusyError, match="another process works in"), locked(folder):
        pass
    os.kill(child, signal.SIGKILL)
    killed.wait(child)
    with locked(folder), locked(folder):  # the process that holds it may take it again
        pass
    assert [p.name for p in folder.iterdir()] == ["held"]


def test_a_new_folder_without_files_is_removed(system, tmp_path):
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).exists() == (system != "flock")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("harm", ["moved", "removed", "replaced"])
def test_a_folder_that_was_moved_or_removed_is_noticed(tmp_path, harm):
    folder = tmp_path / "run"
    with locked(folder) as check_place:
        check_place()
        if harm == "removed":
            shutil.rmtree(folder)
        else:
            folder.rename(tmp_path / "elsewhere")
        if harm == "replaced":
            folder.mkdir()
        with pytest.raises(SetupError, match="moved or removed"):
            check_place()
