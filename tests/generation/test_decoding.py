"""Every way to decode, with every cache, gives what it gives without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, PreTrainedModel

from moelora import Router, UnsupportedLayerError
from tests.architecture_table.bases import ARCHITECTURES, Architecture
from tests.architecture_table.cases import mixture_of
from tests.lm import (
    VOCABULARY,
    explicit_weights,
    lora_config,
    mixture,
    perturb,
    tiny_llama,
    token_ids,
    two_loras,
)
from tests.test_attached import AUTOMATIC
from tests.tolerances import assert_close, assert_equal

NEW = 6


def attached() -> PeftModel:
    """Two plain adapters that one router weighs by itself."""
    torch.manual_seed(4)
    model = two_loras()
    model.attach_router(Router(16, 2, top_k=1).double(), AUTOMATIC)
    return model


MODELS: dict[str, Callable[[], PeftModel]] = {
    "module": mixture,
    "layer": lambda: mixture(router_scope="layer"),
    "model": lambda: mixture(router_scope="model"),
    "attached": attached,
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "nucleus": {"do_sample": True, "top_p": 0.8, "top_k": 0, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "length_penalty": 0.5},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "returned beams": {"num_beams": 4, "num_return_sequences": 2},
    "penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}
EVERY_MODEL = pytest.mark.parametrize("kind", MODELS)


def generated(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """``NEW`` more tokens, greedy unless told otherwise, from the same random numbers."""
    torch.manual_seed(7)
    defaults = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    found: Tensor = model.generate(input_ids=ids, **{**defaults, **options})
    return found


def left_padded() -> tuple[Tensor, Tensor]:
    """Three rows of seven, four and one token."""
    ids = token_ids(3, 7)
    mask = torch.ones_like(ids)
    for row, start in enumerate((0, 3, 6)):
        ids[row, :start] = 0
        mask[row, :start] = 0
    return ids, mask


@EVERY_MODEL
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_cache_changes_no_token_of_rows_of_different_length(
    cache: str, strategy: str, kind: str
) -> None:
    model, (ids, mask) = MODELS[kind]().eval(), left_padded()
    options = {"attention_mask": mask, **STRATEGIES[strategy]}
    assert_equal(
        generated(model, ids, cache_implementation=cache, **options),
        generated(model, ids, use_cache=False, **options),
    )


@EVERY_MODEL
def test_sampling_equals_a_loop_that_draws_from_the_logits(kind: str) -> None:
    model, ids = MODELS[kind]().eval(), token_ids()
    found = generated(model, ids, do_sample=True, temperature=1.5, top_k=0)
    torch.manual_seed(7)
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, -1].float() / 1.5
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    assert_equal(found, ids)


@EVERY_MODEL
def test_scores_are_the_logits_of_an_uncached_forward(kind: str) -> None:
    model, ids = MODELS[kind]().eval(), token_ids()
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.no_grad():
        whole = model(input_ids=output.sequences[:, :-1], use_cache=False).logits[:, -NEW:]
    # transformers' norms compute in float32
    assert_close(torch.stack(output.logits, dim=1), whole.float(), dtype=torch.float32)


@EVERY_MODEL
def test_a_second_turn_goes_on_from_the_cache_of_the_first(kind: str) -> None:
    model, cache = MODELS[kind]().eval(), DynamicCache()
    first = generated(model, token_ids(1, 5), past_key_values=cache)
    ids = torch.cat([first, token_ids(1, 4, seed=9)], dim=1)
    assert cache.get_seq_length() == first.shape[1] - 1
    assert_equal(generated(model, ids, past_key_values=cache), generated(model, ids))


@EVERY_MODEL
def test_a_mixture_assists_another_model(kind: str) -> None:
    model, ids = tiny_llama(seed=1).eval(), token_ids(1, 7)
    found = generated(model, ids, assistant_model=MODELS[kind]().eval())
    assert_equal(found, generated(model, ids))


@EVERY_MODEL
def test_a_mixture_is_assisted_by_another_mixture(kind: str) -> None:
    model, ids = MODELS[kind]().eval(), token_ids(1, 7)
    assistant = mixture(tiny_llama(seed=1)).eval()
    assert_equal(generated(model, ids, assistant_model=assistant), generated(model, ids))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_explicit_weights_per_row_meet_any_cache_and_strategy(cache: str, strategy: str) -> None:
    model, (ids, mask) = two_loras().eval(), left_padded()
    options = {
        "attention_mask": mask,
        "routing_weights": explicit_weights(3, 1)[:, 0],
        **STRATEGIES[strategy],
    }
    assert_equal(
        generated(model, ids, cache_implementation=cache, **options),
        generated(model, ids, use_cache=False, **options),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_explicit_weights_per_token_meet_any_strategy(strategy: str) -> None:
    model, ids = two_loras().eval(), token_ids()
    options = {"routing_weights": explicit_weights(), **STRATEGIES[strategy]}
    assert_equal(
        generated(model, ids, use_cache=True, **options),
        generated(model, ids, use_cache=False, **options),
    )


# A layer that reads the cache again ---------------------------------------------------------------


def latent_attention() -> PreTrainedModel:
    """Attention as in DeepSeek-V3, whose ``kv_b_proj`` reads all positions at each step."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return DeepseekV3ForCausalLM(config).double()


