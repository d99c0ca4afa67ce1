# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints where, its exit codes, and every command that a page shows."""

import ast
import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import example_report
import pytest
import typer
import yaml
from rich.console import Console
from typer.testing import CliRunner

import lora_rlhf
from lora_rlhf import tiny
from lora_rlhf.cli import app
from lora_rlhf.data.closed_world import vocabulary
from lora_rlhf.errors import GateError, LoraRlhfError, NonFiniteError
from lora_rlhf.recipe import loader
from lora_rlhf.reports import tables
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import quiet

ROOT = Path(__file__).resolve().parents[2]
VERBS = (
    "run", "demo", "sweep", "plan", "sft", "reward", "ppo", "policy", "evaluate", "judge", "label",
    "tasks", "iterate", "chat", "do", "card", "report", "doctor",
    "push", "pull", "lint-card", "generate", "compare", "env", "data", "init",
    "serve", "rollout-server", "usage", "moderate", "export", "score",
)  # fmt: skip
SMALL = "name: small\nmodel: {id: tiny}\ndata: {demonstrations: [{task: closed-world}]}\n"


def invoke(*args):
    return CliRunner().invoke(app.app, [str(arg) for arg in args], prog_name="lora-rlhf")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def fake(monkeypatch):
    """A pipeline that does what the test says."""
    made = SimpleNamespace(calls=[], raises=None, record=None)

    def run(recipe, out, *, until, progress, start_from, warm_start, redo):
        made.calls.append((recipe, Path(out), until))
        made.start_from, made.warm_start, made.redo = start_from, warm_start, redo
        if made.raises is not None:
            raise made.raises
        return made.record or Record.open(out, recipe)

    monkeypatch.setattr(app.shell, "room", lambda *_: SimpleNamespace(run=run))
    return made


def estimate(value, low, high, n=128):
    return {"value": value, "low": low, "high": high, "n": n}


EVALUATION = {
    "base": {"success": estimate(0.21, 0.14, 0.29), "kl": estimate(40.123, 38.5, 41.7)},
    "sft": {
        "success": estimate(0.41, 0.33, 0.5),
        "incidents_per_1000": estimate(250, 120, 400, 28),
    },
    "policy": {
        "success": estimate(0.52, 0.43, 0.61),
        "win_rate": estimate(0.58, 0.53, 0.63),
        "win_rate_length_controlled": estimate(0.57, 0.51, 0.63),
        "kl": estimate(3.2, 2.9, 3.5),
    },
}


@pytest.fixture
def finished(tmp_path):
    """A run directory as a finished run leaves it, adapters without their weights."""
    record = Record.open(tmp_path / "done", loader.parse_recipe(SMALL, "small"))
    record.data["evaluation"] = EVALUATION
    record.data["stages"] = {
        name: {"status": "done"} for name in ("sft", "reward", "ppo", "evaluate", "card")
    }
    for role in ("sft", "policy"):
        record.adapter(role).mkdir(parents=True)
        (record.adapter(role) / "adapter_config.json").write_text("{}")
    (record.folder / "plots").mkdir()
    (record.folder / "plots" / "ppo.png").write_bytes(b"")
    record.save()
    return record


