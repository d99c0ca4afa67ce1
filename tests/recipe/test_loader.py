# SPDX-License-Identifier: Apache-2.0
"""Loading and dumping recipes: strict values, errors with lines, masked secrets, round trips."""

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml
from full_recipe import EVERY_KEY
from pydantic import BaseModel, ValidationError

from lora_rlhf.data import row_formats
from lora_rlhf.errors import RecipeError
from lora_rlhf.recipe import trl_args
from lora_rlhf.recipe.loader import dump_recipe, load_recipe, parse_recipe
from lora_rlhf.recipe.schema import COLUMNS, ModelSection, PpoSection, Recipe
from lora_rlhf.recipe.strict_yaml import dump_yaml, list_items, parse_yaml
from lora_rlhf.redaction import hide

BASE = "name: x\nmodel: {id: tiny}\n"


def parse(text: str, *sets: str) -> Recipe:
    return parse_recipe(BASE + text, "r.yaml", list(sets))


def refused(text: str, *sets: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse(text, *sets)
    return caught.value


@pytest.mark.parametrize(("source", "message"), [
    ("{path: d.jsonl, columns: {question: prompt}}", "did you mean {prompt: question}?"),
    ("{path: d.jsonl, columns: {promt: q}}", "did you mean 'prompt'?"),
    ("{path: d.jsonl, columns: {prompt: q, completion: q}}", "'q' as prompt and as completion"),
    ("{path: 'https://example.org/d.jsonl'}", "a file of this machine is expected"),
])  # fmt: skip
def test_sources_that_cannot_be_meant_are_refused_with_what_is(source, message):
    error = refused(f"data: {{demonstrations: [{source}]}}\n")
    assert message in error.given and error.where == "r.yaml:3"


def test_a_data_file_given_as_a_recipe_is_named(tmp_path):
    (tmp_path / "my data.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(RecipeError, match="is data, not a recipe") as caught:
        load_recipe(tmp_path / "my data.jsonl")
    assert f"lora-rlhf init '{tmp_path}/my data.jsonl'" in caught.value.remedy


# --- round trips ---------------------------------------------------------------------------------

"""Every key of a recipe with a value other than its default, except `LEFT_OUT`."""

LEFT_OUT = {"ModelSection.revision", "PpoSection.ema", "SftSection.from", "RewardSection.from"}
"""Not beside the others."""


def unset(section: BaseModel) -> set[str]:
    """Keys that have their default value in every section of their class."""
    at_default: dict[str, bool] = {}

    def walk(model: BaseModel) -> None:
        for name, field in type(model).model_fields.items():
            value = getattr(model, name)
            key = f"{type(model).__name__}.{name}"
            if not field.is_required():
                same = value == field.get_default(call_default_factory=True)
                at_default[key] = at_default.get(key, True) and same
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, BaseModel):
                    walk(part)

    walk(section)
    return {key for key, same in at_default.items() if same}


def test_a_recipe_that_sets_every_key_survives_a_round_trip():
    recipe = parse_recipe(EVERY_KEY, "every.yaml")
    assert unset(recipe) == LEFT_OUT, "the recipe above has to set every key"
    assert parse_recipe(dump_recipe(recipe), "again") == recipe


@pytest.mark.parametrize("more", ["", "ppo: {ema: 0.9}\n", "reward: {ensemble: 2}\n"])
def test_a_dumped_recipe_loads_as_an_equal_recipe(more):
    """The dump has every key, so no check may depend on which keys were given."""
    recipe = parse(more)
    again = parse_recipe(dump_recipe(recipe), "again")
    assert again == recipe and dump_recipe(again) == dump_recipe(recipe)


@pytest.mark.parametrize(
    "text",
    ["1e3", "1e-4", "010", "0x1f", "0o7", "1_000", "12:30", "yes", "no", "True", "null", "~", "",
     ".inf", ".5", "1.", "2024-01-01", "=", "<<", " x ", "a: b", "- a", "#", "***", "é\u2028\x85",
     "two\nlines\n", "'", '"', "\ufeff", "%", "@x", "x" * 200, "word " * 60],
)  # fmt: skip
def test_text_survives_a_round_trip_as_text(text):
    data = {"a": [text, {text: text}], "b": text}
    assert parse_yaml(dump_yaml(data), "x")[0] == data


@pytest.mark.parametrize(
    "number", [0, -5, 10**20, 1e-5, 1e22, 0.1, -0.0, float("-inf"), True, False, None]
)
def test_numbers_survive_a_round_trip(number):
    number_again = parse_yaml(dump_yaml({"a": number}), "x")[0]["a"]
    assert repr(number_again) == repr(number)


def test_a_dump_writes_no_alias():
    shared = ["x"]
    data = {"a": shared, "b": shared}
    assert parse_yaml(dump_yaml(data), "x")[0] == data


def test_a_name_that_begins_like_a_token_is_not_masked():
    recipe = parse_recipe("name: hf_smoke\nmodel: {id: tiny}\ncard: {title: 1e-4 is small}", "r")
    assert "name: hf_smoke\n" in dump_recipe(recipe)
    assert parse_recipe(dump_recipe(recipe), "again") == recipe


# --- secrets -------------------------------------------------------------------------------------

HF = "hf_" + "a" * 20


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("hub_token", "zzz", "***"),
        ("access_token", "glpat-" + "x" * 20, "***"),
        ("auth_token", "zzz", "***"),
        ("api_key", "k", "***"),
        ("password", 1234, "***"),
        ("secrets", {"a": ["b"]}, {"a": ["***"]}),
        ("note", f"use {HF}, please", "use ***, please"),
        ("note", "glpat-" + "x" * 20, "***"),
        ("note", "-----BEGIN RSA PRIVATE KEY-----\nMII\n", "***"),
        ("url", f"https://u:{HF}@x/y", "https://u:***@x/y"),
        ("url", "https://u:pass@x/y", "https://u:***@x/y"),
        ("url", f"https://{HF}@x/y", "https://***@x/y"),
        ("hub_token", None, None),
        ("eos_token", "</s>", "</s>"),
        ("pad_token", "<pad>", "<pad>"),
        ("stop_tokens", ["a"], ["a"]),
        ("max_new_tokens", 5, 5),
        ("include_num_input_tokens_seen", "all", "all"),
        ("tokenizer_name_or_path", "a/b", "a/b"),
        ("authors", "A. Author", "A. Author"),
        ("title", "hf_smoke", "hf_smoke"),
        ("url", "https://x/y:z@v", "https://x/y:z@v"),
    ],
)
def test_secrets_are_hidden_and_nothing_else(key, value, shown):
    assert hide({"args": {key: value}}) == {"args": {key: shown}}


