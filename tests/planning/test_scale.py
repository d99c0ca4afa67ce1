# SPDX-License-Identifier: Apache-2.0
"""The model of an update on several workers: by hand, against simulation, and from a real run."""

import importlib.util
import json
from pathlib import Path

import killed
import numpy as np
import pytest
from scipy import integrate, stats

from lora_rlhf.errors import UsageError
from lora_rlhf.planning import plan_report, scale
from lora_rlhf.planning.scale import Network, Part, Parts, Work
from lora_rlhf.recipe.loader import parse_recipe
from lora_rlhf.runs.record import Record

TEXT = (
    "name: x\nmodel: {id: tiny}\ndata: {prompts: [{task: closed-world}], "
    "comparisons: [{task: closed-world}]}\n"
    "ppo: {args: {per_device_train_batch_size: 16, steps_per_generation: 4, num_iterations: 2, "
    "gradient_accumulation_steps: 2, max_completion_length: 28}}\n"
)
LINK = Network(1e9, 1e-3)
STEADY = Parts(Part(0.0, 0.1, 0.0), Part(1.0, 0.01, 0.0), Part(0.5, 0.02, 0.0), 9)
WORK = Work(episodes=64, steps=4, micro_batches=2, micro_rows=16, tokens=100)


@pytest.mark.parametrize("n", [1, 2, 10, 1024])
def test_the_expected_maximum_is_that_of_the_order_statistic(n):
    density = lambda x: x * n * stats.norm.pdf(x) * stats.norm.cdf(x) ** (n - 1)  # noqa: E731
    expected = integrate.quad(density, -9, 9, epsabs=1e-9)[0]
    assert scale.expected_maximum(n) == pytest.approx(expected, abs=1e-5)


def test_an_update_by_hand():
    alone = scale.point(STEADY, WORK, 1e8, 1, LINK)
    assert alone.seconds == alone.compute == pytest.approx(6.4 + 1.64 + 8 * 0.82)
    four = scale.point(STEADY, WORK, 1e8, 4, LINK)
    assert four.compute == pytest.approx(1.6 + 1.16 + 8 * 0.58)
    gradients, rows = 4 * 2 * 3 / 4 * 0.8, 3 / 4 * 8 * scale.TOKEN * 64 * 100 / 1e9
    assert (four.gradients, four.rows) == (pytest.approx(gradients), pytest.approx(rows))
    assert four.latency == pytest.approx(0.001 * 3 * (4 * 2 + 8 * scale.SMALL))
    assert four.stragglers == 0
    grown = scale.point(STEADY, WORK.times(4), 1e8, 4, LINK)
    assert grown.compute == pytest.approx(alone.compute) and grown.episodes == 256


def test_stragglers_are_those_of_a_simulation():
    cv = Part(0.0, 0.1, 0.2), Part(0.0, 0.01, 0.1), Part(0.0, 0.02, 0.3)
    made = scale.point(Parts(*cv, 9), WORK.times(32), 0.0, 32, LINK)
    rng = np.random.default_rng(0)
    rollout, score, micro = (
        part.per_row * rows * (1 + part.cv * rng.normal(size=(400, count, 32)))
        for part, rows, count in zip(cv, (64, 64, 16), (1, 1, 8), strict=True)
    )
    steps = micro.reshape(400, 4, 2, 32).sum(2)
    waited = sum(part.max(-1).sum(1).mean() for part in (rollout, score, steps))
    assert made.compute + made.stragglers == pytest.approx(waited, rel=0.01)


def measured(folder: Path, rows: int, seconds) -> Record:
    sets = [f"ppo.args.per_device_train_batch_size={rows}"]
    record = Record.open(folder, parse_recipe(TEXT, "r.yaml", sets))
    for step in range(6):
        wobble = 99.0 if step == 0 else 1 + 0.1 * (-1) ** step
        phases = {name: wobble * each for name, each in seconds.items()}
        record.log("ppo", step + 1, {}, {"seconds": 1.0, "phases": phases})
    return record


