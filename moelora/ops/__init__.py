"""The arithmetic of a mixture, knowing neither PEFT nor routers.

``lora_combine_reference`` is the definition of correct (plain loops); ``lora_combine`` computes the
same by PyTorch products in rank space.
"""

from moelora.ops.eager import lora_combine, mix_ranks
from moelora.ops.reference import lora_combine_reference

__all__ = ["lora_combine", "lora_combine_reference", "mix_ranks"]
