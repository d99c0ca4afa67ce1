# SPDX-License-Identifier: Apache-2.0
"""`lora-rlhf label`: projects, a sitting in a terminal, the page in a notebook."""

import json
import sys
from types import ModuleType, SimpleNamespace

import httpx
import pytest
import yaml
from typer.testing import CliRunner

import lora_rlhf
from lora_rlhf.cli import app
from lora_rlhf.errors import UsageError
from lora_rlhf.feedback import guidelines, label_files, labeling, project
from lora_rlhf.feedback.label_server import Access

THREE = {"sft": "Red.", "policy": "Blue.", "base": "Colour?"}


@pytest.fixture
def tasks(tmp_path):
    rows = [{"id": "r", "prompt": "Name a colour.", "answers": THREE},
            {"id": "p", "type": "pair", "prompt": "Two?", "answers": {"a": "one", "b": "two"}},
            {"id": "q", "prompt": "Rate.", "answers": {"a": "one"}},
            {"id": "d", "prompt": "List.", "checks": {"bullets": 2}}]  # fmt: skip
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path, tasks):
    labeling.make(tmp_path / "p", tasks)
    return tmp_path / "p"


def sit(folder, *lines, labeler="anna"):
    """A sitting whose person types these lines; returns what was shown."""
    shown, typed = [], iter(lines)

    def ask(prompt):
        shown.append(prompt)
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    labeling.sit(folder, labeler, ask, shown.append)
    return "\n".join(shown)


def labels(folder):
    with project.load(folder).store(readonly=True) as store:
        order = {label.task: label.order for label in store.labels(current=False)}
        return order, store.labels()


def test_a_sitting_in_a_terminal(folder):
    shown = sit(
        folder,
        "",  # the guidelines are read
        "/bogus", "a b", "b a=c", "/undo", "/flag harmful", "/note hm", "c > a b",
        "b9", "/bad", "a3",
        "six", "6 4 12", "6 4 10",
        "- one", ".", "- one", "- two", ".",
    )  # fmt: skip
    for text in ("Your label so far: b a=c", "flags: harmful", "note: hm", "good enough: yes"):
        assert text in shown
    assert "Guidelines for labelers" in shown and "model" not in shown.split("--- 1 of 4")[1]
    for text in ("there is no /bogus", "each of a b c once", "no question 12",
                 "expected overall 1 to 7",
                 "expected the better",
                 "1 bullets instead of 2", "Nothing is left for you", "5 labels"):  # fmt: skip
        assert text in shown
    order, given = labels(folder)
    ranking, pair, rating, demonstration = given
    assert [ranking.value["ranks"][index] for index in order["r"]] == [2, 3, 1]
    assert (ranking.flags, ranking.note, ranking.replaces) == (("harmful",), "hm", 1)
    assert (pair.value["strength"], pair.both_bad) == (-3 if order["p"] == (0, 1) else 3, True)
    assert rating.value["overall"] == 6 and sum(rating.value["questions"].values()) == 2
    assert demonstration.value == {"text": "- one\n- two"}
    again = sit(folder)
    assert "Guidelines" not in again and "Nothing is left for you" in again


def test_a_correction_begins_with_what_was_said_before(folder):
    said = ("/flag personal_data", "/flag broken", "/flag broken", "/bad", "/note hm", "a b c")
    sit(folder, "", *said, "/undo", "b a c")
    [label] = labels(folder)[1]
    assert (label.replaces, label.flags) == (1, ("personal_data",))
    assert (label.both_bad, label.note) == (True, "hm")


def test_a_sitting_can_be_left_and_goes_on(folder):
    assert "0 labels" in sit(folder, "", "/quit")
    assert "1 label" in sit(folder, "/guidelines", "", "/skip")
    assert labels(folder)[1][0].value is None
    with pytest.raises(UsageError, match="needs the labeler's name"):
        sit(folder, labeler=None)


def test_what_was_open_when_a_sitting_ended_is_given_out_again(folder):
    assert "3 labels" in sit(folder, "", "/skip", "/skip", "/skip", "/quit")
    assert "List." in sit(folder, "/quit")  # at once, though it was another sitting
    shown = sit(folder, "", "/skip", "/skip", "/skip", labeler="bob")
    assert "List." in shown  # or to another person


# ----------------------------------------------------------------------------- projects


def invoke(*args):
    return CliRunner().invoke(app.app, [str(arg) for arg in args], prog_name="lora-rlhf")


