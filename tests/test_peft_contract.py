"""What moelora relies on in PEFT, transformers, accelerate and torch that they do not promise.

A new release that moves one of these fails here first, by name. Every private name in ``moelora/``
has to be in the table.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import peft
import peft.tuners.lora.layer as layers
import peft.tuners.lora.variants as variants
import peft.utils.hotswap
import peft.utils.other
import pytest
import torch
import transformers
from accelerate.state import GradientState
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

import moelora
from moelora import _peft, first_pass
from tests.lm import lora_layers, tiny_llama
from tests.models import LAYER_KINDS, Block, lora_config

PACKAGE = Path(moelora.__file__).parent
VERSIONS = (
    f"peft {peft.__version__}, transformers {transformers.__version__}, "
    f"accelerate {accelerate.__version__}, torch {torch.__version__}"
)


@dataclass(frozen=True)
class Function:
    """A function we call or replace: where it is and the parameters it must begin with.

    Attributes:
        owner: the class or module.
        name: the function.
        parameters: its leading parameters.
        use: what moelora does with it.
    """

    owner: Any
    name: str
    parameters: tuple[str, ...]
    use: str

    def __str__(self) -> str:
        return f"{self.owner.__name__.rsplit('.', 1)[-1]}.{self.name}"


FUNCTIONS = [
    # replaced, see moelora/_peft.py
    Function(
        LoraModel,
        "_create_and_replace",
        ("self", "lora_config", "adapter_name", "target", "target_name", "parent"),
        "makes stacked layers",
    ),
    Function(
        LoraModel,
        "_unload_and_optionally_merge",
        ("self", "merge", "progressbar", "safe_merge", "adapter_names"),
        "refuses to merge learned routing",
    ),
    Function(
        LoraModel, "inject_adapter", ("self", "model", "adapter_name"), "tells layers their place"
    ),
    Function(
        LoraModel, "merge_adapter", ("self", "adapter_names"), "refuses to merge learned routing"
    ),
    Function(
        LoraModel, "add_weighted_adapter", ("self", "adapters", "weights"), "refuses mixtures"
    ),
    Function(
        LoraModel,
        "_get_adapter_state_dict",
        ("cls", "model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"),
        "selects an adapter's tensors",
    ),
    Function(
        LoraModel,
        "_remap_adapter_state_dict_for_load",
        ("cls", "model", "config", "adapter_name", "state_dict"),
        "checks tensors before they are loaded",
    ),
    Function(MixedModel, "_check_new_adapter_config", ("self", "config"), "refuses mixtures"),
    Function(
        PeftModel,
        "save_pretrained",
        ("self", "save_directory", "safe_serialization", "selected_adapters"),
        "writes the router",
    ),
    Function(PeftModel, "load_adapter", ("self", "model_id", "adapter_name"), "checks files"),
    Function(
        PeftModel, "from_pretrained", ("cls", "model", "model_id", "adapter_name"), "checks files"
    ),
    Function(peft.PeftModelForCausalLM, "generate", ("self",), "takes weights"),
    Function(peft.PeftModelForSeq2SeqLM, "generate", ("self",), "takes weights"),
    Function(
        PreTrainedModel,
        "_set_gradient_checkpointing",
        ("self", "enable", "gradient_checkpointing_func"),
        "scopes recomputation",
    ),
    Function(PreTrainedModel, "load_adapter", ("self", "peft_model_id"), "checks files"),
    Function(layers.Linear, "forward", ("self", "x"), "routes"),
    Function(layers.Embedding, "forward", ("self", "x"), "routes"),
    Function(layers._ConvNd, "forward", ("self", "x"), "routes"),
    Function(layers.MultiheadAttention, "forward", ("self", "query"), "routes constant weights"),
    Function(layers.ParamWrapper, "forward", ("self", "x"), "refuses"),
    Function(layers.Linear, "get_delta_weight", ("self", "adapter"), "weighs fixed routing"),
    Function(layers.Embedding, "get_delta_weight", ("self", "adapter"), "weighs fixed routing"),
    Function(layers._ConvNd, "get_delta_weight", ("self", "adapter"), "weighs fixed routing"),
    Function(
        layers.MultiheadAttention, "get_delta_weight", ("self", "adapter"), "constant weights"
    ),
    Function(LoraModel, "subtract_mutated_init", ("self", "output_state_dict"), "refuses mixtures"),
    Function(
        peft.utils.hotswap,
        "hotswap_adapter_from_state_dict",
        ("model", "state_dict", "adapter_name", "config"),
        "checks tensors before they are swapped",
    ),
    Function(
        peft.utils.hotswap,
        "_pad_lora_weights",
        ("model", "target_rank"),
        "refuses to pad a stack of experts",
    ),
    # called
    Function(layers.LoraLayer, "_cast_input_dtype", ("self", "x", "dtype"), "casts as PEFT does"),
    Function(
        layers.Embedding,
        "_embed",
        ("self", "input", "weight", "input_fn", "output_fn"),
        "embeds a stack",
    ),
    Function(layers.Embedding, "_get_embed_scale", ("self",), "scaled embeddings"),
    Function(
        layers.LoraVariant,
        "forward",
        ("module", "active_adapter", "x", "result"),
        "weighs a variant",
    ),
    Function(
        LoraModel, "_check_target_module_exists", ("peft_config", "key"), "checks all targets first"
    ),
    Function(
        BaseTunerLayer,
        "set_adapter",
        ("self", "adapter_names", "inference_mode"),
        "flags of a new router",
    ),
    Function(peft.utils.other, "_get_submodules", ("model", "key"), "finds layers"),
    Function(PeftConfig, "from_peft_type", (), "reads a config's fields"),
    # relied on
    Function(
        LoraModel,
        "_enable_peft_forward_hooks",
        ("self",),
        "is not entered for refused adapter_names",
    ),
    Function(
        nn.Module,
        "register_load_state_dict_pre_hook",
        ("self", "hook"),
        "state dicts with a router",
    ),
    Function(
        nn.Module,
        "register_forward_hook",
        ("self", "hook", "prepend", "with_kwargs", "always_call"),
        "closes a forward",
    ),
    Function(
        nn.Module,
        "register_forward_pre_hook",
        ("self", "hook", "prepend", "with_kwargs"),
        "opens a forward",
    ),
]


@pytest.mark.parametrize("entry", FUNCTIONS, ids=str)
def test_a_function_is_where_it_was_with_its_parameters(entry: Function) -> None:
    found = inspect.getattr_static(entry.owner, entry.name, None)
    assert found is not None, f"{entry} is gone ({VERSIONS}); moelora uses it: {entry.use}"
    function = inspect.unwrap(getattr(found, "__func__", found))
    parameters = tuple(inspect.signature(function).parameters)
    leading = tuple(name for name in parameters if name not in ("args", "kwargs"))
    assert leading[: len(entry.parameters)] == entry.parameters, (
        f"{entry} has parameters {parameters}, was {entry.parameters} ({VERSIONS}); moelora uses "
        f"it: {entry.use}"
    )


# Attributes of instances -----------------------------------------------------------------------


def adapted(kind: str) -> Any:
    """A plain LoRA layer of this kind."""
    model = get_peft_model(Block(LAYER_KINDS[kind].make()), lora_config())
    return model.base_model.model.layer


def attention() -> Any:
    """An adapted nn.MultiheadAttention."""
    base = Block(nn.MultiheadAttention(8, 2))
    return get_peft_model(base, LoraConfig(target_modules=["layer"])).base_model.model.layer


def checkpointing_block() -> Any:
    """A block of a model that checkpoints."""
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    return model.model.layers[0]


def tuner() -> Any:
    """A LoraModel."""
    return get_peft_model(Block(nn.Linear(6, 5)), lora_config()).base_model


def accelerate_state() -> Any:
    """The singleton in which accelerate keeps gradient accumulation."""
    return GradientState


@dataclass(frozen=True)
class Attribute:
    """An attribute we read: of what, its name and its type."""

    make: Callable[[], Any]
    name: str
    type: type | tuple[type, ...]

    def __str__(self) -> str:
        return f"{self.make.__name__}.{self.name}"


def linear() -> Any:
    return adapted("Linear")


def embedding() -> Any:
    return adapted("Embedding")


def convolution() -> Any:
    return adapted("Conv2d")


def module() -> Any:
    return nn.Linear(1, 1)


ATTRIBUTES = [
    *(
        Attribute(linear, name, kind)
        for name, kind in {
            "base_layer": nn.Module,
            "lora_A": nn.ModuleDict,
            "lora_B": nn.ModuleDict,
            "lora_embedding_A": nn.ParameterDict,
            "lora_embedding_B": nn.ParameterDict,
            "lora_dropout": nn.ModuleDict,
            "lora_variant": dict,
            "scaling": dict,
            "r": dict,
            "adapter_layer_names": tuple,
            "other_param_names": tuple,
            "active_adapters": list,
            "merged": bool,
            "merged_adapters": list,
            "disable_adapters": bool,
        }.items()
    ),
    Attribute(embedding, "input_fns", dict),
    Attribute(embedding, "output_fns", dict),
    Attribute(convolution, "_kernel_dim", int),
    Attribute(attention, "base_layer", nn.MultiheadAttention),
    Attribute(tuner, "model", nn.Module),
    Attribute(tuner, "peft_config", dict),
    Attribute(tuner, "active_adapters", list),
    Attribute(checkpointing_block, "_gradient_checkpointing_func", object),
    Attribute(accelerate_state, "_shared_state", dict),
    Attribute(module, "_modules", dict),
    Attribute(module, "_forward_hooks", dict),
    Attribute(module, "_forward_pre_hooks", dict),
    Attribute(module, "_forward_hooks_with_kwargs", dict),
    Attribute(module, "_forward_hooks_always_called", dict),
    Attribute(module, "_forward_pre_hooks_with_kwargs", dict),
]


@pytest.mark.parametrize("entry", ATTRIBUTES, ids=str)
def test_an_attribute_is_where_it_was(entry: Attribute) -> None:
    owner = entry.make()
    assert hasattr(owner, entry.name), f"{entry} is gone ({VERSIONS})"
    value = getattr(owner, entry.name)
    assert isinstance(value, entry.type), f"{entry} is a {type(value).__name__} ({VERSIONS})"


def test_a_kernel_has_two_axes_more_than_space() -> None:
    for kind, space in (("Conv1d", 1), ("Conv2d", 2), ("Conv3d", 3)):
        assert adapted(kind)._kernel_dim == space + 2, VERSIONS


def test_an_adapted_attention_adapts_its_output_projection() -> None:
    layer = attention()
    assert isinstance(layer.base_layer.out_proj, layers.Linear), VERSIONS
    assert layer.base_layer.in_proj_weight is not None


def test_the_checkpointing_function_lies_in_each_block() -> None:
    block = checkpointing_block()
    assert "_gradient_checkpointing_func" in vars(block), VERSIONS
    assert callable(block._gradient_checkpointing_func)


def test_a_fresh_embedding_has_no_functions_of_a_quantised_kind() -> None:
    assert embedding().input_fns.get("default") is None
    assert embedding()._get_embed_scale() is None


# Values ----------------------------------------------------------------------------------------


def test_the_arguments_of_variants_are_the_known_ones() -> None:
    assert list(layers.VARIANT_KWARG_KEYS) == ["alora_offsets"], VERSIONS


def test_the_variant_that_cannot_be_routed_has_its_name() -> None:
    for name in _peft.UNROUTABLE_VARIANTS:
        assert issubclass(getattr(variants, name), layers.LoraVariant), VERSIONS


def test_layers_that_use_their_whole_weight_are_the_known_ones() -> None:
    assert set(_peft.WHOLE_WEIGHT_LAYERS) == {layers.MultiheadAttention, layers.ParamWrapper}
    assert issubclass(layers.Conv1d, layers._ConvNd)
    assert issubclass(layers.Conv3d, layers._ConvNd)


def test_file_names_are_pefts() -> None:
    names = (_peft.CONFIG_NAME, _peft.SAFETENSORS_WEIGHTS_NAME, _peft.WEIGHTS_NAME)
    assert names == ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def test_lora_is_registered_with_its_classes() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is LoraModel
    assert PeftType.LORA.value == "LORA"
    assert "MOELORA" not in PeftType.__members__, "PEFT has a type of our name now"


def test_hot_swapping_compares_the_fields_it_lists() -> None:
    keys = peft.utils.hotswap.CONFIG_KEYS_TO_CHECK
    assert {"use_rslora", "lora_dropout", "alpha_pattern", "use_dora"} <= set(keys[PeftType.LORA])


def test_calling_a_peft_model_goes_through_modules_call() -> None:
    # __call__ is added where it was inherited
    for owner in (PeftModel, PeftMixedModel, BaseTuner):
        found = inspect.unwrap(vars(owner)["__call__"])
        assert found in (nn.Module.__call__, inspect.unwrap(nn.Module.__call__)), owner


def test_nothing_of_our_names_is_pefts_own() -> None:
    """An attribute that PEFT adds under a name of ours would be hidden."""
    names = ("router", "moe_config", "attach_router", "detach_router", "get_routing_weights")
    owners = (PeftModel, LoraModel)
    moelora.uninstall()
    try:
        taken = [f"{o.__name__}.{name}" for o in owners for name in names if hasattr(o, name)]
        fields = set(inspect.signature(LoraConfig).parameters)
        own = set(inspect.signature(moelora.MoELoraConfig).parameters) - fields
    finally:
        moelora.install()
    assert not taken, f"{VERSIONS} has {taken} itself"
    assert len(own) == 16, f"LoraConfig of {VERSIONS} has fields of our names: {own}"
    assert "lora_router" not in LAYER_ATTRIBUTES
    assert "moe_mixtures" not in LAYER_ATTRIBUTES


LAYER_ATTRIBUTES = {name for cls in layers.LoraLayer.__mro__ for name in vars(cls)}


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache], ids=lambda cls: cls.__name__)
def test_a_cache_has_the_methods_that_the_first_pass_follows(cache: type) -> None:
    assert callable(getattr(cache, "get_seq_length", None)), VERSIONS
    expected = {"reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset"}
    assert set(first_pass._FOLLOWED) == expected
    assert {name for name in expected if hasattr(cache, name)} == expected, VERSIONS


def test_every_layer_that_peft_has_is_served_or_known() -> None:
    known = {
        "Linear",
        "Embedding",
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "_ConvNd",
        "MultiheadAttention",
        "ParamWrapper",
        "LoraLayer",
    }
    found = {
        name
        for name, cls in vars(layers).items()
        if inspect.isclass(cls) and issubclass(cls, layers.LoraLayer)
    }
    assert found == known, f"peft {peft.__version__} has other layers: {found ^ known}"


def test_layers_keep_their_containers_under_the_names_peft_looks_for() -> None:
    layer = next(iter(lora_layers(get_peft_model(tiny_llama(), LoraConfig())).values()))
    assert {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"} <= set(
        layer.adapter_layer_names
    )
    assert {"r", "lora_alpha", "scaling", "lora_dropout"} <= set(layer.other_param_names)


# Completeness ----------------------------------------------------------------------------------


def names_in(node: ast.AST) -> tuple[set[str], set[str]]:
    """The names that a node uses of other objects, and those it defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return set(), {node.name}
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return set(), {node.id}
    if isinstance(node, ast.Attribute):
        is_self = isinstance(node.value, ast.Name) and node.value.id == "self"
        return {node.attr}, {node.attr} if is_self and isinstance(node.ctx, ast.Store) else set()
    if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("moelora"):
        return {alias.name for alias in node.names}, set()
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        # patched by name, or read with getattr and vars
        return {node.value} if node.value.isidentifier() else set(), set()
    return set(), set()


