"""MoELoraConfig: defaults, checks, warnings, and the way to disk and back."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import peft.tuners.lora
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftType, TaskType
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)

import moelora
from moelora import ConfigError, MoELoraConfig
from tests.models import unchecked_types


@pytest.fixture(autouse=True, scope="module")
def as_users_run_it() -> Iterator[None]:
    """Values of the wrong type have to reach the config's own checks."""
    with unchecked_types():
        yield


DEFAULTS: dict[str, object] = {
    "use_moe_routing": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "router_hidden_size": None,
    "router_aux_loss_coef": 0.01,
    "router_temperature": 2.0,
    "router_type": "learned_with_maturity",
    "expert_capacity_factor": 1.25,
    "expert_dropout": 0.0,
    "load_balance_loss_type": "aux_loss",
    "router_scope": "module",
    "fixed_routing_weights": None,
    "joins_mixture": False,
    "balance_over_ranks": False,
    "expert_names": None,
}


@st.composite
def valid_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a config that routes, each within what is allowed."""
    num_experts = draw(st.integers(2, 64))
    router_type = draw(st.sampled_from(["learned", "learned_with_maturity", "fixed"]))
    finite = st.floats(-10, 10)
    weights = st.none() | st.lists(finite, min_size=num_experts, max_size=num_experts)
    return {
        "num_experts": num_experts,
        "top_k_experts": draw(st.integers(1, num_experts)),
        "router_hidden_size": draw(st.none() | st.integers(1, 64)),
        "router_aux_loss_coef": draw(st.floats(0, 10)),
        "router_temperature": draw(st.floats(1e-3, 100)),
        "router_type": router_type,
        "expert_capacity_factor": draw(st.none() | st.floats(1e-3, 100)),
        "expert_dropout": draw(st.floats(0, 0.99)),
        "load_balance_loss_type": draw(st.sampled_from(["aux_loss", "z_loss", "switch"])),
        "fixed_routing_weights": draw(weights) if router_type == "fixed" else None,
        "r": draw(st.integers(1, 64)),
        "lora_alpha": draw(st.integers(1, 64)),
        "lora_dropout": draw(st.floats(0, 0.9)),
        "use_rslora": draw(st.booleans()),
        "target_modules": draw(st.just("all-linear") | st.just(["q_proj", "v_proj"])),
        "modules_to_save": draw(st.none() | st.just(["lm_head"])),
        "rank_pattern": draw(st.just({}) | st.just({"q_proj": 3})),
        "alpha_pattern": draw(st.just({}) | st.just({"q_proj": 5})),
        "task_type": draw(st.none() | st.sampled_from([t.value for t in TaskType])),
    }


def as_values(config: PeftConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}


# Defaults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), DEFAULTS.items())
def test_defaults(name: str, value: object) -> None:
    assert getattr(MoELoraConfig(), name) == value
    assert type(getattr(MoELoraConfig(), name)) is type(value)


def test_every_field_of_our_own_has_a_tested_default() -> None:
    own = {f.name for f in fields(MoELoraConfig)} - {f.name for f in fields(LoraConfig)}
    assert own == {*DEFAULTS, "moelora_format"}


def test_all_fields_of_lora_keep_their_defaults() -> None:
    plain, ours = as_values(LoraConfig()), as_values(MoELoraConfig())
    assert {name: ours[name] for name in plain} == plain


def test_it_is_a_lora_config_and_a_lora_type_in_memory() -> None:
    config = MoELoraConfig()
    assert isinstance(config, LoraConfig)
    assert config.peft_type == PeftType.LORA


@pytest.mark.parametrize("module", [peft, peft.tuners.lora, moelora])
def test_it_is_found_under_pefts_public_names(module: Any) -> None:
    assert module.MoELoraConfig is MoELoraConfig


@pytest.mark.parametrize(
    ("changes", "routed", "has_router"),
    [
        ({}, True, True),
        ({"router_type": "learned"}, True, True),
        ({"router_type": "fixed"}, True, False),
        ({"use_moe_routing": False}, False, False),
    ],
)
def test_what_a_config_says_of_its_routing(
    changes: dict[str, Any], routed: bool, has_router: bool
) -> None:
    config = MoELoraConfig(**changes)
    assert (config.routed, config.has_router) == (routed, has_router)


# Checks ----------------------------------------------------------------------------------------

NOT_NUMBERS = [math.nan, math.inf, "1", None, True, [1.0]]
BAD = [
    *[("num_experts", value) for value in (1, 0, -3, 2.0, "4", True, None, 10**9)],
    *[("top_k_experts", value) for value in (0, -1, 5, 1.0, "2", True, None)],
    *[("router_hidden_size", value) for value in (0, -1, 1.5, "8", True, 2**30)],
    *[("router_temperature", value) for value in (0, -1.0, *NOT_NUMBERS)],
    *[("router_aux_loss_coef", value) for value in (-0.01, *NOT_NUMBERS)],
    *[("expert_capacity_factor", value) for value in (0, -1.25, math.nan, math.inf, "2", True)],
    *[("expert_dropout", value) for value in (1, 1.0, -0.1, *NOT_NUMBERS)],
    *[("router_type", value) for value in ("learnt", "", None, 1, ["learned"])],
    *[("load_balance_loss_type", value) for value in ("mse", "", None, 0)],
    *[("router_scope", value) for value in ("token", "", None)],
    *[("use_moe_routing", value) for value in (1, 0, "yes", None)],
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_with_field_value_and_what_is_allowed(
    name: str, value: object
) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .+, got ") as caught:
        MoELoraConfig(**{name: value})
    assert isinstance(caught.value, ConfigError)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 1, "top_k_experts": 1}, r"in \[2, \d+\] when use_moe_routing=True, got 1"),
        ({"top_k_experts": 5}, "between 1 and num_experts=4, got 5"),
        ({"router_temperature": 0}, "a finite number > 0, got 0"),
        ({"router_aux_loss_coef": -1}, "a finite number >= 0, got -1"),
        ({"expert_capacity_factor": 0}, "None or a finite number > 0, got 0"),
        ({"expert_dropout": 1}, r"a number in \[0, 1\), got 1"),
        ({"router_type": "x"}, "one of 'learned_with_maturity', 'learned', 'fixed', got 'x'"),
        ({"load_balance_loss_type": "x"}, "one of 'aux_loss', 'z_loss', 'switch', got 'x'"),
        ({"router_scope": "x"}, "router_scope must be one of 'module'.*, got 'x'"),
        ({"use_moe_routing": 1}, "True or False, got 1"),
        ({"router_hidden_size": 0}, r"None or an integer in \[1, \d+\], got 0"),
    ],
)
def test_the_message_says_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoELoraConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 2, "top_k_experts": 1},
        {"num_experts": 3, "top_k_experts": 3},
        {"router_aux_loss_coef": 0},
        {"router_temperature": 1},
        {"expert_capacity_factor": None},
        {"use_moe_routing": False, "num_experts": 1},
        {"use_moe_routing": False, "num_experts": 1, "use_dora": True},
    ],
)
def test_values_at_the_edge_are_allowed(changes: dict[str, Any]) -> None:
    config = MoELoraConfig(**changes)
    assert {name: getattr(config, name) for name in changes} == changes


@pytest.mark.parametrize(
    "weights", [[1.0], [0.5] * 5, [math.nan] * 4, [1, 2, 3, "4"], "1234", 0.25, [True] * 4]
)
def test_fixed_weights_must_be_one_finite_number_per_expert(weights: object) -> None:
    with pytest.raises(
        ConfigError, match="fixed_routing_weights must be None or a list of num_exp"
    ):
        MoELoraConfig(router_type="fixed", fixed_routing_weights=weights)


def test_fixed_weights_need_fixed_routing() -> None:
    with pytest.raises(ConfigError, match="needs router_type='fixed', got router_type='learned'"):
        MoELoraConfig(router_type="learned", fixed_routing_weights=[0.25] * 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("arrow_config", ArrowConfig()),
        ("alora_invocation_tokens", [1, 2]),
        ("velora_config", VeloraConfig()),
        ("monteclora_config", MontecloraConfig()),
        ("kasa_config", KasaConfig()),
        ("use_bdlora", BdLoraConfig()),
        ("use_qalora", True),
        ("target_parameters", ["experts.weight"]),
    ],
)
def test_lora_options_that_cannot_be_stacked_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not supported in a mixture of num_experts=4"):
        MoELoraConfig(**{name: value})


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "eva", "mica"])
def test_initialisations_from_data_or_weights_are_refused(init: str) -> None:
    with pytest.raises(ConfigError, match=f"init_lora_weights must be one of .*, got '{init}'"):
        MoELoraConfig(init_lora_weights=init)


def test_every_lora_variant_of_peft_is_either_stackable_or_refused() -> None:
    """A variant that a later PEFT adds must not slip into a stack unseen."""
    variants = {f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    from moelora.config import _UNSTACKABLE_FIELDS

    assert variants - set(_UNSTACKABLE_FIELDS) == set()


def test_a_newer_format_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"moelora_format 2 .* Upgrade moelora"):
        MoELoraConfig(moelora_format=2)


# The warning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k_experts", 1),
        ("router_hidden_size", 8),
        ("router_aux_loss_coef", 0.1),
        ("router_temperature", 1.0),
        ("router_type", "learned"),
        ("expert_capacity_factor", None),
        ("expert_dropout", 0.5),
        ("load_balance_loss_type", "z_loss"),
    ],
)
def test_routing_fields_without_routing_warn_by_name(name: str, value: Any) -> None:
    with pytest.warns(UserWarning, match=f"{name} set although use_moe_routing=False") as record:
        MoELoraConfig(use_moe_routing=False, **{name: value})
    assert len(record) == 1
    # it points to whoever made the config, not into the library
    assert Path(record[0].filename).parent.name != "moelora"


@pytest.mark.parametrize("changes", [{}, {"use_moe_routing": False, "num_experts": 1, "r": 4}])
def test_nothing_else_warns(changes: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoELoraConfig(**changes)


# To disk and back ------------------------------------------------------------------------------


@given(changes=valid_fields())
def test_json_and_back_keeps_every_field(changes: dict[str, Any]) -> None:
    config = MoELoraConfig(**changes)
    text = json.loads(json.dumps(config.to_dict(), default=sorted))
    text.pop("peft_type")
    again = MoELoraConfig(**text)
    assert as_values(again) == as_values(config)


@pytest.mark.parametrize("reader", [MoELoraConfig, PeftConfig], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "num_experts": 7,
            "top_k_experts": 3,
            "router_hidden_size": 5,
            "router_aux_loss_coef": 0.5,
            "router_temperature": 0.25,
            "router_type": "learned",
            "expert_capacity_factor": None,
            "expert_dropout": 0.125,
            "load_balance_loss_type": "z_loss",
            "r": 3,
            "lora_alpha": 11,
            "use_rslora": True,
            "target_modules": ["a", "b"],
            "rank_pattern": {"a": 2},
            "task_type": "CAUSAL_LM",
        },
        {"router_type": "fixed", "fixed_routing_weights": [0.5, 0.25, 0.25, -1.0]},
        {"use_moe_routing": False, "num_experts": 1},
    ],
)
def test_saving_and_loading_keeps_every_field(
    reader: type[PeftConfig], changes: dict[str, Any], tmp_path: Path
) -> None:
    config = MoELoraConfig(**changes)
    config.save_pretrained(str(tmp_path))
    # PEFT marks every saved config as one for inference, and gives the instance its marks back
    expected = {**as_values(config), "inference_mode": True}
    loaded = reader.from_pretrained(str(tmp_path))
    assert type(loaded) is MoELoraConfig
    assert {**as_values(loaded), "inference_mode": True} == expected


def test_the_file_names_the_type_and_the_format(tmp_path: Path) -> None:
    MoELoraConfig().save_pretrained(str(tmp_path))
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] == "MOELORA"
    assert content["moelora_format"] == 1
    assert set(DEFAULTS) <= set(content)


def test_to_dict_leaves_the_config_as_it_was() -> None:
    config = MoELoraConfig()
    before = as_values(config)
    config.to_dict()
    assert as_values(config) == before


def test_a_file_with_a_bad_value_is_refused(tmp_path: Path) -> None:
    MoELoraConfig().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts": -4}))
    with pytest.raises(ConfigError, match="num_experts must be .*, got -4"):
        PeftConfig.from_pretrained(str(tmp_path))


def test_a_plain_lora_config_stays_one(tmp_path: Path) -> None:
    LoraConfig(r=3).save_pretrained(str(tmp_path))
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is LoraConfig
