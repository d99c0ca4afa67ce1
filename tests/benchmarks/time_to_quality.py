# SPDX-License-Identifier: Apache-2.0
"""Time to quality: CPU seconds of training until the policy wins 57 % against SFT, by the checker.

    python tests/benchmarks/time_to_quality.py runs/study --out times --page docs/benchmarks.md

`runs/study` is the folder of the closed world's study, whose SFT and reward models of each seed are
used, and made where they are not there.

Ours and TRL's own trainers start from one SFT adapter and one reward model of the closed world.
Peers are plain `trl.GRPOTrainer` and `trl.RLOOTrainer` on a PEFT model with the settings of ours:
same prompts, episodes per update, LoRA and reward (our reward model's scores, and the penalty for a
missing eos). Every `--every` updates the policy answers held-out prompts, outside the clock. Every
run is a process of its own with one thread; finished runs are kept in `--out` and not repeated.
On seed 0 each program tries all of `--rates`, and later seeds take its fastest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PROGRAMS = {
    "ppo": "ours, PPO", "grpo": "ours, GRPO", "rloo": "ours, RLOO",
    "trl-grpo": "TRL's GRPO", "trl-rloo": "TRL's RLOO",
}  # fmt: skip


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the whole measurement, and of one run inside it."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("study", type=Path, help="folder with seed-N/shared: SFT and reward model")
    made.add_argument("--out", type=Path, required=True, help="one JSON file a run")
    made.add_argument("--programs", default=",".join(PROGRAMS))
    made.add_argument("--seeds", default="0,1")
    made.add_argument("--rates", default="1e-3,2e-3", help="learning rates tried on the first seed")
    made.add_argument("--target", type=float, default=0.57, help="win rate against SFT")
    made.add_argument("--updates", type=int, default=24, help="at most")
    made.add_argument("--every", type=int, default=1, help="updates between evaluations")
    made.add_argument("--prompts", type=int, default=256, help="held out, the same every time")
    made.add_argument("--page", type=Path, help="put the table between the page's markers")
    made.add_argument("--one", nargs=3, metavar=("PROGRAM", "SEED", "RATE"), help=argparse.SUPPRESS)
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the table."""
    found = options(argv)
    if found.one:
        program, seed, rate = found.one
        print(json.dumps(run(found, program, int(seed), float(rate))))
        return
    found.out.mkdir(parents=True, exist_ok=True)
    first, *others = found.seeds.split(",")
    runs: list[dict[str, Any]] = []
    for program in found.programs.split(","):
        tried = [once(found, program, first, rate) for rate in found.rates.split(",")]
        best = min(tried, key=lambda r: (r["seconds"] or float("inf"), -r["curve"][-1]["win_rate"]))
        runs += tried
        runs += [once(found, program, seed, str(best["rate"])) for seed in others]
    text = markdown(runs, found)
    print(text)
    if found.page:
        import report

        report.into_page(found.page, "time to quality", text)


