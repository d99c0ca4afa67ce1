# SPDX-License-Identifier: Apache-2.0
"""The doctor names the right stage for runs broken on purpose, and stays silent on healthy runs.

The runs are real: a tiny random base through `pipeline.run`, and PPO alone where that is enough.
"""

import json
import shutil
import subprocess
import sys

import broken_runs
import pytest
from ppo_run import Run
from small import base_folder, nudge, tokenizer
from typer.testing import CliRunner

from lora_rlhf.algorithms import identities
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.cli import app
from lora_rlhf.reports.doctor import doctor, findings, sft_checks
from lora_rlhf.runs.record import Record

NEAR_CHANCE = sft_checks.NEAR_CHANCE


@pytest.fixture(autouse=True)
def random_answers(monkeypatch):
    """The answers are random words, 20 of 64: no model has less than 0.72 of guessing's loss."""
    monkeypatch.setattr(sft_checks, "NEAR_CHANCE", 0.9)


def names(record, *severities):
    findings = doctor.examine(record)
    return [f.name for f in findings if f.severity in (severities or ("fault",))]


def notable(record):
    """Return the findings, without those on sets that are small in every test."""
    return [f for f in doctor.examine(record) if not f.name.startswith("few_rows")]


def fault(record, name):
    """Return the finding of this name, which must be the first fault."""
    faults = [f for f in doctor.examine(record) if f.severity == "fault"]
    assert faults and faults[0].name == name, faults
    return faults[0]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A run up to the reward model; PPO continues from copies of it."""
    folder = tmp_path_factory.mktemp("healthy")
    broken_runs.run(folder)
    return folder


def continued(folder, name, *overrides, until="ppo"):
    shutil.copytree(folder / "run", folder / name)
    return broken_runs.run(folder, *overrides, until=until, out=name)


@pytest.fixture(scope="module")
def evaluated(healthy):
    return continued(healthy, "evaluated", "ppo.updates=10", until="evaluate")


def edited(record, folder, **changes):
    """A copy of a run's record with other values; keys are dotted paths, '__' for the dot."""
    shutil.copytree(record.folder, folder)
    made = Record.read(folder)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = made.data
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    made.save()
    return made


# ------------------------------------------------------------------- healthy runs


def test_a_healthy_run_has_no_fault(evaluated):
    findings = doctor.examine(evaluated)
    assert [f for f in findings if f.severity != "note"] == []
    assert doctor.verdict(findings) == "no fault found; no warnings"


# ------------------------------------------------------------------- broken on purpose


def test_shuffled_labels(tmp_path):
    finding = fault(broken_runs.run(tmp_path, fault="shuffled"), "reward_at_chance")
    assert finding.stage == "reward" and "n=" in finding.what and "shuffled" in finding.remedy


@pytest.mark.slow
def test_an_untrained_reward_model(tmp_path):
    record = broken_runs.run(tmp_path, "reward.args.learning_rate=1e-12")
    finding = fault(record, "reward_untrained")
    assert finding.stage == "reward" and "8e-13" in finding.what


@pytest.mark.slow
def test_a_reward_that_pays_for_length(tmp_path):
    record = broken_runs.run(
        tmp_path,
        "reward.args.num_train_epochs=4",
        "ppo.args.learning_rate=3e-3",
        "ppo.updates=14",
        "ppo.missing_eos_penalty=0.0",
        "ppo.kl_coef=0.01",
        fault="length",
        until="ppo",
    )
    finding = fault(record, "reward_is_length")
    assert finding.stage == "reward" and "the longer completion gets 1.000" in finding.what
    # The effect on PPO is reported as well, after its cause.
    assert {"length_up", "eos_collapse"} <= set(names(record, "fault", "warning"))


def test_a_learning_rate_a_hundred_times_too_high(healthy):
    record = continued(healthy, "fast", "ppo.args.learning_rate=0.1", "ppo.updates=5")
    finding = fault(record, "learning_rate")
    assert finding.stage == "ppo" and "nats per token after 1 update" in finding.what
    assert "value/loss rose" in finding.what and "learning rate 0.1" in finding.what


