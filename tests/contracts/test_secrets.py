# SPDX-License-Identifier: Apache-2.0
"""Nothing leaked: canaries in every place that a secret may come from, looked for in every file.

One real run on a little random base, through the command line, with a tracker, then pushed to the
local Hub. What the canary test looks for it has put there itself, so that it can fail.
"""

import json
import logging
import shutil
import time
from pathlib import Path

import broken_runs
import pytest
import small
from hub_server import HubServer
from huggingface_hub import constants
from peft import AutoPeftModelForCausalLM
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from typer.testing import CliRunner

from lora_rlhf import pipeline, redaction
from lora_rlhf.cli import app
from lora_rlhf.errors import DataError, UsageError
from lora_rlhf.recipe.loader import load_recipe
from lora_rlhf.runs.record import Record
from lora_rlhf.training import sft

CANARIES = {
    "environment": "hf_" + "EnvCanary" * 3,
    "variable": "plainlookingpassphrase",  # of no known shape: only its variable tells
    "recipe": "hf_" + "RecipeCanary" * 2,
    "args": "sk-" + "args0Canary" * 2,
    "data": "ghp_" + "DataCanary" * 3,
    "prompt": "hf_" + "PromptCanary" * 2,
    "exception": "glpat-" + "ErrorCanary" * 2,
}

RECIPE = """
name: little
model: {id: ./base}
lora: {r: 4, alpha: 8}
report_to: [canary]
data:
  demonstrations: [{path: ~/project/demonstrations.jsonl}]
  comparisons: [{path: comparisons.jsonl, labeler_instructions: "ask %(recipe)s in %(home)s/x"}]
  prompts: [{path: %(home)s/project/prompts.jsonl}]
  held_out: 0.25
sft: {args: {per_device_train_batch_size: 16, max_steps: 2, run_name: "%(args)s"}}
reward: {gate: warn, args: {per_device_train_batch_size: 16, max_steps: 2}}
ppo: {updates: 1, value_warmup_updates: 0,
  args: {per_device_train_batch_size: 8, steps_per_generation: 1, max_completion_length: 6}}
evaluate: {n: 24, samples: 8}
card: {title: little, authors: "see %(home)s/me", intended_use: "with %(recipe)s"}
"""

seen_by_tracker: list[str] = []


class Tracker(TrainerCallback):
    """Takes all that the trackers of transformers take."""

    def on_train_begin(self, args, state, control, model=None, **_):
        view = model if hasattr(model, "peft_config") else None
        sent = [args.to_dict(), args.to_sanitized_dict(), args.to_json_string()]
        sent += [model.config.to_dict(), getattr(view, "peft_config", None), args.run_name]
        seen_by_tracker.append(repr(sent))

    def on_log(self, args, state, control, logs=None, **_):
        seen_by_tracker.append(repr(logs))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Somebody's home with a project in it, and secrets in the environment."""
    home = tmp_path / "home" / "somebody"
    broken_runs.write(home / "project", None, 48)
    shutil.copytree(small.base_folder("llama"), home / "project" / "base")
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", CANARIES["environment"])
    monkeypatch.setenv("MY_SECRET", CANARIES["variable"])
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "canary", Tracker)
    monkeypatch.setattr(
        integration_utils, "get_available_reporting_integrations", lambda: ["canary"]
    )
    project = home / "project"
    (project / "recipe.yaml").write_text(RECIPE % (CANARIES | {"home": home}))
    for name in ("prompts", "comparisons", "demonstrations"):
        path = project / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for number, row in enumerate(rows):
            kind = ("data", "prompt", "variable")[number % 3]
            row["prompt"] += f" {CANARIES[kind]} {home}/{number}"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen_by_tracker.clear()
    return home


def leaks(text: str, home: Path) -> list[str]:
    wanted = CANARIES | {"home": str(home)}
    return [name for name, canary in wanted.items() if canary in text]


def in_files(folder: Path, home: Path) -> dict[str, list[str]]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) >= 2
    found = {p.relative_to(folder).as_posix(): leaks(in_file(p), home) for p in files}
    return {name: kinds for name, kinds in found.items() if kinds}


def in_file(path: Path) -> str:
    """Without the one path that stays on this disk: where PEFT finds the base of an adapter.

    A push and the Hub's backup replace it.
    """
    text = path.read_bytes().decode("latin-1")
    if path.name == "adapter_config.json":
        text = json.dumps(json.loads(text) | {"base_model_name_or_path": None})
    return text


def invoke(*arguments):
    return CliRunner().invoke(app.app, [str(a) for a in arguments])