def test_a_shell_leaves_the_home_folder_to_the_command(recipe, fake, tmp_path, monkeypatch):
    """`--out=~/x` made a folder called `~`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for given in ("--out=~/a", "--out=$HOME/a", "--out=${HOME}/a"):
        assert invoke("run", recipe, given).exit_code == 0
        assert fake.calls[-1][1] == tmp_path / "home" / "a"
    for given in ("--out=$DATA/a", "--out=~nobody-here/a"):
        result = invoke("run", recipe, given)
        assert (result.exit_code, len(fake.calls)) == (2, 3) and "write it out" in result.stderr
    (tmp_path / "$DATA").mkdir()
    assert invoke("run", recipe, "--out=$DATA/a").exit_code == 0
    assert [p.name for p in tmp_path.glob("~*")] == []


# --- quick and light -----------------------------------------------------------------------------


def test_help_is_light_and_loading_is_said_before_it_takes_time():
    code = """
        import sys
        from lora_rlhf.cli.app import app
        def loaded(*names):
            return sorted(set(names) & set(sys.modules))
        def call(*args):
            try:
                app(list(args))
            except SystemExit as end:
                assert not end.code, end.code
        call("--help"), call("run", "--help"), call("--version")
        light = loaded("torch", "transformers", "numpy", "yaml", "rich", "trl")
        from lora_rlhf.cli import shell
        import contextlib
        heavy = []
        @contextlib.contextmanager
        def said():
            heavy.extend(loaded("torch", "transformers", "trl", "numpy"))
            sys.exit(0)
            yield
        shell.loading = said
        from lora_rlhf import tiny
        for command in (["demo"], ["plan", TINY], ["env"], ["sft", TINY, "--dry-run"]):
            call(*command)
        print("LOADED", light, heavy)
    """
    code = textwrap.dedent(code).replace("TINY", "str(tiny.recipe())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED [] []"
    assert done.stderr == ""


def test_help_lists_every_verb():
    result = invoke("--help")
    assert result.exit_code == 0
    listed = re.findall(r"^  ([a-z-]+)  ", result.output.split("Start:")[1], re.MULTILINE)
    assert sorted(listed) == sorted(VERBS)
    assert "..." not in result.output.split("Start:")[1]  # each line is whole
    for verb in VERBS:
        assert invoke(verb, "--help").exit_code == 0


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"lora-rlhf {lora_rlhf.__version__}\n")


def test_module_is_runnable():
    done = subprocess.run(
        [sys.executable, "-m", "lora_rlhf", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("lora-rlhf ")


# --- recipes -------------------------------------------------------------------------------------


def test_dry_run_prints_a_recipe_that_loads_again(recipe, tmp_path):
    result = invoke("sft", recipe, "--set", "ppo.args.learning_rate=2e-5", "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stderr.endswith("OK: `sft` can start in runs/small\n")
    plain = yaml.safe_load(result.stdout)
    assert plain["ppo"]["args"]["learning_rate"] == 2e-5
    again = tmp_path / "again.yaml"
    again.write_text(result.stdout)
    first = loader.load_recipe(recipe, ["ppo.args.learning_rate=2e-5"])
    assert loader.load_recipe(again) == first
    assert not (tmp_path / "runs").exists()


def test_dry_run_masks_secrets(recipe):
    result = invoke(
        "sft",
        recipe,
        "--dry-run",
        "--set",
        "ppo.args.project=hf_abcdefghijklmnop",
        "--set",
        "card.authors=hf_qrstuvwxyz012345",
        "--set",
        "ppo.args.optim_args=sk-abcdef1234567890abcd",
    )
    assert result.exit_code == 0
    assert "***" in result.stdout
    for secret in ("hf_", "sk-abcdef"):
        assert secret not in result.output


def test_dry_run_refuses_args_that_no_stage_could_take(recipe):
    result = invoke("run", recipe, "--set", "ppo.args.learning_rat=1", "--dry-run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "ppo.args.learning_rat: TRL's GRPOConfig has no such field" in result.stderr
    assert "did you mean 'ppo.args.learning_rate'?" in result.stderr


def test_errors_in_args_have_their_line(recipe):
    """They are checked after the recipe is loaded, and named no place."""
    recipe.write_text(SMALL + "sft:\n  args:\n    packing: false\n    num_train_epochs: two\n")
    for verb in (["run", recipe, "--dry-run"], ["run", recipe], ["plan", recipe]):
        result = invoke(*verb)
        assert result.exit_code == 2 and f"{recipe}:7: sft.args.num_train_epochs" in result.stderr
    result = invoke("run", recipe, "--set", "sft.args.num_train_epochs=3.x", "--dry-run")
    assert "--set sft.args.num_train_epochs: sft.args.num_train_epochs: '3.x'" in result.stderr


def test_run_passes_on_what_was_given(recipe, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke("run", recipe, "--set", "seed=7", "--set", "ppo.updates=3").exit_code == 0
    assert invoke("ppo", recipe, "--out", "elsewhere").exit_code == 0
    assert invoke("demo", "--seed", 5).exit_code == 0
    (first, out, until), (_, elsewhere, second), (demo, demo_out, whole) = fake.calls
    assert (first.seed, first.ppo.updates, out, until) == (7, 3, Path("runs/small"), "card")
    assert (elsewhere, second) == (Path("elsewhere"), "ppo")
    assert (demo.seed, demo_out, whole) == (5, Path("runs/demo"), "card")
    assert demo == loader.load_recipe(tiny.recipe(), ["seed=5"])


def test_from_names_the_run_to_start_from(recipe, fake, tmp_path):
    assert invoke("run", recipe, "--out", tmp_path / "b", "--from", tmp_path / "a").exit_code == 0
    assert fake.start_from == tmp_path / "a"
    assert invoke("policy", recipe, "--out", tmp_path / "b").exit_code == 0
    assert fake.start_from is None


@pytest.mark.parametrize("verb", ["run", "ppo"])
def test_a_warm_start_is_asked_for_explicitly(verb, recipe, fake, tmp_path):
    assert invoke(verb, recipe, "--out", tmp_path / "b").exit_code == 0
    assert fake.warm_start is False
    assert invoke(verb, recipe, "--out", tmp_path / "b", "--warm-start").exit_code == 0
    assert fake.warm_start is True and fake.redo is None
    invoke(verb, recipe, "--out", tmp_path / "run", "--redo", "sft")
    assert fake.redo == "sft"


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "policy", "evaluate"])
def test_stages_run_until_themselves(stage, recipe, fake, tmp_path):
    assert invoke(stage, recipe, "--out", tmp_path / "out").exit_code == 0
    assert [until for _, _, until in fake.calls] == [stage]


def test_demo_needs_no_network(fake, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert invoke("demo", "--out", tmp_path / "out").exit_code == 0
    assert os.environ.pop("HF_HUB_OFFLINE") == "1"


def test_dry_run_lists_everything_that_is_wrong(recipe, tmp_path):
    recipe.write_text(SMALL.replace("task: closed-world", "path: gone.jsonl"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    sets = ("--set", "sft.args.epochs=3", "--set", "data.prompts=[{path: none.jsonl}]")
    result = invoke("run", recipe, *sets, "--out", tmp_path / "out", "--dry-run")
    assert (result.exit_code, result.stdout) == (2, "")
    for wrong in ("sft.args.num_train_epochs", "out exists and is not a run"):
        assert wrong in result.stderr
    result = invoke("run", recipe, *sets, "--out", tmp_path / "new", "--dry-run")
    for wrong in ("sft.args.num_train_epochs", "gone.jsonl: there is no", "none.jsonl: there is"):
        assert wrong in result.stderr
    assert not (tmp_path / "new").exists() and "OK" not in result.output


@pytest.mark.parametrize(
    ("verb", "inside"),
    [("run", ""), ("run", "recipe.yaml"), ("sft", ""), ("evaluate", "recipe.yaml")],
)
def test_a_run_is_not_taken_for_a_recipe(verb, inside, finished, fake):
    given = finished.folder / inside
    result = invoke(verb, given)
    assert result.exit_code == 2 and f"{finished.folder} is a run" in result.stderr
    assert f"`lora-rlhf {verb} {given} --out {finished.folder}`" in result.stderr
    assert not fake.calls
    assert invoke(verb, given, "--out", finished.folder).exit_code == 0
    assert [out for _, out, _ in fake.calls] == [finished.folder]


# --- errors --------------------------------------------------------------------------------------


def test_unknown_key_names_file_line_and_suggestion(recipe):
    recipe.write_text(SMALL + "ppo:\n  updats: 3\n")
    result = invoke("run", recipe)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert f"{recipe}:5: unknown key 'ppo.updats'; did you mean 'ppo.updates'?" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "there is no recipe at nowhere.yaml"),
        (["run", "RECIPE", "--set", "seed"], "key=value"),
        (["card", "nowhere"], "nowhere is not a run directory"),
        (["generate", "nowhere", "hello"], "nowhere is not a run directory"),
        (["push", "nowhere", "--policy", "me/it"], "nowhere is not a run directory"),
        (["demo", "--seed", "-1"], "--seed"),
        (["run"], "RECIPE"),
        (["runn"], "runn"),
        (["run", "RECIPE", "--outt", "x"], "--outt"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message, recipe):
    result = invoke(*(recipe if part == "RECIPE" else part for part in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_missing_data_file_exits_with_3(recipe, tmp_path):
    recipe.write_text(SMALL.replace("task: closed-world", "path: gone.jsonl"))
    result = invoke("sft", recipe, "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (3, "")
    assert str(tmp_path / "gone.jsonl") in result.stderr


def test_missing_model_folder_exits_with_4(recipe, tmp_path):
    result = invoke("run", recipe, "--set", "model.id=./gone", "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (4, "")
    assert "config.json" in result.stderr and "to do:" in result.stderr


def test_folder_of_something_else_is_left_alone(recipe, fake, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    result = invoke("run", recipe, "--out", tmp_path / "mine")
    assert result.exit_code == 2 and "is not a run" in result.stderr
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (GateError("accuracy 0.5", expected="more", remedy="label more"), 5, "  to do: label more"),
        (NonFiniteError("the loss is nan"), 5, "the loss is nan"),
        (LoraRlhfError("odd"), 1, "odd"),
        (ValueError("a\nb"), 1, "unexpected error: ValueError: a; run again with --debug"),
        (KeyError(), 1, "unexpected error: KeyError; run again with --debug"),
        (OutOfMemoryError("CUDA: tried"), 4, "evaluate.batch_size"),
        (KeyboardInterrupt(), 130, "Interrupted; run the same command to continue."),
    ],
)
def test_exceptions_become_text_and_exit_code(error, code, message, recipe, fake, tmp_path):
    fake.raises = error
    result = invoke("run", recipe, "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("last", [True, False])
def test_debug_shows_the_traceback_wherever_it_stands(last, recipe, fake, tmp_path):
    fake.raises = ValueError("broken")
    arguments = ["run", recipe, "--out", tmp_path / "out"]
    result = invoke(*arguments, "--debug") if last else invoke("--debug", *arguments)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "in run" in result.stderr
    assert result.stderr.rstrip().endswith("unexpected error: ValueError: broken")
    assert "Traceback" not in invoke(*arguments).stderr


@pytest.mark.parametrize(
    ("name", "times", "code"),
    [("SIGTERM", 1, 143), ("SIGINT", 2, -2),
     *(pytest.param(*other, marks=pytest.mark.slow) for other in
       (("SIGINT", 1, 130), ("SIGTERM", 2, -15)))],
)  # fmt: skip
def test_signals(name, times, code, recipe, tmp_path):
    """The first one lets stages clean up; a second one, while they do, ends the process at once."""
    script = f"""
        import os, signal, sys, types
        # A job in the background of a shell starts with SIGINT ignored, and the CLI respects that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from lora_rlhf.cli import app as cli
        progress = types.ModuleType("lora_rlhf.runs.progress")
        progress.Progress = lambda: types.SimpleNamespace(end=lambda: None)
        progress.clock = str
        sys.modules["lora_rlhf.runs.progress"] = progress
        def kill():
            os.kill(os.getpid(), signal.{name})
        def run(*_, **__):
            try:
                kill()
                signal.pause()
            finally:
                print("cleaning", flush=True)
                for _ in range({times - 1}):
                    kill()
        cli.shell.room = lambda *_: types.SimpleNamespace(run=run)
        sys.argv = ["lora-rlhf", "run", {str(recipe)!r}, "--out", {str(tmp_path / "o")!r}]
        cli.main()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (code, "cleaning\n")
    message = "Interrupted; run the same command to continue.\n"
    assert done.stderr == (message if times == 1 else "")


