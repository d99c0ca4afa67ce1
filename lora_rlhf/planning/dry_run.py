# SPDX-License-Identifier: Apache-2.0
"""Run the phases of a recipe on the meta device, and count the bytes that they would allocate.

A tensor on the meta device has a shape and no memory. The functions that score and train are run
there on a backbone made from the config alone, and their allocations are added up: tensors saved by
autograd, the transients of a forward, the KV cache, gradients. No formula per architecture is
needed. Three facts that the meta device lacks are set here: the attention kernel (`_attention`), an
unpacked 4-bit weight (`LiveBytes`), and whether a batch has padding (`_as_on`).

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

_ATEN = torch.ops.aten
_ELEMENTWISE = {
    _ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.mul.Tensor, _ATEN.mul.Scalar, _ATEN.div.Tensor,
    _ATEN.div.Scalar, _ATEN.neg.default, _ATEN.pow.Tensor_Scalar, _ATEN.rsqrt.default,
    _ATEN.silu.default,
}  # fmt: skip
_IN_PLACE = {
    _ATEN.add_.Tensor, _ATEN.mul_.Tensor, _ATEN.div_.Tensor, _ATEN.addmm_.default,
    _ATEN.pow_.Scalar, _ATEN.rsqrt_.default,
}  # fmt: skip


def _result(func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Run an operation, with a shortcut for the commonest, which torch does in Python on meta.

    An elementwise operation on floats of one type gives a tensor like its largest argument.
    """
    if func in _IN_PLACE:
        return args[0]
    if func in _ELEMENTWISE:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        like = max(tensors, key=lambda t: (t.ndim, t.numel()))  # the first of those
        whole = all(t.shape == like.shape or _broadcasts(t.shape, like.shape) for t in tensors)
        one_type = len({t.dtype for t in tensors}) == 1 and like.is_floating_point()
        if whole and one_type and like.is_meta and _ATEN.is_non_overlapping_and_dense(like):
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
    return func(*args, **(kwargs or {}))


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages created inside it and still alive; views cost nothing."""

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._existing = {t.untyped_storage()._cdata for t in existing}
        self._alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = _result(func, args, kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        gemm = getattr(torch.ops.bitsandbytes, "gemm_4bit", None)  # None if not installed
        if gemm is not None and func is gemm.default:
            # Inside the kernel the whole weight is unpacked, with float32 scales. CUDA kernels
            # that do not unpack it serve small batches only.
            weights = math.prod(args[2])
            inside = weights * args[0].dtype.itemsize + 4 * (weights // BLOCK)
            self.peak = max(self.peak, self.now + inside)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._existing or key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.now += self._alive[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._alive.pop(key)


# --------------------------------------------------------------------------- the attention kernel


def _attention(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Run the kernel that `scaled_dot_product_attention` picks on `device`, not the meta device's.

    Both kernels save queries, keys, values, their output and one float32 per row and head for the
    backward, and never hold the (B, heads, L, L) scores. Each call makes a float mask.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(query.dtype)
    ops = torch.ops.aten
    out: Tensor
    if device == "cpu":
        out = ops._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
        return out
    if enable_gqa:  # flash attention's backward repeats keys and values for all query heads
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    grad = torch.is_grad_enabled()
    out = ops._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale
    )[0]
    return out


@contextlib.contextmanager
def _as_on(device: str, *, padded: bool) -> Iterator[None]:
    """Use the kernels of `device`, and attention masks as for batches with or without padding."""
    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, new: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, new))

        put(nn.functional, "scaled_dot_product_attention", functools.partial(_attention, device))
        # On the meta device nobody can tell whether a mask is all ones (transformers drops such a
        # mask) or which targets lie in a tile of the vocabulary, and there is no autocast.
        put(masking_utils, "fast_all", lambda _: not padded)
        put(fx_config, "meta_nonzero_assume_all_nonzero", True)
        put(torch, "is_autocast_enabled", lambda *_: False)
        if device != "cpu":
            put(scoring, "logprobs_and_entropy", logprobs.by_trl_kernels)
            # Triton folds a tile in place; the same steps in torch would count as copies.
            for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
                put(chunked_logprob, name, lambda *_, **__: None)
        yield


# --------------------------------------------------------------------------------------- phases


@dataclass(frozen=True)
class Batch:
    """Rows of one length: a prompt and a completion of this many tokens each.

    Attributes:
        kept: Whether passes start from trunk states that were kept from the rollout.
        rollout: Whether the stage has rollouts, so that fused_layers computes its adapters.
    """

    rows: int
    prompt: int
    completion: int
    kept: bool = False
    rollout: bool = False

    @property
    def tokens(self) -> int:
        """Tokens per row."""
        return self.prompt + self.completion


def count(backbone: Backbone, device: str, batch: Batch, phase: Phase) -> int:
    """Run a phase as on `device`; return the bytes at its peak beyond backbone and roles."""
    adapters = fused_layers.layers(backbone) if batch.rollout else contextlib.nullcontext()
    with adapters, _as_on(device, padded=batch.rows > 1), LiveBytes(tensors(backbone)) as live:
        with microbatch_splitting.in_one_block(trained(backbone) if device == "cpu" else ()):
            phase(backbone, batch)
    for model in (backbone.causal, *backbone.views.values()):
        model.zero_grad(set_to_none=True)
    return live.peak


def trained(backbone: Backbone) -> list[nn.Parameter]:
    """List the parameters that the current stage trains; none outside a stage."""
    return [p for role in sorted(backbone.trained_roles) for _, p in backbone.role_parameters(role)]


Phase = Callable[[Backbone, Batch], None]


@contextlib.contextmanager
def stage(backbone: Backbone, trained: tuple[str, ...], *, checkpointing: bool) -> Iterator[None]:
    """Prepare the backbone as for a stage that trains these roles."""
    if not trained:
        yield
        return
    with backbone.training(*trained):
        for view in backbone.views.values():
            view.train()
        if checkpointing:
            backbone.views["policy"].activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        if trained == ("policy",):
            add_fused_lm_head(backbone.causal, outputs=("log_probs", "entropy", "is_top1"))
        yield


def _ids(backbone: Backbone, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask, (B, L); with several rows, the first is padded by one token."""
    ids = torch.zeros((rows, tokens), dtype=torch.long, device=backbone.device)
    mask = torch.ones((rows, tokens), dtype=torch.long, device=backbone.device)
    if rows > 1:
        mask[0, 0] = 0
    return ids, mask


