# SPDX-License-Identifier: Apache-2.0
"""The code on a card: how to load, check and merge an adapter without this package."""

from __future__ import annotations

import json

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
_ANSWER = "It scores how much people would like an answer."
_MAX_PROMPT = 2000  # characters
_ROWS = 16


def how_to_load(facts: Facts) -> str:
    """Write the section with code that loads, uses and checks the adapter."""
    four_bit = bool(facts.get("model.load_in_4bit"))
    use = {"reward": _use_reward, "value": _use_value}.get(facts.role, _use_policy)(facts)
    more = ["GenerationConfig"] * ("GenerationConfig" in use)
    need = "`lora-rlhf` is not needed"
    if facts.packaged:
        need = "`lora-rlhf` is needed only for the base model that is shipped with it"
    check = _check(facts)
    if check:
        check = f"""

To check that it loaded correctly, continue with the code below: `check.json` holds token ids and \
the outputs of the adapter for them when it was saved.

```python
{check}
```"""
    return f"""\
With plain `transformers` and `peft`; {need}.

```python
{_start(facts, four_bit, *more)}

tokenizer = AutoTokenizer.from_pretrained(adapter_id)
{_base(facts, four_bit)}
model = PeftModel.from_pretrained(base, adapter_id).eval()

{use}
```{check}"""


def how_to_merge(facts: Facts) -> str:
    """Write the section with code that merges the adapter into an unquantised base."""
    why = "Merging combines base and adapter into one model."
    if facts.get("model.load_in_4bit"):
        why = (
            "The adapter was trained on a 4-bit base. Merge it into the unquantised base, as "
            "below: merging into 4-bit weights rounds much of the update away. The merged model "
            "still differs slightly from the one that was trained and evaluated."
        )
    if facts.role == "reward":
        why += " The reward offset is not part of the weights: keep it beside them."
    return f"""\
{why}

```python
{_start(facts, four_bit=False)}

{_base(facts, four_bit=False)}
merged = PeftModel.from_pretrained(base, adapter_id).merge_and_unload()
merged.save_pretrained("merged")
AutoTokenizer.from_pretrained(adapter_id).save_pretrained("merged")
```"""


def how_to_reproduce(facts: Facts) -> str:
    """Write the section with the command, the recipe and the versions."""
    versions = [code(f"{name}=={version}") for name, version in facts.get("versions", {}).items()]
    place = "in this repository" if facts.published else "in the folder of the run"
    entries = {name: facts.get(f"stages.{name}", {}) for name in ("sft", "reward", *RL_STAGES)}
    stages = [name for name, entry in entries.items() if entry and "skipped" not in entry]
    others = [
        f"Different version in {stage}: {code(f'{name}=={version}')}"
        for stage in stages
        for name, version in entries[stage].get("versions", {}).items()
    ]
    items = [
        f"Seed: {number(facts.get('seed'))}; stages run: {', '.join(stages) or MISSING}",
        f"Recipe: `recipe.yaml` {place}; sha256 of the keys that decide the result (equal for runs "
        f"that repeat this one, not that of the file): {code(facts.get('recipe_sha256'))}",
        f"Versions: {', '.join(versions) or MISSING}",
        *others,
    ]
    return f"```bash\nlora-rlhf run recipe.yaml\n```\n\n{bullets(items)}"


def _check(facts: Facts) -> str:
    """Code that compares the loaded model with check.json; empty without that file."""
    expected = at(facts.check, "expected", {})
    key = next((k for k in ("logits_last", "value_last", "score") if k in expected), None)
    if key is None or "input_ids" not in facts.check:
        return ""
    imports, place = "import json", '"check.json"'
    if facts.published:
        imports += "\n\nfrom huggingface_hub import hf_hub_download"
        place = 'hf_hub_download(adapter_id, "check.json")'
    last = """
last = mask.cumsum(1).argmax(1)  # the last token of each row that is not padding
out = out[torch.arange(len(ids)), last]"""
    return f"""\
{imports}

with open({place}) as file:
    check = json.load(file)
ids, mask = torch.tensor(check["input_ids"]), torch.tensor(check["attention_mask"])
with torch.no_grad():
    out = model(input_ids=ids, attention_mask=mask).logits.float(){last * (key != "score")}
expected = torch.tensor(check["expected"]["{key}"]).reshape(len(ids), -1)
out = out.reshape(len(ids), -1)[:, : expected.shape[1]]
difference = (out - expected).abs().max().item()
print("largest difference:", difference, "tolerated:", check["atol"])"""


def _model_class(facts: Facts) -> str:
    task = str(facts.config.get("task_type") or _TASKS.get(facts.role, "CAUSAL_LM"))
    return _CLASSES.get(task, _CLASSES["CAUSAL_LM"])


def _start(facts: Facts, four_bit: bool, *more: str) -> str:
    """Imports, and the paths or Hub ids of base and adapter."""
    names = sorted(
        [_model_class(facts), "AutoTokenizer", *["BitsAndBytesConfig"] * four_bit, *more]
    )
    imports = "from importlib.resources import files\n\n" if facts.packaged else ""
    adapter = '"."  # the folder of this card'
    if facts.published:
        adapter = json.dumps(facts.published)
    base = _literal(str(facts.get("model.id", "base")))
    base += "  # a folder on the machine that trained it; not on the Hub"
    if facts.base:
        base = json.dumps(facts.base)
    elif facts.packaged:
        base = 'str(files("lora_rlhf") / "tiny")  # shipped with lora-rlhf'
    return f"""\
{imports}import torch
from peft import PeftModel
from transformers import {", ".join(names)}

base_id = {base}
adapter_id = {adapter}"""