def test_handlers_are_put_back(recipe, fake, tmp_path):
    import signal

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    invoke("run", recipe, "--out", tmp_path / "out")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_silence_does_not_override_the_user(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    quiet.process()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"


# --- the end of a run ----------------------------------------------------------------------------


def test_summary_is_plain_without_a_terminal(recipe, fake, finished):
    fake.record = finished
    result = invoke("run", recipe, "--out", finished.folder)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["metric", "base", "sft", "policy"]
    success = next(line for line in lines if line.startswith("success"))
    for cell in ("0.21 [0.14, 0.29] n=128", "0.41 [0.33, 0.50] n=128", "0.52 [0.43, 0.61] n=128"):
        assert cell in success
    assert "KL of the policy to SFT: 3.20 [2.90, 3.50] n=128, in nats per sequence" in lines
    assert f"run       {finished.folder}" in lines
    assert f"plot      {finished.folder / 'plots' / 'ppo.png'}" in lines
    assert "\x1b" not in result.stdout


def test_interrupted_run_says_which_stages_are_done(recipe, fake, finished):
    finished.data["stages"] = {"sft": {"status": "done"}, "reward": {"status": "interrupted"}}
    fake.record = finished
    result = invoke("sft", recipe, "--out", finished.folder)
    assert "finished  sft\n" in result.stdout
    assert "metric" not in result.stdout


def test_the_report_shows_every_metric_by_kind_and_the_kind_that_got_worse(finished):
    gap = estimate(-0.3, -0.4, -0.2)
    finished.data["stages"]["evaluate"]["by_kind"] = {
        "sft": {"json": {"success": estimate(0.62, 0.5, 0.7)}, "polite": {}},
        "policy": {"json": {"success": estimate(0.31, 0.2, 0.4), "gold_reward_minus_sft": gap}},
    }
    for terminal in (False, True):
        stream = io.StringIO()
        tables.show(finished, Console(file=stream, force_terminal=terminal, width=80))
        text = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
        rows = {line.strip().split("  ")[0]: line for line in text.splitlines()}
        assert "0.21" not in rows["success, policy"] and "0.52" in rows["success, policy"]
        assert "0.31" in rows["success, policy"] and "0.62" in rows["success, sft"]
        assert ("[0.20, 0.40]" in rows["success, policy"]) is not terminal
        assert "PPO is clearly worse than SFT on prompts of these kinds: json" in text


def test_eight_kinds_fit_a_terminal():
    own = {kind: {"kl": estimate(-0.123, -0.2, -0.1)} for kind in vocabulary.FAMILIES}
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    tables._print_kinds(console, {"policy": ({"kl": estimate(-0.123, -0.2, -0.1)}, own)})
    head, names, values = (line.split() for line in stream.getvalue().splitlines()[:3])
    assert head[-2:] == ["not", "max"] and set(names) >= {"answer", "stated", "words", "benign"}
    assert values == ["kl,", "policy", *["-0.12"] * 9]


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_a_terminal(width, monkeypatch, finished):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, highlight=False)
    tables._print_table(console, *tables.rows(EVALUATION))
    text = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    for value, interval in (("0.52", "[0.43, 0.61]"), ("40.12", "[38.50, 41.70]")):
        assert value in text and interval in text
    assert "win rate length controlled" in " ".join(text.split())
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", stream.getvalue()), "a colour in spite of NO_COLOR"


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.58, 0.53, 0.63), "PPO beat SFT: win rate 58.0 % [53.0, 63.0]"),
        ((0.41, 0.33, 0.49), "PPO did worse than SFT: win rate 41.0 %"),
        ((0.55, 0.47, 0.63), "PPO was not shown to beat SFT: win rate 55.0 %"),
        ((0.55, 0.5, 0.6), "PPO was not shown to beat SFT"),
        ((0.5, 0.5, 0.5), "PPO was not shown to beat SFT"),
        ((0.9, None, None), "It is unknown whether PPO beat SFT"),
    ],
)
def test_verdict_says_no_more_than_the_interval(interval, verdict):
    [sentence] = tables.sentences({"policy": {"win_rate": estimate(*interval)}})
    assert sentence.startswith(verdict)


