"""Triton kernels that touch only the experts a token chose.

A slot is one (token, expert) pair. Each expert's slots follow one another, beginning at a whole
block, so that every block of slots is one small product; ``slots`` is laid out as
``triton_kernels._store_slots`` says. No token is copied: rows are gathered where they are read.
"""

# N803: a kernel's constants are capitals.
# ruff: noqa: N803

import triton
import triton.language as tl


@triton.jit
def _block_of_slots(slots_ptr, E2: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert, slots, their tokens and which of them exist, of this program's block of slots."""
    first = tl.program_id(0) * BLOCK_M
    cols = tl.arange(0, E2)
    starts = tl.load(slots_ptr + cols)
    counts = tl.load(slots_ptr + E2 + cols)
    ends = starts + (counts + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    # segments follow one another: the experts that end before this block come before its own
    expert = tl.sum(tl.where(ends <= first, 1, 0), axis=0)
    own = cols == expert
    end = tl.sum(tl.where(own, starts + counts, 0), axis=0)
    slots = first + tl.arange(0, BLOCK_M)
    there = slots < end
    tokens = tl.load(slots_ptr + 2 * E2 + slots, mask=there, other=0)
    return expert, slots, tokens, there


@triton.jit(do_not_specialize=["T"])
def _down_fwd_kernel(
    x_ptr,
    a_ptr,
    slots_ptr,
    decision_ptr,
    compact_ptr,
    wide_ptr,
    T,
    d_in,
    experts,
    rank,
    ranks,
    x_stride,
    scaling,
    E2: tl.constexpr,
    R2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``w * scaling * A_e x`` of every slot: one row per slot, and in its place in all ranks."""
    expert, slots, tokens, there = _block_of_slots(slots_ptr, E2, BLOCK_M)
    if expert >= experts:
        return
    within = tl.arange(0, R2)
    x_rows = x_ptr + tokens.to(tl.int64)[:, None] * x_stride
    a_rows = a_ptr + (expert * rank + within).to(tl.int64)[None, :] * d_in
    total = tl.zeros([BLOCK_M, R2], dtype=tl.float32)
    for start in range(0, d_in, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        inside = cols < d_in
        x = tl.load(x_rows + cols[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        a = tl.load(
            a_rows + cols[:, None], mask=inside[:, None] & (within < rank)[None, :], other=0.0
        )
        total = tl.dot(x, a.to(x.dtype), total, input_precision="ieee")
    weight = tl.load(
        decision_ptr + (T.to(tl.int64) + tokens) * experts + expert, mask=there, other=0.0
    )
    mixed = (total * (weight * scaling)[:, None]).to(compact_ptr.dtype.element_ty)
    here = there[:, None] & (within < rank)[None, :]
    tl.store(compact_ptr + slots.to(tl.int64)[:, None] * rank + within[None, :], mixed, mask=here)
    place = tokens.to(tl.int64)[:, None] * ranks + expert * rank + within[None, :]
    tl.store(wide_ptr + place, mixed, mask=here)


@triton.jit(do_not_specialize=["T"])
def _down_bwd_kernel(
    grad_ptr,
    b_ptr,
    slots_ptr,
    decision_ptr,
    compact_ptr,
    grad_compact_ptr,
    grad_z_ptr,
    shares_ptr,
    T,
    d_out,
    experts,
    rank,
    ranks,
    grad_stride,
    grad_z_stride,
    scaling,
    E2: tl.constexpr,
    R2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of ``A_e x`` of every slot, and ``q``: gradient times scaled rank, summed."""
    expert, slots, tokens, there = _block_of_slots(slots_ptr, E2, BLOCK_M)
    if expert >= experts:
        return
    within = tl.arange(0, R2)
    rows = grad_ptr + tokens.to(tl.int64)[:, None] * grad_stride
    b_cols = b_ptr + expert * rank + within[None, :]
    total = tl.zeros([BLOCK_M, R2], dtype=tl.float32)
    for start in range(0, d_out, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        inside = cols < d_out
        grad = tl.load(rows + cols[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        b = tl.load(
            b_cols + cols.to(tl.int64)[:, None] * ranks,
            mask=inside[:, None] & (within < rank)[None, :],
            other=0.0,
        )
        total = tl.dot(grad, b.to(grad.dtype), total, input_precision="ieee")
    here = there[:, None] & (within < rank)[None, :]
    row = slots.to(tl.int64)[:, None] * rank + within[None, :]
    mixed = tl.load(compact_ptr + row, mask=here, other=0.0).to(tl.float32)
    share = tl.sum(total * mixed, axis=1)
    tl.store(shares_ptr + tokens.to(tl.int64) * experts + expert, share, mask=there)
    weight = tl.load(
        decision_ptr + (T.to(tl.int64) + tokens) * experts + expert, mask=there, other=0.0
    )
    grad_z = (total * (weight * scaling)[:, None]).to(grad_compact_ptr.dtype.element_ty)
    tl.store(grad_compact_ptr + row, grad_z, mask=here)
    place = tokens.to(tl.int64)[:, None] * grad_z_stride + expert * rank + within[None, :]
    tl.store(grad_z_ptr + place, grad_z, mask=here)


@triton.jit
def _outer_bwd_kernel(
    rows_ptr,
    compact_ptr,
    slots_ptr,
    output_ptr,
    width,
    rank,
    rows_stride,
    slot_stride,
    column_stride,
    E2: tl.constexpr,
    R2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``sum over an expert's slots of rows[token, column] * compact[slot, rank]``: dA or dB."""
    expert = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < width
    within = tl.arange(0, R2)
    start = tl.load(slots_ptr + expert)
    number = tl.load(slots_ptr + E2 + expert)
    total = tl.zeros([BLOCK_N, R2], dtype=tl.float32)
    for first in range(0, number, BLOCK_M):
        offset = first + tl.arange(0, BLOCK_M)
        there = offset < number
        slots = start + offset
        tokens = tl.load(slots_ptr + 2 * E2 + slots, mask=there, other=0)
        rows = tl.load(
            rows_ptr + tokens.to(tl.int64)[None, :] * rows_stride + cols[:, None],
            mask=there[None, :] & inside[:, None],
            other=0.0,
        )
        compact = tl.load(
            compact_ptr + slots.to(tl.int64)[:, None] * rank + within[None, :],
            mask=there[:, None] & (within < rank)[None, :],
            other=0.0,
        )
        total = tl.dot(rows, compact, total, input_precision="ieee")
    place = (expert * rank + within).to(tl.int64)[None, :] * slot_stride
    tl.store(
        output_ptr + place + cols.to(tl.int64)[:, None] * column_stride,
        total.to(output_ptr.dtype.element_ty),
        mask=inside[:, None] & (within < rank)[None, :],
    )
