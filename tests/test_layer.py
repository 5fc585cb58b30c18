"""Explicit routing weights in every kind of LoRA layer: laws first, then cases."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moelora import RoutingWeightsError, UnsupportedLayerError
from tests.models import (
    LAYER_KINDS,
    Block,
    LayerKind,
    activate,
    adapter_parameters,
    gradients,
    lora_config,
    lora_model,
    one_layer,
    randomise,
)
from tests.reference import experts_of, mixture_reference
from tests.tolerances import assert_close, assert_equal

SEEDS = st.integers(0, 2**31 - 1)


@dataclass
class Problem:
    """A model of one adapted layer in float64, an input, and weights for it."""

    model: peft.PeftModel
    x: Tensor
    weights: Tensor

    @property
    def names(self) -> list[str]:
        return list(self.model.base_model.active_adapters)

    @property
    def layer(self) -> Any:
        return one_layer(self.model)

    def run(self) -> Tensor:
        return self.model(self.x, routing_weights=self.weights)

    def reference(self) -> Tensor:
        experts = experts_of(self.layer, self.names, [1] * len(self.names))
        return mixture_reference(self.layer.base_layer, experts, self.x, self.weights)

    def base(self) -> Tensor:
        return self.layer.base_layer(self.x)

    @property
    def inputs(self) -> list[Tensor]:
        """Everything a gradient flows to: weights, every A and B, and a floating point input."""
        floats = [self.x] if self.x.is_floating_point() else []
        return [self.weights, *adapter_parameters(self.model), *floats]


def make_problem(
    kind: LayerKind,
    *,
    seed: int,
    rows: int,
    tokens: int,
    ranks: list[int],
    alphas: list[int],
    **config: Any,
) -> Problem:
    torch.manual_seed(seed)
    base = Block(kind.make()).double()
    configs = [lora_config(r=r, lora_alpha=a, **config) for r, a in zip(ranks, alphas, strict=True)]
    model = lora_model(base, configs)
    randomise(model)
    x = kind.draw(rows, tokens)
    if x.is_floating_point():
        x = x.double().requires_grad_()
    lead = (rows, tokens) if kind.per_token else (rows,)
    weights = torch.randn(*lead, len(ranks), dtype=torch.float64)
    # a third of the weights is exactly 0: an expert nobody chose
    weights = weights * (torch.rand_like(weights) > 1 / 3)
    return Problem(model, x, weights.requires_grad_())


@st.composite
def linear_problems(draw: st.DrawFn) -> Problem:
    """A linear layer with a few plain LoRA adapters of unequal rank and alpha."""
    experts = draw(st.integers(1, 4))
    return make_problem(
        LAYER_KINDS["Linear"],
        seed=draw(SEEDS),
        rows=draw(st.integers(0, 3)),
        tokens=draw(st.integers(0, 5)),
        ranks=draw(st.lists(st.integers(1, 5), min_size=experts, max_size=experts)),
        alphas=draw(st.lists(st.integers(1, 9), min_size=experts, max_size=experts)),
    )


@st.composite
def problems(draw: st.DrawFn, kind: LayerKind) -> Problem:
    """A layer of a given kind; ranks are even because grouped convolutions split them."""
    experts = draw(st.integers(1, 3))
    return make_problem(
        kind,
        seed=draw(SEEDS),
        rows=draw(st.integers(1, 3)),
        tokens=draw(st.integers(1, 3)),
        ranks=draw(st.lists(st.sampled_from([2, 4]), min_size=experts, max_size=experts)),
        alphas=draw(st.lists(st.integers(1, 9), min_size=experts, max_size=experts)),
    )


def every_kind(examples: int) -> Any:
    """Run a law for every kind of layer, with so many examples each."""

    def decorate(law: Any) -> Any:
        @pytest.mark.parametrize("kind", LAYER_KINDS)
        @settings(max_examples=examples)
        @given(data=st.data())
        def run(kind: str, data: st.DataObject) -> None:
            law(data.draw(problems(LAYER_KINDS[kind])))

        run.__name__ = law.__name__
        return run

    return decorate


# Laws ------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(problem=linear_problems())
def test_explicit_weights_equal_the_formula_with_all_gradients(problem: Problem) -> None:
    output, expected = problem.run(), problem.reference()
    assert_close(output, expected)
    assert_close(gradients(output, problem.inputs), gradients(expected, problem.inputs))


@every_kind(examples=6)
def test_every_kind_of_layer_equals_the_formula_with_all_gradients(problem: Problem) -> None:
    output, expected = problem.run(), problem.reference()
    assert_close(output, expected)
    assert_close(gradients(output, problem.inputs), gradients(expected, problem.inputs))


@every_kind(examples=4)
def test_permuting_experts_with_their_weights_changes_nothing(problem: Problem) -> None:
    before = problem.run()
    grads = gradients(before, problem.inputs)
    names, weights = problem.names, problem.weights
    for order in itertools.islice(itertools.permutations(range(len(names))), 6):
        activate(problem.model, [names[index] for index in order])
        problem.weights = weights[..., list(order)]
        output = problem.run()
        assert_close(output, before)
        assert_close(gradients(output, [weights, *problem.inputs[1:]]), grads)


@every_kind(examples=4)
def test_one_hot_weights_equal_the_single_adapter(problem: Problem) -> None:
    names = problem.names
    for index, name in enumerate(names):
        activate(problem.model, names)
        one_hot = torch.zeros_like(problem.weights)
        one_hot[..., index] = 1
        routed = problem.model(problem.x, routing_weights=one_hot)
        activate(problem.model, [name])
        assert_close(routed, problem.model(problem.x))


@every_kind(examples=4)
def test_weights_of_one_equal_peft_with_all_adapters_active(problem: Problem) -> None:
    problem.weights = torch.ones_like(problem.weights)
    assert_close(problem.run(), problem.model(problem.x))


@every_kind(examples=4)
def test_zero_weights_equal_the_base_layer_to_the_bit(problem: Problem) -> None:
    problem.weights = torch.zeros_like(problem.weights)
    assert_equal(problem.run(), problem.base())


@every_kind(examples=4)
def test_splitting_the_batch_changes_nothing(problem: Problem) -> None:
    rows = [
        problem.model(problem.x[row : row + 1], routing_weights=problem.weights[row : row + 1])
        for row in range(len(problem.x))
    ]
    assert_close(torch.cat(rows), problem.run())


@every_kind(examples=4)
def test_equal_experts_make_routing_irrelevant(problem: Problem) -> None:
    kind = problem.layer
    for name in problem.names[1:]:
        for container in (kind.lora_A, kind.lora_B, kind.lora_embedding_A, kind.lora_embedding_B):
            if name in container:
                container[name] = copy.deepcopy(container["e0"])
        kind.scaling[name] = kind.scaling["e0"]
    uneven = problem.weights.detach().abs() + 0.1
    uneven = uneven / uneven.sum(dim=-1, keepdim=True)
    first = torch.zeros_like(uneven)
    first[..., 0] = 1
    assert_close(
        problem.model(problem.x, routing_weights=uneven),
        problem.model(problem.x, routing_weights=first),
    )


@settings(max_examples=20)
@given(problem=linear_problems(), more=st.integers(1, 4))
def test_zero_padding_a_rank_changes_nothing(problem: Problem, more: int) -> None:
    before = problem.run()
    layer = problem.layer
    a, b = layer.lora_A["e0"], layer.lora_B["e0"]
    a.weight = nn.Parameter(torch.cat([a.weight, a.weight.new_zeros(more, a.in_features)]))
    b.weight = nn.Parameter(torch.cat([b.weight, b.weight.new_zeros(b.out_features, more)], dim=1))
    assert_close(problem.run(), before)


@settings(max_examples=20)
@given(problem=linear_problems())
def test_the_gradient_at_weight_zero_is_exact(problem: Problem) -> None:
    problem.weights = torch.zeros_like(problem.weights, requires_grad=True)
    output, expected = problem.run(), problem.reference()
    assert_close(gradients(output, [problem.weights]), gradients(expected, [problem.weights]))


@settings(max_examples=20)
@given(problem=linear_problems())
def test_the_arguments_are_never_written_to(problem: Problem) -> None:
    x, weights = problem.x.detach().clone(), problem.weights.detach().clone()
    versions = problem.x._version, problem.weights._version
    gradients(problem.run(), problem.inputs)
    assert_equal([problem.x.detach(), problem.weights.detach()], [x, weights])
    assert (problem.x._version, problem.weights._version) == versions


# Cases: layer types ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_no_weights_are_plain_peft_to_the_bit(kind: str) -> None:
    problem = make_problem(LAYER_KINDS[kind], seed=0, rows=2, tokens=3, ranks=[2, 4], alphas=[1, 5])
    plain = problem.layer.base_layer(problem.x)
    layer = problem.layer
    if not layer.lora_embedding_A and layer.lora_A:
        for name in problem.names:
            update = layer.lora_B[name](layer.lora_A[name](problem.x))
            plain = plain + update * layer.scaling[name]
        assert_equal(problem.model(problem.x), plain)
    assert_equal(problem.model(problem.x, routing_weights=None), problem.model(problem.x))


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_dropout_acts_on_what_an_expert_reads_and_only_in_training(kind: str) -> None:
    problem = make_problem(
        LAYER_KINDS[kind], seed=0, rows=3, tokens=4, ranks=[2], alphas=[2], lora_dropout=0.5
    )
    problem.model.eval()
    assert_close(problem.run(), problem.reference())
    problem.model.train()
    problem.weights = torch.ones_like(problem.weights)
    torch.manual_seed(3)
    routed = problem.run()
    torch.manual_seed(3)
    assert_close(routed, problem.model(problem.x))


class Attention(nn.Module):
    """PyTorch's own attention, whose projections PEFT adapts by merging for the call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


