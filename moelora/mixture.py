"""Mixtures in a LoRA model: making their layers, and what merging means for them.

The functions here replace methods of PEFT's ``LoraModel`` and LoRA layers (see ``_peft``); each
gets the original first and leaves plain LoRA adapters to it.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moelora import _peft
from moelora.attached import watch_state_dicts
from moelora.binding import bind, unbind
from moelora.config import MoELoraConfig, is_int
from moelora.decision import MixtureSpec
from moelora.errors import ConfigError, MergeError, UnsupportedLayerError
from moelora.layer import mixtures_of
from moelora.places import (
    block_of,
    hidden_size_of,
    is_encoder_decoder,
    module_lists,
    reads_other_tokens,
)
from moelora.rollback import unchanged_on_error
from moelora.router import ModuleRouter
from moelora.router_request import announce
from moelora.scope import ATTACHED


def inject_adapter(
    original: Callable[..., Any],
    tuner: Any,
    model: nn.Module,
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Inject as PEFT does, after checking all targets, and tell every layer its place."""
    config = tuner.peft_config[adapter_name]
    if isinstance(config, MoELoraConfig):
        _check_targets(tuner, model, config)
        with unchanged_on_error(tuner):
            tuner.__dict__[_ROUTED_BLOCKS] = set()
            original(tuner, model, adapter_name, *args, **kwargs)
            del tuner.__dict__[_ROUTED_BLOCKS]
        _take_maturity(tuner, adapter_name, config)
    else:
        original(tuner, model, adapter_name, *args, **kwargs)
    if not isinstance(tuner, _peft.AdaLoraModel):
        bind(model, tuner.peft_config)
        watch_state_dicts(tuner)


def _check_targets(tuner: Any, model: nn.Module, config: MoELoraConfig) -> None:
    """Refuse layers that cannot hold a mixture before the first one is replaced."""
    if not _is_stack(config) or config.target_modules in (None, "all-linear"):
        return
    for name, module in model.named_modules():
        if name and tuner._check_target_module_exists(config, name):
            _check_base_layer(module, name, config)


def _check_base_layer(module: nn.Module, name: str, config: MoELoraConfig) -> None:
    base = module.get_base_layer() if isinstance(module, _peft.BaseTunerLayer) else module
    if isinstance(base, nn.MultiheadAttention):
        raise UnsupportedLayerError(
            f"A mixture cannot adapt {name!r}: nn.MultiheadAttention uses its whole weight at "
            "once, so its tokens cannot be routed. Leave it out of target_modules."
        )
    groups = getattr(base, "groups", 1)
    if isinstance(groups, int) and groups > 1:
        raise UnsupportedLayerError(
            f"A mixture cannot adapt {name!r}: a convolution with groups={groups} would give each "
            f"group other experts. Leave it out of target_modules (num_experts="
            f"{config.num_experts})."
        )


def _is_stack(config: MoELoraConfig) -> bool:
    return config.num_experts > 1 or config.use_moe_routing


