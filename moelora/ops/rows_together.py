"""Packed rows of many layers of a model, made with one launch instead of one by each layer.

What has to be packed is learnt: a forward leaves what it packed layer by layer, and later ones do
it portion by portion. Each forward packs anew, so every change is seen that was made before it; one
made during it is seen by its version.
"""

import math
import operator
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moelora.ops.options import Member
from moelora.ops.packing import Packed, must_pack_now, parameters_of, stream_of, versions_of
from moelora.ops.routed_triton import Sizes, launchers, pack

#: Elements per program of the kernel.
_BLOCK = 4096
#: Outputs start at multiples of so many elements, which matrix units ask for.
_ALIGNMENT = 64
#: Elements of a portion (32 MiB in half precision). A forward without gradients holds one at a
#: time; with gradients all are held for backward, as they would be if each layer packed its own.
_PORTION = 2**24
#: Where memory moves so often, tables cost more than they save.
_MAX_MOVES = 16

_Key = tuple[int, int]
_SHAPE = operator.attrgetter("shape")
_ADDRESS = operator.methodcaller("data_ptr")


@dataclass(frozen=True)
class _Request:
    """What a forward packed for one layer and those that share its input.

    Attributes:
        owners: A, B and router of each member, kept weakly: adapters may go.
        shapes: theirs.
        sizes: of the packed rows.
        kind: dtype and device of the parameters.
    """

    owners: tuple["weakref.ref[Tensor]", ...]
    shapes: list[torch.Size]
    sizes: Sizes
    kind: tuple[torch.dtype, torch.device]

    def fits(self) -> bool:
        """Whether its parameters are alive, their memory too, and of the shapes they had."""
        tensors = [owner() for owner in self.owners]
        return all(
            tensor is not None and tensor.shape == shape and tensor.data_ptr()
            for tensor, shape in zip(tensors, self.shapes, strict=True)
        )

    @property
    def elements(self) -> int:
        """Of its rows and Bs, about."""
        return self.sizes.rows * self.sizes.d_in + sum(map(math.prod, self.shapes[1::3]))


class _Copy(NamedTuple):
    """One contiguous piece: which tensor (or None for zeros), how many elements, which part."""

    tensor: Tensor | None
    number: int
    part: int


class _Region(NamedTuple):
    """Matrices of one width, one after the other, some of them padding."""

    start: int
    end: int
    width: int
    rows: list[int]

    def views(self, out: Tensor) -> Sequence[Tensor]:
        """Its matrices in what the kernel wrote."""
        return out[self.start : self.end].view(-1, self.width).split_with_sizes(self.rows)


@dataclass(frozen=True)
class _Layout:
    """Where matrices lie in one tensor.

    Attributes:
        regions: by width, so that a few calls make all views: each call costs the host as much as a
            small layer's kernel takes.
        starts: of each matrix its first element.
        places: of each matrix its number among the views of all regions.
        size: elements of all.
    """

    regions: list[_Region]
    starts: list[int]
    places: list[int]
    size: int


def _layout(shapes: Sequence[tuple[int, int]]) -> _Layout:
    """Let matrices of these ``(rows, width)`` start at multiples of the alignment."""
    by_width: dict[int, list[int]] = {}
    for number, (_, width) in enumerate(shapes):
        by_width.setdefault(width, []).append(number)
    regions: list[_Region] = []
    starts, places = [0] * len(shapes), [0] * len(shapes)
    end = views = 0
    for width, numbers in by_width.items():
        step = _ALIGNMENT // math.gcd(width, _ALIGNMENT)
        start, sizes = end, list[int]()
        for number in numbers:
            rows = shapes[number][0]
            starts[number], places[number] = end, views + len(sizes)
            padding = -rows % step
            sizes += [rows, padding] if padding else [rows]
            end += (rows + padding) * width
        regions.append(_Region(start, end, width, sizes))
        views += len(sizes)
    return _Layout(regions, starts, places, end)


@dataclass(frozen=True)
class _Table:
    """Where everything lies, for the kernel.

    Attributes:
        pointers: the addresses of all parameters, by which it is known to be up to date.
        dtype: of the rows.
        tasks: on the device, see the kernel.
        task_of: of each of the kernel's programs, on the device.
        layout: of what it writes.
        places: of each request the views of its rows and of its Bs.
    """

    pointers: list[int]
    dtype: torch.dtype
    tasks: Tensor
    task_of: Tensor
    layout: _Layout
    places: list[tuple[int, list[int]]]


