# SPDX-License-Identifier: Apache-2.0
"""Personal data: names by lists and cues, pseudonyms, and what reaches a trainer."""

import csv
import json
import re

import pytest
from data_sources import all_rows, recipe
from measure_personal_data import labelled

from lora_rlhf.data import dataset_builder, personal_data
from lora_rlhf.data.filters import SECRET
from lora_rlhf.data.personal_data import Pseudonyms, Span, apart, names
from lora_rlhf.errors import SetupError

RAW = ("Alice", "Smith", "+1 212-736-5000", "alice@example.org")


class Shapes:
    """Finds what the real finder does, by simple shapes: it needs no Presidio."""

    names_by = "shapes"

    def spans(self, text):
        shapes = {"PHONE_NUMBER": r"\+1 [\d-]+", "EMAIL_ADDRESS": r"\S+@\S+\w"}
        found = [Span(*m.span(), kind) for kind in shapes for m in re.finditer(shapes[kind], text)]
        return apart([*found, *(Span(*place, "PERSON") for place in names(text))])


@pytest.fixture
def shapes(monkeypatch):
    monkeypatch.setattr(personal_data, "loaded", lambda *_: Shapes())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My name is Zsofia Okonkwo.", ["Zsofia Okonkwo"]),
        ("Alice's dog likes Alice", ["Alice", "Alice"]),
        ("Dear Mr Quispe, hello", ["Quispe"]),
        ("Dear Sir or Madam, the Team", []),
        ("Ask Will Turner. Will it rain?", ["Will Turner"]),
        ("Will you mark it in May?", []),
        ("I'm Grace, hi", ["Grace"]),
        ("by Jean-Luc Picard", ["Jean-Luc Picard"]),
        ("Okeke Johnson called", ["Okeke Johnson"]),
        ("In Paris and New York on Monday", []),
        ("Please ask Émile or Jürgen Müller. Call me Émile", ["Émile", "Émile"]),
        ("A" * 100_000 + " Ab-" * 10_000, []),
    ],
)
def test_names_by_lists_and_cues(text, expected):
    places = apart([Span(*place, "PERSON") for place in names(text)])
    assert [text[one.start : one.end] for one in places] == expected


def test_what_two_finds_share_is_one_find_and_nothing_is_left_over(tmp_path):
    spans = apart([Span(6, 11, "EMAIL_ADDRESS"), Span(0, 11, "PERSON"), Span(5, 6, "PERSON")])
    assert spans == [Span(0, 6, "PERSON"), Span(6, 11, "EMAIL_ADDRESS")]
    (tmp_path / "a.jsonl").write_text("{}", encoding="utf-8")
    made = Pseudonyms(recipe(demonstrations=tmp_path / "a.jsonl"))
    alice, mail = made.of("PERSON", "Alice"), made.of("EMAIL_ADDRESS", "a@b.c")
    assert made.redact("Alice a@b.c", spans) == f"{alice} {mail}"


def test_a_person_keeps_a_pseudonym_that_needs_the_raw_data(tmp_path):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file in files:
        file.write_text("{}", encoding="utf-8")
    given = recipe(demonstrations=files[0], prompts=files[1])
    made = Pseudonyms(given)
    alice = made.of("PERSON", "Alice")
    assert re.fullmatch(r"\[NAME_[0-9A-F]{6}\]", alice)
    assert made.of("PERSON", "Alice Smith") == f"{alice} {made.of('PERSON', 'SMITH')}"
    assert "李" not in made.of("PERSON", "李明") and made.of("PERSON", "Alice's") == f"{alice}'s"
    assert made.of("PHONE_NUMBER", "+1 212-736") == made.of("PHONE_NUMBER", "+1 (212) 736")
    assert Pseudonyms(given).of("PERSON", "alice") == alice
    files[1].write_text("{} ", encoding="utf-8")
    assert Pseudonyms(given).of("PERSON", "Alice") != alice


