# SPDX-License-Identifier: Apache-2.0
"""The benchmark programs run, split their time and count operations; no speed is asserted."""

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import traceback
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import killed
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import common
import flops
import report
import run
from peers import environments

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "benchmarks"
PEERS = os.environ.get("LORA_RLHF_PEERS")


class Forked:
    """What run.py asks of a `Popen`, as a fork of this process: nothing is imported again.

    In an interpreter of its own it is run by the slow test below.
    """

    def __init__(self, command, *, stderr, env, **_):
        (asked, ask), (answers, answer) = os.pipe(), os.pipe()

        def program():
            os.close(ask), os.close(answers)  # the parent's: else no end would ever be told
            for number, stream in enumerate((asked, answer, stderr.fileno())):
                os.dup2(stream, number)
            sys.stdin = open(0, closefd=False)
            sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))
            os.environ.update(env)
            sys.argv = command[1:]
            try:
                runpy.run_path(command[1], run_name="__main__")
            except Exception:
                traceback.print_exc()
                return 1

        self.child, self.code = killed.start(program), None
        os.close(asked), os.close(answer)
        self.stdin, self.stdout = os.fdopen(ask, "w"), os.fdopen(answers)

    def poll(self):
        return self.code

    def wait(self):
        self.code = killed.wait(self.child)
        return self.code

    def kill(self):
        os.kill(self.child, signal.SIGKILL)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One round of ours on the tiny case, through the real command."""
    out = tmp_path_factory.mktemp("benchmark")
    page = out / "page.md"
    page.write_text("before\n<!-- case tiny -->\nold\n<!-- end case tiny -->\nafter\n")
    printed = io.StringIO()
    processes = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(run, "subprocess", processes)
        run.main(
            [
                "--case",
                "tiny",
                "--rounds",
                "1",
                "--only",
                "float32",
                "--fractions",
                "1,1/2",
                "--json",
                str(out / "tiny.json"),
                "--page",
                str(page),
            ]
        )
    return json.loads((out / "tiny.json").read_text()), printed.getvalue(), page.read_text()


@pytest.mark.slow
def test_an_update_is_split_into_its_phases(measured):
    found, _, _ = measured
    assert [p["name"] for p in found["programs"]] == ["ours float32 1", "ours float32 1/2"]
    for program in found["programs"]:
        [record] = program["rounds"]
        for unit in ("cpu", "wall"):
            parts = [record[unit][name] for name in common.PHASES]
            assert all(part > 0 for part in parts)
            assert record[unit]["total"] == pytest.approx(sum(parts), abs=1e-3)
        assert program["facts"]["peak_above_imports_mb"] > 0
    layers = [p["facts"]["adapted_layers"] for p in found["programs"]]
    assert layers == [2, 1]


@pytest.mark.slow
def test_the_tables_are_printed_and_replace_what_was_on_the_page(measured):
    _, printed, page = measured
    assert re.search(r"\| ours \| float32 \| 1/2 \| \d", printed)
    assert "share of generation" in printed
    assert printed.strip() in page
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page


@pytest.mark.slow
def test_the_formula_agrees_with_torchs_counter(measured):
    """Its products but attention, which the counter does not know on a CPU."""
    found, _, _ = measured
    full = found["programs"][0]
    case = common.CASES["tiny"]
    shape, length = common.PRESETS["tiny"], case["prompt_len"] + case["response_len"]
    passes = full["flops"]["tokens"]["highest"]["score"] / (case["num_prompts"] * length)
    need = flops.needed(
        shape,
        adapted=2,
        targets=("q_proj", "v_proj"),
        r=16,
        sequences=case["num_prompts"],
        prompt=case["prompt_len"],
        completion=case["response_len"],
        epochs=case["ppo_epochs"],
        role_passes=passes,
    )
    assert passes == 3  # the policy's log-probs come from sampling
    attention = case["num_prompts"] * 4 * shape.attention * length * (length + 1) / 2
    counted = full["flops"]["flops"]
    assert counted["score"] == pytest.approx(need["score"] - passes * 2 * attention, rel=0.02)
    each = 2 * 2 * 3 * attention  # policy and value, two layers, forward and backward
    assert counted["train"] == pytest.approx(need["train"] - case["ppo_epochs"] * each, rel=0.02)


def test_less_is_needed_where_fewer_layers_are_adapted_or_passes_are_saved():
    shape = common.PRESETS["small"]
    settings = {
        "targets": common.LINEAR,
        "r": 16,
        "sequences": 8,
        "prompt": 32,
        "completion": 32,
        "epochs": 2,
    }
    full = flops.needed(shape, adapted=8, **settings)
    half = flops.needed(shape, adapted=4, **settings)
    caught = flops.needed(shape, adapted=4, role_passes=3, trunk_passes=0, **settings)
    assert half["train"] < 0.65 * full["train"]  # the projection to the vocabulary stays
    assert caught["score"] < half["score"] < full["score"]
    assert caught["train"] == half["train"]


def test_ratios_are_taken_inside_a_round():
    def entry(name, dtype, fraction, totals):
        rounds = [{"cpu": dict.fromkeys(report.PARTS, t)} for t in totals]
        return {"name": name, "dtype": dtype, "fraction": fraction, "rounds": rounds}

    # The machine is twice as slow in the second round, for both: medians apart would hide it.
    found = report.ratios(
        [
            entry("trl011", "float32", "", [4.0, 12.0, 5.0]),
            entry("ours float32 1", "float32", "1", [2.0, 4.0, 2.0]),
            entry("ours 4-bit 1", "4-bit", "1", [9.0, 9.0, 9.0]),
        ]
    )
    assert list(found) == ["ours float32 1"]  # float32 against float32 only
    assert found["ours float32 1"]["trl011"]["total"] == [2.5, 2.0, 3.0]


def test_fewer_rounds_than_the_others_are_told():
    def entry(dtype, rounds):
        record = {"cpu": dict.fromkeys(report.PARTS, 1.0), "peak_mb": 2.0}
        facts = {"model_tensors_mb": 1.0, "rss_before_models_mb": 1.0}
        return {
            "name": "ours",
            "dtype": dtype,
            "fraction": "1",
            "rounds": [record] * rounds,
            "facts": facts,
        }

    shown = report._seconds([entry("float32", 5), entry("4-bit", 3)], 5)
    assert "| float32 |" in shown and "| 4-bit (3 rounds) |" in shown


@pytest.mark.slow
def test_a_worker_runs_in_an_interpreter_of_its_own(tmp_path, monkeypatch):
    """With the package found through the PYTHONPATH that it is given."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    out = tmp_path / "tiny.json"
    run.main(
        [
            "--case",
            "tiny",
            "--rounds",
            "1",
            "--only",
            "float32",
            "--fractions",
            "1",
            "--json",
            str(out),
        ]
    )
    [program] = json.loads(out.read_text())["programs"]
    assert program["facts"]["impl"] == "lora-rlhf" and len(program["rounds"]) == 1


