"""One table of wrong input: which error each gets, and that nothing of the model has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, get_peft_model
from torch import Tensor, nn

from moelora import (
    ConfigError,
    MergeError,
    MoELoraConfig,
    MoELoraError,
    Router,
    RoutingWeightsError,
    UnsupportedLayerError,
    mark_mature,
    record_routing,
)
from tests.lm import (
    lora_config,
    lora_layers,
    mixture,
    mixture_config,
    perturb,
    snapshot,
    tiny_llama,
    token_ids,
    two_loras,
)

CONFIG, ADAPTER, ROUTER = "adapter_config.json", "adapter_model.safetensors", "router.safetensors"


class World:
    """What wrong input is given to: a mixture beside a plain LoRA, two plain LoRAs, a folder."""

    def __init__(self, folder: Path) -> None:
        self.mixture = mixture(router_type="learned_with_maturity")
        self.mixture.add_adapter("plain", lora_config())
        perturb(self.mixture)
        self.mixture.eval()
        self.loras = two_loras().eval()
        self.root = folder

    @property
    def folder(self) -> Path:
        """A saved mixture; saved when it is first asked for."""
        folder = self.root / "saved"
        if not folder.exists():
            mixture(num_experts=3).save_pretrained(folder)
        return folder

    def state(self) -> list[Any]:
        """Everything that must not change."""
        return [
            (
                snapshot(model),
                list(model.active_adapters),
                list(model.peft_config),
                [(name, len(m._forward_pre_hooks)) for name, m in model.named_modules()],
            )
            for model in (self.mixture, self.loras)
        ]

    def logits(self) -> list[Tensor]:
        """The next forwards."""
        weights = torch.tensor([0.5, -1.0], dtype=torch.float64)
        return [
            self.mixture(token_ids()).logits,
            self.loras(token_ids(), routing_weights=weights).logits,
        ]


@dataclass(frozen=True)
class Bad:
    """One wrong input, the error it gets, and what the message says."""

    call: Callable[[World], Any]
    match: str
    error: type[Exception] | tuple[type[Exception], ...] = MoELoraError


# Configs ---------------------------------------------------------------------------------------


def config(match: str, **fields: Any) -> Bad:
    """A field that ``MoELoraConfig`` refuses, on the way into a model."""
    return Bad(
        lambda world: world.mixture.add_adapter("new", MoELoraConfig(**fields)), match, ConfigError
    )


CONFIGS = {
    "one expert": config(r"num_experts must be .*\[2, .*got 1\.", num_experts=1),
    "no expert": config("num_experts must be .*got 0", num_experts=0),
    "minus one expert": config("num_experts must be .*got -1", num_experts=-1),
    "a million million experts": config("num_experts must be .*got 10{12}", num_experts=10**12),
    "half an expert": config(r"num_experts must be .*got 2\.5", num_experts=2.5),
    "experts as text": config("num_experts must be .*got '4'", num_experts="4"),
    "experts as a flag": config("num_experts must be .*got True", num_experts=True),
    "a list of experts": config(r"num_experts must be .*got \[4\]", num_experts=[4]),
    "top k of zero": config("top_k_experts must be .*got 0", top_k_experts=0),
    "top k beyond the experts": config(
        "top_k_experts must be between 1 and num_experts=4, got 5", top_k_experts=5
    ),
    "top k as text": config("top_k_experts must be .*got 'all'", top_k_experts="all"),
    "temperature of zero": config("router_temperature must be .*> 0, got 0", router_temperature=0),
    "negative temperature": config("router_temperature .*got -1", router_temperature=-1.0),
    "temperature of NaN": config("router_temperature .*got nan", router_temperature=float("nan")),
    "negative coefficient": config(
        r"router_aux_loss_coef must be .*>= 0, got -0\.1", router_aux_loss_coef=-0.1
    ),
    "infinite coefficient": config(
        "router_aux_loss_coef .*got inf", router_aux_loss_coef=float("inf")
    ),
    "capacity of zero": config(
        "expert_capacity_factor must be None or .*> 0, got 0", expert_capacity_factor=0.0
    ),
    "dropout of one": config(r"expert_dropout .*\[0, 1\), got 1", expert_dropout=1.0),
    "unknown router type": config(
        "router_type must be one of 'learned_with_maturity', .*got 'softmax'", router_type="softmax"
    ),
    "unknown loss": config(
        "load_balance_loss_type must be one of .*got 'kl'", load_balance_loss_type="kl"
    ),
    "unknown scope": config("router_scope must be one of .*got 'token'", router_scope="token"),
    "hidden size of zero": config(
        "router_hidden_size must be None or .*got 0", router_hidden_size=0
    ),
    "routing as text": config(
        "use_moe_routing must be True or False, got 'no'", use_moe_routing="no"
    ),
    "fixed weights for a learned router": config(
        "fixed_routing_weights needs router_type='fixed'", fixed_routing_weights=[0.5, 0.5]
    ),
    "too few fixed weights": config(
        "fixed_routing_weights must be .*num_experts=4",
        router_type="fixed",
        fixed_routing_weights=[1.0],
    ),
    "newer format": config("moelora_format 99 .*Upgrade moelora", moelora_format=99),
    "DoRA in a mixture": config("use_dora is not supported in a mixture", use_dora=True),
    "PiSSA in a mixture": config("init_lora_weights .*'pissa'", init_lora_weights="pissa"),
    "a rank of zero": Bad(
        lambda world: world.mixture.add_adapter("new", mixture_config(r=0)),
        r"`?r`? .*positive|must be",
        ValueError,
    ),
    "a target that is not there": Bad(
        lambda world: world.mixture.add_adapter("new", mixture_config(target_modules=["nowhere"])),
        r"(?s)[Tt]arget modules .*nowhere.* not found",
        ValueError,
    ),
    "a name that is taken": Bad(
        lambda world: world.mixture.add_adapter("plain", mixture_config()),
        "plain.*already exists",
        ValueError,
    ),
    "a misspelt field": Bad(lambda world: MoELoraConfig(num_expert=8), "num_expert'", TypeError),
}


# Explicit weights ------------------------------------------------------------------------------


def weights(match: str, value: Any, error: type[Exception] = RoutingWeightsError) -> Bad:
    """Weights that two plain adapters refuse, for two rows of seven tokens."""
    return Bad(lambda world: world.loras(token_ids(), routing_weights=value), match, error)


WEIGHTS = {
    "one expert too many": weights(r"E=2 .*got shape \(3,\)", torch.ones(3)),
    "one expert too few": weights(r"E=2 .*got shape \(2, 7, 1\)", torch.ones(2, 7, 1)),
    "no experts": weights(r"E=2 .*got shape \(0,\)", torch.ones(0)),
    "a number": weights("must be a torch.Tensor .*got float", 1.0),
    "a list": weights("must be a torch.Tensor .*got list", [0.5, 0.5]),
    "text": weights("must be a torch.Tensor .*got str", "uniform"),
    "a scalar tensor": weights(r"got shape \(\)", torch.tensor(1.0)),
    "five axes": weights(r"got shape \(1, 1, 1, 1, 2\)", torch.ones(1, 1, 1, 1, 2)),
    "integers": weights("floating point dtype, got torch.int64", torch.tensor([0, 1])),
    "booleans": weights("floating point dtype, got torch.bool", torch.tensor([True, False])),
    "complex numbers": weights("dtype, got torch.complex64", torch.ones(2, dtype=torch.complex64)),
    "NaN": weights("must be finite", torch.tensor([0.5, torch.nan])),
    "infinity": weights("must be finite", torch.tensor([0.5, -torch.inf])),
    "another batch": weights(
        r"\(3, 7, 2\) cannot be aligned .*layers\.0\.self_attn\.q_proj", torch.ones(3, 7, 2)
    ),
    "another length": weights(r"\(2, 6, 2\) cannot be aligned", torch.ones(2, 6, 2)),
    "another batch without seq": weights(
        r"\(3, 2\) cannot be aligned|\(3, 1, 2\)", torch.ones(3, 2)
    ),
    "another number of blocks": weights("2 layers in axis 2", torch.ones(2, 7, 3, 2)),
    "a sparse tensor": weights(
        "routing_weights", torch.tensor([0.0, 1.0]).to_sparse(), RoutingWeightsError
    ),
    "a tensor without values": weights(
        "routing_weights", torch.ones(2, device="meta"), RoutingWeightsError
    ),
    "too few positions for a prompt": Bad(
        lambda world: world.loras.generate(
            token_ids(), routing_weights=torch.ones(2, 3, 2), max_new_tokens=1
        ),
        "7 positions of the prompt",
        RoutingWeightsError,
    ),
    "weights in a mixture's shape for generate": Bad(
        lambda world: world.mixture.generate(
            token_ids(), routing_weights=torch.ones(2), max_new_tokens=1
        ),
        "E=3",
        RoutingWeightsError,
    ),
    "weights given to the backbone": Bad(
        lambda world: world.loras.get_base_model().model(
            token_ids(), routing_weights=torch.ones(2)
        ),
        "backbone",
        UnsupportedLayerError,
    ),
    "weights given to one layer": Bad(
        lambda world: next(iter(lora_layers(world.loras).values()))(
            torch.ones(2, 7, 16, dtype=torch.float64), routing_weights=torch.ones(5)
        ),
        "E=2",
        RoutingWeightsError,
    ),
}


# Misspelt keywords -----------------------------------------------------------------------------


def keyword(name: str) -> Bad:
    """A near miss of ``routing_weights``, which a model that takes any keyword would swallow."""
    return Bad(
        lambda world: world.loras(token_ids(), **{name: torch.ones(2)}),
        f"{name}.*routing_weights",
        (MoELoraError, TypeError),
    )


def generate_keyword(name: str) -> Bad:
    """The same in ``generate``."""
    return Bad(
        lambda world: world.loras.generate(token_ids(), max_new_tokens=1, **{name: torch.ones(2)}),
        name,
        ValueError,
    )


MISSPELT = [
    "routing_weight",
    "routing_weigths",
    "routing_wieghts",
    "routingweights",
    "router_weights",
    "Routing_Weights",
]
KEYWORDS = {
    **{f"{name}=": keyword(name) for name in MISSPELT},
    **{f"generate({name}=)": generate_keyword(name) for name in MISSPELT[:2]},
    "routing_weight= for a mixture": Bad(
        lambda world: world.mixture(token_ids(), routing_weight=torch.ones(3)),
        "routing_weight.*routing_weights",
        (MoELoraError, TypeError),
    ),
    "routing_weight= for the tuner": Bad(
        lambda world: world.loras.base_model(token_ids(), routing_weight=torch.ones(2)),
        "routing_weight.*routing_weights",
        (MoELoraError, TypeError),
    ),
    "routing_weight= for the base inside": Bad(
        lambda world: world.loras.get_base_model()(token_ids(), routing_weight=torch.ones(2)),
        "routing_weight.*routing_weights",
        (MoELoraError, TypeError),
    ),
    "attach_router(config=)": Bad(
        lambda world: world.loras.attach_router(Router(16, 2), config=mixture_config()),
        "unexpected keyword argument 'config'",
        TypeError,
    ),
    "mark_mature(expert=)": Bad(
        lambda world: mark_mature(world.mixture, expert=[0]),
        "unexpected keyword argument 'expert'",
        TypeError,
    ),
}


# Routers ---------------------------------------------------------------------------------------


class Says(nn.Module):
    """A router that returns what it is told to."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, hidden_states: Tensor) -> Any:
        return self.answer(hidden_states)


