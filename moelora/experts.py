"""``ExpertManager``: experts that come one by one, each an adapter of its own."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moelora import _peft
from moelora.adapter_folder import ROUTER_KEY
from moelora.attached import attach_router, get_router
from moelora.binding import base_of, bind
from moelora.config import MoELoraConfig, is_int
from moelora.errors import ConfigError, UnsupportedLayerError
from moelora.expert_config import check_model, expert_config, experts_in, routing_fields
from moelora.expert_io import (
    converted,
    export_adapter,
    load_experts,
    read_source,
    save_experts,
    set_tensors,
)
from moelora.expert_names import check_new_name, rename_adapter
from moelora.expert_record import ExpertRecord, changed
from moelora.expert_set import ExpertId, ExpertSet
from moelora.frozen import (
    adapter_parameters,
    freeze_adapters,
    frozen_adapters,
    unfreeze_adapters,
)
from moelora.mixture import mark_mature
from moelora.optimizer import note_removed
from moelora.places import hidden_size_of
from moelora.rollback import unchanged_on_error
from moelora.router import Router


class ExpertManager(ExpertSet):
    """Experts over one frozen model, each a PEFT LoRA adapter that can come, grow up and go.

    An expert's id is its position in the routing order: the order in which experts were made, which
    is the order of the columns of ``routing_weights``. Removing one moves the later ones up. An
    adapter of several experts (a mixture, ``MoELoraConfig(num_experts=4)``) has one id too: its
    experts are activated, frozen, renamed and removed together, and have one column each.

    What the manager knows lies in the model (which adapters there are, which are frozen, mature),
    so that a second manager over the same model, or one over a copy of it, knows the same.

    Not managed, and refused: options that change the base model or cannot be shared by several
    active adapters (``modules_to_save``, ``bias``, ``trainable_token_indices``,
    ``layer_replication``, ``kasa_config``, PiSSA-like initialisations), tuners other than LoRA,
    ``PeftMixedModel``, and adapters injected by ``transformers`` itself.

    Args:
        model: a transformers model, any module, or a PEFT model, whose LoRA adapters become
            experts in their order. It is frozen, as PEFT does, when the first expert is made.
        r: rank of new experts, unless told otherwise.
        lora_alpha: their alpha.
        lora_dropout: their dropout.
        target_modules: the layers they adapt; None for PEFT's choice for the architecture.
        routing: None for plain LoRA experts, weighted by ``routing_weights=`` or by an attached
            router (:meth:`add_router`). A config whose routing fields all experts get, for experts
            that each bring router rows into the layers they adapt and are routed in one pass.
        **lora_fields: other fields of ``LoraConfig`` for all experts, for instance ``task_type``.

    Raises:
        ConfigError: if a field is wrong or cannot differ between experts.
        UnsupportedLayerError: if the model's adapters cannot be managed.

    Example:
        >>> base = nn.Sequential(nn.Linear(4, 4))
        >>> experts = ExpertManager(base, r=2, target_modules=["0"])
        >>> experts.create_expert("sql"), experts.create_expert("french", r=8)
        (0, 1)
        >>> experts.activate_all_experts()
        ['sql', 'french']
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        r: int = 8,
        lora_alpha: int | float = 16,
        lora_dropout: float = 0.0,
        target_modules: list[str] | str | None = None,
        routing: MoELoraConfig | None = None,
        **lora_fields: Any,
    ) -> None:
        check_model(model)
        super().__init__(model)
        self.routing = routing_fields(routing)
        self.defaults: dict[str, Any] = {
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "target_modules": target_modules,
            **lora_fields,
        }
        # a wrong default is told now, not when the first expert is made
        self._config({})

    # Making and removing ---------------------------------------------------------------------

    def create_expert(
        self,
        name: str | None = None,
        *,
        r: int | None = None,
        lora_alpha: int | float | None = None,
        lora_dropout: float | None = None,
        target_modules: list[str] | str | None = None,
        skill: str | None = None,
        **lora_fields: Any,
    ) -> int:
        """Make a new expert, at the end of the routing order.

        The tensors of all others stay as they are. If all experts were active so far, the new one
        is too; otherwise what is active stays. An attached :class:`~moelora.Router` gets a row for
        it, which starts immature. Optimisers learn of the new parameters by
        :func:`~moelora.update_optimizer`.

        Args:
            name: a folder name; ``expert_<n>`` if None.
            r: rank, like the next ones: the manager's if None.
            lora_alpha: alpha.
            lora_dropout: dropout.
            target_modules: the layers it adapts.
            skill: what it is for, kept in its record.
            **lora_fields: other fields of its ``LoraConfig``.

        Returns:
            The new expert's id.

        Raises:
            ConfigError: if the name is taken or the config is wrong. Nothing is changed then.
        """
        given = {
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "target_modules": target_modules,
        }
        config = self._config({k: v for k, v in given.items() if v is not None} | lora_fields)
        record = ExpertRecord(skill=skill)
        name = self._free_name() if name is None else name
        check_new_name(base_of(self.model), self.get_all_adapter_names(), name)
        return self._add(name, config, record)

    def _add(
        self,
        name: str,
        config: Any,
        record: ExpertRecord,
        tensors: dict[str, Tensor] | None = None,
    ) -> int:
        """Add an adapter, keeping what is active and what is trained."""
        if not self._has_adapters:
            with unchanged_on_error(self.model):
                model = _peft.get_peft_model(self.model, config, adapter_name=name)
                set_tensors(model, name, tensors)
            self.model = model
        else:
            active = self.active_experts
            with self._flags_kept(), unchanged_on_error(self.model):
                self.model.add_adapter(name, config)
                set_tensors(self.model, name, tensors)
            self._grow_router(experts_in(config))
            if active == self.get_all_adapter_names()[:-1]:
                self.activate_all_experts()
        self._records()[name] = record
        if self._tracks_maturity(name) and not any(ROUTER_KEY in key for key in tensors or ()):
            mark_mature(self._tuner.model, name, mature=False)
        bind(self._tuner.model, self._tuner.peft_config)
        return len(self) - 1

    def _free_name(self) -> str:
        taken = self.get_all_adapter_names()
        number = len(taken)
        while f"expert_{number}" in taken:
            number += 1
        return f"expert_{number}"

    def remove_expert(self, expert: ExpertId) -> None:
        """Remove an expert and its router rows; later ones move up by one.

        If it was the only active one, all others become active.

        Raises:
            ConfigError: if there is no such expert, or no other one.
        """
        name = self.name_of(expert)
        if len(self) == 1:
            raise ConfigError(
                f"{name!r} is the only expert and cannot be removed: a PEFT model needs an adapter "
                "(model.unload() returns the base model)."
            )
        router = get_router(self.model)
        if isinstance(router, Router):
            # first, since it may refuse
            router.shrink(self._rows_of([name], router))
        remaining = [n for n in self.active_experts if n != name]
        if not remaining:
            remaining = [n for n in self.get_all_adapter_names() if n != name]
        self._activate(remaining)
        gone = [p for layer in self._layers() for p in adapter_parameters(layer, [name])]
        with self._flags_kept():
            self.model.delete_adapter(name)
        note_removed(gone)
        self._activate(remaining)

    def rename_expert(self, expert: ExpertId, name: str) -> None:
        """Give an expert another name; its tensors, place and record stay.

        Raises:
            ConfigError: if there is no such expert, or the name cannot be given.
        """
        old = self.name_of(expert)
        if name == old:
            return
        check_new_name(base_of(self.model), self.get_all_adapter_names(), name)
        record = self._records()[old]
        rename_adapter(self._tuner, old, name)
        self.model.active_adapter = self.active_experts[0]
        self._records()[name] = record

    # Which are active ------------------------------------------------------------------------

    def activate_all_experts(self) -> list[str]:
        """Let all experts take part; those that are not frozen can be trained.

        Returns:
            Their names in routing order: the order of the columns of ``routing_weights``.

        Raises:
            ConfigError: if there are no experts.
        """
        names = self.get_all_adapter_names()
        if not names:
            raise ConfigError("There are no experts yet. Make one with create_expert().")
        self._activate(names)
        return names

    def set_active_expert(self, expert: ExpertId) -> None:
        """Let one expert work alone, unrouted: every token gets it with weight 1.

        In training only it learns, unless it is frozen.

        Raises:
            ConfigError: if there is no such expert.
        """
        self._activate([self.name_of(expert)])

    def _activate(self, names: list[str]) -> None:
        if self.active_experts != names:
            self._tuner.set_adapter(names)
            self.model.active_adapter = names[0]
        for name in names:
            # loaded for inference only; PEFT forgets it when it activates
            if self._configs()[name].inference_mode:
                self._tuner.set_requires_grad(name, requires_grad=False)

    # Frozen, mature --------------------------------------------------------------------------

    def freeze(self, experts: "ExpertId | Iterable[ExpertId] | None" = None) -> None:
        """Freeze experts and their router rows: no later training step changes a bit of them.

        They stay frozen whichever experts are activated, by PEFT's methods too. They take part in
        forward passes as before. A hidden layer of an attached router is frozen with the first row
        that reads it.

        Args:
            experts: ids or names, one or several; None for all.

        Raises:
            ConfigError: if there is no such expert.
            UnsupportedLayerError: if an attached router that is no :class:`~moelora.Router` could
                still change what these experts are given. Nothing is changed then.
        """
        names = self._names(experts)
        router = get_router(self.model) if names else None
        trained = router is not None and any(p.requires_grad for p in router.parameters())
        if trained and not isinstance(router, Router):
            raise UnsupportedLayerError(
                f"The rows of the attached {type(router).__name__} cannot be frozen one by one. "
                "Use moelora.Router, or freeze that router as a whole first."
            )
        freeze_adapters(base_of(self.model), names)
        if isinstance(router, Router):
            router.freeze(self._rows_of(names, router))

    def unfreeze(self, experts: "ExpertId | Iterable[ExpertId] | None" = None) -> None:
        """Let experts and their router rows be trained again.

        Args:
            experts: ids or names, one or several; None for all.

        Raises:
            ConfigError: if there is no such expert.
        """
        names = self._names(experts)
        for name in names:
            self._configs()[name].inference_mode = False
        unfreeze_adapters(base_of(self.model), names)
        router = get_router(self.model) if names else None
        if isinstance(router, Router):
            router.unfreeze(self._rows_of(names, router))

    def is_frozen(self, expert: ExpertId) -> bool:
        """Whether an expert is frozen.

        Raises:
            ConfigError: if there is no such expert.
        """
        return self.name_of(expert) in frozen_adapters(base_of(self.model))

    def mark_mature(
        self, experts: "ExpertId | Iterable[ExpertId] | None" = None, *, mature: bool = True
    ) -> None:
        """Mark experts as mature (or young again).

        While one active expert is immature all share every token; once all are mature, tokens are
        routed to their top k. That holds where routers keep maturity: a :class:`~moelora.Router`
        with ``track_maturity``, or ``router_type="learned_with_maturity"``. Without, the mark is
        kept in the record.

        Args:
            experts: ids or names, one or several; None for all.
            mature: False to make them young.

        Raises:
            ConfigError: if there is no such expert.
        """
        names = self._names(experts)
        router = get_router(self.model) if names else None
        records = self._records() if names else {}
        for name in names:
            if self._tracks_maturity(name):
                mark_mature(self._tuner.model, name, mature=mature)
            if isinstance(router, Router) and router.mature is not None:
                router.mark_mature(self._rows_of([name], router), mature=mature)
            records[name] = changed(records[name], mature=mature)

    def is_mature(self, expert: ExpertId) -> bool:
        """Whether an expert is mature; a mixture is if all its experts are.

        Raises:
            ConfigError: if there is no such expert.
        """
        name = self.name_of(expert)
        router = get_router(self.model)
        if isinstance(router, Router) and router.mature is not None:
            return all(router.is_mature(row) for row in self._rows_of([name], router))
        for layer in self._layers():
            routers = layer._modules.get("lora_router", {})
            if name in routers and routers[name].mature is not None:
                return bool(routers[name].mature.all())
        return self._records()[name].mature

    @property
    def all_mature(self) -> bool:
        """Whether all experts are mature, so that routing is sparse."""
        return all(self.is_mature(name) for name in self.get_all_adapter_names())

    # Records ---------------------------------------------------------------------------------

    def record(self, expert: ExpertId) -> ExpertRecord:
        """What is known of an expert: skill, steps, tokens, date, maturity, frozen or not.

        Raises:
            ConfigError: if there is no such expert.
        """
        name = self.name_of(expert)
        record = self._records()[name]
        return changed(record, mature=self.is_mature(name), frozen=self.is_frozen(name))

    def update_record(
        self, expert: ExpertId, *, add_steps: int = 0, add_tokens: int = 0, **changes: Any
    ) -> ExpertRecord:
        """Change an expert's record.

        Args:
            expert: id or name.
            add_steps: optimiser steps it was trained for since.
            add_tokens: tokens it has seen since.
            **changes: new values of ``skill``, ``steps``, ``tokens_seen``, ``created``, ``extra``.

        Returns:
            The new record.

        Raises:
            ConfigError: if there is no such expert or field, or for a wrong value.
        """
        for field in ("mature", "frozen"):
            if field in changes:
                raise ConfigError(f"{field} is set by mark_mature(), freeze() and unfreeze().")
        for name, value in (("add_steps", add_steps), ("add_tokens", add_tokens)):
            if not is_int(value):
                raise ConfigError(f"{name} must be an integer, got {value!r}.")
        record = changed(self._records()[self.name_of(expert)], **changes)
        record = changed(
            record, steps=record.steps + add_steps, tokens_seen=record.tokens_seen + add_tokens
        )
        self._records()[self.name_of(expert)] = record
        return self.record(expert)

    # A router over all of them ---------------------------------------------------------------

    def add_router(
        self,
        *,
        top_k: int = 2,
        temperature: float = 2.0,
        hidden_size: int | None = None,
        input_size: int | None = None,
        moe_config: MoELoraConfig | None = None,
    ) -> Router:
        """Attach a :class:`~moelora.Router` over all experts, which grows with them.

        Experts that are there start mature as their records say; later ones start immature.

        Args:
            top_k: experts per token once all are mature; more than there are count as all.
            temperature: divides the logits.
            hidden_size: width of a hidden layer, or None.
            input_size: width of the hidden states; None for the model's ``config.hidden_size``.
            moe_config: routes every forward automatically (a first pass gives the hidden states);
                None to ask ``model.get_routing_weights(hidden_states)`` and pass the weights.

        Returns:
            The router, a submodule of the model.

        Raises:
            ConfigError: if there are no experts, or a value is wrong.
            UnsupportedLayerError: if ``input_size`` is needed, or experts bring their own rows.
        """
        if not self._has_adapters:
            raise ConfigError("There are no experts yet. Make one with create_expert().")
        routed = [n for n, c in self._configs().items() if getattr(c, "has_router", False)]
        if routed and moe_config is not None:
            raise UnsupportedLayerError(
                f"Experts {routed} bring router rows of their own, which an automatic router over "
                "all experts would overrule. Make the manager with routing=None."
            )
        mature = [self._records()[name].mature for name in self.get_all_adapter_names()]
        router = Router(
            hidden_size_of(base_of(self.model)) if input_size is None else input_size,
            self.num_experts,
            top_k=top_k,
            temperature=temperature,
            hidden_size=hidden_size,
            track_maturity=True,
            growing=True,
        )
        for name, is_mature in zip(self.get_all_adapter_names(), mature, strict=True):
            router.mark_mature(self.columns_of(name), mature=is_mature)
        frozen = [name for name in self.get_all_adapter_names() if self.is_frozen(name)]
        router.freeze([column for name in frozen for column in self.columns_of(name)])
        attach_router(self.model, router, moe_config)
        return router

    def _grow_router(self, number: int) -> None:
        router = get_router(self.model)
        if isinstance(router, Router):
            missing = self.num_experts - router.num_experts
            if 0 < missing <= number:
                router.expand(missing)

    # To and from disk ------------------------------------------------------------------------

    def save(self, folder: "str | os.PathLike[str]") -> None:
        """Save all experts: PEFT's own folders, ``router.safetensors`` and ``experts.json``.

        Each expert's folder is an adapter that ``PeftModel.from_pretrained`` loads.

        Raises:
            ConfigError: if there are no experts.
            CheckpointError: if something else is in the way.
        """
        save_experts(self, Path(folder))

    @classmethod
    def load(
        cls,
        model: nn.Module,
        folder: "str | os.PathLike[str]",
        *,
        is_trainable: bool = False,
        **defaults: Any,
    ) -> "ExpertManager":
        """Load what :meth:`save` wrote over a base model; all experts are active then.

        Folders without ``experts.json`` (``PeftModel.save_pretrained``, Trainer checkpoints) load
        too, in the order that an attached router's file says, else the root's adapter first and
        then the folders by name, numbers counting as numbers.

        Args:
            model: a base model without adapters. A failed load leaves it as it was.
            folder: a folder or a hub id.
            is_trainable: whether the experts shall be trained further; frozen ones stay frozen.
            **defaults: as for the manager; else new experts are made like the first one.

        Raises:
            CheckpointError: if files are missing, damaged or contradict each other.
        """
        manager: ExpertManager = load_experts(
            cls, model, folder, is_trainable=is_trainable, defaults=defaults
        )
        return manager

    def export_expert(self, expert: ExpertId, folder: "str | os.PathLike[str]") -> Path:
        """Write one expert as a plain LoRA adapter, which PEFT loads without moelora.

        Of a mixture, :func:`moelora.export_expert` writes any single expert.

        Returns:
            The folder.

        Raises:
            ConfigError: if there is no such expert.
            CheckpointError: if the folder is not empty or cannot be written.
            UnsupportedLayerError: for a mixture, which is no plain LoRA.
        """
        return export_adapter(self, self.name_of(expert), folder)

    def import_expert(
        self,
        source: "str | os.PathLike[str] | nn.Module | ExpertManager",
        name: str | None = None,
        *,
        adapter: ExpertId | None = None,
        skill: str | None = None,
    ) -> int:
        """Take an expert from elsewhere, at the end of the routing order.

        A plain LoRA becomes an expert of this manager's kind: with ``routing`` it gets fresh router
        rows. A routed expert loses its rows where experts are plain.

        Args:
            source: an adapter's folder or hub id, a PEFT model, or another manager. Only
                safetensors are read.
            name: its name here; the adapter's or folder's if None.
            adapter: which adapter of the source; in a folder or on the hub, a subfolder. Not needed
                where there is one.
            skill: what it is for; the source's record says so too if None.

        Returns:
            The new expert's id.

        Raises:
            CheckpointError: if files are missing, damaged or do not fit this model.
            ConfigError: if the source has no such adapter, or its config or name cannot be used.
                Nothing is changed in any of these cases.
        """
        found = read_source(source, adapter)
        config, tensors = converted(found, self.routing)
        record = found.record if skill is None else changed(found.record, skill=skill)
        if not any(ROUTER_KEY in key for key in tensors):
            # the rows that it gets here have learnt nothing
            record = changed(record, mature=False)
        name = found.name if name is None else name
        check_new_name(base_of(self.model), self.get_all_adapter_names(), name)
        return self._add(name, config, record, tensors)

    def _config(self, changes: dict[str, Any]) -> Any:
        return expert_config({**self.defaults, **changes}, self.routing)