class _Portion:
    """Requests that are served with one launch.

    Args:
        requests: of one kind.
    """

    def __init__(self, requests: dict[_Key, _Request]) -> None:
        self.requests = requests
        self.kind = next(iter(requests.values())).kind
        self._owners = [owner for request in requests.values() for owner in request.owners]
        self._shapes = [shape for request in requests.values() for shape in request.shapes]
        self._table: _Table | None = None
        self._moves = 0

    def tensors(self) -> list[Tensor] | None:
        """All parameters; None if one is not what it was."""
        tensors = [owner() for owner in self._owners]
        alive = [tensor for tensor in tensors if tensor is not None]
        same = len(alive) == len(tensors) and list(map(_SHAPE, alive)) == self._shapes
        return alive if same else None

    def table(self, x: Tensor, tensors: list[Tensor], pointers: list[int]) -> _Table | None:
        """The kernel's table of these parameters; None if it cannot serve them (any more)."""
        known = self._table
        if known is not None and known.pointers == pointers and known.dtype is x.dtype:
            return known
        self._moves += 0 if known is None else 1
        if self._moves > _MAX_MOVES or not self._are_alike(x, tensors):
            return None
        self._table = _table_of(list(self.requests.values()), tensors, pointers, x)
        return self._table

    def _are_alike(self, x: Tensor, tensors: list[Tensor]) -> bool:
        """Whether one kernel can read them all; a B may be in the dtype of the rows already."""
        dtype, device = self.kind
        return x.device == device and all(
            tensor.device == device
            and tensor.is_contiguous()
            and (tensor.dtype == dtype or (index % 3 == 1 and tensor.dtype == x.dtype))
            for index, tensor in enumerate(tensors)
        )

    def packed(
        self, x: Tensor, tensors: list[Tensor], table: _Table
    ) -> Iterator[tuple[_Key, Packed]]:
        """Launch the kernel; what it gave for each request."""
        layout = table.layout
        out = torch.empty(layout.size, dtype=x.dtype, device=x.device)
        launchers().pack_all(
            (table.task_of.shape[0], 1, 1), (x.dtype, *self.kind),
            (table.tasks, table.task_of, tensors[0], out, _BLOCK),
        )  # fmt: skip
        views = [view for region in layout.regions for view in region.views(out)]
        versions, stream = versions_of(tensors), stream_of(x)
        first = 0
        for (key, request), (rows, lora_bs) in zip(
            self.requests.items(), table.places, strict=True
        ):
            last = first + len(request.owners)
            group = tuple(tensors[first:last])
            outs = [views[place] for place in lora_bs] or list(group[1::3])
            yield (
                key,
                Packed(group, versions[first:last], request.sizes, views[rows], outs, stream),
            )
            first = last


