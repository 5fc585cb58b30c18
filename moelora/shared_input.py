"""Layers that read the same input (query, key and value; gate and up): found, then served together.

Which layers those are is told by one forward, which is watched for layers that get the very same
tensor one after the other. From then on the first of them computes for all, and the others
take what is ready, if they are called with that tensor. Where one is not, its group is given up.
In the watched forward itself the layers' names are taken for a hint, so that a training that is
resumed goes on as one that never stopped: alone, layers round otherwise than together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from moelora.ops import RoutedOutput
from moelora.ops.rows_together import ForwardRows
from moelora.places import reads_other_tokens

# torch 2.8: the first that tells of hooks for saved tensors
_TOP_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

#: Names and layers of a group, by the name of each of its layers.
InputGroups = Mapping[str, tuple[tuple[str, Any], ...]]


#: Names of layers beside each other that mostly read one input, in the order of their calls.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)

#: Those of them that are no attention's.
_GATES = frozenset(("gate_proj", "up_proj", "w1", "w3", "wi_0", "wi_1"))


def expected_groups(base: nn.Module) -> InputGroups:
    """The groups that the names in a model suggest. A wrong guess costs work in one forward.

    Args:
        base: the model, its adapted layers bound to it.
    """
    groups: dict[str, tuple[tuple[str, Any], ...]] = {}
    for parent in base.modules():
        for names in SIBLINGS:
            layers = [parent._modules.get(name) for name in names]
            bindings = [(getattr(layer, "_moelora_binding", None), layer) for layer in layers]
            members = tuple((binding.name, layer) for binding, layer in bindings if binding)
            if len(members) > 1:
                groups.update(dict.fromkeys([name for name, _ in members], members))
    return groups


class TracedInputs(NamedTuple):
    """What one traced forward knows of layers with the same input.

    A trace cannot watch a forward first, so names are taken at their word.

    Attributes:
        groups: as names suggest.
        ready: results that wait for their layer's call, by its name: the input they were made for,
            its version then, and the result.
    """

    groups: InputGroups
    ready: dict[str, tuple[Tensor, int, Any]]

    def again(self) -> "TracedInputs":
        """The same for one run of a block on its own."""
        return TracedInputs(self.groups, {})


def groups_for_traces(base: nn.Module) -> InputGroups:
    """The groups that names suggest, without those of cross attention.

    Its key and value do not read what its query does: in a trace they would be computed for an
    input that is not theirs, at every run. Whether a model that is not of transformers has any, its
    names do not tell.

    Args:
        base: the model, its adapted layers bound to it.
    """
    is_known = isinstance(getattr(base, "config", None), PretrainedConfig)
    return {
        name: group
        for name, group in expected_groups(base).items()
        if not any(reads_other_tokens(member) for member, _ in group)
        and (is_known or name.rpartition(".")[2] in _GATES)
    }


class InputWatch:
    """Watches one forward for layers with the same input."""

    def __init__(self) -> None:
        self._input: tuple[Tensor, int] | None = None
        self._run: dict[str, Any] = {}
        self._seen: set[str] = set()
        self._groups: dict[str, tuple[tuple[str, Any], ...]] = {}
        self._closed = False

    def see(self, name: str, layer: Any, x: Tensor) -> None:
        """A layer is called.

        Args:
            name: the layer's name in its model.
            layer: it.
            x: its input.
        """
        # a recomputation in backward comes after the forward and repeats it
        if self._closed or x.is_inference():
            return
        last = self._input
        if last is None or last[0] is not x or last[1] != x._version or name in self._seen:
            self._end_run()
            self._input = (x, x._version)
        self._run[name] = layer
        self._seen.add(name)

    def _end_run(self) -> None:
        if len(self._run) > 1:
            self._groups.update(dict.fromkeys(self._run, tuple(self._run.items())))
        self._run = {}

    def close(self) -> InputGroups | None:
        """The forward is over: each layer's group; None if no layer was seen."""
        self._end_run()
        self._input, self._closed = None, True
        return self._groups if self._seen else None


def without(groups: InputGroups, names: Mapping[str, Any]) -> InputGroups:
    """The groups in which none of the named layers is.

    Example:
        >>> pair = (("q", 1), ("k", 2))
        >>> without({"q": pair, "k": pair}, {"k": None})
        {}
    """
    return {
        name: members
        for name, members in groups.items()
        if not any(member in names for member, _ in members)
    }


@dataclass(frozen=True)
class SharedInputs:
    """What one forward knows of layers with the same input.

    Attributes:
        groups: as they were when the forward began, or as names suggest: a block that is
            recomputed must do the same.
        watch: looks for them, where they are not known yet.
        rows: what it packs; a block that is recomputed takes the same.
        ready: results that wait for their layer's call, by its name.
    """

    groups: InputGroups
    watch: InputWatch | None
    rows: ForwardRows
    ready: "dict[str, Ready]"

    def again(self) -> "SharedInputs":
        """The same for one run of a block on its own."""
        return SharedInputs(self.groups, self.watch, self.rows, {})


class Ready(NamedTuple):
    """A layer's result, computed with that of another.

    Attributes:
        plan: the layer's plan.
        result: what it gives.
        x: for this input.
        version: as it was then.
        conditions: under which it was computed.
    """

    plan: Any
    result: RoutedOutput
    x: Tensor
    version: int
    conditions: tuple[Any, ...]

    def is_for(self, x: Tensor) -> bool:
        """Whether a call with ``x``, now, is the one this was made for."""
        return x is self.x and x._version == self.version and self.conditions == conditions_of(x)


def may_be_recomputed_alone() -> bool:
    """Whether what backward needs is being saved by somebody's hooks, or that cannot be told.

    A model that checkpoints its blocks by itself recomputes them outside of any forward of ours,
    where each layer is alone, and has to save the same tensors then. What transformers checkpoints
    is recomputed inside the frame of its forward.
    """
    return _TOP_HOOKS is None or _TOP_HOOKS(False) is not None


def conditions_of(x: Tensor) -> tuple[Any, ...]:
    """What a result depends on besides tensors: gradients, and the stream that computes it."""
    stream = torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else None
    return torch.is_grad_enabled(), stream
