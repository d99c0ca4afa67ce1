# SPDX-License-Identifier: Apache-2.0
"""Language models as judges: servers, grades, and a LoRA trained on people's labels."""

import json
import math
import random
import re

import pytest
from chat_server import said

from lora_rlhf.errors import AdapterError, DataError, UsageError
from lora_rlhf.evaluation import (
    evaluate_targets,
    judge_probes,
    judge_training,
    judge_validation,
    judges,
    language_judges,
)
from lora_rlhf.evaluation.engine import Engine
from lora_rlhf.evaluation.language_judges import CALIBRATION, LanguageModel, calibration_of
from lora_rlhf.evaluation.prompt_sets import Row
from lora_rlhf.evaluation.verdicts import Pairs
from lora_rlhf.hub.targets import Target, parse
from lora_rlhf.recipe.schema import ModelSection

ROWS = [Row(str(i), "", f"Question {i}?") for i in range(5)]
GOOD, BAD = [f"good {i}" for i in range(5)], [f"bad {i}" for i in range(5)]


def test_a_verdict_that_changes_with_the_order_is_a_tie(monkeypatch):
    judge = LanguageModel("m", engine=None, target=Target("m", "model"))
    odds = [(1.0, 2.0), (-1.0, -0.5), (1.0, -1.0), (-2.0, 0.1), (3.0, 3.0)]
    monkeypatch.setattr(LanguageModel, "odds", lambda *_: odds)
    found = judge.compare(Pairs(ROWS, "aaaaa", "bbbba"))
    assert found.wins == [1.0, 0.0, 0.5, 0.5, 0.5]
    assert found.changed == pytest.approx(2 / 5), "equal answers are a tie, not a change"
    assert found.odds == pytest.approx([1.5, -0.75, 0.0, -0.95, 3.0])


# ------------------------------------------------------------------------------ servers


def served(chat, text="{}"):
    [spec] = judges.parse([text.format(chat.url)])
    return spec.load(None)


def likes_good(asked):
    """Prefer the good answer, by letter or by grade."""
    text = asked["messages"][-1]["content"]
    if "Answer A" in text:
        return said("Answer " + "BA"["good" in text.split("Answer A:")[1].split("Answer B:")[0]])
    return said("Grade: 8" if "good" in text.split("Answer:")[1] else "3.")


@pytest.mark.parametrize("named", ["{}", "pointwise:{}"])
def test_a_server_judges_in_both_orders_or_by_grades(chat, named):
    chat.reply = likes_good
    judge = served(chat, named)
    found = judge.compare(Pairs(ROWS, GOOD, BAD))
    assert found.wins == [1.0] * 5 and not found.failed
    assert judge.compare(Pairs(ROWS, BAD, GOOD)).wins == [0.0] * 5
    assert len(chat.seen) == 10, "no request is sent twice"
    assert judge.compare(Pairs(ROWS, GOOD, GOOD)).wins == [0.5] * 5
    if named == "{}":
        chat.reply = lambda asked: said("A")
        again = served(chat).compare(Pairs(ROWS, GOOD, BAD))
        assert again.wins == [0.5] * 5 and again.changed == 1


def test_replies_without_a_verdict_and_failures_are_counted_and_asked_again(chat, tmp_path):
    def reply(asked):
        text = asked["messages"][-1]["content"]
        number = int(re.search(r"Question (\d)", text)[1])
        return {0: said("Both A and B are fine."), 1: b"{}"}.get(number) or likes_good(asked)

    chat.reply = reply
    judge = served(chat)
    judge.keep = tmp_path / "kept.json"
    found = judge.compare(Pairs(ROWS, GOOD, BAD))
    assert found.wins == [None, None, 1.0, 1.0, 1.0]
    assert found.failed == {"no verdict in the reply": 2, "error": 2}
    chat.reply, before = likes_good, len(chat.seen)
    again = served(chat)
    again.keep = judge.keep
    assert again.compare(Pairs(ROWS, GOOD, BAD)).wins == [None, 1.0, 1.0, 1.0, 1.0]
    assert len(chat.seen) - before == 2, "only the two that failed"


