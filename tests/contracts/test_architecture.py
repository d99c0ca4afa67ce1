# SPDX-License-Identifier: Apache-2.0
"""The shape of the code, frozen: floors of rooms, one module per outside library, safe calls."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from pydantic import BaseModel
from source_tree import (
    SourceTree,
    climbing_imports,
    code_in_inits,
    repeated_stems,
    rings,
    room,
    unusual_imports,
)

from lora_rlhf.recipe import schema as recipe_sections

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lora_rlhf"

LONGEST_FUNCTION = 60

FLOORS: list[tuple[str, ...]] = [
    ("estimates", "redaction", "tiny"),
    ("errors",),
    ("recipe", "_trl", "extras"),
    ("data", "runtime", "distributed"),
    ("models", "runs"),
    ("training", "reports"),
    ("algorithms", "hub"),
    ("evaluation", "planning", "serving", "exports", "preflight"),
    ("pipeline", "feedback", "starting", "sweeps"),
    ("cli",),
    ("__main__",),
]
"""The rooms, lowest floor first. A room imports from lower floors only, never from a neighbour.

A room is a folder of the package or a module at its top. `__init__` is the public entrance: it
opens on all of them, and none of them imports it.
"""

WITHOUT_TORCH = ("reports", "hub", "recipe", "cli", "errors", "estimates", "redaction")
"""Rooms that import no torch, transformers or TRL when they are loaded."""

TREE = SourceTree.read(PACKAGE)
FILES = {name: PACKAGE / path for name, path in TREE.paths.items()}
FLOOR = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}


def dotted(node: ast.expr) -> str:
    """`torch.load` of a call to it; empty for what is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    stem = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{stem}.{node.attr}" if stem else ""


# ------------------------------------------------------------------------- the imports


def test_every_module_is_in_a_room():
    assert {room(name) for name in TREE.modules} == set(FLOOR)


def test_imports_go_to_lower_floors_only():
    assert climbing_imports(TREE, FLOORS) == []


def test_no_ring_of_modules():
    assert rings(TREE) == []


def test_imports_are_relative_inside_a_folder_and_absolute_elsewhere():
    assert unusual_imports(TREE) == []


def test_file_stems_are_unique():
    assert repeated_stems(TREE) == []


def test_the_init_of_a_room_holds_one_docstring():
    assert code_in_inits(TREE) == ["tiny"]


def test_the_real_imports_are_seen():
    edges = {(name, other) for name in TREE.modules for other in TREE.imports(name)}
    assert {
        ("cli.app", "errors"),
        ("cli.app", "pipeline"),  # by a string
        ("data.closed_world.generator", "data.closed_world.vocabulary"),
        ("models.loading", "tiny"),
    } <= edges
    assert len(edges) > 300


def house(changes: Mapping[str, str] | None = None) -> SourceTree:
    """A little package that breaks no rule, with these files changed or added."""
    files = {
        "__init__.py": "",
        "errors.py": "",
        "models/__init__.py": '"""Models."""',
        "models/views.py": "from lora_rlhf import errors",
        "models/backbone.py": "from . import views",
        "runs/__init__.py": '"""Runs."""',
        "runs/record.py": "from lora_rlhf.errors import RecipeError",
        "runs/cards/__init__.py": '"""Cards."""',
        "runs/cards/text.py": "from lora_rlhf.runs.record import Record",
        "cli.py": "def open(name): importlib.import_module(f'lora_rlhf.{name}')",
        "shell.py": "import torch; from lora_rlhf import models; open('models.views')",
    }
    return SourceTree(files | (changes or {}))


LITTLE_FLOORS = [("errors",), ("models", "runs"), ("cli",), ("shell",)]