def test_the_command_makes_fills_and_exports_a_project(tmp_path, tasks):
    made = invoke("label", tmp_path / "p", "--new", tasks)
    assert made.exit_code == 0 and "p: 4 tasks, project.yaml and guidelines.md" in made.stdout
    assert "1 tasks" not in made.stdout
    added = invoke("label", tmp_path / "p", "--add", tasks)
    assert "0 tasks added, 4 there already" in added.stdout
    sit(tmp_path / "p", "", "a b c", "b2", "5", "- x", "- y", ".")
    out = tmp_path / "comparisons.jsonl"
    assert (
        "2 rows (comparisons) from 3 labels"
        in invoke("label", tmp_path / "p", "--export", out).stdout
    )
    assert len(out.read_text().splitlines()) == 2
    text = invoke("label", tmp_path / "p", "--export", out, "--as", "demonstrations").stdout
    assert "1 row (demonstrations)" in text
    settings = yaml.safe_load((tmp_path / "p" / "project.yaml").read_text())
    assert settings["version"] == 1 and settings["overlap"] == 0.2
    assert (tmp_path / "p" / "guidelines.md").read_text() == guidelines.PACKAGED.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--new", "TASKS"], "there is a project already: project.yaml exists"),
        (["--new", "TASKS", "--type", "poll"], "there is no type 'poll'"),
        (["--as", "judge"], "--as and --without are for --export"),
        (["--type", "pair"], "--type is for --new"),
        (["--host", "0.0.0.0"], "there is no password"),
        (["--terminal"], "--terminal needs the labeler's name"),
    ],
)
def test_wrong_usage_is_one_error(folder, tasks, options, message):
    result = invoke("label", folder, *[tasks if one == "TASKS" else one for one in options])
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize("name", ["labels.sqlite", "project.yaml", "guidelines.md"])
def test_an_export_replaces_no_file_of_the_project(folder, name):
    before = (folder / name).read_bytes()
    result = invoke("label", folder, "--export", folder / ".." / folder.name / name)
    assert result.exit_code == 2 and "is a file of the project" in result.stderr
    assert (folder / name).read_bytes() == before


def edit(folder, text):
    (folder / "project.yaml").write_text(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("version: 2\nname: x\n", r"project.yaml:1: version: Input should be 1"),
        ("name: x\noverlpa: 0.1\n", r"project.yaml:2: overlpa: is not a known key"),
        ("name: x\noverlap: 2\n", r"project.yaml:2: overlap"),
        ("name: x\nguidelines: ../x.md\n", r"project.yaml:.*is not in the project's folder"),
        ("name: [\n", r"project.yaml:\d: not valid YAML"),
        ("", r"project.yaml:1: name: Field required"),
    ],
)
def test_a_project_file_that_is_wrong_is_one_error_with_its_line(folder, text, problem):
    edit(folder, text)
    with pytest.raises(UsageError, match=problem):
        project.load(folder)


def test_the_page_of_documentation_names_every_key():
    root = guidelines.PACKAGED.parents[2]
    page = (root / "docs" / "feedback.md").read_text(encoding="utf-8")
    keys = [*project.Settings.model_fields, *project.ScreeningSection.model_fields]
    assert not [key for key in (*keys, *label_files.FIELDS) if f"`{key}`" not in page]
    assert not [form for form in label_files.FORMS if form not in page]


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\xff", b"x" * 500_001])
def test_guidelines_that_cannot_be_read_are_one_error(folder, content):
    path = folder / "guidelines.md"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UsageError, match=r"guidelines.md: the guidelines "):
        labeling.serve(folder, Access(), print, print)
    with pytest.raises(UsageError, match=r"guidelines.md: the guidelines "):
        sit(folder)


def test_no_project_and_no_store_are_errors(tmp_path, folder):
    with pytest.raises(UsageError, match="there is no labelling project here"):
        project.load(tmp_path)
    for ending in ("-wal", "-shm"):  # SQLite would read the first page from there
        (folder / f"labels.sqlite{ending}").unlink(missing_ok=True)
    (folder / "labels.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(UsageError, match=r"labels.sqlite: this is not a SQLite file, or"):
        sit(folder)
    (folder / "labels.sqlite").unlink()
    with pytest.raises(UsageError, match="there is no store of labels here"):
        labeling.export(folder, tmp_path / "x.jsonl")


def test_tasks_of_other_prompts_are_refused_and_change_nothing(folder, tasks):
    other = tasks.read_text().replace("Name a colour.", "Name a fruit.")
    tasks.write_text(other + json.dumps({"id": "new", "prompt": "x"}) + "\n")
    result = invoke("label", folder, "--add", tasks)
    assert result.exit_code == 3 and "task 'r' differs from the task with this id" in result.stderr
    with project.load(folder).store() as store:
        assert len(store.tasks()) == 4


# ---------------------------------------------------------------------------- notebooks


def test_a_cell_shows_the_page(folder, monkeypatch):
    frames = []
    jupyter = ModuleType("IPython.display")
    jupyter.IFrame = lambda url, **size: SimpleNamespace(url=url, **size)
    jupyter.display = frames.append
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", jupyter)
    server = lora_rlhf.label(folder, height=300)
    try:
        assert lora_rlhf.label(folder) is server
        assert [frame.url for frame in frames] == [server.url] * 2 and frames[0].height == 300
        answer = httpx.get(server.url)
        cookie = answer.headers["set-cookie"]
        assert {"Secure", "SameSite=None", "Partitioned"} <= {p.strip() for p in cookie.split(";")}
        policy = answer.headers["content-security-policy"]
        assert "frame-ancestors http://localhost:*" in policy
    finally:
        server.stop()


def test_colab_shows_the_page_its_own_way(folder, monkeypatch):
    shown = []
    output = ModuleType("google.colab.output")
    output.serve_kernel_port_as_iframe = lambda port, path, height: shown.append((port, path))
    for name, module in (("google", ModuleType("google")), ("google.colab", ModuleType("c"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "google.colab.output", output)
    server = lora_rlhf.label(folder)
    try:
        assert shown == [(server.access.port, f"/?token={server.access.token}")]
        origin = {"origin": "https://8000-abc.prod.colab.dev"}
        token = {"cookie": f"{server.access.cookie}={server.access.token}"}
        state = f"{server.address}api/state"
        assert httpx.get(state, headers=token | origin).status_code == 200
        assert httpx.get(state, headers=token | {"origin": "https://evil.dev"}).status_code == 403
    finally:
        server.stop()
