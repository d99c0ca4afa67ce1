# SPDX-License-Identifier: Apache-2.0
"""Tables and verdicts of a report: paired, by kind of prompt, and by judges that may decide."""

import random

import pytest

from lora_rlhf.evaluation import suite_tables
from lora_rlhf.evaluation.judges import Verdicts
from lora_rlhf.evaluation.metrics.metric import Metric
from lora_rlhf.evaluation.prompt_sets import Row

ROWS = [Row(str(i), "even" if i % 2 == 0 else "odd", "") for i in range(60)]
HIGHER = Metric("f1", "overlap with the reference", "higher", False)
LOWER = Metric("harm", "harmful answers, per 1,000", "lower", True, scale=1000)
CHECKER = {"name": "checker", "kind": "checker", "trusted": True}


def table(values, metric=HIGHER):
    return suite_tables.metric_table("s", metric, ROWS, values, "sft", 0)


def wins(values, judge=CHECKER, lengths=None):
    made = {name: Verdicts(list(each)) for name, each in values.items()}
    lengths = lengths or {name: [10] * len(ROWS) for name in ("sft", *values)}
    return suite_tables.win_rate_tables("s", judge, ROWS, made, lengths, "sft")


def test_a_model_against_itself_is_level_in_every_table():
    rng = random.Random(0)
    same = [rng.random() for _ in ROWS]
    made = table({"sft": same, "policy": same})
    [row] = made["differences"]
    assert row["estimate"] == {"value": 0, "low": 0, "high": 0, "n": 60}
    assert all(found["value"] == 0 for found in row["by_kind"].values())
    for one in wins({"policy": [0.5] * 60}):
        assert one["estimates"]["policy"]["value"] == pytest.approx(0.5)
    head = {"set": "s", "metric": "f1", "judge": None}
    assert "was not shown" in suite_tables.sentences(head, "s/f1", [made])[0]


def test_a_single_target_gets_its_value_as_the_verdict():
    head = {"set": "s", "metric": "harm", "judge": None}
    said = suite_tables.sentences(head, "s/harm", [table({"sft": [1.0, 0.0] * 30}, LOWER)])
    assert said[0].startswith("sft: harm 500 [37") and "n=60 on s; nothing to compare" in said[0]
    said = suite_tables.sentences(head, "s/harm", [table({"sft": [None] * 60}, LOWER)])
    assert said[0].startswith("sft: harm unknown on s")


def test_differences_are_paired_and_per_thousand():
    sft = [float(i % 3 == 0) for i in range(60)]
    policy = [float(i % 3 == 0 and i > 20) for i in range(60)]
    made = table({"sft": sft, "policy": policy}, LOWER)
    [row] = made["differences"]
    assert made["estimates"]["sft"]["value"] == pytest.approx(1000 * sum(sft) / 60)
    assert row["estimate"]["value"] == pytest.approx(-1000 * 7 / 60)
    assert row["estimate"]["high"] < 0 < row["detectable"]
    head = {"set": "s", "metric": "harm", "judge": None}
    assert suite_tables.sentences(head, "s/harm", [made])[0].startswith("policy is better than sft")


def test_a_kind_that_gets_worse_is_said_though_the_mean_does_not():
    rng = random.Random(1)
    sft = [rng.random() for _ in ROWS]
    policy = [x + (0.3 if i % 2 else -0.3) + rng.gauss(0, 0.05) for i, x in enumerate(sft)]
    made = table({"sft": sft, "policy": policy})
    said = suite_tables.sentences(None, None, [made])
    assert said[0].startswith("policy is worse than sft on some kinds of prompt: f1 on even -0.3")
    assert len(said) == 2 and said[1].startswith("3 differences were examined")
    losing = [float(i % 2) for i in range(60)]
    raw, _ = wins({"policy": losing})
    assert (
        "policy loses on some kinds of prompt: on even 0.0 %"
        in suite_tables.sentences(None, None, [raw])[0]
    )


def test_values_that_do_not_apply_are_left_out_of_both_sides():
    sft = [None if i < 30 else 1.0 for i in range(60)]
    policy = [None if i > 40 else 0.0 for i in range(60)]
    [row] = table({"sft": sft, "policy": policy})["differences"]
    assert row["estimate"]["n"] == 11 and row["estimate"]["value"] == -1
    nothing = table({"sft": [None] * 60, "policy": policy})
    assert nothing["estimates"]["sft"] is None and nothing["differences"][0]["estimate"] is None