def test_an_error_shows_no_secret():
    assert HF not in str(refused(f"card: {{language: {HF}}}\n"))
    assert HF not in str(refused(f"card: {{language: {{x: {HF}}}}}\n"))


# --- strict values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {r: '4'}", "lora.r = '4': expected a whole number"),
        ("lora: {r: true}", "lora.r = True"),
        ("lora: {r: 4.0}", "lora.r = 4.0"),
        ("hub: {public: yes}", "hub.public = 'yes': expected true or false"),
        ("hub: {public: 1}", "hub.public = 1"),
        ("ppo: {kl_coef: inf}", "ppo.kl_coef = 'inf'"),
        ("ppo: {kl_coef: .inf}", "ppo.kl_coef = inf: expected a finite number"),
        ("ppo: {kl_coef: true}", "ppo.kl_coef = True"),
        ("ppo: {kl_target: .NaN}", "ppo.kl_target = nan"),
        ("ppo: {args: {x: 1e999}}", "1e999 is beyond the largest number"),
        ("seed: 1_000", "seed = '1_000'"),
        ("card: {title: 7}", "card.title = 7: expected text"),
    ],
)
def test_values_of_another_type_are_refused(text, message):
    error = refused(text)
    assert message in error.given and error.where == "r.yaml:3"


VALUES = ["x y", 7, -1, 0.5, 1e9, True, None, [], [1], ["x"], {}, {"a": 1}]


