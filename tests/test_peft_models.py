"""Explicit weights through every kind of PeftModel, and every way to call one."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from moelora import MoELoraConfig, RoutingWeightsError, UnsupportedLayerError
from tests.architectures import (
    ARCHITECTURES,
    EXPERTS,
    ROWS,
    TOKENS,
    build,
    every_architecture,
    random_weights,
    run,
)
from tests.models import (
    activate,
    adapter_parameters,
    gradients,
    llama_config,
    lora_layers,
    lora_model,
    randomise,
    token_ids,
)
from tests.tolerances import assert_close, assert_equal


def single_adapters(name: str, model: PeftModel) -> list[Tensor]:
    """PEFT's own output with each adapter alone."""
    outputs = []
    names = list(model.base_model.active_adapters)
    for adapter in names:
        activate(model, [adapter])
        outputs.append(run(name, model))
    activate(model, names)
    return outputs


# Every kind of model ---------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("shape", ["[batch, E]", "[batch, 1, E]"])
def test_each_row_can_have_an_adapter_of_its_own(name: str, shape: str) -> None:
    model = build(name)
    singles = single_adapters(name, model)
    with model.disable_adapter():
        base = run(name, model)
    # with fewer experts than rows, the rows left over have none
    weights = torch.eye(ROWS, ARCHITECTURES[name].experts, dtype=torch.float64)
    weights = weights if shape == "[batch, E]" else weights[:, None]
    output = run(name, model, routing_weights=weights)
    wanted = [*singles, *[base] * ROWS][:ROWS]
    assert_close(output, torch.stack([wanted[row][row] for row in range(ROWS)]))


@every_architecture
def test_constant_one_hot_weights_equal_the_single_adapter(name: str) -> None:
    model = build(name)
    for index, single in enumerate(single_adapters(name, model)):
        weights = torch.eye(ARCHITECTURES[name].experts, dtype=torch.float64)[index]
        assert_close(run(name, model, routing_weights=weights), single)


@every_architecture
def test_weights_of_one_equal_all_adapters_together(name: str) -> None:
    model = build(name)
    together = run(name, model)
    weights = torch.ones_like(random_weights(name, ROWS))
    assert_close(run(name, model, routing_weights=weights), together)


@every_architecture
def test_zero_weights_equal_the_base_model_to_the_bit(name: str) -> None:
    model = build(name)
    with model.disable_adapter():
        base = run(name, model)
    assert_equal(run(name, model, routing_weights=0 * random_weights(name)), base)


@every_architecture
def test_a_disabled_adapter_gives_the_base_with_weights_too(name: str) -> None:
    model = build(name)
    with model.disable_adapter():
        base = run(name, model)
        assert_equal(run(name, model, routing_weights=random_weights(name, ROWS)), base)


@every_architecture
def test_no_weights_are_plain_peft_to_the_bit(name: str) -> None:
    model = build(name)
    before = run(name, model)
    run(name, model, routing_weights=random_weights(name, ROWS))
    assert_equal(run(name, model, routing_weights=None), before)
    assert_equal(run(name, model), before)


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.per_token])
def test_per_token_weights_that_are_equal_for_all_tokens_equal_those_per_row(name: str) -> None:
    model = build(name)
    per_row = random_weights(name, ROWS)
    per_token = per_row[:, None].expand(-1, TOKENS, -1)
    assert_close(
        run(name, model, routing_weights=per_token), run(name, model, routing_weights=per_row)
    )


@pytest.mark.parametrize("name", ["causal LM", "causal LM of Conv1D layers", "flattened tokens"])
def test_per_token_weights_meet_their_own_tokens(name: str) -> None:
    """In a causal model the first tokens see only the weights of the first tokens."""
    model = build(name)
    weights = torch.randn(ROWS, TOKENS, EXPERTS, dtype=torch.float64)
    other = weights.clone()
    other[:, 3:] = torch.randn_like(other[:, 3:])
    one, two = (run(name, model, routing_weights=value) for value in (weights, other))
    assert_close(one[:, :3], two[:, :3])
    assert float((one[:, 3:] - two[:, 3:]).detach().abs().max()) > 0
    swapped = run(name, model, routing_weights=weights[[1, 0, 2]])
    assert_close(swapped[2], one[2])


@pytest.mark.parametrize("name", ["causal LM", "causal LM of Conv1D layers", "flattened tokens"])
def test_splitting_the_batch_changes_nothing(name: str) -> None:
    model = build(name)
    weights = torch.randn(ROWS, TOKENS, EXPERTS, dtype=torch.float64)
    ids = ARCHITECTURES[name].batch()["input_ids"]
    rows = [
        model(input_ids=ids[row : row + 1], routing_weights=weights[row : row + 1]).logits
        for row in range(ROWS)
    ]
    assert_close(torch.cat(rows), run(name, model, routing_weights=weights))


