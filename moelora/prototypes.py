"""Arrow prototypes: what input direction each LoRA expert answers most, without any training."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

#: Slope of the smooth absolute value; a power of two, so that scaling by it rounds nothing.
SHARPNESS = 1024.0


def top_right_singular_vector(
    a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"]
) -> Float[Tensor, " in"]:
    """The unit direction in input space that ``B A`` amplifies most; zeros if ``B A`` is zero.

    With ``A.T = Q R`` and ``B = P S`` (both QR), ``B A = P (S R.T) Q.T``, so the vector is ``Q v``
    with ``v`` the top right singular vector of the small ``S R.T``: no ``[out, in]`` product is
    formed. Computed in float64. The sign, which is arbitrary, is chosen so that the entry of
    largest magnitude is positive. Where the two largest singular values coincide, it is one unit
    vector of their plane.

    Source: Arrow (arXiv:2405.11157), section 3.2. PEFT finds it by 15 power iterations, which have
    not converged where the largest singular values are close; this is the exact one.

    Args:
        a: the expert's A.
        b: the expert's B.

    Example:
        >>> a, b = torch.tensor([[0.0, -2.0, 0.0]]), torch.tensor([[3.0], [4.0]])
        >>> top_right_singular_vector(a, b)
        tensor([0., 1., 0.], dtype=torch.float64)
    """
    q, r = torch.linalg.qr(a.double().T)
    s = torch.linalg.qr(b.double()).R
    _, values, right = torch.linalg.svd(s @ r.T, full_matrices=False)
    if values.numel() == 0 or values[0] == 0:
        return torch.zeros(a.shape[1], dtype=torch.float64)
    vector: Tensor = q @ right[0]
    vector = vector / vector.norm()
    # adding zero turns -0. into 0.
    positive: Tensor = vector * vector[vector.abs().argmax()].sign() + 0.0
    return positive


def arrow_router(
    prototypes: Sequence[Float[Tensor, " in"]],
) -> tuple[Float[Tensor, "experts hidden"], Float[Tensor, "hidden in"]]:
    """Router tensors whose logits are ``|x . v_e|``, the absolute value smoothed near zero.

    A router with a hidden layer of width ``2 E`` holds ``+c v_e`` and ``-c v_e`` and adds both by
    ``1 / c``: ``(silu(c z) + silu(-c z)) / c = z tanh(c z / 2)`` with ``z = x . v_e``. That grows
    with ``|z|``, so the top k experts are exactly Arrow's, and it is smaller than ``|z|`` by at
    most ``0.56 / c``, with ``c =`` :data:`SHARPNESS`.

    Args:
        prototypes: one unit vector (or zeros) per expert.

    Returns:
        ``weight`` and ``hidden_weight`` of the router, float64.

    Example:
        >>> weight, hidden_weight = arrow_router([torch.tensor([1.0, 0.0])])
        >>> hidden_weight
        tensor([[ 1024.,     0.],
                [-1024.,     0.]], dtype=torch.float64)
        >>> weight * 1024
        tensor([[1., 1.]], dtype=torch.float64)
    """
    rows = torch.stack(list(prototypes)).double() * SHARPNESS
    # adding zero turns -0. into 0.
    hidden_weight = torch.cat([rows, -rows]) + 0.0
    eye = torch.eye(len(prototypes), dtype=torch.float64) / SHARPNESS
    return torch.cat([eye, eye], dim=1), hidden_weight