def test_the_little_package_breaks_no_rule():
    tree = house()
    assert climbing_imports(tree, LITTLE_FLOORS) == rings(tree) == unusual_imports(tree) == []
    assert repeated_stems(tree) == code_in_inits(tree) == []
    assert tree.imports("shell") == {"models", "models.views"}


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("models/views.py", "from lora_rlhf.runs import record"),
        ("models/views.py", "from lora_rlhf.runs.record import Record"),
        ("models/views.py", "import lora_rlhf.runs.record"),
        ("models/views.py", "def f():\n    from lora_rlhf.runs import record"),
        ("models/views.py", "if TYPE_CHECKING:\n    from lora_rlhf.runs.record import Record"),
        ("models/views.py", "from ..runs import record"),
        ("models/views.py", "from .. import cli"),
        ("models/views.py", "importlib.import_module('lora_rlhf.runs.record')"),
        ("models/views.py", "importlib.import_module('..runs.record', __package__)"),
        ("models/views.py", "patch('lora_rlhf.runs.record.Record.read')"),
        ("models/views.py", "HOME = 'lora_rlhf.runs.record:Record'"),
        ("models/views.py", "cli.open('runs.record')"),
        ("models/views.py", "import lora_rlhf"),
        ("models/views.py", "from lora_rlhf import Record"),
        ("errors.py", "from .models import views"),
        ("errors.py", "def f(): return import_module('lora_rlhf.cli')"),
    ],
)
def test_an_import_that_climbs_is_seen(where, line):
    assert climbing_imports(house({where: line}), LITTLE_FLOORS)


@pytest.mark.parametrize(
    "line",
    ["from . import backbone", "from .backbone import Backbone", "import lora_rlhf.models.backbone",
     "def f():\n    from .backbone import Backbone",
     "importlib.import_module('lora_rlhf.models.backbone')", "import_module('.backbone', 'x')",
     "NAME = 'lora_rlhf.models.backbone.Backbone'", "cli.open('models.backbone')"],
)  # fmt: skip
def test_a_ring_is_seen(line):
    assert rings(house({"models/views.py": line})) == [
        "models.views > models.backbone > models.views"
    ]


@pytest.mark.parametrize(
    "line",
    ["from lora_rlhf.models import backbone", "from lora_rlhf.models.backbone import Backbone",
     "import lora_rlhf.models.backbone", "from .. import errors", "from ..errors import Problem"],
)  # fmt: skip
def test_an_import_in_the_other_style_is_seen(line):
    assert len(unusual_imports(house({"models/views.py": line}))) == 1


def test_a_repeated_stem_is_seen():
    assert repeated_stems(house({"runs/views.py": ""})) == ["views"]
    assert repeated_stems(house({"runs/cards/models.py": ""})) == ["models"]


@pytest.mark.parametrize("text", ['"""Runs."""\nX = 1', '"""Runs."""\nfrom . import record', ""])
@pytest.mark.parametrize("folder", ["runs", "runs/cards"])
def test_an_init_without_just_a_docstring_is_seen(folder, text):
    tree = house({f"{folder}/__init__.py": text})
    assert code_in_inits(tree) == [folder.replace("/", ".")]


LOADER = """
import importlib, sys
heavy = {"torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes"}
for name in sys.argv[1:]:
    importlib.import_module(name)
    if loaded := sorted(heavy & {*sys.modules}):
        sys.exit(f"{name} loads {', '.join(loaded)}")
"""


