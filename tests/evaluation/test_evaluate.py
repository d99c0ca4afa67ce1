# SPDX-License-Identifier: Apache-2.0
"""The evaluation stage with a scripted backbone."""

import json
import random

import pytest
from datasets import Dataset

from lora_rlhf import estimates
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.data.closed_world import checkers, generator, vocabulary
from lora_rlhf.errors import DamageError, DataError, NonFiniteError
from lora_rlhf.evaluation import evaluate
from lora_rlhf.recipe.loader import parse_recipe
from lora_rlhf.reports import evaluation_report, html_report, tables
from lora_rlhf.runs import metric_names, samples
from lora_rlhf.runs.record import Record
from lora_rlhf.training.reward import ensemble

EOS = 0


def recipe(**section):
    settings = {"n": 64, "batch_size": 5, "max_new_tokens": 40, "temperature": 0.7, **section}
    lines = "".join(f"  {key}: {value}\n" for key, value in settings.items() if value is not None)
    return parse_recipe(f"name: e\nseed: 11\nmodel:\n  id: tiny\nevaluate:\n{lines}", "e.yaml")


class Scripted:
    """A backbone that answers from a list; token ids are code points, 0 is eos."""

    eos_ids = [EOS]

    def __init__(self, answers, roles=("reference", "policy", "reward")):
        self.answers, self.roles, self.calls = answers, set(roles), []
        self.reward_offset = {"reward": 0.25}

    def has(self, role):
        return role in self.roles

    def encode_prompt(self, prompt):
        return [ord(c) for c in samples.prompt_text(prompt)]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i != EOS)

    def generate(self, prompts, role, **options):
        self.calls.append((role, prompts, options))
        return [[ord(c) for c in text] for text in self.answers[role]]


@pytest.fixture
def heads(monkeypatch):
    """Scores are lengths / 10; log-probs are -1 a token, for SFT -1.5, for the base -1.25."""
    calls = []

    def scores(backbone, sequences, role, batch_size):
        sign = {"reward": 1, "held_out": -1}[role]
        return [sign * len(completion) / 10 for _, completion in sequences]

    def sequence_logprobs(backbone, sequences, role, batch_size, temperature):
        calls.append((role, batch_size, temperature))
        rate = {"policy": -1.0, "reference": -1.5, None: -1.25}[role]
        return [rate * len(completion) for _, completion in sequences]

    def rewards(backbone, sequences, section, batch_size):
        raw = evaluate.scores(backbone, sequences, role="reward", batch_size=batch_size)
        return ensemble.Scores([score + backbone.reward_offset["reward"] for score in raw], [])

    monkeypatch.setattr(ensemble, "scores", rewards)
    for stand_in in (scores, sequence_logprobs):
        monkeypatch.setattr(evaluate, stand_in.__name__, stand_in)
    return calls


def plain_prompts(n=3):
    return Dataset.from_list([{"prompt": f"question {i}"} for i in range(n)])


PLAIN = {
    None: ["aaaaaaaaaa", "bb", "cc"],
    "reference": ["abc\0", "abcde\0", "abcdefg"],
    "policy": ["abcdefghij\0", "abcde\0", "abc\0"],
}


@pytest.fixture
def record(tmp_path):
    return Record.open(tmp_path / "run", recipe())


@pytest.fixture
def plain(record, heads):
    backbone = Scripted(PLAIN)
    evaluate.run(recipe(), backbone, record, plain_prompts())
    return record.data["evaluation"]


def bare(estimate):
    """Without the p of a comparison."""
    return {key: value for key, value in estimate.items() if not key.startswith("p")}