def test_no_message_speaks_of_the_library_that_checks_it():
    """Every key of every section, with values of every type."""
    plain = yaml.safe_load(EVERY_KEY)
    data = {k: [dict.fromkeys(v[0])] for k, v in plain["data"].items() if isinstance(v, list)}
    for section, value in itertools.product(plain, VALUES):
        inside = plain[section] if isinstance(plain[section], dict) else {}
        sets = [{section: value}, {section: dict.fromkeys(inside, value)}]
        if section == "data":
            sets += [{"data": {k: [dict.fromkeys(v, value)]}} for k, [v] in data.items()]
        for given in sets:
            try:
                parse("", *(f"{k}={json.dumps(v)}" for k, v in given.items()))
            except RecipeError as error:
                ours = re.sub(r"(= '|= \[').*?'", "", error.given)
                words = r"Input|[Vv]alid\b|instance|Section|\b(dict|str|int)\b|Value error"
                assert not re.search(words, ours)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("ppo.learning_rate", "'ppo.args.learning_rate'?"),
        ("sft.lr", "'sft.args.learning_rate'?"),
        ("lora.rank", "'lora.r'?"),
        ("rank", "'lora.r'?"),
        ("model.name", "'model.id'?"),
        ("sft.epochs", "'sft.args.num_train_epochs'?"),
        ("reward.batch_size", "'reward.args.per_device_train_batch_size'?"),
        ("kl_coef", "'ppo.kl_coef' or 'grpo.kl_coef' or 'rloo.kl_coef'?"),
        ("learning_rate", "'sft.args.learning_rate' or 'reward.args.learning_rate' or"),
        ("ppo.beta", "'ppo.kl_coef'?"),
        ("dpo.kl_coef", "'dpo.beta'?"),
        ("data.max_length", "'data.max_tokens'?"),
        ("ppo.updats", "'ppo.updates'?"),
        ("evaluation", "'evaluate'?"),
        ("lora.target", "'lora.target_modules'?"),
        ("model.name_or_path", "'model.id'?"),
        ("data.val_size", "'data.held_out'?"),
        ("data.cutoff_len", "'data.max_tokens'?"),
        ("hub.private", "'hub.public'?"),
        ("ppo.epochs", "'ppo.args.num_iterations'?"),
    ],
)
def test_a_suggestion_is_a_key_that_exists(given, meant):
    error = refused("", f"{given}=1")
    assert f"unknown key {given!r}; did you mean {meant}" in error.given
    for key in re.findall(r"'([^']+)'", meant):
        section, *rest = key.split(".")
        fields = getattr(Recipe.model_fields[section].annotation, "model_fields", {})
        assert not rest or rest[0] in fields
        if rest[:1] == ["args"]:
            assert rest[1] in trl_args.fields(section)


def test_a_name_like_nothing_gets_the_list_of_keys():
    assert "known: r, alpha, top_fraction, target_modules" in refused("", "lora.zzz=1").given


def test_numbers_are_those_of_yaml_1_2():
    recipe = parse("evaluate: {n: 010, batch_size: 0x10}\nppo: {kl_coef: 1, args: {a: True}}\n")
    assert (recipe.evaluate.n, recipe.evaluate.batch_size) == (10, 16)
    assert recipe.ppo.kl_coef == 1.0 and recipe.ppo.args["a"] is True


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_are_refused_from_python_too(value):
    with pytest.raises(ValidationError, match="finite"):
        PpoSection(kl_coef=value)


@pytest.mark.parametrize("value", [Path("x"), {1: "a"}, (1,), object()])
def test_args_hold_only_what_yaml_can_hold(value):
    with pytest.raises(ValidationError, match="plain data|is not text"):
        PpoSection(args={"a": value})


# --- keys that do not go together ----------------------------------------------------------------

P = "data:\n  prompts:\n  - "
C = "data:\n  comparisons:\n  - "


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("reward:\n  gate: stop\n  combine: min\n", 5, "reward.combine needs reward.ensemble"),
        ("reward:\n  ensemble: 2\n  combine_std: 2\n", 5, "reward.combine_std is read by"),
        ("ppo:\n  updates: 1\n  watch: best\n", 5, "needs reward.held_out_model: true"),
        ("ppo:\n  kl_coef: 0\n  kl_target: 3\n", 4, "ppo.kl_target multiplies ppo.kl_coef"),
        ("ppo:\n  lam: 1\n  ema: 0.9\n  kl_budget: 1\n", 5, "which policy is kept"),
        ("ppo:\n  lam: 1\n  ptx_coef: 1\n", 5, "data.text is empty"),
        ("seed: 1\nalgorithm: dpo\n", 4, "algorithm: dpo needs data.comparisons"),
        ("algorithm: best_of_n\nppo:\n  reward: gold\n", 5, "not by gold"),
        ("hub:\n  policy: a/b\n  reward: A/b\n", 5, "hub.reward and hub.policy are both A/b"),
        (P + "path: x\n    n: 3\n", 6, "data.prompts.0.n: n is read with task: only"),
        (C + "path: x\n    completions: 3\n", 6, "completions is read with task: only"),
        (C + "hub: a/b\n    agreement: 0.9\n", 6, "agreement is read with task: only"),
        (P + "path: x\n    split: test\n", 6, "split is read with hub: only"),
        (P + "path: x\n    name: en\n", 6, "name is read with hub: only"),
        (P + "path: x\n    revision: a\n", 6, "revision is read with hub: only"),
        (P + "task: closed-world\n    columns: {prompt: q}\n", 6, "read with path: or hub: only"),
        (P + "task: closed-world\n    split: test\n", 6, "split is read with hub: only"),
        (P + "task: closed-world\n    agreement: 0.9\n", 6, "for data.comparisons only"),
        (P + "path: x\n    labeler_instructions: y\n", 6, "for data.comparisons only"),
        (C + "path: x\n    columns:\n      chosen: a\n      margins: m\n", 8, "'margins'"),
        ("data:\n  text:\n  - path: x\n    columns:\n      prompt: a\n", 7, "known: text"),
        ("data:\n  text:\n  - task: closed-world\n", 5, "no plain text"),
        (P + "path: x\n    hub: a/b\n", 5, "exactly one of task, path, hub (found: path, hub)"),
        (P + "n: 3\n", 5, "found: none"),
    ],
)
def test_a_conflict_names_the_line_and_never_shows_the_recipe(text, line, message):
    error = refused(text)
    assert error.where == f"r.yaml:{line}" and message in error.given
    assert "{" not in error.given and len(error.given) < 220


