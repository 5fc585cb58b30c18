"""Parameter groups: routers, experts' A and B, and the rest, each with its own rate and decay."""

import inspect
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import nn

from moelora import _peft
from moelora.attached import get_router
from moelora.config import is_number
from moelora.errors import ConfigError

Number: TypeAlias = float | int


def param_groups(
    model: nn.Module,
    *,
    lr: Number,
    router_lr: Number | None = None,
    weight_decay: Number = 0.0,
    router_weight_decay: Number | None = None,
    loraplus_lr_ratio: Number | None = None,
) -> list[dict[str, Any]]:
    """Every trainable parameter of ``model`` once, in groups for an optimiser.

    Groups are named ``experts_a``, ``experts_b``, ``routers`` and ``other`` (modules to save,
    magnitudes, biases of the base), with ``_no_decay`` appended for vectors, which are never
    decayed; empty groups are left out.

    Source: LoRA+ (arXiv:2402.12354), section 4: B learns ``ratio`` times as fast as A. Adapted
    embeddings have no such A and B and take ``lr``, where PEFT's ``create_loraplus_optimizer`` asks
    for a rate of their own.

    Args:
        model: a PEFT model, or any module that holds adapted layers.
        lr: learning rate of the experts' A and of everything that has none of its own, > 0.
        router_lr: learning rate of all routers, attached ones too; ``lr`` by default.
        weight_decay: decay of all matrices, >= 0.
        router_weight_decay: decay of the routers' matrices; ``weight_decay`` by default.
        loraplus_lr_ratio: learning rate of B as a multiple of ``lr``, > 0; 1 by default.

    Raises:
        ConfigError: a ``ValueError``, if a number is out of range, nothing is trainable, or a
            router's or B's own rate is given where there is no such trainable parameter.

    Example:
        >>> from moelora import MoELoraConfig
        >>> from moelora._peft import get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 8))
        >>> model = get_peft_model(base, MoELoraConfig(r=2, target_modules=["0"]))
        >>> groups = param_groups(model, lr=1e-4, router_lr=1e-3, loraplus_lr_ratio=16)
        >>> {group["name"]: group["lr"] for group in groups}
        {'experts_a': 0.0001, 'experts_b': 0.0016, 'routers': 0.001}
    """
    _check_numbers(
        above_zero={"lr": lr, "router_lr": router_lr, "loraplus_lr_ratio": loraplus_lr_ratio},
        not_negative={"weight_decay": weight_decay, "router_weight_decay": router_weight_decay},
    )
    rates = {
        "experts_a": lr,
        "experts_b": lr if loraplus_lr_ratio is None else lr * loraplus_lr_ratio,
        "routers": lr if router_lr is None else router_lr,
        "other": lr,
    }
    decays = dict.fromkeys(rates, weight_decay)
    if router_weight_decay is not None:
        decays["routers"] = router_weight_decay
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    kinds = _kinds(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = kinds.get(id(parameter), "other")
            members.setdefault((kind, parameter.ndim > 1), []).append(parameter)
    found = {kind for kind, _ in members}
    if not found:
        raise ConfigError("The model has no trainable parameter to optimise.")
    given = {"router_lr": router_lr, "router_weight_decay": router_weight_decay}
    _check_used(given, "routers", found)
    _check_used({"loraplus_lr_ratio": loraplus_lr_ratio}, "experts_b", found)
    return [
        {
            "name": kind if decayed else f"{kind}_no_decay",
            "params": members[kind, decayed],
            "lr": rates[kind],
            "weight_decay": decays[kind] if decayed else 0.0,
        }
        for kind in rates
        for decayed in (True, False)
        if (kind, decayed) in members
    ]


class MoEOptimizer:
    """Makes an optimiser over :func:`param_groups` for ``Trainer(optimizer_cls_and_kwargs=...)``.

    The Trainer calls it with the model that it has wrapped (FSDP, DeepSpeed), so the groups hold
    the parameters that are trained. TRL's SFTTrainer takes it too; its other trainers take
    ``optimizers=(AdamW(param_groups(model, ...)), None)``.

    Example:
        >>> kwargs = {"lr": 2e-4, "router_lr": 1e-3, "loraplus_lr_ratio": 16}
        >>> optimizer_cls_and_kwargs = (MoEOptimizer, kwargs)
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: Number,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        **kwargs: Any,
    ) -> torch.optim.Optimizer:
        """Make the optimiser.

        Args:
            model: the model whose trainable parameters are optimised.
            lr: see :func:`param_groups`.
            optimizer_class: any optimiser that takes parameter groups.
            **kwargs: other arguments of :func:`param_groups`; the rest goes to the optimiser.

        Raises:
            ConfigError: see :func:`param_groups`.
        """
        names = inspect.signature(param_groups).parameters.keys() & kwargs.keys()
        groups = param_groups(model, lr=lr, **{name: kwargs.pop(name) for name in names})
        make: Any = optimizer_class
        optimizer: torch.optim.Optimizer = make(groups, lr=lr, **kwargs)
        return optimizer


def _kinds(model: nn.Module) -> dict[int, str]:
    """The group of each parameter of an adapter or attached router, by identity."""
    kinds = {id(p): kind for kind, module in _parts(model) for p in module.parameters()}
    for module in model.modules():
        # an attached router lies in the LoraModel, which may itself be wrapped
        if isinstance(module, _peft.LoraModel) and (router := get_router(module)) is not None:
            kinds.update({id(parameter): "routers" for parameter in router.parameters()})
    return kinds


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for module in model.modules():
        if not isinstance(module, _peft.LoraLayer):
            continue
        for kind, name in (
            ("experts_a", "lora_A"),
            ("experts_a", "lora_embedding_A"),
            ("experts_a", "lora_embedding_B"),
            ("experts_b", "lora_B"),
            ("routers", "lora_router"),
        ):
            part = module._modules.get(name)
            if part is not None:
                yield kind, part


def _check_numbers(
    *, above_zero: dict[str, Number | None], not_negative: dict[str, Number | None]
) -> None:
    for allowed, values in (("> 0", above_zero), (">= 0", not_negative)):
        for name, value in values.items():
            if value is None and name != "lr":
                continue
            fine = is_number(value) and value is not None and value >= 0
            if not fine or (value == 0 and allowed == "> 0"):
                raise ConfigError(f"{name} must be a finite number {allowed}, got {value!r}.")


def _check_used(given: dict[str, Number | None], kind: str, found: set[str]) -> None:
    """A rate that no parameter would take is a mistake, not a wish."""
    unused = [name for name, value in given.items() if value is not None]
    if unused and kind not in found:
        raise ConfigError(
            f"{' and '.join(unused)} given, but the model has no trainable parameter of "
            f"{kind!r}. Leave it out, or check which adapters are active and trainable."
        )
