"""Cases of the routed op against its reference; run as a script, in Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.ops.routed_cases
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from moelora.ops import (
    Member,
    RouterOptions,
    backend,
    routed_linear,
    routed_linear_reference,
    routed_linears,
    routed_linears_inference,
)

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


def of_layout(layout: str, *, tokens: int, trains: bool) -> list[float]:
    """The same for inputs, masks and gradients that are not contiguous, and for no tokens.

    Nothing but the output is asked for: neither capacity nor statistics.
    """
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = {
        "plain": lambda: normal(tokens, 12),
        "turned": lambda: normal(12, tokens).t(),
        "every other": lambda: normal(tokens, 24)[:, ::2],
        "repeated": lambda: normal(1, 12).expand(tokens, 12),
    }[layout]()
    weight, a, b, router = normal(7, 12), normal(8, 12), normal(7, 8), normal(4, 12)
    options = RouterOptions(4, 2, 2.0, 1.7, 1.0 if layout == "every other" else None)
    wide = [tensor.double() for tensor in (x, weight, a, b, router)]
    if not trains:
        options = RouterOptions(4, 2, 2.0, 1.7)
        member = Member(weight, None, a, b, router)
        (result,) = routed_linears_inference(x, [member], options=options, backend="triton")
        expected, _ = routed_linear_reference(*wide[:2], None, *wide[2:], options=options)
        return [relative(result.output, expected)]
    mask = (torch.rand(2 * tokens, generator=generator) > 0.3)[::2]
    told = {"options": options, "token_mask": mask if options.capacity_factor else None}
    ours = [tensor.requires_grad_() for tensor in (x, a, b, router)]
    output = routed_linear(ours[0], weight, None, *ours[1:], **told, backend="triton").output
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    expected, _ = routed_linear_reference(theirs[0], wide[1], None, *theirs[1:], **told)
    direction = normal(7, tokens).t()
    # what was computed may be written to, and an expanded gradient has no strides
    (output.mul_(direction) * torch.ones(()).expand_as(output)).sum().backward()
    if tokens:
        (expected * direction).sum().backward()
    pairs = [(output, expected * direction)]
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None
        pairs.append((one.grad, torch.zeros_like(other) if other.grad is None else other.grad))
    return [relative(one, other) for one, other in pairs]


def beside_bases(name: str, dtype: torch.dtype, *, tokens: int, trains: bool) -> list[float]:
    """The same for two layers whose bases compute themselves: outputs are updates alone."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, widths = normal(2, tokens, 12), (7, 5)
    layers = [(normal(8, 12), normal(width, 8), normal(4, 12)) for width in widths]
    directions = [normal(2, tokens, width) for width in widths]
    options = RouterOptions(4, 2, 2.0, 1.7, 1.0 if trains else None, "switch" if trains else None)
    ours = [tensor.clone().requires_grad_(trains) for tensor in (x, *sum(layers, ()))]
    theirs = [tensor.double().detach().requires_grad_(trains) for tensor in ours]
    members = [Member(None, None, *ours[start : start + 3]) for start in (1, 4)]
    run = routed_linears if trains else routed_linears_inference
    outputs = [each.output for each in run(ours[0], members, options=options, backend=name)]
    expected = [
        routed_linear_reference(
            theirs[0].reshape(-1, 12), theirs[0].new_zeros(width, 12), None,
            *theirs[start : start + 3], options=options,
        )[0].reshape(2, tokens, width)
        for start, width in zip((1, 4), widths, strict=True)
    ]  # fmt: skip
    pairs = list(zip(outputs, expected, strict=True))
    if trains:
        # what was computed may be written to
        torch.autograd.backward([output.mul_(2) for output in outputs], directions)
        torch.autograd.backward([2 * each for each in expected], [d.double() for d in directions])
        pairs += [(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)]
        pairs[:2] = [(output / 2, each) for output, each in pairs[:2]]
    return [relative(one, other) for one, other in pairs]


