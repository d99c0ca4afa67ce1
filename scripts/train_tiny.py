# SPDX-License-Identifier: Apache-2.0
"""Pre-train the tiny model: ``python scripts/train_tiny.py --out DIR``.

The text is generated from the ``pretrain`` split. Most of it shows bad behaviour, as web text does:
the model learns to copy from a record but is a mediocre assistant, which SFT and PPO then improve.
The settings were chosen for copying, never by how well PPO does afterwards. It takes four minutes
on an H100 (``--workers 6``), which is mostly idle, and hours on two CPU cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_rlhf.data.closed_world import checkers, generator, vocabulary

log = logging.getLogger(__name__)

SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>", "<system>")
# Each turn opens with its own token and nothing depends on later turns, so a conversation's
# tokens are a prefix of the longer conversation's: trainers mask prompts by length.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "<assistant>{% generation %}{{ message['content'] }}<eos>{% endgeneration %}"
    "{%- elif message['role'] == 'system' -%}<system>{{ message['content'] }}"
    "{%- else -%}<user>{{ message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)


@dataclass(frozen=True)
class Settings:
    """Settings that decide the weights, together with the versions in ``TRAINED.json``."""

    seed: int = 0
    steps: int = 9000
    batch: int = 96
    learning_rate: float = 3e-3
    warmup: int = 300
    weight_decay: float = 0.05
    good_share: float = 0.4
    plain_share: float = 0.3
    plain_start: float = 0.7
    settle: float = 0.6
    prompt_weight: float = 0.2
    vocabulary: int = 2048  # nearly every value is one token, so copying takes one step
    hidden: int = 128
    layers: int = 6
    heads: int = 4
    intermediate: int = 384
    positions: int = 512
    threads: int = 1
    sample: int = 20_000  # documents that the tokenizer is trained on
    chunk: int = 96  # batches that are generated, and sorted by length, together
    evaluated: int = 240  # prompts that are answered before each export


def restated(item: checkers.Item, rng: random.Random) -> str:
    """Return the record, and again in other forms and orders: text that teaches copying."""
    facts = [(a, v) for a, v in item.facts if a != "name"]
    shuffled = rng.sample(facts, len(facts))
    forms = [
        "; ".join(f"{a}: {v}" for a, v in shuffled) + ".",
        " ".join(f"{item.name} {vocabulary.PHRASES[a].format(v=v)}." for a, v in shuffled),
        "\n".join(f"- {a}: {v}" for a, v in shuffled),
        json.dumps({"name": item.name, **dict(shuffled)}),
    ]
    return f"{item.prompt.split(chr(10))[0]}\n" + "\n".join(rng.sample(forms, 2))


def documents(
    settings: Settings, chunk: int, n: int, progress: float = 1.0
) -> list[tuple[str, str]]:
    """Return ``n`` pre-training documents as (prompt, completion); plain text has no prompt.

    The model must learn to copy before it can answer from a record, and invented values teach the
    opposite. So the text starts clean and turns into the mix over ``settle`` of the training.
    """
    rng = random.Random(f"pretrain/{settings.seed}/{chunk}")
    fresh = max(0.0, 1.0 - progress / settings.settle)
    good_share = settings.good_share + fresh * (1.0 - settings.good_share)
    plain_share = settings.plain_share + fresh * (settings.plain_start - settings.plain_share)
    rows = []
    for item in generator.items(n, settings.seed * 100_003 + chunk, "pretrain"):
        write = generator.good if rng.random() < good_share else generator.flawed
        text = write(item, rng)
        if item.facts and rng.random() < plain_share:
            rows.append(("", restated(item, rng)))
        else:
            rows.append((item.prompt, text))
    return rows


def build_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE on generated text; any other text falls back to bytes."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [" ".join(row) for row in documents(settings, -1, settings.sample, 0.3)]
    # In JSON a value follows a quote, not a space: without more of it, values would be split.
    records = generator.items(settings.sample, -1, "pretrain", ["json"])
    texts += [json.dumps(dict(item.facts)) for item in records]
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=list(SPECIAL[2:]),
        model_max_length=settings.positions,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        initializer_range=0.06,  # 0.02 is for wide models; here attention would start flat
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


Batch = tuple[torch.Tensor, torch.Tensor]  # token ids and loss weights, (batch, length)


def chunk_of_batches(
    chunk: int, settings: Settings, tokenizer: PreTrainedTokenizerFast
) -> list[Batch]:
    """Return the batches of one chunk, right-padded."""
    user, assistant = (tokenizer.convert_tokens_to_ids(t) for t in ("<user>", "<assistant>"))
    progress = chunk * settings.chunk / settings.steps
    rows = documents(settings, chunk, settings.batch * settings.chunk, progress)
    prompts = tokenizer([prompt for prompt, _ in rows], add_special_tokens=False)["input_ids"]
    texts = tokenizer([text for _, text in rows], add_special_tokens=False)["input_ids"]
    docs = []
    for (prompt, _), head, tail in zip(rows, prompts, texts, strict=True):
        lead = [user, *head, assistant] if prompt else []
        weights = [settings.prompt_weight] * len(lead) + [1.0] * (len(tail) + 1)
        docs.append(([*lead, *tail, tokenizer.eos_token_id], weights))
    docs.sort(key=lambda doc: len(doc[0]))  # like lengths together: little padding
    order = list(range(0, len(docs), settings.batch))
    random.Random(f"order/{settings.seed}/{chunk}").shuffle(order)
    made = []
    for start in order:
        part = docs[start : start + settings.batch]
        ids = torch.full((len(part), len(part[-1][0])), tokenizer.pad_token_id)
        loss_weights = torch.zeros(ids.shape)
        for i, (doc, weights) in enumerate(part):
            ids[i, : len(doc)] = torch.tensor(doc)
            loss_weights[i, : len(doc)] = torch.tensor(weights)
        made.append((ids, loss_weights))
    return made


def batches(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, workers: int
) -> Iterator[Batch]:
    """Yield the batches of all steps, which `workers` processes write ahead."""
    make = functools.partial(chunk_of_batches, settings=settings, tokenizer=tokenizer)
    chunks = range(math.ceil(settings.steps / settings.chunk))
    loader = DataLoader(chunks, batch_size=None, collate_fn=make, num_workers=workers)  # type: ignore[arg-type]
    for chunk in loader:
        yield from chunk


def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    temperature: float = 0.0,
    max_new_tokens: int = 64,
) -> list[str]:
    """Return completions of prompts, greedy at temperature 0."""
    chats = [[{"role": "user", "content": p}] for p in prompts]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(
        model.device
    )
    how: dict[str, Any] = {"do_sample": False}
    if temperature:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **how,
    )
    with torch.no_grad():
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=config,
        )
    new = out[:, inputs["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(new, skip_special_tokens=True))


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    n: int,
    temperature: float = 0.0,
    split: str = "pretrain",
) -> dict[str, float]:
    """Return the mean gold reward by family, over all items ("all"), and copying ("copied")."""
    items = generator.items(n, 10_007, split)
    was_training = model.training
    model.eval()
    texts = sample(model, tokenizer, [item.prompt for item in items], temperature)
    model.train(was_training)
    rewards = [checkers.check(i, text).reward for i, text in zip(items, texts, strict=True)]
    result = {"all": sum(rewards) / n}
    for family in vocabulary.FAMILIES:
        own = [r for i, r in zip(items, rewards, strict=True) if i.family == family]
        result[family] = sum(own) / len(own)
    # A completion that names the right value has copied, whatever else it did.
    pairs = [(i, t) for i, t in zip(items, texts, strict=True) if i.family == "answer"]
    result["copied"] = sum(i.answer.lower() in t.lower() for i, t in pairs) / len(pairs)
    return {key: round(value, 4) for key, value in result.items()}


def export(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    facts: dict[str, Any],
) -> None:
    """Write the folder, each file atomically, so that a reader never sees half of one."""
    out.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to(torch.bfloat16) for k, v in model.state_dict().items()}
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        copy = LlamaForCausalLM(model.config).to(model.device, torch.bfloat16)
        copy.load_state_dict(state)
        copy.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        copy.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        Path(scratch, "chat_template.jinja").unlink(missing_ok=True)
        config = json.loads(Path(scratch, "tokenizer_config.json").read_text())
        config["chat_template"] = TEMPLATE  # here older versions find it too
        Path(scratch, "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        Path(scratch, "TRAINED.json").write_text(json.dumps(facts, indent=2) + "\n")
        for file in sorted(Path(scratch).iterdir()):
            os.replace(file, out / file.name)


def weighted_loss(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy, each token with its weight; (B, L, V), (B, L), (B, L) -> ()."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()


def train(
    settings: Settings,
    out: Path,
    export_every: float = 240.0,
    fuse: bool = True,
    device: str = "cpu",
    workers: int = 0,
) -> dict[str, Any]:
    """Train from scratch, export regularly, and return the contents of ``TRAINED.json``.

    ``fuse`` compiles the model, which needs a C++ compiler and made training 2.6 times as fast on
    CPUs; ``workers`` processes write the text.
    """
    torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, nothing else on a CPU
    tokenizer = build_tokenizer(settings)
    model = build_model(settings, tokenizer).to(device)
    facts: dict[str, Any] = {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    log.info("%s", facts)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    start = last = time.monotonic()
    running = 0.0
    model.train()
    forward = torch.compile(model, dynamic=True) if fuse else model
    for step, batch in enumerate(batches(settings, tokenizer, workers), start=1):
        ids, weights = (tensor.to(device) for tensor in batch)
        progress = step / settings.steps
        rate = min(step / settings.warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = settings.learning_rate * rate
        loss = weighted_loss(forward(input_ids=ids).logits, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        running = value if step == 1 else 0.98 * running + 0.02 * value
        if step % 50 == 0:
            log.info("step %d loss %.4f, %.0f s", step, running, time.monotonic() - start)
        ended = step == settings.steps
        if ended or time.monotonic() - last > export_every:
            facts |= {
                "finished": ended,
                "step": step,
                "loss": round(running, 4),
                "seconds": round(time.monotonic() - start),
                "greedy": evaluate(model, tokenizer, settings.evaluated),
            }
            log.info("%s", {k: facts[k] for k in ("step", "loss", "seconds", "greedy")})
            export(model, tokenizer, out, facts)
            last = time.monotonic()
        if ended:
            break
    return facts


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--no-compile", action="store_true", help="do without a C++ compiler")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that write the text")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings = Settings(seed=args.seed, steps=args.steps)
    fuse = not args.no_compile and args.device == "cpu"
    train(settings, args.out, fuse=fuse, device=args.device, workers=args.workers)


if __name__ == "__main__":
    main()
