# SPDX-License-Identifier: Apache-2.0
"""Findings of the doctor: stage, severity, reason and remedy of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_rlhf.errors import counted
from lora_rlhf.estimates import differs

STAGES = ("data", "sft", "reward", "ppo", "evaluate")
"""Stages that can be at fault, in order. `ppo` stands for whatever algorithm the run uses."""

SMALL = 100
"""Number of prompts below which the interval of a rate is wider than 0.2."""


@dataclass(frozen=True)
class Finding:
    """One observation about a run."""

    stage: str  # one of STAGES
    severity: str  # fault (the result cannot be trusted), warning or note
    name: str  # does not change between versions
    what: str  # the problem, with its numbers
    why: str
    remedy: str

    def line(self) -> str:
        """Return the whole finding on one line, for messages during a run."""
        return f"{self.severity}: {self.what}: {self.why}; to do: {self.remedy}"


Findings = Iterator[Finding]
Line = dict[str, float]
Lines = dict[str, list[Line]]
"""The metrics of every line of `metrics.jsonl`, by stage."""

_EXPLOITED = "PPO increases whatever the reward model rewards, right or wrong"
_SHUFFLED = "read twenty comparisons to see whether their labels are shuffled; add comparisons; "

_LEARNERS = {"demonstrations": "SFT", "comparisons": "the reward model"}

KNOWN: dict[str, tuple[str, str, str, str]] = {
    "pad_is_eos": (
        "data", "fault", "padding is masked out of the loss, and the end token with it, so the "
        "model never learns to stop",
        "set tokenizer.pad_token to an unused token and save the tokenizer beside the base model"),
    "rebuilt": (
        "data", "warning", "the files were taken as they are: nothing shows if they were changed",
        "run the recipe into a new --out if the result matters"),
    "contradictions": (
        "data", "warning", "contradictory labels limit what a reward model can learn",
        "give labelers clearer instructions"),
    "dropped": (
        "data", "note", "the remaining rows may differ from the prompts of users",
        "raise data.max_tokens or data.max_prompt_tokens, if memory allows"),
    "filtered": (
        "data", "note", "training does not see all that is in the file",
        "read a few of the dropped rows; `columns:` maps columns that have other names"),
    "few_rows": (
        "data", "note", f"below {SMALL}, what is learned or measured may be chance",
        "use more of them"),
    "agreement": (
        "data", "warning", "a reward model is seldom more consistent than its labelers",
        "give clearer instructions, use fewer and better labelers, or collect more labels per "
        "pair"),
    "sft_loss_rises": (
        "sft", "fault", "every later stage starts from this model",
        "lower sft.args.learning_rate"),
    "sft_overfits": (
        "sft", "warning", "the model memorised the demonstrations",
        "train for fewer epochs, or add demonstrations"),
    "sft_at_chance": (
        "sft", "warning", "the model predicts little of such answers, and PPO samples from it",
        "raise sft.args.learning_rate, or train for more epochs; use a base that knows such text "
        "(the packaged `tiny` has read its own task only)"),
    "sft_below_base": (
        "sft", "warning", "PPO starts from a model that is worse than the base",
        "improve the demonstrations"),
    "no_eos": (
        "sft", "fault", "the others are cut off at max_completion_length, so the reward scores "
        "fragments; this happens when pad = eos, because the end token is then never learned",
        "use a tokenizer whose padding token is not its end token; check that demonstrations end"),
    "few_eos": (
        "sft", "warning", "the others are cut off at max_completion_length, so the reward scores "
        "fragments",
        "raise ppo.args.max_completion_length; check that demonstrations end; train SFT for more "
        "epochs"),
    "wrong_reference": (
        "sft", "fault", "it must be 0, because the policy starts as a copy of its reference",
        "check whether adapters/sft was changed, or another adapter was loaded as policy or "
        "reference"),
    "reward_inverted": (
        "reward", "fault", "it prefers what people rejected, and PPO will learn the same",
        "check for swapped columns (`columns:`)"),
    "reward_untrained": (
        "reward", "fault", _EXPLOITED,
        "raise reward.args.learning_rate (1e-4 to 1e-3 is usual), or train for more epochs"),
    "reward_memorised": (
        "reward", "fault", _EXPLOITED, _SHUFFLED + "train for fewer epochs"),
    "reward_learning_rate": (
        "reward", "fault", "updates are too large to learn anything from the comparisons",
        "divide reward.args.learning_rate by ten (1e-4 to 1e-3 is usual)"),
    "reward_at_chance": (
        "reward", "fault", _EXPLOITED,
        _SHUFFLED + "raise reward.args.learning_rate, or train for more epochs"),
    "reward_gate": (
        "reward", "fault", _EXPLOITED, "improve the comparisons, or train longer"),
    "reward_is_length": (
        "reward", "fault", "PPO will only change the length of answers (2310.03716)",
        ""),
    "labels_lean_on_length": (
        "reward", "note", "length is the easiest thing to learn from these comparisons",
        "watch completions/length and the length-controlled win rate; "),
    "held_out_at_chance": (
        "reward", "warning", "its scores of the policy, and ppo.watch: best, mean nothing",
        "add comparisons: each of the two models is trained on half of them"),
    "probes": (
        "reward", "warning", "a policy that is trained against it learns to do the same",
        "add comparisons in which such an answer is the worse one; read the samples for it"),
    "gold_falls": (
        "reward", "fault", "the reward model rewards something other than what is wanted",
        "read the samples to see what it rewards; improve the comparisons; raise ppo.kl_coef"),
    "paid_by_length": (
        "reward", "warning", "length may be all that was learned (2310.03716)",
        "compare win rates with their length-controlled versions; add comparisons in which the "
        "shorter completion is better"),
    "hacked": (
        "reward", "fault", "the policy exploits the reward model without being better",
        "improve the comparisons; raise ppo.kl_coef; use fewer ppo.updates; set ppo.watch: best"),
    "policy_still": (
        "ppo", "warning", "the policy still behaves like SFT",
        "raise ppo.args.learning_rate or ppo.updates"),
    "learning_rate": (
        "ppo", "fault", "updates are too large: PPO is only valid near the policy that generated "
        "the samples",
        "divide ppo.args.learning_rate by ten (usual for LoRA on a model of 100M parameters or "
        "more: 1e-5 to 2e-4)"),
    "no_kl_penalty": (
        "ppo", "fault", "nothing keeps the policy near the text that the reward model was trained "
        "on",
        "set ppo.kl_coef to 0.02 to 0.05, or set ppo.kl_target or ppo.kl_budget"),
    "worse": (
        "evaluate", "fault", "PPO made the model worse",
        "resolve the findings above; until then SFT is the better model of this run"),
    "kinds": (
        "evaluate", "warning", "the mean over all prompts hides it",
        "read the answers to these prompts in samples.jsonl; add demonstrations and comparisons of "
        "this kind; raise ppo.kl_coef"),
    "length": (
        "evaluate", "warning", "the gain may come from length alone",
        "add comparisons in which the shorter answer is preferred"),
    "undecided": (
        "evaluate", "note", "it was not shown that PPO helped",
        "evaluate on more prompts (evaluate.n) to detect smaller differences; raise ppo.updates"),
    "no_judge": (
        "evaluate", "note", "a gain by this judge proves little, and no gain is a bad sign",
        "set reward.held_out_model: true, which trains a judge on other comparisons"),
    "few_prompts": (
        "evaluate", "note", "only large differences show",
        "use more prompts (data.prompts or data.held_out) and a larger evaluate.n"),
}  # fmt: skip
"""Kind of finding -> stage, severity, why, remedy. Findings on stopped stages and on the signs of
`alarms` are made without this table."""


def finding(kind: str, what: str, about: str = "", severity: str = "", more: str = "") -> Finding:
    """Make a finding of a kind in `KNOWN`; append `about` to its name and `more` to its remedy."""
    stage, usual, why, remedy = KNOWN[kind]
    name = f"{kind}_{about}" if about else kind
    return Finding(stage, severity or usual, name, what, why, remedy + more)


_DIRECTIONS = {
    "ranks": "; check the order of `ranks` (1 is best)",
    "scores": "; check the order of `scores` (the highest is best)",
    "label": "; check that `label` is true for good answers",
}
"""Column of comparisons that judges -> what may be wrong with it."""


def direction(data: dict[str, Any]) -> str:
    """Return what to check in the columns that judge the comparisons of this run."""
    layouts = data.get("comparisons", {}).get("read_as", ())
    columns = {column for layout in layouts for column in str(layout).split(" + ")}
    return "".join(more for column, more in _DIRECTIONS.items() if column in columns)


def few_rows(name: str, report: dict[str, Any]) -> Findings:
    """Check the sizes of the sets that SFT and the reward model learn from and are judged on."""
    train, held_out = report.get("train", SMALL), report.get("held_out", SMALL)
    if name not in _LEARNERS or min(train, held_out) >= SMALL:
        return
    few = {"to learn from": train, f"to test {_LEARNERS[name]} on": held_out}
    noun = name.removesuffix("s")
    what = [f"only {counted(n, noun)} {use}" for use, n in few.items() if n < SMALL]
    more = "" if train < SMALL else ", or a larger data.held_out"
    yield finding("few_rows", " and ".join(what), name, more=more)


def few_prompts(n: int) -> Findings:
    """Check the number of evaluation prompts; a run does so before training."""
    if n < SMALL:
        yield finding("few_prompts", f"the evaluation rests on {counted(n, 'prompt')}")


def rate(estimate: dict[str, Any]) -> str:
    """Format as `0.412 [0.350, 0.470], n=128`."""
    low, high = estimate["low"], estimate["high"]
    interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{estimate['value']:.3f}{interval}, n={estimate['n']}"


def above(estimate: Any, bound: float) -> bool:
    """True if an estimate is clearly above `bound`; False without an interval."""
    return differs(estimate, bound) > 0


def below(estimate: Any, bound: float) -> bool:
    """True if an estimate is clearly below `bound`; False without an interval."""
    return differs(estimate, bound) < 0
