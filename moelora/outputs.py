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
    """Return ``output`` with ``aux_loss``; added to its own where the base model has one."""
    if not _is_model_output(output):
        return {**output, "aux_loss": aux_loss}
    if any(f.name == "aux_loss" for f in fields(output)):
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


def _is_model_output(output: Any) -> bool:
    return hasattr(type(output), "__dataclass_fields__")


def _reduce(self: Any) -> tuple[Any, ...]:
    # pickled by the class it was made from, since the subclass is made at run time
    return _rebuild, (type(self).__mro__[1], dict(self))


def _rebuild(base: type, values: dict[str, Any]) -> Any:
    return output_class(base)(**values)