def read_samples(record):
    text = (record.folder / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# --- models and settings ---


def test_every_model_gets_the_same_prompts_seed_and_settings(record, heads):
    backbone = Scripted(PLAIN)
    evaluate.run(recipe(), backbone, record, plain_prompts())
    assert [role for role, _, _ in backbone.calls] == [None, "reference", "policy"]
    prompts, options = backbone.calls[0][1:]
    assert options == {"max_new_tokens": 40, "temperature": 0.7, "seed": 11, "batch_size": 5}
    assert all(call[1:] == (prompts, options) for call in backbone.calls)
    assert heads == [(role, 5, 0.7) for role in (None, "reference", "policy", "reference")], (
        "log-probs need the temperature that sampled"
    )


def test_only_models_that_exist_are_evaluated(record, heads):
    evaluate.run(recipe(), Scripted(PLAIN, roles=["reference"]), record, plain_prompts())
    assert list(record.data["evaluation"]) == ["base", "sft"]
    evaluate.run(recipe(), Scripted(PLAIN, roles=[]), record, plain_prompts())
    assert list(record.data["evaluation"]) == ["base"]
    assert set(record.data["evaluation"]["base"]) == {"length", "eos_rate", "repetition"}


def test_at_most_n_prompts(record, heads):
    backbone = Scripted({role: texts[:2] for role, texts in PLAIN.items()})
    evaluate.run(recipe(n=2), backbone, record, plain_prompts())
    assert record.data["evaluation"]["sft"]["length"]["n"] == 2


def test_answers_may_be_as_long_as_in_the_rollouts(record, heads, monkeypatch):
    monkeypatch.setattr(ppo_stage, "completion_limit", lambda recipe, algorithm: 48)
    for given, used in ((None, 48), (7, 7)):
        backbone = Scripted(PLAIN)
        evaluate.run(recipe(max_new_tokens=given), backbone, record, plain_prompts())
        assert backbone.calls[0][2]["max_new_tokens"] == used
        assert record.data["stages"]["evaluate"]["max_new_tokens"] == used


# --- the numbers of plain prompts ---


def test_proxy_reward_is_centred_and_length_counts_the_end(plain):
    assert plain["policy"]["length"] == estimates.mean_interval([11, 6, 4])
    assert plain["policy"]["proxy_reward"] == estimates.mean_interval([1.35, 0.85, 0.65])
    assert plain["sft"]["eos_rate"] == estimates.wilson(2, 3)
    assert plain["base"]["eos_rate"] == estimates.wilson(0, 3)


def test_kl_is_per_sequence_on_own_samples_and_absent_for_sft(plain):
    assert plain["policy"]["kl"] == estimates.mean_interval([5.5, 3.0, 2.0])
    assert plain["base"]["kl"] == estimates.mean_interval([2.5, 0.5, 0.5])
    assert "kl" not in plain["sft"]


def test_win_rates_are_against_sft_only(plain):
    assert bare(plain["policy"]["win_rate_proxy"]) == estimates.win_rate([11, 6, 4], [4, 6, 7])
    assert plain["policy"]["win_rate_proxy"]["value"] == 0.5
    assert plain["policy"]["longer_than_sft"]["value"] == 0.5
    assert plain["base"]["win_rate_proxy"]["value"] == pytest.approx(1 / 3)
    assert not [name for name in plain["sft"] if "win_rate" in name or "sft" in name]


def test_metrics_that_do_not_apply_are_absent(plain):
    task_metrics = {"gold_reward", "success", "win_rate", "hallucination", "words", "constraint"}
    for values in plain.values():
        assert not task_metrics & set(values)
        assert "held_out_reward" not in values
        assert "incidents_per_1000" not in values


def test_repetition_is_over_tokens_that_can_repeat(plain):
    base = plain["base"]["repetition"]
    assert (base["value"], base["low"], base["n"]) == (pytest.approx(6 / 7), None, 1)
    assert plain["policy"]["repetition"]["value"] == 0.0


def test_the_interval_of_repetition_stays_above_0(record, heads):
    """One answer of ten loops: the interval of a plain mean would begin below 0."""
    ids = [[1, 2, 3, 4, 5]] * 9 + [[6] * 9]
    texts = ["".join(chr(i) for i in one) for one in ids]
    backbone = Scripted({None: texts}, roles=[])
    evaluate.run(recipe(), backbone, record, plain_prompts(10))
    repetition = record.data["evaluation"]["base"]["repetition"]
    assert repetition["value"] == pytest.approx(5 / 60) and repetition["n"] == 10
    assert 0 < repetition["low"] < repetition["value"] < repetition["high"] < 0.6


def test_greedy_answers_have_no_kl(record, heads):
    evaluate.run(recipe(temperature=0), Scripted(PLAIN), record, plain_prompts())
    assert "kl" not in record.data["evaluation"]["policy"]
    assert heads == []
    assert "win_rate_proxy" in record.data["evaluation"]["policy"]


def test_held_out_model_judges_apart_from_the_proxy(record, heads):
    roles = ("reference", "policy", "reward", "held_out")
    evaluate.run(recipe(), Scripted(PLAIN, roles), record, plain_prompts())
    metrics = record.data["evaluation"]["policy"]
    assert metrics["held_out_reward"]["value"] == pytest.approx(-0.7)
    assert bare(metrics["win_rate_held_out"]) == estimates.win_rate([-11, -6, -4], [-4, -6, -7])
    assert "win_rate_held_out_length_controlled" in metrics


def test_nan_names_the_role(record, heads, monkeypatch):
    monkeypatch.setattr(evaluate, "scores", lambda b, s, role, batch_size: [0.0, float("nan"), 0.0])
    with pytest.raises(NonFiniteError, match="reward score of evaluation prompt 1 is nan"):
        evaluate.run(recipe(), Scripted(PLAIN), record, plain_prompts())
    assert not record.done("evaluate")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"prompt": []}, "no prompts"),
        ({"text": ["a"]}, "column"),
        ({"prompt": ["a"], "item": ["{"]}, "item that cannot be read"),
        ({"prompt": ["a"], "item": ['{"family": "answer"}']}, "item that cannot be read"),
    ],
)
def test_unusable_prompts_are_a_data_error(record, heads, rows, message):
    with pytest.raises(DataError, match=message):
        evaluate.run(recipe(), Scripted({None: ["a"]}, roles=[]), record, Dataset.from_dict(rows))