def private_names() -> dict[str, str]:
    """Private names that ``moelora/`` uses and does not define, with where they stand."""
    used: dict[str, str] = {}
    own: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if "demo" in path.parts:
            # reads packages of texts and of a model, whose versions are pinned
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            uses, defines = names_in(node)
            own |= defines
            line = getattr(node, "lineno", 0)
            used.update(dict.fromkeys(uses, f"{path.relative_to(PACKAGE)}:{line}"))
    ours = ("__", "_moelora")
    return {
        name: where
        for name, where in used.items()
        if name.startswith("_") and not name.startswith(ours) and name not in own
    }


#: Private names that are no promise of another library, or that their users check themselves.
NO_CONTRACT = {
    "_peft": "our own module",
    "_ConvNd": "imported by the boundary, see the layer classes above",
    "_fsdp_wrapped_module": "a name in state dicts of FSDP, which torch documents",
    "_active_adapter": "read by the fused path alone, whose tests run it",
    "_disable_adapters": "read by the fused path alone, whose tests run it",
    "_buffers": "torch reads it itself; the fused path is tested with it",
    "_version": "torch reads it itself; the fused path is tested with it",
    "_are_functorch_transforms_active": "torch reads it itself; the fused path is tested with it",
    "_is_any_autocast_enabled": "torch reads it itself; the fused path is tested with it",
    "_current_level": "torch reads it itself; the fused path is tested with it",
    "_backward_hooks": "torch reads it itself; the fused path is tested with it",
    "_backward_pre_hooks": "torch reads it itself; the fused path is tested with it",
    "_get_tracing_state": "torch reads it itself; the fused path is tested with it",
    "_C": "torch reads it itself; the fused path is tested with it",
    "_global_forward_hooks": "torch reads it itself; the fused path is tested with it",
    "_global_forward_pre_hooks": "torch reads it itself; the fused path is tested with it",
    "_global_backward_hooks": "torch reads it itself; the fused path is tested with it",
    "_global_backward_pre_hooks": "torch reads it itself; the fused path is tested with it",
    "_cuda_getCurrentRawStream": "Triton launches with it too",
    "_cuda_getDevice": "what torch.cuda.current_device calls",
    "_autograd": "where torch keeps the next one",
    "_top_saved_tensors_default_hooks": "without it, as before torch 2.8, no work is shared",
    "_dynamo": "torch.compile itself; the compiled trainings are tested with it",
    "_disable_dynamo": "imported when moelora is, so a test of anything needs it",
    "_unsafe_view": "an operator of torch; every fused op is tested with it",
    "_replace": "documented by Python, of named tuples",
    "_no_decay": "our own name",
    "_getframe": "Python's own, sys._getframe",
    "_name_or_path": "written by transformers into every config.json",
    "_dylora_": "part of a file name",
    "_dylora_num_experts": "a key in DyLoRA's files",
    "_expert_": "part of an adapter's name",
}


def test_every_private_name_that_moelora_uses_is_in_the_table() -> None:
    known = {entry.name for entry in [*FUNCTIONS, *ATTRIBUTES]} | set(NO_CONTRACT)
    missing = {name: where for name, where in private_names().items() if name not in known}
    assert not missing, f"add to FUNCTIONS or ATTRIBUTES: {missing}"


def test_the_tested_range_is_the_installed_one() -> None:
    lowest, beyond = map(Version, _peft.PEFT_RANGE)
    assert lowest <= Version(peft.__version__) < beyond
