# SPDX-License-Identifier: Apache-2.0
"""Names under which a server of ours may be reached."""

import pytest

from lora_rlhf.runtime.local_server import knows_host


@pytest.mark.parametrize(
    ("header", "port", "known"),
    [
        ("127.0.0.1:8765", 8765, True),
        ("localhost:8765", 8765, True),
        ("[::1]:8765", 8765, True),
        ("localhost", 80, True),  # clients leave out HTTP's own port
        ("[::1]", 80, True),
        ("localhost:80", 80, True),
        ("localhost", 8765, False),
        ("localhost:8766", 8765, False),
        ("evil.example:8765", 8765, False),
        ("192.168.0.7:8765", 8765, False),
        ("localhost:8765:8765", 8765, False),
        ("", 80, False),
        (":80", 80, False),
    ],
)
def test_only_its_own_names_at_its_own_port(header, port, known):
    assert knows_host(header, "127.0.0.1", port, shared=False) is known


def test_a_shared_server_answers_to_addresses_but_not_to_foreign_names():
    assert knows_host("192.168.0.7:8765", "0.0.0.0", 8765, shared=True)
    assert not knows_host("evil.example:8765", "0.0.0.0", 8765, shared=True)
