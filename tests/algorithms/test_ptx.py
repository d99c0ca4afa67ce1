# SPDX-License-Identifier: Apache-2.0
"""PPO-ptx: the loss is the language model's own, per token, exact under accumulation."""

import json

import pytest
import torch
from ppo_run import Run, roles
from small import backbone

from lora_rlhf.algorithms.ppo import ptx
from lora_rlhf.algorithms.ppo.ptx import TextMix
from lora_rlhf.data import dataset_builder
from lora_rlhf.errors import DataError
from lora_rlhf.recipe.schema import ModelSection, Recipe

ROWS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16], [17, 18, 19]]


def test_the_loss_is_that_of_the_causal_model():
    made = backbone("llama", "policy", "reference")
    mix = TextMix(ROWS, 4, 0, pad_id=0)
    batch = mix.next(made)
    with made.role("policy"), torch.no_grad():
        ours = float(ptx.loss_sum(made, batch))
        one_by_one = sum(
            float(made.causal(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss)
            * (len(row) - 1)
            for row in ROWS
        )
    assert ours == pytest.approx(one_by_one, rel=1e-5)
    assert batch.tokens == sum(len(row) - 1 for row in ROWS)


def test_every_text_comes_once_before_any_comes_again():
    made = backbone("llama", "policy", "reference")
    mix = TextMix([[i, i] for i in range(5, 15)], 4, 3, pad_id=0)
    seen = [int(row[0]) for _ in range(5) for row in mix.next(made).ids]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(5, 15))
    again = TextMix([[i, i] for i in range(5, 15)], 4, 3, pad_id=0)
    assert seen[:4] == [int(row[0]) for row in again.next(made).ids]


def test_fewer_texts_than_a_batch_are_not_repeated():
    assert TextMix(ROWS, 99, 0, pad_id=0).size == 4


def test_text_keeps_the_policy_near_to_text(tmp_path):
    """With a large coefficient the text's loss falls; without it nothing is logged of it."""
    options = {"updates": 6, "kl_coef": 0.0}
    plain = Run(tmp_path / "a", made=roles(), **options).go()
    mixed = Run(tmp_path / "b", made=roles(), text=TextMix(ROWS, 4, 0, 0), ptx_coef=5.0, **options)
    mixed.go()
    losses = [line["policy/ptx_loss"] for line in mixed.lines]
    assert losses[-1] < losses[0] - 0.05
    assert "policy/ptx_loss" not in plain.lines[0]


def test_accumulation_divides_by_the_tokens_of_the_whole_step(tmp_path):
    """Two micro-batches of two texts move the policy as one of four does."""
    found = []
    for name, size, window in (("one", 4, 1), ("two", 2, 2)):
        args = {
            "per_device_train_batch_size": size,
            "steps_per_generation": window,
            "gradient_accumulation_steps": window,
        }
        made = roles()
        mix = TextMix(ROWS, size, 0, 0)
        run = Run(
            tmp_path / name,
            args,
            made=made,
            text=mix,
            ptx_coef=1.0,
            rewards=[zero],
            kl_coef=0.0,
            missing_eos_penalty=0.0,
        )
        gradients = {}
        clip = run.trainer._clip_grad_norm

        def keep(model, gradients=gradients, made=made, clip=clip):
            for name, p in made.role_parameters("policy"):
                gradients[name] = p.grad.clone()
            return clip(model)

        run.trainer._clip_grad_norm = keep
        run.trainer.note = lambda numbers: None
        # PPO's own part is left out: sampling differs between batch sizes.
        run.trainer._compute_loss = lambda model, inputs, t=run.trainer: only_text(t, inputs)
        run.go()
        found.append(gradients)
    assert any(float(g.abs().max()) > 0 for g in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-7)


def only_text(trainer, inputs):
    trainer.micro_batch = inputs
    return trainer._zero_loss()


def zero(completion_ids, **_):
    return [0.0 for _ in completion_ids]


# ------------------------------------------------------------------------------ data


def recipe(path, **options):
    source = {"path": str(path), **options}
    return Recipe(
        name="x",
        model=ModelSection(id="tiny"),
        data={"text": [source], "max_tokens": 8},
        ppo={"ptx_coef": 0.5},
    )


def test_long_documents_are_cut_and_nothing_is_lost(tmp_path):
    made = backbone("llama", "policy")
    words = " ".join(f"w{i}" for i in range(5, 25))
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in (words, "w9 </s> w9", " ")))
    rows, report = dataset_builder.texts(recipe(path), made.tokenizer)
    assert all(2 <= len(row) <= 8 for row in rows)
    ids = [i for row in rows for i in row]
    assert ids.count(made.tokenizer.eos_token_id) == 2  # the one in the text stays text
    assert report["documents"] == 2 and report["tokens"] == len(ids) >= 20
    assert report["special_tokens_in_text"] == 1


def test_text_without_its_column_is_an_error_with_file_and_line(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "fine"}\n{"content": "no"}\n')
    with pytest.raises(DataError) as error:
        dataset_builder.texts(recipe(path), backbone("llama", "policy").tokenizer)
    assert "text.jsonl:2" in str(error.value) and "columns" in str(error.value)


def test_rows_without_text_are_left_out_as_skip_bad_says_and_counted(tmp_path):
    path = tmp_path / "text.jsonl"
    found = ("w5 w6", None, "w7 w8", 3, "w9 w10", "half \udc00")
    lines = ["{", *(json.dumps({"text": text}) for text in found)]
    path.write_text("\n".join(lines))
    tokenizer = backbone("llama", "policy").tokenizer
    rows, report = dataset_builder.texts(recipe(path, skip_bad=4), tokenizer)
    assert len(rows) == report["documents"] == 3
    assert report["counts"]["broken"] == {"before": 7, "after": 3}
    [note] = report["notes"]
    assert note == "broken and left out (skip_bad), the first at text.jsonl:1 (4 rows)"
    for allowed, line in enumerate((1, 3, 3, 3)):
        with pytest.raises(DataError) as error:
            dataset_builder.texts(recipe(path, skip_bad=allowed), tokenizer)
        assert error.value.where == f"{path}:{line}"
        assert line == 1 or "3 of 6 rows do not fit text" in error.value.given


def test_no_text_at_all(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="no text"):
        dataset_builder.texts(recipe(path), backbone("llama", "policy").tokenizer)
