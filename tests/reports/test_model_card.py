# SPDX-License-Identifier: Apache-2.0
"""A card shows all numbers of the record and no others, and its texts do not render as markup."""

import ast
import copy
import itertools
import json
import re
import subprocess
import sys

import pytest
from card_run import RECIPE, RECORD, ROLES, SCORES, change, make_run, pythons, section, set_at
from huggingface_hub import ModelCard

from lora_rlhf.errors import UsageError
from lora_rlhf.reports import tables
from lora_rlhf.reports.cards import model_card
from lora_rlhf.reports.cards.card_facts import hub_base
from lora_rlhf.runs.metric_names import METRICS
from lora_rlhf.runs.record import Record

PLACEHOLDER = re.compile(r"\b(?:TODO|None|null|NaN|nan|inf)\b|(?i:more information)|\[\]|\{\}")


@pytest.fixture
def run(tmp_path):
    count = itertools.count()
    return lambda *args, **kw: make_run(tmp_path / f"run{next(count)}", *args, **kw)


# --- front matter ---------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_front_matter_is_read_by_the_hub(run, role):
    data = ModelCard(model_card.render(run(), role)).data.to_dict()
    assert data["base_model"] == "acme/base"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en"]
    assert data["datasets"] == ["acme/pairs"]  # the file and the generator are no Hub data sets
    assert {"lora-rlhf", "lora", "trl"} <= set(data["tags"])
    tasks = {"reward": "text-classification", "value": "token-classification"}
    assert data["pipeline_tag"] == tasks.get(role, "text-generation")


def test_model_index_carries_interval_and_n(run):
    results = ModelCard(model_card.render(run(), "policy")).data.eval_results
    by_metric = {r.metric_type: r for r in results}
    assert set(by_metric) == set(RECORD["evaluation"]["policy"])
    rate = by_metric["win_rate"]
    assert rate.metric_value == 0.634
    assert rate.metric_args == {"low": 0.551, "high": 0.709, "n": 128}
    assert rate.metric_name == "win rate, 0.634 (95 % interval 0.551 to 0.709, n = 128)"
    [accuracy] = ModelCard(model_card.render(run(), "reward")).data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 0.6789)
    assert "model-index" not in ModelCard(model_card.render(run(), "value")).data.to_dict()


def test_a_metric_that_is_not_finite_is_no_result(run):
    record = run(change(evaluation__policy__win_rate__value="nan"))
    text = model_card.render(record, "policy")
    assert "win_rate" not in {r.metric_type for r in ModelCard(text).data.eval_results}
    assert "not finite" in section(text, "Evaluation")


def test_the_time_of_a_copied_stage_is_not_counted_as_this_runs(run):
    record = run()
    assert "copied" not in model_card.render(record, "policy").partition("| stage | seconds |")[2]
    record.data["stages"]["sft"]["from_run"] = {"name": "first", "record_sha256": "ab" * 32}
    text = model_card.render(record, "policy")
    assert "| sft (copied from the run first) | 71.38 |" in text and "| reward | 53.12 |" in text
    assert "took its seconds in the other run" in text
    assert "1/5 sft copied; it took 1:11" in tables.stage_line(record, "sft")


def test_the_hash_of_the_recipe_is_not_called_that_of_the_file(run):
    text = model_card.render(run(), "policy")
    assert "sha256 of the keys that decide the result" in text
    assert "sha256 of the original" not in text


def test_the_screen_says_which_of_its_words_are_corrected(run, capsys):
    tables.show(run())
    assert "after correction for the number of comparisons" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_base_without_hub_id_is_never_named_as_one(run):
    record = run(change(model__id="/home/somebody/base", model__source="local folder"))
    text = model_card.render(record, "policy")
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "/home" not in text
    assert "is not on the Hub" in text


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({}, "acme/base"),
        ({"id": "/a/b", "source": "local folder"}, None),
        ({"id": "a/b", "source": "local folder"}, None),
        ({"id": "tiny", "source": "the tiny model packaged with lora-rlhf"}, None),
        ({"id": "/a/b", "source": "local folder", "hub_id": "acme/own"}, "acme/own"),
        ({"id": "../x"}, None),
    ],
)
def test_hub_base(run, edit, expected):
    assert hub_base(run(lambda data: data["model"].update(edit)).data["model"]) == expected