def create_and_replace(
    original: Callable[..., Any],
    tuner: Any,
    lora_config: Any,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Make a LoRA layer of rank ``num_experts * r`` with a router in its bottleneck."""
    if not isinstance(lora_config, MoELoraConfig) or not _is_stack(lora_config):
        original(tuner, lora_config, adapter_name, target, target_name, parent, *args, **kwargs)
        return
    _check_base_layer(target, kwargs.get("current_key", target_name), lora_config)
    stacked = _stacked_config(lora_config)
    original(tuner, stacked, adapter_name, target, target_name, parent, *args, **kwargs)
    # dispatching corrects this field for Conv1D bases; it is saved with the adapter
    lora_config.fan_in_fan_out = stacked.fan_in_fan_out
    layer = getattr(parent, target_name)
    _add_mixture(layer, adapter_name, lora_config)
    # PEFT leaves new layers in training mode, where capacity would make rows depend on each other
    layer.train(tuner.model.training)
    if lora_config.has_router:
        features = _router_features(tuner, lora_config, kwargs.get("current_key", target_name))
        if features is not None:
            router = _add_router(layer, adapter_name, lora_config, features)
            if router.mature is not None and _comes_later(tuner, adapter_name, lora_config):
                nn.init.zeros_(router.mature)


def _stacked_config(config: MoELoraConfig) -> MoELoraConfig:
    """The config of the one LoRA that holds all experts, each keeping its own scaling."""
    experts = config.num_experts
    # rsLoRA divides by sqrt(r), so the total rank's root is what alpha has to make up for
    alpha_factor = math.sqrt(experts) if config.use_rslora else experts
    stacked = copy.copy(config)
    stacked.r = config.r * experts
    stacked.lora_alpha = config.lora_alpha * alpha_factor  # type: ignore[assignment]
    stacked.rank_pattern = {k: v * experts for k, v in (config.rank_pattern or {}).items()}
    stacked.alpha_pattern = {k: v * alpha_factor for k, v in (config.alpha_pattern or {}).items()}
    return stacked


def _add_mixture(layer: Any, adapter_name: str, config: MoELoraConfig) -> None:
    """Give a freshly stacked adapter its spec and its router."""
    if "moe_mixtures" not in layer.__dict__:
        layer.moe_mixtures = {}
        layer.other_param_names = (*layer.other_param_names, "moe_mixtures")
    layer.moe_mixtures[adapter_name] = MixtureSpec.from_config(config)
    if config.init_lora_weights == "gaussian" and adapter_name in layer.lora_A:
        # PEFT's deviation is 1 / rank; an expert's own rank is what a single LoRA would have used
        std = config.num_experts / layer.r[adapter_name]
        if layer.lora_A[adapter_name].weight.device.type != "meta":
            nn.init.normal_(layer.lora_A[adapter_name].weight, std=std)


_ROUTED_BLOCKS = "_moelora_routed_blocks"


def _router_features(tuner: Any, config: MoELoraConfig, name: str) -> int | None:
    """Width of what the layer's router reads; 0 for the layer's own input, None for no router.

    A router that several layers share lies in the first of them.

    Raises:
        UnsupportedLayerError: if a shared router would decide over other tokens than the layer's.
    """
    if config.router_scope == "module":
        return 0
    block = block_of(name, module_lists(tuner.model))
    if config.router_scope == "layer" and block is None:
        raise UnsupportedLayerError(
            f"Layer {name!r} lies in no transformer block, so router_scope='layer' has no router "
            "for it. Leave it out of target_modules, or use router_scope='module'."
        )
    if is_encoder_decoder(tuner.model) and (
        config.router_scope == "model" or reads_other_tokens(name)
    ):
        raise UnsupportedLayerError(
            f"Layer {name!r} of an encoder-decoder model reads other tokens than the router of "
            f"router_scope={config.router_scope!r}. Use router_scope='module'."
        )
    routed: set[str] = tuner.__dict__[_ROUTED_BLOCKS]
    key = "" if config.router_scope == "model" or block is None else block[0]
    if key in routed:
        return None
    routed.add(key)
    return hidden_size_of(tuner.model)


def _comes_later(tuner: Any, adapter_name: str, config: MoELoraConfig) -> bool:
    """Whether an adapter joins others that are routed already; a saved one keeps its maturity."""
    others = [name for name in tuner.peft_config if name != adapter_name]
    return config.joins_mixture and any(_has_router(tuner, name) for name in others)


def _add_router(
    layer: Any, adapter_name: str, config: MoELoraConfig, features: int
) -> ModuleRouter:
    is_embedding = adapter_name in layer.lora_embedding_A
    weight = (
        layer.lora_embedding_A[adapter_name] if is_embedding else layer.lora_A[adapter_name].weight
    )
    if "lora_router" not in layer._modules:
        layer.lora_router = nn.ModuleDict()
        layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_router")
    router = ModuleRouter(
        in_features=features or weight.shape[1],
        num_experts=config.num_experts,
        hidden_size=config.router_hidden_size,
        track_maturity=config.router_type == "learned_with_maturity",
        reads_indices=is_embedding and not features,
        expert_dropout=float(config.expert_dropout),
    )
    if weight.device.type != "meta":
        router = router.to(device=weight.device, dtype=weight.dtype)
    layer.lora_router[adapter_name] = router
    layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)
    return router


def mark_mature(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    experts: Iterable[Any] | None = None,
    mature: bool = True,
) -> None:
    """Mark experts of a mixture with ``router_type="learned_with_maturity"`` as mature (or young).

    While any active expert is immature all experts share every token; once all are mature, tokens
    are routed to their top k.

    Args:
        model: a PEFT model or any module that holds the mixture's layers.
        adapter_name: the mixture.
        experts: indices of the experts; None for all of them.
        mature: False makes them young again.

    Raises:
        ConfigError: if no layer has such a mixture, or an index is out of range; nothing is changed
            then.
    """
    routers: list[Any] = [
        _routers_of(module)[adapter_name]
        for module in model.modules()
        if isinstance(module, _peft.LoraLayer) and adapter_name in _routers_of(module)
    ]
    buffers = [router.mature for router in routers if router.mature is not None]
    if not buffers:
        raise ConfigError(
            f"No mixture {adapter_name!r} with router_type='learned_with_maturity' in this model."
        )
    number = buffers[0].shape[0]
    chosen = list(range(number)) if experts is None else list(experts)
    for index in chosen:
        if not is_int(index) or not 0 <= index < number:
            raise ConfigError(f"experts must be in [0, {number}), got {index!r}.")
    with torch.no_grad():
        for buffer in buffers:
            buffer[chosen] = mature


def _routers_of(layer: Any) -> Any:
    return layer._modules.get("lora_router", ())


def _take_maturity(tuner: Any, adapter_name: str, config: MoELoraConfig) -> None:
    """Give an adapter that is added with another one's own config object that one's maturity.

    So TRL makes the reference of a trained adapter, and copies its parameters only. Adapters that
    join a mixture may well share a config, and are young when they come.
    """
    if config.joins_mixture:
        return
    others = [name for name, other in tuner.peft_config.items() if other is config]
    other = next((name for name in others if name != adapter_name), None)
    if other is None or config.router_type != "learned_with_maturity":
        return
    for module in tuner.model.modules():
        routers: Any = _routers_of(module) if isinstance(module, _peft.LoraLayer) else ()
        if adapter_name in routers and other in routers:
            mature, source = routers[adapter_name].mature, routers[other].mature
            if mature.device.type != "meta" and source.device.type != "meta":
                mature.copy_(source)


# Merging -------------------------------------------------------------------------------------


def get_delta_weight(
    original: Callable[..., Tensor], layer: Any, adapter: str, *args: Any, **kwargs: Any
) -> Tensor:
    """The merged update of an adapter: for fixed routing the weighted sum of its experts.

    Raises:
        MergeError: for learned routing, whose update depends on the token.
    """
    spec = mixtures_of(layer).get(adapter)
    if spec is None or not spec.routed:
        return original(layer, adapter, *args, **kwargs)
    if spec.has_router:
        raise MergeError(_no_merged_weight([adapter]))
    with _weighted_rows(layer, adapter, spec):
        return original(layer, adapter, *args, **kwargs)


@contextmanager
def _weighted_rows(layer: Any, adapter: str, spec: MixtureSpec) -> Iterator[None]:
    """Let A's rows carry their expert's fixed weight while PEFT multiplies B and A."""
    is_embedding = adapter in layer.lora_embedding_A
    holder = layer.lora_embedding_A if is_embedding else layer.lora_A[adapter]
    name = adapter if is_embedding else "weight"
    parameter = holder[name] if is_embedding else holder.weight
    weights = parameter.new_tensor(spec.fixed_weights)
    factors = weights.repeat_interleave(parameter.shape[0] // spec.num_experts)
    weighted = parameter.detach() * factors.reshape(-1, *(1,) * (parameter.ndim - 1))
    _set_parameter(holder, name, nn.Parameter(weighted, requires_grad=False))
    try:
        yield
    finally:
        _set_parameter(holder, name, parameter)


def _set_parameter(holder: Any, name: str, parameter: nn.Parameter) -> None:
    if isinstance(holder, nn.ParameterDict):
        holder[name] = parameter
    else:
        holder.weight = parameter


def unload_and_optionally_merge(
    original: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any
) -> nn.Module:
    """Refuse to merge learned routing before the first layer is touched; take our hooks along."""
    call = inspect.signature(original).bind(tuner, *args, **kwargs)
    call.apply_defaults()
    if call.arguments["merge"]:
        _check_mergeable(tuner, call.arguments["adapter_names"])
    base: nn.Module = original(tuner, *args, **kwargs)
    unbind(base)
    return base


def delete_adapter(original: Callable[..., None], tuner: Any, *args: Any, **kwargs: Any) -> None:
    """Delete as PEFT does; without its last router the model tells of none."""
    original(tuner, *args, **kwargs)
    announce(tuner.model, tuner.peft_config)


def check_mixed_config(original: Callable[..., Any], tuner: Any, config: Any) -> None:
    """Refuse a mixture in a PeftMixedModel, whose layers moelora does not serve."""
    if isinstance(config, MoELoraConfig) and _is_stack(config):
        raise UnsupportedLayerError(
            "A mixture cannot be part of a PeftMixedModel (mixed=True). Use get_peft_model(..., "
            "mixed=False); plain LoRA adapters can be added beside it."
        )
    original(tuner, config)


def merge_adapter(
    original: Callable[..., Any],
    tuner: Any,
    adapter_names: list[str] | None = None,
    **kwargs: Any,
) -> None:
    """Refuse to merge learned routing before the first layer is touched."""
    _check_mergeable(tuner, adapter_names)
    original(tuner, adapter_names, **kwargs)


def _check_mergeable(tuner: Any, adapter_names: list[str] | None) -> None:
    if tuner.model.__dict__.get(ATTACHED) is not None:
        raise MergeError(
            "Adapters that an attached router weighs token by token have no single merged weight. "
            "Call detach_router() first, to merge their plain sum."
        )
    names = tuner.active_adapters if adapter_names is None else adapter_names
    learned = [name for name in names if _has_router(tuner, name)]
    if learned:
        raise MergeError(_no_merged_weight(learned))


def _has_router(tuner: Any, name: str) -> bool:
    config = tuner.peft_config.get(name)
    return isinstance(config, MoELoraConfig) and config.has_router


def _no_merged_weight(names: list[str]) -> str:
    return (
        f"Adapter(s) {names} cannot be merged: a routed mixture has no single merged weight, its "
        "update depends on the token. Keep the adapter unmerged, or use router_type='fixed'."
    )


def no_conversion(name: str) -> str:
    """Why a mixture cannot be turned into the difference to its initial values."""
    return (
        f"Adapter {name!r} is a mixture of experts, whose update cannot be converted by "
        "subtracting its initial values."
    )


def subtract_mutated_init(
    original: Callable[..., Any],
    tuner: Any,
    output_state_dict: dict[str, Tensor],
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Refuse mixtures: concatenated stacks would interleave the ranks of different experts."""
    config = tuner.peft_config.get(adapter_name)
    if isinstance(config, MoELoraConfig) and _is_stack(config):
        raise MergeError(no_conversion(adapter_name))
    return original(tuner, output_state_dict, adapter_name, *args, **kwargs)


def supports_lora_conversion(
    original: Callable[..., bool], tuner: Any, adapter_name: str = "default"
) -> bool:
    """A learned mixture is no LoRA of any rank."""
    return not _has_router(tuner, adapter_name) and original(tuner, adapter_name)


def pad_lora_weights(
    original: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Refuse to pad stacked ranks at their end, which would move experts into each other.

    Raises:
        UnsupportedLayerError: naming the mixtures.
    """
    layers = [module for module in model.modules() if isinstance(module, _peft.LoraLayer)]
    stacked = sorted({name for layer in layers for name in mixtures_of(layer)})
    if stacked:
        raise UnsupportedLayerError(
            f"Adapter(s) {stacked} are mixtures of experts and cannot be padded to another rank."
        )
    return original(model, *args, **kwargs)


def add_weighted_adapter(
    original: Callable[..., Any], tuner: Any, adapters: list[str], *args: Any, **kwargs: Any
) -> None:
    """Refuse mixtures, whose stacked tensors are no single LoRA's."""
    mixtures = [
        name
        for name in adapters
        if isinstance(tuner.peft_config.get(name), MoELoraConfig)
        and _is_stack(tuner.peft_config[name])
    ]
    if mixtures:
        raise MergeError(
            f"Adapter(s) {mixtures} are mixtures of experts and cannot be combined by "
            "add_weighted_adapter: activate them together instead, set_adapter([...])."
        )
    original(tuner, adapters, *args, **kwargs)
