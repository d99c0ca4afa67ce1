# SPDX-License-Identifier: Apache-2.0
"""Memory that runs out: smaller batches, the same gradients and samples; at one row, remedies.

The allocator is a fake one that has room for so many rows: it raises what torch raises, in the
forward or, through a hook, in the middle of the backward. One test takes the real one.
"""

import contextlib
import json

import killed
import pytest
import torch
from small import EPISODES, backbone
from transformers import TrainerCallback
from typer.testing import CliRunner

from lora_rlhf import pipeline
from lora_rlhf.cli import app
from lora_rlhf.errors import MemoryLimitError
from lora_rlhf.models import sampler, scoring
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.planning import gpu_fit
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import oom
from lora_rlhf.training import checkpoint_callback, microbatch_splitting

PASSES = ("generation", "scoring", "training")
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB"


class Room:
    """Room for so many rows of each kind of pass; counts how often there was too little.

    Args:
        most: Kind -> rows; `backward` fails after the forward.
    """

    def __init__(self, **most: int) -> None:
        self.most, self.short = most, dict.fromkeys(most, 0)
        self.rows: dict[str, set[int]] = {kind: set() for kind in (*PASSES, "backward")}
        self.open = False

    def take(self, kind: str, rows: int) -> None:
        if self.open and rows > self.most.get(kind, rows):
            self.short[kind] += 1
            raise torch.OutOfMemoryError(MESSAGE)
        self.rows[kind].add(rows)

    def watch(self, made: Backbone) -> None:
        """Every forward of this backbone asks for room first."""

        def before(_, args, kwargs):
            ids = kwargs.get("input_ids", args[0] if args else None)
            kind = "training" if torch.is_grad_enabled() else "scoring"
            kind = "generation" if kwargs.get("use_cache") else kind
            self.take(kind, len(ids))

        def after(_, args, kwargs, output):
            states = output.last_hidden_state
            if states.requires_grad:
                states.register_hook(lambda gradient: self.take("backward", len(gradient)))

        made.decoder.register_forward_pre_hook(before, with_kwargs=True)
        made.decoder.register_forward_hook(after, with_kwargs=True)


class Gradients(TrainerCallback):
    """What every optimizer step of a training gets, before it is clipped and after."""

    def __init__(self) -> None:
        self.found: list[dict[str, torch.Tensor]] = []

    def keep(self, made: Backbone) -> None:
        self.found.append(
            {
                f"{role} {name}": p.grad.clone()
                for role in sorted(made.trained_roles)
                for name, p in made.role_parameters(role)
                if p.grad is not None
            }
        )


@contextlib.contextmanager
def watched(room: Room | None, stage: str):
    """The gradients of the first optimizer step of a training, which is then stopped."""
    with pytest.MonkeyPatch.context() as patch:
        seen = Gradients()
        real_load, real_train = Backbone.load, checkpoint_callback.CheckpointCallback.train

        def load(*args):
            made = real_load(*args)
            if room is not None:
                room.watch(made)
            return made

        def train(self, trainer):
            if room is not None:
                room.open = True  # what is done before, at load, has no halves
            if self.name == stage:
                clip = trainer._clip_grad_norm

                def keep(model):
                    seen.keep(self.backbone)
                    return clip(model)

                trainer._clip_grad_norm = keep
                trainer.args.max_steps = 1
            return real_train(self, trainer)

        patch.setattr(Backbone, "load", load)
        patch.setattr(checkpoint_callback.CheckpointCallback, "train", train)
        yield seen


SETS = (
    "reward.held_out_model=false", "lora.top_fraction=0.5", "reward.gate=warn", "evaluate.n=2",
    "ppo.value_warmup_updates=0", "ppo.args.gradient_accumulation_steps=2",
    "ppo.entropy_coef=0.01",
)  # fmt: skip


def one(folder, out, stage, room=None, *sets, algorithm="ppo", start=None):
    recipe = killed.recipe(folder, *SETS, f"algorithm={algorithm}", *sets)
    with watched(room, stage) as seen:
        with contextlib.suppress(IndexError):
            record = pipeline.run(
                recipe,
                folder / out,
                start_from=start,
                until=stage if stage in ("sft", "reward") else "policy",
            )
        return record, seen.found


