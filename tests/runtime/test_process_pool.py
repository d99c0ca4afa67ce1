# SPDX-License-Identifier: Apache-2.0
"""Child processes a few at a time: exit codes, output, GPUs in turn, and a stop that lets save."""

import sys
from pathlib import Path

import pytest

from lora_rlhf.runtime import process_pool

SAVES = """
import pathlib, signal, sys, time
def end(*_):
    print("saved", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def command(code: str, *args: object) -> list[str]:
    return [sys.executable, "-S", "-c", code, *map(str, args)]


def test_exit_codes_and_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    pool = process_pool.Pool(2, tmp_path)
    show = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], file=sys.stderr); print("
    show += "int(os.environ['OMP_NUM_THREADS']) > 0); sys.exit(int(sys.argv[1]))"
    ends = [pool.submit(command(show, code), tmp_path / f"{code}.log") for code in (0, 5)]
    assert [one.result(timeout=60) for one in ends] == [0, 5]
    pool.stop()
    gpus = [(tmp_path / f"{code}.log").read_text().split() for code in (0, 5)]
    assert {words[0] for words in gpus} <= {"4", "7"} and all("True" in words for words in gpus)
    assert not (tmp_path / "stop").exists()


def test_a_stop_lets_the_running_save_and_begins_nothing_more(tmp_path: Path):
    (tmp_path / "stop").touch()  # of a sweep that was killed
    pool = process_pool.Pool(1, tmp_path)
    first = pool.submit(command(SAVES, tmp_path / "up"), tmp_path / "first.log")
    second = pool.submit(command(SAVES, tmp_path / "never"), tmp_path / "second.log")
    while not (tmp_path / "up").exists() and not first.done():
        pass_time(first)
    pool.stop()
    assert first.result() == 3 and (tmp_path / "first.log").read_text() == "saved\n"
    assert second.result() == process_pool.STOPPED
    assert not (tmp_path / "never").exists() and not (tmp_path / "second.log").exists()


def pass_time(future) -> None:
    try:
        future.exception(timeout=0.05)
    except TimeoutError:
        return
