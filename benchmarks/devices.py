"""Whose numbers they are: a figure of one device says nothing about another's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

Run = dict[str, Any]
#: What the aims were set for.
_AIMED_AT = "H100"


def device_of(run: Run) -> str:
    """The name of the GPU, or of the CPU."""
    name: str = run["environment"]["device"]
    return name


def is_cpu(run: Run) -> bool:
    """Whether a run is one of the CPU."""
    return run["environment"]["driver"] is None


def by_device(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by their device, in the order in which the devices come first.

    Example:
        >>> run = {"environment": {"device": "NVIDIA H200", "driver": "1.2"}}
        >>> list(by_device([run, run]))
        ['NVIDIA H200']
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(device_of(run), []).append(run)
    return found


def in_order(devices: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """The device that the aims were set for, other GPUs, CPUs; equal ones stay as they are."""

    def rank(device: str) -> tuple[bool, bool]:
        return is_cpu(devices[device][0]), _AIMED_AT not in device

    return {device: devices[device] for device in sorted(devices, key=rank)}


def said(text: str, device: str, devices: Collection[str]) -> str:
    """A text, with the device if there is more than one that it could be of."""
    return f"{text}, {device}" if len(devices) > 1 else text
