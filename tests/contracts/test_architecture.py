# SPDX-License-Identifier: Apache-2.0
"""The shape of the code, frozen: floors of rooms, one module per outside library, safe calls."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from lora_rlhf.recipe import schema as recipe_sections

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lora_rlhf"

LONGEST_FUNCTION = 60

FLOORS: list[tuple[str, ...]] = [
    ("estimates", "redaction", "tiny"),
    ("errors",),
    ("recipe", "_trl"),
    ("data", "runtime"),
    ("models", "runs"),
    ("training", "reports"),
    ("algorithms", "hub"),
    ("evaluation", "planning", "serving", "preflight"),
    ("pipeline",),
    ("cli",),
    ("__main__",),
]
"""The rooms, lowest floor first. A room imports from lower floors only, never from a neighbour.

A room is a folder of the package or a module at its top. `__init__` is the public entrance: it
opens on all of them, and none of them imports it.
"""

WITHOUT_TORCH = ("reports", "hub", "recipe", "cli", "errors", "estimates", "redaction")
"""Rooms that import no torch, transformers or TRL when they are loaded."""

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ENTRANCE = "__init__"
MODULES = [name for name in FILES if name != ENTRANCE]
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
NODES = {name: list(ast.walk(tree)) for name, tree in TREES.items()}
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room(name: str) -> str:
    return name.split(".")[0]


def module_of(dotted_name: str) -> str:
    """The module that `lora_rlhf.a.b.name` is or lives in."""
    rest = dotted_name.split(".")[1:]
    while rest and ".".join(rest) not in FILES:
        rest = rest[:-1]
    return ".".join(rest) or ENTRANCE


def string_imports(node: ast.AST) -> Iterator[str]:
    """Our modules that a string names, as in `importlib.import_module("lora_rlhf.pipeline")`.

    Formatted strings count by what their call sites give: `shell.room("pipeline")`.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if re.fullmatch(r"lora_rlhf(\.[a-z_0-9]+)+", node.value):
            yield node.value
    elif isinstance(node, ast.Call) and dotted(node.func).endswith("shell.room"):
        yield f"lora_rlhf.{ast.literal_eval(node.args[0])}"


def own_imports(name: str, *, at_load: bool = False) -> Iterator[str]:
    """The modules of this package that `name` imports.

    Args:
        at_load: Only those imported when the module is loaded, not inside functions.
    """
    package = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
    for node in loaded_nodes(name) if at_load else NODES[name]:
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ["lora_rlhf", *package[: len(package) + 1 - node.level]] if node.level else []
            stem = ".".join([*start, *([node.module] if node.module else [])])
            targets = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            targets = list(string_imports(node))
        for target in targets:
            if target.split(".")[0] == "lora_rlhf":
                yield module_of(target)


def loaded_nodes(name: str) -> Iterator[ast.AST]:
    """Nodes that run when the module is loaded: outside functions and `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = [TREES[name]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def outside_imports(name: str, *, at_load: bool = False) -> Iterator[tuple[str, str]]:
    """(library module, imported name) of everything that `name` imports from elsewhere."""
    for node in loaded_nodes(name) if at_load else NODES[name]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module or "", alias.name) for alias in node.names)


def importers(library: str) -> set[str]:
    return {
        name
        for name in FILES
        for module, _ in outside_imports(name)
        if module.split(".")[0] == library
    }


def dotted(node: ast.expr) -> str:
    """`torch.load` of a call to it; empty for what is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    stem = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{stem}.{node.attr}" if stem else ""


def test_every_module_is_in_a_room():
    assert {room(name) for name in MODULES} == set(FLOOR)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_to_lower_floors_only(name):
    for other in set(own_imports(name)):
        assert other != ENTRANCE, f"{name} imports the package's public entrance"
        if room(other) != room(name):
            assert FLOOR[room(other)] < FLOOR[room(name)], f"{name} imports {other}"


