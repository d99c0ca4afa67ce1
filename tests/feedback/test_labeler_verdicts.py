"""Verdicts on simulated labelers, the screening test by hand, and the consensus."""

import random
from dataclasses import replace

import pytest
from simulated_team import label, team

from lora_rlhf.feedback.labeler_verdicts import consensus, judge_labelers, screen
from lora_rlhf.feedback.labels import Answer, Task


def named(made, judge=True):
    """The kinds of reasons for each labeler, with the habit."""
    verdicts = judge_labelers(made.tasks, made.labels, made.judge if judge else ())
    return [(made.habits[v.labeler], list(v.reasons)) for v in verdicts]


TEAMS = [
    {"each": 60, "overlap": 0.5},
    {"each": 100, "overlap": 0.2},
    {"each": 40, "overlap": 1.0, "per_overlap": 3},
    {"each": 40, "overlap": 1.0, "per_overlap": 4, "gold_share": 0.0},
]


@pytest.mark.parametrize("seeds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_precision_and_recall_of_the_verdicts(seeds):
    """Twelve people of whom five are not honest; docs/feedback.md has the shares of more teams."""
    teams = enumerate(TEAMS * seeds)
    found = [one for seed, given in teams for one in named(team(seed, **given))]
    assert not [one for one in found if one[0] == "honest" and one[1]]
    shares = {
        habit: [bool(reasons) for who, reasons in found if who == habit]
        for habit in ("spammer", "liar", "left", "copy")
    }
    recall = {habit: sum(of) / len(of) for habit, of in shares.items()}
    bounds = {"spammer": 0.65, "liar": 0.85, "left": 1.0, "copy": 1.0}
    assert not {who: share for who, share in recall.items() if share < bounds[who]}
    reasons = {(who, kinds[0]) for who, kinds in found if kinds}
    assert {("spammer", "chance"), ("liar", "against"), ("left", "side")} <= reasons
    assert {kind for who, kind in reasons if who == "copy"} == {"copies"}


def test_few_labels_name_nobody():
    found = named(team(1, each=8, overlap=0.2))
    assert not [one for one in found if one[0] in ("honest", "spammer", "liar") and one[1]]
    verdicts = judge_labelers(
        *(getattr(team(1, each=8, overlap=0.2), k) for k in ("tasks", "labels"))
    )
    assert all(v.note or v.reliability["low"] > 0 for v in verdicts if not v.named)


def shown_first(task, order, ranks, n):
    return [1 + order.index(answer) for answer in range(len(ranks))]


def longer(task, order, ranks, n):
    lengths = [len(answer.text) for answer in task.answers]
    return [1 + sum(other > mine for other in lengths) for mine in lengths]


HABITS = {
    "right": (lambda *a: [len(a[2]) + 1 - rank for rank in shown_first(*a)], "side"),
    "ties": (lambda *a: [1] * len(a[2]), "side"),
    "longer": (longer, "copies"),
    "shorter": (lambda *a: [len(a[2]) + 1 - rank for rank in longer(*a)], "copies"),
    "first of the file": (lambda *a: [1, 2, 3, 4], "chance"),
    "in turn": (lambda *a: shown_first(*a) if a[3] % 2 else HABITS["right"][0](*a), "chance"),
}


@pytest.mark.parametrize("habit", HABITS)
def test_habits_that_no_threshold_was_made_for(habit):
    made = team(3, each=60, overlap=1.0, per_overlap=4, habits=("honest",) * 8)
    rule, kind = HABITS[habit]
    tasks = {task.id: task for task in made.tasks}
    labels = [
        replace(one, value={"ranks": rule(tasks[one.task], one.order, one.value["ranks"], n)})
        if one.labeler == "p03"
        else one
        for n, one in enumerate(made.labels)
    ]
    verdicts = judge_labelers(made.tasks, labels)
    assert [v.labeler for v in verdicts if v.named] == ["p03"]
    assert kind in verdicts[3].reasons


def test_the_later_one_is_the_copy():
    made = team(5, each=60, overlap=1.0, per_overlap=5, habits=("honest",) * 6)
    source = {one.task: one for one in made.labels if one.labeler == "p01"}
    labels = [
        replace(one, id=one.id + 10**6, value=source[one.task].value)
        if one.labeler == "p04" and one.task in source
        else one
        for one in made.labels
    ]
    verdicts = {v.labeler: v for v in judge_labelers(made.tasks, labels)}
    assert [who for who, v in verdicts.items() if v.named] == ["p04"]
    assert "as p01 does" in verdicts["p04"].reasons["copies"]


def test_gold_decides_against_a_majority_of_liars():
    habits = ("honest",) * 2 + ("liar",) * 4
    made = team(2, each=60, overlap=0.5, gold_share=0.5, habits=habits)
    found = named(made)
    assert {(habit, bool(reasons)) for habit, reasons in found} == {
        ("honest", False),
        ("liar", True),
    }


def test_two_people_who_disagree_do_not_show_who_is_wrong():
    made = team(2, each=60, overlap=1.0, gold_share=0.0, habits=("honest", "liar"))
    verdicts = judge_labelers(made.tasks, made.labels)
    assert [v.named for v in verdicts] == [False, False]
    assert all(v.reliability is None and v.agreement["value"] < 0.5 for v in verdicts)


def test_an_order_that_was_never_shuffled_names_nobody():
    made = team(4, each=40, overlap=1.0, per_overlap=4, habits=("honest",) * 8)
    best_first = [
        replace(one, order=tuple(sorted(range(4), key=lambda i: -made.rewards[one.task][i])))
        for one in made.labels
    ]
    assert not [v for v in judge_labelers(made.tasks, best_first) if v.named]


def test_people_of_another_taste_are_not_named():
    """Four of twelve judge by something that the others do not see, and find each other."""
    rng = random.Random(1)
    tasks, labels = [], []
    for i in range(240):
        answers = tuple(Answer(f"m{n}", "") for n in range(3))
        tasks.append(Task(f"t{i}", "ranking", ({"role": "user", "content": f"{i}"},), answers))
        qualities = [[rng.gauss(0, 1) for _ in answers] for _ in range(2)]
        for who in rng.sample(range(13), 5):  # the last one is a spammer
            seen = [x + rng.gauss(0, 0.7) for x in qualities[who < 4]]
            seen = seen if who < 12 else rng.sample(range(3), 3)
            ranks = [1 + sum(other > x for other in seen) for x in seen]
            order = rng.sample(range(3), 3)
            labels.append(label(len(labels), tasks[-1], f"p{who:02}", {"ranks": ranks}, order))
    verdicts = judge_labelers(tasks, labels)
    assert [v.labeler for v in verdicts if v.named] == ["p12"]
    assert any("another taste" in v.note for v in verdicts[:4])


def test_ratings_are_judged_too():
    rng = random.Random(0)
    tasks, labels = [], []
    for i in range(60):
        tasks.append(
            Task(f"t{i}", "rating", ({"role": "user", "content": f"{i}"},), (Answer("m", ""),))
        )
        quality = rng.gauss(4, 1.5)
        for who in range(6):
            said = rng.gauss(4, 2) if who == 0 else quality + rng.gauss(0, 1)
            said = 7 if who == 1 else min(7, max(1, round(said)))
            labels.append(
                label(6 * i + who, tasks[-1], f"p{who}", {"overall": said, "questions": {}})
            )
    verdicts = judge_labelers(tasks, labels)
    assert [list(v.reasons) for v in verdicts] == [["chance"], ["side"], [], [], [], []]


# --- screening -----------------------------------------------------------------------------------


def ask(number, kind, gold=None, checks=None, model="m"):
    count = {"ranking": 3, "pair": 2, "rating": 1, "demonstration": 0}[kind]
    answers = tuple(Answer(model, f"a{i}") for i in range(count))
    prompt = ({"role": "user", "content": f"q{number}"},)
    return Task(f"t{number}", kind, prompt, answers, gold=gold, checks=checks)


def test_screening_by_hand():
    tasks = [
        ask(0, "ranking", gold={"ranks": [1, 2, 2], "flags": []}),
        ask(1, "ranking", gold={"ranks": [1, 2, 3], "flags": ["harmful"]}),
        ask(2, "demonstration", checks={"max_words": 2}),
        ask(3, "demonstration"),
        ask(4, "rating", model="ann"),
    ]
    labels = [
        label(0, tasks[0], "ann", {"ranks": [1, 3, 2]}),
        label(1, tasks[1], "ann", {"ranks": [3, 2, 1]}, flags=("broken",)),
        label(2, tasks[2], "ann", {"text": "one two three"}),
        label(3, tasks[3], "ann", {"text": "one two three"}),
        label(4, tasks[4], "bob", {"overall": 6, "questions": {}}),
        label(5, tasks[1], "bob", {"ranks": [1, 1, 3]}),
    ]
    found = screen(tasks, labels, {"rankings": 0.9})
    ann, bob = found["ann"], found["bob"]
    assert ann["flags"].estimate["value"] == 1 and ann["flags"].result == "passed"
    assert (ann["rankings"].estimate["value"], ann["rankings"].estimate["n"]) == (2 / 5, 5)
    assert ann["rankings"].result == "unclear"  # two tasks exclude little
    assert ann["demonstrations"].estimate["value"] == (6 + 1) / 2
    assert bob["flags"].estimate["value"] == 0 and bob["flags"].result == "unclear"
    assert bob["rankings"].estimate["value"] == pytest.approx((0.5 + 1 + 1) / 3)


def test_flags_without_gold_are_compared_where_anybody_flagged():
    tasks = [ask(i, "pair") for i in range(30)]
    labels = [
        label(10 * i + n, one, who, {"strength": 1}, flags=("harmful",) if mark(i) else ())
        for i, one in enumerate(tasks)
        for n, (who, mark) in enumerate(
            {"ann": lambda i: i < 10, "bob": lambda i: i < 10, "eve": lambda i: i >= 10}.items()
        )
    ]
    found = screen(tasks, labels)
    assert found["eve"]["flags"].estimate["value"] == 0 and found["eve"]["flags"].result == "below"
    assert found["ann"]["flags"].estimate["value"] == pytest.approx(0.5 * 20 / 30 + 10 * 0.5 / 30)


# --- consensus -----------------------------------------------------------------------------------


def test_a_model_of_labelers_beats_the_majority():
    habits = ("honest",) * 3 + ("spammer", "spammer", "left")
    made = team(6, each=50, overlap=1.0, per_overlap=5, gold_share=0.0, habits=habits)
    ways = consensus(made.tasks, made.labels)

    def right(way):
        pairs = [
            (ranks[a] < ranks[b]) == (made.rewards[task][a] > made.rewards[task][b])
            for task, value in ways[way].items()
            for ranks in [value["ranks"]]
            for a in range(4)
            for b in range(a)
            if made.rewards[task][a] != made.rewards[task][b]
        ]
        return sum(pairs) / len(pairs)

    assert right("model") > right("majority") + 0.03 and right("majority") > 0.6
    assert ways["model"].keys() == ways["majority"].keys()


def test_majority_by_hand():
    tasks = [ask(0, "ranking"), ask(1, "pair"), ask(2, "rating"), ask(3, "pair")]
    given = [
        [{"ranks": [1, 2, 3]}, {"ranks": [1, 3, 2]}, {"ranks": [2, 1, 3]}],
        [{"strength": -1}, {"strength": 3}, {"strength": 0}],
        [{"overall": n, "questions": {}} for n in (6, 6, 2)],
        [{"strength": 2}],
    ]
    labels = [
        label(10 * i + n, tasks[i], f"p{n}", value)
        for i, values in enumerate(given)
        for n, value in enumerate(values)
    ]
    assert consensus(tasks, labels)["majority"] == {
        "t0": {"ranks": [1, 2, 3]},
        "t1": {"strength": 0},
        "t2": {"overall": 6},
    }
