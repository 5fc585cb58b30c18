"""Packed rows made less often than by each layer in each forward: kept, or made for all at once."""

import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora.ops.options import Member
from moelora.ops.routed_triton import Sizes, launchers, pack

#: Gives the packed rows of a layer and those that share its input, as :func:`pack` does.
Packer = Callable[[Tensor, Sequence[Member], Sizes], tuple[Tensor, list[Tensor]]]

#: Elements per program of the kernel that packs all layers.
_BLOCK = 4096
#: Outputs start at multiples of so many elements, which matrix units ask for.
_ALIGNMENT = 64
#: Where tables would have to be made so often, they cost more than they save.
_MAX_TABLES = 16


class _Packed(NamedTuple):
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
            and self.versions == _versions(tensors)
            and self.stream == _stream(x)
        )


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([tensor._version for tensor in tensors])


def _stream(x: Tensor) -> int | None:
    return torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else None


def _parameters(members: Sequence[Member]) -> tuple[Tensor, ...]:
    return tuple([tensor for member in members for tensor in member[2:5]])


def _must_pack_now(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether a CUDA graph is recorded, which has to see changes, or changes cannot be seen."""
    is_recording = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return is_recording or any(tensor.is_inference() for tensor in tensors)


class KeptRows:
    """A layer's packed rows, for as long as no parameter changes.

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
        tensors = _parameters(members)
        if _must_pack_now(x, tensors):
            return pack(x, members, sizes)
        known = self._packed.get(len(members))
        if known is None or not known.is_of(tensors, x, sizes):
            packed = pack(x, members, sizes)
            known = _Packed(tensors, _versions(tensors), sizes, *packed, _stream(x))
            self._packed[len(members)] = known
        return known.rows, known.lora_bs


# All layers at once ------------------------------------------------------------------------------

_Key = tuple[int, int]


@dataclass(frozen=True)
class _Request:
    """What a forward packed for one layer and those that share its input.

    Attributes:
        owners: A, B and router of each member, kept weakly: adapters may go.
        sizes: of the packed rows.
        b_shapes: of each B.
    """

    owners: tuple["weakref.ref[Tensor]", ...]
    sizes: Sizes
    b_shapes: tuple[torch.Size, ...]

    def fits(self, group: Sequence[Any]) -> bool:
        """Whether its parameters are alive and of the shapes they had."""
        if any(tensor is None for tensor in group):
            return False
        sizes = self.sizes
        return (
            all(lora_a.shape == (sizes.ranks, sizes.d_in) for lora_a in group[0::3])
            and all(router.shape == (sizes.experts, sizes.d_in) for router in group[2::3])
            and tuple([lora_b.shape for lora_b in group[1::3]]) == self.b_shapes
        )


class _Copy(NamedTuple):
    """One contiguous piece: which tensor (or None for zeros), how many elements, which part."""

    tensor: Tensor | None
    number: int
    part: int


@dataclass(frozen=True)
class _Table:
    """Where everything lies, for the kernel.

    Attributes:
        pointers: the addresses of all parameters, by which it is known to be up to date.
        kind: dtypes of rows and parameters, and the device.
        tasks: on the device, see the kernel.
        task_of: of each of the kernel's programs, on the device.
        size: elements of all outputs.
        places: of each request its rows' and its Bs' first elements.
    """

    pointers: tuple[int, ...]
    kind: tuple[Any, ...]
    tasks: Tensor
    task_of: Tensor
    size: int
    places: list[tuple[int, list[int]]]


class RowsTogether:
    """Packs the rows of all layers of a model's forwards with one launch each.

    What has to be packed is learnt: a forward leaves what it packed layer by layer, and later ones
    do it at once when the first layer asks. Each forward packs anew, so every change is seen that
    was made before it; one made during it is seen by its version.
    """

    def __init__(self) -> None:
        self._wanted: dict[_Key, _Request] = {}
        self._table: _Table | None = None
        self._tables = 0
        self._is_given_up = False

    def begin(self) -> "ForwardRows":
        """A forward begins."""
        return ForwardRows(self)

    def learn(self, new: dict[_Key, _Request], used: set[_Key], *, packed: int) -> None:
        """A forward is over.

        Args:
            new: what it packed layer by layer.
            used: what it asked for of what was packed at once.
            packed: how many requests that were.
        """
        if self._is_given_up:
            return
        wanted = self._wanted
        if 2 * len(used) < packed:
            wanted = {key: request for key, request in wanted.items() if key in used}
        if new or wanted is not self._wanted:
            self._wanted, self._table = {**wanted, **new}, None

    def pack_all(self, x: Tensor) -> dict[_Key, _Packed]:
        """Everything that is known to be wanted in the dtype of ``x``; nothing if in doubt."""
        wanted = self._wanted
        if not wanted or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return {}
        groups = [tuple([owner() for owner in request.owners]) for request in wanted.values()]
        tensors = [tensor for group in groups for tensor in group if tensor is not None]
        pointers = tuple([tensor.data_ptr() for tensor in tensors])
        fitting = {
            key: request
            for (key, request), group in zip(wanted.items(), groups, strict=True)
            if request.fits(group)
        }
        if len(fitting) < len(wanted) or 0 in pointers:
            # an adapter has gone or grown; or its memory has gone, for a while (sharded)
            self._wanted = fitting
            return {}
        kind = (x.dtype, tensors[0].dtype, x.device)
        table = self._table
        if table is None or table.pointers != pointers or table.kind != kind:
            table = self._new_table(list(zip(wanted.values(), groups, strict=True)), pointers, kind)
        if table is None:
            return {}
        out = torch.empty(table.size, dtype=x.dtype, device=x.device)
        launchers().pack_all(
            (table.task_of.shape[0], 1, 1), kind,
            (table.tasks, table.task_of, tensors[0], out, _BLOCK),
        )  # fmt: skip
        stream = _stream(x)
        ready = {}
        for (key, request), group, place in zip(wanted.items(), groups, table.places, strict=True):
            rows, lora_bs = _views(out, request, group, place)
            versions = _versions(group)  # type: ignore[arg-type]
            ready[key] = _Packed(group, versions, request.sizes, rows, lora_bs, stream)  # type: ignore[arg-type]
        return ready

    def _new_table(
        self,
        requests: list[tuple[_Request, tuple[Any, ...]]],
        pointers: tuple[int, ...],
        kind: tuple[Any, ...],
    ) -> _Table | None:
        """The table of these requests; None if one kernel cannot serve them all."""
        dtype, source, device = kind
        are_alike = all(
            tensor.device == device
            and tensor.is_contiguous()
            and (tensor.dtype == source or (index % 3 == 1 and tensor.dtype == dtype))
            for _, group in requests
            for index, tensor in enumerate(group)
        )
        self._tables += 1
        if not are_alike or self._tables > _MAX_TABLES:
            self._is_given_up = True
            self._wanted, self._table = {}, None
            return None
        tasks: list[tuple[int, int, int, int, int]] = []
        task_of: list[int] = []
        places, size = [], 0
        for request, group in requests:
            starts = []
            for piece in _pieces(request, group, dtype):
                starts.append(size)
                for tensor, number, part in piece:
                    address = 0 if tensor is None else tensor.data_ptr()
                    tasks.append((address, size, number, part, len(task_of)))
                    task_of += [len(tasks) - 1] * -(-number // _BLOCK)
                    size += number
                size = -(-size // _ALIGNMENT) * _ALIGNMENT
            places.append((starts[0], starts[1:]))
        self._table = _Table(
            pointers,
            kind,
            torch.tensor(tasks, dtype=torch.int64, device=device),
            torch.tensor(task_of, dtype=torch.int32, device=device),
            size,
            places,
        )
        return self._table


def _pieces(
    request: _Request, group: Sequence[Tensor], dtype: torch.dtype
) -> Iterator[list[_Copy]]:
    """What :func:`pack` writes, as contiguous copies: the rows, then each B that it casts."""
    sizes = request.sizes
    rows: list[_Copy] = []
    for lora_a in group[0::3]:
        rows.append(_Copy(lora_a, sizes.ranks * sizes.d_in, 0))
        rows.append(_Copy(None, (sizes.padded_ranks - sizes.ranks) * sizes.d_in, -1))
    for part in range(sizes.splits):
        for router in group[2::3]:
            rows.append(_Copy(router, sizes.experts * sizes.d_in, part))
            rows.append(_Copy(None, (sizes.padded_experts - sizes.experts) * sizes.d_in, -1))
    yield [copy for copy in rows if copy.number]
    for lora_b in group[1::3]:
        if lora_b.dtype != dtype:
            yield [_Copy(lora_b, lora_b.numel(), 0)]


def _views(
    out: Tensor, request: _Request, group: Sequence[Any], place: tuple[int, list[int]]
) -> tuple[Tensor, list[Tensor]]:
    """Rows and Bs in the one tensor that holds all."""
    sizes, (start, b_starts) = request.sizes, place
    rows = out.as_strided((sizes.rows, sizes.d_in), (sizes.d_in, 1), start)
    if not b_starts:
        return rows, list(group[1::3])
    return rows, [
        out.as_strided(shape, (shape[1], 1), b_start)
        for shape, b_start in zip(request.b_shapes, b_starts, strict=True)
    ]


class ForwardRows:
    """What one forward packs. A block's recomputation takes what its forward packed."""

    def __init__(self, together: RowsTogether) -> None:
        self._together = together
        self._ready: dict[_Key, _Packed] | None = None
        self._new: dict[_Key, _Request] = {}
        self._used: set[_Key] = set()
        self._is_over = False

    def get(
        self, x: Tensor, members: Sequence[Member], sizes: Sizes
    ) -> tuple[Tensor, list[Tensor]]:
        """The packed rows of ``members``.

        Args:
            x: as for :func:`pack`.
            members: as there.
            sizes: as there.
        """
        tensors = _parameters(members)
        key = (id(tensors[0]), len(members))
        ready = self._ready
        if ready is None:
            ready = self._ready = self._together.pack_all(x)
        found = ready.get(key)
        if found is not None and found.is_of(tensors, x, sizes):
            self._used.add(key)
            return found.rows, found.lora_bs
        if not self._is_over and not _must_pack_now(x, tensors):
            shapes = tuple(member.lora_b.shape for member in members)
            self._new[key] = _Request(tuple(map(weakref.ref, tensors)), sizes, shapes)
        return pack(x, members, sizes)

    def end(self) -> None:
        """The forward is over; recomputations may follow."""
        if not self._is_over:
            self._is_over = True
            self._together.learn(self._new, self._used, packed=len(self._ready or {}))
