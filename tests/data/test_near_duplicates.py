# SPDX-License-Identifier: Apache-2.0
"""Near-duplicate prompts, long common beginnings, and overlap with evaluation prompts."""

import random

import pytest
from data_sources import all_rows, jsonl, recipe, removed

from lora_rlhf.data import contamination, dataset_builder
from lora_rlhf.data.filters import FilteredSet, normalised
from lora_rlhf.data.near_duplicates import jaccard, originals, shingles
from lora_rlhf.errors import DataError

RNG = random.Random(0)
WORDS = [f"word{i}" for i in range(500)]


def sentence(n):
    return " ".join(RNG.choices(WORDS, k=n))


def test_originals_are_those_of_a_comparison_of_all_pairs():
    bases = [sentence(40) for _ in range(60)]
    texts = []
    for base in bases:
        words = base.split()
        for changes in (0, 1, 2, 6):
            for place in RNG.sample(range(40), changes):
                words[place] = "other"
            texts.append(" ".join(words))
    RNG.shuffle(texts)
    texts = list(dict.fromkeys(texts))
    sets = [shingles(text) for text in texts]
    similar = {(i, j): jaccard(sets[i], sets[j]) for j in range(len(texts)) for i in range(j)}
    first = originals(texts, 0.7)
    dropped = {j for j, original in enumerate(first) if original != j}
    assert all(similar[first[j], j] >= 0.7 for j in dropped)
    assert not [
        value for (i, j), value in similar.items() if value >= 0.85 and not {i, j} & dropped
    ]
    assert 30 < len(dropped) < len(texts)


def given(**keys):
    data = {k: keys.pop(k) for k in [*keys] if k not in ("demonstrations", "prompts", "evaluate")}
    made = recipe(**keys)
    return made.model_copy(update={"data": made.data.model_copy(update=data)})


def test_near_duplicates_are_dropped_and_other_answers_kept(tmp_path, plain):
    long = sentence(30)
    rows = [{"prompt": sentence(12), "completion": "a"} for _ in range(60)]
    rows += [{"prompt": long, "completion": "a"}, {"prompt": long.upper(), "completion": "b"},
             {"prompt": f"{long} please", "completion": "a"}]  # fmt: skip
    file = jsonl(tmp_path / "d.jsonl", rows)
    prepared = dataset_builder.demonstrations(
        given(demonstrations=file, near_duplicates=0.8), plain
    )
    one_of_them = removed(prepared, "near-duplicate prompt")
    assert one_of_them in (1, 2)  # the file is shuffled: the copy or both originals go
    prepared = dataset_builder.demonstrations(given(demonstrations=file, common_prefix=60), plain)
    assert removed(prepared, "first 60 characters as in an earlier prompt") in (1, 2)
    assert len(all_rows(prepared)) >= 61


def test_an_unasked_filter_is_not_in_the_report(tmp_path, plain):
    rows = [{"prompt": "the same words again", "completion": f"{i}"} for i in range(2)]
    rows += [{"prompt": f"q{i}", "completion": "a"} for i in range(60)]
    prepared = dataset_builder.demonstrations(
        given(demonstrations=jsonl(tmp_path / "d.jsonl", rows)), plain
    )
    reasons = " ".join(prepared.report["counts"])
    assert not [w for w in ("near", "characters", "overlap", "user", "personal") if w in reasons]
    assert not {"personal_data", "contamination", "augmented", "users"} & prepared.report.keys()


EVALUATED = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


@pytest.mark.parametrize(
    ("prompt", "answer", "hit"),
    [
        (f"Please: {EVALUATED.upper()}, ok?", "a", True),
        ("Quote it", f"So: {EVALUATED}", True),
        (EVALUATED.replace("fourteen", "14"), "a", True),
        (EVALUATED.replace(" two", " zwei"), "a", False),
        (EVALUATED.replace("six seven", "sechs sieben"), "a", False),
        ("how are you today", "a", True),
        ("how are you", "fine", False),
    ],
)
def test_rows_that_overlap_evaluation_prompts(prompt, answer, hit):
    sets = {"exam": [EVALUATED, "How are you today"]}
    row = {"prompt": prompt, "completion": answer, "item": ""}
    kept = FilteredSet("demonstrations")
    assert contamination.clean(kept, [row, {**row, "item": "{}"}], sets, "drop")[:-1] == (
        [] if hit else [row]
    )
    assert kept.more["contamination"]["rows"] == ({"exam": 1} if hit else {})


@pytest.mark.parametrize("action", ["warn", "drop"])
def test_contaminated_rows_are_counted_by_set(tmp_path, plain, action):
    rows = [{"prompt": sentence(15), "completion": "a"} for _ in range(60)]
    asked = [{"prompt": rows[i]["prompt"] + " now"} for i in range(10)]
    asked += [{"prompt": sentence(15)} for _ in range(50)]
    files = [jsonl(tmp_path / f"{n}.jsonl", r) for n, r in (("d", rows), ("e", asked))]
    suites = FilteredSet(
        "suites", [{"prompt": row["prompt"], "set": "exam"} for row in rows[10:15]]
    )
    prepared = dataset_builder.demonstrations(
        given(demonstrations=files[0], evaluate=files[1], contamination=action),
        plain,
        {"suites": suites},
    )
    entry = prepared.report["contamination"]
    assert entry["against"] == {"evaluate": 60, "exam": 5}
    in_train = sum(entry["rows"].values())
    assert 10 <= in_train <= 15
    left = {normalised(row["prompt"]) for row in prepared.train}
    contaminated = {normalised(row["prompt"]) for row in rows[:15]}
    assert len(left & contaminated) == (0 if action == "drop" else in_train)
    if action == "warn":
        assert any(n.startswith(contamination.OVERLAP) for n in prepared.report["notes"])
    else:
        assert removed(prepared, contamination.OVERLAP) == in_train


def test_a_set_that_is_mostly_contaminated_stops_the_run(tmp_path, plain):
    rows = [{"prompt": sentence(15), "completion": "a"} for _ in range(60)]
    asked = [{"prompt": f"{row['prompt']} now"} for row in rows]
    files = [jsonl(tmp_path / f"{n}.jsonl", r) for n, r in (("d", rows), ("e", asked))]
    source = given(demonstrations=files[0], evaluate=files[1], contamination="drop", max_lost=0.2)
    with pytest.raises(DataError, match="overlap with evaluation prompts") as caught:
        dataset_builder.demonstrations(source, plain)
    assert "contamination: warn" in caught.value.remedy