def test_parts_are_read_from_runs_and_the_first_update_is_left_out(tmp_path):
    recipe, runs = parse_recipe(TEXT, "r.yaml"), []
    for rows in (4, 8, 16):
        seconds = {"rollout": 2 + 0.5 * 4 * rows, "score": 3.0, "update": 8 * (0.25 + 0.125 * rows)}
        runs.append(measured(tmp_path / str(rows), rows, seconds))
    parts = Parts.measure(runs, recipe)
    assert parts.updates == 15 and parts.rollout.cv == pytest.approx(0.1, rel=0.15)
    assert parts.rollout.fixed == pytest.approx(2, rel=0.1)
    assert (parts.score.fixed, parts.score.per_row) == (
        pytest.approx(3, rel=0.05),
        pytest.approx(0),
    )
    assert parts.micro.per_row == pytest.approx(0.125, rel=0.05)
    assert parts.micro.cv == pytest.approx(8**0.5 * parts.rollout.cv)
    [alone] = [Parts.measure(runs[-1:], recipe).rollout]
    assert alone.fixed == 0 and alone.per_row == pytest.approx(34 / 64, rel=0.05)


def test_the_curve_of_a_real_run(runs: killed.Runs, tmp_path):
    run = runs.after("ppo")
    made = plan_report.report(
        runs.recipe(), runs.folder, "8GB", probe=False, workers=12, runs=[run],
        network=("25Gbit", "50us"),
    )  # fmt: skip
    per_role = Record.read(run).data["lora"]["parameters_per_role"]
    assert made.scale.trained == per_role["policy"] + per_role["value"]
    assert made.scale.whole == 2 * Record.read(run).data["model"]["parameters"]
    own, grown = (made.scale.curve(grown=grown) for grown in (False, True))
    assert [p.workers for p in own] == [1, 2, 4]  # rows of a micro-batch
    assert [p.workers for p in grown] == [1, 2, 4, 8, 12]
    assert all(a.seconds < b.seconds for a, b in zip(grown, grown[1:], strict=False))
    text = made.as_text()
    assert "25 Gbit/s and 0.05 ms" in text and "all parameters, s" in text
    curves = json.loads(made.as_json())["scale"]["curves"]
    assert len(curves["grown_batch_full"]) == 5
    assert curves["grown_batch_full"][-1]["gradients"] > curves["grown_batch"][-1]["gradients"]


def test_the_bend_names_its_cause():
    slow = [scale.point(STEADY, WORK.times(n), 1e8, n, Network(1e12, 1e-2)) for n in (1, 4, 64)]
    assert scale.bend(slow) == "below 80 % from 64 workers on, mostly by latency of the ring"
    thin = [scale.point(STEADY, WORK.times(n), 1e9, n, Network(1e9, 0.0)) for n in (1, 2, 4)]
    assert scale.bend(thin) == "below 80 % from 2 workers on, mostly by the bytes of gradients"
    fixed = [scale.point(STEADY, WORK, 0.0, n, Network(1e12, 0.0)) for n in (1, 2, 16)]
    assert "from 2 workers on, mostly by what does not shrink" in scale.bend(fixed)
    assert scale.bend(slow[:1]) == "above 80 % up to 1 workers"


@pytest.mark.parametrize(
    ("speed", "latency"), [("1", "1ms"), ("0Gbit", "1ms"), ("1GB", "1ms"), ("1Gbit", "1"), ("", "")]
)
def test_a_link_that_is_none_is_refused(speed, latency):
    with pytest.raises(UsageError, match="such as"):
        Network.parse(speed, latency)


def test_runs_that_say_nothing_of_the_recipe_are_refused(tmp_path):
    recipe = parse_recipe(TEXT, "r.yaml")
    with pytest.raises(UsageError, match="no rollouts to share"):
        Work.of(parse_recipe(TEXT, "r.yaml", ["algorithm=dpo"]))
    for workers, runs, why in ((0, (), "--workers 0"), (2, (), "needs measured seconds")):
        with pytest.raises(UsageError, match=why):
            scale.model(None, recipe, None, runs, workers, LINK)
    record = measured(tmp_path / "run", 16, {"rollout": 1.0, "score": 1.0})
    with pytest.raises(UsageError, match="no seconds per phase"):
        Parts.measure([record], recipe)
    with pytest.raises(UsageError, match=r"measured with lora\.r 16, and the recipe has 4"):
        Parts.measure([record], parse_recipe(TEXT, "r.yaml", ["lora.r=4"]))


@pytest.mark.slow
def test_the_page_is_up_to_date():
    path = Path(__file__).resolve().parents[2] / "docs" / "make_scale.py"
    spec = importlib.util.spec_from_file_location("make_scale", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.render(), "run `make docs`"