LATENT = {"target_modules": ["q_b_proj", "kv_b_proj", "down_proj"]}


def test_a_router_of_each_module_serves_latent_attention() -> None:
    model, (ids, mask) = mixture(latent_attention(), **LATENT).eval(), left_padded()
    assert_equal(
        generated(model, ids, attention_mask=mask),
        generated(model, ids, attention_mask=mask, use_cache=False),
    )


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("kind", ["layer", "model", "attached", "explicit"])
def test_weights_of_new_tokens_are_not_given_to_what_the_cache_holds(
    kind: str, num_beams: int
) -> None:
    options: dict[str, Any] = {"num_beams": num_beams}
    ids = token_ids()
    if kind in ("layer", "model"):
        model = mixture(latent_attention(), router_scope=kind, **LATENT).eval()
    else:
        model = get_peft_model(latent_attention(), lora_config(**LATENT), adapter_name="a").eval()
        model.add_adapter("b", lora_config(**LATENT))
        model.base_model.set_adapter(["a", "b"])
        perturb(model)
        options["routing_weights"] = explicit_weights()
    if kind == "attached":
        del options["routing_weights"]
        model.attach_router(Router(16, 2, top_k=1).double(), AUTOMATIC)
    with pytest.raises(UnsupportedLayerError, match=r"kv_b_proj' reads .* tokens where"):
        generated(model, ids, **options)
    generated(model, ids, use_cache=False, **options)
    model.base_model.disable_adapter_layers()
    options.pop("routing_weights", None)
    generated(model, ids, **options)


# Every base that generates -----------------------------------------------------------------------

GENERATING = [a for a in ARCHITECTURES if a.generates]


def continued(architecture: Architecture, model: PeftModel, **options: Any) -> Tensor:
    inputs = architecture.batch()
    rows = len(inputs.pop("labels"))
    if "input_features" in inputs:
        inputs["decoder_input_ids"] = torch.zeros(rows, 1, dtype=torch.long)
    torch.manual_seed(7)
    found: Tensor = model.generate(
        **inputs, **{"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    )
    return found


@pytest.mark.parametrize("architecture", GENERATING, ids=lambda a: a.title)
@pytest.mark.parametrize("strategy", ["greedy", "sampling", "beams"])
def test_every_base_decodes_with_a_static_cache_as_without_one(
    strategy: str, architecture: Architecture
) -> None:
    model = mixture_of(architecture).eval()
    perturb(model)
    options = STRATEGIES[strategy]
    expected = continued(architecture, model, use_cache=False, **options)
    assert_equal(continued(architecture, model, use_cache=True, **options), expected)
    static = continued(architecture, model, cache_implementation="static", **options)
    assert_equal(static, expected)
