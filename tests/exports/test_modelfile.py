# SPDX-License-Identifier: Apache-2.0
"""Chat templates in Go: those that can be written, and a refusal for the others."""

import pytest
import small

from lora_rlhf import tiny
from lora_rlhf.errors import UsageError
from lora_rlhf.exports import modelfile

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
SYSTEM_IN_THE_FIRST_TURN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.index0 == 1 %}{{ messages[0]['content'] }}\n\n{% endif %}{{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHANGES_EARLIER_TURNS = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if not loop.last %}{{ m['content'] | upper }}{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template):
    made = small.tokenizer()
    made.chat_template = template
    return made


def go(template: str, turns: list[dict[str, str]]) -> str:
    """Execute the Go templates that `Shape.go` writes."""
    start, _, rest = template.partition("{{ range .Messages }}{{ ")
    body, _, opening = rest.partition("end }}{{ end }}")
    branches = {}
    for branch in body.removeprefix("if ").split("else if "):
        role, _, text = branch.removeprefix('eq .Role "').partition('" }}')
        branches[role] = text.removesuffix("{{ ")
    text = start
    for turn in turns:
        text += branches.get(turn["role"], "").replace("{{ .Content }}", turn["content"])
    return (text + opening).replace('{{ "{{" }}', "{{")


CHAT = [
    {"role": "system", "content": "Be {{ brief }}."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why\nso?"},
]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, NO_SYSTEM, None])
def test_a_template_in_go_writes_what_the_chat_template_writes(template):
    if template is None:
        from transformers import AutoTokenizer

        made = AutoTokenizer.from_pretrained(tiny.path())
    else:
        made = tokenizer(template)
    found = modelfile.shape(made)
    for chat in (CHAT, CHAT[1:], CHAT[1:2]):
        if template == NO_SYSTEM and chat is CHAT:
            continue
        wanted = made.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert found.render(chat) == wanted
        given = [{"role": "system", "content": found.system}] * bool(found.system)
        assert go(found.go(), chat if chat is CHAT else given + chat) == wanted


def test_the_modelfile_of_the_tiny_model():
    text = modelfile.write(small.base("tiny"), "tiny.gguf", "apache-2.0", 512)
    assert text == (
        'FROM ./tiny.gguf\nTEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<system>'
        '{{ .Content }}{{ else if eq .Role "user" }}<user>{{ .Content }}{{ else if eq .Role '
        '"assistant" }}<assistant>{{ .Content }}<eos>{{ end }}{{ end }}<assistant>"""\n'
        'PARAMETER stop """<eos>"""\nPARAMETER temperature 1\nPARAMETER top_k 0\n'
        "PARAMETER top_p 1\nPARAMETER min_p 0\nPARAMETER repeat_penalty 1\n"
        'PARAMETER num_ctx 512\nLICENSE """apache-2.0"""\n'
    )


def test_a_default_system_prompt_becomes_the_modelfiles():
    found = modelfile.shape(tokenizer(CHATML))
    assert found.system == "You are helpful"
    assert found.around["system"] == ("<|im_start|>system\n", "<|im_end|>\n")


def test_a_turn_that_begins_with_the_bos_token_keeps_it():
    """SmolLM2's bos opens every turn, and its tokenizer, and so llama.cpp, puts none before."""
    made = small.base(small.base_folder("llama"))
    made.tokenizer.bos_token = "<user>"
    made.tokenizer.chat_template = CHATML.replace("<|im_start|>", "<user>")
    text = modelfile.write(made, "m.gguf", "", 64)
    assert 'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<user>system\n' in text
    assert 'SYSTEM """You are helpful"""' in text and "LICENSE" not in text


@pytest.mark.parametrize("template", [SYSTEM_IN_THE_FIRST_TURN, CHANGES_EARLIER_TURNS, None])
def test_a_template_that_is_more_than_text_around_turns_is_refused(template):
    with pytest.raises(UsageError, match="no Modelfile can be written: the"):
        modelfile.shape(tokenizer(template))