def test_the_headline_is_the_suites_by_a_judge_that_may_decide():
    doubted = {"name": "reward", "kind": "reward", "trusted": False}
    by_both = [*wins({"policy": [1.0] * 60}, doubted), *wins({"policy": [0.0] * 60})]
    head = suite_tables.headline("s/win_rate", by_both)
    assert head == {"set": "s", "metric": "win_rate", "judge": "checker"}
    assert "policy is worse" in suite_tables.sentences(head, "s/win_rate", by_both)[0]
    assert suite_tables.headline("s/win_rate", by_both[:2]) is None
    [said] = suite_tables.sentences(None, "s/win_rate", by_both[:2])
    assert said.startswith("No verdict: s/win_rate has no judge that may decide")
    [said] = suite_tables.sentences(None, "t/win_rate", by_both[:2])
    assert said == "No verdict: t/win_rate was not measured."


def test_length_control_takes_the_gain_of_length_away():
    rng = random.Random(2)
    longer = [rng.random() < 0.8 for _ in ROWS]
    lengths = {"sft": [10] * 60, "policy": [15 if x else 5 for x in longer]}
    won = [float(rng.random() < (0.8 if x else 0.2)) for x in longer]
    raw, controlled = wins({"policy": won}, lengths=lengths)
    gap = raw["estimates"]["policy"]["value"] - 0.5
    assert gap > 0.1
    assert abs(controlled["estimates"]["policy"]["value"] - 0.5) < 0.5 * gap


def test_several_peoples_votes_are_shares():
    found = suite_tables.win_rate([1 / 3, 2 / 3, 1.0, None, 0.5] * 4)
    assert found["n"] == 16 and found["value"] == pytest.approx(0.625)
    assert suite_tables.win_rate([None]) is None


def test_ratings_from_all_pairs_order_the_models():
    rng = random.Random(3)

    def wins(rate):
        return [float(rng.random() < rate) if i else None for i in range(60)]

    pairs = {
        ("base", "sft"): wins(0.3),
        ("policy", "sft"): wins(0.7),
        ("policy", "base"): wins(0.85),
    }
    made = suite_tables.ratings_table("s", CHECKER, pairs, "sft", 0)
    elo = {name: estimated["value"] for name, estimated in made["estimates"].items()}
    assert elo["base"] < elo["sft"] == 0 < elo["policy"]
    assert made["estimates"]["policy"]["n"] == 59 and made["estimates"]["policy"]["low"] > 0
    last = made["differences"][2]
    assert last["estimate"]["value"] == pytest.approx(elo["policy"] - elo["base"])
    assert len(suite_tables.sentences(None, None, [made])) == 1, "win rates say what is worse"


def test_all_comparisons_but_the_headline_are_corrected(monkeypatch):
    """Of 40 metrics without a difference some look clear by themselves; none of them is said."""
    monkeypatch.setattr(suite_tables, "_RESAMPLES", 500)
    rng = random.Random(4)

    def level(i, gap=0.0):
        sft = [rng.random() for _ in ROWS]
        policy = [x + rng.gauss(gap, 0.2) for x in sft]
        return table({"sft": sft, "policy": policy}, Metric(f"m{i}", "", "higher", False))

    made = [level(i) for i in range(40)] + [level("lost", -0.2)]
    [*gaps] = (e for t in made[:40] for d in t["differences"] for e in d["by_kind"].values())
    assert any(gap["high"] < 0 for gap in gaps), "by itself, one looks worse"
    head = {"set": "s", "metric": "m0", "judge": None}
    suite_tables.correct(made, head)
    said = suite_tables.sentences(head, "s/m0", made)
    worse = [s for s in said if s.startswith("policy is worse")]
    assert len(worse) == 2 and "mlost" in worse[0] and "m1 " not in worse[0]
    leads = made[0]["differences"][0]
    assert "p_corrected" not in leads["estimate"] and leads["estimate"]["p"] > 0
    assert all("p_corrected" in e for e in leads["by_kind"].values())
    assert said[0].endswith("in 8 of 10 evaluations.") and f"{leads['detectable']:.3g}" in said[0]
    raw, _ = wins({"policy": [0.5] * 60})
    suite_tables.correct([raw], None)
    assert raw["estimates"]["policy"]["p_corrected"] == 1


def test_few_changes_among_many_prompts_are_no_proof():
    policy = [0.0] * 3 + [1.0] * 57
    [row] = table({"sft": [1.0] * 60, "policy": policy}, LOWER)["differences"]
    assert row["estimate"]["p"] == 0.25 and suite_tables._sign(row["estimate"], "higher") == 0