@pytest.mark.parametrize(("text", "words"), [
    ("model: {id: a/b, revision: 4467109}", 'in quotes, such as revision: "..."'),
    ("model: {id: a/b, revision: 44e7109}", "in quotes if it is a text, such as a commit"),
    ('model: {id: "C:\\Users\\me"}', "write paths with / or in 'single quotes'"),
    ('model: {id: ".\\base"}', "so write it with / or in 'single quotes'"),
    ('model: {id: x}\ndata: {prompts: [{path: "data\\train.jsonl"}]}', "so write it with / or"),
    ("model:\n\tid: x", "indent by spaces"),
    ("model: tiny", "such as {id: tiny}"),
    ("model: {id: tiny}\ndata: {prompts: d.jsonl}", "such as [{path: FILE}]"),
    ("model: {id: tiny}\ndata: {prompts: {path: d.jsonl}}", "such as [{path: FILE}]"),
    ("model: {id: tiny}\ndata: {prompts: [d.jsonl]}", "a source, such as {path: FILE}"),
])  # fmt: skip
def test_what_yaml_makes_of_a_value_has_its_remedy(text, words):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"name: x\n{text}\n", "r.yaml")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {idd: tiny}", "unknown key 'model.idd'; did you mean 'model.id'?"),
        ("modle: {id: tiny}", "unknown key 'modle'; did you mean 'model'?"),
        ("model: {revision: x}", "'model.id' is required"),
        ("model: {nothing_like_it: x}", "'model.id' is required\n  r.yaml:2: unknown key"),
    ],
)
def test_a_typo_in_a_required_key_is_one_problem(text, message):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"name: x\n{text}\n", "r.yaml")
    assert caught.value.where.startswith("r.yaml:") and caught.value.given.startswith(message)
    assert caught.value.given.count("\n") == message.count("\n")


def test_a_conflict_by_set_names_the_option():
    assert refused("", "reward.combine=min").where == "--set reward.combine"
    sets = "data={prompts: [{path: x, columns: {margins: y}}]}"
    assert refused("", sets).where == "--set data"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"id": "tiny", "revision": "abc"}, "leave model.revision out"),
        ({"id": "./base", "revision": "abc"}, "leave model.revision out"),
        ({"id": "/base", "revision": "abc"}, "leave model.revision out"),
        ({"id": "a/b", "hub_id": "c/d"}, "leave model.hub_id out"),
    ],
)
def test_model_keys_that_would_not_be_read_are_refused(model, message):
    with pytest.raises(ValidationError, match=message):
        ModelSection(**model)


def test_model_keys_that_are_read_are_accepted():
    ModelSection(id="a/b", revision="abc")
    ModelSection(id="/base", hub_id="a/b")
    ModelSection(id="tiny", hub_id="a/tiny")  # once pushed: adapters name it


def test_columns_of_the_schema_are_those_of_the_layouts():
    named = {key for known in row_formats.LAYOUTS.values() for layout in known for key in layout}
    beside = {"margin", "labeler", "user", "tools", "input", "system", "label"}
    assert named | beside == {*COLUMNS, "text"}


# --- paths ---------------------------------------------------------------------------------------


