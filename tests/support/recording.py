# SPDX-License-Identifier: Apache-2.0
"""Progress that keeps what it would print."""

from lora_rlhf.runs.progress import Progress


class RecordingProgress(Progress):
    """Prints nothing; `lines` holds every line."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)
