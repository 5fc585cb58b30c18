"""``generate``: the KV cache, beams, padding and explicit weights change no token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from moelora import RoutingWeightsError, UnsupportedLayerError, record_routing
from tests.lm import (
    VOCABULARY,
    lora_config,
    mixture,
    mixture_config,
    perturb,
    tiny_llama,
    tiny_t5,
    token_ids,
)
from tests.tolerances import assert_close, assert_equal

NEW = 6


def generated(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """Greedy unless told otherwise; ``NEW`` more tokens."""
    mask = torch.ones_like(ids)
    defaults = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": mask}
    found: Tensor = model.generate(input_ids=ids, **{**defaults, **kwargs})
    return found


def step_by_step(
    model: Any, ids: Tensor, weights_at: Callable[[int], Tensor] | None = None
) -> Tensor:
    """Greedy decoding without cache and without ``generate``; weights ``[rows, length, E]``."""
    for _ in range(NEW):
        kwargs = {} if weights_at is None else {"routing_weights": weights_at(ids.shape[1])}
        logits = model(input_ids=ids, use_cache=False, **kwargs).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).double()


def left_padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    ids = token_ids(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length] = 0
        mask[row, : max(lengths) - length] = 0
    return ids, mask


MODELS: dict[str, Callable[[], PeftModel]] = {
    "llama": lambda: mixture(),
    "llama_top_1": lambda: mixture(top_k_experts=1),
    "llama_embedding": lambda: mixture(target_modules=["embed_tokens", "o_proj", "lm_head"]),
    "gpt2": lambda: mixture(tiny_gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "llama_by_block": lambda: mixture(router_scope="layer"),
    "llama_by_model": lambda: mixture(router_scope="model"),
    "gpt2_by_block": lambda: mixture(
        tiny_gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, router_scope="layer"
    ),
    "gpt2_by_model": lambda: mixture(
        tiny_gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, router_scope="model"
    ),
    "fixed": lambda: mixture(router_type="fixed", fixed_routing_weights=[1.0, -0.5, 0.3]),
}
SCOPES = pytest.mark.parametrize("scope", ["module", "layer", "model"])
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams_returned": {"num_beams": 3, "num_return_sequences": 2},
}


# By the routers --------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", MODELS)
def test_the_kv_cache_changes_no_token(kind: str, strategy: str) -> None:
    model = MODELS[kind]().eval()
    options = STRATEGIES[strategy]
    assert_equal(
        generated(model, token_ids(), use_cache=True, **options),
        generated(model, token_ids(), use_cache=False, **options),
    )


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_generation_equals_a_loop_over_forwards(kind: str) -> None:
    model = MODELS[kind]().eval()
    assert_equal(generated(model, token_ids()), step_by_step(model, token_ids()))


@SCOPES
def test_a_static_cache_changes_no_token(scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    assert_equal(
        generated(model, token_ids(), cache_implementation="static"),
        generated(model, token_ids(), use_cache=False),
    )


@SCOPES
@pytest.mark.parametrize("strategy", ["greedy", "beams"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_different_length_generate_as_they_do_alone(
    use_cache: bool, strategy: str, scope: str
) -> None:
    model = mixture(router_scope=scope).eval()
    options = {"use_cache": use_cache, **STRATEGIES[strategy]}
    ids, mask = left_padded([7, 4, 1])
    together = generated(model, ids, attention_mask=mask, **options)
    for row in range(3):
        alone = ids[row : row + 1, mask[row].argmax() :]
        new = generated(model, alone, **options)[:, alone.shape[1] :]
        assert_equal(together[row : row + 1, ids.shape[1] :], new)


def test_generation_differs_from_that_of_the_base() -> None:
    model = mixture().eval()
    with model.disable_adapter():
        base = generated(model, token_ids(4, 7))
    assert not torch.equal(generated(model, token_ids(4, 7)), base)


@SCOPES
def test_generating_in_training_mode_leaves_nothing_behind(scope: str) -> None:
    model = mixture(expert_capacity_factor=None, router_scope=scope).train()
    expected = generated(mixture(router_scope=scope).eval(), token_ids())
    assert_equal(generated(model, token_ids()), expected)


@SCOPES
def test_chunked_prefill_changes_no_token(scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    assert_equal(
        generated(model, token_ids(), prefill_chunk_size=3),
        generated(model, token_ids(), use_cache=False),
    )


ASSISTED: dict[str, Callable[[], dict[str, Any]]] = {
    "prompt_lookup": lambda: {"prompt_lookup_num_tokens": 2},
    "early_exit": lambda: {"assistant_early_exit": 1},
    "assistant": lambda: {"assistant_model": tiny_llama(seed=1).eval()},
}


@SCOPES
@pytest.mark.parametrize("way", ASSISTED)
def test_assisted_decoding_changes_no_token(way: str, scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    ids = token_ids(1, 7)
    assert_equal(generated(model, ids, **ASSISTED[way]()), generated(model, ids))


@pytest.mark.parametrize("shape", [(1, 7, 3), (1, 3)])
@pytest.mark.parametrize("way", ["prompt_lookup", "assistant"])
def test_assisted_decoding_keeps_explicit_weights_at_their_positions(
    way: str, shape: tuple[int, ...]
) -> None:
    model, ids, weights = mixture().eval(), token_ids(1, 7), random_weights(*shape)
    found = generated(model, ids, routing_weights=weights, **ASSISTED[way]())
    assert_equal(found, generated(model, ids, routing_weights=weights))


def test_chunked_prefill_keeps_explicit_weights_at_their_positions() -> None:
    model, ids, weights = mixture().eval(), token_ids(), random_weights(2, 7, 3)
    found = generated(model, ids, routing_weights=weights, prefill_chunk_size=3)
    assert_equal(found, generated(model, ids, routing_weights=weights))


@SCOPES
def test_embeddings_instead_of_tokens_generate_the_same(scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    ids = token_ids()
    embeds = model.get_input_embeddings()(ids)
    new = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
    )
    assert_equal(new, generated(model, ids)[:, ids.shape[1] :])


# Rows do not depend on each other ------------------------------------------------------------


@SCOPES
def test_the_logits_of_a_row_are_the_same_to_the_bit_whatever_stands_beside_it(scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    first, second = token_ids(3, 7), token_ids(3, 7, seed=9)
    second[0] = first[0]
    assert_equal(model(second).logits[0], model(first).logits[0])


@SCOPES
def test_the_routing_of_a_row_is_that_of_the_row_alone(scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    ids = token_ids(3, 7)
    with record_routing(model) as together:
        model(ids)
    with record_routing(model) as alone:
        model(ids[1:2])
    assert together.routing.keys() == alone.routing.keys()
    for name, routing in alone.routing.items():
        assert_equal(together.routing[name].selected_experts[7:14], routing.selected_experts)
        assert_close(together.routing[name].routing_weights[7:14], routing.routing_weights)


@SCOPES
def test_permuting_rows_permutes_logits(scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    ids, order = token_ids(4, 7), torch.tensor([2, 0, 3, 1])
    assert_close(model(ids[order]).logits, model(ids).logits[order])


@SCOPES
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_tokens_change_no_logits_of_real_ones(side: str, scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    ids = token_ids(2, 7)
    mask = torch.ones_like(ids)
    padded, real = (slice(0, 3), slice(3, 7)) if side == "left" else (slice(4, 7), slice(0, 4))
    mask[1, padded] = 0
    other = ids.clone()
    other[1, padded] = 0
    before = model(ids, attention_mask=mask).logits
    after = model(other, attention_mask=mask).logits
    assert_close(after[1, real], before[1, real])
    assert_equal(after[0], before[0])


@SCOPES
def test_prefill_and_decoding_give_the_same_logits(scope: str) -> None:
    model = mixture(router_scope=scope).eval()
    ids = token_ids(2, 7)
    whole = model(ids, use_cache=False).logits
    cache = None
    steps = []
    for position in range(7):
        output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    # transformers' norms compute in float32
    assert_close(torch.cat(steps, dim=1), whole, dtype=torch.float32)


# With explicit weights -----------------------------------------------------------------------


def two_loras(base: Any = None) -> PeftModel:
    """Two plain LoRA adapters as experts."""
    config = lora_config()
    model = get_peft_model(tiny_llama() if base is None else base, config, adapter_name="first")
    model.add_adapter("second", lora_config(r=3))
    model.base_model.set_adapter(["first", "second"])
    perturb(model)
    return model.eval()


def random_weights(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def position_weights(weights: Tensor, rows: int, length: int) -> Tensor:
    """What holds at each of ``length`` positions: the last given one past the end."""
    if weights.ndim == 1:
        return weights.expand(rows, length, -1)
    if weights.ndim == 2:
        return weights[:, None].expand(rows, length, -1)
    given = weights.shape[1]
    positions = [min(position, given - 1) for position in range(length)]
    return weights[:, positions]


FORMS = {"[B, S, E]": (2, 7, 2), "[B, 1, E]": (2, 1, 2), "[B, E]": (2, 2), "[E]": (2,)}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_explicit_weights_hold_for_every_step_and_the_last_one_for_new_positions(
    form: str, use_cache: bool
) -> None:
    model, weights, ids = two_loras(), random_weights(*FORMS[form]), token_ids()
    expected = step_by_step(model, ids, lambda length: position_weights(weights, 2, length))
    found = generated(model, ids, routing_weights=weights, use_cache=use_cache)
    assert_equal(found, expected)


def test_weights_beyond_the_prompt_hold_at_their_positions() -> None:
    model, weights, ids = two_loras(), random_weights(2, 10, 2), token_ids()
    expected = step_by_step(model, ids, lambda length: position_weights(weights, 2, length))
    assert_equal(generated(model, ids, routing_weights=weights), expected)


def test_explicit_weights_per_block_hold_for_every_step() -> None:
    model, weights, ids = two_loras(), random_weights(2, 7, 2, 2), token_ids()
    expected = step_by_step(model, ids, lambda length: position_weights(weights, 2, length))
    assert_equal(generated(model, ids, routing_weights=weights), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_explicit_weights_of_positions_meet_any_cache(cache: str) -> None:
    model, weights, ids = two_loras(), random_weights(2, 7, 2), token_ids()
    expected = step_by_step(model, ids, lambda length: position_weights(weights, 2, length))
    found = generated(model, ids, routing_weights=weights, cache_implementation=cache)
    assert_equal(found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_explicit_weights_follow_each_row_over_its_beams(form: str) -> None:
    model, weights, ids = two_loras(), random_weights(*FORMS[form]), token_ids()
    together = generated(model, ids, routing_weights=weights, num_beams=3)
    for row in range(2):
        own = weights if weights.ndim == 1 else weights[row : row + 1]
        alone = generated(model, ids[row : row + 1], routing_weights=own, num_beams=3)
        assert_equal(together[row : row + 1], alone)


@pytest.mark.parametrize("form", FORMS)
def test_beams_with_explicit_weights_need_no_cache(form: str) -> None:
    model, weights, ids = two_loras(), random_weights(*FORMS[form]), token_ids()
    assert_equal(
        generated(model, ids, routing_weights=weights, num_beams=3, use_cache=True),
        generated(model, ids, routing_weights=weights, num_beams=3, use_cache=False),
    )


@pytest.mark.parametrize("form", FORMS)
def test_constant_weights_of_one_row_equal_scaled_adapters_in_beam_search(form: str) -> None:
    model, ids = two_loras(), token_ids()
    weights = torch.tensor([0.7, -1.2], dtype=torch.float64).expand(FORMS[form])
    found = generated(model, ids, routing_weights=weights, num_beams=3)
    for layer in model.modules():
        if hasattr(layer, "scale_layer"):
            for name, weight in (("first", 0.7), ("second", -1.2)):
                layer.scaling[name] *= weight
    assert_equal(found, generated(model, ids, num_beams=3))


def test_beams_named_in_a_generation_config_count_too() -> None:
    model, weights, ids = two_loras(), random_weights(2, 7, 2), token_ids()
    config = GenerationConfig(num_beams=3, max_new_tokens=NEW, do_sample=False)
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        routing_weights=weights,
        generation_config=config,
    )
    assert_equal(found, generated(model, ids, routing_weights=weights, num_beams=3))


def test_beams_named_in_the_models_own_generation_config_count_too() -> None:
    model, weights, ids = two_loras(), random_weights(2, 7, 2), token_ids()
    expected = generated(model, ids, routing_weights=weights, num_beams=3)
    model.get_base_model().generation_config.num_beams = 3
    assert_equal(generated(model, ids, routing_weights=weights), expected)


def test_an_argument_overrules_the_number_of_beams_in_a_generation_config() -> None:
    model, weights, ids = two_loras(), random_weights(2, 7, 2), token_ids()
    config = GenerationConfig(num_beams=5, max_new_tokens=NEW, do_sample=False)
    found = generated(model, ids, routing_weights=weights, generation_config=config, num_beams=1)
    assert_equal(found, generated(model, ids, routing_weights=weights))


@pytest.mark.parametrize("form", FORMS)
def test_several_samples_per_row_use_that_rows_weights(form: str) -> None:
    model, weights, ids = two_loras(), random_weights(*FORMS[form]), token_ids()
    # a temperature near zero makes sampling greedy
    options = {"do_sample": True, "temperature": 1e-4, "top_k": 0, "num_return_sequences": 3}
    found = generated(model, ids, routing_weights=weights, **options)
    greedy = generated(model, ids, routing_weights=weights)
    assert_equal(found, greedy.repeat_interleave(3, dim=0))


def test_rows_of_different_length_with_explicit_weights_generate_as_they_do_alone() -> None:
    model, weights = two_loras(), random_weights(3, 2)
    ids, mask = left_padded([7, 4, 1])
    together = generated(model, ids, attention_mask=mask, routing_weights=weights)
    for row in range(3):
        alone = ids[row : row + 1, mask[row].argmax() :]
        new = generated(model, alone, routing_weights=weights[row : row + 1])
        assert_equal(together[row : row + 1, 7:], new[:, alone.shape[1] :])


def test_explicit_weights_override_the_routers() -> None:
    model, ids = mixture().eval(), token_ids()
    weights = random_weights(2, 3)
    expected = step_by_step(model, ids, lambda length: position_weights(weights, 2, length))
    assert_equal(generated(model, ids, routing_weights=weights), expected)


def test_no_weights_is_pefts_generation() -> None:
    model, ids = two_loras(), token_ids()
    assert_equal(generated(model, ids, routing_weights=None), generated(model, ids))


def test_the_tuner_generates_as_the_model_around_it() -> None:
    model, weights, ids = two_loras(), random_weights(2, 7, 2), token_ids()
    found = generated(model.base_model, ids, routing_weights=weights)
    assert_equal(found, generated(model, ids, routing_weights=weights))


def test_generation_leaves_no_weights_to_the_next_call() -> None:
    model, ids = two_loras(), token_ids()
    before = model(ids).logits
    generated(model, ids, routing_weights=random_weights(2, 7, 2), num_beams=3)
    assert_equal(model(ids).logits, before)


def test_a_generation_that_raised_leaves_no_weights_to_the_next_call() -> None:
    model, ids = two_loras(), token_ids()
    before = model(ids).logits

    def stop(*_: object) -> bool:
        raise OSError("interrupted")

    with pytest.raises(OSError, match="interrupted"):
        generated(model, ids, routing_weights=random_weights(2, 7, 2), stopping_criteria=[stop])
    assert_equal(model(ids).logits, before)
    assert_equal(generated(model, ids), step_by_step(model, ids))


# Encoder and decoder -------------------------------------------------------------------------


T5_TARGETS = ["q", "k", "v", "wo"]


def t5_loras() -> PeftModel:
    fields = {"target_modules": T5_TARGETS, "task_type": "SEQ_2_SEQ_LM"}
    model = get_peft_model(tiny_t5(), lora_config(**fields), adapter_name="first")
    model.add_adapter("second", lora_config(**fields))
    model.base_model.set_adapter(["first", "second"])
    perturb(model)
    return model.eval()


def t5_step_by_step(model: PeftModel, ids: Tensor, **kwargs: Any) -> Tensor:
    decoder_ids = torch.zeros(ids.shape[0], 1, dtype=torch.long)
    for _ in range(NEW):
        output = model(input_ids=ids, decoder_input_ids=decoder_ids, use_cache=False, **kwargs)
        best = output.logits[:, -1].argmax(-1, keepdim=True)
        decoder_ids = torch.cat([decoder_ids, best], dim=1)
    return decoder_ids


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("shape", [(2, 2), (2, 1, 2), (2,)])
def test_an_encoder_decoder_takes_weights_without_a_seq_axis(
    shape: tuple[int, ...], use_cache: bool
) -> None:
    model, ids, weights = t5_loras(), token_ids(2, 5), random_weights(*shape)
    expected = t5_step_by_step(model, ids, routing_weights=weights)
    assert_equal(generated(model, ids, routing_weights=weights, use_cache=use_cache), expected)


def test_an_encoder_decoder_repeats_weights_per_beam() -> None:
    model, ids, weights = t5_loras(), token_ids(2, 5), random_weights(2, 2)
    together = generated(model, ids, routing_weights=weights, num_beams=3)
    for row in range(2):
        own = weights[row : row + 1]
        alone = generated(model, ids[row : row + 1], routing_weights=own, num_beams=3)
        assert_equal(together[row : row + 1], alone)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_encoder_decoder_mixture_generates_the_same_with_and_without_cache(
    strategy: str,
) -> None:
    fields = {"target_modules": T5_TARGETS, "task_type": "SEQ_2_SEQ_LM"}
    model = mixture(tiny_t5(), **fields).eval()
    options = STRATEGIES[strategy]
    assert_equal(
        generated(model, token_ids(), use_cache=True, **options),
        generated(model, token_ids(), use_cache=False, **options),
    )


def test_an_encoder_decoder_refuses_weights_per_token() -> None:
    model = t5_loras()
    with pytest.raises(RoutingWeightsError, match="encoder-decoder"):
        generated(model, token_ids(2, 5), routing_weights=random_weights(2, 5, 2))


# Refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (torch.ones(2, 3), "E=2"),
        (torch.ones(2, 2, dtype=torch.long), "floating point"),
        (torch.full((2,), float("nan")), "finite"),
        (torch.ones(3, 2), "q_proj"),
        (torch.ones(6, 2), "q_proj"),
        (torch.ones(3, 7, 2), "q_proj"),
        ([0.5, 0.5], "torch.Tensor"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: Any, match: str) -> None:
    with pytest.raises(RoutingWeightsError, match=match):
        generated(two_loras(), token_ids(), routing_weights=weights)


@pytest.mark.parametrize("use_cache", [True, False])
def test_weights_for_fewer_positions_than_the_prompt_are_refused(use_cache: bool) -> None:
    with pytest.raises(RoutingWeightsError, match="positions|seq"):
        generated(
            two_loras(), token_ids(), routing_weights=torch.ones(2, 3, 2), use_cache=use_cache
        )


def test_adapter_names_and_weights_together_are_refused() -> None:
    with pytest.raises(RoutingWeightsError, match="adapter_names"):
        generated(
            two_loras(),
            token_ids(),
            routing_weights=torch.ones(2),
            adapter_names=["first", "second"],
        )


def test_merged_adapters_and_weights_together_are_refused() -> None:
    model = two_loras()
    model.merge_adapter()
    with pytest.raises(RoutingWeightsError, match="merged"):
        generated(model, token_ids(), routing_weights=torch.ones(2))


def test_a_tuner_that_is_no_lora_refuses_weights() -> None:
    from peft import LoHaConfig

    config = LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(dtype=torch.float32), config)
    with pytest.raises(UnsupportedLayerError, match="LoHa"):
        generated(model, token_ids(), routing_weights=torch.ones(1))


def test_disabled_adapters_ignore_weights() -> None:
    model, ids = two_loras(), token_ids()
    with model.disable_adapter():
        base = generated(model, ids)
        assert_equal(generated(model, ids, routing_weights=torch.ones(2)), base)


def test_a_second_mixture_takes_its_columns_in_the_order_of_active_adapters() -> None:
    model = mixture(name="first")
    model.add_adapter("second", mixture_config(num_experts=2))
    perturb(model)
    ids, weights = token_ids(), random_weights(2, 5)
    model.base_model.set_adapter(["second", "first"])
    turned = torch.cat([weights[:, 3:], weights[:, :3]], dim=1)
    found = generated(model.eval(), ids, routing_weights=turned)
    model.base_model.set_adapter(["first", "second"])
    assert_equal(found, generated(model, ids, routing_weights=weights))
