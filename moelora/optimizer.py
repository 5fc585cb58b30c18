"""Optimisers of a model that grows: new parameters join, old ones keep their state."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from moelora import _peft

#: For a parameter that took over rows of others: those others, newest first, and which rows.
_origins: Any = WeakTensorKeyDictionary()
#: Parameters whose experts are gone.
_removed: Any = WeakTensorKeyDictionary()


def note_replaced(new: nn.Parameter, old: nn.Parameter, rows: Tensor) -> None:
    """Remember that ``new`` holds these rows of ``old``, until optimisers have learnt of it."""
    earlier = [(reference, taken[rows]) for reference, taken in _origins.get(old, [])]
    _origins[new] = [(TensorWeakRef(old), rows), *earlier]
    _removed[old] = True


def note_removed(parameters: Iterable[nn.Parameter]) -> None:
    """Remember that these parameters belong to no model any more."""
    for parameter in parameters:
        _removed[parameter] = True


def update_optimizer(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    select: Callable[[str], bool] | None = None,
    **options: Any,
) -> list[nn.Parameter]:
    """Let an optimiser follow a model whose experts came, went or were frozen.

    Trainable parameters that it does not know join the group of their like (the same tensor of
    another expert), so that its learning rate and decay, and a scheduler's, hold for them; state
    they get with their first step. Router rows that lie in another parameter now (a
    :class:`~moelora.Router` that was frozen in part, or shrunk) keep their state: each tensor of it
    is cut as the parameter was. Parameters of removed experts leave. All other parameters, and
    their state, are not touched. Groups whose parameters were in the model's order stay so, which
    is what a saved optimiser is read by.

    Call it after ``create_expert``, ``remove_expert``, ``freeze`` or ``add_router``, between two
    steps.

    Args:
        optimizer: any optimiser that keeps its state per parameter, in tensors of the parameter's
            shape or of one element: SGD, Adam, AdamW and their kin.
        model: the model, or any module, whose parameters it trains.
        select: by a parameter's name in ``model``, whether it is for this optimiser; None for all.
            Give it where several optimisers share a model.
        **options: hyperparameters of a new group for the new parameters, for instance ``lr``;
            without, they join a group that is there.

    Returns:
        The parameters that joined.

    Raises:
        TypeError: if ``optimizer`` is none of torch's, or keeps one state for all parameters.
        ValueError: if rows moved and the state of an optimiser cannot be cut. Nothing is changed
            then.

    Example:
        >>> import torch
        >>> from moelora import Router
        >>> router = Router(4, 2, track_maturity=True)
        >>> optimizer = torch.optim.AdamW(router.parameters())
        >>> router.expand()
        >>> [tuple(parameter.shape) for parameter in update_optimizer(optimizer, router)]
        [(1, 4)]
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch optimiser, got {type(optimizer).__name__}.")
    if isinstance(optimizer, LBFGS):
        raise TypeError("LBFGS keeps one history for all parameters and cannot follow a model.")
    named = [(n, p) for n, p in model.named_parameters() if select is None or select(n)]
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    ordered = [group for group in optimizer.param_groups if _is_ordered(group, named)]
    moved = {
        id(p): origin for _, p in named if id(p) not in known and (origin := _origin(p, known))
    }
    states = {key: _cut(optimizer, *origin) for key, origin in moved.items()}
    for group in optimizer.param_groups:
        _replace_in_group(optimizer, group, [(n, p) for n, p in named if id(p) in moved], moved)
    for _, parameter in named:
        if states.get(id(parameter)):
            optimizer.state[parameter] = states[id(parameter)]
    new = [(n, p) for n, p in named if p.requires_grad and id(p) not in known | moved.keys()]
    if new and options:
        _add_group(optimizer, new, options)
    elif new:
        _join_groups(optimizer, model, new)
    if isinstance(optimizer, Adagrad):
        _start_adagrad(optimizer, {id(parameter) for _, parameter in new})
    for group in ordered:
        _order(group, named)
    return [parameter for _, parameter in new]


def _origin(parameter: nn.Parameter, known: set[int]) -> tuple[nn.Parameter, Tensor] | None:
    """The parameter of an optimiser whose rows this one holds, over any number of moves."""
    for reference, rows in _origins.get(parameter, []):
        old = reference()
        if old is not None and id(old) in known:
            return old, rows
    return None


