# SPDX-License-Identifier: Apache-2.0
"""Little PPO runs on tiny random models, for the tests of the trainer, its guards and its stage."""

import contextlib

import torch
from datasets import Dataset
from small import EOS, backbone, copied

from lora_rlhf.algorithms import policy_stage
from lora_rlhf.algorithms.ppo import ppo_stage
from lora_rlhf.algorithms.ppo.ppo_trainer import PPOTrainer
from lora_rlhf.recipe.schema import ModelSection, PpoSection, Recipe
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record
from lora_rlhf.training.checkpoint_callback import CheckpointCallback
from lora_rlhf.training.stage_context import StageContext
from lora_rlhf.training.stage_log import StageLog

ARGS = {
    "per_device_train_batch_size": 4, "steps_per_generation": 1, "max_completion_length": 6,
    "learning_rate": 1e-2, "warmup_steps": 0,
}  # fmt: skip


def recipe(args=None, *, seed=0, model=None, **section):
    section = {"updates": 1, "value_warmup_updates": 0, **section}
    data = {"text": [{"path": "text.jsonl"}]} if section.get("ptx_coef") else {}
    return Recipe(
        name="little",
        seed=seed,
        model=ModelSection(id="tiny", **(model or {})),
        data=data,
        ppo=PpoSection(**section, args={**ARGS, **(args or {})}),
    )


def roles(**options):
    """A backbone as it stands before PPO: SFT and reward are trained, each in its own way."""
    torch.manual_seed(0)
    made = backbone("llama", "policy", "reference", "reward", **options)
    made.reward_offset["reward"] = 0.25
    return made


def eos_more_often(made, score=3.0):
    """Let completions end at different lengths."""
    with torch.no_grad():
        made.causal.get_output_embeddings().weight[EOS] *= score
    return made


_STARTED = {}


def started(recipe):
    """The roles at the start of PPO; adding the value takes PEFT longer than copying the whole."""
    key = recipe.ppo.reward, recipe.ppo.value
    if key not in _STARTED:
        _STARTED[key] = roles()
        ppo_stage.start_roles(_STARTED[key], recipe)
    return copied(_STARTED[key])


def prompts(n=32):
    """Of one to three words, all different."""
    words = [f"w{5 + i}" for i in range(40)]
    return Dataset.from_list([{"prompt": " ".join(words[i : i + 1 + i % 3])} for i in range(n)])


def w9(completion_ids, **_):
    """A reward: the share of the token 9."""
    return [ids.count(9) / len(ids) for ids in completion_ids]


class Run:
    """One PPO run. `go` trains; what is to be broken is broken between `__init__` and `go`."""

    def __init__(
        self,
        folder,
        args=None,
        *,
        made=None,
        rewards=(w9,),
        weights=None,
        trainer=PPOTrainer,
        n=32,
        callbacks=(),
        text=None,
        **section,
    ):
        self.recipe = recipe(args, **section)
        self.record = Record.open(folder, self.recipe)
        if made:
            ppo_stage.start_roles(made, self.recipe)
        self.backbone = made or started(self.recipe)
        config = ppo_stage.arguments(self.recipe, self.record.folder)
        config.reward_weights = weights
        per_update = policy_stage.steps_per_update(config)
        progress = Progress(quiet=True)
        log = StageLog(self.record, "ppo", progress, steps_per_unit=per_update)
        self.stage = contextlib.ExitStack()
        self.stage.enter_context(self.backbone.training("policy", "value"))
        self.trainer = trainer(
            self.backbone,
            args=config,
            ppo=self.recipe.ppo,
            reward_funcs=list(rewards),
            train_dataset=prompts(n),
            progress=progress,
            callbacks=[log, *callbacks],
            text=text,
        )

    def go(self):
        with self.stage:
            self.trainer.train()
        return self

    def kept(self):
        """The same as a stage does it: with checkpoints, and bad updates skipped."""
        unit = policy_stage.steps_per_update(self.trainer.args)
        context = StageContext(self.recipe, self.backbone, self.record, self.trainer.progress)
        keeper = CheckpointCallback(context, "ppo", "ppo", unit)
        with self.stage:
            keeper.train(self.trainer)
        return self

    @property
    def lines(self):
        return self.record.metrics("ppo")

    def weights(self):
        """Every tensor of policy and value."""
        return {
            f"{role} {name}": p.detach().clone()
            for role in ("policy", "value")
            for name, p in self.backbone.role_parameters(role)
        }
