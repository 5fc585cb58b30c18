"""Model outputs that also hold ``aux_loss``.

transformers' outputs are dataclasses that refuse unknown fields when they are rebuilt (by DDP, by
``gather``), so a field is added by a subclass of the output's own class: it stays an instance of
what it was.
"""

from dataclasses import field, fields, make_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


def with_aux_loss(output: Any, aux_loss: Tensor) -> Any:
    """Return ``output`` with ``aux_loss``; added to its own where the base model has one.

    Tensors and tuples have no place for it and are returned as they are.
    """
    if not isinstance(output, dict):
        return output
    if not _is_model_output(output):
        return {**output, "aux_loss": aux_loss}
    # of the instance, since a traced forward knows no fields of classes
    instance: Any = output
    if any(f.name == "aux_loss" for f in fields(instance)):
        own = output.get("aux_loss")
        output["aux_loss"] = aux_loss if own is None else own + aux_loss.to(own.device)
        return output
    cls: Any = type(output)
    return output_class(cls)(**dict(output), aux_loss=aux_loss)


@cache
@torch.compiler.assume_constant_result
def output_class(base: type) -> type:
    """The subclass of a ``ModelOutput`` class with the field ``aux_loss``."""
    cls = make_dataclass(
        f"MoELora{base.__name__}",
        [("aux_loss", Tensor | None, field(default=None))],
        bases=(base,),
    )
    cls.__module__ = __name__
    cls.__reduce__ = _reduce  # type: ignore[method-assign, assignment]
    return cls


def carried_tensors(output: Any, *, has_loss: bool) -> dict[tuple[Any, ...], Tensor] | None:
    """The tensors of ``output`` that carry a gradient, by their place in it.

    A place is the key or index, and the index within a tuple for outputs such as
    ``hidden_states``. The loss comes first if there is one; ``aux_loss`` is left out. None for an
    output of unknown type.
    """
    if isinstance(output, Tensor):
        return {(): output} if output.requires_grad else {}
    if isinstance(output, dict):
        items = [(key, value) for key, value in output.items() if key != "aux_loss"]
        if has_loss:
            items.sort(key=lambda item: item[0] != "loss")
    elif isinstance(output, tuple):
        items = list(enumerate(output))
    else:
        return None
    carried: dict[tuple[Any, ...], Tensor] = {}
    for key, value in items:
        if isinstance(value, Tensor) and value.requires_grad:
            carried[key,] = value
        elif type(value) in (tuple, list) and all(isinstance(each, Tensor) for each in value):
            carried.update({(key, i): t for i, t in enumerate(value) if t.requires_grad})
    return carried


def with_tensors(output: Any, tensors: dict[tuple[Any, ...], Tensor]) -> Any:
    """Return ``output`` with other tensors in some of its places."""
    if isinstance(output, Tensor):
        return tensors.get((), output)
    changed: Any = output if isinstance(output, dict) else dict(enumerate(output))
    for (key, *index), tensor in tensors.items():
        if index:
            values = list(changed[key])
            values[index[0]] = tensor
            changed[key] = type(changed[key])(values)
        else:
            changed[key] = tensor
    return changed if isinstance(output, dict) else tuple(changed.values())


def _is_model_output(output: Any) -> bool:
    return hasattr(type(output), "__dataclass_fields__")


def _reduce(self: Any) -> tuple[Any, ...]:
    # pickled by the class it was made from, since the subclass is made at run time
    return _rebuild, (type(self).__mro__[1], dict(self))


def _rebuild(base: type, values: dict[str, Any]) -> Any:
    return output_class(base)(**values)