# --- task prompts ---


def task_run(record, n=32):
    """SFT answers right, the base always errs; the policy errs on each harmful prompt only."""
    items = generator.items(n, 3, "evaluate")
    rng = random.Random(0)
    right = [generator.good(item, rng) for item in items]
    wrong = [generator.flawed(item, rng) for item in items]
    comply = [
        generator.flawed(item, rng, "comply") if item.family == "refuse" else text
        for item, text in zip(items, right, strict=True)
    ]
    answers = {None: wrong, "reference": right, "policy": comply}
    rows = [{"prompt": i.prompt, "item": json.dumps(i.to_dict())} for i in items]
    evaluate.run(recipe(), Scripted(answers), record, Dataset.from_list(rows))
    return items, answers, record.data["evaluation"]


def test_task_metrics_have_the_documented_denominators(record, heads):
    items, answers, evaluation = task_run(record)
    judged = [checkers.check(i, text) for i, text in zip(items, answers[None], strict=True)]
    base = evaluation["base"]
    assert base["gold_reward"] == estimates.mean_interval([v.reward for v in judged])
    assert base["words"] == estimates.mean_interval([v.words for v in judged])
    about_records = [v.hallucinated for v in judged if v.hallucinated is not None]
    assert len(about_records) == 20
    assert base["hallucination"] == estimates.wilson(sum(about_records), 20)
    harmless = [v.over_refusal for v in judged if v.over_refusal is not None]
    assert base["over_refusal"] == estimates.wilson(sum(harmless), 28)
    form = [v.constraint for v in judged if v.constraint is not None]
    assert base["constraint"] == estimates.wilson(sum(form), 12)
    assert evaluation["sft"]["success"] == estimates.wilson(32, 32)


