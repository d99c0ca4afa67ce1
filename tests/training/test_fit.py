# SPDX-License-Identifier: Apache-2.0
"""The training loop of all stages."""

import pytest

from lora_rlhf.errors import NonFiniteError
from lora_rlhf.training import fit


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_the_stage(loss):
    with pytest.raises(NonFiniteError, match="sft: the loss is") as error:
        fit.check_loss("sft", loss)
    assert "sft.args.learning_rate" in error.value.remedy
    fit.check_loss("sft", 3.0)
