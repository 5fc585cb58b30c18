"""Explicit routing weights on PEFT LoRA models; the names are those of DyLoRA's own plan.

Held against a slow way that shares nothing with moelora: the base model without any adapter, in
float64, with a hook on every adapted layer that adds one expert after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from moelora import MoELoraConfig, Router
from tests.dylora.tiny import BASES, HIDDEN, VOCABULARY, llama, randomise, token_ids
from tests.tolerances import TOLERANCES, assert_close, assert_equal

TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gemma": ["q_proj", "v_proj", "down_proj"],
}


def experts_over(
    base: PreTrainedModel, number: int, targets: list[str], *, dtype: torch.dtype = torch.float64
) -> PeftModel:
    """Plain LoRA adapters of unequal rank, drawn far from zero, all active."""
    names = [f"expert_{index}" for index in range(number)]
    model: Any = base.to(dtype)
    for index, name in enumerate(names):
        config = LoraConfig(
            r=2 + index % 3, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM"
        )
        if index == 0:
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(names)
    randomise(model)
    return model.eval()


def softmaxed(rows: int, length: int, experts: int, *, seed: int = 7) -> Tensor:
    """Weights as a router gives them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, experts, generator=generator, dtype=torch.float64).softmax(-1)


class SlowWay:
    """The base model in float64 with a hook on each layer that ``model`` adapts."""

    def __init__(self, base: PreTrainedModel, model: PeftModel) -> None:
        self.base = copy.deepcopy(base).double().eval()
        self.names: list[str] = list(model.base_model.active_adapters)
        self.tensors: dict[str, Tensor] = {}
        self.layers: dict[str, dict[str, float]] = {}
        for key, value in model.state_dict().items():
            if ".lora_" not in key:
                continue
            path = key.removeprefix("base_model.model.").removesuffix(".weight")
            self.tensors[path] = value.detach().double().requires_grad_()
            layer = path.partition(".lora_")[0]
            self.layers[layer] = dict(model.base_model.model.get_submodule(layer).scaling)

    @contextmanager
    def hooked(self, weights: Tensor) -> Iterator[None]:
        """Let the layers add ``sum_e w_e * scaling_e * B_e A_e x``."""
        hooks = [
            self.base.get_submodule(path).register_forward_hook(self._hook(path, weights))
            for path in self.layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, path: str, weights: Tensor) -> Any:
        def add_experts(_layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            total = output
            for index, name in enumerate(self.names):
                down = self.tensors[f"{path}.lora_A.{name}"]
                up = self.tensors[f"{path}.lora_B.{name}"]
                delta = (args[0] @ down.T) @ up.T * self.layers[path][name]
                total = total + weights[..., index : index + 1] * delta
            return total

        return add_experts

    def __call__(self, ids: Tensor, weights: Tensor) -> Tensor:
        with self.hooked(weights.double()):
            logits: Tensor = self.base(input_ids=ids, use_cache=False).logits
        return logits


def single_pass(model: PeftModel, ids: Tensor, weights: Tensor | None) -> Tensor:
    logits: Tensor = model(input_ids=ids, routing_weights=weights, use_cache=False).logits
    return logits


@pytest.mark.parametrize("base", BASES)
def test_routing_weights_forward_basic(base: str) -> None:
    model = experts_over(BASES[base](), 2, TARGETS[base])
    ids = token_ids()
    weights = softmaxed(2, 12, 2)
    logits = single_pass(model, ids, weights)
    assert logits.shape == (2, 12, VOCABULARY)
    expected = SlowWay(BASES[base](), model)(ids, weights)
    assert_close(logits, expected)
    assert not torch.allclose(logits, single_pass(model, ids, None), atol=1e-2)


@pytest.mark.parametrize("base", BASES)
def test_single_vs_multi_pass_output_equivalence(base: str) -> None:
    """One pass equals the weighted sum of the experts in every layer, to float64's accuracy."""
    model = experts_over(BASES[base](), 4, TARGETS[base])
    slow = SlowWay(BASES[base](), model)
    ids = token_ids()
    for seed in range(3):
        weights = softmaxed(2, 12, 4, seed=seed)
        assert_close(single_pass(model, ids, weights), slow(ids, weights))


@pytest.mark.parametrize("per_token", [False, True])
def test_at_one_adapted_layer_one_pass_equals_a_pass_for_each_expert(per_token: bool) -> None:
    """DyLoRA's first way: run each expert alone and mix their logits.

    It is the same where only the last layer is adapted and weights sum to 1.
    """
    model = experts_over(llama(), 4, ["lm_head"])
    ids = token_ids()
    weights = softmaxed(2, 12, 4) if per_token else torch.tensor([0.5, 0.25, 0.125, 0.125]).double()
    names = list(model.base_model.active_adapters)
    found = single_pass(model, ids, weights)
    mixed = torch.zeros_like(found)
    for index, name in enumerate(names):
        model.set_adapter(name)
        mixed = mixed + weights[..., index : index + 1] * single_pass(model, ids, None)
    assert_close(found, mixed)


def test_over_several_layers_a_pass_for_each_expert_is_something_else() -> None:
    """Which is why the N-pass way is only approximated by one pass, and the other way round."""
    model = experts_over(llama(), 2, TARGETS["llama"])
    ids, weights = token_ids(), torch.tensor([0.5, 0.5])
    found = single_pass(model, ids, weights)
    mixed = torch.zeros_like(found)
    for name in list(model.base_model.active_adapters):
        model.set_adapter(name)
        mixed = mixed + 0.5 * single_pass(model, ids, None)
    assert float((found - mixed).abs().max()) > 1e-3


@pytest.mark.parametrize("base", BASES)
def test_routing_weights_gradients(base: str) -> None:
    """Gradients of the weights, of every A and every B, against the slow way's."""
    model = experts_over(BASES[base](), 3, TARGETS[base])
    slow = SlowWay(BASES[base](), model)
    ids = token_ids()
    weights = softmaxed(2, 12, 3).requires_grad_()
    same = weights.detach().clone().requires_grad_()
    single_pass(model, ids, weights).square().mean().backward()
    slow(ids, same).square().mean().backward()
    assert_close(weights.grad, same.grad)
    for path, tensor in slow.tensors.items():
        module = model.base_model.model.get_submodule(path)
        assert_close(module.weight.grad, tensor.grad)
        assert float(module.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("base", BASES)
def test_backward_compatibility_no_routing(base: str) -> None:
    """Without the argument, and with None: PEFT's sum of the active adapters, to the bit."""
    model = experts_over(BASES[base](), 2, TARGETS[base])
    ids = token_ids()
    plain = model(input_ids=ids, use_cache=False).logits
    assert_equal(single_pass(model, ids, None), plain)
    # an expert alone, beside its own slow way with weight 1
    model.set_adapter("expert_1")
    alone = single_pass(model, ids, None)
    slow = SlowWay(BASES[base](), model)
    expected = slow(ids, torch.ones(1, dtype=torch.float64))
    assert_close(alone, expected)
    # summed, as PEFT does it
    model.base_model.set_adapter(["expert_0", "expert_1"])
    summed = SlowWay(BASES[base](), model)(ids, torch.ones(2, dtype=torch.float64))
    assert_close(plain, summed)


@pytest.mark.parametrize("experts", [2, 4, 8])
@pytest.mark.parametrize("base", BASES)
def test_multiple_experts_2_4_8(base: str, experts: int) -> None:
    model = experts_over(BASES[base](), experts, TARGETS[base])
    ids, weights = token_ids(), softmaxed(2, 12, experts)
    slow = SlowWay(BASES[base](), model)
    assert_close(single_pass(model, ids, weights), slow(ids, weights))
    one_hot = torch.eye(experts, dtype=torch.float64)[experts - 1]
    model.set_adapter(f"expert_{experts - 1}")
    alone = single_pass(model, ids, None)
    model.base_model.set_adapter([f"expert_{index}" for index in range(experts)])
    assert_close(single_pass(model, ids, one_hot), alone)


@pytest.mark.parametrize("length", [8, 128, 512])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_routing_weights_various_shapes(batch: int, length: int) -> None:
    model = experts_over(llama(), 3, TARGETS["llama"])
    ids, weights = token_ids(batch, length), softmaxed(batch, length, 3)
    with torch.no_grad():
        logits = single_pass(model, ids, weights)
        assert logits.shape == (batch, length, VOCABULARY)
        # the slow way on some rows and positions: a causal model does not look further
        rows, upto = min(batch, 2), min(length, 128)
        expected = SlowWay(llama(), model)(ids[:rows, :upto], weights[:rows, :upto])
        assert_close(logits[:rows, :upto], expected)
        constant = weights[:, :1]
        for form in (constant, constant[:, 0]):
            assert_equal(
                single_pass(model, ids, form),
                single_pass(model, ids, constant.expand(batch, length, 3)),
            )
        if batch == 1:
            assert_equal(single_pass(model, ids, constant[0, 0]), single_pass(model, ids, constant))


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_routing_weights_mixed_precision(dtype: torch.dtype, weights_dtype: torch.dtype) -> None:
    """A base in one dtype, weights in another: the output is the base's, and close to float64."""
    model = experts_over(llama(), 3, TARGETS["llama"], dtype=dtype)
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {torch.float32}
    ids = token_ids()
    weights = softmaxed(2, 12, 3).to(weights_dtype).requires_grad_()
    logits = single_pass(model, ids, weights)
    assert logits.dtype == dtype
    base = llama().to(dtype)
    slow = SlowWay(base, model)
    expected = slow(ids, weights.detach())
    # the error of the base model alone, rounded in every layer, is the measure
    base_error = (base(input_ids=ids).logits.double() - slow.base(input_ids=ids).logits).norm()
    error = (logits.detach().double() - expected).norm()
    assert float(error) <= 3 * float(base_error) + TOLERANCES[torch.float32].atol
    logits.float().square().mean().backward()
    assert weights.grad.dtype == weights_dtype
    assert bool(torch.isfinite(weights.grad).all())
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert bool(torch.isfinite(parameter.grad).all())


@pytest.mark.parametrize("automatic", [False, True])
def test_router_persistence(automatic: bool, tmp_path: Path) -> None:
    """An attached router is saved with the experts, and gives the same outputs when loaded."""
    model = experts_over(llama(), 3, TARGETS["llama"])
    torch.manual_seed(3)
    router = Router(HIDDEN, 3, top_k=2, track_maturity=True)
    nn.init.normal_(router.weight)
    config = MoELoraConfig(num_experts=3, top_k_experts=2) if automatic else None
    model.attach_router(router.double(), config)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(
        llama().double(), str(tmp_path / "expert_0"), adapter_name="expert_0"
    )
    for name in ("expert_1", "expert_2"):
        loaded.load_adapter(str(tmp_path / name), adapter_name=name)
    loaded.base_model.set_adapter(["expert_0", "expert_1", "expert_2"])
    loaded.eval()
    states = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    # tensors of a file may lie at odd addresses, where some processors' products round otherwise
    loaded = copy.deepcopy(loaded)
    assert_equal(loaded.get_routing_weights(states), model.get_routing_weights(states))
    for key, tensor in router.state_dict().items():
        assert_equal(loaded.router.state_dict()[key], tensor)
    ids = token_ids()
    assert_equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    weights = softmaxed(2, 12, 3)
    assert_equal(single_pass(loaded, ids, weights), single_pass(model, ids, weights))


def test_a_router_in_the_state_dict_persists_too() -> None:
    model, other = (experts_over(llama(), 2, TARGETS["llama"]) for _ in range(2))
    for each in (model, other):
        each.attach_router(Router(HIDDEN, 2))
    assert not torch.equal(model.router.weight, other.router.weight)
    other.load_state_dict(model.state_dict())
    assert_equal(other.router.weight, model.router.weight)
