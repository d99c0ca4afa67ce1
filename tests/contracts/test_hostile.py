# SPDX-License-Identifier: Apache-2.0
"""Files that somebody else made: nothing in them is executed, and none leads out of its folder.

Python's own audit events tell what is opened and unpickled while a test looks; the canary is a file
beside the folder that no attack may touch.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import broken_runs
import card_run
import damage
import pytest
import small
import torch
from hub_server import HubServer, hub_env
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lora_rlhf import pipeline
from lora_rlhf.cli import app
from lora_rlhf.data import chat_template, dataset_builder
from lora_rlhf.errors import (
    AdapterError,
    BaseModelError,
    DataError,
    RecipeError,
    TokenizerError,
    UsageError,
)
from lora_rlhf.models import adapters
from lora_rlhf.models.base_model import BaseModel
from lora_rlhf.recipe import trl_args
from lora_rlhf.recipe.loader import load_recipe, parse_recipe
from lora_rlhf.recipe.schema import LoraSection, ModelSection
from lora_rlhf.reports.doctor import doctor
from lora_rlhf.runs import checkpoint
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.serving import loaded_run
from lora_rlhf.training.resumable_trainer import ResumableTrainer


class Watch:
    """Everything that the interpreter opened and unpickled while this was on."""

    def __init__(self):
        self.on, self.opened, self.unpickled, self.hooked = False, [], [], False

    def __call__(self, event, args):
        if self.on and event == "open" and isinstance(args[0], str):
            self.opened.append(os.path.realpath(args[0]))
        if self.on and event == "pickle.find_class":
            self.unpickled.append(args)

    @contextlib.contextmanager
    def looking(self):
        if not self.hooked:  # not before it is needed: nothing takes a hook away again
            sys.addaudithook(self)
        self.hooked, self.on, self.opened, self.unpickled = True, True, [], []
        try:
            yield self
        finally:
            self.on = False


watch = Watch()


@pytest.fixture
def canary(tmp_path):
    """A file outside, which must still be there, unchanged, and never have been opened."""
    path = tmp_path / "outside" / "canary.safetensors"
    path.parent.mkdir()
    save_file(load_file(small.base_folder() / "model.safetensors"), path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    with watch.looking():
        Path(__file__).read_bytes()  # the watch is on
        yield path
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert str(path) not in watch.opened
    assert os.path.realpath(__file__) in watch.opened


class Bomb:
    """A pickle that leaves a file behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "executed"),)


def test_the_watch_and_the_bomb_work(tmp_path):
    with watch.looking():
        pickle.loads(pickle.dumps(Bomb(tmp_path)))
        (tmp_path / "x").write_text("x")
    assert (tmp_path / "executed").is_dir()
    assert watch.unpickled and str(tmp_path / "x") in watch.opened


# --- adapters --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "policy"
    return adapters.save_role(small.backbone("llama", "policy"), "policy", folder)


@pytest.fixture
def adapter(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "policy"))


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_an_adapters_config_names_is_not_looked_at(adapter, canary):
    rewrite(
        adapter / "adapter_config.json",
        base_model_name_or_path=str(canary.parent),
        auto_mapping={"base_model_class": "system", "parent_library": "os"},
        revision="../..",
    )
    backbone = small.backbone()
    adapters.load_role(backbone, "policy", adapter)
    assert backbone.has("policy")


def test_a_pickle_is_no_adapter(adapter, canary):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(canary.parent)))
    with pytest.raises(AdapterError, match="never a pickle"):
        adapters.load_role(small.backbone(), "policy", adapter)
    assert watch.unpickled == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "check.json", "deep/er/link"])
@pytest.mark.parametrize("target", ["canary", "folder", "nowhere", "itself"])
def test_a_link_out_of_an_adapter_is_refused(adapter, canary, name, target):
    path = adapter / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(
        {"canary": canary, "folder": canary.parent, "nowhere": "../x", "itself": path}[target]
    )
    with pytest.raises(AdapterError, match="leads out of the folder"):
        adapters.load_role(small.backbone(), "policy", adapter)


