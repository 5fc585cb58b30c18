"""A base model and tokenizer for the examples: by name or folder, or tiny, untrained, offline."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{number}" for number in range(61)]


def load(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of that name or folder; for None two blocks of 16 features that know 61 words."""
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(name), tokenizer
    pad, eos, unknown = special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token=eos, unk_token=unknown
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config), tokenizer


def counting(start: int, length: int) -> str:
    """Words that count up, as something to learn for a model that knows nothing."""
    return "".join(f" {WORDS[(start + step) % len(WORDS)]}" for step in range(length))
