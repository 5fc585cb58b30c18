"""Triton kernels of a routed mixture. Their meaning is defined by ``ops/reference.py``.

``z`` is what one product of the input gives: ``[tokens, ranks + splits * padded experts]``, in
float32; first ``A x``, then the router's scores. A float32 router row meets a bfloat16 input as the
sum of three bfloat16 rows (its leading, middle and trailing bits), so the scores keep float32
accuracy on the matrix units.

Up to three layers that read the same input (its members) share each launch; the last axis of the
grid says whose program it is. ``z`` then holds ``A x`` of one after the other, then their scores,
part by part.

Shapes: ``T`` tokens, ``E`` experts, ``K`` experts per token, ``R`` rank of one expert.
"""

# N803: a kernel's constants are capitals. SIM102: a constant and a value are no one condition to
# Triton's compiler. C901: a kernel's constants choose between forms of one computation.
# ruff: noqa: N803, SIM102, C901

import triton
import triton.language as tl


@triton.jit
def _of(member, first, second, third, MEMBERS: tl.constexpr):
    """What belongs to one member."""
    mine = first
    if MEMBERS > 1:
        if member == 1:
            mine = second
    if MEMBERS > 2:
        if member == 2:
            mine = third
    return mine


@triton.jit(do_not_specialize=["b0_numel", "b1_numel", "b2_numel", "b_programs"])
def _pack_fwd_kernel(
    a0_ptr,
    a1_ptr,
    a2_ptr,
    router0_ptr,
    router1_ptr,
    router2_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    rows_ptr,
    b0_out_ptr,
    b1_out_ptr,
    b2_out_ptr,
    d_in,
    ranks,
    padded_ranks,
    experts,
    padded_experts,
    row_programs,
    b_programs,
    b0_numel,
    b1_numel,
    b2_numel,
    MEMBERS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A and the router's rows of all members become one matrix; each B is cast to its dtype."""
    pid = tl.program_id(0)
    if pid < row_programs:
        blocks = tl.cdiv(d_in, BLOCK)
        row = pid // blocks
        cols = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = cols < d_in
        score = row - MEMBERS * padded_ranks
        # there may be no ranks at all
        own = row % tl.maximum(padded_ranks, 1)
        member = tl.where(
            score < 0, row // tl.maximum(padded_ranks, 1), score // padded_experts % MEMBERS
        )
        is_a = (own < ranks) & (score < 0)
        part = score // (MEMBERS * padded_experts)
        expert = score % padded_experts
        a_ptr = _of(member, a0_ptr, a1_ptr, a2_ptr, MEMBERS)
        a = tl.load(a_ptr + own * d_in + cols, mask=inside & is_a, other=0.0).to(tl.float32)
        is_router = (score >= 0) & (expert < experts)
        router_ptr = _of(member, router0_ptr, router1_ptr, router2_ptr, MEMBERS)
        offset = expert * d_in + cols
        w = tl.load(router_ptr + offset, mask=inside & is_router, other=0.0).to(tl.float32)
        if SPLIT:
            dtype = rows_ptr.dtype.element_ty
            leading = w.to(dtype).to(tl.float32)
            middle = (w - leading).to(dtype).to(tl.float32)
            w = tl.where(part == 0, leading, tl.where(part == 1, middle, w - leading - middle))
        tl.store(
            rows_ptr + row.to(tl.int64) * d_in + cols,
            tl.where(is_a, a, w).to(rows_ptr.dtype.element_ty),
            mask=inside,
        )
    else:
        member = (pid - row_programs) // b_programs
        block = (pid - row_programs) % b_programs
        element = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = element < _of(member, b0_numel, b1_numel, b2_numel, MEMBERS)
        b = tl.load(_of(member, b0_ptr, b1_ptr, b2_ptr, MEMBERS) + element, mask=inside, other=0.0)
        b_out_ptr = _of(member, b0_out_ptr, b1_out_ptr, b2_out_ptr, MEMBERS)
        tl.store(b_out_ptr + element, b.to(b_out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pack_all_fwd_kernel(tasks_ptr, task_of_ptr, like_ptr, out_ptr, BLOCK: tl.constexpr):
    """The same for all layers of a model, from a table of what lies where.

    A task is five numbers: the address it reads (of the dtype of ``like_ptr``), the element it
    writes first, how many, which part of each (-1: zeros), and its first program.
    """
    pid = tl.program_id(0)
    task_ptr = tasks_ptr + tl.load(task_of_ptr + pid).to(tl.int64) * 5
    source_ptr = tl.load(task_ptr).to(tl.pointer_type(like_ptr.dtype.element_ty))
    target_ptr = out_ptr + tl.load(task_ptr + 1)
    part = tl.load(task_ptr + 3)
    element = (pid - tl.load(task_ptr + 4)) * BLOCK + tl.arange(0, BLOCK)
    inside = element < tl.load(task_ptr + 2)
    value = tl.load(source_ptr + element, mask=inside & (part >= 0), other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    leading = value.to(dtype).to(tl.float32)
    middle = (value - leading).to(dtype).to(tl.float32)
    value = tl.where(part == 1, middle, tl.where(part == 2, value - leading - middle, value))
    tl.store(target_ptr + element, value.to(dtype), mask=inside)


@triton.jit
def _load_logits(
    z_ptr, tokens, inside, z_stride, member, padded_ranks, experts, padded_experts,
    inverse_temperature, E2: tl.constexpr, SPLITS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """``(block, E2)`` router logits of some tokens; -inf past the last expert."""
    cols = tl.arange(0, E2)
    real = cols < experts
    there = inside[:, None] & real[None, :]
    base = z_ptr + tokens.to(tl.int64)[:, None] * z_stride + MEMBERS * padded_ranks + cols[None, :]
    logits = tl.zeros([tokens.shape[0], E2], dtype=tl.float32)
    for part in tl.static_range(SPLITS):
        # the small parts first would round less; their order changes the last bit only
        place = base + (part * MEMBERS + member) * padded_experts
        logits += tl.load(place, mask=there, other=0.0)
    return tl.where(real[None, :], logits * inverse_temperature, float("-inf"))


@triton.jit
def _choose(logits, K: tl.constexpr, E2: tl.constexpr):
    """``(block, E2)`` 1.0 for each token's K highest logits, the lower index first among equals."""
    cols = tl.arange(0, E2)
    chosen = tl.zeros([logits.shape[0], E2], dtype=tl.float32)
    for _ in tl.static_range(K):
        rest = tl.where(chosen > 0, float("-inf"), logits)
        best = tl.argmax(rest, axis=1)
        chosen = tl.where(cols[None, :] == best[:, None], 1.0, chosen)
    return chosen


@triton.jit
def _softmax(logits, keep):
    """Softmax over the experts in ``keep``; zeros for a token that keeps none."""
    kept = tl.where(keep, logits, float("-inf"))
    highest = tl.max(kept, axis=1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    exponentials = tl.exp(kept - highest[:, None])
    total = tl.sum(exponentials, axis=1)
    return exponentials / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _all_mature(mature_ptr, experts, E2: tl.constexpr, HAS_MATURE: tl.constexpr):
    """1 if no expert is young, else 0."""
    result = 1
    if HAS_MATURE:
        cols = tl.arange(0, E2)
        flags = tl.load(mature_ptr + cols, mask=cols < experts, other=1).to(tl.int32)
        result = tl.min(tl.where(flags > 0, 1, 0), axis=0)
    return result


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["mask_ptr"])
def _count_fwd_kernel(
    z_ptr,
    mask_ptr,
    partial_ptr,
    T,
    experts,
    z_stride,
    padded_ranks,
    padded_experts,
    inverse_temperature,
    K: tl.constexpr,
    E2: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """A block's sums: slots, first choices, probabilities, logsumexp squared, tokens."""
    pid = tl.program_id(0)
    member = tl.program_id(1)
    tokens = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    logits = _load_logits(
        z_ptr, tokens, inside, z_stride, member, padded_ranks, experts, padded_experts,
        inverse_temperature, E2, SPLITS, MEMBERS,
    )  # fmt: skip
    valid = inside
    if HAS_MASK:
        valid = inside & (tl.load(mask_ptr + tokens, mask=inside, other=0) != 0)
    counts = tl.where(valid, 1.0, 0.0)
    cols = tl.arange(0, E2)
    chosen = _choose(logits, K, E2)
    first = _choose(logits, 1, E2)
    real = (cols < experts)[None, :] & inside[:, None]
    probs = _softmax(logits, real)
    highest = tl.max(logits, axis=1)
    lse = tl.log(tl.sum(tl.exp(logits - highest[:, None]), axis=1)) + highest
    row = partial_ptr + (member * tl.num_programs(0) + pid) * (3 * E2 + 2)
    tl.store(row + cols, tl.sum(chosen * counts[:, None], axis=0))
    tl.store(row + E2 + cols, tl.sum(first * counts[:, None], axis=0))
    tl.store(row + 2 * E2 + cols, tl.sum(probs * counts[:, None], axis=0))
    tl.store(row + 3 * E2, tl.sum(lse * lse * counts, axis=0))
    tl.store(row + 3 * E2 + 1, tl.sum(counts, axis=0))


@triton.jit
def _store_statistics(
    partial_ptr, statistics_ptr, blocks, divisor, K: tl.constexpr, E2: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The sums over all blocks of :func:`_count_fwd_kernel`, as means over valid tokens."""
    cols = tl.arange(0, E2)
    slots = tl.zeros([E2], dtype=tl.float32)
    firsts = tl.zeros([E2], dtype=tl.float32)
    probs = tl.zeros([E2], dtype=tl.float32)
    squares = 0.0
    for start in range(0, blocks, BLOCK_P):
        others = start + tl.arange(0, BLOCK_P)
        there = others < blocks
        row = partial_ptr + others * (3 * E2 + 2)
        tile = row[:, None] + cols[None, :]
        slots += tl.sum(tl.load(tile, mask=there[:, None], other=0.0), axis=0)
        firsts += tl.sum(tl.load(tile + E2, mask=there[:, None], other=0.0), axis=0)
        probs += tl.sum(tl.load(tile + 2 * E2, mask=there[:, None], other=0.0), axis=0)
        squares += tl.sum(tl.load(row + 3 * E2, mask=there, other=0.0), axis=0)
    tl.store(statistics_ptr + cols, probs / divisor)
    tl.store(statistics_ptr + E2 + cols, slots / (divisor * K))
    tl.store(statistics_ptr + 2 * E2 + cols, firsts / divisor)
    tl.store(statistics_ptr + 3 * E2, squares / divisor)
    tl.store(statistics_ptr + 3 * E2 + 1, divisor)


@triton.jit
def _store_slots(
    slots_ptr, counts, position, keep, tokens, pid, E2: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Enter tokens in their experts' slots; segments of whole blocks, expert after expert.

    ``slots_ptr`` holds each expert's first slot and number of tokens (``E2`` each), then the token
    of every slot.
    """
    cols = tl.arange(0, E2)
    counts = counts.to(tl.int32)
    padded = (counts + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    starts = tl.cumsum(padded, axis=0) - padded
    if pid == 0:
        tl.store(slots_ptr + cols, starts)
        tl.store(slots_ptr + E2 + cols, counts)
    slot = starts[None, :] + position.to(tl.int32)
    value = tokens[:, None] + tl.zeros([1, E2], dtype=tl.int32)
    tl.store(slots_ptr + 2 * E2 + slot, value, mask=keep)


@triton.jit(
    do_not_specialize=["T", "blocks", "slots_size"],
    do_not_specialize_on_alignment=["mask_ptr", "mature0_ptr", "mature1_ptr", "mature2_ptr"],
)
def _route_fwd_kernel(
    z_ptr,
    mask_ptr,
    mature0_ptr,
    mature1_ptr,
    mature2_ptr,
    partial_ptr,
    decision_ptr,
    mixed_ptr,
    statistics_ptr,
    slots_ptr,
    T,
    experts,
    rank,
    ranks,
    z_stride,
    padded_ranks,
    padded_experts,
    slots_size,
    blocks,
    inverse_temperature,
    capacity_share,
    scaling,
    K: tl.constexpr,
    E2: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_MATURE: tl.constexpr,
    HAS_CAPACITY: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DISPATCH: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Softmax, top-k, capacity, renormalisation, and the scaled ranks ``expand(w) * (A x)``.

    With ``DISPATCH`` (tokens in a slot block of an expert, else 0) no rank is scaled; instead each
    token is entered in the slots of its experts, see :func:`_store_slots`.
    """
    pid = tl.program_id(0)
    member = tl.program_id(1)
    partial_ptr += member * blocks * (3 * E2 + 2)
    statistics_ptr += member * (3 * E2 + 2)
    decision_ptr += member * 2 * T.to(tl.int64) * experts
    mixed_ptr += member * T.to(tl.int64) * ranks
    slots_ptr += member * slots_size
    tokens = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    cols = tl.arange(0, E2)
    logits = _load_logits(
        z_ptr, tokens, inside, z_stride, member, padded_ranks, experts, padded_experts,
        inverse_temperature, E2, SPLITS, MEMBERS,
    )  # fmt: skip
    real = (cols < experts)[None, :] & inside[:, None]
    probs = _softmax(logits, real)
    chosen = _choose(logits, K, E2)
    keep = (chosen > 0) & real
    # in parentheses: Triton 3.2 takes two operands at a time
    if (HAS_CAPACITY or HAS_STATISTICS) or DISPATCH > 0:
        number = 0.0
        before = tl.zeros([E2], dtype=tl.float32)
        slots = tl.zeros([E2], dtype=tl.float32)
        for start in range(0, blocks, BLOCK_P):
            others = start + tl.arange(0, BLOCK_P)
            row = partial_ptr + others * (3 * E2 + 2)
            earlier = (others < pid)[:, None]
            tile = row[:, None] + cols[None, :]
            before += tl.sum(tl.load(tile, mask=earlier, other=0.0), axis=0)
            if DISPATCH > 0:
                there = (others < blocks)[:, None]
                slots += tl.sum(
                    tl.load(row[:, None] + cols[None, :], mask=there, other=0.0), axis=0
                )
            number += tl.sum(tl.load(row + 3 * E2 + 1, mask=others < blocks, other=0.0), axis=0)
        if HAS_CAPACITY or DISPATCH > 0:
            if HAS_MASK and HAS_CAPACITY:
                keep = keep & (tl.load(mask_ptr + tokens, mask=inside, other=0) != 0)[:, None]
            slot = tl.where(keep, 1.0, 0.0)
            position = before[None, :] + tl.cumsum(slot, axis=0) - slot
            if HAS_CAPACITY:
                # a product that is a whole number but for rounding is that number
                capacity = tl.ceil(number * capacity_share - 1e-4)
                keep = keep & (position < capacity)
                slots = tl.minimum(slots, capacity)
            if DISPATCH > 0:
                _store_slots(slots_ptr, slots, position, keep, tokens, pid, E2, DISPATCH)
        if HAS_STATISTICS:
            if pid == 0:
                _store_statistics(
                    partial_ptr, statistics_ptr, blocks, tl.maximum(number, 1.0), K, E2, BLOCK_P
                )
    if K == 1:
        weights = tl.where(keep, probs, 0.0)
    else:
        weights = _softmax(logits, keep)
    mature_ptr = _of(member, mature0_ptr, mature1_ptr, mature2_ptr, MEMBERS)
    weights = tl.where(_all_mature(mature_ptr, experts, E2, HAS_MATURE) > 0, weights, probs)
    weights_ptr = decision_ptr + T.to(tl.int64) * experts
    offsets = tokens.to(tl.int64)[:, None] * experts + cols[None, :]
    tl.store(decision_ptr + offsets, logits, mask=real)
    tl.store(weights_ptr + offsets, weights, mask=real)
    if DISPATCH > 0:
        return
    # the weights just written are read back by rank; the barrier makes them seen
    tl.debug_barrier()
    z_ptr += member * padded_ranks
    for start in range(0, padded_ranks, BLOCK_R):
        rank_cols = start + tl.arange(0, BLOCK_R)
        there = inside[:, None] & (rank_cols < ranks)[None, :]
        z = tl.load(
            z_ptr + tokens.to(tl.int64)[:, None] * z_stride + rank_cols[None, :],
            mask=there,
            other=0.0,
        )
        expert = rank_cols // rank
        weight = tl.load(
            weights_ptr + tokens.to(tl.int64)[:, None] * experts + expert[None, :],
            mask=there,
            other=0.0,
        )
        tl.store(
            mixed_ptr + tokens.to(tl.int64)[:, None] * ranks + rank_cols[None, :],
            (z * weight * scaling).to(mixed_ptr.dtype.element_ty),
            mask=there,
        )


@triton.jit(
    do_not_specialize=["T"],
    do_not_specialize_on_alignment=[
        "mask_ptr",
        "statistics_ptr",
        "grad_statistics0_ptr",
        "grad_statistics1_ptr",
        "grad_statistics2_ptr",
    ],
)
def _route_bwd_kernel(
    grad_mixed0_ptr,
    grad_mixed1_ptr,
    grad_mixed2_ptr,
    mixed_ptr,
    decision_ptr,
    mask_ptr,
    statistics_ptr,
    grad_statistics0_ptr,
    grad_statistics1_ptr,
    grad_statistics2_ptr,
    grad_z_ptr,
    T,
    experts,
    rank,
    ranks,
    padded_ranks,
    padded_experts,
    grad_stride,
    inverse_temperature,
    scaling,
    K: tl.constexpr,
    E2: tl.constexpr,
    R2: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_SHARES: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """From the gradient of the scaled ranks to those of ``A x`` and of the router's scores.

    With ``q[e]`` the sum of gradient times scaled rank, the logits' gradient is ``q - w sum(q)``
    (``p`` instead of ``w`` for K = 1): no division by a weight, and none is needed at weight 0.
    With ``HAS_SHARES`` the first pointers hold ``q`` itself, and only the scores are left to do.
    """
    member = tl.program_id(1)
    grad_mixed_ptr = _of(member, grad_mixed0_ptr, grad_mixed1_ptr, grad_mixed2_ptr, MEMBERS)
    mixed_ptr += member * T.to(tl.int64) * ranks
    decision_ptr += member * 2 * T.to(tl.int64) * experts
    statistics_ptr += member * (3 * E2 + 2)
    grad_statistics_ptr = _of(
        member, grad_statistics0_ptr, grad_statistics1_ptr, grad_statistics2_ptr, MEMBERS
    )
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    cols = tl.arange(0, E2)
    within = tl.arange(0, R2)
    real = (cols < experts)[None, :] & inside[:, None]
    wide = tokens.to(tl.int64)
    per_expert = wide[:, None] * experts + cols[None, :]
    logits = tl.load(decision_ptr + per_expert, mask=real, other=float("-inf"))
    weights_ptr = decision_ptr + T.to(tl.int64) * experts
    weights = tl.load(weights_ptr + per_expert, mask=real, other=0.0)
    out_dtype = grad_z_ptr.dtype.element_ty
    row = grad_z_ptr + wide * grad_stride + member * padded_ranks
    if HAS_SHARES:
        q = tl.load(grad_mixed_ptr + per_expert, mask=real, other=0.0)
    else:
        rank_cols = cols[:, None] * rank + within[None, :]
        here = real[:, :, None] & (within < rank)[None, None, :]
        offsets = wide[:, None, None] * ranks + rank_cols[None, :, :]
        grad_mixed = tl.load(grad_mixed_ptr + offsets, mask=here, other=0.0).to(tl.float32)
        mixed = tl.load(mixed_ptr + offsets, mask=here, other=0.0).to(tl.float32)
        tl.store(
            row[:, None, None] + rank_cols[None, :, :],
            (grad_mixed * weights[:, :, None] * scaling).to(out_dtype),
            mask=here,
        )
        pad = ranks + tl.arange(0, 8)
        tl.store(
            row[:, None] + pad[None, :],
            tl.zeros([BLOCK_T, 8], dtype=tl.float32).to(out_dtype),
            mask=inside[:, None] & (pad < padded_ranks)[None, :],
        )
        q = tl.sum(grad_mixed * mixed, axis=2)
    probs = _softmax(logits, real)
    share = weights
    if K == 1:
        share = probs
    grad_logits = q - share * tl.sum(q, axis=1)[:, None]
    if HAS_STATISTICS:
        valid = tl.where(inside, 1.0, 0.0)
        if HAS_MASK:
            valid = tl.where(tl.load(mask_ptr + tokens, mask=inside, other=0) != 0, valid, 0.0)
        valid = valid / tl.load(statistics_ptr + 3 * E2 + 1)
        grad_probs = tl.load(grad_statistics_ptr + cols, mask=cols < experts, other=0.0)
        mean = tl.sum(probs * grad_probs[None, :], axis=1)
        grad_logits += probs * (grad_probs[None, :] - mean[:, None]) * valid[:, None]
        highest = tl.max(logits, axis=1)
        highest = tl.where(inside, highest, 0.0)
        lse = tl.log(tl.sum(tl.exp(logits - highest[:, None]), axis=1)) + highest
        grad_square = tl.load(grad_statistics_ptr + 3 * E2)
        grad_logits += probs * (tl.where(inside, lse, 0.0) * valid * 2.0 * grad_square)[:, None]
    grad_logits = tl.where(real, grad_logits * inverse_temperature, 0.0)
    columns = (cols < padded_experts)[None, :] & inside[:, None]
    start = (MEMBERS - member) * padded_ranks + member * padded_experts
    scores = row[:, None] + start + cols[None, :]
    tl.store(scores, grad_logits.to(out_dtype), mask=columns)
