"""What a case of the compatibility table is, and the two kinds of model it is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.lm import lora_config, mixture_config, perturb, tiny_llama, token_ids

#: Adapters of a model with explicit weights, in the order of their weights.
LORAS = ("default", "second")


@dataclass(frozen=True)
class Kind:
    """A column of the table: how models of this kind are made and called."""

    title: str
    explicit: bool

    def config(self, **fields: Any) -> LoraConfig:
        """The config of one adapter."""
        return lora_config(**fields) if self.explicit else mixture_config(**fields)

    def model(self, base: nn.Module | None = None, *, seed: int = 1, **fields: Any) -> PeftModel:
        """One mixture, or two plain LoRA adapters, all tensors drawn anew."""
        model = get_peft_model(tiny_llama() if base is None else base, self.config(**fields))
        if self.explicit:
            model.add_adapter("second", self.config(**fields))
            model.base_model.set_adapter(list(LORAS))
        perturb(model, seed=seed)
        return model.eval()

    @property
    def adapters(self) -> list[str]:
        """The names of :meth:`model`'s adapters."""
        return list(LORAS) if self.explicit else ["default"]

    def arguments(
        self, experts: int = len(LORAS), rows: int = 2, length: int = 7
    ) -> dict[str, Any]:
        """Explicit weights of either sign per token; nothing for a mixture, which routes itself."""
        if not self.explicit:
            return {}
        generator = torch.Generator().manual_seed(3)
        weights = torch.randn(rows, length, experts, generator=generator, dtype=torch.float64)
        return {"routing_weights": weights}

    def logits(self, model: nn.Module, *, experts: int = len(LORAS), **arguments: Any) -> Tensor:
        """The model's logits, by the mixture's router or with explicit weights."""
        output: Tensor = model(token_ids(), **self.arguments(experts), **arguments).logits
        return output


MIXTURE = Kind("routed mixture (`MoELoraConfig`)", explicit=False)
EXPLICIT = Kind("explicit `routing_weights` over plain adapters", explicit=True)
KINDS = (MIXTURE, EXPLICIT)


@dataclass(frozen=True)
class Refusal:
    """What a refused case returns: the call, and the model it must leave alone."""

    call: Callable[[], Any]
    model: nn.Module | None = None


@dataclass(frozen=True)
class Case:
    """One cell: what works, or what is refused and why.

    Attributes:
        area: the section of the page.
        name: the row.
        kind: the column.
        covers: the methods it is about, as ``PeftModel.name`` or ``LoraModel.name``.
        note: what works, in a few words; for a refusal the first sentence of its message.
        error: the type of the refusal, None if it works.
        function: for what works, the test; for what is refused, it returns a :class:`Refusal`.
    """

    area: str
    name: str
    kind: Kind
    covers: tuple[str, ...]
    note: str
    error: type[Exception] | None
    function: Callable[[Kind, Path], Refusal | None]

    @property
    def id(self) -> str:
        """The name of the test."""
        return f"{self.name} - {'explicit' if self.kind.explicit else 'mixture'}"


@dataclass
class Area:
    """The cases of one section of the page, in order."""

    title: str
    cases: list[Case] = field(default_factory=list)

    def works(
        self, name: str, note: str, *, covers: tuple[str, ...] = (), kinds: tuple[Kind, ...] = KINDS
    ) -> Callable[[Callable[[Kind, Path], None]], Callable[[Kind, Path], None]]:
        """Register a test of something that works, for each of ``kinds``."""

        def register(function: Callable[[Kind, Path], None]) -> Callable[[Kind, Path], None]:
            for kind in kinds:
                self.cases.append(Case(self.title, name, kind, covers, note, None, function))
            return function

        return register

    def refuses(
        self,
        name: str,
        reason: str,
        *,
        error: type[Exception],
        covers: tuple[str, ...] = (),
        kinds: tuple[Kind, ...] = KINDS,
    ) -> Callable[[Callable[[Kind, Path], Refusal]], Callable[[Kind, Path], Refusal]]:
        """Register a call that is refused, for each of ``kinds``.

        ``reason`` is the first sentence of the message (or the part of it up to a value).
        """

        def register(function: Callable[[Kind, Path], Refusal]) -> Callable[[Kind, Path], Refusal]:
            for kind in kinds:
                self.cases.append(Case(self.title, name, kind, covers, reason, error, function))
            return function

        return register


def both(*names: str) -> tuple[str, ...]:
    """``names`` as methods of PeftModel and of LoraModel."""
    return tuple(f"{owner}.{name}" for name in names for owner in ("PeftModel", "LoraModel"))


def of_model(*names: str) -> tuple[str, ...]:
    """``names`` as methods of PeftModel."""
    return tuple(f"PeftModel.{name}" for name in names)


def of_tuner(*names: str) -> tuple[str, ...]:
    """``names`` as methods of LoraModel."""
    return tuple(f"LoraModel.{name}" for name in names)
