# SPDX-License-Identifier: Apache-2.0
"""Our PPO on a randomly initialised Llama: seconds and memory of one update, split by phase.

    python tests/benchmarks/ours.py --preset small --threads 1

One update is what the PPO stage does between two lines of its log: a rollout of
`--num-prompts` prompts, scored by policy, reference, reward and value (an adapter of its own), and
`--ppo-epochs` passes over it. The phases are those that the trainer itself tells `Progress`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common

_PHASES = {"rollout": "generate", "score": "score", "update": "train"}


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The shared options, and those that only we have."""
    made = common.parser(__doc__ or "")
    made.add_argument("--top-fraction", type=lambda text: float(Fraction(text)), default=1.0)
    made.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    made.add_argument("--four-bit", action="store_true", help="NF4, double quantisation")
    made.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    made.add_argument("--copies", type=int, default=0, help="idle backbones kept in memory as well")
    made.add_argument("--memory-gb", type=float, help="CUDA: refuse to use more than this")
    return common.options(made, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run until told to stop."""
    found = options(argv)
    import torch

    torch.set_num_threads(found.threads)
    torch.manual_seed(found.seed)
    import models
    import peft
    import transformers
    import trl

    from lora_rlhf._trl import check_seams
    from lora_rlhf.algorithms import policy_stage, reward_functions
    from lora_rlhf.algorithms.ppo import ppo_stage
    from lora_rlhf.models import fused_layers
    from lora_rlhf.runs.record import Record
    from lora_rlhf.runtime.devices import pick_device

    check_seams()
    transformers.logging.set_verbosity_error()
    device = pick_device()
    on_gpu = device.type == "cuda"
    if on_gpu and found.memory_gb:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, found.memory_gb * 2**30 / whole))
    updates = common.Updates(found, torch.cuda.synchronize if on_gpu else None)
    # What separate models cost: each has a backbone of its own; the work of a role is the same.
    idle = [models.backbone(found, device) for _ in range(found.copies)]
    backbone = models.backbone(found, device)
    parameters = backbone.causal.num_parameters()
    models.add_roles(backbone)
    recipe = recipe_of(found, backbone)
    with tempfile.TemporaryDirectory() as folder:
        record = Record.open(Path(folder) / "run", recipe)
        args = ppo_stage.arguments(recipe, record.folder)
        ppo_stage.start_roles(backbone, recipe)
        prompts = dataset(found)
        functions, args.reward_weights = reward_functions.of_recipe(recipe, backbone, prompts)
        memory = backbone.memory_report()
        updates.models_are_made(
            "lora-rlhf",
            torch=torch.__version__,
            trl=trl.__version__,
            peft=peft.__version__,
            transformers=transformers.__version__,
            params=parameters,
            adapted_layers=len(backbone.adapted_layers),
            device=str(device),
            trainable=sum(p.numel() for _, p in _trained(backbone)),
            model_tensors_mb=round(
                memory["total"] / 2**20 + sum(b.memory_report()["total"] for b in idle) / 2**20, 1
            ),
            backbone_tensors_mb=round(memory["backbone"] / 2**20, 1),
        )
        with backbone.training("policy", "value"):
            trainer = ppo_stage.PPOTrainer(
                backbone,
                args=args,
                ppo=recipe.ppo,
                reward_funcs=functions,
                train_dataset=prompts,
                progress=_progress(updates),
                callbacks=[_callback(updates, backbone, policy_stage.steps_per_update(args))],
            )
            with fused_layers.layers(backbone):  # as ppo.train does
                trainer.train()


def recipe_of(found: argparse.Namespace, backbone: Any) -> Any:
    """A recipe with the options as its settings, and everything else as we ship it."""
    from lora_rlhf.recipe.schema import PpoSection, Recipe

    return Recipe(
        name="benchmark",
        seed=found.seed,
        model=backbone.model_section,
        lora=backbone.lora_section,
        ppo=PpoSection(
            updates=found.updates + 2,
            value_warmup_updates=0,
            args={
                "per_device_train_batch_size": found.minibatch,
                "warmup_steps": 0,
                "steps_per_generation": found.num_prompts // found.minibatch,
                "num_iterations": found.ppo_epochs,
                "learning_rate": found.learning_rate,
                "temperature": found.temperature,
                "max_completion_length": found.response_len,
            },
        ),
    )


def dataset(found: argparse.Namespace) -> Any:
    """Prompts as text, which the trainer tokenises."""
    from datasets import Dataset

    rows = common.prompts(found, 8 * found.num_prompts)
    return Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in row)} for row in rows])


def _trained(backbone: Any) -> Iterator[tuple[str, Any]]:
    for role in ("policy", "value"):
        yield from backbone.role_parameters(role)


def _progress(updates: common.Updates) -> Any:
    from lora_rlhf.runs.progress import Progress

    class Phases(Progress):
        """Tells the clocks what the trainer is doing."""

        def phase(self, name: str) -> None:
            updates.enter(_PHASES[name])

    return Phases(quiet=True)


def _callback(updates: common.Updates, backbone: Any, per_update: int) -> Any:
    import counting
    import torch
    from transformers import TrainerCallback

    class EachUpdate(TrainerCallback):
        """Waits before every update, and takes its time after it."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._begin()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if self.watch:
                self.watch.step()
            if state.global_step % per_update == 0:
                counted = self.watch.finish() if self.watch else {}
                if backbone.device.type == "cuda":
                    counted["cuda_peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
                    counted["cuda_reserved_mb"] = round(torch.cuda.max_memory_reserved() / 2**20)
                updates.end(**counted)
                self._begin()

        def _begin(self) -> None:
            self.watch = counting.watch(updates.begin(), updates, backbone)

    return EachUpdate()


if __name__ == "__main__":
    main()