def compare(ours, theirs):
    """Within 1e-6, of what an optimizer step gets."""
    assert len(ours) == len(theirs) == 1 and ours[0].keys() == theirs[0].keys()
    assert max(float(g.abs().max()) for g in theirs[0].values()) > 1e-3, "it could not tell"
    for name, gradient in theirs[0].items():
        torch.testing.assert_close(ours[0][name], gradient, rtol=0, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """SFT and reward model, which the algorithms share."""
    folder = tmp_path_factory.mktemp("halving")
    killed.write(folder)
    pipeline.run(killed.recipe(folder, *SETS), folder / "start", until="reward")
    return folder


@pytest.mark.parametrize(
    ("stage", "where"),
    [("sft", "backward"),
     *(pytest.param(*other, marks=pytest.mark.slow) for other in
       (("sft", "training"), ("reward", "training"), ("reward", "backward")))],
)  # fmt: skip
def test_the_gradient_of_the_first_stages_is_the_same(start, stage, where):
    room = Room(**{where: 6 if stage == "reward" else 1})
    before = start / "start" if stage == "reward" else None
    sets = ("reward.args.learning_rate=2e-2",) if before else ()
    _, wanted = one(start, f"{stage}-{where}-all", stage, None, *sets)
    record, found = one(start, f"{stage}-{where}-half", stage, room, *sets)
    assert room.short[where] > 0 and record.data["clock"]["rows_at_once"]["training"] < 8
    compare(found, wanted)


_KINDS = [
    *(("grpo", f"grpo.args={{loss_type: {kind}}}") for kind in ("grpo", "bnpo", "dapo", "dr_grpo")),
    ("rloo", "rloo.num_generations=2"), ("dpo", "dpo.beta=0.1"),
]  # fmt: skip
OTHERS = [
    ("ppo", "ppo.value=adapter", "training"), ("ppo", "ppo.value=head", "backward"),
    *((*kind, where) for kind in _KINDS for where in ("training", "backward")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "more", "where"),
    [("ppo", "ppo.value=adapter", "backward"), ("ppo", "ppo.value=head", "training"),
     *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)],
)  # fmt: skip
def test_the_gradient_of_every_algorithm_is_the_same(start, algorithm, more, where):
    """With text (ptx), an entropy bonus, a frozen trunk and two micro-batches a step."""
    name = f"{algorithm}-{more[-9:].strip('}')}-{where}".replace(" ", "")
    limit = {"dpo": 4}.get(algorithm, 2)  # of DPO's rows, two are a comparison
    room = Room(**{where: limit})
    options = {"algorithm": algorithm, "start": start / "start"}
    _, wanted = one(start, name + "-all", algorithm, None, more, **options)
    record, found = one(start, name + "-half", algorithm, room, more, **options)
    assert room.short[where] > 0 and max(room.rows[where]) <= limit
    assert record.data["clock"]["rows_at_once"]["training"] == 2
    compare(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_groups_are_sampled_and_scored_in_smaller_batches(start, algorithm):
    """The same tokens, and so the same gradient."""
    options = {"algorithm": algorithm, "start": start / "start"}
    _, wanted = one(start, f"{algorithm}-rows-all", algorithm, None, **options)
    room = Room(generation=3, scoring=2)
    record, found = one(start, f"{algorithm}-rows-half", algorithm, room, **options)
    assert room.short["generation"] > 0 and room.short["scoring"] > 0
    assert record.data["clock"]["rows_at_once"].keys() == {"generation", "scoring"}
    assert record.data["stages"][algorithm]["identities"]["sampler_difference"] < 1e-3
    compare(found, wanted)


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [("grpo", "grpo.args={entropy_coef: 0.01}"),
     *(pytest.param(*other, marks=pytest.mark.slow) for other in
       (("grpo", "grpo.args={top_entropy_quantile: 0.5}"), ("dpo", "dpo.args={loss_type: [aot]}"),
        ("dpo", "dpo.args={loss_type: [sft]}")))],
)  # fmt: skip
def test_loss_that_is_no_sum_over_rows_is_not_split(start, algorithm, more, monkeypatch):
    """Pieces would give another gradient: it stops, and says so."""
    monkeypatch.setattr(pipeline.run_memory, "remedies", lambda _: "")  # nine plans
    recipe = killed.recipe(start, *SETS, f"algorithm={algorithm}", more)
    out = start / f"whole-{algorithm}-{len(more)}"
    with (
        watched(Room(training=2), "none"),
        pytest.raises(MemoryLimitError, match="cannot be split"),
    ):
        pipeline.run(recipe, out, start_from=start / "start", until="policy")


def test_identity_check_runs_again_in_the_repeated_step(start):
    """PPO takes the reference's log-probs while the policy's graph is there."""
    room = Room(scoring=2)
    record, _ = one(start, "moved", "none", room, "ppo.updates=1", start=start / "start")
    assert record.data["clock"]["rows_at_once"] == {"scoring": 2, "training": 2}
    identities = record.data["stages"]["ppo"]["identities"]
    assert identities["mean_abs_log_ratio_after_first_update"] > 0


