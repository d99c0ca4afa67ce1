# SPDX-License-Identifier: Apache-2.0
"""Answers that say that they do not know, or that the text does not say."""

from __future__ import annotations

import re

_UNKNOWN = re.compile(
    r"\b(?:i|we)(?:'m| am| are)? (?:do not|don't|does not|can ?not|can't|not) "
    r"(?:know|sure|certain|familiar|answer|determine|say|find|aware|able"
    r"|have (?:enough|any|that|this))\b"
    r"|\b(?:unknown|not stated|not sure|no idea|unanswerable|not (?:known|available|mentioned"
    r"|enough information)|there is no (?:information|answer)|cannot be (?:determined|answered))\b"
)
_NOT_STATED = re.compile(
    r"\b(?:not|isn't|is not|doesn't|does not|no)\b(?: \w+){0,3} (?:state[ds]?|mention(?:ed|s)?"
    r"|specif(?:y|ied|ies)|given?|provided?|says?|said|include[ds]?|list(?:ed|s)?|information|tell)\b"
)


def says_unknown(answer: str) -> bool:
    """Tell if an answer says that it does not know."""
    return bool(_UNKNOWN.search(_plain(answer)))


def says_not_stated(answer: str) -> bool:
    """Tell if an answer says that the text does not say it."""
    return bool(_NOT_STATED.search(_plain(answer)))


def _plain(text: str) -> str:
    return text.replace("’", "'").casefold()