def test_incidents_are_per_thousand_harmful_prompts(record, heads):
    _, _, evaluation = task_run(record)
    incidents = evaluation["policy"]["incidents_per_1000"]
    assert incidents == estimates.scaled(estimates.wilson(4, 4), 1000)
    safe = evaluation["sft"]["incidents_per_1000"]
    assert (safe["value"], safe["n"]) == (0.0, 4)
    assert safe["high"] > 400, "no incident in four prompts proves little"


def test_without_harmful_prompts_there_is_no_incident_rate(record, heads):
    items = generator.items(4, 3, "evaluate", ["polite"])
    rows = [{"prompt": i.prompt, "item": json.dumps(i.to_dict())} for i in items]
    answers = {role: ["x"] * 4 for role in (None, "reference", "policy")}
    evaluate.run(recipe(), Scripted(answers), record, Dataset.from_list(rows))
    metrics = set(record.data["evaluation"]["policy"])
    assert "gold_reward" in metrics
    assert not {"incidents_per_1000", "hallucination", "constraint"} & metrics


def test_gold_comparisons_are_paired_with_sft(record, heads):
    items, answers, evaluation = task_run(record)
    gold = {
        role: [checkers.check(i, text).reward for i, text in zip(items, texts, strict=True)]
        for role, texts in answers.items()
    }
    policy = evaluation["policy"]
    assert bare(policy["win_rate"]) == estimates.win_rate(gold["policy"], gold["reference"])
    assert policy["win_rate"]["value"] == (28 / 2) / 32
    expected = estimates.paired_difference(gold["policy"], gold["reference"], seed=11)
    assert bare(policy["gold_reward_minus_sft"]) == expected
    assert expected["value"] == pytest.approx(-2 * 4 / 32)
    assert "win_rate" not in evaluation["sft"]
    assert "gold_reward_minus_sft" not in evaluation["sft"]


def test_prompts_without_an_item_count_only_for_other_metrics(record, heads):
    item = generator.items(1, 3, "evaluate", ["answer"])[0]
    rows = [
        {"prompt": "free", "item": None},
        {"prompt": item.prompt, "item": json.dumps(item.to_dict())},
        {"prompt": "free too", "item": None},
    ]
    evaluate.run(recipe(), Scripted(PLAIN), record, Dataset.from_list(rows))
    metrics = record.data["evaluation"]["policy"]
    assert metrics["gold_reward"]["n"] == 1
    assert metrics["win_rate_length_controlled"]["n"] == 1
    assert metrics["length"]["n"] == 3


def test_each_kind_of_prompt_has_the_metrics_of_its_own_prompts(record, heads):
    """The whole is the mean over kinds; a fall on one kind shows there and nowhere else."""
    items, answers, evaluation = task_run(record, 64)
    by_kind = Record.read(record.folder).data["stages"]["evaluate"]["by_kind"]
    assert list(by_kind) == ["base", "sft", "policy"]
    assert all(set(own) == set(vocabulary.FAMILIES) for own in by_kind.values())
    mean = sum(own["gold_reward"]["value"] for own in by_kind["base"].values()) / 8
    assert mean == pytest.approx(evaluation["base"]["gold_reward"]["value"])
    assert evaluation["base"]["gold_reward"]["n"] == 64
    refused = by_kind["policy"].pop("refuse")
    assert (refused["win_rate"]["value"], refused["win_rate"]["n"]) == (0.0, 8)
    assert refused["gold_reward_minus_sft"]["high"] < 0
    assert all(own["win_rate"]["value"] == 0.5 for own in by_kind["policy"].values())
    lengths = [len(t) for i, t in zip(items, answers[None], strict=True) if i.family == "json"]
    assert by_kind["base"]["json"]["length"] == estimates.mean_interval(lengths)
    assert set(by_kind["base"]["polite"]) < set(by_kind["base"]["answer"])
    sentences = tables.sentences(evaluation, "ppo", by_kind | {"policy": {"refuse": refused}})
    said = " ".join(sentences)
    assert "PPO is clearly worse than SFT on prompts of these kinds: refuse (gold reward -2" in said


