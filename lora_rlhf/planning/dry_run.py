# SPDX-License-Identifier: Apache-2.0
"""The phases of a run, gone through on the meta device: every byte is counted, none is allocated.

A tensor on the meta device has a shape and no memory. So the backbone, the roles and the very
functions that score and train are run from the config alone, and what they would allocate is
added up: what autograd saves, the transients of a forward, the KV cache, gradients. No formula
per architecture can go stale. What the meta device cannot know is set here, each once: the
attention kernel (`_Attention`), a 4-bit weight unpacked, whether a batch has padding (`_as_on`).

B rows, L tokens of prompt and completion, T completion tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, masking_utils

from lora_rlhf._trl import add_fused_lm_head, chunked_logprob
from lora_rlhf.algorithms.objectives import masked_sum
from lora_rlhf.data.padding import position_ids
from lora_rlhf.models import fused_layers, logprobs, sampler, scoring, trunk
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.training import microbatch_splitting

from .meta_backbone import BLOCK, tensors


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are born inside it and still alive; views cost nothing."""

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._existing = {t.untyped_storage()._cdata for t in existing}
        self._alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        gemm = getattr(torch.ops.bitsandbytes, "gemm_4bit", None)  # there where it is installed
        if gemm is not None and func is gemm.default:
            self.passing(_dequantised(args[2], args[0].dtype))
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._existing or key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.now += self._alive[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key)

    def passing(self, count: int) -> None:
        """Count bytes that exist inside one kernel only."""
        self.peak = max(self.peak, self.now + count)


