# SPDX-License-Identifier: Apache-2.0
"""TRL 0.11.4's multi-adapter PPO: one backbone, a reward adapter, a value head on the policy.

    python tests/benchmarks/peers/trl011_multiadapter.py --preset small --threads 1

Set up as its own examples/scripts/ppo_multi_adapter.py: the reference is the policy with its
adapter disabled, and the value head sits on the policy's trunk.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common

warnings.filterwarnings("ignore")


def main(argv: Sequence[str] | None = None) -> None:
    """Run until told to stop."""
    found = common.options(common.parser(__doc__ or ""), argv)
    import peft
    import torch
    import transformers
    import trl
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer  # noqa: F401

    torch.set_num_threads(found.threads)
    torch.manual_seed(found.seed)
    transformers.logging.set_verbosity_error()
    folder = tempfile.mkdtemp()
    save_reward_adapter(found, folder)
    updates = common.Updates(found)
    model = policy(found, folder)
    trainer = trl.PPOTrainer(
        trl.PPOConfig(
            learning_rate=found.learning_rate,
            batch_size=found.num_prompts,
            mini_batch_size=found.minibatch,
            gradient_accumulation_steps=1,
            ppo_epochs=found.ppo_epochs,
            seed=found.seed,
            remove_unused_columns=False,
        ),
        model,
        ref_model=None,
        tokenizer=common.tokenizer(common.PRESETS[found.preset].vocabulary),
    )
    batched = trainer.batched_forward_pass

    def scored(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return batched(*args, **kwargs)
        with updates.phase("score"):
            return batched(*args, **kwargs)

    trainer.batched_forward_pass = scored
    updates.models_are_made(
        f"trl {trl.__version__} multi-adapter",
        torch=torch.__version__,
        trl=trl.__version__,
        transformers=transformers.__version__,
        peft=peft.__version__,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        model_tensors_mb=round(common.tensor_mb(model.parameters()), 1),
    )
    rows = [torch.tensor(row) for row in common.prompts(found, 8 * found.num_prompts)]
    while updates.begin():
        first = len(updates.records) * found.num_prompts % len(rows)
        update(trainer, rows[first : first + found.num_prompts], updates, found)
        updates.end()


def lora(found: argparse.Namespace, task: str) -> Any:
    """The adapter's shape."""
    from peft import LoraConfig

    return LoraConfig(
        r=found.lora_r,
        lora_alpha=2 * found.lora_r,
        lora_dropout=0.0,
        bias="none",
        task_type=task,
        target_modules=common.targets(found),
    )


def save_reward_adapter(found: argparse.Namespace, folder: str) -> None:
    """In a child process, so that its full model is in nobody's peak memory."""
    child = os.fork()
    if child == 0:
        from peft import get_peft_model
        from transformers import AutoModelForSequenceClassification, LlamaConfig

        llama = common.llama_options(common.PRESETS[found.preset])
        model = AutoModelForSequenceClassification.from_config(LlamaConfig(**llama, num_labels=1))
        get_peft_model(model, lora(found, "SEQ_CLS")).save_pretrained(folder)
        os._exit(0)
    os.waitpid(child, 0)


def policy(found: argparse.Namespace, folder: str) -> Any:
    """Policy with value head and reward adapter on one backbone, float32."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from trl import AutoModelForCausalLMWithValueHead

    llama = common.llama_options(common.PRESETS[found.preset])
    base = AutoModelForCausalLM.from_config(LlamaConfig(**llama))
    return AutoModelForCausalLMWithValueHead.from_pretrained(
        base, peft_config=lora(found, "CAUSAL_LM"), reward_adapter=folder
    )


def update(trainer: Any, queries: Any, updates: common.Updates, found: argparse.Namespace) -> None:
    """One rollout and the step on it; what TRL's example does."""
    import torch

    with updates.phase("generate"), torch.no_grad():
        responses = trainer.generate(
            queries,
            return_prompt=False,
            batch_size=found.num_prompts,
            top_k=0,
            top_p=1.0,
            do_sample=True,
            temperature=found.temperature,
            pad_token_id=common.PAD,
            eos_token_id=None,
            suppress_tokens=[common.PAD, common.EOS],
            max_new_tokens=found.response_len,
            use_cache=True,
        )
    ids = torch.stack([torch.cat(pair) for pair in zip(queries, responses, strict=True)])
    with updates.phase("score"):
        scores = trainer.accelerator.unwrap_model(trainer.model).compute_reward_score(
            input_ids=ids, attention_mask=torch.ones_like(ids)
        )
    trainer.step(queries, responses, [row[-1, 0] for row in scores])


if __name__ == "__main__":
    main()
