# SPDX-License-Identifier: Apache-2.0
"""Fuzzing of everything that reads people's files: recipes, data files, adapter folders.

Every input gives a result or an error of errors.py, and nothing is written, started or connected
to: Python's audit events are watched, and a canary file lies beside the input. By default a few
hundred inputs, always the same; `-m slow` tries 10,000 others each time.
"""

import contextlib
import copy
import functools
import gzip
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import small
from data_sources import TEMPLATE, make_tokenizer
from full_recipe import EVERY_KEY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from lora_rlhf.data import dataset_builder
from lora_rlhf.errors import LoraRlhfError, RecipeError
from lora_rlhf.models import adapters
from lora_rlhf.recipe import loader, trl_args
from lora_rlhf.recipe.schema import COLUMNS, Recipe
from lora_rlhf.recipe.strict_yaml import dump_yaml

QUICK = {"recipe": 50, "data": 100, "adapter": 40}
DEEP = {"recipe": 3_000, "data": 5_000, "adapter": 2_000}


def runs(kind: str, many: bool):
    """Hypothesis' settings: the same few inputs by default, or thousands of new ones."""
    return settings(
        max_examples=(DEEP if many else QUICK)[kind],
        derandomize=not many,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


# --- watch for changes ----------------------------------------------------------------------------

CHANGES = (
    "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.utime", "os.putenv", "os.system", "os.exec", "os.posix_spawn", "os.fork",
    "subprocess.Popen", "socket.connect", "socket.bind", "shutil.rmtree", "shutil.move",
    "pickle.find_class",
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Witness:
    """The changes that the code under test makes, by audit events."""

    def __init__(self):
        self.on, self.seen, self.hooked = False, [], False

    def start(self):
        if not self.hooked:  # not before it is needed: nothing takes a hook away again
            sys.addaudithook(self)
        self.hooked, self.on, self.seen = True, True, []

    def __call__(self, what, args):
        if not self.on:
            return
        if what == "open":
            mode, flags = args[1], args[2]
            writes = any(c in mode for c in "wax+") if isinstance(mode, str) else flags & _WRITES
            if not writes or args[0] == os.devnull:
                return
        elif what not in CHANGES:
            return
        self.seen.append((what, str(args)[:200]))


witness = Witness()
counted: dict[str, int] = {}
taken: dict[str, int] = {}


def harmless(kind: str, call) -> None:
    """Call it, and check that it returns or raises one of our errors, and changes nothing."""
    counted[kind] = counted.get(kind, 0) + (kind in DEEP)
    witness.start()
    try:
        call()
        taken[kind] = taken.get(kind, 0) + 1
    except LoraRlhfError as error:
        assert error.given.strip() and str(error).encode()  # nothing that a terminal cannot show
        assert len(str(error)) < 10_000
    finally:
        witness.on = False
    assert witness.seen == []


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """A folder to work in; nothing beside it may change."""
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "canary").write_text("untouched")
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(work))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    before = sorted(p.name for p in tmp_path.iterdir())
    yield work
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "canary").read_text() == "untouched"
    assert os.environ.get("HOME") == str(tmp_path / "home")


def test_the_watch_for_changes_sees_a_change(canary):
    for change in (
        lambda: (canary / "x").write_text("x"),
        lambda: (canary / "y").mkdir(),
        lambda: os.close(os.open(canary / "z", os.O_CREAT)),
        lambda: (canary / "x").unlink(),
    ):
        with pytest.raises(AssertionError):
            harmless("none", change)
    with pytest.raises(ZeroDivisionError):
        harmless("none", lambda: 1 / 0)
    harmless("none", lambda: (canary / "z").read_text())


# --- ways to spoil something -------------------------------------------------------------------

WORDS = st.sampled_from(
    [
        "",
        "0",
        "-1",
        "1e999",
        "nan",
        ".inf",
        "null",
        "~",
        "true",
        "no",
        "1_0",
        "0x1f",
        "²",
        "١",
        "\0",
        "\x1b",
        "\ufeff",
        "\u2028",
        "\ud800",
        "../../canary",
        "/etc/passwd",
        "~/x",
        "~nobody/x",
        "data://../x",
        "a\\b",
        "C:\\x",
        "file:///x",
        "x" * 300,
        "x" * 5000,
        "%",
        "{{ x }}",
        "${HOME}",
        "<<",
        "!!python/x",
        "&a",
        "*a",
        "hf_" + "a" * 20,
        ".",
        "..",
        "a.b",
        "a..b",
        "0.0",
        "tiny",
        "a/b",
        "ppo",
        "-",
        "- -",
        "?",
        "[",
        "{",
    ]
)
TEXT = st.one_of(WORDS, st.text(max_size=20), st.text(st.characters(), max_size=5))
SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    TEXT,
    st.integers(min_value=-(10**400), max_value=10**400),
)
TREE = st.recursive(
    SCALAR, lambda x: st.lists(x, max_size=4) | st.dictionaries(TEXT, x, max_size=4), max_leaves=8
)


