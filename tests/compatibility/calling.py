"""Calls: forward, generate, mixed batches, attached routers."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale

from moelora import MoELoraConfig, Router, RoutingWeightsError
from tests.compatibility.registry import (
    EXPLICIT,
    MIXTURE,
    Area,
    Kind,
    Refusal,
    both,
    of_model,
    of_tuner,
)
from tests.lm import lora_config, mixture_config, perturb, tiny_llama, token_ids, trainable
from tests.tolerances import assert_close, assert_equal

AREA = Area("Calls")


@AREA.works(
    "`model(...)`",
    "the model, its tuner and the base below give the same",
    covers=both("forward", "__call__"),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    expected = kind.logits(model)
    assert not torch.equal(expected, tiny_llama()(token_ids()).logits)
    for owner in (model.base_model, model.base_model.model):
        assert_equal(kind.logits(owner), expected)
    arguments = kind.arguments()
    assert_equal(model.forward(token_ids(), **arguments).logits, expected)
    assert_equal(model.base_model.forward(token_ids(), **arguments).logits, expected)


@AREA.works(
    "`generate`",
    "with the KV cache as without, from the model and from its tuner",
    covers=both("generate") + of_model("prepare_inputs_for_generation"),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    arguments = kind.arguments(length=1)
    fixed = {"max_new_tokens": 4, "do_sample": False, "input_ids": token_ids(), **arguments}
    tokens = model.generate(**fixed)
    assert tokens.shape == (2, 11)
    assert_equal(model.generate(use_cache=False, **fixed), tokens)
    assert_equal(model.base_model.generate(**fixed), tokens)
    logits = model(tokens[:, :-1], **arguments).logits[:, 6:]
    assert_equal(logits.argmax(-1), tokens[:, 7:])
    prepared = model.prepare_inputs_for_generation(token_ids(), use_cache=False)
    assert_equal(prepared["input_ids"], token_ids())


@AREA.refuses(
    "mixed batches, `adapter_names=`",
    "adapter_names cannot be combined with a routed mixture",
    error=RoutingWeightsError,
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    model = kind.model()
    model.add_adapter("plain", lora_config())
    return Refusal(lambda: model(token_ids(), adapter_names=["default", "plain"]), model)


@AREA.refuses(
    "mixed batches, `adapter_names=`",
    "adapter_names cannot be combined with routing_weights: give weights that are one-hot per row "
    "instead.",
    error=RoutingWeightsError,
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    model = kind.model()
    return Refusal(lambda: kind.logits(model, adapter_names=["default", "second"]), model)


@AREA.refuses(
    "mixed batches that name an inactive mixture",
    "adapter_names cannot be combined with ",
    error=RoutingWeightsError,
)
def _(kind: Kind, _folder: Path) -> Refusal:
    model = MIXTURE.model()
    model.add_adapter("plain", lora_config())
    perturb(model)
    model.eval().set_adapter("plain")
    arguments = EXPLICIT.arguments(experts=1) if kind is EXPLICIT else {}
    return Refusal(
        lambda: model(token_ids(), adapter_names=["default", "plain"], **arguments), model
    )


@AREA.refuses(
    "mixed batches by `model.forward`",
    "adapter_names cannot be combined with ",
    error=RoutingWeightsError,
)
def _(kind: Kind, _folder: Path) -> Refusal:
    model = kind.model()
    names = ["default", "second"]
    if kind is MIXTURE:
        model.add_adapter("second", lora_config())
        perturb(model)
        model.eval().set_adapter("second")
    arguments = kind.arguments()
    return Refusal(lambda: model.forward(token_ids(), adapter_names=names, **arguments), model)


@AREA.works("`rescale_adapter_scale`", "scales what the experts add, for the time of the block")
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    before = kind.logits(model)
    with rescale_adapter_scale(model, 0.0):
        assert_equal(kind.logits(model), tiny_llama()(token_ids()).logits)
    assert_equal(kind.logits(model), before)


@AREA.works(
    "mixed batches by one-hot weights",
    "a plain adapter per row, `__base__` is a row of zeros",
    kinds=(EXPLICIT,),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    one_hot = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    expected = model(token_ids(), adapter_names=["second", "__base__"]).logits
    found = model(token_ids(), routing_weights=one_hot).logits
    assert_close(found, expected, dtype=torch.float32)


@AREA.works(
    "mixed batches by one-hot weights",
    "an expert per row, zeros give the base",
    kinds=(MIXTURE,),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    one_hot = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = model(token_ids(), routing_weights=one_hot).logits
    assert_equal(found[1:], tiny_llama()(token_ids()).logits[1:])
    alone = model(token_ids(), routing_weights=one_hot[:1]).logits
    assert_close(found[:1], alone[:1], dtype=torch.float32)


@AREA.works(
    "`attach_router`, `detach_router`, `has_router`, `get_routing_weights`",
    "a router beside the adapters, asked or routing by itself",
    covers=both(
        "attach_router",
        "detach_router",
        "get_routing_weights",
        "has_router",
        "moe_config",
        "router",
    ),
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    before = kind.logits(model)
    experts = 2 if kind is EXPLICIT else 3
    router = Router(16, experts).double()
    config = mixture_config(num_experts=experts)
    assert model.router is None
    assert model.get_routing_weights(torch.zeros(1, 2, 16)) is None
    for owner in (model, model.base_model):
        owner.attach_router(router)
        assert model.router is model.base_model.router is router
        assert model.moe_config is None
        hidden = torch.randn(2, 7, 16, dtype=torch.float64)
        assert_equal(owner.get_routing_weights(hidden), router(hidden))
        assert_equal(kind.logits(model), before)
        assert owner.has_router()
        assert owner.detach_router() is router
        assert not owner.has_router()
        assert model.router is None
        owner.attach_router(router, config)
        assert model.moe_config is model.base_model.moe_config is config
        with model.disable_adapter():
            states = model.base_model.model.model(token_ids()).last_hidden_state
        by_hand = model(token_ids(), routing_weights=owner.get_routing_weights(states)).logits
        assert_close(model(token_ids()).logits, by_hand, dtype=torch.float32)
        owner.detach_router()
    assert_equal(kind.logits(model), before)


@AREA.works(
    "`get_base_model`, `get_model_config`, `base_model_torch_dtype`",
    "those of the base",
    covers=of_model("get_base_model", "base_model_torch_dtype") + of_tuner("get_model_config"),
)
def _(kind: Kind, _folder: Path) -> None:
    base = tiny_llama()
    model = kind.model(base)
    assert model.get_base_model() is base
    assert model.base_model_torch_dtype is base.dtype
    assert model.base_model.get_model_config(model.base_model)["model_type"] == "llama"


@AREA.works(
    "`prepare_model_for_gradient_checkpointing`",
    "inputs require gradients; checkpointing changes no gradient",
    covers=of_model("prepare_model_for_gradient_checkpointing"),
)
def _(kind: Kind, _folder: Path) -> None:
    fields = {} if kind is EXPLICIT else {"expert_capacity_factor": None}
    gradients = []
    for checkpointing in (False, True):
        model = kind.model(**fields).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model._prepare_model_for_gradient_checkpointing(model.get_base_model())
        model(token_ids(), labels=token_ids(), **kind.arguments()).loss.backward()
        gradients.append([p.grad for p in trainable(model).values()])
    assert_close(*gradients)


@AREA.refuses(
    "`get_prompt`, `get_prompt_embedding_to_save`",
    "'LlamaForCausalLM' object has no attribute 'prompt_encoder'",
    error=AttributeError,
    covers=of_model("get_prompt", "get_prompt_embedding_to_save"),
)
def _(kind: Kind, _folder: Path) -> Refusal:
    model = kind.model()

    def call() -> None:
        try:
            model.get_prompt(1)
        except AttributeError:
            model.get_prompt_embedding_to_save("default")

    return Refusal(call)


@AREA.works("a plain adapter beside a mixture", "a shared expert of weight 1", kinds=(MIXTURE,))
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model(target_modules=["q_proj"])
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["v_proj"]))
    perturb(model)
    model.eval().base_model.set_adapter(["default", "plain"])
    found = model(token_ids()).logits
    base = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["v_proj"]), "plain").eval()
    state = model.state_dict()
    base.load_state_dict({k: v for k, v in state.items() if k in base.state_dict()}, strict=False)
    alone = kind.model(base.merge_and_unload(), target_modules=["q_proj"])
    alone.load_state_dict({k: v for k, v in state.items() if ".default." in k}, strict=False)
    assert_close(found, alone(token_ids()).logits, dtype=torch.float32)


@AREA.works(
    "a plain adapter beside a mixture", "one more expert, with one weight", kinds=(EXPLICIT,)
)
def _(kind: Kind, _folder: Path) -> None:
    model = kind.model()
    config: MoELoraConfig = mixture_config(num_experts=2)
    model.add_adapter("mixture", config)
    perturb(model)
    model.eval().base_model.set_adapter(["second", "mixture"])
    weights = torch.tensor([0.7, 0.0, 0.0], dtype=torch.float64)
    found = model(token_ids(), routing_weights=weights).logits
    model.set_adapter("second")
    assert_close(found, model(token_ids(), routing_weights=weights[:1]).logits, dtype=torch.float32)
