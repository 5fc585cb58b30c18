"""Words that pictures and pages share: short names of modules, labels of layers, spelt tokens."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def short_name(module_name: str) -> str:
    """Return a module's name without the containers around its block.

    Args:
        module_name: as in ``model.named_modules()``.

    Example:
        >>> short_name("model.layers.3.self_attn.q_proj")
        'layer 3 self_attn.q_proj'
    """
    parts = module_name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return f"layer {part} {'.'.join(parts[position + 1 :])}".rstrip()
    return module_name


def layer_of(module_name: str) -> int:
    """Return the block that a module belongs to: the first number in its dotted name.

    Args:
        module_name: as in ``model.named_modules()``; a name without a number gives 0.

    Example:
        >>> layer_of("model.layers.3.self_attn.q_proj")
        3
    """
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module_name)
    return int(number.group(1)) if number else 0


def layer_labels(block_names: Sequence[str]) -> list[str]:
    """Return what tells blocks apart: their number, and the name of their stack if there are more.

    Args:
        block_names: as in ``model.named_modules()``; names without a number stay as they are.

    Example:
        >>> layer_labels(["model.layers.0", "model.layers.1", "lm_head"])
        ['0', '1', 'lm_head']
        >>> layer_labels(["encoder.block.0", "decoder.block.0"])
        ['encoder 0', 'decoder 0']
    """
    stacks = [
        name.rsplit(".", 1) if name.split(".")[-1].isdigit() else None for name in block_names
    ]
    prefixes = [stack[0].split(".") for stack in stacks if stack is not None and len(stack) == 2]
    common = _common_start(prefixes)
    ends = _common_start([prefix[common:][::-1] for prefix in prefixes])
    labels = []
    for name, stack in zip(block_names, stacks, strict=True):
        if stack is None:
            labels.append(name)
            continue
        parts = stack[0].split(".") if len(stack) == 2 else []
        own = ".".join(parts[common : len(parts) - ends])
        labels.append(f"{own} {stack[-1]}".strip())
    return labels


def _common_start(lists: Sequence[Sequence[str]]) -> int:
    """The number of leading parts that all lists share."""
    if not lists:
        return 0
    length = 0
    for parts in zip(*lists, strict=False):
        if len(set(parts)) > 1:
            break
        length += 1
    return length


def spell_tokens(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text that each token adds; of a character split over tokens, the last one has it.

    Args:
        ids: of one text.
        tokenizer: whose ids they are.
    """
    pieces: list[str] = []
    so_far = ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        # a replacement mark at the end is a character not yet complete
        whole = so_far if text.endswith("\N{REPLACEMENT CHARACTER}") else text
        pieces.append(whole[len(so_far) :])
        so_far = whole
    return pieces
