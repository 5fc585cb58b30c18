"""Explicit weights and the tokens they meet: blocks, refusals, and the pure functions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import BertModel, GPT2LMHeadModel, LlamaForCausalLM, T5ForConditionalGeneration

from moelora import RoutingWeightsError
from moelora.alignment import align_routing_weights, check_routing_weights
from tests.architectures import EXPERTS, ROWS, TOKENS, build, run
from tests.models import (
    activate,
    bert_config,
    gpt2_config,
    llama_config,
    lora_layers,
    lora_model,
    t5_config,
    token_ids,
)
from tests.tolerances import assert_close, assert_equal

# Blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no task type", "causal LM of Conv1D layers", "flattened tokens"])
def test_weights_per_block_reach_their_own_block(name: str) -> None:
    model = build(name)
    weights = torch.randn(ROWS, TOKENS, EXPERTS, dtype=torch.float64)
    same = weights[:, :, None].expand(ROWS, TOKENS, 2, EXPERTS)
    assert_close(run(name, model, routing_weights=same), run(name, model, routing_weights=weights))
    # block 1 silent: as if its adapters were not there
    silent = torch.stack([weights, torch.zeros_like(weights)], dim=2)
    by_weights = run(name, model, routing_weights=silent)
    for key, layer in model.named_modules():
        if "lora_B" in vars(layer).get("_modules", {}) and ".1." in key:
            for item in layer.lora_B.values():
                item.weight.data.zero_()
    assert_close(run(name, model, routing_weights=weights), by_weights)


def test_weights_per_block_broadcast_over_tokens() -> None:
    model = build("no task type")
    weights = torch.randn(ROWS, 1, 2, EXPERTS, dtype=torch.float64)
    expected = run("no task type", model, routing_weights=weights.expand(ROWS, TOKENS, 2, EXPERTS))
    assert_close(run("no task type", model, routing_weights=weights), expected)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_weights_per_block_are_refused_outside_of_blocks(target: str) -> None:
    base = LlamaForCausalLM(llama_config())
    model = lora_model(base, [LoraConfig(target_modules=["q_proj", target])])
    with pytest.raises(RoutingWeightsError, match=f"'.*{target}', which lies in no transformer bl"):
        run("causal LM", model, routing_weights=torch.rand(ROWS, TOKENS, 2, 1))


def test_weights_for_another_number_of_blocks_are_refused() -> None:
    model = build("no task type")
    with pytest.raises(
        RoutingWeightsError, match=r"must have 2 layers in axis 2.*'model\.layers\.0"
    ):
        run("no task type", model, routing_weights=torch.rand(ROWS, TOKENS, 3, EXPERTS))


# What cannot be aligned ------------------------------------------------------------------------


def refused(model: nn.Module, weights: Any, match: str, error: type = RoutingWeightsError) -> None:
    """A call with bad weights raises, and the next one without is as before, to the bit."""
    before = run("no task type", model)
    with pytest.raises(error, match=match):
        run("no task type", model, routing_weights=weights)
    assert_equal(run("no task type", model), before)


BAD_WEIGHTS: dict[str, tuple[Any, str]] = {
    "too few experts": (
        torch.rand(ROWS, TOKENS, 2),
        r"E=3 experts .*\['e0', 'e1', 'e2'\], got .*2\)",
    ),
    "too many experts": (torch.rand(ROWS, EXPERTS + 1), r"E=3 experts .* got shape \(3, 4\)"),
    "another batch": (
        torch.rand(ROWS + 1, TOKENS, EXPERTS),
        r"\(4, 5, 3\) cannot be aligned.*q_proj",
    ),
    "another batch without seq": (torch.rand(ROWS + 1, EXPERTS), r"cannot be aligned.*'model\.lay"),
    "another seq": (
        torch.rand(ROWS, TOKENS + 1, EXPERTS),
        r"\(3, 6, 3\) cannot be aligned.*q_proj",
    ),
    "batch and seq swapped": (torch.rand(TOKENS, ROWS, EXPERTS), r"\(5, 3, 3\) cannot be aligned"),
    "no axis": (torch.tensor(1.0), r"must be \[batch, seq, E\].* got shape \(\)"),
    "five axes": (
        torch.rand(1, 1, 1, 1, EXPERTS),
        r"must be .*layers, E\], got shape \(1, 1, 1, 1",
    ),
    "NaN": (torch.full((EXPERTS,), torch.nan), "must be finite, got NaN or infinity"),
    "infinity": (torch.tensor([0.0, 1.0, -torch.inf]), "must be finite, got NaN or infinity"),
    "integers": (torch.ones(EXPERTS, dtype=torch.int64), r"floating point dtype, got torch\.int64"),
    "booleans": (torch.ones(EXPERTS, dtype=torch.bool), r"floating point dtype, got torch\.bool"),
    "complex": (torch.ones(EXPERTS, dtype=torch.complex64), r"dtype, got torch\.complex64"),
    "a list": ([0.1, 0.2, 0.7], r"must be a torch\.Tensor .* got list"),
    "a number": (1.0, r"must be a torch\.Tensor .* got float"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused_and_leave_no_trace(case: str) -> None:
    weights, match = BAD_WEIGHTS[case]
    refused(build("no task type"), weights, match)


@pytest.mark.parametrize("case", [c for c in BAD_WEIGHTS if "batch" not in c and "seq" not in c])
def test_a_layer_called_directly_refuses_the_same(case: str) -> None:
    weights, match = BAD_WEIGHTS[case]
    layer = next(iter(lora_layers(build("no task type"))))
    x = torch.randn(ROWS, TOKENS, layer.in_features, dtype=torch.float64)
    before = layer(x)
    with pytest.raises(RoutingWeightsError, match=match):
        layer(x, routing_weights=weights)
    assert_equal(layer(x), before)


@pytest.mark.parametrize("name", ["causal LM of Conv1D layers", "flattened tokens", "causal LM"])
def test_weights_of_another_length_are_refused_in_every_model(name: str) -> None:
    model = build(name)
    with pytest.raises(RoutingWeightsError, match="cannot be aligned"):
        run(name, model, routing_weights=torch.rand(ROWS, TOKENS - 1, EXPERTS))
    with pytest.raises(RoutingWeightsError, match="cannot be aligned"):
        run(name, model, routing_weights=torch.rand(ROWS - 1, EXPERTS))


def test_merged_adapters_refuse_weights() -> None:
    model = build("no task type")
    model.merge_adapter(["e1"])
    refused(model, torch.rand(EXPERTS), r"while adapters \['e1'\] are merged.*unmerge_adapter\(\)")
    layer = next(iter(lora_layers(model)))
    with pytest.raises(RoutingWeightsError, match=r"'model\.layers\.0.*\['e1'\] are merged"):
        layer(torch.randn(1, 2, layer.in_features).double(), routing_weights=torch.rand(EXPERTS))


def test_adapter_names_in_the_same_call_are_refused() -> None:
    model = build("no task type")
    before = run("no task type", model)
    with pytest.raises(RoutingWeightsError, match="adapter_names cannot be combined"):
        run(
            "no task type",
            model,
            routing_weights=torch.rand(EXPERTS),
            adapter_names=["e0", "e1", "e2"],
        )
    assert_equal(run("no task type", model), before)
    mixed = run("no task type", model, adapter_names=["e0", "e1", "e2"])
    expected = run("no task type", model, routing_weights=torch.eye(3, dtype=torch.float64))
    assert_close(expected, mixed)


@pytest.mark.parametrize("place", ["first", "last"])
def test_an_exception_in_the_middle_of_a_forward_leaves_no_trace(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("no task type")
    before = run("no task type", model)
    layers = list(lora_layers(model))
    layer = layers[0 if place == "first" else -1]
    with monkeypatch.context() as patch:
        patch.setattr(layer.base_layer, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("no task type", model, routing_weights=torch.rand(EXPERTS))
    assert_equal(run("no task type", model), before)


@pytest.mark.parametrize("shape", [(ROWS, TOKENS), (ROWS, TOKENS, 2), (ROWS, 4)])
def test_an_encoder_decoder_refuses_weights_per_token(shape: tuple[int, ...]) -> None:
    model = build("seq2seq")
    with pytest.raises(
        RoutingWeightsError, match="encoder-decoder model takes routing_weights witho"
    ):
        run("seq2seq", model, routing_weights=torch.rand(*shape, EXPERTS))


def test_an_encoder_decoder_refuses_another_batch() -> None:
    model = build("seq2seq")
    with pytest.raises(
        RoutingWeightsError, match="cannot be aligned with the input of layer 'encod"
    ):
        run("seq2seq", model, routing_weights=torch.rand(ROWS + 1, EXPERTS))


def test_position_embeddings_refuse_weights_per_row_but_take_constant_ones() -> None:
    base = GPT2LMHeadModel(gpt2_config())
    model = lora_model(base, [LoraConfig(target_modules=["wpe"], init_lora_weights=False)])
    run("no task type", model, routing_weights=torch.ones(1))
    with pytest.raises(RoutingWeightsError, match=r"cannot be aligned .*'transformer\.wpe'"):
        run("no task type", model, routing_weights=torch.rand(ROWS, TOKENS, 1))
    with pytest.raises(RoutingWeightsError, match=r"cannot be aligned .*'transformer\.wpe'"):
        run("no task type", model, routing_weights=torch.rand(ROWS, 1))


@pytest.mark.parametrize("rows", [TOKENS, TOKENS - 1])
def test_relative_position_embeddings_have_no_rows_whatever_the_batch_size(rows: int) -> None:
    """Their input is [seq, seq]: with as many rows as tokens, shapes alone would mislead."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["relative_attention_bias"], init_lora_weights=False)
    model = lora_model(T5ForConditionalGeneration(t5_config()), [config])
    ids = token_ids(rows, TOKENS)
    model(input_ids=ids, decoder_input_ids=ids, routing_weights=torch.ones(1))
    with pytest.raises(RoutingWeightsError, match=r"relative_attention_bias"):
        model(input_ids=ids, decoder_input_ids=ids, routing_weights=torch.rand(rows, 1))


