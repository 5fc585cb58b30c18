"""Bases with experts of their own, whose linears transformers 5 fused into 3-D parameters."""

from collections.abc import Callable
from typing import Any

from torch import nn

from moelora.config import MoELoraConfig


def convert_config(
    original: Callable[..., None], config: Any, model: nn.Module, conversions: list[Any] | None
) -> None:
    """Leave a mixture's targets as they are; convert those of plain adapters as PEFT does.

    For adapters made with transformers 4, PEFT turns the names of the linears that a base such as
    Mixtral had then (``"all-linear"`` means them too) into ``target_parameters``: updates of a
    whole 3-D parameter, which no token can be routed over. No mixture is that old, so its targets
    are the linears that exist.

    Args:
        original: PEFT's conversion, which changes ``config`` in place.
        config: the adapter's config.
        model: the base model.
        conversions: how transformers renames the base's weights.
    """
    is_stack = isinstance(config, MoELoraConfig) and (
        config.num_experts > 1 or config.use_moe_routing
    )
    if not is_stack:
        original(config, model=model, conversions=conversions)
