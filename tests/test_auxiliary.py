"""The auxiliary loss: its value, that it reaches the routers once with its weight, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from moelora import AuxLossError
from tests.auxiliary import (
    LOSS_TYPES,
    SCOPES,
    accumulated,
    assert_gradients_close,
    expected_loss,
    expected_mean_loss,
    gradients,
    router_inputs,
    scaled,
    summed,
    train_batch,
    without_loss,
)
from tests.lm import (
    captured_inputs,
    lora_config,
    mixture,
    mixture_config,
    perturb,
    router_parameters,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
    token_ids,
    trainable,
)
from tests.tolerances import assert_close, assert_equal

# Value -----------------------------------------------------------------------------------------


@SCOPES
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_output_holds_the_mean_over_routers_unscaled(loss_type: str, scope: str) -> None:
    model = mixture(
        load_balance_loss_type=loss_type, router_aux_loss_coef=0.25, router_scope=scope
    ).train()
    with router_inputs(model) as inputs:
        output = model(**train_batch())
    assert_close(output.aux_loss, expected_mean_loss(model, inputs))


def test_an_output_with_the_loss_can_be_taken_apart_and_rebuilt() -> None:
    # what DistributedDataParallel and gather do
    output = mixture().train()(**train_batch())
    rebuilt = tree_map(lambda leaf: leaf, output)
    assert type(rebuilt) is type(output)
    assert isinstance(rebuilt, CausalLMOutputWithPast)
    assert_equal([rebuilt.loss, rebuilt.aux_loss], [output.loss, output.aux_loss])
    assert_equal(rebuilt[0], output.loss)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_loss_is_the_task_loss_plus_the_coefficient_times_the_auxiliary_loss(
    loss_type: str,
) -> None:
    model = mixture(load_balance_loss_type=loss_type, router_aux_loss_coef=0.25).train()
    output = model(**train_batch())
    task = without_loss(model)(**train_batch())
    assert_close(output.loss, task.loss + 0.25 * output.aux_loss)


@SCOPES
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_gradient_is_that_of_the_task_plus_coefficient_times_the_loss_by_hand(
    loss_type: str, scope: str
) -> None:
    model = mixture(
        load_balance_loss_type=loss_type, router_aux_loss_coef=0.25, router_scope=scope
    ).train()
    model(**train_batch()).loss.backward()
    oracle = without_loss(model)
    with router_inputs(oracle) as inputs:
        task = oracle(**train_batch()).loss
    auxiliary = gradients(expected_mean_loss(oracle, inputs), oracle)
    assert_gradients_close(
        accumulated(model), summed(gradients(task, oracle), scaled(auxiliary, 0.25))
    )


def test_top_1_counts_one_slot_per_token() -> None:
    model = mixture(top_k_experts=1).train()
    with captured_inputs(model) as inputs:
        output = model(**train_batch())
    assert_close(output.aux_loss, expected_mean_loss(model, inputs))


def test_a_hidden_layer_in_the_router_gets_the_gradient_too() -> None:
    model = mixture(router_hidden_size=5, router_aux_loss_coef=3.0).train()
    oracle = without_loss(model)
    model(**train_batch()).loss.backward()
    oracle(**train_batch()).loss.backward()
    moved = {
        name: not torch.equal(p.grad, router_parameters(oracle)[name].grad)
        for name, p in router_parameters(model).items()
    }
    assert all(moved.values()), moved


@SCOPES
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_padding_counts_nowhere(loss_type: str, side: str, scope: str) -> None:
    model = mixture(
        load_balance_loss_type=loss_type, expert_capacity_factor=None, router_scope=scope
    ).train()
    batch = train_batch(length=9)
    mask = torch.ones_like(batch["input_ids"])
    padded = slice(0, 4) if side == "left" else slice(5, 9)
    mask[1, padded] = 0
    batch["labels"][1, padded] = -100
    with router_inputs(model) as inputs:
        output = model(**batch, attention_mask=mask)
    assert_close(output.aux_loss, expected_mean_loss(model, inputs, mask=mask))


@SCOPES
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_padding_changes_no_loss(side: str, scope: str) -> None:
    model = mixture(router_scope=scope).train()
    batch = train_batch(length=9)
    mask = torch.ones_like(batch["input_ids"])
    padded = slice(0, 4) if side == "left" else slice(5, 9)
    mask[1, padded] = 0
    # the last padding on the left would predict the first real token
    batch["labels"][1, slice(0, 5) if side == "left" else padded] = -100
    other_ids = batch["input_ids"].clone()
    other_ids[1, padded] = 3
    output = model(**batch, attention_mask=mask)
    other = model(**{**batch, "input_ids": other_ids}, attention_mask=mask)
    assert_close([other.loss, other.aux_loss], [output.loss, output.aux_loss])


def test_a_boolean_mask_means_the_same_as_a_mask_of_integers() -> None:
    model = mixture().train()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    assert_equal(
        model(**train_batch(), attention_mask=mask.bool()).aux_loss,
        model(**train_batch(), attention_mask=mask).aux_loss,
    )


def test_a_mask_given_by_position_counts_as_well() -> None:
    model = mixture().train()
    batch = train_batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[1, :3] = 0
    by_position = model(batch["input_ids"], mask, labels=batch["labels"])
    assert_equal(by_position.aux_loss, model(**batch, attention_mask=mask).aux_loss)


# Once ------------------------------------------------------------------------------------------


def test_two_forwards_before_one_backward_count_each_once() -> None:
    model = mixture(router_aux_loss_coef=0.5).train()
    first, second = train_batch(seed=3), train_batch(seed=4)
    (model(**first).loss + model(**second).loss).backward()
    together = [g.clone() for g in accumulated(model)]
    model.zero_grad()
    model(**first).loss.backward()
    model(**second).loss.backward()
    assert_gradients_close(together, accumulated(model))


@SCOPES
def test_a_forward_that_raised_leaves_nothing_to_the_next_one(scope: str) -> None:
    model = mixture(router_scope=scope).train()
    expected = model(**train_batch()).aux_loss
    broken = model.get_base_model().lm_head.register_forward_pre_hook(_raise)
    with pytest.raises(OSError, match="interrupted"):
        model(**train_batch(seed=5))
    broken.remove()
    assert_equal(model(**train_batch()).aux_loss, expected)


def _raise(*_: object) -> None:
    raise OSError("interrupted")


def test_training_without_gradients_adds_nothing() -> None:
    model = mixture().train()
    with torch.no_grad():
        output = model(**train_batch())
    assert type(output) is CausalLMOutputWithPast
    assert_close(output.loss, without_loss(model)(**train_batch()).loss)


def test_evaluation_gives_pefts_own_output_without_extras() -> None:
    output = mixture().eval()(**train_batch())
    assert type(output) is CausalLMOutputWithPast
    assert "aux_loss" not in output


def test_evaluation_loss_is_the_task_loss() -> None:
    model = mixture(router_aux_loss_coef=5.0).eval()
    output = model(**train_batch())
    shifted = output.logits[:, :-1].flatten(0, 1)
    targets = train_batch()["labels"][:, 1:].flatten()
    task = nn.functional.cross_entropy(shifted.float(), targets)
    assert_close(output.loss, task)


def test_a_coefficient_of_zero_leaves_the_output_alone() -> None:
    output = mixture(router_aux_loss_coef=0.0).train()(**train_batch())
    assert type(output) is CausalLMOutputWithPast


def test_disabled_adapters_have_no_auxiliary_loss() -> None:
    model = mixture().train()
    with model.disable_adapter():
        assert type(model(**train_batch())) is CausalLMOutputWithPast


def test_explicit_weights_leave_the_routers_without_a_loss() -> None:
    model = mixture().train()
    output = model(**train_batch(), routing_weights=torch.rand(3))
    assert type(output) is CausalLMOutputWithPast


def test_fixed_routing_has_no_auxiliary_loss() -> None:
    output = mixture(router_type="fixed").train()(**train_batch())
    assert type(output) is CausalLMOutputWithPast


def test_a_frozen_mixture_still_trains_the_adapter_beside_it() -> None:
    model = mixture().train()
    model.add_adapter("plain", lora_config())
    model.base_model.set_adapter(["default", "plain"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.requires_grad_(False)
    model(**train_batch()).loss.backward()
    assert all(p.grad is not None for p in trainable(model).values())


def test_two_active_mixtures_share_one_loss_over_all_their_experts() -> None:
    model = mixture().train()
    model.add_adapter("second", mixture_config(num_experts=2))
    perturb(model)
    model.base_model.set_adapter(["default", "second"])
    with captured_inputs(model) as inputs:
        output = model(**train_batch())
    losses = []
    for name, x in inputs.items():
        layer = model.get_submodule(name)
        rows = torch.cat([layer.lora_router[a].weight for a in ("default", "second")])
        logits = (x @ rows.T).flatten(0, -2) / 2.0
        losses.append(expected_loss(logits, loss_type="aux_loss", top_k=2))
    assert_close(output.aux_loss, sum(losses) / len(losses))


# Where the model computes no loss ------------------------------------------------------------


@SCOPES
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_without_labels_the_gradient_is_attached_to_the_logits_once(
    loss_type: str, scope: str
) -> None:
    model = mixture(
        load_balance_loss_type=loss_type, router_aux_loss_coef=0.25, router_scope=scope
    ).train()
    ids = token_ids()
    model(input_ids=ids).logits.square().mean().backward()
    oracle = without_loss(model)
    with router_inputs(oracle) as inputs:
        task = oracle(input_ids=ids).logits.square().mean()
    auxiliary = gradients(expected_mean_loss(oracle, inputs), oracle)
    assert_gradients_close(
        accumulated(model), summed(gradients(task, oracle), scaled(auxiliary, 0.25))
    )


def test_without_labels_the_output_holds_the_loss_alone() -> None:
    model = mixture().train()
    with captured_inputs(model) as inputs:
        output = model(input_ids=token_ids())
    assert_close(output.aux_loss, expected_mean_loss(model, inputs))
    assert output.loss is None


@pytest.mark.parametrize("with_labels", [True, False])
def test_tuple_outputs_carry_the_loss_as_outputs_do(with_labels: bool) -> None:
    model = mixture(router_aux_loss_coef=0.25).train()
    batch = train_batch() if with_labels else {"input_ids": token_ids()}
    first = model(**batch, return_dict=False)[0]
    first.square().mean().backward()
    as_tuple = [g.clone() for g in accumulated(model)]
    model.zero_grad()
    output = model(**batch)
    (output.loss if with_labels else output.logits).square().mean().backward()
    assert_gradients_close(as_tuple, accumulated(model))


def test_a_tuple_output_has_pefts_length() -> None:
    model = mixture().train()
    batch = train_batch()
    assert len(model(**batch, return_dict=False)) == len(model.eval()(**batch, return_dict=False))


def test_a_bare_module_without_model_outputs_gets_the_gradient_once() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 4, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    torch.manual_seed(0)
    fields: dict[str, Any] = {"target_modules": ["linear"], "task_type": None}
    model = mixture(Bare(), router_aux_loss_coef=0.25, **fields).train()
    x = torch.randn(6, 5, dtype=torch.float64)
    model(x).square().mean().backward()
    oracle = without_loss(model)
    with captured_inputs(oracle) as inputs:
        task = oracle(x).square().mean()
    auxiliary = gradients(expected_mean_loss(oracle, inputs), oracle)
    assert_close(accumulated(model), summed(gradients(task, oracle), scaled(auxiliary, 0.25)))


def test_an_output_that_cannot_carry_the_loss_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.linear(x)]

    model = mixture(Odd(), target_modules=["linear"], task_type=None).train()
    with pytest.raises(AuxLossError, match="output of type list"):
        model(torch.randn(6, 5))


def test_question_answering_adds_the_loss_whatever_the_output_looks_like() -> None:
    from transformers import LlamaForQuestionAnswering

    torch.manual_seed(0)
    base = LlamaForQuestionAnswering(tiny_llama().config).double()
    model = mixture(base, task_type="QUESTION_ANS", router_aux_loss_coef=2.0).train()
    batch = {
        "input_ids": token_ids(),
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([3, 4]),
    }
    assert_close(model(**batch, return_dict=False)[0], model(**batch).loss)


def test_a_base_with_its_own_auxiliary_loss_gets_ours_added() -> None:
    fields: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    model = mixture(tiny_mixtral(), router_aux_loss_coef=0.25, **fields).train()
    with captured_inputs(model) as inputs:
        output = model(**train_batch(), output_router_logits=True)
    plain = without_loss(model)(**train_batch(), output_router_logits=True)
    ours = expected_mean_loss(model, inputs)
    assert isinstance(output, MoeCausalLMOutputWithPast)
    assert_close(output.aux_loss, plain.aux_loss + ours)
    assert_close(output.loss, plain.loss + 0.25 * ours)


def test_a_mixtral_that_reports_no_loss_of_its_own_reports_ours() -> None:
    fields: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    model = mixture(tiny_mixtral(), **fields).train()
    with captured_inputs(model) as inputs:
        output = model(**train_batch())
    assert_close(output.aux_loss, expected_mean_loss(model, inputs))


def test_an_encoder_decoder_counts_the_tokens_that_each_layer_reads() -> None:
    fields: dict[str, Any] = {"target_modules": ["q", "k"], "task_type": "SEQ_2_SEQ_LM"}
    model = mixture(tiny_t5(), **fields).train()
    encoder_mask = torch.ones(2, 5, dtype=torch.long)
    encoder_mask[1, 3:] = 0
    decoder_mask = torch.ones(2, 5, dtype=torch.long)
    decoder_mask[0, 2:] = 0
    batch = {
        "input_ids": token_ids(2, 5),
        "attention_mask": encoder_mask,
        "decoder_attention_mask": decoder_mask,
        "labels": token_ids(2, 5, seed=3),
    }
    with captured_inputs(model) as inputs:
        output = model(**batch)
    losses = []
    for name, x in inputs.items():
        reads_encoder = ".encoder." in name or name.endswith("EncDecAttention.k")
        mask = encoder_mask if reads_encoder else decoder_mask
        losses.append(expected_mean_loss(model, {name: x}, mask=mask))
    assert_close(output.aux_loss, sum(losses) / len(losses))


# Refused ---------------------------------------------------------------------------------------


def test_float16_autocast_without_a_loss_is_refused() -> None:
    model = mixture(tiny_llama(dtype=torch.float32)).train()
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(AuxLossError, match="float16 loss scaler"),
    ):
        model(input_ids=token_ids())


class OwnCheckpointing(nn.Module):
    """A model that checkpoints by itself, where no frame can be handed to the recomputation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = checkpoint(self.linear, x, use_reentrant=True)
        return output


