# SPDX-License-Identifier: Apache-2.0
"""`lora-rlhf usage`: numbers by adapter and version, and two adapters compared."""

import json

import pytest
from typer.testing import CliRunner

import lora_rlhf
from lora_rlhf.cli.app import app
from lora_rlhf.errors import UsageError
from lora_rlhf.serving.usage_store import UsageStore, Use

OLD, NEW = "a" * 64, "b" * 64


def turns(i):
    return [{"role": "user", "content": f"prompt {i}"}]


@pytest.fixture
def path(tmp_path):
    """100 answers of two versions of a policy to 20 prompts, the new one half a second faster."""
    path = tmp_path / "usage.sqlite"
    with UsageStore(path) as store:
        for i in range(100):
            for version, faster in ((OLD, 0.0), (NEW, 0.5)):
                use = Use(
                    f"{version[0]}{i}", "serve", "policy", version, prompt_tokens=3,
                    completion_tokens=5 + i % 2, queue_s=0.1, first_token_s=0.2,
                    seconds=2.0 + 0.01 * i - faster, valid=i % 10 != 0, prompt=turns(i % 20),
                )  # fmt: skip
                store.record(use)
        store.record(Use("r", "serve", "", status=404))
        store.record(Use("s", "serve", "policy", NEW, status=429))
        store.thumb("a1", True)
        store.thumb("b1", False)
    return path


def test_numbers_of_each_version(path):
    report = lora_rlhf.usage(path)
    names = [group["name"] for group in report["groups"]]
    assert names == ["no model", f"policy@{OLD[:12]}", f"policy@{NEW[:12]}"]
    nothing, old, new = report["groups"]
    assert (nothing["statuses"], old["statuses"]) == ({"404": 1}, {"200": 100})
    assert new["statuses"] == {"200": 100, "429": 1} and old["tokens"] == 850
    numbers = new["metrics"]
    assert numbers["answered"]["value"] == pytest.approx(100 / 101)
    assert numbers["structured answers valid"]["value"] == 0.9
    assert numbers["thumbs up"] == {
        "value": 0,
        "low": 0,
        "high": pytest.approx(0.79, abs=0.01),
        "n": 1,
    }
    assert numbers["seconds, p50"]["value"] == pytest.approx(1.995)
    low, high = (numbers["seconds, p50"][key] for key in ("low", "high"))
    assert high - low > 0.2  # 20 prompts, not 100 requests
    p95 = numbers["seconds, p95"]  # 20 prompts do not show a p95's upper limit
    assert p95["value"] == pytest.approx(2.4405) and (p95["low"], p95["high"]) == (None, None)
    assert numbers["answer tokens per request"]["value"] == 5.5
    assert "tasks completed" not in numbers


def test_each_judged_answer_of_a_request_counts(path):
    with UsageStore(path) as store:
        for choice in (1, 2, 3):
            store.thumb("b1", True, choice=choice)
        store.thumb("b2", True, choice=1)
    numbers = lora_rlhf.usage(path)["groups"][2]["metrics"]
    assert (numbers["thumbs up"]["value"], numbers["thumbs up"]["n"]) == (0.8, 5)


def test_two_versions_are_compared_on_their_common_prompts(path):
    of_metric = {one["metric"]: one for one in lora_rlhf.usage(path)["differences"]}
    faster = of_metric["mean seconds"]
    assert (faster["of"], faster["less"]) == (f"policy@{OLD[:12]}", f"policy@{NEW[:12]}")
    assert faster["how"] == "paired on 20 prompts"
    assert faster["estimate"]["value"] == faster["estimate"]["low"] == pytest.approx(0.5)
    assert (
        faster["estimate"]["p_corrected"] < 0.001 < of_metric["answered"]["estimate"]["p_corrected"]
    )
    assert of_metric["thumbs up"]["how"] == "independent samples"
    with pytest.raises(UsageError, match="'policy' has several versions"):
        lora_rlhf.usage(path, ["policy", "sft"])
    with pytest.raises(UsageError, match="'sft' is not in the store"):
        lora_rlhf.usage(path, ["sft", f"policy@{NEW[:12]}"])


def test_the_verb_prints_plots_and_gives_json(path, tmp_path):
    picture = tmp_path / "usage.png"
    done = CliRunner().invoke(app, ["usage", str(path), "--plot", str(picture)])
    assert done.exit_code == 0 and picture.stat().st_size > 5_000
    assert "200: 100, 429: 1" in done.stdout
    assert f"mean seconds of policy@{OLD[:12]} minus that of policy@{NEW[:12]}: 0.5" in done.stdout
    given = json.loads(CliRunner().invoke(app, ["usage", str(path), "--json"]).stdout)
    assert given["groups"] == lora_rlhf.usage(path)["groups"]
    missing = CliRunner().invoke(app, ["usage", str(tmp_path / "none")])
    assert missing.exit_code == 2 and "no store of uses" in missing.stderr
