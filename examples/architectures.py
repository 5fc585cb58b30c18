"""One call for any model: a decoder, an encoder-decoder, an image classifier, a plain nn.Module.

    python examples/architectures.py

Each is built small and gets a mixture of four experts over all its linear layers; three steps,
saved, loaded into a fresh base, and asked again. Offline, seconds on a CPU.
"""

import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from moelora import MoELoraConfig

torch.manual_seed(0)
WORDS = torch.randint(1, 64, (4, 8))
CLASSES = torch.arange(4) % 2
GPT2 = tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
Batch = dict[str, Tensor]
#: How each base is made, a batch for it, and what else its config says.
BASES: dict[str, tuple[Callable[[], nn.Module], Batch, dict[str, object]]] = {
    "GPT-2": (
        lambda: tf.GPT2LMHeadModel(GPT2),
        {"input_ids": WORDS, "labels": WORDS},
        {"task_type": "CAUSAL_LM"},
    ),
    "T5": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, decoder_start_token_id=0)),
        {"input_ids": WORDS, "labels": WORDS.flip(1)},
        {"task_type": "SEQ_2_SEQ_LM"},
    ),
    # its head is trained too, and saved whole
    "ViT": (
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**VIT, patch_size=8, num_labels=2)),
        {"pixel_values": torch.randn(4, 3, 16, 16), "labels": CLASSES},
        {"modules_to_save": ["classifier"]},
    ),
    "a plain nn.Module": (
        lambda: nn.Sequential(nn.Linear(5, 32), nn.GELU(), nn.Linear(32, 2)),
        {"input": torch.randn(4, 5), "labels": CLASSES},
        {},
    ),
}


def ask(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The model's loss and its logits; a model of nobody's has no loss of its own."""
    if "input" not in batch:
        output = model(**batch)
        return output.loss, output.logits
    logits = model(batch["input"])
    return F.cross_entropy(logits, batch["labels"]), logits


if __name__ == "__main__":
    for name, (make, batch, fields) in BASES.items():
        torch.manual_seed(0)
        config = MoELoraConfig(r=4, num_experts=4, target_modules="all-linear", **fields)
        model = get_peft_model(make(), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        before, _ = ask(model.eval(), batch)
        for _ in range(3):
            ask(model.train(), batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            torch.manual_seed(0)
            again = PeftModel.from_pretrained(make(), folder).eval()
        loss, logits = ask(model.eval(), batch)
        same = torch.equal(ask(again, batch)[1], logits)
        print(f"{name}: loss {before:.3f} -> {loss:.3f}; reloaded {'bit-equal' if same else '!='}")
