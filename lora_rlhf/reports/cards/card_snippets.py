# SPDX-License-Identifier: Apache-2.0
"""The code on a card: how to load, check and merge an adapter without this package."""

from __future__ import annotations

import json
from typing import Any

from lora_rlhf.runs.samples import sample_table

from .card_facts import RL_STAGES, Facts
from .card_markdown import MISSING, at, bullets, code, is_number, number

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
_TASKS = {"reward": "SEQ_CLS", "value": "TOKEN_CLS"}
_DTYPES = ("float32", "bfloat16", "float16")
_PROMPT = "Say in one sentence what a reward model is."
_MAX_PROMPT = 2000  # characters
_ROWS = 16


def how_to_load(facts: Facts) -> str:
    """The section with the loading code, and the check that it loaded right."""
    need = "`lora-rlhf` is not needed"
    if not facts.base and is_packaged(facts):
        need = "of `lora-rlhf`, only the base is needed that is shipped with it"
    text = f"With plain `transformers` and `peft`; {need}.\n\n```python\n{loading(facts)}\n```"
    if check := checking(facts):
        text += (
            "\n\nTo see that it loaded right, go on with this: `check.json` holds token ids and "
            f"what the adapter gave for them when it was saved.\n\n```python\n{check}\n```"
        )
    return text


def how_to_merge(facts: Facts) -> str:
    """The section with the merging code."""
    why = "Merging makes a whole model of base and adapter."
    if facts.get("model.load_in_4bit"):
        why = (
            "The adapter was trained on a 4-bit base. Merge into the unquantised base, as here: "
            "merging into 4-bit weights rounds much of the update away. The merged model still "
            "differs a little from what was trained and evaluated."
        )
    if facts.role == "reward":
        why += " The reward offset is not part of the weights: keep it beside them."
    return f"{why}\n\n```python\n{merging(facts)}\n```"


def how_to_reproduce(facts: Facts) -> str:
    """The section with the command, the recipe and the versions."""
    versions = [f"`{name}=={version}`" for name, version in facts.get("versions", {}).items()]
    place = "in this repository" if facts.published else "in the folder of the run"
    entries = {name: facts.get(f"stages.{name}", {}) for name in ("sft", "reward", *RL_STAGES)}
    stages = [name for name, entry in entries.items() if entry and "skipped" not in entry]
    others = [
        f"{code(f'{name}=={version}')} in {stage}"
        for stage in stages
        for name, version in entries[stage].get("versions", {}).items()
    ]
    digest = code(facts.get("recipe_sha256"))
    items = [
        f"Seed: {number(facts.get('seed'))}; stages run: {', '.join(stages) or MISSING}",
        f"Recipe: `recipe.yaml` {place}, sha256 of the original {digest}",
        f"Versions: {', '.join(versions) or MISSING}",
        *(f"Another version: {other}" for other in others),
    ]
    return f"```bash\nlora-rlhf run recipe.yaml\n```\n\n{bullets(items)}"


def loading(facts: Facts) -> str:
    """Python that loads the adapter with plain transformers and peft, and uses it once."""
    task = str(facts.config.get("task_type") or _TASKS.get(facts.role, "CAUSAL_LM"))
    model_class = _CLASSES.get(task, _CLASSES["CAUSAL_LM"])
    four_bit = bool(facts.get("model.load_in_4bit"))
    names = sorted([model_class, "AutoTokenizer", *(["BitsAndBytesConfig"] if four_bit else [])])
    lines = [
        *_imports(facts, names),
        "",
        *_addresses(facts),
        "",
        "tokenizer = AutoTokenizer.from_pretrained(adapter_id)",
    ]
    lines += _base(facts, model_class, four_bit)
    lines += ["model = PeftModel.from_pretrained(base, adapter_id).eval()", ""]
    use = {"reward": _use_reward, "value": _use_value}.get(facts.role, _use_policy)
    return "\n".join(lines + use(facts))


