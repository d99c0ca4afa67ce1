# SPDX-License-Identifier: Apache-2.0
"""What `import lora_rlhf` shows: exactly `__all__`, sorted, documented, and cheap to import."""

import importlib
import subprocess
import sys
import types

import pytest

import lora_rlhf


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


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, lora_rlhf\n"
        "lora_rlhf.__version__, lora_rlhf.LoraRlhfError\n"
        "heavy = {'torch', 'transformers', 'trl', 'numpy', 'pydantic', 'yaml', 'rich', 'typer'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