def users_csv(path):
    """A user's own file, with a name, a phone number and an e-mail address in every row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "completion"])
        for i in range(60):
            rows.writerow([f"q{i}: my name is Alice Smith, write to alice@example.org",
                           f"Alice, call +1 212-736-5000 ({i})"])  # fmt: skip
    return path


def leaks(prepared):
    text = json.dumps([all_rows(prepared), prepared.report, prepared.lines], ensure_ascii=False)
    return [raw for raw in RAW if raw in text]


def test_a_csv_is_redacted_in_rows_report_and_the_shown_example(tmp_path, chat, shapes):
    file = users_csv(tmp_path / "d.csv")
    given = recipe(demonstrations=file, prompts=file, evaluate=file)
    data = given.data.model_copy(update={"personal_data": "redact", "evaluate": []})
    given = given.model_copy(update={"data": data})
    trained = dataset_builder.demonstrations(given, chat)
    asked = dataset_builder.prompts(given, chat)
    assert leaks(trained) == leaks(asked) == []
    assert trained.report["personal_data"] == {
        "action": "redact",
        "rows": 60,
        "found": {"EMAIL_ADDRESS": 60, "PHONE_NUMBER": 60, "PERSON": 120},
        "names_by": "shapes",
    }
    assert "names were replaced by pseudonyms (60 rows)" in trained.report["notes"]
    row = next(iter(trained.train))
    name = re.search(r"\[NAME_\w+\]", row["completion"][0]["content"])[0]
    assert name in row["prompt"][0]["content"]  # the same person in prompt and answer


def test_arguments_of_tool_calls_are_redacted():
    call = {"name": "send", "arguments": {"to": ["Alice"], "phone": "+1 212-736-5000", "n": 3}}
    turn = {"role": "assistant", "content": "", "tool_calls": json.dumps([{"function": call}])}
    [new] = personal_data._each([turn], lambda text: text.replace("Alice", "X").replace("+1", "Y"))
    [made] = json.loads(new["tool_calls"])
    assert made["function"]["arguments"] == {"to": ["X"], "phone": "Y 212-736-5000", "n": 3}


def test_rows_with_personal_data_are_dropped_or_warned_of(tmp_path, plain, shapes):
    file = users_csv(tmp_path / "d.csv")
    with file.open("a", encoding="utf-8") as more:
        more.writelines(f"plain {i},answer {i}\n" for i in range(60))
    given = recipe(demonstrations=file)

    def told(action):
        data = given.data.model_copy(update={"personal_data": action})
        return dataset_builder.demonstrations(given.model_copy(update={"data": data}), plain)

    assert leaks(told("keep")) == leaks(told("warn")) == [*RAW]
    assert f"{SECRET} names; see data.personal_data (60 rows)" in told("warn").report["notes"]
    assert told("drop").report["counts"]["personal data"] == {"before": 120, "after": 60}
    assert leaks(told("drop")) == []
    assert "personal_data" not in told("keep").report


def test_without_presidio_the_extra_is_named(tmp_path, plain, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "presidio_analyzer", None)
    file = users_csv(tmp_path / "d.csv")
    given = recipe(demonstrations=file)
    data = given.data.model_copy(update={"personal_data": "redact", "name_model": "none"})
    with pytest.raises(SetupError, match=r"(?s)data.personal_data needs.*lora-rlhf.hygiene"):
        dataset_builder.demonstrations(given.model_copy(update={"data": data}), plain)


def test_the_labelled_set_of_the_script_labels_what_it_says():
    wrong, people = [], [0, 0]
    for text, spans, listed in labelled(600):
        wrong += [
            s for s in spans if s.kind == "EMAIL_ADDRESS" and "@" not in text[s.start : s.end]
        ]
        covered = {i for start, end in names(text) for i in range(start, end)}
        for one in spans:
            if one.kind == "PERSON" and listed:
                people[covered.issuperset(range(one.start, one.end))] += 1
    assert not wrong and people[1] > 0.97 * sum(people) > 40


@pytest.mark.slow
def test_presidio_and_a_model_for_names(tmp_path, plain, monkeypatch):
    import socket

    import spacy

    model = spacy.blank("en")
    ruler = model.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PERSON", "pattern": "Thandiwe"}])
    model.to_disk(tmp_path / "people")
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was used"))
    file = users_csv(tmp_path / "d.csv")
    given = recipe(demonstrations=file)
    update = {"personal_data": "redact", "name_model": str(tmp_path / "people")}
    data = given.data.model_copy(update=update)
    trained = dataset_builder.demonstrations(given.model_copy(update={"data": data}), plain)
    assert leaks(trained) == []
    assert trained.report["personal_data"]["names_by"] == "people"
    with pytest.raises(SetupError, match=r"data.name_model: no_such_model cannot be loaded"):
        personal_data.Finder("no_such_model")
    finder = personal_data.Finder(str(tmp_path / "people"))
    text = "Then Thandiwe paid with 4111 1111 1111 1111 from 192.168.4.7"
    assert [one.kind for one in finder.spans(text)] == ["PERSON", "CREDIT_CARD", "IP_ADDRESS"]