# models that normalise in float64; Llama and T5 do so in float32 whatever their dtype
@pytest.mark.parametrize("name", ["causal LM of Conv1D layers", "flattened tokens"])
def test_gradients_equal_finite_differences(name: str) -> None:
    model = build(name)
    weights = torch.randn(ROWS, EXPERTS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda value: run(name, model, routing_weights=value), [weights], fast_mode=True
    )


@every_architecture
def test_gradients_reach_the_weights_and_every_adapter(name: str) -> None:
    model = build(name)
    weights = random_weights(name, ROWS).requires_grad_()
    inputs = [weights, *adapter_parameters(model)]
    for gradient in gradients(run(name, model, routing_weights=weights), inputs):
        assert float(gradient.abs().max()) > 0


def test_a_model_called_by_position_or_by_embeddings_gives_the_same() -> None:
    model = build("causal LM")
    ids = token_ids(ROWS, TOKENS)
    weights = torch.randn(ROWS, TOKENS, EXPERTS, dtype=torch.float64)
    config = LoraConfig(target_modules=["q_proj"])
    narrow = lora_model(LlamaForCausalLM(llama_config()).double(), [config] * 1)
    randomise(narrow)
    by_name = model(input_ids=ids, routing_weights=weights).logits
    assert_close(model(ids, routing_weights=weights).logits, by_name)
    embeddings = narrow.get_input_embeddings()(ids)
    weights = weights[..., :1]
    assert_close(
        narrow(inputs_embeds=embeddings, routing_weights=weights).logits,
        narrow(input_ids=ids, routing_weights=weights).logits,
    )


# Ways to call ----------------------------------------------------------------------------------


def test_tuner_base_and_injected_model_take_weights_like_the_peft_model() -> None:
    model = build("causal LM")
    weights = torch.randn(ROWS, TOKENS, EXPERTS, dtype=torch.float64)
    expected = run("causal LM", model, routing_weights=weights)
    assert_equal(run("causal LM", model.base_model, routing_weights=weights), expected)
    assert_equal(run("causal LM", model.base_model.model, routing_weights=weights), expected)


def test_a_bare_lora_model_takes_weights() -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    tuner = LoraModel(LlamaForCausalLM(llama_config()).double(), config, "only")
    full = run("causal LM", tuner)
    assert_close(run("causal LM", tuner, routing_weights=torch.ones(1)), full)
    half = run("causal LM", tuner, routing_weights=torch.full((ROWS, TOKENS, 1), 0.5))
    assert float((half - full).detach().abs().max()) > 0


def _injected(*configs: LoraConfig) -> nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(llama_config()).double()
    for number, config in enumerate(configs):
        peft.inject_adapter_in_model(config, base, f"e{number}")
    for layer in lora_layers(base):
        layer.set_adapter([f"e{number}" for number in range(len(configs))])
    randomise(base, std=0.3)
    return base


def test_an_injected_model_takes_weights() -> None:
    configs = [LoraConfig(r=r, target_modules=["q_proj", "v_proj"]) for r in (2, 3)]
    injected = _injected(*configs)
    wrapped = lora_model(LlamaForCausalLM(llama_config()).double(), configs)
    wrapped.load_state_dict(
        {f"base_model.model.{key}": value for key, value in injected.state_dict().items()}
    )
    weights = torch.randn(ROWS, TOKENS, 2, dtype=torch.float64)
    assert_equal(
        run("causal LM", injected, routing_weights=weights),
        run("causal LM", wrapped, routing_weights=weights),
    )


def test_adapters_injected_one_after_the_other_keep_their_number_of_experts() -> None:
    mixture = MoELoraConfig(num_experts=3, target_modules=["q_proj"], r=1)
    model = _injected(mixture, LoraConfig(r=2, target_modules=["v_proj"]))
    run("causal LM", model, routing_weights=torch.rand(ROWS, TOKENS, 4))
    with pytest.raises(RoutingWeightsError, match=r"E=4 experts .*\['e0', 'e1'\]"):
        run("causal LM", model, routing_weights=torch.rand(ROWS, TOKENS, 2))


