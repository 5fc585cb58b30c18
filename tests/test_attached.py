"""A router of the user's own on any LoRA model: attach, ask, state dicts, training, copies."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoHaConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import moelora
from moelora import (
    MoELoraConfig,
    Router,
    RoutingWeightsError,
    UnsupportedLayerError,
)
from tests.lm import (
    assert_same_snapshot,
    captured_inputs,
    lora_config,
    mixture,
    mixture_config,
    perturb,
    router_parameters,
    snapshot,
    tiny_llama,
    token_ids,
    trainable,
    two_loras,
)
from tests.models import unchecked_types
from tests.tolerances import assert_close, assert_equal

AUTOMATIC = mixture_config(num_experts=2, top_k_experts=1)


class Linear(nn.Module):
    """A router that knows nothing of moelora: one linear map and a softmax."""

    def __init__(self, experts: int = 2, hidden: int = 16) -> None:
        super().__init__()
        self.map = nn.Linear(hidden, experts).to(torch.float64)

    def forward(self, hidden_states: Tensor) -> Tensor:
        weights: Tensor = self.map(hidden_states).softmax(-1)
        return weights


class Returning(nn.Module):
    """Returns whatever the given function makes of the hidden states."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, hidden_states: Tensor) -> Any:
        return self.make(hidden_states)