# --- licence --------------------------------------------------------------------------------


def test_licence_is_left_out_with_a_reason_where_it_is_not_known(run):
    record = run(lambda data: data["data"]["prompts"]["sources"][0].update(license=None))
    text = model_card.render(record, "policy")
    assert "license" not in ModelCard(text).data.to_dict()
    assert "no licence is recorded for: prompts (prompts.jsonl)" in text


def test_licence_is_not_derived_from_terms_that_a_person_must_weigh(run):
    record = run(lambda data: data["data"]["prompts"]["sources"][0].update(license="CC-BY-NC-4.0"))
    text = model_card.render(record, "policy")
    assert "license" not in ModelCard(text).data.to_dict()
    assert "CC-BY-NC-4.0" in text.split("## Lineage")[0]


def test_the_authors_licence_wins_and_an_unknown_one_is_other(run):
    recipe = {**RECIPE, "card": {**RECIPE["card"], "license": "Our Own Terms"}}
    data = ModelCard(model_card.render(run(recipe=recipe), "policy")).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "our-own-terms")
    recipe["card"]["license"] = "MIT"
    data = ModelCard(model_card.render(run(recipe=recipe), "policy")).data.to_dict()
    assert data["license"] == "mit" and "license_name" not in data


# --- numbers --------------------------------------------------------------------------------


def leaves(data, path=""):
    if isinstance(data, dict):
        for key, value in data.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from leaves(value, f"{path}.{index}")
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield path, data


NOT_SHOWN = {"schema", "clock.evaluation.policy.seconds"}


def test_every_number_of_the_record_is_on_a_card(run):
    before = run()
    cards = {role: model_card.render(before, role) for role in ROLES}
    paths = {path for path, _ in leaves(RECORD)} - NOT_SHOWN
    assert len(paths) > 100

    def shown(path):
        after = Record(before.folder, copy.deepcopy(before.data))
        *keys, last = path.split(".")
        data = after.data
        for key in keys:
            data = data[int(key)] if isinstance(data, list) else data[key]
        key = int(last) if isinstance(data, list) else last
        data[key] = data[key] * 3 + 17
        return any(model_card.render(after, role) != card for role, card in cards.items())

    assert not [path for path in sorted(paths) if not shown(path)]


def shown_numbers(text):
    """The numbers of a card's prose and tables, each with its number of decimals."""
    body = text.split("\n---\n", 1)[1]
    body = re.sub(
        r"```.*?```|`[^`]*`|&#\d+;|\[U\+[0-9A-F]+\]|\d{4}-\d\d-\d\dT\S+", " ", body, flags=re.S
    )
    for match in re.finditer(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?!\w)", body):
        plain = match[0].rstrip(",").replace(",", "")
        mantissa, _, exponent = plain.partition("e")
        decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
        yield match[0], float(plain), decimals


@pytest.mark.parametrize("role", ROLES)
def test_every_number_on_a_card_comes_from_the_run(run, role):
    record = run()
    known = [value for _, value in leaves(record.data)] + [v for _, v in leaves(RECIPE)]
    known += [value for line in record.metrics() for _, value in leaves(line)]
    known += [score for scores in SCORES.values() for score in scores]
    known += [100 * value for value in known if isinstance(value, float)]  # percent
    known += [95, 3]  # the level of the intervals; the rows in a note of the data
    known += [0.5, 50, 8, 10]  # chance, and 8 of 10 evaluations
    prose = " ".join(METRICS.values())
    known += [float(n.replace(",", "")) for n in re.findall(r"-?\d[\d,]*", prose)]
    text = model_card.render(record, role)
    numbers = list(shown_numbers(text))
    assert len(numbers) > 30
    for shown, value, decimals in numbers:
        tolerance = 0.5000001 * 10**-decimals
        assert any(abs(value - k) <= tolerance for k in known), f"{shown} is not from the run"


