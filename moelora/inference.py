"""What a model that only serves may keep between its forwards."""

from typing import Any

from torch import nn

from moelora import _peft
from moelora.errors import UnsupportedLayerError
from moelora.routed_layer import KEEPS_ROWS, forget_plan


class Preparation:
    """What :func:`prepare_for_inference` did; :meth:`remove` undoes it.

    As a context manager it is undone at the end of the block.
    """

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers

    def remove(self) -> None:
        """Forget the packed rows. Doing so twice does nothing more."""
        for layer in self._layers:
            layer.__dict__.pop(KEEPS_ROWS, None)
            forget_plan(layer)
        self._layers = []

    def __enter__(self) -> "Preparation":
        return self

    def __exit__(self, *_raised: object) -> None:
        self.remove()


def prepare_for_inference(model: nn.Module) -> Preparation:
    """Let a mixture's layers keep their packed weights between forwards without gradients.

    On a GPU each forward of more than a few tokens packs A, B and router of its layers in the
    dtype of the model. That costs 1 % of a prefill's GPU time, but 4 % of the host's, by which
    small prefills are bound. Prepared layers do it once and keep the result: as many bytes again as
    the adapters have in the model's dtype. Results are the same to the bit. Training, decoding of
    few tokens, and the CPU pack nothing and stay as they are.

    Rows are made anew when a parameter is replaced or changed in place by an optimiser, by
    ``load_state_dict`` or under ``no_grad``. **A change through** ``parameter.data`` **is not
    seen**: call :meth:`Preparation.remove` before and prepare again. CUDA graphs pack each time
    they run.

    Args:
        model: a model with a mixture: a ``PeftModel``, or a model that adapters were injected into.

    Returns:
        A handle that undoes it, also usable in a ``with`` statement.

    Raises:
        UnsupportedLayerError: if the model has no LoRA layers.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from moelora import MoELoraConfig
        >>> base = nn.Sequential(nn.Linear(8, 8))
        >>> model = get_peft_model(base, MoELoraConfig(num_experts=2, target_modules=["0"]))
        >>> with prepare_for_inference(model.eval()), torch.no_grad():
        ...     model(torch.ones(1, 8)).shape
        torch.Size([1, 8])
    """
    layers = [module for module in model.modules() if isinstance(module, _peft.LoraLayer)]
    if not layers:
        raise UnsupportedLayerError(
            f"prepare_for_inference needs LoRA layers, but {type(model).__name__} has none."
        )
    for layer in layers:
        layer.__dict__[KEEPS_ROWS] = True
        forget_plan(layer)
    return Preparation(layers)
