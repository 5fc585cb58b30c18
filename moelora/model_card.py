"""What a mixture's model card says: how to load it, and what is in it."""

import re
from pathlib import Path

from huggingface_hub import ModelCard

from moelora.config import MoELoraConfig

_BEGIN = "<!-- moelora: begin -->"
_END = "<!-- moelora: end -->"


def add_to_model_card(folder: Path, mixtures: dict[str, MoELoraConfig]) -> None:
    """Put the section about mixtures first in ``README.md``, in place of an older one.

    Args:
        folder: where PEFT has just written its card.
        mixtures: the configs of the saved mixtures, by adapter name.
    """
    path = folder / "README.md"
    if not path.exists() or not mixtures:
        return
    card = ModelCard.load(path)
    before, _, rest = card.text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    card.text = f"{_BEGIN}\n{_section(mixtures)}\n{_END}\n\n{(before + after).strip()}\n"
    tags = [*(card.data.tags or []), "moelora", "mixture-of-experts"]
    card.data.tags = sorted(set(tags))
    card.save(path)


def _section(mixtures: dict[str, MoELoraConfig]) -> str:
    rows = [f"| {_code(name)} | {_experts(c)} | {_router(c)} |" for name, c in mixtures.items()]
    return "\n".join(
        [
            "**Load this adapter with moelora:** "
            "`pip install moelora`, then `import moelora` before `PeftModel.from_pretrained`.",
            "",
            "| adapter | experts | router |",
            "| --- | --- | --- |",
            *rows,
        ]
    )


def _experts(config: MoELoraConfig) -> str:
    told = f"{config.num_experts} LoRA experts of rank {config.r}"
    if config.expert_names is None:
        return told
    return f"{told}: {', '.join(map(_code, config.expert_names))}"


def _code(name: str) -> str:
    """A name as code in a table's cell: a fence longer than any in it, and bars escaped."""
    ticks = max(map(len, re.findall("`+", name)), default=0)
    fence, space = "`" * (ticks + 1), " " * bool(ticks)
    return f"{fence}{space}{' '.join(name.split())}{space}{fence}".replace("|", r"\|")


def _router(config: MoELoraConfig) -> str:
    if not config.use_moe_routing:
        return "none: always on"
    if not config.has_router:
        return "fixed weights"
    scope = {"module": "in every layer", "layer": "in every block", "model": "one for the model"}
    return f"{config.router_type}, {scope[config.router_scope]}, top {config.top_k_experts}"