def test_a_link_inside_and_a_link_to_the_folder_are_fine(adapter, tmp_path):
    (adapter / "adapter_model.safetensors").rename(adapter / "weights")
    (adapter / "adapter_model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(adapter)
    adapters.load_role(small.backbone(), "policy", tmp_path / "link")


@pytest.mark.parametrize(
    "header",
    [b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99999999999]}}',
     b'{"x": {"dtype": "F32", "shape": [99999999999], "data_offsets": [0, 4]}}',
     b'{"__metadata__": 7}', b"[]", b'{"x": {}}', b"{" * 5000, b"\xff\xfe"],
)  # fmt: skip
@pytest.mark.parametrize("size", [None, 2**63 - 1, 0])
def test_a_lying_header_is_one_error(adapter, header, size):
    raw = (len(header) if size is None else size).to_bytes(8, "little") + header + b"\0" * 16
    (adapter / "adapter_model.safetensors").write_bytes(raw)
    with pytest.raises(AdapterError):
        adapters.load_role(small.backbone(), "policy", adapter)


# --- bases -----------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    return Path(shutil.copytree(small.base_folder(), tmp_path / "base"))


def load(folder: Path) -> BaseModel:
    return BaseModel.load(ModelSection(id=str(folder)), LoraSection(r=2))


@pytest.mark.parametrize(
    "name", ["../outside/canary.safetensors", "{canary}", "a/../../outside/x", "..", 7, None, "~/x"]
)
def test_an_index_names_files_of_its_own_folder_only(base, canary, name):
    name = name.replace("{canary}", str(canary)) if isinstance(name, str) else name
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors"),
    }
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    load(base)  # that is what a sharded base looks like
    index["weight_map"][next(iter(weights))] = name
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match=r"index\.json names"):
        load(base)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', "{}", "[" * 100_000, "\ud800"])
def test_an_index_that_is_none_is_one_error(base, text):
    (base / "model.safetensors.index.json").write_text(text, errors="surrogatepass")
    with pytest.raises(BaseModelError, match=r"index\.json cannot be read"):
        load(base)


@pytest.mark.parametrize("honest", [False, True])
def test_a_pickle_is_no_base(base, canary, honest):
    """Nor is one that would load: what is read must not depend on what is in it."""
    if honest:
        torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    else:
        (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(canary.parent)))
    (base / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="only safetensors are read"):
        load(base)
    assert watch.unpickled == []


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["llama", "stranger"])
def test_code_beside_a_base_is_never_run(base, canary, where, kind):
    code = f"import os\nos.mkdir({str(canary.parent / 'executed')!r})\n"
    (base / "evil.py").write_text(code)
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    mapped = dict.fromkeys(names, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    rewrite(base / where, auto_map=mapped)
    if kind == "stranger":
        rewrite(base / "config.json", model_type="stranger")
        rewrite(base / "tokenizer_config.json", tokenizer_class="Stranger")
    with contextlib.suppress(BaseModelError):  # with a class of its own transformers needs no code
        load(base)
    assert "evil" not in sys.modules


def test_a_tokenizer_cannot_name_another_file(base, canary):
    keys = ("vocab_file", "tokenizer_file", "merges_file", "spm_file", "added_tokens_file")
    rewrite(base / "tokenizer_config.json", **dict.fromkeys(keys, str(canary)))
    with contextlib.suppress(BaseModelError):
        load(base)


def test_a_link_out_of_a_base_is_refused_but_for_the_hubs_cache(base, canary, tmp_path):
    (base / "generation_config.json").unlink(missing_ok=True)
    (base / "generation_config.json").symlink_to(canary)
    with pytest.raises(BaseModelError, match=r"generation_config\.json is a link"):
        load(base)
    (base / "generation_config.json").unlink()
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b/snapshots/1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in base.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert load(snapshot).fingerprint


# --- chat templates --------------------------------------------------------------------------

BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
                 "{{ m(60) }}",
    "memory": "{{ 'a' * 99999999999 }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
                "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "padding": "{{ 'a' | center(99999999999) }}",
    "length": "{# " + "x" * 1_000_000 + " #}",
    "unasked": "{% if not add_generation_prompt %}{{ 'a' * 99999999999 }}{% endif %}",
    "after a refusal": "{% if messages | length == 1 %}{{ raise_exception('no') }}{% endif %}"
                       "{{ 'a' * 99999999999 }}",
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k == "recursion" else k for k in BOMBS]
)
def test_a_template_bomb_is_found_before_it_goes_off(base, monkeypatch, kind):
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    tokenizer = small.tokenizer()
    tokenizer.chat_template = BOMBS[kind]
    tokenizer.save_pretrained(base)
    with pytest.raises(TokenizerError, match="the chat template (does not end|asks for|has 1,000)"):
        load(base)


