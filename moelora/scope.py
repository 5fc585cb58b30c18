"""What one forward pass knows about routing, and how the layers of a model find it.

A :class:`RoutingScope` belongs to one base model. While a forward runs, its top :class:`Frame`
holds the explicit weights, the padding mask and the tape of router decisions. Frames are kept per
thread and leave with the forward, also when it raises; nothing that carries a graph stays.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from moelora.ops.rows_together import RowsTogether
from moelora.routing import Routing
from moelora.shared_input import (
    InputGroups,
    InputWatch,
    SharedInputs,
    TracedInputs,
    expected_groups,
    without,
)


class TapeEntry(NamedTuple):
    """One router's decision during a training forward, until the losses are taken from it.

    Attributes:
        layer_name: the router's layer or block.
        routing: the decision; None if a fused op made it and nobody looks.
        token_mask: ``(tokens,)`` True for real tokens, or None.
        loss_type: which auxiliary loss.
        coefficient: its weight.
        router_is_trainable: whether a gradient is wanted.
        checkpointed: made inside a block that is recomputed in backward.
        statistics: the sums that a fused op made of the decision, and the number of experts.
        over_ranks: its loss is that of the tokens of all processes.
    """

    layer_name: str
    routing: Routing | None
    token_mask: Tensor | None
    loss_type: str
    coefficient: float
    router_is_trainable: bool
    checkpointed: bool
    statistics: tuple[Tensor, int] | None = None
    over_ranks: bool = False

    @property
    def has_graph(self) -> bool:
        """Whether the loss of this decision has a gradient now."""
        if self.statistics is not None:
            return self.statistics[0].requires_grad
        return self.routing is not None and self.routing.router_logits.requires_grad

    @property
    def deferred(self) -> bool:
        """Whether the gradient has to wait for the block's recomputation."""
        return self.checkpointed and not self.has_graph

    @property
    def lost(self) -> bool:
        """Whether the router's gradient cannot be had at all."""
        return self.router_is_trainable and not (self.checkpointed or self.has_graph)


@dataclass
class Tape:
    """The router decisions of one forward. Once closed (by the end of that forward) it takes none.

    A checkpointed block that is recomputed in backward meets the closed tape of its own forward, so
    nothing is counted twice.

    Attributes:
        training: the forward trains, so that the loss reaches the routers; else it is only told.
        asked: the caller asked for ``outputs.aux_loss``, in evaluation too.
        observed: somebody looks at the decisions, so every router reports in training.
        entries: the decisions so far.
        closed: the forward is over.
        deferred: what the loss of one router is to be multiplied with when its block is
            recomputed, as ``(times its coefficient, plainly)``; None unless the block ran without
            a gradient (reentrant checkpointing). Set in backward before any recomputation.
    """

    training: bool = True
    asked: bool = False
    observed: bool = False
    entries: list[TapeEntry] = field(default_factory=list)
    closed: bool = False
    deferred: "tuple[Tensor | float, Tensor | float] | None" = None

    def takes(self, *, training: bool, coefficient: float) -> bool:
        """Whether a router of a layer in this mode, with this coefficient, reports."""
        if coefficient != 0:
            return self.asked or training
        return training and self.observed

    def add(self, entry: TapeEntry) -> None:
        """Keep ``entry`` while the forward runs."""
        if not self.closed:
            self.entries.append(entry)

    def close(self) -> list[TapeEntry]:
        """Return the entries and forget them."""
        entries, self.entries, self.closed = self.entries, [], True
        return entries


