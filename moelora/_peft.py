"""The boundary: the one file that imports PEFT and the only one that changes it.

What registration can do is registered. What it cannot do is in ``_patches``: each entry names the
class or module, the attribute, and what replaces it; ``install`` checks every original signature
before it changes anything, ``uninstall`` puts the same objects back. Plain LoRA calls reach the
originals.

Upstream issues: huggingface/peft #1156, #1472, #2330; what PEFT would need: docs/upstream.md.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import peft
import peft.tuners.lora
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.adalora import AdaLoraLayer, AdaLoraModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import (
    VARIANT_KWARG_KEYS,
    LoraLayer,
    MultiheadAttention,
    ParamWrapper,
)
from peft.tuners.lora.layer import _ConvNd as ConvLayer
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    PeftType,
    get_peft_model_state_dict,
    hotswap,
    set_peft_model_state_dict,
    transformers_weight_conversion,
)
from peft.utils.other import _get_submodules as get_submodules
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel
from transformers.generation.continuous_batching import ContinuousMixin

from moelora.errors import IncompatiblePeftError

__all__ = [
    "CONFIG_NAME",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "SAFETENSORS_WEIGHTS_NAME",
    "UNROUTABLE_VARIANTS",
    "VARIANT_KWARG_KEYS",
    "WEIGHTS_NAME",
    "WHOLE_WEIGHT_LAYERS",
    "AdaLoraLayer",
    "AdaLoraModel",
    "BaseTuner",
    "BaseTunerLayer",
    "ConvLayer",
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "ParamWrapper",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "check_target_module_exists",
    "get_pattern_key",
    "get_peft_model",
    "get_peft_model_state_dict",
    "get_submodules",
    "install",
    "is_installed",
    "set_peft_model_state_dict",
    "uninstall",
]

#: Tested PEFT releases: from the first included to the second excluded.
PEFT_RANGE = ("0.21.0", "0.22.0")

#: Layers that use their whole adapted weight at once and so cannot weigh tokens.
WHOLE_WEIGHT_LAYERS = (MultiheadAttention, ParamWrapper)

#: LoRA variants that are no update of one adapter.
UNROUTABLE_VARIANTS = frozenset({"ArrowLinearVariant"})

_MISSING = object()
_Parameters: TypeAlias = tuple[str, ...] | None
_Row: TypeAlias = tuple[Any, str, Callable[..., Any], Any, _Parameters]
_lock = threading.RLock()
_undo: list[Callable[[], None]] = []


@dataclass(frozen=True)
class _Patch:
    """Replace ``owner.name`` by ``make(original)``.

    ``parameters`` are the leading parameter names the original must have; None where the owner
    defines no such attribute itself and inherits it.
    """

    owner: Any
    name: str
    make: Callable[[Any], Any]
    parameters: tuple[str, ...] | None


def is_installed() -> bool:
    """Whether the plugin is in effect."""
    # not bool(): torch.compile of torch 2.11 and older cannot trace that of a list
    return len(_undo) > 0


def install() -> None:
    """Add moelora to PEFT: registries, the forward argument, the layer classes. Idempotent.

    Raises:
        IncompatiblePeftError: an ``ImportError``, if the installed PEFT is outside ``PEFT_RANGE``
            or a patched function has other parameters than the tested ones; nothing is changed
            then.
    """
    with _lock:
        if _undo:
            return
        _check_version(peft.__version__)
        patches = list(_patches())
        for patch in patches:
            _check_signature(patch)
        for patch in patches:
            _apply(patch)
        _register()


def uninstall() -> None:
    """Restore every class, function and mapping to the same objects as before ``install``.

    Models made in between keep their layers; their mixtures are no longer routed.
    """
    with _lock:
        while _undo:
            _undo.pop()()


def _check_version(version: str) -> None:
    lowest, beyond = map(Version, PEFT_RANGE)
    # a development version counts as the release it will become
    if not lowest <= Version(Version(version).base_version) < beyond:
        raise IncompatiblePeftError(
            f"moelora supports peft>={PEFT_RANGE[0]},<{PEFT_RANGE[1]}, but peft {version} is "
            f"installed. Install a supported release: pip install 'peft>={PEFT_RANGE[0]},"
            f"<{PEFT_RANGE[1]}'."
        )


def _check_signature(patch: _Patch) -> None:
    if patch.parameters is None:
        return
    original = inspect.getattr_static(patch.owner, patch.name, None)
    function = getattr(original, "__func__", original)
    found = tuple(inspect.signature(function).parameters) if callable(function) else ()
    if found[: len(patch.parameters)] != patch.parameters:
        raise IncompatiblePeftError(
            f"{patch.owner.__name__}.{patch.name} of peft {peft.__version__} has parameters "
            f"{found}, moelora was tested with {patch.parameters}."
        )


def _apply(patch: _Patch) -> None:
    own = vars(patch.owner).get(patch.name, _MISSING)
    original = getattr(patch.owner, patch.name, None) if own is _MISSING else own
    setattr(patch.owner, patch.name, patch.make(original))
    _undo.append(functools.partial(_restore, patch.owner, patch.name, own))


def _restore(owner: Any, name: str, own: Any) -> None:
    if own is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, own)


def _register() -> None:
    """Make the config known: by its type on disk, and by name in PEFT's public modules."""
    from moelora.config import DISK_PEFT_TYPE, ROUTING_FIELDS, MoELoraConfig
    from moelora.router_request import announce_again, withdraw_all

    announce_again()
    _undo.append(withdraw_all)
    registries: tuple[tuple[dict[Any, Any], type], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, MoELoraConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, LoraModel),
    )
    for registry, value in registries:
        registry[DISK_PEFT_TYPE] = value
        _undo.append(functools.partial(registry.pop, DISK_PEFT_TYPE, None))
    # what has to agree before one mixture is swapped for another in place
    keys = hotswap.CONFIG_KEYS_TO_CHECK
    before = keys[PeftType.LORA]
    keys[PeftType.LORA] = [*before, "num_experts", *ROUTING_FIELDS]
    _undo.append(functools.partial(keys.__setitem__, PeftType.LORA, before))
    for module in (peft, peft.tuners, peft.tuners.lora):
        vars(module)["MoELoraConfig"] = MoELoraConfig
        _undo.append(functools.partial(delattr, module, "MoELoraConfig"))


