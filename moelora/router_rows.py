"""The rows of a router that grows: one per expert, in one parameter or in several.

A parameter ``weight`` that was never divided holds all rows. Rows that come later, or that are
frozen apart from others, lie in ``weight_1``, ``weight_2`` ... in the order of the experts.
"""

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moelora.optimizer import note_removed, note_replaced


def block_name(name: str, number: int) -> str:
    """The name of a row parameter's block.

    Example:
        >>> block_name("weight", 0), block_name("weight", 2)
        ('weight', 'weight_2')
    """
    return name if number == 0 else f"{name}_{number}"


def blocks(router: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that hold the rows called ``name``, in the order of the experts."""
    found: list[nn.Parameter] = []
    while (block := router._parameters.get(block_name(name, len(found)))) is not None:
        found.append(block)
    return found


def block_of_row(router: Any, row: int) -> nn.Parameter:
    """The block of ``weight`` in which a row lies."""
    for block in blocks(router, "weight"):
        if row < block.shape[0]:
            return block
        row -= block.shape[0]
    raise IndexError(row)


def append(router: Any, number: int, *, std: float) -> None:
    """Add a block of new rows: ``weight`` drawn from a normal distribution, others zero."""
    for name in router.row_parameters:
        existing = blocks(router, name)
        new = torch.zeros_like(existing[0][:1]).repeat(number, *(1,) * (existing[0].ndim - 1))
        if name == "weight":
            nn.init.normal_(new, std=std)
        _set_blocks(router, name, [*existing, nn.Parameter(new)])


def cut(router: Any, sizes: list[int]) -> None:
    """Lay the rows into blocks of these sizes; what optimisers know of them moves along."""
    bounds = list(pairwise([0, *accumulate(sizes)]))
    for name in router.row_parameters:
        pieces = [_take(blocks(router, name), list(range(a, b))) for a, b in bounds]
        _set_blocks(router, name, pieces)


def keep(router: Any, columns: list[int]) -> None:
    """Keep only these rows; blocks of which all rows stay are the same parameters."""
    for name in router.row_parameters:
        pieces, start = [], 0
        for block in blocks(router, name):
            chosen = [c for c in columns if start <= c < start + block.shape[0]]
            if chosen:
                pieces.append(_take(blocks(router, name), chosen))
            else:
                note_removed([block])
            start += block.shape[0]
        _set_blocks(router, name, pieces)


def set_trainable(router: Any, columns: list[int], *, trainable: bool) -> None:
    """Let rows be trained or not; blocks that would be half and half are divided first."""
    chosen = set(columns)
    sizes: list[int] = []
    changing: list[bool] = []
    start = 0
    for block in blocks(router, "weight"):
        flags = [row in chosen for row in range(start, start + block.shape[0])]
        start += block.shape[0]
        if block.requires_grad == trainable:
            # nothing to change in this block, so nothing to divide
            flags = [False] * len(flags)
        for index, flag in enumerate(flags):
            if index > 0 and flag == changing[-1]:
                sizes[-1] += 1
            else:
                sizes.append(1)
                changing.append(flag)
    if sizes != router.row_blocks:
        cut(router, sizes)
    for name in router.row_parameters:
        for block, flag in zip(blocks(router, name), changing, strict=True):
            if flag:
                block.requires_grad_(trainable)
                block.grad = None


def _take(existing: list[nn.Parameter], columns: list[int]) -> nn.Parameter:
    """Some consecutive columns of one block as a parameter; the block itself if they are all."""
    start = 0
    for block in existing:
        if columns[0] < start + block.shape[0]:
            break
        start += block.shape[0]
    if len(columns) == block.shape[0]:
        return block
    index = torch.tensor([column - start for column in columns], device=block.device)
    taken = nn.Parameter(block.detach()[index].clone(), requires_grad=block.requires_grad)
    if block.grad is not None:
        taken.grad = block.grad[index].clone()
    note_replaced(taken, block, index)
    return taken


def _set_blocks(router: Any, name: str, pieces: list[nn.Parameter]) -> None:
    """Replace the blocks; the parameters' order is that of a router made so from the start."""
    old = [block_name(name, number) for number in range(len(blocks(router, name)))]
    ordered: dict[str, nn.Parameter | None] = {}
    for key, parameter in router._parameters.items():
        if key == name:
            ordered.update({block_name(name, n): piece for n, piece in enumerate(pieces)})
        elif key not in old:
            ordered[key] = parameter
    router._parameters.clear()
    router._parameters.update(ordered)


def fitted(router: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A router's tensors, with their rows cut as this router's are, if there are as many."""
    result = dict(tensors)
    for name in router.row_parameters:
        own = blocks(router, name)
        given: list[Tensor] = []
        while (block := tensors.get(block_name(name, len(given)))) is not None:
            given.append(block)
        sizes = [block.shape[0] for block in own]
        fits = given and all(block.ndim == own[0].ndim for block in given)
        if not fits or sum(block.shape[0] for block in given) != sum(sizes):
            continue
        if [block.shape[0] for block in given] == sizes:
            continue
        if any(block.shape[1:] != given[0].shape[1:] for block in given):
            continue
        for number in range(len(given)):
            del result[block_name(name, number)]
        for number, piece in enumerate(torch.cat(given).split(sizes)):
            result[block_name(name, number)] = piece.clone()
    return result
