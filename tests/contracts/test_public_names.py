# SPDX-License-Identifier: Apache-2.0
"""What `import lora_rlhf` shows: exactly `__all__`, sorted, documented, and cheap to import."""

import importlib
import math
import subprocess
import sys
import types
import warnings

import card_run
import datasets
import pytest
from transformers.utils import logging as transformers

import lora_rlhf
from lora_rlhf import tiny
from lora_rlhf.cli.app import app
from lora_rlhf.errors import UsageError
from lora_rlhf.runtime import quiet


def test_visible_names_are_exactly_all():
    assert dir(lora_rlhf) == lora_rlhf.__all__ == sorted(lora_rlhf.__all__)


def test_no_module_shadows_a_public_name():
    for module in ("recipe.loader", "errors", "runs.record", "reports.tables", "tiny"):
        importlib.import_module(f"lora_rlhf.{module}")
    shown = {name: getattr(lora_rlhf, name) for name in lora_rlhf.__all__}
    assert not [name for name, value in shown.items() if isinstance(value, types.ModuleType)]


def test_every_public_name_is_documented():
    for name in lora_rlhf.__all__:
        value = getattr(lora_rlhf, name)
        assert name == "__version__" or (value.__doc__ or "").strip(), name
        assert name == "__version__" or value.__name__ == name


def test_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'trainn'"):
        _ = lora_rlhf.trainn


def test_demo_runs_the_packaged_recipe(monkeypatch, tmp_path):
    from lora_rlhf import pipeline

    seen = {}
    monkeypatch.setattr(
        pipeline, "run", lambda recipe, out, progress: seen.update(recipe=recipe, out=out)
    )
    lora_rlhf.demo(tmp_path, seed=3)
    assert (seen["recipe"].seed, seen["recipe"].model.id, seen["out"]) == (3, "tiny", tmp_path)


def test_the_verbs_of_the_command_line_exist_in_python():
    verbs = {command.name for command in app.registered_commands} - {
        "env",
        "judge",
        "report",
        "rollout-server",
    }  # only a shell needs them
    stages = {"sft", "reward", "ppo", "policy"}  # run(..., until=)
    assert {verb.replace("-", "_") for verb in verbs - stages} <= set(lora_rlhf.__all__)


def test_verbs_over_runs_take_their_folder(tmp_path, capsys):
    record = card_run.make_run(tmp_path / "run")
    assert repr(record).startswith(f"Record('{record.folder}': ppo, seed ")
    assert "sft done, reward done, ppo done" in repr(record)
    assert {path.parent.name for path in lora_rlhf.card(record.folder)} >= {"sft", "policy"}
    assert all(finding.stage for finding in lora_rlhf.doctor(record.folder))
    other = card_run.make_run(tmp_path / "other").folder
    with pytest.raises(lora_rlhf.LoraRlhfError, match="runs of the same recipe and seed"):
        lora_rlhf.compare(record.folder, other)
    plan = lora_rlhf.plan(lora_rlhf.load_recipe(tiny.recipe(), ["algorithm=best_of_n"]), "16GB")
    assert plan.fits and "fits 16 GB" in plan.as_text()
    assert capsys.readouterr() == ("", "")


def test_libraries_are_quiet_inside_and_as_before_outside(capfd):
    before = transformers.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    with pytest.warns(UserWarning, match="after"):
        with quiet.libraries():
            warnings.warn("inside", stacklevel=1)
            list(transformers.tqdm(range(3)))
            datasets.Dataset.from_dict({"a": [1]}).map(lambda row: row)
        warnings.warn("after", stacklevel=1)
    assert capfd.readouterr().err == ""
    after = transformers.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    assert after == before


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, lora_rlhf\n"
        "lora_rlhf.__version__, lora_rlhf.LoraRlhfError\n"
        "heavy = {'torch', 'transformers', 'trl', 'numpy', 'pydantic', 'yaml', 'rich', 'typer'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("call", "problem"), [
    (lambda: lora_rlhf.run("recipe.yaml", "out"), "'recipe.yaml' is no recipe.*\n.*load_recipe"),
    (lambda: lora_rlhf.evaluate({"name": "x"}, "out"), "is no recipe, but of the type dict"),
    (lambda: lora_rlhf.plan("recipe.yaml", gpu=16), "is no recipe"),
    (lambda: lora_rlhf.show_data("recipe.yaml"), "is no recipe"),
    (lambda: lora_rlhf.compare(["no", "run"]), "no is not a run directory"),
    (lambda: lora_rlhf.generate("run", ["a", "b"]), "of the type list.*\n.*one prompt of text"),
    (lambda: lora_rlhf.generate("run", None), "of the type NoneType"),
    (lambda: lora_rlhf.generate("run", "a", temperature=math.nan), "temperature nan"),
    (lambda: lora_rlhf.generate("run", "a", temperature=-1), "temperature -1"),
    (lambda: lora_rlhf.generate("run", "a", temperature="0"), "temperature '0'"),
    (lambda: lora_rlhf.generate("run", "a", max_new_tokens=0), "max_new_tokens 0"),
])  # fmt: skip
def test_what_python_may_pass_by_mistake_is_one_error(call, problem):
    with pytest.raises(UsageError, match=problem):
        call()


def test_changes_of_a_recipe_may_be_one_text_or_a_mapping():
    for given in ("seed=3", {"seed": 3}, ["seed=3"]):
        assert lora_rlhf.load_recipe(tiny.recipe(), given).seed == 3
    kept = lora_rlhf.load_recipe(tiny.recipe(), {"model.revision": None, "model.id": "1234"})
    assert kept.model.revision is None and kept.model.id == "1234"
