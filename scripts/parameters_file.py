# SPDX-License-Identifier: Apache-2.0
"""The command of the scripts that train packaged parameters: write the file, print its figures."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def command(
    description: str | None,
    train: Callable[[Path], dict[str, Any]],
    out: Path,
    source: str,
    default: str | None = None,
    *,
    indent: int | None = 1,
    shown: Sequence[str] = ("validation",),
) -> None:
    """Parse the command line, train on a source, and write and print what comes out.

    Args:
        source: Name of the argument with the source.
        default: The source if the argument may be left out.
        shown: Keys that are printed.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument(source, type=Path, nargs="?" if default else None, default=default)
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    made = train(Path(getattr(options, source)))
    text = json.dumps(
        made, indent=indent, ensure_ascii=False, separators=None if indent else (",", ":")
    )
    options.out.write_text(text + "\n", encoding="utf-8")
    print(json.dumps({key: made[key] for key in shown}, indent=1))
