# SPDX-License-Identifier: Apache-2.0
"""Every error a user can cause, as one class each: what was given, what was expected, what to do.

LoraRlhfError                 exit code 1
├── UsageError                exit code 2
│   └── RecipeError
├── DataError                 exit code 3
├── SetupError                exit code 4
│   ├── BaseModelError
│   ├── TokenizerError
│   ├── AdapterError
│   ├── CheckpointError
│   ├── BusyError
│   ├── DiskError
│   ├── MemoryLimitError
│   └── HubError
└── DivergedError             exit code 5
    ├── IdentityError
    ├── GateError
    └── NonFiniteError
"""

from __future__ import annotations

from lora_rlhf.redaction import safe

INTERRUPTED = {"SIGINT": 130, "SIGTERM": 143}
"""Exit codes of an interrupted run, as a shell reports them (128 + signal number)."""


def first_line(error: BaseException) -> str:
    """What an error says first; its class, where it says nothing."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


class LoraRlhfError(Exception):
    """Base of all errors that are the user's to mend; the CLI prints them without a traceback.

    Whatever is said is said without secrets, and without the folder of anybody's home.

    Args:
        given: What was found, with the offending value.
        expected: What would have been right.
        remedy: What to do now, as an instruction.
        where: The place, `file:line` where there is one.
    """

    exit_code = 1

    def __init__(
        self, given: str, *, expected: str = "", remedy: str = "", where: str = ""
    ) -> None:
        given, expected, remedy, where = map(safe, (given, expected, remedy, where))
        self.given, self.expected, self.remedy, self.where = given, expected, remedy, where
        lines = [f"{where}: {given}" if where else given]
        if expected:
            lines.append(f"  expected: {expected}")
        if remedy:
            lines.append(f"  to do: {remedy}")
        super().__init__("\n".join(lines))


class UsageError(LoraRlhfError):
    """A command or an option that makes no sense, such as `lora-rlhf push` without a repository."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be read: an unknown key, a wrong type, a duplicate, a contradiction."""


class DataError(LoraRlhfError):
    """A dataset that cannot be used: a missing column, a broken line, no rows left."""

    exit_code = 3


class SetupError(LoraRlhfError):
    """Something on this machine is missing or unsuitable: a package, a model, a device."""

    exit_code = 4


class BaseModelError(SetupError):
    """The base model cannot serve as a backbone."""


class TokenizerError(SetupError):
    """The tokenizer lacks what the pipeline needs: a pad token apart from eos, a chat template."""


class AdapterError(SetupError):
    """An adapter folder that is missing, broken, or made for another base or role."""


class CheckpointError(SetupError):
    """A checkpoint from which a run cannot go on exactly: broken, incomplete, of another run."""


class BusyError(SetupError):
    """Another process works in the run directory."""


class DiskError(SetupError):
    """The disk is full, or the run directory may not be written; what is on it is whole."""


class MemoryLimitError(SetupError):
    """The device has no memory for what was asked; what was saved is whole."""


class HubError(SetupError):
    """The Hub refused or could not be reached; nothing that was trained is lost."""


class DivergedError(LoraRlhfError):
    """Training left the range in which its result can be used."""

    exit_code = 5


class IdentityError(DivergedError):
    """A start-up identity of PPO does not hold; the message names the stage at fault."""


class GateError(DivergedError):
    """The reward model is not good enough to optimise against."""


class NonFiniteError(DivergedError):
    """NaN or infinity in a loss, a reward or a parameter."""