@st.composite
def spoiled(draw, raw: bytes):
    """Bytes with some of them changed, left out, doubled, or put elsewhere."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        end = min(len(raw), at + draw(st.integers(0, 30)))
        word = WORDS.map(lambda w: w.encode("utf-8", "replace"))
        twice, nothing = st.just(raw[at:end] * 2), st.just(b"")
        put = draw(st.one_of(st.binary(max_size=4), word, twice, nothing))
        raw = raw[:at] + put + raw[end:]
    return raw


@st.composite
def grafted(draw, tree):
    """Plain data with one or more of its branches replaced, renamed or left out."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        here = tree
        for _ in range(draw(st.integers(0, 4))):
            inside = [
                v
                for v in (here.values() if isinstance(here, dict) else here)
                if isinstance(v, dict | list) and v
            ]
            if not inside:
                break
            here = draw(st.sampled_from(inside))
        if not here:
            break
        key = draw(st.sampled_from(list(here) if isinstance(here, dict) else range(len(here))))
        what = draw(st.sampled_from(["value", "value", "value", "gone", "name"]))
        if what == "value":
            here[key] = draw(TREE)
        elif what == "gone":
            del here[key]
        elif isinstance(here, dict):
            here[draw(TEXT)] = here.pop(key)
    return tree


# --- recipes -----------------------------------------------------------------------------------

WHOLE = loader.parse_recipe(EVERY_KEY, "every").model_dump(mode="json")


def as_yaml(tree) -> bytes:
    """Dump as a run does or, if that fails, as JSON, which is YAML too."""
    try:
        return dump_yaml(tree).encode("utf-8", "surrogatepass")
    except Exception:
        return json.dumps(tree, default=str).encode("utf-8", "surrogatepass")


RECIPES = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=80).map(lambda t: t.encode("utf-8", "surrogatepass")),
    spoiled(EVERY_KEY.encode()),
    grafted(WHOLE).map(as_yaml),
    TREE.map(as_yaml),
    st.tuples(
        st.just(b"name: x\nmodel: {id: tiny}\n"), spoiled(b"data: {prompts: [{path: x}]}\n")
    ).map(b"".join),
)
KEYS = st.sampled_from(
    [
        "ppo.updates",
        "data.prompts.0.path",
        "model.id",
        "data.prompts",
        "sft.args.a",
        "name.x",
        "a",
        "data.prompts.9.path",
        "",
        ".",
        "data..x",
        "0",
        "²",
        "lora.r.1",
        "9" * 5000,
    ]
)
SETS = st.lists(st.one_of(st.tuples(KEYS, TEXT).map("=".join), TEXT), max_size=2)


def recipes(work: Path):
    def check(raw: bytes, sets: list[str]) -> None:
        path = work / "recipe.yaml"
        path.write_bytes(raw)

        def call():
            recipe = loader.load_recipe(path, sets)
            with contextlib.suppress(RecipeError):
                trl_args.check(recipe)
            text = loader.dump_recipe(recipe)
            again = loader.parse_recipe(text, "again")
            assert loader.dump_recipe(again) == text

        harmless("recipe", call)

    return check


def test_recipes(canary):
    runs("recipe", False)(given(RECIPES, SETS)(recipes(canary)))()


@pytest.mark.slow
def test_thousands_of_recipes(canary):
    runs("recipe", True)(given(RECIPES, SETS)(recipes(canary)))()


# --- data --------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "q", "completion": "a"},
    {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1.5, "labeler": "x"},
    {"prompt": "q", "completions": ["a", "b", "c"], "ranks": [1, 2, 2]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
     "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    {"text": "some text"},
]  # fmt: skip
COLUMN = st.sampled_from(sorted({key for row in ROWS for key in row}))
ROW = st.one_of(
    st.sampled_from(ROWS).flatmap(grafted),
    st.sampled_from(ROWS),
    st.dictionaries(COLUMN, TREE, max_size=4),
)


def more(first):
    """Enough of one kind that something is left to train on."""
    return [
        {k: f"{v} {i}" if isinstance(v, str) else v for k, v in first.items()} for i in range(30)
    ]


TABLE = st.tuples(st.lists(ROW, max_size=4), st.sampled_from(ROWS).map(more)).map(
    lambda parts: [*parts[1][:9], *parts[0], *parts[1][9:]]
)


def lines(rows) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode("utf-8", "surrogatepass")


def cells(rows) -> bytes:
    head = list(dict.fromkeys(key for row in rows for key in row))
    table = [head, *[[str(row.get(key, "")) for key in head] for row in rows]]
    quoted = [",".join('"' + str(c).replace('"', '""') + '"' for c in row) for row in table]
    return "\r\n".join(quoted).encode("utf-8", "surrogatepass")


def parquet(rows) -> bytes:
    out = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    except Exception:  # rows that no table can hold
        return lines(rows)
    return out.getvalue()


@functools.cache
def tokenizers():
    return make_tokenizer(None), make_tokenizer(TEMPLATE)