def _attention() -> tuple[peft.PeftModel, Tensor]:
    torch.manual_seed(0)
    model = lora_model(Attention().double(), [lora_config(), lora_config(r=3)])
    randomise(model)
    return model, torch.randn(2, 3, 8, dtype=torch.float64)


# PEFT 0.21 adds the output projection's update twice: in MultiheadAttention.merge, and again in the
# merge of the projection that it calls. What we hold to is PEFT's own forward.
_TIMES_ADDED = {"in_proj": 1, "out_proj": 2}


def _merged_attention(model: peft.PeftModel, x: Tensor, weights: Tensor) -> Tensor:
    """Both projections with their weighted updates added, as one plain function."""
    layer = model.base_model.model.layer
    base = layer.base_layer
    merged = []
    for part, weight, times in (
        (layer, base.in_proj_weight, _TIMES_ADDED["in_proj"]),
        (base.out_proj, base.out_proj.weight, _TIMES_ADDED["out_proj"]),
    ):
        for expert, factor in zip(experts_of(part, ["e0", "e1"], [1, 1]), weights, strict=True):
            weight = weight + times * factor * expert.scaling * (expert.b @ expert.a)
        merged.append(weight)
    x = x.transpose(0, 1)
    output, _ = nn.functional.multi_head_attention_forward(
        *(x, x, x, 8, 2, merged[0], base.in_proj_bias, None, None, False, 0.0, merged[1]),
        base.out_proj.bias,
        need_weights=False,
    )
    return output.transpose(0, 1)


