# SPDX-License-Identifier: Apache-2.0
"""vLLM with our adapters: what it cannot load, new names, the check by log-prob, start and end.

A stub speaks the part of vLLM's API that is used. The real server is tested where LORA_RLHF_VLLM
names the Python of an environment that has it.
"""

import hashlib
import json
import os
import shutil
import socket
import sys
import textwrap

import pytest
import torch
from typer.testing import CliRunner

from lora_rlhf.cli.app import app
from lora_rlhf.errors import AdapterError, SetupError, UsageError
from lora_rlhf.models.base_model import BaseModel
from lora_rlhf.models.plain_adapters import PlainAdapters
from lora_rlhf.recipe.schema import LoraSection, ModelSection
from lora_rlhf.serving import vllm_engine
from lora_rlhf.serving.api_server import Access
from lora_rlhf.serving.vllm_engine import Reference, Served, VllmServer

CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "bias": "none",
          "target_modules": ["q_proj"], "init_lora_weights": True}  # fmt: skip
KEY = "a-key-of-the-test-1"

STUB = """
    import json, os, sys
    from http.server import BaseHTTPRequestHandler, HTTPServer
    args = dict(zip(sys.argv[1:], sys.argv[2:]))
    assert os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1" and "--enable-lora" in args
    log, names = open(os.environ["STUB_LOG"], "a"), ["base"]

    class Api(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send({"data": [{"id": name} for name in names]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            print(json.dumps([self.path, body]), file=log, flush=True)
            if self.headers["Authorization"] != "Bearer " + os.environ["VLLM_API_KEY"]:
                return self.send({"error": "no key"}, 401)
            if self.path == "/v1/load_lora_adapter":
                if body["lora_name"] in names:
                    return self.send({"error": {"message": "already loaded"}}, 400)
                names.append(body["lora_name"])
                return self.send("Success")
            if self.path == "/v1/unload_lora_adapter":
                names.remove(body["lora_name"])
                return self.send("Success")
            rows = [{str(t): {"logprob": -t / 10}} for t in body["prompt"]]
            self.send({"choices": [{"prompt_logprobs": [None, *rows[1:]]}]})

        def send(self, answer, code=200):
            self.send_response(code)
            self.end_headers()
            text = answer if isinstance(answer, str) else json.dumps(answer)
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    HTTPServer((args["--host"], int(args["--port"])), Api).serve_forever()
"""


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """An interpreter whose `-m vllm...` is the stub."""
    script = tmp_path / "stub.py"
    script.write_text(textwrap.dedent(STUB))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{script}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log.jsonl"))
    return str(python)


def access():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return Access("127.0.0.1", free.getsockname()[1], KEY)


def started(python, served, at, base="base-model"):
    return VllmServer(vllm_engine.serving_command(python, base, served, at), at, served)


def log(tmp_path):
    return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("change", "reason"),
    [({}, ""), ({"modules_to_save": ["score"], "task_type": "SEQ_CLS"}, "write no text"),
     ({"r": 1024}, "above --max-lora-rank 512"), ({"rank_pattern": {"q_proj": 600}}, "rank 600"),
     ({"use_dora": True}, "DoRA"), ({"peft_type": "IA3"}, "type IA3"), ({"bias": "all"}, "bias"),
     ({"init_lora_weights": "pissa"}, "changes the base"), ({"init_lora_weights": "gaussian"}, ""),
     ({"layer_replication": [[0, 2]]}, "layer_replication"), ({"r": None}, "cannot be read")],
)  # fmt: skip
def test_adapters_that_vllm_cannot_load_are_named_with_a_reason(adapter, change, reason):
    (adapter / "adapter_config.json").write_text(json.dumps(CONFIG | change))
    found = vllm_engine.problem(adapter)
    assert reason in found and bool(found) == bool(reason)


