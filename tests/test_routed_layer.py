"""Layers routed in one op, used in ways that the op itself does not see."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from moelora import UnsupportedLayerError, record_routing
from tests.lm import (
    checkpoint_blocks,
    explicit_weights,
    gradients_of,
    lora_layers,
    mixture,
    mixture_config,
    perturb,
    tiny_llama,
    token_ids,
    two_loras,
)
from tests.mixtures import draw_input, moe_config, moe_model
from tests.models import gradients, one_layer
from tests.tolerances import assert_close, assert_equal


def planned_layer(**fields: Any) -> Any:
    """A layer that has been routed in one op."""
    layer = one_layer(moe_model(moe_config(**fields)))
    layer(draw_input())
    assert layer.__dict__["_moelora_plan"] is not None
    return layer


@pytest.mark.parametrize("explicit", [False, True], ids=["routed", "explicit weights"])
def test_what_follows_a_layer_may_write_into_its_output(explicit: bool) -> None:
    model, told = mixture(), {}
    if explicit:
        model, told = two_loras(), {"routing_weights": explicit_weights()}
    model.train()
    ids = token_ids()

    def step(hook: Any) -> list[Tensor | None]:
        layers = list(lora_layers(model).values())
        handles = [layer.register_forward_hook(hook) for layer in layers]
        model.zero_grad()
        model(input_ids=ids, labels=ids, **told).loss.backward()
        for handle in handles:
            handle.remove()
        return gradients_of(model)

    expected = step(lambda _layer, _args, output: output * 1.5)
    assert_close(step(lambda _layer, _args, output: output.mul_(1.5)), expected)


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_router", "base_layer"])
def test_a_part_may_be_parametrised_later(part: str) -> None:
    layer, x = planned_layer(), draw_input()
    doubled = copy.deepcopy(layer)
    for each in (layer, doubled):
        module = getattr(each, part)
        module = module if part == "base_layer" else module["e0"]
        if each is layer:
            parametrize.register_parametrization(module, "weight", Doubled())
        else:
            module.weight.data.mul_(2)
    assert_close(layer(x), doubled(x))


PARTS = ["lora_A", "lora_B", "lora_router", "lora_dropout", "base_layer"]
REGISTER = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("register", REGISTER)
@pytest.mark.parametrize("part", PARTS)
def test_a_hook_on_a_part_that_comes_later_is_called_until_it_goes(
    part: str, register: str
) -> None:
    layer, x, calls = planned_layer(), draw_input().requires_grad_(), []
    module = getattr(layer, part)
    module = module if part == "base_layer" else module["e0"]
    handle = getattr(module, register)(lambda *_arguments: calls.append(part))
    layer(x).sum().backward()
    assert calls == [part]
    handle.remove()
    layer(x).sum().backward()
    assert calls == [part]
    assert layer.__dict__["_moelora_plan"] is not None


def test_a_forward_that_a_part_is_given_later_is_called() -> None:
    layer, x = planned_layer(), draw_input()
    for part in PARTS:
        module = getattr(layer, part)
        module = module if part == "base_layer" else module["e0"]
        calls, original = [], module.forward
        # as accelerate does to modules that it offloads
        module.forward = lambda *args, do=original, seen=calls: (seen.append(1), do(*args))[1]
        layer(x)
        assert calls == [1], part
        del module.forward


def test_a_model_made_in_inference_mode_runs_in_it() -> None:
    with torch.inference_mode():
        # more ranks than the ops compute for nothing, and flags that say who is young
        model = mixture(r=400, router_type="learned_with_maturity").eval()
        ids = token_ids()
        first = model(input_ids=ids).logits
        assert_equal(model(input_ids=ids).logits, first)


def test_functional_calls_use_what_they_are_given() -> None:
    layer, x = planned_layer(), draw_input()
    given = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    changed = copy.deepcopy(layer)
    changed.load_state_dict(given)
    assert_close(torch.func.functional_call(layer, given, (x,)), changed(x))
    assert_close(torch.func.vmap(layer)(x), layer(x))
    assert_close(torch.func.jacrev(layer)(x), torch.func.jacfwd(layer)(x))


def test_a_copy_and_a_pickle_of_a_layer_are_independent_of_it() -> None:
    layer, x = planned_layer(), draw_input()
    expected = layer(x)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    with torch.no_grad():
        layer.lora_A["e0"].weight.zero_()
    for each in copies:
        assert each.__dict__["_moelora_plan"] is None
        assert_equal(each(x), expected)


@pytest.mark.parametrize("change", ["replaced", "data", "in place", "moved"])
def test_whatever_way_a_parameter_changes_the_next_call_sees_it(change: str) -> None:
    layer, x = planned_layer(), draw_input()
    owner = layer.lora_B["e0"]
    new = torch.randn_like(owner.weight)
    with torch.no_grad():
        if change == "replaced":
            owner.weight = nn.Parameter(new)
        elif change == "data":
            owner.weight.data = new
        elif change == "in place":
            owner.weight.copy_(new)
        else:
            layer.float()
            new, x = new.float(), x.detach().float()
            owner.weight.copy_(new)
    fresh = copy.deepcopy(layer)
    assert_equal(layer(x), fresh(x))
    assert_equal(owner.weight.detach(), new)


def test_one_layer_used_twice_in_a_forward_gathers_both_gradients() -> None:
    layer = planned_layer()
    first, second = draw_input(), draw_input(tokens=4)
    leaves = [p for p in layer.parameters() if p.requires_grad]
    together = gradients(torch.cat([layer(first), layer(second)], dim=1).sum(dim=1), leaves)
    parts = [gradients(layer(x).sum(dim=1), leaves) for x in (first, second)]
    assert_close(together, [a + b for a, b in zip(*parts, strict=True)])


def test_under_autocast_the_output_keeps_the_layers_dtype() -> None:
    layer = planned_layer().float()
    x = draw_input().detach().float()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert (found.float() - expected).norm() < 3e-2 * expected.norm()


# Autocast ----------------------------------------------------------------------------------------


def bfloat16_mixture(**fields: Any) -> PeftModel:
    """A model of bfloat16 throughout, whose layers are routed in one op."""
    base = tiny_llama().bfloat16()
    model = get_peft_model(base, mixture_config(**fields), autocast_adapter_dtype=False)
    perturb(model)
    return model.train()


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("experts", [3, 16], ids=["few experts", "many experts"])
def test_autocast_to_the_models_own_dtype_changes_nothing(inside: bool, experts: int) -> None:
    model = bfloat16_mixture(num_experts=experts)
    ids = token_ids()

    def step(model: Any) -> tuple[Tensor, list[Tensor | None]]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        if not inside:
            with torch.autocast("cpu", enabled=False):
                loss.backward()
        else:
            loss.backward()
        return loss.detach(), gradients_of(model)

    base = tiny_llama().bfloat16().requires_grad_()
    _, expected = step(base)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = step(base)
    if not all(map(torch.equal, found, expected)):
        pytest.skip(f"torch {torch.__version__} changes a model without adapters too")
    # groups are known from the second forward on
    step(model)
    loss, expected = step(model)
    plans = {name: planned(layer) for name, layer in lora_layers(model).items()}
    with torch.autocast("cpu", torch.bfloat16):
        same_loss, found = step(model)
    for name, layer in lora_layers(model).items():
        assert planned(layer) is plans[name] is not None
    assert_close(same_loss, loss)
    assert_equal(found, expected)


@pytest.mark.parametrize("explicit", [False, True], ids=["routed", "explicit weights"])
def test_layers_of_the_autocast_dtype_are_fused_without_gradients_too(
    explicit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, told = bfloat16_mixture().eval(), {}
    if explicit:
        told = {"routing_weights": explicit_weights(experts=3)}
    ids = token_ids()
    with torch.no_grad():
        expected = model(input_ids=ids, **told).logits
        monkeypatch.setattr("moelora.layer.lora_combine", None)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(input_ids=ids, **told).logits
    assert_close(found, expected)


def planned(layer: Any) -> Any:
    return layer.__dict__["_moelora_plan"]


def test_autocast_to_another_dtype_is_left_to_pytorch() -> None:
    layer = planned_layer().float()
    x = draw_input().detach().float()
    layer(x)
    assert planned(layer) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert planned(layer) is None


def test_a_model_without_memory_tells_its_shapes() -> None:
    model, ids = mixture().to("meta").train(), token_ids().to("meta")
    output = model(input_ids=ids, labels=ids)
    assert output.logits.shape == (2, 7, model.config.vocab_size)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert model.eval()(input_ids=ids).logits.is_meta


# Bases that compute themselves --------------------------------------------------------------------


class OwnLinear(nn.Linear):
    """A class of its own, as quantised layers are."""


def general(run: Any, model: nn.Module) -> Any:
    """What ``run`` gives where layers are not routed in one op: their decisions keep a graph."""
    with record_routing(model, keep_graph=True):
        return run()


def trained(model: PeftModel, *, seed: int = 0) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients of one step."""
    torch.manual_seed(seed)
    model.zero_grad()
    ids = token_ids()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), gradients_of(model)