def _cut(optimizer: Optimizer, old: nn.Parameter, rows: Tensor) -> dict[str, Any]:
    """The state of some rows of a parameter."""
    state = {}
    for name, value in optimizer.state.get(old, {}).items():
        if not isinstance(value, Tensor):
            state[name] = value
        elif value.shape == old.shape and value.numel() > 1:
            state[name] = value[rows.to(value.device)].clone()
        elif value.numel() == 1:
            state[name] = value.clone()
        else:
            raise ValueError(
                f"The state {name!r} of {type(optimizer).__name__} has shape "
                f"{tuple(value.shape)} for a parameter of shape {tuple(old.shape)}, so it cannot "
                "be cut by rows. Make a new optimiser, or use SGD, Adam or AdamW."
            )
    return state


def _replace_in_group(
    optimizer: Optimizer,
    group: dict[str, Any],
    moved: list[tuple[str, nn.Parameter]],
    origins: dict[int, tuple[nn.Parameter, Tensor]],
) -> None:
    """Put parameters in the places of those they come from; let removed ones go."""
    successors: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in moved:
        successors.setdefault(id(origins[id(parameter)][0]), []).append((name, parameter))
    names = group.get("param_names") or [""] * len(group["params"])
    kept: list[tuple[str, nn.Parameter]] = []
    for name, parameter in zip(names, group["params"], strict=True):
        if id(parameter) in successors:
            kept += successors[id(parameter)]
        elif parameter not in _removed:
            kept.append((name, parameter))
            continue
        optimizer.state.pop(parameter, None)
    _set_group(group, kept)


def _is_ordered(group: dict[str, Any], named: list[tuple[str, nn.Parameter]]) -> bool:
    """Whether a group has the model's parameters in the model's order."""
    place = {id(p): number for number, (_, p) in enumerate(named)}
    places = [place[id(p)] for p in group["params"] if id(p) in place]
    return places == sorted(places)


def _order(group: dict[str, Any], named: list[tuple[str, nn.Parameter]]) -> None:
    """Bring a group's parameters into the model's order; others keep their places."""
    place = {id(p): number for number, (_, p) in enumerate(named)}
    names = group.get("param_names") or [""] * len(group["params"])
    members = list(zip(names, group["params"], strict=True))
    slots = [slot for slot, (_, p) in enumerate(members) if id(p) in place]
    own = sorted((members[slot] for slot in slots), key=lambda member: place[id(member[1])])
    for slot, member in zip(slots, own, strict=True):
        members[slot] = member
    _set_group(group, members)


def _set_group(group: dict[str, Any], members: list[tuple[str, nn.Parameter]]) -> None:
    group["params"] = [parameter for _, parameter in members]
    if "param_names" in group:
        group["param_names"] = [name for name, _ in members]


def _add_group(
    optimizer: Optimizer, new: list[tuple[str, nn.Parameter]], options: dict[str, Any]
) -> None:
    named = any("param_names" in group for group in optimizer.param_groups)
    group = {"params": new if named else [parameter for _, parameter in new], **options}
    optimizer.add_param_group(group)
    # what a scheduler takes a group's own rate from
    added = optimizer.param_groups[-1]
    added.setdefault("initial_lr", added["lr"])


def _join_groups(
    optimizer: Optimizer, model: nn.Module, new: list[tuple[str, nn.Parameter]]
) -> None:
    """Add each parameter to the group in which its likes are."""
    adapters = _adapter_names(model)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    like: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in group_of:
            for kind in _kinds(name, adapters):
                like.setdefault(kind, group_of[id(parameter)])
    for name, parameter in new:
        found = [like[kind] for kind in _kinds(name, adapters) if kind in like]
        group = found[0] if found else optimizer.param_groups[0]
        # a new list: the old one may be the caller's
        group["params"] = [*group["params"], parameter]
        if "param_names" in group:
            group["param_names"] = [*group["param_names"], name]


def _start_adagrad(optimizer: Adagrad, new: set[int]) -> None:
    """Give new parameters the state that Adagrad of torch 2.11 and older gives when it is made."""
    for group in optimizer.param_groups:
        told = {name: group[name] for name in ("initial_accumulator_value", "fused")}
        for parameter in group["params"]:
            if id(parameter) in new:
                optimizer.state[parameter] = Adagrad([parameter], **told).state[parameter]


def _adapter_names(model: nn.Module) -> set[str]:
    layers = (module for module in model.modules() if isinstance(module, _peft.LoraLayer))
    return {name for layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)}


def _kinds(name: str, adapters: set[str]) -> list[str]:
    """What a parameter is, from the very same place to the same kind of tensor anywhere."""
    parts = ["*" if part in adapters else part for part in name.split(".")]
    parts[-1] = re.sub(r"_\d+$", "", parts[-1])
    start = next((i for i, part in enumerate(parts) if part.startswith("lora_")), len(parts) - 1)
    return [".".join(parts), ".".join(parts[start:])]