def test_abstention_counts_both_ways(record, heads):
    items = generator.items(16, 3, "evaluate", ["answer", "not_stated"])
    denial = "That is not stated in the record."
    right = [generator.good(item, random.Random(0)) for item in items]
    answers = {None: right, "reference": [denial] * 16, "policy": ["I cannot help with that."] * 16}
    rows = [{"prompt": i.prompt, "item": json.dumps(i.to_dict())} for i in items]
    evaluate.run(recipe(), Scripted(answers), record, Dataset.from_list(rows))
    evaluation = record.data["evaluation"]
    shares = {
        model: [evaluation[model][name] for name in ("false_abstention", "missed_abstention")]
        for model in evaluation
    }
    none, every = estimates.wilson(0, 8), estimates.wilson(8, 8)
    assert shares == {"base": [none, none], "sft": [every, none], "policy": [none, every]}
    gaps = [evaluation["policy"][f"{n}_abstention_minus_sft"]["value"] for n in ("false", "missed")]
    assert gaps == [-1, 1]
    by_kind = record.data["stages"]["evaluate"]["by_kind"]["sft"]
    assert "missed_abstention" not in by_kind["answer"]
    assert "false_abstention" not in by_kind["not_stated"]
    said = " ".join(tables.sentences(evaluation, "ppo"))
    assert "PPO answers unanswerable questions more often than SFT" in said
    assert "questions unanswerable" not in said, "it abstains less often than SFT"


# --- record and samples ---


def test_times_are_under_clock_only(record, heads):
    evaluate.run(recipe(), Scripted(PLAIN), record, plain_prompts())
    assert set(record.data["clock"]["evaluation"]["policy"]) == {"seconds", "tokens_per_second"}
    first, samples = dict(record.data), read_samples(record)
    evaluate.run(recipe(), Scripted(PLAIN), record, plain_prompts())
    for part in ("evaluation", "stages"):
        assert record.data[part] == first[part]
    assert read_samples(record) == samples


def test_the_record_has_the_settings(record, heads):
    task_run(record)
    stage = Record.read(record.folder).data["stages"]["evaluate"]
    assert stage["status"] == "done"
    assert (stage["prompts"], stage["seed"], stage["temperature"]) == (32, 11, 0.7)
    assert stage["families"] == dict.fromkeys(vocabulary.FAMILIES, 4)
    assert stage["models"] == ["base", "sft", "policy"]


def test_samples_have_a_line_for_each_prompt_and_model(record, heads):
    items, answers, _ = task_run(record)
    lines = read_samples(record)
    assert [(line["index"], line["model"]) for line in lines[:4]] == [
        (0, "base"),
        (0, "sft"),
        (0, "policy"),
        (1, "base"),
    ]
    assert len(lines) == 96
    line = next(x for x in lines if x["model"] == "policy" and x["family"] == "refuse")
    assert line["prompt"] == items[line["index"]].prompt
    assert line["completion"] == answers["policy"][line["index"]]
    assert line["score"] == line["gold_reward"] == -1.0
    assert line["verdict"]["incident"] is True
    assert line["tokens"] == len(line["completion"])
    assert line["kl"] == pytest.approx(0.5 * line["tokens"])
    assert line["proxy_reward"] == pytest.approx(line["tokens"] / 10 + 0.25)


def test_odd_line_separators_do_not_break_the_samples(record, heads):
    answers = {role: ["a\u2028b\x85c\nd", "e", "f"] for role in PLAIN}
    evaluate.run(recipe(), Scripted(answers), record, plain_prompts())
    lines = read_samples(record)
    assert len(lines) == 9
    assert lines[0]["completion"] == "a\u2028b\x85c\nd"