def _patches() -> Iterator[_Patch]:
    """Every change to a foreign class or module, in one list."""
    yield from _layer_patches()
    for owner, name, wrap, replacement, parameters in _table():
        yield _Patch(owner, name, functools.partial(wrap, replacement), parameters)


def _table() -> Iterator[_Row]:
    """Owner, attribute, how it is wrapped, by what, and the original's leading parameters."""
    from moelora import attached, checkpoint, continuous, fused_experts, mixture, model

    generating: list[type] = [
        cls for cls in (PeftModel, *_subclasses(PeftModel)) if "generate" in vars(cls)
    ]
    for cls in generating:
        yield cls, "generate", _method, model.generate_with_routing, ("self",)
    callers: tuple[type, ...] = (PeftModel, PeftMixedModel, BaseTuner)
    for cls in callers:
        yield cls, "__call__", _method, model.call_with_routing, None
    holders: tuple[type, ...] = (LoraModel, PeftModel)
    for cls in holders:
        yield cls, "router", _added, property(attached.get_router), None
        yield cls, "moe_config", _added, property(attached.get_moe_config), None
        for method in (
            attached.attach_router,
            attached.detach_router,
            attached.has_router,
            attached.get_routing_weights,
        ):
            yield cls, method.__name__, _added, method, None
    methods: tuple[tuple[str, Any, _Parameters], ...] = (
        ("generate", model.generate_with_routing, None),
        ("inject_adapter", mixture.inject_adapter, None),
        (
            "_create_and_replace",
            mixture.create_and_replace,
            ("self", "lora_config", "adapter_name"),
        ),
        ("_enable_peft_forward_hooks", model.enable_forward_hooks, ("self",)),
        ("_unload_and_optionally_merge", mixture.unload_and_optionally_merge, None),
        ("merge_adapter", mixture.merge_adapter, None),
        ("delete_adapter", mixture.delete_adapter, ("self", "adapter_name")),
        ("add_weighted_adapter", mixture.add_weighted_adapter, ("self", "adapters", "weights")),
        ("subtract_mutated_init", mixture.subtract_mutated_init, ("self", "output_state_dict")),
        ("supports_lora_conversion", mixture.supports_lora_conversion, None),
    )
    for name, function, parameters in methods:
        yield LoraModel, name, _method, function, parameters
    state_dict = ("cls", "model", "config", "adapter_name", "state_dict")
    for name, function in (
        ("_get_adapter_state_dict", checkpoint.get_adapter_state_dict),
        ("_remap_adapter_state_dict_for_load", checkpoint.remap_adapter_state_dict_for_load),
    ):
        yield LoraModel, name, _classmethod, function, state_dict
    others: tuple[_Row, ...] = (
        (PeftModel, "save_pretrained", _method, checkpoint.save_pretrained, ("self",)),
        (PeftModel, "load_adapter", _method, checkpoint.load_adapter, ("self", "model_id")),
        (PeftModel, "from_pretrained", _classmethod, checkpoint.from_pretrained, ("cls", "model")),
        (MixedModel, "_check_new_adapter_config", _method, mixture.check_mixed_config, ("self",)),
        (hotswap, "_pad_lora_weights", _function, mixture.pad_lora_weights, ("model",)),
        (
            transformers_weight_conversion,
            "convert_peft_config_for_transformers",
            _function,
            fused_experts.convert_config,
            ("peft_config", "model", "conversions"),
        ),
        (
            hotswap,
            "hotswap_adapter_from_state_dict",
            _function,
            checkpoint.hotswap_adapter_from_state_dict,
            ("model", "state_dict", "adapter_name", "config"),
        ),
        (
            PreTrainedModel,
            "_set_gradient_checkpointing",
            _method,
            model.set_gradient_checkpointing,
            ("self", "enable", "gradient_checkpointing_func"),
        ),
        (
            ContinuousMixin,
            "init_continuous_batching",
            _method,
            continuous.init_continuous_batching,
            ("self",),
        ),
        (ContinuousMixin, "generate_batch", _method, continuous.generate_batch, ("self", "inputs")),
        (PreTrainedModel, "load_adapter", _method, checkpoint.load_adapter_into_base, ("self",)),
    )
    yield from others


