"""The page made from the architecture table's rows and columns."""

from __future__ import annotations

from pathlib import Path

from tests.architecture_table.bases import ARCHITECTURES
from tests.architecture_table.cases import COLUMNS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"

_HEAD = """# Base models

Generated from `tests/architecture_table` by `python -m tests.architecture_table`; every cell is a
test that runs with the others. Each base is built small from its config and gets a mixture of
four experts with the defaults of `MoELoraConfig` and `target_modules="all-linear"`: all linear
layers but the head. *Train* is three steps of AdamW; *save* and *reload* are `save_pretrained`
and `PeftModel.from_pretrained`; *generate* is held against a loop of forwards without a cache.

"""

_NOTES = """
- A classification head is trained and saved whole. PEFT sees to it with `task_type="SEQ_CLS"`;
  otherwise name it in `modules_to_save`, as for ViT here.
- PEFT's class for `task_type="SEQ_2_SEQ_LM"` passes `input_ids`, so Whisper and other models that
  read no text take no task type.
- The experts of Mixtral and its like are 3-D parameters in transformers 5, no linear layers, and
  their router is no linear layer either: a mixture adapts the attention around them. PEFT's
  `target_parameters`, which plain adapters have for them, cannot be routed and are refused.
- `router_scope="layer"` needs transformer blocks, `"model"` a `config.hidden_size`; with an
  encoder and a decoder, cross-attention reads other tokens than either router does. `"module"`,
  the default, needs none of these.
"""


def rows() -> list[list[str]]:
    """The cells of each row, its title first."""
    return [
        [architecture.title, *(column.says(architecture) for column in COLUMNS)]
        for architecture in ARCHITECTURES
    ]


def render() -> str:
    """The whole page."""
    titles = ["", *(column.title for column in COLUMNS)]
    lines = [titles, ["---"] * len(titles), *rows()]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{_HEAD}{table}{_NOTES}"