def _states(backbone: Backbone, batch: Batch) -> Tensor | None:
    """Return trunk states for a batch, (B, L, H), or None if its stage keeps none."""
    if not batch.kept:
        return None
    width = backbone.causal.config.get_text_config().hidden_size
    return torch.zeros(
        (batch.rows, batch.tokens, width), dtype=backbone.causal.dtype, device=backbone.device
    )


@torch.no_grad()
def prefill(backbone: Backbone, batch: Batch) -> None:
    """Sample the first token of each completion, all prompts in one pass."""
    ids, mask = _ids(backbone, batch.rows, batch.prompt)
    with backbone.role("policy"):
        _next(backbone, ids, mask, DynamicCache(config=backbone.causal.config))


@torch.no_grad()
def decode(backbone: Backbone, batch: Batch) -> None:
    """Sample the last token of each completion, with a full KV cache."""
    config, dtype = backbone.causal.config, backbone.causal.dtype
    cache = DynamicCache(config=config)
    ids, mask = _ids(backbone, batch.rows, batch.tokens)
    heads, width = kv_shape(config)
    shape = (batch.rows, heads, batch.tokens - 1, width)
    for index in range(len(backbone.layers)):
        full = torch.zeros(shape, dtype=dtype, device=backbone.device)
        cache.update(full, full.clone(), index)
        del full
    with backbone.role("policy"):
        _next(backbone, ids[:, -1:], mask, cache)


def kv_shape(config: Any) -> tuple[int, int]:
    """Return the number of key and value heads, and the dimension of a head."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(heads), int(width)


def _next(backbone: Backbone, ids: Tensor, mask: Tensor, cache: DynamicCache) -> None:
    """Take one step of the sampler: a forward with the cache, and a draw for each row."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    names = inspect.signature(type(backbone.causal).forward).parameters
    if "position_ids" in names:
        inputs["position_ids"] = position_ids(mask)[:, -ids.shape[1] :]
    inputs["cache" if "cache" in names else "past_key_values"] = cache
    out = backbone.causal(**inputs, use_cache=True, logits_to_keep=1)
    logits = out.logits[:, -1].float()
    del out
    sampler.draw(logits, 1.0, torch.zeros(len(ids), device=backbone.device))


