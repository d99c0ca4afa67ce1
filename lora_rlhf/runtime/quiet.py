# SPDX-License-Identifier: Apache-2.0
"""Hide progress bars and warnings of libraries, which are not about the user's run."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",  # it reports every retry; we report the outcome
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
"""Set before the libraries are imported, unless the user has set them."""

loud = False
"""True with `--debug`: libraries may say everything."""


def process() -> None:
    """Silence libraries for the rest of the process, except their errors."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Hide bars of libraries, except downloads', and warnings; restore them at the end."""
    if loud:
        yield
        return
    import datasets
    from huggingface_hub import utils
    from transformers.utils import logging as transformers

    shown, verbosity = transformers.is_progress_bar_enabled(), transformers.get_verbosity()
    sets = datasets.are_progress_bars_disabled()
    transformers.disable_progress_bar()  # those of the Hub too
    utils.enable_progress_bars()  # type: ignore[attr-defined]
    datasets.disable_progress_bars()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.set_verbosity(verbosity)
        if shown:
            transformers.enable_progress_bar()
        if not sets:
            datasets.enable_progress_bars()
