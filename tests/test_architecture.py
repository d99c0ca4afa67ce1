# SPDX-License-Identifier: Apache-2.0
"""The shape of the code, frozen: imports only leftwards, one door per library, short files."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from lora_rlhf import sections as recipe_sections

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_rlhf"

ORDER = [
    *(
        "masking",
        "errors",
        "stopping",
        "strict_yaml",
        "inside",
        "section",
        "data_section",
        "sections",
        "config",
    ),
    *("arguments", "readers", "record", "sharing", "samples"),
    *(
        "sources",
        "layouts",
        "tokens",
        "templates",
        "filters",
        "task_words",
        "task_checks",
        "tasks",
        "metrics",
        "data",
    ),
    *("tiny", "tiny.train"),
    *(
        "installed",
        "_trl",
        "fingerprints",
        "halving",
        "base",
        "trunk",
        "sampler",
        "views",
        "backbone",
        "fused",
        "adapters",
    ),
    *("logprobs", "heads"),
    *("objectives", "overoptimization", "guards"),
    *("progress", "health", "checkpoint", "pieces", "resumable", "resume", "stages", "sft"),
    *("ensemble", "ranking", "reward_report", "reward"),
    *("ppo_log", "ptx", "minibatches", "watch", "steering", "ppo_optimizer"),
    *("rollout", "ppo_trainer", "ppo"),
    *("controls", "group_trainers", "dpo", "best_of_n", "answers", "evaluate"),
    *("base_config", "budget", "meta", "rehearsal", "plan", "probe", "advice"),
    *("plots", "card_text", "card_facts", "card_limits", "card_training", "card_code", "card"),
    *(
        "staging",
        "hub",
        "moment",
        "backup",
        "checks",
        "loaded",
        "findings",
        "pipeline",
        "compare",
        "summary",
        "doctor",
    ),
    "plan_report",
    *("machine", "shell", "cli", "__main__"),
]
"""Every room, leftmost first: a module imports only what stands before it.

`__init__` is the front door: it opens on all of them, and none of them imports it.
"""

LONGEST_FILE, LONGEST_FUNCTION = 400, 60

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FRONT_DOOR = "__init__"
ROOMS = [name for name in FILES if name != FRONT_DOOR]
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
NODES = {name: list(ast.walk(tree)) for name, tree in TREES.items()}


def own_imports(name: str) -> Iterator[str]:
    """The modules of this package that `name` imports, anywhere in it."""
    inside = name.split(".")[:-1]
    for node in NODES[name]:
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ["lora_rlhf", *inside[: len(inside) + 1 - node.level]] if node.level else []
            stem = ".".join([*start, *([node.module] if node.module else [])])
            targets = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.split(".")[0] != "lora_rlhf":
                continue
            rest = target.split(".")[1:]
            while rest and ".".join(rest) not in FILES:
                rest = rest[:-1]
            yield ".".join(rest) or FRONT_DOOR


def outside_imports(name: str) -> Iterator[tuple[str, str]]:
    """(library module, imported name) of everything that `name` imports from elsewhere."""
    for node in NODES[name]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module or "", alias.name) for alias in node.names)


def importers(library: str) -> set[str]:
    return {
        name for name in FILES for module, _ in outside_imports(name)
        if module.split(".")[0] == library
    }  # fmt: skip


def dotted(node: ast.expr) -> str:
    """`torch.load` of a call to it; empty for what is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    stem = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{stem}.{node.attr}" if stem else ""


def test_every_module_has_its_place_in_the_order():
    assert sorted(ORDER) == sorted(ROOMS)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", ROOMS)
def test_imports_go_only_leftwards(name):
    found = set(own_imports(name))
    assert FRONT_DOOR not in found, f"{name} imports the package's front door"
    later = [other for other in found if ORDER.index(other) >= ORDER.index(name)]
    assert not later, f"{name} imports {later}, which stand to its right"


def test_the_check_of_imports_sees_something():
    edges = {(name, other) for name in ROOMS for other in own_imports(name)}
    assert {("cli", "errors"), ("tasks", "task_words"), ("base", "tiny")} <= edges
    assert len(edges) > 60


def test_every_module_is_in_the_map_of_rooms():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = [
        name for name in ROOMS
        if not re.search(rf"`{re.escape(name)}(\.py)?`", text)
    ]  # fmt: skip
    assert not missing, f"CONTRIBUTING.md does not say what these are for: {missing}"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_short(name):
    lines = FILES[name].read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST_FILE, f"{name} has {lines} lines"
    for function in NODES[name]:
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= LONGEST_FUNCTION, f"{name}.{function.name} has {length} lines"


@pytest.mark.parametrize("name", FILES)
def test_every_file_names_its_licence_and_purpose(name):
    first = FILES[name].read_text(encoding="utf-8").split("\n", 1)[0]
    assert first == "# SPDX-License-Identifier: Apache-2.0"
    assert ast.get_docstring(TREES[name])


def test_one_door_per_library():
    assert importers("trl") == {"_trl"}
    assert importers("peft") <= {"base", "views", "backbone", "fused"}
    assert importers("typer") <= {"shell", "cli"}
    assert importers("matplotlib") == {"plots"}


def test_only_the_hub_module_talks_to_the_hub():
    allowed = {
        "card": {"ModelCard"},
        "card_facts": {"EvalResult", "ModelCardData"},
        "shell": {"utils"},  # its progress bars
        "backup": {"utils"},  # none of them across a stage's line
    }
    for name in set(FILES) - {"hub"}:
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
                f"from {node.module} import {name}" for name in names
                if isinstance(node, ast.ImportFrom) and f"{node.module}.{name}" in FORBIDDEN
            ]  # fmt: skip
        elif isinstance(node, ast.Attribute | ast.Name):
            bases = ("yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader")
            found += [dotted(node)] if dotted(node) in bases else []
        if not isinstance(node, ast.Call):
            continue
        found += [dotted(node.func)] if dotted(node.func) in FORBIDDEN else []
        allowed = {
            "trust_remote_code": ("False",), "shell": ("False",), "allow_pickle": ("False",),
            "weights_only": ("True",), "use_safetensors": ("True",), "Loader": SAFE_LOADERS,
        }  # fmt: skip
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
        key.value for node in NODES["base"] if isinstance(node, ast.Dict)
        for key in node.keys if isinstance(key, ast.Constant)
    }  # fmt: skip


def test_the_package_does_not_print():
    for name in set(FILES) - {"tiny.train"}:  # a script of its own
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
    for name in set(FILES) - {"config", "sections", "section", "data_section"}:
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
        f"{section.__name__}.{key}" for (section, key), field in keys.items()
        if not field.description and not issubclass(_class(field.annotation), BaseModel)
    ]  # fmt: skip
    assert not undescribed


def _class(annotation: object) -> type:
    return annotation if isinstance(annotation, type) else object


@pytest.mark.parametrize("name", FILES)
def test_what_is_public_is_documented(name):
    public = [
        node for node in TREES[name].body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    ]  # fmt: skip
    public += [
        method for node in public if isinstance(node, ast.ClassDef) for method in node.body
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
    ]  # fmt: skip
    bare = [node.name for node in public if not ast.get_docstring(node)]
    assert not bare, f"{name}: {bare}"