def test_repeated_step_is_logged_once(start):
    whole, _ = one(start, "log-all", "none", None, "ppo.updates=1", start=start / "start")
    room = Room(backward=2)
    half, _ = one(start, "log-half", "none", room, "ppo.updates=1", start=start / "start")
    assert room.short["backward"] > 0
    [a], [b] = (record.metrics("ppo") for record in (whole, half))
    assert a.keys() == b.keys()
    for key in ("kl/sequence", "reward/score", "policy/grad_norm", "value/grad_norm", "loss"):
        assert b[key] == pytest.approx(a[key], abs=1e-5), key


def test_samples_and_scores_are_the_same(start):
    """Whoever is in the batch: each row has its own uniforms."""
    made = backbone("llama", "policy", "reference", "reward", top_fraction=0.5)
    prompts = [prompt for prompt, _ in EPISODES] * 4
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3, "keep_states": True}

    def look():
        with made.role("policy"):
            drawn = sampler.sample(made, prompts, **options)
        return (
            drawn,
            scoring.episode_logprobs(made, EPISODES, "policy"),
            scoring.scores(made, EPISODES),
        )

    whole = look()
    room = Room(generation=5, scoring=1)
    room.watch(made)
    room.open = True
    messages: list[str] = []
    made.backoff.say = messages.append
    half = look()
    assert [s.ids for s in half[0]] == [s.ids for s in whole[0]]
    for a, b in zip(half[0], whole[0], strict=True):
        torch.testing.assert_close(a.states, b.states, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(half[1]), torch.cat(whole[1]), rtol=0, atol=1e-5)
    assert half[2] == pytest.approx(whole[2], abs=1e-5)
    assert made.backoff.limits == {"generation": 3, "scoring": 1}
    assert room.short == {"generation": 2, "scoring": 2}, "12 -> 6 -> 3, 3 -> 2 -> 1, never again"
    assert len(messages) == 4 and "memory ran out in generation at 12 rows" in messages[0]
    look()
    assert room.short == {"generation": 2, "scoring": 2}


def test_resume_keeps_the_halved_limits(start):
    """Sums of other batches round otherwise: the same bits need the same cuts."""
    recipe = killed.recipe(start, *SETS, "algorithm=ppo")
    pipeline.run(recipe, start / "kept", start_from=start / "start", until="reward")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        real = checkpoint_callback.CheckpointCallback.save

        def save(self, trainer, notes=None):
            real(self, trainer, notes)
            if trainer.state.global_step == 2:
                raise SystemExit

        patch.setattr(checkpoint_callback.CheckpointCallback, "save", save)
        with watched(Room(training=2), "none"), pytest.raises(SystemExit):
            pipeline.run(recipe, start / "kept", until="ppo")
    with pytest.MonkeyPatch.context() as patch:
        real_load = checkpoint_callback.CheckpointCallback.load

        def load(self, trainer):
            real_load(self, trainer)
            seen.append(dict(self.backbone.backoff.limits))

        patch.setattr(checkpoint_callback.CheckpointCallback, "load", load)
        pipeline.run(recipe, start / "kept", until="ppo")
    assert seen == [{"training": 2}]


@pytest.mark.parametrize(
    "kind",
    ["backward", *(pytest.param(k, marks=pytest.mark.slow) for k in PASSES)],
)
def test_no_room_for_one_row_ends_with_a_table_of_remedies(start, kind, monkeypatch):
    if kind == "backward":  # the others plan every remedy, for seconds
        for name in ("trunk_on_cpu", "lengths", "rank", "fraction", "four_bit"):
            monkeypatch.setattr(gpu_fit, name, lambda *_: {})
    recipe = killed.recipe(start, *SETS, "algorithm=ppo")
    out = start / f"none-{kind}"
    with watched(Room(**{kind: 0}), "none"), pytest.raises(MemoryLimitError) as error:
        pipeline.run(recipe, out, start_from=start / "start", until="ppo")
    named = "training" if kind == "backward" else kind
    assert f"memory ran out in {named}, with one row at once: {MESSAGE}" in str(error.value)
    table = str(error.value).splitlines()
    assert any(line.split()[:3] == ["nothing,", "one", "row"] for line in table)
    assert any("--set model.gradient_checkpointing=true" in line and "MB" in line for line in table)
    assert error.value.exit_code == 4
    record = Record.read(out)
    assert record.done("reward") and not record.done("ppo"), "what was finished is kept"
    assert record.data["stages"]["ppo"]["error"]["type"] == "MemoryLimitError"