FILES = st.one_of(
    *[
        st.tuples(st.just(ending), st.one_of(TABLE.map(write), TABLE.map(write).flatmap(spoiled)))
        for ending, write in (
            ("jsonl", lines),
            ("json", lambda rows: json.dumps(rows).encode()),
            ("csv", cells),
            ("parquet", parquet),
            ("tsv", cells),
            ("jsonl.gz", lambda rows: gzip.compress(lines(rows))),
        )
    ],
    st.tuples(
        st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet", "csv.gz", "txt", ""]),
        st.binary(max_size=80),
    ),
)
OURS = st.sampled_from(COLUMNS)
SETTINGS = st.fixed_dictionaries(
    {"skip_bad": st.sampled_from([0, 1, 30])},
    optional={
        "columns": st.dictionaries(OURS, TEXT, max_size=2).filter(
            lambda columns: len({*columns.values()}) == len(columns)
        ),
        "limit": st.integers(1, 40),
    },
)


KINDS = ("demonstrations", "comparisons", "prompts", "text")


def datasets(work: Path):
    def check(file, source, kind, chat) -> None:
        ending, raw = file
        for old in work.glob("d.*"):
            old.unlink()
        path = work / f"d.{ending}"
        path.write_bytes(raw)
        columns = source.get("columns", {}) if kind != "text" else {}
        section = {**source, "columns": columns, "path": str(path)}
        recipe = Recipe.model_validate(
            {
                "name": "t",
                "model": {"id": "tiny"},
                "data": {kind: [section], "held_out": 0.3, "max_lost": 1.0},
            }
        )
        read = dataset_builder.texts if kind == "text" else getattr(dataset_builder, kind)

        def call():
            result = read(recipe, tokenizers()[chat])
            report = result[1] if kind == "text" else result.report
            assert json.dumps(report, allow_nan=False).encode()

        harmless("data", call)

    return check


ARGUMENTS = (FILES, SETTINGS, st.sampled_from(KINDS), st.booleans())


def test_dataset_builder(canary):
    tokenizers()
    runs("data", False)(given(*ARGUMENTS)(datasets(canary)))()


@pytest.mark.slow
def test_thousands_of_data_files(canary):
    tokenizers()
    runs("data", True)(given(*ARGUMENTS)(datasets(canary)))()


# --- adapter folders ---------------------------------------------------------------------------

JSONS = ("adapter_config.json", "check.json", "reward.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A valid folder, its small files as data, and its weights."""
    folder = adapters.save_role(
        small.backbone("llama", "reward"), "reward", tmp_path_factory.mktemp("good") / "reward"
    )
    files = {name: json.loads((folder / name).read_text()) for name in JSONS}
    return folder, files, load_file(folder / "adapter_model.safetensors")


def folders(saved):
    folder, files, tensors = saved
    weights = (folder / "adapter_model.safetensors").read_bytes()
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    raw = weights[8 + size :]

    def packed(changed) -> bytes:
        text = json.dumps(changed).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + raw

    def renamed(names) -> bytes:
        kept = dict(zip(names, tensors.values(), strict=False))
        return save({name.replace("\0", "") or "x": value for name, value in kept.items()})

    files = [
        st.tuples(
            st.just(name),
            st.one_of(
                grafted(tree).map(lambda t: json.dumps(t).encode("utf-8", "surrogatepass")),
                TREE.map(lambda t: json.dumps(t).encode("utf-8", "surrogatepass")),
                spoiled(json.dumps(tree).encode()),
                st.binary(max_size=20),
            ),
        )
        for name, tree in files.items()
    ]
    clean = st.text(st.characters(exclude_categories=("Cs",)), max_size=9)
    shards = st.one_of(
        grafted(header).map(packed),
        spoiled(weights[:400]).map(lambda h: h + weights[400:]),
        st.binary(max_size=40),
        st.integers(0, len(weights)).map(lambda n: weights[:n]),
        st.lists(clean, max_size=5, unique=True).map(renamed),
    )
    weights_file = st.tuples(st.just("adapter_model.safetensors"), shards)
    return st.lists(st.one_of(*files, weights_file), min_size=1, max_size=2)


def loads(saved, work: Path):
    backbone = small.backbone("llama", "reward")
    before = backbone.state_hash("reward")

    def check(changes) -> None:
        folder = work / "reward"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved[0], folder)
        for name, raw in changes:
            (folder / name).write_bytes(raw)
        harmless("adapter", lambda: adapters.load_role(backbone, "reward", folder))
        assert list(backbone.views) == ["reward"]
        for _, parameter in backbone.role_parameters("reward"):
            assert parameter.isfinite().all()

    assert before
    return check


def test_adapter_folders(canary, saved):
    runs("adapter", False)(given(folders(saved))(loads(saved, canary)))()


@pytest.mark.slow
def test_thousands_of_adapter_folders(canary, saved):
    runs("adapter", True)(given(folders(saved))(loads(saved, canary)))()


@pytest.mark.slow
def test_ten_thousand_inputs_were_tried():
    """Runs last; hypothesis may stop early when it finds no new inputs."""
    print(f"fuzzed: {counted}, of these taken: {taken}")
    assert sum(counted.values()) >= 10_000
