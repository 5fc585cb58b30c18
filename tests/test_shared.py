"""Routers that many layers share: one per transformer block, reading the block's input."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from moelora import UnsupportedLayerError, mark_mature
from tests.lm import (
    checkpoint_blocks,
    gradients_of,
    lora_config,
    lora_layers,
    mixture,
    mixture_config,
    perturb,
    router_parameters,
    tiny_llama,
    tiny_t5,
    token_ids,
    trainable,
)
from tests.test_generation import generated
from tests.tolerances import assert_close, assert_equal

TEMPERATURE = 2.0


def by_hand(model: PeftModel, *, top_k: int | None = 2, adapter: str = "default") -> PeftModel:
    """A copy whose blocks route their input in plain torch; None for dense routing."""
    copied = copy.deepcopy(model)
    for block in copied.get_base_model().model.layers:
        layers = [part for part in block.modules() if isinstance(part, LoraLayer)]
        (router,) = [part.lora_router[adapter] for part in layers if "lora_router" in part._modules]
        seen: dict[str, Tensor] = {}
        block.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.__setitem__("input", args[0])
        )
        for layer in layers:
            layer.forward = _routed(layer, router, seen, adapter, top_k)
    return copied


def _routed(
    layer: LoraLayer, router: Any, seen: dict[str, Tensor], adapter: str, top_k: int | None
) -> Any:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        probs = (seen["input"] @ router.weight.T / TEMPERATURE).softmax(-1)
        if top_k is not None:
            threshold = probs.sort(dim=-1, descending=True).values[..., top_k - 1 : top_k]
            probs = torch.where(probs >= threshold, probs, 0.0)
            probs = probs / probs.sum(-1, keepdim=True)
        result = layer.base_layer(x)
        rank = layer.lora_A[adapter].weight.shape[0] // router.num_experts
        for expert in range(router.num_experts):
            part = slice(expert * rank, (expert + 1) * rank)
            delta = x @ layer.lora_A[adapter].weight[part].T
            delta = delta @ layer.lora_B[adapter].weight[:, part].T * layer.scaling[adapter]
            result = result + probs[..., expert : expert + 1] * delta
        return result

    return forward


def test_each_block_has_one_router_of_the_hidden_size() -> None:
    model = mixture(router_scope="layer", num_experts=4)
    found = router_parameters(model)
    assert {tuple(p.shape) for p in found.values()} == {(4, 16)}
    blocks = [name.split("layers.")[1].split(".")[0] for name in found]
    assert blocks == ["0", "1"]


def test_a_router_for_the_model_lies_in_it_once() -> None:
    found = router_parameters(mixture(router_scope="model"))
    assert [tuple(p.shape) for p in found.values()] == [(3, 16)]


def test_a_block_routes_all_its_layers_by_its_input() -> None:
    model = mixture(router_scope="layer").eval()
    assert_close(model(token_ids()).logits, by_hand(model)(token_ids()).logits, dtype=torch.float32)


def test_gradients_equal_those_of_the_block_routed_by_hand() -> None:
    fields = {"router_aux_loss_coef": 0.0, "expert_capacity_factor": None}
    model = mixture(router_scope="layer", **fields).train()
    expected = by_hand(model).train()
    for each in (model, expected):
        each(token_ids()).logits.square().mean().backward()
    assert_close(gradients_of(model), gradients_of(expected), dtype=torch.float32)


def test_immature_experts_share_every_token_of_the_block() -> None:
    model = mixture(router_scope="layer", router_type="learned_with_maturity").eval()
    mark_mature(model, experts=[0], mature=False)
    expected = by_hand(model, top_k=None)
    assert_close(model(token_ids()).logits, expected(token_ids()).logits, dtype=torch.float32)


def test_a_fresh_shared_mixture_equals_its_base() -> None:
    for scope in ("layer", "model"):
        model = mixture(router_scope=scope)
        for name, parameter in trainable(model).items():
            if ".lora_B." in name:
                nn.init.zeros_(parameter)
        assert_equal(model.eval()(token_ids()).logits, tiny_llama().eval()(token_ids()).logits)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_explicit_weights_take_the_place_of_shared_routers(scope: str) -> None:
    shared, single = mixture(router_scope=scope).eval(), mixture().eval()
    state = {k: v for k, v in shared.state_dict().items() if ".lora_router." not in k}
    single.load_state_dict(state, strict=False)
    weights = torch.rand(2, 7, 3, dtype=torch.float64)
    assert_equal(
        shared(token_ids(), routing_weights=weights).logits,
        single(token_ids(), routing_weights=weights).logits,
    )


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_disabled_adapters_give_the_base(scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    with model.disable_adapter():
        found = model(token_ids()).logits
    assert_equal(found, tiny_llama().eval()(token_ids()).logits)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_forward_within_a_block_has_its_own_routing(scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    inner, outer = token_ids(3, 4, seed=5), token_ids()
    expected = [model(inner).logits, model(outer).logits]
    calls: list[int] = []
    found: list[Tensor] = []
    # with two passes, the first one is without adapters
    routed_pass = 2 if scope == "model" else 1

    def nested(*_: object) -> None:
        calls.append(1)
        if len(calls) == routed_pass:
            found.append(model(inner).logits)

    hook = model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(nested)
    found.append(model(outer).logits)
    hook.remove()
    assert_equal(found, expected)


def test_an_encoder_decoder_routes_blocks_of_either_side() -> None:
    fields = {"target_modules": ["q", "wo"], "task_type": "SEQ_2_SEQ_LM"}
    model = mixture(tiny_t5(), router_scope="layer", **fields).eval()
    assert len(router_parameters(model)) == 4
    batch = {"input_ids": token_ids(2, 5), "decoder_input_ids": token_ids(2, 3)}
    alone = {name: value[1:] for name, value in batch.items()}
    assert_close(model(**alone).logits, model(**batch).logits[1:])


def test_keys_and_values_of_cross_attention_cannot_share_the_decoders_router() -> None:
    fields = {"target_modules": ["q", "k"], "task_type": "SEQ_2_SEQ_LM"}
    with pytest.raises(UnsupportedLayerError, match="EncDecAttention.k"):
        mixture(tiny_t5(), router_scope="layer", **fields)


def test_one_router_cannot_serve_encoder_and_decoder() -> None:
    fields = {"target_modules": ["q"], "task_type": "SEQ_2_SEQ_LM"}
    with pytest.raises(UnsupportedLayerError, match="router_scope='model'"):
        mixture(tiny_t5(), router_scope="model", **fields)


def test_a_layer_outside_of_blocks_has_no_router_of_its_block() -> None:
    with pytest.raises(UnsupportedLayerError, match="'lm_head' lies in no transformer block"):
        mixture(target_modules=["q_proj", "lm_head"], router_scope="layer")


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_base_without_a_hidden_size_is_refused(scope: str) -> None:
    base = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    with pytest.raises(UnsupportedLayerError, match="hidden_size"):
        mixture(base, target_modules=["0", "1"], task_type=None, router_scope=scope)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_refused_mixture_can_be_followed_by_another(scope: str) -> None:
    base = tiny_llama()
    if scope == "layer":
        with pytest.raises(UnsupportedLayerError, match="lm_head"):
            mixture(base, target_modules=["lm_head"], router_scope=scope)
        assert not lora_layers(base)
    model = mixture(base, router_scope=scope).eval()
    expected = mixture(router_scope=scope).eval()
    assert_equal(model(token_ids()).logits, expected(token_ids()).logits)


def test_a_second_mixture_makes_its_own_routers() -> None:
    model = mixture(name="first", router_scope="layer")
    model.add_adapter("second", mixture_config(router_scope="layer", target_modules=["o_proj"]))
    names = [name.split(".lora_router.")[1] for name in router_parameters(model)]
    assert sorted(names) == ["first.weight"] * 2 + ["second.weight"] * 2


def test_an_order_of_targets_changes_no_routing() -> None:
    first = mixture(router_scope="layer", target_modules=["q_proj", "down_proj"]).eval()
    other = mixture(router_scope="layer", target_modules=["down_proj", "q_proj"]).eval()
    assert_equal(first(token_ids()).logits, other(token_ids()).logits)


@pytest.mark.parametrize("scopes", [("module", "layer"), ("layer", "model"), ("model", "module")])
def test_active_mixtures_of_different_scopes_are_refused(
    scopes: tuple[str, str],
) -> None:
    model = mixture(name="first", router_scope=scopes[0])
    model.add_adapter("second", mixture_config(router_scope=scopes[1]))
    perturb(model)
    model.eval().base_model.set_adapter(["first", "second"])
    with pytest.raises(UnsupportedLayerError, match="router_scope"):
        model(token_ids())


def test_a_shared_mixture_beside_a_plain_lora_trains_both() -> None:
    model = mixture(name="first", router_scope="layer").train()
    model.add_adapter("plain", lora_config())
    perturb(model)
    model.base_model.set_adapter(["first", "plain"])
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None for p in trainable(model).values())


# Against loops over tokens and experts ---------------------------------------------------------


def weights_by_loops(
    hidden: Tensor, rows: Tensor, *, capacity_factor: float | None, mask: Tensor
) -> Tensor:
    """Two experts per token of those with room, in plain Python."""
    experts, tokens = rows.shape[0], int(mask.sum())
    room = [
        math.inf if capacity_factor is None else capacity_factor * tokens * 2 / experts
    ] * experts
    room = [math.inf if math.isinf(free) else math.ceil(free) for free in room]
    found = []
    for token, real in zip(hidden.flatten(0, 1), mask.flatten().tolist(), strict=True):
        scores = [row @ token / TEMPERATURE for row in rows]
        best = sorted(range(experts), key=lambda i: -scores[i].item())[:2]
        kept = [i for i in best if room[i] > 0]
        if real:
            for i in best:
                room[i] -= 1
        total = sum(scores[i].exp() for i in kept)
        zero = torch.zeros((), dtype=hidden.dtype)
        found.append(
            torch.stack([scores[i].exp() / total if i in kept else zero for i in range(experts)])
        )
    return torch.stack(found).reshape(*hidden.shape[:2], experts)


def by_loops(
    model: PeftModel,
    scope: str,
    mask: Tensor,
    *,
    adapters: tuple[str, ...] = ("default",),
    capacity_factor: float | None = None,
) -> PeftModel:
    """A copy whose blocks take weights from :func:`weights_by_loops`."""
    copied = copy.deepcopy(model)
    base = copied.get_base_model()
    with torch.no_grad():
        final = tiny_llama().model(token_ids(), attention_mask=mask).last_hidden_state
    every_layer = [part for part in base.modules() if isinstance(part, LoraLayer)]
    for block in base.model.layers:
        layers = [part for part in block.modules() if isinstance(part, LoraLayer)]
        holders = every_layer if scope == "model" else layers
        rows = torch.cat([_rows(holders, name) for name in adapters])
        seen: dict[str, Tensor] = {}

        def decide(_: Any, args: Any, seen: Any = seen, rows: Tensor = rows) -> None:
            hidden = args[0] if scope == "layer" else final
            options = {"capacity_factor": capacity_factor, "mask": mask}
            seen["weights"] = weights_by_loops(hidden, rows, **options)

        block.register_forward_pre_hook(decide)
        for layer in layers:
            layer.forward = _weighed(layer, seen, adapters, holders)
    return copied


def _rows(layers: list[LoraLayer], adapter: str) -> Tensor:
    found = [p.lora_router[adapter].weight for p in layers if adapter in _routers_in(p)]
    (rows,) = found
    return rows


def _routers_in(layer: LoraLayer) -> Any:
    return layer._modules.get("lora_router") or {}


def _weighed(
    layer: LoraLayer, seen: dict[str, Tensor], adapters: tuple[str, ...], holders: list[LoraLayer]
) -> Any:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result, column = layer.base_layer(x), 0
        for name in adapters:
            experts = _rows(holders, name).shape[0]
            for expert in range(experts if name in layer.lora_A else 0):
                rank = layer.lora_A[name].weight.shape[0] // experts
                part = slice(expert * rank, (expert + 1) * rank)
                delta = x @ layer.lora_A[name].weight[part].T
                delta = delta @ layer.lora_B[name].weight[:, part].T * layer.scaling[name]
                index = column + expert
                result = result + seen["weights"][..., index : index + 1] * delta
            column += experts
        return result

    return forward


def padding(side: str) -> Tensor:
    """The second row has three tokens of padding."""
    mask = torch.ones(2, 7, dtype=torch.long)
    if side != "none":
        mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    return mask


def real_logits(model: PeftModel, mask: Tensor) -> Tensor:
    """Logits of all tokens that are no padding."""
    found: Tensor = model(token_ids(), attention_mask=mask).logits[mask.bool()]
    return found


SCOPES = pytest.mark.parametrize("scope", ["layer", "model"])
SIDES = pytest.mark.parametrize("side", ["none", "left", "right"])
WITHOUT_LOSS: dict[str, Any] = {"router_aux_loss_coef": 0.0, "expert_capacity_factor": None}


@SCOPES
@SIDES
@pytest.mark.parametrize("capacity_factor", [None, 0.3, 1.0])
def test_values_and_gradients_equal_loops_with_capacity_and_padding(
    scope: str, side: str, capacity_factor: float | None
) -> None:
    fields = {**WITHOUT_LOSS, "expert_capacity_factor": capacity_factor}
    model = mixture(router_scope=scope, **fields).train()
    mask = padding(side)
    expected = by_loops(model, scope, mask, capacity_factor=capacity_factor)
    found = [real_logits(each, mask) for each in (model, expected)]
    assert_close(found[0], found[1], dtype=torch.float32)
    for logits in found:
        logits.square().mean().backward()
    assert_close(gradients_of(model), gradients_of(expected), dtype=torch.float32)


@SCOPES
def test_capacity_limits_no_answer_in_eval(scope: str) -> None:
    model = mixture(router_scope=scope, expert_capacity_factor=0.1).eval()
    mask = padding("none")
    expected = real_logits(by_loops(model, scope, mask), mask)
    assert_close(real_logits(model, mask), expected, dtype=torch.float32)


def two_of_a_scope(scope: str) -> PeftModel:
    """Two mixtures of unequal rank and number on layers that overlap."""
    model = mixture(name="first", router_scope=scope, **WITHOUT_LOSS)
    fields = {"num_experts": 2, "r": 3, "target_modules": ["o_proj", "down_proj"]}
    model.add_adapter("second", mixture_config(router_scope=scope, **WITHOUT_LOSS, **fields))
    perturb(model)
    return model


@SCOPES
@pytest.mark.parametrize("adapters", [("first", "second"), ("second", "first")])
def test_two_mixtures_of_a_scope_equal_loops_over_all_their_experts(
    scope: str, adapters: tuple[str, ...]
) -> None:
    model = two_of_a_scope(scope).train()
    model.base_model.set_adapter(list(adapters))
    mask = padding("none")
    expected = by_loops(model, scope, mask, adapters=adapters)
    found = [real_logits(each, mask) for each in (model, expected)]
    assert_close(found[0], found[1], dtype=torch.float32)
    for logits in found:
        logits.square().mean().backward()
    assert_close(gradients_of(model), gradients_of(expected), dtype=torch.float32)


@SCOPES
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_two_mixtures_of_a_scope_generate_the_same_with_and_without_cache(
    scope: str, options: dict[str, int]
) -> None:
    model = two_of_a_scope(scope).eval()
    model.base_model.set_adapter(["first", "second"])
    cached = generated(model, token_ids(), use_cache=True, **options)
    assert_equal(cached, generated(model, token_ids(), use_cache=False, **options))


@SCOPES
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_gradient_with_capacity_and_padding(
    scope: str, use_reentrant: bool
) -> None:
    model = mixture(router_scope=scope, expert_capacity_factor=0.5).train()
    model.enable_input_require_grads()
    other = copy.deepcopy(model)
    checkpoint_blocks(other, use_reentrant=use_reentrant)
    mask = padding("right")
    labels = token_ids().masked_fill(mask == 0, -100)
    for each in (model, other):
        each(input_ids=token_ids(), attention_mask=mask, labels=labels).loss.backward()
    assert_close(gradients_of(other), gradients_of(model))


@SCOPES
def test_a_layer_called_alone_is_refused_with_its_name(scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    name, layer = next(iter(lora_layers(model.get_base_model()).items()))
    with pytest.raises(UnsupportedLayerError, match=name):
        layer(torch.randn(2, 7, 16, dtype=torch.float64))


@SCOPES
def test_a_layer_called_alone_takes_explicit_weights(scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    layer = next(iter(lora_layers(model).values()))
    weights = torch.rand(2, 7, 3, dtype=torch.float64)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    assert layer(x, routing_weights=weights).shape[:2] == (2, 7)


def test_a_block_called_alone_is_refused_with_a_layers_name() -> None:
    model = mixture(router_scope="layer").eval()
    hidden = torch.randn(2, 7, 16, dtype=torch.float64)
    base = model.get_base_model().model
    positions = base.rotary_emb(hidden, torch.arange(7)[None])
    with pytest.raises(UnsupportedLayerError, match="q_proj"):
        base.layers[0](hidden, position_embeddings=positions)


@SCOPES
def test_an_error_in_a_router_leaves_nothing_to_the_next_forward(scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    expected = model(token_ids()).logits
    (host, *_) = [p for p in lora_layers(model).values() if _routers_in(p)]

    def stop(*_: object) -> None:
        raise OSError("stopped")

    hook = host.lora_router["default"].register_forward_pre_hook(stop)
    with pytest.raises(OSError, match="stopped"):
        model(token_ids())
    hook.remove()
    assert_equal(model(token_ids()).logits, expected)
