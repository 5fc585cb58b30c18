"""A tiny random Llama with a byte tokenizer, two toy skills, and made-up results."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moelora.demo.results import (
    Contender,
    DemoResults,
    Sample,
    SkillSummary,
    TokenView,
    Usage,
)

TOY_SKILLS: dict[str, Callable[[str], str]] = {
    "backward": lambda word: word[::-1],
    "upper": str.upper,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte; padding is the end token, as in many real models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def tiny_llama() -> LlamaForCausalLM:
    """Two layers of random weights, in evaluation mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny_model(folder: Path) -> Path:
    tiny_tokenizer().save_pretrained(folder)
    tiny_llama().save_pretrained(folder)
    return folder


def save_toy_skills(folder: Path) -> Path:
    for name, answer in TOY_SKILLS.items():
        (folder / name).mkdir(parents=True)
        for split, size in (("train", 20), ("valid", 4)):
            draw = random.Random(f"{name} {split}")
            words = ["".join(draw.choices("abcdé", k=draw.randint(3, 6))) for _ in range(size)]
            write_examples(folder / name / f"{split}.jsonl", [(w, answer(w)) for w in words])
    return folder


def write_examples(path: Path, pairs: list[tuple[str, str]]) -> None:
    lines = [
        json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def made_up_results(*, nasty: str = "plain") -> DemoResults:
    """Results of two skills, two layers and three experts; ``nasty`` is in every foreign text."""
    skills = [f"a {nasty}", f"b {nasty}"]

    def losses(value: float) -> dict[str, float]:
        return dict(zip(skills, (value, value + 1.0), strict=True))

    usage = Usage(
        skills=[[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]],
        layers=[[0.4, 0.3, 0.3], [0.3, 0.3, 0.4]],
        shown=[f"model.layers.0.{nasty}", "model.layers.1.mlp.up_proj"],
        shown_skills=[[[0.9, 0.1, 0.0], [0.0, 0.1, 0.9]], [[0.4, 0.3, 0.3], [0.3, 0.3, 0.4]]],
        separations=[0.9, 0.1],
        mean_separation=0.5,
        shuffled_separation=0.05,
        tokens=[TokenView(name, [nasty, ""], [[[100, 0, 0], [40, 60, 0]]] * 2) for name in skills],
    )
    return DemoResults(
        settings={"model": nasty, "steps": 3, "experts": 3, "top_k": 2, "rank": 4},
        versions={"torch": nasty},
        skills=[SkillSummary(name, nasty, 20, 4, 1) for name in skills],
        contenders=[
            Contender("base", "frozen base", 0, losses(3.0), 0.0),
            Contender("lora", "one LoRA", 1000, losses(2.0), 1.5),
            Contender("mixture", f"mixture {nasty}", 3000, losses(1.9), 2.5),
        ],
        samples=[Sample(name, nasty, nasty, nasty, nasty) for name in skills],
        usage=usage,
        reload_difference=0.0,
        seconds={"train": 4.0},
    )