@dataclass(frozen=True)
class SharedRouting:
    """Weights that one router gives to many layers.

    Attributes:
        weights: ``(batch, seq, experts)``; None where a single expert serves every token.
        columns: each mixture's first and last-but-one column, by adapter name.
    """

    weights: Tensor | None
    columns: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Frame:
    """One forward (or one ``generate`` call) of the base model.

    Attributes:
        weights: the user's explicit routing weights, or None to route by the adapters' routers.
        per_token: the weights are those of this forward's tokens, not one vector for all.
        batch_shape: ``(batch, seq)`` of the model's input where it has one.
        generating: inside ``generate``; rows may be repeated ``row_repeats`` times, and positions
            past those given take the last one.
        row_repeats: beams or returned sequences per row.
        token_mask: ``(batch, seq)`` True for real tokens; None without padding information.
        decoder_token_mask: the same for the decoder's tokens of an encoder-decoder model.
        shared: routing decided once for a block (by its name) or for the model (by ``""``).
        first_pass_cache: the first pass's own KV cache, for the cache that the forward returns.
        adapters_off: the first pass of a two-pass router; layers give their base output.
        tape: where routers leave their decisions in training.
        checkpointed: inside a block that is recomputed in backward.
        is_forward: made by the base model's forward, not by ``generate``.
        keeps_graph: a recorder of this forward wants decisions with their graph, so also of blocks
            that are recomputed when it is gone.
        inputs: layers that read the same input, in a forward that is not traced.
        traced: the same in one that is.
        outer: the frame to return to.
    """

    weights: Tensor | None = None
    per_token: bool = False
    batch_shape: tuple[int, int] | None = None
    generating: bool = False
    row_repeats: int = 1
    token_mask: Tensor | None = None
    decoder_token_mask: Tensor | None = None
    shared: dict[str, SharedRouting] = field(default_factory=dict)
    first_pass_cache: Any = None
    adapters_off: bool = False
    tape: Tape | None = None
    checkpointed: bool = False
    is_forward: bool = False
    keeps_graph: bool = False
    inputs: SharedInputs | None = None
    traced: TracedInputs | None = None
    outer: "Frame | None" = None


class _FrameStack(threading.local):
    """The frames of each thread.

    A list, since a trace that breaks inside a forward replays changes of a list, but loses an
    attribute that was set on a thread-local object.
    """

    def __init__(self) -> None:
        self.frames: list[Frame] = []


class RoutingRecorder(Protocol):
    """What :func:`moelora.record_routing` registers."""

    def begin_forward(self) -> None:
        """A forward of the model begins."""

    def add(self, layer_name: str, routing: Routing) -> None:
        """A layer has routed."""


class RoutingObserver(Protocol):
    """Who looks at all decisions of training forwards (the Trainer's callback)."""

    def observe(self, entries: list[TapeEntry], aux_loss: Tensor | None) -> None:
        """A training forward is over; a block's recomputation is none."""


class TracedObserver(Protocol):
    """Who looks at the decisions of compiled forwards."""

    def add(self, entries: list[TapeEntry], mean: Tensor | None) -> None:
        """A forward is being traced; what is done here is done at each of its runs."""


_scopes: "weakref.WeakSet[RoutingScope]" = weakref.WeakSet()


def live_scopes() -> "list[RoutingScope]":
    """The scopes of all models that are alive."""
    return list(_scopes)


class RoutingScope:
    """The routing state of one base model, shared by its layers. Copies start without frames.

    Attributes:
        recorders: see :func:`moelora.record_routing`.
        observers: who looks at all decisions in training; kept weakly.
        traced: where compiled forwards add up what observers want to see; None if nobody looks.
        aux_loss_scale: how the trainer scales a loss that it computes itself, where it told.
        known_arguments: the forward's argument names that were looked at.
        announced: the base's config, where it was made to tell of its routers.
        input_groups: layers that read the same input; None before a forward was watched.
        groups_for_traces: those that share its work in a trace.
        rows: what the kernels need of all layers, packed at once.
    """

    def __init__(self, aux_loss_scale: float | None = None, announced: Any = None) -> None:
        self._frames = _FrameStack()
        self.recorders: list[RoutingRecorder] = []
        self.observers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.traced: TracedObserver | None = None
        self.aux_loss_scale = aux_loss_scale
        self.known_arguments: frozenset[str] = frozenset()
        self.announced = announced
        self.input_groups: InputGroups | None = None
        self.groups_for_traces: InputGroups = {}
        self._expected_groups: InputGroups | None = None
        self.rows = RowsTogether()
        _scopes.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoutingScope":
        # the copied base shares the copied config
        copied = RoutingScope(self.aux_loss_scale, copy.deepcopy(self.announced, memo))
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return RoutingScope, (self.aux_loss_scale, self.announced)

    def shared_inputs(self, base: nn.Module) -> SharedInputs:
        """What a forward that begins may know of layers with the same input.

        Args:
            base: the model.
        """
        if self.input_groups is not None:
            return SharedInputs(self.input_groups, None, self.rows.begin(), {})
        if self._expected_groups is None:
            # once: a model in which nothing is routed by its layers is never done with watching
            self._expected_groups = expected_groups(base)
        return SharedInputs(self._expected_groups, InputWatch(), self.rows.begin(), {})

    def learn(self, inputs: SharedInputs | None) -> None:
        """A forward is over."""
        if inputs is None:
            return
        if inputs.watch is None:
            inputs.rows.end()
            self.give_up(inputs)
            return
        groups = inputs.watch.close()
        if groups == inputs.groups:
            # else it packed layers for groups that there are not
            inputs.rows.end()
        if self.input_groups is None:
            self.input_groups = groups

    def give_up(self, inputs: SharedInputs | None) -> None:
        """Forget the groups of results that nobody took, in forwards that begin from now on."""
        if inputs is not None and inputs.ready:
            self.input_groups = without(self.input_groups or {}, inputs.ready)

    @property
    def top(self) -> Frame | None:
        """The current frame of this thread."""
        frames = self._frames.frames
        return frames[-1] if frames else None

    def keeps_graph(self) -> bool:
        """Whether a recorder wants decisions with their graph."""
        return any(getattr(recorder, "keep_graph", True) for recorder in self.recorders)

    def push(self, frame: Frame) -> None:
        """Enter ``frame``."""
        self._frames.frames.append(replace(frame, outer=self.top))

    def pop(self) -> Frame | None:
        """Leave the top frame and return it."""
        frames = self._frames.frames
        return frames.pop() if frames else None

    def restore(self, frame: Frame | None) -> None:
        """Go back to ``frame``, whatever was entered since."""
        frames = self._frames.frames
        while frames and frames[-1] is not frame:
            frames.pop()

    @contextmanager
    def entered(self, frame: Frame) -> Iterator[None]:
        """Run a block inside ``frame``, whatever happens in it."""
        frames = self._frames.frames
        depth = len(frames)
        self.push(frame)
        try:
            yield
        finally:
            del frames[depth:]


