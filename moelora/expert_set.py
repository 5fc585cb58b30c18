"""The experts of a model: their names, ids and columns, read from the model itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

from moelora import _peft
from moelora.attached import tuner_of
from moelora.config import is_int
from moelora.errors import ConfigError
from moelora.expert_config import experts_in
from moelora.expert_record import ExpertRecord, records_of
from moelora.router import Router

#: An expert's position in the routing order, or its name.
ExpertId: TypeAlias = int | str


class ExpertSet:
    """The adapters of a model as experts, in routing order.

    Args:
        model: a PEFT model with LoRA adapters, or a base model without any.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def __len__(self) -> int:
        """The number of adapters; ids are below it."""
        return len(self.get_all_adapter_names())

    def __repr__(self) -> str:
        """Name the experts."""
        return f"ExpertManager({self.get_all_adapter_names()})"

    @property
    def num_experts(self) -> int:
        """The number of columns of ``routing_weights`` when all are active."""
        return sum(experts_in(config) for config in self._configs().values())

    def get_all_adapter_names(self) -> list[str]:
        """The names of all experts, in routing order."""
        return list(self._configs())

    def id_of(self, expert: ExpertId) -> int:
        """The position of an expert given by position or name.

        Raises:
            ConfigError: if there is no such expert.
        """
        names = self.get_all_adapter_names()
        if isinstance(expert, str) and expert in names:
            return names.index(expert)
        if is_int(expert) and 0 <= expert < len(names):  # type: ignore[operator]
            return expert  # type: ignore[return-value]
        raise ConfigError(
            f"An expert is one of {names} or an id in [0, {len(names)}), got {expert!r}."
        )

    def name_of(self, expert: ExpertId) -> str:
        """The name of an expert given by position or name.

        Raises:
            ConfigError: if there is no such expert.
        """
        return self.get_all_adapter_names()[self.id_of(expert)]

    def columns_of(self, expert: ExpertId) -> range:
        """The columns of ``routing_weights``, with all active, that belong to an expert.

        Raises:
            ConfigError: if there is no such expert.
        """
        name = self.name_of(expert)
        start = 0
        for other, config in self._configs().items():
            if other == name:
                break
            start += experts_in(config)
        return range(start, start + experts_in(self._configs()[name]))

    @property
    def active_experts(self) -> list[str]:
        """The names of the active experts, in the order of their routing weights."""
        return list(self._tuner.active_adapters) if self._has_adapters else []

    @property
    def current_expert_id(self) -> int | None:
        """The id of the one active expert; None if several are active."""
        active = self.active_experts
        return self.id_of(active[0]) if len(active) == 1 else None

    @property
    def _has_adapters(self) -> bool:
        return isinstance(self.model, _peft.PeftModel)

    @property
    def _tuner(self) -> Any:
        return tuner_of(self.model)

    def _configs(self) -> dict[str, Any]:
        configs: dict[str, Any] = self._tuner.peft_config if self._has_adapters else {}
        return configs

    def _records(self) -> dict[str, ExpertRecord]:
        return records_of(self._tuner)

    def _layers(self) -> Iterator[Any]:
        return (m for m in self._tuner.model.modules() if isinstance(m, _peft.LoraLayer))

    def _names(self, experts: Any) -> list[str]:
        if experts is None:
            return self.get_all_adapter_names()
        if isinstance(experts, str) or is_int(experts):
            return [self.name_of(experts)]
        return [self.name_of(expert) for expert in experts]

    def _rows_of(self, names: list[str], router: Router) -> list[int]:
        """An attached router's rows for these experts; it may have been made for fewer or more."""
        rows = [column for name in names for column in self.columns_of(name)]
        return [row for row in rows if row < router.num_experts]

    def _tracks_maturity(self, name: str) -> bool:
        config = self._configs()[name]
        return getattr(config, "has_router", False) and config.router_type.endswith("maturity")

    @contextmanager
    def _flags_kept(self) -> Iterator[None]:
        """Keep what is trainable: PEFT makes all active adapters so when it adds or removes one."""
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        yield
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