@pytest.mark.parametrize("shape", [(2,), (1, 2), (1, 1, 2)])
def test_multihead_attention_takes_constant_weights(shape: tuple[int, ...]) -> None:
    model, x = _attention()
    weights = torch.tensor([0.3, -1.2], dtype=torch.float64)
    expected = _merged_attention(model, x, weights)
    assert_close(model(x, routing_weights=weights.reshape(shape)), expected)


def test_multihead_attention_with_one_hot_weights_equals_the_single_adapter() -> None:
    model, x = _attention()
    for index, name in enumerate(["e0", "e1"]):
        activate(model, ["e0", "e1"])
        routed = model(x, routing_weights=torch.eye(2)[index])
        activate(model, [name])
        assert_close(routed, model(x))


def test_multihead_attention_sends_gradients_to_weights_and_adapters() -> None:
    model, x = _attention()
    x.requires_grad_()
    weights = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    inputs = [weights, *adapter_parameters(model), x]
    expected = gradients(_merged_attention(model, x, weights), inputs)
    assert_close(gradients(model(x, routing_weights=weights), inputs), expected)


def test_multihead_attention_with_zero_weights_is_the_base() -> None:
    model, x = _attention()
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        assert_equal(model(x, routing_weights=torch.zeros(2)), base)


def test_multihead_attention_refuses_weights_per_token() -> None:
    model, x = _attention()
    with pytest.raises(
        UnsupportedLayerError, match=r"'layer'.*only constant routing_weights \[E\]"
    ):
        model(x, routing_weights=torch.rand(2, 3, 2))
    untouched, _ = _attention()
    assert_equal(model(x), untouched(x))