def test_every_program_takes_the_same_options():
    ours = _options(FOLDER / "ours.py")
    for name, (script, _) in environments.PEERS.items():
        assert _options(script) <= ours, name
    assert {"--top-fraction", "--dtype", "--four-bit", "--checkpointing"} <= ours


def _options(script):
    told = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"^  (--[a-z-]+)", told.stdout, flags=re.M))


def test_the_case_reaches_every_program():
    options = argparse.Namespace(
        case="c", rounds=5, fractions=[Fraction(1, 4)], only=["4-bit"], venv_dir=None
    )
    [program] = run.programs(options)
    command = " ".join(program.command)
    assert "--four-bit --top-fraction 1/4" in command
    for key, value in common.CASES["c"].items():
        assert f"--{key.replace('_', '-')} {value}" in command


@pytest.mark.slow
def test_the_gpu_command_works_without_one_on_a_tiny_shape(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(FOLDER / "ours.py"),
            "--preset",
            "tiny",
            "--num-prompts",
            "4",
            "--prompt-len",
            "8",
            "--response-len",
            "8",
            "--minibatch",
            "2",
            "--updates",
            "1",
            "--four-bit",
            "--checkpointing",
            "--copies",
            "2",
            "--lora-targets",
            "all-linear",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["measured_updates"] == 1
    # Two idle backbones of 4-bit layers beside the one that works.
    assert found["model_tensors_mb"] > 2.5 * found["backbone_tensors_mb"]


@pytest.mark.skipif(PEERS is None, reason="LORA_RLHF_PEERS names no folder with their environments")
@pytest.mark.parametrize("peer", environments.PEERS)
def test_a_peer_runs(peer):
    script, _ = environments.PEERS[peer]
    done = subprocess.run(
        [
            environments.python_of(peer, Path(PEERS)),
            str(script),
            "--preset",
            "tiny",
            "--updates",
            "1",
            "--num-prompts",
            "4",
            "--minibatch",
            "2",
            "--prompt-len",
            "8",
            "--response-len",
            "8",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(found[f"cpu_{phase}_s"] > 0 for phase in common.PHASES)


def test_the_page_has_a_place_for_every_table():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name in ("case a", "case b", "case c", "gpu", "quality", "start", "time to quality"):
        assert page.count(f"<!-- {name} -->") == page.count(f"<!-- end {name} -->") == 1


def test_the_table_of_quality_is_made_from_the_study():
    import quality

    def row(seed, gain, low):
        estimate = {"value": gain, "low": low, "high": 1.0, "n": 9}
        keys = dict.fromkeys(quality.SHOWN, estimate)
        return {"name": "fraction-1-4", "seed": seed, **keys}

    text = quality.markdown([row(0, 0.55, 0.49), row(1, 0.65, 0.51), row(2, 0.75, 0.6)])
    [line] = [line for line in text.splitlines() if line.startswith("| 1/4")]
    # t(2) = 4.3027, s = 0.1: 0.65 -+ 4.3027 * 0.1 / sqrt(3)
    assert "| 3 | 0.650 [0.402, 0.898]" in line and line.endswith("| 2 of 3 |")


def test_seconds_to_quality_are_compared_seed_by_seed():
    import time_to_quality

    def one(program, seed, rate, seconds):
        curve = [{"update": 2, "seconds": 20.0, "win_rate": 0.6 if seconds else 0.5}]
        facts = {"program": program, "seed": seed, "rate": rate, "seconds": seconds}
        return {**facts, "updates": 2, "per_update": 10.0, "curve": curve}

    runs = [one("rloo", 0, 1e-3, 30.0), one("rloo", 0, 2e-3, 20.0), one("rloo", 1, 2e-3, 10.0)]
    runs += [one("trl-rloo", 0, 1e-3, 60.0), one("trl-rloo", 1, 1e-3, 40.0)]
    runs += [one("ppo", 0, 1e-3, None), one("ppo", 1, 1e-3, 80.0)]
    found = time_to_quality.options(["study", "--out", "out", "--target", "0.57"])
    text = time_to_quality.markdown(runs, found)
    assert "| ours, RLOO | 3.50 (3.00 to 4.00), 2 seeds |" in text
    assert "| ours, PPO | 0.50 (0.50 to 0.50), 1 seed |" in text  # not reached is no pair
    assert "| ours, PPO | 0.001 | 0 | 0.500 | 2 | not in 20.0 | 10.00 |" in text


def test_the_clock_of_quality_stands_still_while_answers_are_checked(monkeypatch):
    import time_to_quality

    now = [5.0]
    monkeypatch.setattr(time_to_quality.time, "process_time", lambda: now[0])
    watch = time_to_quality.Watch.__new__(time_to_quality.Watch)
    watch.target, watch.every, watch.curve, watch.spent = 0.6, 2, [], 0.0
    watch.sft, watch.take = [0.0, 0.0], lambda: None
    answers = iter([[0.0, 0.0], [1.0, 1.0]])

    def gold(role):
        now[0] += 100  # an evaluation
        return next(answers)

    watch._gold = gold
    clock, control = watch.callback(per_update=3), SimpleNamespace(should_training_stop=False)
    clock.on_train_begin()
    for step in range(1, 13):
        now[0] += 1
        clock.on_step_end(None, SimpleNamespace(global_step=step), control)
        assert control.should_training_stop == (step == 12)
    assert [line["seconds"] for line in watch.curve] == [6.0, 12.0]
    assert watch.result()["seconds"] == 12.0 and watch.result()["updates"] == 4
