# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline at reduced size: from demonstrations to cards, twice, interrupted, gated."""

import functools
import io
import json
import os
import re
import runpy
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from killed import Runs
from reduced_run import REDUCED, recipe
from rich.console import Console
from typer.testing import CliRunner

import lora_rlhf
from lora_rlhf import pipeline, tiny
from lora_rlhf.algorithms.ppo import ppo_stage, ppo_trainer
from lora_rlhf.cli.app import app
from lora_rlhf.errors import DataError, GateError, RecipeError, SetupError, UsageError
from lora_rlhf.recipe import stage_keys
from lora_rlhf.reports import plots, tables
from lora_rlhf.reports.doctor import doctor, findings
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.progress import Progress, clock
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime.oom import BatchSizeBackoff
from lora_rlhf.serving import loaded_run
from lora_rlhf.training.reward import reward_stage
from lora_rlhf.training.stage_context import StageContext

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "docs" / "quickstart.py"


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `finished` as it was when PPO began."""
    return tmp_path_factory.mktemp("run") / "rewarded"


@pytest.fixture(scope="module")
def finished(rewarded: Path) -> Record:
    """The whole run, not interrupted."""
    real = ppo_stage.run

    def run(*args, **kwargs):
        shutil.copytree(rewarded.parent / "a", rewarded)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_stage, "run", run)
        patch.setattr(pipeline, "plots", plots)
        return pipeline.run(recipe(), rewarded.parent / "a")


def bits(record: Record) -> dict[str, object]:
    """All that two equal runs must share: the record without its clock, metrics and samples."""
    data = {k: v for k, v in record.data.items() if k not in ("clock", "files")}
    lines = [{k: v for k, v in line.items() if k != "clock"} for line in record.metrics()]
    samples = (record.folder / "samples.jsonl").read_text()
    weights = {
        p.parent.name: p.read_bytes()
        for p in record.folder.glob("adapters/*/adapter_model.safetensors")
    }
    return {"record": data, "metrics": lines, "samples": samples, "weights": weights}


@pytest.mark.parametrize(
    ("n", "rows", "reported"), [(24, 24, 24), (512, 24, 24), (3, 24, 3), (100, 100, 0)]
)
def test_few_evaluation_prompts_are_reported_before_training(
    tmp_path, monkeypatch, n, rows, reported
):
    class Training(Exception):
        pass

    def train(context, *_):
        context.record.save()
        raise Training

    printed = []
    progress = Progress(quiet=True)
    monkeypatch.setattr(progress, "say", printed.append)
    monkeypatch.setattr(pipeline.sft, "run", train)
    changes = [f"evaluate.n={n}", f"data.evaluate.0.n={rows}"]
    with pytest.raises(Training):
        pipeline.run(recipe(*changes), tmp_path / "run", progress=progress)
    lines = [line for line in printed if "evaluation rests" in line]
    notes = Record.read(tmp_path / "run").data["data"]["prompts"]["notes"]
    if not reported:
        assert not lines and not notes
        return
    [finding] = findings.few_prompts(reported)
    assert lines == [finding.line()] and "\n" not in finding.line()
    assert f"rests on {reported} prompts" in finding.line() and "evaluate.n" in finding.line()
    assert notes == [f"the evaluation rests on {reported} prompts: only large differences show"]


def test_doctor_and_run_agree_on_few_prompts(finished: Record):
    [finding] = [f for f in doctor.examine(finished) if f.name == "few_prompts"]
    assert [finding] == list(findings.few_prompts(12))


def test_a_run_leaves_everything_a_user_was_promised(finished: Record):
    folder = finished.folder
    assert {p.name for p in (folder / "adapters").iterdir()} == {"sft", "reward", "policy", "value"}
    for adapter in (folder / "adapters").iterdir():
        assert (adapter / "README.md").stat().st_size > 1000
        assert (adapter / "adapter_config.json").is_file()
    assert list((folder / "plots").glob("*.png"))
    assert set(finished.data["evaluation"]) == {"base", "sft", "policy"}
    for metric in ("gold_reward", "hallucination", "length", "kl"):
        assert {"value", "low", "high", "n"} <= set(finished.data["evaluation"]["policy"][metric])
    assert finished.data["stages"]["ppo"]["identities"]["kl_at_start"] == 0
    assert finished.data["stages"]["ppo"]["updates"] == len(finished.metrics("ppo")) == 3
    assert finished.data["files"]["recipe.yaml"]
    for stage in ("sft", "reward", "ppo"):  # the adapters on disk are those of the stages
        entry = finished.data["stages"][stage]
        role = "policy" if stage == "ppo" else stage
        path = f"adapters/{role}/adapter_model.safetensors"
        assert finished.data["files"][path] == entry["adapter_sha256"]


def test_the_policy_moved_away_from_sft(finished: Record):
    stages = finished.data["stages"]
    assert stages["ppo"]["adapter_sha256"] != stages["sft"]["adapter_sha256"]
    assert stages["ppo"]["identities"]["mean_abs_log_ratio_after_first_update"] > 0


def test_a_finished_run_is_not_run_again(finished: Record, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline.Backbone, "load", lambda *_: pytest.fail("the base was loaded"))
    again = pipeline.run(recipe(), finished.folder)
    assert again.data == finished.data


def test_a_run_of_another_recipe_is_refused(finished: Record):
    with pytest.raises(UsageError, match="another recipe"):
        pipeline.run(recipe("ppo.kl_coef=0.1"), finished.folder)
    assert Record.read(finished.folder).data == finished.data


@pytest.mark.slow  # test_resume.py kills, and test_interrupts.py stops, at more places
def test_an_interrupted_run_ends_with_the_same_bits(
    finished: Record, rewarded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped in the middle of PPO, then the same command again."""
    out, real = shutil.copytree(rewarded, tmp_path / "b"), ppo_trainer.PPOTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.update == 1:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ppo_trainer.PPOTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe(), out)
    monkeypatch.undo()
    half = Record.read(out)
    assert half.done("reward") and not half.done("ppo")
    monkeypatch.setattr(reward_stage, "run", lambda *_: pytest.fail("a finished stage ran again"))
    record = pipeline.run(recipe(), out)
    assert bits(record) == bits(finished)


