"""Which layers of a trace are one operator, and what it is told. Traces: tests/test_compile.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moelora.traced_layer as traced_layer
from moelora import UnsupportedLayerError, record_routing
from moelora.ops import Member, RoutedOutput, routed_linears
from moelora.scope import Frame, Tape
from moelora.shared_input import TracedInputs
from moelora.traced_layer import traced_forward
from tests.lm import lora_layers, mixture, tiny_llama
from tests.tolerances import assert_close


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What operators are told, PyTorch's operations in their place."""
    calls: list[dict[str, Any]] = []

    def run(
        x: Tensor, members: list[Member], *, is_sparse: bool, **told: Any
    ) -> list[RoutedOutput]:
        calls.append({"member": members[0], "number": len(members), "is_sparse": is_sparse, **told})
        return routed_linears(x, members, backend="eager", **told)

    monkeypatch.setattr(traced_layer, "routed_linears_traced", run)
    monkeypatch.setattr(traced_layer, "_choice", lambda *_: (True, True))
    return calls


def model_of(**fields: Any) -> Any:
    return mixture(tiny_llama(dtype=torch.float32, num_hidden_layers=1), **fields)


def first_layer(model: Any) -> Any:
    return next(iter(lora_layers(model).values()))


def forward(
    layer: Any, x: Tensor, frame: Frame | None = None, mask: Tensor | None = None
) -> Tensor | None:
    binding = layer.__dict__["_moelora_binding"]
    return traced_forward(layer, x, binding, frame, token_mask=lambda: mask)


@pytest.mark.parametrize("training", [False, True])
def test_it_gives_what_the_layer_gives(training: bool, told: list[dict[str, Any]]) -> None:
    layer, x = first_layer(model_of(expert_capacity_factor=1.0).train(training)), draw()
    found = forward(layer, x)
    assert found is not None
    assert_close(found, layer(x))
    member = told[0]["member"]
    assert member.base_weight is layer.base_layer.weight
    assert member.lora_a is layer.lora_A["default"].weight
    assert told[0]["options"].capacity_factor == (1.0 if training else None)
    assert not told[0]["record"]


def draw() -> Tensor:
    return torch.randn(2, 5, 16)


def hook_on(part: str) -> Callable[[Any], None]:
    def register(layer: Any) -> None:
        module = getattr(layer, part)["default"]
        module.register_forward_hook(lambda *_: None)

    return register


def bias_on_b(layer: Any) -> None:
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(layer.lora_B["default"].out_features))


def transposed_a(layer: Any) -> None:
    weight = layer.lora_A["default"].weight
    weight.data = weight.data.t().contiguous().t()


def scaling_as_tensor(layer: Any) -> None:
    layer.scaling["default"] = torch.tensor(2.0)


@pytest.mark.parametrize(
    "change",
    [
        hook_on("lora_A"),
        hook_on("lora_B"),
        hook_on("lora_router"),
        bias_on_b,
        transposed_a,
        scaling_as_tensor,
    ],
    ids=["hook on A", "hook on B", "hook on router", "bias", "transposed", "scaling"],
)
def test_a_layer_that_is_more_than_its_arithmetic_goes_the_general_way(
    change: Callable[[Any], None], told: list[dict[str, Any]]
) -> None:
    layer = first_layer(model_of().eval())
    change(layer)
    assert forward(layer, draw()) is None
    assert not told


@pytest.mark.parametrize(
    "fields",
    [
        {"use_moe_routing": False},
        {"router_type": "fixed"},
        {"router_scope": "layer"},
        {"expert_dropout": 0.5},
    ],
    ids=str,
)
def test_other_routing_goes_the_general_way(
    fields: dict[str, Any], told: list[dict[str, Any]]
) -> None:
    assert forward(first_layer(model_of(**fields).train()), draw()) is None
    assert not told


def test_where_the_kernels_do_not_run_layers_go_the_general_way() -> None:
    assert forward(first_layer(model_of().eval()), draw()) is None