def _base(facts: Facts, four_bit: bool) -> str:
    model_class = _model_class(facts)
    causal = model_class == _CLASSES["CAUSAL_LM"]
    dtype = str(facts.get("model.dtype", "")).removeprefix("torch.")
    dtype = dtype if dtype in _DTYPES else "float32"
    # The revision belongs to model.id; a base that was pushed under another id has hub_revision.
    pinned = facts.get("model.revision") if facts.base == facts.get("model.id") else None
    pinned = pinned or facts.get("model.hub_revision")
    options = [f"revision={json.dumps(pinned)}"] if pinned and facts.base else []
    options += [] if causal else ["num_labels=1"]
    options.append(f"dtype=torch.{dtype}")
    quantization = pad = ""
    if four_bit:
        options.append("quantization_config=quantization")
        quantization = f"""\
quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.{dtype},
)
"""
    if not causal:
        token = facts.head.get("pad_token_id", facts.get("model.pad_id"))
        token = token if is_number(token) else "tokenizer.pad_token_id"
        pad = f"\nbase.config.pad_token_id = {token}  # otherwise the wrong token is scored"
    return f"""\
{quantization}base = {model_class}.from_pretrained(
    base_id, {", ".join(options)}
){pad}"""


def _literal(text: str) -> str:
    """A Python string literal on one line, in which no text can end the code block."""
    return ascii(text).replace("`", r"\x60")


def _chat(facts: Facts) -> bool:
    """True if the adapter's tokenizer has a chat template."""
    folder = facts.record.adapter(facts.role)
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    )


def _example(facts: Facts) -> tuple[str, str]:
    """A prompt and an answer of the run as Python strings."""
    for row in sorted(sample_table(facts.record, _ROWS), key=lambda row: row["index"]):
        prompt, answers = str(row["prompt"]), row["answers"]
        answer = str(next(iter(answers.values())).get("completion", ""))
        if 0 < len(prompt) <= _MAX_PROMPT:
            return _literal(prompt), _literal(answer[:_MAX_PROMPT])
    return _literal(_PROMPT), _literal(_ANSWER)


def _use_policy(facts: Facts) -> str:
    # Length of the evaluation, otherwise of the rollouts: the algorithm's own, otherwise PPO's.
    rollout = at(facts.recipe, "ppo.args.max_completion_length")
    rollout = at(facts.recipe, f"{facts.algorithm}.args.max_completion_length", rollout)
    rollout = facts.get(f"stages.{facts.algorithm}.args.max_completion_length", rollout)
    tokens = at(facts.recipe, "evaluate.max_new_tokens", rollout)
    tokens = facts.get("stages.evaluate.max_new_tokens", tokens)
    temperature = at(facts.recipe, "evaluate.temperature", 1.0)
    options = "do_sample=False"
    temperature = temperature if is_number(temperature) else 1.0
    if temperature:  # top_k=0, because transformers' own default is 50
        options = f"do_sample=True, temperature={temperature}, top_k=0"
    options += f", max_new_tokens={tokens}" if is_number(tokens) else ""
    ends, pad = facts.get("model.eos_ids"), facts.get("model.pad_id")
    config = ""
    if ends and all(map(is_number, ends)) and is_number(pad):
        config = f"""\
model.generation_config = GenerationConfig(eos_token_id={list(ends)}, pad_token_id={pad})
"""  # the tokens that ended answers in training, and no setting of the base's generation config
    inputs = 'tokenizer(prompt, return_tensors="pt")'
    if _chat(facts):
        inputs = """\
tokenizer.apply_chat_template(
    [{"role": "user", "content": prompt}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
)"""
    return f"""\
{config}prompt = {_example(facts)[0]}
inputs = {inputs}
with torch.no_grad():
    output = model.generate(**inputs, {options})
answer = output[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def _tokenized(facts: Facts) -> str:
    """Code that tokenises as in training: prompt and answer separately, then eos."""
    prompt, answer = _example(facts)
    prompt_ids = 'tokenizer(prompt)["input_ids"]'
    if _chat(facts):
        prompt_ids = """\
tokenizer.apply_chat_template(
    [{"role": "user", "content": prompt}],
    add_generation_prompt=True, return_dict=True,
)["input_ids"]"""
    return f"""\
prompt = {prompt}
answer = {answer}
prompt_ids = {prompt_ids}
answer_ids = tokenizer(
    answer, add_special_tokens=False, split_special_tokens=True
)["input_ids"]
input_ids = torch.tensor([prompt_ids + answer_ids + [tokenizer.eos_token_id]])
with torch.no_grad():"""


def _use_reward(facts: Facts) -> str:
    offset = facts.head.get("reward_offset", facts.get("stages.reward.offset"))
    before, after = "", 'print("score, not centred:", raw)'
    if is_number(offset):
        before = f"reward_offset = {offset!r}  # centres the reward on demonstrations\n"
        after = 'reward = raw + reward_offset\nprint("reward:", reward)'
    return f"""\
{before}{_tokenized(facts)}
    raw = model(input_ids=input_ids).logits[0, 0].item()
{after}"""


def _use_value(facts: Facts) -> str:
    return f"""\
{_tokenized(facts)}
    values = model(input_ids=input_ids).logits  # one expected return per token
print("values:", values.flatten().tolist())"""
