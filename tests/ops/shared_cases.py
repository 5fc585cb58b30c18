"""Layers that read one input, on the kernels together; run as a script, in Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.ops.shared_cases
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from moelora.ops import (
    Member,
    RouterOptions,
    backend,
    routed_linear_reference,
    routed_linears,
    routed_linears_inference,
)
from moelora.ops.routed_triton import pack, sizes_of
from moelora.ops.rows_together import RowsTogether

#: tokens, d_in, widths of the outputs, experts, rank, k, capacity factor, loss, mature
CASES = [
    (37, 12, (10, 4, 6), 4, 2, 2, 1.25, "aux_loss", True),
    (37, 12, (6, 20), 5, 3, 2, 1.0, "z_loss", None),
    (20, 12, (6, 5, 7), 3, 1, 1, None, None, False),
    # sums of several blocks of tokens, without a capacity
    (70, 12, (6, 5), 3, 1, 2, None, "aux_loss", True),
    # more than the kernels take at once
    (9, 12, (6, 5, 7, 4), 3, 2, 2, None, "switch", True),
]


def problem(case: tuple) -> tuple[Tensor, list[Member], RouterOptions]:
    """An input, members with biases, and options."""
    tokens, d_in, widths, experts, rank, top_k, capacity, loss_type, maturity = case
    generator = torch.Generator().manual_seed(tokens + experts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    members = [
        Member(
            normal(width, d_in),
            normal(width) if number else None,
            normal(experts * rank, d_in),
            normal(width, experts * rank),
            normal(experts, d_in),
            None if maturity is None else torch.tensor([maturity or number > 0] * experts),
        )
        for number, width in enumerate(widths)
    ]
    options = RouterOptions(experts, top_k, 2.0, 1.7, capacity, loss_type)
    return normal(tokens, d_in), members, options


def training_errors(case: tuple) -> list[float]:
    """Relative errors of outputs, statistics and all gradients; one member's output is not used."""
    x, members, options = problem(case)
    mask = torch.arange(len(x)) % 5 != 3
    pull = torch.linspace(-1, 1, options.num_experts)
    pairs = []
    gradients = []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.detach().to(dtype).clone().requires_grad_()]
        loss = torch.zeros((), dtype=dtype)
        taken = []
        for member in members:
            own = [t.detach().to(dtype).clone().requires_grad_() for t in member[2:5]]
            bias = None if member.bias is None else member.bias.to(dtype)
            taken.append(Member(member.base_weight.to(dtype), bias, *own, member.mature))
            inputs += own
        if dtype == torch.float32:
            results = routed_linears(
                inputs[0], taken, options=options, token_mask=mask, backend="triton"
            )
            outputs = [result.output for result in results]
            width = 0 if results[0].statistics is None else (len(results[0].statistics) - 2) // 3
            sums = [
                None
                if r.statistics is None
                else (r.statistics[: options.num_experts], r.statistics[3 * width])
                for r in results
            ]
        else:
            told = [
                routed_linear_reference(
                    inputs[0], *member[:5], options=options, token_mask=mask, mature=member.mature
                )
                for member in taken
            ]
            outputs = [output for output, _ in told]
            sums = [
                None
                if options.loss_type is None
                else (s["mean_probs"], s["mean_squared_logsumexp"])
                for _, s in told
            ]
        for number, (output, statistics) in enumerate(zip(outputs, sums, strict=True)):
            if number != 1:
                loss = loss + (output * torch.arange(output.numel()).sin().view_as(output)).sum()
            if statistics is not None:
                mean, square = statistics
                loss = loss + (square if options.loss_type == "z_loss" else (mean * pull).sum())
        loss.backward()
        gradients.append([tensor.grad for tensor in inputs])
        pairs.append([*outputs, loss])
    found = [*zip(*pairs, strict=True), *zip(*gradients, strict=True)]
    return [error(a, b) for a, b in found]


def error(a: Tensor | None, b: Tensor | None) -> float:
    """Relative; a missing gradient is zero."""
    if b is None or a is None:
        return 0.0 if a is None and b is None else float((b if a is None else a).norm())
    return float((a.double() - b).norm() / (b.norm() + 1e-9))


def inference_errors(case: tuple, tokens: int) -> list[float]:
    """The same without gradients; few tokens take kernels of their own."""
    x, members, options = problem(case)
    x = x[:tokens]
    options = RouterOptions(options.num_experts, options.top_k, 2.0, 1.7)
    results = routed_linears_inference(
        x.unsqueeze(0), members, options=options, record=True, backend="triton", all_mature=True
    )
    errors = []
    for result, member in zip(results, members, strict=True):
        double = [None if t is None else t.double() for t in member[:5]]
        output, _ = routed_linear_reference(
            x.double(), *double, options=options, mature=member.mature
        )
        assert result.router_logits is not None
        errors.append(error(result.output[0], output))
        errors.append(error(result.router_logits, x.double() @ double[4].t() / 2))
    return errors


def packed_otherwise(x_dtype: torch.dtype, dtype: torch.dtype, b_dtype: torch.dtype) -> list[str]:
    """What packing all layers at once writes otherwise than packing each alone, to the bit."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 3).to(dtype)

    found, together = [], RowsTogether()
    x = normal(2, 70, dtype=x_dtype)
    groups = []
    # one whose ranks and experts are whole blocks, one whose are not; one larger than a program's
    for ranks, experts, widths in ((15, 5, (6, 9, 130)), (16, 8, (7,)), (96, 3, (80, 4))):
        members = [
            Member(
                x,
                None,
                normal(ranks, 70, dtype=dtype),
                normal(width, ranks, dtype=b_dtype),
                normal(experts, 70, dtype=dtype),
            )
            for width in widths
        ]
        groups.append((members, sizes_of(ranks, experts, 70, x_dtype, len(members))))
    for turn in range(2):
        rows = together.begin()
        for members, sizes in groups:
            expected, given = pack(x, members, sizes), rows.get(x, members, sizes)
            pairs = zip([expected[0], *expected[1]], [given[0], *given[1]], strict=True)
            found += [
                f"{x_dtype} {dtype} {b_dtype} {turn} {sizes.key} {number}"
                for number, (a, b) in enumerate(pairs)
                if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b)
            ]
        rows.end()
    if rows._used != set(together._wanted) or len(rows._used) != len(groups):
        found.append("they were not packed at once")
    return found


def main() -> int:
    """Run all cases; say which are wrong."""
    wrong: list[Any] = []
    half, single = torch.bfloat16, torch.float32
    for dtypes in ((half, single, single), (half, half, half), (single,) * 3, (half, single, half)):
        wrong += packed_otherwise(*dtypes)
    for number, case in enumerate(CASES):
        found = training_errors(case)
        found += inference_errors(case, 20) + inference_errors(case, 3)
        if case[-1] is not False:
            backend.SPARSE_FROM = 0
            backend.explain.cache_clear()
            found += inference_errors(case, 3) + (training_errors(case) if number == 0 else [])
            backend.SPARSE_FROM = 300
            backend.explain.cache_clear()
        # not max(): it overlooks NaN
        if not all(error < 2e-5 for error in found):
            wrong.append((case, found))
    x, members, options = problem(CASES[0])
    unlike = members[1]._replace(router=members[1].router.double())
    try:
        routed_linears(x, [members[0], unlike], options=options, backend="triton")
        wrong.append(("layers that are not alike", []))
    except ValueError as error:
        if "must have the same experts, ranks and dtypes" not in str(error):
            wrong.append((str(error), []))
    for line in wrong:
        sys.stderr.write(f"{line}\n")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
