# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for tests: progress that keeps its lines, and a clock that stands still."""

from lora_rlhf.runs.progress import Progress


class RecordingProgress(Progress):
    """Prints nothing; `lines` holds every line."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


class StoppedClock:
    """Replaces the module `time`: stands still until a test moves `now`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic
