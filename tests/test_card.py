# SPDX-License-Identifier: Apache-2.0
"""A card says what the record says, all of it, nothing else, and nothing that renders as markup."""

import ast
import itertools
import json
import re
import subprocess
import sys

import pytest
from card_run import HOSTILE, RECIPE, RECORD, ROLES, SCORES, estimate, make_run, write_samples
from huggingface_hub import ModelCard

from lora_rlhf import card
from lora_rlhf.card_facts import hub_base
from lora_rlhf.card_text import CUT, cell, interval, number, relative, without_paths
from lora_rlhf.errors import UsageError
from lora_rlhf.evaluate import METRICS
from lora_rlhf.record import Record

PLACEHOLDER = re.compile(r"\b(?:TODO|None|null|NaN|nan|inf)\b|(?i:more information)|\[\]|\{\}")


@pytest.fixture
def run(tmp_path):
    count = itertools.count()
    return lambda *args, **kw: make_run(tmp_path / f"run{next(count)}", *args, **kw)


def set_at(data, path, value):
    *keys, last = path.split(".")
    for key in keys:
        data = data[key]
    data[last] = value


def change(**values):
    """`stages__ppo__kl_last=3`: an edit of the record's data."""
    return lambda data: [set_at(data, k.replace("__", "."), v) for k, v in values.items()]


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text, title):
    lines = [line for line in section(text, title).splitlines() if line.startswith("|")]
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]


def pythons(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


# --- front matter ---------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_front_matter_is_what_the_hub_reads(run, role):
    data = ModelCard(card.render(run(), role)).data.to_dict()
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
    results = ModelCard(card.render(run(), "policy")).data.eval_results
    found = {r.metric_type: r for r in results}
    assert set(found) == set(RECORD["evaluation"]["policy"])
    rate = found["win_rate"]
    assert rate.metric_value == 0.634
    assert rate.metric_args == {"low": 0.551, "high": 0.709, "n": 128}
    assert rate.metric_name == "win rate, 0.634 (95 % interval 0.551 to 0.709, n = 128)"
    [accuracy] = ModelCard(card.render(run(), "reward")).data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 0.6789)
    assert "model-index" not in ModelCard(card.render(run(), "value")).data.to_dict()


def test_a_metric_that_is_not_finite_is_no_result(run):
    record = run(change(evaluation__policy__win_rate__value="nan"))
    text = card.render(record, "policy")
    assert "win_rate" not in {r.metric_type for r in ModelCard(text).data.eval_results}
    assert "not finite" in section(text, "Evaluation")


def test_a_base_without_hub_id_is_never_named_as_one(run):
    record = run(change(model__id="/home/somebody/base", model__source="local folder"))
    text = card.render(record, "policy")
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "/home" not in text
    assert "is on no Hub" in text


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
    assert hub_base(run(lambda data: data["model"].update(edit))) == expected


# --- licence --------------------------------------------------------------------------------


def test_licence_is_left_out_with_a_reason_where_it_is_not_known(run):
    record = run(lambda data: data["data"]["prompts"]["sources"][0].update(license=None))
    text = card.render(record, "policy")
    assert "license" not in ModelCard(text).data.to_dict()
    assert "no licence is recorded for: prompts (prompts.jsonl)" in text


def test_licence_is_not_derived_from_terms_that_a_person_must_weigh(run):
    record = run(lambda data: data["data"]["prompts"]["sources"][0].update(license="CC-BY-NC-4.0"))
    text = card.render(record, "policy")
    assert "license" not in ModelCard(text).data.to_dict()
    assert "CC-BY-NC-4.0" in text.split("## Lineage")[0]


def test_the_authors_licence_wins_and_an_unknown_one_is_other(run):
    recipe = {**RECIPE, "card": {**RECIPE["card"], "license": "Our Own Terms"}}
    data = ModelCard(card.render(run(recipe=recipe), "policy")).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "our-own-terms")
    recipe["card"]["license"] = "MIT"
    data = ModelCard(card.render(run(recipe=recipe), "policy")).data.to_dict()
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