def test_the_report_has_the_numbers_and_the_words_of_the_record(record, heads):
    """Every number of the record is one of the report's, and the page adds times alone."""
    _, _, evaluation = task_run(record)
    report = evaluation_report.read(record.folder)
    by_kind = record.data["stages"]["evaluate"]["by_kind"]
    assert report["verdict"] == tables.sentences(evaluation, "ppo", by_kind)
    assert report["verdict"] == tables.verdict(record)
    assert report["headline"]["judge"] == "checker"
    assert report["headline"]["sentence"] == report["verdict"][0]
    known = [e for t in report["tables"] for e in t["estimates"].values()]
    known += [d["estimate"] for t in report["tables"] for d in t["differences"]]
    for metrics in evaluation.values():
        assert all(estimate in known for estimate in metrics.values())
    assert {j["name"]: j["trusted"] for j in report["judges"]} == {"checker": True, "reward": False}
    assert len(report["samples"]) == 32 and report["created"] is None and not report["costs"]
    assert report["samples"][0]["answers"]["policy"]["values"]["wins by checker"] is not None
    page = html_report.of_run(Record.read(record.folder)).read_text()
    sentence = report["headline"]["sentence"].replace("'", "&#39;")
    assert sentence in page and "tokens" in page.split('id="cost"')[1]
    path = record.folder / "report.json"
    path.write_text(path.read_text().replace("win rate", "win-rate", 1))
    with pytest.raises(DamageError, match=r"report\.json: its sha256"):
        html_report.of_run(Record.read(record.folder))


def test_sample_table_shows_the_worst_answers(record, heads):
    task_run(record)
    table = samples.sample_table(record, 6)
    assert [row["why"] for row in table] == ["worst"] * 3 + ["first"] * 3
    for row in table[:3]:
        assert row["answers"]["policy"]["family"] == "refuse"
        assert row["answers"]["policy"]["verdict"]["incident"]
        assert set(row["answers"]) == {"base", "sft", "policy"}
    assert [row["index"] for row in table[3:]] == [0, 1, 2]
    base = samples.sample_table(record, 1, "base")[0]["answers"]["base"]["gold_reward"]
    assert base == min(x["gold_reward"] for x in read_samples(record) if x["model"] == "base")
    assert samples.sample_table(record, 0) == []
    assert len(samples.sample_table(record, 500)) == 32


def test_sample_table_without_gold_is_ranked_by_the_proxy(record, heads):
    assert samples.sample_table(record, 4) == []
    evaluate.run(recipe(), Scripted(PLAIN), record, plain_prompts())
    assert [row["index"] for row in samples.sample_table(record, 3)] == [2, 1, 0]


def test_prompts_of_messages_are_shown_as_text():
    hello = {"role": "user", "content": "hello"}
    assert samples.prompt_text([hello]) == "hello"
    system = {"role": "system", "content": "be kind"}
    assert samples.prompt_text([system, hello]) == "system: be kind\nuser: hello"


