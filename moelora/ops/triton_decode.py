"""Triton kernels of a routed mixture for few tokens: they read the parameters as they are.

Names and members as in ``triton_kernels.py``. ``z`` holds ``A x`` and the scores of one member
after the other.
"""

# N803: a kernel's constants are capitals. SIM102: a constant and a value are no one condition to
# Triton's compiler.
# ruff: noqa: N803, SIM102

import triton
import triton.language as tl

from moelora.ops.triton_kernels import _all_mature, _of


@triton.jit(do_not_specialize=["T"])
def _scores_fwd_kernel(
    x_ptr,
    a0_ptr,
    a1_ptr,
    a2_ptr,
    router0_ptr,
    router1_ptr,
    router2_ptr,
    z_ptr,
    T,
    d_in,
    experts,
    ranks,
    first_row,
    x_stride,
    z_stride,
    T2: tl.constexpr,
    BLOCK: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """``A x`` and the router's scores of few tokens, one row of A or of the router per program.

    Rows are counted from ``first_row`` on; those of the router follow those of A.
    """
    row = tl.program_id(0) + first_row
    member = tl.program_id(1)
    z_ptr += member * (ranks + experts)
    tokens = tl.arange(0, T2)
    total = tl.zeros([T2, BLOCK], dtype=tl.float32)
    if row < ranks:
        row_ptr = _of(member, a0_ptr, a1_ptr, a2_ptr, MEMBERS) + row.to(tl.int64) * d_in
    else:
        router_ptr = _of(member, router0_ptr, router1_ptr, router2_ptr, MEMBERS)
        row_ptr = router_ptr + (row - ranks).to(tl.int64) * d_in
    for start in range(0, d_in, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < d_in
        w = tl.load(row_ptr + cols, mask=inside, other=0.0)
        x = tl.load(
            x_ptr + tokens[:, None] * x_stride + cols[None, :],
            mask=(tokens < T)[:, None] & inside[None, :],
            other=0.0,
        )
        total += x.to(tl.float32) * w.to(tl.float32)[None, :]
    tl.store(z_ptr + tokens * z_stride + row, tl.sum(total, axis=1), mask=tokens < T)


@triton.jit
def _chosen_fwd_kernel(
    x_ptr,
    a0_ptr,
    a1_ptr,
    a2_ptr,
    z_ptr,
    d_in,
    experts,
    rank,
    ranks,
    x_stride,
    z_stride,
    K: tl.constexpr,
    E2: tl.constexpr,
    BLOCK: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """``A x`` for the experts that a token's scores choose, one row of A per program."""
    token = tl.program_id(0)
    member = tl.program_id(2)
    a_ptr = _of(member, a0_ptr, a1_ptr, a2_ptr, MEMBERS)
    z_ptr += member * (ranks + experts)
    choice = tl.program_id(1) // rank
    row = tl.program_id(1) % rank
    cols = tl.arange(0, E2)
    z_row = z_ptr + token * z_stride
    rest = tl.load(z_row + ranks + cols, mask=cols < experts, other=float("-inf"))
    expert = tl.argmax(rest, axis=0)
    for number in tl.static_range(1, K):
        rest = tl.where(cols == expert, float("-inf"), rest)
        expert = tl.where(number <= choice, tl.argmax(rest, axis=0), expert)
    # NaN scores may name a padded expert
    expert = tl.minimum(expert, experts - 1)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, d_in, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        inside = offset < d_in
        a_row = a_ptr + (expert * rank + row).to(tl.int64) * d_in
        a = tl.load(a_row + offset, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + token * x_stride + offset, mask=inside, other=0.0).to(tl.float32)
        total += a * x
    tl.store(z_row + expert * rank + row, tl.sum(total, axis=0))


@triton.jit(
    do_not_specialize=["T", "d_out0", "d_out1", "d_out2"],
    do_not_specialize_on_alignment=["mature0_ptr", "mature1_ptr", "mature2_ptr"],
)
def _decode_fwd_kernel(
    z_ptr,
    mature0_ptr,
    mature1_ptr,
    mature2_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    output0_ptr,
    output1_ptr,
    output2_ptr,
    decision_ptr,
    T,
    d_out0,
    d_out1,
    d_out2,
    experts,
    rank,
    ranks,
    z_stride,
    inverse_temperature,
    scaling,
    K: tl.constexpr,
    E2: tl.constexpr,
    R2: tl.constexpr,
    HAS_MATURE: tl.constexpr,
    RECORD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Route one token and add its experts' update to one block of outputs; reads only their B."""
    token = tl.program_id(0)
    member = tl.program_id(2)
    d_out = _of(member, d_out0, d_out1, d_out2, MEMBERS)
    b_ptr = _of(member, b0_ptr, b1_ptr, b2_ptr, MEMBERS)
    output_ptr = _of(member, output0_ptr, output1_ptr, output2_ptr, MEMBERS)
    mature_ptr = _of(member, mature0_ptr, mature1_ptr, mature2_ptr, MEMBERS)
    z_ptr += member * (ranks + experts)
    decision_ptr += member * 2 * T * experts
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = outputs < d_out
    cols = tl.arange(0, E2)
    within = tl.arange(0, R2)
    real = cols < experts
    z_row = z_ptr + token * z_stride
    logits = tl.load(z_row + ranks + cols, mask=real, other=0.0) * inverse_temperature
    logits = tl.where(real, logits, float("-inf"))
    highest = tl.max(logits, axis=0)
    everything = tl.sum(tl.exp(logits - highest), axis=0)
    mature = _all_mature(mature_ptr, experts, E2, HAS_MATURE)
    where = output_ptr + token.to(tl.int64) * d_out + outputs
    base = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    b_rows = b_ptr + outputs.to(tl.int64)[:, None] * ranks
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    kept = 0.0
    rest = logits
    for _ in tl.static_range(K):
        expert = tl.argmax(rest, axis=0)
        share = tl.exp(tl.max(rest, axis=0) - highest)
        kept += share
        rest = tl.where(cols == expert, float("-inf"), rest)
        # NaN scores may name a padded expert
        mine = (within < rank) & (expert < experts)
        columns = expert * rank + within
        z = tl.load(z_row + columns, mask=mine, other=0.0) * share
        b = tl.load(b_rows + columns[None, :], mask=inside[:, None] & mine[None, :], other=0.0)
        total += tl.sum(b.to(tl.float32) * z[None, :], axis=1)
    if HAS_MATURE:
        # the young share with all others
        for _ in range(tl.where(mature > 0, 0, experts - K)):
            expert = tl.argmax(rest, axis=0)
            share = tl.exp(tl.max(rest, axis=0) - highest)
            rest = tl.where(cols == expert, float("-inf"), rest)
            mine = (within < rank) & (expert < experts)
            columns = expert * rank + within
            z = tl.load(z_row + columns, mask=mine, other=0.0) * share
            b = tl.load(b_rows + columns[None, :], mask=inside[:, None] & mine[None, :], other=0.0)
            total += tl.sum(b.to(tl.float32) * z[None, :], axis=1)
    divisor = everything
    if K > 1:
        divisor = tl.where(mature > 0, kept, everything)
    tl.store(
        where,
        (base + total * (scaling / divisor)).to(output_ptr.dtype.element_ty),
        mask=inside,
    )
    if RECORD:
        if tl.program_id(1) == 0:
            chosen = (rest == float("-inf")) | (mature == 0)
            weights = tl.where(chosen, tl.exp(logits - highest) / divisor, 0.0)
            row = decision_ptr + token * experts + cols
            tl.store(row, logits, mask=real)
            tl.store(row + T * experts, weights, mask=real)
