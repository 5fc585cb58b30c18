"""Layers routed in one op: one mixture, a linear router of the layer's own.

Everything such a layer needs is looked up once and kept as its plan; each call only checks that
nothing has changed. On a GPU a small layer's arithmetic takes less time than such look-ups do.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from moelora.decision import MixtureSpec, report
from moelora.fused_layer import fusable, is_bare, is_traced
from moelora.ops import RouterOptions, routed_linear, routed_linear_inference
from moelora.ops.backend import SPARSE_FROM
from moelora.ops.options import LossType
from moelora.router import ModuleRouter
from moelora.routing import Routing
from moelora.scope import Frame, LayerBinding, TapeEntry

_PLAN = "_moelora_plan"


class RoutedPlan:
    """A layer's parts and sizes, for as long as they are the same objects.

    Copies and pickles of a layer make their own.
    """

    def __init__(self, layer: Any, adapter: str, spec: MixtureSpec, x: Tensor) -> None:
        self.adapter, self.spec = adapter, spec
        self.active = layer._active_adapter
        self.scaling = layer.scaling[adapter]
        self.dtype, self.device = x.dtype, x.device
        self.holders = tuple(
            layer._modules[name] for name in ("lora_A", "lora_B", "lora_dropout", "lora_router")
        )
        self.base = layer._modules["base_layer"]
        self.parts = tuple(holder._modules[adapter] for holder in self.holders)
        self.drops = type(self.parts[2]) is not nn.Identity
        self.weight, self.bias = self.base._parameters["weight"], self.base._parameters.get("bias")
        lora_a, lora_b, _, router = self.parts
        self.owners = (lora_a, lora_b, router)
        self.tensors = tuple(owner._parameters["weight"] for owner in self.owners)
        self.dtypes = tuple(tensor.dtype for tensor in self.tensors)
        self.is_conv1d = type(self.base) is not nn.Linear
        # told to a layer by tests, which run the kernels in Triton's interpreter
        self.backend: str = layer.__dict__.get("_moelora_backend", "auto")
        #: whether the ops may leave unchosen experts out
        self.is_large = self.tensors[0].shape[0] > SPARSE_FROM * spec.top_k
        self._maturity: tuple[Tensor, int, bool] | None = None
        self._options: dict[tuple[bool, bool], RouterOptions] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def holds(self, layer: Any, x: Tensor) -> bool:
        """Whether the layer is still what it was, and ``x`` what it was made for."""
        modules = layer._modules
        if (
            x.dtype is not self.dtype
            or x.device != self.device
            or type(x) is not Tensor
            or layer._active_adapter != self.active
            or layer._disable_adapters
            or layer.merged_adapters
            or layer.scaling[self.adapter] != self.scaling
            or modules["base_layer"] is not self.base
            or (self.drops and layer.training)
            or (layer.training and self.spec.expert_dropout > 0)
            or layer.moe_mixtures.get(self.adapter) is not self.spec
            or self.adapter in layer.lora_variant
        ):
            return False
        return self._parts_are_the_same() and not is_traced(x)

    def _parts_are_the_same(self) -> bool:
        adapter, weight, bias = self.adapter, self.weight, self.bias
        for holder, part in zip(self.holders, self.parts, strict=True):
            if holder._modules.get(adapter) is not part or not is_bare(part):
                return False
        for owner, tensor, dtype in zip(self.owners, self.tensors, self.dtypes, strict=True):
            if (
                owner._parameters["weight"] is not tensor
                or tensor.dtype is not dtype
                or tensor.device != self.device
                or not tensor.is_contiguous()
            ):
                return False
        parameters = self.base._parameters
        return (
            is_bare(self.base)
            and parameters["weight"] is weight
            and parameters.get("bias") is bias
            and not weight.requires_grad
            and weight.dtype is self.dtype
            and weight.device == self.device
            and (bias is None or not (bias.requires_grad or bias.dtype is not self.dtype))
        )

    def run(
        self,
        layer: Any,
        x: Tensor,
        binding: LayerBinding | None,
        frame: Frame | None,
        *,
        token_mask: Tensor | None,
    ) -> Tensor:
        """The layer's output, its decision reported.

        Args:
            layer: the LoRA layer, for which :meth:`holds`.
            x: ``(*lead, d_in)``.
            binding: the layer's place in its model.
            frame: the current forward.
            token_mask: ``(tokens,)`` True for real tokens, or None.
        """
        spec, training = self.spec, layer.training
        tape = None if frame is None or binding is None else frame.tape
        takes = tape is not None and tape.takes(training=training, coefficient=spec.aux_loss_coef)
        recorders = () if binding is None else binding.scope.recorders
        looked_at = bool(recorders) or (takes and tape is not None and tape.observed)
        options = self._options.get((training, takes)) or self._make_options(training, takes)
        mature = self.parts[3]._buffers["mature"]
        if training or takes or torch.is_grad_enabled():
            result = routed_linear(
                x, self.weight, self.bias, *self.tensors, options=options, token_mask=token_mask,
                mature=mature, is_conv1d=self.is_conv1d, record=looked_at, backend=self.backend,
                all_mature=self._knows_all_mature(mature),
            )  # fmt: skip
        else:
            result = routed_linear_inference(
                x, self.weight, self.bias, *self.tensors, options=options, mature=mature,
                is_conv1d=self.is_conv1d, record=looked_at, backend=self.backend,
                all_mature=self._knows_all_mature(mature),
            )  # fmt: skip
        if not (recorders or takes) or binding is None:
            return result.output
        routing = None
        if looked_at:
            routing = _routing(result.router_logits, result.routing_weights, options.top_k)
            for recorder in recorders:
                recorder.add(binding.name, routing)
        if not takes or tape is None or frame is None or result.statistics is None:
            return result.output
        entry = TapeEntry(
            layer_name=binding.name,
            routing=routing,
            token_mask=token_mask,
            loss_type=spec.loss_type,
            coefficient=spec.aux_loss_coef,
            router_is_trainable=self.tensors[2].requires_grad,
            checkpointed=frame.checkpointed,
            statistics=(result.statistics, spec.num_experts),
            over_ranks=tape.training and spec.balance_over_ranks,
        )
        return report(result.output, entry, tape)

    def _knows_all_mature(self, mature: Tensor | None) -> bool:
        """Whether no expert is young, as far as that is known without asking the GPU each time."""
        if mature is None or not self.is_large:
            return mature is None
        known = self._maturity
        if known is None or known[0] is not mature or known[1] != mature._version:
            if mature.is_cuda and torch.cuda.is_current_stream_capturing():
                return False
            # one synchronisation per change of the buffer
            known = self._maturity = (mature, mature._version, bool(mature.all()))
        return known[2]

    def _make_options(self, training: bool, takes: bool) -> RouterOptions:  # noqa: FBT001
        spec = self.spec
        options = RouterOptions(
            spec.num_experts,
            min(spec.top_k, spec.num_experts),
            spec.temperature,
            float(self.scaling),
            spec.capacity_factor if training else None,
            cast("LossType", spec.loss_type) if takes else None,
        )
        self._options[training, takes] = options
        return options


def _routing(logits: Any, weights: Any, top_k: int) -> Routing:
    """The decision that the op made, for those who look at it."""
    return Routing(logits, logits.softmax(dim=-1), weights, logits.topk(top_k, dim=-1).indices)


def plan_of(layer: Any, x: Tensor) -> RoutedPlan | None:
    """The layer's plan, if it can be routed in one op now; else None.

    Args:
        layer: a LoRA layer.
        x: its input.
    """
    if torch.compiler.is_compiling():
        return None
    plan: RoutedPlan | None = layer.__dict__.get(_PLAN)
    if plan is None or not plan.holds(layer, x):
        plan = _new_plan(layer, x)
        layer.__dict__[_PLAN] = plan
    if plan is None or _keeps_graph(layer):
        return None
    return plan


def _keeps_graph(layer: Any) -> bool:
    """Whether a recorder wants the decision with its graph, which the ops do not give."""
    binding: LayerBinding | None = layer.__dict__.get("_moelora_binding")
    recorders = () if binding is None else binding.scope.recorders
    return any(getattr(recorder, "keep_graph", True) for recorder in recorders)


def _new_plan(layer: Any, x: Tensor) -> RoutedPlan | None:
    """A plan for a layer that has one routed mixture of its own and nothing else."""
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
    if fusable(layer, x, active) is None or not is_bare(router) or router.reads_indices:
        return None
    plan = RoutedPlan(layer, adapter, spec, x)
    return plan if plan.holds(layer, x) else None
