"""The auxiliary loss under gradient checkpointing of both kinds: the same gradients, once."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moelora import MoELoraConfig
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


class _Checkpointing(nn.Module):
    """A model that checkpoints its blocks by itself, in no way that transformers knows."""

    def __init__(self, *, checkpoints: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(2)
        )
        self.checkpoints = checkpoints

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return x


@pytest.mark.parametrize("coefficient", [0.0, 0.25])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_model_may_checkpoint_by_itself_without_reentrance(
    loss_type: str, coefficient: float
) -> None:
    found = []
    for checkpoints in (True, False):
        config = MoELoraConfig(
            num_experts=3, top_k_experts=2, r=2, target_modules=r"blocks\.\d\.[02]",
            load_balance_loss_type=loss_type, router_aux_loss_coef=coefficient,
        )  # fmt: skip
        model = get_peft_model(_Checkpointing(checkpoints=checkpoints).double(), config)
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        for _ in range(2):
            x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(2, 5, 6).requires_grad_()
            model(x).square().mean().backward()
        found.append(accumulated(model))
    assert_gradients_close(*found)