@pytest.fixture(scope="module")
def started(finished: Record) -> str:
    return str(finished.folder)


@pytest.mark.parametrize(
    "algorithm",
    ["dpo", *(pytest.param(a, marks=pytest.mark.slow) for a in ("grpo", "best_of_n"))],
)
def test_a_control_ends_in_the_same_report(
    algorithm: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if algorithm == "grpo":
        monkeypatch.setattr(pipeline, "plots", plots)
    sets = [f"algorithm={algorithm}", "best_of_n.n=3", "ppo.updates=2", "dpo.args.max_steps=3"]
    recipe, started = functools.partial(runs.recipe, "ppo"), runs.after("evaluate")
    record = pipeline.run(recipe(*sets), tmp_path / "run", start_from=started)
    model = "best_of_n" if algorithm == "best_of_n" else "policy"
    evaluation = record.data["evaluation"]
    assert list(evaluation) == ["base", "sft", model] and record.done(algorithm)
    assert evaluation["sft"] == Record.read(started).data["evaluation"]["sft"]
    rows = loaded_run.generate(record.folder, "w5 w6", seed=1, max_new_tokens=8)
    assert [row["model"] for row in rows] == ["base", "sft", model]
    name = {"grpo": "GRPO", "dpo": "DPO", "best_of_n": "best of n"}[algorithm]
    if model == "policy":
        card = (record.adapter("policy") / "README.md").read_text()
        assert name in card and "PPO" not in card.replace("PPO needs", "")
        assert not record.adapter("value").exists()
    else:
        assert evaluation[model]["kl_bound"]["n"] == 0 and "kl" not in evaluation[model]
        assert (
            evaluation[model]["proxy_reward"]["value"] > evaluation["sft"]["proxy_reward"]["value"]
        )
        assert "(bound)" in (record.adapter("sft") / "README.md").read_text()
    assert pipeline.run(recipe(*sets), record.folder).data == record.data  # nothing runs again
    with pytest.raises(UsageError, match=f"read by {algorithm}, which is done"):
        pipeline.run(recipe(*sets, "algorithm=ppo"), record.folder)


def test_stages_are_shared_only_between_equal_recipes(started: str, tmp_path: Path):
    out = tmp_path / "b"
    for change, stage in (
        ("sft.args.learning_rate=2e-3", "sft"),
        ("seed=3", "sft"),
        ("reward.args.learning_rate=2e-3", "reward"),
    ):
        with pytest.raises(UsageError, match=f"(?s){change.split('=')[0]}.*read by {stage}"):
            pipeline.run(recipe(change), out, start_from=started)
    assert not out.exists()
    with pytest.raises(UsageError, match="not a run"):
        pipeline.run(recipe(), out, start_from=tmp_path / "nowhere")
    pipeline.run(recipe("checkpoint.keep=3"), out, start_from=started, until="reward")
    record = pipeline.run(recipe(), out, start_from=started, until="reward")  # given again
    assert record.done("reward")
    other = Record.open(tmp_path / "c", recipe("seed=4"))
    with other.stage("sft") as entry:
        entry["adapter_sha256"] = "0" * 64
    with pytest.raises(UsageError, match="did not start from"):
        pipeline.run(recipe(), other.folder, start_from=started)


def test_runs_that_cannot_finish_are_refused_before_anything(tmp_path: Path, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(UsageError, match="no stage 'ppo' with algorithm: grpo"):
        pipeline.run(recipe("algorithm=grpo"), out, until="ppo")
    with pytest.raises(RecipeError, match="hub.value is set, and GRPO trains no value adapter"):
        pipeline.run(recipe("algorithm=grpo", "hub.value=a/b"), out)
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "4")
            with pytest.raises(SetupError, match=f"{name}=4 is set"):
                pipeline.run(recipe(), out)
    assert not out.exists()


@pytest.mark.slow  # test_tokenization.py counts the reads of a run
def test_comparisons_of_a_file_are_read_once(tmp_path: Path, monkeypatch):
    path = tmp_path / "c.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": "no"}) + "\n"
            for i in range(60)
        )
    )
    reads, real = [], pipeline.dataset_builder.comparisons
    monkeypatch.setattr(
        pipeline.dataset_builder, "comparisons", lambda *a, **k: reads.append(k) or real(*a, **k)
    )
    short = ("sft.args.max_steps=1", "reward.args.max_steps=1")
    with_file = recipe(f"data.comparisons=[{{path: {path}}}]", *short)
    record = pipeline.run(with_file, tmp_path / "run", until="reward")
    assert len(reads) == 1 and record.done("reward")
    path.write_text(path.read_text().replace("no", "nay"))
    changed = recipe(f"data.comparisons=[{{path: {path}}}]", "algorithm=dpo", *short)
    with pytest.raises(DataError, match="changed since reward, which read it"):
        pipeline.run(changed, record.folder)


