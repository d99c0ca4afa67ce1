# SPDX-License-Identifier: Apache-2.0
"""The modules of a package read as syntax trees: who imports whom, and which rules that breaks."""

import ast
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

PACKAGE = "lora_rlhf"
ENTRANCE = "__init__"
"""The package's own `__init__`: it opens on every room, and no room imports it."""


class SourceTree:
    """The modules of a package.

    Args:
        sources: Path inside the package, as in `models/views.py`, to the text of that file.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.paths: dict[str, PurePosixPath] = {}
        for path in map(PurePosixPath, sources):
            parts = path.with_suffix("").parts
            self.paths[".".join(parts).removesuffix(".__init__")] = path
        self.sources = sources
        self.modules = [name for name in self.paths if name != ENTRANCE]

    @functools.cached_property
    def trees(self) -> dict[str, ast.Module]:
        """Parsed at the first use, which is after collection."""
        return {name: ast.parse(self.sources[str(path)]) for name, path in self.paths.items()}

    @functools.cached_property
    def nodes(self) -> dict[str, list[ast.AST]]:
        return {name: list(ast.walk(tree)) for name, tree in self.trees.items()}

    @functools.cached_property
    def _openers(self) -> set[str]:
        return {
            function.name
            for nodes in self.nodes.values()
            for function in nodes
            if isinstance(function, ast.FunctionDef)
            and any(_called(node) == "import_module" for node in ast.walk(function))
        }

    @classmethod
    @functools.cache
    def read(cls, folder: Path) -> "SourceTree":
        files = sorted(folder.rglob("*.py"))
        return cls({f.relative_to(folder).as_posix(): f.read_text(encoding="utf-8") for f in files})

    def folder(self, name: str) -> str:
        """The folder of a module, empty at the top of the package."""
        return str(self.paths[name].parent).removeprefix(".")

    def module_of(self, dotted_name: str) -> str:
        """The module that `lora_rlhf.a.b.name` is or lives in."""
        rest = dotted_name.split(".")[1:]
        while rest and ".".join(rest) not in self.paths:
            rest = rest[:-1]
        return ".".join(rest) or ENTRANCE

    def imports(self, name: str) -> set[str]:
        """The modules of the package that a module imports, inside functions and strings too."""
        ours = (target for node in self.nodes[name] for target in self._targets(name, node))
        return {self.module_of(t) for t in ours if t.split(".")[0] == PACKAGE} - {name}

    def _targets(self, name: str, node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            stem = ".".join(filter(None, [*self._start(name, node.level), node.module]))
            return [f"{stem}.{alias.name}" for alias in node.names]
        return list(self._strings(name, node))

    def _start(self, name: str, level: int) -> list[str]:
        """The package at which a relative import of so many dots begins."""
        if not level:
            return []
        parts = [PACKAGE, *self.paths[name].parent.parts]
        return parts[: len(parts) + 1 - level]

    def _strings(self, name: str, node: ast.AST) -> Iterator[str]:
        """Modules named in a string: `"lora_rlhf.runs.record.Record"`, `shell.room("pipeline")`.

        A function that calls `import_module` opens what its callers name in their first argument.
        """
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(rf"{PACKAGE}(\.\w+)+(:\w+)?", node.value):
                yield node.value.partition(":")[0]
        elif _called(node) in self._openers | {"import_module"}:
            first = next(iter(node.args), None)
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                stem = first.value.lstrip(".")
                dots = len(first.value) - len(stem)
                target = ".".join([*(self._start(name, dots) or [PACKAGE]), stem])
                if self.module_of(target) != ENTRANCE:
                    yield target

    def outside_imports(self, name: str) -> Iterator[tuple[str, str]]:
        """(library module, imported name) of everything that a module imports from elsewhere."""
        for node in self.nodes[name]:
            if isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield from ((node.module or "", alias.name) for alias in node.names)
            elif _called(node) == "import_module" and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value, ""

    def importers(self, library: str) -> set[str]:
        """The modules that import a library."""
        imported = (
            (name, module) for name in self.paths for module, _ in self.outside_imports(name)
        )
        return {name for name, module in imported if module.split(".")[0] == library}


def _called(node: ast.AST) -> str:
    """`b` of a call of `a.b()`; empty for anything else."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", None) or getattr(node.func, "id", "")


def room(name: str) -> str:
    return name.split(".")[0]


# Each rule returns a line for everything that breaks it.


def climbing_imports(tree: SourceTree, floors: Sequence[Sequence[str]]) -> list[str]:
    """Imports of another room that is not on a lower floor, and of the package's entrance."""
    floor = {r: number for number, rooms in enumerate(floors) for r in rooms}
    return [
        f"{name} imports {other}"
        for name in tree.modules
        for other in sorted(tree.imports(name))
        if other == ENTRANCE
        or (room(other) != room(name) and floor[room(other)] >= floor[room(name)])
    ]


def rings(tree: SourceTree) -> list[str]:
    """Modules that import each other, the way round."""
    broken: list[str] = []
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            broken.append(" > ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for other in sorted(tree.imports(name) - {ENTRANCE}):
                visit(other, (*path, name))
            done.add(name)

    for name in tree.modules:
        visit(name, ())
    return broken


def unusual_imports(tree: SourceTree) -> list[str]:
    """Imports that are absolute inside a folder, or relative out of it."""
    broken = []
    for name in tree.modules:
        for node in tree.nodes[name]:
            if isinstance(node, ast.ImportFrom) and node.level > 1:
                broken.append(f"{name}: a relative import leaves the folder")
            elif isinstance(node, ast.Import) or (
                isinstance(node, ast.ImportFrom) and not node.level
            ):
                ours = [t for t in tree._targets(name, node) if t.startswith(f"{PACKAGE}.")]
                broken += [
                    f"{name} imports {other} of its own folder absolutely"
                    for other in map(tree.module_of, ours)
                    if tree.folder(name) and tree.folder(other) == tree.folder(name)
                ]
    return broken


def repeated_stems(tree: SourceTree) -> list[str]:
    """File names that exist twice, or that are also the name of a room."""
    names = [path.stem for path in tree.paths.values() if path.stem != "__init__"]
    names += {path.parts[0] for path in tree.paths.values() if len(path.parts) > 1}
    return sorted({name for name in names if names.count(name) > 1})


def code_in_inits(tree: SourceTree) -> list[str]:
    """The `__init__.py` of rooms that hold more than one docstring."""
    return [
        name
        for name, path in tree.paths.items()
        if path.name == "__init__.py"
        and name != ENTRANCE
        and not (len(tree.trees[name].body) == 1 and ast.get_docstring(tree.trees[name]))
    ]
