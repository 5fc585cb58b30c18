"""Layers on two devices: every tensor gets to the device where it is used.

Without GPUs, tensors that hold no data stand for both devices: torch refuses to mix them as it
would two GPUs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode

from tests.lm import mixture, token_ids

FIRST, SECOND = torch.device("cpu"), torch.device("cpu:1")


def place(module: nn.Module, device: torch.device) -> None:
    """Replace all tensors by ones without data on ``device``."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
                part._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)


def bring(value: Any) -> Any:
    """Tensors on the second device, also those in tuples."""
    if isinstance(value, Tensor):
        return value.to(SECOND)
    return tuple(map(bring, value)) if isinstance(value, tuple) else value


def bring_inputs(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """What accelerate's hooks do for a ``device_map``."""
    return bring(args), {name: bring(value) for name, value in kwargs.items()}


@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "general path"])
@pytest.mark.parametrize("scope", ["module", "layer", "model"])
def test_routers_masks_and_losses_follow_the_layers(scope: str, hooked: bool) -> None:
    model = mixture(router_scope=scope, router_aux_loss_coef=1.0).train()
    inner = model.get_base_model().model
    upper = [inner.layers[1], inner.norm, model.get_base_model().lm_head]
    ids = token_ids()
    with FakeTensorMode(allow_non_fake_inputs=True):
        place(model, FIRST)
        for module in upper:
            place(module, SECOND)
            module.register_forward_pre_hook(bring_inputs, with_kwargs=True)
        for name, module in model.named_modules():
            if hooked and name.endswith("base_layer"):
                module.register_forward_hook(lambda *_: None)
        mask = torch.ones(ids.shape, dtype=torch.long, device=FIRST)
        ids = torch.zeros(ids.shape, dtype=torch.long, device=FIRST)
        loss = model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss
        loss.backward()
        trained = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    assert loss.device == SECOND
    assert {p.device for p, _ in trained} == {FIRST, SECOND}
    assert all(grad is not None and grad.device == p.device for p, grad in trained)


def test_these_devices_do_not_mix() -> None:
    with FakeTensorMode():
        tensors = torch.ones(2, device=FIRST), torch.ones(2, device=SECOND)
        with pytest.raises(FakeTensorDeviceMismatchError):
            tensors[0] + tensors[1]
