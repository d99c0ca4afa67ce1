# SPDX-License-Identifier: Apache-2.0
"""Labels as a dataset on the Hub: what is in it, what the card says, and what is never sent."""

import json
import subprocess
import sys
from collections import Counter

import pytest
import yaml
from hub_server import HubServer, hub_env, turn_to

from lora_rlhf.data import row_formats, sources
from lora_rlhf.errors import DataError, HubError, UsageError
from lora_rlhf.feedback import project, publication
from lora_rlhf.feedback.labels import Answer, Label, Task
from lora_rlhf.feedback.publication import Request

GUIDELINES = "# Be kind\n"


def turns(text):
    return ({"role": "user", "content": text},)


def label(task, value, who="Anna Schmidt", sha="", **fields):
    given = {"flags": (), "both_bad": False, "note": "a private note", "order": (0, 1)}
    given |= {"seconds": 2.0, "guidelines": sha, "created": "2026-01-02T00:00:00.000+00:00"}
    return Label(0, task, who, value, **(given | fields))


@pytest.fixture
def tea(tmp_path):
    two = (Answer("secret-model-1", "Yes"), Answer("secret-model-2", "No"))
    system = ({"role": "system", "content": "Be brief."}, *turns("And milk?"))
    there = project.create(tmp_path / "tea", project.Settings(name="Tea", overlap=0.5))
    with there.store() as store:
        store.add_tasks(
            [
                *(Task(f"p{n}", "pair", turns(f"Tea {n}?"), two, why="random") for n in range(3)),
                Task("turns", "pair", system, two, why="like the failure: ada@example.org?"),
                Task("gold", "pair", turns("Gold?"), two, gold={"strength": 1}),
                Task("mail", "pair", turns("Mail ada@example.org?"), two),
                Task("d", "demonstration", turns("Write."), ()),
            ]
        )
        sha = store.acknowledge("Anna Schmidt", GUIDELINES)
        store.add_labels(
            [
                *(label(f"p{n}", {"strength": 2}, sha=sha) for n in range(3)),
                *(label(f"p{n}", {"strength": 1 - n}, "bob", sha) for n in range(3)),
                label("turns", {"strength": -1}, sha=sha),
                label("gold", {"strength": 1}, sha=sha),
                label("mail", {"strength": 1}, flags=("personal_data",)),
                label("d", {"text": "A cup.\u2028And milk."}),  # no end of a row
            ]
        )
    return there


def staged(tea, folder, **options):
    folder.mkdir()
    return publication.stage(tea, Request("acme/tea", **options), folder)


def test_the_files_hold_no_names_no_models_and_no_gold(tea, tmp_path):
    names = staged(tea, tmp_path / "out")
    assert [name for name in names if name.startswith("data")] == [
        f"data/{part}.jsonl{suffix}"
        for part in ("comparisons", "demonstrations")
        for suffix in ("", ".labels.json")
    ]
    text = "".join((tmp_path / "out" / name).read_text() for name in names)
    for hidden in ("Anna", "bob", "secret-model", "Gold?", "ada@", "a private note", str(tmp_path)):
        assert hidden not in text
    rows = sources.read(
        sources.DataSource(path=str(tmp_path / "out/data/comparisons.jsonl")), sources.Skips()
    )
    assert len({row["labeler"] for _, row in rows}) == 2
    assert {type(row["prompt"]) for _, row in rows} == {list}  # one has a system turn: so all
    examples = row_formats.examples(rows, "comparisons", True, Counter(),
                                    sources.Skips())  # fmt: skip
    assert len(examples) == 6  # a tie teaches nothing


def test_the_card_tells_of_people_agreement_and_guidelines(tea, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Coffee?"}) + "\n")
    staged(tea, tmp_path / "out", licence="CC BY 4.0", prompts=prompts)
    card = (tmp_path / "out/README.md").read_text()
    meta = yaml.safe_load(card.split("---\n")[1])
    assert meta["license"] == "cc-by-4.0" and meta["pretty_name"] == "Tea"
    assert [one["config_name"] for one in meta["configs"]] == [
        "comparisons",
        "demonstrations",
        "prompts",
    ]
    for line in (
        "6 labels by 2 people (pair 6); labels of 0 more",
        "Agreement on comparisons (3 questions",
        "Krippendorff's alpha",
        "1 with a known right value",
        "random (3), like the failure (1), not recorded (2)",
        "1 flagged as broken or personal data",
        "flagged their prompt or an answer to it: 1. A program searched",
        "2026-01-02 to 2026-01-02",
        "not recorded: 2 labels",
        "CC BY 4.0",
    ):
        assert line in card, line
    [text] = [path.read_text() for path in (tmp_path / "out/guidelines").iterdir()]
    assert text == GUIDELINES and "8 labels" in card
    assert "Not stated" in (staged(tea, tmp_path / "2") and (tmp_path / "2/README.md").read_text())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("my key is hf_" + "a" * 30, "a Hugging Face token"),
        ("BENCHMARK DATA. canary GUID 26b5c67b-86dc-4073", "the canary of a benchmark"),
    ],
)
def test_secrets_and_benchmarks_are_never_sent(tea, tmp_path, text, problem):
    with tea.store() as store:
        two = (Answer("a", "x"), Answer("b", text))
        store.add_tasks([Task("new", "pair", turns("?"), two)])
        store.add_labels([label("new", {"strength": 1})])
    with pytest.raises(HubError, match=problem) as error:
        staged(tea, tmp_path / "out")
    assert "data/comparisons.jsonl" in error.value.given and text not in str(error.value)


def test_what_cannot_be_published_is_one_error(tea, tmp_path):
    with pytest.raises(UsageError, match="no label by 'eve'"):
        staged(tea, tmp_path / "out", without=("eve",))
    empty = project.create(tmp_path / "empty", project.Settings(name="e"))
    with pytest.raises(DataError, match="there are no labels to publish"):
        staged(empty, tmp_path / "out2")


@pytest.mark.slow  # an interpreter that imports datasets
@pytest.mark.hub
def test_it_loads_where_we_cannot_be_imported(tea, tmp_path, monkeypatch):
    load = (
        "import sys; sys.modules['lora_rlhf'] = None; import datasets, json\n"
        "parts = {n: datasets.load_dataset('acme/tea', n) for n in ('comparisons','prompts')}\n"
        "print(json.dumps({n: {s: rows[:] for s, rows in p.items()} for n, p in parts.items()}))"
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Coffee?"}) + "\n")
    with HubServer(user="tester", token="hf_test", orgs=("acme",)) as hub:
        turn_to(hub, monkeypatch, tmp_path)
        pushed = publication.push(tea.folder, Request("acme/tea", prompts=prompts))
        assert pushed["private"] and pushed["url"].endswith("/datasets/acme/tea")
        assert hub.repos["datasets/acme/tea"].commits[-1].sha == pushed["commit"]
        done = subprocess.run(
            [sys.executable, "-c", load],
            env=hub_env(hub, tmp_path) | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        parts = json.loads(done.stdout.splitlines()[-1])
        assert len(parts["comparisons"]["train"]["ranks"]) == 6
        assert parts["prompts"]["test"]["prompt"][0][0]["content"] == "Coffee?"
        hub.repos["datasets/acme/tea"].private = False
        with pytest.raises(HubError, match="is a public repository"):
            publication.push(tea.folder, Request("acme/tea"))