def _layer_patches() -> Iterator[_Patch]:
    """The forward of every LoRA layer class, of those to come too, and the merged weight.

    And activating adapters, which leaves frozen ones frozen.
    """
    from moelora import frozen

    for layer_class in [LoraLayer, *_subclasses(LoraLayer)]:
        if issubclass(layer_class, AdaLoraLayer):
            continue
        yield from _patches_of_layer_class(layer_class)
    yield _Patch(LoraLayer, "__init_subclass__", _init_subclass, None)
    make = functools.partial(_method, frozen.set_adapter)
    yield _Patch(LoraLayer, "set_adapter", make, ("self", "adapter_names"))
    make = functools.partial(_method, frozen.delete_adapter)
    yield _Patch(LoraLayer, "delete_adapter", make, ("self", "adapter_name"))


def _patches_of_layer_class(layer_class: type) -> Iterator[_Patch]:
    from moelora import mixture

    if "forward" in vars(layer_class):
        yield _Patch(layer_class, "forward", _routed_forward, ("self",))
    if "get_delta_weight" in vars(layer_class):
        make = functools.partial(_method, mixture.get_delta_weight)
        yield _Patch(layer_class, "get_delta_weight", make, ("self",))


def _init_subclass(_original: Any) -> Any:
    """Serve LoRA layer classes that are defined later (bitsandbytes', a user's own)."""

    def __init_subclass__(cls: type, **kwargs: Any) -> None:
        super(LoraLayer, cls).__init_subclass__(**kwargs)  # type: ignore[misc]
        if issubclass(cls, AdaLoraLayer):
            return
        with _lock:
            for patch in _patches_of_layer_class(cls):
                _apply(patch)

    return classmethod(__init_subclass__)  # type: ignore[arg-type]


def _routed_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    from moelora.layer import needs_routing, routed_forward
    from moelora.routed_layer import has_plan

    first = list(inspect.signature(original).parameters)[1]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # a layer with a plan was routed before; whether it still is comes out with the plan
        if not has_plan(self) and not needs_routing(self, kwargs):
            return original(self, *args, **kwargs)
        if not args:
            args = (kwargs.pop(first),)
        return routed_forward(original, self, *args, **kwargs)

    return forward


def _added(addition: Any, _original: Any) -> Any:
    """An attribute that the owner did not have."""
    return addition


def _method(
    replacement: Callable[..., Any], original: Callable[..., Any] | None
) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(original, self, *args, **kwargs)

    return method if original is None else functools.wraps(original)(method)


def _function(replacement: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    return function


def _classmethod(replacement: Callable[..., Any], original: Any) -> Any:
    function = original.__func__

    @functools.wraps(function)
    def method(cls: type, *args: Any, **kwargs: Any) -> Any:
        return replacement(function, cls, *args, **kwargs)

    return classmethod(method)


def _subclasses(cls: type) -> list[type]:
    """All subclasses, each once."""
    found: dict[type, None] = {}
    subclass: type
    for subclass in cls.__subclasses__():
        found[subclass] = None
        found.update(dict.fromkeys(_subclasses(subclass)))
    return list(found)