def test_a_base_beside_the_recipe_is_found_with_and_without_a_dot(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    path = tmp_path / "recipe.yaml"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, wanted in (
        ("./base", str(tmp_path / "base")),
        ("base", str(tmp_path / "base")),
        ("~/base", str(tmp_path / "home" / "base")),
        ("$HOME/base", str(tmp_path / "home" / "base")),
        ('"${HOME}/base"', str(tmp_path / "home" / "base")),
        ("./$HOMES/base", str(tmp_path / "$HOMES" / "base")),
        ("./gone", str(tmp_path / "gone")),
        ("empty", "empty"),
        ("org/name", "org/name"),
        ("tiny", "tiny"),
    ):
        path.write_text(f"name: x\nmodel: {{id: {given}}}\n")
        recipe = load_recipe(path)
        assert recipe.model.id == wanted
        assert parse_recipe(dump_recipe(recipe), "again", folder=Path("/")) == recipe


def test_the_home_folder_stands_for_its_names_in_every_path(tmp_path, monkeypatch):
    """`path: $HOME/x` was looked for in a folder `$HOME` beside the recipe."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for home in ("~", "$HOME", "${HOME}"):
        text = (
            f"name: x\nmodel: {{id: tiny}}\ndata: {{prompts: [{{path: '{home}/p.jsonl'}}]}}\n"
            f"sft: {{from: '{home}/sft'}}\nppo: {{reward: '{home}/r.py:score'}}\n"
        )
        made = parse_recipe(text, "r.yaml", folder=Path("/elsewhere"))
        assert made.data.prompts[0].path == str(tmp_path / "p.jsonl")
        assert made.sft.start == str(tmp_path / "sft")
        assert made.ppo.reward == f"{tmp_path}/r.py:score"


@pytest.mark.parametrize(
    ("contradiction", "met_in"),
    [("ppo.kl_target=1", "policy"), ("reward.combine_std=2", "reward"), ("algorithm=dpo", "policy"),
     ("ppo.ptx_coef=1", "policy"), ("hub={policy: a/b, reward: a/b}", "card")],
)  # fmt: skip
def test_a_contradiction_that_no_wanted_stage_meets_refuses_nothing(
    tmp_path, contradiction, met_in
):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nmodel: {id: tiny}\nppo: {kl_coef: 0}\n")
    order = ("sft", "reward", "policy", "evaluate", "card")
    for until in order:
        if order.index(until) < order.index(met_in):
            made = load_recipe(path, [contradiction], until=until)
            assert parse_recipe(dump_recipe(made), "of a run", until="") == made
            with pytest.raises(RecipeError):
                load_recipe(path, [contradiction, "sft.args=3"], until=until)
        else:
            with pytest.raises(RecipeError):
                load_recipe(path, [contradiction], until=until)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("0.02,2e-5, null", ["0.02", "2e-5", "null"]),
        ('[a, b], {c: 1, d: 2},"x, y"', ["[a, b]", "{c: 1, d: 2}", '"x, y"']),
        ("gold,my_reward:score", ["gold", "my_reward:score"]),
        ("", []),
    ],
)
def test_items_of_a_list_keep_their_text(text, items):
    assert list_items(text, "x") == items


@pytest.mark.parametrize("text", ["a,,b", "a]b", "1] [2", "a, &x b"])
def test_items_that_are_no_list_are_refused(text):
    with pytest.raises(RecipeError):
        list_items(text, "x")


@pytest.mark.parametrize("key", ["sft.args", "sft.privacy", "reward.args", "reward.privacy"])
def test_what_an_adapter_of_ones_own_makes_useless_has_a_remedy_that_helps(key):
    stage, _, name = key.partition(".")
    sets = [f"{stage}.from=/own", f"{stage}.args={{}}", "sft.args={}"][: 3 if stage == "sft" else 2]
    sets += [f"{stage}.privacy.epsilon=3"] if name == "privacy" else []
    sets += [f"{key}={{learning_rate: 1e-4}}"] if name == "args" else []
    with pytest.raises(RecipeError, match="without effect") as caught:
        parse("", *sets)
    remedy = re.search(r"`--set (.+?)`", str(caught.value))[1]
    assert remedy == f"{key}={{}}"
    assert getattr(parse("", *sets, remedy), stage).start == "/own"


@pytest.mark.parametrize("text", [EVERY_KEY, "- a\n- [b, 'c']\n", "a: &x 1\n", "a: 1\na: 2\n", ""])
def test_yaml_reads_the_same_without_libyaml(monkeypatch, text):
    def read():
        try:
            return parse_yaml(text, "r.yaml")
        except RecipeError as error:
            return str(error)

    with_libyaml = read()
    monkeypatch.delattr(yaml, "CSafeLoader")  # as where PyYAML was built without it
    assert read() == with_libyaml
