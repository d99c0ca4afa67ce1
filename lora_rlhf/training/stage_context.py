# SPDX-License-Identifier: Apache-2.0
"""Objects that every training stage uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lora_rlhf.distributed.world import world
from lora_rlhf.models import adapters
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record


class StageContext(NamedTuple):
    """The recipe of a run, its backbone, its record and its progress line."""

    recipe: Recipe
    backbone: Backbone
    record: Record
    progress: Progress

    def take_adapter(self, role: str, folder: str) -> dict[str, str]:
        """Load an adapter of the user's into a role; return its name and sha256, for the record."""
        adapters.load_role(self.backbone, role, folder)
        path, name = Path(folder), Path(folder).name
        if path.parent.name == "snapshots":  # in the Hub's cache
            name = path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        return {"adapter": name, "sha256": sha256(path / "adapter_model.safetensors")}

    def check_equal(self, roles: Sequence[str]) -> None:
        """Check that roles have the same bits in all processes of the run.

        Raises:
            SetupError: They differ.
        """
        if world().size > 1:
            world().agree("adapters", {role: self.backbone.state_hash(role) for role in roles})

    def save_adapter(self, role: str, name: str | None = None) -> str:
        """Save a role as `adapters/NAME`, by default its own name; returns the file's sha256."""
        self.record.check_place()
        self.check_equal([role])
        folder = adapters.save_role(self.backbone, role, self.record.adapter(name or role))
        return self.record.note(folder)["adapter_model.safetensors"]
