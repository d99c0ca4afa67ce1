# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can cause and correct, one class for each kind.

LoraRlhfError                 exit code 1
├── UsageError                exit code 2
│   └── RecipeError
├── DataError                 exit code 3
├── SetupError                exit code 4
│   ├── BaseModelError
│   ├── TokenizerError
│   ├── AdapterError
│   ├── CheckpointError
│   ├── DamageError
│   ├── BusyError
│   ├── DiskError
│   ├── MemoryLimitError
│   └── HubError
├── DivergedError             exit code 5
│   ├── IdentityError
│   ├── GateError
│   └── NonFiniteError
├── ChecksError               exit code 6
└── FitError                  exit code 7

A message states the problem first, with the offending value; then what was expected; then what to
do, as an instruction:

    raise DataError(
        "column 'chosen' is missing",
        where="data.jsonl:3",
        expected="a JSON object with chosen and rejected",
        remedy="rename the column, or map it with `columns:`",
    )
"""

from __future__ import annotations

from lora_rlhf.redaction import printable, safe

INTERRUPTED = {"SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143}
"""Exit codes of an interrupted run, as a shell reports them (128 + signal number)."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if there is none."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def reason(error: BaseException) -> str:
    """Return the reason why a file cannot be used, without its number and path if it has them."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return getattr(error, "strerror", None) or first_line(error)


def check_unicode(text: str, what: str) -> None:
    """Refuse a text with half of a surrogate pair, which no tokenizer and no file takes.

    Raises:
        UsageError: It has one; `what` names the text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} is not valid Unicode: half of a surrogate pair at {error.start}",
            remedy="give the text in UTF-8",
        ) from None


def counted(number: int, noun: str) -> str:
    """Return `1 row`, `2 rows`, `1,000 rows`."""
    return f"{number:,} {noun}" + "s" * (number != 1)


class LoraRlhfError(Exception):
    """Base of all errors that a user can fix; the CLI prints them without a traceback.

    Secrets and home folders are masked in the message, and control characters are escaped.

    Args:
        given: The problem, with the offending value.
        expected: What would have been right.
        remedy: What to do now, as an instruction.
        where: The place, `file:line` if there is one.
    """

    exit_code = 1

    def __init__(
        self, given: str, *, expected: str = "", remedy: str = "", where: str = ""
    ) -> None:
        texts = (given, expected, remedy, where)
        given, expected, remedy, where = (printable(safe(text)) for text in texts)
        self.given, self.expected, self.remedy, self.where = given, expected, remedy, where
        lines = [f"{where}: {given}" if where else given]
        if expected:
            lines.append(f"  expected: {expected}")
        if remedy:
            lines.append(f"  to do: {remedy}")
        super().__init__("\n".join(lines))


class UsageError(LoraRlhfError):
    """A command or an option that cannot be carried out.

    `lora-rlhf card notes/`: the folder holds no run. Give the --out of a `lora-rlhf run`.
    """

    exit_code = 2


class RecipeError(UsageError):
    """A recipe with an unknown key, a wrong type, a duplicate or a contradiction.

    `ppo: {kl_coeff: 0.1}`: unknown key. Use the suggested name, `kl_coef`.
    """


class DataError(LoraRlhfError):
    """A dataset with a missing column, a broken line or no rows left.

    A line of `data.jsonl` that is not JSON. Fix that line, or remove it.
    """

    exit_code = 3


class SetupError(LoraRlhfError):
    """Something on this machine is missing or unsuitable: a package, a model, a device.

    `report_to: wandb` without wandb. Install it, or leave `report_to` out.
    """

    exit_code = 4


class BaseModelError(SetupError):
    """A base model that cannot serve as a backbone.

    `model: {id: t5-small}`, an encoder-decoder. Use a causal language model.
    """


class TokenizerError(SetupError):
    """A tokenizer without a pad token apart from eos, or without a needed chat template.

    Rows of messages and a base without a template. Use a chat model, or rows of plain text.
    """


class AdapterError(SetupError):
    """An adapter folder that is missing, broken, or made for another base or role.

    An `adapters/sft` that was replaced by hand. Restore it, or train the stage again.
    """


class CheckpointError(SetupError):
    """A checkpoint from which a run cannot continue exactly: damaged, or of another run.

    A truncated `optimizer.safetensors`. Use `--warm-start`, or delete the stage's checkpoints.
    """


class DamageError(SetupError):
    """A file of a run that is missing, or is not as the run wrote it.

    A flipped bit in `adapters/reward`. Restore the file, or run into a new --out.
    """


class BusyError(SetupError):
    """Another process works in the run directory.

    The same command in two terminals. Wait for the first, or give another --out.
    """


class DiskError(SetupError):
    """The disk is full, or the run directory is not writable; saved files are intact.

    Make room, then run the same command.
    """


class MemoryLimitError(SetupError):
    """The device runs out of memory even with one row at once; saved files are intact.

    Choose a remedy from the printed table, such as `--set model.load_in_4bit=true`.
    """


class HubError(SetupError):
    """The Hub refused a request or could not be reached; nothing that was trained is lost.

    A token without write access. Log in with one, then run `lora-rlhf push` again.
    """


class DivergedError(LoraRlhfError):
    """Base of errors of trainings whose result cannot be used."""

    exit_code = 5


class IdentityError(DivergedError):
    """A start-up identity does not hold; the message names the stage at fault.

    Policy and reference differ before the first update, because `adapters/sft` was changed after
    SFT. Restore the folder, or train the stage again.
    """


class GateError(DivergedError):
    """The reward model is not good enough to optimise against.

    Its held-out accuracy may be that of chance. Add comparisons, or train it for longer.
    """


class NonFiniteError(DivergedError):
    """NaN or infinity in a loss, a reward or a parameter.

    float16 overflows in every step. Use `model.dtype: bfloat16`, or a lower learning rate.
    """


class ChecksError(LoraRlhfError):
    """An answer of `do` that fails a check after all tries; the best one is printed.

    A summary of 80 words where 50 were asked for. Give more --tries, or another model.
    """

    exit_code = 6


class FitError(LoraRlhfError):
    """A recipe that does not fit the named GPU as it is; `plan` prints what would make it fit.

    `lora-rlhf plan recipe.yaml --gpu 8GB`. Take the printed --set options, or a larger GPU.
    """

    exit_code = 7
