"""A small real tokenizer, made here: one token per word, as many as the tiny models know."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.lm import VOCABULARY

#: Prompts of one, three and six words.
PROMPTS = ["w7", "w3 w11 w5", "w9 w2 w30 w41 w8 w60"]


def word_tokenizer(side: str = "left") -> PreTrainedTokenizerFast:
    """Words ``w1`` to ``w60``; padding is token 0."""
    vocabulary = {"<pad>": 0, **{f"w{number}": number for number in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>", padding_side=side
    )