def test_a_judge_that_is_gone_or_too_slow_ends_nothing(chat, monkeypatch):
    chat.reply = lambda asked: b"<html>"
    found = served(chat).compare(Pairs(ROWS * 4, GOOD * 4, BAD * 4))
    assert found.wins == [None] * 20 and found.failed == {"error": 32, "not asked": 8}
    judge = served(chat)

    def slow(*_, **__):
        raise TimeoutError("slow")

    monkeypatch.setattr(judge.server._client, "chat_completion", slow)
    assert judge.compare(Pairs(ROWS[:1], GOOD[:1], BAD[:1])).failed == {"time-out": 2}


def test_a_server_is_compared_with_people(chat, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_probes, "MOST", 2)
    chat.reply = likes_good
    labels = tmp_path / "labels.jsonl"
    rows = [{"prompt": f"q{i}", "a": f"bad {'x' * (i % 9)}", "b": f"good {i}", "labels": ["b"]}
            for i in range(60)]  # fmt: skip
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "judge.json"
    lines = evaluate_targets.check_judge(chat.url, labels, out, n=None, seed=0, base=None)
    assert json.loads(out.read_text())["accuracy"]["value"] == 1
    assert any("it may decide" in line for line in lines), lines


# ------------------------------------------------------------------------------ training


def labelled(n=50):
    """People who like yes better than no."""
    return [
        judge_validation.Labelled(
            Row(str(i), "", f"Question {i}"), *(("yes", "no", (1.0,)), ("no", "yes", (0.0,)))[i % 2]
        )
        for i in range(n)
    ]


def test_a_judge_learns_from_people_and_knows_how_sure_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_training, "LEARNING_RATE", 1e-2)
    monkeypatch.setattr(judge_training, "BATCH", 3)
    monkeypatch.setattr(judge_probes, "MOST", 2)
    monkeypatch.setattr(language_judges, "PAIRWISE", "{prompt} A: {a} B: {b}")
    base = ModelSection(id="tiny")
    engine, (train, calibrate, test) = Engine(base, []), judge_training.split(labelled(), 0, "l")
    prompts = [{one.row.prompt for one in part} for part in (train, calibrate, test)]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    before = LanguageModel("m", engine, Target("", "model"))
    ignorant = judge_validation.validate(before, test, "l")["accuracy"]["value"]
    judge_training.train(engine, train, tmp_path, epochs=2, seed=0)
    again = judge_validation.validate(before, test, "l")["accuracy"]["value"]
    assert ignorant == again <= 0.75, "the LoRA was taken off"
    [target] = parse([str(tmp_path)], base="tiny")
    engine.add(target)
    judge = LanguageModel("m", engine, target)
    judge_training.calibrate(judge, calibrate, tmp_path)
    record = judge_validation.validate(judge, test, "l")
    assert record["accuracy"]["value"] >= 0.9 and record["calibration_error"] < 0.2
    assert calibration_of(target) == (judge.scale, judge.offset) and judge.scale > 0
    (tmp_path / CALIBRATION).write_text('{"scale": "x"}')
    with pytest.raises(AdapterError, match="cannot be read"):
        calibration_of(target)


def test_platt_finds_scale_and_offset_and_turns_no_judge_round():
    rng = random.Random(0)
    odds = [rng.gauss(3, 2) for _ in range(4000)]
    outcomes = [float(rng.random() < 1 / (1 + math.exp(-0.5 * x + 1.5))) for x in odds]
    assert judge_training.platt(odds, outcomes) == pytest.approx((0.5, -1.5), abs=0.15)
    scale, _ = judge_training.platt(odds, [1 - one for one in outcomes])
    assert scale == 0


def test_too_few_prompts_or_what_is_no_model_cannot_be_trained(tmp_path, chat):
    with pytest.raises(DataError, match="answers to 40 prompts of labels"):
        judge_training.split(labelled(40), 0, "labels")
    shared = {"epochs": 1, "n": None, "seed": 0, "base": None}
    with pytest.raises(UsageError, match="cannot be trained"):
        evaluate_targets.train_judge(chat.url, tmp_path / "l.jsonl", tmp_path / "x", **shared)
    with pytest.raises(UsageError, match="exists"):
        (tmp_path / "x").write_text("")
        evaluate_targets.train_judge("tiny", tmp_path / "l.jsonl", tmp_path / "x", **shared)
