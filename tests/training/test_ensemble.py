# SPDX-License-Identifier: Apache-2.0
"""Reward ensembles: what they combine to, what travels with the run, merging into one adapter."""

import json

import numpy as np
import pytest
import torch
from card_run import estimate, make_run
from peft import PeftModel
from reward_run import DEMONSTRATIONS, last_word, prepared, recipe, run
from small import EPISODES, backbone, batch, nudge
from transformers import AutoModelForSequenceClassification

from lora_rlhf.errors import AdapterError
from lora_rlhf.models import adapters, scoring
from lora_rlhf.recipe.schema import RewardSection
from lora_rlhf.reports.cards import model_card
from lora_rlhf.training.reward import ensemble, reward_stage

EACH = [[1.0, 0.0, -2.0], [3.0, 0.0, 2.0]]


def section(combine="mean", members=2, **more):
    return RewardSection(ensemble=members, combine=combine, **more)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (section("mean"), [2.0, 0.0, 0.0]),
        (section("min"), [1.0, 0.0, -2.0]),
        (section("mean_minus_std"), [1.0, 0.0, -2.0]),
        (section("mean_minus_std", combine_std=0.5), [1.5, 0.0, -1.0]),
    ],
)
def test_combine_by_hand(given, wanted):
    assert ensemble.combine(EACH, given).tolist() == wanted
    shifted = ensemble.combine(np.array(EACH) + 0.75, given)
    assert shifted.tolist() == [w + 0.75 for w in wanted], "one shift of all moves the reward so"


@pytest.fixture
def made():
    torch.manual_seed(0)
    found = backbone("llama", "reference", "reward", "reward_1", "reward_2")
    found.reward_offset = {"reward": 0.5, "reward_1": -0.25, "reward_2": 1.0}
    return found


def test_every_member_has_its_own_offset(made):
    raw = np.array([scoring.scores(made, EPISODES, r) for r in ("reward", "reward_1", "reward_2")])
    each = raw + np.array([[0.5], [-0.25], [1.0]])
    found = ensemble.scores(made, EPISODES, section(members=3))
    assert found.rewards == pytest.approx(each.mean(axis=0).tolist())
    assert found.std == pytest.approx(each.std(axis=0).tolist()) and min(found.std) > 0.01
    alone = ensemble.scores(made, EPISODES, RewardSection())
    assert alone.rewards == pytest.approx(each[0].tolist()) and alone.std == [0, 0, 0]
    assert ensemble.scores(made, EPISODES, section("min", 3)).rewards == pytest.approx(
        each.min(axis=0).tolist()
    )


def test_a_missing_member_is_named(made):
    with pytest.raises(AdapterError, match="lacks reward_3"):
        ensemble.scores(made, EPISODES, section(members=4))


# ------------------------------------------------------------------------------------ merging


def linear_updates(made, role):
    """name of a linear layer -> its update, scale included."""
    found = {}
    for name, parameter in made.role_parameters(role):
        if "lora_A" in name:
            layer = name.replace(".lora_A.weight", "")
            b = dict(made.role_parameters(role))[name.replace("lora_A", "lora_B")]
            config = made.views[role].peft_config[role]
            found[layer] = config.lora_alpha / config.r * (b @ parameter).detach()
    return found


def test_the_merged_adapter_is_the_average_of_the_updates(made):
    members = ("reward", "reward_1", "reward_2")
    with torch.no_grad():
        for role in members[1:]:
            for _, parameter in made.role_parameters(role):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    each = [linear_updates(made, role) for role in members]
    head = torch.stack([made.head(role).weight.detach() for role in members]).mean(0)
    ensemble.average(made, members)
    merged = linear_updates(made, "reward")
    assert merged.keys() == each[0].keys() and len(merged) == 14
    for layer, update in merged.items():
        wanted = torch.stack([one[layer] for one in each]).mean(0)
        assert (update - wanted).abs().max() < 1e-6
        assert (update - each[0][layer]).abs().max() > 1e-3, "the test could not tell"
    assert torch.allclose(made.head("reward").weight, head)
    assert made.stacked("reward") == 3
    assert not made.has("reward_1") and not made.has("reward_2") and made.has("reference")


def test_merging_equal_members_changes_nothing(made):
    for role in ("reward_1", "reward_2"):
        made.copy_role("reward", role)
    before = scoring.scores(made, EPISODES, "reward")
    ensemble.average(made, ("reward", "reward_1", "reward_2"))
    assert scoring.scores(made, EPISODES, "reward") == pytest.approx(before, abs=1e-5)