def what_loads_torch(*modules: str, path: Path = ROOT) -> str:
    """The first of these modules that loads a heavy library, in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", LOADER, *modules], capture_output=True, text=True, cwd=path
    )
    return done.stderr.strip()


def test_no_torch_where_none_is_needed(tmp_path):
    light = [f"lora_rlhf.{name}" for name in TREE.modules if room(name) in WITHOUT_TORCH]
    light += ["lora_rlhf.feedback.labeling", "lora_rlhf.feedback.notebook"]  # start at once
    assert what_loads_torch(*light) == ""
    (tmp_path / "torch.py").touch()
    (tmp_path / "indirect.py").write_text("import direct")
    (tmp_path / "direct.py").write_text("import torch")
    assert what_loads_torch("json", "indirect", path=tmp_path) == "indirect loads torch"


def test_every_room_is_in_the_map_and_has_a_readme():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = [r for r in FLOOR if r != "__main__" and not re.search(rf"`{r}(\.py|/)?`", text)]
    assert not missing, f"CONTRIBUTING.md does not say what these rooms own: {missing}"
    for folder in sorted({path.parent for path in FILES.values()} - {PACKAGE}):
        if folder.parent != PACKAGE or folder.name == "tiny":
            continue
        readme = (folder / "README.md").read_text(encoding="utf-8")
        modules = {p.stem for p in folder.rglob("*.py")} - {"__init__"}
        absent = sorted(stem for stem in modules if f"`{stem}`" not in readme)
        assert not absent, f"{folder.name}/README.md does not say what these are for: {absent}"


def test_functions_stay_short():
    lengths = {
        f"{name}.{function.name}": (function.end_lineno or 0) - function.lineno + 1
        for name in FILES
        for function in TREE.nodes[name]
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(lengths) > 1000
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION}


def test_only_tables_of_data_are_formatted_by_hand():
    outside = []
    for name, path in FILES.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        skipped = {number for number, line in enumerate(lines, 1) if "# fmt:" in line}
        tables = {
            node.end_lineno
            for node in TREE.nodes[name]
            if isinstance(node, ast.Assign | ast.AnnAssign)
            and isinstance(node.value, ast.Dict | ast.Tuple | ast.List | ast.Set)
        }
        outside += [f"{name}:{number}" for number in sorted(skipped - tables)]
    assert not outside, "fmt: skip outside of a table"


def test_every_file_names_its_licence_and_purpose():
    licence = "# SPDX-License-Identifier: Apache-2.0\n"
    assert not [n for n, p in FILES.items() if not p.read_text("utf-8").startswith(licence)]
    assert not [name for name in FILES if not ast.get_docstring(TREE.trees[name])]


def test_one_door_per_library():
    assert TREE.importers("trl") == {"_trl"}
    assert TREE.importers("peft") == {
        "models.backbone",
        "models.fused_layers",
        "models.lean_layers",
        "models.plain_adapters",
        "models.stacked_lora",
    }
    assert TREE.importers("typer") <= {
        f"cli.{name}" for name in ("shell", "command_group", "app", "start_verbs", "use_verbs")
    }
    assert TREE.importers("matplotlib") == {"reports.plots"}


def test_only_the_hub_module_talks_to_the_hub():
    allowed = {
        "reports.cards.model_card": {"ModelCard"},
        "reports.cards.card_facts": {"EvalResult", "ModelCardData"},
        "runtime.quiet": {"utils"},  # its progress bars
        "evaluation.server": {"InferenceClient"},  # of a user's own server
        "hub.backup": {"utils"},  # none of them across a stage's line
    }
    for name in set(FILES) - {"hub.repository"}:
        names = {
            n for module, n in TREE.outside_imports(name) if module.startswith("huggingface_hub")
        }
        assert names <= allowed.get(name, set()), name
        calls = {node.attr for node in TREE.nodes[name] if isinstance(node, ast.Attribute)}
        assert not calls & {"push_to_hub", "upload_folder", "create_repo", "create_commit"}, name
    for library in ("requests", "httpx", "urllib", "aiohttp", "socket", "http"):
        # A vLLM that we started, and the rollout server that the recipe names.
        allowed_here = {"serving.vllm_engine", "serving.rollout_server", "algorithms.vllm_rollouts"}
        assert TREE.importers(library) <= allowed_here, library


PICKLES = ("pickle", "cPickle", "_pickle", "cloudpickle", "joblib", "dill", "marshal", "shelve")
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.hub.load"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"),
    *("yaml.full_load_all", "pandas.read_pickle", "pd.read_pickle"),
}
SAFE_LOADERS = ("yaml.SafeLoader", "yaml.CSafeLoader", "_Loader")


def dangers(tree: ast.AST) -> list[str]:
    """What could run, or unpickle, something that a file says."""
    dangerous = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            dangerous += [f"import {name}" for name in names if name.split(".")[0] in PICKLES]
            dangerous += [
                f"from {node.module} import {name}"
                for name in names
                if isinstance(node, ast.ImportFrom) and f"{node.module}.{name}" in FORBIDDEN
            ]
        elif isinstance(node, ast.Attribute | ast.Name):
            bases = ("yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader")
            dangerous += [dotted(node)] if dotted(node) in bases else []
        if not isinstance(node, ast.Call):
            continue
        dangerous += [dotted(node.func)] if dotted(node.func) in FORBIDDEN else []
        allowed = {
            "trust_remote_code": ("False",),
            "shell": ("False",),
            "allow_pickle": ("False",),
            "weights_only": ("True",),
            "use_safetensors": ("True",),
            "Loader": SAFE_LOADERS,
        }
        keys = [(k.arg, ast.unparse(k.value)) for k in node.keywords]
        dangerous += [
            f"{key}={value}" for key, value in keys if value not in allowed.get(key, (value,))
        ]
    for node in ast.walk(tree):  # options that are handed on as a dict
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                name = key.value if isinstance(key, ast.Constant) else None
                if name in ("trust_remote_code", "shell") and not isinstance(value, ast.Constant):
                    dangerous.append(f"{name}: {ast.unparse(value)}")
                elif name in ("trust_remote_code", "shell") and value.value is True:
                    dangerous.append(f"{name}: True")
    return dangerous


def test_nothing_is_unpickled_or_executed():
    assert {name: seen for name in FILES if (seen := dangers(TREE.trees[name]))} == {}


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import loads", "import dill as d", "import joblib.numpy_pickle",
     "torch.load(x)", "torch.save(a, b)", "from torch import load", "eval(x)",
     "exec(x)", "yaml.load(x)", "yaml.load(x, Loader=yaml.SafeLoader)", "yaml.unsafe_load(x)",
     "yaml.parse(x, Loader=yaml.Loader)", "class L(yaml.UnsafeLoader): pass",
     "from os import system",
     "os.system(x)", "subprocess.run(x, shell=True)", "subprocess.run(x, shell=wanted)",
     "f(trust_remote_code=True)", "f(trust_remote_code=given)", "f(**{'trust_remote_code': True})",
     "numpy.load(x, allow_pickle=True)", "f(use_safetensors=None)",
     "torch.load(x, weights_only=False)"],
)  # fmt: skip
def test_the_audit_sees(line):
    assert dangers(ast.parse(line))


def test_the_audit_lets_pass_what_is_safe():
    fine = "yaml.safe_load(x); yaml.parse(x, Loader=yaml.SafeLoader); f(trust_remote_code=False)"
    assert dangers(ast.parse(fine + "; re.compile(x); subprocess.run([a])")) == []
    assert {"use_safetensors", "trust_remote_code"} <= {
        key.value
        for node in TREE.nodes["models.loading"]
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }


def test_the_package_does_not_print():
    for name in FILES:
        calls = [n for n in TREE.nodes[name] if isinstance(n, ast.Call)]
        assert not [c for c in calls if dotted(c.func) == "print"], name


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from sections(part)


def test_every_recipe_key_is_read_somewhere():
    read: set[str] = set()
    for name in (n for n in FILES if room(n) != "recipe"):
        for node in TREE.nodes[name]:
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(r"[a-z0-9_.]+", node.value):
                    read.update(node.value.split("."))
    fields = {(s.__name__, key) for s in sections(recipe_sections.Recipe) for key in s.model_fields}
    assert len(fields) > 60
    unread = sorted(f"{section}.{key}" for section, key in fields if key not in read)
    assert not unread, f"nothing reads {unread}: a key that does nothing is a lie"


def test_every_recipe_key_is_described():
    keys = {
        (s, key): f for s in sections(recipe_sections.Recipe) for key, f in s.model_fields.items()
    }
    undescribed = [
        f"{section.__name__}.{key}"
        for (section, key), field in keys.items()
        if not field.description and not issubclass(_class(field.annotation), BaseModel)
    ]
    assert not undescribed


def _class(annotation: object) -> type:
    return annotation if isinstance(annotation, type) else object


def test_what_is_public_is_documented():
    public = [
        node
        for name in FILES
        for node in TREE.trees[name].body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    ]
    public += [
        method
        for node in public
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
    ]
    assert len(public) > 500
    assert not [node.name for node in public if not ast.get_docstring(node)]
