"""The arithmetic of a mixture, knowing neither PEFT nor router modules.

``reference`` defines what is right (plain loops). ``eager`` computes the same by PyTorch products
in rank space, ``fused`` and ``routed`` together with the frozen layer they adapt;
``triton_kernels`` do the routing on a GPU, in a trace as the operators of ``traced``.
``backend.explain`` says which of them runs.
"""

from moelora.ops.backend import Choice, explain
from moelora.ops.eager import lora_combine, mix_ranks
from moelora.ops.fused import combine_linear
from moelora.ops.options import Member, RoutedOutput, RouterOptions
from moelora.ops.reference import lora_combine_reference, routed_linear_reference
from moelora.ops.routed import routed_linear, routed_linears, routed_linears_inference

__all__ = [
    "Choice",
    "Member",
    "RoutedOutput",
    "RouterOptions",
    "combine_linear",
    "explain",
    "lora_combine",
    "lora_combine_reference",
    "mix_ranks",
    "routed_linear",
    "routed_linear_reference",
    "routed_linears",
    "routed_linears_inference",
]