def _dequantised(shape: Any, dtype: torch.dtype) -> int:
    """Bytes of a 4-bit weight as the matrix product reads it: whole, and its float32 scales.

    bitsandbytes' CUDA kernels that never unpack it serve small batches only.
    """
    count = int(shape[0]) * int(shape[1])
    return count * dtype.itemsize + 4 * (count // BLOCK)


# --------------------------------------------------------------------------- the attention kernel


class _Attention:
    """What `scaled_dot_product_attention` picks on a device; on the meta device it never does.

    Both kernels save queries, keys, values, their output and one float32 per row and head for the
    backward, and never hold the (B, heads, L, L) scores. A mask becomes a float one in each call.
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(query.dtype)
        ops = torch.ops.aten
        out: Tensor
        if self.device == "cpu":
            out = ops._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        else:
            if enable_gqa:  # flash attention's backward makes them as wide as the queries
                groups = query.shape[1] // key.shape[1]
                key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
            if attn_mask is not None:
                attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
            out = ops._scaled_dot_product_efficient_attention(
                query,
                key,
                value,
                attn_mask,
                torch.is_grad_enabled(),
                dropout_p,
                is_causal,
                scale=scale,
            )[0]
        return out


@contextlib.contextmanager
def _as_on(device: str, *, padded: bool) -> Iterator[None]:
    """Inside, kernels are those of `device`, and masks are built as for batches with padding."""
    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, new: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, new))

        put(nn.functional, "scaled_dot_product_attention", _Attention(device))
        # The meta device cannot say whether a mask is all ones, which lets transformers drop it,
        # nor which targets lie in a tile of the vocabulary, and it knows no autocast.
        put(masking_utils, "fast_all", lambda _: not padded)
        put(fx_config, "meta_nonzero_assume_all_nonzero", True)
        put(torch, "is_autocast_enabled", lambda *_: False)
        if device != "cpu":
            put(scoring, "logprobs_and_entropy", logprobs.by_trl_kernels)
            # Triton folds a tile where it lies; in torch, as here, each step would be a copy.
            for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
                put(chunked_logprob, name, lambda *_, **__: None)
        yield


# --------------------------------------------------------------------------------------- phases


@dataclass(frozen=True)
class Batch:
    """Rows of one length: a prompt and a completion of this many tokens each.

    Attributes:
        kept: Whether passes start from the trunk's states of them, kept from the rollout.
        rollout: Whether they are of a stage of rollouts, whose adapters fused.py computes.
    """

    rows: int
    prompt: int
    completion: int
    kept: bool = False
    rollout: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.completion


def count(made: Backbone, device: str, batch: Batch, phase: Phase) -> int:
    """Go through a phase as on `device`; the bytes it holds at its peak beside what it finds."""
    adapters = fused_layers.layers(made) if batch.rollout else contextlib.nullcontext()
    with adapters, _as_on(device, padded=batch.rows > 1), LiveBytes(tensors(made)) as live:
        with microbatch_splitting.in_one_block(trained(made) if device == "cpu" else ()):
            phase(made, batch)
    for model in (made.causal, *made.views.values()):
        model.zero_grad(set_to_none=True)
    return live.peak


def trained(made: Backbone) -> list[nn.Parameter]:
    """What the stage at hand moves; nothing where none is begun."""
    return [p for role in sorted(made.trained_roles) for _, p in made.role_parameters(role)]


Phase = Callable[[Backbone, Batch], None]


@contextlib.contextmanager
def stage(made: Backbone, trained: tuple[str, ...], *, checkpointing: bool) -> Iterator[None]:
    """As a stage that trains these roles finds the backbone; its gradients go at the end."""
    if not trained:
        yield
        return
    with made.training(*trained):
        for view in made.views.values():
            view.train()
        if checkpointing:
            made.views["policy"].activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        if trained == ("policy",):
            add_fused_lm_head(made.causal, outputs=("log_probs", "entropy", "is_top1"))
        yield


def _ids(made: Backbone, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, L); of several rows the first is one token shorter: there is padding."""
    ids = torch.zeros((rows, tokens), dtype=torch.long, device=made.device)
    mask = torch.ones((rows, tokens), dtype=torch.long, device=made.device)
    if rows > 1:
        mask[0, 0] = 0
    return ids, mask


def _states(made: Backbone, batch: Batch) -> Tensor | None:
    """The micro-batch's own copy of the kept trunk states, (B, L, H); None without a trunk."""
    if not batch.kept:
        return None
    width = made.causal.config.get_text_config().hidden_size
    return torch.zeros(
        (batch.rows, batch.tokens, width), dtype=made.causal.dtype, device=made.device
    )


@torch.no_grad()
def prefill(made: Backbone, batch: Batch) -> None:
    """Sampling: all prompts at once, and the first token of each completion."""
    ids, mask = _ids(made, batch.rows, batch.prompt)
    with made.role("policy"):
        _next(made, ids, mask, DynamicCache(config=made.causal.config))


@torch.no_grad()
def decode(made: Backbone, batch: Batch) -> None:
    """Sampling: the last token of the completions, when the cache is full."""
    config, dtype = made.causal.config, made.causal.dtype
    cache = DynamicCache(config=config)
    ids, mask = _ids(made, batch.rows, batch.tokens)
    shape = (batch.rows, kv_heads(config), batch.tokens - 1, head_width(config))
    for index in range(len(made.layers)):
        full = torch.zeros(shape, dtype=dtype, device=made.device)
        cache.update(full, full.clone(), index)
        del full
    with made.role("policy"):
        _next(made, ids[:, -1:], mask, cache)


def kv_heads(config: Any) -> int:
    """Heads of keys and values."""
    config = config.get_text_config()
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_width(config: Any) -> int:
    """Dimensions of a head."""
    config = config.get_text_config()
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _next(made: Backbone, ids: Tensor, mask: Tensor, cache: DynamicCache) -> None:
    """One step of sampler.py: a forward with the cache, and a draw for each row."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    names = inspect.signature(type(made.causal).forward).parameters
    if "position_ids" in names:
        inputs["position_ids"] = position_ids(mask)[:, -ids.shape[1] :]
    inputs["cache" if "cache" in names else "past_key_values"] = cache
    out = made.causal(**inputs, use_cache=True, logits_to_keep=1)
    logits = out.logits[:, -1].float()
    del out
    sampler.draw(logits, 1.0, torch.zeros(len(ids), device=made.device))


@torch.no_grad()
def score(made: Backbone, batch: Batch) -> None:
    """Log-probs and values of a batch of episodes, without gradients."""
    ids, mask = _ids(made, batch.rows, batch.tokens)
    kept = _states(made, batch)
    with made.role("policy"):
        scoring.completion_logprobs(made, ids, mask, batch.completion, 1.0, kept)
    if made.has("value"):
        with made.role("value"):
            scoring.token_values(made, ids, mask, batch.completion, trunk_states=kept)


@torch.no_grad()
def rewards(made: Backbone, batch: Batch) -> None:
    """Scores of a batch of episodes by a reward role."""
    ids, mask = _ids(made, batch.rows, batch.tokens)
    with made.role("reward"):
        scoring.last_token_scores(made, ids, mask, "reward", _states(made, batch))


@torch.no_grad()
def trunk_pass(made: Backbone, batch: Batch) -> None:
    """The states that leave the trunk, for a batch of episodes."""
    ids, mask = _ids(made, batch.rows, batch.tokens)
    if trunk.depth(made):
        scoring.trunk_states(made, ids, mask)


def language_model(made: Backbone, batch: Batch) -> None:
    """Forward and backward of SFT, through the LM head that TRL puts on the policy's view."""
    ids, mask = _ids(made, batch.rows, batch.tokens)
    with made.role("policy"):
        made.views["policy"](
            input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True, use_cache=False
        ).loss.backward()


def ranking(made: Backbone, batch: Batch) -> None:
    """Forward and backward of the reward model; rows are completions, whatever their prompts."""
    ids, mask = _ids(made, batch.rows, batch.tokens)
    with made.role("reward"):
        out = made.views["reward"](input_ids=ids, attention_mask=mask, use_cache=False)
        out.logits.float().sum().backward()


def policy_step(made: Backbone, batch: Batch) -> None:
    """Forward and backward of the policy on a micro-batch."""
    _policy(made, batch, lambda: None)


def update(made: Backbone, batch: Batch) -> None:
    """A micro-batch of PPO: forward and backward of the policy, then those of the value."""
    ids, mask = _ids(made, batch.rows, batch.tokens)

    def watch() -> None:
        # On the very first, FrozenRolesCheck takes the reference's log-probs in between.
        with torch.no_grad():
            scoring.completion_logprobs(made, ids, mask, batch.completion, 1.0)

    _policy(made, batch, watch)
    if made.has("value"):
        with made.role("value"):
            values = scoring.token_values(
                made, ids, mask, batch.completion, trunk_states=_states(made, batch)
            )
            masked_sum(values, mask[:, -batch.completion :]).backward()


def _policy(made: Backbone, batch: Batch, between: Callable[[], None]) -> None:
    ids, mask = _ids(made, batch.rows, batch.tokens)
    with made.role("policy"):
        found, _ = scoring.completion_logprobs(
            made, ids, mask, batch.completion, 1.0, _states(made, batch)
        )
        between()
        masked_sum(found, mask[:, -batch.completion :]).backward()


def lm_head(made: Backbone, batch: Batch) -> None:
    """The LM head of `policy_step` alone, from hidden states on."""
    config = made.causal.config.get_text_config()
    ids, _ = _ids(made, batch.rows, batch.completion)
    states = torch.zeros(
        (batch.rows, batch.completion, config.hidden_size),
        dtype=made.causal.dtype,
        device=made.device,
        requires_grad=True,
    )
    scoring.logprobs_of(made, states, ids, 1.0)[0].sum().backward()


@functools.cache
def twice(phase: Phase) -> Phase:
    """The phase with gradients of an earlier micro-batch there: accumulation adds to them."""

    def both(made: Backbone, batch: Batch) -> None:
        phase(made, batch)
        phase(made, batch)

    return both
