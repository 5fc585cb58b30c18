"""Layers routed in one op: one mixture, a linear router of the layer's own.

The op computes a plain frozen base as well; any other base of a linear layer computes itself.

Everything such a layer needs is looked up once and kept as its plan; each call only checks that
nothing has changed. On a GPU a small layer's arithmetic takes less time than such look-ups do.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moelora.decision import MixtureSpec, report
from moelora.fused_layer import (
    base_output,
    fusable,
    is_bare,
    is_traced,
    mixes_beside,
)
from moelora.ops import (
    Member,
    RoutedOutput,
    RouterOptions,
    explain,
    routed_linears,
    routed_linears_inference,
)
from moelora.ops.backend import SPARSE_FROM
from moelora.ops.options import LossType
from moelora.ops.packing import KeptRows
from moelora.ops.routed_triton import MAX_MEMBERS, pack
from moelora.router import ModuleRouter
from moelora.routing import Routing
from moelora.scope import Frame, LayerBinding, Tape, TapeEntry
from moelora.shared_input import Ready, conditions_of, may_be_recomputed_alone

_PLAN = "_moelora_plan"
#: Set on a layer that may keep its packed weights, see :mod:`moelora.inference`.
KEEPS_ROWS = "_moelora_keeps_rows"


class RoutedPlan:
    """A layer's parts and sizes, for as long as they are the same objects.

    Copies and pickles of a layer make their own.
    """

    def __init__(
        self, layer: Any, adapter: str, spec: MixtureSpec, x: Tensor, *, fuses_base: bool
    ) -> None:
        self.adapter, self.spec = adapter, spec
        self.active = layer._active_adapter
        self.scaling = layer.scaling[adapter]
        self.dtype, self.device = x.dtype, x.device
        holders = tuple(
            layer._modules[name] for name in ("lora_A", "lora_B", "lora_dropout", "lora_router")
        )
        self.base = layer._modules["base_layer"]
        self.parts = tuple(holder._modules[adapter] for holder in holders)
        self.drops = type(self.parts[2]) is not nn.Identity
        #: None if the base computes itself, and the ops the update alone
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if fuses_base:
            self.weight = self.base._parameters["weight"]
            self.bias = self.base._parameters.get("bias")
        lora_a, lora_b, _, router = self.parts
        self.tensors: tuple[Any, Any, Any] = (lora_a.weight, lora_b.weight, router.weight)
        self.dtypes = tuple(tensor.dtype for tensor in self.tensors)
        # the dictionaries themselves: each look-up less is memory that the CPU need not wait for
        self._places = tuple(
            (holder._modules, part, part.__dict__)
            for holder, part in zip(holders, self.parts, strict=True)
        )
        self._owned = tuple(
            (owner._parameters, tensor, tensor.dtype)
            for owner, tensor in zip((lora_a, lora_b, router), self.tensors, strict=True)
        )
        #: what the next hook registered anywhere was to be numbered when the parts had none
        self._hooks_from: int | None = None
        self.is_conv1d = fuses_base and type(self.base) is not nn.Linear
        # told to a layer by tests, which run the kernels in Triton's interpreter
        self.backend: str = layer.__dict__.get("_moelora_backend", "auto")
        #: whether the ops may leave unchosen experts out
        self.is_large = self.tensors[0].shape[0] > SPARSE_FROM * spec.top_k
        self.choice = explain(
            device=x.device.type,
            dtype=x.dtype,
            num_experts=spec.num_experts,
            top_k=min(spec.top_k, spec.num_experts),
            rank=lora_a.weight.shape[0] // spec.num_experts,
            backend=self.backend,
        )
        self.uses_kernels = self.choice.backend == "triton"
        #: layers of one kind may be computed together
        self.kind = (
            adapter, spec, self.scaling, self.dtypes, lora_a.weight.shape, router.mature is None,
            self.backend, fuses_base,
        )  # fmt: skip
        self.kept = KeptRows() if layer.__dict__.get(KEEPS_ROWS) and self.uses_kernels else None
        self._member: Member | None = None
        self._maturity: tuple[Tensor, int, bool] | None = None
        self._options: dict[tuple[bool, bool], RouterOptions] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def holds(self, layer: Any, x: Tensor) -> bool:
        """Whether the layer is still what it was, and ``x`` what it was made for."""
        return (
            x.dtype is self.dtype
            and x.device == self.device
            and type(x) is Tensor
            and self._is_still(layer)
            and not is_traced(x)
        )

    def holds_like(self, other: "RoutedPlan", layer: Any) -> bool:
        """The same for the input that ``other`` holds for."""
        return other.dtype is self.dtype and other.device == self.device and self._is_still(layer)

    def _is_still(self, layer: Any) -> bool:
        modules = layer._modules
        if (
            layer._active_adapter != self.active
            or layer._disable_adapters
            or layer.merged_adapters
            or layer.scaling[self.adapter] != self.scaling
            or modules["base_layer"] is not self.base
            or (layer.training and self.spec.expert_dropout > 0)
            or layer.moe_mixtures.get(self.adapter) is not self.spec
            or self.adapter in layer.lora_variant
        ):
            return False
        return self._parts_are_the_same()

    def _parts_are_the_same(self) -> bool:
        adapter, weight, bias = self.adapter, self.weight, self.bias
        for modules, part, attributes in self._places:
            if modules.get(adapter) is not part or "forward" in attributes:
                return False
        for parameters, tensor, dtype in self._owned:
            if (
                parameters.get("weight") is not tensor
                or tensor.dtype is not dtype
                or tensor.device != self.device
                or not tensor.is_contiguous()
            ):
                return False
        if weight is None:
            return self._has_no_hooks()
        parameters = self.base._parameters
        return (
            "forward" not in self.base.__dict__
            and parameters.get("weight") is weight
            and parameters.get("bias") is bias
            and not weight.requires_grad
            and weight.dtype is self.dtype
            and weight.device == self.device
            and (bias is None or not (bias.requires_grad or bias.dtype is not self.dtype))
            and self._has_no_hooks()
        )

    def _has_no_hooks(self) -> bool:
        """Whether no part has a hook; looked at again only after one was registered somewhere."""
        if self._hooks_from != RemovableHandle.next_id:
            looked_at = self.parts if self.weight is None else (*self.parts, self.base)
            if not all(is_bare(part) for part in looked_at):
                return False
            self._hooks_from = RemovableHandle.next_id
        return True

    @property
    def dropping(self) -> bool:
        """Whether dropout is at work, which some leave on in evaluation."""
        return self.drops and self.parts[2].training

    def member(self) -> Member:
        """What the ops are told of this layer."""
        mature, known = self.parts[3]._buffers["mature"], self._member
        if known is None or known.mature is not mature:
            known = Member(self.weight, self.bias, *self.tensors, mature, self.is_conv1d)
            self._member = known
        return known

    def compute(
        self,
        layer: Any,
        x: Tensor,
        binding: LayerBinding | None,
        frame: Frame | None,
        *,
        token_mask: Tensor | None,
    ) -> RoutedOutput:
        """The layer's result; those of layers that wait for the same input are kept for them.

        Args:
            layer: the LoRA layer, for which :meth:`holds`.
            x: ``(*lead, d_in)``.
            binding: the layer's place in its model.
            frame: the current forward.
            token_mask: ``(tokens,)`` True for real tokens, or None.
        """
        training, spec = layer.training, self.spec
        tape = None if frame is None or binding is None else frame.tape
        takes = tape is not None and tape.takes(training=training, coefficient=spec.aux_loss_coef)
        if frame is None and binding is not None and training and torch.is_grad_enabled():
            # a block that its model recomputes by itself: it has to save what its forward saved
            takes = spec.aux_loss_coef != 0 or bool(binding.scope.observers)
        options = self._options.get((training, takes)) or self._make_options(training, takes)
        dropping = self.dropping
        has_graph = training or takes or dropping or torch.is_grad_enabled()
        inputs = None if frame is None or binding is None else frame.inputs
        others: list[tuple[str, RoutedPlan]] = []
        if inputs is not None and binding is not None:
            if inputs.watch is not None:
                inputs.watch.see(binding.name, layer, x)
            group = inputs.groups.get(binding.name)
            checkpointed = frame is not None and frame.checkpointed
            if group and (checkpointed or not (has_graph and may_be_recomputed_alone())):
                others = self._others(group, layer, x, frame)
        plans = [self, *(plan for _, plan in others)]
        members = [plan.member() for plan in plans]
        if dropping:
            # each drops other elements, in the order of the layers' own calls
            members = [
                member._replace(dropped=plan.parts[2](x))
                for member, plan in zip(members, plans, strict=True)
            ]
        asks = self.is_large or not self.uses_kernels
        all_mature = asks and all(plan.knows_all_mature() for plan in plans)
        record = looks_on(binding, tape if takes else None)
        if has_graph:
            results = routed_linears(
                x, members, options=options, token_mask=token_mask, record=record,
                all_mature=all_mature, packer=pack if inputs is None else inputs.rows.get,
                choice=self.choice,
            )  # fmt: skip
        else:
            lent = pack if inputs is None else inputs.rows.lend
            results = routed_linears_inference(
                x, members, options=options, record=record, all_mature=all_mature,
                packer=lent if self.kept is None else self.kept.get, choice=self.choice,
            )  # fmt: skip
        if inputs is not None and others:
            version, conditions = x._version, conditions_of(x)
            for (name, plan), result in zip(others, results[1:], strict=True):
                inputs.ready[name] = Ready(plan, result, x, version, conditions)
        return results[0]

    def _others(
        self, group: tuple[tuple[str, Any], ...], layer: Any, x: Tensor, frame: Frame | None
    ) -> "list[tuple[str, RoutedPlan]]":
        """The plans of those behind this layer in its group, if they are of one kind."""
        others: list[tuple[str, RoutedPlan]] = []
        # an inference tensor has no version, by which a change of it could be seen
        if x.is_inference():
            return others
        is_behind = False
        for name, other in group:
            if not is_behind:
                is_behind = other is layer
                continue
            # a hook before a layer may change what the layer is
            if other.training != layer.training or other._forward_pre_hooks:
                return others
            plan: RoutedPlan | None = other.__dict__.get(_PLAN)
            if plan is None or not plan.holds_like(self, other):
                plan = plan_of(other, x, frame)
            if plan is None or plan.kind != self.kind or plan.dropping != self.dropping:
                return others
            others.append((name, plan))
            if len(others) + 1 == MAX_MEMBERS:
                return others
        return others

    def finish(
        self,
        result: RoutedOutput,
        binding: LayerBinding | None,
        frame: Frame | None,
        *,
        token_mask: Tensor | None,
    ) -> Tensor:
        """:func:`reported` for this layer.

        Args:
            result: what :meth:`compute` gave, or kept for this layer.
            binding: as there.
            frame: as there.
            token_mask: as there.
        """
        trains = self.tensors[2].requires_grad
        return reported(
            result, self.spec, binding, frame, token_mask=token_mask, router_is_trainable=trains
        )

    def knows_all_mature(self) -> bool:
        """Whether no expert is young, as far as that is known without asking the GPU each time."""
        mature = self.parts[3]._buffers["mature"]
        if mature is None:
            return True
        # an inference tensor has no version, by which a change of it could be seen
        if mature.is_inference():
            return False
        known = self._maturity
        if known is None or known[0] is not mature or known[1] != mature._version:
            if mature.is_cuda and torch.cuda.is_current_stream_capturing():
                return False
            # one synchronisation per change of the buffer
            known = self._maturity = (mature, mature._version, bool(mature.all()))
        return known[2]

    def _make_options(self, training: bool, takes: bool) -> RouterOptions:  # noqa: FBT001
        options = options_of(self.spec, self.scaling, training=training, takes=takes)
        self._options[training, takes] = options
        return options


def options_of(spec: MixtureSpec, scaling: float, *, training: bool, takes: bool) -> RouterOptions:
    """What the ops are told of a layer's router.

    Args:
        spec: of the layer's mixture.
        scaling: of its adapter.
        training: whether the layer trains.
        takes: whether statistics for the auxiliary loss are wanted.
    """
    return RouterOptions(
        spec.num_experts,
        min(spec.top_k, spec.num_experts),
        spec.temperature,
        float(scaling),
        spec.capacity_factor if training else None,
        cast("LossType", spec.loss_type) if takes else None,
    )


def looks_on(binding: LayerBinding | None, tape: Tape | None) -> bool:
    """Whether somebody wants to see a decision.

    Args:
        binding: the layer's place in its model.
        tape: where the decision is left, or None.
    """
    has_recorders = binding is not None and bool(binding.scope.recorders)
    return has_recorders or (tape is not None and tape.observed)


def reported(
    result: RoutedOutput,
    spec: MixtureSpec,
    binding: LayerBinding | None,
    frame: Frame | None,
    *,
    token_mask: Tensor | None,
    router_is_trainable: bool,
) -> Tensor:
    """A layer's output, its decision told to those who want it.

    Args:
        result: what the ops gave.
        spec: of the layer's mixture.
        binding: the layer's place in its model.
        frame: the current forward.
        token_mask: ``(tokens,)`` True for real tokens, or None.
        router_is_trainable: whether the loss has to reach the router.
    """
    if binding is None:
        return result.output
    tape, routing = None, None
    if frame is not None and result.statistics is not None:
        tape = frame.tape
    if looks_on(binding, tape) and result.router_logits is not None:
        top_k = min(spec.top_k, spec.num_experts)
        routing = _routing(result.router_logits, result.routing_weights, top_k)
        for recorder in binding.scope.recorders:
            recorder.add(binding.name, routing)
    if tape is None or frame is None or result.statistics is None:
        return result.output
    entry = TapeEntry(
        layer_name=binding.name,
        routing=routing,
        token_mask=token_mask,
        loss_type=spec.loss_type,
        coefficient=spec.aux_loss_coef,
        router_is_trainable=router_is_trainable,
        checkpointed=frame.checkpointed,
        statistics=(result.statistics, spec.num_experts),
        over_ranks=tape.training and spec.balance_over_ranks,
    )
    return report(result.output, entry, tape)


def _routing(logits: Any, weights: Any, top_k: int) -> Routing:
    """The decision that the op made, for those who look at it."""
    return Routing(logits, logits.softmax(dim=-1), weights, logits.topk(top_k, dim=-1).indices)


def planned_forward(
    layer: Any,
    x: Tensor,
    binding: LayerBinding | None,
    frame: Frame | None,
    *,
    token_mask: Callable[[], Tensor | None],
) -> Tensor | None:
    """The layer's output if it can be routed in one op now, its decision reported; else None.

    Args:
        layer: a LoRA layer.
        x: its input.
        binding: the layer's place in its model.
        frame: the current forward.
        token_mask: tells which of the layer's tokens are real, ``(tokens,)``, or None.
    """
    if frame is not None and frame.inputs is not None and frame.inputs.ready and binding:
        ready = frame.inputs.ready.get(binding.name)
        if ready is not None and ready.is_for(x):
            del frame.inputs.ready[binding.name]
            if frame.inputs.watch is not None:
                frame.inputs.watch.see(binding.name, layer, x)
            plan: RoutedPlan = ready.plan
            output = plan.finish(ready.result, binding, frame, token_mask=token_mask())
            return output if plan.weight is not None else beside_base(layer, x, output)
    found = plan_of(layer, x, frame)
    if found is None:
        return None
    mask = token_mask()
    result = found.compute(layer, x, binding, frame, token_mask=mask)
    output = found.finish(result, binding, frame, token_mask=mask)
    return output if found.weight is not None else beside_base(layer, x, output)


def beside_base(layer: Any, x: Tensor, update: Tensor) -> Tensor:
    """The output of a layer whose base computes itself, in the base's dtype.

    Args:
        layer: a LoRA layer.
        x: its input.
        update: what the ops gave.

    Raises:
        UnsupportedLayerError: if the base returns anything but a tensor.
    """
    output = base_output(layer, x)
    return (output + update).to(output.dtype)


def plan_of(layer: Any, x: Tensor, frame: Frame | None) -> RoutedPlan | None:
    """The layer's plan, if it can be routed in one op now; else None.

    Args:
        layer: a LoRA layer.
        x: its input.
        frame: the current forward.
    """
    plan: RoutedPlan | None = layer.__dict__.get(_PLAN)
    if plan is None or not plan.holds(layer, x):
        plan = _new_plan(layer, x)
        layer.__dict__[_PLAN] = plan
    if plan is None or keeps_graph(layer, frame):
        return None
    return plan


def has_plan(layer: nn.Module) -> bool:
    """Whether the layer was routed in one op when it was last looked at."""
    return layer.__dict__.get(_PLAN) is not None


def forget_plan(layer: nn.Module) -> None:
    """Let a layer's next call make its plan anew."""
    layer.__dict__.pop(_PLAN, None)


