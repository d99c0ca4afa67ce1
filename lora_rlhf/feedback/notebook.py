# SPDX-License-Identifier: Apache-2.0
"""The labelling page inside a notebook's cell: Jupyter through an IFrame, Colab by its own way."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from lora_rlhf.runtime.local_server import LOOPBACK

from . import labeling, project
from .label_server import Access, LabelServer

_running: dict[Path, LabelServer] = {}


def label(
    folder: str | Path, *, new: str | Path | None = None, port: int = 0, height: int = 800
) -> LabelServer:
    """Serve a labelling project on this machine's loopback, and show its page if in a notebook.

    Calling it again for the same folder shows the same server.

    Args:
        new: File of tasks, from which the project is made if there is none.

    Returns:
        The server: `url` is the address of the page, `stop()` ends it.
    """
    key = Path(folder).resolve()
    if new is not None and not key.exists():
        labeling.make(key, Path(new), "ranking")
    server = _running.get(key)
    if server is None or not server.running:
        colab, jupyter = "google.colab" in sys.modules, "IPython" in sys.modules
        access = Access(LOOPBACK, port, embedded=colab or jupyter)
        server = _running[key] = LabelServer(project.load(folder), access)
        server.start()
    _show(server, height)
    return server


def _show(server: LabelServer, height: int) -> None:
    if "google.colab" in sys.modules:
        output = importlib.import_module("google.colab.output")
        path = f"/?token={server.access.token}"
        output.serve_kernel_port_as_iframe(server.access.port, path=path, height=str(height))
    elif "IPython" in sys.modules:
        display = importlib.import_module("IPython.display")
        display.display(display.IFrame(server.url, width="100%", height=height))