def test_verdict_names_its_judge():
    assert "is unknown" in tables.sentences({"base": {}, "policy": {}})[0]
    assert "is unknown" in tables.sentences({})[0]
    proxy = {"win_rate_proxy": estimate(0.9, 0.8, 0.95)}
    assert "proves little" in tables.sentences({"policy": proxy})[0]
    better = proxy | {"win_rate_held_out": estimate(0.5, 0.4, 0.6)}
    assert "never saw" in tables.sentences({"policy": better})[0]


def test_a_judge_that_people_do_not_support_decides_nothing():
    evaluation = {"policy": {"win_rate_held_out": estimate(0.7, 0.62, 0.77)}}
    [sentence] = tables.sentences(evaluation, accuracy=estimate(0.64, 0.58, 0.7, 224))
    assert sentence.startswith("PPO beat SFT: win rate 70.0 %")
    assert "right on 0.64 [0.58, 0.70] n=224 held-out comparisons" in sentence
    [sentence] = tables.sentences(evaluation, accuracy=estimate(0.53, 0.47, 0.59, 224))
    assert sentence.startswith("It is unknown whether PPO beat SFT: win rate 70.0 %")
    assert "not clearly better than chance" in sentence


def test_no_difference_comes_with_the_smallest_one_that_could_be_seen():
    [sentence] = tables.sentences({"policy": {"win_rate": estimate(0.55, 0.451, 0.647, 96)}})
    assert "a difference of 14.0 points in 8 of 10 evaluations" in sentence


