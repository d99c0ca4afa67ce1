# SPDX-License-Identifier: Apache-2.0
"""Batches that rows join and leave: the same bits as alone, and the numbers of whole forwards."""

import threading

import pytest
import torch
from small import ARCHITECTURES, base, base_folder

from lora_rlhf.models import decode_batch, token_draw
from lora_rlhf.models.decode_batch import PIECE, DecodeBatch
from lora_rlhf.models.plain_adapters import PlainAdapters, peft_name
from lora_rlhf.models.stacked_lora import BASE

PROMPTS = [([5, 6, 7, 8], 1), ([9] * 13, 2), ([11] * 20, 1)]


def logits(batch, prompts, steps: int = 12) -> list[torch.Tensor]:
    """Each step's logits, (rows, V), of tokens that depend on the prompt and the step."""
    with torch.inference_mode():
        groups = []
        for prompt, rows, adapter in prompts:
            groups.append([group for group, _ in batch.begin(prompt, adapter, rows)][-1])
        return [
            batch.step(groups, [[token(group.prompt, t)] * group.rows for group in groups])
            for t in range(steps)
        ]


def token(prompt: list[int], step: int) -> int:
    return (5 + 7 * step + len(prompt)) % 60


def with_adapter(made, rank: int, folder) -> DecodeBatch:
    """A batch of the base and of one adapter with random weights."""
    adapters = PlainAdapters(made)
    with adapters.training(rank, folder) as weights:
        for weight in weights:
            torch.nn.init.normal_(weight, std=0.1)
    adapters.load("one", folder)
    return DecodeBatch(made, [peft_name("one")])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_row_is_the_same_alone_and_that_of_a_whole_forward(name, tmp_path):
    batch = with_adapter(base(base_folder(name)), 4, tmp_path)
    assert batch.why_single == ""
    names = [BASE, peft_name("one"), peft_name("one")]
    rows = [(*each, adapter) for each, adapter in zip(PROMPTS, names, strict=True)]
    together, at = logits(batch, rows), 0
    for prompt, count, adapter in rows:
        alone = logits(batch, [(prompt, 1, adapter)])
        for _ in range(count):
            assert all(torch.equal(x[0], y[at]) for x, y in zip(alone, together, strict=True))
            at += 1
        whole = batch.logits([*prompt, *(token(prompt, t) for t in range(12))], adapter, 12)
        torch.testing.assert_close(torch.cat(alone), whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"load_in_4bit": True}])
def test_the_bits_of_other_precisions(options, tmp_path):
    batch = with_adapter(base("tiny", **options), 8, tmp_path)
    rows = [(prompt, count, peft_name("one")) for prompt, count in PROMPTS]
    together = logits(batch, rows)
    alone = logits(batch, [(*PROMPTS[2], peft_name("one"))])
    assert batch.why_single == ""
    assert all(torch.equal(x[0], y[3]) for x, y in zip(alone, together, strict=True))


