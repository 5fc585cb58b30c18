"""Packed rows, and those that are kept between forwards."""

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moelora.ops.options import Member
from moelora.ops.routed_triton import Sizes, pack

#: Gives the packed rows of a layer and those that share its input, as :func:`pack` does.
Packer = Callable[[Tensor, Sequence[Member], Sizes], tuple[Tensor, list[Tensor]]]


class Packed(NamedTuple):
    """Rows and the parameters they were made of.

    Attributes:
        tensors: A, B and router of each member.
        versions: theirs at that time.
        sizes: of the rows; parameters may be given other shapes in place.
        rows: what :func:`pack` gave.
        lora_bs: what else it gave.
        stream: on which.
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    sizes: Sizes
    rows: Tensor
    lora_bs: list[Tensor]
    stream: int | None

    def is_of(self, tensors: tuple[Tensor, ...], x: Tensor, sizes: Sizes) -> bool:
        """Whether packing ``tensors`` for ``x``, now, would give the same."""
        return (
            self.rows.dtype is x.dtype
            and self.sizes.key == sizes.key
            and all(map(operator.is_, tensors, self.tensors))
            and self.versions == versions_of(tensors)
            and self.stream == stream_of(x)
        )


def versions_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """By which a change in place is seen."""
    return tuple([tensor._version for tensor in tensors])


def stream_of(x: Tensor) -> int | None:
    """The stream that computes with ``x`` now; None on a CPU."""
    return torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else None


def parameters_of(members: Sequence[Member]) -> tuple[Tensor, ...]:
    """A, B and router of one member after the other."""
    return tuple([tensor for member in members for tensor in member[2:5]])


def must_pack_now(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether a CUDA graph is recorded, which has to see changes, or changes cannot be seen."""
    is_recording = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return is_recording or any(tensor.is_inference() for tensor in tensors)


class KeptRows:
    """A layer's packed rows, for as long as no parameter changes.

    A change is told by a parameter's version, so one made through ``.data`` is not seen.
    """

    def __init__(self) -> None:
        self._packed: dict[int, Packed] = {}

    def get(
        self, x: Tensor, members: Sequence[Member], sizes: Sizes
    ) -> tuple[Tensor, list[Tensor]]:
        """The packed rows of ``members``, made anew if there are none or they are out of date.

        Args:
            x: as for :func:`pack`.
            members: as there; of one number the last ones are kept.
            sizes: as there.
        """
        tensors = parameters_of(members)
        if must_pack_now(x, tensors):
            return pack(x, members, sizes)
        known = self._packed.get(len(members))
        if known is None or not known.is_of(tensors, x, sizes):
            packed = pack(x, members, sizes)
            known = Packed(tensors, versions_of(tensors), sizes, *packed, stream_of(x))
            self._packed[len(members)] = known
        return known.rows, known.lora_bs