# --- verbs over runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [True, False])
def test_card_is_written_again(finished, sealed):
    """A run that was stopped before it was sealed can be pushed after this."""
    finished.data["files"] = {"adapters/policy/README.md": "stale"} if sealed else {}
    finished.save()
    result = invoke("card", finished.folder)
    assert result.exit_code == 0, result.output
    paths = [Path(line) for line in result.stdout.splitlines()]
    assert {path.parent.name for path in paths} == {"sft", "policy"}
    assert all(path.name == "README.md" and path.is_file() for path in paths)
    files = json.loads((finished.folder / "record.json").read_text())["files"]
    assert len(files["adapters/policy/README.md"]) == 64


def test_card_of_one_role_goes_to_stdout(finished):
    result = invoke("card", finished.folder, "--role", "policy")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("---\n") and "\n# " in result.stdout
    assert not (finished.adapter("policy") / "README.md").exists()
    assert invoke("card", finished.folder, "--role", "teacher").exit_code == 2


def test_card_without_adapters(tmp_path):
    Record.open(tmp_path / "new", loader.parse_recipe(SMALL, "small"))
    result = invoke("card", tmp_path / "new")
    assert result.exit_code == 2 and "no adapter yet" in result.stderr


@pytest.fixture
def pushed(monkeypatch):
    from lora_rlhf.hub import publishing

    calls = []

    def push(record, role, repo_id, *, public=False, report=False, token=None):
        calls.append((role, repo_id, public))
        url = f"hub:{repo_id}"
        return {"url": url, "commit": "abc", "private": not public, "notes": ["look"], "files": []}

    monkeypatch.setattr(publishing, "push", push)
    monkeypatch.setattr(
        publishing, "push_base", lambda record, repo, **k: push(record, "base", repo, **k)
    )
    return calls