def test_target_parameters_are_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) @ self.weight[0]

    config = lora_config(target_modules=["linear"], target_parameters=["block.weight"])
    model = lora_model(nn.ModuleDict({"block": Experts()}), [config])
    x = torch.randn(2, 3, 4)
    block = model.base_model.model["block"]
    before = block(x)
    with pytest.raises(UnsupportedLayerError, match="target_parameters"):
        block(x, routing_weights=torch.ones(1))
    assert_equal(block(x), before)


def test_an_embedding_that_scales_its_output_scales_its_experts_too() -> None:
    class ScaledEmbedding(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(9, 5)
            self.register_buffer("embed_scale", torch.tensor(3.0))

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    model = lora_model(Block(ScaledEmbedding()).double(), [lora_config(), lora_config(r=3)])
    randomise(model)
    ids = torch.randint(0, 9, (2, 3))
    weights = torch.randn(2, 3, 2, dtype=torch.float64)
    base = one_layer(model).base_layer(ids)
    expected = base
    for index, name in enumerate(("e0", "e1")):
        activate(model, [name])
        expected = expected + weights[..., index : index + 1] * (model(ids) - base)
    activate(model, ["e0", "e1"])
    assert_close(model(ids, routing_weights=weights), expected)


def test_a_base_layer_that_returns_no_tensor_is_refused() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), None

    model = lora_model(Block(Pair(4, 4)), [lora_config()])
    with pytest.raises(UnsupportedLayerError, match="Pair returns tuple, not a tensor"):
        model(torch.randn(2, 4), routing_weights=torch.ones(1))


# Cases: shapes of weights ----------------------------------------------------------------------

