# SPDX-License-Identifier: Apache-2.0
"""A byte-level tokenizer with a chat template, and one without."""

import pytest
from data_sources import make_tokenizer


@pytest.fixture(scope="module")
def chat():
    return make_tokenizer()


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer(None)
