"""A mixture in transformers' Trainer: router statistics in TensorBoard, a rate for the routers.

    python examples/trainer.py --steps 20

Runs offline on a tiny model; `--model NAME --data lines.txt` takes a real one. Look at the routers
with `tensorboard --logdir trainer-mixture`. Needs `pip install moelora accelerate tensorboard`.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from small_model import counting, load
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from moelora import MoELoraConfig, MoEOptimizer, MoETrainerCallback


def main() -> None:
    """Train, evaluate, save and load again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model's name or folder; a tiny one is made without")
    parser.add_argument("--data", type=Path, help="a text file, one example a line")
    parser.add_argument("--out", default="trainer-mixture")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    base, tokenizer = load(arguments.model)
    lines = [counting(start, 8 + start % 5) for start in range(64)]
    if arguments.data is not None:
        lines = arguments.data.read_text(encoding="utf-8").splitlines()
    encoded = [tokenizer(line, truncation=True, max_length=512) for line in lines if line]
    examples = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in encoded]
    held_out = max(1, len(examples) // 8)

    config = MoELoraConfig(
        num_experts=4, top_k_experts=2, r=8, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    training = TrainingArguments(
        arguments.out,
        max_steps=arguments.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=max(1, arguments.steps // 2),
        save_steps=max(1, arguments.steps // 2),
        save_total_limit=1,
        load_best_model_at_end=True,
        logging_steps=max(1, arguments.steps // 4),
        report_to="tensorboard",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model,
        training,
        train_dataset=examples[held_out:],
        eval_dataset=examples[:held_out],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[MoETrainerCallback()],
        optimizer_cls_and_kwargs=(MoEOptimizer, {"lr": 2e-3, "router_lr": 4e-3}),
    )
    trainer.train()
    print(f"eval_loss {trainer.evaluate()['eval_loss']:.4f}")
    model.save_pretrained(arguments.out)

    reloaded = PeftModel.from_pretrained(load(arguments.model)[0], arguments.out)
    number = reloaded.peft_config["default"].num_experts
    print(f"saved to {arguments.out}, loaded with {number} experts")


if __name__ == "__main__":
    main()