class Buffered(nn.Module):
    """A router whose only tensor is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(16, 2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states @ self.table


def automatic(router: nn.Module | None = None) -> PeftModel:
    """Two plain LoRA adapters routed by an attached router in every forward."""
    model = two_loras().eval()
    model.attach_router(router or Linear(), AUTOMATIC)
    return model


def hidden_states() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 7, 16, generator=generator, dtype=torch.float64)


# Attaching and detaching -----------------------------------------------------------------------


@pytest.mark.parametrize("owner", [LoraModel, PeftModel])
@pytest.mark.parametrize(
    "name", ["attach_router", "detach_router", "get_routing_weights", "router", "moe_config"]
)
def test_every_lora_model_has_the_router_api(owner: type, name: str) -> None:
    assert hasattr(owner, name)


def test_a_model_starts_without_a_router() -> None:
    model = two_loras()
    assert model.router is None
    assert model.moe_config is None
    assert model.get_routing_weights(hidden_states()) is None
    assert model.detach_router() is None


@pytest.mark.parametrize("outer", [True, False])
def test_model_and_tuner_show_the_same_router(outer: bool) -> None:
    model = two_loras()
    router = Linear()
    (model if outer else model.base_model).attach_router(router, AUTOMATIC)
    assert model.router is router
    assert model.base_model.router is router
    assert model.moe_config is AUTOMATIC
    assert model.base_model.moe_config is AUTOMATIC


def test_detaching_returns_the_router_and_leaves_none() -> None:
    model = two_loras()
    router = Linear()
    model.attach_router(router, AUTOMATIC)
    assert model.detach_router() is router
    assert model.router is None
    assert model.moe_config is None
    assert not [key for key in model.state_dict() if "router" in key]


def test_attached_and_detached_a_model_is_as_before() -> None:
    model = two_loras()
    before, expected = snapshot(model), model(token_ids()).logits
    model.attach_router(Linear(), AUTOMATIC)
    model.detach_router()
    assert_same_snapshot(snapshot(model), before)
    assert_equal(model(token_ids()).logits, expected)


def test_a_second_router_replaces_the_first_with_a_warning() -> None:
    model = automatic(Linear())
    second = Linear()
    with pytest.warns(UserWarning, match="already has a router"):
        model.attach_router(second)
    assert model.router is second
    assert model.moe_config is None


def test_a_replaced_router_routes_no_longer() -> None:
    model = automatic(Linear())
    second = Linear()
    with pytest.warns(UserWarning, match="router"):
        model.attach_router(second, AUTOMATIC)
    assert_equal(model(token_ids()).logits, automatic(second)(token_ids()).logits)


def test_a_router_without_config_routes_no_forward() -> None:
    model = two_loras().eval()
    expected = model(token_ids()).logits
    model.attach_router(Linear())
    assert_equal(model(token_ids()).logits, expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_router_takes_the_models_mode_and_follows_it(training: bool) -> None:
    model = two_loras().train(training)
    router = Linear().train(not training)
    model.attach_router(router)
    assert router.training is training
    model.train(not training)
    assert router.training is not training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_router_moves_with_the_model(dtype: torch.dtype) -> None:
    model = automatic()
    model.to(dtype)
    assert {p.dtype for p in model.router.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("move", "dtype"),
    [("half", torch.float16), ("double", torch.float64), ("bfloat16", torch.bfloat16)],
)
def test_a_router_follows_half_and_double(move: str, dtype: torch.dtype) -> None:
    model = automatic()
    getattr(model, move)()
    assert {p.dtype for p in model.router.parameters()} == {dtype}


@pytest.mark.parametrize("router", [None, 3, "linear", torch.zeros(2), lambda x: x, Linear])
def test_what_is_no_module_is_refused(router: Any) -> None:
    model = two_loras()
    before = snapshot(model)
    with unchecked_types(), pytest.raises(TypeError, match="router_module"):
        model.attach_router(router)
    assert_same_snapshot(snapshot(model), before)


@pytest.mark.parametrize("config", [True, {}, "auto", MoELoraConfig, lora_config()])
def test_a_config_of_another_type_is_refused(config: Any) -> None:
    model = two_loras()
    before = snapshot(model)
    with unchecked_types(), pytest.raises(TypeError, match="moe_config"):
        model.attach_router(Linear(), config)
    assert model.router is None
    assert_same_snapshot(snapshot(model), before)


def test_a_tuner_that_is_no_lora_takes_no_router() -> None:
    model = get_peft_model(tiny_llama(), LoHaConfig(target_modules=["q_proj"]))
    for method in (lambda: model.attach_router(Linear()), model.detach_router):
        with pytest.raises(UnsupportedLayerError, match="LoHa"):
            method()


# Asking it -------------------------------------------------------------------------------------


def test_weights_are_those_of_the_router() -> None:
    model, router = two_loras(), Linear()
    model.attach_router(router)
    assert_equal(model.get_routing_weights(hidden_states()), router(hidden_states()))


def test_our_router_gives_the_renormalised_top_k_of_a_softmax() -> None:
    model = two_loras().eval()
    router = Router(16, 4, top_k=2, temperature=0.5).double()
    model.attach_router(router)
    probs = (hidden_states() @ router.weight.T / 0.5).softmax(-1)
    best = probs.topk(2, dim=-1)
    expected = torch.zeros_like(probs).scatter(-1, best.indices, best.values)
    expected = expected / expected.sum(-1, keepdim=True)
    assert_close(model.get_routing_weights(hidden_states()), expected)


def test_weights_given_back_route_the_model_with_a_gradient_for_the_router() -> None:
    model, router = two_loras(), Linear()
    model.attach_router(router)
    weights = model.get_routing_weights(hidden_states())
    model(token_ids(), routing_weights=weights).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("router", [Linear, Buffered, lambda: Router(16, 2)])
def test_hidden_states_of_another_dtype_are_converted(
    router: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    model = two_loras()
    model.attach_router(router())
    weights = model.get_routing_weights(hidden_states().to(dtype))
    assert weights.shape == (2, 7, 2)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", [Linear, Buffered, lambda: Router(16, 2).half()])
def test_a_router_of_another_dtype_routes_the_model(
    router: Callable[[], nn.Module], base: torch.dtype
) -> None:
    model = two_loras(tiny_llama(dtype=base)).eval()
    model.attach_router(router(), AUTOMATIC)
    logits = model(token_ids()).logits
    assert logits.dtype == base
    assert bool(logits.isfinite().all())


BAD: dict[str, Callable[[Tensor], Any]] = {
    "a tuple": lambda x: (x[..., :2],),
    "None": lambda x: None,
    "integers": lambda x: x[..., :2].long(),
    "other tokens": lambda x: x[:, 1:, :2],
    "other rows": lambda x: x[1:, :, :2],
    "no axis": lambda x: x.sum(),
    "one axis too many": lambda x: x[..., None, :2],
    "flattened": lambda x: x.flatten(0, 1)[:, :2],
}
BAD_VALUES: dict[str, Callable[[Tensor], Any]] = {
    "three experts": lambda x: x[..., :3],
    "no experts": lambda x: x[..., :0],
    "NaN": lambda x: x[..., :2] * float("nan"),
    "infinity": lambda x: x[..., :2] / 0.0,
}


@pytest.mark.parametrize("bad", BAD)
def test_a_router_that_answers_wrongly_is_named_when_asked(bad: str) -> None:
    model = two_loras()
    model.attach_router(Returning(BAD[bad]))
    with pytest.raises(RoutingWeightsError, match="Returning"):
        model.get_routing_weights(hidden_states())


@pytest.mark.parametrize("bad", {**BAD, **BAD_VALUES})
def test_a_router_that_answers_wrongly_stops_the_forward_and_leaves_nothing(bad: str) -> None:
    model = two_loras().eval()
    expected = model(token_ids()).logits
    model.attach_router(Returning({**BAD, **BAD_VALUES}[bad]), AUTOMATIC)
    with pytest.raises(RoutingWeightsError):
        model(token_ids())
    model.detach_router()
    assert_equal(model(token_ids()).logits, expected)


def test_a_router_of_another_width_is_refused_with_a_name() -> None:
    model = automatic(Router(12, 2))
    with pytest.raises(ValueError, match=r"(?i)router|hidden|12"):
        model(token_ids())


# State dicts -----------------------------------------------------------------------------------


def test_the_router_lies_under_its_name_in_the_state_dict() -> None:
    model = two_loras()
    before = set(model.state_dict())
    model.attach_router(Linear())
    names = {f"base_model.router.{name}" for name in ("map.weight", "map.bias")}
    assert set(model.state_dict()) - before == names
    assert {"router.map.weight", "router.map.bias"} <= set(model.base_model.state_dict())


@pytest.mark.parametrize("level", ["model", "tuner"])
def test_a_state_dict_restores_the_router(level: str) -> None:
    model, other = automatic(Linear()), automatic(Linear())
    source, target = (m if level == "model" else m.base_model for m in (model, other))
    target.load_state_dict(source.state_dict())
    assert_equal(list(other.router.parameters()), list(model.router.parameters()))
    assert_equal(other(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("level", ["model", "tuner"])
def test_a_state_dict_without_a_router_loads_strictly_with_a_warning(level: str) -> None:
    old, model = two_loras(), automatic()
    kept = [p.clone() for p in model.router.parameters()]
    perturb(old, seed=9)
    source, target = (m if level == "model" else m.base_model for m in (old, model))
    with pytest.warns(UserWarning, match="older checkpoint"):
        target.load_state_dict(source.state_dict(), strict=True)
    assert_equal(list(model.router.parameters()), kept)
    model.detach_router()
    assert_equal(list(model.state_dict().values()), list(old.state_dict().values()))


def test_a_state_dict_with_half_a_router_is_refused() -> None:
    model = automatic()
    state = model.state_dict()
    del state["base_model.router.map.bias"]
    with pytest.raises(RuntimeError, match=r"router\.map\.bias"):
        model.load_state_dict(state)


def test_a_state_dict_with_more_than_the_router_is_refused() -> None:
    model = automatic()
    state = {**model.state_dict(), "base_model.router.other": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"router\.other"):
        model.load_state_dict(state)


@pytest.mark.parametrize("strict", [True, False])
def test_a_routers_tensors_wait_for_the_router(strict: bool) -> None:
    source, model = automatic(), two_loras()
    with pytest.warns(UserWarning, match="kept for attach_router"):
        model.load_state_dict(source.state_dict(), strict=strict)
    router = Linear()
    model.attach_router(router)
    assert_equal(list(router.parameters()), list(source.router.parameters()))


def test_a_loading_keeps_the_given_state_dict_whole() -> None:
    source, model = automatic(), two_loras()
    state = source.state_dict()
    keys = list(state)
    with pytest.warns(UserWarning, match="router"):
        model.load_state_dict(state)
    assert list(state) == keys


def test_kept_tensors_go_to_one_router_only() -> None:
    source, model = automatic(), two_loras()
    with pytest.warns(UserWarning, match="router"):
        model.load_state_dict(source.state_dict())
    model.attach_router(Linear())
    model.detach_router()
    third = Linear()
    before = [p.clone() for p in third.parameters()]
    model.attach_router(third)
    assert_equal(list(third.parameters()), before)


def test_kept_tensors_that_do_not_fit_leave_model_and_tensors_alone() -> None:
    source, model = automatic(), two_loras()
    with pytest.warns(UserWarning, match="router"):
        model.load_state_dict(source.state_dict())
    with pytest.raises((RuntimeError, ValueError), match="map"):
        model.attach_router(Linear(5))
    assert model.router is None
    right = Linear()
    model.attach_router(right)
    assert_equal(list(right.parameters()), list(source.router.parameters()))


@pytest.mark.parametrize("name", ["first", "second"])
def test_no_adapters_state_dict_holds_the_router(name: str) -> None:
    model = automatic()
    for target in (model, model.base_model):
        keys = get_peft_model_state_dict(target, adapter_name=name)
        assert keys
        assert not [key for key in keys if "router" in key or "map" in key]


def test_a_base_with_a_part_named_router_loses_no_adapter_tensor() -> None:
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.router(x)
            return output

    config = lora_config(target_modules=["router"], task_type=None)
    base = inject_adapter_in_model(config, Base())
    keys = set(get_peft_model_state_dict(base))
    assert keys == {"router.lora_A.weight", "router.lora_B.weight"}


# Training, copies, unloading -------------------------------------------------------------------


class Gates(nn.Module):
    """A gate per expert, so that one expert's router learns too."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.map = nn.Linear(16, experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        weights: Tensor = self.map(hidden_states).sigmoid()
        return weights