@pytest.mark.slow
def test_the_same_with_several_epochs_shows_in_ratios(healthy):
    record = continued(
        healthy,
        "epochs",
        "ppo.args.learning_rate=0.1",
        "ppo.updates=5",
        "ppo.args.num_iterations=4",
    )
    what = fault(record, "learning_rate").what
    assert "clip_fraction" in what and "approx_kl" in what
    assert not {"clip_fraction", "update_too_large", "ratio_max"} & set(names(record))


@pytest.mark.slow
def test_no_kl_penalty(healthy):
    record = continued(
        healthy, "free", "ppo.kl_coef=0.0", "ppo.args.learning_rate=5e-3", "ppo.updates=12"
    )
    finding = fault(record, "no_kl_penalty")
    assert finding.stage == "ppo" and "kl_coef is 0" in finding.what
    assert "kl_high" not in names(record)


def test_no_penalty_is_no_fault_where_the_kl_stays_low(healthy):
    assert not names(continued(healthy, "calm", "ppo.kl_coef=0.0", "ppo.updates=4"))


def test_a_wrong_reference(healthy, monkeypatch):
    """The policy does not start as the reference: PPO stops, and the record says why."""
    real = ppo_stage.start_roles

    def wrong(backbone, recipe):
        real(backbone, recipe)
        nudge(backbone, "policy")

    monkeypatch.setattr(ppo_stage, "start_roles", wrong)
    record = continued(healthy, "wrong")
    assert record.data["stages"]["ppo"]["error"]["type"] == "IdentityError"
    finding = fault(record, "stopped_ppo")
    assert finding.stage == "sft" and "policy and reference differ" in finding.what
    assert "identity" in finding.why and "adapters/sft" in finding.remedy


def test_a_wrong_reference_shows_in_the_log_without_the_guard(tmp_path, monkeypatch):
    monkeypatch.setattr(identities, "policy_equals_reference", lambda *_: 0.0)
    run = Run(tmp_path / "r", updates=1)
    nudge(run.backbone, "policy", std=0.3)
    run.go()
    finding = fault(run.record, "wrong_reference")
    assert finding.stage == "sft" and "before the first update" in finding.what


def test_pad_equal_to_eos_is_fixed_before_the_record(tmp_path, healthy):
    folder = tmp_path / "base"
    shutil.copytree(base_folder("llama"), folder)
    tokenizer(pad="</s>").save_pretrained(folder)
    record = broken_runs.run(tmp_path, f"model.id={folder}", until="sft")
    model = record.data["model"]
    assert model["pad_id"] not in model["eos_ids"] and not names(record)


def test_a_record_in_which_pad_is_eos(evaluated, tmp_path):
    record = edited(evaluated, tmp_path / "r", model__pad_id=1)
    finding = fault(record, "pad_is_eos")
    assert finding.stage == "data" and "never learns to stop" in finding.why


@pytest.mark.slow
def test_completions_that_are_cut_off(tmp_path):
    record = broken_runs.run(
        tmp_path, "sft.args.num_train_epochs=8", "ppo.args.max_completion_length=2", until="ppo"
    )
    finding = next(f for f in doctor.examine(record) if f.name == "few_eos")
    assert (finding.stage, finding.severity) == ("sft", "warning")
    assert "of completions" in finding.what


def test_completions_that_never_end(evaluated, tmp_path):
    """With pad = eos the end token is never learned."""
    lines = [{"completions/eos_rate": 0.0, "completions/length": 12.0} for _ in range(4)]
    finding = fault(logged(evaluated, tmp_path / "r", lines), "no_eos")
    assert finding.stage == "sft" and "0% of completions" in finding.what
    assert "pad = eos" in finding.why


def test_a_stage_that_stopped_without_an_error(healthy, tmp_path):
    record = edited(
        Record.read(healthy / "run"), tmp_path / "r", stages__ppo={"status": "interrupted"}
    )
    [finding] = notable(record)
    assert (finding.stage, finding.severity, finding.name) == ("ppo", "warning", "interrupted")