def test_the_number_check_finds_a_made_up_number(run):
    text = model_card.render(run(), "policy") + "\nIt is 31.337 times better.\n"
    assert 31.337 in [value for _, value, _ in shown_numbers(text)]


# --- nothing made up ------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_no_placeholder_even_where_nearly_nothing_is_recorded(tmp_path, role):
    full = make_run(tmp_path / "full")
    assert not (placeholder := PLACEHOLDER.search(model_card.render(full, role))), placeholder
    bare = Record(tmp_path / "bare", {"name": "bare"})
    (tmp_path / "bare").mkdir()
    text = model_card.render(bare, role)
    ModelCard(text)
    assert not PLACEHOLDER.search(text), PLACEHOLDER.search(text)
    assert text.count("not recorded") > 10
    for title in ("Lineage", "LoRA", "Data", "Limits", "Cost", "How to load", "How to merge"):
        assert section(text, title).strip()


@pytest.mark.parametrize("key", list(RECORD))
def test_any_part_of_the_record_may_be_missing(run, key):
    record = run(lambda data: data.pop(key))
    for role in ROLES:
        assert not PLACEHOLDER.search(model_card.render(record, role))


def test_nulls_in_the_record_are_shown_as_missing(run):
    def edit(data):
        for path, _ in list(leaves(data)):
            if not path.split(".")[-1].isdigit() and ".calibration." not in path:
                if ".sources." not in path:
                    set_at(data, path, None)

    for role in ROLES:
        assert not PLACEHOLDER.search(model_card.render(run(edit), role))


def test_only_steps_that_changed_the_rows_are_listed(run):
    def edit(data):
        data["data"]["prompts"]["counts"] |= {
            "duplicate": {"before": 399, "after": 399},
            "unknown": {"before": None, "after": 399},
        }
        data["data"]["comparisons"]["counts"]["pairs"] = {"before": 997, "after": 1009}

    text = model_card.render(run(edit), "policy")
    assert "| prompts | limit | 401 | 399 |" in text
    assert "| prompts | unknown | not recorded | 399 |" in text
    assert "| prompts | duplicate |" not in text
    assert "| comparisons | pairs | 997 | 1,009 |" in text, "what follows counts from there"

    def nothing(data):
        for entry in data["data"].values():
            entry["counts"] = {"limit": {"before": 9, "after": 9}}

    assert "No filter changed the rows." in model_card.render(run(nothing), "policy")


def test_hygiene_is_on_the_card(run):
    entry = {
        "users": 41,
        "personal_data": {"action": "redact", "rows": 6, "found": {"PERSON": 7}, "names_by": "m"},
        "contamination": {"against": {"exam": 60}, "rows": {}},
        "augmented": {"paraphrases": 12},
        "identity_test": {"twins": 0},
    }
    text = model_card.render(
        run(lambda data: data["data"]["demonstrations"].update(entry)), "policy"
    )
    for line in (
        "demonstrations: written by 41 users",
        "demonstrations: personal data (redact): 6 rows; PERSON 7; names by m",
        "demonstrations: compared with evaluation prompts (exam 60); rows that overlap: none",
        "demonstrations: rows made by augmentation, marked in the column augmented: paraphrases 12",
        "names, pronouns or groups alone: no such comparisons",
    ):
        assert line in text