def test_a_merged_adapter_is_saved_loaded_and_copied_like_any_other(made, tmp_path):
    ensemble.average(made, ("reward", "reward_1", "reward_2"))
    made.reward_offset["reward"] = -0.125
    before = scoring.scores(made, EPISODES, "reward")
    folder = adapters.save_role(made, "reward", tmp_path / "reward")
    made.drop_role("reward")
    adapters.load_role(made, "reward", folder)
    assert scoring.scores(made, EPISODES, "reward") == before
    assert made.reward_offset["reward"] == -0.125
    made.add_role("value", copy_from="reward")  # PPO's value starts as the reward
    ids = batch(made)
    with torch.no_grad(), made.role("value"):
        value = made.head("value")(scoring.hidden_states(made, **ids)[:, -1].float())[:, 0]
    assert value.tolist() == pytest.approx([b - 0.125 for b in before], abs=1e-5)


def test_a_merged_adapter_loads_with_plain_peft(made, tmp_path):
    ensemble.average(made, ("reward", "reward_1", "reward_2"))
    folder = adapters.save_role(made, "reward", tmp_path / "reward")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (12, 24)
    base = AutoModelForSequenceClassification.from_pretrained(
        made.model_section.id, num_labels=1, dtype=torch.float32
    )
    plain = PeftModel.from_pretrained(base, folder).eval()
    check = json.loads((folder / "check.json").read_text())
    with torch.no_grad():
        logits = plain(
            input_ids=torch.tensor(check["input_ids"]),
            attention_mask=torch.tensor(check["attention_mask"]),
        ).logits
    assert logits[:, 0].tolist() == pytest.approx(check["expected"]["score"], abs=1e-5)


@pytest.mark.parametrize("stacked", [0, 17, "3", 1.5])
def test_a_width_that_cannot_be_is_refused(made, tmp_path, stacked):
    folder = adapters.save_role(made, "reward", tmp_path / "reward")
    note = json.loads((folder / "reward.json").read_text())
    (folder / "reward.json").write_text(json.dumps({**note, "stacked": stacked}))
    made.drop_role("reward")
    with pytest.raises(AdapterError, match="stacked"):
        adapters.load_role(made, "reward", folder)
    assert not made.has("reward")


def test_a_wide_adapter_does_not_fit_another_role(made, tmp_path):
    ensemble.average(made, ("reward", "reward_1"))
    folder = adapters.save_role(made, "reward", tmp_path / "reward")
    with pytest.raises(AdapterError, match="shape"):
        adapters.load_role(made, "reward_2", folder)


@pytest.mark.parametrize(("combine", "accuracy"), [("min", 0.611), ("warm", 0.6789)])
def test_a_card_states_the_accuracy_of_the_published_adapter(tmp_path, combine, accuracy):
    def change(data):
        data["stages"]["reward"]["ensemble"] = {
            "members": 2,
            "combine": combine,
            "disagreement": estimate(0.31, 0.2, 0.4, 90),
            "accuracy": [estimate(0.611, 0.55, 0.67, 201), estimate(0.622, 0.56, 0.68, 201)],
        }

    text = model_card.render(make_run(tmp_path, change), "reward")
    assert f"value: {accuracy}" in text
    assert "Ensemble: 2 reward models" in text and "0.622 [0.56, 0.68], n = 201" in text
    assert ("only the first member, and not the whole reward" in text) is (combine == "min")


# ---------------------------------------------------------------------------------- the stage


@pytest.mark.parametrize("combine", ["mean_minus_std", "warm"])
def test_the_stage_trains_judges_and_loads_an_ensemble(tmp_path, combine):
    given = {"ensemble": 2, "combine": combine}
    made, record = run(tmp_path / "run", prepared(last_word, 40), **given)
    chosen = recipe(**given).reward
    entry = record.data["stages"]["reward"]
    found = entry["ensemble"]
    assert entry["gate"] == "passed"
    assert len(found["accuracy"]) == len(found["steps"]) == 2
    assert len(set(found["train_loss"])) == 2, "members differ in seed and order"
    assert found["disagreement"]["value"] > 0 and found["disagreement"]["n"] > 40
    assert entry["accuracy"]["low"] > 0.7 and found["accuracy_of_mean"]["value"] > 0.7
    shown = reward_stage._episodes(made, DEMONSTRATIONS)
    rewards = ensemble.scores(made, shown, chosen).rewards
    assert np.mean(rewards) == pytest.approx(0, abs=1e-5), "as of one reward model"
    names = {"reward"} if combine == "warm" else {"reward", "reward_1"}
    assert {path.name for path in (tmp_path / "run" / "adapters").iterdir()} == names
    assert set(found["roles"]) == names == set(made.views) - {"reference"}
    torch.manual_seed(0)
    again = backbone("llama", "reference")
    reward_stage.load(again, record)
    assert ensemble.scores(again, shown, chosen).rewards == pytest.approx(rewards, abs=1e-5)
    if combine == "warm":
        assert again.stacked("reward") == 2
    nudge(again, "reward")
    assert ensemble.scores(again, shown, chosen).rewards != pytest.approx(rewards, abs=1e-3)