def test_report_is_written_again(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: bool(opened.append(address)))
    (tmp_path / "report.json").write_text(json.dumps(example_report.report(prompts=8)))
    page = tmp_path / "report.html"
    result = invoke("report", tmp_path)
    assert (result.exit_code, result.stdout) == (0, f"{page}\n") and not opened
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    page.unlink()
    assert invoke("report", tmp_path / "report.json").stdout == f"{page}\n" and page.is_file()
    result = invoke("report", tmp_path, "--open")
    assert opened == [page.as_uri()] and "no browser was found" in result.stderr


def test_report_without_its_json(tmp_path):
    result = invoke("report", tmp_path)
    assert result.exit_code == 2 and f"{tmp_path}: no report.json" in result.stderr
    assert not list(tmp_path.iterdir())


def test_push_sends_the_base_first_and_only_what_is_named(finished, pushed):
    result = invoke(
        "push", finished.folder, "--policy", "me/policy", "--base", "me/base", "--public"
    )
    assert result.exit_code == 0, result.output
    assert pushed == [("base", "me/base", True), ("policy", "me/policy", True)]
    assert "policy hub:me/policy (public, commit abc)" in result.stdout
    assert "note: look" in result.stderr


def test_push_falls_back_on_the_recipe(finished, pushed):
    result = invoke("push", finished.folder)
    assert result.exit_code == 2 and "no repository to push to" in result.stderr
    recipe = loader.parse_recipe(SMALL + "hub: {policy: us/p, reward: us/r}\n", "")
    (finished.folder / "recipe.yaml").write_text(loader.dump_recipe(recipe))
    assert invoke("push", finished.folder).exit_code == 0
    assert pushed == [("policy", "us/p", False), ("reward", "us/r", False)]


def test_generate_shows_each_model_with_its_reward(finished, monkeypatch):
    seen = {}

    def generate(folder, text, **options):
        seen.update(folder=folder, text=text, **options)
        return [
            {"model": "base", "text": "well \x1b[31mred", "tokens": 3, "reward": -1.25},
            {"model": "policy", "text": "A [bold]box[/bold].", "tokens": 4, "reward": 0.5},
        ]

    monkeypatch.setattr(app.shell, "room", lambda *_: SimpleNamespace(generate=generate))
    result = invoke(
        "generate",
        finished.folder,
        "What is it?",
        "--temperature",
        0,
        "--seed",
        3,
        "--max-new-tokens",
        9,
    )
    assert result.exit_code == 0, result.output
    assert (seen["text"], seen["temperature"]) == ("What is it?", 0)
    assert (seen["seed"], seen["max_new_tokens"]) == (3, 9)
    assert "[base]  tokens 3  reward -1.250\nwell \\x1b[31mred\n" in result.stdout
    assert "A [bold]box[/bold]." in result.stdout
    stream = io.StringIO()
    tables.show_answers(generate("", ""), Console(file=stream, force_terminal=True, width=60))
    assert "reward 0.500" in stream.getvalue() and "[31mred" in stream.getvalue()
    assert "\x1b[31m" not in stream.getvalue()


