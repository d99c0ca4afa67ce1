# SPDX-License-Identifier: Apache-2.0
"""A finished run with weights: a little random Llama, and adapters by plain PEFT."""

import json
from pathlib import Path

from card_run import RECIPE, make_run

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% endfor %}<|assistant|>"
WORDS = "the record does not say hello how can i help you today prompt a b c d".split()


def _base(folder: Path):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=None,
        eos_token_id=1,
        bos_token_id=None,  # as many bases have none
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


_KINDS = {
    "policy": ("CAUSAL_LM", "AutoModelForCausalLM", "logits_last"),
    "reward": ("SEQ_CLS", "AutoModelForSequenceClassification", "score"),
    "value": ("TOKEN_CLS", "AutoModelForTokenClassification", "value_last"),
}
"""Role -> PEFT's task, the class of transformers, and the key of `check.json`."""


def _adapter(base: Path, tokenizer, role: str, folder: Path) -> None:
    """A plain PEFT adapter with random weights, and the check.json that the run would write."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    task, kind, key = _KINDS[role]
    head = {"num_labels": 1} if role != "policy" else {}
    model = getattr(transformers, kind).from_pretrained(base, dtype=torch.float32, **head)
    model.config.pad_token_id = 0
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj", "up_proj"],
        task_type=task,
        modules_to_save=["score"] if head else None,
    )
    model = get_peft_model(model, lora).eval()
    torch.manual_seed([*_KINDS].index(role) + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = torch.tensor([[0, 0, 5, 6, 7, 1], [9, 10, 11, 12, 13, 1]])
    mask = (ids != 0).long()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    if role == "reward":
        note = {"reward_offset": 0.25, "pad_token_id": 0, "head": "score, no bias"}
        (folder / "reward.json").write_text(json.dumps(note))
    last = logits[:, 0] if role == "reward" else logits[:, -1]
    expected = {key: (last[:, :8] if role == "policy" else last.flatten()).tolist()}
    check = {"role": role, "input_ids": ids.tolist(), "attention_mask": mask.tolist()}
    (folder / "check.json").write_text(json.dumps(check | {"expected": expected, "atol": 1e-5}))


def make_finished(top: Path, *more: str) -> Path:
    """The folder of a run on a base that exists only here: `base` beside `run` in `top`.

    It has adapters of policy, reward, and the roles of `more`.
    """
    tokenizer = _base(top / "base")

    def edit(data):
        data["model"] |= {"id": str(top / "base"), "source": "local folder", "revision": None}
        data["model"] |= {"pad_id": 0, "eos_ids": [1]}
        data["stages"]["reward"]["offset"] = 0.25
        data["data"]["prompts"]["notes"] = [f"one line of {top}/x.jsonl was empty"]

    recipe = RECIPE | {"model": {"id": str(top / "base")}}
    recipe["data"] = {"prompts": [{"path": f"{top}/private/prompts.jsonl"}]}
    record = make_run(top / "run", edit, recipe, roles=())
    for role in ("policy", "reward", *more):
        _adapter(top / "base", tokenizer, role, record.adapter(role))
        (record.adapter(role) / "training_args.bin").write_bytes(b"pickle")
        (record.adapter(role) / "optimizer.pt").write_bytes(b"pickle")
    record.seal()
    return top / "run"