SHADOWS = ("resource", "json", "jinja2", "markupsafe", "random", "datetime", "sitecustomize")


@pytest.mark.parametrize("where", ["", "."])
def test_the_trial_of_a_template_runs_nothing_of_the_folder_it_is_in(tmp_path, monkeypatch, where):
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(
            f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\nraise SystemExit(1)\n"
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [where and str(tmp_path), *sys.path])
    tokenizer = small.tokenizer()
    tokenizer.chat_template = BOMBS["memory"] + "{# " + where + " #}"
    with pytest.raises(TokenizerError, match="asks for too much memory"):
        chat_template.check(tokenizer)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("fault", ["no process", "exit code 7", "seconds were over"])
def test_a_template_that_cannot_be_tried_is_noted_and_tried_again(monkeypatch, caplog, fault):
    tokenizer = small.tokenizer()
    tokenizer.chat_template = BOMBS["memory"] + "{# " + fault + " #}"
    with monkeypatch.context() as broken:
        if fault == "no process":
            broken.setattr(sys, "executable", "/no/such/python")
        elif fault == "exit code 7":
            broken.setattr(chat_template, "_TRIAL", "import sys; sys.exit(7)")
        else:
            broken.setattr(chat_template, "SECONDS", 0.1)
            broken.setattr(chat_template, "_TRIAL", "import time; time.sleep(9)")
        chat_template.check(tokenizer)
        [said] = caplog.messages
        assert "could not be tried (" in said and said.endswith("it is used untried")
        assert fault == "no process" or fault in said
        monkeypatch.setattr(chat_template, "prefix_note", lambda tokenizer: None)  # would go off
        assert chat_template.note(tokenizer) == said.removesuffix(": it is used untried")
    with pytest.raises(TokenizerError, match="asks for too much memory"):
        chat_template.check(tokenizer)


def test_where_there_is_no_module_resource_the_clock_bounds_a_template(monkeypatch):
    code = chat_template._TRIAL.replace("import resource", "import no_such_module")
    monkeypatch.setattr(chat_template, "_TRIAL", code)
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    tokenizer = small.tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{# without #}"
    chat_template.check(tokenizer)
    assert chat_template.note(tokenizer) is None
    tokenizer.chat_template = BOMBS["loops"] + "{# without #}"
    with pytest.raises(TokenizerError, match="does not end"):
        chat_template.check(tokenizer)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('executed') }}",
    "{% include '/etc/passwd' %}", "{{ 1 / 0 }}", "{{ messages.append(1) }}", "{% if %}",
    "{{ x.y.z }}",
]  # fmt: skip


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_that_breaks_out_or_breaks_is_an_error_of_ours(
    base, canary, template, monkeypatch, tmp_path
):
    monkeypatch.chdir(canary.parent)
    tokenizer = small.tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(base)
    found = load(base)
    broken_runs.write(tmp_path / "data", None, 40)
    text = broken_runs.RECIPE.format(base=base)
    recipe = parse_recipe(text, "r", folder=tmp_path / "data")
    with pytest.raises(DataError, match="refused by the chat template: 40 -> 0"):
        dataset_builder.demonstrations(recipe, found.tokenizer)