def unusual(model: PeftModel, kind: str) -> PeftModel:
    """The model with bases that the ops do not compute."""
    for layer in lora_layers(model).values():
        base = layer.base_layer
        if kind == "trained":
            base.weight.requires_grad_()
        elif kind == "hooked":
            base.register_forward_hook(lambda _base, _args, output: 2 * output)
        elif kind == "wrapped":
            base.forward = lambda x, forward=base.forward: forward(x) + 1
        else:
            layer.base_layer = OwnLinear(base.in_features, base.out_features, bias=False).to(
                base.weight.dtype
            )
            layer.base_layer.weight = base.weight
    return model


KINDS = ("trained", "hooked", "wrapped", "own class")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "checkpointing", [None, False, True], ids=["plain", "nonreentrant", "reentrant"]
)
def test_a_mixture_beside_any_base_trains_as_in_the_general_way(
    kind: str, checkpointing: bool | None
) -> None:
    model = unusual(mixture().train(), kind)
    if checkpointing is not None:
        checkpoint_blocks(model, use_reentrant=checkpointing)
    expected = general(lambda: trained(model), model)
    # groups are known from the second forward on
    for _ in range(2):
        assert_close(trained(model), expected)
    for layer in lora_layers(model).values():
        assert planned(layer).weight is None
    if kind == "trained":
        weights = [layer.base_layer.weight for layer in lora_layers(model).values()]
        assert all(weight.grad is not None for weight in weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 20], ids=["a token", "many tokens"])