def keeps_graph(layer: Any, frame: Frame | None) -> bool:
    """Whether a recorder wants the decision with its graph, which the ops do not give.

    Args:
        layer: a LoRA layer.
        frame: the current forward.
    """
    if frame is not None and frame.is_forward:
        return frame.keeps_graph
    binding: LayerBinding | None = layer.__dict__.get("_moelora_binding")
    return binding is not None and binding.scope.keeps_graph()


def mixture_alone(layer: Any) -> tuple[str, MixtureSpec] | None:
    """A layer's adapter, if it is one routed mixture with a linear router of its own.

    Args:
        layer: a LoRA layer.
    """
    mixtures: dict[str, MixtureSpec] = layer.__dict__.get("moe_mixtures", {})
    active = list(layer.active_adapters)
    if len(active) != 1 or active[0] not in mixtures or layer.disable_adapters or layer.merged:
        return None
    adapter = active[0]
    spec = mixtures[adapter]
    if not (spec.routed and spec.has_router) or spec.router_scope != "module":
        return None
    router = layer.lora_router[adapter]
    if type(router) is not ModuleRouter or router.hidden_weight is not None:
        return None
    if spec.num_experts == 1 or (layer.training and spec.expert_dropout > 0):
        return None
    if not is_bare(router) or router.reads_indices:
        return None
    return adapter, spec


def _new_plan(layer: Any, x: Tensor) -> RoutedPlan | None:
    """A plan for a layer that has one routed mixture of its own and nothing else."""
    found = mixture_alone(layer)
    if found is None:
        return None
    adapter, spec = found
    fuses_base = fusable(layer, x, [adapter], drops=True) is not None
    if not fuses_base and not mixes_beside(layer, x, adapter):
        return None
    plan = RoutedPlan(layer, adapter, spec, x, fuses_base=fuses_base)
    return plan if plan.holds(layer, x) else None