@pytest.mark.parametrize("path", [p for p, _ in leaves(RECORD) if p not in NOT_SHOWN])
def test_every_number_of_the_record_is_on_a_card(run, path):
    def edit(data):
        *keys, last = path.split(".")
        for key in keys:
            data = data[int(key)] if isinstance(data, list) else data[key]
        key = int(last) if isinstance(data, list) else last
        data[key] = data[key] * 3 + 17

    before, after = run(), run(edit)
    assert any(card.render(before, role) != card.render(after, role) for role in ROLES)


def shown_numbers(text):
    """The numbers of a card's prose and tables, each with its number of decimals."""
    body = text.split("\n---\n", 1)[1]
    body = re.sub(r"```.*?```|`[^`]*`|&#\d+;|\[U\+[0-9A-F]+\]|\d{4}-\d\d-\d\dT\S+", " ", body,
                  flags=re.S)  # fmt: skip
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
    known += [95, 3]  # the level of the intervals; the rows in a note of the data
    prose = " ".join(METRICS.values())
    known += [float(n.replace(",", "")) for n in re.findall(r"-?\d[\d,]*", prose)]
    text = card.render(record, role)
    found = list(shown_numbers(text))
    assert len(found) > 30
    for shown, value, decimals in found:
        tolerance = 0.5000001 * 10**-decimals
        assert any(abs(value - k) <= tolerance for k in known), f"{shown} is not from the run"


def test_the_number_check_finds_a_number_of_nowhere(run):
    text = card.render(run(), "policy") + "\nIt is 31.337 times better.\n"
    assert 31.337 in [value for _, value, _ in shown_numbers(text)]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "not recorded"), (True, "yes"), (0, "0"), (1234567, "1,234,567"), (2.0, "2"),
        (0.123456, "0.1235"), (3.5e-05, "3.5e-05"), (123456.7, "123,457"),
        (float("nan"), "not finite"), ("NaN", "not finite"), ("-inf", "not finite"),
        ("a|b", "a&#124;b"),
    ],
)  # fmt: skip
def test_number(value, shown):
    assert number(value) == shown


def test_interval_says_when_it_has_none():
    assert interval(estimate(0.5, 0.4, 0.6, 10)) == "0.5 (95 % interval 0.4 to 0.6, n = 10)"
    assert interval(estimate(0.5, 0.4, 0.6, 10), short=True) == "0.5 [0.4, 0.6], n = 10"
    assert interval({"value": 0.5, "n": 1}) == "0.5 (no interval recorded, n = 1)"
    assert interval(0.5) == "0.5 (no interval recorded)"
    assert interval(None) == "not recorded"


# --- nothing made up ------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_no_placeholder_even_where_nearly_nothing_is_recorded(tmp_path, role):
    full = make_run(tmp_path / "full")
    assert not (found := PLACEHOLDER.search(card.render(full, role))), found
    bare = Record(tmp_path / "bare", {"name": "bare"})
    (tmp_path / "bare").mkdir()
    text = card.render(bare, role)
    ModelCard(text)
    assert not PLACEHOLDER.search(text), PLACEHOLDER.search(text)
    assert text.count("not recorded") > 10
    for title in ("Lineage", "LoRA", "Data", "Limits", "Cost", "How to load", "How to merge"):
        assert section(text, title).strip()


@pytest.mark.parametrize("key", list(RECORD))
def test_any_part_of_the_record_may_be_missing(run, key):
    record = run(lambda data: data.pop(key))
    for role in ROLES:
        assert not PLACEHOLDER.search(card.render(record, role))


def test_nulls_in_the_record_are_said_to_be_missing(run):
    def edit(data):
        for path, _ in list(leaves(data)):
            if not path.split(".")[-1].isdigit() and ".calibration." not in path:
                if ".sources." not in path:
                    set_at(data, path, None)

    for role in ROLES:
        assert not PLACEHOLDER.search(card.render(run(edit), role))


def test_an_unknown_role_is_refused(run):
    with pytest.raises(UsageError, match="one of policy"):
        card.render(run(), "judge")


# --- samples and other people's text --------------------------------------------------------


