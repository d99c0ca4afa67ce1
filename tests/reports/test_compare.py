# SPDX-License-Identifier: Apache-2.0
"""Comparison of constructed runs: rows, pairs, seeds, and reasons against pairing."""

import json
import re
import subprocess
import sys

import pytest
from compared_run import estimate, make
from typer.testing import CliRunner

from lora_rlhf.cli import app
from lora_rlhf.errors import UsageError
from lora_rlhf.reports import compare, plots, tables


@pytest.fixture
def three(tmp_path):
    return [
        make(tmp_path / "a", "ppo"),
        make(tmp_path / "b", "grpo", rewards=(0.75, 0.25, 0.25, 0.25)),
        make(tmp_path / "c", "best_of_n", rewards=(0.5, 0.5, 0.5, 0.5)),
    ]


def test_every_run_is_a_row_and_is_paired_with_the_first(three):
    report = compare.run(three)
    assert [row["algorithm"] for row in report["rows"]] == ["SFT", "PPO", "GRPO", "best of n"]
    ppo, best = report["rows"][1], report["rows"][3]
    assert (ppo["label"], ppo["episodes"], ppo["seconds"]) == ("a", 128, 30.0)
    assert ppo["metrics"]["kl"]["value"] == 2.25 and ppo["seconds_per_answer"] == 0.5
    assert best["samples_per_answer"] == 16 and best["metrics"]["kl_bound"]["n"] == 0
    assert report["metric"] == "gold_reward"
    grpo, bon = report["differences"]
    assert (grpo["of"], grpo["less"], grpo["pairs"], grpo["why_not"]) == ("b", "a", 1, None)
    assert grpo["estimate"]["value"] == pytest.approx(0.125) and grpo["estimate"]["n"] == 4
    assert grpo["estimate"]["low"] <= 0.125 <= grpo["estimate"]["high"]
    assert bon["estimate"]["value"] == pytest.approx(0.25)
    both = [one["estimate"] for one in (grpo, bon)]
    assert all(0 < one["p"] <= one["p_corrected"] <= 1 for one in both)
    [alone] = compare.run(three[:2])["differences"]
    assert "p_corrected" not in alone["estimate"]  # one comparison needs no correction
    assert any("upper bound" in note for note in report["notes"])


def test_seeds_of_one_recipe_are_one_row(tmp_path):
    folders = []
    for seed, (ppo, grpo) in enumerate([(0.1, 0.3), (0.2, 0.5), (0.3, 0.7)]):
        folders.append(make(tmp_path / f"p{seed}", "ppo", seed, (ppo,) * 4, sft=f"s{seed}"))
        folders.append(make(tmp_path / f"g{seed}", "grpo", seed, (grpo,) * 4, sft=f"s{seed}"))
    report = compare.run(folders)
    _, ppo, grpo = report["rows"]
    assert (ppo["label"], ppo["seeds"], ppo["runs"]) == (
        "p0 and 2 more",
        [0, 1, 2],
        ["p0", "p1", "p2"],
    )
    assert grpo["metrics"]["gold_reward"]["value"] == pytest.approx(0.5)
    assert grpo["metrics"]["gold_reward"]["n"] == 3
    # Differences 0.2, 0.3, 0.4: mean 0.3, s = 0.1, t(2) = 4.3027: 0.3 +- 4.3027 * 0.1 / sqrt(3)
    assert not any("fewer than 3 seeds" in note for note in report["notes"])
    few = compare.run(folders[:4])
    assert any("fewer than 3 seeds" in note for note in few["notes"])
    difference = report["differences"][0]
    assert difference["pairs"] == 3 and difference["estimate"]["n"] == 3
    assert difference["estimate"]["value"] == pytest.approx(0.3)
    assert difference["estimate"]["low"] == pytest.approx(0.3 - 4.3027 * 0.1 / 3**0.5, abs=1e-4)


def of_kinds(**gaps):
    """Let the policy of a run gain this on SFT by kind of prompt."""

    def change(record):
        own = {k: {"gold_reward_minus_sft": estimate(gap)} for k, gap in gaps.items()}
        record.data["stages"]["evaluate"]["by_kind"] = {
            "policy": own, "sft": {kind: {"gold_reward": estimate(0.1)} for kind in gaps}
        }  # fmt: skip

    return change


