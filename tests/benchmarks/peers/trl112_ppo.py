# SPDX-License-Identifier: Apache-2.0
"""TRL 1.12.0's `experimental.ppo.PPOTrainer`, the last release that has it.

    python tests/benchmarks/peers/trl112_ppo.py --preset small --threads 1

Set up as TRL's own examples/scripts/ppo/ppo.py with `--use_peft`: a LoRA policy, the reference by
disabling its adapter, a *separate* reward model and a *separate, fully trained* value model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common


def main(argv: Sequence[str] | None = None) -> None:
    """Run until told to stop."""
    found = common.options(common.parser(__doc__ or ""), argv)
    import datasets
    import peft
    import torch
    import transformers
    import trl
    import trl.experimental.ppo.ppo_trainer as module
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401

    torch.set_num_threads(found.threads)
    torch.manual_seed(found.seed)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    updates = common.Updates(found)
    policy, value, reward = models(found)
    module.batch_generation = updates.timed("generate", module.batch_generation)
    module.get_reward = updates.timed("score", module.get_reward)
    forward = module.forward

    def scored(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with updates.phase("score"):
            return forward(*args, **kwargs)

    module.forward = scored
    shape = common.PRESETS[found.preset]
    rows = common.prompts(found, found.num_prompts * (found.updates + 3))
    dataset = datasets.Dataset.from_dict({"input_ids": rows})
    trainer = module.PPOTrainer(
        args=config(found),
        processing_class=common.tokenizer(shape.vocabulary),
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(found.num_prompts)),
        callbacks=[callback(updates)],
        peft_config=peft.LoraConfig(
            r=found.lora_r,
            lora_alpha=2 * found.lora_r,
            lora_dropout=0.0,
            bias="none",
            target_modules=common.targets(found),
            task_type="CAUSAL_LM",
        ),
    )
    trained = [p for m in (trainer.policy_model, value) for p in m.parameters() if p.requires_grad]
    tensors = [p for m in (policy, value, reward) for p in m.parameters()]
    updates.models_are_made(
        f"trl {trl.__version__} experimental.ppo",
        torch=torch.__version__,
        trl=trl.__version__,
        transformers=transformers.__version__,
        peft=peft.__version__,
        trainable=sum(p.numel() for p in trained),
        model_tensors_mb=round(common.tensor_mb(tensors), 1),
    )
    trainer.train()


def models(found: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Policy, value model and reward model, float32."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        LlamaConfig,
    )

    llama = common.llama_options(common.PRESETS[found.preset])
    policy = AutoModelForCausalLM.from_config(LlamaConfig(**llama), dtype=torch.float32)
    scorers = [
        AutoModelForSequenceClassification.from_config(
            LlamaConfig(**llama, num_labels=1), dtype=torch.float32
        )
        for _ in range(2)
    ]
    return policy, scorers[0], scorers[1]


def config(found: argparse.Namespace) -> Any:
    """The options in TRL's words; the dataset has batches to spare.

    While its last batch is active, accelerate steps the optimizer on every micro-batch.
    """
    from trl.experimental.ppo import PPOConfig

    return PPOConfig(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=found.seed,
        per_device_train_batch_size=found.num_prompts,
        gradient_accumulation_steps=1,
        num_mini_batches=found.num_prompts // found.minibatch,
        num_ppo_epochs=found.ppo_epochs,
        local_rollout_forward_batch_size=found.num_prompts,
        response_length=found.response_len,
        total_episodes=found.num_prompts * (found.updates + 2),
        num_sample_generations=0,
        learning_rate=found.learning_rate,
        temperature=found.temperature,
        save_strategy="no",
        missing_eos_penalty=1.0,
        logging_steps=10**9,
        disable_tqdm=True,
    )


def callback(updates: common.Updates) -> Any:
    """Waits before every update, and takes its time after it."""
    from transformers import TrainerCallback

    class EachUpdate(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            updates.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            updates.end()
            updates.begin()

    return EachUpdate()


if __name__ == "__main__":
    main()
