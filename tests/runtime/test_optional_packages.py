# SPDX-License-Identifier: Apache-2.0
"""What bitsandbytes does when it is imported."""

from types import SimpleNamespace

import torch

from lora_rlhf.runtime import optional_packages


def test_what_bitsandbytes_compiles_is_compiled_when_it_is_called(monkeypatch):
    """Or each start of a command would import torch's compiler, for a second."""
    compiled, made = [], {}

    def compiler(function, **options):
        compiled.append((function, options))
        return lambda number: 10 * function(number)

    def load(name):
        made.update(plain=torch.compile(abs), tuned=torch.compile(dynamic=False)(abs))

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(optional_packages, "importlib", SimpleNamespace(import_module=load))
    optional_packages._import_bitsandbytes()
    assert torch.compile is compiler and compiled == []
    assert (made["tuned"](-2), made["tuned"](-3), made["plain"](-4)) == (20, 30, 40)
    assert compiled == [(abs, {"dynamic": False}), (abs, {})]
