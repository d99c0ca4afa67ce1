# SPDX-License-Identifier: Apache-2.0
"""PPO with completions from a rollout server: what is sent, what comes back, what is refused.

A stub in this process answers as vLLM, with our sampler. The real vLLM is tested where
LORA_RLHF_VLLM names the Python of an environment that has it.
"""

import contextlib
import hashlib
import json
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import send_to_device
from ppo_run import Run, recipe, roles
from transformers import TrainerCallback

from lora_rlhf.algorithms import vllm_rollouts
from lora_rlhf.algorithms.vllm_rollouts import RolloutServer as Client
from lora_rlhf.errors import IdentityError, RecipeError, SetupError, UsageError
from lora_rlhf.models import adapters, sampler
from lora_rlhf.preflight import check_launch
from lora_rlhf.recipe.schema import CheckpointSection, PpoSection
from lora_rlhf.serving import rollout_server, vllm_engine
from lora_rlhf.serving.api_server import Access

KEY = "a-key-of-the-test-2"


class Vllm:
    """The part of vLLM's API that is used, answered by our sampler.

    It samples with the trainer's policy as it is, or, given another backbone, with the adapter
    that it was asked to load.
    """

    def __init__(self, backbone, off=0.0, loads=False):
        self.backbone, self.off, self.loads = backbone, off, loads
        self.allowed = threading.Event()  # completions wait for it
        self.allowed.set()
        self.answered = 0
        self.folders, self.log, self.ended = {}, [], threading.Event()
        self.lock = threading.Lock()  # our sampler is not for several threads
        owner = self

        class Api(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send({"data": [{"id": name} for name in ("base", *owner.folders)]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.log.append((self.path, body))
                if self.path == "/v1/load_lora_adapter":
                    owner.folders[body["lora_name"]] = body["lora_path"]
                    if owner.loads:
                        adapters.load_role(owner.backbone, "policy", body["lora_path"])
                elif self.path == "/v1/unload_lora_adapter":
                    del owner.folders[body["lora_name"]]
                else:
                    owner.allowed.wait(10)
                    with owner.lock:
                        answer = owner.completed(body)
                        owner.answered += 1
                    return self.send(answer)
                self.send("Success")

            def send(self, answer):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *_):
                pass

        http = type("Http", (ThreadingHTTPServer,), {"request_queue_size": 1024})
        self.http = http(("127.0.0.1", 0), Api)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.access = Access("127.0.0.1", self.http.server_address[1], KEY)
        self.client = vllm_engine.Client(f"http://127.0.0.1:{self.access.port}", KEY)
        self.process = SimpleNamespace(wait=self.ended.wait, poll=lambda: None)

    def completed(self, body):
        assert body["model"] in self.folders
        with self.backbone.role("policy"):
            [row] = sampler.sample(
                self.backbone,
                [body["prompt"]],
                max_new_tokens=body["max_tokens"],
                temperature=body["temperature"],
                seeds=[body["seed"]],
            )
        logprobs = [x + self.off for x in row.logprobs.tolist()]
        return {"choices": [{"token_ids": row.ids, "logprobs": {"token_logprobs": logprobs}}]}

    def close(self):
        self.ended.set()
        self.http.shutdown()


@contextlib.contextmanager
def served(backbone, off=0.0, loads=False):
    vllm = Vllm(backbone, off, loads)
    made = rollout_server.RolloutServer(recipe(), vllm, Access("127.0.0.1", 0, KEY))
    threading.Thread(target=made.run, daemon=True).start()
    try:
        yield made
    finally:
        vllm.ended.set()


@pytest.fixture(scope="module")
def backbone():
    return roles()


@pytest.fixture
def server(backbone):
    with served(backbone) as made:
        yield made


def url(made):
    return f"http://127.0.0.1:{made.port}"


def test_a_run_samples_there_and_sends_the_policy_once_an_update(tmp_path, monkeypatch):
    monkeypatch.setenv(vllm_rollouts.KEY, KEY)
    made = roles()
    with served(made) as there:
        run = Run(tmp_path, made=made, updates=3, rollout_server=url(there))
        run.go()
        log = there.vllm.log
    names = [body["lora_name"] for path, body in log if path == "/v1/load_lora_adapter"]
    assert len(names) == len(set(names)) == 3
    assert len(there.vllm.folders) == 1  # earlier versions are unloaded
    asked = [body for path, body in log if path == "/v1/completions"]
    assert len({body["seed"] for body in asked}) == len(asked) == 3 * 4
    assert {body["model"] for body in asked[4:8]} == {names[1]}
    lines = list(run.record.metrics("ppo"))
    assert all(line["policy/server_difference"] < 1e-4 for line in lines) and len(lines) == 3
    assert run.trainer.identities["kl_at_start"] == 0


def test_log_probs_of_another_policy_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv(vllm_rollouts.KEY, KEY)
    made = roles()
    with (
        served(made, off=0.01) as there,
        pytest.raises(IdentityError, match="differ from the trainer's by 0.01"),
    ):
        Run(tmp_path, made=made, rollout_server=url(there)).go()


class AtStepEnd(TrainerCallback):
    """Calls a function with the number of the optimizer step that ends."""

    def __init__(self, act):
        self.act = act

    def on_step_end(self, _, state, *__, **___):
        self.act(state.global_step)


def ahead(folder, there, **section):
    """A run of four updates, whose rollouts are one update behind from the second on.

    With seven prompts, of which a rollout takes four, each update is an epoch of its own.
    """
    section = {"updates": 4, "n": 7, "max_staleness": 1, "rollout_server": url(there), **section}
    return Run(folder, made=roles(), **section)


def asked(there):
    """Requests for completions, each as the number of the adapter that answered and its seed."""
    loaded = [body["lora_name"] for path, body in there.vllm.log if "load_lora" in path]
    names = list(dict.fromkeys(loaded))
    bodies = [body for path, body in there.vllm.log if path == "/v1/completions"]
    return [(names.index(body["model"]), body["seed"]) for body in bodies]


def test_the_next_rollout_is_sampled_while_this_one_trains(tmp_path, monkeypatch):
    monkeypatch.setenv(vllm_rollouts.KEY, KEY)
    with served(roles(), loads=True) as there:
        vllm, trained = there.vllm, []

        def step_ends(_):
            trained.append(vllm.answered)
            vllm.allowed.set()

        run = ahead(tmp_path, there, callbacks=[AtStepEnd(step_ends)])
        sample_ahead = run.trainer.scorer.sample_ahead

        def held_back(*args):  # until this update has trained
            vllm.allowed.clear()
            sample_ahead(*args)

        run.trainer.scorer.sample_ahead = held_back
        run.go()
        found = asked(there)
    assert trained == [4, 8, 12, 16]
    # The policy before the last update samples the last rollout; the last policy samples none.
    assert [adapter for adapter, _ in found] == [n for n in (0, 0, 1, 2) for _ in range(4)]
    assert len({seed for _, seed in found}) == 16
    lines = list(run.lines)
    assert [line["policy/staleness"] for line in lines] == [0, 1, 1, 1]
    assert all(line["policy/server_difference"] < 1e-4 for line in lines)
    assert abs(lines[0]["policy/weight_max"] - 1) < 1e-4 < lines[2]["policy/weight_max"] - 1


def test_weights_are_cut_off_and_enter_the_loss(tmp_path, monkeypatch):
    monkeypatch.setenv(vllm_rollouts.KEY, KEY)
    cap = "vllm_importance_sampling_clip_max"
    with served(roles(), loads=True) as there:
        whole, cut = (
            ahead(tmp_path / name, there, args={"learning_rate": 0.1, cap: most}).go()
            for name, most in (("whole", 1e6), ("cut", 1.0))
        )
    truncated = [line["policy/weight_truncated"] for line in cut.lines]
    assert truncated[1] > 0 == list(whole.lines)[1]["policy/weight_truncated"]
    assert list(whole.lines)[1]["policy/weight_max"] > 1.1
    pairs = zip(whole.weights().values(), cut.weights().values(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_a_killed_run_goes_on_with_what_was_sampled_ahead(tmp_path, monkeypatch):
    monkeypatch.setenv(vllm_rollouts.KEY, KEY)
    args = {"steps_per_generation": 2, "per_device_train_batch_size": 2}  # two steps an update

    def run(name, there, killed_after=None):
        def step_ends(step):
            if step == killed_after:  # before this step's checkpoint
                raise SystemError("killed")

        callbacks = [AtStepEnd(step_ends)]
        made = ahead(tmp_path / name, there, args=args, callbacks=callbacks)
        saved = CheckpointSection(every_steps=1)
        made.recipe = made.recipe.model_copy(update={"checkpoint": saved})
        return made

    with served(roles(), loads=True) as there:
        expected, seeds = run("whole", there).kept().weights(), asked(there)
    for killed_after in (4, 5):  # its last checkpoint is inside update 1, or after it
        with served(roles(), loads=True) as there:
            name = f"killed{killed_after}"
            with pytest.raises(SystemError, match="killed"):
                run(name, there, killed_after).kept()
            there.vllm.log.clear()
            found = run(name, there).kept()
            later = {seed for _, seed in asked(there)}
        assert [line["policy/staleness"] for line in found.lines] == [0, 1, 1, 1]
        assert later == {seed for _, seed in seeds[12:]}  # of the last rollout only
        for key, tensor in found.weights().items():
            assert torch.equal(tensor, expected[key]), key


def test_what_was_sampled_ahead_is_not_moved_with_the_trainers_state():
    drawn = sampler.Sampled([5, 6], torch.tensor([-0.1, -1 / 3]))
    made = vllm_rollouts.Ahead([[1]], lambda: [drawn], {}, threading.Event())
    moved = send_to_device(made.state_dict(), "meta")  # as a run on a GPU that goes on
    [row] = vllm_rollouts.Ahead.restored(moved).rows()
    assert row.ids == [5, 6] and torch.equal(row.logprobs, drawn.logprobs)


def test_a_server_that_fails_ahead_stops_the_run_where_its_completions_are_used(
    tmp_path, monkeypatch
):
    monkeypatch.setenv(vllm_rollouts.KEY, KEY)
    with served(roles(), loads=True) as there:
        run = ahead(tmp_path, there)
        completed = there.vllm.completed
        there.vllm.completed = lambda body: {} if there.vllm.answered > 7 else completed(body)
        with pytest.raises(SetupError, match="cannot be read"):
            run.go()
    assert len(list(run.lines)) == 2


def test_an_adapter_arrives_as_it_was_sent(server, backbone):
    client = Client(url(server), KEY)
    body = vllm_rollouts.packed(backbone)
    assert body == vllm_rollouts.packed(backbone)
    digest = client.send(backbone)
    assert digest == hashlib.sha256(body).hexdigest() == server.versions.current
    folder = server.versions._folder / digest
    files = adapters.as_files(backbone, "policy")
    for name in rollout_server.FILES:
        assert (folder / name).read_bytes() == files[name]
    assert len(server.vllm.log) == 1
    client.send(backbone)
    assert len(server.vllm.log) == 1  # the server has it


def test_bytes_that_are_damaged_or_no_adapter_are_refused(server):
    client = Client(url(server), KEY)
    with pytest.raises(SetupError, match="arrived damaged"):
        client._ask("PUT", "/adapters/" + 64 * "0", b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    with pytest.raises(SetupError, match="not a zip archive"):
        client._ask("PUT", f"/adapters/{digest}", b"x")
    with pytest.raises(SetupError, match="404"):
        client._ask("PUT", "/adapters/../../etc", b"x")
    with pytest.raises(SetupError, match="404"):
        client._ask("POST", "/v1/load_lora_adapter", b"{}")
    assert not server.vllm.log


def test_another_recipe_a_wrong_key_and_no_server_are_one_error_before_training(
    server, monkeypatch
):
    ours = recipe(rollout_server=url(server))
    with pytest.raises(SetupError, match="refused the key"):
        check_launch(ours, ["ppo"])
    monkeypatch.setenv(vllm_rollouts.KEY, KEY)
    check_launch(ours, ["ppo"])
    other = ours.model_copy(update={"lora": ours.lora.model_copy(update={"r": 4})})
    with pytest.raises(UsageError, match="another recipe or version: rank: 16 there, 4 here"):
        check_launch(other, ["ppo"])
    with pytest.raises(RecipeError, match="GRPO samples here"):
        check_launch(ours.model_copy(update={"algorithm": "grpo"}), ["grpo"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    gone = recipe(rollout_server=f"http://127.0.0.1:{port}")
    with pytest.raises(SetupError, match="/info failed"):
        check_launch(gone, ["ppo"])
    check_launch(gone, ["sft"])  # a stage that does not sample there


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        ({}, "cannot be read"),
        ({"choices": [{"token_ids": [], "logprobs": {"token_logprobs": []}}]}, "0 tokens"),
        ({"choices": [{"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1]}}]}, "1 log-probs"),
        ({"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [None]}}]}, "cannot be"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_used(answer, match):
    with pytest.raises(SetupError, match=match):
        Client("http://x", KEY)._sampled(answer)


def test_addresses_in_a_recipe():
    assert PpoSection(rollout_server="http://10.0.0.2:8001").rollout_server
    with pytest.raises(ValueError, match="max_staleness is read with ppo.rollout_server only"):
        PpoSection(max_staleness=1)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        PpoSection(max_staleness=2, rollout_server="http://10.0.0.2:8001")
    for bad in ("10.0.0.2:8001", "ftp://x", "http://me:secret@x", "http://x/?key=1"):
        with pytest.raises(ValueError, match="expected an address"):
            PpoSection(rollout_server=bad)


def test_other_machines_need_a_key(monkeypatch):
    monkeypatch.delenv(vllm_rollouts.KEY, raising=False)
    assert rollout_server.access().key
    with pytest.raises(UsageError, match="LORA_RLHF_ROLLOUT_KEY"):
        rollout_server.access("0.0.0.0")


def test_many_requests_at_once_are_all_answered(server, backbone):
    client = Client(url(server), KEY)
    client.send(backbone)
    server.vllm.completed = lambda _: {
        "choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}}]
    }
    rows = client.sample(backbone, [[1, 2]] * 300, max_new_tokens=1, temperature=1.0)
    assert len(rows) == 300


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ppo_with_the_real_vllm(tmp_path, monkeypatch):
    if not (python := os.environ.get("LORA_RLHF_VLLM")):
        pytest.skip("LORA_RLHF_VLLM names no Python with vLLM")
    from lora_rlhf import pipeline, tiny
    from lora_rlhf.recipe.loader import load_recipe
    from lora_rlhf.runs.record import Record

    monkeypatch.setenv(vllm_rollouts.KEY, KEY)
    small = ["ppo.updates=3", "ppo.reward=gold", "data.comparisons=[]", "sft.args.max_steps=5",
             "ppo.value_warmup_updates=1"]  # fmt: skip
    ours = load_recipe(tiny.recipe(), small)
    there = rollout_server.serve(ours, rollout_server.access(), python)
    threading.Thread(target=there.run, daemon=True).start()
    try:
        ours = load_recipe(tiny.recipe(), [*small, f"ppo.rollout_server={url(there)}"])
        pipeline.run(ours, tmp_path / "run", until="ppo")
    finally:
        there.close()
    lines = Record.read(tmp_path / "run").metrics("ppo")
    assert len(lines) == 3
    assert max(line["policy/server_difference"] for line in lines) < 1e-3
    assert torch.tensor([line["kl/sequence"] for line in lines]).isfinite().all()
