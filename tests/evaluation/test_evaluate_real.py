# SPDX-License-Identifier: Apache-2.0
"""The evaluation stage on a tiny real backbone, against plain forward passes."""

import json

import pytest
import torch
from datasets import Dataset

from lora_rlhf.data.closed_world import generator
from lora_rlhf.evaluation import evaluate
from lora_rlhf.recipe.loader import parse_recipe
from lora_rlhf.recipe.schema import LoraSection, ModelSection
from lora_rlhf.runs.record import Record


def recipe(temperature):
    return parse_recipe(
        "name: e\nseed: 11\nmodel:\n  id: tiny\nppo:\n  args:\n    max_completion_length: 8\n"
        f"evaluate:\n  n: 64\n  batch_size: 5\n  temperature: {temperature}\n",
        "e.yaml",
    )


@pytest.fixture
def record(tmp_path):
    return Record.open(tmp_path / "run", recipe(1.0))


@pytest.fixture(scope="module")
def real():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from lora_rlhf.models.backbone import Backbone

    vocabulary = {"<pad>": 0, "<eos>": 1}
    for unit in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[unit] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    causal = LlamaForCausalLM(config)
    causal.lm_head.weight.data[1] += 0.15  # an end now and then
    backbone = Backbone(causal, tokenizer, ModelSection(id="t"), LoraSection(r=4, alpha=8), {})
    for role, source in (("reference", None), ("policy", "reference"), ("reward", None)):
        backbone.add_role(role, copy_from=source)
    backbone.reward_offset["reward"] = 2.0
    return backbone


def real_prompts():
    return Dataset.from_list(
        [
            {"prompt": item.prompt[:60], "item": json.dumps(item.to_dict())}
            for item in generator.items(12, 0, "evaluate")
        ]
    )


def test_a_policy_equal_to_sft_has_equal_metrics(real, record):
    evaluate.run(recipe(1.0), real, record, real_prompts())
    evaluation = record.data["evaluation"]
    for name in ("gold_reward", "proxy_reward", "length", "eos_rate", "words"):
        assert evaluation["policy"][name] == evaluation["sft"][name] == evaluation["base"][name]
    assert evaluation["policy"]["win_rate_proxy"]["value"] == 0.5
    assert evaluation["policy"]["win_rate"]["value"] == 0.5
    assert evaluation["policy"]["gold_reward_minus_sft"]["high"] == 0.0
    assert abs(evaluation["policy"]["kl"]["value"]) < 1e-5


def test_a_moved_policy_has_the_kl_of_plain_logits(real, record):
    parameters = [p for n, p in real.role_parameters("policy") if "lora_B" in n]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    try:
        settings = recipe(0.8)
        evaluate.run(settings, real, record, real_prompts())
        prompts = [real.encode_prompt(row["prompt"]) for row in real_prompts()]
        answers = real.generate(
            prompts, "policy", max_new_tokens=8, temperature=0.8, seed=11, batch_size=5
        )
        expected = []
        for prompt, answer in zip(prompts, answers, strict=True):
            total = {}
            for role in ("policy", "reference"):
                with real.role(role), torch.no_grad():
                    logits = real.causal(torch.tensor([prompt + answer])).logits[0] / 0.8
                chosen = logits.log_softmax(-1)[len(prompt) - 1 : -1]
                total[role] = chosen[range(len(answer)), answer].sum().item()
            expected.append(total["policy"] - total["reference"])
        evaluation = record.data["evaluation"]
        assert evaluation["policy"]["kl"]["value"] == pytest.approx(sum(expected) / 12, abs=1e-4)
        assert evaluation["policy"]["kl"]["value"] > 0.05
        assert abs(evaluation["base"]["kl"]["value"]) < 1e-5, "a fresh SFT adapter is the base"
        with (record.folder / "samples.jsonl").open(encoding="utf-8") as file:
            completion = json.loads(file.readlines()[2])["completion"]
        assert completion == real.decode(answers[0])
    finally:
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
