"""The kernels, launched at the price of an ordinary PyTorch operation.

``kernel[grid](...)`` finds out at every call how its arguments specialise it, which takes more time
on the host than the kernels of a small layer take on the GPU. Here the compiled kernel is kept by
the sizes and dtypes it was compiled for, and launched directly.
"""

from typing import Any

import torch
import triton
from packaging.version import Version
from torch import Tensor

from moelora.ops import triton_decode as few
from moelora.ops import triton_kernels as kernels
from moelora.ops import triton_sparse as sparse

# 3.5: the first whose compiled kernels take all arguments in order, constants included
_LAUNCHES_DIRECTLY = Version(triton.__version__) >= Version("3.5")
_ALIGNMENT = 16


class Launcher:
    """A kernel and its compiled forms.

    Args:
        kernel: what ``triton.jit`` made. What may change under one key, other than pointers to
            aligned memory, must be listed in its ``do_not_specialize``.
        num_warps: warps per program.
    """

    def __init__(self, kernel: Any, *, num_warps: int = 4) -> None:
        self.kernel = kernel
        self.num_warps = num_warps
        #: of each compiled form, what a launch needs
        self.compiled: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        key: tuple[Any, ...],
        arguments: tuple[Any, ...],
        *,
        aligned: bool = True,
    ) -> None:
        """Launch the kernel.

        Args:
            grid: programs along each axis.
            key: all that the arguments may differ in besides values: sizes, dtypes, the device.
            arguments: every argument of the kernel in order, constants included; the first is a
                tensor.
            aligned: False if a tensor from outside starts at an odd address.
        """
        device = arguments[0].device
        if device.type == "cuda" and device.index != torch._C._cuda_getDevice():
            # Triton launches on the current device, wherever its arguments are
            with torch.cuda.device(device):
                self(grid, key, arguments, aligned=aligned)
            return
        compiled = self.compiled.get(key) if aligned else None
        if compiled is not None and not _is_watched():
            if grid[0] > 0:
                # what Triton's own launch does once it has found the compiled kernel
                run, function, metadata = compiled
                run(
                    *grid, torch._C._cuda_getCurrentRawStream(device.index), function, metadata,
                    None, None, None, *arguments,
                )  # fmt: skip
            return
        made = self.kernel[grid](*arguments, num_warps=self.num_warps)
        if _LAUNCHES_DIRECTLY and aligned and hasattr(made, "packed_metadata"):
            self.compiled[key] = (made.run, made.function, made.packed_metadata)


def _is_watched() -> bool:
    """Whether a profiler wants to be told of launches."""
    hook = triton.knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def is_aligned(*tensors: Tensor) -> bool:
    """Whether kernels may assume that these start at multiples of 16 bytes."""
    return all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors)


pack = Launcher(kernels._pack_fwd_kernel)
pack_all = Launcher(kernels._pack_all_fwd_kernel)
count = Launcher(kernels._count_fwd_kernel)
route = Launcher(kernels._route_fwd_kernel)
route_backward = Launcher(kernels._route_bwd_kernel)
scores = Launcher(few._scores_fwd_kernel)
chosen = Launcher(few._chosen_fwd_kernel)
down = Launcher(sparse._down_fwd_kernel)
down_backward = Launcher(sparse._down_bwd_kernel)
outer_backward = Launcher(sparse._outer_bwd_kernel)
decode = Launcher(few._decode_fwd_kernel, num_warps=1)
