# SPDX-License-Identifier: Apache-2.0
"""Sweeps with runs that a stand-in writes; one real sweep is slow."""

import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import broken_runs
import compared_run
import pytest
from small import base_folder
from typer.testing import CliRunner

from lora_rlhf import sweeps
from lora_rlhf.cli import app
from lora_rlhf.errors import LoraRlhfError, UsageError
from lora_rlhf.recipe.loader import load_recipe
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import process_pool


def seal(record: Record) -> None:
    record.data["stages"]["card"] = {"status": "done"}
    record.data["files"] = {"recipe.yaml": "ab" * 32}


class Engine:
    """Writes finished runs instead of starting them; `fails` names folders whose run fails."""

    def __init__(self):
        self.commands, self.fails, self.stopped, self.raises = [], (), 0, None

    def submit(self, command: list[str], log: Path) -> Future:
        verb, path, folder = command[3], command[4], Path(command[6])
        pairs = list(zip(command[7::2], command[8::2], strict=True))
        sets = [value for option, value in pairs if option == "--set"]
        self.commands.append((verb, folder, [v for option, v in pairs if option == "--from"]))
        future = Future()
        if self.raises:
            raise self.raises
        if str(folder).endswith(self.fails or ("nothing",)):
            log.write_text("loading…\nsft 1/2\nGateError: no better than chance\n  to do: more\n")
            future.set_result(5)
            return future
        recipe = load_recipe(path, sets)
        reward = 0.5 - recipe.ppo.kl_coef + recipe.seed / 100
        compared_run.make(
            folder, seed=recipe.seed, rewards=(reward, reward / 2, 0.25, 0.0),
            sft=f"s{recipe.seed}", sets=sets, kinds=("json", "json", "polite", "polite"),
            change=seal,
        )  # fmt: skip
        log.write_text("done\n")
        future.set_result(0)
        return future

    def stop(self):
        self.stopped += 1


@pytest.fixture
def engine(monkeypatch) -> Engine:
    made = Engine()
    monkeypatch.setattr(process_pool, "start", lambda processes, folder: made)
    return made


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(compared_run.TEXT)
    return path


GRID = ["ppo.kl_coef=0.02,0.05"]


def test_every_point_is_a_run_and_all_are_one_comparison(engine, recipe, tmp_path):
    out, lines = tmp_path / "out", []
    report = sweeps.sweep(recipe, GRID, out, seeds=3, say=lines.append)
    runs = {folder: start for verb, folder, start in engine.commands if verb == "run"}
    assert sorted(str(folder.relative_to(out)) for folder in runs) == [
        f"ppo.kl_coef={coef}/seed-{seed}" for coef in ("0.02", "0.05") for seed in range(3)
    ]
    assert [verb for verb, _, _ in engine.commands].count("reward") == 3
    starts = {folder.name: start for folder, start in runs.items()}
    assert all(Path(starts[f"seed-{i}"][0]).name.startswith(f"seed-{i}-reward") for i in range(3))
    assert {run["state"] for run in report["runs"]} == {"done"} and engine.stopped == 1
    assert report["reference"] == "ppo.kl_coef=0.05"  # the recipe's own
    [one] = report["comparison"]["differences"]
    assert (one["of"], one["less"]) == ("ppo.kl_coef=0.02", "ppo.kl_coef=0.05")
    assert one["estimate"]["value"] == pytest.approx(0.03 * 1.5 / 4) and one["estimate"]["n"] == 3
    assert list(one["by_kind"]) == ["json", "polite"]
    assert json.loads((out / "sweep.json").read_text()) == report
    text = (out / "sweep.md").read_text()
    assert "Finished: 6 of 6 runs." in text and "gold_reward, difference | json | polite" in text
    assert lines[-1].startswith("9/9 ppo.kl_coef=0.05/seed-2: done after")
    again = sweeps.sweep(recipe, GRID, out, seeds=3)
    assert again == report and len(engine.commands) == 9
    more = sweeps.sweep(recipe, ["ppo.kl_coef=0.02,0.05,0.1"], out, seeds=4)
    assert len(engine.commands) == 9 + 1 + 2 + 4 and len(more["runs"]) == 12