def router(match: str, answer: Callable[[Tensor], Any]) -> Bad:
    """A router whose answer no forward can use."""

    def call(world: World) -> None:
        world.loras.attach_router(Says(answer), mixture_config(num_experts=2))
        try:
            world.loras(token_ids())
        finally:
            world.loras.detach_router()

    return Bad(call, match, RoutingWeightsError)


def new_router(match: str, *args: Any, **kwargs: Any) -> Bad:
    """A size that ``Router`` refuses."""
    return Bad(lambda _: Router(*args, **kwargs), match, ConfigError)


def attached_router_of_another_width(world: World) -> None:
    world.loras.attach_router(Router(8, 2), mixture_config(num_experts=2))
    try:
        world.loras(token_ids())
    finally:
        world.loras.detach_router()


ROUTERS = {
    "a router that is text": Bad(
        lambda world: world.loras.attach_router("learned"), "torch.nn.Module, got str", TypeError
    ),
    "a router class": Bad(
        lambda world: world.loras.attach_router(nn.Linear), "torch.nn.Module, got type", TypeError
    ),
    "a router with a plain config": Bad(
        lambda world: world.loras.attach_router(Router(16, 2), lora_config()),
        "MoELoraConfig, got LoraConfig",
        TypeError,
    ),
    "a router on LoHa": Bad(
        lambda _: get_peft_model(tiny_llama(), LoHaConfig(target_modules=["q_proj"])).attach_router(
            Router(16, 2)
        ),
        "LoHaModel",
        UnsupportedLayerError,
    ),
    "a router that returns a tuple": router("float tensor .*got tuple", lambda x: (x, x)),
    "a router that returns nothing": router("float tensor .*got NoneType", lambda x: None),
    "a router that returns integers": router(
        "float tensor .*got torch.int64", lambda x: x.new_ones(*x.shape[:2], 2, dtype=torch.int64)
    ),
    "a router for other tokens": router(r"tokens \(2, 7\), got shape", lambda x: x[:, :3, :2]),
    "a router for three experts": router("E=2 experts", lambda x: x[..., :3]),
    "a router of NaN": router("must be finite", lambda x: x[..., :2] * torch.nan),
    "a router of another width": Bad(attached_router_of_another_width, "8.*16|16.*8", MoELoraError),
    "a router asked with a list": Bad(
        lambda _: _asked_with_a_list(), "hidden_states|torch.Tensor", (MoELoraError, TypeError)
    ),
    "Router without inputs": new_router("input_size must be .*at least 1, got 0", 0, 2),
    "Router without experts": new_router("num_experts must be .*at least 1, got 0", 16, 0),
    "Router of half an expert": new_router(r"num_experts must be .*got 2\.5", 16, 2.5),
    "Router of text": new_router("input_size must be .*got '16'", "16", 2),
    "Router with top_k beyond": new_router(
        "top_k must be between 1 and num_experts=2", 16, 2, top_k=3
    ),
    "Router of temperature zero": new_router(
        "temperature must be .*> 0, got 0", 16, 2, temperature=0
    ),
    "Router of infinite temperature": new_router(
        "temperature must be .*got inf", 16, 2, temperature=float("inf")
    ),
    "Router of NaN temperature": new_router("temperature .*nan", 16, 2, temperature=float("nan")),
    "Router with an empty hidden layer": new_router(
        "hidden_size must be .*got 0", 16, 2, hidden_size=0
    ),
}


