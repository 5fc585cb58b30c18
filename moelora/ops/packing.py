"""Packed rows that outlive a forward, for layers that only serve."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moelora.ops.options import Member
from moelora.ops.routed_triton import Sizes, pack


class _Packed(NamedTuple):
    """Rows and the parameters they were made of.

    Attributes:
        tensors: A, B and router of each member.
        versions: theirs at that time.
        rows: what :func:`pack` gave.
        lora_bs: what else it gave.
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    rows: Tensor
    lora_bs: list[Tensor]


class KeptRows:
    """What :func:`moelora.ops.routed_triton.pack` gave, for as long as no parameter changes.

    A change is told by a parameter's version, so one made through ``.data`` is not seen.
    """

    def __init__(self) -> None:
        self._packed: dict[int, _Packed] = {}

    def get(
        self, x: Tensor, members: Sequence[Member], sizes: Sizes
    ) -> tuple[Tensor, list[Tensor]]:
        """The packed rows of ``members``, made anew if there are none or they are out of date.

        Args:
            x: as for :func:`pack`.
            members: as there; of one number the last ones are kept.
            sizes: as there.
        """
        tensors = tuple(tensor for member in members for tensor in member[2:5])
        is_recording = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if is_recording or any(tensor.is_inference() for tensor in tensors):
            # a CUDA graph must see changes when it runs; inference tensors have no version
            return pack(x, members, sizes)
        versions = tuple(tensor._version for tensor in tensors)
        known = self._packed.get(len(members))
        if (
            known is None
            or known.versions != versions
            or any(new is not old for new, old in zip(tensors, known.tensors, strict=True))
            or known.rows.dtype != x.dtype
        ):
            known = self._packed[len(members)] = _Packed(
                tensors, versions, *pack(x, members, sizes)
            )
        return known.rows, known.lora_bs