def test_env_tells_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("LORA_RLHF_DATA", "/home/somebody/data")
    result = invoke("env")
    assert result.exit_code == 0, result.output
    found = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in result.stdout.splitlines())
    assert {"lora-rlhf", "torch", "trl", "python", "device", "dtype auto", "4-bit"} <= set(found)
    assert (found["HF_TOKEN"], found["trl fits"]) == ("set", "yes")
    assert "hf_" not in result.output and "somebody" not in result.output


# --- every command that is shown -----------------------------------------------------------------


@functools.cache
def whole():
    """All commands as they are parsed; making them takes longer than a line."""
    return typer.main.get_command(app.app)


def parse(line: str) -> None:
    """Let the CLI parse a command line without running it; its errors come through."""
    words = shlex.split(line, comments=True)
    ends = [i for i, word in enumerate(words) if word in ("|", "&&", "||", ";", "&")]
    ends += [i for i, word in enumerate(words) if re.match(r"\d?>", word)]
    words = words[1 : min(ends, default=None)]
    group = whole()
    try:
        context = group.make_context("lora-rlhf", words)
        name, command, rest = group.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        command.make_context(name, rest, parent=context)
    except typer.Exit:  # --help, --version
        pass


def shown_commands(text: str) -> list[str]:
    """The lines of fenced blocks that call lora-rlhf, continuations joined."""
    fences = re.findall(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```", text, re.MULTILINE | re.DOTALL)
    joined = "\n".join(fences).replace("\\\n", " ")
    found = re.findall(r"^\s*[$!]?\s*((?:[A-Z_]+=\S+\s+)*)(lora-rlhf .*)$", joined, re.MULTILINE)
    return [line for _, line in found]


def test_the_parser_of_shown_commands_sees_mistakes():
    text = "```bash\n$ lora-rlhf run x.yaml \\\n   --out y  # go\nlora-rlhf demo | tee log\n```\n"
    assert len(shown_commands(text)) == 2
    for line in shown_commands(text):
        parse(line)
    for wrong in ("lora-rlhf runn x", "lora-rlhf run", "lora-rlhf demo --seeds 3"):
        with pytest.raises(typer.BadParameter.__mro__[1]):
            parse(wrong)


def test_every_command_on_our_pages_parses():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    pages += [*(ROOT / "recipes").rglob("README.md"), *(ROOT / "docs").rglob("*.md")]
    found = 0
    for page in pages:
        for line in shown_commands(page.read_text(encoding="utf-8")) if page.exists() else ():
            try:
                parse(line)
            except Exception as error:
                pytest.fail(f"{page.relative_to(ROOT)}: {line}: {error!r}")
            found += 1
    assert found >= 3 or not (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_every_command_in_our_messages_parses():
    """Messages say what to do; a command that does not exist would be worse than none."""
    found = set()
    for path in sorted((ROOT / "lora_rlhf").rglob("*.py")):
        for text in strings(ast.parse(path.read_text(encoding="utf-8"))):
            found.update((path.name, line) for line in re.findall(r"`(lora-rlhf [^`]+)`", text))
            if text.startswith("lora-rlhf push"):
                found.add((path.name, text))
    assert len(found) >= 5
    for name, line in sorted(found):
        if line.count(" ") == 1:  # `lora-rlhf run`: the verb is meant
            assert line.split()[1] in VERBS, (name, line)
            continue
        try:
            parse(line)
        except Exception as error:
            pytest.fail(f"{name}: {line}: {error!r}")


def strings(tree: ast.AST):
    """Every string of a module; what an f-string fills in reads X, an option --policy."""
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside.update(id(part) for part in node.values)
            parts = (p.value if isinstance(p, ast.Constant) else "X" for p in node.values)
            yield "".join(map(str, parts)).replace("--X ", "--policy ")
        elif isinstance(node, ast.Constant) and id(node) not in inside:
            yield str(node.value)
