# SPDX-License-Identifier: Apache-2.0
"""Runs, comparisons and progress in a notebook: what is shown, escaped, and drawn seldom."""

import sys
from types import SimpleNamespace

import card_run
import pytest

import lora_rlhf
from lora_rlhf.reports import rich_displays
from lora_rlhf.runs.progress import Progress


@pytest.fixture
def cell(monkeypatch):
    """A notebook's kernel that keeps what is shown in each place."""
    shown = []

    class Handle:
        def update(self, value):
            shown.append(value)

    def display(value, display_id):
        shown.append(value)
        return Handle()

    formatters = {"text/html": SimpleNamespace(known={})}
    formatter = formatters["text/html"]
    formatter.for_type_by_name = lambda *key: formatter.known.update({key[:2]: key[2]})
    running = SimpleNamespace(kernel=1, display_formatter=SimpleNamespace(formatters=formatters))
    module = SimpleNamespace(
        get_ipython=lambda: running, display=SimpleNamespace(display=display, HTML=str)
    )
    monkeypatch.setitem(sys.modules, "IPython", module)
    return SimpleNamespace(shown=shown, known=formatter.known)


def test_a_run_shows_its_sentence_table_and_plots(tmp_path):
    record = card_run.make_run(tmp_path / "run")
    text = rich_displays.record_html(record)
    assert "SFT: win rate" in text and "<th>policy</th>" in text
    plots = list(record.folder.glob("plots/*.png"))
    assert text.count("data:image/png;base64,") == len(plots) > 0


def test_foreign_text_is_escaped(tmp_path):
    record = card_run.make_run(tmp_path / "run")
    record.data["name"] = "<script>x</script>\x1b[31m"
    text = rich_displays.record_html(record)
    assert "<script>" not in text and "\x1b" not in text


def test_the_notebook_learns_our_types_and_a_console_does_not(cell, tmp_path):
    rich_displays.register(plan="lora_rlhf.planning.plan_report")
    assert ("lora_rlhf.runs.record", "Record") in cell.known
    report = {"rows": [], "differences": [], "notes": ["<b>"]}
    shown = cell.known["lora_rlhf.reports.compare", "Comparison"](report)
    assert "&lt;b&gt;" in shown


def test_progress_is_one_place_with_curves(cell, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(rich_displays, "time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = rich_displays.progress()
    assert isinstance(progress, rich_displays.CellProgress)
    progress.say("data are read <1>")
    progress.begin("ppo", 500)
    for step in range(1, 501):
        now[0] += 0.1
        progress.step(step, {"reward/score": float(step), "kl/sequence": 1.0})
    progress.end()
    assert len(cell.shown) < 60, "a browser would be flooded"
    last = [text for text in cell.shown if "500/500" in text][-1]
    assert "score 1 → 500".replace("score", "reward/score") in last and "<svg" in last
    assert "&lt;1&gt;" in last and len(last) < 20_000


def test_elsewhere_it_is_the_line_of_the_console(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert type(rich_displays.progress()) is Progress
    assert isinstance(lora_rlhf.__all__, list)