def test_a_mixture_beside_any_base_infers_as_in_the_general_way(kind: str, length: int) -> None:
    model = unusual(mixture().eval(), kind)
    ids = token_ids(2, length)
    with torch.no_grad():
        expected = general(lambda: model(input_ids=ids).logits, model)
        for _ in range(2):
            assert_close(model(input_ids=ids).logits, expected)
    assert all(planned(layer).weight is None for layer in lora_layers(model).values())


def test_a_base_that_gets_a_hook_computes_itself_from_then_on() -> None:
    layer, x = planned_layer(), draw_input()
    assert planned(layer).weight is layer.base_layer.weight
    plain = layer(x)
    handle = layer.base_layer.register_forward_hook(lambda _base, _args, output: output + 1)
    assert_close(layer(x), plain + 1)
    assert planned(layer).weight is None
    handle.remove()
    assert_close(layer(x), plain)


def test_a_base_without_a_tensor_is_refused_by_name() -> None:
    layer, x = planned_layer(), draw_input()
    layer.base_layer.register_forward_hook(lambda _base, _args, output: (output,))
    with pytest.raises(UnsupportedLayerError, match="'layer' cannot be routed: .* returns tuple"):
        layer(x)


# Dropout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True], ids=["plain bases", "hooked bases"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_a_mixture_with_dropout_trains_as_in_the_general_way(
    beside: bool, checkpointing: bool | None
) -> None:
    model = mixture(lora_dropout=0.4).train()
    if beside:
        unusual(model, "hooked")
    if checkpointing is not None:
        checkpoint_blocks(model, use_reentrant=checkpointing)
    ids = token_ids()
    expected = general(lambda: trained(model), model)
    for _ in range(3):
        assert_close(trained(model), expected)
    assert not torch.equal(trained(model, seed=1)[0], expected[0])
    for layer in lora_layers(model).values():
        assert planned(layer) is not None
        assert planned(layer).drops
    # without dropout at work layers share their input's work again
    model.eval()
    with torch.no_grad():
        logits = general(lambda: model(input_ids=ids).logits, model)
        assert_close(model(input_ids=ids).logits, logits)


def test_dropout_that_is_left_on_in_evaluation_is_at_work() -> None:
    model, ids = mixture(lora_dropout=0.4).eval(), token_ids(2, 5)

    def logits() -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return model(input_ids=ids).logits

    idle = [logits(), logits()][1]
    for number, layer in enumerate(lora_layers(model).values()):
        # of some layers only: others of the same input must not be served together with them
        layer.lora_dropout.train(number % 3 != 0)
    expected = general(logits, model)
    for _ in range(2):
        assert_close(logits(), expected)
    assert not torch.allclose(expected, idle, atol=1e-3)
    assert all(planned(layer) is not None for layer in lora_layers(model).values())
