# SPDX-License-Identifier: Apache-2.0
"""The quickstart notebook, executed on the tiny model; its .ipynb is made from its text."""

import os
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "recipes" / "notebooks"
SMALL = (
    "sft.args.num_train_epochs=1 ppo.updates=3 ppo.value_warmup_updates=1 evaluate.n=32 "
    "ppo.args.max_completion_length=16 ppo.args.per_device_train_batch_size=8 "
    "ppo.args.steps_per_generation=2 reward.gate=warn"
)


def test_the_notebook_is_made_from_its_text():
    jupytext = pytest.importorskip("jupytext")
    text, made = (jupytext.read(NOTEBOOKS / f"quickstart.{end}") for end in ("py", "ipynb"))
    assert [(cell.cell_type, cell.source) for cell in text.cells] == [
        (cell.cell_type, cell.source) for cell in made.cells
    ]
    assert not any(cell.get("outputs") for cell in made.cells)


@pytest.mark.slow  # a run of each stage in a kernel of its own
def test_it_runs_from_the_csv_to_the_card(tmp_path, monkeypatch):
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("LORA_RLHF_NOTEBOOK_MODEL", "tiny")
    monkeypatch.setenv("LORA_RLHF_NOTEBOOK_SET", SMALL)
    root = str(NOTEBOOKS.parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    notebook = jupytext.read(NOTEBOOKS / "quickstart.py")
    for cell in notebook.cells:
        cell.source = cell.source.replace("%pip install", "# %pip install")
    nbclient.NotebookClient(
        notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    pages = "".join(o["data"].get("text/html", "") for o in shown if "data" in o)
    assert "win rate" in pages and "data:image/png" in pages, "the run shows its table and plots"
    assert "paired" in pages, "the comparison shows its differences"
    assert "<iframe" in pages, "the labelling page"
    text = "".join(o.get("text", "") for o in shown if o["output_type"] == "stream")
    assert "taken for" in text and "Is it better than SFT?" in text
    assert len(pages) + len(text) < 2_000_000