def test_rows_are_a_table_in_the_order_of_the_metrics(plain):
    header, table = tables.rows({**plain, "best_of_n": {"novel": estimates.wilson(1, 2)}})
    assert header == ["metric", "base", "sft", "policy", "best_of_n"]
    names = [row[0] for row in table]
    known = [name for name in metric_names.METRICS if name in names]
    assert names == [*known, "novel"]
    assert all(len(row) == 5 for row in table)
    kl = table[names.index("kl")]
    assert kl[2] == "", "SFT has no KL to itself, and an empty cell is not a zero"
    assert kl[3].startswith("3.50 [")


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        ((0.41, 0.349, 0.4712, 128), "0.41 [0.35, 0.47] n=128"),
        ((-0.001, -0.5, 0.5, 9), "0.00 [-0.50, 0.50] n=9"),
        ((12.5, 1.25, 812.3, 40), "12.5 [1.2, 812.3] n=40"),
        ((1000.0, 722.4, 1000.0, 10), "1000 [722, 1000] n=10"),
        ((3.0, None, None, 1), "3.00 n=1"),
        (None, ""),
    ],
)
def test_cell(estimate, text):
    keys = ("value", "low", "high", "n")
    given = None if estimate is None else dict(zip(keys, estimate, strict=True))
    assert tables.cell(given) == text


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        ((0.0004, -0.0123, 0.131, 512), "0.000400 [-0.0123, 0.131] n=512"),
        ((0.004, 0.001, 0.3, 9), "0.00400 [0.00100, 0.300] n=9"),
        ((-1.234, -12.0, 5.5e-17, 9), "-1.23 [-12.00, 0.00] n=9"),
        ((0.0, 0.0, 0.0, 9), "0.00 [0.00, 0.00] n=9"),
        ((-0.09996, None, None, 1), "-0.1000 n=1"),
        ((float("nan"), None, None, 3), "nan n=3"),
    ],
)
def test_a_small_difference_is_not_shown_as_zero(estimate, text):
    given = dict(zip(("value", "low", "high", "n"), estimate, strict=True))
    assert tables.cell(given, difference=True) == text
    [[name, shown]] = tables.rows({"policy": {"gold_reward_minus_sft": given}})[1]
    assert shown == text


# --- interrupted ---------------------------------------------------------------------------------


def test_a_model_that_is_done_is_not_evaluated_again(tmp_path, heads, monkeypatch):
    """An evaluation that is killed after two of three models ends with the same numbers."""
    answers = {
        None: ["ab", "c\0", "d"],
        "reference": ["abc", "d\0", "e"],
        "policy": ["f", "gh", ""],
    }
    run = {"base": "x", "evaluate.n": 3}

    def go(folder, identity, until=3):
        backbone, messages = Scripted(answers), []
        real = Scripted.generate

        def generate(self, prompts, role, **options):
            if len(self.calls) == until:
                raise KeyboardInterrupt
            return real(self, prompts, role, **options)

        monkeypatch.setattr(Scripted, "generate", generate)
        record = Record.open(folder, recipe())
        try:
            evaluate.run(recipe(), backbone, record, plain_prompts(), identity, messages.append)
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(Scripted, "generate", real)
        return [role for role, *_ in backbone.calls], messages, record

    _, _, whole = go(tmp_path / "whole", run)
    assert not list((tmp_path / "whole").glob("checkpoints/*")), "a finished stage needs none"
    for case, harm in enumerate((None, "run", "sum", "text")):
        folder = tmp_path / str(case)
        assert go(folder, run, until=2)[0] == [None, "reference"]
        path = folder / "checkpoints" / "evaluate" / "sft.json"
        if harm == "sum":
            content = json.loads(path.read_text())
            content["kept"]["ids"][0][0] += 1
            path.write_text(json.dumps(content))
        elif harm == "text":
            path.write_text(path.read_text()[:-9])
        calls, messages, record = go(folder, {**run, "base": "y"} if harm == "run" else run)
        wanted = {None: ["policy"], "run": [None, "reference", "policy"]}
        assert calls == wanted.get(harm, ["reference", "policy"])
        assert record.data["evaluation"] == whole.data["evaluation"]
        assert record.data["stages"] == whole.data["stages"]
        names = ("samples.jsonl", "report.json")
        assert [(folder / n).read_bytes() for n in names] == [
            (whole.folder / n).read_bytes() for n in names
        ]
        if harm is None:
            assert messages == ["evaluate: base was done before", "evaluate: sft was done before"]
            assert [r["from"] for r in record.data["clock"]["resumed"]] == ["base.json", "sft.json"]
        else:
            assert any("is not used, sft is evaluated again" in line for line in messages)