def test_honest_templates_pass(tmp_path):
    """ChatML, one with macros, loop controls, generation marks and tojson; and none at all."""
    honest = [
        None,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        "{%- macro say(m) -%}{{ m.content | trim }}{%- endmacro -%}{%- for m in messages -%}"
        "{%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}{% generation %}{{ say(m) }}"
        "{% endgeneration %}{%- endfor -%}{{ tools | tojson }}{{ strftime_now('%Y') }}",
        "{{ raise_exception('only with tools') }}",
        {"default": "{{ messages[0].content }}"},
    ]
    tokenizer = small.tokenizer()
    for template in honest:
        tokenizer.chat_template = template
        chat_template.check(tokenizer)


# --- recipes ---------------------------------------------------------------------------------

BASE = "name: x\nmodel: {id: tiny}\n"


@pytest.mark.parametrize(
    "text",
    ["model: {id: a/b, trust_remote_code: true}", "trust_remote_code: true",
     *[f"{s}: {{args: {{trust_remote_code: true}}}}"
       for s in ("sft", "reward", "ppo", "grpo", "dpo")],
     *[f"{s}: {{args: {{model_init_kwargs: {{trust_remote_code: true}}}}}}"
       for s in ("sft", "reward", "ppo")],
     "data: {prompts: [{hub: a/b, trust_remote_code: true}]}"],
)  # fmt: skip
def test_no_recipe_turns_remote_code_on(text):
    algorithm = text.split(":")[0] if text.startswith(("grpo", "dpo")) else "ppo"
    more = "data: {comparisons: [{path: x}]}\n" if algorithm == "dpo" else ""
    head = "name: x\n" if text.startswith("model") else BASE
    with pytest.raises(RecipeError):
        recipe = parse_recipe(f"{head}algorithm: {algorithm}\n{more}{text}\n", "r")
        trl_args.check(recipe)
        if "model_init" in text and text.startswith("ppo"):
            from lora_rlhf.algorithms.ppo import ppo_stage

            ppo_stage.arguments(recipe, Path("."))


LAUGHS = "a: &a [x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    "text",
    [
        BASE + "seed: !!python/object/apply:os.mkdir [executed]\n",
        BASE + "seed: !!python/object/new:os.mkdir [executed]\n",
        BASE + "card: {title: !!python/name:os.system ''}\n",
        BASE + "card: !include /etc/passwd\n",
        BASE + "seed: !!int '3'\n", "%TAG ! tag:x,2000:\n---\n" + BASE + "seed: !y 1\n",
        BASE + LAUGHS, BASE + "<<: {seed: 1}\n", BASE + "card: &x {title: a}\n",
        BASE + "\tseed: 1\n", BASE + "---\nseed: 1\n", BASE + "seed: 1\nseed: 2\n",
        BASE + "sft: {args: {a: " + "[" * 5000 + "]" * 5000 + "}}\n",
        BASE + "seed: " + "9" * 5000 + "\n", BASE + "? [a, b]\n: 1\n", "\0", "\x07", "[]", "name",
    ],
)  # fmt: skip
def test_yaml_is_data(text, canary, monkeypatch):
    monkeypatch.chdir(canary.parent)
    open(os.devnull).close()  # something is opened: the watch is on
    with pytest.raises(RecipeError):
        parse_recipe(text, "r.yaml")


def test_no_variable_of_the_environment_gets_into_a_recipe(monkeypatch):
    monkeypatch.setenv("SOME_NAME", "value")
    for given in ("$SOME_NAME", "${SOME_NAME}", "{{ SOME_NAME }}", "env:SOME_NAME", "%SOME_NAME%"):
        recipe = parse_recipe(
            f"{BASE}card: {{title: '{given}'}}\ndata: {{prompts: [{{path: '{given}'}}]}}", "r"
        )
        assert recipe.card.title == given == recipe.data.prompts[0].path


def test_a_recipe_of_10_mb_is_not_even_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE + "#" * 10_000_000)
    with watch.looking(), pytest.raises(RecipeError, match="over 250000 bytes"):
        load_recipe(path)
    assert str(path) not in watch.opened


# --- run directories, checkpoints, archives ----------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run of which only SFT is done, looked at while it went on."""
    top = tmp_path_factory.mktemp("half")
    with watch.looking():
        broken_runs.run(top, "checkpoint.every_steps=1", until="sft", n=40)
    (top / "seen").write_text(repr(watch.unpickled))
    return top


