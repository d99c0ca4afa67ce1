# SPDX-License-Identifier: Apache-2.0
"""Targets on one base: the same answers, rewards and log-probabilities as the run's own roles."""

import dataclasses
import json
import shutil

import pytest
import torch

from lora_rlhf.data import few_shot
from lora_rlhf.errors import AdapterError, NonFiniteError, UsageError
from lora_rlhf.evaluation import judges, language_judges
from lora_rlhf.evaluation.engine import Engine
from lora_rlhf.evaluation.prompt_sets import Row
from lora_rlhf.evaluation.suite import SetSection, Suite
from lora_rlhf.evaluation.verdicts import Pairs
from lora_rlhf.hub import targets
from lora_rlhf.runs import samples
from lora_rlhf.runs.record import Record
from lora_rlhf.serving import loaded_run, vllm_engine
from lora_rlhf.serving.inference import InferenceEngine

SUITE = Suite(name="little", temperature=1.0, seed=5, max_new_tokens=8,
              sets=[SetSection(name="x", format="plain")])  # fmt: skip
TEXTS = ("w7 w8", "w9", "w5 w6 w7 w8")
ROWS = [Row(str(i), "", [{"role": "user", "content": text}]) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def run(runs):
    return runs.after("evaluate")


@pytest.fixture(scope="module")
def engine(run):
    named = targets.parse([str(run)])
    return Engine(named[0].base, named), named


def test_a_run_is_three_targets(run):
    named = targets.parse([str(run)])
    assert [t.name.split(":")[1] for t in named] == ["base", "sft", "policy"]
    assert targets.parse([f"{run}:policy"]) == named[2:]
    assert [t.name for t in targets.parse([f"{run}:sft"] * 2)] == [
        named[1].name,
        f"{named[1].name} 2",
    ]


def test_runs_of_one_name_are_numbered_as_a_whole(run, tmp_path):
    """So that the SFT of `a/demo` is never taken for that of `b/demo`, nor its reward model."""
    other = tmp_path / run.name
    shutil.copytree(run, other)
    named = targets.parse([str(run), str(other)])
    assert [t.name.rpartition(":")[::2] for t in named] == [
        (name, model) for name in (run.name, f"{run.name} 2") for model in ("base", "sft", "policy")
    ]
    specs = judges.of_targets(named)
    for spec in specs:
        assert spec.name.startswith(f"{run.name} 2:") == spec.folder.startswith(str(other))


def test_a_classifier_answers_nothing(run, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    for text in (str(run / "adapters" / "reward"), str(tmp_path)):
        with pytest.raises(UsageError, match="scores answers and writes none"):
            targets.check_text(targets.parse([text], base="tiny"))
    targets.check_text(targets.parse([str(run), str(run / "adapters" / "sft")], base="tiny"))


def test_an_adapter_folder_finds_its_base(run, tmp_path):
    [found] = targets.parse([str(run / "adapters" / "policy")])
    assert (found.kind, found.name) == ("adapter", "policy")
    assert found.base.id == Record.read(run).data["model"]["id"] or found.base.id
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="names no base model"):
        targets.parse([str(tmp_path)])
    assert targets.parse([str(tmp_path)], base="tiny")[0].base.id == "tiny"


def test_what_is_no_target_is_refused(tmp_path, run):
    for text in (str(tmp_path), "nowhere", str(tmp_path / "x" / "y")):
        with pytest.raises(UsageError, match="no run, model or adapter"):
            targets.parse([text])


def test_a_server_is_offered_only_where_one_is_accepted(tmp_path):
    for given, match in (
        (["http://x/v1"], "cannot be loaded"),
        ([str(tmp_path)], "no run"),
        ([], "nothing is named"),
    ):
        with pytest.raises(UsageError, match=match) as refused:
            targets.parse(given, servers=False)
        assert "expected: a run" in str(refused.value)
        assert "URL" not in str(refused.value) and "a Hub id" in str(refused.value)
    for load in (InferenceEngine.load, vllm_engine.prepare):
        with pytest.raises(UsageError, match="cannot be loaded"):
            load(["http://127.0.0.1:1/v1"])


def test_answers_are_those_of_the_runs_roles(engine, run):
    made, named = engine
    backbone, _ = loaded_run.load(run)
    prompts = [backbone.encode_prompt(row.prompt) for row in ROWS]
    for target, role in zip(named, (None, "reference", "policy"), strict=True):
        ids = backbone.generate(prompts, role, max_new_tokens=8, temperature=1.0, seed=5)
        answers = made.answer(target, ROWS, SUITE)
        assert [a.text for a in answers] == [backbone.decode(one) for one in ids]
        assert [a.tokens for a in answers] == [len(one) for one in ids]


def test_rewards_are_those_in_the_runs_samples(engine, run):
    made, named = engine
    [held_out, reward] = judges.of_targets(named)
    assert (held_out.independent, reward.independent) == (True, False)
    judge = held_out.load(made)
    by_prompt = samples.read(Record.read(run))
    lines = [one["policy"] for one in by_prompt.values()]
    rows = [
        Row(str(i), "", [{"role": "user", "content": x["prompt"]}]) for i, x in enumerate(lines)
    ]
    found = judge.scores(rows, [line["completion"] for line in lines])
    whole = [
        i
        for i, line in enumerate(lines)  # special tokens inside an answer are in no text
        if line["finished"]
        and len(made.base.encode_completion(line["completion"])) == line["tokens"]
    ]
    assert len(whole) > 3
    for i in whole:
        assert found[i] == pytest.approx(lines[i]["held_out_reward"], abs=1e-4)


def test_the_base_is_bare_while_reward_adapters_are_loaded(run):
    named = targets.parse([f"{run}:base"])
    made = Engine(named[0].base, named)
    before = made.options(named[0]).logprobs("w5 w6", [" w7", " w8 w9"])
    judges.of_targets(named)[0].load(made)
    made.rewards(judges.of_targets(named)[0].name, [ROWS[0].prompt], ["w5"], 4)
    assert made.options(named[0]).logprobs("w5 w6", [" w7", " w8 w9"]) == before


def test_log_probabilities_are_the_models(engine):
    made, named = engine
    target = named[2]
    ids = [5, 6, 7, 8, 9]
    with made.active(target), torch.no_grad():
        logits = made.base.causal(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [float(logits[1, 7]), float(logits[1, 7] + logits[2, 8] + logits[3, 9])]
    found = made.options(target).logprobs("w5 w6", [" w7", " w7 w8 w9"])
    assert found == pytest.approx(wanted, abs=1e-4)
    assert made.options(target).logprobs("w5 w6 ", ["w7"]) == pytest.approx(wanted[:1], abs=1e-4)


def test_letters_after_a_context_take_one_forward(engine):
    made, named = engine
    options = made.options(named[2])
    contexts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    found = options.next_token(contexts, ["w20", "w21"])
    for ids, (a, b) in zip(contexts, found, strict=True):
        text = " ".join(f"w{i}" for i in ids)
        assert [a, b] == pytest.approx(options.logprobs(text, [" w20", " w21"]), abs=1e-4)
    judge = language_judges.LanguageModel("m", made, named[2])
    [(_, shown_second)] = judge.odds(["w5"], ["w7"], ["w8"])
    [(swapped, _)] = judge.odds(["w5"], ["w8"], ["w7"])
    assert shown_second == pytest.approx(-swapped, abs=1e-5)
    rows = [Row("1", "", "w5"), Row("2", "", "w5 " * 3000)]
    pairs = Pairs(rows, ["w7", "w7"], ["w8", "w8"])
    compared = judge.compare(pairs)
    assert None not in compared.wins[:1] and compared.wins[1] is None, "beyond the context"
    [held_out, _] = judges.of_targets(named)
    compared = held_out.load(made).compare(pairs)
    assert None not in compared.wins[:1] and compared.wins[1] is None, "for a reward model too"


def test_an_adapter_of_another_base_is_refused(run):
    [target] = targets.parse([str(run / "adapters" / "policy")], base="tiny")
    with pytest.raises(AdapterError, match="another base"):
        Engine(target.base, [target])


def test_examples_come_before_the_prompt_of_a_bare_base():
    text = few_shot.without_template([{"role": "user", "content": "Why?"}], 2)
    assert text.count("Instruction:") == 3 and text.endswith("Instruction: Why?\nAnswer:")
    assert few_shot.without_template("Why?", 0) == "Why?"
    assert few_shot.completed(" Because.\n\nInstruction: more") == "Because."
    assert few_shot.completed(" Because.") == " Because."


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="adapter_config.json: cannot be read"):
        targets.parse([str(tmp_path)])


def test_adapters_of_one_name_stay_apart(run, tmp_path):
    """Names that differ in signs only, and a judge that has a target's name."""
    for name, role in (("a-b", "sft"), ("a_b", "policy")):
        shutil.copytree(run / "adapters" / role, tmp_path / name)
    named = [targets.parse([str(tmp_path / name)], base="tiny")[0] for name in ("a-b", "a_b")]
    section = targets.parse([str(run)])[0].base
    made = Engine(section, named)
    other = dataclasses.replace(named[1], name="a-b")
    made.add(other)
    first, second, same = (made.options(t).logprobs("w5 w6", [" w7"]) for t in (*named, other))
    assert first != second == same


def test_what_changes_an_answer_is_in_its_identity(run, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(run / "adapters" / "policy", folder)
    [target] = targets.parse([str(folder)], base="tiny")
    before = target.describe()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    assert target.describe() != before

    section = targets.parse([str(run)])[0].base
    made = Engine(section, [])
    before = made.identity
    made.base.tokenizer.chat_template = "{{ messages }}"
    assert made.identity != before and before == Engine(section, []).identity


def test_a_cut_answer_counts_its_own_tokens(engine, monkeypatch):
    made, named = engine
    monkeypatch.setattr(made.base.tokenizer, "chat_template", None)
    monkeypatch.setattr(made.base, "decode", lambda ids: "w7 w8\nInstruction: w9 w9 w9")
    rows = [Row("1", "", "w5")]
    [found] = made.answer(named[0], rows, SUITE)
    assert (found.text, found.tokens, found.finished) == ("w7 w8", 3, True)


def test_log_probabilities_that_are_no_numbers_are_an_error(engine, monkeypatch):
    made, named = engine
    head = made.base.causal.get_output_embeddings()
    with head.register_forward_hook(lambda *_: torch.full_like(_[2], torch.nan)):
        with pytest.raises(NonFiniteError, match="a text's log-probability is nan"):
            made.options(named[0]).text_logprob("w5 w6")
        with pytest.raises(NonFiniteError, match="a judge's log-probability is nan"):
            language_judges.LanguageModel("m", made, named[2]).odds(["w5"], ["w7"], ["w8"])
