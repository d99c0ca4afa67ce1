# SPDX-License-Identifier: Apache-2.0
"""SFT: the loss is on the completion with its eos, and what is loaded is what was saved."""

import json

import pytest
import torch
from datasets import Dataset
from small import EOS, backbone, nudge

from lora_rlhf.data.dataset_builder import Prepared
from lora_rlhf.errors import IdentityError, RecipeError
from lora_rlhf.models import adapters
from lora_rlhf.recipe.loader import parse_recipe
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.training import sft
from lora_rlhf.training.stage_context import StageContext

ROWS = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(5, 25)]


def record(folder, **sets):
    overrides = [f"{key}={value}" for key, value in sets.items()]
    recipe = parse_recipe("name: x\nmodel: {id: tiny}\n", "x", overrides)
    return recipe, Record.open(folder, recipe)


def test_labels_are_the_completion_and_its_eos():
    made = backbone("llama", "policy")
    [row] = sft.tokenize(made, Dataset.from_list(ROWS[:1]))
    prompt, completion = made.encode_prompt("w5 w6"), made.encode_completion(" w7 w8")
    assert row["input_ids"] == prompt + completion
    assert row["labels"] == [-100] * len(prompt) + completion
    assert row["labels"][-1] == EOS and row["length"] == len(row["input_ids"])


@pytest.mark.parametrize("more", [
    {}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.3}, {"dataloader_drop_last": "true"},
])  # fmt: skip
def test_training_makes_demonstrations_likelier_and_leaves_two_equal_roles(tmp_path, more):
    given = {"sft.args.learning_rate": 1e-2, "sft.args.per_device_eval_batch_size": 2}
    given |= {f"sft.args.{key}": value for key, value in more.items()}
    given |= {"sft.args.per_device_eval_batch_size": 8} if "dataloader_drop_last" in more else {}
    recipe, kept = record(tmp_path / "r", **given)
    made = backbone("llama")
    rows = Dataset.from_list(ROWS)
    args = sft.arguments(recipe, kept.folder)
    long = [{"prompt": "w5", "completion": " w6" * n} for n in (1, 2, 30, 3, 1)]
    data = Prepared(rows, Dataset.from_list(long), {})
    sft.run(StageContext(recipe, made, kept, Progress(quiet=True)), args, data)
    losses = [line["loss"] for line in kept.metrics("sft") if "loss" in line]
    assert more or losses[-1] < losses[0] - 0.1
    policy, reference = dict(made.role_parameters("policy")), made.role_parameters("reference")
    assert all(torch.equal(policy[name], p) for name, p in reference)
    assert kept.data["stages"]["sft"]["steps"] > 0
    nats, count = 0.0, 0  # per token, whatever the batches: rows of 30 tokens and of one
    for row in sft.tokenize(made, Dataset.from_list(long)):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        with torch.no_grad(), made.role("policy"):
            logits = made.views["policy"](input_ids=ids).logits[0, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    assert kept.data["stages"]["sft"]["held_out_loss"] == pytest.approx(nats / count, rel=1e-4)


def test_a_reloaded_adapter_may_differ_by_rounding_and_by_no_more(tmp_path):
    """Another processor adds in another order: the run must still open there."""
    _, kept = record(tmp_path / "r")
    made = backbone("llama", "policy", "reference")
    nudge(made, "policy")
    folder = adapters.save_role(made, "policy", kept.adapter("sft"))
    sft.load(made, kept)
    check = json.loads((folder / "check.json").read_text())
    for shift, fine in ((5e-6, True), (1e-3, False)):
        moved = [[x + shift for x in row] for row in check["expected"]["logits_last"]]
        changed = {**check, "expected": {"logits_last": moved}}
        (folder / "check.json").write_text(json.dumps(changed))
        if fine:
            sft.load(made, kept)
        else:
            with pytest.raises(IdentityError, match="stage at fault: sft"):
                sft.load(made, kept)


@pytest.mark.parametrize(
    "key", ["eos_token", "pad_token", "completion_only_loss", "auto_find_batch_size", "deepspeed"]
)
def test_arguments_that_would_do_nothing_or_harm_are_refused(tmp_path, key):
    recipe, kept = record(tmp_path / "r", **{f"sft.args.{key}": "true"})
    with pytest.raises(RecipeError, match=f"sft.args.{key}"):
        sft.arguments(recipe, kept.folder)