def test_why_a_run_stopped_is_read(healthy, tmp_path):
    """Also where that was outside of a stage, or no error of ours."""
    stopped = {"type": "DataError", "message": "no rows\n  to do: give more rows"}
    record = edited(Record.read(healthy / "run"), tmp_path / "a", clock__stopped=stopped)
    finding = fault(record, "stopped_ppo")
    assert finding.stage == "data" and finding.what.endswith("DataError: no rows")
    assert finding.remedy == "give more rows"
    broken = {"type": "ZeroDivisionError", "message": "division by zero"}
    changes = {"stages__ppo": {"status": "interrupted"}, "clock__stopped": broken}
    finding = fault(edited(record, tmp_path / "b", **changes), "stopped_ppo")
    assert finding.what == "ppo stopped with ZeroDivisionError: division by zero"
    changes["clock__stopped"] = {"type": "Interrupted", "message": "SIGTERM"}
    [finding] = notable(edited(record, tmp_path / "c", **changes))
    assert (finding.severity, finding.what) == ("note", "ppo was stopped by SIGTERM")


def test_a_run_notes_why_it_stopped_and_forgets_it_when_it_goes_on(healthy, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(ppo_stage, "run", broken)
        with pytest.raises(RuntimeError):
            continued(healthy, "stopped", "ppo.updates=3")
    record = Record.read(healthy / "stopped")
    assert record.data["clock"]["stopped"] == {"type": "RuntimeError", "message": "out of luck"}
    assert fault(record, "stopped_ppo").what.endswith("RuntimeError: out of luck")
    record = broken_runs.run(healthy, "ppo.updates=3", until="ppo", out="stopped")
    assert "stopped" not in record.data["clock"] and "stopped_ppo" not in names(record)


def test_a_learning_rate_is_accused_before_the_reward_model(evaluated, tmp_path):
    lines = [{"learning_rate": 0.1, "policy/entropy": 1.0, "kl/k1": 0.01 + 3.0 * i, "kl/coef": 0.1}
             for i in range(8)]  # fmt: skip
    record = logged(evaluated, tmp_path / "r", lines)
    wins = {"win_rate": rate(0.3, 0.2, 0.4), "win_rate_proxy": rate(0.8, 0.7, 0.9)}
    record.data["evaluation"]["policy"] |= wins
    assert fault(record, "learning_rate").stage == "ppo"
    assert "hacked_win_rate" in names(record, "note")


def test_a_reward_model_with_too_large_a_rate(evaluated, tmp_path):
    lines = [{"accuracy": 0.5, "learning_rate": 0.3, "loss": 0.7 + i} for i in range(12)]
    record = logged(evaluated, tmp_path / "r", lines, "reward")
    record.data["stages"]["reward"] |= {"accuracy": rate(0.5, 0.4, 0.6), "gate": "failed"}
    assert "loss of 10" in fault(record, "reward_learning_rate").what


# ------------------------------------------------------------------- read from the record


def rate(value, low, high, n=200):
    return {"value": value, "low": low, "high": high, "n": n}


RECORDS = {
    "reward_inverted": ("reward", {"stages__reward__accuracy": rate(0.3, 0.2, 0.4)}),
    "reward_at_chance": ("reward", {"stages__reward__accuracy": rate(0.5, 0.4, 0.6),
                                    "stages__reward__gate": "failed"}),
    "reward_is_length": ("reward", {
        "stages__reward__accuracy_length_baseline": rate(0.7, 0.6, 0.8),
        "stages__reward__accuracy_by_length": {"longer": rate(0.9, 0.8, 0.95),
                                               "shorter": rate(0.2, 0.1, 0.3)}}),
    "reward_gate": ("reward", {"stages__reward__gate": "warned",
                               "stages__reward__gate_reason": "it is a test"}),
    "hacked_win_rate": ("reward", {"evaluation__policy__win_rate": rate(0.3, 0.2, 0.4),
                                   "evaluation__policy__win_rate_proxy": rate(0.8, 0.7, 0.9),
                                   "evaluation__policy__longer_than_sft": rate(0.9, 0.8, 0.95)}),
    "worse_win_rate": ("evaluate", {"evaluation__policy__win_rate": rate(0.3, 0.2, 0.4)}),
    "length_win_rate": ("evaluate", {
        "evaluation__policy__win_rate": rate(0.6, 0.55, 0.7),
        "evaluation__policy__win_rate_length_controlled": rate(0.5, 0.4, 0.6)}),
    "kinds_worse": ("evaluate", {"stages__evaluate__by_kind": {
        "policy": {"json": {"gold_reward_minus_sft": rate(-0.2, -0.3, -0.1)}}}}),
    "kinds_false_abstention": ("evaluate", {
        "evaluation__sft__false_abstention": rate(0.1, 0.05, 0.2),
        "evaluation__policy__false_abstention": rate(0.6, 0.5, 0.7),
        "evaluation__policy__false_abstention_minus_sft": rate(0.5, 0.3, 0.7)}),
    "undecided_win_rate": ("evaluate", {"evaluation__policy__win_rate": rate(0.5, 0.45, 0.55)}),
    "few_prompts": ("evaluate", {"evaluation__policy__win_rate": rate(0.9, 0.8, 0.95, n=40)}),
    "held_out_at_chance": ("reward", {"stages__reward__held_out_accuracy": rate(0.5, 0.4, 0.6)}),
    "labels_lean_on_length": ("reward", {
        "stages__reward__accuracy_length_baseline": rate(0.7, 0.6, 0.8)}),
    "sft_overfits": ("sft", {"stages__sft__held_out_loss": 9.0}),
    "sft_below_base": ("sft", {"evaluation__base__gold_reward_minus_sft": rate(0.3, 0.2, 0.4)}),
    "policy_still": ("ppo", {"stages__ppo__kl_last": 1e-4}),
    "agreement_comparisons": ("data", {
        "data__comparisons__labeler_agreement": {"measured": 0.55, "pairs": 90}}),
    "contradictions_comparisons": ("data", {
        "data__comparisons__counts": {"labelled both ways": {"before": 100, "after": 80}}}),
    "filtered_comparisons": ("data", {
        "data__comparisons__counts": {"chosen equal to rejected": {"before": 9, "after": 3}}}),
    "dropped_prompts": ("data", {
        "data__prompts__counts": {"over data.max_prompt_tokens = 9": {"before": 9, "after": 4}}}),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_a_finding_that_needs_only_the_record(evaluated, tmp_path, name):
    stage, changes = RECORDS[name]
    by_name = {f.name: f for f in doctor.examine(edited(evaluated, tmp_path / "r", **changes))}
    assert by_name[name].stage == stage
    assert set(by_name) <= {name, *NOTES}


@pytest.mark.parametrize(
    ("held_out", "losses", "found"),
    [
        (7.7, [7.4, 7.3, 7.3], [("sft_at_chance", "fault")]),
        (5.6, [6.2, 5.7, 5.6], [("sft_at_chance", "warning")]),
        (5.6, [6.2, 1.7, 1.6], [("sft_overfits", "warning")]),
        (7.7, [6.2, 1.7, 1.6], [("sft_overfits", "fault")]),
        (1.3, [2.2, 1.3, 1.2], []),
    ],
)
def test_the_held_out_loss_of_sft_is_compared_with_guessing(held_out, losses, found, monkeypatch):
    """A tiny model on other text had 5.6 of ln(2,048) = 7.62, and no finding."""
    monkeypatch.setattr(sft_checks, "NEAR_CHANCE", NEAR_CHANCE)
    entry = {"held_out_loss": held_out, "chance_loss": 7.624619}
    seen = list(sft_checks._losses(entry, [{"loss": loss} for loss in losses]))
    assert [(f.name, f.severity) for f in seen] == found
    assert all(("guessing has 7.62" in f.what) == (held_out > 3.7) for f in seen)
    entry["args"] = {
        "loss_type": "dft"
    }  # whose training loss is far below the nats of held-out rows
    seen = list(sft_checks._losses(entry, [{"loss": loss} for loss in losses]))
    assert "sft_overfits" not in {f.name for f in seen}


@pytest.mark.parametrize(
    ("layout", "column"),
    [
        ("prompt + completions + ranks", "ranks"),
        ("prompt + completions + scores", "scores"),
        ("prompt + completion + label", "label"),
        ("chosen + rejected", None),
    ],
)
def test_advice_names_only_columns_that_the_data_have(evaluated, tmp_path, layout, column):
    changes = {
        "data__comparisons__read_as": [layout],
        "data__comparisons__counts": {"labelled both ways": {"before": 100, "after": 80}},
        "stages__reward__accuracy": rate(0.3, 0.2, 0.4),
    }
    findings = {f.name: f for f in doctor.examine(edited(evaluated, tmp_path / "r", **changes))}
    for name in ("contradictions_comparisons", "reward_inverted"):
        named = [c for c in ("ranks", "scores", "label") if f"`{c}`" in findings[name].remedy]
        assert named == ([column] if column else [])


@pytest.mark.parametrize(
    ("train", "held_out", "line"),
    [
        (50, 1, "only 50 demonstrations to learn from and only 1 demonstration to test SFT on"),
        (324, 28, "only 28 demonstrations to test SFT on"),
    ],
)
def test_a_note_on_few_rows_names_only_those_that_are_few(train, held_out, line):
    [found] = findings.few_rows("demonstrations", {"train": train, "held_out": held_out})
    assert found.what == line and ("data.held_out" in found.remedy) == (train > 100)
    assert not [*findings.few_rows("demonstrations", {"train": 324, "held_out": 128})]


NOTES = {"few_prompts", "no_judge", "few_rows_demonstrations", "few_rows_comparisons"}
"""Findings on the unedited run: few prompts, and the proxy is the only judge."""


def test_the_worst_probe_of_a_judges_record_in_the_run_is_named(evaluated, tmp_path):
    record = edited(evaluated, tmp_path / "r")
    (record.folder / "judge-other.json").write_text("[]")
    probes = {"padded": rate(0.7, 0.6, 0.8, n=100), "empty": rate(0.1, 0.05, 0.2, n=100)}
    judged = {"judge": f"{record.folder.name}:reward", "probes": probes}
    (record.folder / "judge.json").write_text(json.dumps(judged))
    by_name = {f.name: f for f in doctor.examine(record)}
    assert set(by_name) == {"probes_reward", *NOTES}
    one = by_name["probes_reward"]
    assert (one.stage, one.severity) == ("reward", "warning")
    assert "padded with empty sentences to the better one in 70 % [60, 80]" in one.what
    probes["padded"] = rate(0.5, 0.4, 0.6, n=100)
    (record.folder / "judge.json").write_text(json.dumps(judged))
    assert {f.name: f for f in doctor.examine(record)}["probes_reward"].severity == "note"


def test_an_evaluation_by_the_proxy_on_few_prompts_proves_little(evaluated, tmp_path):
    """Without a checker or a held-out reward model, the proxy is the only judge."""
    changes = {"evaluation__policy__win_rate_proxy": rate(0.42, 0.22, 0.68, n=6)}
    by_name = {f.name: f for f in doctor.examine(edited(evaluated, tmp_path / "r", **changes))}
    assert set(by_name) == NOTES and {f.severity for f in by_name.values()} == {"note"}
    assert "rests on 6 prompts" in by_name["few_prompts"].what
    assert "not clearly above 50 %" in by_name["no_judge"].what
    assert "held_out_model" in by_name["no_judge"].remedy
    clear = {"evaluation__policy__win_rate_proxy": rate(0.9, 0.8, 0.95, n=6)}
    again = {f.name: f for f in doctor.examine(edited(evaluated, tmp_path / "b", **clear))}
    assert "not clearly above" not in again["no_judge"].what


def test_a_wide_interval_is_no_sign_that_length_was_the_gain(evaluated, tmp_path):
    changes = {
        "evaluation__policy__win_rate": rate(0.594, 0.523, 0.654),
        "evaluation__policy__win_rate_length_controlled": rate(0.582, 0.457, 0.697),
    }
    names = {f.name for f in doctor.examine(edited(evaluated, tmp_path / "r", **changes))}
    assert "length_win_rate" not in names


def logged(evaluated, folder, lines, stage="ppo"):
    record = edited(evaluated, folder)
    record.truncate_log(stage)
    for step, line in enumerate(lines):
        record.log(stage, step, line)
    record.note_log(stage)
    return record


def test_gold_that_falls_while_the_proxy_rises(evaluated, tmp_path):
    """The doctor may read the gold reward, because it does not influence training."""
    lines = [
        {"rewards/model": 0.1 * i + 0.05 * (i % 2), "rewards/gold": 0.5 - 0.05 * i}
        for i in range(12)
    ]
    finding = fault(logged(evaluated, tmp_path / "r", lines), "gold_falls")
    assert finding.stage == "reward"


def test_a_loss_of_sft_that_rises(evaluated, tmp_path):
    lines = [{"loss": 2.0 + 0.1 * i * i} for i in range(12)]
    assert fault(logged(evaluated, tmp_path / "r", lines, "sft"), "sft_loss_rises").stage == "sft"


def test_memorised_comparisons(evaluated, tmp_path):
    """Several epochs on shuffled labels: right on the training comparisons only."""
    lines = [{"accuracy": 0.5 + 0.04 * i, "learning_rate": 1e-4} for i in range(12)]
    record = logged(evaluated, tmp_path / "r", lines, "reward")
    record.data["stages"]["reward"] |= {"accuracy": rate(0.5, 0.4, 0.6), "gate": "failed"}
    assert "memorised" in fault(record, "reward_memorised").what


def test_nan_in_the_log_is_text_and_is_found(evaluated, tmp_path):
    record = logged(evaluated, tmp_path / "r", [{"kl/sequence": 0.0, "loss": float("nan")}])
    assert "nan" in names(record)


# ------------------------------------------------------------------- the command


def test_findings_come_in_the_order_of_the_stages(evaluated, tmp_path):
    changes = {
        k: v
        for name in ("worse_win_rate", "reward_inverted", "agreement_comparisons")
        for k, v in RECORDS[name][1].items()
    }
    findings = notable(edited(evaluated, tmp_path / "r", **changes))
    assert [f.stage for f in findings] == ["data", "reward", "evaluate"]
    assert doctor.verdict(findings).startswith("stage at fault: reward (held-out accuracy 0.300")


def test_the_command_prints_findings_and_exits_with_0(evaluated, tmp_path):
    changes = RECORDS["reward_inverted"][1]
    record = edited(evaluated, tmp_path / "r", **changes)
    text = CliRunner().invoke(app.app, ["doctor", str(record.folder)])
    assert text.exit_code == 0
    assert "reward: fault: held-out accuracy 0.300 [0.200, 0.400], n=200" in text.output
    assert "    to do  check for swapped columns" in text.output
    data = json.loads(CliRunner().invoke(app.app, ["doctor", str(record.folder), "--json"]).output)
    assert data["verdict"].startswith("stage at fault: reward")
    [finding] = [f for f in data["findings"] if f["name"] not in NOTES]
    assert list(finding) == ["stage", "severity", "name", "what", "why", "try"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    done = CliRunner().invoke(app.app, ["doctor", str(tmp_path)])
    assert done.exit_code == 2


def test_a_run_that_has_just_begun(tmp_path):
    record = Record(
        tmp_path,
        {"name": "x", "model": {}, "data": {}, "stages": {}, "evaluation": {}, "clock": {}},
    )
    assert doctor.examine(record) == []


def test_no_torch_is_imported(evaluated):
    code = (
        "import sys; from lora_rlhf.reports.doctor import doctor; "
        "from lora_rlhf.runs.record import Record; "
        f"doctor.show(r := Record.read({str(evaluated.folder)!r}), doctor.examine(r)); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