def with_dropout(
    name: str,
    dtype: torch.dtype,
    *,
    tokens: int,
    widths: tuple[int, ...],
    has_base: bool,
    wanted: tuple[bool, ...],
) -> list[float]:
    """The same for layers whose A read the input after dropout, and the routers before it.

    Args:
        name: the backend.
        dtype: of all tensors.
        tokens: of each of two rows.
        widths: of the layers' outputs. One alone stands beside a layer without dropout.
        has_base: whether the op computes the bases.
        wanted: of input, and each A, B, router and dropped input, which have a gradient.
    """
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = [normal(2, tokens, 12)]
    for width in widths:
        inputs += [normal(8, 12), normal(width, 8), normal(4, 12), normal(2, tokens, 12)]
    wanted = (wanted[0], *wanted[1:] * len(widths))
    weights = [normal(width, 12) for width in widths]
    directions = [normal(2, tokens, width) for width in widths]
    options = RouterOptions(4, 2, 2.0, 1.7, 1.0, "switch")
    ours = [t.clone().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    theirs = [t.double().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    x, *rest = ours
    members = [
        Member(weight if has_base else None, None, *rest[at : at + 3], dropped=rest[at + 3])
        for weight, at in zip(weights, range(0, len(rest), 4), strict=True)
    ]
    beside = [members[0]._replace(dropped=None)] if len(members) == 1 else []
    results = routed_linears(x, [*beside, *members], options=options, backend=name)[len(beside) :]
    pull, pairs = torch.linspace(-1, 1, 4, dtype=torch.float64), []
    total, total_expected = torch.zeros((), dtype=dtype), torch.zeros((), dtype=torch.float64)
    for index, result in enumerate(results):
        lora_a, lora_b, router, dropped = theirs[1 + 4 * index : 5 + 4 * index]
        base = weights[index].double() if has_base else torch.zeros(widths[index], 12).double()
        flat = theirs[0].reshape(-1, 12)
        _, sums = routed_linear_reference(flat, base, None, lora_a, lora_b, router, options=options)
        parts = (dropped.reshape(-1, 12) @ lora_a.t()).unflatten(1, (4, 2))
        mixed = (parts * sums["weights"].unsqueeze(2) * 1.7).flatten(1)
        expected = (flat @ base.t() + mixed @ lora_b.t()).reshape(2, tokens, widths[index])
        assert result.statistics is not None
        extra, extra_expected = result.statistics[:4] @ pull.to(dtype), sums["mean_probs"] @ pull
        pairs += [(result.output, expected), (extra, extra_expected)]
        total = total + (result.output * directions[index]).sum() + extra
        total_expected = total_expected + (expected * directions[index]).sum() + extra_expected
    total.backward()
    total_expected.backward()
    assert [t.grad is not None for t in ours] == list(wanted)
    pairs += [(a.grad, b.grad) for a, b, w in zip(ours, theirs, wanted, strict=True) if w]
    return [relative(one, other) for one, other in pairs]


#: Tokens of each of two rows, widths of the layers, whether the op computes the bases, and which
#: gradients are wanted.
DROPPED = [
    (3, (7,), True, (True, True, True, True, True)),
    (20, (7, 5, 6), True, (True, True, True, True, True)),
    (20, (7, 5), False, (True, True, True, True, True)),
    (3, (7, 5), True, (False, True, True, True, False)),
    (3, (7, 5), False, (False, False, False, True, True)),
    (3, (7,), True, (True, False, True, False, False)),
]

#: Tokens of each of two rows, whether with gradients.
BESIDE = [(2, False), (12, False), (3, True), (20, True)]


def relative(actual: Tensor, expected: Tensor) -> float:
    """The error relative to the norm."""
    return float((actual.double() - expected).norm() / (expected.norm() + 1e-12))


#: Layout, tokens, whether with gradients. Up to 16 tokens take other kernels without.
LAYOUTS = [
    ("turned", 5, False),
    ("every other", 5, False),
    ("repeated", 5, False),
    ("turned", 20, False),
    ("every other", 20, True),
    ("turned", 33, True),
    ("repeated", 3, True),
    ("plain", 0, True),
]


def on_the_kernels() -> Iterator[tuple[object, list[float]]]:
    """Every case with its errors."""
    kernels: tuple[str, torch.dtype] = ("triton", torch.float32)
    for number, case in enumerate(CASES):
        yield case, errors(case, LOSSES[number % 3], *kernels)
    for layout, tokens, trains in LAYOUTS:
        yield (layout, tokens, trains), of_layout(layout, tokens=tokens, trains=trains)
    for tokens, trains in BESIDE:
        yield ("beside", tokens, trains), beside_bases(*kernels, tokens=tokens, trains=trains)
    for tokens, widths, has_base, wanted in DROPPED:
        found = with_dropout(
            *kernels, tokens=tokens, widths=widths, has_base=has_base, wanted=wanted
        )
        yield ("dropped", tokens, widths, has_base, wanted), found


def main() -> int:
    """Run all cases on the kernels, dense and sparse; say which are wrong."""
    wrong = []
    for sparse_from in (backend.SPARSE_FROM, 0):
        backend.SPARSE_FROM = sparse_from
        backend.explain.cache_clear()
        for case, found in on_the_kernels():
            if not all(error < 2e-5 for error in found):
                wrong.append((sparse_from, case, found))
    for line in wrong:
        sys.stderr.write(f"{line}\n")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