def test_engines_in_two_threads_have_their_own_caches():
    first, second = (DecodeBatch(base("tiny"), []) for _ in range(2))
    rows, got = [([5, 6, 7, 8], 1, BASE)], []
    alone = logits(first, rows, 2)
    with torch.inference_mode():
        [(group, _)] = first.begin(*rows[0][:1], BASE, 1)

    def between(*_):
        hook.remove()
        thread = threading.Thread(target=lambda: got.extend(logits(second, rows, 2)))
        thread.start()
        thread.join()

    hook = first.base.causal.register_forward_pre_hook(between)
    with torch.inference_mode():
        steps = [first.step([group], [[token(rows[0][0], t)]]) for t in range(2)]
    for a, b, c in zip(alone, steps, got, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_temperature_below_the_smallest_float_is_greedy():
    row = torch.arange(50.0)[None] / 50
    drawn = [int(token_draw.draw(row, [1e-60], [1.0], [seed], [0])) for seed in range(9)]
    assert drawn == [49] * 9


def test_rows_leave_and_long_prompts_come_in_pieces():
    made = base("tiny")
    batch, long = DecodeBatch(made, []), [7 + i % 50 for i in range(PIECE - 40)]
    with torch.inference_mode():
        pieces = [group.length for group, _ in batch.begin([*long, *[9] * 60], BASE, 1)]
        assert pieces == [PIECE, PIECE + 20]
        [(group, _)] = batch.begin(long[:30], BASE, 3)
        first = batch.step([group], [[5, 6, 7]])
        group.keep([2])
        second = batch.step([group], [[8]])
        whole = batch.logits([*long[:30], 7, 8], BASE, 2)
    torch.testing.assert_close(torch.stack([first[2], second[0]]), whole, atol=2e-5, rtol=0)


def test_where_no_batch_is_possible_rows_are_computed_alone(monkeypatch):
    made = base(base_folder("llama"))
    monkeypatch.setattr(type(made.causal), "_supports_attention_backend", False)
    batch = DecodeBatch(made, [])
    assert "takes no other attention" in batch.why_single
    rows = [(*each, BASE) for each in PROMPTS]
    together = logits(batch, rows, 3)
    monkeypatch.undo()
    torch.testing.assert_close(
        torch.stack(together),
        torch.stack(logits(DecodeBatch(made, []), rows, 3)),
        atol=2e-5,
        rtol=0,
    )


@pytest.mark.parametrize(("changes_at", "least"), [((), 4), ((7,), 8), ((11, 20), 32), ((99,), 0)])
def test_the_fewest_rows_are_measured(changes_at, least):
    class Kernels(torch.nn.Linear):
        """A layer that rounds in another way from some numbers of rows on, as a processor's do."""

        def forward(self, rows):
            return rows + 1e-3 * sum(len(rows) >= at for at in changes_at)

    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), Kernels(8, 8))
    assert decode_batch._least_rows(layers, []) >= least
    if not least:
        assert decode_batch._least_rows(layers, []) == 0
    assert decode_batch._least_rows(torch.nn.Sequential(Kernels(8, 8)), []) == least


def test_packed_weights_of_one_size_may_be_of_two_products():
    class Packed(torch.nn.Linear):
        def __init__(self, width, out, changes_at=999):
            super().__init__(width, out, bias=False)
            codes = torch.zeros(width * out // 2, 1, dtype=torch.uint8)
            self.weight = torch.nn.Parameter(codes, requires_grad=False)
            self.changes_at = changes_at

        def forward(self, rows):
            return rows + 1e-3 * (len(rows) >= self.changes_at)

    layers = torch.nn.Sequential(Packed(8, 16), Packed(16, 8, changes_at=11))
    layers.dtype = torch.float32
    assert decode_batch._least_rows(layers, []) == 16


def test_without_steady_kernels_rows_are_computed_alone(monkeypatch):
    monkeypatch.setattr(decode_batch, "_steady", lambda *_: False)
    batch = DecodeBatch(base(base_folder("llama")), [])
    assert "on this processor" in batch.why_single


class TestDraw:
    def test_frequencies_are_the_probabilities(self):
        row, n = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf]), 20_000
        drawn = token_draw.draw(row.expand(n, -1).clone(), [0.5] * n, [1.0] * n, range(n), [3] * n)
        expected = (row / 0.5).softmax(0) * n
        counts = torch.bincount(drawn, minlength=5)
        assert counts[4] == 0
        assert float(((counts[:4] - expected[:4]) ** 2 / expected[:4]).sum()) < 16.3  # p = 0.001

    def test_noise_is_finite(self):
        extreme = token_draw._gumbel(torch.tensor([0, 511, 2**31, 2**32 - 512, 2**32 - 1]))
        assert bool(extreme.isfinite().all()) and bool((extreme.diff() >= 0).all())

    def test_positions_are_independent(self):
        n = 20_000
        each = [token_draw.noise(torch.arange(n), torch.full((n,), t), 2) for t in (0, 1)]
        pairs = torch.stack([each[0][:, 0], each[0][:, 1], each[1][:, 0], each[1][:, 1]])
        correlations = torch.corrcoef(pairs).fill_diagonal_(0)
        assert float(correlations.abs().max()) < 0.03

    @pytest.mark.parametrize("size", [5, 5000])
    def test_the_nucleus(self, size):
        row = torch.full((size,), -20.0)
        row[:4] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
        n = 300
        drawn = token_draw.draw(row.expand(n, -1).clone(), [1.0] * n, [0.75] * n, range(n), [0] * n)
        assert set(drawn.tolist()) == {0, 1}

    def test_greedy(self):
        assert token_draw.draw(torch.tensor([[1.0, 3.0, 2.0]]), [0], [0.5], [1], [0]).tolist() == [
            1
        ]


