"""Where a layer lies in its model: blocks, encoder or decoder, and what tokens it reads."""

import re
from typing import Any

from torch import nn

from moelora.errors import UnsupportedLayerError

_CROSS_ATTENTION = re.compile(r"EncDecAttention|encoder_attn|cross_?attn|cross_?attention", re.I)
_POSITION_PAIRS = re.compile(r"relative_(attention|position)", re.I)
_KEYS_AND_VALUES = frozenset({"k", "v", "k_proj", "v_proj", "key", "value"})


def module_lists(base: nn.Module) -> dict[str, int]:
    """The length of each ModuleList, by name: the candidates for stacks of transformer blocks."""
    return {name: len(m) for name, m in base.named_modules() if isinstance(m, nn.ModuleList)}


def block_of(name: str, lists: dict[str, int]) -> tuple[str, int, int] | None:
    """The block around a layer: its name, its index and the number of blocks in its stack.

    The outermost ModuleList is taken for the stack. None outside of any.

    Example:
        >>> block_of("model.layers.3.mlp.up_proj", {"model.layers": 12})
        ('model.layers.3', 3, 12)
    """
    parts = name.split(".")
    for depth in range(1, len(parts)):
        number = lists.get(".".join(parts[:depth]))
        if number is not None:
            return ".".join(parts[: depth + 1]), int(parts[depth]), number
    return None


def is_encoder_decoder(base: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder, which see different tokens."""
    return bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))


def reads_decoder(name: str) -> bool:
    """Whether the input of this layer of an encoder-decoder model are decoder tokens."""
    return "decoder" in name.split(".") and not reads_other_tokens(name)


def reads_other_tokens(name: str) -> bool:
    """Whether a layer is a key or value of cross-attention: it reads the encoder's states.

    Told by name, since lengths may coincide.

    Example:
        >>> reads_other_tokens("decoder.block.0.layer.1.EncDecAttention.v")
        True
    """
    parts = name.split(".")
    return parts[-1] in _KEYS_AND_VALUES and any(map(_CROSS_ATTENTION.search, parts))


def reads_position_pairs(name: str) -> bool:
    """Whether a layer embeds pairs of positions: its input has no rows of the batch.

    Example:
        >>> reads_position_pairs("encoder.block.0.layer.0.SelfAttention.relative_attention_bias")
        True
    """
    return _POSITION_PAIRS.search(name.rsplit(".", 1)[-1]) is not None


def hidden_size_of(base: nn.Module) -> int:
    """The width of the hidden states between blocks, from the model's config.

    Raises:
        UnsupportedLayerError: if the model has no config that says so.
    """
    config: Any = getattr(base, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "hidden_size", None)
    if not isinstance(size, int):
        raise UnsupportedLayerError(
            f"{type(base).__name__} has no config.hidden_size, so a router over its hidden states "
            "cannot be made. Use router_scope='module', which needs no such thing."
        )
    return size