@pytest.mark.slow
def test_command_reports_a_lack_of_memory_without_a_traceback(start):
    (start / "recipe.yaml").write_text(
        killed.broken_runs.RECIPE.format(base=killed.base_folder("llama"))
    )
    with watched(Room(training=0), "none"):
        sets = [word for s in (*killed.SETS, *SETS) for word in ("--set", s)]
        result = CliRunner().invoke(
            app.app, ["run", str(start / "recipe.yaml"), "--out", str(start / "said"), *sets]
        )
    assert result.exit_code == 4
    assert "planned peak" in result.stderr and "Traceback" not in result.stderr
    json.loads((start / "said" / "record.json").read_text())


def test_gradients_share_one_block_and_unused_parameters_have_none():
    """A parameter whose gradient is 0 would be moved by what the optimizer remembers."""
    a, b, idle = (torch.nn.Parameter(torch.randn(3, 2)) for _ in range(3))
    half, frozen = torch.nn.Parameter(torch.randn(4).half()), torch.nn.Parameter(torch.ones(1))
    frozen.requires_grad_(False)
    b.grad = torch.ones_like(b)  # of the micro-batch before
    with microbatch_splitting.in_one_block([a, b, idle, half, frozen]):
        for _ in range(2):
            (2 * a.sum() + b.square().sum() + half.float().sum()).backward()
    assert idle.grad is None and frozen.grad is None
    assert torch.equal(a.grad, torch.full((3, 2), 4.0))
    torch.testing.assert_close(b.grad, 1 + 4 * b)
    assert a.grad.untyped_storage().nbytes() == (a.numel() + idle.numel()) * 4
    assert torch.equal(half.grad, torch.full((4,), 2.0).half())


def test_failed_block_leaves_no_gradients(monkeypatch):
    a, half = (torch.nn.Parameter(torch.ones(2, dtype=t)) for t in (torch.float32, torch.half))
    zeros = torch.zeros

    def short(size, dtype, **options):
        if dtype == torch.half:
            raise torch.OutOfMemoryError(MESSAGE)
        return zeros(size, dtype=dtype, **options)

    monkeypatch.setattr(torch, "zeros", short)
    with pytest.raises(torch.OutOfMemoryError), microbatch_splitting.in_one_block([a, half]):
        raise AssertionError("there was room")
    assert a.grad is None and half.grad is None


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_stage_keeps_its_gradients_in_blocks(start, stage):
    """One for each loss: else hundreds of small ones would lie between the activations."""
    found = []
    real = Gradients.keep

    def keep(self, made):
        found.extend(
            {
                p.grad.untyped_storage().data_ptr()
                for _, p in made.role_parameters(role)
                if p.grad is not None
            }
            for role in made.trained_roles
        )
        real(self, made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gradients, "keep", keep)
        one(start, f"blocks-{stage}", stage, start=None if stage == "sft" else start / "start")
    assert len(found) == (1 if stage == "sft" else 2) and all(len(blocks) == 1 for blocks in found)


def test_other_errors_are_not_out_of_memory():
    for error in (RuntimeError("shape mismatch"), ValueError(" out of memory."), KeyError("x")):
        assert not oom.is_out_of_memory(error)
        with pytest.raises(type(error)):
            oom.attempt(lambda error=error: raises(error))
    host = RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried ...")
    others = [
        RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ]
    for error in (torch.OutOfMemoryError(MESSAGE), MemoryError(), host, *others):
        assert oom.attempt(lambda error=error: raises(error))[1]


def raises(error):
    raise error


def real_limit(out):
    """In a child: the kernel gives no more than what is there now and 50 MB."""
    import resource

    made = backbone("llama", "policy")
    episodes = [(list(range(5, 45)) * 20 + [5] * (i % 7), [7] * 100) for i in range(48)]
    alone = scoring.episode_logprobs(made, episodes, "policy", batch_size=1)
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 50 * 10**6, resource.RLIM_INFINITY))
    messages = []
    made.backoff.say = messages.append
    found = scoring.episode_logprobs(made, episodes, "policy", batch_size=48)
    off = max(float((a - b).abs().max()) for a, b in zip(found, alone, strict=True))
    out.write_text(json.dumps({"off": off, "messages": messages, "most": made.backoff.limits}))


@pytest.mark.slow
def test_the_real_allocator(tmp_path):
    """A limit of the kernel on this process's memory, and torch's own error."""
    out = tmp_path / "found.json"
    assert killed.wait(killed.start(real_limit, out)) == 0
    found = json.loads(out.read_text())
    assert "DefaultCPUAllocator: can't allocate memory" in found["messages"][0]
    assert 1 <= found["most"]["scoring"] < 48 and found["off"] < 1e-4
