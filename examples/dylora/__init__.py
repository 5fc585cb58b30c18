"""DyLoRA-MoE as a user of moelora: experts that come one by one, in one forward pass."""

from examples.dylora.model import DyLoRAMoE

__all__ = ["DyLoRAMoE"]