def test_differences_by_kind_of_prompt_are_a_family_of_their_own(tmp_path, capsys):
    """Per seed: json gains 0.4 to 0.43, polite 0.02, which one seed loses."""
    kinds, folders = ("json", "json", "polite", "polite"), []
    for seed in range(4):
        gains = (0.4, 0.41 + 0.005 * seed, 0.02, 0.0 - 0.01 * (seed == 2))
        for name, by in (("a", (0.0,) * 4), ("b", gains)):
            options = {
                "sft": f"s{seed}",
                "kinds": kinds,
                "sets": [f"ppo.kl_coef=0.{int(name == 'a')}"],
            }
            folders.append(make(tmp_path / f"{name}{seed}", "ppo", seed, by, **options))
    labels = ["kl 1", "kl 0"] * 4
    report = compare.run(folders, labels)
    assert [row["label"] for row in report["rows"]] == ["SFT", "kl 1", "kl 0"]
    [one] = report["differences"]
    assert (one["of"], one["less"], one["pairs"]) == ("kl 0", "kl 1", 4)
    assert list(one["by_kind"]) == ["json", "polite"]
    json_gap, polite = one["by_kind"].values()
    assert json_gap["value"] == pytest.approx(0.405 + 0.005 * 1.5 / 2) and json_gap["n"] == 4
    assert json_gap["p"] < json_gap["p_corrected"] < 0.05
    assert polite["value"] == pytest.approx(0.01 - 0.01 / 8)
    tables.show_comparison(report)
    shown = capsys.readouterr().out
    head = next(line for line in shown.splitlines() if line.startswith("gold_reward, difference"))
    assert head.split()[2:] == ["json", "polite"]
    assert re.search(r"kl 0 less kl 1 +\*0\.409 \[", shown)


def test_metrics_by_kind_and_the_kinds_that_got_worse(tmp_path, capsys):
    runs = [
        make(tmp_path / "a", change=of_kinds(json=-0.4, polite=0.2)),
        make(tmp_path / "b", "grpo", change=of_kinds(json=0.3, polite=0.2)),
        make(tmp_path / "c", "rloo"),
    ]
    report = compare.run(runs)
    sft, a, b, c = (row["by_kind"] for row in report["rows"])
    assert a["json"]["gold_reward_minus_sft"]["value"] == -0.4 and set(b) == set(sft) and not c
    assert any(note.startswith("a is clearly worse than SFT on") for note in report["notes"])
    assert "b is clearly worse than SFT on no kind of prompt." in report["notes"]
    tables.show_comparison(report)
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split()[4:] for line in lines if line.startswith("by kind of prompt")]
    assert sum(heads, []) == ["all", "json", "polite"]
    at = next(i for i, line in enumerate(lines) if line.startswith("by kind of prompt"))
    assert all(len(line) <= 100 for line in lines[at : lines.index("", at)])
    assert next(line for line in lines if line.startswith("gold_reward_minus_sft, a")).split()[
        2:4
    ] == ["-0.400", "[-0.500,"]


def test_kinds_are_averaged_over_seeds(tmp_path):
    gaps = (-0.3, -0.2, -0.1)
    runs = [make(tmp_path / f"{i}", seed=i, change=of_kinds(json=g)) for i, g in enumerate(gaps)]
    [_, row] = compare.run(runs)["rows"]
    gap = row["by_kind"]["json"]["gold_reward_minus_sft"]
    assert (gap["value"], gap["n"]) == (pytest.approx(-0.2), 3)


def test_a_recipe_with_another_setting_is_another_row(tmp_path):
    runs = [make(tmp_path / "a", seed=0), make(tmp_path / "b", seed=1, sets=["ppo.kl_coef=0.1"])]
    report = compare.run(runs)
    labels = [row["label"] for row in report["rows"]]  # another seed is another SFT model
    assert labels == ["SFT of a", "SFT of b", "a", "b"]
    assert report["differences"][0]["why_not"] == "no seed in common: [1] and [0]"


def _at(path, value):
    def change(record):
        *keys, last = path.split(".")
        at = record.data
        for key in keys:
            at = at[key]
        at[last] = value

    return change


def _other_prompts(record):
    path = record.folder / "samples.jsonl"
    path.write_text(path.read_text().replace('"p3"', '"q3"'))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_at("stages.sft.adapter_sha256", "zz"), "different SFT adapters"),
        (_at("model.fingerprint", "zz"), "different base models"),
        (_at("stages.evaluate.seed", 5), "settings: seed 0 and 5|settings: seed 5 and 0"),
        (_at("stages.evaluate.max_new_tokens", 5), "max_new_tokens 5 and 9"),
        (_at("stages.evaluate.prompts", 5), "prompts 5 and 4"),
        (_other_prompts, "on different prompts"),
        (lambda record: (record.folder / "samples.jsonl").unlink(), "no answers"),
    ],
)
def test_runs_that_are_not_comparable_have_a_reason_and_no_estimate(tmp_path, change, why):
    runs = [make(tmp_path / "a"), make(tmp_path / "b", "dpo", change=change)]
    difference = compare.run(runs)["differences"][0]
    assert difference["estimate"] is None
    assert any(part in difference["why_not"] for part in why.split("|"))