def test_a_run_reads_and_writes_no_pickle(half):
    assert (half / "seen").read_text() == "[]"
    for path in half.rglob("*"):
        if path.is_file():
            head = path.read_bytes()[:4]
            assert head[:1] != b"\x80" and head != b"PK\x03\x04", path
            assert path.suffix not in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".npy"), path


def test_checkpoints_hold_no_pickle_either(tmp_path):
    from lora_rlhf.runtime import interrupts

    broken_runs.write(tmp_path, None, 40)
    text = broken_runs.RECIPE.format(base=small.base_folder())
    sets = ["checkpoint.every_steps=1", "checkpoint.max_minutes=1e-9"]
    recipe = parse_recipe(text, "r", sets, tmp_path)
    with watch.looking(), contextlib.suppress(interrupts.OutOfTime):
        pipeline.run(recipe, tmp_path / "run", until="sft")
        pipeline.run(recipe, tmp_path / "run", until="sft")  # it goes on, from a checkpoint
    assert watch.unpickled == []
    files = [p for p in (tmp_path / "run" / "checkpoints").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "adapters/sft/extra", "plots", "record.json.tmp"]
)
def test_a_link_out_of_a_run_is_refused_and_not_followed(half, canary, tmp_path, name):
    out = Path(shutil.copytree(half / "run", tmp_path / "run"))
    recipe = parse_recipe(broken_runs.RECIPE.format(base=small.base_folder()), "r", folder=half)
    path = out / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(canary if name != "plots" else canary.parent)
    for verb in (
        lambda: Record.read(out),
        lambda: pipeline.run(recipe, out, until="reward"),
        lambda: pipeline.run(recipe, tmp_path / "other", until="sft", start_from=out),
    ):
        with pytest.raises(UsageError, match="leads out of the folder"):
            verb()


def test_a_checkpoint_names_its_own_files_only(tmp_path):
    parts = {part: {"x": 1} for part in checkpoint.PARTS}
    folder = checkpoint.write(tmp_path / "c", 1, parts, {checkpoint.TRAINER_STATE: "{}"}, {}, {})
    assert isinstance(checkpoint.verify(folder), checkpoint.Checkpoint)
    kept = json.loads((folder / "manifest.json").read_text())["files"]
    (tmp_path / "x").write_text("x")
    for name in ("../../x", str(tmp_path / "x"), "..", ""):
        files = kept | {name: {"bytes": 1, "sha256": "0"}}
        damage.edit(folder / "manifest.json", lambda data, files=files: data.update(files=files))
        with watch.looking():
            assert checkpoint.verify(folder) == f"it lacks {name}"
        assert str(tmp_path / "x") not in watch.opened


@pytest.mark.parametrize("name", ["../outside", "..", "./x", "a/..", ".a/b", "data", "a/b/c", "~"])
def test_a_hub_dataset_is_no_folder(tmp_path, canary, monkeypatch, name):
    """`datasets` reads a folder of that name in the place of the Hub's."""
    (tmp_path / "here" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    open(os.devnull).close()  # something is opened: the watch is on
    text = f"{BASE}data: {{demonstrations: [{{hub: '{name}'}}]}}\n"
    with pytest.raises(DataError, match="use path: for a file"):
        dataset_builder.demonstrations(parse_recipe(text, "r"), small.tokenizer())


@pytest.mark.parametrize("name", ["check.json", "adapter_config.json", "reward.json"])
def test_small_files_that_are_deep_or_no_files(adapter, name):
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).write_text("[" * 100_000)
    with pytest.raises(AdapterError, match="cannot be read"):
        adapters.load_role(small.backbone(), "reward", adapter)
    (adapter / name).unlink()
    (adapter / name).mkdir()
    with pytest.raises(AdapterError, match="cannot be read|holds no adapter"):
        adapters.load_role(small.backbone(), "reward", adapter)


