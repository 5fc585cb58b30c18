"""Matrix products with the accuracy and the passes that the fused layers need."""

import torch
import torch.nn.functional as F
from torch import Tensor

# torch 2.8: the first whose half-precision products can give float32 results
_HAS_OUT_DTYPE = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)

_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with a result in at least float32: half-precision inputs, no rounding of the sum.

    Example:
        >>> wide_mm(torch.ones(1, 2).bfloat16(), torch.ones(2, 1).bfloat16())
        tensor([[2.]])
    """
    if a.dtype not in (torch.bfloat16, torch.float16):
        return torch.mm(a, b)
    if a.is_cuda and _HAS_OUT_DTYPE:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None, *, is_conv1d: bool) -> Tensor:
    """What the frozen layer gives, flattened to ``(tokens, d_out)``, by the layer's own call.

    Args:
        x: ``(*batch, d_in)``.
        weight: ``(d_out, d_in)``, or ``(d_in, d_out)`` of transformers' ``Conv1D``.
        bias: ``(d_out,)`` or None; a ``Conv1D`` always has one.
        is_conv1d: which of the two.

    Example:
        >>> base_product(torch.ones(1, 1, 2), torch.ones(3, 2), None, is_conv1d=False)
        tensor([[2., 2., 2.]])
    """
    if is_conv1d and bias is not None:
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
    return F.linear(x, weight, bias).reshape(-1, weight.shape[0])


def base_output(x: Tensor, weight: Tensor, bias: Tensor | None, *, is_conv1d: bool) -> Tensor:
    """What the frozen layer gives, ``(*batch, d_out)``, contiguous; without gradients only.

    Args:
        x: ``(*batch, d_in)``.
        weight: as for :func:`base_product`, and all that follow.
        bias: as there.
        is_conv1d: as there.

    Example:
        >>> base_output(torch.ones(1, 1, 2), torch.ones(3, 2), None, is_conv1d=False)
        tensor([[[2., 2., 2.]]])
    """
    if is_conv1d or not x.is_contiguous():
        return in_shape(base_product(x, weight, bias, is_conv1d=is_conv1d), x.shape)
    return F.linear(x, weight, bias)


def in_shape(output: Tensor, batch: torch.Size) -> Tensor:
    """``output`` of all tokens in the shape of a layer's input, as a tensor of its own.

    Autograd refuses to change a view that a custom function returns, and callers do write into a
    layer's output (``ReLU(inplace=True)``).

    Args:
        output: ``(tokens, d_out)``; used no more.
        batch: of the input, ``(*batch, d_in)``.

    Example:
        >>> in_shape(torch.ones(6, 2), torch.Size([2, 3, 4])).shape
        torch.Size([2, 3, 2])
    """
    shaped: Tensor = _UNSAFE_VIEW(output, (*batch[:-1], output.shape[-1]))
    return shaped


def with_update(
    x: Tensor,
    flat: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ranks: Tensor,
    lora_b: Tensor,
    *,
    is_conv1d: bool,
) -> Tensor:
    """The frozen layer's product and the update, in the order that passes less over the output.

    Args:
        x: ``(*batch, d_in)``.
        flat: the same, ``(tokens, d_in)``.
        weight: ``(d_out, d_in)``, or ``(d_in, d_out)`` of transformers' ``Conv1D``; None for the
            update alone.
        bias: ``(d_out,)`` or None.
        ranks: ``(tokens, ranks)``, scaled.
        lora_b: ``(d_out, ranks)``.
        is_conv1d: which of the two.

    Returns:
        ``(*batch, d_out)``, a tensor of its own.

    Example:
        >>> x, one = torch.ones(1, 1, 2), torch.ones(1, 1)
        >>> with_update(x, x[0], torch.ones(1, 2), None, one, 3 * one, is_conv1d=False)
        tensor([[[5.]]])
    """
    if weight is None:
        return torch.mm(ranks, lora_b.t()).resize_(*x.shape[:-1], lora_b.shape[0])
    if bias is not None or is_conv1d or not (flat.is_cuda or x.is_contiguous()):
        output = base_product(flat, weight, bias, is_conv1d=is_conv1d).addmm_(ranks, lora_b.t())
        return in_shape(output, x.shape)
    if flat.is_cuda:
        return two_products(flat, weight, ranks, lora_b, x.shape)
    output = F.linear(x, weight)
    output.view(-1, weight.shape[0]).addmm_(ranks, lora_b.t())
    return output


def two_products(
    flat: Tensor, weight: Tensor, ranks: Tensor, lora_b: Tensor, batch: torch.Size
) -> Tensor:
    """:func:`with_update` of a plain linear layer, in as few calls as there are.

    Args:
        flat: as there, and all that follow.
        weight: as there.
        ranks: as there.
        lora_b: as there.
        batch: the shape of ``x``.

    Example:
        >>> one = torch.ones(1, 1)
        >>> two_products(one, one, one, 2 * one, torch.Size([1, 1, 1]))
        tensor([[[3.]]])
    """
    if update_first(weight, None, is_conv1d=False):
        output = torch.mm(ranks, lora_b.t()).addmm_(flat, weight.t())
    else:
        output = torch.mm(flat, weight.t()).addmm_(ranks, lora_b.t())
    # changes the tensor itself: a view may not be returned, see in_shape
    return output.resize_(*batch[:-1], weight.shape[0])


def update_first(weight: Tensor, bias: Tensor | None, *, is_conv1d: bool) -> bool:
    """Whether to write the update first and let the base product accumulate onto it.

    Both ways pass once more over the output. Where it is much wider than the input the base product
    hides that pass: 220 instead of 247 us for 2048 to 8192 features of 4096 tokens on an H100, and
    no difference where it is not.

    Example:
        >>> update_first(torch.ones(8, 2), None, is_conv1d=False)
        True
    """
    return bias is None and not is_conv1d and weight.shape[0] >= 2 * weight.shape[1]


def base_gradient(grad: Tensor, weight: Tensor, *, is_conv1d: bool) -> Tensor:
    """The gradient of ``x`` through the frozen layer, ``(tokens, d_in)``.

    Example:
        >>> base_gradient(torch.ones(1, 3), torch.ones(3, 2), is_conv1d=False)
        tensor([[3., 3.]])
    """
    return torch.mm(grad, weight.t() if is_conv1d else weight)