def _asked_with_a_list() -> None:
    model = two_loras()
    model.attach_router(Router(16, 2))
    model.get_routing_weights([[0.0] * 16])


# States of adapters ----------------------------------------------------------------------------


def merged_and_weighted(world: World) -> None:
    model = two_loras()
    model.merge_adapter()
    model(token_ids(), routing_weights=torch.ones(2))


def mixtures_of_two_scopes(_world: World) -> None:
    model = mixture(name="a")
    model.add_adapter("b", mixture_config(router_scope="layer"))
    model.base_model.set_adapter(["a", "b"])
    model(token_ids())


def state_with_part_of_a_router(world: World) -> None:
    model = two_loras()
    model.attach_router(Router(16, 2, hidden_size=3))
    state = model.state_dict()
    state.pop("base_model.router.hidden_weight")
    model.load_state_dict(state)


def state_with_a_router_of_another_shape(world: World) -> None:
    state = world.mixture.state_dict()
    key = next(key for key in state if ".lora_router." in key and key.endswith("weight"))
    world.mixture.load_state_dict({**state, key: state[key][:1]})


STATES = {
    "weights while merged": Bad(merged_and_weighted, "are merged", RoutingWeightsError),
    "weights with adapter_names": Bad(
        lambda world: world.loras(
            token_ids(), routing_weights=torch.ones(2), adapter_names=["first", "second"]
        ),
        "adapter_names cannot be combined with routing_weights",
        RoutingWeightsError,
    ),
    "generate with weights and adapter_names": Bad(
        lambda world: world.loras.generate(
            token_ids(), routing_weights=torch.ones(2), adapter_names=["first", "second"]
        ),
        "adapter_names cannot be combined with routing_weights",
        RoutingWeightsError,
    ),
    "adapter_names of a mixture": Bad(
        lambda world: world.mixture(token_ids(), adapter_names=["default", "plain"]),
        "adapter_names cannot be combined with a routed mixture",
        RoutingWeightsError,
    ),
    "merging learned routing": Bad(
        lambda world: world.mixture.merge_adapter(), "cannot be merged", MergeError
    ),
    "merging learned routing safely": Bad(
        lambda world: world.mixture.merge_and_unload(safe_merge=True),
        "cannot be merged",
        MergeError,
    ),
    "a weighted adapter of a mixture": Bad(
        lambda world: world.mixture.add_weighted_adapter(["default", "plain"], [1.0, 1.0], "sum"),
        "are mixtures of experts",
        MergeError,
    ),
    "an adapter that is not there": Bad(
        lambda world: world.mixture.set_adapter("nobody"), "nobody", (ValueError, KeyError)
    ),
    "deleting an adapter that is not there": Bad(
        lambda world: world.mixture.delete_adapter("nobody"), "nobody", (ValueError, KeyError)
    ),
    "mixtures of two scopes": Bad(
        mixtures_of_two_scopes, "different router_scope", UnsupportedLayerError
    ),
    "part of a router in a state dict": Bad(
        state_with_part_of_a_router, r"router\.hidden_weight", RuntimeError
    ),
    "a router of another shape in a state dict": Bad(
        state_with_a_router_of_another_shape,
        "lora_router.*size mismatch|size mismatch.*lora_router",
        RuntimeError,
    ),
    "maturity of an unknown adapter": Bad(
        lambda world: mark_mature(world.mixture, "nobody"), "No mixture 'nobody'", ConfigError
    ),
    "maturity of a plain adapter": Bad(
        lambda world: mark_mature(world.mixture, "plain"), "No mixture 'plain'", ConfigError
    ),
    "maturity of expert three of three": Bad(
        lambda world: mark_mature(world.mixture, experts=[3]),
        r"experts must be .*\[0, 3\), got 3",
        ConfigError,
    ),
    "maturity of a fraction of an expert": Bad(
        lambda world: mark_mature(world.mixture, experts=[0.5], mature=False),
        r"experts must be .*got 0\.5",
        ConfigError,
    ),
    "recording a model without adapters": Bad(
        lambda _: record_routing(tiny_llama()).__enter__(),
        "no LoRA adapters",
        UnsupportedLayerError,
    ),
    "an adapter name with a dot": Bad(
        lambda world: world.mixture.add_adapter("a.b", mixture_config()),
        "name",
        (ValueError, KeyError),
    ),
    "a layer outside of blocks for a router per block": Bad(
        lambda world: world.mixture.add_adapter(
            "new", mixture_config(router_scope="layer", target_modules=["q_proj", "lm_head"])
        ),
        "'lm_head' lies in no transformer block",
        UnsupportedLayerError,
    ),
    "a norm as a target": Bad(
        lambda world: world.mixture.add_adapter(
            "new", mixture_config(target_modules=["q_proj", "input_layernorm"])
        ),
        "not supported",
        ValueError,
    ),
    "a mixture in a mixed model": Bad(
        lambda _: get_peft_model(tiny_llama(), mixture_config(), mixed=True),
        "PeftMixedModel",
        UnsupportedLayerError,
    ),
    "an adapter name that leaves the folder": Bad(
        lambda world: saved_under_name(world, ".."), "name", (ValueError, KeyError)
    ),
    "an adapter name with separators": Bad(
        lambda world: saved_under_name(world, "a/b"),
        "'a/b' cannot be saved under its name: it must be a plain folder name",
        ValueError,
    ),
    "weights for a model of another tuner": Bad(
        lambda _: get_peft_model(tiny_llama(), LoHaConfig(target_modules=["q_proj"]))(
            token_ids(), routing_weights=torch.ones(1)
        ),
        "tuner is LoHaModel",
        UnsupportedLayerError,
    ),
    "a grouped convolution": Bad(
        lambda _: get_peft_model(
            nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)),
            mixture_config(target_modules=["0"], task_type=None),
        ),
        "groups=2",
        UnsupportedLayerError,
    ),
}


def saved_under_name(world: World, name: str) -> None:
    model = get_peft_model(tiny_llama(), mixture_config(), adapter_name=name)
    model.save_pretrained(world.root / "inside")