@pytest.fixture
def copied(finished: Record, tmp_path: Path, monkeypatch) -> Path:
    """A finished run to go on with; nothing of it may need the backbone."""
    monkeypatch.setattr(pipeline.Backbone, "load", lambda *_: pytest.fail("the base was loaded"))
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


def test_a_run_stopped_while_its_cards_are_written_can_be_finished(copied, monkeypatch):
    record = Record.read(copied)
    del record.data["stages"]["card"]
    record.data["files"] = {}
    record.save()

    def stop(*_):
        raise KeyboardInterrupt

    for owner, name in ((pipeline.model_card, "write"), (Record, "seal")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, stop)
            pipeline.run(recipe(), copied)
        assert not Record.read(copied).done("card")
    record = pipeline.run(recipe(), copied)
    assert record.done("card") and record.data["files"]["samples.jsonl"]


def test_a_free_key_that_changes_reaches_cards_and_seal(copied):
    record = pipeline.run(recipe("card.title=Another name"), copied)
    assert "# Another name" in (record.adapter("policy") / "README.md").read_text()
    for path in (copied / "recipe.yaml", record.adapter("policy") / "README.md"):
        assert record.data["files"][str(path.relative_to(copied))] == sha256(path)


@pytest.mark.parametrize(
    "change",
    ["sft.args.per_device_train_batch_size=0", "reward.args.lr_scheduler_kwargs={min_lr: 1}",
     "ppo.args.learning_rate=fast", "report_to=[foo]", "sft.args.activation_offloading=true"],
)  # fmt: skip
def test_bad_args_are_refused_before_anything(change: str, tmp_path: Path):
    with pytest.raises(RecipeError, match=change.split("=")[0].rsplit(".", 1)[0]):
        pipeline.run(recipe(change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def data(record: Record, parsed, **backbone) -> pipeline._Data:
    made = SimpleNamespace(tokenizer=None, backoff=BatchSizeBackoff(), **backbone)
    return pipeline._Data(parsed, record, made, Progress(quiet=True))


def test_two_task_sources_get_answers_of_their_own(tmp_path: Path):
    parsed, drawn = recipe(), []
    record = Record.open(tmp_path / "run", parsed)
    generate = lambda ids, *_, **__: drawn.append(ids) or ids  # noqa: E731
    made = data(record, parsed, encode_prompt=str, decode=str, generate=generate)
    assert made.sample(["a", "b"], 2, 0) == [["a", "a"], ["b", "b"]]
    assert made.sample(["c"], 3, 0) == [["c", "c", "c"]]
    assert made.sample(["a", "b"], 2, 0) == [["a", "a"], ["b", "b"]] and len(drawn) == 2


def test_a_reward_model_that_nobody_needs_is_done(tmp_path: Path):
    parsed = recipe("ppo.reward=gold", "data.comparisons=[]")
    record = Record.open(tmp_path / "run", parsed)
    context = StageContext(parsed, None, record, Progress(quiet=True))
    pipeline._run_stage("reward", context, None, data(record, parsed))
    assert record.done("reward") and "gold" in record.data["stages"]["reward"]["skipped"]
    assert pipeline._finished(parsed, record, "reward")
    assert not pipeline._finished(recipe("data.comparisons=[]"), record, "reward")


@pytest.mark.slow
def test_another_seed_gives_other_numbers(finished: Record, tmp_path: Path):
    record = pipeline.run(recipe("seed=1"), tmp_path / "c", until="sft")
    assert (
        record.data["stages"]["sft"]["adapter_sha256"]
        != finished.data["stages"]["sft"]["adapter_sha256"]
    )


def test_ppo_is_refused_behind_a_failed_gate(finished: Record, tmp_path: Path):
    out = tmp_path / "gated"
    shutil.copytree(finished.folder, out)
    record = Record.read(out)
    record.data["stages"] = {k: record.data["stages"][k] for k in ("sft", "reward")}
    record.data["stages"]["reward"] |= {"gate": "failed", "gate_reason": "it is a test"}
    record.save()
    with pytest.raises(GateError, match="it is a test"):
        pipeline.run(recipe("reward.gate=stop"), out)


def test_missing_data_is_reported_before_training(tmp_path: Path):
    with pytest.raises(DataError):
        pipeline.run(recipe("data.prompts=[{path: nowhere.jsonl}]"), tmp_path / "d")
    assert not Record.read(tmp_path / "d").data["stages"]


def test_generate_answers_as_base_sft_and_policy(finished: Record):
    rows = loaded_run.generate(finished.folder, "Say hello politely.", seed=1)
    assert [row["model"] for row in rows] == ["base", "sft", "policy"]
    assert all(isinstance(row["reward"], float) for row in rows)


SHORT = [
    *REDUCED, "sft.args.max_steps=2", "reward.args.max_steps=2", "ppo.updates=1",
    "ppo.value_warmup_updates=0", "evaluate.n=4",
]  # fmt: skip


@pytest.mark.parametrize("again", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_quickstart_runs(finished, tmp_path: Path, monkeypatch, capsys, again: bool):
    sets = REDUCED if again else SHORT
    if again:
        shutil.copytree(finished.folder, tmp_path / "runs" / "quickstart")
        monkeypatch.setattr(reward_stage, "run", lambda *_: pytest.fail("it ran again"))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    load = lora_rlhf.load_recipe
    monkeypatch.setattr(
        lora_rlhf, "load_recipe", lambda path, given: load(path, [*given, *sets]), raising=False
    )
    assert len(QUICKSTART.read_text().splitlines()) <= 15
    runpy.run_path(str(QUICKSTART))
    assert "policy" in capsys.readouterr().out
    assert os.path.exists("runs/quickstart/record.json")


BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {
    page.relative_to(ROOT).as_posix(): blocks
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if page.parent.name != "tutorials" and (blocks := BLOCK.findall(page.read_text("utf-8")))
}
TUTORIALS = ("own-data", "reward-model", "ppo-or-not", "evaluation", "labels", "serving")
"""In the order in which each needs the files of those before it."""


def test_no_page_hides_its_python():
    """Blocks begin at the start of a line, where the next test finds them."""
    assert len(PAGES["README.md"]) >= 2 and len(PAGES["docs/use.md"]) >= 4
    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert len(re.findall("```py", text)) == len(BLOCK.findall(text)), page
    assert QUICKSTART.read_text().endswith(PAGES["README.md"][0])


@pytest.mark.parametrize(
    "page", [p if p == "README.md" else pytest.param(p, marks=pytest.mark.slow) for p in PAGES]
)
def test_the_python_of_a_page_runs(finished, page: str, tmp_path: Path, monkeypatch):
    """In one namespace per page, with this run under every name that the pages give to theirs."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "mine", "smollm2"):
        shutil.copytree(finished.folder, tmp_path / "runs" / name)
    names: dict[str, object] = {}
    with lora_rlhf.serve("runs/demo", usage="served.sqlite") as server:
        monkeypatch.setenv("OPENAI_API_KEY", server.key)
        for code in PAGES[page]:
            code = code.replace("http://127.0.0.1:8000/v1", server.url)
            code = code.replace("HuggingFaceTB/SmolLM2-1.7B-Instruct", str(tiny.path()))
            if code not in QUICKSTART.read_text():  # which has a test of its own
                exec(compile(code, page, "exec"), names)


def test_each_tutorial_is_in_the_list():
    assert {path.stem for path in (ROOT / "docs" / "tutorials").iterdir()} == {*TUTORIALS}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tutorials_run_one_after_another(tmp_path: Path, monkeypatch):
    """The labeler ranks as the answers stand; a server has a test of its own."""
    monkeypatch.chdir(tmp_path)
    for name in TUTORIALS:
        text = (ROOT / "docs" / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
        blocks = re.findall(r"^```(python|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        assert blocks, name
        for kind, block in blocks:
            if kind == "python":
                exec(compile(block, name, "exec"), {})
                continue
            for line in block.replace("\\\n", " ").splitlines():
                if not line.startswith("lora-rlhf ") or line.startswith("lora-rlhf serve"):
                    continue
                words = shlex.split(line, comments=True)[1:]
                done = CliRunner().invoke(app, words, input="a b c\n" * 9 + "/quit\n")
                assert done.exit_code == 0, f"{name}: {line}\n{done.output[-2000:]}"


def test_the_last_line_asks_what_the_model_was_asked(finished: Record):
    console = Console(file=io.StringIO(), highlight=False)
    tables.show(finished, console)
    (line,) = [x for x in console.file.getvalue().splitlines() if x.startswith("try it")]
    asked = {
        json.loads(x)["prompt"]
        for x in (finished.folder / "samples.jsonl").read_text().splitlines()
    }
    assert shlex.split(line)[-1] in asked


def test_each_finished_stage_leaves_one_line(finished: Record):
    """With its number, its result and its time."""
    lines = [tables.stage_line(finished, stage) for stage in stage_keys.stage_names("ppo")]
    assert [line.split()[:2] for line in lines] == [
        ["1/5", "sft"], ["2/5", "reward"], ["3/5", "ppo"], ["4/5", "evaluate"], ["5/5", "card"],
    ]  # fmt: skip
    reward = finished.data["stages"]["reward"]
    assert f"mean loss {finished.data['stages']['sft']['train_loss']:.3g}, " in lines[0]
    assert f"held-out loss {finished.data['stages']['sft']['held_out_loss']:.3g}" in lines[0]
    assert f"accuracy {tables.cell(reward['accuracy'])}, gate {reward['gate']}" in lines[1]
    assert " -> " in lines[2] and "KL to SFT" in lines[2]
    for line, stage in zip(lines, finished.data["clock"]["stages"].values(), strict=True):
        assert f"done in {clock(stage['seconds'])}" in line
