# SPDX-License-Identifier: Apache-2.0
"""Hold back streamed text until the sentence that it belongs to is whole and has passed a check."""

from __future__ import annotations

import re
from collections.abc import Callable

LONGEST = 600
"""Characters that are held back at most; a longer sentence or code block is checked in parts."""

_CONTEXT = 400  # characters already shown that are checked again with the next sentence
_END = re.compile(
    r"[.!?\u2026\u061f\u06d4\u0589\u0964\u0965\u1362\u17d4\u104b]+[\"'\u2019\u201d\u00bb)\]]*\s"
    r"|[\u3002\uff01\uff1f\uff61\uff0e]+[\"'\u2019\u201d\u300d\u300f\uff09)\]]*(?=[^\u300d\u300f\u201d\uff09)\]\u3002\uff01\uff1f])"
    r"|\n"
)
"""End of a sentence: a full stop of any script. East Asian ones need no space after them."""
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[^\n]*\n", re.M)


class SentenceGate:
    """Streamed text goes in, checked text comes out: all of it, in its order, one sentence late.

    Args:
        check: Gets the next sentences with the text before them; it raises to stop the answer.
    """

    def __init__(self, check: Callable[[str], None], longest: int = LONGEST) -> None:
        self._check, self._longest = check, longest
        self._held = self._shown = ""
        self._in_code = False
        self._error: Exception | None = None

    def feed(self, delta: str) -> str:
        """Take the next piece, and return the text that may be shown now.

        Raises:
            Blocked: A sentence did not pass; neither it nor anything after it is ever shown.
        """
        if self._error is not None:
            raise self._error
        self._held += delta
        passed = ""
        while size := self._ready():
            try:
                passed += self._pass(size)
            except Exception:
                if passed:
                    return passed  # the next call raises
                raise
        return passed

    def finish(self) -> str:
        """Return what is left, checked, at the end of the answer; raises as `feed`."""
        return self._pass(len(self._held))

    def _ready(self) -> int:
        """Characters up to the first end of a sentence or of a code block; 0: wait for more."""
        fences = [fence.span() for fence in _FENCE.finditer(self._held)]
        first = _END.search(self._held)
        end = first.end() if first else 0
        if self._in_code:
            end = fences[0][1] if fences else 0
        elif fences and fences[0][0] < (end or self._longest):
            end = fences[1][1] if len(fences) > 1 else 0
        if 0 < end <= self._longest or len(self._held) <= self._longest:
            return end
        return self._held.rfind(" ", 1, self._longest) + 1 or self._longest

    def _pass(self, size: int) -> str:
        if self._error is not None:
            raise self._error
        text = self._held[:size]
        try:
            if text.strip():
                self._check(self._shown + text)
        except Exception as error:
            self._error, self._held = error, ""
            raise
        self._held = self._held[size:]
        self._in_code ^= len(_FENCE.findall(text)) % 2 == 1
        self._shown = (self._shown + text)[-_CONTEXT:]
        return text
