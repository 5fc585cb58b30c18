"""What a number depends on besides the code: machine, driver, libraries, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
_LIBRARIES = ("torch", "triton", "peft", "transformers", "accelerate", "numpy")


def environment(device: torch.device, *, commit: str | None = None) -> dict[str, Any]:
    """Describe this machine and this checkout.

    Args:
        device: what is measured on.
        commit: the commit, where the files were copied without their repository.
    """
    return {
        "device": _device_name(device),
        "driver": _driver(device),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        **_commit(commit),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(given: str | None) -> dict[str, Any]:
    """The commit, and whether files differ from it; those that are measured, not the results."""
    found = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if given is not None or found is None:
        return {"commit": given or found or "unknown", "dirty": None}
    paths = ["moelora", "benchmarks/*.py"]
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", *paths)
    return {"commit": found, "dirty": bool(changed)}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603 - fixed words
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