def demonstrations(path: Path):
    text = f"{BASE}data: {{demonstrations: [{{path: {path}}}]}}\n"
    return dataset_builder.demonstrations(parse_recipe(text, "r"), small.tokenizer())


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(80):
            file.write(b" " * 2**20)
    with pytest.raises(DataError, match="unpacks to over 67 MB, from 0.1 MB"):
        demonstrations(path)


@pytest.mark.parametrize("ending", ["tar.gz", "zip", "tar", "pkl", "npy", "pt", "arrow", "xlsx"])
def test_archives_and_pickles_are_no_data(tmp_path, canary, ending):
    path = tmp_path / f"d.{ending}"
    raw = pickle.dumps(Bomb(canary.parent))
    path.write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    with pytest.raises(DataError, match="files ending in"):
        demonstrations(path)
    assert watch.unpickled == []


# --- nobody is told --------------------------------------------------------------------------

TRAIN = """
import os, sys, transformers  # first, as many programs do: it reads the variables at once
sys.path.insert(0, {tests!r})
import broken_runs
from pathlib import Path
broken_runs.run(Path("."), until="sft", n=40)
"""


@pytest.mark.parametrize("said", [None, "1", "0"])
def test_trl_tells_nobody_of_a_trainer_unless_asked(monkeypatch, said):
    told = []

    class Told:
        def _send_telemetry(self):
            told.append(self)

    class Trainer(ResumableTrainer, Told):
        def __init__(self):
            pass

    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    if said is not None:
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", said)
    Trainer()._send_telemetry()
    assert len(told) == (said == "0")


@pytest.mark.slow
@pytest.mark.hub
@pytest.mark.parametrize("asked", [False, True])
def test_nobody_is_told_of_a_run_unless_that_is_asked_for(tmp_path, asked):
    with HubServer() as server:
        env = hub_env(server, tmp_path)
        for name in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI"):
            env.pop(name, None)
        if asked:
            env["HF_HUB_DISABLE_TELEMETRY"] = "0"
        here = Path(__file__).parent
        env |= {"PYTHONPATH": str(here.parents[1]), "OMP_NUM_THREADS": "1"}
        code = TRAIN.format(tests=str(here.parent / "support"))
        subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=tmp_path, check=True, capture_output=True
        )
        told = [r.path for r in server.requests if "telemetry" in r.path]
        assert bool(told) == asked, told
        assert asked or not server.requests


# --- the screen ------------------------------------------------------------------------------

ESCAPE = "\x1b]0;owned\x07\x9b31m\u202e\udcff"


def test_no_text_of_others_reaches_the_terminal_as_it_is(tmp_path):
    """Errors, the doctor's report, what a run says, cards and the name of its folder."""
    folder = tmp_path / f"a{ESCAPE[:-1]}"
    record = card_run.make_run(folder)
    record.data["stages"]["ppo"] = {
        "status": "interrupted",
        "error": {"type": "LoraRlhfError", "message": ESCAPE},
    }
    record.data["model"]["id"] = ESCAPE[:-1]
    record.save()
    out = io.StringIO()
    doctor.show(record, doctor.examine(record), Console(file=out, highlight=False))
    progress = Progress()
    progress.console = Console(file=out)
    progress.say(ESCAPE)
    out.write(str(UsageError(ESCAPE, remedy=str(folder))))
    for command in (["doctor", str(folder)], ["card", "--role", "policy", str(folder)],
                    ["generate", str(tmp_path / ESCAPE[:-1]), "x"]):  # fmt: skip
        result = CliRunner().invoke(app.app, command)
        out.write(result.stdout + result.stderr)
    said = out.getvalue()
    assert said.count("owned") >= 5
    assert not set("\x1b\x07\x9b\u202e\udcff") & set(said)


@pytest.mark.parametrize(
    ("text", "seed", "wrong"), [("a\ud83d", 0, "half of a surrogate"), ("a", 2**64, "seed 1844"),
                                ("a", -1, "seed -1")],
)  # fmt: skip
def test_a_prompt_or_a_seed_that_cannot_be_used_is_one_error(text, seed, wrong):
    with pytest.raises(UsageError, match=wrong):
        loaded_run.generate("nowhere", text, seed=seed)
