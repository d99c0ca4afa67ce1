# SPDX-License-Identifier: Apache-2.0
"""Roles as LoRA adapters with small heads on one frozen base model.

A *view* is a Hugging Face head class over the shared backbone, wrapped by PEFT. TRL's trainers
accept it, and a saved adapter loads without this package:

    policy, reference       AutoModelForCausalLM               adapters "default", "reference"
    reward, held_out        AutoModelForSequenceClassification  score head (no bias)
    reward_1 ... reward_15  the same; the other members of a reward ensemble
    value                   AutoModelForTokenClassification     per-token head with a bias

The policy's adapter is called "default" because TRL looks it up by that name.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_rlhf.runtime import optional_packages  # noqa: F401  # isort: skip
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_rlhf.errors import AdapterError

from . import sampler
from .base_model import BaseModel
from .fingerprints import fingerprint
from .memory import held_tensors, tensor_bytes
from .views import build_view, head_wrapper, to_head_dtype

MEMBERS = ("reward", *(f"reward_{i}" for i in range(1, 16)))
"""Roles of a reward ensemble, in order; a single reward model is the first."""

REWARDS = (*MEMBERS, "held_out")
"""Every role that scores."""

ADAPTERS = {"policy": "default", **{r: r for r in ("reference", "value", *REWARDS)}}
"""Role -> name of its adapter."""

_TASKS = {
    **dict.fromkeys(("policy", "reference"), TaskType.CAUSAL_LM),
    **dict.fromkeys(REWARDS, TaskType.SEQ_CLS),
    "value": TaskType.TOKEN_CLS,
}


@dataclass
class Backbone(BaseModel):
    """The base model, the views on it and the switch between roles.

    Attributes:
        views: Role -> PeftModel over the shared backbone.
        reward_offset: Reward role -> offset of its score, so that demonstrations average 0.
    """

    views: dict[str, PeftModel] = field(default_factory=dict)
    reward_offset: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.trained_roles: frozenset[str] = frozenset()
        self._bare_value: nn.Linear | None = None
        self._known: dict[str, list[Any]] = {}  # cached results of walks over all modules

    # ------------------------------------------------------------------ roles

    def has(self, role: str) -> bool:
        """Tell if `role` has been added."""
        return role in self.views

    def add_role(
        self, role: str, *, copy_from: str | None = None, stacked: int | None = None
    ) -> PeftModel:
        """Add a role's adapter (and head), fresh or as a copy of another role's; returns its view.

        A fresh LoRA is the identity (B = 0). A reward head is drawn with std 1/sqrt(d + 1)
        (2403.17031); a value head copied from a reward role has that role's offset as its bias.

        Args:
            copy_from: Role whose tensors are copied.
            stacked: Multiplies rank and alpha, so that the adapter can hold this many adapters
                side by side at the same scale. Default: as `copy_from`, else 1.
        """
        if role in self.views:
            raise ValueError(f"role {role!r} exists")
        adapter, task = ADAPTERS[role], _TASKS[role]
        partly = len(self.adapted_layers) < len(self.layers)
        stacked = stacked or (self.stacked(copy_from) if copy_from is not None else 1)
        config = LoraConfig(
            task_type=task,
            r=stacked * self.lora_section.r,
            lora_alpha=stacked * self.lora_section.alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=list(self.target_modules),
            layers_to_transform=self.adapted_layers if partly else None,
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in self.layers.modules()),
            base_model_name_or_path=self.model_section.hub_id or self.causal.name_or_path,
        )
        shared = [v for r, v in self.views.items() if _TASKS[r] is task is TaskType.CAUSAL_LM]
        if shared:
            view = shared[0]
            view.add_adapter(adapter, config)
        else:
            base = self.causal
            if task is not TaskType.CAUSAL_LM:
                base = build_view(self.causal, per_token=task is TaskType.TOKEN_CLS)
            with warnings.catch_warnings():
                # Sharing the layers between views is intended; PEFT takes it for a mistake.
                warnings.filterwarnings("ignore", message=".*modify a model with PEFT.*")
                # PEFT reads this attribute under its old name.
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
                view = get_peft_model(base, config, adapter_name=adapter)
        self.views[role] = view
        if task is not TaskType.CAUSAL_LM:
            head_wrapper(view).register_forward_pre_hook(to_head_dtype)
        if self.has("value") and self.has("policy"):
            # In the policy's module tree it is part of the optimizer, zero_grad and state_dict.
            self.views["policy"].add_module("value_head", self.head("value"))
        # PEFT has just changed requires_grad and the active adapters.
        self._reset()
        if copy_from is not None:
            self._copy(copy_from, role)
        return view

    def stacked(self, role: str) -> int:
        """Return the rank of a role's adapter, in multiples of the recipe's rank."""
        return int(self.views[role].peft_config[ADAPTERS[role]].r) // self.lora_section.r

    def head(self, role: str) -> nn.Linear:
        """Return the float32 linear head of a reward role or of the value model."""
        if role == "value" and self._bare_value is not None:
            return self._bare_value
        head: nn.Linear = head_wrapper(self.views[role]).modules_to_save[ADAPTERS[role]]
        return head

    def role_parameters(self, role: str) -> list[tuple[str, nn.Parameter]]:
        """List one role's parameters by the names that PEFT saves, without the adapter's name."""
        if role not in self._known:
            self._known[role] = self._find_parameters(role)
        return self._known[role]

    def _find_parameters(self, role: str) -> list[tuple[str, nn.Parameter]]:
        if role == "value" and self._bare_value is not None:
            return [(f"value_head.{n}", p) for n, p in self._bare_value.named_parameters()]
        adapter, parameters = ADAPTERS[role], []
        for name, parameter in self.views[role].named_parameters():
            parts = name.split(".")
            if parts[0] == "value_head":
                continue  # the value head, which is also in the policy's module tree
            if any(part.startswith("lora_") for part in parts) and parts[-2] == adapter:
                parameters.append((".".join([*parts[:-2], parts[-1]]), parameter))
            elif "modules_to_save" in parts and adapter in parts:
                at = parts.index("modules_to_save")
                parameters.append((".".join([*parts[:at], *parts[at + 2 :]]), parameter))
        return parameters

    @torch.no_grad()
    def _copy(self, source: str, target: str) -> None:
        """Copy LoRA tensors, and the head if both roles have one."""
        values = dict(self.role_parameters(source))
        for name, parameter in self.role_parameters(target):
            if name in values:
                parameter.copy_(values[name])
            elif "lora_" in name:
                raise AdapterError(f"{source} has no {name} to start {target} from")
        if TaskType.CAUSAL_LM not in (_TASKS[source], _TASKS[target]):
            # By role, not by name: GPT-2's heads are called "classifier" (token) and "score".
            self.head(target).weight.copy_(self.head(source).weight)
        if source in self.reward_offset:
            if target == "value":
                self.head(target).bias.fill_(self.reward_offset[source])
            else:
                self.reward_offset[target] = self.reward_offset[source]

    def add_value_head(self, copy_from: str | None) -> None:
        """Add a value model that is one linear head on the policy's states, without an adapter.

        It starts as the reward role's head and offset, or at 0, and belongs to the policy's view.
        """
        self._known.clear()
        hidden = self.causal.get_output_embeddings().weight.shape[1]
        head = nn.Linear(hidden, 1, device=self.device, dtype=torch.float32)
        with torch.no_grad():
            head.weight.zero_()
            head.bias.zero_()
            if copy_from is not None:
                head.weight.copy_(self.head(copy_from).weight)
                head.bias.fill_(self.reward_offset.get(copy_from, 0.0))
        self.views["policy"].add_module("value_head", head)
        self._bare_value = head

    def drop_value(self) -> None:
        """Remove the value model, be it an adapter or a linear head."""
        self._known.clear()
        if self._bare_value is not None:
            self._bare_value = None
            del self.views["policy"].value_head
        elif self.has("value"):
            self.drop_role("value")

    def copy_role(self, source: str, target: str) -> None:
        """Make `target` equal to `source`; adds it if it does not exist."""
        if self.has(target):
            self._copy(source, target)
        else:
            self.add_role(target, copy_from=source)

    def drop_role(self, role: str) -> None:
        """Remove a role's adapter and head, freeing their memory."""
        _delete_adapter(self.views.pop(role), ADAPTERS[role])
        if role == "value" and self.has("policy"):
            del self.views["policy"].value_head
        self.reward_offset.pop(role, None)
        self._reset()

    def _reset(self) -> None:
        """After a change of the adapters: deactivate all, and set requires_grad as declared."""
        self._known.clear()
        self.activate([])
        self.apply_trainable()

    # -------------------------------------------------------------- switching

    @contextlib.contextmanager
    def role(self, role: str | None) -> Iterator[None]:
        """Activate `role` inside the context; None is the base model without any adapter.

        Sets the layers' active adapter directly: PEFT's `set_adapter` would turn off the other
        adapters' gradients, and `disable_adapter` turns some back on (peft#3447). The previous
        adapter is restored on every exit.
        """
        before = [layer._active_adapter for layer in self._lora_layers()]
        self.activate([] if role is None else [ADAPTERS[role]])
        try:
            yield
        finally:
            for layer, active in zip(self._lora_layers(), before, strict=True):
                layer._active_adapter = active

    def _lora_layers(self) -> list[BaseTunerLayer]:
        if "" not in self._known:
            self._known[""] = [m for m in self.decoder.modules() if isinstance(m, BaseTunerLayer)]
        return self._known[""]

    def activate(self, names: list[str]) -> None:
        """Set the layers' active adapters without restoring them later; prefer `role`."""
        for layer in self._lora_layers():
            layer._active_adapter = list(names)

    @contextlib.contextmanager
    def weights(self, role: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Give a role other weights inside the context, by the names of `role_parameters`."""
        own = {name: p.detach().clone() for name, p in self.role_parameters(role)}
        try:
            self._set(role, tensors)
            yield
        finally:
            self._set(role, own)

    @torch.no_grad()
    def _set(self, role: str, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.role_parameters(role):
            parameter.copy_(tensors[name])

    # --------------------------------------------------------------- training

    @contextlib.contextmanager
    def training(self, *roles: str) -> Iterator[None]:
        """Train exactly these roles inside the context; the first one is active.

        Sets `requires_grad`, and afterwards undoes what trainers leave behind: patched forwards,
        gradient checkpointing, `use_cache` off, clones of the policy's adapter, training mode,
        gradients. The embedding's output never requires gradients.
        """
        forward = self.causal.__dict__.get("forward")
        config, use_cache = self.causal.config, getattr(self.causal.config, "use_cache", None)
        bases = [v.get_base_model() for v in {id(v): v for v in self.views.values()}.values()]
        for base in bases:
            # TRL, Trainer and each rollout would hook the embedding, and backward would then run
            # through the frozen layers below the adapters. Only reentrant checkpointing needs it.
            base.__dict__["enable_input_require_grads"] = lambda: None
        self.trained_roles = frozenset(roles)
        self.apply_trainable()
        try:
            with self.role(roles[0]):
                yield
        finally:
            self.trained_roles = frozenset()
            self.apply_trainable()
            self.causal.__dict__.pop("forward", None)
            if forward is not None:
                self.causal.__dict__["forward"] = forward
            if use_cache is not None:
                config.use_cache = use_cache
            for view in {id(v): v for v in self.views.values()}.values():
                view.get_base_model().activation_checkpointing_disable()
                view.zero_grad(set_to_none=True)
                view.eval()
                for foreign in view.peft_config.keys() - ADAPTERS.values():
                    _delete_adapter(view, foreign)  # TRL's clone of the policy, "ref"
            for base in bases:
                del base.__dict__["enable_input_require_grads"]

    @contextlib.contextmanager
    def float32_kept(self) -> Iterator[None]:
        """Restore the float32 adapters that a TRL trainer's `__init__` rounds to bf16 in 4-bit.

        Casting back would not suffice: rounding loses bits (a KL of 1.6e-3 before any step).
        """
        kept = [(p, p.data) for role in self.views for _, p in self.role_parameters(role)]
        try:
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data

    def apply_trainable(self) -> None:
        """Set `requires_grad` of all parameters as the stage declared it."""
        declared = self._declared()
        for parameter in self._all_parameters():
            parameter.requires_grad_(id(parameter) in declared)

    def _declared(self) -> dict[int, str]:
        """Return id -> role and name of every parameter that the stage trains."""
        return {
            id(parameter): f"{role}: {name}"
            for role in self.trained_roles
            for name, parameter in self.role_parameters(role)
        }

    def assert_trainable(self) -> None:
        """Check that `requires_grad` is exactly as the stage declared it.

        Raises:
            AdapterError: Naming the first parameter that is not.
        """
        declared = self._declared()
        for parameter in self._all_parameters():
            if parameter.requires_grad != (id(parameter) in declared):
                name = declared.get(id(parameter), "a parameter of no trained role")
                state = "is trainable" if parameter.requires_grad else "is frozen"
                raise AdapterError(
                    f"{name} {state}",
                    expected=f"trainable: {sorted(self.trained_roles)}",
                    remedy="this is a bug or a foreign call of set_adapter; please report it",
                )

    def _all_parameters(self) -> list[nn.Parameter]:
        seen: set[nn.Module] = set()  # each module once: the views share most of them
        modules = (m for v in (self.causal, *self.views.values()) for _, m in v.named_modules(seen))
        return list({id(p): p for m in modules for p in m.parameters(recurse=False)}.values())

    def state_hash(self, role: str | None) -> str:
        """Hash a role's tensors by sha256; None: a sample of the frozen backbone's tensors."""
        if role is None:
            return fingerprint(self.causal)
        digest = hashlib.sha256()
        for name, parameter in sorted(self.role_parameters(role)):
            digest.update(name.encode() + parameter.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def memory_report(self) -> dict[str, Any]:
        """Count the bytes of the shared backbone and the bytes that each role adds."""
        shared = {id(p): p for p in [*self.causal.parameters(), *self.causal.buffers()]}
        roles = {}
        for role in self.views:
            own = [p for _, p in self.role_parameters(role)]
            for parameter in own:
                shared.pop(id(parameter), None)
            if _TASKS[role] is not TaskType.CAUSAL_LM:
                # PEFT also keeps the original head.
                own += head_wrapper(self.views[role]).original_module.parameters()
            roles[role] = tensor_bytes([p.data for p in own])
        parts = self.shards.parts if self.shards is not None else []
        held = [t for p in shared.values() for t in held_tensors(p)]
        backbone = tensor_bytes([*held, *parts])
        return {"backbone": backbone, "roles": roles, "total": backbone + sum(roles.values())}

    def describe_lora(self) -> dict[str, Any]:
        """Describe the adapters' shape for the record."""
        return {
            **self.lora_section.model_dump(include={"r", "alpha", "top_fraction"}),
            "target_modules": self.target_modules,
            "adapted_layers": len(self.adapted_layers),
            "total_layers": len(self.layers),
            "parameters_per_role": {
                role: sum(p.numel() for _, p in self.role_parameters(role)) for role in self.views
            },
        }

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        role: str | None,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
    ) -> list[list[int]]:
        """Generate completions as `role` by `sampler.sample`; None is the base model."""
        with self.role(role):
            completions = sampler.sample(
                self,
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                batch_size=batch_size,
            )
        return [completion.ids for completion in completions]


def _delete_adapter(view: PeftModel, adapter: str) -> None:
    view.delete_adapter(adapter)
    if view.peft_config:
        # Another role uses this view; PEFT looks up the view's configuration by this name.
        view.active_adapter = view.base_model.active_adapter = next(iter(view.peft_config))