def test_no_ring_of_modules():
    edges = {name: sorted(set(own_imports(name)) - {name}) for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a ring of imports: {' > '.join([*path, name])}"
        if name not in done:
            for other in edges[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_imports_are_relative_inside_a_folder_and_absolute_elsewhere():
    for name in MODULES:
        for node in NODES[name]:
            if not isinstance(node, ast.ImportFrom):
                continue
            if not node.level and (node.module or "").split(".")[0] == "lora_rlhf":
                ours = [module_of(f"{node.module}.{alias.name}") for alias in node.names]
                here = FILES[name].parent
                inside = [o for o in ours if FILES[o].parent == here != PACKAGE]
                assert not inside, f"{name} imports {inside} of its own folder absolutely"
            elif node.level:
                assert node.level == 1, f"{name}: a relative import leaves the folder"


def test_file_stems_are_unique():
    stems = [path.stem for path in FILES.values() if path.name != "__init__.py"]
    assert sorted(stems) == sorted(set(stems))


def test_the_init_of_a_room_holds_one_docstring():
    for name, path in FILES.items():
        if path.name == "__init__.py" and name not in (ENTRANCE, "tiny"):
            assert len(TREES[name].body) == 1 and ast.get_docstring(TREES[name]), name


def test_no_torch_where_none_is_needed():
    heavy = {"torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes"}
    loads: dict[str, set[str]] = {}

    def loaded(name: str) -> set[str]:
        if name not in loads:
            loads[name] = set()
            found = {
                module.split(".")[0] for module, _ in outside_imports(name, at_load=True)
            } & heavy
            for other in own_imports(name, at_load=True):
                found |= loaded(other)
            loads[name] = found
        return loads[name]

    assert loaded("models.backbone") >= {"torch", "transformers"}
    for name in MODULES:
        if room(name) in WITHOUT_TORCH:
            assert not loaded(name), f"{name} loads {loaded(name)}"


def test_the_check_of_imports_sees_something():
    edges = {(name, other) for name in MODULES for other in own_imports(name)}
    assert {
        ("cli.app", "errors"),
        ("cli.app", "pipeline"),  # by a string
        ("data.closed_world.generator", "data.closed_world.vocabulary"),
        ("models.base_model", "tiny"),
    } <= edges
    assert len(edges) > 300


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


@pytest.mark.parametrize("name", FILES)
def test_functions_stay_short(name):
    for function in NODES[name]:
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= LONGEST_FUNCTION, f"{name}.{function.name} has {length} lines"


@pytest.mark.parametrize("name", FILES)
def test_only_tables_of_data_are_formatted_by_hand(name):
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    skipped = {number for number, line in enumerate(lines, 1) if "# fmt:" in line}
    tables = {
        node.end_lineno
        for node in NODES[name]
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(node.value, ast.Dict | ast.Tuple | ast.List | ast.Set)
    }
    assert skipped <= tables, f"{name}: fmt: skip outside of a table on {sorted(skipped - tables)}"


@pytest.mark.parametrize("name", FILES)
def test_every_file_names_its_licence_and_purpose(name):
    first = FILES[name].read_text(encoding="utf-8").split("\n", 1)[0]
    assert first == "# SPDX-License-Identifier: Apache-2.0"
    assert ast.get_docstring(TREES[name])


def test_one_door_per_library():
    assert importers("trl") == {"_trl"}
    assert importers("peft") <= {
        "models.base_model",
        "models.views",
        "models.backbone",
        "models.fused_layers",
    }
    assert importers("typer") <= {"cli.shell", "cli.app"}
    assert importers("matplotlib") == {"reports.plots"}


def test_only_the_hub_module_talks_to_the_hub():
    allowed = {
        "reports.cards.model_card": {"ModelCard"},
        "reports.cards.card_facts": {"EvalResult", "ModelCardData"},
        "cli.shell": {"utils"},  # its progress bars
        "hub.backup": {"utils"},  # none of them across a stage's line
    }
    for name in set(FILES) - {"hub.repository"}:
        found = {n for module, n in outside_imports(name) if module.startswith("huggingface_hub")}
        assert found <= allowed.get(name, set()), name
        calls = {node.attr for node in NODES[name] if isinstance(node, ast.Attribute)}
        assert not calls & {"push_to_hub", "upload_folder", "create_repo", "create_commit"}, name
    for library in ("requests", "httpx", "urllib", "aiohttp", "socket", "http"):
        assert not importers(library), library


PICKLES = ("pickle", "cPickle", "_pickle", "cloudpickle", "joblib", "dill", "marshal", "shelve")
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.hub.load"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"),
    *("yaml.full_load_all", "pandas.read_pickle", "pd.read_pickle"),
}
SAFE_LOADERS = ("yaml.SafeLoader", "_Loader")


