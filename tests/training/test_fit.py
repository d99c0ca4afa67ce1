# SPDX-License-Identifier: Apache-2.0
"""The training loop of all stages."""

from types import SimpleNamespace

import pytest
from recording import RecordingProgress

from lora_rlhf.errors import NonFiniteError
from lora_rlhf.training import fit


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_the_stage(loss):
    with pytest.raises(NonFiniteError, match="sft: the loss is") as error:
        fit.check_loss("sft", loss)
    assert "sft.args.learning_rate" in error.value.remedy
    fit.check_loss("sft", 3.0)


@pytest.mark.parametrize("tf32", [True, False, None])
def test_each_stage_sets_tf32_for_itself(monkeypatch, tf32):
    """All configs are built before the first stage, and building one switches the process."""
    switched = []
    finished = SimpleNamespace(train=lambda _: SimpleNamespace(training_loss=1.0))
    monkeypatch.setattr(fit, "enable_tf32", switched.append)
    monkeypatch.setattr(fit, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(fit, "CheckpointCallback", lambda *_: finished)
    monkeypatch.setattr(fit, "StageLog", lambda *_: None)
    backbone = SimpleNamespace(assert_trainable=lambda: None)
    context = SimpleNamespace(record=None, progress=RecordingProgress(), backbone=backbone)
    trainer = SimpleNamespace(
        args=SimpleNamespace(tf32=tf32), before_training=lambda: None, after_training=lambda: None
    )
    fit.fit(context, lambda callbacks: trainer, "sft")
    assert switched == ([] if tf32 is None else [tf32])