def test_the_code_generates_up_to_the_evaluated_length(run):
    assert "max_new_tokens=29" in pythons(model_card.render(run(), "policy"))[0]
    record = run(lambda data: data["stages"]["evaluate"].pop("max_new_tokens"))
    assert "max_new_tokens=24" in pythons(model_card.render(record, "policy"))[0]


def test_defaults_that_took_effect_are_listed(run):
    for role, title in (
        ("sft", "Supervised fine-tuning"),
        ("reward", "Reward model"),
        ("policy", "Reinforcement learning"),
    ):
        stage = "ppo" if role == "policy" else role
        for key in RECORD["stages"][stage]["args"]:
            assert f"{key} " in section(model_card.render(run(), role), title)
    assert "lr_scheduler_type cosine" in model_card.render(run(), "sft")


def test_a_stage_with_other_versions_says_so(run):
    record = run(lambda data: data["stages"]["reward"].update(versions={"torch": "9.9"}))
    text = section(model_card.render(record, "policy"), "How to reproduce")
    assert "Different version in reward: `torch==9.9`" in text


def test_a_run_without_a_reward_model_says_why(run):
    record = run()
    record.data["stages"]["reward"] = {"status": "done", "skipped": "the reward is gold"}
    text = model_card.render(record, "policy")
    assert section(text, "Reward model").strip() == "There is none: the reward is gold."
    assert "stages run: sft, ppo" in text


def test_an_unknown_role_is_refused(run):
    with pytest.raises(UsageError, match="one of policy"):
        model_card.render(run(), "judge")


# --- files and code -------------------------------------------------------------------------


def test_the_code_is_python_and_needs_no_package_of_ours(run):
    for role in ROLES:
        blocks = pythons(model_card.render(run(), role, {role: f"acme/{role}"}))
        assert len(blocks) == 2  # a third, the check, comes with check.json
        for block in blocks:
            ast.parse(block)
            assert "lora_rlhf" not in block
            assert 'base_id = "acme/base"' in block and f'adapter_id = "acme/{role}"' in block
            assert f'revision="{RECORD["model"]["revision"]}"' in block


def test_a_prompt_cannot_leave_its_string(run):
    record = run()
    line = {"index": 0, "model": "policy", "completion": "x", "score": 1}
    prompt = 'a"""b\'\n```\nimport os; 🙂 \ud800'
    text = json.dumps(line | {"prompt": prompt, "score": 2}) + "\n"
    text += json.dumps(line | {"index": 1, "prompt": "worst"}) + "\n"
    (record.folder / "samples.jsonl").write_text(text)
    code = pythons(model_card.render(record, "policy"))[0]
    values = [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]
    assert prompt in values


def test_the_code_ends_answers_as_the_run_did(run):
    """The base's generation config may know other end tokens, and a repetition penalty."""
    record = run()
    record.data["model"] |= {"eos_ids": [7, 2], "pad_id": 0}
    code = pythons(model_card.render(record, "policy"))[0]
    assert "GenerationConfig(eos_token_id=[7, 2], pad_token_id=0)" in code
    imported = next(n for n in ast.parse(code).body if getattr(n, "module", "") == "transformers")
    assert "GenerationConfig" in {name.name for name in imported.names}
    assert "GenerationConfig" not in pythons(model_card.render(record, "reward"))[0]