ROWS, TOKENS = 2, 3
SHAPES = {
    "per token": (ROWS, TOKENS, 2),
    "per sample": (ROWS, 1, 2),
    "per sample, two axes": (ROWS, 2),
    "constant": (2,),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding"])
def test_every_shape_of_weights_broadcasts_over_the_tokens(
    kind: str, shape: tuple[int, ...]
) -> None:
    problem = make_problem(
        LAYER_KINDS[kind], seed=0, rows=ROWS, tokens=TOKENS, ranks=[2, 3], alphas=[1, 5]
    )
    given_weights = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    full = given_weights if len(shape) == 3 else given_weights.reshape(-1, 1, 2)
    problem.weights = full.expand(ROWS, TOKENS, 2)
    output = problem.model(problem.x, routing_weights=given_weights)
    expected = problem.reference()
    assert_close(output, expected)
    assert_close(gradients(output, [given_weights]), gradients(expected, [given_weights]))


@pytest.mark.parametrize("shape", [(ROWS, 2), (ROWS, 1, 2), (2,)])
@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Conv3d", "Conv2d with groups"])
def test_a_convolution_takes_one_weight_vector_per_sample(
    kind: str, shape: tuple[int, ...]
) -> None:
    problem = make_problem(
        LAYER_KINDS[kind], seed=0, rows=ROWS, tokens=TOKENS, ranks=[2, 4], alphas=[1, 5]
    )
    given_weights = torch.randn(shape, dtype=torch.float64)
    problem.weights = given_weights.reshape(-1, 2).expand(ROWS, 2)
    assert_close(problem.model(problem.x, routing_weights=given_weights), problem.reference())


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Conv3d"])
def test_a_convolution_refuses_weights_per_token(kind: str) -> None:
    problem = make_problem(
        LAYER_KINDS[kind], seed=0, rows=ROWS, tokens=TOKENS, ranks=[2], alphas=[1]
    )
    with pytest.raises(RoutingWeightsError, match="'layer' is a convolution"):
        problem.model(problem.x, routing_weights=torch.rand(ROWS, TOKENS, 1))


def test_an_input_of_three_token_axes_takes_weights_per_sample() -> None:
    model = lora_model(Block(nn.Linear(6, 5)).double(), [lora_config(), lora_config()])
    randomise(model)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    weights = torch.randn(2, 2, dtype=torch.float64)
    layer = one_layer(model)
    experts = experts_of(layer, ["e0", "e1"], [1, 1])
    expected = mixture_reference(
        layer.base_layer, experts, x, weights[:, None, None].expand(2, 3, 4, 2)
    )
    assert_close(model(x, routing_weights=weights), expected)


def test_rows_without_a_token_axis_take_one_weight_vector_each() -> None:
    model = lora_model(Block(nn.Linear(6, 5)).double(), [lora_config(), lora_config()])
    randomise(model)
    x, weights = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    layer = one_layer(model)
    expected = mixture_reference(
        layer.base_layer, experts_of(layer, ["e0", "e1"], [1, 1]), x, weights
    )
    assert_close(model(x, routing_weights=weights), expected)
    assert_close(model(x, routing_weights=weights[:, None]), expected)
    assert_close(layer(x, routing_weights=weights), expected)


# Cases: several adapters -----------------------------------------------------------------------


class TwoLayers(nn.Module):
    """Two linear layers one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_an_adapter_that_lacks_a_layer_keeps_its_column() -> None:
    torch.manual_seed(0)
    targets = [["first"], ["first", "second"], ["second"]]
    configs = [lora_config(target_modules=names, r=1 + n) for n, names in enumerate(targets)]
    model = lora_model(TwoLayers().double(), configs)
    randomise(model)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    weights = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    base = model.base_model.model
    hidden = mixture_reference(
        base.first.base_layer,
        experts_of(base.first, ["e0", "e1"], [1, 1]),
        x,
        weights[..., [0, 1]],
    )
    expected = mixture_reference(
        base.second.base_layer,
        experts_of(base.second, ["e1", "e2"], [1, 1]),
        hidden,
        weights[..., [1, 2]],
    )
    output = model(x, routing_weights=weights)
    inputs = [weights, *adapter_parameters(model)]
    assert_close(output, expected)
    assert_close(gradients(output, inputs), gradients(expected, inputs))


def test_weights_follow_the_order_of_the_active_adapters() -> None:
    problem = make_problem(
        LAYER_KINDS["Linear"], seed=0, rows=1, tokens=2, ranks=[1, 2, 3], alphas=[1, 2, 3]
    )
    activate(problem.model, ["e2", "e0"])
    problem.weights = torch.randn(1, 2, 2, dtype=torch.float64)
    assert problem.names == ["e2", "e0"]
    assert_close(problem.run(), problem.reference())


def test_a_layer_called_directly_obeys_the_keyword() -> None:
    problem = make_problem(
        LAYER_KINDS["Linear"], seed=0, rows=2, tokens=3, ranks=[2, 1], alphas=[1, 2]
    )
    assert_close(problem.layer(problem.x, routing_weights=problem.weights), problem.reference())
    assert_equal(problem.layer(problem.x, routing_weights=None), problem.model(problem.x))


def test_a_layer_made_by_hand_obeys_the_keyword() -> None:
    torch.manual_seed(0)
    config = lora_config()
    layer = peft.tuners.lora.Linear(nn.Linear(4, 4), "e0", config, r=2, lora_alpha=4)
    x = torch.randn(2, 3, 4)
    weights = torch.rand(2, 3, 1)
    expected = layer.base_layer(x) + weights * (layer(x) - layer.base_layer(x))
    assert_close(layer(x, routing_weights=weights), expected)
    with pytest.raises(RoutingWeightsError, match=r"E=1 experts.*\['e0'\]"):
        layer(x, routing_weights=torch.rand(2, 3, 2))