def test_samples_hold_the_worst_answers_first(run):
    table = rows(card.render(run(), "policy"), "Samples")
    assert [row[0] for row in table[2:]] == ["worst", "worst", "first", "first"]
    assert [row[-1] for row in table[2:]] == ["-0.875", "0.375", "0.625", "0.9375"]
    assert [row[1] for row in table[2:]] == ["prompt b", "prompt d", "prompt a", "prompt c"]
    sft = rows(card.render(run(), "sft"), "Samples")
    assert [row[-1] for row in sft[2:]] == ["-0.25", "0.125", "0.5", "0.75"]


def test_hostile_samples_render_as_text(run):
    text = card.render(run(), "policy")
    table = rows(text, "Samples")
    assert {len(row) for row in table} == {6}  # no pipe of an answer makes a column
    worst = table[2][4]
    for markup in ("<", "`", "*", "![", "](", "@", "https://", "www.", "$", "{{", "\u202e", "\x00"):
        assert markup not in worst, markup
    assert "script&#62;alert(1)" in worst and "[U+202E]".replace("[", "&#91;")[:5] in worst
    assert text.count("\n# ") == 1  # the answer's heading is none
    assert len(re.findall(r"(?m)^---$", text)) == 2


def test_hostile_text_everywhere_else_leaves_the_card_whole(run):
    def edit(data):
        data["name"] = HOSTILE
        for entry in data["data"].values():
            entry["notes"] = [HOSTILE]
            entry["sources"][0] |= {"name": HOSTILE, "license": HOSTILE}
            entry["counts"] = {HOSTILE: {"before": 3, "after": 2}}
        data["stages"]["reward"] |= {"gate": "warned", "gate_reason": HOSTILE}
        data["stages"]["ppo"]["alarms"] = [HOSTILE]
        data["evaluation"]["policy"][HOSTILE] = estimate(0.5, 0.4, 0.6, 9)
        data["clock"]["host"] = {HOSTILE: HOSTILE}
        data["model"] |= {"license": HOSTILE, "fingerprint": HOSTILE, "source": HOSTILE}

    words = dict.fromkeys(("title", "license", "authors", "intended_use", "limits"), HOSTILE)
    record = run(edit, recipe={**RECIPE, "card": {**RECIPE["card"], **words}})
    plain, text = card.render(run(), "policy"), card.render(record, "policy")
    assert "<script" not in text.split("\n---\n", 1)[1]
    for mark in (r"(?m)^# ", r"(?m)^## ", r"(?m)^```"):
        assert len(re.findall(mark, text)) == len(re.findall(mark, plain))
    data = ModelCard(text).data
    assert data.license == "other" and len(data.eval_results) == 5


def test_long_texts_are_cut_with_a_mark(run):
    record = run()
    write_samples(record.folder, "ordinary", "long " * 500)
    worst = rows(card.render(record, "policy"), "Samples")[2][4]
    assert worst.endswith(CUT.replace("[", "&#91;").replace("]", "&#93;").strip())
    assert len(worst) < 500


def test_a_cell_keeps_words_readable():
    assert cell("learning_rate of _x_") == "learning_rate of &#95;x&#95;"
    assert cell("a\r\n\r\nb\tc") == "a ⏎ b c"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/x.jsonl", "x.jsonl"), ("/home/John Doe/x.jsonl", "x.jsonl"),
        ("C:\\Users\\me\\x.jsonl", "x.jsonl"), ("~/x/y.csv", "y.csv"), ("/data/base/", "base"),
        ("read /data/in/x.jsonl, then", "read x.jsonl, then"), ("https://a.b/c/d", "https://a.b/c/d"),
        ("acme/base", "acme/base"), ("either/or/both", "either/or/both"), ("data://hh/x", "data://hh/x"),
    ],
)  # fmt: skip
def test_local_folders_are_taken_off(text, expected):
    assert relative(text) == expected
    assert without_paths({"a": [text]}) == {"a": [expected]}


# --- limits ---------------------------------------------------------------------------------


def limits_of(record, role="policy"):
    return section(card.render(record, role), "Limits")


