# SPDX-License-Identifier: Apache-2.0
"""The wheel, and the versions that it asks for."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("an installed package has no pyproject.toml", allow_module_level=True)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COLAB = ROOT / "requirements" / "colab-2026-08.txt"
MOVED = {"datasets", "pyarrow", "transformers"}
"""Packages of Colab that are too old; TRL 1.16 itself needs the first two newer."""


def lowest(requirement: str) -> Version:
    bounds = [b.version for b in Requirement(requirement).specifier if b.operator in (">=", "==")]
    return max(map(Version, bounds), default=Version("0"))


def name(requirement: str) -> str:
    return Requirement(requirement).name.lower().replace("_", "-")


OURS = {name(one): one for one in PROJECT["dependencies"]}


def test_the_wheel_holds_the_package_alone_and_is_small(tmp_path, monkeypatch):
    backend = pytest.importorskip("hatchling.build", reason="hatchling (extra test) is missing")
    monkeypatch.chdir(ROOT)
    wheel = tmp_path / backend.build_wheel(str(tmp_path))
    assert wheel.stat().st_size < 4_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [archive.read(n).decode() for n in names if n.endswith("METADATA")]
    assert {n.split("/")[0].partition("-")[0] for n in names} == {"lora_rlhf"}
    bad = r"(^|/)tests?[_/]|conftest|\.jsonl|\.csv|\.parquet|\.gz$|\.pyc|README\.md|/runs/.*\.json"
    assert not [n for n in names if re.search(bad, n)]
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "lora_rlhf").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == modules
    wanted = {
        "lora_rlhf/tiny/model.safetensors",
        "lora_rlhf/tiny/recipe.yaml",
        "lora_rlhf/py.typed",
    }
    assert wanted <= set(names)
    assert "Description-Content-Type: text/markdown" in metadata


def test_pythons_are_named_up_to_3_14():
    versions = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if ":: Python :: 3." in c]
    assert versions == ["3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["requires-python"] == ">=3.11"


def test_every_extra_is_in_the_table():
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert set(PROJECT["optional-dependencies"]) <= set(re.findall("`([a-z]+)`", rows))


def test_lower_bounds_are_not_below_what_trl_needs():
    """A bound below TRL's own would never be installed, so it would say what nobody tested."""
    theirs = {name(one): one for one in requires("trl") if "extra" not in one}
    below = {
        n: (OURS[n], theirs[n]) for n in OURS.keys() & theirs if lowest(OURS[n]) < lowest(theirs[n])
    }
    assert not below
    assert len(OURS.keys() & theirs) >= 6


def test_colab_is_within_the_bounds():
    pins = [line for line in COLAB.read_text().splitlines() if line and not line.startswith("#")]
    for pin in pins:
        ours = OURS.get(name(pin))
        if ours is not None and name(pin) not in MOVED:
            assert Requirement(ours).specifier.contains(pin.partition("==")[2]), (ours, pin)


def resolved(path: Path, *options: str) -> dict[str, str]:
    """Resolve our dependencies into a file, whose pins are kept where no requirement forbids it."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("uv is missing (`make wheel` installs it)")
    command = [uv, "pip", "compile", str(ROOT / "pyproject.toml"), "--no-header", "--no-annotate"]
    done = subprocess.run(
        [*command, "-o", str(path), *options], capture_output=True, text=True, timeout=180
    )
    if done.returncode and re.search("(?i)connect|dns|timed out|fetch", done.stderr):
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]:.100}")
    assert done.returncode == 0, done.stderr
    return pins(path)


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"(?m)^([\w-]+)==(\S+)", path.read_text()))


def test_installing_in_colab_moves_neither_torch_nor_numpy(tmp_path):
    path = shutil.copy(COLAB, tmp_path / "colab.txt")
    before, after = pins(COLAB), resolved(path, "--python-version", "3.13")
    assert {n for n in before if after.get(n) != before[n]} == MOVED


def test_every_lower_bound_can_be_installed(tmp_path):
    lowest_of_all = ("--resolution", "lowest-direct", "--python-version", "3.11")
    made = resolved(tmp_path / "low.txt", *lowest_of_all)
    wrong = {
        n: (one, made[n])
        for n, one in OURS.items()
        if lowest(one).release[:2] != Version(made[n]).release[: len(lowest(one).release[:2])]
    }
    assert not wrong