def checking(facts: Facts) -> str:
    """Python that goes on from `loading` and compares with check.json; empty without one."""
    expected = at(facts.check, "expected", {})
    key = next((k for k in ("logits_last", "value_last", "score") if k in expected), None)
    if key is None or "input_ids" not in facts.check:
        return ""
    place = '"check.json"'
    lines = ["import json", ""]
    if facts.published:
        lines = ["import json", "", "from huggingface_hub import hf_hub_download", ""]
        place = 'hf_hub_download(adapter_id, "check.json")'
    lines += [
        f"with open({place}) as file:",
        "    check = json.load(file)",
        'ids, mask = torch.tensor(check["input_ids"]), torch.tensor(check["attention_mask"])',
        "with torch.no_grad():",
        "    out = model(input_ids=ids, attention_mask=mask).logits.float()",
    ]
    if key != "score":
        lines += [
            "last = mask.cumsum(1).argmax(1)  # the last token of each row that is not padding",
            "out = out[torch.arange(len(ids)), last]",
        ]
    lines += [
        f'expected = torch.tensor(check["expected"]["{key}"]).reshape(len(ids), -1)',
        "out = out.reshape(len(ids), -1)[:, : expected.shape[1]]",
        "difference = (out - expected).abs().max().item()",
        'print("largest difference:", difference, "tolerated:", check["atol"])',
    ]
    return "\n".join(lines)


def merging(facts: Facts) -> str:
    """Python that merges the adapter into an unquantised base and saves a whole model."""
    task = str(facts.config.get("task_type") or _TASKS.get(facts.role, "CAUSAL_LM"))
    model_class = _CLASSES.get(task, _CLASSES["CAUSAL_LM"])
    lines = [*_imports(facts, [model_class, "AutoTokenizer"]), "", *_addresses(facts), ""]
    lines += _base(facts, model_class, four_bit=False)
    lines += [
        "merged = PeftModel.from_pretrained(base, adapter_id).merge_and_unload()",
        'merged.save_pretrained("merged")',
        'AutoTokenizer.from_pretrained(adapter_id).save_pretrained("merged")',
    ]
    return "\n".join(lines)


def _imports(facts: Facts, names: list[str]) -> list[str]:
    packaged = not facts.base and is_packaged(facts)
    lines = ["from importlib.resources import files", ""] if packaged else []
    lines += ["import torch", "from peft import PeftModel"]
    return [*lines, f"from transformers import {', '.join(names)}"]


def _addresses(facts: Facts) -> list[str]:
    adapter = 'adapter_id = "."  # the folder of this card'
    if facts.published:
        adapter = f"adapter_id = {json.dumps(facts.published)}"
    if facts.base:
        return [f"base_id = {json.dumps(facts.base)}", adapter]
    if is_packaged(facts):
        return ['base_id = str(files("lora_rlhf") / "tiny")  # shipped with lora-rlhf', adapter]
    name = _literal(str(facts.get("model.id", "base")))
    return [f"base_id = {name}  # a folder on the machine that trained: it is on no Hub", adapter]


def _base(facts: Facts, model_class: str, four_bit: bool) -> list[str]:
    dtype = str(facts.get("model.dtype", "")).removeprefix("torch.")
    dtype = dtype if dtype in _DTYPES else "float32"
    # The revision belongs to model.id; a base that was pushed under another id has its own.
    pinned = facts.get("model.revision") if facts.base == facts.get("model.id") else None
    pinned = pinned or facts.get("model.hub_revision")
    options = [f"revision={json.dumps(pinned)}"] if pinned and facts.base else []
    options += ["num_labels=1"] if model_class != _CLASSES["CAUSAL_LM"] else []
    options.append(f"dtype=torch.{dtype}")
    lines = []
    if four_bit:
        lines = [
            "quantization = BitsAndBytesConfig(",
            '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,',
            f"    bnb_4bit_compute_dtype=torch.{dtype},",
            ")",
        ]
        options.append("quantization_config=quantization")
    lines += [f"base = {model_class}.from_pretrained(", f"    base_id, {', '.join(options)}", ")"]
    if model_class != _CLASSES["CAUSAL_LM"]:
        pad = facts.head.get("pad_token_id", facts.get("model.pad_id"))
        pad_id = str(pad) if is_number(pad) else "tokenizer.pad_token_id"
        lines.append(f"base.config.pad_token_id = {pad_id}  # without it the wrong token is scored")
    return lines


