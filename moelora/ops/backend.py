"""Which implementation of the ops runs, and why."""

import functools
import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from moelora.errors import BackendError

logger = logging.getLogger(__name__)

Backend = Literal["auto", "eager", "triton", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)

#: The kernels keep a token's experts, and one token's ranks, in registers.
MAX_EXPERTS = 256
MAX_TOP_K = 16
MAX_RANKS_IN_BLOCK = 16384
#: Ranks of all experts per chosen expert from which on the unchosen ones are left out.
SPARSE_FROM = 300
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """What runs.

    Attributes:
        backend: ``"eager"``, ``"triton"`` or ``"reference"``.
        reason: why, in one sentence.
        is_sparse: whether training and decoding compute with the chosen experts only (Triton).
    """

    backend: str
    reason: str
    is_sparse: bool = False


@functools.cache
def explain(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    num_experts: int,
    top_k: int,
    rank: int,
    backend: str = "auto",
) -> Choice:
    """Say which backend runs a routed layer of these sizes, and why.

    The rule of ``"auto"``: Triton's kernels on a CUDA device with Triton installed, for float32 and
    bfloat16, up to 256 experts, 16 experts per token and 16 384 padded ranks; PyTorch's own
    operations everywhere else. In training and for a few tokens, more than 300 ranks of all experts
    for each expert that a token chooses make it sparse: below that, one product with all experts
    takes less time than looking up the chosen ones.

    Args:
        device: where the layer runs.
        dtype: of the layer's input.
        num_experts: experts of the layer.
        top_k: experts per token.
        rank: of one expert.
        backend: ``"auto"``, or the one that must run.

    Raises:
        BackendError: if ``backend`` is unknown, or cannot run these sizes here.

    Example:
        >>> explain(device="cpu", dtype=torch.float32, num_experts=8, top_k=2, rank=16)
        Choice(backend='eager', reason='Triton needs a CUDA device, this is cpu.', is_sparse=False)
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend must be one of {list(BACKENDS)}, got {backend!r}.")
    if backend in ("eager", "reference"):
        return Choice(backend, f"backend={backend!r} was asked for.")
    on_cuda = torch.device(device).type == "cuda"
    if backend == "auto" and not on_cuda:
        return Choice("eager", f"Triton needs a CUDA device, this is {device}.")
    obstacle = _obstacle(torch.device(device), dtype, num_experts, top_k, rank)
    if obstacle is None:
        ranks = num_experts * rank
        if ranks > SPARSE_FROM * top_k:
            return Choice("triton", f"More than {SPARSE_FROM} ranks per chosen expert.", True)
        return Choice("triton", f"At most {SPARSE_FROM} ranks per chosen expert.")
    if backend == "triton":
        raise BackendError(f"backend='triton' cannot run: {obstacle}")
    logger.info("Using PyTorch's operations instead of Triton's kernels: %s", obstacle)
    return Choice("eager", obstacle)


def _obstacle(
    device: torch.device, dtype: torch.dtype, num_experts: int, top_k: int, rank: int
) -> str | None:
    """What keeps Triton's kernels from running, in one sentence."""
    if device.type != "cuda" and not _interprets():
        return f"Triton needs a CUDA device, this is {device}."
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed."
    if dtype not in _DTYPES:
        return f"The kernels take {' or '.join(map(str, _DTYPES))}, the input is {dtype}."
    if num_experts > MAX_EXPERTS or top_k > MAX_TOP_K:
        return (
            f"The kernels take up to {MAX_EXPERTS} experts and {MAX_TOP_K} per token, got "
            f"{num_experts} and {top_k}."
        )
    padded = _power_of_two(num_experts) * _power_of_two(rank)
    if padded > MAX_RANKS_IN_BLOCK:
        return f"The kernels take up to {MAX_RANKS_IN_BLOCK} padded ranks, got {padded}."
    return None


def _interprets() -> bool:
    """Whether Triton's interpreter stands in for a GPU (tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
