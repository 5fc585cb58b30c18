"""QLoRA with a mixture: a base in 4 bits, eight experts on top, trained by transformers' Trainer.

    python examples/qlora.py --data lines.txt --out my-mixture

Runs on a GPU and, slowly, on a CPU. Needs `pip install moelora bitsandbytes accelerate`.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from moelora import MoELoraConfig

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


def load_base(name: str) -> PreTrainedModel:
    """The base in 4 bits, its quantisation constants quantised once more."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPE,
    )
    return AutoModelForCausalLM.from_pretrained(name, quantization_config=quantization, dtype=DTYPE)


def main() -> None:
    """Train, save, load again and write a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, type=Path, help="a text file, one example a line")
    parser.add_argument("--out", default="qlora-mixture")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = arguments.data.read_text(encoding="utf-8").splitlines()
    dataset = [tokenizer(line, truncation=True, max_length=512) for line in lines if line]

    # casts norms to float32 and switches gradient checkpointing on
    base = prepare_model_for_kbit_training(
        load_base(arguments.model), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    config = MoELoraConfig(
        num_experts=8, top_k_experts=2, r=8, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    training = TrainingArguments(
        arguments.out,
        max_steps=arguments.steps,
        learning_rate=2e-3,
        use_cpu=not torch.cuda.is_available(),
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model, training, train_dataset=dataset, data_collator=collator).train()
    model.save_pretrained(arguments.out)

    model = PeftModel.from_pretrained(load_base(arguments.model), arguments.out).eval()
    prompt = tokenizer(lines[0][:20], return_tensors="pt").to(model.device)
    written = model.generate(**prompt, max_new_tokens=20, pad_token_id=tokenizer.pad_token_id)
    print(tokenizer.decode(written[0]))


if __name__ == "__main__":
    main()