def test_each_sft_model_that_runs_start_from_is_a_row(tmp_path):
    """One row "SFT" was the first run's, beside runs that started from another model."""

    def better(record):
        record.data["evaluation"]["sft"]["gold_reward"] = estimate(0.2)

    runs = [
        make(tmp_path / "a"),
        make(tmp_path / "b", "grpo"),
        make(tmp_path / "c", "rloo", sft="zz", change=better),
    ]
    report = compare.run(runs)
    assert [row["label"] for row in report["rows"]] == ["SFT of a, b", "SFT of c", "a", "b", "c"]
    assert [row["metrics"]["gold_reward"]["value"] for row in report["rows"][:2]] == [0.1, 0.2]
    assert any("start from different SFT adapters" in note for note in report["notes"])
    assert [row["label"] for row in compare.run(runs[:2])["rows"]] == ["SFT", "a", "b"]


def test_scores_of_two_reward_models_are_not_compared(tmp_path):
    def without_gold(record):
        for values in record.data["evaluation"].values():
            values.pop("gold_reward")

    def other_judge(record):
        without_gold(record)
        record.data["stages"]["reward"]["adapter_sha256"] = "other"

    one = make(tmp_path / "a", change=without_gold)
    same = compare.run([one, make(tmp_path / "b", "grpo", change=without_gold)])
    assert same["metric"] == "proxy_reward" and same["differences"][0]["estimate"]
    assert any("proves little" in note for note in same["notes"])
    other = compare.run([one, make(tmp_path / "c", "grpo", change=other_judge)])
    assert "different reward models" in other["differences"][0]["why_not"]


def test_folders_that_cannot_be_compared_are_refused(tmp_path, three):
    with pytest.raises(UsageError, match="given twice"):
        compare.run([three[0], three[0]])
    with pytest.raises(UsageError, match="not a run"):
        compare.run([three[0], tmp_path])
    with pytest.raises(UsageError, match="same recipe and seed"):
        compare.run([three[0], make(tmp_path / "again")])
    open_run = make(tmp_path / "open", change=_at("stages.evaluate.status", "interrupted"))
    with pytest.raises(UsageError, match="not evaluated yet"):
        compare.run([three[0], open_run])


def test_the_plot_has_a_point_for_each_run(three, tmp_path, monkeypatch):
    report = compare.run(three)
    drawn = []
    from matplotlib.axes import Axes

    real = Axes.errorbar

    def spy(self, x, y, **options):
        drawn.append((x, y, options["label"], options["markerfacecolor"]))
        return real(self, x, y, **options)

    monkeypatch.setattr(Axes, "errorbar", spy)
    path = plots.comparison(report, tmp_path / "plots" / "compared.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [label for _, _, label, _ in drawn] == ["SFT", "PPO: a", "GRPO: b", "best of n: c"]
    assert drawn[0][0] == [0.0] and drawn[1][:2] == ([1.5], [0.25])
    assert drawn[3][0] == [pytest.approx(1.83**0.5)] and drawn[3][3] == "white"


def test_the_command_prints_a_table_or_json(three, tmp_path):
    arguments = ["compare", *map(str, three)]
    result = CliRunner().invoke(app.app, arguments)
    assert result.exit_code == 0, result.output
    assert "gold reward of b minus that of a: 0.12" in result.stdout.replace("0.13", "0.12")
    assert "algorithm" in result.stdout and "1.83 (bound)" in result.stdout
    png = tmp_path / "p.png"
    result = CliRunner().invoke(app.app, [*arguments, "--json", "--plot", str(png)])
    assert json.loads(result.stdout)["rows"][2]["label"] == "b" and png.is_file()


def test_a_small_difference_is_not_rounded_to_zero(tmp_path):
    runs = [make(tmp_path / "a"), make(tmp_path / "b", "grpo", rewards=(0.5, 0.25, 0.002, 0.25))]
    result = CliRunner().invoke(app.app, ["compare", *map(str, runs)])
    assert "gold reward of b minus that of a: 0.000500 [0.00, 0.00" in result.stdout


def test_a_terminal_shows_every_number_once(three):
    import io

    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160, color_system=None)
    tables.show_comparison(compare.run(three), console)
    assert "1.83 (bound)" in out.getvalue() and "best of n" in out.getvalue()


def test_comparing_needs_no_torch(three):
    code = "import sys\nfrom lora_rlhf.reports import compare\ncompare.run(sys.argv[1:])\n"
    code += "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, *map(str, three)], check=True)