def test_adapters_are_loaded_under_their_names_and_checked(adapter, stub, tmp_path):
    good = Served("policy@1234", adapter, (Reference([1, 2, 3], [-0.2, -0.3]),))
    server = started(stub, [good], access())
    try:
        assert server.client.models() == ["base", "policy@1234"]
        assert server.differences == {"policy@1234": pytest.approx(0, abs=1e-9)}
        assert [path for path, _ in log(tmp_path)] == ["/v1/load_lora_adapter", "/v1/completions"]
        other = Served("policy@5678", adapter, (Reference([1, 2, 3], [-0.2, -0.9]),))
        with pytest.raises(AdapterError, match=r"differs by 0\.6"):
            server.client.load(other)
        assert server.client.models() == ["base", "policy@1234"]
        assert server.client.load(good) < 1e-9  # the same version again: no second load
        assert f"key: {KEY}" in server.lines()
    finally:
        server.close()
    assert server.process.poll() is not None


def test_a_number_that_is_none_is_far(monkeypatch):
    client, rows = vllm_engine.Client("http://x"), [{"7": {"logprob": -1.0}}]
    rows.append({"8": {"logprob": float("nan")}})
    monkeypatch.setattr(client, "ask", lambda *_: {"choices": [{"prompt_logprobs": rows}]})
    assert client._difference("a", Reference([7, 8], [-1.0, -1.0])) == float("inf")


def test_a_server_that_does_not_start_is_one_error(adapter, tmp_path):
    served = [Served("a@1", adapter)]
    with pytest.raises(SetupError, match="cannot be started"):
        started(str(tmp_path / "absent"), served, access())
    with pytest.raises(SetupError, match="ended with exit code"):
        started("/bin/false", served, access())


def test_the_key_is_not_on_the_command_line(adapter, monkeypatch):
    monkeypatch.setenv("LORA_RLHF_VLLM_OPTIONS", "--gpu-memory-utilization 0.3")
    made = vllm_engine.serving_command("python", "base-model", [Served("a@1", adapter)], access())
    assert KEY not in " ".join(made) and made[-2:] == ["--gpu-memory-utilization", "0.3"]
    assert made[made.index("--max-lora-rank") + 1] == "16"
    (adapter / "adapter_config.json").write_text(json.dumps(CONFIG | {"r": 24}))
    made = vllm_engine.serving_command("python", "base-model", [Served("a@1", adapter)], access())
    assert made[made.index("--max-lora-rank") + 1] == "32"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of the tiny model."""
    base = BaseModel.load(ModelSection(id="tiny"), LoraSection())
    made = [tmp_path_factory.mktemp("adapters") / name for name in ("first", "second")]
    for number, folder in enumerate(made):
        torch.manual_seed(number)
        with PlainAdapters(base).training(8, folder) as weights:
            for weight in weights:
                torch.nn.init.normal_(weight, std=0.05)
    return made


def test_each_version_has_its_own_name_and_our_log_probs(folders, tmp_path):
    base, served = vllm_engine.prepare(folders, "tiny")
    assert [one.name.partition("@")[0] for one in served] == ["first", "second"]
    weights = hashlib.sha256((folders[0] / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert served[0].name.startswith(f"first@{weights[:12]}-")
    for one in served:
        for reference in one.references:
            assert 0 < len(reference.logprobs) < len(reference.ids)
            assert all(value <= 0 for value in reference.logprobs)
    assert served[0].references != served[1].references
    changed = shutil.copytree(folders[0], tmp_path / "first")
    config = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    [other] = vllm_engine.prepare([changed], "tiny", check=False)[1]
    assert other.name != served[0].name
    (changed / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UsageError, match="cannot serve first: it uses DoRA"):
        vllm_engine.prepare([changed], "tiny")
    with pytest.raises(UsageError, match="no adapter is named"):
        vllm_engine.prepare(["tiny"])


def test_serve_says_what_vllm_leaves_out():
    result = CliRunner().invoke(app, ["serve", "tiny", "--engine", "vllm"])
    assert result.exit_code == 2 and "no moderation" in result.output
    result = CliRunner().invoke(app, ["serve", "tiny", "--engine", "llama"])
    assert result.exit_code == 2 and "own or vllm" in result.output


@pytest.mark.slow
def test_the_real_server_answers_as_our_engine(folders):
    if not (python := os.environ.get("LORA_RLHF_VLLM")):
        pytest.skip("LORA_RLHF_VLLM names no Python with vLLM")
    server = vllm_engine.serve(folders, Access("127.0.0.1", 0, KEY), python=python, base="tiny")
    try:
        assert len(server.differences) == 2
        assert max(server.differences.values()) < 0.01
    finally:
        server.close()
