# SPDX-License-Identifier: Apache-2.0
"""Exports of Argilla, Label Studio and Open WebUI in, and our own tasks and labels there and back.

The files are written by hand after the sources of the tools: argilla 2.8 (`Record.to_dict`,
`Settings.serialize`), Label Studio's export serializers and its pages on tags, and Open WebUI's
feedback model.
"""

import json
import re
from collections import Counter

import pytest

from lora_rlhf.errors import DataError, UsageError
from lora_rlhf.feedback import exchange, labeling, project
from lora_rlhf.feedback.labels import Answer, Label, Task
from lora_rlhf.serving.usage_store import UsageStore


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tea"


def written(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def taken(folder, path, tool, **options):
    """Import a file; return tasks and labels by task, and what was said."""
    lines = exchange.take(folder, path, tool, **options)
    with project.load(folder).store(readonly=True) as store:
        labels = {}
        for label in store.labels():
            labels.setdefault(label.task, []).append(label)
        return {task.id: task for task in store.tasks()}, labels, lines


# ------------------------------------------------------------------------- Label Studio


def result(kind, name="q", to="prompt", **value):
    return {
        "id": "Dx_aB91ISN", "from_name": name, "to_name": to, "type": kind, "value": value,
        "origin": "manual",
    }  # fmt: skip


def annotation(*results, who=7, **changes):
    given = {"id": 1001, "completed_by": who, "result": [*results], "was_cancelled": False}
    given |= {"ground_truth": False, "created_at": "2025-03-09T22:16:08.728353Z", "draft_created_at"
              : None, "updated_at": "2025-03-09T22:16:08.728378Z", "lead_time": 4.25}  # fmt: skip
    given |= {"prediction": {}, "result_count": 1, "unique_id": "6f", "import_id": None}
    given |= {"last_action": None, "bulk_created": False, "task": 1, "project": 83}
    return given | {"updated_by": who, "parent_prediction": None, "last_created_by": None} | changes


def ls_task(data, *annotations, number=1):
    counts = dict.fromkeys(("total_annotations", "cancelled_annotations", "total_predictions"), 0)
    return {
        "id": number, "annotations": [*annotations], "file_upload": "dataset.json", "drafts": [],
        "predictions": [], "data": data, "meta": {}, "created_at": "2025-03-09T21:52:49.513742Z",
        "updated_at": "2025-03-09T22:16:08.746926Z", "inner_id": 1, **counts, "comment_count": 0,
        "unresolved_comment_count": 0, "last_comment_updated_at": None, "project": 83,
        "updated_by": 7, "comment_authors": [],
    }  # fmt: skip


PAIR = {"prompt": "The quick brown fox...", "answer1": "jumps.", "answer2": "bags few lynx."}
ITEMS = {
    "prompt": "What destroyed the library?",
    "items": [
        {"id": "llm_1", "title": "LLM 1", "body": "Wars."},
        {"id": "llm_2", "title": "LLM 2", "body": "Time."},
        {"id": "llm_3", "title": "LLM 3", "body": "Fire."},
    ],
}
EMAIL = {"id": 9, "email": "ada@example.org", "first_name": "Ada", "last_name": ""}


def test_label_studio_pairs_rankings_ratings_and_texts(tmp_path, folder):
    rows = [
        ls_task(
            PAIR,
            annotation(result("pairwise", to="answer1,answer2", selected="left")),
            annotation(result("pairwise", to="answer1,answer2", selected="right"),
                       result("textarea", "why", text=["dull"]), who=EMAIL),
            annotation(who=8, was_cancelled=True),
        ),
        ls_task(ITEMS, annotation(result("ranker", to="a", ranker=["llm_2", "llm_3", "llm_1"])),
                annotation(result("ranker", ranker={"_": ["llm_1", "llm_2", "llm_3"], "bad": []}),
                           who=8),
                annotation(result("ranker", ranker={"good": ["llm_1"], "bad": ["llm_2", "llm_3"]}),
                           who=EMAIL), number=2),
        ls_task({"prompt": "Rate", "response": "So."}, 
                annotation(result("rating", rating=4), result("choices", choices=["harmful"])),
                number=3),
        ls_task({"prompt": "Write"}, annotation(result("textarea", text=["A line"])),
                number=4),
    ]  # fmt: skip
    path = written(tmp_path / "export.json", rows)
    tasks, labels, lines = taken(folder, path, "label-studio")
    kinds = {name: task.type for name, task in tasks.items()}
    assert kinds == {
        "label-studio/1": "pair", "label-studio/2": "ranking", "label-studio/3": "rating",
        "label-studio/4": "demonstration",
    }  # fmt: skip
    pair, ranking, rating, text = labels.values()
    assert [one.value for one in pair] == [{"strength": -2}, {"strength": 2}, None]
    assert pair[1].note == "dull" and pair[0].seconds == 4.25
    assert pair[0].created == "2025-03-09T22:16:08.728+00:00"
    assert [one.value["ranks"] for one in ranking] == [[3, 1, 2], [1, 2, 3]]
    assert rating[0].value["overall"] == 4 and rating[0].flags == ("harmful",)
    assert text[0].value == {"text": "A line"}
    assert pair[0].labeler == text[0].labeler != pair[1].labeler  # the same person is the same
    assert b"example.org" not in (folder / "labels.sqlite").read_bytes()
    assert any("several buckets" in line and "1 " in line for line in lines)
    assert taken(folder, path, "label-studio")[1] == labels  # again: nothing new
    out = tmp_path / "c.jsonl"
    labeling.export(folder, out, "comparisons")
    assert json.loads(out.read_text().splitlines()[0])["ranks"] == [1, 2]


def test_an_annotation_that_was_corrected_in_label_studio_replaces_its_label(tmp_path, folder):
    left, right = (result("pairwise", to="answer1,answer2", selected=s) for s in ("left", "right"))
    taken(folder, written(tmp_path / "1.json", [ls_task(PAIR, annotation(left))]), "label-studio")
    later = annotation(right, updated_at="2025-03-10T08:00:00.000000Z")
    path = written(tmp_path / "2.json", [ls_task(PAIR, later)])
    [[label]] = taken(folder, path, "label-studio")[1].values()
    assert (label.value, label.replaces) == ({"strength": 2}, 1)
    assert label.created == "2025-03-10T08:00:00.000+00:00"


def test_a_key_of_pseudonyms_is_never_empty(tmp_path):
    (tmp_path / exchange.KEY).touch()  # killed before it was written
    key = exchange.pseudonym_key(tmp_path)
    assert len(key) == 32 and exchange.pseudonym_key(tmp_path) == key


@pytest.mark.parametrize(
    ("change", "options", "place", "problem"),
    [
        ({"colour": 1}, {}, "export.json row 1", "unknown field 'colour' in a task"),
        ({"data": {**PAIR, "ref": "x"}}, {}, "row 1, data", "unknown field 'ref' beside"),
        ({"data": {"q1": "x"}}, {}, "row 1, data", "no field is known to hold the prompt: q1"),
        ({"data": {**PAIR, "prompt": 3}}, {}, "row 1, data", "the prompt is 3"),
        ({"annotations": [annotation(mood=1)]}, {}, "annotation 1", "unknown field 'mood'"),
        ({"annotations": [annotation(who=None)]}, {}, "annotation 1", "completed_by is missing"),
        ({"annotations": [annotation(result("labels", labels=["PER"]))]}, {},
         "annotation 1, result 1", "a result of type 'labels'"),
        ({"annotations": [annotation(result("choices", choices=["Maybe"]))]}, {},
         "annotation 1", "the option 'Maybe' is not known"),
        ({"annotations": [annotation(result("ranker", ranker=["llm_9"]))]}, {},
         "annotation 1, q", "'llm_9' is ranked"),
        ({"annotations": [annotation(created_at="today")]}, {}, "annotation 1", "created_at"),
        ({"annotations": [annotation(result("rating", rating=2))]}, {}, "annotation 1",
         "a rating of 2 answers together"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_one_error_with_its_place(
    tmp_path, folder, change, options, place, problem
):
    path = written(tmp_path / "export.json", [ls_task(PAIR) | change])
    with pytest.raises(DataError) as error:
        exchange.take(folder, path, "label-studio", **options)
    assert problem in error.value.given and place in error.value.where
    assert not folder.exists()  # nothing was made


def test_a_file_without_tasks_leaves_no_empty_project(tmp_path, folder):
    """It said "0 tasks added", and the project was in the way of the right file."""
    empty = UsageStore(tmp_path / "usage.sqlite")
    with empty:
        pass
    with pytest.raises(DataError, match="no task is in it"):
        exchange.take(folder, empty.path, "usage")
    assert not folder.exists()
    taken(folder, written(tmp_path / "e.json", [ls_task(PAIR)]), "label-studio")
    _, _, lines = taken(folder, empty.path, "usage")
    assert "0 tasks" in lines[0]  # into a project, nothing is nothing


def test_names_of_fields_can_be_given(tmp_path, folder):
    data = {"q": "Tea?", "x": "Yes", "y": "No", "ref": "Perhaps"}
    path = written(tmp_path / "e.json", [ls_task(data)])
    fields = ["prompt=q", "answer=x", "answer=y"]
    tasks, _, _ = taken(folder, path, "label-studio", fields=fields, ignore=["ref"])
    [task] = tasks.values()
    assert [one.text for one in task.answers] == ["Yes", "No"]
    with pytest.raises(UsageError, match="--field question=q"):
        exchange.take(folder, path, "label-studio", ["question=q"])
    with pytest.raises(UsageError, match="no format 'prodigy'"):
        exchange.take(folder, path, "prodigy")


# ------------------------------------------------------------------------------ Argilla

ADA, BOB = "6d1f1f6e-0000-4000-8000-000000000001", "6d1f1f6e-0000-4000-8000-000000000002"


def record(name, fields, **responses):
    given = {
        question: [{"value": value, "user_id": who} for who, value in by.items()]
        for question, by in responses.items()
    }
    return {
        "id": name, "fields": fields, "metadata": {"n": 1}, "suggestions": {}, "responses": given,
        "vectors": {}, "status": "completed", "_server_id": None,
    }  # fmt: skip


def test_argilla_records_with_and_without_settings(tmp_path, folder):
    two = {"instruction": "Tea?", "response-1": "Yes", "response-2": "No"}
    turns = [{"role": "user", "content": "Hi"}]
    rows = [
        record("1", two, best={ADA: "response-2", BOB: "response-1"}, why={ADA: "polite"}),
        record("2", two, order={ADA: ["response-2", "response-1"]}),
        record("3", two, **{"quality-1": {ADA: 3, BOB: 1}, "quality-2": {ADA: 5}}),
        record("4", {"prompt": turns}, answer={ADA: "Hello"}),
    ]
    tasks, labels, lines = taken(folder, written(tmp_path / "records.json", rows), "argilla")
    assert [task.type for task in tasks.values()] == ["pair", "ranking", "ranking", "demonstration"]
    assert [one.value["strength"] for one in labels["argilla/1"]] == [2, -2]
    assert labels["argilla/1"][0].note == "polite"
    assert labels["argilla/2"][0].value == labels["argilla/3"][0].value == {"ranks": [2, 1]}
    assert len(labels["argilla/3"]) == 1 and any("ratings of only some" in one for one in lines)
    assert labels["argilla/4"][0].value == {"text": "Hello"}
    question = {"name": "span", "settings": {"type": "span", "options": []}, "required": True}
    settings = {"guidelines": "Be kind.", "questions": [question], "fields": []}
    written(tmp_path / "d/.argilla/settings.json", settings)
    written(tmp_path / "d/records.json", rows)
    with pytest.raises(DataError, match="question 'span' is of type 'span'") as error:
        exchange.take(folder, tmp_path / "d", "argilla")
    assert error.value.where.endswith("settings.json")
    other = tmp_path / "other"
    _, labels, _ = taken(other, tmp_path / "d", "argilla", ignore=["span"])
    with project.load(other).store() as store:
        [sha256] = store.guidelines()
    assert labels["argilla/1"][0].guidelines == sha256


@pytest.mark.parametrize(
    ("row", "place", "problem"),
    [
        ({"colour": 1}, "row 1", "unknown field 'colour' in a record"),
        ({"responses": {"q": [{"value": 1, "user_id": ADA, "mood": 2}]}},
         "row 1, response 1 to q", "unknown field 'mood'"),
        ({"responses": {"q": [{"value": [{"start": 1}], "user_id": ADA}]}},
         "row 1, response 1 to q", "the value is [{"),
    ],
)  # fmt: skip
def test_argilla_fields_that_are_not_known(tmp_path, folder, row, place, problem):
    path = written(tmp_path / "records.json", [record("1", {"prompt": "Tea?"}) | row])
    with pytest.raises(DataError) as error:
        exchange.take(folder, path, "argilla")
    assert problem in error.value.given and place in error.value.where


# ---------------------------------------------------------------------------- there and back


@pytest.fixture
def labelled(folder):
    """A project with a label of each type, ties, flags, notes and a skipped task."""
    turns = ({"role": "user", "content": "Tea?"},)
    of_somebody = ({"role": "user", "content": "Ada's tea?"},)
    four = tuple(Answer(f"model {n}", text) for n, text in enumerate(["a", "b", "c", "d"]))
    tasks = [
        Task("set/1", "ranking", turns, four, set="set"),
        Task("two", "pair", turns, four[:2]),
        Task("one", "rating", turns, four[:1]),
        Task("none", "demonstration", turns, ()),
        Task("gold", "pair", turns, four[:2], gold={"strength": 1}),
        Task("private", "pair", of_somebody, four[:2]),
        Task("same", "pair", of_somebody, four[1:3]),
    ]
    yes = {"value": {"overall": 6, "questions": {"opinion": True}}}

    def label(task, value, who="anna", flags=(), note="", order=(0, 1)):
        when = "2026-01-01T00:00:00.000+00:00"
        return Label(0, task, who, value, flags, False, note, order, 2.5, "", when)

    labels = [
        label("set/1", {"ranks": [2, 1, 3, 4]}, order=(3, 1, 0, 2)),
        label("two", {"strength": -3}, flags=("harmful",), note="rude"),
        label("two", {"strength": 1}, who="bob"),
        label("one", yes["value"]),
        label("none", {"text": "A cup."}),
        label("private", {"strength": 1}, flags=("personal_data",)),
    ]
    with project.create(folder, project.Settings(name="tea", overlap=0.0)).store() as store:
        store.add_tasks(tasks)
        store.add_labels(labels)
        return [one for one in store.labels() if one.task != "private"]


def content(labels):
    return Counter((one.task, one.labeler, str(one.value), one.flags, one.note) for one in labels)


@pytest.mark.parametrize("tool", ["label-studio", "argilla"])
def test_our_labels_come_back_as_they_were(tmp_path, folder, labelled, tool):
    said = exchange.put(folder, tmp_path / "out", tool)
    assert "4 tasks, 5 labels" in said
    parts = [path for path in (tmp_path / "out").iterdir() if path.suffix not in (".xml", ".md")]
    text = "".join(p.read_text() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert len(parts) == 4 and "model 0" not in text and "private" not in text
    empty = tmp_path / "again"
    with project.load(folder).store() as store, project.create(
        empty, project.Settings(name="tea", overlap=0.0)
    ).store() as other:  # fmt: skip
        other.add_tasks(store.tasks())
        for name in ("anna", "bob"):
            other.add_labeler(name)
    for part in parts:
        exchange.take(empty, part, tool)
    with project.load(empty).store() as store:
        assert content(store.labels()) == content(labelled)
        assert len(store.tasks()) == 7
    for part in parts:
        assert "0 tasks and 0 labels" in exchange.take(folder, part, tool)[0]


def test_label_studio_shows_what_its_tasks_hold(tmp_path, folder, labelled):
    """Its page reads `$answer-1` as `$answer` and the text "-1"."""
    exchange.put(folder, tmp_path / "out", "label-studio")
    for path in (tmp_path / "out").glob("*.xml"):
        shown = set(re.findall(r'value="\$([^"]*)"', path.read_text()))
        assert all(re.fullmatch(r"\w+", name) for name in shown)
        for row in json.loads(path.with_suffix(".json").read_text()):
            assert shown == row["data"].keys() - {"task"}


def test_tasks_alone_can_be_handed_out_and_ties_are_counted_for_argilla(tmp_path, folder, labelled):
    with project.load(folder).store() as store:
        [ranking] = [one for one in labelled if one.task == "set/1"]
        tie = {"value": {"ranks": [1, 1, 1, 1]}, "labeler": "bob"}
        store.add_labels([Label(**{**vars(ranking), **tie})])
    assert "1 left out: rankings with ties" in exchange.put(folder, tmp_path / "a", "argilla")
    with pytest.raises(UsageError, match="there is something already"):
        exchange.put(folder, tmp_path / "a", "argilla")
    said = exchange.put(folder, tmp_path / "l", "label-studio", unlabelled=True)
    assert "labels" not in said
    assert json.loads((tmp_path / "l/pair.json").read_text())[0]["annotations"] == []


def test_a_task_that_is_not_the_projects_is_refused(tmp_path, folder, labelled):
    exchange.put(folder, tmp_path / "out", "label-studio")
    path = tmp_path / "out/pair.json"
    path.write_text(path.read_text().replace("Tea?", "Coffee?"))
    with pytest.raises(DataError, match="are not those of the task 'two' in the project") as error:
        exchange.take(folder, path, "label-studio")
    assert error.value.where.endswith("pair.json row 1")
    path.write_text(path.read_text().replace("Coffee?", r"Tea\ud83d?"))
    with pytest.raises(DataError, match=r"half of a character \(U\+D83D\)") as error:
        exchange.take(folder, path, "label-studio")
    assert error.value.where.endswith("pair.json row 1")


# --------------------------------------------------------------------------- Open WebUI


def feedback(answer, rating, who="u1", chat="c", when=1_704_067_200, **changes):
    """As `/api/v1/evaluations/feedbacks/all/export` writes it."""
    messages = {
        "m0": {"id": "m0", "parentId": None, "childrenIds": ["m1", "m2"], "role": "user",
               "content": "Tea?", "timestamp": 1, "models": ["llama"]},
        "m1": {"id": "m1", "parentId": "m0", "childrenIds": [], "role": "assistant",
               "content": "Yes, please.", "model": "llama", "modelName": "Llama", "done": True},
        "m2": {"id": "m2", "parentId": "m0", "childrenIds": [], "role": "assistant",
               "content": "No.", "model": "llama", "annotation": {"rating": -1}},
    }  # fmt: skip
    inner = {
        "id": "",
        "title": "Tea",
        "models": ["llama"],
        "params": {},
        "tags": [],
        "files": [],
        "history": {"messages": messages, "currentId": answer},
        "timestamp": 1_704_067_200_000,
    }
    snapshot = {"chat": {"id": chat, "user_id": who, "title": "Tea", "chat": inner}}
    data = {"rating": rating, "model_id": "llama", "sibling_model_ids": ["llama"], "tags": ["t"]}
    data |= {"reason": "accurate_information", "comment": "", "details": {"rating": 9}}
    meta = {"arena": False, "model_id": "llama", "message_id": answer, "message_index": 2}
    meta |= {"chat_id": chat, "base_models": {"llama": None}}
    given = {"id": f"f-{answer}-{who}", "user_id": who, "version": 0, "type": "rating"}
    given |= {"data": data, "meta": meta, "snapshot": snapshot, "created_at": when}
    return given | {"updated_at": when} | changes


def test_thumbs_up_and_down_on_one_prompt_are_a_pair(tmp_path, folder):
    rows = [
        feedback("m1", 1),
        feedback("m2", -1),
        feedback("m1", 1, who="u2"),
        feedback("m2", "-1", who="u3"),
        feedback("m9", 1, who="u4"),
        feedback("m1", 1, who="u5", snapshot=None),
        feedback("m1", None, who="u6"),
    ]
    path = written(tmp_path / "feedback.json", rows)
    tasks, labels, lines = taken(folder, path, "open-webui")
    [task], [[label]] = tasks.values(), labels.values()
    assert [one.text for one in task.answers] == ["No.", "Yes, please."]
    assert label.value == {"strength": 2} and label.labeler.startswith("open-webui-")
    assert label.created == "2024-01-01T00:00:00.000+00:00"
    unused = Counter(line.removeprefix("not used: ") for line in lines[1:])
    assert {reason.split(" ", 1)[1] for reason in unused} == {
        "thumbs up without one down",
        "thumbs down without one up",
        "thumbs on an answer that is not in the chat",
        "thumbs without the chat (export them with the snapshot)",
        "ratings without a thumb",
    }
    path = written(tmp_path / "new.json", [feedback("m1", 1, colour=1)])
    with pytest.raises(DataError, match="unknown field 'colour' in a feedback") as error:
        exchange.take(folder, path, "open-webui")
    assert error.value.where.endswith("new.json row 1")


# ----------------------------------------------------------------------------- our own thumbs


def test_thumbs_down_become_tasks(folder, tmp_path):
    question, other = ([{"role": "user", "content": text}] for text in ("What is tea?", "And why?"))
    with UsageStore(tmp_path / "usage.sqlite") as store:
        store.thumb("a", False, "too short", question, "A drink.", model="policy")
        store.thumb("b", True, "", other, "Leaves.", model="policy")
        store.thumb("c", False, "", other, "A tree.", model="sft")
        store.thumb("d", True, "", [{"role": "user", "content": "Thanks"}], "Good.")
        store.thumb("e", False)
    path = tmp_path / "usage.sqlite"
    tasks, labels, lines = taken(folder, path, "usage")
    written, compared = tasks.values()
    assert (written.type, written.answers, written.why) == (
        "demonstration",
        (),
        "thumb down: too short",
    )
    assert written.prompt == tuple(question) and not labels
    assert (compared.type, [a.text for a in compared.answers]) == ("pair", ["Leaves.", "A tree."])
    assert [line.partition(": ")[2] for line in lines[1:]] == [
        "1 thumbs whose text is not stored", "1 thumbs up without one down",
    ]  # fmt: skip
    again, _, lines = taken(folder, path, "usage")
    assert again == tasks and "0 tasks" in lines[0]