@pytest.mark.skipif(traced_layer._IS_EXPORTING is None, reason="torch 2.6 does not tell of exports")
def test_an_export_holds_no_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("cuda", torch.float32, 8, 2, 16, "auto")
    assert traced_layer._choice(*sizes) == (True, False)
    monkeypatch.setattr(traced_layer, "_IS_EXPORTING", lambda: True)
    assert traced_layer._choice(*sizes) == (False, False)


def test_autocast_to_another_dtype_goes_the_general_way(told: list[dict[str, Any]]) -> None:
    layer = first_layer(model_of().eval())
    with torch.autocast("cpu", torch.bfloat16):
        assert forward(layer, draw()) is None
    assert not told


def test_hooks_of_all_modules_are_respected(told: list[dict[str, Any]]) -> None:
    layer = first_layer(model_of().eval())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert forward(layer, draw()) is None
    finally:
        handle.remove()
    assert not told


def test_a_decision_is_recorded_and_one_with_its_graph_goes_the_general_way(
    told: list[dict[str, Any]],
) -> None:
    model = model_of().eval()
    layer, x = first_layer(model), draw()
    with record_routing(model) as record:
        forward(layer, x)
    assert told[0]["record"]
    assert next(iter(record.routing.values())).routing_weights.shape == (10, 3)
    with record_routing(model, keep_graph=True):
        assert forward(layer, x) is None


def test_a_base_with_a_hook_computes_itself(told: list[dict[str, Any]]) -> None:
    layer, x = first_layer(model_of().eval()), draw()
    layer.base_layer.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    found = forward(layer, x)
    assert found is not None
    assert_close(found, layer(x))
    assert told[0]["member"].base_weight is None


def test_a_base_that_gives_no_tensor_is_named(told: list[dict[str, Any]]) -> None:
    layer = first_layer(model_of().eval())
    layer.base_layer.register_forward_hook(lambda _module, _inputs, output: (output,))
    with pytest.raises(UnsupportedLayerError, match="returns tuple, not a tensor"):
        forward(layer, draw())
    assert told


def test_dropout_changes_what_a_reads(told: list[dict[str, Any]]) -> None:
    layer, x = first_layer(model_of(lora_dropout=0.5).train()), draw()
    torch.manual_seed(1)
    found = forward(layer, x)
    torch.manual_seed(1)
    assert found is not None
    assert_close(found, layer(x))
    assert told[0]["member"].dropped is not None
    assert not told[0]["is_sparse"]
    layer.eval()
    forward(layer, x)
    assert told[1]["member"].dropped is None
    assert told[1]["is_sparse"]


def test_padding_without_a_capacity_and_young_experts_are_computed_densely(
    told: list[dict[str, Any]],
) -> None:
    x, mask = draw(), torch.arange(10) > 2
    for capacity_factor in (None, 1.0):
        layer = first_layer(model_of(expert_capacity_factor=capacity_factor).train())
        forward(layer, x, mask=mask)
    layer.lora_router["default"].mature = torch.tensor([True, True, False])
    forward(layer, x)
    assert [call["is_sparse"] for call in told] == [False, True, False]


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_the_auxiliary_loss_gets_its_statistics(
    coefficient: float, told: list[dict[str, Any]]
) -> None:
    layer, x = first_layer(model_of(router_aux_loss_coef=coefficient).train()), draw()
    tape = Tape()
    forward(layer, x, Frame(tape=tape))
    entries = tape.close()
    assert len(entries) == (coefficient != 0)
    assert all(entry.has_graph and entry.router_is_trainable for entry in entries)
    # a block that its model recomputes by itself has to save what its forward saved
    forward(layer, x)
    assert (told[1]["options"].loss_type is not None) == (coefficient != 0)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_function_transforms_go_the_general_way(transform: str, told: list[dict[str, Any]]) -> None:
    layer, x = first_layer(model_of().eval()), draw()
    found: list[Tensor | None] = []

    def run(inputs: Tensor) -> Tensor:
        found.append(forward(layer, inputs))
        return inputs.sum()

    if transform == "jvp":
        torch.func.jvp(run, (x,), (x,))
    else:
        getattr(torch.func, transform)(run)(x)
    assert found == [None]
    assert not told