def gated(kind: str, *, seed: int) -> PeftModel:
    """A float32 model of one adapter, and its router; the seed draws both."""
    base = tiny_llama(dtype=torch.float32)
    plain = kind == "plain"
    model = get_peft_model(base, lora_config()) if plain else mixture(base, name="skill")
    perturb(model, seed=seed)
    torch.manual_seed(seed)
    model.attach_router(Gates(1 if plain else 3), mixture_config())
    return model


def trainer(model: PeftModel, folder: Path, **options: Any) -> Trainer:
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(4)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        learning_rate=0.05,
        per_device_train_batch_size=2,
        report_to=[],
        save_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2])


def test_a_trainer_trains_router_and_adapters(tmp_path: Path) -> None:
    model = gated("plain", seed=1)
    before = {name: p.clone() for name, p in trainable(model).items()}
    trainer(model, tmp_path).train()
    assert "base_model.router.map.weight" in before
    assert [n for n, p in trainable(model).items() if torch.equal(p, before[n])] == []


@pytest.mark.parametrize("kind", ["plain", "mixture"])
def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(kind: str, tmp_path: Path) -> None:
    model, resumed = gated(kind, seed=1), gated(kind, seed=2)
    trainer(model, tmp_path).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=checkpoint)
    assert_close(list(trainable(resumed).values()), list(trainable(model).values()))


