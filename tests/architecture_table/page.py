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
- With `task_type="TOKEN_CLS"` or `"QUESTION_ANS"`, and for DistilBERT's `"SEQ_CLS"`, PEFT's
  `"all-linear"` takes the head along that it also saves whole, and fails (plain adapters too):
  name the modules. So with Llama 4's router, which is a linear layer that returns a tuple; PEFT
  itself refuses the output projections of Mamba and Mamba 2.
- Linears whose module is not called, but whose weight is read (`dt_proj` of Jamba, the output of
  `nn.MultiheadAttention` in SigLIP's head), are not routed, as they get nothing from any adapter.
- `router_scope="layer"` needs transformer blocks, `"model"` a `config.hidden_size`; with an
  encoder and a decoder, cross-attention reads other tokens than either router does. `kv_b_proj` of
  multi-head latent attention (DeepSeek) reads the whole cache at each step, which only its own
  router can serve: others are refused in generation with a cache. `"module"`, the default, needs
  none of these.

## Tried once, not in every test run

By a script, each built small from its config, with `router_scope="module"`: three steps, saved and
reloaded to the bit, greedy decoding and beams with a cache equal to those without. Qwen 2, OPT
(also with projected embeddings), Falcon (rotary and ALiBi), BLOOM, MPT, Phi-3, Gemma 1 and 2,
GPT-J, GPT-Neo, GPT-BigCode, CodeGen, StableLM, StarCoder 2, Cohere, OLMo 2, Granite, GLM, SmolLM
3, DeepSeek V2 and V3, Qwen 2 and 3 MoE, gpt-oss,
Qwen 3 Next, Jamba, RecurrentGemma; BART,
Pegasus, mBART, Marian, mT5, Speech2Text; LLaVA and Gemma 3 with images, ViT with GPT-2. Without
generation: RoBERTa, XLM-R, ELECTRA, DeBERTa 2, ModernBERT, ALBERT, DistilBERT, GPT-2, Llama, Qwen 2
and Mistral as classifiers of texts, of tokens and of answers and as feature extractors; CLIP,
SigLIP, DINOv2, Swin, BEiT, ConvNeXt, wav2vec 2, and ResNet's convolutions (whose batch norms the
training itself changes, so that only a base with the same statistics gives the same bits).
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