def _table_of(
    requests: list[_Request], tensors: list[Tensor], pointers: list[int], x: Tensor
) -> _Table:
    """Lay out all requests: the rows of each, then each B that is not in the dtype of ``x``."""
    matrices: list[tuple[int, int]] = []
    pieces: list[list[_Copy]] = []
    numbers: list[tuple[int, list[int]]] = []
    first = 0
    for request in requests:
        group = tensors[first : first + len(request.owners)]
        first += len(group)
        cast = [lora_b for lora_b in group[1::3] if lora_b.dtype != x.dtype]
        number = len(matrices)
        numbers.append((number, list(range(number + 1, number + 1 + len(cast)))))
        matrices.append((request.sizes.rows, request.sizes.d_in))
        pieces.append(_rows(request.sizes, group))
        for lora_b in cast:
            matrices.append((lora_b.shape[0], lora_b.shape[1]))
            pieces.append([_Copy(lora_b, lora_b.numel(), 0)])
    layout = _layout(matrices)
    tasks: list[tuple[int, int, int, int, int]] = []
    task_of: list[int] = []
    for start, piece in zip(layout.starts, pieces, strict=True):
        for tensor, elements, part in piece:
            address = 0 if tensor is None else tensor.data_ptr()
            tasks.append((address, start, elements, part, len(task_of)))
            task_of += [len(tasks) - 1] * -(-elements // _BLOCK)
            start += elements
    return _Table(
        pointers,
        x.dtype,
        torch.tensor(tasks, dtype=torch.int64, device=x.device),
        torch.tensor(task_of, dtype=torch.int32, device=x.device),
        layout,
        [
            (layout.places[rows], [layout.places[number] for number in lora_bs])
            for rows, lora_bs in numbers
        ],
    )


def _rows(sizes: Sizes, group: Sequence[Tensor]) -> list[_Copy]:
    """What :func:`pack` writes as rows, as contiguous copies."""
    rows: list[_Copy] = []
    for lora_a in group[0::3]:
        rows.append(_Copy(lora_a, sizes.ranks * sizes.d_in, 0))
        rows.append(_Copy(None, (sizes.padded_ranks - sizes.ranks) * sizes.d_in, -1))
    for part in range(sizes.splits):
        for router in group[2::3]:
            rows.append(_Copy(router, sizes.experts * sizes.d_in, part))
            rows.append(_Copy(None, (sizes.padded_experts - sizes.experts) * sizes.d_in, -1))
    return [copy for copy in rows if copy.number]


class RowsTogether:
    """What the forwards of a model want packed."""

    def __init__(self) -> None:
        self._wanted: dict[_Key, _Request] = {}
        self._portions: dict[_Key, _Portion] = {}
        self._relearnt = 0
        self._is_given_up = False

    def begin(self) -> "ForwardRows":
        """A forward begins."""
        return ForwardRows(self)

    def knows(self, key: _Key) -> bool:
        """Whether a request is known to be wanted."""
        return key in self._portions

    def learn(self, new: dict[_Key, _Request], used: set[_Key], offered: set[_Key]) -> None:
        """A forward is over.

        Args:
            new: what it packed layer by layer.
            used: what it asked for of what was packed together.
            offered: all that was packed together.
        """
        if self._is_given_up:
            return
        wanted = self._wanted
        if not wanted.keys().isdisjoint(new):
            # what was packed together was of no use: another dtype, or changed in each forward
            self._relearnt += 1
        if self._relearnt > _MAX_MOVES:
            self._give_up()
            return
        if 2 * len(used) < len(offered):
            unused = offered - used
            wanted = {key: request for key, request in wanted.items() if key not in unused}
        if new or wanted is not self._wanted:
            self._want({**wanted, **new})

    def _give_up(self) -> None:
        """Let each layer pack alone from now on."""
        self._is_given_up = True
        self._want({})

    def _want(self, wanted: dict[_Key, _Request]) -> None:
        """Put into one portion what follows each other, is of one kind, and not too much."""
        self._wanted, self._portions = wanted, {}
        some: dict[_Key, _Request] = {}
        elements, kind = 0, None
        for key, request in wanted.items():
            if some and (request.kind != kind or elements + request.elements > _PORTION):
                self._portions.update(dict.fromkeys(some, _Portion(some)))
                some, elements = {}, 0
            some[key], kind = request, request.kind
            elements += request.elements
        if some:
            self._portions.update(dict.fromkeys(some, _Portion(some)))

    def pack(self, key: _Key, x: Tensor) -> dict[_Key, Packed]:
        """A request in the dtype of ``x``, with all others of its portion; nothing if in doubt."""
        portion = self._portions.get(key)
        # None: another thread's forward may have forgotten it a moment ago
        if portion is None or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return {}
        tensors = portion.tensors()
        pointers = [] if tensors is None else list(map(_ADDRESS, tensors))
        if tensors is None or 0 in pointers:
            # an adapter has gone or grown; or its memory has gone, for a while (sharded)
            wanted = self._wanted.items()
            self._want({k: r for k, r in wanted if k not in portion.requests or r.fits()})
            return {}
        table = portion.table(x, tensors, pointers)
        if table is None:
            self._give_up()
            return {}
        return dict(portion.packed(x, tensors, table))


class ForwardRows:
    """What one forward packs. A block's recomputation takes what its forward packed."""

    def __init__(self, together: RowsTogether) -> None:
        self._together = together
        self._ready: dict[_Key, Packed] = {}
        self._new: dict[_Key, _Request] = {}
        self._used: set[_Key] = set()
        self._offered: set[_Key] = set()
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
        return self._get(x, members, sizes, keeps=True)

    def lend(
        self, x: Tensor, members: Sequence[Member], sizes: Sizes
    ) -> tuple[Tensor, list[Tensor]]:
        """The same without gradients: what was packed before goes when more has to be packed.

        Args:
            x: as there.
            members: as there.
            sizes: as there.
        """
        return self._get(x, members, sizes, keeps=False)

    def _get(
        self, x: Tensor, members: Sequence[Member], sizes: Sizes, *, keeps: bool
    ) -> tuple[Tensor, list[Tensor]]:
        tensors = parameters_of(members)
        key = (id(tensors[0]), len(members))
        found = self._ready.get(key)
        if found is None and self._together.knows(key):
            if not keeps:
                # before there is more: one portion is in memory at a time
                self._ready.clear()
            packed = self._together.pack(key, x)
            self._ready.update(packed)
            self._offered.update(packed)
            found = packed.get(key)
        if found is not None and found.is_of(tensors, x, sizes):
            self._used.add(key)
            return found.rows, found.lora_bs
        if not self._is_over and not must_pack_now(x, tensors):
            self._new[key] = _Request(
                tuple(map(weakref.ref, tensors)),
                list(map(_SHAPE, tensors)),
                sizes,
                (tensors[0].dtype, tensors[0].device),
            )
        return pack(x, members, sizes)

    def end(self) -> None:
        """The forward is over; recomputations may follow."""
        if not self._is_over:
            self._is_over = True
            self._together.learn(self._new, self._used, self._offered)