def test_the_best_model_has_its_router(tmp_path: Path) -> None:
    model = gated("plain", seed=1)
    # by this measure the first is the best
    options = {"metric_for_best_model": "loss", "greater_is_better": True}
    training = trainer(
        model,
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        **options,
    )
    training.train()
    assert Path(training.state.best_model_checkpoint).name == "checkpoint-1"
    saved = load_file(tmp_path / "checkpoint-1" / "router.safetensors")
    assert_equal(model.router.map.weight.detach(), saved["map.weight"])


def test_adding_an_adapter_leaves_the_router_trainable() -> None:
    model = automatic()
    model.add_adapter("third", lora_config())
    model.base_model.set_adapter(["first", "second"])
    assert all(p.requires_grad for p in model.router.parameters())


def _reloaded(model: PeftModel) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _reloaded])
def test_a_copy_routes_by_its_own_copy_of_the_router(copied: Callable[[Any], Any]) -> None:
    model = automatic()
    expected = model(token_ids()).logits
    other = copied(model)
    with torch.no_grad():
        for parameter in model.router.parameters():
            parameter.normal_(std=3)
    assert other.router is not model.router
    assert_equal(other(token_ids()).logits, expected)
    assert other.moe_config.num_experts == 2
    other.detach_router()
    assert_equal(other(token_ids()).logits, two_loras().eval()(token_ids()).logits)


def test_unload_returns_the_base_without_a_router() -> None:
    model = automatic()
    base = model.unload()
    assert not [key for key in base.state_dict() if "router" in key]
    assert_equal(base(token_ids()).logits, tiny_llama().eval()(token_ids()).logits)


def test_after_unload_new_adapters_are_not_routed_by_the_old_router() -> None:
    base = automatic().unload()
    found = two_loras(base).eval()
    calls: list[int] = []
    base.register_forward_hook(lambda *_: calls.append(1))
    assert found.router is None
    assert_equal(found(token_ids()).logits, two_loras().eval()(token_ids()).logits)


def test_uninstalled_automatic_routing_is_refused_instead_of_summed() -> None:
    model = automatic()
    moelora.uninstall()
    try:
        with pytest.raises(UnsupportedLayerError, match="uninstalled"):
            model(token_ids())
    finally:
        moelora.install()


def test_no_forward_writes_to_the_hidden_states() -> None:
    model = two_loras()
    model.attach_router(Linear().float())
    given = hidden_states()
    before = given.clone()
    model.get_routing_weights(given)
    assert_equal(given, before)


def test_layers_of_an_attached_model_see_no_graph_of_the_first_pass() -> None:
    model = automatic().train()
    with captured_inputs(model) as inputs:
        model(token_ids()).logits.sum().backward()
    assert inputs
    assert not router_parameters(model)


def test_attaching_warns_of_nothing() -> None:
    model = two_loras()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.attach_router(Linear(), AUTOMATIC)
