# SPDX-License-Identifier: Apache-2.0
"""Counterfactual pairs: only the person differs, and who is treated differently is found."""

import json
import re

import pytest

from lora_rlhf import estimates
from lora_rlhf.evaluation import counterfactual, evaluate_targets, prompt_sets, suite_tables
from lora_rlhf.evaluation.metrics.registry import METRICS

PAIRS = prompt_sets.load("c", format="counterfactual", generated=counterfactual.generated)
OTHER = counterfactual.swapped(PAIRS)


def test_prompts_of_a_pair_differ_in_the_person_alone():
    assert all(len(a.prompt.split()) == len(b.prompt.split())
               for a, b in zip(PAIRS.rows, OTHER.rows, strict=True))  # fmt: skip
    assert [row.id for row in PAIRS.rows] == [row.id for row in OTHER.rows]
    assert len({row.id for row in PAIRS.rows}) == len(PAIRS.rows) >= 150
    for row, other in zip(PAIRS.rows, OTHER.rows, strict=True):
        one, two = re.fullmatch(r".*: (.+) - (.+)", row.id).groups()
        assert row.prompt != other.prompt and re.sub(rf"\b{one}\b", two, row.prompt) == other.prompt


def tables(answer):
    """The tables of one model, whose answer depends on the prompt."""
    made = []
    for name in ("counterfactual_refused", "counterfactual_words"):
        by_set = [[METRICS[name].score(row, answer(row.prompt)) for row in prompts.rows]
                  for prompts in (OTHER, PAIRS)]  # fmt: skip
        swaps = suite_tables.swaps(METRICS[name], OTHER.rows, *({"m": v} for v in by_set), 0)
        made.append({"metric": name, "swaps": swaps, "differences": []})
    suite_tables.correct(made, None)
    return made


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda text: "Here is what I would do: ask politely.", None),
        (lambda text: text, None),
        (lambda text: "I can't help with that." if re.search("Muslim|Hindu|Jew|Budd", text) else
         "Here is a plan: first, ask politely.", "religion: counterfactual_refused +1e+03"),
        (lambda text: "Yes, of course. " * (4 if re.search("Jamal|Lakisha|Tyrone|Ebony", text) else
                                            5), "race: counterfactual_words -3"),
    ],
    ids=["same", "echo", "refuses a religion", "shorter for a race"],
)  # fmt: skip
def test_who_is_treated_differently_is_found_after_correction(answer, said):
    [sentence] = suite_tables._by_identity(tables(answer))
    if said is None:
        assert sentence.startswith("No model was shown to treat people differently by identity (")
    else:
        assert sentence.startswith("m treats people differently by identity (") and said in sentence
        kinds = {s["kind"] for t in tables(answer) for s in t["swaps"]
                 if s["estimate"]["p_corrected"] < 0.05}  # fmt: skip
        assert kinds == {said.partition(":")[0]}


def test_p_values_are_exact_on_few_pairs():
    assert estimates.sign_flip_p([1, 2, 3], [0, 0, 0], 0) == pytest.approx(2 / 8, abs=0.02)
    assert estimates.sign_flip_p([1, 2], [1, 2], 0) == 1


def test_own_pairs_and_rewards_are_in_the_report(runs, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"w{i} w6", "swapped": f"w{i} w7", "kind": "k"} for i in range(8, 12)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "s.yaml"
    shared = f"format: counterfactual, path: {pairs}, metrics: [counterfactual_words]"
    file.write_text(
        f"version: 1\nname: s\nmax_new_tokens: 4\nsets:\n- {{name: c, {shared}}}\n"
        f"- {{name: p, {shared}, stress: [case], win_rate: true}}\n"
    )
    folder = evaluate_targets.evaluate_targets(
        [str(runs.after("evaluate"))], suite=str(file), out=tmp_path / "out"
    )
    report = json.loads((folder / "report.json").read_text())
    by_name = {(t["set"], t["metric"]): t for t in report["tables"]}
    words = by_name["c swapped", "counterfactual_words"]
    assert [s["kind"] for s in words["swaps"]] == ["k"] * 3
    [reward] = [t for (name, m), t in by_name.items() if name == "c swapped" and "held_out" in m]
    assert {s["target"] for s in reward["swaps"]} == set(words["estimates"])
    found = [s["estimate"] for t in (words, reward) for s in t["swaps"]]
    assert all(0 < one["p"] <= one["p_corrected"] <= 1 for one in found)
    wins = [t for t in report["tables"] if (t["set"], t["metric"]) == ("p under case", "win_rate")]
    assert wins and all(t["from_clean"].keys() == t["estimates"].keys() for t in wins)
    assert any("identities, corrected with all" in line for line in report["verdict"])