INACTIVE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "position embeddings": (lambda: nn.Embedding(8, 8), {"target_modules": ["beside"]}),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        {"target_modules": ["beside"]},
    ),
    "a convolution": (lambda: nn.Conv1d(3, 3, 1), {"target_modules": ["beside"]}),
    "a parameter": (
        lambda: nn.Linear(8, 8),
        {"target_modules": [], "target_parameters": ["beside.weight"]},
    ),
}


@pytest.mark.parametrize("kind", INACTIVE)
def test_a_layer_without_an_active_adapter_takes_no_part(kind: str) -> None:
    make, target = INACTIVE[kind]

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.routed, self.beside = nn.Linear(8, 8), make()

        def forward(self, x: Tensor) -> Tensor:
            x = self.routed(x)
            if kind == "attention":
                return self.beside(x, x, x, need_weights=False)[0]
            return self.beside(torch.arange(3)[None]) if "position" in kind else self.beside(x)

    torch.manual_seed(0)
    first = LoraConfig(target_modules=["routed"], init_lora_weights=False)
    model = lora_model(Pair(), [first, LoraConfig(init_lora_weights=False, **target)])
    activate(model, ["e0"])
    x = torch.randn(2, 3, 8)
    assert_close(model(x, routing_weights=torch.ones(2, 3, 1)), model(x))