#: Where a base model keeps its scope, in ``__dict__``: not a submodule, and not PEFT's.
SCOPE = "_moelora_scope"
#: Where a base model keeps the attached router that routes every forward, if there is one.
ATTACHED = "_moelora_attached"
#: The routing fields of the config that came with it.
ATTACHED_SPEC = "_moelora_attached_spec"


def scope_of(base: nn.Module) -> RoutingScope | None:
    """The routing scope of a base model; None if no LoRA adapter of it was bound."""
    scope: RoutingScope | None = base.__dict__.get(SCOPE)
    return scope


class ScopedCheckpoint:
    """A gradient checkpointing function that recomputes a block inside the frame of its forward.

    The recomputation happens in backward, possibly in another thread, when the forward's frame is
    long gone. Explicit weights travel as a tensor argument, so that they get their gradient under
    reentrant checkpointing too.
    """

    def __init__(self, checkpoint: Callable[..., Any], scope: RoutingScope) -> None:
        self.checkpoint = checkpoint
        self.scope = scope

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint ``function(*args)``, remembering the current frame."""
        frame = self.scope.top
        if frame is None:
            return self.checkpoint(function, *args, **kwargs)
        rest = replace(frame, weights=None, shared={}, outer=None, checkpointed=True)
        names = list(frame.shared)
        columns = [frame.shared[name].columns for name in names]

        def run(weights: Tensor | None, *inputs: Any) -> Any:
            tensors, inner = inputs[: len(names)], inputs[len(names) :]
            shared = dict(zip(names, map(SharedRouting, tensors, columns), strict=True))
            shared_inputs = None if rest.inputs is None else rest.inputs.again()
            traced = None if rest.traced is None else rest.traced.again()
            frame = replace(
                rest, weights=weights, shared=shared, inputs=shared_inputs, traced=traced
            )
            with self.scope.entered(frame):
                output = function(*inner)
            self.scope.give_up(shared_inputs)
            return output

        tensors = [frame.shared[name].weights for name in names]
        return self.checkpoint(run, frame.weights, *tensors, *args, **kwargs)


@dataclass
class LayerBinding:
    """What an adapted layer knows about its place in the model.

    Attributes:
        scope: the model's routing scope.
        name: the layer's name in the base model.
        block_name: that block's name.
        block: ``(index, number)`` of the transformer block it lies in, or None outside of blocks.
        reads_decoder: True if its input are the decoder's tokens, of an encoder-decoder model.
        experts_of: number of experts of each adapter of the model, by name.
    """

    scope: RoutingScope
    name: str
    block: tuple[int, int] | None
    block_name: str | None
    reads_decoder: bool
    experts_of: dict[str, int]