# Layers that read one input ----------------------------------------------------------------------


def attention_of(model: Any) -> tuple[list[Any], Frame]:
    """Query, key and value of the first block, and a traced forward's frame."""
    layers = lora_layers(model)
    wanted = [
        layer
        for name in ("q_proj", "k_proj", "v_proj")
        for key, layer in layers.items()
        if key.endswith(f"layers.0.self_attn.{name}")
    ]
    scope = wanted[0].__dict__["_moelora_binding"].scope
    return wanted, Frame(traced=TracedInputs(scope.groups_for_traces, {}))


def all_linear(**fields: Any) -> Any:
    return model_of(target_modules="all-linear", **fields).eval()


@torch.no_grad()
def test_layers_of_one_input_are_one_operator(told: list[dict[str, Any]]) -> None:
    layers, frame = attention_of(all_linear())
    x = draw()
    for layer in layers:
        found = forward(layer, x, frame)
        assert found is not None
        assert_close(found, layer(x))
    assert [call["number"] for call in told] == [3]
    assert frame.traced is not None
    assert not frame.traced.ready


@torch.no_grad()
def test_another_input_is_computed_anew(told: list[dict[str, Any]]) -> None:
    (query, key, value), frame = attention_of(all_linear())
    x, other = draw(), draw()
    forward(query, x, frame)
    for layer in (key, value):
        found = forward(layer, other, frame)
        assert found is not None
        assert_close(found, layer(other))
    assert [call["number"] for call in told] == [3, 2]


@torch.no_grad()
def test_an_input_that_was_changed_is_another(told: list[dict[str, Any]]) -> None:
    (query, key, _), frame = attention_of(all_linear())
    x = draw()
    forward(query, x, frame)
    x.mul_(2)
    found = forward(key, x, frame)
    assert found is not None
    assert_close(found, key(x))
    assert [call["number"] for call in told] == [3, 2]


@pytest.mark.parametrize("change", ["hook", "training", "scaling", "float64", "bias", "dropout"])
@torch.no_grad()
def test_unlike_layers_are_computed_alone(change: str, told: list[dict[str, Any]]) -> None:
    (query, key, _), frame = attention_of(all_linear(lora_dropout=0.5))
    if change == "hook":
        key.register_forward_pre_hook(lambda *_: None)
    elif change == "training":
        key.train()
    elif change == "scaling":
        key.scaling["default"] = 3.0
    elif change == "float64":
        key.lora_router["default"].double()
    elif change == "dropout":
        key.lora_dropout.train()
    else:
        bias_on_b(key)
    forward(query, draw(), frame)
    assert [call["number"] for call in told] == [1]


@torch.no_grad()
def test_each_layer_drops_elements_of_its_own(told: list[dict[str, Any]]) -> None:
    layers, frame = attention_of(all_linear(lora_dropout=0.5))
    for layer in layers:
        layer.lora_dropout.train()
    x = draw()
    torch.manual_seed(1)
    found = [forward(layer, x, frame) for layer in layers]
    torch.manual_seed(1)
    for output, layer in zip(found, layers, strict=True):
        assert output is not None
        assert_close(output, layer(x))
    assert [call["number"] for call in told] == [3]


@pytest.mark.parametrize("training", [False, True])
def test_what_may_be_recomputed_alone_is_computed_alone(
    training: bool, told: list[dict[str, Any]]
) -> None:
    layers, frame = attention_of(all_linear().train(training))
    x = draw()
    with torch.set_grad_enabled(not training):
        for layer in layers:
            forward(layer, x, frame)
    assert [call["number"] for call in told] == [1, 1, 1]


def test_a_result_without_a_graph_is_not_taken_for_one_with(told: list[dict[str, Any]]) -> None:
    (query, key, _), frame = attention_of(all_linear())
    x = draw()
    with torch.no_grad():
        forward(query, x, frame)
    found = forward(key, x, frame)
    assert found is not None
    assert found.requires_grad
    assert [call["number"] for call in told] == [3, 1]
