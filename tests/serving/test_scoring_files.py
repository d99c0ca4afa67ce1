# SPDX-License-Identifier: Apache-2.0
"""`lora-rlhf score`: answers in a file, ranked by the run's reward model."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import lora_rlhf
from lora_rlhf.cli import app
from lora_rlhf.errors import DataError, UsageError
from lora_rlhf.models import scoring
from lora_rlhf.runs.record import Record
from lora_rlhf.serving import loaded_run, scoring_files
from lora_rlhf.training.reward import ensemble

CHAT = [{"role": "user", "content": "w5 w6"}]
ROWS = [
    {"prompt": "w5 w6", "answers": ["w10 w11", "w50 w5", "w10 w11"]},
    {"prompt": [{"role": "user", "content": "w7"}], "answer": "w9"},
    {"prompt": "w5 w6", "answer": "w40 w41"},
]


@pytest.fixture(scope="module")
def run(runs):
    return runs.after("evaluate")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rewards_are_the_runs_and_ranks_follow_them(run, tmp_path):
    report = lora_rlhf.score(run, write(tmp_path / "a.jsonl", ROWS), out=tmp_path / "out.jsonl")
    backbone, record = loaded_run.load(run)
    section, rows = record.recipe().reward, report["answers"]
    prompt = backbone.encode_prompt(CHAT)
    texts = [row["text"] for row in rows if row["prompt"] == 1]
    assert texts == ["w10 w11", "w50 w5", "w10 w11", "w40 w41"]  # lines of one prompt are joined
    episodes = [(prompt, backbone.encode_completion(text)) for text in texts]
    wanted = ensemble.scores(backbone, episodes, section).rewards
    assert [row["reward"] for row in rows[:4]] == pytest.approx(wanted, abs=1e-4)
    ranks = [row["rank"] for row in rows[:4]]
    assert ranks[0] == ranks[2]
    assert sorted(zip(ranks, wanted, strict=True)) == sorted(
        zip(ranks, wanted, strict=True), key=lambda pair: -pair[1]
    )
    assert rows[4]["rank"] == 1 and rows[4]["where"].endswith("a.jsonl:2")
    assert report["accuracy"] == record.data["stages"]["reward"]["accuracy"]
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == rows


def test_the_file_of_answers_is_not_written_over(run, tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UsageError, match="another file to write"):
        lora_rlhf.score(run, path, out=tmp_path / "." / "a.jsonl")
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS


def test_an_answer_that_is_too_long_gets_no_score_and_says_so(run, tmp_path):
    context = 2048
    rows = [{"prompt": "w5", "answers": ["w9 " * context, "w9"]}]
    said = []
    report = lora_rlhf.score(run, write(tmp_path / "a.jsonl", rows), say=said.append)
    long, short = report["answers"]
    assert long["reward"] is None and long["rank"] is None and short["rank"] == 1
    assert "the context has 2048" in long["note"] and len(said) == 1
    assert "no score" in "\n".join(scoring_files.lines(report))


def test_memory_that_runs_out_makes_smaller_batches_with_the_same_scores(
    run, tmp_path, monkeypatch
):
    path = write(tmp_path / "a.jsonl", ROWS)
    wanted = lora_rlhf.score(run, path)["answers"]
    real, sizes, said = scoring.last_token_scores, [], []

    def small(backbone, ids, *args):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise MemoryError("full")
        return real(backbone, ids, *args)

    monkeypatch.setattr(scoring, "last_token_scores", small)
    got = lora_rlhf.score(run, path, say=said.append)["answers"]
    assert [row["reward"] for row in got] == pytest.approx([r["reward"] for r in wanted], abs=1e-4)
    assert max(sizes) > 2 >= sizes[-1] and "memory ran out" in said[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "not JSON"), ("[1]", "not an object"), ("{}", "one of answers and answer"),
     ('{"prompt": "a", "answers": ["b"], "answer": "c"}', "one of answers and answer"),
     ('{"prompt": "a", "answers": []}', "not a list with at least one"),
     ('{"prompt": "a", "answers": "b"}', "not a list with at least one"),
     ('{"prompt": 3, "answer": "b"}', "prompt is neither"),
     ('{"prompt": [], "answer": "b"}', "prompt is neither"),
     ('{"prompt": [{"role": "robot", "content": "a"}], "answer": "b"}', "prompt is neither"),
     ('{"prompt": "a", "answer": null}', "an answer is not a text"),
     ('{"prompt": "a", "answer": "\\ud800"}', "half of a character")],
)  # fmt: skip
def test_a_bad_line_is_one_error_with_its_place(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + line)
    with pytest.raises(DataError, match=message) as caught:
        list(scoring_files._read(str(path)))
    assert caught.value.where == f"{path}:3"


def test_an_empty_and_an_absent_file_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    for name, why in (("a.jsonl", "no rows"), ("b.jsonl", "read: No such file or directory$")):
        with pytest.raises(DataError, match=why):
            list(scoring_files._read(str(tmp_path / name)))


def test_standard_input(monkeypatch):
    text = json.dumps(ROWS[1]).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))
    [prompt] = scoring_files._read("-")
    assert prompt.answers == [("standard input:1", "w9")]


def test_texts_and_messages_in_one_file_are_one_prompt_layout(run, tmp_path):
    rows = [{"prompt": "w5 w6", "answer": "w9"}, {"prompt": CHAT, "answer": "w9"}]
    report = lora_rlhf.score(run, write(tmp_path / "a.jsonl", rows))
    a, b = report["answers"]
    assert a["reward"] == b["reward"]


def test_a_run_without_a_reward_model_is_refused(runs, tmp_path):
    with pytest.raises(UsageError, match="has no reward model"):
        lora_rlhf.score(runs.after("sft"), write(tmp_path / "a.jsonl", ROWS))


def test_the_verb_prints_a_table_with_the_accuracy_of_the_reward_model(run, tmp_path):
    path = str(write(tmp_path / "a.jsonl", ROWS))
    done = CliRunner().invoke(app.app, ["score", str(run), path])
    share = Record.read(run).data["stages"]["reward"]["accuracy"]
    assert done.exit_code == 0, done.output
    assert "prompt  rank  reward" in done.output
    assert f"{share['value']:.1%} of {share['n']} comparisons [{share['low']:.1%}, " in done.output
    done = CliRunner().invoke(app.app, ["score", str(run), path, "--json"])
    assert json.loads(done.stdout[done.stdout.index("{") :])["members"] == 1


def test_an_ensemble_shows_its_spread():
    row = {"prompt": 1, "where": "a:1", "rank": 1, "reward": 0.5, "std": 0.25, "text": "x\ny"}
    report = {"accuracy": None, "gate": "passed", "members": 3, "answers": [row]}
    text = "\n".join(scoring_files.lines(report))
    assert "std" in text and "0.250" in text and "x y" in text
    assert "3 members" in text and "was not measured" in text
