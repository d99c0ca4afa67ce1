# SPDX-License-Identifier: Apache-2.0
"""The key that was meant: for a name of another library, another section, or with a typo."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from lora_rlhf.errors import UsageError

from .schema import Recipe
from .strict_yaml import Key

_SYNONYMS = {
    "learning_rate": "lr learning-rate learningrate step_size",
    "r": "rank lora_r lora_rank", "alpha": "lora_alpha",
    "target_modules": "modules lora_target_modules target targets lora_target",
    "id": "name path model base base_model model_id model_name model_name_or_path name_or_path "
          "pretrained_model_name_or_path",
    "load_in_4bit": "quantization quantize load_in_8bit qlora four_bit bits",
    "dtype": "torch_dtype precision bf16 fp16", "public": "private visibility",
    "held_out": "val_size test_size validation_split val_set_size eval_split test_split",
    "path": "file filename data_path data_files local", "hub": "dataset dataset_name repo repo_id",
    "demonstrations": "train sft dataset datasets instructions examples",
    "comparisons": "preferences preference pairs rankings reward",
    "max_tokens": "max_length max_seq_length max_seq_len block_size cutoff_len "
                  "sequence_len context_length",
    "updates": "steps total_steps num_steps num_updates iterations max_steps total_episodes",
    "num_train_epochs": "epochs num_epochs n_epochs train_epochs",
    "num_iterations": "epochs ppo_epochs num_ppo_epochs inner_epochs",
    "per_device_train_batch_size": "batch_size train_batch_size micro_batch_size batch",
    "gradient_accumulation_steps": "grad_accum accumulation accumulate_grad_batches",
    "warmup_steps": "warmup num_warmup_steps warmup_ratio", "max_grad_norm": "clip_grad grad_clip",
    "lr_scheduler_type": "scheduler lr_scheduler schedule", "optim": "optimizer",
    "epsilon": "cliprange clip_range clip_eps", "clip_value": "cliprange_value clip_range_vf",
    "beta": "kl_coef kl kl_penalty", "kl_coef": "beta kl kl_coeff init_kl_coef kl_penalty",
    "kl_target": "target target_kl",
    "lam": "lambda lambda_ gae_lambda", "vf_coef": "value_coef vf_coeff value_loss_coef",
    "max_completion_length": "max_new_tokens response_length max_response_length",
    "num_generations": "group_size num_samples", "n": "num num_prompts count samples size",
    "top_fraction": "layers top_layers",
}  # fmt: skip
"""Our key or TRL's -> what other libraries, papers and older versions call it."""


def siblings(at: tuple[Key, ...]) -> list[str]:
    """Return the schema's keys in the section of the key `at`."""
    model: type[BaseModel] = Recipe
    for part in at[:-1]:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        annotation: Any = field.annotation if field else None
        annotation = next(iter(get_args(annotation)), annotation)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


Args = Mapping[str, Collection[str]]
"""Section of a stage -> the names that its `args:` may have."""


def suggest(at: tuple[Key, ...], args: Args) -> list[tuple[Key, ...]]:
    """Return the keys that an unknown one may stand for, at most three; empty if none is near."""
    stage, given, here = str(at[0]), str(at[-1]), siblings(at)
    in_args = at[1:2] == ("args",)
    if in_args:
        here = siblings((stage, ""))
    known = args.get(stage, ()) if len(at) > 1 else ()
    meant = [given, *(key for key, names in _SYNONYMS.items() if given in names.split())]
    folder = (stage,) if in_args else at[:-1]

    def named(names: list[str]) -> list[tuple[Key, ...]]:
        keys = [(*folder, n) for n in names if n in here]
        keys += [(stage, "args", n) for n in names if n in known]
        return [key for key in keys if key != at]

    def near(names: Collection[str]) -> list[str]:
        return difflib.get_close_matches(given, sorted(names), n=1, cutoff=0.7)

    first, second = (known, here) if in_args else (here, known)
    nearest = named(meant) or named(near(first)) or named(near(second))
    return (nearest or [key for key in _everywhere(args) if key[-1] in meant and key != at])[:3]


def described(at: tuple[Key, ...], args: Args) -> str:
    """Return "did you mean ...?" for an unknown key; empty if none is near."""
    names = [repr(".".join(map(str, key))) for key in suggest(at, args)]
    return f"did you mean {' or '.join(names)}?" if names else ""


def nearest(given: str, known: Collection[str]) -> str:
    """Return ": did you mean ...?" for an unknown word; empty if none is near."""
    close = difflib.get_close_matches(given, sorted(known), n=1, cutoff=0.6)
    return f": did you mean {close[0]}?" if close else ""


def check_names(given: Collection[str], known: Collection[str], of: str) -> None:
    """Check the names of options that Python passes on.

    Raises:
        UsageError: One is unknown.
    """
    for name in given:
        if name not in known:
            raise UsageError(
                f"{of} has no option {name!r}{nearest(name, known)}",
                expected=", ".join(sorted(known)),
            )


def _everywhere(args: Args) -> Iterator[tuple[str, ...]]:
    """Yield the keys of the recipe and its sections, then those of `args:`."""
    for name in Recipe.model_fields:
        yield (name,)
        yield from ((name, key) for key in siblings((name, "")))
    for stage, names in args.items():
        yield from ((stage, "args", key) for key in sorted(names))