def test_a_pooled_input_refuses_weights_per_token() -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["pooler.dense"], init_lora_weights=False)
    model = lora_model(BertModel(bert_config()), [config])
    ids = token_ids(ROWS, TOKENS)
    with pytest.raises(RoutingWeightsError, match=r"cannot be aligned .*'pooler\.dense'"):
        model(input_ids=ids, routing_weights=torch.rand(ROWS, TOKENS, 1))
    rows = torch.tensor([[0.0], [1.0], [0.0]])
    routed = model(input_ids=ids, routing_weights=rows).pooler_output
    full = model(input_ids=ids).pooler_output
    with model.disable_adapter():
        base = model(input_ids=ids).pooler_output
    assert_close(routed, torch.stack([base[0], full[1], base[2]]))


# The functions ---------------------------------------------------------------------------------


def test_checking_returns_the_very_tensor() -> None:
    weights = torch.rand(2, 3)
    assert check_routing_weights(weights, num_experts=3, adapters=["a"]) is weights


@pytest.mark.parametrize(
    ("shape", "lead", "expected"),
    [
        ((3,), (2, 5), (3,)),
        ((2, 3), (2, 5), (2, 1, 3)),
        ((2, 1, 3), (2, 5), (2, 1, 3)),
        ((2, 5, 3), (2, 5), (2, 5, 3)),
        ((2, 5, 3), (10,), (10, 3)),
        ((2, 3), (2,), (2, 3)),
        ((10, 3), (10,), (10, 3)),
        ((2, 4, 3), (2, 2, 2), (2, 2, 2, 3)),
        ((0, 5, 3), (0, 5), (0, 5, 3)),
        ((2, 0, 3), (2, 0), (2, 0, 3)),
    ],
)
def test_aligning_without_a_model(
    shape: tuple[int, ...], lead: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    weights = torch.rand(shape)
    aligned = align_routing_weights(weights, lead, layer_name="layer")
    assert aligned.shape == expected
    assert_equal(aligned.reshape(-1), weights.reshape(-1))


@pytest.mark.parametrize(
    ("shape", "lead"),
    [
        ((2, 4, 3), (2, 5)),
        ((3, 5, 3), (2, 5)),
        ((2, 3), ()),
        ((2, 3), (5,)),
        ((2, 5, 3), (9,)),
        ((2, 3), (4,)),
        ((2, 1, 3), (4,)),
    ],
)
def test_what_does_not_correspond_is_refused_by_the_layers_name(
    shape: tuple[int, ...], lead: tuple[int, ...]
) -> None:
    with pytest.raises(
        RoutingWeightsError, match="cannot be aligned with the input of layer 'here'"
    ):
        align_routing_weights(torch.rand(shape), lead, layer_name="here")


def test_blocks_are_chosen_by_the_layers_place() -> None:
    weights = torch.rand(2, 5, 3, 4)
    for block in range(3):
        aligned = align_routing_weights(weights, (2, 5), layer_name="here", block=(block, 3))
        assert_equal(aligned, weights[:, :, block])


def test_every_permutation_of_adapters_permutes_the_weights_columns() -> None:
    model = build("no task type")
    weights = torch.randn(ROWS, EXPERTS, dtype=torch.float64)
    before = run("no task type", model, routing_weights=weights)
    for order in itertools.permutations(range(EXPERTS)):
        activate(model, [f"e{index}" for index in order])
        assert_close(run("no task type", model, routing_weights=weights[:, list(order)]), before)