def test_reentrant_checkpointing_by_the_model_itself_is_refused_with_the_way_out() -> None:
    model = mixture(OwnCheckpointing(), target_modules=["linear"], task_type=None).train()
    with pytest.raises(AuxLossError, match="use_reentrant=False"):
        model(torch.randn(6, 5, dtype=torch.float64, requires_grad=True))


def test_a_trainer_that_computes_the_loss_over_accumulated_batches_is_refused() -> None:
    model = mixture().train()
    with pytest.raises(AuxLossError, match="label_smoothing_factor, compute_loss_func"):
        model(input_ids=token_ids(), num_items_in_batch=torch.tensor(12))


# Scale -----------------------------------------------------------------------------------------


def test_a_micro_batch_brings_its_share_of_the_accumulated_targets() -> None:
    model = mixture(router_aux_loss_coef=0.25).train()
    batch = train_batch()
    batch["labels"][1, 3:] = -100
    # causal models predict positions 1 to 6 of row 0 and 1 to 2 of row 1
    total = torch.tensor(32)
    output = model(**batch, num_items_in_batch=total)
    task = without_loss(model)(**batch, num_items_in_batch=total)
    assert_close(output.loss, task.loss + 0.25 * (8 / 32) * output.aux_loss)


def test_shifted_labels_are_counted_as_they_are() -> None:
    model = mixture(router_aux_loss_coef=0.25).train()
    batch = train_batch()
    batch["shift_labels"] = batch["labels"].clone()
    batch["shift_labels"][1, 3:] = -100
    output = model(**batch, num_items_in_batch=torch.tensor(20))
    task = without_loss(model)(**batch, num_items_in_batch=torch.tensor(20))
    assert_close(output.loss, task.loss + 0.25 * (10 / 20) * output.aux_loss)


def test_rows_without_targets_add_nothing_to_an_accumulated_batch() -> None:
    model = mixture(router_aux_loss_coef=0.25).train()
    batch = train_batch()
    batch["labels"][:] = -100
    model(**batch, num_items_in_batch=torch.tensor(20)).loss.backward()
    assert_equal(accumulated(model), [torch.zeros_like(g) for g in accumulated(model)])