def test_explicit_weights_reach_a_wrapped_linear_forward_as_the_keyword(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[object] = []
    original = Linear.forward

    def traced(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs.get("routing_weights"))
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(Linear, "forward", traced)
    model = build("no task type")
    weights = torch.rand(ROWS, TOKENS, EXPERTS, dtype=torch.float64)
    run("no task type", model, routing_weights=weights)
    assert len(seen) == 4
    assert all(isinstance(value, Tensor) and torch.equal(value, weights) for value in seen)
    seen.clear()
    run("no task type", model)
    assert seen == [None] * 4


def test_threads_with_different_weights_do_not_meet() -> None:
    model = build("no task type")
    weights = [torch.randn(ROWS, TOKENS, EXPERTS, dtype=torch.float64) for _ in range(4)]
    expected = [run("no task type", model, routing_weights=value) for value in weights]
    results: dict[int, Tensor] = {}
    ids = ARCHITECTURES["no task type"].batch()["input_ids"]

    def work(index: int) -> None:
        for _ in range(5):
            results[index] = model(input_ids=ids, routing_weights=weights[index]).logits

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_equal([results[index] for index in range(4)], expected)


def test_threads_may_make_the_models_first_call_with_weights() -> None:
    weights = [torch.randn(ROWS, TOKENS, EXPERTS, dtype=torch.float64) for _ in range(4)]
    ids = ARCHITECTURES["no task type"].batch()["input_ids"]
    expected = [run("no task type", build("no task type"), routing_weights=w) for w in weights]
    model = build("no task type")
    barrier = threading.Barrier(4)
    results: dict[int, Tensor] = {}

    def work(index: int) -> None:
        barrier.wait()
        results[index] = model(input_ids=ids, routing_weights=weights[index]).logits

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_equal([results[index] for index in range(4)], expected)


def test_a_part_of_the_model_called_directly_does_not_swallow_weights() -> None:
    model = build("no task type")
    backbone = model.base_model.model.model
    ids = ARCHITECTURES["no task type"].batch()["input_ids"]
    before = backbone(input_ids=ids).last_hidden_state
    with pytest.raises((UnsupportedLayerError, RoutingWeightsError), match="routing_weights"):
        backbone(input_ids=ids, routing_weights=torch.zeros(EXPERTS))
    assert_equal(backbone(input_ids=ids).last_hidden_state, before)


def test_a_copied_or_unpickled_model_takes_weights_of_its_own() -> None:
    model = build("no task type")
    weights = torch.randn(ROWS, TOKENS, EXPERTS, dtype=torch.float64, requires_grad=True)
    expected = run("no task type", model, routing_weights=weights)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(run("no task type", copied, routing_weights=weights), expected)
        for layer in lora_layers(copied):
            layer.lora_B["e0"].weight.data.zero_()
    assert_equal(run("no task type", model, routing_weights=weights), expected)


# Other tuners ----------------------------------------------------------------------------------

OTHER_TUNERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LoHa": (
        lambda: get_peft_model(
            LlamaForCausalLM(llama_config()), peft.LoHaConfig(target_modules=["q_proj"])
        ),
        "LoHaModel",
    ),
    "IA3": (
        lambda: get_peft_model(
            LlamaForCausalLM(llama_config()),
            peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        ),
        "IA3Model",
    ),
    "AdaLora": (
        lambda: get_peft_model(
            LlamaForCausalLM(llama_config()),
            peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        ),
        "AdaLoraModel",
    ),
    "prompt tuning": (
        lambda: get_peft_model(
            LlamaForCausalLM(llama_config()),
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        ),
        "prompt|Prompt|LlamaForCausalLM",
    ),
    "mixed": (
        lambda: get_peft_model(
            LlamaForCausalLM(llama_config()), LoraConfig(target_modules=["q_proj"]), mixed=True
        ),
        "MixedModel",
    ),
}


@pytest.mark.parametrize("name", OTHER_TUNERS)
def test_a_tuner_that_is_not_lora_refuses_weights_instead_of_swallowing_them(name: str) -> None:
    make, tuner = OTHER_TUNERS[name]
    model = make()
    before = run("causal LM", model)
    with pytest.raises(
        UnsupportedLayerError, match=rf"need LoRA adapters, but this model's tuner is ({tuner})"
    ):
        run("causal LM", model, routing_weights=torch.ones(1))
    assert_equal(run("causal LM", model), before)
    assert_equal(run("causal LM", model, routing_weights=None), before)


@pytest.mark.parametrize("name", ["LoHa", "AdaLora", "mixed"])
def test_such_a_tuner_called_directly_refuses_weights_too(name: str) -> None:
    tuner = OTHER_TUNERS[name][0]().base_model
    with pytest.raises(UnsupportedLayerError, match="need LoRA adapters"):
        run("causal LM", tuner, routing_weights=torch.ones(1))


def test_an_x_lora_model_refuses_weights(tmp_path: Any) -> None:
    base = LlamaForCausalLM(llama_config())
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=16,
        adapters={"0": str(tmp_path)},
        use_trainable_adapters=True,
    )
    base = LlamaForCausalLM(llama_config(use_cache=False))
    model = get_peft_model(base, config)
    with pytest.raises(UnsupportedLayerError, match="tuner is XLoraModel"):
        run("causal LM", model, routing_weights=torch.ones(1))


def test_a_model_whose_adapters_were_deleted_refuses_weights() -> None:
    model = build("no task type")
    for name in ("e0", "e1", "e2"):
        model.base_model.delete_adapter(name)
    with pytest.raises(RoutingWeightsError, match=r"E=0 experts .* active adapters \[\]"):
        run("no task type", model.base_model, routing_weights=torch.rand(EXPERTS))


def test_unloading_takes_every_hook_along() -> None:
    model = build("no task type")
    run("no task type", model, routing_weights=torch.rand(EXPERTS))
    base = model.unload()
    assert not list(lora_layers(base))
    modules = list(base.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
    assert not any("moelora" in name for module in modules for name in vars(module))
