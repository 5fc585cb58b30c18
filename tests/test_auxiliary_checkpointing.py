"""The auxiliary loss under gradient checkpointing of both kinds: the same gradients, once."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.auxiliary import (
    LOSS_TYPES,
    SCOPES,
    accumulated,
    assert_gradients_close,
    scaled,
    train_batch,
)
from tests.lm import (
    checkpoint_blocks,
    mixture,
    router_parameters,
    token_ids,
)
from tests.tolerances import assert_close

# Gradient checkpointing --------------------------------------------------------------------


@SCOPES
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_checkpointing_changes_no_gradient(
    loss_type: str, with_labels: bool, use_reentrant: bool, scope: str
) -> None:
    model = mixture(
        load_balance_loss_type=loss_type, router_aux_loss_coef=0.25, router_scope=scope
    ).train()
    plain = copy.deepcopy(model)
    checkpoint_blocks(model, use_reentrant=use_reentrant)
    for each in (model, plain):
        if with_labels:
            each(**train_batch()).loss.backward()
        else:
            each(input_ids=token_ids()).logits.square().mean().backward()
    assert_gradients_close(accumulated(model), accumulated(plain))


@SCOPES
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_two_checkpointed_forwards_before_one_backward_count_each_once(
    use_reentrant: bool, scope: str
) -> None:
    model = mixture(router_aux_loss_coef=0.25, router_scope=scope).train()
    plain = copy.deepcopy(model)
    checkpoint_blocks(model, use_reentrant=use_reentrant)
    for each in (model, plain):
        first = each(**train_batch(seed=3)).loss
        second = each(**train_batch(seed=4)).loss
        (first + 3 * second).backward()
    assert_gradients_close(accumulated(model), accumulated(plain))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_scale_of_the_loss_reaches_recomputed_routers(use_reentrant: bool) -> None:
    model = mixture(router_aux_loss_coef=0.25).train()
    plain = copy.deepcopy(model)
    checkpoint_blocks(model, use_reentrant=use_reentrant)
    for each in (model, plain):
        loss = each(**train_batch(), num_items_in_batch=torch.tensor(30)).loss
        (1024.0 * loss).backward()
    assert_close(
        scaled(accumulated(model), 2.0**-10),
        scaled(accumulated(plain), 2.0**-10),
        dtype=torch.float32,
    )


@SCOPES
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_value(use_reentrant: bool, scope: str) -> None:
    model = mixture(router_scope=scope).train()
    plain = model(**train_batch())
    checkpoint_blocks(model, use_reentrant=use_reentrant)
    output = model(**train_batch())
    assert_close([output.loss, output.aux_loss], [plain.loss, plain.aux_loss])


@SCOPES
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_padding_counts_nowhere_in_a_recomputation(use_reentrant: bool, scope: str) -> None:
    model = mixture(router_aux_loss_coef=0.25, router_scope=scope).train()
    plain = copy.deepcopy(model)
    checkpoint_blocks(model, use_reentrant=use_reentrant)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    for each in (model, plain):
        each(**train_batch(), attention_mask=mask).loss.backward()
    assert_gradients_close(accumulated(model), accumulated(plain))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_adapters_outside_of_checkpointed_blocks_keep_their_share(use_reentrant: bool) -> None:
    model = mixture(target_modules=["q_proj", "lm_head"], router_aux_loss_coef=0.25).train()
    plain = copy.deepcopy(model)
    checkpoint_blocks(model, use_reentrant=use_reentrant)
    for each in (model, plain):
        each(**train_batch()).loss.backward()
    assert_gradients_close(accumulated(model), accumulated(plain))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_frozen_routers_pass_the_same_gradient_on_under_checkpointing(
    use_reentrant: bool,
) -> None:
    model = mixture(router_aux_loss_coef=5.0).train()
    for parameter in router_parameters(model).values():
        parameter.requires_grad_(False)
    plain = copy.deepcopy(model)
    checkpoint_blocks(model, use_reentrant=use_reentrant)
    for each in (model, plain):
        each(**train_batch()).loss.backward()
    assert_gradients_close(accumulated(model), accumulated(plain))