def once(found: argparse.Namespace, program: str, seed: str, rate: str) -> dict[str, Any]:
    """One run in a process of its own, unless its file is there."""
    path = found.out / f"{program}-{seed}-{float(rate):g}.json"
    if not path.exists():
        command = [sys.executable, __file__, str(found.study), "--out", str(found.out)]
        for name in ("target", "updates", "every", "prompts"):
            command += [f"--{name}", str(getattr(found, name))]
        command += ["--one", program, seed, rate]
        made = subprocess.run(
            command, stdout=subprocess.PIPE, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        path.write_bytes(made.stdout.splitlines()[-1] + b"\n")
        print(path.read_text(), end="", file=sys.stderr, flush=True)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def run(found: argparse.Namespace, program: str, seed: int, rate: float) -> dict[str, Any]:
    """Train until the target is reached, and return what the clock said."""
    import torch

    from lora_rlhf import load_recipe, tiny
    from lora_rlhf import run as run_pipeline
    from lora_rlhf.data.dataset_builder import prompts
    from lora_rlhf.runtime import quiet
    from lora_rlhf.serving import loaded_run

    quiet.process()
    torch.set_num_threads(1)
    start = found.study / f"seed-{seed}" / "shared"
    run_pipeline(load_recipe(tiny.recipe(), [f"seed={seed}"]), start, until="reward")
    backbone, _ = loaded_run.load(start)
    algorithm = program.removeprefix("trl-")
    sets = [f"algorithm={algorithm}", f"ppo.updates={found.updates}"]
    sets += [f"{algorithm}.args.learning_rate={rate}"]
    recipe = load_recipe(start / "recipe.yaml", sets)
    torch.manual_seed(seed)
    prepared = prompts(recipe, backbone.tokenizer)
    make = theirs if program.startswith("trl-") else ours
    watch = Watch(found, backbone, prepared.held_out.select(range(found.prompts)), recipe)
    with tempfile.TemporaryDirectory() as out:
        make(recipe, backbone, prepared.train, watch, Path(out))
    return {"program": program, "seed": seed, "rate": rate, **watch.result()}


class Watch:
    """The clock of one run, and the evaluations outside it."""

    def __init__(self, found: argparse.Namespace, backbone: Any, rows: Any, recipe: Any) -> None:
        self.target, self.every = found.target, found.every
        self.backbone, self.recipe, self.rows = backbone, recipe, rows
        self.curve: list[dict[str, float]] = []
        self.spent = self._since = 0.0
        self.take: Callable[[], None] = lambda: None  # a peer's weights into the backbone's policy
        self.sft = self._gold("reference")

    def _gold(self, role: str) -> list[float]:
        from lora_rlhf.data.closed_world import checkers

        ids = [self.backbone.encode_prompt(prompt) for prompt in self.rows["prompt"]]
        limit = self.recipe.ppo.args["max_completion_length"]
        answers = self.backbone.generate(ids, role, max_new_tokens=limit, seed=1, batch_size=128)
        items = [checkers.Item.from_dict(json.loads(item)) for item in self.rows["item"]]
        texts = [self.backbone.decode(answer) for answer in answers]
        return [checkers.check(i, text).reward for i, text in zip(items, texts, strict=True)]

    def callback(self, per_update: int) -> Any:
        """A callback of TRL's trainers that stops the clock for each evaluation."""
        from transformers import TrainerCallback

        class Clock(TrainerCallback):
            def on_train_begin(_, *__: Any, **___: Any) -> None:  # noqa: N805
                self._since = time.process_time()

            def on_step_end(_, args: Any, state: Any, control: Any, **__: Any) -> None:  # noqa: N805
                if state.global_step % (per_update * self.every) == 0:
                    control.should_training_stop |= self.look(state.global_step // per_update)

        return Clock()

    def look(self, update: int) -> bool:
        """Evaluate the policy; True if it has reached the target."""
        import torch

        from lora_rlhf.estimates import win_rate

        self.spent += time.process_time() - self._since
        state = torch.get_rng_state()
        self.take()
        rate = win_rate(self._gold("policy"), self.sft)["value"]
        torch.set_rng_state(state)
        self.curve.append({"update": update, "seconds": round(self.spent, 2), "win_rate": rate})
        print(self.curve[-1], file=sys.stderr, flush=True)
        self._since = time.process_time()
        return bool(rate >= self.target)

    def result(self) -> dict[str, Any]:
        """The seconds and updates at the first evaluation at the target, None without one."""
        last = self.curve[-1]
        reached = last["win_rate"] >= self.target
        return {
            "seconds": last["seconds"] if reached else None,
            "updates": int(last["update"]),
            "per_update": last["seconds"] / last["update"],
            "curve": self.curve,
        }


def ours(recipe: Any, backbone: Any, train: Any, watch: Watch, out: Path) -> None:
    """Train as our stages do; the checker's reward, which they only log, is left out."""
    from lora_rlhf.algorithms import grpo_rloo, policy_stage, reward_functions
    from lora_rlhf.algorithms.ppo import ppo_stage
    from lora_rlhf.models import fused_layers
    from lora_rlhf.runs.progress import Progress

    functions = reward_functions.of_recipe(recipe, backbone, train)[0][:1]
    common = {"train_dataset": train, "progress": Progress(quiet=True)}
    ppo_stage.start_roles(backbone, recipe)
    if recipe.algorithm == "ppo":
        args = ppo_stage.arguments(recipe, out)
        build: Any = ppo_stage.PPOTrainer
        common["ppo"] = recipe.ppo
        roles: tuple[str, ...] = ("policy", "value")
    else:
        args = grpo_rloo.arguments(recipe, out)
        build = {"grpo": grpo_rloo.GroupGRPO, "rloo": grpo_rloo.GroupRLOO}[recipe.algorithm]
        roles = ("policy",)
        functions.append(reward_functions.eos_penalty(backbone, recipe.ppo.missing_eos_penalty))
    args.reward_weights = [1.0] * len(functions)
    clock = watch.callback(policy_stage.steps_per_update(args))
    with backbone.training(*roles):
        trainer = build(backbone, args=args, reward_funcs=functions, callbacks=[clock], **common)
        with fused_layers.layers(backbone):
            trainer.train()


def theirs(recipe: Any, backbone: Any, train: Any, watch: Watch, out: Path) -> None:
    """Train by TRL's own trainer on a PEFT model; the backbone only scores and evaluates."""
    import torch
    import trl
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    from lora_rlhf import tiny
    from lora_rlhf.algorithms import grpo_rloo, policy_stage, reward_functions
    from lora_rlhf.models import adapters
    from lora_rlhf.training.reward import ensemble

    def score(prompts: Any, completion_ids: Any, **_: Any) -> list[float]:
        ids = [backbone.encode_prompt(prompt) for prompt in prompts]
        episodes = list(zip(ids, completion_ids, strict=True))
        return ensemble.scores(backbone, episodes, recipe.reward).rewards

    def take() -> None:
        weights = get_peft_model_state_dict(trainer.model)
        with torch.no_grad():
            for name, parameter in backbone.role_parameters("policy"):
                parameter.copy_(weights[name])

    backbone.copy_role("reference", "policy")
    adapters.save_role(backbone, "reference", out / "sft")
    base = AutoModelForCausalLM.from_pretrained(tiny.path(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, out / "sft", is_trainable=True)
    args = grpo_rloo.arguments(recipe, out)
    args.reward_weights = [1.0, 1.0]
    penalty = reward_functions.eos_penalty(backbone, recipe.ppo.missing_eos_penalty)
    build = {"grpo": trl.GRPOTrainer, "rloo": trl.RLOOTrainer}[recipe.algorithm]
    trainer = build(
        model=model,
        args=args,
        reward_funcs=[score, penalty],
        train_dataset=train,
        processing_class=backbone.tokenizer,
        callbacks=[watch.callback(policy_stage.steps_per_update(args))],
    )
    watch.take = take
    trainer.train()


def markdown(runs: list[dict[str, Any]], found: argparse.Namespace) -> str:
    """A row for each program, rate and seed, then seconds against the best peer's."""
    import report

    heads = ["program", "learning rate", "seed", "win rate at the end", "updates"]
    heads += ["CPU seconds", "CPU seconds an update"]
    rows = []
    for one in runs:
        last = one["curve"][-1]
        seconds = f"{one['seconds']:.1f}" if one["seconds"] else f"not in {last['seconds']:.1f}"
        cells = [PROGRAMS[one["program"]], f"{one['rate']:g}", str(one["seed"])]
        cells += [f"{last['win_rate']:.3f}", str(one["updates"]), seconds]
        rows.append([*cells, f"{one['per_update']:.2f}"])
    parts = [report.table(heads, rows)]
    best = chosen(runs)
    peers = [name for name in best if name.startswith("trl-")]
    lines = []
    for name in (name for name in best if name not in peers):
        cells = [PROGRAMS[name]]
        for peer in peers:
            pairs = [
                best[peer][seed] / own
                for seed, own in best[name].items()
                if own and best[peer].get(seed)
            ]
            count = f"{len(pairs)} seed{'s' * (len(pairs) > 1)}"
            spread = f"{min(pairs):.2f} to {max(pairs):.2f}" if pairs else ""
            cells.append(f"{median(pairs):.2f} ({spread}), {count}" if pairs else "none")
        lines.append(cells)
    parts.append("How many times fewer CPU seconds ours took, on seeds where both reached it.")
    parts.append(report.table(["", *(f"than {PROGRAMS[peer]}" for peer in peers)], lines))
    parts.append(
        f"Target {found.target:g}; {found.prompts} prompts every {found.every} updates, at "
        f"most {found.updates}; one thread of {report.processor()}."
    )
    return "\n\n".join(parts)


def chosen(runs: list[dict[str, Any]]) -> dict[str, dict[int, float | None]]:
    """Program -> seed -> seconds at its fastest rate of the seed."""
    best: dict[str, dict[int, float | None]] = {}
    for one in runs:
        mine = best.setdefault(one["program"], {})
        known = [s for s in (mine.get(one["seed"]), one["seconds"]) if s]
        mine[one["seed"]] = min(known, default=None)
    return best


if __name__ == "__main__":
    main()