def test_a_win_rate_that_includes_one_half_is_not_called_a_win(run):
    sentence = "PPO did not clearly beat SFT"
    assert sentence not in limits_of(run())
    close = run(change(evaluation__policy__win_rate=estimate(0.53, 0.45, 0.61, 128)))
    assert f"{sentence}: win rate 0.53" in limits_of(close)
    worse = run(change(evaluation__policy__win_rate=estimate(0.31, 0.25, 0.37, 128)))
    assert "PPO made the model worse than SFT" in limits_of(worse)
    lone = run(lambda data: data["evaluation"]["policy"].pop("win_rate"))
    assert "cannot say whether PPO beat SFT" in limits_of(lone)


def test_a_judge_that_training_optimised_is_no_proof(run):
    def edit(data):
        policy = data["evaluation"]["policy"]
        policy["win_rate_proxy"] = policy.pop("win_rate")

    assert "The only judge of the win rate is the reward model" in limits_of(run(edit))
    assert "The only judge" not in limits_of(run())


def test_high_kl_and_longer_answers_are_said(run):
    assert "far from SFT" not in limits_of(run())
    assert "far from SFT: KL 88.25 nats" in limits_of(run(change(stages__ppo__kl_last=88.25)))
    assert "not finite" in limits_of(run(change(stages__ppo__kl_last="NaN")))
    longer = run(change(evaluation__policy__length=estimate(40.5, 37.5, 43.5, 128)))
    assert "Answers grew longer: 21.7" in limits_of(longer)
    assert "grew longer" not in limits_of(run())


def test_a_proxy_that_rises_alone_is_said(run):
    gold = run(change(evaluation__policy__gold_reward=estimate(0.12, 0.03, 0.21, 128)))
    assert "may exploit the reward model" in limits_of(gold)
    assert "may exploit" not in limits_of(run())


def test_a_gate_that_only_warned_is_said_on_top(run):
    edit = change(stages__reward__gate="warned", stages__reward__gate_reason="too few comparisons")
    for role in ("policy", "reward", "value"):
        text = card.render(run(edit), role)
        top = text.split("\n## ")[0]
        assert "> **Warning.** The reward model did not pass its gate" in top
        assert "too few comparisons" in top and "warn only" in top
        assert "did not pass its gate" in section(text, "Limits")
        assert "**Warning.**" not in card.render(run(), role)


def test_quantised_and_gold_runs_say_so(run):
    four_bit = card.render(run(change(model__load_in_4bit=True)), "policy")
    assert "4-bit base" in section(four_bit, "Limits")
    assert "4-bit NF4" in section(four_bit, "Lineage")
    load, merge = pythons(four_bit)[0], pythons(four_bit)[-1]
    assert "load_in_4bit=True" in load and "load_in_4bit" not in merge
    gold = run(change(stages__ppo__reward="gold"))
    assert "optimised the exact checker" in limits_of(gold)
    assert "a copy of the SFT adapter with a new head" in card.render(gold, "value")


def test_small_evaluations_and_the_authors_limits_are_said(run):
    few = run(change(evaluation__policy__win_rate__n=12))
    assert "rest on 12 prompts only" in limits_of(few)
    own = {**RECIPE, "card": {**RECIPE["card"], "limits": "Do not use it for medicine."}}
    assert "Do not use it for medicine." in limits_of(run(recipe=own))


# --- files and code -------------------------------------------------------------------------


def test_the_code_is_python_and_needs_no_package_of_ours(run):
    for role in ROLES:
        blocks = pythons(card.render(run(), role, {role: f"acme/{role}"}))
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
    code = pythons(card.render(record, "policy"))[0]
    values = [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]
    assert prompt in values


def test_the_card_is_made_again_from_a_finished_run_without_torch(run):
    record = run()
    code = f"""
import socket, sys
def refuse(*_): raise AssertionError("the network was used")
socket.socket.connect = refuse
from lora_rlhf import card, hub
from lora_rlhf.record import Record
paths = card.write(Record.read({str(record.folder)!r}))
assert "torch" not in sys.modules
print(*(p.parent.name for p in paths))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["policy", "reward", "value", "sft"]
    for role in ROLES:
        readme = (record.adapter(role) / "README.md").read_text(encoding="utf-8")
        assert readme == card.render(record, role)


def test_no_card_for_a_role_that_the_run_has_not(run):
    record = run(roles=("sft",))
    assert [path.parent.name for path in card.write(record)] == ["sft"]
