# SPDX-License-Identifier: Apache-2.0
"""Plain English, as far as a test can hold it: how docstrings begin, and words that say nothing."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / "lora_rlhf").rglob("*.py"))
assert len(PATHS) > 100


@functools.cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in PATHS}


RIDDLE = re.compile(r"(What|Whether|Where|How|Who|That|Those|It)\b")
"""First words of a docstring that make a reader guess what the thing is."""

VAGUE = {"found", "told", "said", "asked", "those", "luck", "well", "unwell"}
"""Names that do not say what a value is: an adapter, a score, a row, a message."""

PRIVATE = re.compile(
    r"\b(is asked of|are asked of|for ever|unwell|the door|its door|at the door|dear|mended|"
    r"is told (?:that|of|to)|are told (?:that|of|to)|bends the distribution|is no number|"
    r"are no numbers?)\b"
)
"""Phrases of our own that a reader of TRL, PEFT and the papers would have to guess."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "lora_rlhf"))


def docstrings(tree: ast.AST):
    """(line, text) of every docstring, public and private."""
    for node in ast.walk(tree):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def variables(tree: ast.AST):
    """(line, name) of everything that gets a name: variables, arguments, functions, classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def test_docstrings_begin_with_a_verb_or_a_noun():
    riddles = [
        f"{name_of(path)}:{line}: {text.splitlines()[0]}"
        for path, tree in trees().items()
        for line, text in docstrings(tree)
        if RIDDLE.match(text)
    ]
    assert not riddles, "\n".join(riddles)


def test_names_say_what_a_value_is():
    vague = [
        f"{name_of(path)}:{line}: {name}"
        for path, tree in trees().items()
        for line, name in variables(tree)
        if name in VAGUE
    ]
    assert not vague, "\n".join(vague)


def test_no_private_phrases():
    private = [
        f"{name_of(path)}:{number}: {match[0]}"
        for path in PATHS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (match := PRIVATE.search(line))
    ]
    assert not private, "\n".join(private)