def test_the_first_setting_is_the_reference_where_none_is_the_recipe_itself(
    engine, recipe, tmp_path
):
    report = sweeps.sweep(recipe, ["ppo.kl_coef=0.2,0.1"], tmp_path / "out", seeds=1)
    assert report["reference"] == "ppo.kl_coef=0.2" and report["comparison"]


def test_a_failed_run_is_named_and_the_others_go_on(engine, recipe, tmp_path):
    engine.fails = ("0.02/seed-0",)
    args = ["sweep", str(recipe), "--grid", GRID[0], "--seeds", "2", "--out", str(tmp_path / "o")]
    ended = CliRunner().invoke(app.app, args)
    assert ended.exit_code == 5 and "1 of 4 runs failed" in ended.stdout
    assert "ppo.kl_coef=0.02, seed 0: GateError: no better than chance\n  to do: mo" in ended.stdout
    assert "loading" not in ended.stdout and "seed-0.log" in ended.stdout
    assert "GateError" in (tmp_path / "o" / "sweep.md").read_text()
    report = json.loads((tmp_path / "o" / "sweep.json").read_text())
    assert [run["state"] for run in report["runs"]] == ["failed", "done", "done", "done"]
    assert report["comparison"]["differences"][0]["pairs"] == 1
    engine.fails, before = (), len(engine.commands)
    assert CliRunner().invoke(app.app, args).exit_code == 0
    assert [str(folder)[-11:] for _, folder, _ in engine.commands[before:]] == ["0.02/seed-0"]


def test_without_its_shared_stages_no_run_of_a_seed_begins(engine, recipe, tmp_path):
    out = tmp_path / "o"
    points = list(sweeps._with_shared(sweeps._points(recipe, sweeps._settings(GRID), 2, ()), out))
    engine.fails = (points[1].start.folder.name,)
    report = sweeps.sweep(recipe, GRID, out, seeds=2)
    assert [run["state"] for run in report["runs"]] == ["done", "failed"] * 2
    assert len(engine.commands) == 2 + 2


def test_an_interruption_stops_the_engine(engine, recipe, tmp_path):
    engine.raises = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sweeps.sweep(recipe, GRID, tmp_path / "o", seeds=1)
    assert engine.stopped == 1
    engine.raises = None
    assert sweeps.sweep(recipe, GRID, tmp_path / "o", seeds=1)["comparison"]


