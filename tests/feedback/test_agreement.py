"""Agreement of labelers against published values, scipy and numbers by hand."""

import json

import pytest
from scipy.stats import kendalltau
from simulated_team import label

from lora_rlhf.feedback import agreement
from lora_rlhf.feedback.agreement import Vote, alpha, kendall, measure, raw, tau_b, votes
from lora_rlhf.feedback.labels import Answer, Task


def task(number, kind="ranking", answers=3, about=""):
    prompt = ({"role": "user", "content": f"q{number}"},)
    made = tuple(Answer(f"m{i}", f"a{i}") for i in range(answers))
    return Task(f"t{number}", kind, prompt, made, kind=about)


def cast(rows):
    """Votes of one observer a row; None is missing."""
    return [
        Vote(f"u{unit}", "", f"o{who}", value, f"u{unit}")
        for who, row in enumerate(rows)
        for unit, value in enumerate(row)
        if value is not None
    ]


N = None
KRIPPENDORFF_2011 = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
    [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
]
"""Computing Krippendorff's alpha-reliability, section C: four observers, twelve units."""


@pytest.mark.parametrize(
    ("level", "value"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_of_the_published_example(level, value):
    assert alpha(cast(KRIPPENDORFF_2011), level) == pytest.approx(value, abs=5e-4)


def test_alpha_is_not_defined_without_variation_or_overlap():
    assert alpha(cast([[1, 1], [1, 1]]), "nominal") is None
    assert alpha(cast([[1, N], [N, 2]]), "nominal") is None


@pytest.mark.data
def test_three_raters_of_pandalm(real_data):
    path = real_data / "pandalm" / "testset-v1.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    given = {"1": -2, "2": 2, "0": 0}
    tasks = [task(i, "pair", 2) for i in range(len(rows))]
    labels = [
        label(3 * i + who, tasks[i], f"p{who}", {"strength": given[str(row[f"annotator{who}"])]})
        for i, row in enumerate(rows)
        for who in (1, 2, 3)
    ]
    numbers = measure(tasks, labels)["parts"]["comparisons"]
    assert numbers["alpha"] == pytest.approx(0.864, abs=5e-4)
    assert numbers["labelers"] == 3 and numbers["questions"] == 999


def test_raw_agreement_by_hand():
    tasks = [task(0), task(1)]
    said = {"ann": [[1, 2, 3], [1, 1, 3]], "bob": [[1, 3, 2], [3, 2, 1]]}
    labels = [
        label(i, tasks[n], who, {"ranks": ranks})
        for who, both in said.items()
        for i, (n, ranks) in enumerate(enumerate(both))
    ]
    numbers = measure(tasks, labels)["parts"]["comparisons"]
    # t0: 0-1 and 0-2 equal, 1-2 not. t1: 0-1 is a tie of ann, 0-2 and 1-2 are opposite.
    assert (numbers["raw"]["value"], numbers["raw"]["n"]) == (2 / 5, 5)
    taus = [kendalltau(a, b).statistic for a, b in zip(said["ann"], said["bob"], strict=True)]
    assert numbers["kendall"]["value"] == pytest.approx(sum(taus) / 2)
    assert numbers["questions"] == 6


@pytest.mark.parametrize(
    ("a", "b"),
    [([1, 2, 3, 4], [1, 3, 2, 4]), ([1, 1, 3, 4], [2, 1, 4, 3]), ([1, 1, 1, 4], [4, 2, 2, 1])],
)
def test_tau_b_as_scipy(a, b):
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    verdicts = ([x[i] - x[j] for i, j in pairs] for x in (a, b))
    assert tau_b(*verdicts) == pytest.approx(kendalltau(a, b).statistic)
    assert tau_b([0, 0], [1, 1]) is None


def test_ratings_agree_by_scipy():
    tasks = [task(i, "rating", 1) for i in range(6)]
    said = {"ann": [7, 5, 5, 2, 1, 4], "bob": [6, 6, 3, 2, 2, 5]}
    labels = [
        label(i, tasks[i], who, {"overall": value, "questions": {"opinion": value > 4}})
        for who, values in said.items()
        for i, value in enumerate(values)
    ]
    parts = measure(tasks, labels)["parts"]
    expected = kendalltau(said["ann"], said["bob"]).statistic
    assert parts["rating"]["kendall"]["value"] == pytest.approx(expected)
    assert parts["rating"]["raw"]["value"] == pytest.approx(1 / 6)
    opinions = parts["questions"]["by_question"]["opinion"]
    assert opinions["raw"]["value"] == pytest.approx(4 / 6)
    assert parts["questions"]["by_question"]["violent"]["alpha"] is None


def test_the_last_label_of_a_person_counts_and_skips_do_not():
    one = task(0, "pair", 2)
    labels = [
        label(1, one, "ann", {"strength": -1}),
        label(3, one, "ann", {"strength": 2}),
        label(2, one, "bob", {"strength": 1}),
        label(4, one, "eve", None, flags=("harmful",)),
    ]
    made = votes([one], labels)
    assert {(v.labeler, v.value) for v in made["comparisons"]} == {("ann", 1), ("bob", 1)}
    assert raw(made["comparisons"])["value"] == 1 and kendall(made["comparisons"])["value"] == 1
    flags = [v for v in made["flags"] if v.question == "harmful"]
    assert sorted(v.value for v in flags) == [0, 0, 1]


@pytest.mark.parametrize(("size", "shown"), [(4, False), (5, True)])
def test_a_group_of_fewer_than_five_is_never_shown(size, shown):
    tasks = [task(i, "pair", 2, about="a" if i % 2 else "b") for i in range(4)]
    people = [f"p{i}" for i in range(9)]
    labels = [
        label(10 * i + n, one, who, {"strength": 1 if (n + i) % 3 else -1})
        for i, one in enumerate(tasks)
        for n, who in enumerate(people)
    ]
    groups = {who: "x" if n < size else "" for n, who in enumerate(people)}
    report = measure(tasks, labels, groups)
    part = report["parts"]["comparisons"]
    assert list(part["by_kind"]) == ["a", "b"]
    assert list(part["by_group"]) == (["x"] if shown else [])
    assert report["groups_hidden"] == (not shown)
    assert "x" in json.dumps(report["parts"]) or not shown
    if not shown:
        assert '"x"' not in json.dumps(report)
    assert not any(who in json.dumps(report) for who in people)


def test_people_of_a_group_who_share_no_task_do_not_count():
    tasks = [task(i, "pair", 2) for i in range(5)]
    labels = [label(i, tasks[i], f"p{i}", {"strength": 1}) for i in range(5)]
    labels += [label(9, tasks[0], "p1", {"strength": 1})]
    report = measure(tasks, labels, dict.fromkeys([f"p{i}" for i in range(5)], "x"))
    assert report["parts"]["comparisons"]["by_group"] == {}


def test_fewest_is_five():
    assert agreement.FEWEST == 5