def forwarded(batch, monkeypatch):
    """The number of tokens of each forward from now on."""
    counts, forward = [], batch._forward

    def counted(ids, *rest):
        counts.append(len(ids[0]))
        return forward(ids, *rest)

    monkeypatch.setattr(batch, "_forward", counted)
    return counts


@torch.inference_mode()
def turn(batch, prompt, adapter=BASE, steps=4):
    """The logits of a prompt and of some tokens of its answer, (1 + steps, V); it is kept then."""
    group, logits = list(batch.begin(prompt, adapter, 1))[-1]
    found = [logits]
    answer = [token(prompt, t) for t in range(steps + 1)]  # the last one is never computed
    found += [batch.step([group], [[one]])[0] for one in answer[:-1]]
    batch.keep(group, answer)
    return torch.stack(found), answer


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prompt_goes_on_from_what_was_kept(name, tmp_path, monkeypatch):
    batch = with_adapter(base(base_folder(name)), 4, tmp_path)
    batch.kept_tokens, one = 100, peft_name("one")
    prompt = [5 + i % 50 for i in range(20)]
    counts = forwarded(batch, monkeypatch)
    first, answer = turn(batch, prompt, one)
    later = [*prompt, *answer, 7, 8, 9]
    counts.clear()
    found, more = turn(batch, later, one)
    assert counts == [4, 1, 1, 1, 1]  # the answer's last token and the new ones
    whole = batch.logits([*later, *more[:-1]], one, 5)
    torch.testing.assert_close(found, whole, atol=2e-5, rtol=0)
    cases = [
        (later, one, 1),
        (later, BASE, len(later)),
        ([*later[:6], 60, 61], one, 2),  # another word in the middle
        ([60, 3], one, 2),  # nothing in common
    ]
    for ids, adapter, computed in cases:
        counts.clear()
        found, more = turn(batch, ids, adapter, 2)
        assert counts[0] == computed
        whole = batch.logits([*ids, *more[:-1]], adapter, 3)
        torch.testing.assert_close(found, whole, atol=2e-5, rtol=0)
    assert torch.equal(turn(batch, prompt, one)[0], first)  # nothing in common: as at first


def test_what_is_kept_is_bounded_and_can_be_dropped(tmp_path, monkeypatch):
    batch = with_adapter(base(base_folder("llama")), 4, tmp_path)
    one = peft_name("one")
    turn(batch, [5] * 20)
    assert not batch._kept  # the default: a server's prompts are of several people
    batch.kept_tokens = 50
    turn(batch, [5] * 20)
    turn(batch, [5] * 20, one)
    assert list(batch._kept) == [BASE, one]
    ids, layers = batch._kept[one]
    assert len(ids) == 24 and {layer.shape[3] for layer in layers} == {24}
    turn(batch, [7] * 60, one)  # too long to be kept; the earlier one stays
    turn(batch, [6] * 24)  # replaces that of its adapter, and makes room by dropping the oldest
    assert [(name, len(ids)) for name, (ids, _) in batch._kept.items()] == [(BASE, 28)]
    batch.forget()
    counts = forwarded(batch, monkeypatch)
    turn(batch, [6] * 24)
    assert counts[0] == 24


@torch.inference_mode()
def test_several_samples_keep_their_prompt_only():
    batch = DecodeBatch(base(base_folder("llama")), [])
    batch.kept_tokens = 50
    group, _ = list(batch.begin([5] * 20, BASE, 3))[-1]
    batch.step([group], [[1, 2, 3]])
    group.keep([2])
    batch.keep(group, [])
    assert batch._kept[BASE][0] == [5] * 20 and batch._kept[BASE][1][0].shape[1:4:2] == (1, 20)