@pytest.mark.parametrize(
    ("grid", "shared"),
    [
        (["ppo.kl_coef=0.1,0.2", "evaluate.n=8,9"], {"reward": 1}),
        (["reward.args.learning_rate=1e-3,1e-4"], {"sft": 1}),
        (["reward.args.learning_rate=1e-3,1e-4", "ppo.kl_coef=0.1,0.2"], {"sft": 1, "reward": 2}),
        (["sft.args.learning_rate=1e-3,1e-4"], {}),
        (["sft.args.learning_rate=1e-3,1e-4", "algorithm=ppo,dpo"], {"reward": 2}),
    ],
)
def test_stages_are_shared_as_far_as_their_recipe_is_equal(recipe, tmp_path, grid, shared):
    points = sweeps._points(recipe, sweeps._settings(grid), 1, ())
    jobs = list(sweeps._with_shared(points, tmp_path))
    starts = {start.folder: start.until for job in jobs for start in sweeps._starts(job)}
    assert {stage: [*starts.values()].count(stage) for stage in shared} == shared
    assert len(starts) == sum(shared.values()) and len({job.folder for job in jobs}) == len(jobs)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"grid": ["ppo.kl_coeff=0.1,0.2"]}, "unknown key 'ppo.kl_coeff'"),
        ({"grid": ["ppo.kl_coef=0.1,much"]}, "expected a number"),
        ({"grid": ["ppo.args.learning_rates=1,2"]}, "learning_rate"),
        ({"grid": []}, "the grid is empty"),
        ({"grid": ["ppo.kl_coef="]}, "is empty"),
        ({"grid": ["ppo.kl_coef"]}, "has no values"),
        ({"grid": ["ppo.kl_coef=0.1,,0.2"]}, "not valid YAML"),
        ({"grid": ["ppo.kl_coef=0.1", "ppo.kl_coef=0.2"]}, "given twice"),
        ({"grid": ["ppo.kl_coef=0.1,1e-1"]}, "are the same point"),
        ({"grid": ["report_to=[],[none]"]}, "are the same point"),
        ({"grid": ["seed=1,2"]}, "seed is not for a grid"),
        ({"seeds": 0}, "0 seeds"),
        ({"processes": 0}, "in 0 processes"),
        ({"overrides": ["checkpoint.hub=a/b"]}, "would back up to a/b"),
        (
            {"overrides": ["ppo.rollout_server=http://127.0.0.1:1"], "processes": 2},
            "the adapter of one run at a time",
        ),
    ],
)
def test_bad_input_is_refused_before_anything(engine, recipe, tmp_path, change, why):
    options = {"grid": GRID, "seeds": 2, **change}
    with pytest.raises(LoraRlhfError, match=why):
        sweeps.sweep(recipe, options.pop("grid"), tmp_path / "o", **options)
    assert not engine.commands and not (tmp_path / "o").exists()


def test_a_folder_with_something_else_is_refused(engine, recipe, tmp_path):
    out = tmp_path / "o"
    sweeps.sweep(recipe, GRID, out, seeds=1)
    before = len(engine.commands)
    for options in ({"overrides": ["ppo.updates=7"]}, {"grid": ["ppo.gamma=0.9,1.0"]}):
        with pytest.raises(UsageError, match=r"holds another sweep: ppo\.kl_coef=0\.02, ppo"):
            sweeps.sweep(recipe, **{"grid": GRID, "out": out, "seeds": 1, **options})
    Record.open(tmp_path / "run", load_recipe(recipe))
    for other in (tmp_path / "run", recipe):
        with pytest.raises(UsageError, match="is not a sweep"):
            sweeps.sweep(recipe, GRID, other, seeds=1)
    assert len(engine.commands) == before


@pytest.mark.slow
def test_a_real_sweep_is_interrupted_goes_on_and_names_what_failed(tmp_path):
    broken_runs.write(tmp_path, None, 40)
    shutil.copytree(base_folder("llama"), tmp_path / "base")
    text = broken_runs.RECIPE.format(base=tmp_path / "base") + "threads: 1\n"
    (tmp_path / "recipe.yaml").write_text(text)
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "lora_rlhf", "sweep", str(tmp_path), "--out", str(out),
        "--grid", "ppo.reward=model,nowhere:score", "--seeds", "2", "--processes", "2",
        "--set", "ppo.updates=30", "--set", "checkpoint.every_minutes=0", "--set", "evaluate.n=8",
    ]  # fmt: skip
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    own = out / "ppo.reward=model"
    deadline = time.monotonic() + 500
    while not list(own.glob("seed-*/checkpoints/ppo/step-*")) and time.monotonic() < deadline:
        assert first.poll() is None
        time.sleep(0.5)
    first.send_signal(signal.SIGINT)
    assert "run the same command to continue" in first.communicate(timeout=200)[1]
    assert first.returncode == 130
    assert not any(Record.read(run).done("ppo") for run in own.glob("seed-[01]"))
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "2 of 4 runs failed" in again.stdout
    assert "nowhere" in again.stdout
    assert any("resumed" in Record.read(run).data["clock"] for run in own.glob("seed-[01]"))
    assert all(Record.read(run).done("card") for run in own.glob("seed-[01]"))