def _literal(text: str) -> str:
    """A Python string on one line that ends no code block, whatever the text is."""
    return ascii(text).replace("`", r"\x60")


def _chat(facts: Facts) -> bool:
    folder = facts.record.adapter(facts.role)
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    )


def _example(facts: Facts) -> tuple[str, str]:
    for row in sorted(sample_table(facts.record, _ROWS), key=lambda row: row["index"]):
        prompt, answers = str(row["prompt"]), row["answers"]
        answer = str(next(iter(answers.values())).get("completion", ""))
        if 0 < len(prompt) <= _MAX_PROMPT:
            return _literal(prompt), _literal(answer[:_MAX_PROMPT])
    return _literal(_PROMPT), _literal("It scores how much people would like an answer.")


def _use_policy(facts: Facts) -> list[str]:
    prompt, _ = _example(facts)
    # As evaluated, or else as in the rollouts: PPO's, unless the algorithm has its own.
    rollout = at(facts.recipe, "ppo.args.max_completion_length")
    rollout = at(facts.recipe, f"{facts.algorithm}.args.max_completion_length", rollout)
    rollout = facts.get(f"stages.{facts.algorithm}.args.max_completion_length", rollout)
    asked = at(facts.recipe, "evaluate.max_new_tokens", rollout)
    tokens = facts.get("stages.evaluate.max_new_tokens", asked)
    warmth = at(facts.recipe, "evaluate.temperature", 1.0)
    # As evaluated: the generation config of the base may cut to the top 50 tokens.
    options = f"do_sample=True, temperature={warmth}, top_k=0" if warmth else "do_sample=False"
    options += f", max_new_tokens={tokens}" if is_number(tokens) else ""
    inputs = ['inputs = tokenizer(prompt, return_tensors="pt")']
    if _chat(facts):
        inputs = [
            "inputs = tokenizer.apply_chat_template(",
            '    [{"role": "user", "content": prompt}],',
            '    add_generation_prompt=True, return_tensors="pt", return_dict=True,',
            ")",
        ]
    return [
        f"prompt = {prompt}",
        *inputs,
        "with torch.no_grad():",
        f"    output = model.generate(**inputs, {options})",
        'answer = output[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]


def _tokenized(facts: Facts) -> list[str]:
    """A conversation as it was scored in training: prompt and answer tokenised apart, then eos."""
    prompt, answer = _example(facts)
    prompt_ids = ['prompt_ids = tokenizer(prompt)["input_ids"]']
    if _chat(facts):
        prompt_ids = [
            "prompt_ids = tokenizer.apply_chat_template(",
            '    [{"role": "user", "content": prompt}],',
            "    add_generation_prompt=True, return_dict=True,",
            ')["input_ids"]',
        ]
    return [
        f"prompt = {prompt}",
        f"answer = {answer}",
        *prompt_ids,
        "answer_ids = tokenizer(",
        "    answer, add_special_tokens=False, split_special_tokens=True",
        ')["input_ids"]',
        "input_ids = torch.tensor([prompt_ids + answer_ids + [tokenizer.eos_token_id]])",
    ]


def _use_reward(facts: Facts) -> list[str]:
    offset: Any = facts.head.get("reward_offset", facts.get("stages.reward.offset"))
    lines = [*_tokenized(facts), "with torch.no_grad():"]
    lines.append("    raw = model(input_ids=input_ids).logits[0, 0].item()")
    if not is_number(offset):
        return [*lines, 'print("score, not centred:", raw)']
    lines = [f"reward_offset = {offset!r}  # demonstrations then average zero", *lines]
    return [*lines, "reward = raw + reward_offset", 'print("reward:", reward)']


def _use_value(facts: Facts) -> list[str]:
    return [
        *_tokenized(facts),
        "with torch.no_grad():",
        "    values = model(input_ids=input_ids).logits  # one expected return per token",
        'print("values:", values.flatten().tolist())',
    ]


def is_packaged(facts: Facts) -> bool:
    """Whether the base is the tiny model that is shipped with the package."""
    packaged = "packaged" in str(facts.get("model.source", "")).lower()
    return packaged or facts.get("model.id") == "tiny"