@torch.no_grad()
def score(backbone: Backbone, batch: Batch) -> None:
    """Compute log-probs and values of a batch of episodes, without gradients."""
    ids, mask = _ids(backbone, batch.rows, batch.tokens)
    kept = _states(backbone, batch)
    with backbone.role("policy"):
        scoring.completion_logprobs(backbone, ids, mask, batch.completion, 1.0, kept)
    if backbone.has("value"):
        with backbone.role("value"):
            scoring.token_values(backbone, ids, mask, batch.completion, trunk_states=kept)


@torch.no_grad()
def rewards(backbone: Backbone, batch: Batch) -> None:
    """Score a batch of episodes with a reward role."""
    ids, mask = _ids(backbone, batch.rows, batch.tokens)
    with backbone.role("reward"):
        scoring.last_token_scores(backbone, ids, mask, "reward", _states(backbone, batch))


@torch.no_grad()
def trunk_pass(backbone: Backbone, batch: Batch) -> None:
    """Compute the trunk states of a batch of episodes."""
    ids, mask = _ids(backbone, batch.rows, batch.tokens)
    if trunk.depth(backbone):
        scoring.trunk_states(backbone, ids, mask)


def language_model(backbone: Backbone, batch: Batch) -> None:
    """Run forward and backward of SFT, through TRL's LM head on the policy's view."""
    ids, mask = _ids(backbone, batch.rows, batch.tokens)
    with backbone.role("policy"):
        backbone.views["policy"](
            input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True, use_cache=False
        ).loss.backward()


def ranking(backbone: Backbone, batch: Batch) -> None:
    """Run forward and backward of the reward model; rows are completions of any prompts."""
    ids, mask = _ids(backbone, batch.rows, batch.tokens)
    with backbone.role("reward"):
        out = backbone.views["reward"](input_ids=ids, attention_mask=mask, use_cache=False)
        out.logits.float().sum().backward()


def policy_step(
    backbone: Backbone, batch: Batch, before_backward: Callable[[], None] = lambda: None
) -> None:
    """Run forward and backward of the policy on a micro-batch."""
    ids, mask = _ids(backbone, batch.rows, batch.tokens)
    with backbone.role("policy"):
        logps, _ = scoring.completion_logprobs(
            backbone, ids, mask, batch.completion, 1.0, _states(backbone, batch)
        )
        before_backward()
        masked_sum(logps, mask[:, -batch.completion :]).backward()


def update(backbone: Backbone, batch: Batch) -> None:
    """Run a micro-batch of PPO: forward and backward of the policy, then of the value."""
    ids, mask = _ids(backbone, batch.rows, batch.tokens)

    @torch.no_grad()
    def score_reference() -> None:
        # In the first update FrozenRolesCheck does this between the policy's forward and backward.
        scoring.completion_logprobs(backbone, ids, mask, batch.completion, 1.0)

    policy_step(backbone, batch, score_reference)
    if backbone.has("value"):
        with backbone.role("value"):
            values = scoring.token_values(
                backbone, ids, mask, batch.completion, trunk_states=_states(backbone, batch)
            )
            masked_sum(values, mask[:, -batch.completion :]).backward()


def lm_head(backbone: Backbone, batch: Batch) -> None:
    """Run forward and backward of the LM head of `policy_step` alone."""
    config = backbone.causal.config.get_text_config()
    ids, _ = _ids(backbone, batch.rows, batch.completion)
    states = torch.zeros(
        (batch.rows, batch.completion, config.hidden_size),
        dtype=backbone.causal.dtype,
        device=backbone.device,
        requires_grad=True,
    )
    scoring.logprobs_of(backbone, states, ids, 1.0)[0].sum().backward()


@functools.cache
def twice(phase: Phase) -> Phase:
    """Run a phase twice: the second time, gradients of the first micro-batch are in memory."""

    def both(backbone: Backbone, batch: Batch) -> None:
        phase(backbone, batch)
        phase(backbone, batch)

    return both