def dangers(tree: ast.AST) -> list[str]:
    """What could run, or unpickle, something that a file says."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"import {name}" for name in names if name.split(".")[0] in PICKLES]
            found += [
                f"from {node.module} import {name}"
                for name in names
                if isinstance(node, ast.ImportFrom) and f"{node.module}.{name}" in FORBIDDEN
            ]
        elif isinstance(node, ast.Attribute | ast.Name):
            bases = ("yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader")
            found += [dotted(node)] if dotted(node) in bases else []
        if not isinstance(node, ast.Call):
            continue
        found += [dotted(node.func)] if dotted(node.func) in FORBIDDEN else []
        allowed = {
            "trust_remote_code": ("False",),
            "shell": ("False",),
            "allow_pickle": ("False",),
            "weights_only": ("True",),
            "use_safetensors": ("True",),
            "Loader": SAFE_LOADERS,
        }
        keys = [(k.arg, ast.unparse(k.value)) for k in node.keywords]
        found += [
            f"{key}={value}" for key, value in keys if value not in allowed.get(key, (value,))
        ]
    for node in ast.walk(tree):  # options that are handed on as a dict
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                name = key.value if isinstance(key, ast.Constant) else None
                if name in ("trust_remote_code", "shell") and not isinstance(value, ast.Constant):
                    found.append(f"{name}: {ast.unparse(value)}")
                elif name in ("trust_remote_code", "shell") and value.value is True:
                    found.append(f"{name}: True")
    return found


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_unpickled_or_executed(name):
    assert dangers(TREES[name]) == []


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
        for node in NODES["models.base_model"]
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }


def test_the_package_does_not_print():
    for name in FILES:
        calls = [n for n in NODES[name] if isinstance(n, ast.Call)]
        assert not [c for c in calls if dotted(c.func) == "print"], name


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from sections(part)


def test_every_recipe_key_is_read_somewhere():
    read: set[str] = set()
    for name in set(FILES) - {"recipe.loader", "recipe.schema"}:
        for node in NODES[name]:
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(r"[a-z_.]+", node.value):
                    read.update(node.value.split("."))
    fields = {(s.__name__, key) for s in sections(recipe_sections.Recipe) for key in s.model_fields}
    assert len(fields) > 60
    unread = sorted(f"{section}.{key}" for section, key in fields if key not in read)
    assert not unread, f"nothing reads {unread}: a key that does nothing is a lie"


def test_every_recipe_key_is_described():
    found = sections(recipe_sections.Recipe)
    keys = {(s, key): f for s in found for key, f in s.model_fields.items()}
    undescribed = [
        f"{section.__name__}.{key}"
        for (section, key), field in keys.items()
        if not field.description and not issubclass(_class(field.annotation), BaseModel)
    ]
    assert not undescribed


def _class(annotation: object) -> type:
    return annotation if isinstance(annotation, type) else object


@pytest.mark.parametrize("name", FILES)
def test_what_is_public_is_documented(name):
    public = [
        node
        for node in TREES[name].body
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
    bare = [node.name for node in public if not ast.get_docstring(node)]
    assert not bare, f"{name}: {bare}"