def test_the_card_is_made_again_from_a_finished_run_without_torch(run):
    record = run()
    code = f"""
import socket, sys
def refuse(*_): raise AssertionError("the network was used")
socket.socket.connect = refuse
from lora_rlhf.hub import publishing as hub
from lora_rlhf.reports.cards import model_card as card
from lora_rlhf.runs.record import Record
paths = card.write(Record.read({str(record.folder)!r}))
assert "torch" not in sys.modules
print(*(p.parent.name for p in paths))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["policy", "reward", "value", "sft"]
    for role in ROLES:
        readme = (record.adapter(role) / "README.md").read_text(encoding="utf-8")
        assert readme == model_card.render(record, role)


def test_a_role_that_the_run_lacks_gets_no_card(run):
    record = run(roles=("sft",))
    assert [path.parent.name for path in model_card.write(record)] == ["sft"]


# --- what is not to be trusted --------------------------------------------------------------------

EVIL = (
    "x\n---\n# Title\n<img src=x onerror=alert(1)>![i](https://evil.example/i)\x1b[3m\u202e`{{y}}`"
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
RENDERED = re.compile(r"<img|!\[i|\n# Title")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
KEYS = {"base_model", "base_model_relation", "library_name", "pipeline_tag", "license", "language",
        "license_name", "datasets", "tags", "model-index"}  # fmt: skip


def with_evil(data):
    """The same data with every text made hostile."""
    if isinstance(data, dict):
        return {key: with_evil(value) for key, value in data.items()}
    if isinstance(data, list):
        return [with_evil(value) for value in data]
    return EVIL if isinstance(data, str) else data


@pytest.mark.parametrize("role", ["policy", "reward"])
@pytest.mark.parametrize("part", [*RECORD, "keys", "recipe"])
def test_no_text_of_a_run_is_markup_on_its_card(run, role, part):
    recipe = with_evil(RECIPE) if part == "recipe" else RECIPE
    if part == "recipe":
        recipe["evaluate"]["temperature"] = EVIL

    def edit(data):
        if part == "keys":
            for name in ("versions", "data", "evaluation"):
                data[name][EVIL] = next(iter(data[name].values()))
            data["stages"]["sft"]["args"][EVIL] = 1
            data["evaluation"]["policy"][EVIL] = data["evaluation"]["policy"]["length"]
        elif part in data:
            data[part] = with_evil(data[part])

    text = model_card.render(run(edit, recipe), role)
    assert not CONTROL.search(text), CONTROL.search(text)
    card = ModelCard(text)
    shown = CODE.sub("", card.text)
    assert not RENDERED.search(shown), RENDERED.search(shown)
    assert card.data.to_dict().keys() <= KEYS


@pytest.mark.parametrize(
    "language",
    [["en\nlicense: evil"], ["en\n---\n# x"], [{"license": "evil"}], "en\x85tags: [evil]"],
)
def test_a_language_adds_nothing_to_the_front_matter(run, language):
    plain = RECIPE | {"card": {"language": language}}
    data = ModelCard(model_card.render(run(None, plain), "policy")).data.to_dict()
    assert "language" not in data and data["license"] != "evil" and "evil" not in data["tags"]
    spoken = RECIPE | {"card": {"language": ["en", "pt-BR", "x\ny"]}}
    assert ModelCard(model_card.render(run(None, spoken), "policy")).data.language == [
        "en",
        "pt-BR",
    ]


def test_no_picture_is_broken(run):
    """Only real pictures are shown, and only where they are published with the card."""
    record = run()
    for name in ("evaluation.png", "my own.png"):
        (record.folder / "plots" / name).write_bytes(b"")
    local = model_card.render(record, "policy")
    assert "![" not in local and "`training.png`" in local and "evaluation.png" not in local
    published = model_card.render(record, "policy", {"base": "a/b", "policy": "a/c"})
    assert re.findall(r"!\[.*?\]\((.*?)\)", published) == ["plots/training.png"]


def test_guidelines_stand_for_the_instructions_to_labelers(tmp_path):
    source = {"kind": "file", "name": "c.jsonl", "rows": 9}
    source["labelers"] = {"people": 2, "labels": 9, "guidelines": ["ab" * 32]}
    record = make_run(tmp_path / "people", change(data__comparisons__sources=[source]))
    text = section(model_card.render(record, "reward"), "Data")
    assert "instructions to labelers: the guidelines with sha256 abababababababab" in text
    plain = section(model_card.render(make_run(tmp_path / "plain"), "reward"), "Data")
    assert "instructions to labelers: not recorded" in plain