def test_no_canary_leaves_its_place(home, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    project, out = home / "project", home / "runs" / "x"

    def fails(context, *_):
        with context.record.stage("sft"):
            raise DataError(f"cannot use {CANARIES['exception']} in {home}/project")

    shown = ""
    with monkeypatch.context() as patched:
        patched.setattr(sft, "run", fails)
        for flags in ([], ["--debug"]):
            result = invoke(*flags, "run", project / "recipe.yaml", "--out", out)
            assert result.exit_code == 3 and "cannot use *** in ~/project" in result.output
            shown += result.output
    error = Record.read(out).data["stages"]["sft"]["error"]["message"]
    assert error == "cannot use *** in ~/project"
    assert in_files(out, home) == {}
    result = invoke("run", project / "recipe.yaml", "--out", out)
    assert result.exit_code == 0, result.output
    shown += result.output

    # the run did use what it hides
    record = Record.read(out)
    assert record.done("card") and record.recipe() != load_recipe(project / "recipe.yaml")
    assert record.recipe().data.prompts[0].path == str(project / "prompts.jsonl")
    assert "~/project/prompts.jsonl" in (out / "recipe.yaml").read_text()
    samples = (out / "samples.jsonl").read_text()
    assert "***" in samples and "~/" in samples
    assert in_files(out, home) == {}
    assert leaks(shown + caplog.text, home) == []
    assert len(seen_by_tracker) > 5 and "~/runs/x/checkpoints" in "".join(seen_by_tracker)
    assert leaks("".join(seen_by_tracker), home) == []
    config = json.loads((record.adapter("policy") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(project / "base")
    assert AutoPeftModelForCausalLM.from_pretrained(record.adapter("policy")).peft_config

    # a hit in the data is printed, and counted
    assert "warning: data.prompts: the text holds what looks like a GitHub token" in shown
    notes = record.data["data"]["prompts"]["notes"]
    assert any("a GitHub token" in note and "(16 rows)" in note for note in notes)
    pushes_nothing_secret(out, home, monkeypatch)


def pushes_nothing_secret(out: Path, home: Path, monkeypatch) -> None:
    with HubServer(user="tester", token=CANARIES["environment"], orgs=("acme",)) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        names = {role: f"acme/{role}" for role in ("base", "policy", "reward", "sft")}
        result = invoke("push", out, *[a for r, n in names.items() for a in (f"--{r}", n)])
        assert result.exit_code == 0, result.output
        assert leaks(result.output, home) == []
        assert set(names.values()) <= server.repos.keys()
        pushed = {
            f"{key}/{path}": leaks(data.decode("latin-1"), home)
            for key, repo in server.repos.items()
            for path, data in repo.files.items()
        }
        assert len(pushed) > 30 and {"acme/policy/record.json"} <= pushed.keys()
        assert {path: kinds for path, kinds in pushed.items() if kinds} == {}
        messages = [c.message for repo in server.repos.values() for c in repo.commits]
        assert leaks("".join(messages), home) == []
        # The token goes to the Hub in one header, and is in no address and no body.
        for request in server.requests:
            headers = {k: v for k, v in request.headers.items() if k != "authorization"}
            assert leaks(f"{request.path} {request.query} {headers}", home) == []
            assert leaks(request.body.decode("latin-1"), home) == []


def test_a_run_with_secrets_in_its_recipe_can_be_continued(home):
    """It was written down without them: that is no difference, and no way to print them."""
    recipe = load_recipe(home / "project" / "recipe.yaml")
    out = home / "runs" / "y"
    pipeline.run(recipe, out, until="sft")
    assert pipeline.run(recipe, out, until="sft").done("sft")
    other = recipe.sft.model_copy(update={"args": {**recipe.sft.args, "max_steps": 3}})
    with pytest.raises(UsageError, match="sft.args.max_steps: 2 -> 3") as caught:
        pipeline.run(recipe.model_copy(update={"sft": other}), out, until="sft")
    assert leaks(str(caught.value), home) == []


def test_the_home_folder_is_a_tilde_wherever_it_stands(monkeypatch, tmp_path):
    home = tmp_path / "me"
    home.mkdir()
    link = tmp_path / "link"
    link.symlink_to(home)
    monkeypatch.setenv("HOME", str(link))
    for folder in (home, link):
        text = f"a {folder}/x, '{folder}' {folder}. {folder}-2 {folder}.bak x{folder}y"
        assert redaction.safe(text) == (f"a ~/x, '~' ~. {folder}-2 {folder}.bak x{folder}y")
    assert redaction.safe({str(home): [f"{home}/a", 3, None]}) == {"~": ["~/a", 3, None]}
    monkeypatch.setenv("HOME", "/")
    assert redaction.safe("/etc/x") == "/etc/x"


def test_the_value_of_a_secret_variable_is_hidden_whatever_it_looks_like(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcdefabcdef")
    monkeypatch.setenv("SHORT_TOKEN", "word")
    assert redaction.safe("abcdefabcdef and a word") == "*** and a word"
    assert redaction.variables()["abcdefabcdef"] == "WANDB_API_KEY"


NO_SECRETS = {
    "TOKENIZER_NAME": "some-tokenizer", "TOKENIZER_PATH": "some/where/else1",
    "TOKENIZERS_PARALLELISM": "neverandnever", "MY_TOKENIZER": "some-tokenizer",
    "HF_TOKEN_PATH": "/no/such/token", "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token",
    "SECRETS_DIR": "/run/secrets1", "SECRET_NAMES": "one and another", "TOKEN_ID": "twelve-or-more",
    "TOKEN": "Some-org/Some.model",
}  # fmt: skip
SECRET_NAMES = ["HF_TOKEN", "TOKEN", "token", "GH_TOKEN_2", "API_TOKENS", "PGPASSWORD", "SECRET1",
                "AWS_SECRET_ACCESS_KEY", "OPENAI_APIKEY", "SECRETKEY"]  # fmt: skip


@pytest.mark.parametrize("name", NO_SECRETS)
def test_a_variable_that_holds_no_secret_hides_nothing(monkeypatch, name):
    monkeypatch.setenv(name, NO_SECRETS[name])
    assert NO_SECRETS[name] not in redaction.variables()
    assert redaction.safe(f"with {NO_SECRETS[name]}.") == f"with {NO_SECRETS[name]}."


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_variable_that_holds_a_secret_hides_it(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    for secret in ("plainlookingpassphrase", "abc/def0ghiJ+klm"):
        monkeypatch.setenv(name, secret)
        assert redaction.safe(f"with {secret}.") == "with ***."
    (tmp_path / "plainlookingpassphrase").touch()
    monkeypatch.setenv(name, "plainlookingpassphrase")
    assert redaction.safe("with plainlookingpassphrase.") == "with ***."  # whatever a folder holds
    monkeypatch.setenv(name, str(tmp_path / "plainlookingpassphrase"))
    assert str(tmp_path / "plainlookingpassphrase") not in redaction.variables()


REPEATED = ["sk-", "sk-a", "sk-_", "hf_", "hf_a", "AKIA", "ghp_", "github_pat_", "glpat-", "a:",
            "-----BEGIN ", "-----BEGIN PRIVATE KEY", "-----BEGIN A PRIVATE KEY ", "://a:", "://a",
            "://a:b", "A", "-", "/home/", "/home/a", "~", "a:\\", "\\"]  # fmt: skip


@pytest.mark.parametrize("part", REPEATED)
def test_masking_takes_time_that_grows_as_the_text(part):
    """Eight times the text takes some eight times the time; 64 times, where each pair counts."""

    def seconds(size: int) -> float:
        text = (part * size)[:size]
        start = time.process_time()
        assert redaction.safe(text) and redaction.count_secrets(text) is not None
        return time.process_time() - start

    assert any(seconds(32_000) <= 24 * max(seconds(4_000), 1e-4) for _ in range(3))
    redaction.safe(part * (1_000_000 // len(part)))


def test_a_key_is_hidden_with_all_that_belongs_to_it():
    for key in ("sk-abcdefghijklmnop1", "sk-proj-a_b-c0" + "x" * 99, "sk-" + "a" * 64 + "1"):
        assert redaction.safe(f"my {key} is") == "my *** is"
        assert redaction.safe(f"x-{key}") == "x-***"
    for text in ("sk-learn-and-more-words", "sk-abc1", "task-abcdefghijklmnop1"):
        assert redaction.safe(text) == text


def test_kinds_of_secrets_are_counted():
    text = " ".join(CANARIES.values())
    assert redaction.count_secrets(text) == {
        "a Hugging Face token": 3,
        "an API key": 1,
        "a GitHub token": 1,
        "a GitLab token": 1,
    }
    assert not redaction.count_secrets("hf_smoke sk-learn ghp_x")


def test_only_reported_arguments_are_masked(tmp_path, monkeypatch):
    """The folder that the trainer works in stays as it was."""
    monkeypatch.setenv("HOME", str(tmp_path))
    args = broken_runs_args(tmp_path)
    assert args.output_dir == str(tmp_path / "run" / "checkpoints" / "sft")
    shown = [args.to_dict(), args.to_sanitized_dict(), json.loads(args.to_json_string())]
    assert {found["output_dir"] for found in shown} == {"~/run/checkpoints/sft"}
    assert {found["run_name"] for found in shown} == {"***"}


def broken_runs_args(folder: Path):
    broken_runs.write(folder, None, 4)
    text = broken_runs.RECIPE.format(base=small.base_folder("llama"))
    from lora_rlhf.recipe.loader import parse_recipe

    recipe = parse_recipe(text, "r", [f"sft.args.run_name={CANARIES['args']}"], folder)
    return sft.arguments(recipe, folder / "run")
