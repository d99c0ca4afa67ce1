# SPDX-License-Identifier: Apache-2.0
"""Copy numbers that several pages quote from the page that states them: `make docs`.

The source has `<!-- block NAME -->...<!-- /block -->`, a page that quotes it
`<!-- from PATH NAME -->...<!-- /from -->`, with PATH from the root of the repository.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md",)


def render(page: str) -> str:
    """Return a page with every quote as its source has it now."""

    def quote(match: re.Match[str]) -> str:
        source = (ROOT / match[2]).read_text(encoding="utf-8")
        block = re.search(rf"<!-- block {match[3]} -->(.*?)<!-- /block -->", source, re.DOTALL)
        assert block is not None, f"{match[2]} has no block {match[3]}"
        return f"{match[1]}{block[1]}<!-- /from -->"

    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(r"(<!-- from (\S+) (\S+) -->).*?<!-- /from -->", quote, text, flags=re.DOTALL)


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(render(name), encoding="utf-8")
