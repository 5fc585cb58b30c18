"""Cases of the routed op against its reference; run as a script, in Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.ops.routed_cases
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from moelora.ops import RouterOptions, backend, routed_linear, routed_linear_reference

#: tokens, d_in, d_out, experts, rank, k, capacity factor, padded, maturity (None: not tracked)
CASES = [
    (5, 6, 7, 4, 2, 2, None, True, False),
    (40, 6, 7, 3, 3, 1, 1.25, True, True),
    (70, 16, 9, 8, 4, 2, 1.0, True, None),
    (70, 16, 9, 8, 4, 2, 0.5, False, None),
    (33, 16, 9, 5, 3, 5, 1.0, True, False),
    (1, 16, 9, 2, 1, 2, 1.25, False, None),
]
LOSSES = ("aux_loss", "switch", "z_loss")


def errors(case: tuple, loss_type: str, name: str, dtype: torch.dtype) -> list[float]:
    """Relative errors of the output and of all gradients, the reference in float64."""
    tokens, d_in, d_out, experts, rank, top_k, capacity, padded, maturity = case
    generator = torch.Generator().manual_seed(tokens + experts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    shapes = [(tokens, d_in), (experts * rank, d_in), (d_out, experts * rank), (experts, d_in)]
    inputs = [normal(*shape) for shape in shapes]
    weight, bias, direction = normal(d_out, d_in), normal(d_out), normal(tokens, d_out)
    mask = torch.rand(tokens, generator=generator) > 0.3 if padded else None
    mature = None if maturity is None else torch.tensor([maturity] + [True] * (experts - 1))
    options = RouterOptions(experts, top_k, 2.0, 1.7, capacity, loss_type)  # type: ignore[arg-type]
    told = {"options": options, "token_mask": mask, "mature": mature}
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    result = routed_linear(
        ours[0], weight, bias, *ours[1:], **told, backend=name, all_mature=maturity is not False
    )
    expected = [tensor.double().requires_grad_() for tensor in inputs]
    output, sums = routed_linear_reference(
        expected[0], weight.double(), bias.double(), *expected[1:], **told
    )
    assert result.statistics is not None
    width = (len(result.statistics) - 2) // 3
    pull = torch.linspace(-1, 1, experts, dtype=torch.float64)
    if loss_type == "z_loss":
        extra, extra_expected = result.statistics[3 * width], sums["mean_squared_logsumexp"]
    else:
        extra, extra_expected = (
            result.statistics[:experts] @ pull.to(dtype),
            sums["mean_probs"] @ pull,
        )
    ((result.output * direction).sum() + extra).backward()
    ((output * direction.double()).sum() + extra_expected).backward()
    pairs = [(result.output, output), (extra, extra_expected)]
    pairs += [(a.grad, b.grad) for a, b in zip(ours, expected, strict=True)]
    return [float((a.double() - b).norm() / (b.norm() + 1e-12)) for a, b in pairs]


def main() -> int:
    """Run all cases on the kernels, dense and sparse; say which are wrong."""
    wrong = []
    for sparse_from in (backend.SPARSE_FROM, 0):
        backend.SPARSE_FROM = sparse_from
        backend.explain.cache_clear()
        for number, case in enumerate(CASES):
            found = errors(case, LOSSES[number % 3], "triton", torch.float32)
            if not max(found) < 2e-5:
                wrong.append((sparse_from, case, found))
    for line in wrong:
        sys.stderr.write(f"{line}\n")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
