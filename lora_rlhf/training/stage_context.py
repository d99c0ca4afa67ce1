# SPDX-License-Identifier: Apache-2.0
"""Objects that every training stage uses."""

from __future__ import annotations

from typing import NamedTuple

from lora_rlhf.models import adapters
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record


class StageContext(NamedTuple):
    """The recipe of a run, its backbone, its record and its progress line."""

    recipe: Recipe
    backbone: Backbone
    record: Record
    progress: Progress

    def save_adapter(self, role: str, name: str | None = None) -> str:
        """Save a role as `adapters/NAME`, by default its own name; returns the file's sha256."""
        self.record.check_place()
        folder = adapters.save_role(self.backbone, role, self.record.adapter(name or role))
        return self.record.note(folder)["adapter_model.safetensors"]
