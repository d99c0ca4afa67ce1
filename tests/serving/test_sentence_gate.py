# SPDX-License-Identifier: Apache-2.0
"""Streamed text passes a gate whole and in order, one checked sentence after the other."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_rlhf.serving.sentence_gate import LONGEST, SentenceGate

CALM = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=60)
PIECES = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(["Hello. ", "?! ", "\n", "```\n", "```python\n", "。", "好。」", " ",
                         "e.g. ",
                         "x" * 700, "word " * 200, "\ud800"]),
    ),
    max_size=12,
)  # fmt: skip


@CALM
@given(PIECES, st.integers(1, 50))
def test_no_text_is_lost_reordered_or_shown_unchecked(pieces, longest):
    checked: list[str] = []
    gate = SentenceGate(checked.append, longest)
    shown, given_so_far = "", ""
    for piece in pieces:
        given_so_far += piece
        shown += gate.feed(piece)
        assert given_so_far.startswith(shown)
        assert len(given_so_far) - len(shown) <= longest
    tail = gate.finish()
    assert shown + tail == given_so_far
    assert bool(checked) == bool(given_so_far.strip())


@CALM
@given(PIECES, st.integers(0, 6))
def test_nothing_is_shown_after_a_sentence_that_did_not_pass(pieces, n):
    calls = 0

    def check(text):
        nonlocal calls
        calls += 1
        if calls > n:
            raise ValueError(text)

    gate, free = SentenceGate(check), SentenceGate(lambda text: None)
    shown = unchecked = ""
    stopped = False
    for piece in [*pieces, None]:
        unchecked += free.finish() if piece is None else free.feed(piece)
        try:
            shown += gate.finish() if piece is None else gate.feed(piece)
            assert not stopped
        except ValueError:
            stopped = True
    assert unchecked.startswith(shown)
    assert calls <= n + 1
    assert stopped == (calls > n) and stopped == (shown != unchecked)


def sizes(*deltas):
    gate = SentenceGate(lambda text: None)
    return [gate.feed(delta) for delta in deltas] + [gate.finish()]


def test_ends_of_sentences():
    made = sizes("It is 3.", "14. ", "Yes", "!\n", "No")
    assert made == ["", "It is 3.14. ", "", "Yes!\n", "", "No"]
    assert sizes("“好。”", "他走了。", "完") == ["", "“好。”", "他走了。", "完"]
    assert sizes("नमस्ते। ", "ठीक") == ["नमस्ते। ", "", "ठीक"]
    assert sizes("هل؟ ", "نعم") == ["هل؟ ", "", "نعم"]


def test_a_code_block_is_one_piece():
    made = sizes("Run:\n", "```python\n", "a = 1\n", "b. c = 2\n", "```\n", "Done.")
    assert made == ["Run:\n", "", "", "", "```python\na = 1\nb. c = 2\n```\n", "", "Done."]


def test_a_blocked_sentence_keeps_what_passed_before_it():
    def check(text):
        if "bad" in text:
            raise ValueError(text)

    gate = SentenceGate(check)
    assert gate.feed("Good. A bad one. Good.") == "Good. "
    for call in (lambda: gate.feed("More. "), gate.finish):
        with pytest.raises(ValueError, match="bad"):
            call()


def test_a_phrase_across_two_sentences_is_seen():
    seen: list[str] = []
    gate = SentenceGate(seen.append)
    gate.feed("a" * LONGEST + " end.\n")
    gate.feed("Next one. ")
    assert "end.\nNext one. " in seen[-1] and len(seen[-1]) < LONGEST
