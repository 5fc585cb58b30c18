"""Which torch can trace a whole model of transformers."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version

#: With or without an adapter, transformers' models make a KV cache in the traced forward, from a
#: view of their config whose iteration torch 2.7 and 2.8 cannot trace. Torch 2.6 has no
#: torch.compiler.is_exporting, which transformers calls. A layer alone compiles there too.
needs_model_tracing = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"),
    reason=f"torch.compile of torch {torch.__version__} cannot trace a model of transformers 5",
)
